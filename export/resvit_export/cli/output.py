"""How results look: tables for people, one JSON document for scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from resvit_calibrate.gate.comparison import DECIBELS, SHARE
from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.builder.settings import TITLES
from resvit_engines.console import Output, console, mib, table
from resvit_export.cli.audit_tables import audit_tables
from resvit_export.stages.audit import Audited
from resvit_export.stages.calibrate import Calibrated
from resvit_export.stages.compile import Compiled
from resvit_export.stages.decide.recover import Recovered
from resvit_export.stages.export import Exported
from resvit_export.stages.fold import Folded
from resvit_export.stages.fuse import Fused
from resvit_export.stages.prune import Pruned
from resvit_export.stages.quantize import Quantized
from resvit_export.stages.retrain import Retrained
from resvit_export.stages.validate import Validated

if TYPE_CHECKING:
    from resvit_calibrate.ranges.ranges import Ranges
    from resvit_export.records.prune import PruneRecord
    from resvit_export.records.verdict import ScoreRow, VerdictRecord
    from resvit_export.report.comparison import Entry
    from resvit_export.stage import Artifact
    from resvit_export.to_onnx.report import ExportReport
    from resvit_quantize.fold.program import FoldReport
    from resvit_quantize.pruning.distill.options import DistillReport
    from resvit_quantize.qdq.report import QuantizeReport
    from resvit_quantize.recovery.options import RecoverReport

VERDICT_STYLE = {
    VerdictKind.ACCEPTED: "bold green",
    VerdictKind.REJECTED: "bold red",
    VerdictKind.UNDECIDED: "bold yellow",
}


def summarize(artifact: Artifact) -> dict[str, Any]:
    """A stage for JSON output: where it lies, what it cost and what it found."""
    results = {
        file: artifact.json(file)
        for file in artifact.record.outputs
        if file.endswith(".json") and file not in ("ranges.json", "clips.json", "kernels.json", "golden.json")
    }
    return {
        "stage": artifact.stage,
        "folder": str(artifact.folder.resolve()),
        "reused": artifact.reused,
        "seconds": artifact.seconds,
        "peak_mib": artifact.record.peak_mib,
        "results": results,
    }


def show_stage(artifact: Artifact, output: Output) -> None:
    """Print what one stage found, for people."""
    if output.json:
        return
    if not output.quiet:
        for item in _tables(artifact):
            console().print(item)
    console().print(f"{artifact.stage}: {artifact.folder}", markup=False)


def _tables(artifact: Artifact) -> list[Table | str]:
    match artifact:
        case Pruned():
            return _prune(artifact.report)
        case Retrained():
            return _retrain(artifact.report)
        case Folded():
            return _fold(artifact.report)
        case Exported():
            return _export(artifact.report, artifact.reference)
        case Recovered():
            return recover_lines(artifact.report)
        case Calibrated():
            return _ranges(artifact.known)
        case Quantized():
            return _quantize(artifact.report)
        case Fused():
            return list(artifact.result.sentences)
        case Validated():
            return _validate(artifact.verdict)
        case Compiled():
            return compile_lines(artifact)
        case Audited():
            return audit_tables(artifact.result)
    return []


def _prune(report: PruneRecord) -> list[Table | str]:
    shown: list[Table | str] = []
    if (chosen := report.widths) is not None:
        rows = [
            (item.group, item.kind.value, str(item.before), str(item.after), f"{item.importance_lost:.1%}")
            for item in chosen.groups
            if item.before != item.after
        ]
        columns = ("group", "of", "before", "after", "importance lost")
        shown.append(table(f"Pruned by {report.importance.value}", columns, rows, left=2))
        shown.append(f"{len(chosen.groups) - len(rows)} groups stay as they are")
        shown.append(chosen.summary)
        shown += [f"left alone: {path}: {reason}" for path, reason in chosen.left_alone.items()]
    if (sparse := report.sparsity) is not None:
        shown.append(
            f"2:4 sparsity by {sparse.method.value}: {len(sparse.sparse)} layers, {sparse.share:.1%} of weights"
        )
    return [*shown, *report.notes]


def _retrain(report: DistillReport) -> list[Table | str]:
    rows = [
        (when, str(score.step), _share(score.agreement), _share(score.top1), f"{score.loss:.4f}")
        for when, score in (("pruned", report.before), ("retrained", report.after))
    ]
    title = f"Trained on {report.images:,} images, against the unpruned model on {report.held_out:,} others"
    return [table(title, ("weights", "step", "agreement", "top-1", "loss"), rows), _loss(report), _stop(report)]


def _loss(report: DistillReport | RecoverReport) -> str:
    return f"The loss is of {report.objective}"


def _stop(report: DistillReport | RecoverReport) -> str:
    return f"{report.stop.value}, after {report.steps} steps in {report.seconds:.0f} s"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _fold(report: FoldReport) -> list[Table | str]:
    counts: dict[str, list[str]] = {}
    for item in report.items:
        counts.setdefault(item.kind, []).append(item.where)
    rows = [(kind, str(len(where)), _shorten(where)) for kind, where in counts.items()]
    return [
        table("Folded", ("what", "count", "where"), rows, left=3),
        f"largest error {report.max_abs_error:.2g} absolute, {report.max_rel_error:.2g} relative",
    ]


def _export(report: ExportReport, reference: str) -> list[Table | str]:
    name, shape = report.input
    rows = [
        ("opset", str(report.opset)),
        ("nodes", str(report.nodes)),
        ("input", f"{name} {list(shape)}"),
        ("outputs", ", ".join(f"{name} {list(shape)}" for name, shape in report.outputs)),
        (f"parity with {reference}", f"{report.parity_max_abs:.2g} absolute, {report.parity_max_rel:.2g} relative"),
        ("size", mib(report.bytes)),
    ]
    return [table("Float ONNX", ("what", "value"), rows, left=2)]


def recover_lines(report: RecoverReport) -> list[Table | str]:
    """What recovery won."""
    rows = [
        (when, str(score.step), _share(score.agreement), f"{-10 * math.log10(max(score.nsr, 1e-30)):.1f} dB")
        for when, score in (("before", report.before), ("after", report.after))
    ]
    title = f"Recovery on {report.images:,} images, against the float model on {report.held_out:,} others"
    return [table(title, ("weights", "step", "agreement", "SQNR"), rows), _loss(report), _stop(report)]


def _ranges(ranges: Ranges) -> list[Table | str]:
    estimators = ("max", "percentile", "mse", "entropy")
    rows = []
    for name, item in ranges.tensors.items():
        amax = item.amax.get("int8")
        if amax:
            cells = [f"{amax[kind]:.4g}" for kind in estimators]
            rows.append((name, f"{item.minimum:.4g}", f"{item.maximum:.4g}", *cells))
    title = f"Ranges of {len(rows)} tensors from {ranges.images} images (amax for INT8 by estimator)"
    return [table(title, ("tensor", "min", "max", *estimators), rows)]


def _quantize(report: QuantizeReport) -> list[Table | str]:
    held_back = [escape(report.held_back.sentence)] if report.held_back else []
    return [quantize_table(report), *held_back, *(f"FP32: {item.name} — {item.reason}" for item in report.fp32)]


def quantize_table(report: QuantizeReport) -> Table:
    """Nodes and multiply-accumulates quantised, by group."""
    rows = []
    for group, item in report.groups.items():
        share = item.quantized_macs / item.macs if item.macs else 0.0
        rows.append((group, f"{item.quantized_nodes}/{item.nodes}", f"{item.macs / 1e6:.2f} M", f"{share:.1%}"))
    groups = report.groups.values()
    nodes, done = sum(item.nodes for item in groups), sum(item.quantized_nodes for item in groups)
    total = sum(item.macs for item in groups)
    rows.append(("all", f"{done}/{nodes}", f"{total / 1e6:.2f} M", f"{report.macs_share:.1%}"))
    return table(
        f"Quantised to {report.precision.upper()} by {report.quantizer}",
        ("group", "nodes", "multiply-accumulates", "share quantised"),
        rows,
    )


def comparison_table(entries: Sequence[Entry]) -> Table:
    """Builds side by side; ``*`` marks the Pareto front of a target."""
    from resvit_export.report.comparison import pareto_front

    front = {entry for one in entries for entry in pareto_front([o for o in entries if o.target == one.target])}
    rows = [
        (
            f"{'*' if entry in front else ' '} {entry.run}",
            entry.target,
            entry.precision,
            entry.verdict,
            entry.value_text,
            entry.drop_text,
            f"{entry.latency_ms:.3f}",
            f"{entry.speed.gain:.2f}",
        )
        for entry in entries
    ]
    drop = entries[0].drop_name.lower().replace(" the ", " ")  # of 80 columns every one counts
    columns = ("run", "target", "as", "verdict", entries[0].metric, drop, "ms", "FP16 = 1")
    return table(f"{len(rows)} builds; * is the Pareto front of its target", columns, rows, left=4)


def _sqnr(row: ScoreRow) -> str:
    # Records hold no infinity: outputs that are equal and outputs that hold NaN both have no number there.
    if row.sqnr_db is None:
        return "∞" if row.agreement == 1.0 else "none"
    return f"{row.sqnr_db:.1f} dB"


def accuracy_table(record: VerdictRecord) -> Table:
    """Accuracy stage by stage, each against the original network."""
    original, *others = record.rows
    # No accuracy was lost where none was measured: people read by how much the SQNR keeps the least one.
    of_noise = original.unit == DECIBELS
    names, sign = ([], -1) if of_noise else (list(original.values), 1)
    rows = [(original.stage, *(metric_value(original, name) for name in names), "", "", "", "")]
    rows += [
        (
            item.stage,
            *(metric_value(item, name) for name in names),
            _points(item.drop, sign),
            " … ".join(_points(edge, sign) for edge in item.interval[::sign]),
            _share(item.agreement),
            _sqnr(item),
        )
        for item in others
    ]
    interval = f"{record.verdict.confidence:.0%} interval"
    unit = "points" if original.unit.endswith("points") else original.unit
    title = (
        f"Outputs against the original's on {record.data}; dB above the least SQNR"
        if of_noise
        else f"Accuracy on {record.data}; drops in {unit}"
    )
    drop = "above least" if of_noise else "drop"
    return table(title, ("stage", *names, drop, interval, "agreement", "SQNR"), rows)


def _points(value: float | None, sign: int = 1) -> str:
    return "not finite" if value is None else f"{sign * value:+.2f}"


def metric_value(row: ScoreRow, name: str) -> str:
    """One metric of a stage of a verdict: shares of images in %, the others as they are usually written."""
    value = row.values.get(name)
    if value is None:
        return ""
    if row.unit == SHARE and "distance" not in name:
        return f"{value:.2%}"
    return f"{value:.1f} dB" if row.unit == DECIBELS else f"{value:.4f}"


def verdict_line(record: VerdictRecord) -> str:
    """The verdict as rich markup."""
    return f"[{VERDICT_STYLE[record.kind]}]{record.kind.value.upper()}[/]: {escape(record.reason)}"


def _validate(record: VerdictRecord) -> list[Table | str]:
    note = [record.runtime_note] if record.runtime_note else []
    blame = [record.blame.sentence] if record.blame else []
    return [accuracy_table(record), verdict_line(record), *blame, *note]


def compile_lines(compiled: Compiled) -> list[Table | str]:
    """The engine in figures, or how it is built where it can be."""
    if (report := compiled.engine) is not None:
        seconds, peak = report.seconds or 0.0, report.peak_mib
        rows = [
            ("target", f"{report.target} (SM {report.sm})" if report.sm else report.target),
            ("builder", f"{TITLES[report.builder]} {report.builder_version}"),
            ("engine", mib(report.bytes)),
            ("kernels", str(len(report.kernels))),
            ("built in", f"{seconds:.1f} s, peak {peak} MiB"),
        ]
        return [table("Engine", ("what", "value"), rows, left=2)]
    plan = compiled.plan
    assert plan is not None
    return [
        plan.why,
        *[f"  {command}" for command in plan.commands],
        "With the device on the network, --device ssh://USER@HOST does all of it from here. By hand, 'resvit-engine "
        "build BUNDLE --trust KEY.pub' there also checks the engine and packs it for 'resvit-engine install'.",
    ]


def _shorten(names: Sequence[str], limit: int = 3) -> str:
    more = f" … (+{len(names) - limit})" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
