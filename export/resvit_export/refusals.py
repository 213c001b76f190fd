"""What is refused: wishes that cannot be met, before any work, and what the gate rejected."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.layer_times import measured_times_from_json
from resvit_engines.targets.speed_verdict import Evidence, SpeedKind, SpeedVerdict
from resvit_engines.targets.table import Precision, Target
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.recipe.choices import InputType, Plugins, Quantizer, Recovery
from resvit_export.recipe.recipe import Recipe
from resvit_export.records.verdict import VerdictRecord
from resvit_export.run import MOST_IMAGES, RECOVERY_IMAGES, Run
from resvit_export.stages.export import Exported, batch_of, require_batch
from resvit_quantize.settings import Effort

if TYPE_CHECKING:
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_export.loading.load import Network

_STILL_WRITTEN = 3
"""Bytes for each byte of the float ONNX: the quantised one, its engine or plan, and the bundle of both."""


def refuse_impossible(recipe: Recipe, target: Target | None) -> None:
    """Refuse what no stage can do; raises ``ResvitError``, before any work."""
    if recipe.checkpoint_key is not None and recipe.checkpoint is None:
        raise ResvitError(
            f"--checkpoint-key says {recipe.checkpoint_key}, and there is no checkpoint.",
            "Give --checkpoint, or leave --checkpoint-key out.",
        )
    require_sizes(recipe)
    require_input_type(recipe)
    if recipe.tune is not None and not quantises_itself(recipe):
        raise ResvitError(
            "--tune chooses which layers our own quantiser puts into 8 bits, and there are none for --precision "
            f"{recipe.precision} by {recipe.quantizer}.",
            "Leave --tune out, or ask for --precision int8 or fp8 and --quantizer resvit.",
            ExitCode.IMPOSSIBLE,
        )
    if target is not None and target.on_cpu:
        require_for_cpu(recipe, target)
    require_searchable(recipe, target)
    require_prunable(recipe, target)
    if recipe.recover is Recovery.ALWAYS and not recoverable(recipe):
        raise ResvitError(
            f"Recovery trains for our own INT8 and FP8, not for {recipe.precision} by {recipe.quantizer}.",
            "Leave --recover out, or ask for --precision int8 or fp8 and --quantizer resvit.",
            ExitCode.IMPOSSIBLE,
        )
    if recipe.recover is Recovery.ALWAYS and recipe.train_data is None:
        raise ResvitError(
            "Recovery was asked for, and there are no images to train on.",
            "Say --train-data with a folder of images, an .npz, fashion-mnist, or package.module:factory.",
        )


def require_input_type(recipe: Recipe) -> None:
    """Refuse an INT8 image for a network whose layers do not read INT8; raises ``ResvitError`` (IMPOSSIBLE)."""
    if recipe.input_type is InputType.INT8 and recipe.precision is not Precision.INT8:
        raise ResvitError(
            f"--input-type int8 is what the first layer's quantiser writes, and --precision {recipe.precision} has no "
            "INT8 one.",
            "Say --input-type fp16 or uint8, or --precision int8.",
            ExitCode.IMPOSSIBLE,
        )


def pixels_of(recipe: Recipe, images: Callable[[], tuple[ImageSet, ImageSet]]) -> Preprocess | None:
    """How pixels become the image, which only pictures of our own preparing tell; asked for uint8 alone.

    Raises:
        ResvitError: IMPOSSIBLE where uint8 is asked for, and a loader of the user's prepares the images.
    """
    if recipe.input_type is not InputType.UINT8:
        return None
    calibration, validation = images()
    if calibration.prepared or validation.prepared:
        raise ResvitError(
            "The image cannot enter as uint8: a loader of your own prepares it, and only that knows its pixels.",
            "Say --input-type fp16, or int8 where the first layer is quantised.",
            ExitCode.IMPOSSIBLE,
        )
    return validation.preprocess


def require_for_cpu(recipe: Recipe, target: Target) -> None:
    """Refuse what rests on TensorRT's rules, or on times that nobody can predict of a processor.

    Raises:
        ResvitError: IMPOSSIBLE, naming the option.
    """
    asked = {
        "--latency-budget": (recipe.latency_budget is not None, "no time of a processor is predicted"),
        "--prune-latency": (recipe.prune_latency is not None, "no time of a processor is predicted"),
        "--measured-times": (recipe.measured_times is not None, "they are for predictions, and there are none of it"),
        "--sparsity": (recipe.sparsity is not None, "ONNX Runtime has no kernels for 2:4 sparse weights"),
        "--quantizer modelopt": (recipe.quantizer is Quantizer.MODELOPT, "it places Q/DQ for TensorRT"),
        "--recover": (recipe.recover is Recovery.ALWAYS, "it trains for TensorRT's grids"),
        "--input-type": (recipe.input_type is not InputType.FP32, "its engine reads FP32"),
        "--require-fused": (recipe.require_fused, "its rules are TensorRT's"),
    }
    for option, (given, why) in asked.items():
        if given:
            raise ResvitError(
                f"{option} is not for {target.title}: {why}.", "Leave it out for this target.", ExitCode.IMPOSSIBLE
            )


def require_sizes(recipe: Recipe) -> None:
    """Refuse what works for one image size alone, where a range of sizes is asked for.

    Raises:
        ResvitError: IMPOSSIBLE, naming the option.
    """
    if recipe.sizes is None:
        return
    shares = [f"--prune-{name}" for name, share in recipe.prune_budgets.items() if share is not None]
    asked = {
        **dict.fromkeys(shares, True),
        "--sparsity": recipe.sparsity is not None,
        "--recover": recipe.recover is Recovery.ALWAYS,
        "--latency-budget": recipe.latency_budget is not None,
        "--effort best": recipe.effort is Effort.BEST,
        "--tune": recipe.tune is not None,
        "--quantizer modelopt": recipe.quantizer is Quantizer.MODELOPT,
        "--plugins on": recipe.plugins is Plugins.ON,
        "--shape of several inputs": len(recipe.shapes) > 1 or (bool(recipe.shapes) and recipe.input_shape is not None),
        "--data of ready arrays": _gives_prepared(recipe.data),
        "--validation-data of ready arrays": _gives_prepared(recipe.validation_data),
    }
    if wrong := [option for option, given in asked.items() if given]:
        shape = "x".join(map(str, recipe.shape or ("C", *recipe.sizes.usual)))
        raise ResvitError(
            f"{wrong[0]} works for one image size, and a range was asked for: {recipe.sizes}.",
            f"Leave it out, or name one size, as in --input-shape {shape}.",
            ExitCode.IMPOSSIBLE,
        )


def _gives_prepared(data: str | None) -> bool:
    """Whether a function of the user's gives the network's input; of what is in memory nobody knows here."""
    from resvit_calibrate.data.naming import OBJECT
    from resvit_calibrate.data.sources import gives_prepared

    return data is not None and not data.startswith(OBJECT) and gives_prepared(data)


def require_ready(
    run: Run, network: NetworkRecord, exported: Exported, images: tuple[ImageSet, ImageSet] | None
) -> None:
    """Refuse what would end the run behind its first long stage, calibrating or pruning; takes seconds.

    What is known by then is the float ONNX, whose operators, batch and parity were checked. Here come the disk, the
    patterns, the training images, and whether its answers on two validation images are what the task can judge.
    Without ``images`` nothing that needs any is asked.

    Raises:
        ResvitError: as the stage that would have come upon it; SYSTEM where the disk has no room.
    """
    from resvit_calibrate.runtime.runner import onnx_runner
    from resvit_quantize.graph.network import MOST_ALONE, too_large
    from resvit_quantize.placement.placement import require_patterns

    recipe, model = run.recipe, exported.model.path
    float_bytes = sum(file.bytes for file in exported.record.outputs.values())
    _require_room(run.folder.path, float_bytes)
    least = float_bytes // {Precision.FP32: 1, Precision.FP16: 2}.get(recipe.precision, 4)
    if least > MOST_ALONE and not recipe.prunes:
        raise too_large(least)
    if recipe.quantizer is Quantizer.MODELOPT:
        require_modelopt(recipe)
    if not recipe.prunes:  # pruned layers are others
        require_patterns(model, run.quantize_settings({}))
    if recipe.input_type is InputType.INT8 and recipe.quantizer is Quantizer.RESVIT and not recipe.prunes:
        _require_int8_image(model, run)
    if images is None:
        return
    pixels_of(recipe, lambda: images)
    task = run.task(network, exported.report.to_json()["outputs"])
    task.task().require_answers(onnx_runner(model), images[1])
    if recipe.retrains:
        run.training_images(network, MOST_IMAGES)
    elif recipe.recover is Recovery.ALWAYS:
        run.training_images(network, RECOVERY_IMAGES)


def require_answerable(run: Run, loaded: Network) -> None:
    """Refuse what a network in PyTorch and its first images tell, before it is folded: seconds after the start.

    That are its batch, its input beside the images', its outputs against the task, the classes against the labels, and
    whether the task can judge what it answers on two validation images.

    Raises:
        ResvitError: as the stage that would have come upon it.
    """
    network = loaded.record()
    require_batch(network, batch_of(run.recipe))
    if run.recipe.data is None:
        return
    pixels_of(run.recipe, lambda: run.image_sets(network))
    task = run.task(network, network.outputs)
    task.task().require_answers(loaded.runner(), run.image_sets(network)[1])


def _require_int8_image(model: Path, run: Run) -> None:
    """Refuse an INT8 image where the layer that reads it stays in FP16, as cheap ones do unless asked for."""
    from resvit_quantize.graph.analysed import graph_from_onnx
    from resvit_quantize.qdq.plan import image_readers_in_half

    halves = image_readers_in_half(graph_from_onnx(model).analysis, run.quantize_settings({}))
    if halves:
        raise ResvitError(
            f"The image cannot enter in INT8: {halves[0]}, which reads it, stays in FP16.",
            f"Say --input-type uint8 or fp16, or --include '{halves[0]}' as well.",
            ExitCode.IMPOSSIBLE,
        )


def _require_room(folder: Path, float_bytes: int) -> None:
    """Refuse a disk on which what follows the float ONNX will not fit."""
    free, needed = shutil.disk_usage(folder).free, _STILL_WRITTEN * float_bytes
    if free < needed:
        raise ResvitError(
            f"The disk is full before the work is done: {folder} has {free >> 20:,} MiB left, and quantised model, "
            f"engine and bundle take about {-(-needed >> 20):,} MiB.",
            "Free some space, or name a folder on another disk with --run; finished stages are kept.",
            ExitCode.SYSTEM,
        )


def quantises_itself(recipe: Recipe) -> bool:
    """Whether our own quantiser puts 8 bits into the graph: what is known of its placement holds."""
    return recipe.quantizer is Quantizer.RESVIT and recipe.precision.quantises


def asks_for_speed(recipe: Recipe) -> bool:
    """Whether a build that is known to be no faster than FP16 is a failure: 8 bits have no other use.

    Where placements are timed, an engine in floats is a result like others.
    """
    return recipe.precision.quantises and not recipe.even_if_slower and recipe.tune is None


def require_gain(speed: SpeedVerdict, recipe: Recipe) -> None:
    """Refuse 8 bits that gain nothing on the target, where that is known by evidence and the recipe does not insist.

    A latency budget is left to its search, which may find layers that gain.

    Raises:
        ResvitError: NOT_FASTER, with what to do instead.
    """
    if speed.kind is not SpeedKind.NOT_FASTER or speed.evidence is Evidence.SAME:
        return
    if not asks_for_speed(recipe) or recipe.latency_budget is not None:
        return
    raise ResvitError(
        f"{speed.headline}.",
        "Build with --precision fp16, or for more images at a time (--batch 8), or a larger network; "
        "--even-if-slower goes on all the same.",
        ExitCode.NOT_FASTER,
    )


def recoverable(recipe: Recipe) -> bool:
    """Whether recovery and search can serve: for 8 bits by our own quantiser, of one image size."""
    return recipe.sizes is None and quantises_itself(recipe)


def require_modelopt(recipe: Recipe) -> None:
    """Refuse ModelOpt's quantiser where it is not installed, and what it cannot be told."""
    if recipe.include:
        raise ResvitError(
            "ModelOpt's quantiser cannot be told to include single nodes.",
            "Drop --include, or use --quantizer resvit.",
            ExitCode.IMPOSSIBLE,
        )
    if importlib.util.find_spec("modelopt") is None:
        raise ResvitError(
            "ModelOpt is not installed.",
            "pip install 'resvit-export[modelopt]', or use --quantizer resvit.",
            ExitCode.MISSING,
        )


