"""Data sets for the examples and benchmarks, from local files: images as `uint8`, of shape
`(number, height, width, channels)`; and the options of `train.py` and `evaluate.py` that
choose one. Nothing is downloaded: where a file is missing, the
error says where to get it. As a script, it packs a folder of images into one file, to train
on more than fit in memory:

    python examples/data.py img_align_celeba celeba.npy --size 64 --crop 140
"""

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8


Images = UInt8[np.ndarray, "number height width channels"]
Labels = UInt8[np.ndarray, " number"]

_debian = "/usr/share/datasets/fashion-mnist"
_where = {
    "MNIST": "Fetch it from storage.googleapis.com/cvdf-datasets/mnist.",
    "Fashion-MNIST": (
        "Install the Debian package dataset-fashion-mnist, or fetch it from "
        "github.com/zalandoresearch/fashion-mnist."
    ),
    "CIFAR-10": "Fetch cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html.",
}
# MD5 checksums of the published files, unpacked.
_published = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "Fashion-MNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "CIFAR-10": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
}


def rings(number: int = 12_800, seed: int = 0) -> Float[np.ndarray, "number 2"]:
    """The authors' two-dimensional toy data: five rings, scaled to unit variance."""
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
    from sklearn.datasets import load_digits

    # From levels 0 to 16, of which the largest becomes 255.
    pixels, _ = load_digits(return_X_y=True)
    return np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)


def digits_labels() -> Labels:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)[1].astype(np.uint8)


def mnist(directory: str | Path, train: bool = True, verify: bool = True) -> Images:
    """60,000 training or 10,000 test images of 28x28.

    **Arguments:**

    - `directory`: it holds `train-images-idx3-ubyte` or `t10k-images-idx3-ubyte`, with or
        without `.gz`.
    - `train`: whether to read the training images; otherwise, the test images.
    - `verify`: whether to refuse files other than the published ones.
    """
    return _idx("MNIST", directory, train, "images-idx3", verify)[..., None]


def mnist_labels(directory: str | Path, train: bool = True, verify: bool = True) -> Labels:
    return _idx("MNIST", directory, train, "labels-idx1", verify)


def fashion_mnist(
    directory: str | Path = _debian, train: bool = True, verify: bool = True
) -> Images:
    """As MNIST; by default from where the Debian package puts it."""
    return _idx("Fashion-MNIST", directory, train, "images-idx3", verify)[..., None]


def fashion_mnist_labels(
    directory: str | Path = _debian, train: bool = True, verify: bool = True
) -> Labels:
    return _idx("Fashion-MNIST", directory, train, "labels-idx1", verify)


def _idx(
    data: str, directory: str | Path, train: bool, kind: str, verify: bool
) -> np.ndarray:
    name = f"{'train' if train else 't10k'}-{kind}-ubyte"
    paths = [Path(directory, name), Path(directory, f"{name}.gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"There is no {paths[0]}. {_where[data]}")
    axes = int(kind[-1])
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        shape = np.frombuffer(content, ">i4", axes, offset=4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except Exception as error:
        raise ValueError(f"{path} is not a complete {kind} file: {error}.") from error
    if verify:
        _verify(data, path, name, content)
    return array


def _verify(data: str, path: str | Path, name: str, content: bytes) -> None:
    found, published = hashlib.md5(content).hexdigest(), _published[data][name]
    if found != published:
        raise ValueError(
            f"{path} is not the file that was published as {data}: its MD5 sum, unpacked, "
            f"is {found} and not {published}. {_where[data]} To read it anyway, pass "
            "`verify=False`."
        )


def cifar10(directory: str | Path, train: bool = True, verify: bool = True) -> Images:
    """50,000 training or 10,000 test images of 32x32.

    **Arguments:**

    - `directory`: `cifar-10-batches-py`, or the archive `cifar-10-python.tar.gz`.
    - `train`, `verify`: as in `mnist`.
    """
    images = _cifar10(directory, train, verify, b"data").reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def cifar10_labels(
    directory: str | Path, train: bool = True, verify: bool = True
) -> Labels:
    return _cifar10(directory, train, verify, b"labels").astype(np.uint8)


def _cifar10(path: str | Path, train: bool, verify: bool, field: bytes) -> np.ndarray:
    names = [f"data_batch_{n}" for n in range(1, 6)] if train else ["test_batch"]
    parts = []
    for name, content in _batches(Path(path), names):
        if verify:
            _verify("CIFAR-10", f"{name} in {path}", name, content)
        try:
            batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
            parts.append(np.asarray(batch[field]))
        except Exception as error:
            message = f"{name} in {path} is not a complete file: {error}."
            raise ValueError(message) from error
    return np.concatenate(parts)


def _batches(path: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    try:
        if path.is_dir():
            yield from ((name, (path / name).read_bytes()) for name in names)
            return
        # Decompressed completely first, as the checksum is at the end.
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes()))) as file:
            for name in names:
                member = file.extractfile(f"cifar-10-batches-py/{name}")
                yield name, b"" if member is None else member.read()
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        message = f"{path} is not complete: {error}. {_where['CIFAR-10']}"
        raise ValueError(message) from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays only, and executes no code in a file."""

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in (
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


_endings = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def folder(
    directory: str | Path,
    size: int | None = None,
    crop: int | None = None,
    channels: int = 3,
) -> Images:
    """All images in a directory and its subdirectories, sorted by name, upright and in
    8-bit sRGB; links are followed, hidden files left out. For CELEBA: `img_align_celeba`
    from mmlab.ie.cuhk.edu.hk/projects/CelebA.html.

    **Arguments:**

    - `directory`: a directory with PNG, JPEG, BMP or WebP files.
    - `size`: the height and width of the result; by default images are not resized, and
        must all have the same size.
    - `crop`: the side of the centre crop, before resizing: 140 for CELEBA.
    - `channels`: 3, where greyscale becomes three equal channels; or 1, where colours
        become their luma.

    **Raises:** `ValueError` that names an image that cannot be read, is smaller than
    `crop`, has another size than the first, or is not simply 8-bit sRGB or greyscale.
    """
    return np.stack(list(_read_all(_paths(directory), size, crop, channels)))


def pack_folder(
    directory: Path,
    path: Path,
    size: int | None = None,
    crop: int | None = None,
    channels: int = 3,
) -> UInt8[np.memmap, "number height width channels"]:
    """Write the images of `folder` to one file in NumPy's format, one by one.

    **Returns:** `packed(path)`. An error keeps an existing file.
    """
    paths = _paths(directory)
    images = _read_all(paths, size, crop, channels)
    first = next(images)
    partial = Path(f"{path}.partial")
    file = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(paths), *first.shape))
    try:
        file[0] = first
        for i, image in enumerate(images, start=1):
            file[i] = image
        file.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return packed(path)


def packed(path: str | Path) -> UInt8[np.memmap, "number height width channels"]:
    """Images in a file of `pack_folder` or `numpy.save`, read when they are needed."""
    try:
        images = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is not a complete file in NumPy's format: {error}. `python "
            "examples/data.py` writes one."
        ) from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{path} must hold images, (number, height, width, channels) of uint8; got "
            f"shape {images.shape} of {images.dtype}."
        )
    return images


def folder_labels(
    directory: str | Path, classes: Sequence[str] | None = None
) -> tuple[Int[np.ndarray, " number"], tuple[str, ...]]:
    """The class of each image of `folder`: the subdirectory that it is in.

    **Arguments:**

    - `directory`: a directory with one subdirectory per class.
    - `classes`: the names of the subdirectories, in the order of the labels; by default
        all with images, sorted. Pass those of the training data for other data.

    **Returns:** the labels, counted from 0, and the names of the classes.
    """
    parts = [path.relative_to(directory).parts for path in _paths(directory)]
    if outside := [names[0] for names in parts if len(names) == 1]:
        raise ValueError(
            f"{outside[0]} is not in a subdirectory of {directory}, so it has no class."
        )
    found = {names[0] for names in parts}
    classes = tuple(sorted(found) if classes is None else classes)
    if unknown := sorted(found - set(classes)):
        raise ValueError(
            f"{directory} has images in {', '.join(unknown)}, but the classes are "
            f"{', '.join(classes)}."
        )
    return np.array([classes.index(names[0]) for names in parts]), classes


def _paths(directory: str | Path) -> list[Path]:
    paths = []
    for where, folders, names in os.walk(directory, followlinks=True):
        # Without hidden files, and without previews that macOS and servers put there.
        visible = lambda name: not name.startswith((".", "__MACOSX", "@eaDir"))
        folders[:] = filter(visible, folders)
        paths += [Path(where, name) for name in filter(visible, names)]
    if not (paths := sorted(p for p in paths if p.suffix.lower() in _endings)):
        what = "holds no images" if Path(directory).is_dir() else "is not a directory"
        raise ValueError(f"{directory} {what}. Images end in {', '.join(_endings)}.")
    return paths


def _read_all(
    paths: list[Path], size: int | None, crop: int | None, channels: int
) -> Iterator[UInt8[np.ndarray, "height width channels"]]:
    shape = None
    for path in paths:
        image = _read(path)
        if crop is not None:
            if crop > min(image.size):
                raise ValueError(
                    f"{path} has {image.width}x{image.height} pixels, of which `crop` "
                    f"cannot keep {crop}x{crop}. Use a smaller `crop`."
                )
            left, top = (image.width - crop) // 2, (image.height - crop) // 2
            image = image.crop((left, top, left + crop, top + crop))
        if size is not None:
            image = image.resize((size, size), resample=2)  # Bilinear.
        array = np.asarray(image if channels == 3 else image.convert("L"))
        array = array.reshape(image.height, image.width, channels)
        shape = array.shape if shape is None else shape
        if array.shape != shape:
            raise ValueError(
                f"{path} has {image.width}x{image.height} pixels, but {paths[0]} has "
                f"{shape[1]}x{shape[0]}. Pass a `size`."
            )
        yield array


def _read(path: Path):
    """A Pillow image of mode RGB, upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow raises many exceptions for damaged files.
        raise ValueError(f"{path} is not a complete image: {error}.") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            raise ValueError(f"{path} is transparent. Composite it onto a background.")
    profile = image.info.get("icc_profile", b"sRGB").replace(b"\0", b"")
    if image.mode not in ("1", "L", "P", "RGB", "RGBA") or b"sRGB" not in profile:
        raise ValueError(
            f"{path} is not in 8-bit sRGB or greyscale, but in Pillow's mode {image.mode}, "
            "or has another colour profile. Convert it."
        )
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the data are read from."""

    name: Literal[
        "rings", "digits", "mnist", "fashion_mnist", "cifar10", "folder", "packed"
    ]
    directory: Path | None = None
    """The location of its files. Not needed for rings and digits. For `packed`, a file that
    `examples/data.py` wrote, for more images than fit in memory."""
    verify: bool = True  # Verify the files against their published checksums.
    size: int | None = None
    """For a folder of images: the size to resize them to. For packed images: their size,
    which is checked."""
    crop: int | None = None
    """For a folder of images: the size of a centre crop before resizing; CELEBA: 140.
    Packed images have been cropped before."""
    channels: Literal[1, 3] | None = None
    """For a folder of images: 1 to read them as greyscale; 3 by default. For packed images:
    the number of their channels, which is checked."""
    held_out: float | None = None
    """For a folder of images: the share that training leaves out, for evaluation; 0.1 by
    default, or 0 with `test`."""
    test: Path | None = None
    """A second folder, or packed file, of images that are held out."""


OWN = ("folder", "packed")  # Images of one's own.

_CLASSES = {
    "fashion_mnist": (
        "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split()
    ),
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
}


def check_source(data: Source) -> None:
    own = (data.size, data.crop, data.channels, data.held_out, data.test)
    if data.name not in OWN and own != (None,) * 5:
        raise ValueError(
            "`--data.size`, `--data.crop`, `--data.channels`, `--data.held-out` and "
            f"`--data.test` are for a folder, not for {data.name}."
        )
    if data.name in ("rings", "digits", *OWN) and not data.verify:
        raise ValueError(f"{data.name} is not verified: leave out `--data.no-verify`.")
    if data.name in ("rings", "digits") and data.directory is not None:
        raise ValueError(
            f"{data.name} is not read from files: leave out `--data.directory`."
        )
    if data.directory is None and data.name not in ("rings", "digits", "fashion_mnist"):
        raise ValueError(f"{data.name} is read from files: give `--data.directory`.")
    if not 0 <= (data.held_out or 0) < 1:
        raise ValueError(f"`--data.held-out` must be in [0, 1); got {data.held_out}.")
    if data.held_out and (data.test is not None or data.name == "packed"):
        raise ValueError(
            "`--data.held-out` is for a folder without `--data.test`. For packed images, "
            "pack a second folder: `--data.test`."
        )
    if data.test is not None and data.directory is not None:
        if data.test.resolve().is_relative_to(data.directory.resolve()):
            raise ValueError(
                f"`--data.test` {data.test} must not be in `--data.directory` "
                f"{data.directory}: it would be trained on. Move it beside it."
            )


def has_test(data: Source) -> bool:
    """Whether there are images that training leaves out."""
    if data.name in OWN:
        return data.test is not None or (data.name == "folder" and data.held_out != 0)
    return data.name not in ("rings", "digits")


def load(data: Source, train: bool = True) -> np.ndarray:
    check_source(data)
    if not (train or has_test(data)):
        raise ValueError(f"{data.name} has no test set.")
    if data.name in ("rings", "digits"):
        return globals()[data.name]()
    if data.name not in OWN:
        directory = {} if data.directory is None else {"directory": data.directory}
        read = globals()[data.name]
        return read(train=train, verify=data.verify, **directory)
    directory = data.directory if train or data.test is None else data.test
    assert directory is not None
    if data.name == "folder":
        images = folder(directory, data.size, data.crop, data.channels or 3)
        return part_of(images, data, train)
    images = packed(directory)
    if data.size is not None and images.shape[1:3] != (data.size, data.size):
        raise ValueError(
            f"{directory} holds images of {images.shape[1]} x {images.shape[2]}, "
            f"and `--data.size` is {data.size}: pack them with this size."
        )
    if data.channels not in (None, images.shape[3]):
        raise ValueError(
            f"{directory} holds images of {images.shape[3]} channels, and "
            f"`--data.channels` is {data.channels}: pack them with `channels`."
        )
    return images


def part_of(values: np.ndarray, data: Source, train: bool) -> np.ndarray:
    """What belongs to the images of a folder for training, or to those held out: of equally
    many consecutive ones, one each, at random."""
    if data.test is not None or data.held_out == 0:
        return values
    share = 0.1 if data.held_out is None else data.held_out
    number = len(values)
    held_out = min(max(round(share * number), 1), number - 1)
    edges = np.linspace(0, number, held_out + 1).astype(int)
    chosen = np.zeros(number, bool)
    chosen[np.random.default_rng(0).integers(edges[:-1], edges[1:])] = True
    return values[~chosen if train else chosen]


def load_labels(
    data: Source, train: bool = True, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels, and the names of the classes. For a folder, `classes` are those of a
    model, by default its own."""
    if data.name in ("rings", "packed"):
        raise ValueError(f"The data {data.name!r} have no labels.")
    if data.name == "digits":
        return digits_labels(), tuple(map(str, range(10)))
    if data.name == "folder":
        assert data.directory is not None
        labels, found = folder_labels(data.directory, classes)
        if not train and data.test is not None:
            return folder_labels(data.test, found)
        labels = part_of(labels, data, train)
        if train and classes is None and len(np.unique(labels)) < len(found):
            (first, *_) = (name for n, name in enumerate(found) if n not in labels)
            raise ValueError(
                f"All images of the class {first} are held out. Give it more, or "
                "`--data.held-out 0`."
            )
        return labels, found
    directory = {} if data.directory is None else {"directory": data.directory}
    read = globals()[f"{data.name}_labels"]
    names = _CLASSES.get(data.name, map(str, range(10)))
    return read(train=train, verify=data.verify, **directory), tuple(names)


def standard_deviation(data: np.ndarray) -> float:
    """The standard deviation of the data as the model sees them."""
    # In parts, as the data may be larger than memory.
    sums = np.zeros(2)
    for part in np.array_split(data, max(1, len(data) // 1000)):
        part = np.asarray(part, np.float64)
        sums += part.sum(), (part**2).sum()
    mean, square = sums / data.size
    std = max(square - mean**2, 0.0) ** 0.5
    return std / (127.5 if data.dtype == np.uint8 else 1)


if __name__ == "__main__":
    import tyro

    tyro.cli(pack_folder)
