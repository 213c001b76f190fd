"""The stage ``prune``: a smaller network that loads, exports and quantises as any other.

A pruned checkpoint is one file of plain values: the state dict under ``state_dict`` and, under ``resvit_structure``,
the shapes that the original architecture takes on for it. ``load_checkpoint`` reads both, and needs no pruning library.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.targets.layer_times import measured_times_from_json
from resvit_engines.targets.table import Precision, Target
from resvit_export.loading.source import NetworkSource
from resvit_export.recipe.recipe import Recipe
from resvit_export.records.prune import GroupCurve, GroupWidth, PruneRecord, SparsityRecord, WidthsRecord
from resvit_export.stage import Artifact, File, Stage
from resvit_quantize.pruning.choose.importance import Importance
from resvit_quantize.pruning.groups import Kind

if TYPE_CHECKING:
    import torch
    from torch import nn

    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_quantize.pruning.choose.budget import Budget
    from resvit_quantize.pruning.groups import Group

REPORT = "prune.json"
IMPORTANCE_IMAGES = 512
"""What importance is told by, at most."""
SPARSE_BATCHES = 4
"""Batches of 32 that tell which weights 2:4 sparsity leaves."""
CURVE_MACS = 60e9
"""Multiply-accumulates that the picture of sensitivity may cost: half a minute on two cores."""
CURVE_IMAGES = 128
CURVE_SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class PruneBudget:
    """The share that may remain, of one of three costs; what may go, and by which importance.

    ``target`` and ``measured``, its layer times, say what a latency is.
    """

    macs: float | None
    latency: float | None
    params: float | None
    what: tuple[Kind, ...]
    importance: Importance
    precision: Precision
    target: Target | None = None
    measured: File | None = None

    @property
    def share(self) -> float:
        """The one that is set."""
        return next(share for share in (self.macs, self.latency, self.params) if share is not None)

    def of_choice(self) -> Budget:
        """As the choice of widths takes it."""
        from resvit_quantize.pruning.choose.budget import Budget

        return Budget(
            macs=self.macs,
            latency=self.latency,
            params=self.params,
            precision=self.precision,
            target=self.target,
            measured=measured_times_from_json(self.measured.path) if self.measured else None,
            allowed=frozenset(self.what),
        )


def budget_of(recipe: Recipe, target: Target | None) -> PruneBudget | None:
    """The recipe's budget; ``None`` where weights become sparse alone."""
    if all(share is None for share in recipe.prune_budgets.values()):
        return None
    return PruneBudget(
        macs=recipe.prune_macs,
        latency=recipe.prune_latency,
        params=recipe.prune_params,
        what=tuple(sorted(recipe.prune_what)),
        importance=recipe.prune_importance,
        precision=recipe.precision,
        target=target if recipe.prune_latency is not None else None,
        measured=File.of(Path(recipe.measured_times)) if recipe.measured_times else None,
    )


@dataclass(frozen=True)
class Pruned(Artifact):
    """``pruned.pt``, ``pruned.pt2``, ``prune.json`` and, for 2:4 sparsity, ``masks.pt``."""

    @property
    def weights(self) -> File:
        """State dict and structure, as a checkpoint."""
        return self.file("pruned.pt")

    @property
    def program(self) -> File:
        """The pruned network as a program of its own."""
        return self.file("pruned.pt2")

    @functools.cached_property
    def report(self) -> PruneRecord:
        """What was taken out."""
        return self.read(REPORT, PruneRecord.from_json)

    @property
    def masks(self) -> File | None:
        """Which weights 2:4 sparsity keeps."""
        return self.file("masks.pt") if self.has("masks.pt") else None


