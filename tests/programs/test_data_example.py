"""Data sets in files that are made here in the formats of the real ones."""

import functools
import gzip
import pathlib
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageCms

import gddim_eqx as gd
from examples import data


# NumPy only.
pytestmark = pytest.mark.x64

_random = np.random.default_rng(0)


def test_rings_are_five_and_of_unit_variance():
    points = data.rings(5000, seed=1)
    assert points.shape == (5000, 2) and points.dtype == np.float32
    np.testing.assert_allclose(points.std(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)
    # Undo the scale: every point is at distance 1 from one of the centres.
    angles = np.linspace(0, 2 * np.pi, 4001)[:-1]
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    centres = np.array([[-3.5, 1.5], [0, 1.5], [3.5, 1.5], [-2.1, -1.5], [2.1, -1.5]]) / 2
    exact = (centres[:, None] + circle).reshape(-1, 2)
    unscaled = points * exact.std(axis=0) + exact.mean(axis=0)
    distances = np.linalg.norm(unscaled[:, None] - centres, axis=2)
    assert np.abs(distances - 1).min(axis=1).max() < 0.1


def test_digits():
    images = data.digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
    assert images.max() == 255 and images.min() == 0


@pytest.fixture
def idx(tmp_path):
    images = _random.integers(0, 256, (3, 28, 28), np.uint8)
    content = struct.pack(">iiii", 2051, *images.shape) + images.tobytes()
    return tmp_path, images, content


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("read", (data.mnist, data.fashion_mnist))
def test_mnist(idx, packed, read):
    directory, images, content = idx
    name = "t10k-images-idx3-ubyte" + ".gz" * packed
    (directory / name).write_bytes(gzip.compress(content) if packed else content)
    found = read(directory, train=False, verify=False)
    np.testing.assert_array_equal(found[..., 0], images)
    with pytest.raises(ValueError, match=f"{name} is not the file .* published as"):
        read(directory, train=False)


@pytest.mark.parametrize(
    "read, cure",
    [
        (data.mnist, "no .*train-images-idx3-ubyte.*cvdf-datasets/mnist"),
        (data.fashion_mnist, "no .*train-images-idx3-ubyte.*Debian package"),
        (data.fashion_mnist_labels, "no .*train-labels-idx1-ubyte.*Debian"),
        (data.cifar10, "data_batch_1.*cifar-10-python.tar.gz from"),
    ],
)
def test_says_where_to_get_what_is_missing(tmp_path, read, cure):
    with pytest.raises(ValueError, match=cure):
        read(tmp_path)


def test_labels(tmp_path):
    content = struct.pack(">ii", 2049, 4) + bytes([3, 0, 9, 1])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    labels = data.fashion_mnist_labels(tmp_path, verify=False)
    np.testing.assert_array_equal(labels, [3, 0, 9, 1])


@pytest.mark.skipif(
    not pathlib.Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="The Debian package dataset-fashion-mnist is not installed.",
)
def test_the_published_fashion_mnist():
    for train, number in ((True, 60_000), (False, 10_000)):
        images = data.fashion_mnist(train=train)
        assert images.shape == (number, 28, 28, 1) and images.dtype == np.uint8
        labels = data.fashion_mnist_labels(train=train)
        np.testing.assert_array_equal(np.bincount(labels), [number // 10] * 10)


def test_damaged_fashion_mnist_is_refused(idx):
    directory, _, content = idx
    path = directory / "train-images-idx3-ubyte.gz"
    packed = gzip.compress(content)
    flipped = packed[:50] + bytes([packed[50] ^ 1]) + packed[51:]
    cut = gzip.compress(content[:1000])
    for damaged in (packed[:100], b"", cut, gzip.compress(b""), content, flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is not a complete .* file"):
            data.fashion_mnist(directory, verify=False)


@pytest.fixture
def cifar10(tmp_path):
    images = _random.integers(0, 256, (12, 32, 32, 3), np.uint8)
    directory = tmp_path / "cifar-10-batches-py"
    directory.mkdir()
    for n, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        data = images[2 * n : 2 * n + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        batch = {b"data": data, b"labels": [1, 2], b"batch_label": b"x"}
        (directory / name).write_bytes(pickle.dumps(batch, protocol=2))
    return directory, images


def _pack(directory):
    archive = directory.with_name("cifar-10-python.tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(directory, directory.name)
    return archive


@pytest.mark.parametrize("packed", (False, True))
def test_cifar10(cifar10, packed):
    path, images = cifar10
    path = _pack(path) if packed else path
    read = functools.partial(data.cifar10, path)
    np.testing.assert_array_equal(read(verify=False), images[:10])
    np.testing.assert_array_equal(read(train=False, verify=False), images[10:])
    labels = data.cifar10_labels(path, verify=False)
    np.testing.assert_array_equal(labels, [1, 2] * 5)
    with pytest.raises(ValueError, match="data_batch_1.* is not the file .* CIFAR-10: its"):
        read()


@pytest.mark.parametrize("packed", (False, True))
def test_damaged_cifar10_is_refused(cifar10, packed):
    directory, _ = cifar10
    batch = directory / "data_batch_3"
    whole = batch.read_bytes()
    read = lambda: data.cifar10(_pack(directory) if packed else directory, verify=False)
    for damaged in (whole[:2000], b"", pickle.dumps({b"labels": []})):
        batch.write_bytes(damaged)
        with pytest.raises(ValueError, match="data_batch_3.* is not a complete file"):
            read()
    batch.unlink()
    with pytest.raises(ValueError, match="data_batch_3.*Fetch"):
        read()


def test_a_damaged_archive_is_refused(cifar10):
    archive = _pack(cifar10[0])
    whole = archive.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for damaged in (whole[:100], whole[: len(whole) // 2], b"", bytes(flipped)):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a? ?complete"):
            data.cifar10(archive, verify=False)


class _Runs:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_runs_nothing(tmp_path, capsys):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": _Runs()}))
    with pytest.raises(ValueError, match="it holds builtins.print"):
        data.cifar10(tmp_path, train=False, verify=False)
    assert capsys.readouterr().out == ""


def _write(directory, name, height=6, width=8):
    pixels = _random.integers(0, 256, (height, width, 3), np.uint8)
    (directory / name).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(directory / name)
    return pixels


def test_a_folder_of_images(tmp_path):
    (tmp_path / "readme.txt").write_text("not an image")
    names = ["b.png", "a.PNG", "inside/c.png"]
    pixels = {name: _write(tmp_path, name) for name in names}
    read = data.folder(tmp_path)
    np.testing.assert_array_equal(read, np.stack([pixels[name] for name in sorted(names)]))
    assert data.folder(tmp_path, size=4, crop=6).shape == (3, 4, 4, 3)
    cropped = data.folder(tmp_path, crop=4)
    np.testing.assert_array_equal(cropped, read[:, 1:5, 2:6])


def test_a_folder_is_packed_into_one_file(tmp_path):
    directory, path = tmp_path / "images", tmp_path / "images.npy"
    directory.mkdir()
    for name in ("b.png", "a.png", "inside/c.png"):
        _write(directory, name)
    found = data.pack_folder(directory, path, size=4, crop=6)
    assert isinstance(found, np.memmap)
    expected = data.folder(directory, size=4, crop=6)
    for images in (found, data.packed(path), np.load(path)):
        np.testing.assert_array_equal(images, expected)
    # A failure keeps what was there, and leaves nothing else.
    _write(directory, "d.png", 9, 7)
    with pytest.raises(ValueError, match="d.png has 7x9 pixels"):
        data.pack_folder(directory, path)
    np.testing.assert_array_equal(np.load(path), expected)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["images", "images.npy"]


def test_a_folder_is_read_as_greyscale(tmp_path):
    levels = _random.integers(0, 256, (6, 8), np.uint8)
    directory = tmp_path / "images"
    directory.mkdir()
    Image.fromarray(levels).save(directory / "a.png")
    Image.fromarray(np.repeat(levels[..., None], 3, -1)).save(directory / "b.png")
    colours = _write(directory, "c.png").astype(float)
    assert data.folder(directory).shape == (3, 6, 8, 3)
    found = data.folder(directory, channels=1)
    assert found.shape == (3, 6, 8, 1)
    np.testing.assert_array_equal(found[:2, ..., 0], [levels, levels])
    # ITU-R 601.
    luma = colours @ [0.299, 0.587, 0.114]
    assert np.abs(found[2, ..., 0] - luma).max() < 1
    packed = data.pack_folder(directory, tmp_path / "x.npy", channels=1)
    np.testing.assert_array_equal(packed, found)


def test_packed_files_that_do_not_do_are_refused(tmp_path):
    path = tmp_path / "x.npy"
    with pytest.raises(
        ValueError, match="x.npy is not .* No such file.*data.py` writes one"
    ):
        data.packed(path)
    np.save(path, np.zeros((5, 4, 4, 1), np.uint8))
    content = path.read_bytes()
    for size in (len(content) - 1, 40, 0):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="x.npy is not a complete file"):
            data.packed(path)
    for wrong in (np.zeros((5, 4, 4), np.uint8), np.zeros((5, 4, 4, 1))):
        np.save(path, wrong)
        with pytest.raises(ValueError, match="must hold images.*got shape"):
            data.packed(path)


def test_the_classes_of_a_folder_are_its_subdirectories(tmp_path):
    for name in ("cat/b.png", "cat/young/a.png", "ant/z.png", "dog/a.png"):
        _write(tmp_path, name)
    labels, classes = data.folder_labels(tmp_path)
    assert classes == ("ant", "cat", "dog") and labels.tolist() == [0, 1, 1, 2]
    assert len(labels) == len(data.folder(tmp_path))
    given = ("dog", "cow", "cat", "ant")
    labels, classes = data.folder_labels(tmp_path, given)
    assert classes == given and labels.tolist() == [3, 2, 2, 0]
    with pytest.raises(ValueError, match="has images in ant, dog, but the classes are cat"):
        data.folder_labels(tmp_path, ["cat"])
    _write(tmp_path, "a.png")
    with pytest.raises(ValueError, match="a.png is not in a subdirectory"):
        data.folder_labels(tmp_path)


def test_links_are_followed_and_hidden_files_are_not_read(tmp_path):
    directory = tmp_path / "images"
    for name in ("elsewhere/a.png", "images/ant/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        _write(tmp_path, name)
    (directory / "dog").symlink_to(tmp_path / "elsewhere")
    (directory / "ant" / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    for junk in (".hidden/a.png", "ant/._a.png", "__MACOSX/cat/a.png", "@eaDir/a.png"):
        (directory / junk).parent.mkdir(parents=True, exist_ok=True)
        (directory / junk).write_bytes(b"no image")
    labels, classes = data.folder_labels(directory)
    assert labels.tolist() == [0, 0, 1] and classes == ("ant", "dog")
    images = data.folder(directory)
    np.testing.assert_array_equal(images[1], images[2])
    (directory / "ant" / "c.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="c.png is not a complete image.*No such file"):
        data.folder(directory)


_colour = _random.integers(0, 256, (5, 4, 3), np.uint8)
_alpha = np.full((5, 4, 1), 255, np.uint8)


def _palette():
    image = Image.fromarray(_colour[..., 0])
    image.putpalette(_random.integers(0, 256, (256, 3), np.uint8).tobytes())
    return image


@pytest.mark.parametrize(
    "image",
    (
        Image.fromarray(_colour[..., 0]),
        Image.fromarray(_colour[..., 0] > 127),
        Image.fromarray(_colour),
        _palette(),
        Image.fromarray(np.concatenate([_colour, _alpha], axis=-1)),
    ),
    ids=("L", "1", "RGB", "P", "RGBA"),
)
def test_images_of_8_bits(tmp_path, image):
    image.save(tmp_path / "a.png")
    (found,) = data.folder(tmp_path)
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(_colour).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(data.folder(tmp_path)[0], np.rot90(_colour, -1))


_holes = np.where(np.arange(4)[None, :, None] == 2, np.uint8(7), _alpha)


@pytest.mark.parametrize(
    "image, options, message",
    [
        (np.concatenate([_colour, _holes], axis=-1), {}, "a.png is transparent"),
        (_colour, {"transparency": tuple(_colour[0, 0].tolist())}, "a.png is transparent"),
        (_colour[..., 0].astype(np.uint16), {}, "a.png is not in 8-bit sRGB .* mode I;16"),
        (_colour, {"icc_profile": b"Display P3"}, "a.png .* another colour profile"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(tmp_path, image, options, message):
    Image.fromarray(image).save(tmp_path / "a.png", **options)
    with pytest.raises(ValueError, match=message):
        data.folder(tmp_path)


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(_colour).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(data.folder(tmp_path)[0], _colour)


def test_former_names_say_what_to_use():
    with pytest.raises(AttributeError, match="no 'datasets'. Copy `examples/data.py`"):
        gd.datasets  # pyright: ignore
    with pytest.raises(AttributeError, match="`gddim_eqx` has no 'nothing'.$"):
        gd.nothing  # pyright: ignore


def test_folders_that_do_not_do_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images. Images end in .png"):
        data.folder(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        data.folder(tmp_path / "nowhere")
    _write(tmp_path, "a.png")
    _write(tmp_path, "b.png", 9, 7)
    with pytest.raises(ValueError, match="b.png has 7x9 pixels, but .*a.png has 8x6"):
        data.folder(tmp_path)
    with pytest.raises(ValueError, match="a.png has 8x6 .* `crop` cannot keep 7x7"):
        data.folder(tmp_path, size=4, crop=7)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="b.png is not a complete image"):
        data.folder(tmp_path)
