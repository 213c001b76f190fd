"""The image as every graph here reads it, float32 [B, C, H, W], whatever the user's graph takes.

TensorFlow's exporters read [B, H, W, C], and graphs made for cameras read bytes and begin with a Cast. Both are the
same network behind another entrance: the transpose is put in front, where it meets its opposite, and the cast goes. A
DequantizeLinear that makes numbers of bytes is a normalisation, and becomes a subtraction and a multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resvit_calibrate.runtime.sessions import Array
from resvit_engines.errors import ResvitError

_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
_RANGES = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
}
_OTHER_FLOATS = (ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_ENTRANCES = (ir.DataType.FLOAT, *_RANGES, *_OTHER_FLOATS)
_MOVES = frozenset({"Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Gather", "Split"})
"""What hands numbers on as they are, and reads nothing else of the image's type."""
_HOLD_PIXELS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.INT32})
"""Types that bytes are exact in, on their way to float32."""
_FEWEST = 4
"""Channels of an image, at most."""


@dataclass(frozen=True)
class ImageEntrance:
    """How a graph took its image, before it was brought into our form: the type of its numbers, their order."""

    dtype: ir.DataType
    channels_last: bool

    @property
    def pixels(self) -> tuple[int, int] | None:
        """The numbers that stand for black and white, where the network reads whole numbers; else None."""
        return _RANGES.get(self.dtype)

    def notes(self, name: str) -> list[str]:
        """A sentence for each thing that was changed."""
        told = []
        if self.channels_last:
            told.append(f"the image {name} was [B, H, W, C]; it is read as [B, C, H, W]")
        if self.pixels is not None:
            told.append(
                f"the image {name} was {self.dtype.name.lower()}; it is read as float32 of the same numbers, "
                f"{self.pixels[0]} to {self.pixels[1]}"
            )
        elif self.dtype is not ir.DataType.FLOAT:
            told.append(f"the image {name} was {self.dtype.name.lower()}; it is read as float32")
        return told

    def before(self) -> Callable[[Array], Array]:
        """From our form of an image [B, C, H, W] to the one that the user's graph reads."""

        def turned(images: Array) -> Array:
            plain = images.transpose(_TO_LAST) if self.channels_last else images
            return np.ascontiguousarray(plain.astype(self.dtype.numpy()))

        return turned

    def random(self, images: Array) -> Array:
        """Normal numbers as numbers that the graph can read, exact in its own type."""
        if self.pixels is None:
            return images.astype(self.dtype.numpy()).astype(np.float32)
        low, high = self.pixels
        spread: Array = np.clip(np.rint(images * (high - low) / 5 + (low + high + 1) / 2), low, high)
        return spread.astype(np.float32)


def take_image(model: ir.Model) -> tuple[str | None, ImageEntrance]:
    """Bring the graph's image into our form, in place; its name, None where no input is one, and what it was.

    Raises:
        ResvitError: for whole numbers that the graph computes with before it makes floats of them.
    """
    images = [v for v in model.graph.inputs if v.shape is not None and len(v.shape) == 4 and v.dtype in _ENTRANCES]
    if not images:
        return None, ImageEntrance(ir.DataType.FLOAT, False)
    image = next((v for v in images if v.dtype is ir.DataType.FLOAT), images[0])
    dtype = image.dtype
    assert dtype is not None
    if dtype is not ir.DataType.FLOAT:
        _make_float(model.graph, image, dtype)
    last = _is_channels_last(image)
    if last:
        _put_channels_first(model.graph, image)
    return image.name, ImageEntrance(dtype, last)


def _make_float(graph: ir.Graph, image: ir.Value, dtype: ir.DataType) -> None:
    """Let the image and what only moves it be float32, and drop the casts that follow."""
    pending, moved, casts = [image], {image: None}, []
    scalings: list[ir.Node] = []
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            raise _computed(image, dtype, "an output of the graph")
        for use in value.uses():
            node = use.node
            if node.op_type == "Shape":
                continue
            if use.idx == 0 and _casts_to(node) is ir.DataType.FLOAT:
                casts.append(node)
            elif use.idx == 0 and scaling_of(node) is not None:
                scalings.append(node)
            elif (use.idx == 0 and node.op_type in _MOVES and not node.domain) or _passes_bytes(node, dtype):
                pending += [out for out in node.outputs if out not in moved]
                moved.update(dict.fromkeys(node.outputs))
                if _casts_to(node) is not None:
                    casts.append(node)
            elif not (node.op_type == "Concat" and not node.domain):
                raise _computed(image, dtype, f"{node.op_type} '{node.name}'")
            elif node.outputs[0] not in moved and all(part in moved for part in node.inputs):
                pending.append(node.outputs[0])
                moved[node.outputs[0]] = None
    for node in {use.node for value in moved for use in value.uses()}:
        if node.op_type == "Concat" and node.outputs[0] not in moved:
            raise _computed(image, dtype, f"Concat '{node.name}'")
    for value in moved:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in scalings:
        _compute_scaling(graph, node)
    for node in dict.fromkeys(casts):
        source = node.inputs[0]
        assert source is not None
        if node.outputs[0].is_graph_output():
            raise _computed(image, dtype, "an output of the graph")
        node.outputs[0].replace_all_uses_with(source)
        graph.remove(node, safe=True)