def require_prunable(recipe: Recipe, target: Target | None) -> None:
    """Refuse at once what no pruning can do: a graph without modules, a latency without a device.

    Raises ``ResvitError``.
    """
    from resvit_quantize.pruning.sparsity.sparsity import require_sparsity

    if not recipe.prunes:
        return
    if str(recipe.model).endswith((".onnx", ".pt2")):
        raise ResvitError(
            "Pruning takes channels out of PyTorch modules, and a .onnx or .pt2 file has only their graph.",
            "Name the model that it was exported from (timm:NAME, package.module:factory), with its --checkpoint.",
            ExitCode.IMPOSSIBLE,
        )
    if recipe.prune_latency is not None and target is None:
        raise ResvitError("A share of the latency needs a device.", "Say --target; 'resvit-export targets' lists them.")
    if recipe.sparsity is not None and target is not None:
        require_sparsity(target)


def require_searchable(recipe: Recipe, target: Target | None) -> None:
    """Refuse a latency budget that nothing can search for, and read what the recipe names.

    Raises:
        ResvitError: IMPOSSIBLE for a budget with FP16 or ModelOpt's quantiser; INPUT for one that does not read, and
            for measured times that do not.
    """
    if recipe.measured_times is not None:
        measured_times_from_json(Path(recipe.measured_times))
    if recipe.latency_budget is None:
        return
    from resvit_quantize.search.search import latency_budget_from

    latency_budget_from(recipe.latency_budget)
    if not recoverable(recipe):
        raise ResvitError(
            "A latency budget chooses among 8-bit layers of our own quantiser, which this recipe does not use.",
            "Leave --latency-budget out, or say --precision int8 or fp8 and --quantizer resvit.",
            ExitCode.IMPOSSIBLE,
        )
    if target is None:
        raise ResvitError("A latency budget needs a device.", "Say --target; 'resvit-export targets' lists them.")


