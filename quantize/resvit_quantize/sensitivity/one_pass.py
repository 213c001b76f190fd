"""The one-pass estimate of every layer's damage; see ``sensitivity`` for the method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Precision
from resvit_quantize.placement.grid import StoredWeight, quantise_weight, require_finite, scale_from_amax
from resvit_quantize.placement.placement import WeightKey, edge_key, weight_key
from resvit_quantize.sensitivity.products import QuantizableProducts
from resvit_quantize.sensitivity.task_loss import TaskLoss
from resvit_quantize.torch_graph.fake_quant import fake_quantize
from resvit_quantize.torch_graph.graph import Reading, TorchGraph, filled

_Key = tuple[str, str]
"""Precision and product."""
_SMALL = 100_000_000
_LOSS = "loss"


@dataclass(frozen=True, eq=False)
class _Site:
    """A node some of whose inputs are quantised: the clip's scale by index, or the dequantised weight."""

    key: _Key
    precision: Precision
    scales: dict[int, Tensor]
    weights: dict[int, Tensor]

    def read(self, index: int, value: Tensor, bits: int) -> Tensor:
        """What the quantised node reads at this input."""
        if index in self.weights:
            return self.weights[index]
        return fake_quantize(value, self.scales[index], self.precision, bits) if index in self.scales else value


@contextlib.contextmanager
def threads_for(macs: int) -> Iterator[None]:
    """Within the block PyTorch keeps to one thread where a network's multiply-accumulates for an image are few.

    Its threads meet at every operator: on a shared machine that takes ten times as long as the work of a small one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if macs < _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class DamageEstimate:
    """Sums over images, for formats that share one float network."""

    def __init__(
        self,
        formats: Sequence[QuantizableProducts],
        bits: int,
        probes: int,
        seed: int,
        loss: TaskLoss | None = None,
        *,
        evenly: bool = False,
    ) -> None:
        self.formats, self.bits, self.loss, self.evenly = formats, bits, loss, evenly
        network = formats[0].plan.network
        self.graph = TorchGraph(network)
        self.batch = _fixed_batch(network)
        self.sites = _sites(formats, bits)
        self.generator = torch.Generator().manual_seed(seed)
        floats = [v for v in network.graph.outputs if v.dtype is None or v.dtype.is_floating_point()]
        self.outputs = [str(value.name) for value in floats]
        self.probes = max(probes, len(self.outputs), 1)
        self.turn = 0
        self.images = 0
        self.signal = dict.fromkeys(self.outputs, 0.0)
        self.probed = dict.fromkeys(self.outputs, 0)
        if loss is not None:
            self.outputs = [_LOSS]
            self.signal, self.probed = {_LOSS: 0.0}, {_LOSS: 0}
        self.moved = {name: {key: 0.0 for site in self.sites.values() for key in _keys(site)} for name in self.outputs}
        self.noise = {each.precision.value: dict.fromkeys(self.outputs, 0.0) for each in formats}

    def add(self, batch: Batch) -> None:
        """Take in ``self.batch`` images or fewer.

        Raises :class:`ResvitError` for outputs that are not finite.
        """
        count = len(batch.images)
        # What fills a fixed batch up gets no signs, so that it counts nowhere.
        feeds = filled(self.graph.feeds(batch), self.batch)
        dots: dict[_Key, float] = {}
        clean = self._measured(self._forward_with_errors(feeds, dots), batch)
        for name, value in clean.items():
            self.signal[name] += _power(value.detach())
        own: dict[str, dict[_Key, float]] = {name: {} for name in self.outputs}
        probed = dict.fromkeys(self.outputs, 0)
        # A loss of one image at a time has one direction, and needs no probes to find its length.
        for left in reversed(range(self.probes if self.loss is None else 1)):
            name = self.outputs[self.turn % len(self.outputs)]
            self.turn += 1
            dots.clear()
            signs = torch.randint(0, 2, clean[name].shape, generator=self.generator) * 2.0 - 1.0
            torch.autograd.backward([clean[name]], [signs], retain_graph=left > 0)
            probed[name] += count
            for key, dot in dots.items():
                own[name][key] = own[name].get(key, 0.0) + dot**2
        for name, squares in own.items():
            self.probed[name] += probed[name]
            total = sum(squares.values())
            factor = count / total if self.evenly and total > 0.0 else 1.0
            for key, square in squares.items():
                self.moved[name][key] += square * factor
        # Shares need no noise of all layers together.
        for each in () if self.evenly else self.formats:
            with torch.no_grad():
                noisy = self._measured(self.graph(feeds, self._quantized_reading(each)), batch)
            for name, value in clean.items():
                self.noise[each.precision.value][name] += _power(noisy[name] - value.detach())
        self.images += count

    def _measured(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """What noise is measured in, [B, values] by name: the outputs, or the task's loss of each image."""
        count = len(batch.images)
        if self.loss is None:
            return {name: _centred(outputs[name], count) for name in self.outputs}
        return {_LOSS: self.loss({name: value[:count] for name, value in outputs.items()}, batch)[:, None]}

    def damage(self) -> dict[str, dict[str, float]]:
        """Noise-to-signal power by precision and product; shares of the noise where images count evenly."""
        found: dict[str, dict[str, float]] = {
            each.precision.value: dict.fromkeys(each.products, 0.0) for each in self.formats
        }
        for name in self.outputs:
            if not (self.signal[name] and self.probed[name]):
                continue
            # Evenly, all layers together make 1 of every image.
            whole = self.images if self.evenly else self.probed[name] * self.signal[name] / self.images
            for (precision, product), moved in self.moved[name].items():
                found[precision][product] += moved / whole
        return found

    def together(self) -> dict[str, float]:
        """Noise-to-signal power by precision with all quantised that the rules quantise.

        0 where images count evenly: there it is not measured.
        """
        return {
            precision: sum(noise / self.signal[name] for name, noise in by_output.items() if self.signal[name])
            for precision, by_output in self.noise.items()
        }

    def _forward_with_errors(self, feeds: dict[str, Tensor], dots: dict[_Key, float]) -> dict[str, Tensor]:
        """The float outputs; a backward pass from them then fills ``dots`` with ``(Jᵀu)·d`` of every product."""
        read: dict[int, Tensor] = {}

        def reading(node: ir.Node, index: int, value: Tensor) -> Tensor:
            if node in self.sites:
                read[index] = value
            return value

        def writing(node: ir.Node, result: Tensor) -> Tensor:
            if node not in self.sites:
                return result
            errors = []
            with torch.no_grad():
                for site in self.sites[node]:
                    inputs = [
                        None if v is None else site.read(i, read[i], self.bits) for i, v in enumerate(node.inputs)
                    ]
                    noisy = self.graph.evaluate(node, inputs)
                    assert isinstance(noisy, Tensor)
                    errors.append((site.key, noisy - result))
            read.clear()
            if not result.requires_grad:
                result.requires_grad_()

            def hook(gradient: Tensor) -> None:
                for key, error in errors:
                    dots[key] = dots.get(key, 0.0) + float((gradient * error).sum(dtype=torch.float64))

            result.register_hook(hook)  # type: ignore[no-untyped-call]
            return result

        clean: dict[str, Tensor] = self.graph(feeds, reading, writing)
        for name, value in clean.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ResvitError(
                    f"The network's output '{name}' holds NaN or infinity.",
                    "Check the checkpoint and the preprocessing.",
                )
        return clean

    def _quantized_reading(self, quantized: QuantizableProducts) -> Reading:
        def reading(node: ir.Node, index: int, value: Tensor) -> Tensor:
            for site in self.sites.get(node, ()):
                if site.precision is quantized.precision and site.key[1] in quantized.chosen:
                    return site.read(index, value, self.bits)
            return value

        return reading


