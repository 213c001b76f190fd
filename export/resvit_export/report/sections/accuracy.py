"""The verdict, the accuracy of each stage and the images whose prediction changed, ready to be laid out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from resvit_calibrate.gate.comparison import DECIBELS, SHARE
from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.targets.speed_verdict import SpeedKind, SpeedVerdict
from resvit_export.records.verdict import ScoreRow, VerdictRecord
from resvit_export.report.layout import wording
from resvit_export.report.layout.data import ChangedImage, ReportData
from resvit_export.report.layout.drawings import Drawing, drawing_of
from resvit_export.report.layout.pictures import data_uri_from_pixels, ticks_between

_SPELLING = {"pytorch": "PyTorch", "onnx": "ONNX", "tensorrt": "TensorRT"}
_OUTCOMES = {"lost": ("lost", "worse"), "gained": ("gained", "better")}
_SPEED = {
    SpeedKind.FASTER: ("accepted", "Faster"),
    SpeedKind.NOT_FASTER: ("rejected", "Not faster"),
    SpeedKind.NOT_KNOWN: ("undecided", "Speed not known"),
    SpeedKind.FP16_ITSELF: ("open", "Speed"),
}
_WORDS = {VerdictKind.ACCEPTED: "Accepted", VerdictKind.REJECTED: "Rejected", VerdictKind.UNDECIDED: "Undecided"}


@dataclass(frozen=True)
class Hero:
    """The top of the page."""

    kind: str
    word: str
    sentence: str
    notes: list[str]
    figures: list[tuple[str, str]]
    speed: SpeedHalf | None = None


@dataclass(frozen=True)
class SpeedHalf:
    """The other half of the verdict; ``kind`` is the class of its colour."""

    kind: str
    word: str
    sentence: str


@dataclass(frozen=True)
class StageRow:
    """One line of the accuracy table; ``left``, ``right`` and ``dot`` place the interval, in % of the chart."""

    stage: str
    value: str
    agreement: str
    sqnr: str
    drop: str
    interval: str
    left: float | None = None
    right: float | None = None
    dot: float | None = None
    side: str = ""
    """Where the whole interval lies: "over" the limit, "across" it, or (empty) under it."""


@dataclass(frozen=True)
class Accuracy:
    """The accuracy table and the axis of its chart; positions in % of the chart's width."""

    rows: list[StageRow]
    metric: str
    unit: str
    """Of drops: pp (percentage points), points, or dB."""
    unit_in_words: str
    axis: str
    """What the chart shows, a sentence."""
    drop_name: str
    """How drops and their intervals are called: those of an SQNR are turned round, as what it has above the least."""
    agreement_name: str
    agreement_of: str
    """What is counted, where the name of the column does not say it."""
    confidence: str
    images: str
    data: str
    limit: str
    limit_at: float
    zero_at: float
    ticks: list[tuple[float, str]]
    note: str


@dataclass(frozen=True)
class Changed:
    """An image, or only its index, with what both networks call it."""

    uri: str | None
    alt: str
    float_class: str
    quantized_class: str
    label: str
    outcome: str
    kind: str
    drawing: Drawing | None = None


def spell_stage(stage: str) -> str:
    """Turn ``onnx int8`` into ``ONNX INT8``."""
    words = stage.split()
    return " ".join(_SPELLING.get(w, w.upper() if any(c.isdigit() for c in w) else w) for w in words)


def hero_from_run(data: ReportData) -> Hero:
    """Say what came out, before anything else."""
    speed = speed_half(data.speed) if data.speed else None
    if data.verdict is None:
        sentence = "The accuracy of this network has not been measured yet."
        return Hero("open", "Not validated", sentence, [], _figures(data), speed)
    verdict = data.verdict.verdict
    sentence = _sentence(verdict.reason)
    notes = []
    if verdict.chance_level:
        notes.append("Check the data, the labels and the preprocessing: no drop can be measured from guesses.")
    if data.verdict.blame is not None:
        notes.append(data.verdict.blame.sentence)
    if data.verdict.overlap is not None and data.verdict.overlap.sentence:
        notes.append(_sentence(data.verdict.overlap.sentence))
    needed = verdict.images_needed
    if needed and str(needed) not in sentence:
        notes.append(f"About {needed:,} images would settle it; {verdict.images:,} were used.")
    return Hero(verdict.kind.value, _WORDS[verdict.kind], sentence, notes, _figures(data), speed)


