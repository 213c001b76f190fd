"""Where channels go in ``cat``, ``split`` and ``unbind``, told by the shapes that were traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

Node: TypeAlias = Any
"""Torch-Pruning's nodes and edges, and autograd's functions, which have no types."""


class EntangledError(Exception):
    """The channels cannot be followed; the message says why."""


@contextmanager
def unknown_joins_passed() -> Iterator[None]:
    """Torch-Pruning 1.6 adds up the channels of a ``cat`` before it looks whether it knows all: a ``TypeError``.

    What comes by several ways from a ``split`` it counts as more parts than there are: an ``IndexError``.
    Its maps of joins are not kept anyway, see :func:`set_maps`.
    """
    from torch_pruning.dependency import index_mapping

    theirs = index_mapping.update_concat_index_mapping

    def passing(graph: Any, node: Node) -> None:
        with suppress(TypeError, IndexError):
            theirs(graph, node)

    index_mapping.update_concat_index_mapping = passing
    try:
        yield
    finally:
        index_mapping.update_concat_index_mapping = theirs


def set_maps(graph: Any) -> None:
    """Say by the traced shapes where channels go in every ``cat``, ``split`` and ``unbind``; keep the other maps."""
    from torch_pruning import ops

    joins = (ops.OPTYPE.CONCAT, ops.OPTYPE.SPLIT, ops.OPTYPE.UNBIND)
    for node in graph.module2node.values():
        for edge in node.dependencies:
            if node.type in joins or edge.target.type in joins:
                edge.index_mapping = [None, None]
    for node in graph.module2node.values():
        if node.type == ops.OPTYPE.CONCAT:
            _set_parts(node, node.inputs, lambda joined, other: _sources(joined.grad_fn, other.grad_fn))
        elif node.type in (ops.OPTYPE.SPLIT, ops.OPTYPE.UNBIND):
            _set_parts(node, node.outputs, lambda joined, other: _users(joined.grad_fn, other.grad_fn))


def _set_parts(node: Node, others: list[Node], places: Callable[[Node, Node], list[int]]) -> None:
    """Map the edges to and from ``others``; ``places`` says which parts of the joined tensor another one is."""
    function = node.grad_fn
    split = hasattr(function, "_saved_split_size") or hasattr(function, "_saved_split_sizes")
    concat = not split and "cat" in function.name().lower()
    if concat:
        shapes = [
            tuple(source._input_metadata[number].shape)
            if source is not None and hasattr(source, "_input_metadata")
            else ()
            for source, number in function.next_functions
        ]
    else:
        shapes = [tuple(each.shape) for each in function._input_metadata]
    known = [shape for shape in shapes if shape]
    dim = _signed(getattr(function, "_saved_dim", 0))
    rank = len(known[0]) if known else 0
    if not (split or concat) or not rank or dim % rank != (1 if rank == 4 else rank - 1):
        return
    sizes = [shape[dim] if shape else None for shape in shapes]
    starts: list[int | None] = [0]
    for size in sizes:
        last = starts[-1]
        starts.append(None if size is None or last is None else last + size)
    for other in {id(each): each for each in others}.values():
        parts = [(starts[place], sizes[place]) for place in places(node, other)]
        for edge in [*node.dependencies, *other.dependencies]:
            out = edge.source is node and edge.target is other
            if out or (edge.source is other and edge.target is node):
                edge.index_mapping = [Part(parts, into=not out), None]


@dataclass
class Part:
    """From the channels of a part to those of the joined tensor (``into``), or back."""

    parts: list[tuple[int | None, int | None]]
    into: bool

    def __call__(self, indices: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Map (position, channel of the root) pairs."""
        found: list[tuple[int, int]] = []
        for start, size in self.parts:
            if start is None or size is None:
                raise EntangledError("they are joined with something that is not followed")
            if self.into:
                found += [(index + start, root) for index, root in indices]
            else:
                found += [(index - start, root) for index, root in indices if start <= index < start + size]
        return found


def _sources(joined: Any, other: Any) -> list[int]:
    return [place for place, (function, _) in enumerate(joined.next_functions) if function is other]


def _users(split: Any, other: Any) -> list[int]:
    return [number for function, number in other.next_functions if function is split]


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim
