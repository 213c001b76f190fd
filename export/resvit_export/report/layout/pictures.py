"""Numbers as drawings: coordinates and paths that the template puts into SVG, and PNG data URIs."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 160, 48
"""The view box of one histogram, in SVG units."""
LARGEST_SIDE = 256
"""Images are thinned to this many pixels a side: a page of photographs must still fit in an e-mail."""


def steps_from_histogram(counts: Sequence[int], bin_width: float, span: float) -> str:
    """Draw counts on a log scale as one closed SVG path over 0..span, stepped like the bins themselves.

    Every bin that holds anything is at least 1.5 units high, so that a lone outlier can be seen.
    """
    top = math.log1p(max(counts, default=0)) or 1.0
    parts = [f"M0 {HEIGHT}"]
    for index, count in enumerate(counts):
        left, right = (min(WIDTH * edge * bin_width / span, WIDTH) for edge in (index, index + 1))
        if left >= WIDTH:
            break
        height = max(1.5, (HEIGHT - 2) * math.log1p(count) / top) if count else 0.0
        parts.append(f"L{left:.1f} {HEIGHT - height:.1f}H{right:.1f}")
    return "".join([*parts, f"V{HEIGHT}Z"])


def share_beyond(counts: Sequence[int], bin_width: float, clip: float) -> float:
    """Estimate the share (0..1) of values beyond ``clip``, taking each bin as evenly filled."""
    total = sum(counts)
    if not total:
        return 0.0
    beyond = 0.0
    for index, count in enumerate(counts):
        over = (index + 1) - clip / bin_width
        beyond += count * min(max(over, 0.0), 1.0)
    return beyond / total


def ticks_between(low: float, high: float, wanted: int = 5) -> tuple[list[float], int]:
    """Choose round numbers inside low..high, and how many decimals they need."""
    raw = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [index * step for index in range(first, last + 1)], decimals


def png_from_pixels(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode [H, W], [H, W, 1] or [H, W, 3] as PNG (RFC 2083); the same pixels give the same bytes."""
    image = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    stride = max(1, math.ceil(max(image.shape[:2]) / LARGEST_SIDE))
    image = np.ascontiguousarray(image[::stride, ::stride])
    height, width = image.shape[:2]
    rows = image.reshape(height, -1)
    scanlines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    color_type = 2 if image.ndim == 3 else 0
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)),
            _chunk(b"IDAT", zlib.compress(scanlines, 9)),
            _chunk(b"IEND", b""),
        ]
    )


def data_uri_from_pixels(pixels: npt.NDArray[np.uint8]) -> str:
    """Put an image into the page itself."""
    return "data:image/png;base64," + base64.b64encode(png_from_pixels(pixels)).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