def speed_half(speed: SpeedVerdict) -> SpeedHalf:
    """What is known of the speed, and by what evidence."""
    return SpeedHalf(*_SPEED[speed.kind], _sentence(speed.headline))


def accuracy_from_verdict(record: VerdictRecord) -> Accuracy:
    """Lay out one row per stage, and place every drop interval on one axis that also holds the limit."""
    rows, limit = record.rows, record.verdict.max_drop
    bounds = [edge for row in rows[1:] for edge in (_interval(row) or ()) if math.isfinite(edge)]
    low, high = min([0.0, limit, *bounds]), max([0.0, limit, *bounds])
    margin = 0.08 * ((high - low) or 1.0)
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    ticks, decimals = ticks_between(low, high)
    sign = _sign(rows[0].unit)
    return Accuracy(
        rows=[_row(row, limit, place, reference=index == 0) for index, row in enumerate(rows)],
        **_names(rows),
        confidence=f"{record.verdict.confidence * 100:g}%",
        images=wording.plural(record.verdict.images, "image"),
        data=record.data,
        limit=wording.number(limit),
        limit_at=place(limit),
        zero_at=place(0.0),
        ticks=[(place(tick), wording.number(sign * tick, decimals) if tick else "0") for tick in ticks],
        note=record.runtime_note,
    )


def changed_from_run(data: ReportData) -> list[Changed]:
    """Show the images whose prediction changed; where the pixels are not at hand, list them by index."""
    if data.images:
        return [_changed(image) for image in data.images]
    if data.verdict is None:
        return []
    names = data.verdict.class_names or None
    return [
        _describe(
            None,
            f"Image {item.index}",
            item.label,
            before=item.before,
            after=item.after,
            names=names,
            said=item.outcome,
        )
        for item in data.verdict.changed
    ]


def _sentence(reason: str) -> str:
    reason = reason.strip()
    return reason[:1].upper() + reason[1:] + ("" if reason.endswith((".", "!", "?")) else ".")


def _figures(data: ReportData) -> list[tuple[str, str]]:
    figures = []
    if data.verdict is not None:
        verdict, rows = data.verdict.verdict, data.verdict.rows
        if rows:
            first, last = rows[0], rows[-1]
            name = "Top-1 accuracy" if first.metric == "top-1" else first.metric
            of_noise = first.unit == DECIBELS  # against the original itself, which has none
            before = "" if of_noise else f"{_value(first)} \N{RIGHTWARDS ARROW} "
            figures.append((name, f"{before}{_value(last)}" + " dB" * of_noise))
            interval = _interval(last)
            if last.drop is not None and interval:
                figures.append((wording.drop_name(first.unit), wording.drop(last.drop, first.unit)))
                figures.append((f"{verdict.confidence * 100:g}% interval", _between(interval, first.unit)))
        if not rows or rows[0].unit != DECIBELS:
            figures.append(("Largest drop allowed", wording.drop(verdict.max_drop, verdict.unit)))
        elif data.least_sqnr_db is not None:
            figures.append(("Least SQNR allowed", f"{data.least_sqnr_db:g} dB"))
    if data.quantize:
        if data.quantize.macs_share:
            what = f"Arithmetic in {data.quantize.precision.upper()}"
            figures.append((what, wording.percent(data.quantize.macs_share, 1)))
        else:
            figures.append(("Arithmetic", "all in FP16"))
    if data.speed and data.costs:
        chosen, fp16 = data.costs.chosen, data.costs.fp16
        times = f"{wording.number(fp16.milliseconds, 3)} \N{RIGHTWARDS ARROW} {wording.number(chosen.milliseconds, 3)}"
        figures.append(("Predicted, ms", times))
    if data.engine:
        figures.append(("Engine", wording.size(data.engine.bytes)))
    elif data.quantize:
        ships = data.quantize.precision.upper() if data.quantize.macs_share else "FP16"
        figures.append((f"{ships} ONNX", wording.size(data.quantize.bytes_after)))
    return figures


