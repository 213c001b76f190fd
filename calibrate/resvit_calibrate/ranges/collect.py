"""One pass over the calibration images: what every activation of a float model was seen to hold."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from resvit_calibrate.observe.histogram import ChannelStatistics, TensorStatistics
from resvit_calibrate.observe.meter import PROBE_STEP, Meter, coprime_step
from resvit_calibrate.observe.observers import STARTS, STEPS, VALUES, observed_model
from resvit_calibrate.ranges.estimators import Estimator, amax_from
from resvit_calibrate.ranges.statistics import Statistics, save_statistics, statistics_from_npz
from resvit_calibrate.runtime.runner import pieces
from resvit_calibrate.runtime.sessions import (
    Array,
    Arrays,
    fixed_batch,
    onnxruntime_module,
    open_session,
    run_session,
    session_options,
)
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter

__all__ = [
    "ChannelStatistics",
    "Estimator",
    "Statistics",
    "TensorStatistics",
    "amax_from",
    "collect_statistics",
    "coprime_step",
    "save_statistics",
    "statistics_from_npz",
]


class HasImages(Protocol):
    """What a batch of the data wing looks like from here."""

    def feeds(self, image_input: str) -> Arrays:
        """Images float32 [B, C, H, W] under ``image_input``, and what else the model reads."""
        ...


Batches: TypeAlias = Iterable[HasImages] | Iterable[Arrays]


class Pass(enum.Enum):
    """What images are run for: the label of the progress display, the name of an image, and what is kept."""

    CALIBRATION = ("calibrate", "calibration image")
    """Everything, channels and images apart."""
    CHECK = ("check ranges", "validation image")
    """Extremes and histograms only."""

    def __init__(self, label: str, image: str) -> None:
        self.label, self.image = label, image


def collect_statistics(
    model: Path,
    batches: Batches,
    reporter: Reporter = SILENT,
    total: int = 0,
    *,
    seed: int = 0,
    purpose: Pass = Pass.CALIBRATION,
) -> Statistics:
    """Run ``batches`` through the float ONNX ``model`` once and measure every float activation.

    A batch is a ``Batch``, or arrays under the names of the model's inputs.
    ``total`` is the number of images, for the progress display. Minimum and maximum are exact; histograms of
    what may be quantised hold at most 16,384 values per batch or 1,024 per image, at a stride coprime to the dimensions
    (one that divides the channels would see the same few for ever). Memory grows with the images by one number
    for each sampled tensor and image.

    Raises ResvitError if there is no image, if an image or an activation is NaN or infinite (naming the first
    such tensor and its node), and if the model cannot be run on them.
    """
    observed = observed_model(model)
    session = open_session(observed.model, _options(), folder=observed.folder)
    observed = dataclasses.replace(observed, model=b"")  # the session has its own copy
    meter = Meter(observed, np.random.default_rng(seed), channels=purpose is Pass.CALIBRATION)
    fixed = fixed_batch(session)
    images = 0
    for batch in _counted(_arrays(batches, observed.input), reporter, total, purpose.label):
        whole = batch[observed.input]
        if not len(whole):
            continue
        _require_finite_images(whole, images, observed.input, purpose)
        for piece, size in pieces(batch, fixed or len(whole)):
            if meter.probed != piece[observed.input].shape[1:]:  # images of several sizes have as many token counts
                meter.probe(session, piece, fixed)
            feeds = {**piece, **meter.placement(len(piece[observed.input]))}
            values, *others = run_session(session, meter.outputs, feeds)
            if not meter.add(values, *others, real=size):
                _explain_nonfinite(model, piece, images, purpose)
            images += size
    if not images:
        raise ResvitError(
            f"There is no {purpose.image}, so there are no ranges: they are measured, never invented.",
            "Give a data set with images (a few hundred are enough).",
        )
    return Statistics(meter.statistics(), images)


def _options() -> Any:
    options = session_options()
    # The default order runs the whole model before it measures, and keeps every activation until then.
    # By priority, ready nodes run in the order of the file: each activation is measured when it is made.
    options.execution_order = onnxruntime_module().ExecutionOrder.PRIORITY_BASED
    return options


def _arrays(batches: Batches, name: str) -> Iterator[Arrays]:
    for batch in batches:
        arrays = batch if isinstance(batch, dict) else batch.feeds(name)
        if name not in arrays:
            raise ResvitError(
                f"The model's images go into {name!r}, and the batch holds {sorted(arrays)}.",
                "Name the arrays after the model's inputs.",
            )
        yield {key: np.ascontiguousarray(value) for key, value in arrays.items()}


def _counted(batches: Iterator[Arrays], reporter: Reporter, total: int, label: str) -> Iterator[Arrays]:
    """Pass batches through the progress display, weighed by the first one's number of images."""
    first = next(batches, None)
    if first is not None:
        weight = len(next(iter(first.values())))
        yield from reporter.track(itertools.chain([first], batches), label, total, weight)


def _require_finite_images(images: Array, before: int, name: str, purpose: Pass) -> None:
    if np.isfinite(images.sum(dtype=np.float64)):
        return
    finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
    raise ResvitError(
        f"{purpose.image.capitalize()} {before + int(np.argmin(finite))} (input {name!r}) holds NaN or "
        "infinite values.",
        "Check the image, and the mean and std of the preprocessing (a std of zero does this).",
    )


def _explain_nonfinite(model: Path, piece: Arrays, before: int, purpose: Pass) -> None:
    """Run the batch again with every tensor summed, and raise with the name of the first bad one."""
    observed = observed_model(model, sum_all=True)
    session = open_session(observed.model, _options(), folder=observed.folder)
    feeds = dict(piece)
    if observed.sampled:
        zeros = np.zeros(len(observed.sampled), np.int64)
        feeds |= {STARTS: zeros, STEPS: zeros + PROBE_STEP}
    (values,) = run_session(session, [VALUES], feeds)
    low, high, total = observed.extremes(values)
    infinite, nan = np.isinf(low) | np.isinf(high), np.isnan(low) | np.isnan(high) | np.isnan(total)
    index = int(np.argmax(infinite | nan))
    what = "infinite values" if infinite[index] else "NaN"
    name = observed.measured[index]
    raise ResvitError(
        f"The float model computes {what} in tensor {name!r}, written by {observed.producer[name]}, on a batch "
        f"that begins with {purpose.image} {before}.",
        "Nothing can be quantised from such numbers. Check the checkpoint (training that diverged leaves NaN) "
        "and the preprocessing.",
    )
