"""An ONNX graph in its canonical form: readable unique names, no traces of where it was made, fewer nodes."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable

import onnx_ir as ir
import onnx_ir.passes.common

from resvit_export.loading.inputs import IMAGE
from resvit_export.to_onnx import optimizer
from resvit_export.to_onnx.packed_heads import split_along_heads
from resvit_export.to_onnx.plain_attention import write_out_attention
from resvit_export.to_onnx.stand_ins import bound_stand_ins
from resvit_quantize.graph.shapes import HEIGHT, WIDTH

MODULE = "module"
"""Key of a node's metadata that holds the dotted path of the module it came from."""

BATCH = "batch"
_SYMBOL = re.compile(r"[^\W\d]\w*")
_SCOPES = "pkg.torch.onnx.name_scopes"


def fix_batch(model: ir.Model, batch: int) -> None:
    """Set the first size of every input, and all inner sizes that are equal to it; others are inferred anew."""
    free = {symbol for symbol, name in _free_sizes(model.graph).items() if name == BATCH}
    for value in _values(model.graph):
        if value.shape is None:
            continue
        sizes = [batch if not isinstance(size, int) and size.value in free else size for size in value.shape]
        known = all(isinstance(size, int) for size in sizes) or value.is_graph_input()
        value.shape = ir.Shape(sizes) if known else None
    infer_shapes(model)


