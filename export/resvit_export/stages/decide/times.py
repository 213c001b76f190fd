"""The stage ``times``: which kinds of our kernels make the engine faster on the GPU of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_engines.bench.bench import BenchSettings
from resvit_engines.bench.compare import Comparison, Ratio, compare
from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.records import Record
from resvit_engines.run.engine_runner import open_engine
from resvit_engines.run.runner import Runner
from resvit_engines.targets.table import Target
from resvit_export.stage import Artifact, File, Stage

if TYPE_CHECKING:
    from resvit_quantize.fusion.match import Kind

RESULT = "times.json"
PLAIN, ALL = "plain", "all"
_SECONDS = 2.0


@dataclass(frozen=True)
class TimesRecord:
    """What ``times.json`` holds: the kinds that were chosen, by kind how many times ``faster`` the engine is, and why.

    ``not_built`` gives TensorRT's words by kind.
    """

    chosen: tuple[str, ...]
    faster: Mapping[str, Ratio]
    not_built: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        faster = {kind: ratio.to_json() for kind, ratio in self.faster.items()}
        return {"chosen": list(self.chosen), "faster": faster, "not_built": dict(self.not_built)}

    @classmethod
    def from_json(cls, record: Record) -> TimesRecord:
        """Read what ``to_json`` wrote."""
        faster = record.record("faster")
        ratios = {kind: Ratio.from_json(faster.record(kind)) for kind in faster.names}
        return cls(record.texts("chosen"), ratios, record.texts_by_name("not_built"))


@dataclass(frozen=True)
class Timed(Artifact):
    """``times.json``."""

    @functools.cached_property
    def result(self) -> TimesRecord:
        """What was timed."""
        return self.read(RESULT, lambda found: TimesRecord.from_json(Record(found, RESULT)))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The kinds of kernels that make the engine faster."""
        return self.result.chosen


@dataclass(frozen=True)
class Time(Stage[Timed]):
    """Time engines with and without kernels of our own, which reach the engine by ``way``."""

    name: ClassVar[str] = "times"
    artifact: ClassVar[type[Artifact]] = Timed
    packages: ClassVar[tuple[str, ...]] = ("onnx-ir", "triton", "tensorrt")

    model: File
    target: Target
    way: str
    settings: BuildSettings

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Time them, and write which kinds are worth it."""
        times_into(folder, self.model.path, self.target, self.way, self.settings, reporter)


def times_into(
    folder: Path, model: Path, target: Target, way: str, settings: BuildSettings, reporter: Reporter
) -> None:
    """Write ``times.json``: for each kind how many times faster the engine is with it, and the kinds ``chosen``.

    One engine is built without kernels of ours, one with each kind that the graph has, and one with all that chance
    cannot explain to be faster; they are timed in turns. If that last one is not faster as a whole, none is chosen.
    What does not build is left out, with TensorRT's words.
    """
    from resvit_quantize.fusion.match import Kind

    scratch = folder / "engines"
    scratch.mkdir()
    notes: dict[str, str] = {}
    with contextlib.ExitStack() as owned:
        runners = {PLAIN: owned.enter_context(_runner(model, (), target, way, settings, scratch, reporter))}
        for kind in Kind:
            try:
                runners[kind.value] = owned.enter_context(
                    _runner(model, (kind,), target, way, settings, scratch, reporter)
                )
            except ResvitError as error:
                notes[kind.value] = error.problem
        comparison = _compared(runners, settings, reporter)
        chosen = [name for name, ratio in comparison.ratios.items() if ratio.faster] if comparison else []
        ratios = dict(comparison.ratios) if comparison else {}
        if len(chosen) > 1:
            kinds = tuple(kind for kind in Kind if kind.value in chosen)
            together = owned.enter_context(_runner(model, kinds, target, way, settings, scratch, reporter))
            whole = _compared({PLAIN: runners[PLAIN], ALL: together}, settings, reporter)
            assert whole is not None
            ratios[ALL] = whole.ratios[ALL]
            chosen = chosen if whole.ratios[ALL].faster else []
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    (folder / RESULT).write_bytes(pretty_json(TimesRecord(tuple(chosen), ratios, notes).to_json()))


def _compared(runners: dict[str, Runner], settings: BuildSettings, reporter: Reporter) -> Comparison | None:
    if len(runners) < 2:
        return None
    seconds = _SECONDS * len(runners)
    return compare(runners, BenchSettings(batch=settings.batch[1], seconds=seconds), reporter=reporter)


def _runner(
    model: Path,
    kinds: tuple[Kind, ...],
    target: Target,
    way: str,
    settings: BuildSettings,
    scratch: Path,
    reporter: Reporter,
) -> Runner:
    """An engine of the model with the given kinds, opened.

    Raises:
        ResvitError: INPUT where the graph has none of these kinds, and what building and opening raise.
    """
    import onnx_ir

    from resvit_export.to_tensorrt.copy import onnx_for_tensorrt
    from resvit_export.to_tensorrt.fused_network import fused_network

    name = "-".join(kind.value for kind in kinds) or PLAIN
    source, copy, engine = (scratch / f"{name}.{end}" for end in ("onnx", "tensorrt.onnx", "plan"))
    plugins = way if kinds else "off"
    if kinds:
        network, report = fused_network(model, frozenset(kinds), target)
        if not report.matches:
            raise ResvitError(f"The graph has no {name} that a kernel of ours serves.", "Nothing needs to be done.")
        onnx_ir.save(network, source)
    else:
        source = model
    read = copy if onnx_for_tensorrt(source, copy, target, plugins) else source
    reporter.say(f"an engine with {name} kernels of ours" if kinds else "an engine without kernels of ours")
    built = build_engine(read, engine, target, dataclasses.replace(settings, plugins=plugins), reporter)
    return open_engine(engine, built.sha256, built, read)
