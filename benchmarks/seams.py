"""Does a better graph let the compiler fuse the seams of a hybrid by itself? Kernels and bytes, without a GPU.

    python benchmarks/seams.py --out benchmarks/results/seams.md

Each seam stands between two INT8 products, as it does in a network. TensorRT for RTX compiles the whole graph in each
form that it can be written in; then the two products apart, as a plugin between them would leave them (dense row-major
tensors on both sides, and no fusion across it), to which our one kernel is added with the traffic that it states. Bytes
are activations and weights, those of each kernel. Sizes are those of R50+ViT-B at 224 px, batch 1. SM 86 stands in for
Jetson Orin (87), SM 89 for H100 (90). Nothing is timed: fewer bytes through fewer kernels is what a fused kernel can
give, not what it does give. TensorRT itself, of which TensorRT for RTX is a relative, may fuse otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from resvit_engines.audit.kernel_totals import kernel_totals
from resvit_engines.builder.builder import build_engine
from resvit_engines.errors import ResvitError
from resvit_engines.kernels import bridge, norms, residual
from resvit_engines.targets.table import find_target

TARGETS = {86: "a10", 89: "l4"}
HALF, INT8 = TensorProto.FLOAT16, TensorProto.INT8
SCALE = 1 / 16


class Sketch:
    """A graph in the making: FP16, with INT8 products, random weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.random = np.random.default_rng(0)

    def input(self, shape: tuple[int, ...], kind: int = HALF) -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(f"input{len(self.inputs)}", kind, shape))
        return self.inputs[-1].name

    def constant(self, value: np.ndarray) -> str:
        """An initializer."""
        self.constants.append(numpy_helper.from_array(value, f"constant{len(self.constants)}"))
        return self.constants[-1].name

    def half(self, *shape: int) -> str:
        """Random FP16 numbers."""
        return self.constant(self.random.normal(size=shape).astype(np.float16))

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """One node with one output."""
        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def scale(self) -> tuple[str, str]:
        """Scale and zero point of a tensor."""
        return self.constant(np.float16(SCALE)), self.constant(np.int8(0))

    def dequantized(self, x: str) -> str:
        """DequantizeLinear."""
        return self.op("DequantizeLinear", x, *self.scale())

    def quantized(self, x: str) -> str:
        """QuantizeLinear."""
        return self.op("QuantizeLinear", x, *self.scale())

    def weight(self, *shape: int, axis: int) -> str:
        """An INT8 weight with its dequantisation, a scale for each output channel."""
        values = self.constant(self.random.integers(-127, 128, shape).astype(np.int8))
        scales = self.constant(np.full(shape[axis], SCALE, np.float16))
        return self.op("DequantizeLinear", values, scales, self.constant(np.zeros(shape[axis], np.int8)), axis=axis)

    def conv(self, x: str, channels: int, out: int) -> str:
        """An INT8 1x1 convolution of a quantised map."""
        return self.op("Conv", self.dequantized(x), self.weight(out, channels, 1, 1, axis=0), self.half(out))

    def linear(self, x: str, size: int, out: int) -> str:
        """An INT8 product of quantised tokens."""
        return self.op("Add", self.op("MatMul", self.dequantized(x), self.weight(size, out, axis=1)), self.half(out))

    def save(self, path: Path, *outputs: str) -> Path:
        """Write it."""
        kinds = [INT8 if name.startswith("QuantizeLinear") else HALF for name in outputs]
        values = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outputs, kinds, strict=True)]
        graph = helper.make_graph(self.nodes, "seam", self.inputs, values, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.save(model, path)
        return path


Form = Callable[[Sketch, str], tuple[str, ...]]
"""A seam: from the output of the first product to the quantised input of the second, and what others read of it."""


class Seam(NamedTuple):
    """A seam's forms, the products around it, the shape of what goes into the second, and our kernel's bytes."""

    name: str
    before: Callable[[Sketch], str]
    forms: dict[str, Form]
    after: Callable[[Sketch, str], str]
    middle: tuple[int, ...]
    ours: int


def group_norm(channels: int, side: int) -> Seam:
    """GroupNorm + ReLU between two convolutions."""

    def whole(g: Sketch, x: str) -> tuple[str, ...]:
        y = g.op("GroupNormalization", x, g.half(channels), g.half(channels), num_groups=32, epsilon=1e-5)
        return (g.quantized(g.op("Relu", y)),)

    def spread(g: Sketch, x: str) -> tuple[str, ...]:
        ones, zeros = (g.constant(np.full(32, value, np.float16)) for value in (1, 0))
        rows = g.op("Reshape", x, g.constant(np.array([0, 32, -1])))
        y = g.op("InstanceNormalization", rows, ones, zeros, epsilon=1e-5)
        y = g.op("Reshape", y, g.constant(np.array([1, channels, side, side])))
        y = g.op("Add", g.op("Mul", y, g.half(channels, 1, 1)), g.half(channels, 1, 1))
        return (g.quantized(g.op("Relu", y)),)

    config = norms.GroupNormConfig(channels, 32, side * side, relu=True, out_dtype="int8", out_scale=SCALE)
    shape = (1, channels, side, side)
    return Seam(
        f"GroupNorm + ReLU + requantise, {channels}x{side}x{side}",
        lambda g: g.conv(g.input((1, 256, side, side), INT8), 256, channels),
        {"InstanceNormalization": spread, "GroupNormalization": whole},
        lambda g, x: g.conv(x, channels, 256),
        shape,
        norms.traffic_bytes(config, [shape, (channels,), (channels,)]),
    )


def layer_norm(tokens: int, size: int) -> Seam:
    """Residual addition + LayerNorm between two linears; the sum is read by others too."""

    def whole(g: Sketch, x: str) -> tuple[str, ...]:
        y = g.op("Add", x, g.input((1, tokens, size)))
        return g.quantized(g.op("LayerNormalization", y, g.half(size), g.half(size), epsilon=1e-6)), y

    def spread(g: Sketch, x: str) -> tuple[str, ...]:
        total = g.op("Add", x, g.input((1, tokens, size)))
        axes = g.constant(np.array([-1]))
        y = g.op("Sub", total, g.op("ReduceMean", total, axes))
        variance = g.op("ReduceMean", g.op("Mul", y, y), axes)
        deviation = g.op("Sqrt", g.op("Add", variance, g.constant(np.float16(1e-5))))
        y = g.op("Add", g.op("Mul", g.op("Div", y, deviation), g.half(size)), g.half(size))
        return g.quantized(y), total

    config = norms.LayerNormConfig(size, add=True, out_dtype="int8", out_scale=SCALE)
    shape = (1, tokens, size)
    return Seam(
        f"addition + LayerNorm + requantise, {tokens}x{size}",
        lambda g: g.linear(g.input(shape, INT8), size, size),
        {"written out": spread, "LayerNormalization": whole},
        lambda g, x: g.linear(x, size, 4 * size),
        shape,
        norms.traffic_bytes(config, [shape, shape, (size,), (size,)]),
    )


def block_tail(channels: int, side: int) -> Seam:
    """Shortcut addition + ReLU between two convolutions."""
    shape = (1, channels, side, side)

    def tail(g: Sketch, x: str, shortcut: str) -> tuple[str, ...]:
        return (g.quantized(g.op("Relu", g.op("Add", x, shortcut))),)

    config = residual.ResidualConfig(shape[1:], "fp16", "int8", SCALE, "int8", SCALE)
    return Seam(
        f"shortcut + ReLU + requantise, {channels}x{side}x{side}",
        lambda g: g.conv(g.input((1, 256, side, side), INT8), 256, channels),
        {
            "FP16 shortcut": lambda g, x: tail(g, x, g.input(shape)),
            "INT8 shortcut": lambda g, x: tail(g, x, g.dequantized(g.input(shape, INT8))),
        },
        lambda g, x: g.conv(x, channels, 256),
        shape,
        residual.traffic_bytes(config, [shape, shape]),
    )


def trunk_to_tokens(channels: int, side: int, size: int) -> Seam:
    """The bridge: the projection is part of it."""
    area = side * side
    shape = (1, area + 1, size)

    def tokens(g: Sketch, x: str) -> str:
        rows = g.op("Reshape", g.conv(x, channels, size), g.constant(np.array([0, size, -1])))
        return g.op("Transpose", rows, perm=[0, 2, 1])

    def finished(g: Sketch, x: str) -> tuple[str, ...]:
        y = g.op("Add", x, g.half(*shape))
        return g.quantized(g.op("LayerNormalization", y, g.half(size), g.half(size), epsilon=1e-6)), y

    def concatenated(g: Sketch, x: str) -> tuple[str, ...]:
        return finished(g, g.op("Concat", g.half(1, 1, size), tokens(g, x), axis=1))

    def padded(g: Sketch, x: str) -> tuple[str, ...]:
        """The class token is a part of the table that is added."""
        return finished(g, g.op("Pad", tokens(g, x), g.constant(np.array([0, 1, 0, 0, 0, 0]))))

    def multiplied(g: Sketch, x: str) -> tuple[str, ...]:
        """Tokens first, as INT8; then a matrix product."""
        rows = g.op("Reshape", x, g.constant(np.array([0, channels, -1])))
        y = g.linear(g.op("Transpose", rows, perm=[0, 2, 1]), channels, size)
        return finished(g, g.op("Concat", g.half(1, 1, size), y, axis=1))

    config = bridge.BridgeConfig(
        channels, side, side, size, dtype="int8", in_scale=SCALE, norm=True, out_dtype="int8", out_scale=SCALE
    )
    image = (1, channels, side, side)
    return Seam(
        f"bridge with LayerNorm + requantise, {channels}x{side}x{side} to {area + 1}x{size}",
        lambda g: g.quantized(g.op("Relu", g.conv(g.input((1, 256, side, side), INT8), 256, channels))),
        {"Conv, Concat": concatenated, "Conv, Pad": padded, "MatMul, Concat": multiplied},
        lambda g, x: g.linear(x, size, 3 * size),
        shape,
        bridge.traffic_bytes(config, [image]),
    )


TRUNK = (group_norm(256, 56), group_norm(1024, 14), block_tail(1024, 14))
SEAMS = (*TRUNK, layer_norm(197, 768), trunk_to_tokens(1024, 14, 768))


class Work(NamedTuple):
    """What runs."""

    kernels: int
    bytes: int


def work_of(path: Path, sm: int) -> Work:
    """Compile a graph for one SM and count."""
    totals = kernel_totals(build_engine(path, path.with_suffix(".plan"), find_target(TARGETS[sm])).kernels)
    return Work(totals.kernels, totals.activation_bytes + totals.constant_bytes)


def whole_graph(seam: Seam, form: Form, path: Path) -> Path:
    """Both products and the seam between them; what others read of the seam is an output too."""
    g = Sketch()
    quantized, *others = form(g, seam.before(g))
    return g.save(path, seam.after(g, quantized), *others)


def products_alone(seam: Seam, folder: Path, sm: int) -> Work:
    """What stands around the seam, compiled without it."""
    first, second = Sketch(), Sketch()
    done = [work_of(second.save(folder / "after.onnx", seam.after(second, second.input(seam.middle, INT8))), sm)]
    done.append(work_of(first.save(folder / "before.onnx", seam.before(first)), sm))
    return Work(sum(work.kernels for work in done), sum(work.bytes for work in done))


def rows(sm: int, folder: Path) -> list[str]:
    """The table's lines for one SM."""
    lines = []
    for seam in SEAMS:
        for name, form in seam.forms.items():
            try:
                whole = work_of(whole_graph(seam, form, folder / "whole.onnx"), sm)
                lines.append(f"| {seam.name} | {name} | {whole.kernels} | {whole.bytes / 1e3:.0f} |")
            except ResvitError as error:
                lines.append(f"| {seam.name} | {name} | {error.problem[:60]} | |")
            click.echo(f"SM {sm} {lines[-1]}", err=True)
        around = products_alone(seam, folder, sm)
        total = (around.bytes + seam.ours) / 1e3
        lines.append(f"| | **ours between** | {around.kernels} + 1 | {total:.0f} ({seam.ours / 1e3:.0f} of ours) |")
    return lines


@click.command()
@click.option("--sm", "sms", type=click.Choice([str(sm) for sm in TARGETS]), multiple=True, default=("86", "89"))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables there as Markdown.")
def main(sms: tuple[str, ...], out: Path | None) -> None:
    """Compile every seam in every form, and tabulate kernels and bytes, the products around it included."""
    with tempfile.TemporaryDirectory() as scratch:
        tables = [
            "\n".join(
                [f"## SM {sm}", "", "| seam | form | kernels | kB |", "|---|---|---|---|", *rows(sm, Path(scratch))]
            )
            for sm in map(int, sms)
        ]
    text = "\n\n".join(
        ["# Seams between INT8 products: kernels and bytes", *str(__doc__).strip().split("\n\n")[2:], *tables]
    )
    click.echo(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
