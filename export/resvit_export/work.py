"""What each stage does: from the artefacts before it to the files in its own folder. The pipeline decides when."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.builder.builder import build_engine, builder_here
from resvit_engines.builder.device_plan import plan_for_device
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json, sha256_file
from resvit_engines.progress import Reporter
from resvit_engines.targets.table import Builder, Target
from resvit_export.recipe import Recipe
from resvit_export.to_tensorrt.copy import TENSORRT_COPY, onnx_for_tensorrt, suit_builder

if TYPE_CHECKING:
    from resvit_calibrate.answers.base import Task
    from resvit_calibrate.data.training_images import TrainingImages
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_export.loading.inputs import ShapeWish
    from resvit_export.loading.load import Network
    from resvit_quantize.settings import QuantizeSettings


def network_from_recipe(recipe: Recipe, reporter: Reporter) -> Network:
    """Load the user's network with its weights, as one exported program."""
    from resvit_export.loading.load import ModelSpec, load_network

    spec = ModelSpec(
        model=str(recipe.model),
        checkpoint=Path(recipe.checkpoint) if recipe.checkpoint else None,
        model_args=dict(recipe.model_args),
        input_shape=recipe.shape,
        inputs=tuple(wish.input for wish in recipe.shape_wishes),
    )
    with quiet_libraries():
        return load_network(spec, reporter)


def load_into(folder: Path, network: Network) -> None:
    """Write ``network.json``."""
    _write_json(folder / "network.json", network.facts())


def fold_into(folder: Path, network: Network) -> None:
    """Write ``folded.pt2``, ``fold.json`` and ``network.json``."""
    import torch

    from resvit_export.loading.torch_program import write_by_memory
    from resvit_quantize.fold.program import fold_program

    with quiet_libraries():
        program, report = fold_program(network.program)
        write_by_memory(folder / "folded.pt2", lambda out: torch.export.save(program, out))
    _write_json(folder / "fold.json", report.to_json())
    _write_json(folder / "network.json", network.facts())


def export_into(folder: Path, folded: Path, opset: int, batch: int | None) -> None:
    """Write ``model.onnx``, ``export.json`` and ``network.json`` from the fold stage's folder."""
    from resvit_export.loading.pt2 import program_from_pt2
    from resvit_export.to_onnx.export import onnx_from_program

    with quiet_libraries():
        program = program_from_pt2(folded / "folded.pt2")
        report = onnx_from_program(program, folder / "model.onnx", opset=opset, batch=batch)
    (folder / "network.json").write_bytes((folded / "network.json").read_bytes())
    _write_json(folder / "export.json", report.to_json())


def import_into(folder: Path, model: Path, target: Target | None, wishes: Sequence[ShapeWish]) -> None:
    """Write the same files from a user's ONNX; refuse an opset that the target's TensorRT does not read."""
    from resvit_export.to_onnx.own_onnx import import_onnx

    facts, report = import_onnx(model, folder / "model.onnx", wishes)
    if target and report.opset > target.opset:
        raise ResvitError(
            f"The model is of opset {report.opset}, and {target.software} reads up to opset {target.opset}.",
            f"Export it with opset {target.opset}, or choose a target with a newer TensorRT.",
            ExitCode.IMPOSSIBLE,
        )
    _write_json(folder / "network.json", facts)
    _write_json(folder / "export.json", report.to_json())


def calibrate_into(folder: Path, model: Path, images: ImageSet, batch_size: int, reporter: Reporter) -> None:
    """Write ``ranges.json``, ``statistics.npz`` and ``images.json`` from one pass over the images.

    What is doubtful about the images is said, and kept in ``images.json``.
    """
    from resvit_calibrate.ranges.collect import collect_statistics
    from resvit_calibrate.ranges.diagnostics import remarks_from_statistics, tell
    from resvit_calibrate.ranges.ranges import ranges_from, save_ranges
    from resvit_calibrate.ranges.statistics import save_statistics

    statistics = collect_statistics(model, images.batches(batch_size), reporter, len(images))
    save_statistics(statistics, folder / "statistics.npz")
    save_ranges(ranges_from(statistics, images.digest), folder / "ranges.json")
    remarks = remarks_from_statistics(statistics)
    tell(remarks, reporter)
    facts = {"description": images.description, "images": statistics.images, "digest": images.digest}
    doubts = [remark.to_json() for remark in remarks]
    _write_json(folder / "images.json", {**facts, "skipped": list(images.skipped), "remarks": doubts})


def recover_into(
    folder: Path,
    model: Path,
    ranges: Path,
    images: TrainingImages,
    state: Path,
    recipe: Recipe,
    reporter: Reporter,
) -> None:
    """Write ``recovered.onnx``, its ``clips.json`` and ``recover.json``.

    What a killed run needs to go on stays in ``state``.
    """
    from resvit_calibrate.ranges.ranges import load_ranges
    from resvit_calibrate.ranges.statistics import load_statistics
    from resvit_quantize.recovery.options import RecoverOptions
    from resvit_quantize.recovery.recover import recover_model

    options = RecoverOptions(epochs=recipe.recover_epochs, seed=recipe.seed)
    settings, out = quantize_settings(recipe), folder / "recovered.onnx"
    statistics = load_statistics(ranges.with_name("statistics.npz"))
    report = recover_model(
        model, load_ranges(ranges), settings, images, out, state, options, reporter, statistics=statistics
    )
    document = report.to_json()
    _write_json(folder / "clips.json", document.pop("clips"))
    _write_json(folder / "recover.json", document)


