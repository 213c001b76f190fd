"""The stages ``prune`` and ``retrain``: a smaller network that loads, exports and quantises as any other.

A pruned checkpoint is one file of plain values: the state dict under ``state_dict`` and, under ``resvit_structure``,
the shapes that the original architecture takes on for it. ``load_checkpoint`` reads both, and needs no pruning library.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, pretty_json, sha256_bytes
from resvit_engines.progress import Reporter
from resvit_engines.targets.layer_times import measured_times_from_json
from resvit_engines.targets.table import Precision, Target
from resvit_export.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from resvit_calibrate.data.training_images import TrainingImages
    from resvit_calibrate.images.image_set import Batch
    from resvit_export.loading.load import Network
    from resvit_quantize.pruning.choose.budget import Budget
    from resvit_quantize.pruning.choose.choice import Choice
    from resvit_quantize.pruning.groups import Group
    from resvit_quantize.pruning.structure import Structure

IMPORTANCE_IMAGES = 512
"""What importance is told by, at most."""
SPARSE_BATCHES = 4
"""Batches of 32 that tell which weights 2:4 sparsity leaves."""
CURVE_MACS = 60e9
"""Multiply-accumulates that the picture of sensitivity may cost: half a minute on two cores."""
CURVE_IMAGES = 128
CURVE_SHARES = (0.75, 0.5, 0.25)


class Batches(Protocol):
    """Images that come in batches."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Stream all of them in order."""
        ...


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


