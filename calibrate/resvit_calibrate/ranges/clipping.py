"""How much of what a network computes lies beyond its ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from resvit_calibrate.observe.histogram import TensorStatistics
from resvit_calibrate.ranges.collect import Batches, Pass, collect_statistics
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.progress import SILENT, Reporter


def clipped_shares(
    model: Path, amax: Mapping[str, float], batches: Batches, reporter: Reporter = SILENT, total: int = 0
) -> dict[str, float]:
    """The share, 0 to 1, of the non-zero values of each tensor that lie beyond its ``amax``, on some images.

    Runs the float ONNX ``model`` once over ``batches`` (64 images are enough, ``total`` of them for the progress
    display), with the sampling of calibration. Tensors without a histogram are left out. Raises ResvitError for
    images and models that cannot be measured, as ``collect_statistics`` does.
    """
    return shares_from_statistics(collect_statistics(model, batches, reporter, total, purpose=Pass.CHECK), amax)


def shares_from_statistics(statistics: Statistics, amax: Mapping[str, float]) -> dict[str, float]:
    """The same of images that have been measured already: those of calibration."""
    return {
        name: _clipped(statistics.tensors[name], clip)
        for name, clip in amax.items()
        if name in statistics.tensors and statistics.tensors[name].histogram is not None
    }


def _clipped(statistics: TensorStatistics, amax: float) -> float:
    """Values are taken as spread evenly over their bin of the histogram, and none beyond the exact maximum."""
    assert statistics.histogram is not None
    total = int(statistics.histogram.sum())
    if not total or amax >= statistics.absmax:
        return 0.0
    edges = np.minimum(np.arange(statistics.histogram.size + 1) * statistics.bin_width, statistics.absmax)
    widths = np.diff(edges)
    beyond = np.clip(edges[1:] - amax, 0.0, widths)
    share = np.divide(beyond, widths, out=np.zeros_like(widths), where=widths > 0)
    return float(share @ statistics.histogram / total)
