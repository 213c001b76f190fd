"""Resizing as Pillow does it, byte for byte, whether Pillow is there or not: what a device reads is what was validated.

Pillow resizes 8-bit pixels with weights in fixed point of 22 bits and rounds to 8 bits between across and down (its
``Resample.c``); the nearest pixel it finds by adding steps (``Geometry.c``). Up to 12.2 it always resizes across first;
newer ones go down first where that takes less, and come out otherwise by a step of 255 (its pull request 9549). Here
across always comes first, so that no version changes what a network reads. The sums stay below 2^53, so that products
of float64 matrices give them exactly.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Pixels: TypeAlias = npt.NDArray[np.uint8]
_BITS = 22
_ONE = 1 << _BITS
_TOGETHER = 16
"""Output columns whose weights make one matrix: they read nearly the same input columns."""
_FILTERS: dict[str, Any] = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which every version of it takes."""
_LUMA = (19595, 38470, 7471)
"""ITU-R 601's weights of red, green and blue in fixed point of 16 bits, as Pillow has them."""


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


_KERNELS: dict[str, tuple[Callable[[float], float], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
"""By name the function and how far it reaches, in pixels."""


@dataclass(frozen=True)
class _Block:
    """Some neighbouring outputs, ``start`` to ``stop``: ``weights`` float64 [inputs, outputs] of inputs ``low`` on."""

    start: int
    stop: int
    low: int
    weights: npt.NDArray[np.float64]


def resized(pixels: Pixels, size: tuple[int, int], kernel: str, box: tuple[float, ...] | None = None) -> Pixels:
    """``pixels`` uint8 [H, W, 1 or 3] at ``size`` (height, width), resized across and then down.

    ``kernel`` is ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``; ``box`` is (left, top, right, bottom) of what
    is resized, in pixels that need not be whole; without it all of the image is. By Pillow, which takes a third of the
    time, where it is installed.
    """
    whole = (0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0]))
    if size == pixels.shape[:2] and (box is None or box == whole):
        return pixels
    if importlib.util.find_spec("PIL") is None:
        return resized_by_numpy(pixels, size, kernel, box or whole)
    return _resized_by_pillow(pixels, size, kernel, box or whole)


def _resized_by_pillow(pixels: Pixels, size: tuple[int, int], kernel: str, box: tuple[float, ...]) -> Pixels:
    from PIL import Image as Pillow

    image: Any = Pillow.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    (height, width), (left, top, right, bottom) = size, box
    if kernel != "nearest":
        image = image.resize((width, image.height), _FILTERS[kernel], box=(left, 0, right, image.height))
        left, right = 0, width
    image = image.resize((width, height), _FILTERS[kernel], box=(left, top, right, bottom))
    made = np.asarray(image, dtype=np.uint8)
    return made[:, :, None] if made.ndim == 2 else made


def resized_by_numpy(pixels: Pixels, size: tuple[int, int], kernel: str, box: tuple[float, ...]) -> Pixels:
    """What ``resized`` gives where there is no Pillow."""
    height, width, _ = pixels.shape
    left, top, right, bottom = (float(np.float32(side)) for side in box)
    if kernel == "nearest":
        return pixels[_nearest(height, top, bottom, size[0])[:, None], _nearest(width, left, right, size[1])[None]]
    across = (
        () if (left, right) == (0.0, size[1]) and width == size[1] else _weights(width, left, right, size[1], kernel)
    )
    down = (
        () if (top, bottom) == (0.0, size[0]) and height == size[0] else _weights(height, top, bottom, size[0], kernel)
    )
    # Rows that nothing further down reads are not resized across.
    first = min((block.low for block in down), default=0)
    last = max((block.low + len(block.weights) for block in down), default=height)
    planes = np.ascontiguousarray(pixels[first:last].transpose(2, 0, 1))
    planes = _across(planes, across, size[1]) if across else planes
    planes = _down(planes, down, size[0], first) if down else planes
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def luma(pixels: Pixels) -> Pixels:
    """Colour uint8 [H, W, 3] as grey [H, W, 1], as ``PIL.Image.convert("L")`` makes it of RGB."""
    wide = pixels.astype(np.uint32)
    total = wide[:, :, 0] * _LUMA[0] + wide[:, :, 1] * _LUMA[1] + wide[:, :, 2] * _LUMA[2]
    return ((total + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def _across(planes: Pixels, blocks: tuple[_Block, ...], width: int) -> Pixels:
    """[C, H, inputs] as [C, H, ``width``]."""
    made = np.empty((*planes.shape[:2], width), np.uint8)
    for block in blocks:
        read = planes[:, :, block.low : block.low + len(block.weights)].astype(np.float64)
        made[:, :, block.start : block.stop] = _eight_bits(read @ block.weights)
    return made


def _down(planes: Pixels, blocks: tuple[_Block, ...], height: int, first: int) -> Pixels:
    """[C, inputs, W], of which ``first`` were left out at the top, as [C, ``height``, W]."""
    made = np.empty((planes.shape[0], height, planes.shape[2]), np.uint8)
    for block in blocks:
        low = block.low - first
        read = planes[:, low : low + len(block.weights)].astype(np.float64)
        made[:, block.start : block.stop] = _eight_bits(block.weights.T @ read)
    return made


def _eight_bits(total: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums in fixed point as whole numbers from 0 to 255: a half is added, the bits behind the point are dropped."""
    total += _ONE >> 1
    total *= 1.0 / _ONE
    np.floor(total, out=total)
    return np.clip(total, 0, 255, out=total)


@functools.lru_cache(maxsize=64)
def _weights(inputs: int, start: float, stop: float, outputs: int, kernel: str) -> tuple[_Block, ...]:
    """How ``outputs`` pixels are made of ``inputs``, of which ``start`` to ``stop`` are resized."""
    function, reach = _KERNELS[kernel]
    scale = float(np.float32(stop) - np.float32(start)) / outputs
    wide = max(scale, 1.0)
    support, narrow = reach * wide, 1.0 / wide
    rows: list[tuple[int, list[int]]] = []
    for place in range(outputs):
        centre = start + (place + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), inputs)
        shares = [function((at - centre + 0.5) * narrow) for at in range(low, high)]
        whole = 0.0
        for share in shares:  # sum() adds more exactly than Pillow does, from Python 3.12 on
            whole += share
        if whole != 0.0:
            shares = [share / whole for share in shares]
        rows.append((low, [int(share * _ONE + (-0.5 if share < 0 else 0.5)) for share in shares]))
    return tuple(_block(rows, first, min(first + _TOGETHER, outputs)) for first in range(0, outputs, _TOGETHER))


def _block(rows: list[tuple[int, list[int]]], start: int, stop: int) -> _Block:
    some = rows[start:stop]
    low = min(first for first, _ in some)
    weights = np.zeros((max(first + len(shares) for first, shares in some) - low, len(some)))
    for column, (first, shares) in enumerate(some):
        weights[first - low : first - low + len(shares), column] = shares
    return _Block(start, stop, low, weights)


def _nearest(inputs: int, start: float, stop: float, outputs: int) -> npt.NDArray[np.int64]:
    step = float(np.float32(stop) - np.float32(start)) / outputs
    places = np.cumsum(np.r_[start + step * 0.5, np.full(outputs - 1, step)])
    return np.minimum(places.astype(np.int64), inputs - 1)
