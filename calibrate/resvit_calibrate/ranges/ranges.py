"""Ranges: what calibration hands to quantisation, one JSON file."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import numpy as np

from resvit_calibrate.observe.histogram import TensorStatistics
from resvit_calibrate.ranges.estimators import DEAD_AMAX, PRECISIONS, Estimator, amax_from
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ResvitError
from resvit_engines.files import canonical_json, write_atomic
from resvit_engines.outside import json_from_outside

_COARSE = 64


@dataclasses.dataclass(frozen=True)
class TensorRange:
    """One tensor's range; ``amax`` and ``histogram`` are empty where no histogram was kept."""

    minimum: float
    maximum: float
    amax: dict[str, dict[str, float]]
    """By precision ("int8", "fp8") and estimator."""
    histogram: tuple[int, ...]
    """Counts [64] of the magnitudes that are not zero, for a picture."""
    bin_width: float
    """Of the 64 bins."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "min": self.minimum,
            "max": self.maximum,
            "amax": self.amax,
            "histogram": list(self.histogram),
            "bin_width": self.bin_width,
        }


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The ranges of all float activations, by their names in the float ONNX model."""

    tensors: dict[str, TensorRange]
    images: int
    data_digest: str

    def amax(self, tensor: str, precision: str, estimator: Estimator) -> float:
        """The amax of one tensor: finite and positive.

        Raises ResvitError for a tensor that was not calibrated, and for one without a histogram unless the
        estimator is MAX.
        """
        if tensor not in self.tensors:
            near = difflib.get_close_matches(tensor, self.tensors, 3)
            raise ResvitError(
                f"Tensor {tensor!r} was not calibrated"
                + (f" (there is {', '.join(map(repr, near))})." if near else "."),
                "Calibrate the same ONNX file that is quantised.",
            )
        entry = self.tensors[tensor]
        if precision in entry.amax:
            return entry.amax[precision][estimator.value]
        statistics = TensorStatistics(0, entry.minimum, entry.maximum, None, 0.0)
        return amax_from(statistics, estimator, precision)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "images": self.images,
            "data_digest": self.data_digest,
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
        }


def ranges_from(statistics: Statistics, data_digest: str) -> Ranges:
    """Turn statistics into ranges, with every estimator's amax for every precision."""
    # Reshaped and transposed tensors have the statistics of their source: each is estimated once.
    done: dict[tuple[bytes, int, float, float], TensorRange] = {}
    tensors = {}
    for name, entry in statistics.tensors.items():
        histogram = b"" if entry.histogram is None else entry.histogram.tobytes()
        key = (histogram, entry.count, entry.minimum, entry.maximum)
        if key not in done:
            done[key] = _tensor_range(entry)
        tensors[name] = done[key]
    return Ranges(tensors, statistics.images, data_digest)


def _tensor_range(statistics: TensorStatistics) -> TensorRange:
    if statistics.histogram is None:
        return TensorRange(statistics.minimum, statistics.maximum, {}, (), 0.0)
    amax = {
        precision: {estimator.value: amax_from(statistics, estimator, precision) for estimator in Estimator}
        for precision in PRECISIONS
    }
    filled = np.flatnonzero(statistics.histogram)
    merged = -(-(int(filled[-1]) + 1) // _COARSE) if filled.size else 1
    counts = statistics.histogram[: merged * _COARSE].reshape(_COARSE, merged).sum(axis=1)
    width = statistics.bin_width * merged or DEAD_AMAX / _COARSE
    return TensorRange(statistics.minimum, statistics.maximum, amax, tuple(counts.tolist()), width)


def save_ranges(ranges: Ranges, path: Path) -> None:
    """Write ranges as JSON: equal ranges give equal bytes."""
    write_atomic(path, canonical_json(ranges.to_json()))


def ranges_from_json(data: bytes, where: str) -> Ranges:
    """Read what ``save_ranges`` wrote, which errors call ``where``. Raises ResvitError for anything else."""
    fix = "Run the calibrate stage again."
    stored = json_from_outside(data, where, fix)
    try:
        tensors = {
            name: TensorRange(
                float(entry["min"]),
                float(entry["max"]),
                {precision: {k: float(v) for k, v in by.items()} for precision, by in entry["amax"].items()},
                tuple(int(count) for count in entry["histogram"]),
                float(entry["bin_width"]),
            )
            for name, entry in stored["tensors"].items()
        }
        return Ranges(tensors, int(stored["images"]), str(stored["data_digest"]))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ResvitError(f"{where} does not hold calibration ranges.", fix) from error
