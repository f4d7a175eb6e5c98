"""Data sets from local files, as arrays of `uint8`, `(number, height, width, channels)`.

Nothing is downloaded: where a file is missing, the error says where to get it.
"""

import gzip
import hashlib
import io
import itertools
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, Int, UInt8

from ._misc import check_count, show, write_whole
from ._read_image import read_image


Images = UInt8[np.ndarray, "number height width channels"]
Labels = UInt8[np.ndarray, " number"]

_image_endings = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

# What macOS, Windows, Linux and network drives put beside data; in lower case.
_system_names = frozenset(
    "__macosx @eadir @recycle @tmp #recycle #snapshot $recycle.bin lost+found "
    "__pycache__".split()
) | {"system volume information"}


def rings(number: int = 12_800, seed: int = 0) -> Float[np.ndarray, "number 2"]:
    """The authors' two-dimensional toy data: five rings, scaled to unit variance.

    **Arguments:**

    - `number`: the number of points.
    - `seed`: the seed of NumPy's random numbers.

    **Returns:** the points, `(number, 2)`, in single precision.
    """
    check_count("number", number)
    check_count("seed", seed, least=0)
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
    # From levels 0 to 16, of which the largest becomes 255.
    return np.round(_digits()[0] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)


def digits_labels() -> Labels:
    """The digit on each image of [`gddim_eqx.datasets.digits`][]."""
    return _digits()[1].astype(np.uint8)


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: install it.") from error
    return load_digits(return_X_y=True)


_debian = "/usr/share/datasets/fashion-mnist"  # Where the package puts it.

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


def mnist(directory: str | Path, train: bool = True, verify: bool = True) -> Images:
    """MNIST, in its original format: 60,000 training or 10,000 test images of 28x28.

    **Arguments:**

    - `directory`: the directory that holds `train-images-idx3-ubyte` or
        `t10k-images-idx3-ubyte`, with or without `.gz`.
    - `train`: whether to read the training images; otherwise, the test images.
    - `verify`: whether to refuse files other than the published ones.

    **Raises:** `ValueError` for a file that is missing, truncated, or not the expected one.
    """
    return _idx("MNIST", directory, train, "images-idx3", verify)[..., None]


def fashion_mnist(
    directory: str | Path = _debian, train: bool = True, verify: bool = True
) -> Images:
    """Fashion-MNIST, in MNIST's format: 60,000 training or 10,000 test images of 28x28.

    **Arguments:** as in [`gddim_eqx.datasets.mnist`][], except that `directory` is by
    default where Debian's package `dataset-fashion-mnist` puts it.
    """
    return _idx("Fashion-MNIST", directory, train, "images-idx3", verify)[..., None]


def mnist_labels(directory: str | Path, train: bool = True, verify: bool = True) -> Labels:
    """The digit on each image of [`gddim_eqx.datasets.mnist`][]. Arguments as there."""
    return _idx("MNIST", directory, train, "labels-idx1", verify)


def fashion_mnist_labels(
    directory: str | Path = _debian, train: bool = True, verify: bool = True
) -> Labels:
    """The class of each image of [`gddim_eqx.datasets.fashion_mnist`][], from 0 to 9.
    Arguments as there."""
    return _idx("Fashion-MNIST", directory, train, "labels-idx1", verify)


