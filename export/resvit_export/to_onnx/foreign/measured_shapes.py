"""Shapes that no inference tells and every run agrees on: what is reshaped by sizes that the graph computes itself.

A TorchScript export of a free batch reads sizes from tensors, computes with them, and reshapes by the result. Behind
the first such Reshape ONNX's inference knows nothing: tests of sizes stay undecided, and chains of sizes computed. No
image decides them, so runs at two batches tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

_BY_VALUES = frozenset({"NonZero", "NonMaxSuppression", "Unique", "Compress", "If", "Loop", "Scan"})
"""What gives as much as there is, or what hangs on a decision."""
_SIZES: dict[str, Sequence[int]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "TopK", "OneHot", "Squeeze", "Unsqueeze", "Split", "DFT"), (1,)),
    **dict.fromkeys(("AffineGrid", "CenterCropPad", "SplitToSequence", "SequenceAt", "Upsample"), (1,)),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "MaxUnpool": (2,),
    "Col2Im": (1, 2),
    "STFT": (1, 3),
    "BlackmanWindow": (0,),
    "HannWindow": (0,),
}
"""Inputs whose values decide the size of what an operator gives; of reductions it is the second."""
_BATCHES = (2, 3)
_LARGEST = 1 << 30
"""Bytes of weights above which nothing is run."""


def measure_shapes(model: ir.Model) -> int:
    """Fill in, in place, the shapes that are the same in every run, the batch left free; returns how many changed.

    Only values are taken on whose size no image has a say. Graphs with free sizes besides the batch stay as they are.
    """
    graph = model.graph
    free = _free_batch(graph)
    if free is None or _weights(graph) > _LARGEST:
        return 0
    wanted = [value for value in _decided_by_sizes(graph) if not _is_known(value, free)]
    if not wanted:
        return 0
    one, other = (_shapes(graph, wanted, batch) for batch in (_BATCHES if free else (1, 1)))
    count = 0
    for value in wanted:
        if value not in one or value not in other or len(one[value]) != len(other[value]):
            continue
        pairs = zip(one[value], other[value], strict=True)
        dims: list[int | str | ir.SymbolicDim | None] = [
            free if free and pair == _BATCHES else pair[0] if pair[0] == pair[1] else None for pair in pairs
        ]
        old = list(value.shape) if value.shape is not None else None
        if old is not None and len(old) == len(dims):
            dims = [new if new is not None else had for new, had in zip(dims, old, strict=True)]
        if old != dims and any(dim is not None for dim in dims):
            value.shape = ir.Shape(dims)
            count += list(value.shape) != old
    return count


def _free_batch(graph: ir.Graph) -> str | None:
    """The name of the batch, empty for a fixed one; None where another size is free, or there is no batch."""
    names = set()
    for value in graph.inputs:
        if value.shape is None or not len(value.shape) or not all(isinstance(size, int) for size in value.shape[1:]):
            return None
        first = value.shape[0]
        names.add("" if isinstance(first, int) else str(first.value))
    return names.pop() if len(names) == 1 else None


def _weights(graph: ir.Graph) -> int:
    return sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)


def _is_known(value: ir.Value, free: str) -> bool:
    return value.shape is not None and all(isinstance(size, int) or size.value == free for size in value.shape)


def _decided_by_sizes(graph: ir.Graph) -> list[ir.Value]:
    """Values whose shapes hang on no image: on the inputs' shapes, and on constants."""
    valued: set[ir.Value] = set(graph.inputs)
    sized: set[ir.Value] = set()
    """Values that an image decides, and those whose sizes it does."""
    found = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        places = _SIZES.get(node.op_type, (1,) if node.op_type.startswith("Reduce") else ())
        deciding = [node.inputs[place] for place in places if place < len(node.inputs)]
        tells = node.op_type in ("Shape", "Size")  # as many numbers as the tensor has axes, whatever it holds
        by_image = not tells and (
            bool(node.domain)
            or node.op_type in _BY_VALUES
            or any(value in sized for value in inputs)
            or any(value in valued for value in deciding)
        )
        through = sized if tells else valued
        for value in node.outputs:
            if by_image:
                sized.add(value)
            elif value.name:
                found.append(value)
            if by_image or any(one in through for one in inputs) or (not inputs and "Random" in node.op_type):
                valued.add(value)
    return found


def _shapes(graph: ir.Graph, values: Sequence[ir.Value], batch: int) -> dict[ir.Value, tuple[int, ...]]:
    """What shapes the values have in a run on random numbers; none of a graph that does not run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    random = np.random.default_rng(0)
    feeds = {}
    for value in graph.inputs:
        shape = [batch if not isinstance(size, int) else size for size in value.shape or ()]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        numbers = random.standard_normal(shape) if np.issubdtype(dtype, np.floating) else np.ones(shape)
        feeds[str(value.name)] = numbers.astype(dtype)
    try:
        part = ir.Model(ir.convenience.extract(graph, list(graph.inputs), list(values)), ir_version=10)
        proto = ir.serde.serialize_model(part)
        _answer_with_shapes(proto.graph)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        read = {item.name for item in session.get_inputs()}
        found = session.run(None, {name: feeds[name] for name in feeds if name in read})
    except Exception:  # noqa: BLE001  # what does not run is refused by those who run it next
        return {}
    return {value: tuple(shape.tolist()) for value, shape in zip(values, found, strict=True)}


def _answer_with_shapes(graph: onnx.GraphProto) -> None:
    """Let a graph answer with its outputs' shapes alone: all activations at once are more than a machine may hold."""
    names = [value.name for value in graph.output]
    del graph.output[:]
    for index, name in enumerate(names):
        graph.node.append(onnx.helper.make_node("Shape", [name], [f"measured shape {index}"]))
        graph.output.append(onnx.helper.make_tensor_value_info(f"measured shape {index}", TensorProto.INT64, [None]))
