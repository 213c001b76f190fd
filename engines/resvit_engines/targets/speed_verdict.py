"""The second half of a verdict: is the quantised network faster than the same network in FP16, and who says so?"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from resvit_engines.targets.costs import Prediction
from resvit_engines.targets.layer_work import LayerKind
from resvit_engines.targets.table import Builder, Precision, Target
from resvit_engines.targets.tensorrt_rules import RATIO_ERROR

_NOTABLE = 1.02
"""A gain below this is none: no prediction is that exact, and layer times are not either."""


class SpeedKind(str, enum.Enum):
    """What is known of the speed against FP16."""

    FASTER = "faster"
    NOT_FASTER = "not faster"
    NOT_KNOWN = "not known"
    FP16_ITSELF = "FP16 itself"
    """FP16 ships, and was asked for: there is nothing to compare."""


class Evidence(str, enum.Enum):
    """What a verdict on speed rests on."""

    ENGINES = "both engines, timed on the device in turns"
    LAYER_TIMES = "layer times measured on the device"
    RULES = "rules that were held to engines of TensorRT"
    PEAKS = "the device's peak rates, which no engine was held to"
    NONE = "nothing: times of a processor are measured, not predicted"
    SAME = "what ships is FP16 itself"


@dataclass(frozen=True)
class SpeedVerdict:
    """Whether 8 bits pay on a target.

    ``gain`` is FP16's time over the quantised network's; ``off_by`` is how far the evidence was seen to be off, as a
    share of the gain, None where that is not known. ``headline`` says it in short, ``sentence`` with times and traffic.
    """

    kind: SpeedKind
    gain: float
    evidence: Evidence
    off_by: float | None
    headline: str
    sentence: str

    @property
    def faster(self) -> bool:
        """Whether a gain is predicted at all, however sure that is."""
        return self.gain >= _NOTABLE

    def for_wish(self, asked: Precision) -> SpeedVerdict:
        """The verdict where ``asked`` was asked for: FP16 that ships in place of 8 bits is no faster than FP16."""
        if self.kind is not SpeedKind.FP16_ITSELF or not asked.quantises:
            return self
        headline = f"What ships is {self.headline.replace('FP16,', 'FP16:', 1)}"
        return dataclasses.replace(self, kind=SpeedKind.NOT_FASTER, headline=headline)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "speed": self.kind.value,
            "gain": self.gain,
            "faster": self.faster,
            "evidence": self.evidence.value,
            "off_by": self.off_by,
            "headline": self.headline,
            "sentence": self.sentence,
        }


def judge_speed(fp16: Prediction, chosen: Prediction, target: Target) -> SpeedVerdict:
    """Hold the predicted time of a quantised network against that of the same one in FP16, both on ``target``.

    Evidence that is known to be off by a share decides nothing within it. What TensorRT for RTX makes of a network was
    held to no engine, so that a prediction for it decides nothing at all. Times of all convolutions and linear layers,
    measured on the device, decide.
    """
    used = {layer.precision for layer in chosen.layers} - {Precision.FP16}
    measured = sum(layer.measured for layer in chosen.layers)
    if not used:
        told = "predicted, from measured layer times," if measured else "predicted"
        sentence = f"FP16: {told} {fp16.milliseconds:.3f} ms on {target.title}."
        headline = f"FP16, predicted {fp16.milliseconds:.3f} ms on {target.title}"
        return SpeedVerdict(SpeedKind.FP16_ITSELF, 1.0, Evidence.SAME, None, headline, sentence)
    label = " and ".join(p.value.upper() for p in Precision if p in used)
    gain = fp16.total_us / chosen.total_us
    evidence, off_by = _evidence(chosen, target)
    if off_by is None or (off_by and abs(gain - 1) < off_by):
        kind = SpeedKind.NOT_KNOWN
    else:
        kind = SpeedKind.FASTER if gain >= _NOTABLE else SpeedKind.NOT_FASTER
    times = f"{chosen.milliseconds:.3f} against {fp16.milliseconds:.3f} ms"
    said = f"{label} is predicted {gain:.2f} times as fast as FP16 on {target.title}"
    doubt = ""
    if kind is SpeedKind.NOT_KNOWN:
        doubt = "no engine was ever held to this" if off_by is None else f"that may be {off_by:.0%} off"
        doubt = f"; {doubt}, so time both"
    detail = (
        f"{times}, {chosen.kernels} against {fp16.kernels} kernels, "
        f"{chosen.activation_bytes / 1e6:.1f} against {fp16.activation_bytes / 1e6:.1f} MB of activations"
    )
    if any(layer.kind is LayerKind.ATTENTION and layer.kernels > 1 for layer in chosen.layers):
        # An audit of the same network has fewer: an engine's list has these copies inside attention.
        detail += ", with the copies of packed queries, keys and values, and of each tensor what is read"
    fixed_us = sum(layer.fixed_us for layer in fp16.layers)
    if gain < _NOTABLE and fixed_us > fp16.total_us / 2:
        detail += f"; {fixed_us / 1e3:.3f} ms of FP16's are the fixed cost of kernels, which 8 bits do not change"
    advice = doubt or ("" if kind is SpeedKind.FASTER else "; build with --precision fp16")
    sentence = f"{said}, by {evidence.value}: {detail}{advice}."
    headline = f"{said} ({times}), by {evidence.value}{doubt}"
    return SpeedVerdict(kind, gain, evidence, off_by, headline, sentence)


def measured_speed(gain: float, within: str, ms: tuple[float, float], label: str, target: Target) -> SpeedVerdict:
    """The verdict where both were timed: ``ms`` of the quantised engine and of the one in floats.

    ``within`` is the gain with its interval in words; ``label`` what was timed, such as ``INT8``.
    """
    floats = target.float_precision.value.upper()
    kind = SpeedKind.FASTER if gain >= _NOTABLE else SpeedKind.NOT_FASTER
    headline = f"{label} was measured {within} as fast as {floats} ({ms[0]:.3f} against {ms[1]:.3f} ms)"
    return SpeedVerdict(kind, gain, Evidence.ENGINES, 0.0, headline, f"{headline}, {Evidence.ENGINES.value}.")


def measured_floats(within: str, ms: tuple[float, float] | None, label: str, target: Target) -> SpeedVerdict:
    """The verdict where what was timed in 8 bits gains nothing, so that what ships is in floats.

    ``within`` and ``ms`` are those of the fastest, as for ``measured_speed``; None where none was left to time.
    """
    floats = target.float_precision.value.upper()
    told = "no placement in 8 bits gains and is accepted"
    if ms is not None:
        told = f"the fastest in {label} is {within} as fast ({ms[0]:.3f} against {ms[1]:.3f} ms)"
    headline = f"measured, so {floats} ships: {told}"
    return SpeedVerdict(SpeedKind.NOT_FASTER, 1.0, Evidence.ENGINES, 0.0, headline, f"NOT FASTER, {headline}.")


def unpredicted_speed(target: Target) -> SpeedVerdict:
    """The verdict for a target whose times are measured, and not predicted."""
    headline = f"No time is predicted for {target.title}: 'resvit-export bench' times INT8 against FP32 there"
    return SpeedVerdict(SpeedKind.NOT_KNOWN, 1.0, Evidence.NONE, None, headline, f"{headline}.")


def _evidence(chosen: Prediction, target: Target) -> tuple[Evidence, float | None]:
    """What the times of a prediction rest on, and by what share their ratio may be off."""
    products = [layer for layer in chosen.layers if layer.kind in (LayerKind.CONV, LayerKind.GEMM)]
    if any(layer.measured for layer in products):
        return Evidence.LAYER_TIMES, 0.0 if all(layer.measured for layer in products) else RATIO_ERROR
    if target.builder is Builder.RTX:
        return Evidence.PEAKS, None
    return Evidence.RULES, RATIO_ERROR
