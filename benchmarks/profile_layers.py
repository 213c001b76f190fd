"""Measured layers of ``profiles/`` and predicted ones, by names that both have, so that they can be compared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from profile_networks import ENGINES

from resvit_engines.targets.layer_work import Format, LayerKind, LayerWork
from resvit_engines.targets.tensorrt_kernels import PlacedKernel, Role, TensorRtKernels
from resvit_quantize.graph.fused_layers import layers_from_graph
from resvit_quantize.graph.quantised_edges import QuantisedGraph, quantised_edges

PROFILES = Path(__file__).parent / "profiles"
_RESNET18 = (
    "conv1",
    *(
        f"layer{stage}.{block}.{name}"
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
        for name in ("conv1", "conv2", *(["downsample"] if stage > 1 and block == 0 else []))
    ),
)
_MOBILE = {"0.0": "expand", "1.0": "depthwise", "2": "project"}
_FIRST_MOBILE = {"0.0": "depthwise", "1": "project"}
_EIGHT = frozenset({"int8", "fp8"})


@dataclass(frozen=True)
class Fusion:
    """What runs inside a convolution's kernel, and whether it reads and writes 8 bits."""

    adds: bool
    activates: bool
    pools: bool
    reads_eight: bool
    writes_eight: bool


@dataclass(frozen=True)
class Layer:
    """One layer with a kernel: its key, which measured and predicted ones share, its time, and what fused in it."""

    key: str
    us: float
    fusion: Fusion | None = None
    kernel: PlacedKernel | None = None


@dataclass(frozen=True)
class Profile:
    """One measured engine: total of its layers in a run with a profiler, latency without one, in microseconds."""

    engine: str
    device: str
    total_us: float
    latency_us: float
    layers: tuple[Layer, ...]


@cache
def profile(engine: str) -> Profile:
    """Read one measured engine; layers that take no time are left out."""
    found = json.loads((PROFILES / f"{engine}.json").read_text())
    layers: list[Layer] = []
    convolutions = iter(_RESNET18)
    for row in found["layers"]:
        product = "Conv" in row["type"]
        name = _product(engine, row["name"], convolutions) if product else ""
        if row["us"] > 0:
            before = layers[-1].key if layers else "input"
            fusion = _measured_fusion(row) if product else None
            layers.append(Layer(name or _other(row, before, len(layers)), row["us"], fusion))
    return Profile(engine, found["device"], found["total_us"], found["latency_us"], tuple(layers))


def _product(engine: str, name: str, convolutions: Any) -> str:
    """The name of a convolution or linear layer in the rebuilt network."""
    if re.search(r"Gemm|fc\.weight|predictions|classifier", name):
        return "classifier" if engine.startswith("mobile") else "fc"
    if found := re.search(r"features\.(\d+)\.(?:conv\.)?([\d.]+)\.weight", name):
        block, part = int(found[1]), found[2]
        if block in (0, 18):
            return f"features.{block}"
        return f"features.{block}.{(_FIRST_MOBILE if block == 1 else _MOBILE)[part]}"
    if engine.startswith("resnet50"):
        found = re.search(r"conv\d_block\d_\d(?=_conv/)", name)
        return found[0] if found else "conv1"
    if found := re.match(r"([\w.]+?)(?:\.0)?\.weight", name):
        return found[1]
    return str(next(convolutions))


def _measured_fusion(row: dict[str, Any]) -> Fusion:
    name, pools = row["name"], row["type"] == "ConvActPool"
    return Fusion(
        "Add_" in name or "add/add" in name,
        pools or "activation" in row or "Clip" in name,
        pools,
        _form(row["reads"][0]) in _EIGHT,
        _form(row["writes"][0]) in _EIGHT,
    )


def _form(tensor: str) -> str:
    return tensor.partition(" ")[0]


def _other(row: dict[str, Any], before: str, index: int) -> str:
    """The key of a layer that is no product: what it does, and behind which one."""
    name = row["name"]
    for words, key in (
        (r"^Reformatting|copied_squeeze", ""), (r"MaxPool", "maxpool"), (r"GlobalAveragePool|avg_pool", "avgpool"),
        (r"conv1_pad", "conv1_pad"), (r"pool1_pad", "pool1_pad"), (r"Conv2D__6|BiasAdd__1121", "transpose"),
        (r"Softmax", "softmax"),
    ):  # fmt: skip
        if re.search(words, name):
            if key:
                return key
            break
    read, written = _form(row["reads"][0]), _form(row["writes"][0])
    if written in _EIGHT and read not in _EIGHT:
        return f"quantize {before}"
    if read in _EIGHT and written not in _EIGHT:
        return "dequantize"
    if read != written:
        border = {"input": "input/Cast", "transpose": "input/Cast", "maxpool": "maxpool/Cast", "fc": "output/Cast"}
        return border.get(before, f"convert {index}")
    return f"layout {index}"


@cache
def rebuilt(engine: str) -> tuple[QuantisedGraph, tuple[LayerWork, ...]]:
    """The network of an engine, and its fused layers."""
    graph = quantised_edges(ENGINES[engine]())
    return graph, layers_from_graph(graph.model, edges=graph.edges)


@cache
def predicted_kernels(engine: str) -> tuple[Layer, ...]:
    """What TensorRT is predicted to make of the network, without times."""
    graph, works = rebuilt(engine)
    return kernels_of(graph, works)


def kernels_of(graph: QuantisedGraph, works: tuple[LayerWork, ...]) -> tuple[Layer, ...]:
    """The kernels of a network with their keys."""
    kernels = TensorRtKernels(works)
    return tuple(
        Layer(_key(work, kernel), 0.0, _predicted_fusion(work, kernel), kernel)
        for work in works
        for kernel in kernels.of(work, graph.eight_bit)
    )


def _key(work: LayerWork, kernel: PlacedKernel) -> str:
    if kernel.role is Role.DEQUANTIZE:
        return "dequantize"
    return work.name if kernel.role is Role.LAYER else f"quantize {work.name}"


def _predicted_fusion(work: LayerWork, kernel: PlacedKernel) -> Fusion | None:
    if kernel.role is not Role.LAYER or work.kind not in (LayerKind.CONV, LayerKind.GEMM):
        return None
    inside = " ".join(work.members)
    return Fusion(
        bool(re.search(r"[._]add\b", inside)),
        bool(re.search(r"relu|clip|_out\b", inside)),
        work.pools,
        kernel.work.multiplies in (Format.INT8, Format.FP8),
        kernel.writes[0][1].eight,
    )
