"""A float graph whose products read through fake quantisers, and the float graph that teaches it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ResvitError
from resvit_quantize.graph.network import constant
from resvit_quantize.placement.grid import largest_level, scale_from_amax, weight_shape
from resvit_quantize.placement.placement import EdgeKey, Weight, edge_key
from resvit_quantize.qdq.plan import Plan
from resvit_quantize.torch_graph.fake_quant import fake_quantize
from resvit_quantize.torch_graph.graph import TorchGraph, filled

SPARSE = 0.45
"""The share of zeros from which on a weight was made sparse on purpose: 2:4 has a half."""

Feeds = dict[str, Tensor]
"""What a graph's inputs are fed, [B, ...] by name."""
Outputs = dict[str, Tensor]
"""Of a graph, by name."""


class Student:
    """The graph of a plan in torch, with fake quantisers on exactly the edges and weights of its placement."""

    def __init__(self, plan: Plan, bits: int, device: torch.device) -> None:
        self.graph = TorchGraph(plan.network, trainable=True).to(device)
        self.bits = bits
        names = trainable_constants(plan)
        for parameter in self.graph.parameters():
            parameter.requires_grad_(False)
        self.trained = {name: self.graph.tensor(name).requires_grad_() for name in names}
        for weight in self.trained.values():
            if weight.ndim > 1 and float((weight == 0).float().mean()) > SPARSE:
                _keep_zeros(weight)
        self._weights = {(place.node, place.index): place for place in plan.placement.weights}
        self._edges: dict[tuple[ir.Node, int], EdgeKey] = {}
        self._scales: dict[EdgeKey, Tensor] = {}
        self.stretches: dict[EdgeKey, Tensor] = {}
        """Natural logarithm of each learned scale over the calibrated one."""
        for edge in plan.placement.edges:
            key = edge_key(edge)
            self._edges[edge.node, edge.index] = key
            if key not in self._scales:
                scale = scale_from_amax(plan.amax[key], edge.precision, bits)
                self._scales[key] = torch.tensor(float(scale), device=device)
                self.stretches[key] = torch.zeros((), device=device, requires_grad=True)

    def __call__(self, feeds: Feeds) -> Outputs:
        """Outputs by name for what the graph's inputs are fed."""
        return self.graph(feeds, reading=self._read)  # type: ignore[no-any-return]

    @property
    def learned(self) -> dict[str, Tensor]:
        """All that is trained, by name; the stretch of a tensor is called after it and its precision."""
        stretches = {f"{name}@{precision.value}": value for (name, precision), value in self.stretches.items()}
        return {**self.trained, **stretches}

    def copies(self) -> dict[str, Tensor]:
        """What is learned as it is now, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.learned.items()}

    def load(self, copies: Mapping[str, Tensor]) -> None:
        """Take copies back."""
        with torch.no_grad():
            for name, value in self.learned.items():
                value.copy_(copies[name])

    def clips(self, copies: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """The clips that belong to copies, by precision and tensor."""
        found: dict[str, dict[str, float]] = {}
        for (name, precision), scale in self._scales.items():
            stretch = float(copies[f"{name}@{precision.value}"])
            clip = float(scale) * math.exp(stretch) * largest_level(precision, self.bits)
            found.setdefault(precision.value, {})[name] = clip
        return found

    def _read(self, node: ir.Node, index: int, value: Tensor) -> Tensor:
        if key := self._edges.get((node, index)):
            scale = self._scales[key] * self.stretches[key].exp()
            return fake_quantize(value, scale, key[1], self.bits)
        if place := self._weights.get((node, index)):
            return fake_quantize(value, weight_scale(value, place, self.bits), place.precision, self.bits)
        return value


def _keep_zeros(parameter: Tensor) -> None:
    """Let no gradient through to weights that are zero: sparsity is worth more than they are."""
    kept = (parameter.detach() != 0).to(parameter.dtype)
    parameter.register_hook(lambda gradient: gradient * kept)  # type: ignore[no-untyped-call]


def weight_scale(weight: Tensor, place: Weight, bits: int) -> Tensor:
    """Scales that broadcast against ``weight``, the same as ``scale_from_amax`` of its channels; no gradient."""
    shape, others = weight_shape(np.empty(weight.shape), place.axis)
    amax = weight.detach().abs().amax(others).double()
    scale = scale_from_amax(amax.cpu().numpy(), place.precision, bits)
    return torch.from_numpy(scale).to(weight.device).reshape(shape)


class Pieces:
    """Outputs of a graph for any number of images, also where its constants fix the batch size."""

    def __init__(self, network: ir.Model, sample: Batch, device: torch.device) -> None:
        self.teacher, self.device = TorchGraph(network).to(device), device
        shape = network.graph.inputs[0].shape
        fixed = shape[0] if shape is not None else None
        self.size: int | None = None
        if isinstance(fixed, int) and not self._takes(filled(self.feeds(sample), fixed + 1), fixed):
            self.size = fixed

    def feeds(self, batch: Batch) -> Feeds:
        """What the graphs read of a batch, on their device."""
        return {name: value.to(self.device) for name, value in self.teacher.feeds(batch).items()}

    def __call__(self, graph: Student | TorchGraph, feeds: Feeds) -> Outputs:
        """Outputs by name for any number of images and what is read beside them."""
        if self.size is None:
            outputs: Outputs = graph(feeds)
            return outputs
        parts: list[Outputs] = []
        for start in range(0, len(next(iter(feeds.values()))), self.size):
            part = {name: value[start : start + self.size] for name, value in feeds.items()}
            count = len(next(iter(part.values())))
            parts.append({name: value[:count] for name, value in graph(filled(part, self.size)).items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def targets(self, feeds: Feeds) -> Outputs:
        """What the float graph answers; finite, else :class:`ResvitError`."""
        with torch.no_grad():
            outputs = self(self.teacher, feeds)
        if not all(bool(value.isfinite().all()) for value in outputs.values()):
            raise ResvitError(
                "The float model gives NaN or infinity for training images, and has nothing to teach.",
                "Check the checkpoint and the preprocessing.",
            )
        return outputs

    def _takes(self, feeds: Feeds, fixed: int) -> bool:
        """Whether a batch that is larger than the graph's own gives each image its own outputs."""
        with torch.no_grad():
            try:
                together = self.teacher(feeds)
                alone = self.teacher({name: value[:fixed] for name, value in feeds.items()})
            except RuntimeError:
                return False
        return all(
            len(value) == fixed + 1 and torch.allclose(value[:fixed], alone[name], rtol=1e-3, atol=1e-4)
            for name, value in together.items()
        )


