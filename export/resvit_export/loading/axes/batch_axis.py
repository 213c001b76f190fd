"""Outputs whose batch is not their first size, as recognisers of text have it ([T, B, K]): brought to the front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

BROUGHT = "its batch stood elsewhere and was brought to the front"


def batch_axis(shape: Sequence[int | str], batch: int | str) -> int | None:
    """The axis of an output's ``shape`` along which the images of a ``batch`` lie; None where there is none, or the
    first one is.

    Of a batch of one image, any axis of that size will do: to move it leaves all numbers where they are.
    """
    if not shape or shape[0] == batch or not isinstance(shape[0], int):
        return None
    places = [axis for axis, size in enumerate(shape) if size == batch]
    return places[0] if len(places) == 1 or (places and batch == 1) else None


def to_the_front(axis: int, rank: int) -> list[int]:
    """The permutation that does it."""
    return [axis, *(other for other in range(rank) if other != axis)]


def with_batch_first(program: ExportedProgram, axes: Sequence[int | None]) -> None:
    """Turn, in place, each output of ``program`` whose batch lies along one of ``axes``; None leaves it."""
    graph = program.graph_module.graph
    output = graph.output_node()
    values = list(output.args[0])
    for number, axis in enumerate(axes):
        value = values[number]
        if axis is None:
            continue
        permutation = to_the_front(axis, value.meta["val"].dim())
        with graph.inserting_before(output):
            turned = graph.call_function(torch.ops.aten.permute.default, (value, permutation))
        turned.meta = {**value.meta, "val": value.meta["val"].permute(permutation)}
        values[number] = turned
        (spec,) = [spec for spec in program.graph_signature.output_specs if spec.arg.name == value.name][:1]
        spec.arg = TensorArgument(name=turned.name)
    output.args = (tuple(values),)
    program.graph_module.recompile()
