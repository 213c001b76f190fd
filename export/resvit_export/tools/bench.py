"""What ``bench`` times: a run's network in FP16 and quantised side by side, and unpruned where it was pruned."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_engines.bench.bench import BenchReport, measure
from resvit_engines.bench.commands import golden_feeds, settings_from
from resvit_engines.bench.compare import Comparison, compare
from resvit_engines.builder.builder import build_engine, builder_here
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.keys.public import TrustStore
from resvit_engines.progress import Reporter
from resvit_engines.records import Record
from resvit_engines.run.engine_runner import open_engine
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.run.golden_files import golden_inputs, input_name
from resvit_engines.run.onnx_on_cpu import RUNTIME, open_onnx
from resvit_engines.run.opened import BUNDLE_SUFFIX, opened
from resvit_engines.run.runner import Runner, open_sound_onnx, why_not_here
from resvit_export import work
from resvit_export.run_folder import Artifact, NotFinishedError, RunFolder
from resvit_export.to_tensorrt.copy import TENSORRT_COPY, onnx_for_tensorrt

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline

_ENGINE = "engine.plan"
_RECORD = "engine.json"


@dataclass(frozen=True)
class Subject:
    """One network to be timed. ``engine`` builds its engine or finds it; it is opened as a runner."""

    name: str
    model: Path
    digest: str
    engine: Callable[[], Runner]
    golden: tuple[Array, Array, Arrays] | None = None
    """Images, what the quantised network was validated to make of them, and what is read beside them."""


def bench(
    sources: Sequence[Path], target: str | None, runtime: str, trust: TrustStore, flags: Mapping[str, Any],
    reporter: Reporter,
) -> Comparison | BenchReport:  # fmt: skip
    """Time run folders, bundles and ONNX files side by side; the first network is what the others are compared with.

    A run brings its FP16 form and its quantised one, and, where it was pruned, the unpruned one in FP16 before them.
    Engines run where this machine has the GPU; elsewhere everything runs in ONNX Runtime on the CPU, and says so.
    ``flags`` are those of the benchmark's options. One network alone is timed without a comparison.

    Raises:
        ResvitError: INPUT for a run that was not quantised yet, for what is neither run, bundle nor ONNX file, and for
            networks of different inputs; IMPOSSIBLE or MISSING where ``runtime`` cannot be had.
    """
    with contextlib.ExitStack() as owned:
        runners: dict[str, Runner] = {}
        feeds: Arrays | None = None
        for source in sources:
            prefix = f"{source.name}: " if len(sources) > 1 else ""
            found, seen = _open_source(source, target, runtime, trust, reporter, owned)
            feeds = seen if feeds is None else feeds
            for name, runner in found.items():
                runners.setdefault(f"{prefix}{name}", owned.enter_context(runner))
        _require_alike(runners)
        settings = settings_from(flags, *runners.values())
        first = next(iter(runners.values()))
        if len(runners) == 1:
            return measure(first, settings, feeds)
        return compare(runners, settings, feeds, reporter=reporter)


def _open_source(
    source: Path, target: str | None, runtime: str, trust: TrustStore, reporter: Reporter, owned: contextlib.ExitStack
) -> tuple[dict[str, Runner], Arrays | None]:
    if source.is_dir():
        return _open_run(source, target, runtime, reporter)
    if source.suffix == ".onnx":
        if runtime not in ("auto", RUNTIME):
            raise ResvitError(
                f"{source.name} is no engine: an ONNX file is timed by ONNX Runtime.",
                "Give the run folder or the bundle, or leave --runtime out.",
            )
        return {source.name: open_onnx(source)}, None
    if source.suffix == BUNDLE_SUFFIX:
        runner, folder, manifest = owned.enter_context(opened(str(source), source.parent, trust, runtime))
        return {source.name: runner}, golden_feeds(folder, manifest, runner)
    raise ResvitError(
        f"{source} is no run folder, bundle or ONNX file.", "Give the folder that 'resvit-export build --run' wrote."
    )


def _open_run(
    folder: Path, target: str | None, runtime: str, reporter: Reporter
) -> tuple[dict[str, Runner], Arrays | None]:
    """Prepare what a run's networks need, and open them all by the same runtime."""
    from resvit_export.pipeline import pipelines_for
    from resvit_export.recipe import recipe_from_toml

    recipe = recipe_from_toml(folder / "recipe.toml")
    run = RunFolder(folder, reporter)
    with run.locked():
        pipelines = pipelines_for(recipe, run, reporter)
        chosen = [one for one in pipelines if target in (None, one.recipe.target)]
        if not chosen:
            names = ", ".join(str(one.recipe.target) for one in pipelines)
            raise ResvitError(f"{folder} was not built for {target}.", f"It was for {names}.")
        pipeline = finished(chosen[0])
        subjects = subjects_of(pipeline)
        reason = None if runtime == RUNTIME else _why_no_engine(pipeline)
        if reason is not None and runtime != "auto":
            raise reason
        runners: dict[str, Runner] = {}
        for subject in subjects:
            if runtime != RUNTIME and reason is None:
                runners[subject.name] = subject.engine()
                continue
            cpu = open_sound_onnx(subject.model, *(subject.golden or ()))
            cpu.why = reason.problem.rstrip(".") if reason else "ONNX Runtime was asked for"
            runners[subject.name] = cpu
    golden = next((subject.golden for subject in subjects if subject.golden), None)
    if golden is None:
        return runners, None
    images, _, beside = golden
    return runners, {input_name(next(iter(runners.values())), None): images, **beside}