_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


_NORMS = frozenset({"LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization"})


def trainable_constants(plan: Plan) -> tuple[str, ...]:
    """The constants that recovery may train, in the graph's order.

    Weights of products, and behind the first product also biases and the scales and offsets of norms. All else
    stays as it is, bit for bit: preprocessing inside the graph, positions, masks, epsilons, statistics of
    BatchNorms, and whatever is read in a second way.
    """
    return tuple(
        name
        for name, value in plan.network.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT
        and value.uses()
        and not value.is_graph_output()
        and all(_may_train(plan, use.node, use.idx) for use in value.uses())
    )


def _may_train(plan: Plan, node: ir.Node, index: int) -> bool:
    product = plan.analysis.of.get(node)
    if product is not None and product.weight is not None and node.op_type in _WEIGHTED:
        return index in (1, 2)
    if node.op_type in _NORMS:
        return index in (1, 2) and _behind_product(plan, node.inputs[0])
    if node.op_type not in ("Add", "Mul"):
        return False
    array = constant(node.inputs[index])
    # A vector along one axis is a bias or a norm's scale; what has two axes may be positions or a mask.
    is_vector = array is not None and array.size > 1 and max(array.shape) == array.size
    masks = any(use.node.op_type == "Softmax" for use in node.outputs[0].uses())
    return is_vector and not masks and _behind_product(plan, node.inputs[1 - index])


def _behind_product(plan: Plan, value: ir.Value | None) -> bool:
    return value is not None and value in plan.analysis.data and plan.analysis.depth.get(value, 0) > 0
