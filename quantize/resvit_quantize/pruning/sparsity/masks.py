"""Masks of 2:4 sparsity from ModelOpt's algorithms, on layers and statistics of our own choosing.

``modelopt.torch.sparsity.sparsify`` as a whole is not used, for what it does in ModelOpt 0.47. Its SparseGPT puts
the fours of a convolution along the flattened [channels, taps], which TensorRT does not run sparse, and throws away
the weights that make up for those that go. It leaves out the padding that a convolution reads, and fails where a
linear layer reads maps [B, H, W, C]. It passes over subclasses with a forward of their own, such as timm's
``Conv2dSame``. And it leaves its state on the module.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resvit_engines.errors import ResvitError
from resvit_engines.progress import Reporter
from resvit_quantize.modelopt.quiet import quiet_modelopt
from resvit_quantize.pruning.answers import tensors_in
from resvit_quantize.pruning.copies import copy_of, forgetting
from resvit_quantize.pruning.sparsity.report import LeftAlone, SparseMethod, SparseReport

Layer: TypeAlias = "nn.Linear | _ConvNd"

_PATTERN = "2:4 sparsity"
_BLOCK = 128
"""Columns whose update of the others is put off and done at once."""
_DAMPING = 0.1
"""Of the Hessian's diagonal, relative to its mean: ModelOpt's default."""


@dataclass
class _Run:
    """What one pass showed."""

    order: list[str] = field(default_factory=list)
    reads_image: set[str] = field(default_factory=set)
    answers: set[str] = field(default_factory=set)


def masks_by_modelopt(
    module: nn.Module, method: SparseMethod, batches: Iterable[Tensor], reporter: Reporter
) -> SparseReport:
    """See :func:`resvit_quantize.pruning.sparsity.sparsity.sparsify`."""
    layers: dict[str, Layer] = {n: part for n, part in module.named_modules() if isinstance(part, nn.Linear | _ConvNd)}
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    stream = (images.to(device) for images in batches)
    first = next(stream, None)
    if first is None or not len(first):
        raise ResvitError("There is no image to see the network run on.", "Give at least one image.")
    with _at_rest(module):
        try:
            run = _seen(module, layers, first)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ResvitError(
                f"The network cannot read images of shape {list(first.shape)}: {error}",
                "Give images as the network takes them.",
            ) from error
        left = {name: reason for name, layer in layers.items() if (reason := _reason(name, layer, layers, run))}
        chosen = {name: layer for name, layer in layers.items() if name not in left}
        masks: dict[str, Tensor] = {}
        if chosen and method is SparseMethod.MAGNITUDE:
            masks = {f"{name}.weight": _magnitude_mask(layer.weight) for name, layer in chosen.items()}
        elif chosen:
            hessians = _hessians(module, chosen, itertools.chain([first], stream))
            for name, layer in reporter.track(chosen.items(), "2:4 sparsity", len(chosen)):
                masks[f"{name}.weight"] = _sparsegpt(name, layer, hessians.pop(name))
    with torch.no_grad():
        for name, layer in chosen.items():
            layer.weight.mul_(masks[f"{name}.weight"])
    for name, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention):
            left[name] = "the projections of nn.MultiheadAttention are no layers of their own"
    total = sum(layer.weight.numel() for layer in layers.values())
    share = sum(mask.numel() for mask in masks.values()) / total if total else 0.0
    reporter.say(f"2:4 sparsity: {len(chosen)} layers, {share:.0%} of the weights; {len(left)} left alone")
    return SparseReport(masks, share, tuple(LeftAlone(name, reason) for name, reason in sorted(left.items())))


@contextlib.contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _seen(module: nn.Module, layers: dict[str, Layer], images: Tensor) -> _Run:
    """Run ``module`` once, and see which layers read the image itself, and which give the answers."""
    images = images[:2]
    run, results = _Run(), dict[str, Tensor]()

    def note(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        run.order.append(name)
        results[name] = output  # kept alive, so that no address is used twice
        if inputs[0].data_ptr() == images.data_ptr():
            run.reads_image.add(name)

    hooks = [
        layer.register_forward_hook(lambda _m, inputs, output, name=name: note(name, inputs, output))
        for name, layer in layers.items()
    ]
    try:
        with forgetting(module):
            found = tensors_in(module(images))
    finally:
        for hook in hooks:
            hook.remove()
    answers = {tensor.data_ptr() for tensor in found}
    run.answers = {name for name, result in results.items() if result.data_ptr() in answers}
    # Where something stands between: preprocessing in front of the first layer, a softmax behind the last.
    run.reads_image = run.reads_image or set(run.order[:1])
    run.answers = run.answers or set(run.order[-1:])
    return run


def _reason(name: str, layer: Layer, layers: dict[str, Layer], run: _Run) -> str | None:
    """Why ``layer`` stays dense; ``None`` if it need not."""
    if name not in run.order:
        return "it does not run on its own"
    if name in run.reads_image:
        return "it reads the image"
    if name in run.answers:
        return "it gives the answer"
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return f"{type(layer).__name__} has no sparse kernels"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"its channels are in {layer.groups} groups"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter) or not _reads_weight_as_it_is(layer):
        return f"{type(layer).__name__} computes its weights anew in each pass"
    if layer.weight.shape[1] % 4:
        return f"its {layer.weight.shape[1]} input channels are no multiple of 4"
    twin = next(other for other, part in layers.items() if part.weight is layer.weight)
    return None if twin == name else f"it shares its weights with {twin}"


def _reads_weight_as_it_is(layer: Layer) -> bool:
    """Whether zeros in the weight are zeros in what is multiplied; weights may be standardised on the way."""
    kind = type(layer)
    if kind.forward in (nn.Linear.forward, nn.Conv2d.forward) and (
        getattr(kind, "_conv_forward", None) in (None, nn.Conv2d._conv_forward)
    ):
        return True
    # A forward of its own: with weights twice as large it must answer twice as much, or it does not use them so.
    try:
        twice = copy_of(layer).float()
        if twice.bias is not None:
            twice.bias.zero_()
        sides = () if isinstance(layer, nn.Linear) else tuple(4 * side for side in layer.kernel_size)
        images = torch.randn(2, layer.weight.shape[1], *sides, generator=torch.Generator().manual_seed(0))
        once = twice(images.to(layer.weight.device))
        twice.weight.mul_(2.0)
        return torch.allclose(twice(images.to(layer.weight.device)), 2.0 * once, rtol=1e-3, atol=1e-5)
    except (RuntimeError, ValueError, TypeError):
        return False


def _hessians(module: nn.Module, layers: dict[str, Layer], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Σ x xᵀ by layer, over all that it reads: [in, in], or [taps * in, taps * in] with the channels innermost."""
    sums: dict[str, Tensor] = {}

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = _rows(layer, inputs[0].float(), output)
        product = rows.T @ rows
        sums[name] = sums[name] + product if name in sums else product

    hooks = [
        layer.register_forward_hook(lambda part, inputs, output, name=name: add(name, part, inputs, output))
        for name, layer in layers.items()
    ]
    try:
        with forgetting(module):
            for images in batches:
                module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _rows(layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """What ``layer`` multiplies its weights with: [positions, in] or [positions, taps * in]."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    wanted: list[tuple[int, int]] = []
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        stock = type(layer).forward is nn.Conv2d.forward and not isinstance(layer.padding, str)
        missing = max(0, (output.shape[2 + axis] - 1) * layer.stride[axis] + reach - x.shape[2 + axis])
        each = int(layer.padding[axis])
        wanted.append((each, each) if stock else (missing // 2, missing - missing // 2))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, (*wanted[1], *wanted[0]), mode=mode)
    columns = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)  # [B, in * taps, positions]
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    columns = columns.reshape(len(x), -1, taps, columns.shape[2])  # [B, in, taps, positions]
    return columns.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def _magnitude_mask(weight: Tensor) -> Tensor:
    with quiet_modelopt("sparsity", "leave 2:4 sparsity out"):
        from modelopt.torch.sparsity.weight_sparsity.magnitude import create_asp_mask

        mask: Tensor = create_asp_mask(weight, _PATTERN)
    return mask.to(weight.device)


def _sparsegpt(name: str, layer: Layer, hessian: Tensor) -> Tensor:
    """Choose the mask, and write the weights that make up for what it takes; both as SparseGPT does."""
    if not bool(hessian.isfinite().all()):
        raise ResvitError(f"What '{name}' reads is not finite.", "Check the images and the weights.")
    # ModelOpt guards divisions with an absolute 1e-9, and counts inputs that are always zero as 1: on this scale, both
    # mean the same for all images.
    hessian = hessian / hessian.diagonal().mean().clamp_min(1e-30)
    own = layer.weight
    # Channels innermost, so that each four is of one tap.
    flat = own.detach().float().movedim(1, -1).flatten(1)  # [out, taps * in]
    config = {"pattern": _PATTERN, "col_block_size": _BLOCK, "row_block_size": -1, "hessian_damp": _DAMPING}
    with quiet_modelopt("sparsity", "leave 2:4 sparsity out"):
        from modelopt.torch.sparsity.weight_sparsity.sparsegpt import create_sgpt_mask, prepare

        mask: Tensor = create_sgpt_mask(flat, hessian.clone(), config)
        weight, factor = prepare(flat, hessian, _DAMPING)
    weight = compensated(weight, mask, factor)
    shape = (own.shape[0], *own.shape[2:], own.shape[1])
    own.copy_(weight.reshape(shape).movedim(-1, 1))
    return mask.reshape(shape).movedim(-1, 1).contiguous()


def compensated(weight: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
    """Set ``weight`` [rows, columns] to zero where ``mask`` is False, and let what stays to the right make up for it.

    ``factor`` is the upper Cholesky factor of the inverse Hessian of the columns. The column updates of SparseGPT
    (Frantar and Alistarh 2023, algorithm 1), of which the result minimises the layer's error column by column.
    """
    weight = weight.clone()
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:end])
        for column in range(start, end):
            error = weight[:, column] * ~mask[:, column] / factor[column, column]
            weight[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight * mask
