"""Building from Python: what a notebook or a training script calls, and what the command line calls too."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ExitCode, ResvitError, interrupts_as_themselves
from resvit_engines.files import write_atomic
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.targets.speed_verdict import SpeedKind
from resvit_export.recipe.file import absolute, recipe_to_toml
from resvit_export.recipe.recipe import SETTINGS, Recipe

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from resvit_engines.builder.device_plan import DevicePlan
    from resvit_engines.builder.engine_report import EngineReport
    from resvit_engines.targets.speed_verdict import SpeedVerdict
    from resvit_export.pipeline import Pipeline
    from resvit_export.records.device import DeviceResult
    from resvit_export.records.verdict import VerdictRecord
    from resvit_export.run import Run
    from resvit_export.run_folder import RunFolder
    from resvit_export.stage import Artifact
    from resvit_export.stages.device import RunOnDevice
    from resvit_export.to_onnx.report import ExportReport
    from resvit_quantize.qdq.report import QuantizeReport


_DATA = ("data", "validation_data", "train_data")
_REFUSED = (ExitCode.INPUT, ExitCode.IMPOSSIBLE, ExitCode.MISSING)
"""What ends a command whose settings or data cannot be used."""


@dataclass(frozen=True)
class Device:
    """Where an engine is built, validated and timed: ``ssh://user@host``; a rehearsal only tries the way there."""

    address: str
    rehearse: bool = False


@dataclass(frozen=True)
class Built:
    """What came of a build for one target. ``rejection`` says why it ended at the gate, where it did.

    ``stages`` are the finished stages in order, each with its folder, its record and its files by name.
    """

    pipeline: Pipeline
    stages: tuple[Artifact, ...]
    report: Path
    rejection: ResvitError | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.pipeline.run.folder.path

    @property
    def verdict(self) -> VerdictRecord:
        """The verdict, with the accuracy stage by stage."""
        return self.pipeline.validated.verdict

    @property
    def speed(self) -> SpeedVerdict:
        """The verdict's other half: whether what ships is faster than FP16 on the target, and by what evidence."""
        return self.pipeline.speed

    @property
    def exported(self) -> ExportReport:
        """The float ONNX in figures."""
        return self.pipeline.exported.report

    @property
    def quantized(self) -> QuantizeReport:
        """What became of each matrix product."""
        return self.pipeline.quantized.report

    @property
    def onnx(self) -> Path:
        """The ONNX that was validated and ships."""
        return self.pipeline.model.path

    @property
    def engine(self) -> EngineReport | None:
        """The engine; None where it was not built here, or the model was rejected."""
        return None if self.rejection else self.pipeline.compiled.engine

    @property
    def plan(self) -> DevicePlan | None:
        """How to build the engine where it can be; None where it was built here, or the model was rejected."""
        return None if self.rejection else self.pipeline.compiled.plan

    @property
    def bundle(self) -> Path | None:
        """The bundle for the device; None where the model was rejected."""
        return None if self.rejection else self.pipeline.bundled.bundle.path

    @cached_property
    def device(self) -> DeviceResult | None:
        """What came back from the device; None without one."""
        from resvit_export.stages.device import OnDevice

        return next((stage.result for stage in self.stages if isinstance(stage, OnDevice)), None)

    @property
    def exit_code(self) -> ExitCode:
        """What the command line returns: of the accuracy, of what was refused behind it, of the device the worst.

        Where nothing is wrong with these, that of the speed.
        """
        from resvit_export.refusals import asks_for_speed

        recipe = self.pipeline.recipe
        code = self.verdict.verdict.exit_code
        if self.rejection is not None:
            code = self.rejection.code
        elif recipe.allow_rejected and code is ExitCode.REJECTED:
            code = ExitCode.OK
        if self.device:
            code = max(code, self.device.exit_code(allow_rejected=recipe.allow_rejected))
        if code is ExitCode.OK and asks_for_speed(recipe) and self.speed.kind is SpeedKind.NOT_FASTER:
            code = ExitCode.NOT_FASTER
        return code


