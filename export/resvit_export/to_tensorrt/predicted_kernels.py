"""The kernels that TensorRT is predicted to make of an ONNX graph, in the form in which an audit reads an engine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from resvit_engines.audit.attention_rules import breaches_of
from resvit_engines.audit.expectation import Attention
from resvit_engines.audit.kernels import Kernel
from resvit_engines.targets.layer_work import Format, LayerKind, LayerWork
from resvit_engines.targets.tensorrt_kernels import PlacedKernel, Role, TensorRtKernels, Wanted
from resvit_export.to_onnx.onnx_file import reading
from resvit_quantize.graph.fused_layers import layers_from_graph
from resvit_quantize.graph.quantised_edges import QuantisedGraph, quantised_graph_from_onnx, viewed
from resvit_quantize.graph.shapes import static_shapes

_TYPES = {Format.FP32: "Float", Format.FP16: "Half", Format.INT8: "Int8", Format.FP8: "FP8"}
_NAMES = {LayerKind.CONV: "convolution", LayerKind.GEMM: "gemm"}
_FUSED_ATTENTION = "_mha_"
"""What marks the tactic of fused attention in TensorRT's names."""


def predicted_kernels(path: Path, batch: int, attention: Sequence[Attention]) -> tuple[Kernel, ...]:
    """What TensorRT makes of the graph at ``path``, by its rules (:mod:`resvit_engines.targets.tensorrt_kernels`).

    ``attention`` are the graph's blocks: one that breaks a rule of its fused kernel is several kernels.

    Raises:
        ResvitError: INPUT where the file cannot be read.
    """
    with reading(path):
        graph = quantised_graph_from_onnx(path, batch)
        return tuple(_Listing(graph, batch, attention).kernels())


class _Listing:
    def __init__(self, graph: QuantisedGraph, batch: int, attention: Sequence[Attention]) -> None:
        self.graph = graph
        self.works = layers_from_graph(graph.model, batch, edges=graph.edges)
        self.shapes = static_shapes(graph.model, batch)
        self.plugins = {str(node.name) for node in graph.model.graph if "plugin_namespace" in node.attributes}
        self.outputs = {str(node.name): str(node.outputs[0].name) for node in graph.model.graph if node.outputs}
        self.apart = {node: block for block in attention if breaches_of(block) for node in block.nodes}
        self.quantize: dict[tuple[str, str], dict[str, None]] = {}
        """Names of Q and, beside them, of DQ nodes by the tensor that is quantised, and its scale."""
        self.dequantize: dict[tuple[str, str], dict[str, None]] = {}
        for (node, index), edge in graph.edges.items():
            source = viewed(node.inputs[index])
            key = (str(source.name) if source is not None else "", edge.scale)
            self.quantize.setdefault(key, {})[edge.quantize] = None
            self.dequantize.setdefault(key, {})[edge.dequantize] = None

    def kernels(self) -> Iterator[Kernel]:
        """Every kernel, in order."""
        made = TensorRtKernels(self.works)
        for work in self.works:
            for kernel in made.of(work, self.graph.eight_bit):
                block = next((self.apart[name] for name in work.members if name in self.apart), None)
                if block is not None and work.kind is LayerKind.ATTENTION and len(block.nodes) > 1:
                    yield from self._unfused(kernel, block)
                else:
                    yield self._kernel(work, kernel, block)

    def _kernel(self, work: LayerWork, kernel: PlacedKernel, block: Attention | None) -> Kernel:
        layer = kernel.role is Role.LAYER
        names = list(work.members) if layer else []
        if kernel.role is not Role.QUANTIZE:
            names += [name for value, form in kernel.reads for name in self._pair(self.dequantize, value, form)]
        if kernel.role is not Role.DEQUANTIZE:
            names += [name for value, form in kernel.writes for name in self._pair(self.quantize, value, form)]
        product = layer and work.kind in _NAMES and work.shape is not None
        shape = (work.shape.groups * work.shape.columns, work.shape.depth) if product and work.shape else ()
        kind = "plugin" if self.plugins & {*work.members} else _NAMES.get(work.kind, work.kind.value)
        fused = layer and work.kind is LayerKind.ATTENTION and block is None
        return Kernel(
            work.name if layer else f"{kernel.role.value} {kernel.reads[0][0]}",
            kind if layer and not work.copies else "reformat",
            tuple(_TYPES[form.form] for _, form in kernel.reads),
            tuple(_TYPES[form.form] for _, form in kernel.writes),
            tuple(self._shape(value) for value, _ in kernel.reads),
            tuple(self._shape(value) for value, _ in kernel.writes),
            tuple(dict.fromkeys(name for name in names if name)),
            (_TYPES[kernel.work.multiplies],) if product else (),
            (shape,) if product else (),
            tuple(value for value, _ in kernel.reads),
            tuple(value for value, _ in kernel.writes),
            _FUSED_ATTENTION if fused else "",
        )

    def _unfused(self, kernel: PlacedKernel, block: Attention) -> Iterator[Kernel]:
        """Attention whose first product, softmax and second product are kernels of their own."""
        floats = _TYPES[kernel.work.multiplies]
        reads = [(value, _TYPES[form.form]) for value, form in kernel.reads]
        first, inner, last = block.nodes[0], block.nodes[1:-1], block.nodes[-1]
        scores = (self.outputs.get(first, first), floats)
        shares = (self.outputs.get(inner[-1], inner[-1]), floats) if inner else scores
        written = [(value, _TYPES[form.form]) for value, form in kernel.writes]
        for name, kind, nodes, read, write in (
            (first, "gemm", (first,), reads[:2], [scores]),
            *([(inner[-1], "pointwise", inner, [scores], [shares])] if inner else []),
            (last, "gemm", (last,), [shares, *reads[2:]], written),
        ):
            yield Kernel(
                name,
                kind,
                tuple(form for _, form in read),
                tuple(form for _, form in write),
                tuple(self._shape(value) for value, _ in read),
                tuple(self._shape(value) for value, _ in write),
                nodes,
                input_names=tuple(value for value, _ in read),
                output_names=tuple(value for value, _ in write),
            )

    def _pair(self, names: dict[tuple[str, str], dict[str, None]], value: str, form: Wanted) -> Sequence[str]:
        return tuple(names.get((value, form.scale), ())) if form.eight else ()

    def _shape(self, value: str) -> tuple[int, ...]:
        return self.shapes.get(value, (-1,))
