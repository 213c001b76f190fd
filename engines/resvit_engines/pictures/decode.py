"""Picture files and stored values become pixels: which way up, and which stored value is white."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ExitCode, ResvitError

if TYPE_CHECKING:
    from PIL.Image import Image

WHITE = 0xFFFF
"""The pixel of a 16-bit image that is white, where nothing else is said."""
WHOLE_LEAST = 0xFF
"""Of whole numbers of more than 8 bits no smaller one is white."""
SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
"""How files of the kinds that pictures are kept in end."""
RAW_SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mos", ".mrw", ".nef", ".nrw", ".orf"),
    *(".pef", ".raf", ".rw2", ".srw", ".x3f"),
)
"""How what cameras' sensors give ends: many begin as TIFF does, and hold no finished picture."""
_FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF"),
    "WEBP",
)
"""What holds pixels alone. Pillow knows more: for EPS it starts another program."""
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_MAY_HOLD_EXIF = (b"eXIf", b"exif", b"com.adobe.xmp", b"tiff:Orientation")
_BEYOND = 0.05
"""By how much of white floating-point pixels may overshoot, as resizing makes them do."""


_BEGINNINGS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"qoif",
    b"DDS \x7c\0\0\0",
)
_BITMAP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
"""How many bytes a bitmap's second header can have."""


def begins_as_picture(data: bytes) -> bool:
    """Whether a file's first 18 bytes are those of a picture; of ICO, PCX, PNM and TGA, which say less, never."""
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    bitmap = data[:2] == b"BM" and data[6:10] == bytes(4) and int.from_bytes(data[14:18], "little") in _BITMAP_HEADERS
    return data.startswith(_BEGINNINGS) or webp or bitmap or data[4:12] in (b"ftypavif", b"ftypavis")


class Decoding(NamedTuple):
    """What an image file leaves open: whether it is turned as its EXIF orientation says, and which value is white."""

    upright: bool = True
    white: int = WHITE
    """Of pixels of more than 8 bits; 4095 where a camera or scanner stored 12 bits, 1 of most floating-point ones."""


AS_USUAL = Decoding()


class Header(NamedTuple):
    """What a picture file says of itself."""

    height: int
    width: int
    """In pixels, as stored."""
    colour: bool
    orientation: int
    """EXIF's, 1 to 8: 1 is upright, and from 5 on height and width are exchanged."""


def pillow(what: str = "Pictures are decoded") -> Any:
    """The package's module ``Image``; raises ``ResvitError`` MISSING without it, since ``what`` is done with it."""
    try:
        from PIL import Image as Pillow
    except ImportError as error:
        raise ResvitError(
            f"{what} with Pillow, which is not installed.",
            "Run `pip install pillow` or `apt-get install python3-pil`, or give prepared images as .npy.",
            ExitCode.MISSING,
        ) from error
    return Pillow


def opened(data: bytes) -> Image:
    """Open a picture file's bytes with Pillow, which reads no more than the header at first.

    Raises nearly anything for what is no picture.
    """
    library = pillow()
    if not data:
        raise ValueError("the file is empty")
    library.init()
    image: Image = library.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in library.OPEN])
    return image


def decode(data: bytes, decoding: Decoding = AS_USUAL) -> npt.NDArray[np.uint8]:
    """Decode a picture file's bytes: uint8 [H, W, 1] for grey, [H, W, 3] for everything else.

    Values of more than 8 bits become 8 as ``eight_bits`` says. Transparency is dropped and palettes are looked up, as
    ``Image.convert("RGB")`` and so torchvision's and timm's datasets do. Of a moving image, the first is taken. Raises
    nearly anything for a damaged file.
    """
    with opened(data) as image:
        orientation = _orientation(image, data)
        pixels = _as_stored(image, data, decoding.white)
        # Newer versions of Pillow turn a TIFF while they load it, and then forget that there was anything to turn.
        if orientation != 1 and image.format == "TIFF" and _orientation(image, data) == 1:
            return pixels if decoding.upright else _turned(pixels, {6: 8, 8: 6}.get(orientation, orientation))
        return _turned(pixels, orientation) if decoding.upright else pixels


def header_of(data: bytes) -> Header:
    """Read a picture file's header; raises nearly anything for what is no picture."""
    with opened(data) as image:
        height, width = image.height, image.width
        if image.format == "TIFF":
            # Pillow exchanges the two beforehand where it will turn the image.
            tags: Any = image.tag_v2  # a TIFF has them
            height, width = int(tags[_TIFF_HEIGHT]), int(tags[_TIFF_WIDTH])
        colour = image.mode not in _GREY_MODES and not _is_deep_grey(image)
        return Header(height, width, colour, _orientation(image, data))


def deep_values(data: bytes) -> npt.NDArray[Any] | None:
    """The stored values [H, W, 1 or 3] of a picture of more than 8 bits, all others None."""
    with opened(data) as image:
        return _deep_values(image, data)


