"""What a module costs at any widths, from one recorded call of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resvit_engines.errors import ResvitError
from resvit_engines.targets.layer_work import LayerKind
from resvit_quantize.pruning.choose.costs import Attending, Axis, Costs, Weighted, Weights, heads_over
from resvit_quantize.pruning.copies import forgetting
from resvit_quantize.pruning.groups import Group, Kind

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm)
"""A BatchNorm is folded into the convolution in front of it."""


@dataclass
class _Call:
    path: str
    read: tuple[int, ...]
    written: tuple[int, ...]


@dataclass
class _Product:
    path: str
    macs: int
    read: list[int]
    """Elements of each operand."""
    written: int


def costs_from_module(module: nn.Module, example: Tensor, groups: Iterable[Group]) -> Costs:
    """Record one call of ``module`` on the first image of ``example`` [B, C, H, W].

    Raises ``ResvitError`` where a group names a tensor that the module lacks.
    """
    groups = tuple(groups)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = module.state_dict()
    for group in groups:
        for part in group.slices:
            if part.tensor not in state or part.axis >= state[part.tensor].ndim:
                raise ResvitError(
                    f"{group.name} would prune axis {part.axis} of {part.tensor}, which the network does not have.",
                    "Find the groups anew on this network.",
                )
    weights = {name: _weights(name, parameter, groups) for name, parameter in parameters.items()}
    calls, products = _run(module, example[:1])
    layers: list[Weighted | Attending] = []
    for call in calls:
        name = f"{call.path}.weight"
        layers.append(_layer(module.get_submodule(call.path), call, weights[name]))
    by_module: dict[str, list[_Product]] = {}
    for product in products:
        by_module.setdefault(product.path, []).append(product)
    layers += [_attending(path, each, groups) for path, each in by_module.items()]
    unique = {id(parameter): name for name, parameter in reversed(parameters.items())}
    return Costs(tuple(layers), tuple(weights[name] for name in reversed(unique.values())))


def _weights(name: str, parameter: nn.Parameter, groups: Sequence[Group]) -> Weights:
    shares: list[list[tuple[str, int, int]]] = [[] for _ in parameter.shape]
    for group in groups:
        for part in group.slices:
            if part.tensor == name:
                shares[part.axis].append((group.name, group.units, part.index.shape[1]))
    axes = tuple(Axis(size, tuple(each)) for size, each in zip(parameter.shape, shares, strict=True))
    return Weights(name, axes, _blocks(name, groups))


def _blocks(path: str, groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(
        group.name
        for group in groups
        if group.kind is Kind.BLOCKS and any(path == each or path.startswith(f"{each}.") for each in group.identities)
    )


def _layer(module: nn.Module, call: _Call, weights: Weights) -> Weighted:
    channels = -1 if isinstance(module, nn.Linear | nn.LayerNorm) else 1
    normed = weights.axes[0].full if isinstance(module, nn.LayerNorm) else call.written[channels]
    written, read = torch.Size(call.written).numel() // normed, torch.Size(call.read).numel() // call.read[channels]
    if isinstance(module, _NORMS):
        return Weighted(
            call.path, LayerKind.NORM, weights, written, written, kernels=2 if isinstance(module, nn.GroupNorm) else 1
        )
    grouped = isinstance(module, _CONVOLUTIONS) and module.groups > 1
    kind = LayerKind.GEMM if isinstance(module, nn.Linear) else LayerKind.CONV
    return Weighted(call.path, kind, weights, written, read, grouped)


def _attending(path: str, products: Sequence[_Product], groups: Sequence[Group]) -> Attending:
    """What one product makes for the next stays inside the kernel."""
    read = sum(size for product in products for size in product.read)
    written = sum(product.written for product in products)
    for first, second in itertools.pairwise(products):
        if first.written in second.read:
            read, written = read - first.written, written - first.written
    macs = sum(product.macs for product in products)
    return Attending(f"{path}:attention", macs, read, written, heads_over(groups, path), _blocks(path, groups))


def _run(module: nn.Module, image: Tensor) -> tuple[list[_Call], list[_Product]]:
    calls: list[_Call] = []
    inside: list[str] = [""]

    def entering(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def enter(each: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del each, inputs
            inside.append(path)

        return enter

    def leaving(each: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        path = inside.pop()
        weighted = isinstance(each, (nn.Linear, *_CONVOLUTIONS, *_NORMS))
        if weighted and isinstance(getattr(each, "weight", None), nn.Parameter):
            calls.append(_Call(path, tuple(inputs[0].shape), tuple(output.shape)))

    handles = []
    for path, each in module.named_modules():
        handles += [each.register_forward_pre_hook(entering(path)), each.register_forward_hook(leaving)]
    linear = frozenset(path for path, each in module.named_modules() if isinstance(each, nn.Linear))
    try:
        with _evaluated(module), forgetting(module), _Products(inside, linear) as seen:
            module(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls, seen.products


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and attention in its parts rather than as one opaque call."""
    modes = [(each, each.training) for each in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for each, training in modes:
            each.training = training


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the products outside of layers, those of two activations above all; attention may be one operation."""

    def __init__(self, inside: Sequence[str], linear: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = inside
        self.linear = linear
        self.products: list[_Product] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("bmm", "baddbmm"):
            a, b = args[-2:] if name == "bmm" else args[1:3]
            self._note(a.numel() * b.shape[-1], (a, b), out)
        elif name in ("mm", "addmm") and self.inside[-1] not in self.linear:
            a, b = args[-2:]
            self._note(a.numel() * b.shape[-1], (a, b), out)
        elif name.startswith("_scaled_dot_product") and "backward" not in name:
            q, k, v = args[:3]
            rows = q.numel() // q.shape[-1]
            self._note(rows * k.shape[-2] * (q.shape[-1] + v.shape[-1]), (q, k, v), out[0])
        return out

    def _note(self, macs: int, operands: Sequence[Tensor], out: Tensor) -> None:
        self.products.append(_Product(self.inside[-1], macs, [each.numel() for each in operands], out.numel()))
