"""ONNX operators that rearrange, pad, resize and reduce, as differentiable torch functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs: TypeAlias = Sequence[Tensor]
Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[[Inputs, Attributes], "Tensor | tuple[Tensor, ...]"]


def present(inputs: Inputs, index: int) -> Tensor | None:
    """The input of this index, ``None`` where the node has none."""
    return inputs[index] if len(inputs) > index else None


def ints(value: Tensor) -> list[int]:
    """The values of an integer tensor, in order."""
    return [int(item) for item in value.reshape(-1).tolist()]


def _reshape(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, shape = inputs[0], ints(inputs[1])
    if not attributes.get("allowzero"):
        shape = [x.shape[index] if size == 0 else size for index, size in enumerate(shape)]
    return x.reshape(shape)


def _flatten(inputs: Inputs, attributes: Attributes) -> Tensor:
    axis = attributes.get("axis", 1)
    axis = axis + inputs[0].ndim if axis < 0 else axis
    return inputs[0].reshape(math.prod(inputs[0].shape[:axis]), -1)


def _squeeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    return inputs[0].squeeze(tuple(ints(inputs[1]))) if len(inputs) > 1 else inputs[0].squeeze()


def _unsqueeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = ints(inputs[1])
    result, rank = inputs[0], inputs[0].ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _slice(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, starts, ends = inputs[0], ints(inputs[1]), ints(inputs[2])
    axes_given, steps_given = present(inputs, 3), present(inputs, 4)
    axes = list(range(len(starts))) if axes_given is None else ints(axes_given)
    steps = [1] * len(starts) if steps_given is None else ints(steps_given)
    for given, axis in zip(zip(starts, ends, steps, strict=True), axes, strict=True):
        start, end, step = slice(*given).indices(x.shape[axis])
        if step < 0:
            x = x.index_select(axis, torch.tensor(list(range(start, end, step)), device=x.device, dtype=torch.int64))
        else:
            x = x.narrow(axis, start, max(end - start, 0))
            x = x if step == 1 else x[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
    return x


def _gather_elements(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, index, axis = inputs[0], inputs[1], attributes.get("axis", 0)
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index))


def _top_k(inputs: Inputs, attributes: Attributes) -> tuple[Tensor, ...]:
    """Which are the largest has no gradient; how large they are has."""
    found = inputs[0].topk(
        int(inputs[1]),
        attributes.get("axis", -1),
        bool(attributes.get("largest", 1)),
        bool(attributes.get("sorted", 1)),
    )
    return found.values, found.indices


def _grid_sample(inputs: Inputs, attributes: Attributes) -> Tensor:
    # Renamed with opset 20.
    modes = {"linear": "bilinear", "cubic": "bicubic"}
    mode = attributes.get("mode", "linear")
    return F.grid_sample(
        inputs[0],
        inputs[1],
        modes.get(mode) or str(mode),
        attributes.get("padding_mode", "zeros"),
        bool(attributes.get("align_corners", 0)),
    )


def _split(inputs: Inputs, attributes: Attributes) -> tuple[Tensor, ...]:
    x, axis = inputs[0], attributes.get("axis", 0)
    sizes = present(inputs, 1)
    if sizes is not None:
        return torch.split_with_sizes(x, ints(sizes), axis)
    count = attributes.get("num_outputs", attributes["outputs"])
    return torch.tensor_split(x, _split_points(x.shape[axis], count), axis)


def _split_points(size: int, count: int) -> list[int]:
    part = -(-size // count)
    return [min(part * index, size) for index in range(1, count)]


def _gather(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, index = inputs[0], inputs[1].long()
    axis = attributes.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    flat = x.index_select(axis, index.reshape(-1))
    return flat.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _pad(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, amounts = inputs[0], ints(inputs[1])
    value, axes_given = present(inputs, 2), present(inputs, 3)
    axes = list(range(x.ndim)) if axes_given is None else [axis % x.ndim for axis in ints(axes_given)]
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for position, axis in enumerate(axes):
        begins[axis], ends[axis] = amounts[position], amounts[position + len(axes)]
    pairs = [pad for axis in reversed(range(x.ndim)) for pad in (begins[axis], ends[axis])]
    mode = attributes.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, pairs, value=0.0 if value is None else value.item())
    while len(pairs) > 2 and pairs[-2:] == [0, 0]:
        pairs = pairs[:-2]
    return F.pad(x, pairs, mode={"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode])


def _resize(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Only what ``interpolate`` computes exactly as ONNX defines it; anything else raises NotImplementedError."""
    x, scales, sizes = inputs[0], present(inputs, 2), present(inputs, 3)
    mode, how = attributes.get("mode", "nearest"), attributes.get("coordinate_transformation_mode", "half_pixel")
    refusal = NotImplementedError(f"Resize with mode {mode} and {how}")
    if attributes.get("axes") or attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise refusal
    if sizes is None:
        # Given factors are used as they are, not those that the rounded sizes come to.
        assert scales is not None
        factors = scales.tolist()[2:]
        spatial = [math.floor(size * factor) for size, factor in zip(x.shape[2:], factors, strict=True)]
        wanted: dict[str, Any] = {"scale_factor": factors, "recompute_scale_factor": False}
    else:
        spatial = ints(sizes)[2:]
        wanted = {"size": spatial}
    if mode == "nearest":
        rounding = attributes.get("nearest_mode", "round_prefer_floor")
        whole = all(out % size == 0 for size, out in zip(x.shape[2:], spatial, strict=True))
        # At whole factors both conventions pick the same source.
        if (how == "asymmetric" and rounding == "floor") or (whole and how == "half_pixel"):
            return F.interpolate(x, mode="nearest", **wanted)
        raise refusal
    kind = {("linear", 3): "linear", ("linear", 4): "bilinear", ("cubic", 4): "bicubic"}.get((mode, x.ndim))
    antialias, outside = bool(attributes.get("antialias")), bool(attributes.get("exclude_outside"))
    fits = how in ("half_pixel", "align_corners") or (how == "pytorch_half_pixel" and 1 not in spatial)
    # PyTorch's antialiasing leaves out what lies outside, and has another cubic; without it, the border repeats.
    fits = fits and outside == antialias and not (antialias and how == "align_corners")
    if mode == "cubic":
        fits = fits and attributes.get("cubic_coeff_a", -0.75) == (-0.5 if antialias else -0.75)
    if kind is None or not fits:
        raise refusal
    return F.interpolate(x, mode=kind, align_corners=how == "align_corners", antialias=antialias, **wanted)


