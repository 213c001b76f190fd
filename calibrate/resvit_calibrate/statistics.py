"""One pass over the calibration images: what every activation of a float model was seen to hold."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from resvit_calibrate.estimators import Estimator, amax_from
from resvit_calibrate.histogram import GrowingHistogram, TensorStatistics
from resvit_calibrate.observers import SIZES, STARTS, STEPS, VALUES, ObservedModel, observed_model
from resvit_calibrate.runtime import pieces
from resvit_calibrate.sessions import (
    Array,
    Arrays,
    fixed_batch,
    onnxruntime_module,
    open_session,
    run_session,
    session_options,
)
from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.progress import SILENT, Reporter

__all__ = [
    "Estimator",
    "Statistics",
    "TensorStatistics",
    "amax_from",
    "collect_statistics",
    "load_statistics",
    "save_statistics",
]

_SAMPLE = 1 << 14
"""Values sampled per tensor and batch, at most."""
_PROBE_STEP = 1009


class HasImages(Protocol):
    """What a batch of the data wing looks like from here."""

    @property
    def images(self) -> Array:
        """Float32 [B, C, H, W]."""
        ...


Batches: TypeAlias = Iterable[HasImages] | Iterable[Arrays]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics by tensor name, of every float activation of the model."""

    tensors: dict[str, TensorStatistics]
    images: int


def collect_statistics(
    model: Path, batches: Batches, reporter: Reporter = SILENT, total: int = 0, *, seed: int = 0
) -> Statistics:
    """Run ``batches`` through the float ONNX ``model`` once and measure every float activation.

    A batch is an object with ``images`` float32 [B, C, H, W], or arrays under the names of the model's inputs.
    ``total`` is the number of images, for the progress display. Minimum and maximum are exact; histograms of
    what may be quantised hold at most 16,384 values per batch, at a stride coprime to the tensor's dimensions
    (one that divides the channels would see the same few for ever). Memory does not grow with the images.

    Raises ResvitError if there is no image, if an image or an activation is NaN or infinite (naming the first
    such tensor and its node), and if the model cannot be run on them.
    """
    observed = observed_model(model)
    session = open_session(observed.model, _options(), folder=observed.folder)
    observed = dataclasses.replace(observed, model=b"")  # the session has its own copy
    meter = _Meter(observed, np.random.default_rng(seed))
    fixed = fixed_batch(session)
    images = 0
    for batch in _counted(_arrays(batches, observed.input), reporter, total):
        whole = batch[observed.input]
        if not len(whole):
            continue
        _require_finite_images(whole, images, observed.input)
        for piece, size in pieces(batch, fixed or len(whole)):
            if not meter.sizes.size:
                meter.probe(session, piece, fixed)
            feeds = {**piece, **meter.placement(len(piece[observed.input]))}
            values, *sizes = run_session(session, meter.outputs, feeds)
            if not meter.add(values, *sizes, real=size):
                _explain_nonfinite(model, piece, images)
            images += size
    if not images:
        raise ResvitError(
            "There is no calibration image, so there are no ranges: they are measured, never invented.",
            "Give a data set with images (a few hundred are enough).",
        )
    return meter.statistics(images)


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write statistics as an .npz without pickled objects, whole or not at all."""
    names = list(statistics.tensors)
    table = [statistics.tensors[name] for name in names]
    kept = [entry.histogram for entry in table if entry.histogram is not None]
    about = {
        "images": statistics.images,
        "names": names,
        "has_histogram": [t.histogram is not None for t in table],
    }
    with atomic_file(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            count=np.array([entry.count for entry in table], np.int64),
            minimum=np.array([entry.minimum for entry in table]),
            maximum=np.array([entry.maximum for entry in table]),
            bin_width=np.array([entry.bin_width for entry in table]),
            histograms=np.stack(kept) if kept else np.zeros((0, 0), np.int64),
        )


def load_statistics(path: Path) -> Statistics:
    """Read what ``save_statistics`` wrote. Raises ResvitError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            about: dict[str, Any] = json.loads(stored["about"].tobytes())
            histograms = iter(stored["histograms"])
            columns = zip(
                about["names"],
                about["has_histogram"],
                stored["count"].tolist(),
                stored["minimum"].tolist(),
                stored["maximum"].tolist(),
                stored["bin_width"].tolist(),
                strict=True,
            )
            tensors = {
                name: TensorStatistics(count, low, high, next(histograms) if kept else None, width)
                for name, kept, count, low, high, width in columns
            }
            return Statistics(tensors, int(about["images"]))
    except Exception as error:
        raise ResvitError(f"{path} does not hold calibration statistics.", "Run the calibrate stage again.") from error


class _Meter:
    """Adds up what an observed model measured, batch by batch."""

    def __init__(self, observed: ObservedModel, random: np.random.Generator) -> None:
        self.observed = observed
        self.random = random
        count = len(observed.measured)
        self.minima, self.maxima = np.full(count, np.inf), np.full(count, -np.inf)
        self.histograms = {name: GrowingHistogram() for name in observed.sampled}
        self.sizes = np.zeros(0, np.int64)  # [S], values per image
        self.outputs = [VALUES] + ([SIZES] if observed.sampled else [])
        self.starts = self.steps = self.sizes
        self.batch = 0
        self.row = {name: index for index, name in enumerate(observed.measured)}

    def probe(self, session: Any, piece: Arrays, fixed: int | None) -> None:
        """Learn how large the sampled tensors are, from one image where the batch size is free."""
        if not self.observed.sampled:
            return
        one = piece if fixed else {name: value[:1] for name, value in piece.items()}
        index = np.zeros(len(self.observed.sampled), np.int64)
        sizes: Array
        (sizes,) = run_session(session, [SIZES], {**one, STARTS: index, STEPS: index + _PROBE_STEP})
        self.sizes = np.maximum(sizes // (fixed or 1), 1)

    def placement(self, batch: int) -> Arrays:
        """The strides for this batch size, and starts drawn anew: feeds of the observed model."""
        if not self.observed.sampled:
            return {}
        if batch != self.batch:
            self.batch = batch
            self.steps = np.array([coprime_step(int(size) * batch) for size in self.sizes], np.int64)
        self.starts = self.random.integers(0, self.steps)
        return {STARTS: self.starts, STEPS: self.steps}

    def add(self, values: Array, sizes: Array | None = None, *, real: int) -> bool:
        """Take one batch's measurements, of which ``real`` images are no padding.

        False, and nothing taken, if anything is NaN or infinite.
        """
        low, high, sums = self.observed.extremes(values)
        samples = values[: values.size - low.size - high.size - sums.size]
        if not all(np.isfinite(part).all() for part in (low, high, sums, samples)):
            return False
        self.minima, self.maxima = np.minimum(self.minima, low), np.maximum(self.maxima, high)
        if sizes is None:
            return True
        lengths = np.maximum(-((self.starts - sizes) // self.steps), 0)
        # Padding comes last in the batch, so what is sampled of it comes last in the sample.
        kept = np.maximum(-((self.starts - sizes * real // self.batch) // self.steps), 0)
        begins = np.cumsum(lengths) - lengths
        for name, begin, length in zip(self.observed.sampled, begins, kept, strict=True):
            low_high = self._extremes(name)
            self.histograms[name].add(samples[begin : begin + length], max(map(abs, low_high)))
        return True

    def _extremes(self, name: str) -> tuple[float, float]:
        source, relu = self.observed.derived.get(name, (name, False))
        low, high = float(self.minima[self.row[source]]), float(self.maxima[self.row[source]])
        return (max(low, 0.0), max(high, 0.0)) if relu else (low, high)

    def statistics(self, images: int) -> Statistics:
        """Everything added up, derived tensors included."""
        tensors = {}
        for name in (*self.observed.measured, *self.observed.derived):
            root = self.observed.root(name)
            histogram = self.histograms.get(root)
            low, high = self._extremes(name)
            tensors[name] = (
                TensorStatistics(histogram.count, low, high, histogram.counts, histogram.bin_width)
                if histogram
                else TensorStatistics(0, low, high, None, 0.0)
            )
        return Statistics(tensors, images)


def coprime_step(size: int) -> int:
    """The smallest stride that leaves at most 16,384 of ``size`` values and shares no factor with it.

    The size is the product of the dimensions, so the stride is coprime to each of them.
    """
    if size <= _SAMPLE:
        return 1
    return next(step for step in itertools.count(-(-size // _SAMPLE)) if np.gcd(step, size) == 1)


def _options() -> Any:
    options = session_options()
    # The default order runs the whole model before it measures, and keeps every activation until then.
    # By priority, ready nodes run in the order of the file: each activation is measured when it is made.
    options.execution_order = onnxruntime_module().ExecutionOrder.PRIORITY_BASED
    return options


def _arrays(batches: Batches, name: str) -> Iterator[Arrays]:
    for batch in batches:
        arrays = batch if isinstance(batch, dict) else {name: batch.images}
        if name not in arrays:
            raise ResvitError(
                f"The model's images go into {name!r}, and the batch holds {sorted(arrays)}.",
                "Name the arrays after the model's inputs.",
            )
        yield {key: np.ascontiguousarray(value) for key, value in arrays.items()}


def _counted(batches: Iterator[Arrays], reporter: Reporter, total: int) -> Iterator[Arrays]:
    """Pass batches through the progress display, weighed by the first one's number of images."""
    first = next(batches, None)
    if first is not None:
        weight = len(next(iter(first.values())))
        yield from reporter.track(itertools.chain([first], batches), "calibrate", total, weight)


def _require_finite_images(images: Array, before: int, name: str) -> None:
    if np.isfinite(images.sum(dtype=np.float64)):
        return
    finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
    raise ResvitError(
        f"Calibration image {before + int(np.argmin(finite))} (input {name!r}) holds NaN or infinite values.",
        "Check the image, and the mean and std of the preprocessing (a std of zero does this).",
    )


def _explain_nonfinite(model: Path, piece: Arrays, before: int) -> None:
    """Run the batch again with every tensor summed, and raise with the name of the first bad one."""
    observed = observed_model(model, sum_all=True)
    session = open_session(observed.model, _options(), folder=observed.folder)
    feeds = dict(piece)
    if observed.sampled:
        zeros = np.zeros(len(observed.sampled), np.int64)
        feeds |= {STARTS: zeros, STEPS: zeros + _PROBE_STEP}
    (values,) = run_session(session, [VALUES], feeds)
    low, high, total = observed.extremes(values)
    infinite, nan = np.isinf(low) | np.isinf(high), np.isnan(low) | np.isnan(high) | np.isnan(total)
    index = int(np.argmax(infinite | nan | np.isinf(total)))
    what = "infinite values" if infinite[index] else "NaN" if nan[index] else "numbers too large to add up"
    name = observed.measured[index]
    raise ResvitError(
        f"The float model computes {what} in tensor {name!r}, written by {observed.producer[name]}, on a batch "
        f"that begins with calibration image {before}.",
        "Nothing can be quantised from such numbers. Check the checkpoint (training that diverged leaves NaN) "
        "and the preprocessing.",
    )
