"""What is refused: wishes that cannot be met, before any work, and what the gate rejected."""

from __future__ import annotations

from pathlib import Path

from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.layer_times import measured_times_from_json
from resvit_engines.targets.table import Precision, Target
from resvit_export.recipe.choices import Quantizer, Recovery
from resvit_export.recipe.recipe import Recipe
from resvit_export.records.verdict import VerdictRecord
from resvit_export.run import Run


def refuse_impossible(recipe: Recipe, target: Target | None) -> None:
    """Refuse what no stage can do; raises ``ResvitError``, before any work."""
    if recipe.checkpoint_key is not None and recipe.checkpoint is None:
        raise ResvitError(
            f"--checkpoint-key says {recipe.checkpoint_key}, and there is no checkpoint.",
            "Give --checkpoint, or leave --checkpoint-key out.",
        )
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


def recoverable(recipe: Recipe) -> bool:
    """Whether recovery can serve: for 8 bits by our own quantiser."""
    return recipe.quantizer is Quantizer.RESVIT and recipe.precision is not Precision.FP16


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
    """Refuse to measure sensitivity for FP16 and for ModelOpt's quantiser."""
    if recipe.precision is Precision.FP16:
        raise ResvitError("FP16 has no sensitivity: nothing is quantised.", "Say --precision int8 or fp8.")
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
            f"Try {_recovery_advice(recipe, recovers)}--effort best, more --calibration-images, --exclude for the "
            "layers that 'resvit-export sensitivity' names, or --precision fp16; --allow-rejected goes on "
            "all the same.",
            ExitCode.REJECTED,
        )


def _recovery_advice(recipe: Recipe, recovers: bool) -> str:
    if recovers:
        return "more --recover-epochs or --train-images, "
    if recoverable(recipe) and recipe.train_data is None:
        return "--train-data with training images, labels not needed (recovery then trains the weights), "
    return "--recover, " if recoverable(recipe) else ""
