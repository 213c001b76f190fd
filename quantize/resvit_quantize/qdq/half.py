"""FP32 graphs to FP16, node by node, leaving FP32 what FP16 cannot hold.

A node turns to FP16 where its operator's schema allows it and all that it reads and writes fits. Q, DQ and Cast
have no precision of their own: Q takes its input's, DQ and Cast their consumers'. Graph inputs and outputs stay
FP32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resvit_quantize.graph.network import add_initializer, all_nodes, constant, infer_types
from resvit_quantize.graph.schema import Slots, half_slots, holds_graph, is_float, is_opaque
from resvit_quantize.placement.grid import is_beyond_half
from resvit_quantize.qdq.guards import FP16_MAX, FP16_TINY, guarded_nodes

HEADROOM = 2.0
"""Images that calibration did not see may reach this much further."""
WEIGHT_ERROR = 1e-3
"""Largest relative L2 error of a weight's FP16 copy; plain rounding gives 2e-4."""
_FLEXIBLE = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})
_LINEAR = frozenset({"MatMul", "Gemm"})
_WITH_BIAS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "LayerNormalization", "GroupNormalization", "InstanceNormalization"}
)


@dataclass(frozen=True)
class KeptFloat:
    """A node that stays FP32, and why."""

    name: str
    reason: str


def half_from_network(model: ir.Model, largest: Mapping[str, float]) -> tuple[KeptFloat, ...]:
    """Convert in place; ``largest`` gives the largest magnitude seen in each tensor, where known, by name."""
    infer_types(model)
    conversion = _Conversion(model, largest)
    kept = conversion.decide()
    conversion.convert()
    return kept