def build(
    model: str | nn.Module,
    data: str | Dataset[Any] | DataLoader[Any],
    target: str,
    *,
    run: str | Path | None = None,
    reporter: Reporter = SILENT,
    **settings: Any,
) -> Built:
    """Take a trained network to a validated bundle for ``target``; what is finished in ``run`` is not done again.

    ``model`` is a module in memory, with its weights, or a name as ``--model`` takes it. ``data``, and
    ``validation_data`` and ``train_data`` among the settings, are names as ``--data`` takes them, or a ``Dataset`` or
    ``DataLoader`` of torch's: pictures are prepared here, ready arrays are the network's input. ``settings`` are
    fields of ``Recipe``: ``precision="int8"``, ``max_drop=0.5``, ``checkpoint="weights.pt"``. A model that the
    gate does not accept is no error: see ``Built.verdict`` and ``Built.rejection``.
    ``run`` is ``runs/MODEL`` where it is not said, with the name of the module's class.

    Interrupted, it leaves ``run`` free and what is finished in it, and says so as the text of the
    ``KeyboardInterrupt``; the same call goes on where it stopped.

    Raises:
        ResvitError: where model, data or a setting cannot be used, with the sentence that the command line prints.
    """
    from resvit_calibrate.readers.user.objects import peeked
    from resvit_export.run import runs_for
    from resvit_export.run_folder import RunFolder

    module, name = (None, model) if isinstance(model, str) else (model, f"object:{type(model).__name__}")
    objects: dict[str, Any] = {}
    names = {
        key: value if value is None or isinstance(value, str) else _named(value, objects)
        for key, value in {"data": data, **settings}.items()
        if key in _DATA
    }
    objects = {key: peeked(value) for key, value in objects.items()}
    recipe = recipe_from_settings({"model": name, "targets": (target,), **settings, **names})
    folder = RunFolder(Path(run) if run is not None else Path("runs") / recipe.label, reporter)
    try:
        with (
            interrupts_as_themselves(),
            opened(recipe, folder, runs_for(recipe, folder, reporter, module, objects)) as runs,
        ):
            return build_run(runs[0])
    except KeyboardInterrupt as interrupt:
        # A notebook shows its text as the last line: what to do next belongs there.
        interrupt.args = interrupt.args or (f"what is finished is kept in {folder.path}: the same call goes on there",)
        raise


def _named(value: Any, objects: dict[str, Any]) -> str:
    """A name for a data set in memory, the same for the same object; adds it to ``objects``."""
    known = next((name for name, other in objects.items() if other is value), None)
    if known is not None:
        return known
    name = f"object:{type(value).__name__}"
    name += f"_{len(objects) + 1}" if name in objects else ""
    objects[name] = value
    return name


def recipe_from_settings(settings: Mapping[str, Any]) -> Recipe:
    """The recipe with these fields; paths are relative to the current folder, and stay where they were.

    Raises:
        ResvitError: for a setting that does not exist, and as ``Recipe``.
    """
    for name in settings:
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=3, cutoff=0.4)
            raise ResvitError(
                f"There is no setting '{name}'.",
                f"Did you mean {', '.join(near)}?" if near else f"There are: {', '.join(SETTINGS)}.",
            )
    recipe = Recipe(**settings)
    places = {name: absolute(item, getattr(recipe, name), Path.cwd()) for name, item in SETTINGS.items()}
    return dataclasses.replace(recipe, **places)


@contextlib.contextmanager
def opened(recipe: Recipe, folder: RunFolder, runs: Sequence[Run], *, looks: bool = False) -> Iterator[Sequence[Run]]:
    """The runs on their locked folder, with the recipe written down; who only ``looks`` leaves what is there.

    A run that came to a verdict keeps the recipe of that until the first stage of the new one is done, and so where
    settings or data are refused before; without new stages it is written down in the end.
    """
    kept, now = folder.path / "recipe.toml", recipe_to_toml(recipe).encode()
    with folder.locked():
        if looks and kept.exists():
            yield runs
            return
        judged = next(folder.records("validate"), None) is not None
        if not (judged and kept.is_file()):
            write_atomic(kept, now)
        try:
            with folder.telling_the_first(lambda: write_atomic(kept, now)):
                yield runs
        except ResvitError as error:
            if error.code not in _REFUSED:
                write_atomic(kept, now)
            elif kept.read_bytes() != now:
                folder.reporter.warn(f"{kept} is as before: what was refused is no part of the run.")
            raise
        write_atomic(kept, now)