def eight_bits(values: npt.NDArray[Any], white: int) -> npt.NDArray[np.uint8]:
    """Stored values as 8 bits: those up to ``white`` are divided evenly among 0 to 255, and all above are 255.

    With the usual white, whole numbers keep their high byte, as Pillow does for 16-bit colour. Floating-point ones are
    rounded to the nearest of 255 steps. Raises ``ValueError`` for values that cannot have this white.
    """
    if values.dtype == np.uint8:
        return np.array(values)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if white == WHITE:
            raise ValueError("it holds floating-point pixels, and nothing says which value is white")
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("it holds floating-point pixels that are NaN or infinite")
        dark = white >= WHOLE_LEAST and 0 < high <= 1 + _BEYOND
        if low < -_BEYOND * white or high > (1 + _BEYOND) * white or dark:
            raise ValueError(f"its floating-point pixels lie from {low:g} to {high:g}, where {white} should be white")
        return np.clip(np.floor(values.astype(np.float64) * (255.0 / white) + 0.5), 0, 255).astype(np.uint8)
    if white < WHOLE_LEAST:
        raise ValueError(f"it holds whole numbers of 16 bits, and white={white} is for floating-point pixels")
    if low < 0 or high > WHITE:
        raise ValueError("it holds pixels of more than 16 bits")
    return np.minimum(values.astype(np.int64) * 256 // (white + 1), 255).astype(np.uint8)


def reason(error: Exception) -> str:
    """Why a picture cannot be decoded, in a few words."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that can be recognised"
    return str(error) or type(error).__name__


def _as_stored(image: Image, data: bytes, white: int) -> npt.NDArray[np.uint8]:
    # The usual white leaves the high byte of colour, which is what Pillow itself takes.
    if white != WHITE or image.mode in _GREY_MODES or _is_deep_grey(image):
        deep = _deep_values(image, data)
        if deep is not None:
            return eight_bits(deep, white)
    if image.mode in _GREY_MODES:
        return np.array(image.convert("L"), dtype=np.uint8)[:, :, None]
    image.load()
    # The same colours by way of RGBA, without Pillow's warning about it.
    colours = image.convert("RGBA") if "transparency" in image.info else image
    return np.array(colours.convert("RGB"), dtype=np.uint8)


def _deep_values(image: Image, data: bytes) -> npt.NDArray[Any] | None:
    if image.mode == "F" or image.mode.startswith("I"):
        return np.asarray(image)[:, :, None]
    raw = _raw_mode(image)
    name, _, order = raw.rpartition(";16")
    if not name or image.format not in ("PNG", "TIFF"):
        return None
    if _is_deep_grey(image):
        grey = _read_as(data, "RGBA").astype(np.uint16)  # high and low byte of grey, then of alpha
        return grey[:, :, :1] << 8 | grey[:, :, 1:2]
    # Pillow takes the high byte; told that the bytes lie the other way round, it takes the low one.
    if name not in ("RGB", "RGBA", "RGBX") or order not in ("B", "L", "N"):
        raise ValueError(f"of its 16 bits Pillow reads 8 ({raw}), and another white cannot be said")
    low = _read_as(data, f"{name};16{'L' if order == 'B' else 'B'}")
    return np.asarray(image)[:, :, :3].astype(np.uint16) << 8 | low[:, :, :3]


def _is_deep_grey(image: Image) -> bool:
    # Pillow has no mode for grey and alpha of 16 bits, and makes it RGBA.
    return image.mode == "RGBA" and _raw_mode(image) == "LA;16B"


def _raw_mode(image: Image) -> str:
    # What is about to be decoded tells the bits: Pillow has no mode for colour of more than 8.
    tiles: list[Any] = getattr(image, "tile", [])
    said = tiles[0][3] if tiles else ""
    return str(said[0] if isinstance(said, tuple) and said else said)


def _read_as(data: bytes, raw_mode: str) -> npt.NDArray[np.uint8]:
    with opened(data) as image:
        tiles: list[Any] = []
        for codec, extents, offset, said in image.tile:  # of every image from a file
            tiles.append((codec, extents, offset, (raw_mode, *said[1:]) if isinstance(said, tuple) else raw_mode))
        image.tile = tiles
        return np.array(image, dtype=np.uint8)


def _orientation(image: Image, data: bytes) -> int:
    # Of a PNG, Pillow would decode everything to look for EXIF data behind the pixels.
    if image.format == "PNG" and not any(mark in data for mark in _MAY_HOLD_EXIF):
        return 1
    said = image.getexif().get(_ORIENTATION, 1)
    return said if isinstance(said, int) and 1 <= said <= 8 else 1


def _turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, C] as stored, turned upright as EXIF's ``orientation`` says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
