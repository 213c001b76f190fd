"""Which tensors of an ONNX graph are activations, and what there is to measure of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_SHAPES = {"Shape", "Size"}
_SAME_VALUES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
# Minus infinity in front of these is a mask or a padding, and no fault.
_TAKES_MASKS = {"LogSoftmax", "MaxPool", "Softmax"}
_HANDS_MASKS_ON = _SAME_VALUES | {"Add", "Cast", "Concat", "Expand", "Gather", "Slice", "Where"}
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# What certainly turns a NaN anywhere in its input into one in its output. Kernels of Relu, Clip, Softmax, Gelu and
# the like clamp, and clamping drops NaN; so do slicing and pooling.
_KEEPS_NAN = _SAME_VALUES | {
    *("Add", "BatchNormalization", "Cast", "Concat", "Conv", "ConvTranspose", "Div", "Gemm"),
    *("GlobalAveragePool", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "MatMul", "Mul"),
    *("ReduceMean", "ReduceSum", "Sub"),
}


class ActivationPlan:
    """Which tensors to measure, sum and sample.

    ``channel_axes`` names the tensors that products and residuals read, with the axis of their channels, or None
    where the rank decides; ``perms`` the permutations of transposed tensors (empty: all axes reversed). ``inputs`` are
    what is fed: an activation is whatever is computed from one of them.
    """

    def __init__(self, graph: onnx.GraphProto, inputs: list[str], types: dict[str, int], ranks: dict[str, int]) -> None:
        floats = float_types()
        self.types, self.ranks = types, ranks
        self.derived: dict[str, tuple[str, bool]] = {}
        measured = [name for name in inputs if types.get(name) in floats]
        self.inputs = tuple(measured)
        self.producer = {name: "the graph input" if len(inputs) == 1 else f"the input {name}" for name in measured}
        alive = {*inputs}  # computed from the values of an input, not from its shape
        made_by: dict[str, str] = {}
        for node in graph.node:
            if node.op_type in _SHAPES or alive.isdisjoint(_reads(node)):
                continue
            for position, name in enumerate(node.output):
                if not name:
                    continue
                alive.add(name)
                made_by[name] = node.op_type
                if types.get(name) not in floats:
                    continue
                source = node.input[0] if node.input else ""
                relu = node.op_type == "Relu"
                if position == 0 and (relu or node.op_type in _SAME_VALUES) and source in self.producer:
                    self.derived[name] = (source, relu)
                elif position == 0 and (relu or node.op_type in _SAME_VALUES) and source in self.derived:
                    root, through_relu = self.derived[source]
                    self.derived[name] = (root, through_relu or relu)
                else:
                    measured.append(name)
                    self.producer[name] = f"node {node.name or '(unnamed)'} ({node.op_type})"
        self.measured = tuple(measured)
        known = {*measured, *self.derived}
        self.aliases = {
            node.output[0]: node.input[0]
            for node in graph.node
            if node.op_type in _SAME_VALUES and node.input[0] in known and node.output[0] in known
        }
        self.perms = {
            node.output[0]: next((tuple(a.ints) for a in node.attribute if a.name == "perm"), ())
            for node in graph.node
            if node.op_type == "Transpose" and node.output[0] in self.aliases
        }
        wanted: dict[str, None] = {}
        axes: dict[str, set[int | None]] = {}
        for node in graph.node:
            read = [name for name in _quantizable_inputs(node, made_by) if name in known]
            wanted.update(dict.fromkeys(map(self.root, read)))
            for name in read:
                axis = _channel_axis(node, name)
                # A product of two activations has no weights: what its channels hold helps nobody.
                if node.op_type == "Add" or sum(other in alive for other in node.input[:2]) == 1:
                    axes.setdefault(name, set()).add(axis)
        self.channel_axes = {name: next(iter(found)) if len(found) == 1 else None for name, found in axes.items()}
        self.sampled = tuple(wanted)
        self.masked = _masked_tensors(graph, self.measured)
        self.summed = _nan_checkpoints(graph, self)

    def root(self, name: str) -> str:
        """The first tensor in the chain of reshapes and transposes that holds the values of ``name``."""
        while name in self.aliases:
            name = self.aliases[name]
        return name


def _quantizable_inputs(node: onnx.NodeProto, made_by: dict[str, str]) -> list[str]:
    """The activations that Q/DQ may go on: inputs of weighted nodes, and of an Add that a convolution feeds."""
    if node.op_type in _WEIGHTED:
        return list(node.input[:2])
    if node.op_type == "Add" and any(made_by.get(name, "").startswith("Conv") for name in node.input):
        return list(node.input)
    return []


def _channel_axis(node: onnx.NodeProto, name: str) -> int | None:
    """The axis of ``name`` that the node sums over; None for an Add, where the rank decides."""
    if node.op_type == "Add":
        return None
    if node.op_type not in ("Gemm", "MatMul"):
        return 1
    turned = {a.name for a in node.attribute if a.name in ("transA", "transB") and a.i}
    if name == node.input[0]:
        return -2 if "transA" in turned else -1
    return -1 if "transB" in turned else -2


def _nan_checkpoints(graph: onnx.GraphProto, plan: ActivationPlan) -> tuple[str, ...]:
    """Measured tensors whose sums together catch every NaN: those read by what may drop one, or by nothing."""
    kept = dict.fromkeys((*plan.measured, *plan.derived), True)
    read: set[str] = set()
    for node in graph.node:
        if node.op_type in _SHAPES:
            continue
        strided = any(step > 1 for a in node.attribute if a.name == "strides" for step in a.ints)
        safe = node.op_type in _KEEPS_NAN and not strided
        for name in _reads(node):
            read.add(name)
            if not safe:
                kept[name] = False
    leaky = {name for name in kept if not kept[name] or name not in read}
    # A reshaped tensor is checked at its source; what comes after a Relu has been checked in front of it.
    leaky = {plan.derived[name][0] if name in plan.derived else name for name in leaky}
    return tuple(name for name in plan.measured if name in leaky)


def _masked_tensors(graph: onnx.GraphProto, measured: tuple[str, ...]) -> frozenset[str]:
    """Measured tensors that nothing reads but operators for which minus infinity means "not here".

    Directly, or as a mask on its way there: added to scores, chosen by another mask, moved. Scores themselves, which a
    product makes, are no mask: of them only the sum with one may be minus infinity.
    """
    takers: dict[str, bool] = {output.name: False for output in graph.output}
    made_by = {name: node for node in graph.node for name in node.output if name}
    for node in reversed(graph.node):
        passes = node.op_type in _HANDS_MASKS_ON and all(takers.get(name, False) for name in node.output if name)
        for name in _reads(node):
            maker = made_by.get(name)
            scores = maker is None or maker.op_type in _WEIGHTED
            takes = node.op_type in _TAKES_MASKS or (passes and not scores)
            takers[name] = takers.get(name, True) and takes
    return frozenset(name for name in measured if takers.get(name, False))


def types_and_ranks(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, int]]:
    """Element type and rank of the values, from the model's own records or else by ONNX's shape inference."""
    import onnx

    def recorded(graph: onnx.GraphProto) -> tuple[dict[str, int], dict[str, int]]:
        values = [(v.name, v.type.tensor_type) for v in (*graph.input, *graph.value_info, *graph.output)]
        types = {name: kind.elem_type for name, kind in values if kind.elem_type}
        return types, {name: len(kind.shape.dim) for name, kind in values if kind.HasField("shape")}

    types, ranks = recorded(model.graph)
    written = {name for node in model.graph.node for name in node.output if name}
    if written <= types.keys():
        return types, ranks
    return recorded(onnx.shape_inference.infer_shapes(model).graph)


def float_types() -> tuple[int, ...]:
    """ONNX's codes of the element types that are measured: FP32 and FP16."""
    from onnx import TensorProto

    return TensorProto.FLOAT, TensorProto.FLOAT16


def _reads(node: onnx.NodeProto) -> list[str]:
    """What a node reads, and what its branches may capture."""
    inner = (name for a in node.attribute if a.HasField("g") for child in a.g.node for name in _reads(child))
    return [name for name in (*node.input, *inner) if name]