def scaling_of(node: ir.Node) -> tuple[Array, Array] | None:
    """The zero point and the scale by which a DequantizeLinear makes float32 of its input; None for anything else.

    Both are float32, and go with the input's shape as they are.
    """
    if node.op_type != "DequantizeLinear" or node.domain or node.attributes.get_int("block_size", 0) != 0:
        return None
    source, scale, zero = (*node.inputs, None)[:3]
    if source is None or scale is None or scale.const_value is None or (zero and zero.const_value is None):
        return None
    step = scale.const_value.numpy()
    if step.dtype != np.float32 or step.ndim > 1 or (step.size != 1 and source.shape is None):
        return None
    level = np.zeros_like(step) if zero is None or zero.const_value is None else zero.const_value.numpy()
    if level.shape != step.shape:
        return None
    if step.size == 1:
        return level.astype(np.float32).reshape(()), step.reshape(())
    assert source.shape is not None
    axis, rank = node.attributes.get_int("axis", 1), len(source.shape)
    if not -rank <= axis < rank:
        return None
    sizes = [-1 if place == axis % rank else 1 for place in range(rank)]
    return level.astype(np.float32).reshape(sizes), step.reshape(sizes)


def _compute_scaling(graph: ir.Graph, node: ir.Node) -> None:
    """Write a DequantizeLinear of the image as what it computes, in place."""
    scaling, value, result = scaling_of(node), node.inputs[0], node.outputs[0]
    assert scaling is not None
    for kind, op_type, array in zip(("zero", "scale"), ("Sub", "Mul"), scaling, strict=True):
        if op_type == "Sub" and not array.any():
            continue
        constant = ir.val(f"{result.name}/{kind}", const_value=ir.tensor(array))
        graph.register_initializer(constant)
        step = ir.node(op_type, [value, constant], name=f"{node.name or result.name}/{op_type}")
        step.outputs[0].name = f"{result.name}/{op_type}"
        step.outputs[0].shape, step.outputs[0].type = result.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(node, step)
        value = step.outputs[0]
    assert value is not None
    ir.convenience.replace_nodes_and_values(graph, node, [node], [], [result], [value])


def _casts_to(node: ir.Node) -> ir.DataType | None:
    """The type that a node casts to; None for one that does no such thing."""
    if node.op_type == "Cast" and not node.domain:
        return ir.DataType(node.attributes.get_int("to", 0))
    if node.op_type == "CastLike" and not node.domain and len(node.inputs) > 1 and node.inputs[1] is not None:
        like = node.inputs[1]
        return like.const_value.dtype if like.const_value is not None else like.dtype
    return None


def _passes_bytes(node: ir.Node, dtype: ir.DataType) -> bool:
    """Whether a node casts bytes to a type that holds them exactly, for nothing but casts to float32 behind it."""
    if _casts_to(node) not in _HOLD_PIXELS or dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
        return False
    uses = list(node.outputs[0].uses())
    return bool(uses) and all(_casts_to(use.node) is ir.DataType.FLOAT and use.idx == 0 for use in uses)


def _computed(image: ir.Value, dtype: ir.DataType, where: str) -> ResvitError:
    kind = dtype.name.lower()
    return ResvitError(
        f"The image {image.name} is {kind}, and {where} reads it as such.",
        "Export the network with a float32 image, or with a Cast to float32 as the first thing that reads the image.",
    )


def _is_channels_last(image: ir.Value) -> bool:
    """Whether an image is [B, H, W, C]: the graph turns it itself, or no other order makes sense of its sizes."""
    readers = [use.node for use in image.uses() if use.node.op_type != "Shape"]
    if readers and all(_perm(node) == _TO_FIRST for node in readers):
        return True
    shape = image.shape
    assert shape is not None
    first, last = shape[1], shape[3]
    if not isinstance(last, int) or not 1 <= last <= _FEWEST or (isinstance(first, int) and first <= _FEWEST):
        return False
    return not any(_reads_channels_first(node, first) for node in readers)


def _reads_channels_first(node: ir.Node, channels: object) -> bool:
    """Whether a convolution takes the second axis for the channels."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type != "Conv" or weight is None or weight.shape is None:
        return False
    size, groups = weight.shape[1], node.attributes.get_int("group", 1)
    return isinstance(size, int) and size * groups == channels


def _put_channels_first(graph: ir.Graph, image: ir.Value) -> None:
    """Let the image be [B, C, H, W], and whoever reads it in the other order read it turned."""
    assert image.shape is not None
    batch, height, width, channels = image.shape
    old = ir.Shape([batch, height, width, channels])
    uses = [(use.node, use.idx) for use in image.uses()]
    image.shape = ir.Shape([batch, channels, height, width])
    turn = ir.node("Transpose", [image], {"perm": _TO_LAST}, name=f"{image.name}/Transpose")
    turned = turn.outputs[0]
    turned.name, turned.shape, turned.type = f"{image.name}/channels_last", old, image.type
    for node, index in uses:
        if _perm(node) == _TO_FIRST and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(image)
            graph.remove(node, safe=True)
        else:
            node.replace_input_with(index, turned)
    if turned.uses():
        graph.insert_before(graph[0], turn)


def _perm(node: ir.Node) -> list[int] | None:
    if node.op_type != "Transpose" or node.domain:
        return None
    return list(node.attributes.get_ints("perm", []))