def require_budget(recipe: Recipe) -> None:
    """Refuse to prune without a word on how far."""
    if not recipe.prunes:
        raise ResvitError(
            "Nothing says how far to prune.",
            "Say --prune-macs, --prune-latency or --prune-params with the share that may remain, such as 0.5, "
            "or --sparsity 2:4.",
        )


def require_torch(recipe: Recipe) -> None:
    """Refuse to fold a user's ONNX."""
    if str(recipe.model).endswith(".onnx"):
        raise ResvitError(
            "An ONNX model has no fold stage: its graph is taken as it is.",
            "Start with 'export', or run 'build', which begins there by itself.",
        )


def require_fusing(run: Run) -> None:
    """Refuse to fuse where no kernel of ours goes into the graph, and say why."""
    if not run.fuses:
        run.require_target()
        raise ResvitError(
            f"No kernel of our own goes into this graph: {run.plugins.reason}.",
            "Say --plugins on, for a target whose engine TensorRT builds (resvit-export targets).",
            ExitCode.IMPOSSIBLE,
        )


def require_own_quantizer(recipe: Recipe) -> None:
    """Refuse to measure sensitivity for FP16, for ModelOpt's quantiser and for several image sizes."""
    if recipe.sizes is not None:
        raise ResvitError(
            f"Sensitivity is measured at one image size, and a range was asked for: {recipe.sizes}.",
            "Name one size with --input-shape; what it finds can be given to --exclude for the range.",
            ExitCode.IMPOSSIBLE,
        )
    if not recipe.precision.quantises:
        name = recipe.precision.value.upper()
        raise ResvitError(f"{name} has no sensitivity: nothing is quantised.", "Say --precision int8 or fp8.")
    if recipe.quantizer is not Quantizer.RESVIT:
        raise ResvitError(
            "Sensitivity follows this tool's own placement and ranges, not ModelOpt's.",
            "Say --quantizer resvit.",
            ExitCode.IMPOSSIBLE,
        )


def require_accepted(verdict: VerdictRecord, recipe: Recipe, *, recovers: bool) -> None:
    """Refuse to go on with a rejected model, unless the recipe allows it."""
    if verdict.kind is VerdictKind.REJECTED and not recipe.allow_rejected:
        raise ResvitError(
            f"Validation rejected the model: {verdict.reason}",
            f"Try {_advice(recipe, recovers)}, or --precision fp16; --allow-rejected goes on all the same.",
            ExitCode.REJECTED,
        )


def _advice(recipe: Recipe, recovers: bool) -> str:
    """What may bring a rejected model nearer to the float one."""
    if recipe.sizes is not None:
        return "more --calibration-images, one size in place of a range (which can be searched and trained further)"
    recovery = _recovery_advice(recipe, recovers)
    layers = "--exclude for the layers that 'resvit-export sensitivity' names"
    return f"{recovery}--effort best, more --calibration-images, {layers}"


def _recovery_advice(recipe: Recipe, recovers: bool) -> str:
    if recovers:
        return "more --recover-epochs or --train-images, "
    if recoverable(recipe) and recipe.train_data is None:
        return "--train-data with training images, labels not needed (recovery then trains the weights), "
    return "--recover, " if recoverable(recipe) else ""