def _depth_to_space(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, size = inputs[0], attributes["blocksize"]
    batch, channels, height, width = x.shape
    if attributes.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    parts = x.reshape(batch, size, size, channels // size**2, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // size**2, height * size, width * size)


def _space_to_depth(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, size = inputs[0], attributes["blocksize"]
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // size, size, width // size, size)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * size**2, height // size, width // size)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def operator(inputs: Inputs, attributes: Attributes) -> Tensor:
        axes_given = present(inputs, 1)
        axes = tuple(ints(axes_given)) if axes_given is not None else tuple(attributes.get("axes") or ())
        if not axes:
            if attributes.get("noop_with_empty_axes"):
                return inputs[0]
            axes = tuple(range(inputs[0].ndim))
        return function(inputs[0], dim=axes, keepdim=bool(attributes.get("keepdims", 1)))

    return operator


def _constant_of_shape(inputs: Inputs, attributes: Attributes) -> Tensor:
    value = attributes.get("value")
    filling = torch.zeros(1) if value is None else value
    return filling.reshape(()).expand(ints(inputs[0])).clone()


def _expand(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, wanted = inputs[0], ints(inputs[1])
    own = [1] * (len(wanted) - x.ndim) + list(x.shape)
    wanted = [1] * (x.ndim - len(wanted)) + wanted
    return x.expand([have if want == 1 else want for have, want in zip(own, wanted, strict=True)])


def _shape(inputs: Inputs, attributes: Attributes) -> Tensor:
    return torch.tensor(inputs[0].shape[attributes.get("start", 0) : attributes.get("end")], dtype=torch.int64)


SHAPE_OPERATORS: dict[str, Operator] = {
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GridSample": _grid_sample,
    "Pad": _pad,
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "TopK": _top_k,
    "Squeeze": _squeeze,
    "Tile": lambda i, a: i[0].repeat(ints(i[1])),
    "Unsqueeze": _unsqueeze,
}