def build_run(run: Run, *, report: str = "report.html", device: Device | None = None) -> Built:
    """Do every stage for one target, and write the report; ``device`` then builds, validates and times there."""
    from resvit_export.pipeline import Pipeline
    from resvit_export.report.gather import write_run_report
    from resvit_export.stages.device import look_at_device
    from resvit_export.tune import settled

    run.require_target()
    run.sources.require_images()
    run.signing_key()  # a key that cannot be used is refused before any work
    if device is not None:
        if device.rehearse and run.require_target().on_cpu:
            raise ResvitError(
                "There is nothing to rehearse for a processor: every device has one.",
                "Leave --rehearse out.",
                ExitCode.IMPOSSIBLE,
            )
        if device.rehearse and run.fuses:
            raise ResvitError(
                f"Kernels of our own ({run.plugins.reason}) cannot be rehearsed: TensorRT for RTX takes no plugins.",
                "Rehearse with --plugins off.",
                ExitCode.IMPOSSIBLE,
            )
        look_at_device(device.address, run.require_target(), device.rehearse, run.reporter)
    choose_place(run, device)
    pipeline = Pipeline(run)
    pipeline.look_ahead()
    pipeline = settled(pipeline)
    stages: list[Artifact] = [getattr(pipeline, name) for name in pipeline.variant.order(run)]
    rejection: ResvitError | None = None
    try:
        for name in ("compiled", "audited", "bundled"):
            # One by one: what is done before a refusal is shown.
            stages.append(getattr(pipeline, name))
        if device is not None:
            built = run.folder.do(_on_device(pipeline, device))
            stages.append(built)
            if run.recipe.require_fused and built.audit is not None:
                built.audit.require_fused()
    except ResvitError as error:
        if error.code != ExitCode.REJECTED:
            raise
        rejection = error
    return Built(pipeline, tuple(stages), write_run_report(pipeline, report), rejection)


def choose_place(run: Run, device: Device | None = None) -> None:
    """Say where variants are timed, where the recipe asks for that: on the device, else here.

    Raises:
        ResvitError: IMPOSSIBLE where this machine is not the target, no device is named, and nothing was timed before.
    """
    from resvit_export.stages.decide.tune import not_measurable, place_here, place_there

    if run.recipe.tune is None:
        return
    target = run.require_target()
    if device is not None:
        run.place = place_there(device.address, target, run.reporter, rehearse=device.rehearse)
        return
    run.place = place_here(target)
    if run.place is None and next(run.folder.records("tune"), None) is None:
        raise not_measurable(target)


def _on_device(pipeline: Pipeline, device: Device) -> RunOnDevice:
    """The stage that builds, validates and times on the device, as it is found there."""
    from resvit_export.stages.bundle import signer_of
    from resvit_export.stages.device import KEY_FACTS, RunOnDevice, images_that_fit, look_at_device

    run, questions = pipeline.run, pipeline.questions
    bundle = pipeline.bundled.bundle
    machine = look_at_device(device.address, run.require_target(), device.rehearse, run.reporter, quiet=True)
    count = images_that_fit(pipeline.network.input_shape, len(questions.images), machine)
    if pipeline.network.inputs:
        run.reporter.warn(
            "The network reads more than images: the device builds, times and checks the golden outputs, and is "
            "not validated on the whole set."
        )
        count = 0
    known = machine.to_json()
    return RunOnDevice(
        address=device.address,
        device={name: known[name] for name in KEY_FACTS},
        rehearse=device.rehearse,
        bundle=bundle,
        signer=signer_of(run),
        questions=questions,
        count=count,
        original=pipeline.answered.get("reference") or pipeline.answered["baseline"],
        outputs=tuple(name for name, _ in pipeline.exported.report.outputs),
        max_drop=pipeline.recipe.max_drop,
        confidence=pipeline.variant.confidence,
        doubt=pipeline.doubt,
        audit=pipeline.audit_of(own=True),
    )
