"""What no image reaches, computed once: position codes and masks that a network makes anew at every call.

Libraries write a network for photos of any size: a mask of ones, its running sums as coordinates, their sines as
position codes, and a Where behind every attention product. Of one input size all of that is constant. Left in the
graph it runs in FP16 at every call, and hides attention from the builder's fusions and from ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
_LARGEST = 64 << 20
"""Bytes of a constant; what is larger stays computed."""
_SIZES = (2, 3)
"""Batches at which a value must be one image's value repeated, to be taken as the same for every image."""


def fold_islands(model: ir.Model) -> int:
    """Replace in place what depends on no image by constants, and drop masks that hide nothing; returns how many.

    With a free batch, what is the same for every image becomes the constant of one, expanded to the batch.
    """
    island = Island(model.graph)
    values = island.frontier()
    count = 0
    if values:
        first, second = (island.evaluate(values, batch) for batch in (_SIZES if island.free else (1, 1)))
        for value in values:
            count += island.replace(model, value, first[value], second[value])
    return count + drop_idle_masks(model)


def drop_idle_masks(model: ir.Model) -> int:
    """Take out every Where whose condition is the same everywhere; returns how many."""
    count = 0
    for node in list(model.graph):
        always = _always(node.inputs[0]) if node.op_type == "Where" and not node.domain else None
        if always is None:
            continue
        taken, result = node.inputs[1 if always else 2], node.outputs[0]
        if taken is None or taken.shape is None or taken.shape != result.shape or result.is_graph_output():
            continue
        result.replace_all_uses_with(taken)
        model.graph.remove(node, safe=True)
        count += 1
    return count


class Island:
    """The nodes of a graph that no content of an input reaches; shapes may, where all but the batch is known."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self.shapes: dict[ir.Value, ir.Shape] = {}
        """Of each value that a Shape node gives, the shape that it reads."""
        self.free: str | None = None
        """The batch's name, where it may vary."""
        sizes = [value.shape[0] for value in graph.inputs if value.shape is not None]
        if sizes and not isinstance(sizes[0], int):
            self.free = str(sizes[0].value)
        made: set[ir.Value] = set()
        for node in graph:
            if node.op_type == "Shape" and not node.domain and self._known(node.inputs[0]):
                self.shapes[node.outputs[0]] = node.inputs[0].shape  # type: ignore[union-attr, assignment]
                made.update(node.outputs)
            elif self._inside(node, made):
                self.nodes.append(node)
                made.update(node.outputs)

    def frontier(self) -> list[ir.Value]:
        """What the rest of the graph reads: floats and masks, of a free batch; anything, of a fixed one."""
        own = set(self.nodes)
        kinds = (ir.DataType.FLOAT, ir.DataType.BOOL)
        return [
            value
            for node in self.nodes
            for value in node.outputs
            if any(use.node not in own for use in value.uses())
            and not value.is_graph_output()
            and (self.free is None or (value.dtype in kinds and self._batched(value) is not None))
        ]

    def evaluate(self, values: Sequence[ir.Value], batch: int) -> dict[ir.Value, np.ndarray]:
        """What the values are at a batch, computed by ONNX Runtime."""
        import onnxruntime

        part = ir.convenience.extract(self.graph, list(self.shapes), values)
        model = ir.Model(part, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            ir.serde.serialize_model(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        needed = {item.name for item in session.get_inputs()}
        feeds = {str(v.name): self._sizes(v, batch) for v in self.shapes if v.name in needed}
        return dict(zip(values, session.run([value.name for value in values], feeds), strict=True))

    def replace(self, model: ir.Model, value: ir.Value, first: np.ndarray, second: np.ndarray) -> bool:
        """Put a constant in the value's place, unless it is large or differs from image to image."""
        batched = self.free is not None and self._batched(value)
        one = first[:1] if batched else first
        if self.free is not None and not all(
            np.array_equal(np.broadcast_to(one, array.shape) if batched else one, array) for array in (first, second)
        ):
            return False
        if one.nbytes > _LARGEST:
            return False
        constant = ir.Value(name=f"{value.name}/constant", const_value=ir.tensor(one))
        constant.shape, constant.type = ir.Shape(one.shape), value.type
        self.graph.register_initializer(constant)
        if not batched:
            value.replace_all_uses_with(constant)
            return True
        producer = value.producer()
        assert producer is not None
        target = self._target(model, one.shape)
        expand = ir.node("Expand", [constant, target], name=f"{value.name}/Expand")
        expand.outputs[0].name, expand.outputs[0].shape = f"{value.name}/expanded", value.shape
        expand.outputs[0].type = value.type
        self.graph.insert_after(producer, expand)
        value.replace_all_uses_with(expand.outputs[0])
        return True

    def _target(self, model: ir.Model, shape: tuple[int, ...]) -> ir.Value:
        """The shape of one image's constant with the batch of the graph's input in front: a node for it."""
        source, graph = self.graph.inputs[0], model.graph
        name = "x".join(map(str, shape))
        for node in graph:
            if node.name == f"batch/{name}/Concat":
                return node.outputs[0]
        rest = ir.Value(name=f"batch/{name}/rest", const_value=ir.tensor(np.array(shape[1:], np.int64)))
        rest.shape, rest.type = ir.Shape([len(shape) - 1]), ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(rest)
        size = ir.node("Shape", [source], {"start": 0, "end": 1}, name=f"batch/{name}/Shape")
        whole = ir.node("Concat", [size.outputs[0], rest], {"axis": 0}, name=f"batch/{name}/Concat")
        for node, count in ((size, 1), (whole, len(shape))):
            node.outputs[0].name, node.outputs[0].shape = f"{node.name}_output", ir.Shape([count])
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        graph.insert_before(graph[0], [size, whole])
        return whole.outputs[0]

    def _inside(self, node: ir.Node, made: set[ir.Value]) -> bool:
        plain = not any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        inputs = [value for value in node.inputs if value is not None]
        return plain and node.op_type not in _RANDOM and all(v in made or v.const_value is not None for v in inputs)

    def _known(self, value: ir.Value | None) -> bool:
        """Whether all sizes but the batch are numbers."""
        if value is None or value.shape is None:
            return False
        return all(isinstance(size, int) or size.value == self.free for size in value.shape)

    def _batched(self, value: ir.Value) -> bool | None:
        """Whether the first size is the batch; None where that cannot be told, or another size depends on it."""
        if value.shape is None or len(value.shape) < 1:
            return None
        first, *others = value.shape
        if not all(isinstance(size, int) for size in others):
            return None
        return False if isinstance(first, int) else (True if first.value == self.free else None)

    def _sizes(self, made: ir.Value, batch: int) -> np.ndarray:
        """What the Shape node that gives ``made`` gives at a batch."""
        node = made.producer()
        assert node is not None
        sizes = [size if isinstance(size, int) else batch for size in self.shapes[made]]
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(sizes))
        return np.array(sizes[start:end], np.int64)


def _always(value: ir.Value | None) -> bool | None:
    """What a condition is everywhere, as a constant or one that is expanded; None where it is not one thing."""
    if value is None:
        return None
    if value.const_value is not None:
        array = value.const_value.numpy()
        return bool(array.flat[0]) if array.size and (array == array.flat[0]).all() else None
    producer = value.producer()
    return _always(producer.inputs[0]) if producer is not None and producer.op_type == "Expand" else None