def finished(pipeline: Pipeline) -> Pipeline:
    """The pipeline as its run settled it, without doing any stage that would change what is timed.

    Raises:
        ResvitError: INPUT where it was not quantised yet.
    """
    with pipeline.run.looking_only():
        with contextlib.suppress(NotFinishedError):
            pipeline = pipeline.settled()
        pipeline.calibrated, pipeline.quantized  # noqa: B018
    return pipeline


def subjects_of(pipeline: Pipeline) -> list[Subject]:
    """What of a run is timed, the FP16 baseline first: unpruned where it was pruned, then its own FP16, then it."""
    from resvit_export.pipeline import Pipeline

    precision, recipe = pipeline.recipe.precision.upper(), pipeline.recipe
    pruned = ", pruned" if pipeline.prunes else ""
    found = []
    if pipeline.prunes:
        # Its own budget would be asked of a network that is not pruned.
        plain = dataclasses.replace(
            recipe, prune_macs=None, prune_latency=None, prune_params=None, sparsity=None, measured_times=None,
            latency_budget=None, recover="never",
        )  # fmt: skip
        dense = Pipeline(plain, pipeline.run, pipeline.reporter)
        dense.borrow(pipeline)
        found.append(_half(dense, "FP16, unpruned"))
    if recipe.precision != "fp16":
        found.append(_half(pipeline, f"FP16{pruned}"))
    shipped = pipeline.shipped
    found.append(
        Subject(
            f"{precision}{pruned}",
            shipped.path("model.onnx"),
            shipped.digest,
            lambda: (
                _engine_of_run(pipeline)
                or _engine(pipeline, shipped.path("model.onnx"), shipped.digest, pipeline.engine_settings)
            ),
            _golden(pipeline),
        )
    )
    return found


def _half(pipeline: Pipeline, name: str) -> Subject:
    (model, digest), calibrated, target = pipeline.float_model, pipeline.calibrated, pipeline.target
    builder = builder_here(target) if target else None
    artifact = pipeline.run.stage(
        "half",
        {"builder": builder.value if builder else None},
        {"model": digest, "ranges": calibrated.digest},
        ("onnx", "onnx-ir"),
        lambda folder: work.half_into(folder, model, calibrated.path("ranges.json"), target),
    )
    path = artifact.path("model.onnx")
    return Subject(
        name, path, artifact.digest, lambda: _engine(pipeline, path, artifact.digest, pipeline.build_settings)
    )


def _engine(pipeline: Pipeline, model: Path, digest: str, settings: BuildSettings) -> Runner:
    """An engine of ``model``, built here for the GPU of this machine."""
    target = pipeline.require_target()

    def build(folder: Path) -> None:
        copied = onnx_for_tensorrt(model, folder / TENSORRT_COPY, target, settings.plugins)
        source = folder / TENSORRT_COPY if copied else model
        report = build_engine(source, folder / _ENGINE, target, settings, pipeline.reporter)
        (folder / _RECORD).write_bytes(pretty_json(report.to_json()))

    artifact = pipeline.run.stage(
        "engine",
        {"target": target.to_json(), **settings.to_json()},
        {"model": digest},
        ("tensorrt-rtx-cu13-libs", "tensorrt"),
        build,
    )
    return _opened(artifact, model)


def _engine_of_run(pipeline: Pipeline) -> Runner | None:
    """The engine that the run compiled, where it did."""
    try:
        with pipeline.run.looking_only():
            compiled = pipeline.compiled
    except ResvitError:
        return None
    return _opened(compiled, pipeline.shipped.path("model.onnx")) if _ENGINE in compiled.record["outputs"] else None


def _opened(artifact: Artifact, model: Path) -> Runner:
    report = EngineReport.from_json(Record(artifact.json(_RECORD), _RECORD))
    copy = artifact.path(TENSORRT_COPY)
    sha256 = artifact.record["outputs"][_ENGINE]["sha256"]
    return open_engine(artifact.path(_ENGINE), sha256, report, copy if copy.exists() else model)


def _why_no_engine(pipeline: Pipeline) -> ResvitError | None:
    """Why no engine for the run's target can be built and run on this machine, None where it can."""
    target = pipeline.target
    builder = builder_here(target) if target else None
    if target is None or builder is None:
        return ResvitError(
            f"An engine for {target.title if target else 'no target'} cannot be built on this machine.",
            "Run 'resvit-engine bench' on the device, or leave --runtime out.",
            ExitCode.IMPOSSIBLE,
        )
    return why_not_here(builder, target.sm, hardware_compatible=pipeline.build_settings.hardware_compatible)


def _require_alike(runners: Mapping[str, Runner]) -> None:
    first, *others = runners.items()
    for name, runner in others:
        if [spec.shape[1:] for spec in runner.inputs] != [spec.shape[1:] for spec in first[1].inputs]:
            raise ResvitError(
                f"{first[0]} reads {', '.join(map(str, first[1].inputs))}, and {name} reads "
                f"{', '.join(map(str, runner.inputs))}: their times say nothing of each other.",
                "Compare networks of the same input.",
            )


def _golden(pipeline: Pipeline) -> tuple[Array, Array, Arrays] | None:
    try:
        with pipeline.run.looking_only():
            validated = pipeline.validated
    except NotFinishedError:
        return None
    images, outputs = (np.load(validated.path(f"golden_{end}.npy"), allow_pickle=False) for end in ("input", "output"))
    golden = GoldenFiles.from_json(Record(validated.json("verdict.json"), "verdict.json").record("golden"))
    return images, outputs, golden_inputs(validated.folder, golden, len(images))