class _Conversion:
    def __init__(self, model: ir.Model, largest: Mapping[str, float]) -> None:
        self.model = model
        self.largest = largest
        self.slots: dict[ir.Node, Slots] = {}
        """The nodes that turn to FP16."""
        self.half: set[ir.Value] = set()
        """The computed values that turn to FP16."""
        self.copies: dict[tuple[ir.Value, bool], ir.Value] = {}
        self.from_shapes = _shape_arithmetic(model)
        self.guarded = guarded_nodes(model)

    def decide(self) -> tuple[KeptFloat, ...]:
        """Choose the nodes and values that turn to FP16; returns the other nodes that touch floats."""
        kept: list[KeptFloat] = []
        for node in all_nodes(self.model):
            if not any(is_float(v) for v in (*node.inputs, *node.outputs)) or self._flexible(node):
                continue
            slots = half_slots(node, self.model.graph.opset_imports)
            reason = self._why_float(node, slots)
            if reason is None and isinstance(slots, Slots):
                self.slots[node] = slots
                floats = zip(node.outputs, slots.outputs, strict=True)
                self.half.update(value for value, may in floats if may and is_float(value))
            else:
                kept.append(KeptFloat(str(node.name), str(reason)))
        kept += self._joined()
        for node in self.model.graph:
            if not self._flexible(node) or not is_float(node.outputs[0]):
                continue
            cast_fits = node not in self.from_shapes and self._overflow(node.outputs[0]) is None
            wanted = any(self._reads_half(use.node, use.idx) for use in node.outputs[0].uses())
            if wanted and (node.op_type == "DequantizeLinear" or cast_fits):
                self.half.add(node.outputs[0])
        return tuple(kept)

    def _joined(self) -> Iterator[KeptFloat]:
        """Leave linear layers FP32 that read one 8-bit tensor with one that stays so.

        Builders make one product of them (TensorRT for RTX 1.7 ends in a fault where they write different types).
        """
        for dequantize in [node for node in self.model.graph if node.op_type == "DequantizeLinear"]:
            readers = [use.node for use in dequantize.outputs[0].uses() if use.idx == 0]
            linear = [node for node in readers if node.op_type in _LINEAR and not node.domain]
            wide = [str(node.name) for node in linear if node not in self.slots]
            for node in linear if wide else ():
                if node in self.slots:
                    self.half -= set(node.outputs)
                    del self.slots[node]
                    yield KeptFloat(str(node.name), f"it is one product with '{wide[0]}', which stays FP32")

    def convert(self) -> None:
        """Change types, insert casts where FP16 meets FP32, and copy constants."""
        nodes = list(all_nodes(self.model))
        floats = {v for node in nodes for v in node.inputs if is_float(v)}
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value not in floats or value is None or (self._flexible(node) and node.op_type == "Cast"):
                    continue
                wanted = self._wanted(node, index)
                if wanted != (value in self.half):
                    node.replace_input_with(index, self._copy(value, wanted))
            self._retype_attributes(node)
        for value in self.half:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        self._restore_outputs()
        self._drop_replaced_constants()

    def _flexible(self, node: ir.Node) -> bool:
        return node.op_type in _FLEXIBLE and not node.domain and node.graph is self.model.graph

    def _reads_half(self, node: ir.Node, index: int) -> bool:
        return node in self.slots and self.slots[node].inputs[index]

    def _wanted(self, node: ir.Node, index: int) -> bool:
        """Whether input ``index`` is to be FP16."""
        if not self._flexible(node):
            return self._reads_half(node, index)
        if node.op_type == "DequantizeLinear":
            return node.outputs[0] in self.half
        return node.inputs[0] in self.half and _scale_loss(node) is None

    def _why_float(self, node: ir.Node, slots: Slots | str) -> str | None:
        if node.graph is not self.model.graph:
            return "inside a subgraph"
        if holds_graph(node):
            return f"{node.op_type} holds a subgraph"
        if isinstance(slots, str):
            return slots
        if node in self.from_shapes:
            return "arithmetic on shapes"
        if node in self.guarded:
            return self.guarded[node]
        if any(is_opaque(v) for v in (*node.inputs, *node.outputs)):
            return "reads or writes something of another kind than a tensor"
        for index, (value, may) in enumerate(zip(node.inputs, slots.inputs, strict=True)):
            if value is None or not may or not is_float(value):
                continue
            array = constant(value)
            if array is None and (reason := self._overflow(value)):
                return f"tensor '{value.name}' {reason}"
            if array is not None and (reason := _constant_loss(array, _is_bias(node, index, array))):
                return f"constant '{value.name}' {reason}"
        for value, may in zip(node.outputs, slots.outputs, strict=True):
            if may and is_float(value) and (reason := self._overflow(value)):
                return f"tensor '{value.name}' {reason}"
        return None

    def _overflow(self, value: ir.Value) -> str | None:
        """Why FP16 cannot hold an activation."""
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            scale = constant(producer.inputs[1])
            if (reason := _scale_loss(producer)) is not None:
                return reason
            grid = 128.0 if producer.inputs[0] and producer.inputs[0].dtype == ir.DataType.INT8 else 448.0
            largest = 0.0 if scale is None else float(scale.max()) * grid
            return f"is clipped at {largest:.4g}; FP16 ends at 65504" if largest > FP16_MAX else None
        if str(value.name) not in self.largest:  # made since images were seen, as what shifts a tensor: its Q knows
            return next(filter(None, (_scale_loss(use.node) for use in value.uses() if use.idx == 0)), None)
        largest = self.largest[str(value.name)]
        if largest * HEADROOM > FP16_MAX:
            return f"reaches {largest:.4g}; FP16 ends at 65504, and other images may reach {HEADROOM:g}x further"
        return f"stays within {largest:.3g}, where FP16 loses digits" if 0 < largest < FP16_TINY else None

    def _copy(self, value: ir.Value, half: bool) -> ir.Value:
        """``value`` in the other precision: a converted constant, or a Cast right behind its producer."""
        if (value, half) in self.copies:
            return self.copies[value, half]
        suffix = "fp16" if half else "fp32"
        array, producer = constant(value), value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            copy = self._dequantized_anew(producer, f"{value.name}/{suffix}", half)
        elif array is not None:
            copy = add_initializer(self.model, f"{value.name}/{suffix}", array.astype(np.float16))
        else:
            copy = self._cast(value, f"{value.name}/{suffix}", half)
        self.copies[value, half] = copy
        return copy

    def _cast(self, value: ir.Value, name: str, half: bool) -> ir.Value:
        dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/Cast")
        node.outputs[0].name, node.outputs[0].shape = name, value.shape
        node.outputs[0].type = ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], node)
        else:
            self.model.graph.insert_after(producer, node)
        return node.outputs[0]

    def _dequantized_anew(self, node: ir.Node, name: str, half: bool) -> ir.Value:
        """The same 8-bit values in the other precision; a Cast behind would part them from their reader."""
        stored, scale, *zero = node.inputs
        array = constant(scale)
        if array is None:
            return self._cast(node.outputs[0], name, half)
        own = add_initializer(self.model, f"{name}/scale", array.astype(np.float16 if half else np.float32))
        made = ir.node("DequantizeLinear", [stored, own, *zero], node.attributes.copy(), name=f"{name}/{node.op_type}")
        made.metadata_props.update(node.metadata_props)
        made.outputs[0].name, made.outputs[0].shape = name, node.outputs[0].shape
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
        self.model.graph.insert_after(node, made)
        return made.outputs[0]

    def _retype_attributes(self, node: ir.Node) -> None:
        if not node.outputs or node.outputs[0] not in self.half:
            return
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
        elif node.op_type == "ConstantOfShape":
            value = node.attributes.get("value")
            array = np.zeros(1) if value is None else value.as_tensor().numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array.astype(np.float16)))

    def _restore_outputs(self) -> None:
        """Give FP16 graph outputs a Cast, so that name and type outside stay as they were."""
        for index, value in enumerate(self.model.graph.outputs):
            if value in self.half:
                name = str(value.name)
                value.name = f"{name}/fp16"
                self.model.graph.outputs[index] = self._cast(value, name, half=False)

    def _drop_replaced_constants(self) -> None:
        initializers = self.model.graph.initializers
        for (value, _), copy in self.copies.items():
            if constant(value) is None or value.uses() or value.is_graph_output():
                continue
            name = str(value.name)
            del initializers[name]
            del initializers[str(copy.name)]
            copy.name = name
            self.model.graph.register_initializer(copy)


