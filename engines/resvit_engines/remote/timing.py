"""Variants of a network become engines on the device that they are for, and are timed there in turns.

Each variant is a signed bundle without an engine. Its signature holds before anything of it is unpacked, its engine is
a phase that survives a kill, and nothing of all that is left in the end but times: what ships is built and checked as
every other bundle (:mod:`resvit_engines.remote.job`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.bench.bench import BenchSettings
from resvit_engines.bench.variants import Opening, VariantTimes, time_variants
from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.bundle.bundle import trusted_bundle
from resvit_engines.bundle.fit import require_fit
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import (
    atomic_directory,
    canonical_json,
    make_folder,
    pretty_json,
    remove,
    sha256_bytes,
    write_atomic,
)
from resvit_engines.keys.public import TrustStore
from resvit_engines.machine import Machine, this_machine
from resvit_engines.names import require_name
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record
from resvit_engines.remote.job import ENGINE, ENGINE_REPORT, LOG, MODELS, REHEARSAL, how_to_build, software_of
from resvit_engines.remote.job_folder import JobFolder
from resvit_engines.run.runner import Runner, open_built, open_sound_onnx

VARIANTS, LAYERS = "variants", "layers"
"""Folders of the job: what was built, and of each variant's engine TensorRT's own list of layers (``NAME.json``)."""
_WARM_UP = 0.1
_SPARE_MIB = 256


@dataclass(frozen=True)
class TimingJob:
    """Which bundles are timed, the first the baseline, each called by its file's name without its ending.

    ``rounds`` and ``seconds`` of each in all say how long; ``folder`` is where the work is kept.
    """

    bundles: tuple[Path, ...]
    folder: Path
    rounds: int
    seconds: float
    rehearse: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What the variants are called; raises INPUT for a name that is none, or that comes twice."""
        names = tuple(require_name(path.stem, "The name of the bundle,") for path in self.bundles)
        if len(names) < 2 or len(set(names)) < len(names):
            raise ResvitError(
                f"Two bundles or more of different names are timed, and these are {', '.join(names) or 'none'}.",
                "Name each bundle once; rename one where two are called the same.",
            )
        return names


