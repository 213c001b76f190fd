"""How results look: tables for people, one JSON document for scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from resvit_engines.console import Output, console, mib, table
from resvit_export.cli.audit_tables import audit_lines, audit_tables
from resvit_export.stages.prune import prune_summary

if TYPE_CHECKING:
    from resvit_export.api import Built
    from resvit_export.stage import Artifact

_VERDICT_STYLE = {"accepted": "bold green", "rejected": "bold red", "undecided": "bold yellow"}


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
    makers = {
        "prune": _prune,
        "retrain": _retrain,
        "fold": _fold,
        "export": _export,
        "recover": _recover,
        "calibrate": _ranges,
        "quantize": _quantize,
        "fuse": _fuse,
        "validate": _validate,
        "compile": _compile,
        "audit": _audit,
    }
    maker = makers.get(artifact.stage)
    return maker(artifact) if maker else []


def _prune(artifact: Artifact) -> list[Table | str]:
    report = artifact.json("prune.json")
    shown: list[Table | str] = []
    if "widths" in report:
        rows = [
            (item["group"], item["kind"], str(item["before"]), str(item["after"]), f"{item['importance_lost']:.1%}")
            for item in report["widths"]
            if item["before"] != item["after"]
        ]
        columns = ("group", "of", "before", "after", "importance lost")
        shown.append(table(f"Pruned by {report['importance']}", columns, rows, left=2))
        shown.append(f"{len(report['widths']) - len(rows)} groups stay as they are")
        shown.append(prune_summary(report))
        shown += [f"left alone: {path}: {reason}" for path, reason in report["left_alone"].items()]
    if "sparsity" in report:
        sparse = report["sparsity"]
        shown.append(
            f"2:4 sparsity by {sparse['method']}: {len(sparse['sparse'])} layers, {sparse['share']:.1%} of weights"
        )
    return [*shown, *report["notes"]]


def _retrain(artifact: Artifact) -> list[Table | str]:
    report = artifact.json("retrain.json")
    rows = [
        (when, str(score["step"]), _share(score["agreement"]), _share(score["top1"]), f"{score['loss']:.4f}")
        for when, score in (("pruned", report["before"]), ("retrained", report["after"]))
    ]
    title = f"Trained on {report['images']:,} images, against the unpruned model on {report['held_out']:,} others"
    return [
        table(title, ("weights", "step", "agreement", "top-1", "loss"), rows),
        f"{report['stop']}, after {report['steps']} steps in {report['seconds']:.0f} s",
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _fold(artifact: Artifact) -> list[Table | str]:
    report = artifact.json("fold.json")
    counts: dict[str, list[str]] = {}
    for item in report["items"]:
        counts.setdefault(item["kind"], []).append(item["where"])
    rows = [(kind, str(len(where)), _shorten(where)) for kind, where in counts.items()]
    return [
        table("Folded", ("what", "count", "where"), rows, left=3),
        f"largest error {report['max_abs_error']:.2g} absolute, {report['max_rel_error']:.2g} relative",
    ]


def _export(artifact: Artifact) -> list[Table | str]:
    report = artifact.json("export.json")
    rows = [
        ("opset", str(report["opset"])),
        ("nodes", str(report["nodes"])),
        ("input", f"{report['input']['name']} {report['input']['shape']}"),
        ("outputs", ", ".join(f"{item['name']} {item['shape']}" for item in report["outputs"])),
        ("parity with PyTorch", _parity(report)),
        ("size", mib(report["bytes"])),
    ]
    return [table("Float ONNX", ("what", "value"), rows, left=2)]


def _parity(report: Mapping[str, Any]) -> str:
    if report.get("parity_max_abs") is None:
        return "not applicable: the model came as ONNX"
    return f"{report['parity_max_abs']:.2g} absolute, {report['parity_max_rel']:.2g} relative"


def _recover(artifact: Artifact) -> list[Table | str]:
    report = artifact.json("recover.json")
    rows = []
    for when, score in (("before", report["before"]), ("after", report["after"])):
        agreement = "" if score["agreement"] is None else f"{score['agreement']:.2%}"
        rows.append((when, str(score["step"]), agreement, f"{-10 * math.log10(max(score['nsr'], 1e-30)):.1f} dB"))
    title = f"Recovery on {report['images']:,} images, against the float model on {report['held_out']:,} others"
    return [
        table(title, ("weights", "step", "agreement", "SQNR"), rows),
        f"{report['stop']}, after {report['steps']} steps in {report['seconds']:.0f} s",
    ]


def _ranges(artifact: Artifact) -> list[Table | str]:
    ranges = artifact.json("ranges.json")
    rows = []
    for name, item in ranges["tensors"].items():
        amax = item["amax"].get("int8")
        if amax:
            cells = [f"{amax[kind]:.4g}" for kind in ("max", "percentile", "mse", "entropy")]
            rows.append((name, f"{item['min']:.4g}", f"{item['max']:.4g}", *cells))
    title = f"Ranges of {len(rows)} tensors from {ranges['images']} images (amax for INT8 by estimator)"
    columns = ("tensor", "min", "max", "max", "percentile", "mse", "entropy")
    return [table(title, columns, rows)]


def _quantize(artifact: Artifact) -> list[Table | str]:
    report = artifact.json("quantize.json")
    shown: list[Table | str] = [quantize_table(report)]
    shown += [f"FP32: {item['name']} — {item['reason']}" for item in report["fp32"]]
    return shown


def quantize_table(report: Mapping[str, Any]) -> Table:
    """Nodes and multiply-accumulates quantised, by group."""
    rows = []
    for group, item in report["groups"].items():
        share = item["quantized_macs"] / item["macs"] if item["macs"] else 0.0
        rows.append(
            (group, f"{item['quantized_nodes']}/{item['nodes']}", f"{item['macs'] / 1e6:.2f} M", f"{share:.1%}")
        )
    groups = report["groups"].values()
    nodes, done = sum(i["nodes"] for i in groups), sum(i["quantized_nodes"] for i in groups)
    total = sum(item["macs"] for item in groups)
    rows.append(("all", f"{done}/{nodes}", f"{total / 1e6:.2f} M", f"{report['macs_share']:.1%}"))
    return table(
        f"Quantised to {report['precision'].upper()} by {report['quantizer']}",
        ("group", "nodes", "multiply-accumulates", "share quantised"),
        rows,
    )


def accuracy_table(verdict: Mapping[str, Any]) -> Table:
    """Accuracy stage by stage, each against the original network."""
    original, *others = verdict["stages"]
    names = list(original.get("values") or {"top-1": original.get("top1")})
    unit = original.get("unit", "percentage points")
    rows = [(original["stage"], *(metric_value(original, name) for name in names), "", "", "", "")]
    rows += [
        (
            item["stage"],
            *(metric_value(item, name) for name in names),
            f"{item['drop']:+.2f}",
            f"{item['interval'][0]:+.2f} … {item['interval'][1]:+.2f}",
            "" if item["agreement"] is None else f"{item['agreement']:.2%}",
            "∞" if item["sqnr_db"] is None else f"{item['sqnr_db']:.1f} dB",
        )
        for item in others
    ]
    title = f"Accuracy on {verdict['data']}"
    interval = f"{verdict['confidence']:.0%} interval"
    drop = "drop, points" if unit.endswith("points") else f"drop, {unit}"
    return table(title, ("stage", *names, drop, interval, "agreement", "SQNR"), rows)


def metric_value(stage: Mapping[str, Any], name: str) -> str:
    """One metric of a stage of a verdict: top-1 and top-5 in %, the others as they are usually written."""
    value = (stage.get("values") or {"top-1": stage.get("top1")}).get(name)
    if value is None:
        return ""
    if name in ("top-1", "top-5"):
        return f"{value:.2%}"
    return f"{value:.1f} dB" if stage.get("unit") == "dB" else f"{value:.4f}"


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """The verdict as rich markup."""
    return f"[{_VERDICT_STYLE[verdict['verdict']]}]{verdict['verdict'].upper()}[/]: {escape(verdict['reason'])}"


def _fuse(artifact: Artifact) -> list[Table | str]:
    """What became of attention and the bridge."""
    return list(artifact.json("fusion.json")["sentences"])


def _validate(artifact: Artifact) -> list[Table | str]:
    verdict = artifact.json("verdict.json")
    note = [verdict["runtime_note"]] if verdict["runtime_note"] else []
    return [accuracy_table(verdict), verdict_line(verdict), *note]


def _compile(artifact: Artifact) -> list[Table | str]:
    if artifact.path("engine.json").exists():
        report = artifact.json("engine.json")
        rows = [
            ("target", f"{report['target']} (SM {report['sm']})"),
            ("builder", f"{report['builder']} {report['builder_version']}"),
            ("engine", mib(report["bytes"])),
            ("kernels", str(len(report["kernels"]))),
            ("built in", f"{report['seconds']:.1f} s, peak {report['peak_mib']} MiB"),
        ]
        return [table("Engine", ("what", "value"), rows, left=2)]
    plan = artifact.json("plan.json")
    return [
        plan["why"],
        *[f"  {command}" for command in plan["commands"]],
        "With the device on the network, --device ssh://USER@HOST does all of it from here. By hand, 'resvit-engine "
        "build BUNDLE --trust KEY.pub' there also checks the engine and packs it for 'resvit-engine install'.",
    ]


def _audit(artifact: Artifact) -> list[Table | str]:
    return audit_tables(artifact.json("audit.json"))


def build_document(built: Built) -> dict[str, Any]:
    """The result of a build for JSON output."""
    verdict = built.verdict
    return {
        "verdict": verdict.kind.value,
        "reason": verdict.reason,
        "bundle": str(built.bundle.resolve()) if built.bundle else None,
        "report": str(built.report.resolve()),
        "recipe": str((built.folder / "recipe.toml").resolve()),
        "predicted": built.predicted.to_json(),
        "stages": [summarize(stage) for stage in built.stages],
    }


def show_build(built: Built, output: Output) -> None:
    """Print the result of a build: accuracy, coverage, sizes, verdict and where things lie."""
    pipeline, stages, screen = built.pipeline, built.stages, console()
    if not output.quiet:
        screen.print(accuracy_table(pipeline.validated.json("verdict.json")))
        screen.print(quantize_table(pipeline.quantized.json("quantize.json")))
        if pipeline.variant.recovers:
            for item in _recover(pipeline.recovered):
                screen.print(item, soft_wrap=True)
        screen.print(_sizes(built))
        screen.print(_costs(stages), soft_wrap=True)
        for stage in stages:
            if stage.stage == "compile":
                for item in _compile(stage):
                    screen.print(item, markup=False, soft_wrap=True)
            if stage.stage == "audit":
                for item in audit_lines(stage.json("audit.json")):
                    screen.print(item, soft_wrap=True)
    for line in pipeline.variant.search.lines if pipeline.variant.search else ():
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    screen.print(built.predicted.sentence, markup=False, highlight=False, soft_wrap=True)
    screen.print(verdict_line(pipeline.validated.json("verdict.json")), soft_wrap=True)
    if built.bundle:
        screen.print(f"bundle: {built.bundle}", markup=False, soft_wrap=True)
    screen.print(f"report: {built.report}", markup=False, soft_wrap=True)
    if built.device:
        screen.print("\n".join(built.device.lines(str(stages[-1].path("engine.plan")))), markup=False, soft_wrap=True)


def _sizes(built: Built) -> Table:
    pipeline = built.pipeline
    files = [
        ("float ONNX", pipeline.exported.model.path),
        (f"{pipeline.run.precision.value.upper()} ONNX", pipeline.quantized.model.path),
    ]
    files += [
        ("engine", stage.path("engine.plan"))
        for stage in built.stages
        if stage.stage == "compile" and stage.has("engine.plan")
    ]
    if built.bundle:
        files.append(("bundle", built.bundle))
    return table("Sizes", ("file", "size"), [(name, mib(path.stat().st_size)) for name, path in files])


def _costs(stages: Sequence[Artifact]) -> str:
    return "stages: " + " · ".join(
        f"{stage.stage} {'reused' if stage.reused else f'{stage.seconds:.1f} s'}" for stage in stages
    )


def _shorten(names: Sequence[str], limit: int = 3) -> str:
    more = f" … (+{len(names) - limit})" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