def infer_shapes(model: ir.Model) -> None:
    """Fill in the shapes of inner values that nobody has stated."""
    ir.passes.common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def optimize(model: ir.Model) -> None:
    """Fold constants and shapes, drop identities and whatever nothing reads; no answer moves by more than rounding."""
    for one in optimizer.passes():
        one(model)
        infer_shapes(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    bound_stand_ins(model)
    write_out_attention(model)
    pad_in_max_pool(model)
    pool_over_all(model)
    split_along_heads(model)
    _drop_unused_initializers(model.graph)
    infer_shapes(model)


def pad_in_max_pool(model: ir.Model) -> int:
    """Move a Pad with -inf into the MaxPool behind it, which pads so itself; returns how many.

    Otherwise the graph carries a tensor of infinities, which no calibration can take a range of.
    """
    count = 0
    for pool in list(model.graph):
        if pool.op_type != "MaxPool" or pool.inputs[0] is None:
            continue
        pad = pool.inputs[0].producer()
        if pad is None or pad.op_type != "Pad" or len(pad.outputs[0].uses()) != 1 or len(pool.outputs) != 1:
            continue
        amounts, value = _array(pad, 1), _array(pad, 2)
        mode = pad.attributes.get_string("mode", "constant")
        axes = len(pad.inputs) > 3 and pad.inputs[3] is not None
        if amounts is None or value is None or axes or mode != "constant" or value[0] != -math.inf:
            continue
        rank = len(amounts) // 2
        ceil, auto = pool.attributes.get_int("ceil_mode", 0), pool.attributes.get_string("auto_pad", "NOTSET")
        outside = [*amounts[:2], *amounts[rank : rank + 2]]
        if any(outside) or min(amounts) < 0 or ceil or auto != "NOTSET":
            continue
        extra = [int(a) for a in (*amounts[2:rank], *amounts[rank + 2 :])]
        own = list(pool.attributes.get_ints("pads", [0] * len(extra)))
        kernel = list(pool.attributes.get_ints("kernel_shape", []))
        pads = [a + b for a, b in zip(own, extra, strict=True)]
        if any(pad >= size for pad, size in zip(pads, kernel * 2, strict=True)):
            continue
        pool.attributes["pads"] = ir.AttrInt64s("pads", pads)
        pool.replace_input_with(0, pad.inputs[0])
        model.graph.remove(pad, safe=True)
        count += 1
    _drop_unused_initializers(model.graph)
    return count


def pool_over_all(model: ir.Model) -> int:
    """Write a pool whose one window holds the whole map as the pool over all of it; returns how many.

    A window may be larger than the map (``AvgPool2d`` as wide as the channels, with ``ceil_mode``), and than TensorRT
    takes.
    """
    count = 0
    for pool in list(model.graph):
        image = pool.inputs[0] if pool.op_type in ("AveragePool", "MaxPool") else None
        if image is None or image.shape is None or pool.outputs[0].shape is None or len(pool.outputs) != 1:
            continue
        size, kernel = list(image.shape)[2:], list(pool.attributes.get_ints("kernel_shape", []))
        reaches = all(isinstance(one, int) and window >= one for one, window in zip(size, kernel, strict=True))
        padded = (
            any(pool.attributes.get_ints("pads", [])) or pool.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        )
        apart = any(step != 1 for step in pool.attributes.get_ints("dilations", []))
        if not reaches or padded or apart or any(one != 1 for one in list(pool.outputs[0].shape)[2:]):
            continue
        whole = ir.node(f"Global{pool.op_type}", [image], name=pool.name)
        whole.metadata_props.update(pool.metadata_props)
        old, new = pool.outputs[0], whole.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_nodes_and_values(model.graph, pool, [pool], [whole], [old], [new])
        count += 1
    return count


def canonicalise(model: ir.Model, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Give every node and value its final name, and strip all that the source of the graph left in it.

    Nodes become ``blocks.0.mlp.fc1/MatMul`` and keep their module's path as metadata ``module``; values take
    the name of the node that makes them; constants without a name of their own take that of the node that
    reads them first. The result depends on the graph alone, so equal graphs give equal bytes.
    """
    graph = model.graph
    modules = {node: _module_of(node) for node in graph}
    named = {value for value in graph.initializers.values() if not _is_generated(value.name)}
    taken: set[str] = set()
    for wanted, values in ((inputs, graph.inputs), (outputs, graph.outputs)):
        for name, value in zip(wanted, values, strict=True):
            taken.add(name)
            for other in _values(graph):
                if other is not value and other.name == name:
                    other.name = unique(name, {str(each.name) for each in _values(graph)})
            value.name = name
    fixed = {*graph.inputs, *graph.outputs}
    taken |= {str(value.name) for value in named}
    node_names: set[str] = set()
    for node in graph:
        module = modules[node]
        node.name = unique(f"{module}/{node.op_type}" if module else node.op_type, node_names)
        node.doc_string = None
        node.metadata_props.clear()
        if module:
            node.metadata_props[MODULE] = module
    order: list[ir.Value] = []
    for node in graph:
        for index, source in enumerate(node.inputs):
            if source is None or not source.is_initializer() or source in order:
                continue
            order.append(source)
            if source not in named:
                source.name = unique(_constant_name(node, index), taken)
        for index, value in enumerate(node.outputs):
            if value not in fixed and value.name != "":
                value.name = unique(f"{node.name}_output" + (f"_{index}" if index else ""), taken)
    order += [value for value in graph.initializers.values() if value.is_graph_output() and value not in order]
    graph.initializers.clear()
    for value in order:
        assert value.const_value is not None
        value.const_value.name = value.name
        graph.register_initializer(value)
    _rename_free_sizes(graph)
    for value in _values(graph):
        value.doc_string = None
        value.metadata_props.clear()
    graph.name, graph.doc_string = "network", None
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.doc_string = model.domain = model.producer_version = None
    model.model_version = None
    model.producer_name = "resvit-export"


def image_first(model: ir.Model) -> None:
    """Put the input called ``input`` before the others."""
    inputs = model.graph.inputs
    index = next(index for index, value in enumerate(inputs) if value.name == IMAGE)
    inputs.insert(0, inputs.pop(index))


def _module_of(node: ir.Node) -> str:
    """Dotted module path, from the exporter's metadata, else from the node's name or its weight's."""
    if scopes := node.metadata_props.get(_SCOPES):
        # The last entry names the operator, the one before it the innermost module.
        path = ast.literal_eval(scopes)
        module = str(path[-2]) if len(path) > 1 else ""
        return "" if module.startswith("_empty") else re.sub(r"@\d+", "", module)
    if known := node.metadata_props.get(MODULE):
        return known
    if node.name and "/" in node.name:
        return _module_from_slashes(node.name.strip("/").split("/")[:-1])
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.name and "." in value.name:
            return value.name.rpartition(".")[0]
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return _module_of(source) if source is not None and source.metadata_props.get(_SCOPES) else ""


def _module_from_slashes(parts: list[str]) -> str:
    """``blocks/blocks.0/mlp`` is what the TorchScript exporter makes of ``blocks.0.mlp``."""
    path: list[str] = []
    for part in parts:
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def _is_generated(name: str | None) -> bool:
    """Whether an exporter numbered the value rather than taking a name from the model."""
    return (
        not name
        or re.fullmatch(r"(val|const|constant|onnx::\w+|/?_v|_inlfunc\w*)?_?\d*", name) is not None
        or (re.fullmatch(r"onnx::\w+|.*/Constant(_\d+)?_output_\d+|val_\w+|_inl\w+", name) is not None)
    )


def _constant_name(node: ir.Node, index: int) -> str:
    module = node.metadata_props.get(MODULE)
    weights = {"MatMul": "weight", "Gemm": "weight", "Conv": "weight", "ConvTranspose": "weight"}
    value = node.inputs[index]
    if module and index and node.op_type in weights and value is not None and value.shape and len(value.shape) > 1:
        return f"{module}.weight"
    return f"{node.name}_input_{index}"


def unique(name: str, taken: set[str]) -> str:
    """``name``, with a number behind it where it is ``taken``; it is taken then."""
    result, number = name, 1
    while result in taken:
        result, number = f"{name}_{number}", number + 1
    taken.add(result)
    return result


def _rename_free_sizes(graph: ir.Graph) -> None:
    """Call free sizes ``batch``, ``height`` and ``width`` wherever they occur, alone or inside an expression."""
    free = _free_sizes(graph)
    for value in _values(graph):
        if value.shape is None:
            continue
        sizes: list[int | str | None] = []
        for size in value.shape:
            text = size if isinstance(size, int) else size.value
            if isinstance(text, str):
                text = _SYMBOL.sub(lambda symbol: free.get(symbol[0], symbol[0]), text)
            sizes.append(text)
        value.shape = ir.Shape(sizes)


def _free_sizes(graph: ir.Graph) -> dict[str, str]:
    """By what an exporter calls them, the free first size of every input, and height and width of an image."""
    names = {0: BATCH, 2: HEIGHT, 3: WIDTH}
    return {
        str(size.value): names[axis]
        for value in graph.inputs
        if value.shape is not None
        for axis, size in enumerate(value.shape)
        if isinstance(size, ir.SymbolicDim) and size.value and (axis == 0 or (axis in names and len(value.shape) == 4))
    }


def _values(graph: ir.Graph) -> list[ir.Value]:
    inner = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *inner]


def _array(node: ir.Node, index: int) -> list[float] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return [0.0] if index == 2 else None
    return None if value.const_value is None else list(value.const_value.numpy().reshape(-1).tolist())


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
