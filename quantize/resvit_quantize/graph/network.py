"""Float ONNX files to graphs that the passes can read, and graphs back to checked files."""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from resvit_calibrate.runtime.sessions import add_weight_folder
from resvit_engines.errors import ExitCode, ResvitError
from resvit_quantize.graph.external import weight_bytes, weight_folder, write_onnx
from resvit_quantize.graph.schema import holds_graph

MOST_ALONE = 2**31 - 1 - (64 << 20)
"""Bytes of weights in one file: protobuf ends at 2 GiB, with the graph itself."""
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_FOLD_LIMIT = 1 << 20
"""Elements; a constant expression that grows beyond this (an Expand) stays an expression."""
_SMALL = 1 << 10
"""Elements of constants that are as quickly read from the file's own form."""


def network_from_onnx(path: Path) -> ir.Model:
    """Read a float model and make it plain: constants as initialisers, every node named once, types known.

    Nodes that compute constants from constants (a transposed weight) are evaluated; value names survive.
    Raises :class:`ResvitError` where the file cannot be read or its types do not check.
    """
    model = named_model(path)
    fold_constants(model)
    infer_types(model)
    return model


def named_model(path: Path) -> ir.Model:
    """Read a model as it is, float or with Q/DQ, with constants as initialisers and every node named once.

    Raises :class:`ResvitError` where the file cannot be read.
    """
    try:
        model = ir.load(path)
    except Exception as error:
        raise ResvitError(
            f"{path} cannot be read as an ONNX model: {error}", "Export the model again and give that file."
        ) from error
    if not opset_of(model):
        raise ResvitError(f"{path} imports no ONNX operator set.", "Export the model again, at opset 20 or 23.")
    if opset_of(model) < 19:
        raise ResvitError(
            f"{path} uses opset {opset_of(model)}; FP16 scales need opset 19 or later.",
            "Export the model again, at opset 20 (TensorRT 10.3) or 23 (10.14 and later).",
        )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    _decode_weights(model)
    _name_nodes(model)
    return model


def _decode_weights(model: ir.Model) -> None:
    """Turn what the file holds of large float constants into arrays: a look at one is no copy of its bytes then."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if (
            isinstance(tensor, ir.serde.TensorProtoTensor)
            and tensor.dtype is ir.DataType.FLOAT
            and tensor.size > _SMALL
        ):
            value.const_value = ir.tensor(tensor.numpy(), name=tensor.name, doc_string=tensor.doc_string)


def opset_of(model: ir.Model) -> int:
    """The version of the standard operator set, 0 if there is none."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def onnx_from_network(model: ir.Model, path: Path, *, external_above: int | None = None) -> int:
    """Check types and shapes in full, write the file in one step, and return its size in bytes.

    What ships is one file. With ``external_above`` weights of more bytes may lie beside it (:func:`write_onnx`).
    """
    size = weight_bytes(model)
    if external_above is None and size > MOST_ALONE:
        raise too_large(size)
    write_onnx(model, path, MOST_ALONE if external_above is None else external_above)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        path.unlink()
        raise ResvitError(
            f"The quantised graph does not check: {error}",
            "This is a defect of the quantiser; report it with the model's structure.",
            ExitCode.BUG,
        ) from error
    return path.stat().st_size


def too_large(size: int) -> ResvitError:
    """The error for a quantised model of ``size`` bytes of weights, which fits into no ONNX file."""
    return ResvitError(
        f"The quantised model holds {size >> 20:,} MiB of weights; one ONNX file holds at most 2 GiB.",
        "Use a smaller model, or --precision int8, which takes half of FP16's.",
    )


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind an initialiser, ``None`` for anything computed or fed."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute, or what it is where the node does not say."""
    return node.attributes.get_int(name, default)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes in order, those of subgraphs after the node that holds them."""
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def module_of(node: ir.Node) -> str:
    """The dotted module path that a node came from, empty if nothing tells."""
    module = node.metadata_props.get("module", "")
    if not module and "/" in (node.name or ""):
        module = (node.name or "").rpartition("/")[0].replace("/", ".")
    return module


def add_initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Register ``array`` under ``name``, which must be new."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def infer_types(model: ir.Model) -> None:
    """Fill in element types and shapes; raises :class:`ResvitError` where the graph is inconsistent."""
    try:
        common.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
    except Exception as error:
        cause = error.__cause__ or error
        raise ResvitError(
            f"The ONNX graph's types do not check: {cause}", "Export the model again; its operators disagree."
        ) from error


def _name_nodes(model: ir.Model) -> None:
    seen: set[str] = set()
    for index, node in enumerate(all_nodes(model)):
        name = base = node.name or f"{node.op_type}_{index}"
        suffix = 1
        while name in seen:
            suffix += 1
            name = f"{base}_{suffix}"
        seen.add(name)
        node.name = name


def fold_constants(model: ir.Model, but: Set[str] = frozenset()) -> None:
    """Evaluate, in ONNX Runtime, the nodes that depend on nothing but constants; not those of the op types ``but``."""
    source: dict[ir.Value, int] = {}
    """The constant values, and the elements of the largest initialiser behind each."""
    nodes: dict[ir.Node, None] = {}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        plain = node.domain in ("", "ai.onnx") and node.op_type not in _RANDOM | but and inputs
        if plain and all(v in source or v.is_initializer() for v in inputs) and not holds_graph(node):
            nodes[node] = None
            largest = max(source.get(v, 0 if v.const_value is None else v.const_value.size) for v in inputs)
            source.update(dict.fromkeys(node.outputs, largest))
    wanted = [v for v in source if not v.is_graph_output() and any(use.node not in nodes for use in v.uses())]
    if not wanted:
        return
    for value, array in zip(wanted, _evaluate(model, list(nodes), wanted), strict=True):
        if array.size > max(_FOLD_LIMIT, source[value]):
            continue
        name = str(value.name)
        value.name = f"{name}/folded"
        value.replace_all_uses_with(add_initializer(model, name, np.ascontiguousarray(array)))
    common.RemoveUnusedNodesPass()(model)


def _evaluate(model: ir.Model, nodes: list[ir.Node], wanted: list[ir.Value]) -> list[np.ndarray]:
    import onnxruntime

    inside = {output for node in nodes for output in node.outputs}
    constants = {v for node in nodes for v in node.inputs if v is not None and v not in inside}
    proto = onnx.GraphProto(name="constants")
    proto.node.extend(ir.serde.serialize_node(node) for node in nodes)
    proto.initializer.extend(ir.serde.serialize_tensor(v.const_value) for v in constants if v.const_value is not None)
    proto.output.extend(onnx.ValueInfoProto(name=v.name) for v in wanted)
    whole = onnx.ModelProto(ir_version=model.ir_version, graph=proto)
    for domain, version in model.opset_imports.items():
        whole.opset_import.add(domain=domain, version=version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        add_weight_folder(options, weight_folder(model))
        session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, {}))
    except Exception as error:
        raise ResvitError(
            f"The model's constant expressions cannot be evaluated: {error}",
            "Export the model again with its weights folded.",
        ) from error
