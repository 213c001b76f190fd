"""What ``compare`` puts side by side: engines of run folders, beside those that the device wing reads."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.audit.compare.engine import ListedEngine, engine_from_kernels, with_times
from resvit_engines.audit.inspector import layers_from_file
from resvit_engines.audit.kernels import Kernel
from resvit_engines.bench.bench import BenchReport
from resvit_engines.bench.listed import engine_from_report, listed_engine
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_folder
from resvit_engines.progress import SILENT
from resvit_engines.records import Record
from resvit_export.run_folder import NotFinishedError, RunFolder
from resvit_export.stages.audit import KERNELS, is_predicted

if TYPE_CHECKING:
    from resvit_engines.remote.job_result import JobResult
    from resvit_export.pipeline import Pipeline
    from resvit_export.stages.compile import Compiled

FP16 = ":fp16"
"""Behind a run folder: its network in FP16, which was listed beside it."""


def engine_of(
    source: str, target: str | None = None, profile: Path | None = None, times: Path | None = None
) -> ListedEngine:
    """An engine of a run folder (``RUN``, or ``RUN:fp16``), of a bundle, or by its layer file or profile.

    Of a run that was built on a device it is the engine from there, with its time; of one that is not built yet what is
    predicted. ``target`` says which of a run's targets.

    Raises:
        ResvitError: INPUT for what is none of these, or a run without an audit.
    """
    folder, half = Path(source.removesuffix(FP16)), source.endswith(FP16)
    if leads_to_folder(folder):
        return with_times(_of_run(folder, target, half=half), profile, times)
    return listed_engine(Path(source), profile, times)


def _of_run(folder: Path, target: str | None, *, half: bool) -> ListedEngine:
    from resvit_export.pipeline import Pipeline
    from resvit_export.recipe.file import recipe_from_toml
    from resvit_export.run import runs_for
    from resvit_export.tools.bench import finished

    if not (folder / "recipe.toml").is_file():
        raise ResvitError(f"{folder} is no run folder.", "Give the folder that 'resvit-export build --run' wrote.")
    run_folder = RunFolder(folder, SILENT)
    with run_folder.locked():
        runs = runs_for(recipe_from_toml(folder / "recipe.toml"), run_folder, SILENT)
        chosen = [one for one in runs if target in (None, one.recipe.target)]
        if not chosen:
            names = ", ".join(str(one.recipe.target) for one in runs)
            raise ResvitError(f"{folder} was not built for {target}.", f"It was for {names}.")
        chosen[0].require_target()
        try:
            pipeline = finished(Pipeline(chosen[0]))
            with run_folder.looking_back():
                return _listed(pipeline, f"{folder.name}{FP16 if half else ''}", half=half)
        except NotFinishedError as error:
            raise ResvitError(
                f"{folder} is not finished: {error.problem}", f"Run: resvit-export build --run {folder}"
            ) from error


def _listed(pipeline: Pipeline, name: str, *, half: bool) -> ListedEngine:
    from resvit_export.stages.device import newest_on_device

    target = pipeline.run.require_target()
    if half:
        kernels = _of_audit(pipeline, "fp16")
        note = f"FP16 of the same network; {_predicted(pipeline)}" if is_predicted(target) else "FP16, compiled here"
        return engine_from_kernels(name, kernels, note)
    with contextlib.suppress(ResvitError):
        device = newest_on_device(pipeline.run.folder, pipeline.bundled.bundle)
        if device is not None and device.result.job.engine.kernels:
            return _of_job(name, device.result.job)
    compiled = pipeline.compiled
    if compiled.engine is not None:
        return _of_build(name, compiled)
    return engine_from_kernels(name, _of_audit(pipeline, "quantized"), _predicted(pipeline))


def _of_job(name: str, job: JobResult) -> ListedEngine:
    """The engine that a device built, with the time that it took there."""
    engine, bench = engine_from_report(name, job.engine), job.bench
    if not isinstance(bench, BenchReport) or bench.gpu_ms is None:
        return engine
    note = f"{engine.note}, on {job.machine.gpu or job.machine.host}, batch {bench.batch}"
    return dataclasses.replace(engine, latency_us=1e3 * bench.gpu_ms["p50"], note=note)


def _of_build(name: str, compiled: Compiled) -> ListedEngine:
    """The engine that was built here: by TensorRT's own layer file, where there is one."""
    report = compiled.engine
    assert report is not None
    engine = engine_from_report(name, report)
    if report.layers is None:
        return engine
    return engine_from_kernels(name, layers_from_file(compiled.path(report.layers)).kernels, engine.note)


def _of_audit(pipeline: Pipeline, which: str) -> tuple[Kernel, ...]:
    """Kernels that were compiled or predicted for the audit."""
    kernels = pipeline.audited.read(KERNELS, lambda found: tuple(map(Kernel.from_json, _records(found, which))))
    if not kernels:
        raise ResvitError(
            f"No {which} engine was listed in {pipeline.run.folder.path}.",
            "Run 'resvit-export build', or 'audit', with --precision int8 or fp8 on that folder first.",
        )
    return kernels


def _records(found: object, which: str) -> tuple[Record, ...]:
    listed = Record(found, KERNELS)
    return listed.records(which) if which in listed.names else ()


def _predicted(pipeline: Pipeline) -> str:
    target = pipeline.run.require_target()
    if is_predicted(target):
        return f"predicted by TensorRT's rules for {target.title}; no engine was built"
    return f"compiled for the audit by {target.software}"