@dataclass(frozen=True)
class Prune(Stage[Pruned]):
    """Take out of the network what matters least, down to a budget, to sparse weights, or both.

    ``images``, labelled or not, tell what is important; without any, magnitude does. ``trained`` says whether anything
    is trained behind it. ``code`` is a digest of the network's code, of which no program holds all.
    """

    name: ClassVar[str] = "prune"
    artifact: ClassVar[type[Artifact]] = Pruned

    source: NetworkSource
    budget: PruneBudget | None
    sparse: bool
    images: ImageSet | None
    preprocess: Preprocess | None
    seed: int
    trained: bool
    code: str

    def libraries(self) -> tuple[str, ...]:
        """What traces the network, and what chooses sparse weights."""
        return ("torch", "timm", "torch-pruning", *(("nvidia-modelopt",) if self.sparse else ()))

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the pruned network, what was taken out, and the masks."""
        prune_into(folder, self, reporter)


def prune_into(folder: Path, stage: Prune, reporter: Reporter) -> None:
    """The work of ``Prune``."""
    import torch

    from resvit_export.loading.checkpoint import structure_in, write_network
    from resvit_export.loading.program.run import write_by_memory
    from resvit_quantize.pruning.apply import prune
    from resvit_quantize.pruning.choose.choice import choose_widths
    from resvit_quantize.pruning.choose.importance import importance_of
    from resvit_quantize.pruning.choose.recorder import costs_from_module
    from resvit_quantize.pruning.copies import copy_of
    from resvit_quantize.pruning.find.discover import groups_from_module
    from resvit_quantize.pruning.structure import Structure

    network = stage.source.network(reporter)
    assert network.module is not None
    budget, batches = stage.budget, _tensors_of(stage.images)
    module, example = copy_of(network.module).eval(), torch.zeros(2, *network.input_shape)
    method = budget.importance if budget else Importance.MAGNITUDE
    notes: list[str] = []
    widths: WidthsRecord | None = None
    sparsity: SparsityRecord | None = None
    checkpoint = stage.source.spec.checkpoint
    structure = (structure_in(checkpoint) if checkpoint else None) or Structure()
    if budget is not None:
        found = groups_from_module(module, example, frozenset(budget.what))
        for path, reason in found.left_alone.items():
            reporter.say(f"left alone: {path}: {reason}")
        if not found.groups:
            raise ResvitError(
                "Nothing in this network can be pruned: "
                + "; ".join(f"{path}: {reason}" for path, reason in list(found.left_alone.items())[:3]),
                "Leave out what asks for pruning (--prune-macs and the like), or allow more kinds with --prune-what.",
                ExitCode.IMPOSSIBLE,
            )
        costs = costs_from_module(module, example[:1], found.groups)
        if not batches and method is not Importance.MAGNITUDE:
            method = Importance.MAGNITUDE
            notes.append("no images were given: importance is told by magnitude")
        importance = importance_of(module, found.groups, method, batches, images=IMPORTANCE_IMAGES, seed=stage.seed)
        choice = choose_widths(found.groups, importance, costs, budget.of_choice())
        curves = _curves(module, found.groups, importance, batches, costs.macs({}), reporter)
        module = copy_of(module)  # methods may have cached answers by the module that gave them
        structure = prune(module, found.groups, choice.kept, structure)
        channels = {group.name: group.width for group in found.groups}
        widths = WidthsRecord(
            share=budget.share,
            before=choice.before,
            after=choice.after,
            groups=tuple(GroupWidth(**vars(item), channels=channels[item.group]) for item in choice.widths),
            curves=curves,
            left_alone=dict(found.left_alone),
        )
        notes += choice.notes
        reporter.say(widths.summary)
        for note in choice.notes:
            reporter.say(note)
    if stage.sparse:
        masks, sparsity = _sparsified(module, batches, example[:1], reporter)
        write_by_memory(folder / "masks.pt", lambda out: torch.save(masks, out))
    if not stage.trained:
        reporter.warn("Nothing is trained behind pruning: there is no --train-data, and the gate decides as it is.")
    write_network(folder, "pruned", module, structure, network.input_shape)
    record = PruneRecord(method, tuple(notes), widths, sparsity)
    (folder / REPORT).write_bytes(pretty_json(record.to_json()))


def _tensors_of(images: ImageSet | None) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Batches of 32 images with their labels: as many as importance is told by."""
    import torch

    if images is None:
        return []
    return [
        (torch.from_numpy(batch.images), None if batch.labels is None else torch.from_numpy(batch.labels))
        for batch in itertools.islice(images.batches(32), IMPORTANCE_IMAGES // 32)
    ]


def _sparsified(
    module: nn.Module,
    batches: list[tuple[torch.Tensor, torch.Tensor | None]],
    example: torch.Tensor,
    reporter: Reporter,
) -> tuple[dict[str, torch.Tensor], SparsityRecord]:
    from resvit_quantize.pruning.sparsity.report import SparseMethod
    from resvit_quantize.pruning.sparsity.sparsity import sparsify

    method = SparseMethod.SPARSEGPT if batches else SparseMethod.MAGNITUDE
    pictures = [images for images, _ in batches[:SPARSE_BATCHES]] or [example]
    report = sparsify(module, method, pictures, reporter)
    reporter.say(f"2:4 sparsity: {report.share:.1%} of the weights of linear and convolutional layers")
    return report.masks, SparsityRecord.from_json({"method": method.value, **report.to_json()})


def _curves(
    module: nn.Module,
    groups: tuple[Group, ...],
    importance: Mapping[str, Any],
    batches: list[tuple[torch.Tensor, torch.Tensor | None]],
    macs: float,
    reporter: Reporter,
) -> tuple[GroupCurve, ...]:
    """Each group alone at falling widths: the share of images that keep their answer, or whose outputs stay near.

    As many images, and then shares, as the budget of time allows; empty without images.
    """
    import numpy as np
    import torch

    from resvit_quantize.pruning.apply import prune
    from resvit_quantize.pruning.copies import copy_of

    shares: tuple[float, ...] = CURVE_SHARES
    count = int(CURVE_MACS / max(macs, 1.0) / max(len(groups) * len(shares), 1))
    if count < 8:
        shares, count = (0.5,), count * len(shares)
    if not batches or count < 4:
        return ()
    pictures = torch.cat([pictures for pictures, _ in batches])[: min(count, CURVE_IMAGES)]
    with torch.no_grad():
        exact = _answers(module, pictures)
        found = []
        for group in reporter.track(groups, "prune: sensitivity", len(groups)):
            order = np.argsort(-importance[group.name], kind="stable")
            points = [(1.0, 1.0)]
            for share in shares if group.units > 1 else (0.0,):
                units = max(round(share * group.units), 1 if group.units > 1 else 0)
                trial = copy_of(module)
                prune(trial, groups, {group.name: np.sort(order[:units])})
                points.append((units / group.units, _alike(exact, _answers(trial, pictures))))
            found.append(GroupCurve(group.name, group.kind, tuple(points), len(pictures)))
    return tuple(found)


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
