"""Data sets in files that are made here in the formats of the real ones."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

import gddim_eqx as gd


# NumPy only.
pytestmark = pytest.mark.x64

_random = np.random.default_rng(0)


def test_rings_are_five_and_of_unit_variance():
    points = gd.datasets.rings(5000, seed=1)
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
    images = gd.datasets.digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
    assert images.max() == 255 and images.min() == 0


@pytest.fixture
def idx(tmp_path):
    images = _random.integers(0, 256, (3, 28, 28), np.uint8)
    content = struct.pack(">iiii", 2051, *images.shape) + images.tobytes()
    return tmp_path, images, content


@pytest.mark.parametrize("packed", (False, True))
def test_fashion_mnist(idx, packed):
    directory, images, content = idx
    name = "t10k-images-idx3-ubyte" + ".gz" * packed
    (directory / name).write_bytes(gzip.compress(content) if packed else content)
    read = gd.datasets.fashion_mnist(directory, train=False)
    np.testing.assert_array_equal(read[..., 0], images)
    with pytest.raises(ValueError, match="no train-images-idx3-ubyte in .*Debian"):
        gd.datasets.fashion_mnist(directory)


def test_damaged_fashion_mnist_is_refused(idx):
    directory, _, content = idx
    path = directory / "train-images-idx3-ubyte.gz"
    packed = gzip.compress(content)
    for damaged in (packed[:100], b"", gzip.compress(content[:1000]), content):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is not a whole file"):
            gd.datasets.fashion_mnist(directory)
    path.write_bytes(gzip.compress(struct.pack(">i", 2049) + content[4:]))
    with pytest.raises(ValueError, match="begins with 2049"):
        gd.datasets.fashion_mnist(directory)


def test_cifar10(tmp_path):
    images = _random.integers(0, 256, (10, 32, 32, 3), np.uint8)
    for n in range(5):
        data = images[2 * n : 2 * n + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        batch = {b"data": data, b"labels": [1, 2], b"batch_label": b"x"}
        with (tmp_path / f"data_batch_{n + 1}").open("wb") as file:
            pickle.dump(batch, file, protocol=2)
    np.testing.assert_array_equal(gd.datasets.cifar10(tmp_path), images)
    with pytest.raises(ValueError, match="no test_batch in .*cifar-10-python.tar.gz"):
        gd.datasets.cifar10(tmp_path, train=False)
    whole = (tmp_path / "data_batch_3").read_bytes()
    (tmp_path / "data_batch_3").write_bytes(whole[:2000])
    with pytest.raises(ValueError, match="data_batch_3 is not a whole file"):
        gd.datasets.cifar10(tmp_path)


class _Runs:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_runs_nothing(tmp_path, capsys):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": _Runs()}))
    with pytest.raises(ValueError, match="it holds builtins.print"):
        gd.datasets.cifar10(tmp_path, train=False)
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
    read = gd.datasets.folder(tmp_path)
    np.testing.assert_array_equal(read, np.stack([pixels[name] for name in sorted(names)]))
    assert gd.datasets.folder(tmp_path, size=4, crop=6).shape == (3, 4, 4, 3)
    cropped = gd.datasets.folder(tmp_path, crop=4)
    np.testing.assert_array_equal(cropped, read[:, 1:5, 2:6])


def test_folders_that_do_not_do_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images. Images end in .png"):
        gd.datasets.folder(tmp_path)
    with pytest.raises(ValueError, match="nowhere is no directory"):
        gd.datasets.folder(tmp_path / "nowhere")
    _write(tmp_path, "a.png")
    _write(tmp_path, "b.png", 9, 7)
    with pytest.raises(ValueError, match="b.png is of 7x9 pixels, but .*a.png is of 8x6"):
        gd.datasets.folder(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="b.png is not a whole image"):
        gd.datasets.folder(tmp_path)
