"""Control flow that nothing in an image decides, taken out: one branch of an If, and a Loop of known length.

The old exporter writes an If for ``squeeze`` that tests a size, and a Loop for a ``for`` over a known range. Of one
input size the outcome is known. What does depend on values stays, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from resvit_engines.errors import ResvitError
from resvit_export.to_onnx.constant_islands import Island

_BATCHES = (1, 2, 3)
"""A test is known where it has the same outcome at each of these batches."""
_MOST_TURNS = 64
_MOST_NODES = 100_000
_ROUNDS = 64


def take_known_branches(model: ir.Model, more_shapes: Callable[[ir.Model], int] | None = None) -> int:
    """Replace in place every If and Loop that no image decides by what it computes; returns how many.

    Those inside the taken branch follow. Shapes are inferred anew after each round; where they decide nothing any
    more, ``more_shapes`` is asked to fill in others.
    """
    from resvit_export.to_onnx.canonical import infer_shapes

    count = 0
    for _ in range(_ROUNDS):
        known = _known_nodes(model.graph)
        for node, decided in known:
            if len(model.graph) > _MOST_NODES:
                raise ResvitError(
                    f"Written out, the graph's loops are over {_MOST_NODES:,} operators.",
                    "Export the network with operations on whole tensors in place of loops.",
                )
            if node.op_type == "If":
                _take_branch(model.graph, node, bool(decided.item()))
            else:
                _unroll(model.graph, node, int(decided.item()))
            count += 1
        infer_shapes(model)
        if not known and (more_shapes is None or not _has_branches(model.graph) or not more_shapes(model)):
            return count
    return count


def _has_branches(graph: ir.Graph) -> bool:
    return any(node.op_type in ("If", "Loop") and not node.domain for node in graph)


def refuse_branches(model: ir.Model) -> None:
    """Raise ``ResvitError`` where control flow is left in the graph."""
    for node in model.graph:
        if any(value.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for value in node.attributes.values()):
            if node.op_type == "Scan":
                raise ResvitError(
                    f"The graph holds a loop over one of its axes: Scan '{_name(node)}'.",
                    "Export the network with operations on whole tensors in its place, or as an LSTM or GRU where it "
                    "is one.",
                )
            raise ResvitError(
                f"The graph holds control flow that depends on values: {node.op_type} '{_name(node)}'.",
                "Let the network compute both ways and choose by torch.where, or decide before it is exported.",
            )


def _known_nodes(graph: ir.Graph) -> list[tuple[ir.Node, np.ndarray]]:
    """Each If with its condition and each Loop with its number of turns, where these are known."""
    deciding = {
        node: [value for value in node.inputs[: 1 if node.op_type == "If" else 2] if value is not None]
        for node in graph
        if node.op_type in ("If", "Loop") and not node.domain
    }
    if not deciding:
        return []
    island = Island(graph)
    inside = {value for node in island.nodes for value in node.outputs} | set(island.shapes)
    wanted = [v for values in deciding.values() for v in values if v in inside and v.const_value is None]
    wanted = list(dict.fromkeys(wanted))
    seen: dict[ir.Value, np.ndarray] = {}
    if wanted:
        first, *others = [island.evaluate(wanted, batch) for batch in (_BATCHES if island.free else _BATCHES[:1])]
        seen = {v: first[v] for v in wanted if all(np.array_equal(first[v], other[v]) for other in others)}
    found: list[tuple[ir.Node, np.ndarray]] = []
    for node, values in deciding.items():
        arrays = [v.const_value.numpy() if v.const_value is not None else seen.get(v) for v in values]
        known = [array for array in arrays if array is not None and array.size == 1]
        if len(known) < len(values) or node.inputs[0] is None:
            continue
        if node.op_type == "If" or _runs_through(node, known):
            found.append((node, known[0]))
    return found


def _runs_through(node: ir.Node, known: list[np.ndarray]) -> bool:
    """Whether a Loop takes all its turns: its condition is true at first, and each turn hands on that or true."""
    if int(known[0].item()) > _MOST_TURNS or (len(known) > 1 and not bool(known[1].item())):
        return False
    body = node.attributes["body"].as_graph()
    value: ir.Value | None = body.outputs[0]
    while value is not None and value is not body.inputs[1]:
        if value.const_value is not None:
            return bool(value.const_value.numpy().all())
        producer = value.producer()
        if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
            return bool(producer.attributes["value"].as_tensor().numpy().all())
        value = producer.inputs[0] if producer is not None and producer.op_type in ("Identity", "Cast") else None
    return value is not None


def _take_branch(graph: ir.Graph, node: ir.Node, condition: bool) -> None:
    branch = node.attributes["then_branch" if condition else "else_branch"].as_graph()
    results = _moved(graph, node, branch, _name(node))
    _put(graph, node, results)


def _unroll(graph: ir.Graph, node: ir.Node, turns: int) -> None:
    whole = node.attributes["body"].as_graph()
    carried = list(node.inputs[2:])
    scanned: list[list[ir.Value]] = []
    for turn in range(turns):
        body = whole.clone(allow_outer_scope_values=True)
        name = f"{_name(node)}/{turn}"
        number = _constant(graph, f"{name}/number", np.array(turn, np.int64))
        true = _constant(graph, f"{name}/condition", np.array(True))
        for own, given in zip(body.inputs, [number, true, *carried], strict=True):
            assert given is not None
            own.replace_all_uses_with(given, replace_graph_outputs=True)
        results = _moved(graph, node, body, name)[1:]
        carried = list(results[: len(carried)])
        scanned.append(results[len(carried) :])
    stacked: list[ir.Value] = []
    for index, values in enumerate(zip(*scanned, strict=True)):
        axis = _constant(graph, f"{_name(node)}/axis_{index}", np.array([0], np.int64))
        parts = [ir.node("Unsqueeze", [value, axis]) for value in values]
        whole_scan = ir.node("Concat", [part.outputs[0] for part in parts], {"axis": 0})
        for number_, made in enumerate([*parts, whole_scan]):
            made.name = f"{_name(node)}/scan_{index}_{number_}"
            made.outputs[0].name, made.outputs[0].type = f"{made.name}/output", values[0].type
        graph.insert_before(node, [*parts, whole_scan])
        stacked.append(whole_scan.outputs[0])
    if len(carried) + len(stacked) < len(node.outputs):
        raise ResvitError(
            f"The Loop '{_name(node)}' takes no turn and collects its turns' values.",
            "Export the network again with torch.onnx.export(dynamo=True), or give the PyTorch network itself.",
        )
    _put(graph, node, [*carried, *stacked])


def _moved(graph: ir.Graph, before: ir.Node, inner: ir.Graph, name: str) -> list[ir.Value]:
    """Put the nodes and constants of an inner graph in front of a node; returns what the inner graph gives."""
    results, nodes = list(inner.outputs), list(inner)
    for value in list(inner.initializers.values()):
        inner.initializers.pop(str(value.name))
        value.name = _fresh(graph, f"{name}/{value.name}")
        graph.register_initializer(value)
    inner.outputs.clear()
    inner.remove(nodes)
    for node in nodes:
        node.name = f"{name}/{node.name or node.op_type}"
        for value in node.outputs:
            if value.name:
                value.name = f"{name}/{value.name}"
    graph.insert_before(before, nodes)
    return results


def _put(graph: ir.Graph, node: ir.Node, results: list[ir.Value | None] | list[ir.Value]) -> None:
    """Let the values stand for a node's outputs, and take the node out."""
    for output, value in zip(node.outputs, results, strict=False):
        assert value is not None
        result = value
        if output.is_graph_output():
            copy = ir.node("Identity", [value], name=f"{_name(node)}/{output.name}")
            copy.outputs[0].name, output.name = output.name, f"{output.name}/branch"
            copy.outputs[0].type = output.type or value.type
            graph.insert_before(node, copy)
            result = copy.outputs[0]
        output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=_fresh(graph, name), const_value=ir.tensor(array))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def _fresh(graph: ir.Graph, name: str) -> str:
    while name in graph.initializers:
        name = f"{name}_"
    return name


def _name(node: ir.Node) -> str:
    return str(node.name or (node.outputs[0].name if node.outputs else node.op_type))