def _names(rows: Sequence[ScoreRow]) -> dict[str, str]:
    """How the columns and the chart are called."""
    metric, unit, agreement = rows[0].metric, rows[0].unit, rows[0].agreement_of
    if metric == "top-1":
        axis = "Drop of top-1 accuracy in percentage points."
        return _named("Top-1", "pp", unit, axis, "Same answer", "")
    if unit == DECIBELS:
        axis = "How far the SQNR is above the least one, in dB; to the right is worse. Accuracy was not measured."
    else:
        what = "percentage points" if unit == SHARE else "points, hundredths of it"
        axis = f"Drop of {metric} in {what}; to the right is worse."
    return _named(metric, unit, unit, axis, "Agreement", agreement)


def _named(metric: str, unit: str, words: str, axis: str, agreement: str, of: str) -> dict[str, str]:
    names = ("metric", "unit", "unit_in_words", "axis", "drop_name", "agreement_name", "agreement_of")
    return dict(zip(names, (metric, unit, words, axis, wording.drop_name(unit), agreement, of), strict=True))


def _sign(unit: str) -> int:
    """Of what people read: drops as they are, an SQNR by what it has above the least one."""
    return -1 if unit == DECIBELS else 1


def _between(interval: tuple[float, float], unit: str) -> str:
    sign = _sign(unit)
    low, high = (sign * edge for edge in interval[::sign])
    return f"{wording.number(low)} to {wording.number(high)}"


def _value(row: ScoreRow) -> str:
    """The first metric of a stage: shares of images in %, the others as they are usually written."""
    if row.unit == SHARE:
        return wording.percent(row.value)
    return wording.number(row.value, 1 if row.unit == DECIBELS else 4)


def _interval(row: ScoreRow) -> tuple[float, float] | None:
    low, high = row.interval
    return None if low is None or high is None else (low, high)


def _row(score: ScoreRow, limit: float, place: Callable[[float], float], *, reference: bool) -> StageRow:
    interval, drop = (None, None) if reference else (_interval(score), score.drop)
    itself = reference and score.unit == DECIBELS  # no noise at all, for which no number stands
    row = StageRow(
        stage=spell_stage(score.stage),
        value=wording.NOTHING if itself else _value(score),
        agreement=wording.NOTHING if reference else wording.percent(score.agreement),
        sqnr=wording.NOTHING if itself else wording.number(score.sqnr_db, 1),
        drop=wording.number(None if drop is None else _sign(score.unit) * drop),
        interval=wording.NOTHING,
    )
    if interval is None or drop is None:
        return row
    low, high = interval
    return StageRow(
        **{
            **row.__dict__,
            "interval": _between(interval, score.unit),
            "left": place(low),
            "right": place(high),
            "dot": place(drop),
            "side": "over" if low > limit else "across" if high > limit else "",
        }
    )


def _changed(image: ChangedImage) -> Changed:
    drawing = drawing_of(image.pixels, image.before, image.after, image.names)
    described = _describe(
        data_uri_from_pixels(image.pixels),
        "",
        image.label,
        before=image.float_class,
        after=image.quantized_class,
        names=image.names,
        said=image.outcome,
    )
    return replace(described, drawing=drawing)


def _describe(
    uri: str | None,
    title: str,
    label: int | None,
    *,
    before: int | str,
    after: int | str,
    names: Sequence[str] | None,
    said: str | None = None,
) -> Changed:
    def call(index: int | str) -> str:
        if isinstance(index, str):
            return index
        return names[index] if names and 0 <= index < len(names) else str(index)

    if said is not None:
        outcome, kind = _OUTCOMES.get(said, ("no better, no worse", "neutral"))
    elif label is None:
        outcome, kind = "no label", "neutral"
    elif before == label:
        outcome, kind = "lost", "worse"
    elif after == label:
        outcome, kind = "gained", "better"
    else:
        outcome, kind = "both wrong", "neutral"
    truth = wording.NOTHING if label is None else call(label)
    alt = title or _alt(label, truth, call(before), call(after))
    return Changed(uri, alt, call(before), call(after), truth, outcome, kind)


def _alt(label: int | None, truth: str, before: str, after: str) -> str:
    labelled = "Image" if label is None else f"Image labelled {truth}"
    return f"{labelled}: {before} before, {after} after quantisation"