def prune_into(
    folder: Path, network: Network, images: Batches | None, recipe: Recipe, target: Target | None, reporter: Reporter
) -> None:
    """Write ``pruned.pt``, ``pruned.pt2``, ``prune.json`` and, for 2:4 sparsity, ``masks.pt``.

    ``images``, labelled or not, tell what is important; without any, magnitude does.
    """
    import torch

    from resvit_export.loading.checkpoint import structure_in
    from resvit_export.loading.torch_program import write_by_memory
    from resvit_quantize.pruning.apply import prune
    from resvit_quantize.pruning.choose.choice import choose_widths
    from resvit_quantize.pruning.choose.importance import Importance, importance_of
    from resvit_quantize.pruning.choose.recorder import costs_from_module
    from resvit_quantize.pruning.find.discover import groups_from_module
    from resvit_quantize.pruning.groups import Kind
    from resvit_quantize.pruning.structure import Structure

    assert network.module is not None
    module, example = copy.deepcopy(network.module).eval(), torch.zeros(2, *network.input_shape)
    document: dict[str, Any] = {"importance": recipe.prune_importance, "notes": []}
    structure = (structure_in(Path(recipe.checkpoint)) if recipe.checkpoint else None) or Structure()
    batches = [] if images is None else list(itertools.islice(_tensors(images), IMPORTANCE_IMAGES // 32))
    share = next((share for share in recipe.prune_budgets.values() if share is not None), None)
    if share is not None:
        found = groups_from_module(module, example, frozenset(Kind(kind) for kind in recipe.prune_what))
        for path, reason in found.left_alone.items():
            reporter.say(f"left alone: {path}: {reason}")
        if not found.groups:
            raise ResvitError(
                "Nothing in this network can be pruned: "
                + "; ".join(f"{path}: {reason}" for path, reason in list(found.left_alone.items())[:3]),
                "Leave the --prune options out, or allow more kinds with --prune-what.",
                ExitCode.IMPOSSIBLE,
            )
        costs = costs_from_module(module, example[:1], found.groups)
        method = Importance(recipe.prune_importance)
        if not batches and method is not Importance.MAGNITUDE:
            method = Importance.MAGNITUDE
            document["notes"].append("no images were given: importance is told by magnitude")
        importance = importance_of(module, found.groups, method, batches, images=IMPORTANCE_IMAGES, seed=recipe.seed)
        choice = choose_widths(found.groups, importance, costs, _budget(recipe, target))
        curves = _curves(module, found.groups, importance, batches, costs.macs({}), reporter)
        structure = prune(module, found.groups, choice.kept, structure)
        document |= {
            "importance": method.value,
            "left_alone": dict(found.left_alone),
            "curves": curves,
            **_choice_to_json(choice, found.groups, share),
        }
        document["notes"] += choice.notes
        reporter.say(prune_summary(document))
    if recipe.sparsity is not None:
        masks, document["sparsity"] = _sparsified(module, batches, example[:1], reporter)
        write_by_memory(folder / "masks.pt", lambda out: torch.save(masks, out))
    if recipe.train_data is None:
        reporter.warn("Nothing is trained behind pruning: there is no --train-data, and the gate decides as it is.")
    write_network(folder, "pruned", module, structure, network.input_shape)
    (folder / "prune.json").write_bytes(pretty_json(document))


def retrain_into(
    folder: Path,
    network: Network,
    pruned: Network,
    weights: Path,
    images: TrainingImages,
    state: Path,
    recipe: Recipe,
    reporter: Reporter,
) -> None:
    """Write ``retrained.pt``, ``retrained.pt2`` and ``retrain.json``: ``pruned``, of file ``weights``, learns again."""
    import torch

    from resvit_export.loading.checkpoint import structure_in
    from resvit_quantize.pruning.distill.distill import distill
    from resvit_quantize.pruning.distill.options import DistillOptions
    from resvit_quantize.pruning.structure import Structure

    assert network.module is not None
    assert pruned.module is not None
    options = DistillOptions(epochs=recipe.prune_epochs, seed=recipe.seed)
    masks = weights.with_name("masks.pt")
    kept = torch.load(masks, weights_only=True) if masks.exists() else {}
    facts = {
        "teacher": network.digest,
        "student": pruned.digest,
        "images": images.digest,
        "count": len(images),
        "options": {key: str(value) for key, value in dataclasses.asdict(options).items()},
        "masks": sorted(kept),
    }
    key = sha256_bytes(canonical_json(facts))
    student = copy.deepcopy(pruned.module)
    report = distill(student, network.module, images, options, state, key, reporter, masks=kept)
    write_network(folder, "retrained", student, structure_in(weights) or Structure(), network.input_shape)
    (folder / "retrain.json").write_bytes(pretty_json(report.to_json()))


def write_network(
    folder: Path, name: str, module: nn.Module, structure: Structure, shape: tuple[int, int, int]
) -> None:
    """Write ``NAME.pt``, weights and structure, and ``NAME.pt2``, a program that needs neither code nor structure."""
    import torch

    from resvit_export.loading.checkpoint import STRUCTURE
    from resvit_export.loading.torch_program import program_from_module, write_by_memory

    module = module.cpu().eval()
    program, _ = program_from_module(module, shape)
    weights = {key: value.detach().clone() for key, value in module.state_dict().items()}
    content = {"state_dict": weights, STRUCTURE: structure.to_json()}
    write_by_memory(folder / f"{name}.pt", lambda out: torch.save(content, out))
    write_by_memory(folder / f"{name}.pt2", lambda out: torch.export.save(program, out))


def _budget(recipe: Recipe, target: Target | None) -> Budget:
    from resvit_quantize.pruning.choose.budget import Budget

    return Budget(
        macs=recipe.prune_macs,
        latency=recipe.prune_latency,
        params=recipe.prune_params,
        precision=Precision(recipe.precision),
        target=target,
        measured=measured_times_from_json(Path(recipe.measured_times)) if recipe.measured_times else None,
    )


def _tensors(images: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    import torch

    for batch in images.batches(32):
        labels = None if batch.labels is None else torch.from_numpy(batch.labels)
        yield torch.from_numpy(batch.images), labels


def _sparsified(
    module: nn.Module,
    batches: list[tuple[torch.Tensor, torch.Tensor | None]],
    example: torch.Tensor,
    reporter: Reporter,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from resvit_quantize.pruning.sparsity.report import SparseMethod
    from resvit_quantize.pruning.sparsity.sparsity import sparsify

    method = SparseMethod.SPARSEGPT if batches else SparseMethod.MAGNITUDE
    pictures = [images for images, _ in batches[:SPARSE_BATCHES]] or [example]
    report = sparsify(module, method, pictures, reporter)
    reporter.say(f"2:4 sparsity: {report.share:.1%} of the weights of linear and convolutional layers")
    return report.masks, {"method": method.value, **report.to_json()}


def _choice_to_json(choice: Choice, groups: tuple[Group, ...], share: float) -> dict[str, Any]:
    width = {group.name: group.width for group in groups}
    return {
        "share": share,
        "before": dataclasses.asdict(choice.before),
        "after": dataclasses.asdict(choice.after),
        "widths": [
            {**dataclasses.asdict(item), "kind": item.kind.value, "channels": width[item.group]}
            for item in choice.widths
        ],
    }


def prune_summary(document: Mapping[str, Any]) -> str:
    """What ``prune.json`` says remains, in a sentence."""
    before, after = document["before"], document["after"]
    parts = [
        f"{after['macs'] / before['macs']:.1%} of the multiply-accumulates",
        f"{after['params'] / before['params']:.1%} of the weights",
    ]
    if before["latency_us"]:
        parts.append(f"{after['latency_us'] / before['latency_us']:.1%} of the predicted latency")
    return f"pruned to {', '.join(parts)}"


def _curves(
    module: nn.Module,
    groups: tuple[Group, ...],
    importance: Mapping[str, Any],
    batches: list[tuple[torch.Tensor, torch.Tensor | None]],
    macs: float,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Each group alone at falling widths: the share of images that keep their answer, or whose outputs stay near.

    As many images, and then shares, as the budget of time allows; empty without images.
    """
    import numpy as np
    import torch

    from resvit_quantize.pruning.apply import prune

    shares: tuple[float, ...] = CURVE_SHARES
    count = int(CURVE_MACS / max(macs, 1.0) / max(len(groups) * len(shares), 1))
    if count < 8:
        shares, count = (0.5,), count * len(shares)
    if not batches or count < 4:
        return []
    pictures = torch.cat([pictures for pictures, _ in batches])[: min(count, CURVE_IMAGES)]
    with torch.no_grad():
        exact = _answers(module, pictures)
        found = []
        for group in reporter.track(groups, "prune: sensitivity", len(groups)):
            order = np.argsort(-importance[group.name], kind="stable")
            points = [(1.0, 1.0)]
            for share in shares if group.units > 1 else (0.0,):
                units = max(round(share * group.units), 1 if group.units > 1 else 0)
                trial = copy.deepcopy(module)
                prune(trial, groups, {group.name: np.sort(order[:units])})
                points.append((units / group.units, _alike(exact, _answers(trial, pictures))))
            found.append({"group": group.name, "kind": group.kind.value, "points": points, "images": len(pictures)})
    return found


def _answers(module: nn.Module, pictures: torch.Tensor) -> list[torch.Tensor]:
    import torch

    from resvit_quantize.pruning.losses import answers

    pieces = [answers(module, part) for part in torch.split(pictures, 32)]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def _alike(exact: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The share of equal answers for a classifier; else one less the relative squared error, at least zero."""
    from resvit_quantize.pruning.losses import is_classifier

    if is_classifier(exact):
        return float((exact[0].argmax(1) == other[0].argmax(1)).double().mean())
    error = sum(
        float((a - b).double().square().sum() / a.double().square().sum().clamp_min(1e-30))
        for a, b in zip(exact, other, strict=True)
    )
    return max(0.0, 1.0 - error / len(exact))
