"""Depth: a folder `depth` beside the images, or depths in an array."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.targets import UNKNOWN_DEPTH, DepthTarget, TargetOptions
from resvit_calibrate.readers.paired import PairedPixels, Part, grey_values, pairs_in

SUFFIXES = (".png", ".npy")
_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


class DepthPixels(PairedPixels):
    """Images with a depth map each: 16-bit PNG of ``depth_scale`` metres a step, or ``.npy`` of metres."""

    def values(self, data: bytes, path: Path) -> npt.NDArray[np.generic]:
        """Decode a depth map: float32 [H, W] in metres, 0 where it is unknown."""
        if path.suffix.lower() == ".npy":
            # Never with pickle: such a file would run code.
            stored = np.load(io.BytesIO(data), allow_pickle=False)
            if stored.dtype.kind != "f":
                raise ValueError(f"it holds {stored.dtype}; write metres as floating-point numbers")
            return metres(_flat(stored))
        stored = grey_values(data, _MODES, "depth as a grey image of 16 bits, or metres as .npy")
        return metres(stored.astype(np.float64) * self.options.depth_scale)

    def made(self, values: npt.NDArray[np.generic]) -> DepthTarget:
        """Depths [H, W] as a target."""
        return DepthTarget(values.astype(np.float32, copy=False))


def pixels_from_depth(part: Part, options: TargetOptions) -> DepthPixels:
    """Pair images with depths; raises ``ResvitError`` where nothing matches."""
    return DepthPixels(pairs_in(part, SUFFIXES), "depth", options)


def metres(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Depths as float32, 0 wherever they are not a positive finite number: a sensor's ways of saying "unknown"."""
    depth = values.astype(np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(UNKNOWN_DEPTH))


def _flat(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """[H, W] from [1, H, W] and [H, W, 1] too."""
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[:, :, 0]
    if values.ndim != 2:
        raise ValueError(f"it has the shape {list(values.shape)}, not [H, W]")
    return values
