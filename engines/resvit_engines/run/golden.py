"""Whether what runs here computes what was validated: golden images in, outputs compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.records import Record
from resvit_engines.rows import paired_rows
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.run.golden_files import (
    golden_arrays,
    golden_inputs,
    input_name,
    moving_sqnr_db,
    other_golden_outputs,
    output_of,
    sqnr_db,
)
from resvit_engines.run.runner import Runner, open_runner
from resvit_engines.trt.running import TensorSpec

TOLERANCE_DB = 20.0
_SIGMAS = 3.0
_REINSTALL = "Do not use it: keep the version that runs now, and build the engine again on this device."


class _Checked(Protocol):
    label: str
    why: str

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    def __call__(self, arrays: Mapping[str, Array]) -> Arrays: ...


@dataclass(frozen=True)
class GoldenReport:
    """Outputs beside those that were validated.

    ``max_abs`` is the largest difference, ``sqnr_db`` the signal-to-noise ratio over all outputs in dB (None: no
    difference), ``agreement`` the share of images with the same top answer (None where the outputs are no classes),
    ``tolerance_db`` the smallest SQNR that passes, ``label`` what ran, and ``why`` why not the engine.
    """

    images: int
    max_abs: float
    sqnr_db: float | None
    agreement: float | None
    tolerance_db: float
    label: str
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "images": self.images,
            "max_abs": self.max_abs,
            "sqnr_db": None if self.sqnr_db is None else round(self.sqnr_db, 2),
            "agreement": self.agreement,
            "tolerance_db": self.tolerance_db,
            "label": self.label,
            "why": self.why,
        }

    @classmethod
    def from_json(cls, record: Record) -> GoldenReport:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        return cls(
            record.whole("images", 1),
            record.number("max_abs", 0),
            record.optional("sqnr_db", record.number),
            record.optional("agreement", lambda key: record.number(key, 0, 1)),
            record.number("tolerance_db"),
            record.text("label"),
            record.text("why"),
        )

    @property
    def sentence(self) -> str:
        """The result in words."""
        near = "the very outputs" if self.sqnr_db is None else f"SQNR {self.sqnr_db:.1f} dB"
        answers = "" if self.agreement is None else f", {self.agreement:.0%} of the answers the same"
        return f"{self.images} golden images: {near}{answers} ({self.label})"


def golden_check(folder: Path, manifest: Manifest, runtime: str = "auto") -> GoldenReport:
    """Run the golden images of an unpacked, verified bundle and compare with the outputs that were validated.

    Of a network that takes several sizes there are some of each. Those of the usual size run in batches of the
    smallest, the usual and the largest size of the engine's profile, at other places each time: kernels, and their
    faults, differ from batch to batch. The report is that of the worst.

    The validated outputs are ONNX Runtime's of the same Q/DQ graph. An engine rounds its FP16 sums differently, and
    where that moves a value across the edge of an 8-bit step, the step flips: two equivalent forms of one graph were
    measured 30 dB apart. Another model, wrong weights or other preprocessing end near 0 dB. So 20 dB pass, and of what
    moves from image to image as much as the bundle says, which was measured on this very network; and where
    the outputs are [N, K] classes, the top answer may differ only where the two answers were closer than that noise
    explains: 3 standard deviations of a difference, 3 · √2 · rms. NaN and infinity never pass.

    Raises:
        ResvitError: MISMATCH where the outputs differ by more; INPUT for golden files that are missing or do not
            fit; whatever ``open_runner`` raises.
    """
    with open_runner(folder, manifest, runtime) as runner:
        return golden_check_of(runner, folder, manifest)


def golden_check_of(runner: Runner, folder: Path, manifest: Manifest) -> GoldenReport:
    """The same of a runner that is open; raises what ``golden_check`` does, but for ``open_runner``."""
    reports = _checked(folder, manifest, runner, whole=True)
    for golden in manifest.golden.at_sizes if manifest.golden else ():
        reports += _checked(folder, dataclasses.replace(manifest, golden=golden), runner, whole=False)
    return min(reports, key=lambda report: math.inf if report.sqnr_db is None else report.sqnr_db)


def _checked(folder: Path, manifest: Manifest, runner: Runner, *, whole: bool) -> list[GoldenReport]:
    """Check the golden images of one size: in batches of every kind, or unless ``whole`` in the smallest alone."""
    images, expected = golden_arrays(folder, manifest.golden)
    count = len(images)
    others = other_golden_outputs(folder, manifest.golden, count)
    beside = golden_inputs(folder, manifest.golden, count)
    reports = []
    batches = golden_batches(runner.batch, manifest, count)
    for turn, batch in enumerate(batches if whole else batches[:1]):
        at = (np.arange(-(-count // batch) * batch) + turn) % count
        report = check_runner(
            _InBatches(runner, batch, "" if whole else f", images of {images.shape[2]}x{images.shape[3]}"),
            images[at],
            expected[at],
            manifest,
            {name: array[at] for name, array in others.items()},
            {name: array[at] for name, array in beside.items()},
        )
        reports.append(dataclasses.replace(report, images=count))
    return reports


def golden_batches(bounds: tuple[int, int], manifest: Manifest, images: int) -> tuple[int, ...]:
    """The smallest, the usual and the largest batch of the build, within what runs here; without a build 1 and all."""
    wanted = manifest.build.batch if manifest.build else (1, images)
    return tuple(dict.fromkeys(min(max(batch, bounds[0]), bounds[1]) for batch in wanted))


class _InBatches:
    """A runner that runs in batches of one size."""

    def __init__(self, runner: Runner, batch: int, of: str = "") -> None:
        self.inputs, self.why, self.batch = runner.inputs, runner.why, batch
        self.label = f"{runner.label}, batch {batch}{of}"
        self.runner = runner

    def __call__(self, arrays: Mapping[str, Array]) -> Arrays:
        """The outputs [N, …] of N images, a multiple of the batch."""
        count = len(next(iter(arrays.values())))
        parts = [
            self.runner({name: value[start : start + self.batch] for name, value in arrays.items()})
            for start in range(0, count, self.batch)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_runner(
    runner: _Checked,
    images: Array,
    expected: Array,
    manifest: Manifest,
    others: Mapping[str, Array] | None = None,
    beside: Mapping[str, Array] | None = None,
) -> GoldenReport:
    """Compare what ``runner`` makes of the golden ``images`` [N, …] with ``expected`` [N, …].

    ``beside`` is what the network reads beside them, ``others`` are further outputs, both by name. Each output must
    pass by itself; the report tells of the worst. Where the manifest says that the answers are sets, their rows are
    paired first (``paired_rows``).

    Raises:
        ResvitError: MISMATCH as ``golden_check``.
    """
    outputs = runner({input_name(runner, manifest): images, **(beside or {})})
    if manifest.golden and manifest.golden.sets:
        outputs = paired_rows({output_of(outputs): expected, **(others or {})}, outputs)
    least = manifest.golden.least_db if manifest.golden else {}
    judged = output_of(outputs)
    reports = [_compared(runner, images, outputs[judged], expected, least=least.get(judged))]
    for name, array in (others or {}).items():
        if name not in outputs:
            raise _mismatch(f"it has no output {name}", runner.label)
        reports.append(_compared(runner, images, outputs[name], array, f"of {name}: ", least=least.get(name)))
    return min(reports, key=lambda report: math.inf if report.sqnr_db is None else report.sqnr_db)


def _compared(
    runner: _Checked, images: Array, output: Array, expected: Array, which: str = "", *, least: float | None = None
) -> GoldenReport:
    """Compare one output with what was validated; ``least`` is the SQNR that what moves must keep, in dB."""
    if output.shape != expected.shape:
        raise _mismatch(
            f"{which}the output is {list(output.shape)} and that which was validated {list(expected.shape)}",
            runner.label,
        )
    if not np.isfinite(output).all():
        raise _mismatch(f"{which}{int((~np.isfinite(output)).sum())} of its outputs are NaN or infinite", runner.label)
    wide, true = output.astype(np.float64), expected.astype(np.float64)
    noise = float(np.linalg.norm(wide - true))
    sqnr = sqnr_db(true, wide)
    answers = None
    if true.ndim == 2 and true.shape[1] > 1:
        answers = float((wide.argmax(1) == true.argmax(1)).mean())
    largest = float(np.abs(wide - true).max(initial=0.0))
    report = GoldenReport(len(images), largest, sqnr, answers, TOLERANCE_DB, runner.label, runner.why)
    if sqnr is not None and sqnr < TOLERANCE_DB:
        raise _mismatch(f"{which}SQNR {sqnr:.1f} dB, and {TOLERANCE_DB:.0f} dB are needed", runner.label)
    moving = moving_sqnr_db(true, wide)
    if least is not None and moving is not None and moving < least:
        raise _mismatch(
            f"{which}of what moves from image to image, SQNR {moving:.1f} dB, and {least:.0f} dB are needed",
            runner.label,
        )
    if answers is not None and answers < 1.0:
        rows = np.arange(len(true))
        margin = true.max(1) - true[rows, wide.argmax(1)]
        allowed = _SIGMAS * np.sqrt(2.0) * noise / np.sqrt(true.size)
        if (margin > allowed).any():
            worst = int(margin.argmax())
            raise _mismatch(
                f"golden image {worst} is answered with {int(wide[worst].argmax())} instead of "
                f"{int(true[worst].argmax())}, by more than rounding explains",
                runner.label,
            )
    return report


def _mismatch(why: str, label: str) -> ResvitError:
    return ResvitError(
        f"{label} computes something else than what was validated: {why}.", _REINSTALL, ExitCode.MISMATCH
    )
