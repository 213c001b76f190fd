"""Residual blocks that can become the identity: what they give is their input plus something of the same shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from resvit_quantize.pruning.find.attention_heads import LAYERS, Call

_KEEPS_RESIDUAL = ("Add", "Relu", "Silu", "Gelu", "Hardtanh", "Hardswish", "LeakyRelu", "Clone", "Alias")


def candidates(module: nn.Module) -> frozenset[str]:
    """Members of a ``Sequential`` or ``ModuleList`` that hold layers and may be residual blocks."""
    found = set()
    for path, parent in module.named_modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for name, child in parent.named_children():
                if not isinstance(child, LAYERS) and any(isinstance(each, LAYERS) for each in child.modules()):
                    found.add(f"{path}.{name}" if path else name)
    return frozenset(found)


def residual_blocks(records: Mapping[str, Sequence[Call]]) -> tuple[str, ...]:
    """Which of the watched modules are residual, by the autograd graph of their one call; innermost only.

    One that takes more than its input cannot become the identity.
    """
    found = [
        path
        for path, calls in records.items()
        if len(calls) == 1 and calls[0].alone and _is_residual(calls[0].given, calls[0].made)
    ]
    return tuple(path for path in found if not any(other.startswith(f"{path}.") for other in found))


def _is_residual(given: Tensor, made: Tensor) -> bool:
    if given.shape != made.shape or given.grad_fn is None or made.grad_fn is None:
        return False
    stack: list[Any] = [made.grad_fn]
    seen = set()
    added = False
    while stack:
        function = stack.pop()
        if function is given.grad_fn:
            return added
        if function in seen or not function.name().startswith(_KEEPS_RESIDUAL):
            continue
        seen.add(function)
        added |= function.name().startswith("Add")
        stack += [source for source, _ in function.next_functions if source is not None]
    return False
