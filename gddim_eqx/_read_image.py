"""Reading an image file as 8-bit sRGB."""

import io
from pathlib import Path
from typing import Any

import numpy as np


_formats = ("PNG", "JPEG", "MPO", "BMP", "DIB", "WEBP", "GIF")  # Whatever the suffix.

# The white point and primaries of sRGB, and its approximate gamma, as in PNG.
_srgb = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_gamma = 1 / 2.2


def read_image(path: Path) -> Any:
    """**Returns:** a Pillow image of mode RGB, upright.

    **Raises:** `ValueError` for a file that is not a complete image, or cannot be converted
    to 8-bit sRGB without guessing. Needs Pillow.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            depth, frames = _png_depth(path), getattr(file, "n_frames", 1)
            kind = file.format
    except Exception as error:  # Pillow raises many exceptions for damaged files.
        raise ValueError(f"{path} is not a complete image: {error}.") from error
    if kind not in _formats:
        raise ValueError(f"{path} is a {kind} file. Convert it, for example to PNG.")
    # The other pictures in an MPO file are variants, for example smaller.
    if frames > 1 and kind != "MPO":
        raise ValueError(f"{path} has {frames} frames. Save only the intended one.")
    if depth == 16:
        image = _from_16_bits(path, image)
    _check_opaque(path, image)
    return _to_srgb(path, image)


def _png_depth(path: Path) -> int | None:
    """The bits per channel of a PNG file. Pillow does not report them, and drops the lower
    8 of 16-bit colours."""
    with path.open("rb") as file:
        head = file.read(25)
    return head[24] if head.startswith(b"\x89PNG") else None


def _from_16_bits(path: Path, image: Any) -> Any:
    from PIL import Image

    if image.mode != "I" and not image.mode.startswith("I;16"):
        raise ValueError(
            f"{path} has colours or transparency of 16 bits, of which Pillow reads only 8. "
            "Convert it to 8 bits per channel."
        )
    found = Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
    found.info = image.info
    return found


def _check_opaque(path: Path, image: Any) -> None:
    transparent = image.mode != "P" and "transparency" in image.info
    if not transparent and image.mode in ("P", "PA", "LA", "RGBA"):
        transparent = image.convert("RGBA").getextrema()[3][0] < 255
    if transparent:
        raise ValueError(
            f"{path} is transparent in places, and its background is not known. Composite "
            "it onto one, with Pillow's `Image.alpha_composite`."
        )


def _to_srgb(path: Path, image: Any) -> Any:
    info, mode = image.info, image.mode
    if mode in ("P", "PA", "RGBA"):
        image = image.convert("RGBA").convert("RGB")
    elif mode in ("1", "LA"):
        image = image.convert("L")
    elif mode not in ("L", "RGB", "CMYK"):
        raise ValueError(
            f"{path} has Pillow's mode {mode!r}, whose black and white levels are not "
            "known. Convert it to 8-bit greyscale or RGB."
        )
    if mode == "CMYK" and "adobe" not in info:
        raise ValueError(
            f"{path} is in CMYK, and does not say whether 0 means no ink or full ink. "
            "Convert it to RGB."
        )
    if "icc_profile" in info:
        return _by_profile(path, image, info["icc_profile"])
    if "srgb" not in info:
        power = info.get("gamma", _gamma)
        primaries = info.get("chromaticity", _srgb)
        if abs(power / _gamma - 1) > 0.05 or not np.allclose(primaries, _srgb, atol=0.01):
            raise ValueError(
                f"{path} is not in sRGB: it says that its gamma is {power:.5g} and its "
                f"chromaticities are {tuple(primaries)}. Convert it to sRGB."
            )
    return image.convert("RGB")


def _by_profile(path: Path, image: Any, profile: bytes) -> Any:
    from PIL import ImageCms

    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # Left as it is, as a conversion would only add rounding errors.
        if "sRGB" in ImageCms.getProfileDescription(found):
            return image.convert("RGB")
        srgb: Any = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, found, srgb, outputMode="RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError(
            f"{path} has an ICC profile that cannot be applied: {error}. Convert the image "
            "to sRGB."
        ) from error
