"""Which layers of a graph the DLA of a Jetson AGX Orin would run, by NVIDIA's table of supported layers.

From "DLA Supported Layers and Restrictions" of TensorRT's documentation: of 11.4, and for pooling, padding, Resize and
Softmax of earlier releases. TensorRT has had no DLA from 10.8 to 11.3; 11.4.1 has it on AGX Orin, for the strongly
typed graphs that are used here. No engine was held to this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ResvitError

if TYPE_CHECKING:
    import onnx_ir as ir

DEVICE = "Jetson AGX Orin with TensorRT 11.4.1 (JetPack 7.2.2 or later)"
_SIZE_MOST = 8192
_LOADABLES_MOST = 16
_NO_LAYER = frozenset({"Constant", "Identity", "Cast", "Dropout", "QuantizeLinear", "DequantizeLinear"})
"""What is no layer of its own in an engine."""
_AS_THEY_ARE = frozenset(
    ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "PRelu", "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Abs")
)
"""Activations and element-wise layers that need nothing but sizes."""
_TWO_SIDES = 2


@dataclass(frozen=True)
class DlaLayer:
    """A layer: its node's name and operator, its multiply-accumulates, and why it would not run there, if so."""

    name: str
    op: str
    macs: int
    why_not: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "op": self.op, "macs": self.macs, "why_not": self.why_not}


@dataclass(frozen=True)
class DlaFit:
    """The layers of a graph in order; ``trunk`` are those up to the last convolution of stem and trunk.

    ``loadables`` is how many pieces for the DLA the graph falls into.
    """

    layers: tuple[DlaLayer, ...]
    trunk: tuple[DlaLayer, ...]
    loadables: int

    @property
    def share(self) -> float:
        """Of all multiply-accumulates, those that would run there."""
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs for layer in self.layers if not layer.why_not) / total if total else 0.0

    @property
    def trunk_fits(self) -> bool:
        """Whether all convolutions of stem and trunk would run there in one piece."""
        return bool(self.trunk) and not any(layer.why_not for layer in self.trunk)

    @property
    def sentence(self) -> str:
        """Whether it is worth anything, and why not."""
        if not self.trunk:
            return "There is no trunk of convolutions, and a DLA runs nothing else of weight."
        if not self.trunk_fits:
            reasons = dict.fromkeys(f"{layer.op}: {layer.why_not}" for layer in self.trunk if layer.why_not)
            return f"The trunk does not fit in one piece: {'; '.join(list(reasons)[:3])}."
        if self.loadables > _LOADABLES_MOST:
            return f"The graph falls into {self.loadables} pieces, and {_LOADABLES_MOST} can be loaded."
        return "The trunk fits in one piece; what is behind it runs on the GPU."

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "device": DEVICE,
            "share_of_macs": round(self.share, 4),
            "trunk_fits": self.trunk_fits,
            "loadables": self.loadables,
            "sentence": self.sentence,
            "layers": [layer.to_json() for layer in self.layers],
        }


def dla_fit_of(path: Path) -> DlaFit:
    """Look a graph up, float or with Q/DQ.

    Raises:
        ResvitError: INPUT for a file that is no graph that can be read, and as ``analyse``.
    """
    from resvit_quantize.graph.analysis import HybridPart, analyse
    from resvit_quantize.graph.quantised_edges import quantised_graph_from_onnx

    if not path.exists():
        raise ResvitError(f"There is no file {path}.", "Check the path.")
    model = quantised_graph_from_onnx(path, 1).model
    analysis = analyse(model)
    layers: list[tuple[ir.Node, DlaLayer]] = []
    for node in model.graph:
        if node.op_type in _NO_LAYER:
            continue
        macs = analysis.of[node].macs if node in analysis.of else 0
        layers.append((node, DlaLayer(str(node.name), node.op_type, macs, _why_not(node, analysis.shapes))))
    trunk = (HybridPart.STEM, HybridPart.TRUNK)
    ends = [place for place, (node, _) in enumerate(layers) if node in analysis.of and analysis.of[node].part in trunk]
    found = tuple(layer for _, layer in layers)
    return DlaFit(found, found[: ends[-1] + 1] if ends else (), _pieces(found))


def _pieces(layers: tuple[DlaLayer, ...]) -> int:
    """How many runs of layers that fit there are in the graph's order: neighbours share a loadable."""
    fits = [not layer.why_not for layer in layers]
    return sum(here and not before for before, here in zip([False, *fits], fits, strict=False))


def _why_not(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    sides = [shapes.get(str(value.name)) for value in (*node.inputs, *node.outputs) if value is not None]
    rule = _RULES.get(node.op_type)
    if node.domain not in ("", "ai.onnx") or (rule is None and node.op_type not in _AS_THEY_ARE):
        return "no such layer"
    out = shapes.get(str(node.outputs[0].name))
    if out is None:
        return "its size depends on the image"
    if max((size for shape in sides if shape for size in shape[1:]), default=0) > _SIZE_MOST:
        return f"a side above {_SIZE_MOST}"
    if len(out) != 2 + _TWO_SIDES:
        return "no image map: it takes tensors of four dimensions"
    return rule(node, shapes) if rule is not None else ""


def _convolution(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    del shapes
    return _within(node, "kernel_shape", 1, 32) or _within(node, "strides", 1, 8) or _common(node)


def _common(node: ir.Node) -> str:
    return _within(node, "pads", 0, 31) or _within(node, "dilations", 1, 32)


def _deconvolution(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    del shapes
    if _number(node, "group", 1) != 1:
        return "grouped transposed convolution"
    return _within(node, "pads", 0, 0) or _within(node, "dilations", 1, 1) or _within(node, "kernel_shape", 1, 32)


def _pool(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    del shapes
    if _number(node, "ceil_mode", 0):
        return "sizes are rounded up"
    return _within(node, "kernel_shape", 1, 8) or _within(node, "strides", 1, 16) or _within(node, "pads", 0, 7)


def _global_pool(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    window = shapes.get(str(node.inputs[0].name if node.inputs[0] else ""), ())[2:]
    return "" if window and max(window) <= 8 else f"a window of {'x'.join(map(str, window)) or 'unknown size'}, above 8"


def _concat(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    del shapes
    return "" if _number(node, "axis", 0) in (1, -3) else "not along the channels"


def _softmax(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    shape = shapes.get(str(node.outputs[0].name), ())
    long = shape[_number(node, "axis", -1)] > 1024
    return "more than 1024 values" if long else ""


def _resize(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    before = shapes.get(str(node.inputs[0].name if node.inputs[0] else ""), ())[2:]
    after = shapes.get(str(node.outputs[0].name), ())[2:]
    scales = [to / of for of, to in zip(before, after, strict=False)]
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "nearest"
    most = {"nearest": 32, "linear": 4}.get(mode, 0)
    if not most:
        return f"{mode} interpolation"
    whole = bool(scales) and all(math.isclose(scale, round(scale)) and 1 <= scale <= most for scale in scales)
    return "" if whole else f"not by a whole number up to {most}"


_RULES: Mapping[str, Callable[[ir.Node, Mapping[str, tuple[int, ...]]], str]] = {
    "Conv": _convolution,
    "ConvTranspose": _deconvolution,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Concat": _concat,
    "Softmax": _softmax,
    "Resize": _resize,
}


def _number(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def _within(node: ir.Node, name: str, least: int, most: int) -> str:
    values = node.attributes[name].as_ints() if name in node.attributes else ()
    odd = [value for value in values if not least <= value <= most]
    what = name.removesuffix("_shape").rstrip("s")
    return f"a {what} of {odd[0]}, and {least} to {most} are taken" if odd else ""
