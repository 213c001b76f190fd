"""What a network answers with, whatever it is made of: lists, dictionaries, named tuples, dataclasses, and tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors_in(answer: object) -> list[Tensor]:
    """The tensors of an answer, in order; everything else in it is left out."""
    if isinstance(answer, Tensor):
        return [answer]
    parts = parts_of(answer)
    if parts is None:
        return []
    return [tensor for part in (parts.values() if isinstance(parts, dict) else parts) for tensor in tensors_in(part)]


def parts_of(value: object) -> dict[Any, Any] | list[Any] | None:
    """The parts of a value: by name where they have names, else in order; None of what has no parts that are known.

    Beside those above are known all structures that PyTorch is told of (``torch.utils._pytree.register_pytree_node``).
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and (fields := getattr(value, "_fields", None)):
        return dict(zip(fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return list(value)
    leaves = pytree.tree_leaves(value)
    return None if len(leaves) == 1 and leaves[0] is value else leaves