def _idx(
    data: str, directory: str | Path, train: bool, kind: str, verify: bool
) -> np.ndarray:
    name = f"{'train' if train else 't10k'}-{kind}-ubyte"
    path = _found(directory, (name, f"{name}.gz"), _where[data])
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        magic, number_axes = content[:4], int(kind[-1])
        if magic != bytes([0, 0, 8, number_axes]):
            raise ValueError(f"it begins with {magic!r}")
        header = 4 + 4 * number_axes
        shape = struct.unpack(f">{number_axes}i", content[4:header])
        if min(shape) < 0:
            raise ValueError(f"it says that its shape is {shape}")
        images = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    except (ValueError, EOFError, OSError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is not a complete {kind} file: {error}.") from error
    if verify:
        _verify(data, path, name, content)
    return images


def _verify(data: str, path: Path | str, name: str, content: bytes) -> None:
    found, wanted = hashlib.md5(content).hexdigest(), _published[data][name]
    if found != wanted:
        raise ValueError(
            f"{path} is not the file that was published as {data}: its MD5 sum, unpacked, "
            f"is {found} and not {wanted}. {_where[data]} To read it anyway, pass "
            "`verify=False`."
        )


_harmless = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays only, and executes no code in a file."""

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in _harmless:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def cifar10(directory: str | Path, train: bool = True, verify: bool = True) -> Images:
    """CIFAR-10, in its Python version: 50,000 training or 10,000 test images of 32x32.

    **Arguments:**

    - `directory`: `cifar-10-batches-py`, or the archive it is in,
        `cifar-10-python.tar.gz`.
    - `train`: whether to read the training images; otherwise, the test images.
    - `verify`: whether to refuse files other than the published ones.

    **Raises:** `ValueError` for a file that is missing, truncated, or not the expected one.
    """
    images = _cifar10(directory, train, verify, b"data", (-1, 3, 32, 32))
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def cifar10_labels(
    directory: str | Path, train: bool = True, verify: bool = True
) -> Labels:
    """The class of each image of [`gddim_eqx.datasets.cifar10`][], from 0 to 9.
    Arguments as there."""
    return _cifar10(directory, train, verify, b"labels", (-1,))


def _cifar10(directory, train, verify, field, shape) -> np.ndarray:
    """A field of all files."""
    path = Path(directory)
    names = [f"data_batch_{n}" for n in range(1, 6)] if train else ["test_batch"]
    parts = []
    archive = None
    if path.is_file():
        try:
            # Decompressed completely first, as the checksum is at the end.
            content = gzip.decompress(path.read_bytes())
            archive = tarfile.open(fileobj=io.BytesIO(content))
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete archive: {error}.") from error
    for name in names:
        where, content = _batch(path, archive, name)
        if verify:
            _verify("CIFAR-10", where, name, content)
        try:
            found = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
            data = np.asarray(found[field], np.uint8 if field == b"labels" else None)
            if data.dtype != np.uint8:
                raise ValueError(f"it holds {data.dtype}")
            parts.append(data.reshape(shape))
        except Exception as error:
            raise ValueError(f"{where} is not a complete file: {error}.") from error
    return np.concatenate(parts)


def _batch(path: Path, archive: tarfile.TarFile | None, name: str) -> tuple[str, bytes]:
    if archive is None:
        where = _found(path, (name,), _where["CIFAR-10"])
        return str(where), where.read_bytes()
    member, where = f"cifar-10-batches-py/{name}", f"{name} in {path}"
    try:
        file = archive.extractfile(member)
        if file is None:
            raise KeyError(f"{member} is not a file")
        return where, file.read()
    except KeyError as error:
        message = f"There is no {member} in {path}. {_where['CIFAR-10']}"
        raise ValueError(message) from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a complete archive: {error}.") from error


def folder(
    directory: str | Path,
    size: int | None = None,
    crop: int | None = None,
    channels: int = 3,
) -> Images:
    """All images in a directory and its subdirectories, sorted by name. For CELEBA:
    `img_align_celeba` from mmlab.ie.cuhk.edu.hk/projects/CelebA.html.

    Links are followed. Hidden files and directories, whose names begin with a dot, and
    those of operating systems, such as `__MACOSX` and `@eaDir`, are left out.

    They are converted to 8-bit RGB, where greyscale becomes three equal channels, or with
    `channels=1` to 8-bit greyscale. 16-bit levels are divided by 257 and rounded down,
    images are rotated according to EXIF, and colours with an ICC profile are converted to
    sRGB.

    **Arguments:**

    - `directory`: a directory with PNG, JPEG, BMP or WebP files.
    - `size`: the height and width of the result; by default images are not resized, and
        must all have the same size.
    - `crop`: the side of the centre crop, before resizing: 140 for CELEBA.
    - `channels`: 3 for colours; 1 for greyscale, where colours become their luma.

    **Raises:** `ValueError` if there are no images, for images of different sizes, for a
    broken link, and for an image that is smaller than `crop`, cannot be read, or cannot be
    converted without guessing: with transparent pixels, several frames, 16-bit colours or
    levels without a known range. Needs Pillow.
    """
    return np.stack(list(_read_all(_image_paths(directory), size, crop, channels)))


def pack_folder(
    directory: str | Path,
    path: str | Path,
    size: int | None = None,
    crop: int | None = None,
    channels: int = 3,
) -> UInt8[np.memmap, "number height width channels"]:
    """Write all images of a directory to one file, for training on data sets larger than
    memory. Only one image is in memory at a time.

    !!! example

        ```python
        gd.datasets.pack_folder("img_align_celeba", "celeba.npy", size=64, crop=140)
        batches = gd.training.Batches(gd.datasets.packed("celeba.npy"), 128)
        ```

    **Arguments:**

    - `path`: the file to write, in NumPy's format: `images.npy`.
    - `directory`, `size`, `crop`, `channels`: as in [`gddim_eqx.datasets.folder`][], whose
        images and order these are.

    **Returns:** [`gddim_eqx.datasets.packed`][] of the file.

    **Raises:** `ValueError` as [`gddim_eqx.datasets.folder`][] does. An existing file is
    then kept.
    """
    path, paths = Path(path), _image_paths(directory)
    if path.suffix != ".npy":
        raise ValueError(f"`path` must end in .npy; got {path}.")
    images = _read_all(paths, size, crop, channels)
    first = next(images)

    def write(file: BinaryIO) -> None:
        header = {"descr": "|u1", "fortran_order": False}
        header["shape"] = (len(paths), *first.shape)
        np.lib.format.write_array_header_1_0(file, header)
        for image in itertools.chain([first], images):
            file.write(image.tobytes())

    write_whole(path, write)
    return packed(path)


def packed(path: str | Path) -> UInt8[np.memmap, "number height width channels"]:
    """Images in a file of [`gddim_eqx.datasets.pack_folder`][], or of `numpy.save`, as a
    memory map: they are read when they are needed.

    **Arguments:**

    - `path`: the path of the file.

    **Returns:** the images, `(number, height, width, channels)`.

    **Raises:** `ValueError` for a file that is missing, truncated, or holds no images.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. `pack_folder` writes one.")
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is not a complete file in NumPy's format: {error}. Write it again, "
            "by `pack_folder`."
        ) from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{path} must hold images, (number, height, width, channels) of uint8; got "
            f"shape {images.shape} of {images.dtype}."
        )
    return images


