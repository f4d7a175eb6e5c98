"""Data sets in local files, as arrays of `uint8`, `(number, height, width, channels)`.

Nothing is downloaded: where a file is missing, the error says where to get it.
"""

import gzip
import io
import pickle
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8


Images = UInt8[np.ndarray, "number height width channels"]

_image_endings = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def rings(number: int = 12_800, seed: int = 0) -> Float[np.ndarray, "number 2"]:
    """The authors' points in the plane: five rings, scaled to unit variance."""
    random = np.random.default_rng(seed)
    centres = np.array([[-3.5, 1.5], [0, 1.5], [3.5, 1.5], [-2.1, -1.5], [2.1, -1.5]]) / 2
    angle = random.uniform(0, 2 * np.pi, number)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points += centres[random.integers(5, size=number)]
    points += 0.01 * 0.2**0.5 * random.normal(size=points.shape)
    points -= points.mean(axis=0)
    return (points / points.std(axis=0)).astype(np.float32)


def digits() -> Images:
    """1,797 scans of handwritten digits, 8x8, which come with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: install it.") from error
    pixels, _ = load_digits(return_X_y=True)
    # From levels 0 to 16, such that the greatest stays the greatest.
    return np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)


def fashion_mnist(
    directory: str | Path = "/usr/share/datasets/fashion-mnist", train: bool = True
) -> Images:
    """Fashion-MNIST, or MNIST, in its own format: 60,000 images of 28x28, or 10,000.

    **Arguments:**

    - `directory`: that holds `train-images-idx3-ubyte` or `t10k-images-idx3-ubyte`, with
        or without `.gz`. By default where Debian's package `dataset-fashion-mnist` has
        it.
    - `train`: whether to read the images for training.

    **Raises:** `ValueError` for a file that is missing, cut or of another kind.
    """
    name = f"{'train' if train else 't10k'}-images-idx3-ubyte"
    path = _found(
        directory,
        (name, f"{name}.gz"),
        "Install the Debian package dataset-fashion-mnist, or fetch it from "
        "github.com/zalandoresearch/fashion-mnist.",
    )
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        kind, *shape = struct.unpack(">iiii", content[:16])
        if kind != 2051:
            raise ValueError(f"it begins with {kind}, not with 2051")
        return np.frombuffer(content, np.uint8, offset=16).reshape(*shape, 1)
    except (ValueError, EOFError, OSError, struct.error) as error:
        raise ValueError(f"{path} is not a whole file of images: {error}.") from error


_harmless = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays, and runs nothing that a file might hold instead."""

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in _harmless:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def cifar10(directory: str | Path, train: bool = True) -> Images:
    """CIFAR-10: 50,000 images of 32x32, or 10,000.

    **Arguments:**

    - `directory`: `cifar-10-batches-py`, unpacked.
    - `train`: whether to read the images for training.

    **Raises:** `ValueError` for a file that is missing, cut or of another kind.
    """
    names = [f"data_batch_{n}" for n in range(1, 6)] if train else ["test_batch"]
    parts = []
    for name in names:
        where = "Fetch cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html."
        path = _found(directory, (name,), where)
        try:
            content = io.BytesIO(path.read_bytes())
            data = _ArraysOnly(content, encoding="bytes").load()[b"data"]
            parts.append(data.astype(np.uint8).reshape(-1, 3, 32, 32))
        except Exception as error:
            raise ValueError(f"{path} is not a whole file of images: {error}.") from error
    return np.ascontiguousarray(np.concatenate(parts).transpose(0, 2, 3, 1))


def folder(
    directory: str | Path, size: int | None = None, crop: int | None = None
) -> Images:
    """All images in a directory and those within it, in the order of their names.

    **Arguments:**

    - `directory`: with PNG, JPEG, BMP or WebP files.
    - `size`: of the result; without it, all images must be of one size already.
    - `crop`: how much of the centre to keep before: 140 for CELEBA.

    **Raises:** `ValueError` if there are none, for images of several sizes, and for one
    that cannot be read. Needs Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("To read images, install Pillow.") from error
    directory = Path(directory)
    paths = sorted(
        path for path in directory.rglob("*") if path.suffix.lower() in _image_endings
    )
    if not paths:
        what = "holds no images" if directory.is_dir() else "is no directory"
        raise ValueError(f"{directory} {what}. Images end in {', '.join(_image_endings)}.")
    images = []
    for path in paths:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} is not a whole image: {error}.") from error
        if crop is not None:
            left, top = (image.width - crop) // 2, (image.height - crop) // 2
            image = image.crop((left, top, left + crop, top + crop))
        if size is not None:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{path} is of {image.width}x{image.height} pixels, but {paths[0]} is of "
                f"{images[0].shape[1]}x{images[0].shape[0]}. Give a `size`."
            )
    return np.stack(images)


def _found(directory: str | Path, names: tuple[str, ...], where: str) -> Path:
    for name in names:
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    raise ValueError(f"There is no {names[0]} in {directory}. {where}")