def _sites(formats: Sequence[QuantizableProducts], bits: int) -> dict[ir.Node, list[_Site]]:
    """Every node of the first format's network that reads something quantised, once for each precision."""
    nodes = {str(node.name): node for node in formats[0].plan.network.graph}
    found: dict[ir.Node, list[_Site]] = {}
    for each in formats:
        kept: dict[WeightKey, Tensor] = {}
        here: dict[ir.Node, _Site] = {}
        for name, product in each.products.items():
            for owner in (*(edge.node for edge in product.edges), *(weight.node for weight in product.weights)):
                node = nodes[str(owner.name)]
                here.setdefault(node, _Site((each.precision.value, name), each.precision, {}, {}))
            for edge in product.edges:
                scale = scale_from_amax(each.plan.amax[edge_key(edge)], edge.precision, bits)
                here[nodes[str(edge.node.name)]].scales[edge.index] = torch.from_numpy(np.asarray(scale))
            for weight in product.weights:
                identity = weight_key(weight)
                if identity not in kept:
                    array = require_finite(weight)
                    stored = StoredWeight(*quantise_weight(array, weight.axis, weight.precision, bits))
                    kept[identity] = torch.from_numpy(stored.restored(weight.axis))
                here[nodes[str(weight.node.name)]].weights[weight.index] = kept[identity]
        for node, site in here.items():
            found.setdefault(node, []).append(site)
    return found


def _keys(sites: Sequence[_Site]) -> list[_Key]:
    return [site.key for site in sites]


def _centred(value: Tensor, count: int) -> Tensor:
    """The first ``count`` images' values [count, elements], each image's less their mean; single values as they are."""
    rows = value[:count].reshape(count, -1)
    return rows - rows.mean(dim=1, keepdim=True) if rows.shape[1] > 1 else rows


def _power(value: Tensor) -> float:
    return float(value.square().sum(dtype=torch.float64))


def _fixed_batch(network: ir.Model) -> int:
    shape = network.graph.inputs[0].shape
    first = shape[0] if shape is not None and len(shape) else 1
    return first if isinstance(first, int) and first > 0 else 1
