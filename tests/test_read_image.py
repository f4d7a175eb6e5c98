"""Files of images of all kinds: RGB of 8 bits as NumPy makes it, or refused by name."""

import struct
import zlib

import numpy as np
import pytest

import gddim_eqx as gd


Image = pytest.importorskip("PIL.Image")

_random = np.random.default_rng(0)
_grey = _random.integers(0, 256, (5, 4), np.uint8)
_colour = _random.integers(0, 256, (5, 4, 3), np.uint8)
_opaque = np.full((5, 4, 1), 255, np.uint8)
_holes = np.where(np.arange(4)[None, :, None] == 2, np.uint8(7), _opaque)


def _read(directory):
    (image,) = gd.datasets.folder(directory)
    return image


def _three(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def _join(*channels):
    return np.concatenate([x if x.ndim == 3 else x[..., None] for x in channels], axis=-1)


def _chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


_kinds = {"grey": 0, "RGB": 2, "palette": 3, "grey, alpha": 4, "RGBA": 6}


def _png(path, kind, depth, width, rows, chunks=()):
    """A PNG file of rows of bytes, as Pillow cannot write all kinds."""
    header = struct.pack(">2I5B", width, len(rows), depth, _kinds[kind], 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*x) for x in chunks))


def test_greys_of_16_bits(tmp_path):
    ramp = np.linspace(0, 65535, 8).astype(np.uint16)
    Image.fromarray(ramp[None]).save(tmp_path / "ramp.png")
    expected = np.array([[0, 36, 72, 109, 145, 182, 218, 255]], np.uint8)
    np.testing.assert_array_equal(_read(tmp_path), _three(expected))
    # All of them.
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(every).save(tmp_path / "ramp.png")
    expected = np.floor(every * 255.0 / 65535).astype(np.uint8)
    np.testing.assert_array_equal(_read(tmp_path), _three(expected))


@pytest.mark.parametrize("depth", (1, 2, 4, 8))
def test_greys_of_few_bits(tmp_path, depth):
    _png(tmp_path / "a.png", "grey", depth, 8 // depth, [bytes([0b00011011])])
    bits = np.array([[0, 0, 0, 1, 1, 0, 1, 1]]).reshape(-1, depth)
    levels = bits @ 2 ** np.arange(depth)[::-1]
    expected = (levels * 255 // (2**depth - 1)).astype(np.uint8)[None]
    np.testing.assert_array_equal(_read(tmp_path), _three(expected))


_palette = _random.integers(0, 256, (256, 3), np.uint8)


def _indexed():
    image = Image.fromarray(_grey)
    image.putpalette(_palette.tobytes())
    return image


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: Image.fromarray(_grey), _three(_grey)),
        (lambda: Image.fromarray(_grey > 127), _three(np.uint8(255) * (_grey > 127))),
        (lambda: Image.fromarray(_colour), _colour),
        (_indexed, _palette[_grey]),
        (lambda: Image.fromarray(_join(_grey, _opaque)), _three(_grey)),
        (lambda: Image.fromarray(_join(_colour, _opaque)), _colour),
    ],
    ids=("L", "1", "RGB", "P", "LA", "RGBA"),
)
@pytest.mark.parametrize("ending", ("png", "webp", "bmp", "jpg"))
def test_opaque_images(tmp_path, make, expected, ending):
    image, path = make(), tmp_path / f"a.{ending}"
    if ending != "png" and image.mode in ("LA", "RGBA") and ending != "webp":
        pytest.skip("has no transparency")
    if ending == "jpg":
        image.convert("RGB").save(path, quality=100, subsampling=0)
        difference = np.abs(_read(tmp_path).astype(int) - expected)
        assert difference.max() <= 3
        return
    image.save(path, **(dict(lossless=True) if ending == "webp" else {}))
    np.testing.assert_array_equal(_read(tmp_path), expected)


def test_a_palette_whose_transparency_is_not_used(tmp_path):
    image = _indexed()
    unused = min(set(range(256)) - set(_grey.ravel().tolist()))
    image.save(tmp_path / "a.png", transparency=unused)
    np.testing.assert_array_equal(_read(tmp_path), _palette[_grey])


