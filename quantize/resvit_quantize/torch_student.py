"""A float graph whose products read through fake quantisers, and the float graph that teaches it."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from resvit_engines.errors import ResvitError
from resvit_quantize.fake_quant import fake_quantize
from resvit_quantize.placement import EdgeKey, Weight, edge_key
from resvit_quantize.qdq import LARGEST_SCALE, SMALLEST_SCALE, largest_level, scale_from_amax, weight_shape
from resvit_quantize.quantize import Plan
from resvit_quantize.recover import trainable_constants
from resvit_quantize.torch_graph import TorchGraph

SPARSE = 0.45
"""The share of zeros from which on a weight was made sparse on purpose: 2:4 has a half."""

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
        for constant in self.trained.values():
            if constant.ndim > 1 and float((constant == 0).float().mean()) > SPARSE:
                _keep_zeros(constant)
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

    def __call__(self, images: Tensor) -> Outputs:
        """Outputs by name for images float32 [B, C, H, W]."""
        return self.graph(images, reading=self._read)  # type: ignore[no-any-return]

    @property
    def learned(self) -> dict[str, Tensor]:
        """All that is trained, by name; the stretch of a tensor is called after it and its precision."""
        stretches = {f"{name}@{precision.value}": value for (name, precision), value in self.stretches.items()}
        return {**self.trained, **stretches}

    def copies(self) -> dict[str, Tensor]:
        """What is learned as it is now, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.learned.items()}

    def load(self, copies: dict[str, Tensor]) -> None:
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
    wanted = (amax / largest_level(place.precision, bits)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    half = wanted.to(torch.float16)
    # The next larger half has the next larger bits, for positive numbers.
    larger = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.double() < wanted, larger, half).float().reshape(shape)


class Pieces:
    """Outputs of a graph for any number of images, also where its constants fix the batch size."""

    def __init__(self, network: ir.Model, sample: Tensor) -> None:
        self.teacher = TorchGraph(network).to(sample.device)
        shape = network.graph.inputs[0].shape
        fixed = shape[0] if shape is not None else None
        self.size: int | None = None
        if isinstance(fixed, int) and not self._takes(sample.repeat(fixed + 1, 1, 1, 1)[: fixed + 1], fixed):
            self.size = fixed

    def __call__(self, graph: Student | TorchGraph, images: Tensor) -> Outputs:
        """Outputs by name for images float32 [N, C, H, W]."""
        if self.size is None:
            outputs: Outputs = graph(images)
            return outputs
        parts: list[Outputs] = []
        for part in torch.split(images, self.size):
            # A last part that is too short is filled up with its last image.
            filled = torch.cat([part, part[-1:].expand(self.size - len(part), *part.shape[1:])])
            parts.append({name: value[: len(part)] for name, value in graph(filled).items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def targets(self, images: Tensor) -> Outputs:
        """What the float graph answers; finite, else :class:`ResvitError`."""
        with torch.no_grad():
            outputs = self(self.teacher, images)
        if not all(bool(value.isfinite().all()) for value in outputs.values()):
            raise ResvitError(
                "The float model gives NaN or infinity for training images, and has nothing to teach.",
                "Check the checkpoint and the preprocessing.",
            )
        return outputs

    def _takes(self, images: Tensor, fixed: int) -> bool:
        """Whether a batch that is larger than the graph's own gives each image its own outputs."""
        with torch.no_grad():
            try:
                together, alone = self.teacher(images), self.teacher(images[:fixed])
            except RuntimeError:
                return False
        return all(
            len(value) == len(images) and torch.allclose(value[:fixed], alone[name], rtol=1e-3, atol=1e-4)
            for name, value in together.items()
        )