def _scale_loss(node: ir.Node) -> str | None:
    """Why FP16 cannot hold the scale of a Q or DQ."""
    scale = constant(node.inputs[1]) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
    if scale is None or not is_beyond_half(scale):
        return None
    return f"is quantised in steps of {float(scale.min()):.3g}, which FP16 cannot hold"


def _shape_arithmetic(model: ir.Model) -> set[ir.Node]:
    """Nodes that compute floats from shapes alone: FP16 counts exactly only to 2048."""
    static: set[ir.Value] = set()
    counted: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None and constant(v) is None]
        if node.op_type not in ("Shape", "Size") and not (inputs and all(v in static for v in inputs)):
            continue
        static.update(node.outputs)
        starts = node.op_type in ("Cast", "Range") and is_float(node.outputs[0])
        if starts or any(v in counted for v in inputs):
            found.add(node)
            counted.update(v for v in node.outputs if is_float(v))
    return found


def _is_bias(node: ir.Node, index: int, array: np.ndarray) -> bool:
    """Whether a constant is added to something of its channel's size, so that its small digits do not count."""
    return (node.op_type in _WITH_BIAS and index == 2) or (node.op_type == "Add" and array.size > 1)


def _constant_loss(array: np.ndarray, is_bias: bool) -> str | None:
    """Why FP16 cannot hold a constant; infinities are exact in both."""
    finite = np.abs(array[np.isfinite(array)]).astype(np.float64)
    largest = float(finite.max(initial=0.0))
    if largest > FP16_MAX:
        return f"holds {largest:.4g}; FP16 ends at 65504"
    if largest == 0.0 or is_bias:
        return None
    if largest < FP16_TINY:
        return f"stays within {largest:.3g}, where FP16 loses digits"
    loss = float(np.linalg.norm(finite - finite.astype(np.float16)) / np.linalg.norm(finite))
    return f"loses {loss:.2%} of its norm in FP16" if loss > WEIGHT_ERROR else None
