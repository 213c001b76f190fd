"""What ``bench`` times: a run's network in FP16 and quantised side by side, and unpruned where it was pruned."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.bench.bench import BenchReport, measure
from resvit_engines.bench.commands import golden_feeds, settings_from
from resvit_engines.bench.compare import Comparison, compare
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.keys.public import TrustStore
from resvit_engines.progress import Reporter
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.run.golden_files import golden_inputs, input_name
from resvit_engines.run.npy import read_array
from resvit_engines.run.onnx_on_cpu import RUNTIME, open_onnx
from resvit_engines.run.opened import BUNDLE_SUFFIX, opened
from resvit_engines.run.runner import Runner, open_built, open_sound_onnx, why_not_here
from resvit_engines.targets.table import Precision
from resvit_export.recipe.choices import Recovery
from resvit_export.run import Sources
from resvit_export.run_folder import NotFinishedError, RunFolder
from resvit_export.stage import File
from resvit_export.stages.compile import ENGINE, Compile, Compiled
from resvit_export.stages.score import shipped_in

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline


@dataclass(frozen=True)
class Subject:
    """One network to be timed. ``engine`` builds its engine or finds it; it is opened as a runner."""

    name: str
    model: File
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
    from resvit_export.pipeline import Pipeline
    from resvit_export.recipe.file import recipe_from_toml
    from resvit_export.run import runs_for

    recipe = recipe_from_toml(folder / "recipe.toml")
    run_folder = RunFolder(folder, reporter)
    with run_folder.locked():
        runs = runs_for(recipe, run_folder, reporter)
        chosen = [one for one in runs if target in (None, one.recipe.target)]
        if not chosen:
            names = ", ".join(str(one.recipe.target) for one in runs)
            raise ResvitError(f"{folder} was not built for {target}.", f"It was for {names}.")
        pipeline = finished(Pipeline(chosen[0]))
        subjects = subjects_of(pipeline)
        reason = None if runtime == RUNTIME else _why_no_engine(pipeline)
        if reason is not None and runtime != "auto":
            raise reason
        runners: dict[str, Runner] = {}
        for subject in subjects:
            if runtime != RUNTIME and reason is None:
                runners[subject.name] = subject.engine()
                continue
            cpu = open_sound_onnx(subject.model.path, *(subject.golden or ()))
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
    from resvit_export.tune import settled

    with pipeline.run.folder.looking_back():
        with contextlib.suppress(NotFinishedError):
            pipeline = settled(pipeline)
        pipeline.calibrated, pipeline.quantized  # noqa: B018
    return pipeline


def subjects_of(pipeline: Pipeline) -> list[Subject]:
    """What of a run is timed, the FP16 baseline first: unpruned where it was pruned, then its own FP16, then it."""
    from resvit_export.pipeline import Pipeline
    from resvit_export.run import Run

    run, recipe = pipeline.run, pipeline.recipe
    pruned = ", pruned" if recipe.prunes else ""
    floating = (run.target.float_precision if run.target else Precision.FP16).value.upper()
    subjects = []
    if recipe.prunes:
        # Its own budget would be asked of a network that is not pruned.
        plain = dataclasses.replace(
            recipe, prune_macs=None, prune_latency=None, prune_params=None, sparsity=None, measured_times=None,
            latency_budget=None, recover=Recovery.NEVER,
        )  # fmt: skip
        dense = Pipeline(Run(plain, run.folder, run.reporter, Sources(plain, run.reporter)))
        subjects.append(_half(dense, f"{floating}, unpruned"))
    if run.precision.quantises:
        subjects.append(_half(pipeline, f"{floating}{pruned}"))
    subjects.append(
        Subject(
            f"{run.precision.value.upper()}{pruned}",
            pipeline.model,
            lambda: _engine_of_run(pipeline) or _engine(pipeline, pipeline.model, pipeline.engine_settings),
            _golden(pipeline),
        )
    )
    return subjects


def _half(pipeline: Pipeline, name: str) -> Subject:
    model = pipeline.run.folder.do(pipeline.half).model
    return Subject(name, model, lambda: _engine(pipeline, model, pipeline.run.build_settings))


def _engine(pipeline: Pipeline, model: File, settings: BuildSettings) -> Runner:
    """An engine of ``model``, built here for the GPU of this machine."""
    run = pipeline.run
    return _opened(run.folder.do(Compile(model, run.require_target(), settings, None)), model)


def _engine_of_run(pipeline: Pipeline) -> Runner | None:
    """The engine that the run compiled, where it did."""
    try:
        with pipeline.run.folder.looking_back():
            compiled = pipeline.compiled
    except ResvitError:
        return None
    return _opened(compiled, pipeline.model) if compiled.engine is not None else None


def _opened(compiled: Compiled, model: File) -> Runner:
    engine, report = compiled.file(ENGINE), compiled.engine
    assert report is not None
    return open_built(engine.path, engine.digest, report, (compiled.copy or model).path)


def _why_no_engine(pipeline: Pipeline) -> ResvitError | None:
    """Why no engine for the run's target can be built and run on this machine, None where it can."""
    target = pipeline.run.target
    if target is None or not pipeline.run.builds_here:
        return ResvitError(
            f"An engine for {target.title if target else 'no target'} cannot be built on this machine.",
            "Run 'resvit-engine bench' on the device, or leave --runtime out.",
            ExitCode.IMPOSSIBLE,
        )
    return why_not_here(target.builder, target.sm, hardware_compatible=pipeline.run.build_settings.hardware_compatible)


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
        with pipeline.run.folder.looking_back():
            scored = shipped_in(pipeline.answered)
    except NotFinishedError:
        return None
    images, outputs = (read_array(scored.path(f"golden_{end}.npy"), "golden") for end in ("input", "output"))
    return images, outputs, golden_inputs(scored.folder, scored.golden, len(images))
