"""Small float ONNX graphs with known structure, for the quantiser's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges, TensorRange


class Graph:
    """A graph under construction: ``g.op("Relu", "x")`` returns the output's name."""

    def __init__(self, *shape: int | str, opset: int = 20) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.input = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
        self.opset = opset
        self.stated: list[onnx.ValueInfoProto] = []

    def state(self, value: str, *shape: int | str) -> str:
        """Give the shape of a value that ONNX does not infer, such as GroupNormalization's."""
        self.stated.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, shape))
        return value

    def weight(self, name: str, *shape: int) -> str:
        scale = np.sqrt(2.0 / max(np.prod(shape[1:]), 1))
        return self.constant(name, (self.random.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def op(self, op_type: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: object) -> str:
        name = name or f"{op_type}_{len(self.nodes)}"
        node = helper.make_node(op_type, inputs, [f"{name}:{i}" for i in range(outputs)], name=name, **attributes)
        if "/" in name:
            node.metadata_props.add(key="module", value=name.rpartition("/")[0])
        self.nodes.append(node)
        return node.output[0]

    def conv(self, value: str, out: int, into: int, size: int = 3, name: str = "") -> str:
        name = name or f"Conv_{len(self.nodes)}"
        weight, bias = self.weight(f"{name}.weight", out, into, size, size), self.weight(f"{name}.bias", out)
        return self.op("Conv", value, weight, bias, name=name, pads=[size // 2] * 4)

    def linear(self, value: str, into: int, out: int, name: str) -> str:
        weight, bias = self.weight(f"{name}.weight", into, out), self.weight(f"{name}.bias", out)
        return self.op("Add", self.op("MatMul", value, weight, name=f"{name}/MatMul"), bias, name=f"{name}/Add")

    def norm(self, value: str, width: int, name: str) -> str:
        ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
        scale, bias = self.constant(f"{name}.weight", ones), self.constant(f"{name}.bias", zeros)
        return self.op("LayerNormalization", value, scale, bias, name=f"{name}/LayerNormalization")

    def ints(self, *values: int) -> str:
        return self.constant(f"ints_{len(self.constants)}", np.array(values, np.int64))

    def save(self, path: Path, *outputs: str) -> Path:
        named = [helper.make_node("Identity", [o], [f"logits{i or ''}"], name=f"out{i}") for i, o in enumerate(outputs)]
        infos = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, None) for n in named]
        graph = helper.make_graph(
            [*self.nodes, *named], "toy", [self.input], infos, self.constants, value_info=self.stated
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True), path)
        return path


def basic_block(g: Graph, value: str, channels: int, name: str, into: int | None = None) -> str:
    """ResNet's BasicBlock with its norms folded; a projection on the shortcut where the channels change."""
    into = into or channels
    hidden = g.op("Relu", g.conv(value, channels, into, name=f"{name}.conv1/Conv"), name=f"{name}/Relu1")
    main = g.conv(hidden, channels, channels, name=f"{name}.conv2/Conv")
    shortcut = value if into == channels else g.conv(value, channels, into, 1, name=f"{name}.downsample/Conv")
    return g.op("Relu", g.op("Add", main, shortcut, name=f"{name}/Add"), name=f"{name}/Relu2")


def vit_block(g: Graph, value: str, width: int, tokens: int, heads: int, name: str) -> str:
    """A pre-norm transformer block with one packed QKV product; tokens [B, N, width]."""
    packed = g.linear(g.norm(value, width, f"{name}.norm1"), width, 3 * width, f"{name}.attn.qkv")
    split = g.op("Reshape", packed, g.ints(-1, tokens, 3, heads, width // heads), name=f"{name}.attn/Reshape")
    moved = g.op("Transpose", split, name=f"{name}.attn/Transpose", perm=[2, 0, 3, 1, 4])
    parts = [
        g.op("Gather", moved, g.constant(f"{name}.index{i}", np.array(i)), name=f"{name}.attn/Gather{i}")
        for i in range(3)
    ]
    keys = g.op("Transpose", parts[1], name=f"{name}.attn/Keys", perm=[0, 1, 3, 2])
    scores = g.op("MatMul", parts[0], keys, name=f"{name}.attn/Scores")
    mixed = g.op("MatMul", g.op("Softmax", scores, name=f"{name}.attn/Softmax"), parts[2], name=f"{name}.attn/Mix")
    joined = g.op("Transpose", mixed, name=f"{name}.attn/Join", perm=[0, 2, 1, 3])
    flat = g.op("Reshape", joined, g.ints(-1, tokens, width), name=f"{name}.attn/Flat")
    value = g.op("Add", value, g.linear(flat, width, width, f"{name}.attn.proj"), name=f"{name}/Add1")
    hidden = g.linear(g.norm(value, width, f"{name}.norm2"), width, 4 * width, f"{name}.mlp.fc1")
    hidden = g.linear(g.op("Gelu", hidden, name=f"{name}.mlp/Gelu"), 4 * width, width, f"{name}.mlp.fc2")
    return g.op("Add", value, hidden, name=f"{name}/Add2")


def hybrid(path: Path, opset: int = 20) -> Path:
    """Stem, one BasicBlock, patch projection, one ViT block, head: 16x16 images, 32 channels, 16 tokens."""
    g = Graph("batch", 3, 16, 16, opset=opset)
    value = g.op("Relu", g.conv("input", 32, 3, name="stem/Conv"), name="stem/Relu")
    value = basic_block(g, g.op("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2]), 32, "trunk.0")
    value = g.op("Conv", value, g.weight("proj.weight", 64, 32, 2, 2), name="proj/Conv", strides=[2, 2])
    tokens = g.op("Transpose", g.op("Reshape", value, g.ints(-1, 64, 16)), perm=[0, 2, 1])
    tokens = g.op("Add", tokens, g.weight("pos_embed", 1, 16, 64), name="pos/Add")
    tokens = g.norm(vit_block(g, tokens, 64, 16, 4, "blocks.0"), 64, "norm")
    pooled = g.op("ReduceMean", tokens, g.ints(1), name="pool/ReduceMean", keepdims=0)
    head = g.op("Gemm", pooled, g.weight("head.weight", 10, 64), g.weight("head.bias", 10), name="head/Gemm", transB=1)
    return g.save(path, head)


def offset_convolutions(path: Path) -> Path:
    """Three convolutions, and an offset of the outputs that all images share."""
    g = Graph("batch", 3, 8, 8)
    hidden = g.op("Relu", g.conv(g.op("Relu", g.conv("input", 32, 3, name="first")), 32, 32, name="second"))
    last = g.conv(hidden, 32, 32, name="last")
    return g.save(path, g.op("Add", last, g.constant("offset", np.array(50.0, np.float32))))


def outputs_of(path: Path, images: np.ndarray, every: bool = False, optimize: bool = True) -> dict[str, np.ndarray]:
    """Run a model in ONNX Runtime with Q/DQ unfused; ``every`` returns all float values.

    Where FP8 is quantised from FP32, only without ``optimize`` are the results right: ONNX Runtime 1.32 drops a Relu
    in front of QuantizeLinear.
    """
    import onnxruntime

    model = ir.load(path)
    if every:
        floats = [o for node in model.graph for o in node.outputs if o.dtype == ir.DataType.FLOAT]
        model.graph.outputs.extend(v for v in floats if not v.is_graph_output())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))


def ranges_of(path: Path, images: np.ndarray) -> Ranges:
    """Exact ranges of all values, under every estimator's name."""
    seen = {"input": images, **outputs_of(path, images, every=True)}
    return ranges_from_extremes({name: (float(a.min()), float(a.max())) for name, a in seen.items()})


def ranges_from_extremes(extremes: dict[str, tuple[float, float]]) -> Ranges:
    """Ranges with amax = max(|min|, |max|)."""
    tensors = {}
    for name, (low, high) in extremes.items():
        amax = {estimator.value: max(abs(low), abs(high)) for estimator in Estimator}
        tensors[name] = TensorRange(low, high, {"int8": amax, "fp8": amax}, (), 0.0)
    return Ranges(tensors, 1, "digest")


def sqnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Signal to quantisation noise in dB."""
    noise = float(((reference - candidate) ** 2).sum())
    return 10 * float(np.log10(float((reference**2).sum()) / max(noise, 1e-30)))


def batches(*images: np.ndarray) -> list[Batch]:
    """Images float32 [B, C, H, W] of which nothing else is known, as a data set streams them."""
    return [Batch(each, None) for each in images]