def test_inks(tmp_path):
    inks = np.broadcast_to(np.array([95, 130, 194, 60], np.uint8), (16, 16, 4)).copy()
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100)
    light = (255.0 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    assert np.abs(_read(tmp_path) - light).max() < 2
    # Without Adobe's mark some mean the opposite.
    whole = (tmp_path / "a.jpg").read_bytes()
    start = whole.index(b"\xff\xee")
    (length,) = struct.unpack(">H", whole[start + 2 : start + 4])
    (tmp_path / "a.jpg").write_bytes(whole[:start] + whole[start + 2 + length :])
    with pytest.raises(ValueError, match="a.jpg is in CMYK.*Convert it to RGB"):
        _read(tmp_path)


_turns = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", _turns)
def test_images_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(_colour).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(_read(tmp_path), _turns[orientation](_colour))


def test_grey_and_colour_together(tmp_path):
    Image.fromarray(_grey).save(tmp_path / "a.png")
    Image.fromarray(_colour).save(tmp_path / "b.png")
    expected = np.stack([_three(_grey), _colour])
    np.testing.assert_array_equal(gd.datasets.folder(tmp_path), expected)


def test_the_first_picture_of_several_of_one_scene(tmp_path):
    # As telephones write them.
    first = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    second = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert np.abs(_read(tmp_path).astype(int) - 200).max() <= 1


def _save(path, array, **options):
    Image.fromarray(array).save(path, **options)


def _frames(path):
    frames = [Image.fromarray(x) for x in (_colour, _colour[::-1])]
    frames[0].save(path, save_all=True, append_images=frames[1:])


_sixteen = np.arange(24, dtype=">u2")
_holed = "a.png is transparent in places.*alpha_composite"
_deep = "a.png has colours or transparency of 16 bits.*Convert it to 8 bits"


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: _save(path, _join(_colour, _holes)), _holed),
        (lambda path: _save(path, _join(_grey, _holes)), _holed),
        (
            lambda path: _save(path, _colour, transparency=tuple(_colour[0, 0].tolist())),
            _holed,
        ),
        (lambda path: _save(path, _grey, transparency=int(_grey[0, 0])), _holed),
        (lambda path: _indexed().save(path, transparency=int(_grey[0, 0])), _holed),
        # A level of two bits, and of 16.
        (
            lambda path: _png(path, "grey", 2, 4, [b"\x1b"], [(b"tRNS", b"\0\1")]),
            _holed,
        ),
        (
            lambda path: _png(
                path, "grey", 16, 24, [_sixteen.tobytes()], [(b"tRNS", b"\0\1")]
            ),
            _holed,
        ),
        (lambda path: _png(path, "RGB", 16, 8, [_sixteen.tobytes()]), _deep),
        (lambda path: _png(path, "RGBA", 16, 6, [_sixteen.tobytes()]), _deep),
        (lambda path: _png(path, "grey, alpha", 16, 12, [_sixteen.tobytes()]), _deep),
        (_frames, "a.png has 2 frames"),
        (lambda path: _save(path, _colour, format="TIFF"), "a.png is a TIFF file"),
        (
            lambda path: _save(path, _grey.astype(np.float32), format="TIFF"),
            "a.png is a TIFF file",
        ),
        (
            lambda path: _png(
                path, "grey", 8, 2, [b"ab"], [(b"gAMA", struct.pack(">I", 100_000))]
            ),
            "a.png is not in sRGB: it says that its gamma is 1 ",
        ),
        (
            lambda path: _save(path, _colour, icc_profile=b"no profile" * 20),
            "a.png has an ICC profile that cannot be applied",
        ),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(tmp_path, write, message):
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        _read(tmp_path)


@pytest.mark.parametrize("ending", ("png", "jpg", "webp", "bmp"))
def test_cut_images_are_refused(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    _save(path, np.repeat(np.repeat(_colour, 20, 0), 20, 1))
    whole = path.read_bytes()
    for length in (0, 3, 20, 60, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"a.{ending} is not a complete image"):
            _read(tmp_path)


def _fixed(x):
    return struct.pack(">i", round(x * 65536))


def _profile(gamma, primaries):
    """An ICC profile of three primaries in XYZ at D50, and a power."""
    power = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    xyz = lambda values: b"XYZ " + bytes(4) + b"".join(map(_fixed, values))
    name = b"ours\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
        **{f"{c}XYZ".encode(): xyz(p) for c, p in zip("rgb", primaries)},
        **{f"{c}TRC".encode(): power for c in "rgb"},
    }
    table, content = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">2I", start + len(content), len(value))
        content += value
    size = start + len(content)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28)
    head += b"".join(map(_fixed, (0.9642, 1.0, 0.8249)))
    head += bytes(128 - len(head))
    return head + struct.pack(">I", len(tags)) + table + content


# The columns of sRGB's matrix to XYZ at D50.
_columns = np.array(
    [[0.4360, 0.2225, 0.0139], [0.3851, 0.7169, 0.0971], [0.1431, 0.0606, 0.7141]]
)


@pytest.mark.parametrize("mode", ("RGB", "P"))
def test_colours_with_a_profile_become_those_of_srgb(tmp_path, mode):
    # Linear light, with red and green exchanged.
    profile = _profile(1.0, _columns[[1, 0, 2]])
    image, linear = Image.fromarray(_colour), _colour
    if mode == "P":
        image, linear = _indexed(), _palette[_grey]
    image.save(tmp_path / "a.png", icc_profile=profile)
    x = linear[..., [1, 0, 2]] / 255
    curve = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    assert np.abs(_read(tmp_path) - 255 * curve).max() < 1.5


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(_colour).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(_read(tmp_path), _colour)
    # Also where grey images have it, wrongly.
    Image.fromarray(_grey).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(_read(tmp_path), _three(_grey))
