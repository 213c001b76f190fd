"""Small graphs in ONNX's text format for tests of the graph rewrites, and what ONNX Runtime makes of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from resvit_quantize.fusion.fuse import fuse
from resvit_quantize.fusion.match import FusionReport, Kind
from resvit_quantize.graph.network import infer_types


def graph_of(lines: str, inputs: str, outputs: str, *, opset: int = 20, **constants: Any) -> ir.Model:
    """A model of ``lines``; ``constants`` are named there, lists of whole numbers being shapes, axes and indices.

    As the quantiser writes it: all nodes are named, all types known, and 8-bit weights stay so.
    """
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{\n{lines}\n}}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(_tensor(name, value) for name, value in constants.items())
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    network = ir.serde.deserialize_model(model)
    infer_types(network)
    return network


def _tensor(name: str, value: Any) -> onnx.TensorProto:
    array = np.asarray(value)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return onnx.helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, array.shape, array.tobytes(), raw=True)
    return numpy_helper.from_array(array, name)


def computed(model: ir.Model, **given: np.ndarray) -> list[np.ndarray]:
    """All outputs of a model that is run as it is written, in float64."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [np.asarray(array).astype(np.float64) for array in session.run(None, given)]


def fused(model: ir.Model, *kinds: Kind, **options: Any) -> FusionReport:
    """Fuse in place, and check the result in full."""
    report = fuse(model, frozenset(kinds or (Kind.ATTENTION, Kind.BRIDGE)), **options)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    return report


def refusal(model: ir.Model, *kinds: Kind, **options: Any) -> str:
    """Why the only part that could be fused stays; the graph is as it was."""
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    report = fused(model, *kinds, **options)
    assert report.matches == ()
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before
    (only,) = report.refusals
    return only.reason


def half(shape: tuple[int, ...], seed: int = 0, size: float = 1.0) -> np.ndarray:
    """Random FP16 numbers."""
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float16)