def _read_all(
    paths: list[Path], size: int | None, crop: int | None, channels: int
) -> Iterator[UInt8[np.ndarray, "height width channels"]]:
    for name, value in (("size", size), ("crop", crop)):
        if value is not None:
            check_count(name, value)
    if channels not in (1, 3):
        raise ValueError(
            f"`channels` must be 1, for greyscale, or 3; got {show(channels)}."
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("To read images, install Pillow.") from error
    shape = None
    for path in paths:
        image = read_image(path)
        if crop is not None:
            if crop > min(image.size):
                raise ValueError(
                    f"{path} has {image.width}x{image.height} pixels, of which `crop` "
                    f"cannot keep {crop}x{crop}. Use a smaller `crop`."
                )
            left, top = (image.width - crop) // 2, (image.height - crop) // 2
            image = image.crop((left, top, left + crop, top + crop))
        if size is not None:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        image = image if channels == 3 else image.convert("L")
        found = np.asarray(image).reshape(image.height, image.width, channels)
        shape = found.shape if shape is None else shape
        if found.shape != shape:
            raise ValueError(
                f"{path} has {image.width}x{image.height} pixels, but {paths[0]} has "
                f"{shape[1]}x{shape[0]}. Pass a `size`."
            )
        yield found


def folder_labels(
    directory: str | Path, classes: Sequence[str] | None = None
) -> tuple[Int[np.ndarray, " number"], tuple[str, ...]]:
    """The class of each image of [`gddim_eqx.datasets.folder`][]: the subdirectory of
    `directory` that it is in.

    **Arguments:**

    - `directory`: a directory with one subdirectory per class.
    - `classes`: the names of the subdirectories, in the order of the labels; by default
        all, sorted. Pass those of the training data for other data, so that labels agree
        even if a class has no images there.

    **Returns:** the labels, counted from 0, and the names of the classes.

    **Raises:** `ValueError` for an image outside the subdirectories, or in one that is not
    among the `classes`; and, without `classes`, for a subdirectory that has no images.
    """
    parts = [path.relative_to(directory).parts for path in _image_paths(directory)]
    if outside := [names[0] for names in parts if len(names) == 1]:
        raise ValueError(
            f"{outside[0]} is not in a subdirectory of {directory}, so it has no class."
        )
    found = {names[0] for names in parts}
    if classes is None:
        classes = sorted(path.name for path in _visible(Path(directory)) if path.is_dir())
        if empty := [name for name in classes if name not in found]:
            raise ValueError(
                f"{directory} has no images in {', '.join(empty)}. Images end in "
                f"{', '.join(_image_endings)}. Remove what is no class; or pass `classes=` "
                "if the class is to have no images here."
            )
    classes = (classes,) if isinstance(classes, str) else tuple(classes)
    if len(set(classes)) < len(classes):
        raise ValueError(f"`classes` must be different names; got {classes}.")
    if unknown := sorted(found - set(classes)):
        raise ValueError(
            f"{directory} has images in {', '.join(unknown)}, but the classes are "
            f"{', '.join(classes)}."
        )
    return np.array([classes.index(names[0]) for names in parts]), classes


def _image_paths(directory: str | Path) -> list[Path]:
    directory = Path(directory)
    files = _files(directory) if directory.is_dir() else ()
    paths = sorted(path for path in files if path.suffix.lower() in _image_endings)
    if not paths:
        what = "holds no images" if directory.is_dir() else "is not a directory"
        raise ValueError(f"{directory} {what}. Images end in {', '.join(_image_endings)}.")
    return paths


def _visible(directory: Path) -> Iterator[Path]:
    """What is in a directory, without hidden files and those of operating systems."""
    for path in directory.iterdir():
        if not (path.name.startswith(".") or path.name.lower() in _system_names):
            yield path


def _files(directory: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files in a directory and its subdirectories, except those."""
    # `Path.rglob` follows links to directories in no version of Python by default.
    within = *above, directory.resolve()
    if within[-1] in above:
        raise ValueError(f"{directory} is a link to a directory that it is in. Remove it.")
    for path in _visible(directory):
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from _files(path, within)
        elif path.is_symlink():
            raise ValueError(
                f"{path} is a broken link, to {path.readlink()}. Restore what it links to, "
                "or remove it."
            )


def _found(directory: str | Path, names: tuple[str, ...], where: str) -> Path:
    for name in names:
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    missing = f"{names[0]} in {directory}" if Path(directory).exists() else directory
    raise ValueError(f"There is no {missing}. {where}")