def quantize_settings(recipe: Recipe, precisions: Mapping[str, str] | None = None) -> QuantizeSettings:
    """The recipe's part on quantising, for our own quantiser; ``precisions`` by node are what the search chose."""
    from resvit_calibrate.ranges.estimators import Estimator
    from resvit_engines.targets.table import Precision
    from resvit_quantize.settings import Effort, Methods, QuantizeSettings

    at_output = recipe.calibrator == "output"
    return QuantizeSettings(
        precision=Precision(recipe.precision),
        estimator=Estimator.MSE if at_output else Estimator(recipe.calibrator),
        effort=Effort(recipe.effort),
        methods=Methods(output_ranges=at_output),
        include=recipe.include,
        exclude=recipe.exclude,
        precisions={node: Precision(name) for node, name in (precisions or {}).items()},
    )


def quantize_into(
    folder: Path,
    model: Path,
    ranges: Path,
    images: ImageSet,
    batch_size: int,
    recipe: Recipe,
    reporter: Reporter,
    precisions: Mapping[str, str],
    builder: Builder | None,
) -> None:
    """Write the quantised ``model.onnx``, in the form for ``builder``, and ``quantize.json``; by ours or ModelOpt."""
    from resvit_calibrate.ranges.ranges import load_ranges
    from resvit_calibrate.ranges.statistics import load_statistics
    from resvit_quantize.recovery.recover import pinned_ranges, settings_behind_recovery

    settings, known = quantize_settings(recipe, precisions), load_ranges(ranges)
    recovered = recipe.recover == "always"
    if recovered:
        settings = settings_behind_recovery(settings)
        known = pinned_ranges(known, json.loads(model.with_name("clips.json").read_bytes()))
    out = folder / "model.onnx"
    if recipe.quantizer == "modelopt":
        from resvit_quantize.modelopt.quantizer import quantize_with_modelopt

        report = quantize_with_modelopt(model, images.batches(batch_size), settings, out, reporter)
    else:
        from resvit_quantize.quantize import quantize_model

        statistics = None if recovered else load_statistics(ranges.with_name("statistics.npz"))
        report = quantize_model(
            model,
            known,
            settings,
            out,
            reporter,
            statistics=statistics,
            images=lambda count: images.first(count, batch_size),
        )
    suit_builder(out, builder)
    _write_json(folder / "quantize.json", report.to_json())


def half_into(folder: Path, model: Path, ranges: Path, target: Target | None) -> None:
    """Write a float network in FP16 to ``model.onnx``, by the way that ``--precision fp16`` goes."""
    from resvit_calibrate.ranges.ranges import load_ranges
    from resvit_calibrate.ranges.statistics import load_statistics
    from resvit_engines.targets.table import Precision
    from resvit_quantize.quantize import quantize_model
    from resvit_quantize.settings import QuantizeSettings

    out = folder / "model.onnx"
    quantize_model(
        model,
        load_ranges(ranges),
        QuantizeSettings(Precision.FP16),
        out,
        statistics=load_statistics(ranges.with_name("statistics.npz")),
    )
    suit_builder(out, builder_here(target) if target else None)


def reference_into(
    folder: Path,
    task: Task,
    network: Network,
    pruned: Path | None,
    images: ImageSet,
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Write what PyTorch predicts, and the pruned program where there is one."""
    task.answers(network.runner(), images, batch_size, reporter, "validate (PyTorch)").save(folder / "pytorch.npz")
    if pruned is not None:
        from resvit_export.loading.pt2 import program_from_pt2
        from resvit_export.loading.torch_program import runner_from_program

        runner = runner_from_program(program_from_pt2(pruned))
        task.answers(runner, images, batch_size, reporter, "validate (pruned)").save(folder / "pruned.npz")


def baseline_into(folder: Path, task: Task, model: Path, images: ImageSet, batch_size: int, reporter: Reporter) -> None:
    """Write what the float ONNX predicts."""
    from resvit_calibrate.runtime.runner import onnx_runner

    task.answers(onnx_runner(model), images, batch_size, reporter, "validate (ONNX float)").save(folder / "onnx.npz")


def compile_into(
    folder: Path,
    model: Path,
    export: Mapping[str, Any],
    target: Target,
    builder: Builder | None,
    settings: BuildSettings,
    bundle: str,
    reporter: Reporter,
) -> None:
    """Write ``engine.plan`` and ``engine.json`` where there is a builder, else ``plan.json``.

    ``export`` is what the export stage says of the graph.
    """
    if onnx_for_tensorrt(model, folder / TENSORRT_COPY, target, settings.plugins):
        model = folder / TENSORRT_COPY
    if builder is not None:
        report = build_engine(model, folder / "engine.plan", target, settings, reporter, folder / "build.log")
        _write_json(folder / "engine.json", report.to_json())
        return
    image = export["input"]
    beside = {item["name"]: item["shape"] for item in export.get("inputs", ()) if item["name"] != image["name"]}
    plan = plan_for_device(
        target,
        settings,
        tuple(image["shape"][1:]),
        dynamic_batch=not isinstance(image["shape"][0], int),
        bundle=bundle,
        onnx=model.name,
        onnx_sha256=sha256_file(model),
        input_name=image["name"],
        beside=beside,
    )
    _write_json(folder / "plan.json", plan.to_json())


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_bytes(pretty_json(document))


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the exporter's own warnings and log lines off the terminal: ours say what matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
