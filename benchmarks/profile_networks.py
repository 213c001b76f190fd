"""The networks of ``profiles/`` as ONNX, with their Q/DQ where the engine was built from one.

Weights are zeros of the right type and shape: what TensorRT makes of a graph, and how long that takes, does not hang
on them. Nodes are named after the layers of the original networks (``layer1.0.conv1``), so that layers can be compared.
Types of floats are those that the measured engine has: it was built with leave to choose them (TensorRT 8, weakly
typed), which strongly typed networks, as this program writes them, do not give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

FP32, FP16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass
class Network:
    """A graph under construction. ``quantised``: convolutions read their input and weights through Q/DQ."""

    floats: ir.DataType
    quantised: bool = False
    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)
    types: dict[ir.Value, ir.DataType] = field(default_factory=dict)
    """What a value's numbers are; FP32 for what is not named."""
    _quantised: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def constant(self, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        """Zeros that take no memory."""
        array = np.broadcast_to(np.zeros((), dtype.numpy()), shape)
        value = ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=ir.tensor(array, name=name)
        )
        self.constants.append(value)
        return value

    def numbers(self, name: str, *numbers: int) -> ir.Value:
        """A constant list of whole numbers."""
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape((len(numbers),)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.constants.append(value)
        return value

    def op(self, op_type: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """Append a node; its output is named like it."""
        node = ir.node(op_type, inputs, attributes or None, name=name)
        node.outputs[0].name = f"{name}:0"
        self.nodes.append(node)
        self.types[node.outputs[0]] = self.types.get(inputs[0], FP32)
        return node.outputs[0]

    def qdq(self, value: ir.Value, floats: ir.DataType | None = None) -> ir.Value:
        """A tensor through Q/DQ, one pair for all readers; ``floats`` is the type behind it."""
        floats = floats or self.floats
        if (value, floats) not in self._quantised:
            stored = self._stored(value)
            scale = self.constant(f"{value.name}/scale/{floats.name}", (), floats)
            zero = self.constant(f"{value.name}/zero/{floats.name}", (), ir.DataType.INT8)
            back = self.op("DequantizeLinear", f"{value.name}/DequantizeLinear/{floats.name}", stored, scale, zero)
            self.types[back] = floats
            self._quantised[value, floats] = back
        return self._quantised[value, floats]

    def _stored(self, value: ir.Value) -> ir.Value:
        quantize = next((use.node for use in value.uses() if use.node.op_type == "QuantizeLinear"), None)
        if quantize is not None:
            return quantize.outputs[0]
        scale = self.constant(f"{value.name}/scale", (), self.types.get(value, FP32))
        zero = self.constant(f"{value.name}/zero", (), ir.DataType.INT8)
        return self.op("QuantizeLinear", f"{value.name}/QuantizeLinear", value, scale, zero)

    def weight(self, name: str, shape: tuple[int, ...], floats: ir.DataType) -> ir.Value:
        """A weight, stored in 8 bits where the network is quantised."""
        if not self.quantised:
            return self.constant(f"{name}.weight", shape, floats)
        stored = self.constant(f"{name}.weight", shape, ir.DataType.INT8)
        scale = self.constant(f"{name}.weight/scale", (shape[0],), floats)
        zero = self.constant(f"{name}.weight/zero", (shape[0],), ir.DataType.INT8)
        return self.op("DequantizeLinear", f"{name}.weight/DequantizeLinear", stored, scale, zero, axis=0)

    def conv(
        self, value: ir.Value, name: str, into: int, out: int, size: int = 1, stride: int = 1, groups: int = 1,
        *, pad: int | None = None, floats: ir.DataType | None = None,
    ) -> ir.Value:  # fmt: skip
        """A convolution with bias. ``floats`` is the type that it writes, where that is not the network's."""
        floats = floats or self.floats
        value = self.qdq(value, floats) if self.quantised and not self._is_view(value) else value
        weight = self.weight(name, (out, into // groups, size, size), floats)
        pads = [size // 2 if pad is None else pad] * 4
        bias = self.constant(f"{name}.bias", (out,), floats)
        return self.op("Conv", name, value, weight, bias, strides=[stride] * 2, pads=pads, group=groups)

    def _is_view(self, value: ir.Value) -> bool:
        """Whether it is moved only since its Q/DQ."""
        node = value.producer()
        return node is not None and node.op_type == "Transpose"

    def linear(self, value: ir.Value, name: str, into: int, out: int, floats: ir.DataType | None = None) -> ir.Value:
        """A linear layer on [N, C]."""
        floats = floats or self.floats
        value = self.qdq(value, floats) if self.quantised else value
        weight, bias = self.weight(name, (out, into), floats), self.constant(f"{name}.bias", (out,), floats)
        return self.op("Gemm", name, value, weight, bias, transB=1)

    def matmul(self, value: ir.Value, name: str, into: int, out: int) -> ir.Value:
        """A linear layer on [N, T, C]."""
        value = self.qdq(value) if self.quantised else value
        bias = self.constant(f"{name}.bias", (out,), self.floats)
        weight = self.weight(name, (into, out), self.floats)
        return self.op("Add", f"{name}.bias/Add", self.op("MatMul", name, value, weight), bias)

    def cast(self, value: ir.Value, name: str, to: ir.DataType) -> ir.Value:
        """A change of type."""
        out = self.op("Cast", name, value, to=int(to))
        self.types[out] = to
        return out

    def model(self, shape: tuple[int, ...], given: ir.Value, out: ir.Value) -> ir.Model:
        """The finished model."""
        given.shape, given.type = ir.Shape(shape), ir.TensorType(FP32)
        graph = ir.Graph(
            [given], [out], nodes=self.nodes, initializers=self.constants, opset_imports={"": 21}, name="net"
        )
        return ir.Model(graph, ir_version=10)


def resnet18(
    floats: ir.DataType, batch: int, *, quantised: bool, shortcut: bool = False, pooled: bool = False
) -> ir.Model:
    """torchvision's ResNet-18. ``shortcut``: residuals have Q/DQ as well; ``pooled``: the last pool's input too."""
    net = Network(floats, quantised)
    given = ir.Value(name="input")
    value = given if floats is FP32 or quantised else net.cast(given, "input/Cast", floats)
    # Without Q/DQ on the residuals the builder took FP32 for the stem.
    stem = FP32 if quantised and not shortcut else floats
    value = net.op("Relu", "relu", net.conv(value, "conv1", 3, 64, 7, 2, floats=stem))
    value = net.op("MaxPool", "maxpool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    value = net.cast(value, "maxpool/Cast", floats) if stem is not floats else value
    into = 64
    for stage, out in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            inner = net.op("Relu", f"{name}.relu1", net.conv(value, f"{name}.conv1", into, out, 3, stride))
            inner = net.conv(inner, f"{name}.conv2", out, out, 3)
            side = net.conv(value, f"{name}.downsample", into, out, 1, stride, pad=0) if stride > 1 else value
            side = net.qdq(side) if shortcut else side
            value = net.op("Relu", f"{name}.relu2", net.op("Add", f"{name}.add", inner, side))
            into = out
    value = net.op("GlobalAveragePool", "avgpool", net.qdq(value) if pooled else value)
    value = net.op("Flatten", "flatten", value)
    value = net.linear(value, "fc", 512, 1000, FP32 if quantised else None)
    value = net.cast(value, "output/Cast", FP32) if floats is FP16 and not quantised else value
    return net.model((batch, 3, 224, 224), given, value)


def resnet50(floats: ir.DataType, batch: int, *, quantised: bool, keras: bool = True) -> ir.Model:
    """ResNet-50 with its strides in the first convolution of a block.

    Keras's takes images [N, H, W, C], pads in layers of their own and ends in a softmax.
    """
    net = Network(floats, quantised)
    given = ir.Value(name="input")
    value = given
    if keras:
        pads = net.numbers("conv1_pad/pads", 0, 3, 3, 0, 0, 3, 3, 0)
        value = net.qdq(net.op("Pad", "conv1_pad", given, pads)) if quantised else given
        value = net.op("Transpose", "transpose", value, perm=[0, 3, 1, 2])
    value = net.cast(value, "input/Cast", floats) if floats is FP16 and not quantised else value
    value = net.op("Relu", "conv1_relu", net.conv(value, "conv1", 3, 64, 7, 2, pad=0 if quantised and keras else 3))
    if keras:
        value = net.op("Pad", "pool1_pad", value, net.numbers("pool1_pad/pads", 0, 0, 1, 1, 0, 0, 1, 1))
    around = [0 if keras else 1] * 4
    value = net.op("MaxPool", "maxpool", value, kernel_shape=[3, 3], strides=[2, 2], pads=around)
    into = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
        for block in range(1, blocks + 1):
            name = f"conv{stage}_block{block}"
            stride = 2 if stage > 2 and block == 1 else 1
            inner = net.op("Relu", f"{name}_1_relu", net.conv(value, f"{name}_1", into, width, 1, stride))
            inner = net.op("Relu", f"{name}_2_relu", net.conv(inner, f"{name}_2", width, width, 3))
            inner = net.conv(inner, f"{name}_3", width, 4 * width)
            side = net.conv(value, f"{name}_0", into, 4 * width, 1, stride) if block == 1 else value
            side = net.qdq(side) if quantised else side
            value = net.op("Relu", f"{name}_out", net.op("Add", f"{name}_add", side, inner))
            into = 4 * width
    value = net.op("GlobalAveragePool", "avgpool", net.qdq(value) if quantised else value)
    value = net.linear(net.op("Flatten", "flatten", value), "fc", 2048, 1000, FP32 if quantised else None)
    value = net.cast(value, "output/Cast", FP32) if floats is FP16 and not quantised else value
    if not keras:
        return net.model((batch, 3, 224, 224), given, value)
    return net.model((batch, 224, 224, 3), given, net.op("Softmax", "softmax", value))


def mobilenet_v2(floats: ir.DataType, batch: int, *, quantised: bool, shortcut: bool = False) -> ir.Model:
    """torchvision's MobileNetV2. ``shortcut``: residuals have Q/DQ as well."""
    net = Network(floats, quantised)
    given = ir.Value(name="input")
    value = given if floats is FP32 or quantised else net.cast(given, "input/Cast", floats)
    value = _clipped(net, net.conv(value, "features.0", 3, 32, 3, 2), "features.0.clip")
    into, index = 32, 1
    for expand, out, repeats, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(repeats):
            name, stride, hidden = f"features.{index}", first if repeat == 0 else 1, into * expand
            # Where residuals have no Q/DQ the builder took FP32 at 160 channels.
            kind = FP32 if quantised and not shortcut and out == 160 else None
            inner = (
                _clipped(net, net.conv(value, f"{name}.expand", into, hidden), f"{name}.clip1") if expand > 1 else value
            )
            inner = _clipped(
                net, net.conv(inner, f"{name}.depthwise", hidden, hidden, 3, stride, hidden), f"{name}.clip2"
            )
            inner = net.conv(inner, f"{name}.project", hidden, out, floats=kind)
            if stride == 1 and into == out:
                inner = net.op("Add", f"{name}.add", inner, net.qdq(value) if shortcut else value)
            value, into, index = inner, out, index + 1
    value = _clipped(net, net.conv(value, "features.18", 320, 1280), "features.18.clip")
    value = net.op("Flatten", "flatten", net.op("GlobalAveragePool", "avgpool", value))
    value = net.linear(value, "classifier", 1280, 1000, FP32 if quantised else None)
    value = net.cast(value, "output/Cast", FP32) if floats is FP16 and not quantised else value
    return net.model((batch, 3, 224, 224), given, value)


def vit(batch: int, *, quantised: bool) -> ir.Model:
    """ViT-B/16 at 224 px in FP16; ``quantised``: its linear layers in INT8, the rest in FP16."""
    net = Network(FP16, quantised)
    given = ir.Value(name="input")
    width, tokens, heads = 768, 197, 12
    net.quantised = False
    value = net.conv(net.cast(given, "input/Cast", FP16), "patches", 3, width, 16, 16, pad=0)
    net.quantised = quantised
    value = net.op("Reshape", "patches/Reshape", value, net.numbers("patches/shape", batch, width, tokens - 1))
    value = net.op("Transpose", "patches/Transpose", value, perm=[0, 2, 1])
    token = net.constant("token", (batch, 1, width), FP16)
    value = net.op("Concat", "tokens", token, value, axis=1)
    value = net.op("Add", "positions", value, net.constant("positions/table", (1, tokens, width), FP16))
    scale = net.constant("scale", (), FP16)
    for index in range(12):
        name = f"blocks.{index}"
        inner = _normed(net, value, f"{name}.norm1", width)
        split = [
            _heads(
                net,
                net.matmul(inner, f"{name}.{part}", width, width),
                f"{name}.{part}",
                (batch, tokens, heads, 64),
                perm,
            )
            for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
        ]
        scores = net.op("Mul", f"{name}.scaled", net.op("MatMul", f"{name}.scores", *split[:2]), scale)
        mixed = net.op("MatMul", f"{name}.mix", net.op("Softmax", f"{name}.softmax", scores, axis=-1), split[2])
        mixed = net.op("Transpose", f"{name}.mix/Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = net.op("Reshape", f"{name}.mix/Reshape", mixed, net.numbers(f"{name}.mix/shape", batch, tokens, width))
        value = net.op("Add", f"{name}.add1", net.matmul(mixed, f"{name}.projection", width, width), value)
        inner = net.matmul(_normed(net, value, f"{name}.norm2", width), f"{name}.fc1", width, 4 * width)
        inner = net.matmul(net.op("Gelu", f"{name}.gelu", inner), f"{name}.fc2", 4 * width, width)
        value = net.op("Add", f"{name}.add2", inner, value)
    value = _normed(net, value, "norm", width)
    value = net.op("Gather", "class", value, net.numbers("class/index", 0), axis=1)
    value = net.op("Reshape", "class/Reshape", value, net.numbers("class/shape", batch, width))
    net.quantised = False
    return net.model((batch, 3, 224, 224), given, net.cast(net.linear(value, "head", width, 1000), "output/Cast", FP32))


def _normed(net: Network, value: ir.Value, name: str, width: int) -> ir.Value:
    scale, bias = (net.constant(f"{name}.{part}", (width,), FP16) for part in ("weight", "bias"))
    return net.op("LayerNormalization", name, value, scale, bias)


def _heads(net: Network, value: ir.Value, name: str, shape: tuple[int, ...], perm: list[int]) -> ir.Value:
    split = net.op("Reshape", f"{name}/Reshape", value, net.numbers(f"{name}/shape", *shape))
    return net.op("Transpose", f"{name}/Transpose", split, perm=perm)


def _clipped(net: Network, value: ir.Value, name: str) -> ir.Value:
    floats = FP32 if net.floats is FP32 else FP16
    ends = [net.constant(f"{name}/{end}", (), floats) for end in ("low", "high")]
    return net.op("Clip", name, value, *ends)


ENGINES = {
    "resnet18-a100-b32-fp32": lambda: resnet18(FP32, 32, quantised=False),
    "resnet18-a100-b32-fp16": lambda: resnet18(FP16, 32, quantised=False),
    "resnet18-a100-b32-int8-no-residual-qdq": lambda: resnet18(FP16, 32, quantised=True),
    "resnet18-a100-b32-int8-residual-qdq": lambda: resnet18(FP32, 32, quantised=True, shortcut=True),
    "resnet18-a100-b32-int8-residual-qdq-gap": lambda: resnet18(FP32, 32, quantised=True, shortcut=True, pooled=True),
    "resnet50-rtx3090-b32-fp32": lambda: resnet50(FP32, 32, quantised=False),
    "resnet50-rtx3090-b32-fp16": lambda: resnet50(FP16, 32, quantised=False),
    "resnet50-rtx3090-b32-int8": lambda: resnet50(FP32, 32, quantised=True),
    "mobilenet-int8": lambda: mobilenet_v2(FP16, 1, quantised=True),
    "mobilenetv2-residual-qdq-int8": lambda: mobilenet_v2(FP16, 1, quantised=True, shortcut=True),
}
"""By the profile's name. Both MobileNets are MobileNetV2."""
