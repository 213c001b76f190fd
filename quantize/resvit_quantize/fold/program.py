"""Fold what is exact to fold: the same function with fewer operations, and weights as they will be quantised."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from resvit_calibrate.runtime.parity import differences, moved_between_runs
from resvit_calibrate.runtime.runner import Runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ExitCode, ResvitError
from resvit_quantize.fold.editor import GraphEditor
from resvit_quantize.fold.parallel import merge_parallel_convolutions
from resvit_quantize.fold.rules import (
    Item,
    fold_batch_norms,
    fold_constants,
    fold_layer_scales,
    remove_no_ops,
    say_sizes,
)

RULES: tuple[Callable[[GraphEditor], Iterator[Item]], ...] = (
    fold_constants,
    remove_no_ops,
    say_sizes,
    fold_batch_norms,
    fold_layer_scales,
    merge_parallel_convolutions,
)


@dataclass(frozen=True)
class FoldItem:
    """One thing folded, at the module path ``where``.

    ``kind`` is constant, batch_norm, layer_scale, parallel_convolution or no_op.
    """

    kind: str
    where: str


@dataclass(frozen=True)
class FoldReport:
    """What was folded, and by how much outputs on random images moved (float32 rounding)."""

    items: tuple[FoldItem, ...]
    max_abs_error: float
    max_rel_error: float
    """Relative to the largest absolute output."""

    def counts(self) -> dict[str, int]:
        """Number of folds by kind."""
        return dict(sorted(Counter(item.kind for item in self.items).items()))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "items": [{"kind": item.kind, "where": item.where} for item in self.items],
            "counts": self.counts(),
            "max_abs_error": self.max_abs_error,
            "max_rel_error": self.max_rel_error,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> FoldReport:
        """Read what ``to_json`` wrote."""
        items = tuple(FoldItem(item["kind"], item["where"]) for item in document["items"])
        return cls(items, document["max_abs_error"], document["max_rel_error"])


def fold_program(program: ExportedProgram, *, seed: int = 0) -> tuple[ExportedProgram, FoldReport]:
    """Fold constants, BatchNorm and LayerScale into weights, side-by-side convolutions into one, and drop no-ops.

    The folds are exact, computed in float64 and rounded once to the weights' own type; both programs are then
    run on the same random input [B, C, H, W] (B from the example input) and compared. Node metadata that leads
    back to the user's modules is kept. Raises ``ResvitError`` where the module writes its own state while it
    runs, where a BatchNorm holds no finite factor, or where the outputs differ by more than rounding.
    """
    mutated = [
        spec.target
        for spec in program.graph_signature.output_specs
        if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.TOKEN)
    ]
    functional = program.run_decompositions({})
    mutated += [
        spec.target
        for spec in functional.graph_signature.output_specs
        if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.TOKEN)
    ]
    if mutated:
        raise ResvitError(
            f"The network changes its own state while it runs: {mutated[0] or 'its input'}.",
            "Call .eval() on every part before exporting, and write no buffers in forward.",
        )
    editor = GraphEditor(functional)
    items: list[FoldItem] = []
    before = -1
    while before != len(items):
        before = len(items)
        for rule in RULES:
            items += [FoldItem(kind, where) for kind, where in rule(editor)]
    folded = editor.finish()
    absolute, relative = _difference(program, folded, seed)
    return folded, FoldReport(tuple(items), absolute, relative)


def _difference(before: ExportedProgram, after: ExportedProgram, seed: int) -> tuple[float, float]:
    """Largest absolute difference of the outputs, and that over the largest absolute output."""
    generator = torch.Generator().manual_seed(seed)
    inputs, keywords = before.example_inputs or _example_inputs(before)
    leaves, structure = torch.utils._pytree.tree_flatten((inputs, keywords))
    feeds = {
        str(number): torch.randn(leaf.shape, generator=generator).numpy()
        for number, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    }

    def runner(program: ExportedProgram) -> Runner:
        call = program.module()

        def run(arrays: Arrays) -> Arrays:
            fed = [
                torch.from_numpy(arrays[str(number)]).to(leaf.dtype) if str(number) in arrays else leaf
                for number, leaf in enumerate(leaves)
            ]
            positional, named = torch.utils._pytree.tree_unflatten(fed, structure)
            with torch.no_grad():
                answers = torch.utils._pytree.tree_leaves(call(*positional, **named))
            return {str(index): answer.numpy() for index, answer in enumerate(answers)}

        return run

    sets = any(node.target is torch.ops.aten.topk.default for node in before.graph.nodes)
    absolute = relative = 0.0
    for index, found in differences(runner(before), runner(after), feeds, sets=sets).items():
        if not math.isfinite(found.largest):
            raise ResvitError(
                f"The network itself, before any folding, gives NaN or infinity in output {index} on random images.",
                "Look for a division by zero, a logarithm or root of negative numbers, or weights that overflow.",
            )
        if not found.same and moved_between_runs(runner(before), feeds):
            raise ResvitError(
                f"The network is random: two runs on one image differ in output {index}.",
                "Leave out what draws random numbers when it answers: F.dropout needs training=self.training.",
            )
        if found.chaotic:
            raise ResvitError(
                f"Rounding alone moves output {index} by {found.moved:.3g} (its largest value is {found.largest:.3g}), "
                f"and folding by {found.error:.3g}.",
                "A network that rounding moves so far cannot be converted and checked: look for a division by nearly "
                "nothing, or scores that are all but equal in front of a selection.",
            )
        if not found.same:
            raise ResvitError(
                f"Folding changed output {index} by {found.error:.3g} (its largest value is {found.largest:.3g}).",
                "This is a fault of the fold; please report it.",
                ExitCode.BUG,
            )
        absolute, relative = max(absolute, found.error), max(relative, found.error / max(found.largest, 1e-6))
    return absolute, relative


def _example_inputs(program: ExportedProgram) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Inputs for a program that was saved without any: free sizes are 2, whole numbers 1."""
    names = program.graph_signature.user_inputs
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [[size if isinstance(size, int) else 2 for size in value.shape] for value in values]
    leaves = [
        torch.full(shape, 0 if value.is_floating_point() else 1, dtype=value.dtype)
        for shape, value in zip(shapes, values, strict=True)
    ]
    positional, named = torch.utils._pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return positional, named
