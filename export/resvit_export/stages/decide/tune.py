"""The stages ``timings`` and ``tune``: variants of the placement timed where they will run, and the choice.

The search asks for times through one interface (``resvit_export.tune.Ways``): whatever builds engines of these files
and times them in turns could answer it. So far that is the processor of this machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from resvit_engines.bench.bench import BenchSettings
from resvit_engines.bench.compare import Ratio, paired_ratio, rounds_in_turns
from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record
from resvit_engines.run.runner import open_built
from resvit_engines.targets.table import Target
from resvit_export.stage import Artifact, File, Stage

RESULT = "timings.json"
CHOICE = "tune.json"
WORTH = 1.02
"""Q/DQ stay in a region, and in a network, only where it is measured to be this many times as fast with them."""
_DRIFT = 1.25
"""A machine whose baseline moved further than this from one third of the rounds to the last is said to be uneven."""


@dataclass(frozen=True)
class Timings(Artifact):
    """``timings.json``: ms a call of every variant, one number a round, and how busy the machine was."""

    @functools.cached_property
    def rounds(self) -> Mapping[str, tuple[float, ...]]:
        """The medians of the rounds in ms by variant; those of one round belong together."""
        record = Record(self.json(RESULT), RESULT).record("ms")
        return {name: tuple(record.numbers(name, 0)) for name in record.names}

    def ratio(self, slower: str, faster: str) -> Ratio:
        """How many times as fast ``faster`` is, with its interval of 95%."""
        return paired_ratio(self.rounds[slower], self.rounds[faster])

    def median_ms(self, name: str) -> float:
        """The median over rounds."""
        ordered = sorted(self.rounds[name])
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def remarks(self) -> tuple[str, ...]:
        """What speaks against trusting them."""
        return Record(self.json(RESULT), RESULT).texts("remarks")


@dataclass(frozen=True)
class TimeVariants(Stage[Timings]):
    """Time variants of a network in turns; ``machine`` is where, ``rounds`` how often, ``seconds`` of each in all."""

    name: ClassVar[str] = "timings"
    artifact: ClassVar[type[Artifact]] = Timings
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    variants: Mapping[str, File]
    target: Target
    settings: BuildSettings
    machine: Mapping[str, Any]
    rounds: int
    seconds: float

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Build an engine of every variant, time all of them, and keep the numbers alone."""
        scratch = folder / "engines"
        scratch.mkdir()
        before = os.getloadavg()[0]
        with contextlib.ExitStack() as owned:
            runners = {}
            for number, (name, model) in enumerate(self.variants.items()):
                model.require_unchanged()
                engine = scratch / f"{number}.plan"
                report = build_engine(model.path, engine, self.target, self.settings, SILENT)
                runners[name] = owned.enter_context(open_built(engine, report.sha256, report, model.path))
            bench = BenchSettings(batch=self.settings.batch[1], seconds=self.seconds, warmup=0.1)
            taken = rounds_in_turns(runners, bench, rounds=self.rounds, reporter=reporter)
        for file in scratch.iterdir():
            file.unlink()
        scratch.rmdir()
        load = max(before, os.getloadavg()[0])
        document = {"ms": {name: list(ms) for name, ms in taken.items()}, "load": round(load, 2)}
        (folder / RESULT).write_bytes(pretty_json({**document, "remarks": _remarks(taken, load)}))


def _remarks(taken: Mapping[str, tuple[float, ...]], load: float) -> list[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = []
    if load > cores:
        found.append(f"Other programs ran beside it: a load of {load:.1f} on {cores} cores.")
    first = next(iter(taken.values()))
    third = max(1, len(first) // 3)
    early, late = sorted(first[:third])[third // 2], sorted(first[-third:])[third // 2]
    if max(early, late) > _DRIFT * min(early, late):
        found.append(
            f"The machine's speed moved while it was timed: {early:.3f} ms at first, {late:.3f} ms at the end."
        )
    return found


@dataclass(frozen=True)
class RegionChoice:
    """One region: its products, and how many times as fast the network is with it in 8 bits; kept where that pays."""

    name: str
    nodes: tuple[str, ...]
    share: float
    faster: Ratio
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "nodes": list(self.nodes),
            "share": round(self.share, 4),
            "faster": self.faster.to_json(),
            "kept": self.kept,
        }


@dataclass(frozen=True)
class Tuned(Artifact):
    """``tune.json``."""

    @property
    def precisions(self) -> Mapping[str, str]:
        """What the chosen variant computes otherwise than the plain placement, by product."""
        return Record(self.json(CHOICE), CHOICE).texts_by_name("precisions")

    @property
    def lines(self) -> tuple[str, ...]:
        """What was found, for people."""
        return Record(self.json(CHOICE), CHOICE).texts("sentences")


@dataclass(frozen=True)
class Tune(Stage[Tuned]):
    """Write down what was chosen, and what it rests on; ``sentences`` are for people."""

    name: ClassVar[str] = "tune"
    artifact: ClassVar[type[Artifact]] = Tuned

    regions: tuple[Mapping[str, Any], ...]
    precisions: Mapping[str, str]
    sentences: tuple[str, ...]

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write ``tune.json``."""
        del reporter
        document = {"regions": list(self.regions), "precisions": dict(self.precisions)}
        (folder / CHOICE).write_bytes(pretty_json({**document, "sentences": list(self.sentences)}))


def pays(ratio: Ratio) -> bool:
    """Whether 8 bits are measured to gain what they must: in the median, and chance is excluded."""
    return ratio.value >= WORTH and ratio.faster


def require_measurable(target: Target) -> None:
    """Refuse to tune where nothing can be timed from here; raises ``ResvitError`` IMPOSSIBLE."""
    from resvit_engines.errors import ExitCode

    if not target.on_cpu:
        raise ResvitError(
            f"--tune times variants of the engine on this machine, and so far only for processors, not {target.title}.",
            "Leave --tune out, or say --target cpu.",
            ExitCode.IMPOSSIBLE,
        )
