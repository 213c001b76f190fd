"""Small attention graphs in the types that TensorRT reads: FP16 or FP32, with Q/DQ where asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ALL_PLACES = ("operands", "softmax", "output")


class _Builder:
    def __init__(self, half: bool, fp8: bool) -> None:
        self.fp8 = fp8
        self.random = np.random.default_rng(0)
        self.type = np.float16 if half else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.asarray(value, self.type))

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: object) -> str:
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def linear(self, value: str, into: int, out: int, name: str) -> str:
        weight = self.constant((self.random.standard_normal((into, out)) * 0.1).astype(self.type))
        return self.op("MatMul", value, weight, name=name)

    def qdq(self, value: str, name: str, scale: float = 0.05) -> str:
        size, zero = self.number(scale), self.constant(np.int8(0))
        if self.fp8:
            self.constants[-1].CopyFrom(helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, [], [0.0]))
        quantized = self.op("QuantizeLinear", value, size, zero, name=f"{name}/Q")
        return self.op("DequantizeLinear", quantized, size, zero, name=f"{name}/DQ")


def attention_graph(
    path: Path,
    *,
    head: int = 32,
    tokens: int = 64,
    half: bool = True,
    mask: str = "none",
    between: str = "",
    places: tuple[str, ...] = (),
    whole: bool = False,
    fp8: bool = False,
) -> Path:
    """Write x [1, tokens, 2 * head] through QKV, attention of two heads and a projection.

    ``mask`` is ``none``, ``constant`` or ``computed``; ``between`` an operator in front of the softmax; ``places``
    where Q/DQ stands (INT8, or ``fp8``); ``whole`` takes one ``Attention`` node.
    """
    b, width = _Builder(half, fp8), 2 * head
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, tokens, width])]
    value = b.op("Cast", "x", name="in/Cast", to=TensorProto.FLOAT16) if half else "x"
    mixed = b.linear(value, width, 3 * width, "attn.qkv/MatMul")
    heads = b.op("Reshape", mixed, b.constant(np.array([1, tokens, 3, 2, head], np.int64)))
    heads = b.op("Transpose", heads, perm=[2, 0, 3, 1, 4])
    b.nodes.append(helper.make_node("Split", [heads], ["q", "k", "v"], name="attn/Split", axis=0, num_outputs=3))
    q, k, v = (b.op("Squeeze", one, b.constant(np.array([0], np.int64)), name=f"attn/{one}") for one in "qkv")
    if not whole:
        q = b.op("Mul", q, b.number(head**-0.5), name="attn/Mul")
    if "operands" in places:
        q, k, v = (b.qdq(one, f"attn/{name}") for one, name in ((q, "q"), (k, "k"), (v, "v")))
    if whole:
        out = b.op("Attention", q, k, v, name="attn/Attention", TRT_decomposable=1)
    else:
        scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]), name="attn/MatMul")
        scores = b.op(between, scores, name=f"attn/{between}") if between else scores
        if mask == "constant":
            scores = b.op("Add", scores, b.constant(np.ones((1, 1, tokens, tokens), b.type)), name="attn/Add")
        elif mask == "computed":
            inputs.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, [1, 1, tokens, tokens]))
            bias = b.op("Cast", "m", name="m/Cast", to=TensorProto.FLOAT16) if half else "m"
            scores = b.op("Add", scores, bias, name="attn/Add")
        shares = b.op("Softmax", scores, name="attn/Softmax", axis=-1)
        shares = b.qdq(shares, "attn/p", 1 / 127) if "softmax" in places else shares
        out = b.op("MatMul", shares, v, name="attn/MatMul_1")
    out = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.constant(np.array([1, tokens, width], np.int64)))
    out = b.qdq(out, "attn/out") if "output" in places else out
    out = b.linear(out, width, width, "attn.proj/MatMul")
    b.nodes.append(
        helper.make_node("Cast" if half else "Identity", [out], ["y"], name="out", **({"to": 1} if half else {}))
    )
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, tokens, width])
    graph = helper.make_graph(b.nodes, "attention", inputs, [result], b.constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path
