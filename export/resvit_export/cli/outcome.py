"""What a build ends with: both halves of the verdict, sizes, what comes next, and where it lies, on one screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from resvit_engines.console import Output, console, mib, table
from resvit_engines.errors import one_line
from resvit_engines.targets.speed_verdict import SpeedKind
from resvit_export.cli.audit_tables import audit_lines
from resvit_export.cli.output import (
    VERDICT_STYLE,
    accuracy_table,
    compile_lines,
    quantize_table,
    recover_lines,
    summarize,
)
from resvit_export.report import next_steps
from resvit_export.stages.audit import Audited
from resvit_export.stages.compile import Compiled

if TYPE_CHECKING:
    from resvit_export.api import Built

WIDTH = 80
"""Columns of the narrowest terminal that people use."""
_SPEED_WORD = {
    SpeedKind.FASTER: "faster",
    SpeedKind.NOT_FASTER: "not faster",
    SpeedKind.NOT_KNOWN: "speed not known",
    SpeedKind.FP16_ITSELF: "speed",
}
_SPEED_STYLE = {
    SpeedKind.FASTER: "bold green",
    SpeedKind.NOT_FASTER: "bold red",
    SpeedKind.NOT_KNOWN: "bold yellow",
    SpeedKind.FP16_ITSELF: "bold",
}


def build_document(built: Built) -> dict[str, Any]:
    """The result of a build for JSON output."""
    verdict = built.verdict
    return {
        "verdict": verdict.kind.value,
        "reason": verdict.reason,
        "speed": built.speed.to_json(),
        "exit_code": int(built.exit_code),
        "next": [command for command, _ in next_commands(built)],
        "preprocess": dict(built.pipeline.run.preprocess_steps(built.pipeline.network)),
        "bundle": str(built.bundle.resolve()) if built.bundle else None,
        "report": str(built.report.resolve()),
        "recipe": str((built.folder / "recipe.toml").resolve()),
        "tuned": list(built.pipeline.variant.tuned.lines) if built.pipeline.variant.tuned else None,
        "stages": [summarize(stage) for stage in built.stages],
    }


def show_build(built: Built, output: Output) -> None:
    """Print the result of a build; with ``verbose`` all that its stages found comes before."""
    screen = console()
    if output.verbose and not output.quiet:
        for item in _everything(built):
            screen.print(item, soft_wrap=not isinstance(item, Table))
    for line in outcome(built, brief=output.quiet):
        screen.print(line, soft_wrap=True)


def outcome(built: Built, *, brief: bool = False) -> Iterator[str]:
    """The last lines of a build as rich markup, at most 80 columns wide but for paths and commands.

    ``brief`` leaves out sizes and what comes next.
    """
    verdict, speed = built.verdict, built.speed
    yield from _half(verdict.kind.value, VERDICT_STYLE[verdict.kind], verdict.reason)
    yield from _half(_SPEED_WORD[speed.kind], _SPEED_STYLE[speed.kind], speed.headline)
    for note in _notes(built):
        yield from _wrapped(note, indent="  ")
    if not brief:
        yield from _wrapped("size: " + ", ".join(f"{name} {mib(size)}" for name, size in _sizes(built)), indent="  ")
    if built.bundle:
        yield escape(f"bundle: {built.bundle}")
    yield escape(f"report: {built.report}")
    if brief:
        return
    for index, (command, why) in enumerate(next_commands(built)):
        yield from _wrapped(f"{'next' if not index else 'or'}: {why}", indent="  ")
        yield f"  [bold]{escape(command)}[/]"


def next_commands(built: Built) -> list[tuple[str, str]]:
    """At most three command lines that apply to what came out, the most useful first, each with what it is for."""
    run = built.pipeline.run
    return next_steps.next_commands(
        next_steps.Ending(
            folder=built.folder,
            recipe=built.pipeline.recipe,
            target=run.require_target(),
            verdict=built.verdict,
            speed=built.speed,
            bundle=built.bundle,
            signs=run.signing_key() is not None,
            planned=built.bundle is not None and built.plan is not None,
            on_device=built.device is not None,
        )
    )


def _notes(built: Built) -> Iterator[str]:
    """What nobody should miss, in a line or two each."""
    verdict, pipeline = built.verdict, built.pipeline
    if verdict.blame:
        yield verdict.blame.sentence
    if pipeline.variant.tuned:
        tuned = pipeline.variant.tuned
        yield from () if tuned.best else tuned.lines[:1]  # the headline says how fast the best of none was
        yield from tuned.remarks
    if pipeline.variant.search:
        yield from pipeline.variant.search.result.sentences[:1]
    if built.device:
        yield from built.device.lines(str(built.stages[-1].path("engine.plan")))


def _half(word: str, style: str, sentence: str) -> Iterator[str]:
    first, *others = _wrapped(f"{word.upper()}: {sentence}", indent="  ")
    yield f"[{style}]{word.upper()}[/]{first[len(word) :]}"
    yield from others


def _wrapped(text: str, indent: str) -> list[str]:
    """``text`` as lines of rich markup; words longer than a line, which paths are, stay whole."""
    lines = textwrap.wrap(
        one_line(text), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [escape(line) for line in lines]


def _sizes(built: Built) -> list[tuple[str, int]]:
    pipeline = built.pipeline
    files = [
        ("float ONNX", pipeline.exported.model.path),
        (f"{pipeline.ships.value.upper()} ONNX", pipeline.quantized.model.path),
    ]
    files += [
        ("engine", stage.path("engine.plan"))
        for stage in built.stages
        if isinstance(stage, Compiled) and stage.engine is not None
    ]
    if built.bundle:
        files.append(("bundle", built.bundle))
    return [(name, path.stat().st_size) for name, path in files]


def _everything(built: Built) -> Iterator[Table | str]:
    """The tables and findings of all stages."""
    pipeline, stages = built.pipeline, built.stages
    yield accuracy_table(built.verdict)
    if built.verdict.runtime_note:
        yield escape(built.verdict.runtime_note)
    yield quantize_table(built.quantized)
    if built.quantized.held_back:
        yield escape(built.quantized.held_back.sentence)
    if pipeline.variant.recovers:
        yield from recover_lines(pipeline.recovered.report)
    yield table("Sizes", ("file", "size"), [(name, mib(size)) for name, size in _sizes(built)])
    costs = [f"{stage.stage} {'reused' if stage.reused else f'{stage.seconds:.1f} s'}" for stage in stages]
    yield f"stages: {' · '.join(costs)}"
    for stage in stages:
        if isinstance(stage, Compiled):
            yield from (escape(item) if isinstance(item, str) else item for item in compile_lines(stage))
        if isinstance(stage, Audited):
            yield from audit_lines(stage.result)
    for line in pipeline.variant.search.lines if pipeline.variant.search else ():
        yield escape(line)
    for line in pipeline.variant.tuned.lines if pipeline.variant.tuned else ():
        yield escape(f"tune: {line}")
    yield escape(built.speed.sentence)
    yield ""