@dataclass(frozen=True)
class TimingResult:
    """What was measured, on which machine; ``rehearsal`` says that the times are not the device's."""

    times: VariantTimes
    machine: Machine
    rehearsal: bool
    seconds: Mapping[str, float]
    """How long each engine took to build."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "times": self.times.to_json(),
            "facts": self.machine.to_json(),
            "rehearsal": self.rehearsal,
            "build_seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
        }

    @classmethod
    def from_json(cls, record: Record) -> TimingResult:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        return cls(
            VariantTimes.from_json(record.record("times")),
            Machine.from_json(record.record("facts")),
            record.flag("rehearsal"),
            record.numbers_by_name("build_seconds"),
        )


def run_timing(job: TimingJob, trust: TrustStore, reporter: Reporter = SILENT) -> TimingResult:
    """Do what of the job is not done yet and return its result, which ``result.json`` holds too.

    Raises:
        ResvitError: UNTRUSTED for a bundle that is not signed by a trusted key, IMPOSSIBLE where one does not fit this
            device, SYSTEM where disk or memory is short, and what a build raises.
    """
    names, folder = job.names, JobFolder(job.folder)
    with folder.working(reporter) as events, contextlib.ExitStack() as opened:
        if job.rehearse:
            events.warn(REHEARSAL)
        machine = this_machine(disk=job.folder)
        bundles = [opened.enter_context(trusted_bundle(path, trust)) for path in job.bundles]
        for bundle in bundles:
            require_fit(dataclasses.replace(bundle.manifest, engine=None), machine, rehearse=job.rehearse)
        digests = [bundle.file_digest() for bundle in bundles]
        parts = software_of(machine, rehearse=job.rehearse)
        folder.begin(sha256_bytes(canonical_json([digests, job.rehearse, job.rounds, job.seconds, *parts])))
        folder.repeated_phase("facts", lambda: machine)
        engines: dict[str, EngineReport] = {}
        make_folder(job.folder / VARIANTS)
        make_folder(job.folder / LAYERS)
        for number, (name, bundle) in enumerate(zip(names, bundles, strict=True)):
            place = job.folder / VARIANTS / name

            def build(place: Path = place, bundle: Any = bundle, number: int = number) -> EngineReport:
                events.say(f"Variant {number + 1} of {len(names)}")
                with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=job.folder) as scratch:
                    bundle.extract(Path(scratch))
                    return _build(bundle.manifest, Path(scratch), place, events, rehearse=job.rehearse)

            engines[name], _ = folder.phase(f"build-{name}", build, EngineReport.from_json, f"{VARIANTS}/{name}")
        batch = bundles[0].manifest.build_settings.batch[1]
        openings: dict[str, Opening] = {
            name: functools.partial(_opened, job.folder / VARIANTS / name, report, rehearse=job.rehearse)
            for name, report in engines.items()
        }

        def measure() -> VariantTimes:
            events.say(f"Timing {len(names)} variants in turns")
            bench = BenchSettings(batch=batch, seconds=job.seconds, warmup=_WARM_UP)
            on_gpu = bundles[0].manifest.target is not None and not bundles[0].manifest.target.on_cpu
            return time_variants(openings, bench, job.rounds, events, on_gpu=on_gpu and not job.rehearse)

        times, _ = folder.phase("time", measure, VariantTimes.from_json)
        for name, report in engines.items():
            if report.layers is not None:
                listed = job.folder / VARIANTS / name / report.layers
                write_atomic(job.folder / LAYERS / f"{name}.json", listed.read_bytes())
        seconds = {name: report.seconds or 0.0 for name, report in engines.items()}
        result = TimingResult(times, machine, job.rehearse, seconds)
        folder.finish(result)
    return result


def _build(manifest: Any, model: Path, place: Path, reporter: Reporter, *, rehearse: bool) -> EngineReport:
    """Build one engine; only what it takes to open it is kept: the ONNX where weights come from it, or it stands in."""
    target, settings = how_to_build(manifest, rehearse=rehearse)
    onnx = next(model / name for name in MODELS if (model / name).exists())
    with atomic_directory(place) as partial:
        shown = SILENT if target.on_cpu else reporter  # it takes no time worth showing
        report = build_engine(onnx, partial / ENGINE, target, settings, shown, partial / LOG)
        report = dataclasses.replace(report, rehearsal=rehearse)
        (partial / ENGINE_REPORT).write_bytes(pretty_json(report.to_json()))
        if rehearse or report.strip_weights:
            (partial / MODELS[-1]).write_bytes(onnx.read_bytes())
    return report


def _opened(place: Path, report: EngineReport, *, rehearse: bool) -> Runner:
    """The engine just built; in a rehearsal its graph on the processor, since nothing else is there to run it."""
    model = place / MODELS[-1]
    return open_sound_onnx(model) if rehearse else open_built(place / ENGINE, report.sha256, report, model)


def forget_engines(folder: Path) -> None:
    """Remove what a finished job built; its times are kept."""
    remove(folder / VARIANTS)


def too_large(bundles: Sequence[int], free_mib: int, device: str) -> ResvitError | None:
    """Why bundles of so many bytes cannot be built beside each other in ``free_mib``, or None where they can.

    Each takes its own size, once more while it is unpacked, and an engine, which is seldom larger than its model.
    """
    needed = (2 * sum(bundles) + max(bundles, default=0) >> 20) + _SPARE_MIB
    if free_mib >= needed:
        return None
    return ResvitError(
        f"{len(bundles)} variants and their engines take {needed:,} MiB on {device}, and {free_mib:,} MiB are free.",
        "Free some space there and run the same command again, or say --tune quick, which builds fewer.",
        ExitCode.SYSTEM,
    )
