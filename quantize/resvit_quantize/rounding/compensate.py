"""Weights rounded layer by layer so that each layer makes up for the error that has reached it.

The float and the quantised network run side by side over the calibration images, node by node. At each quantised
layer the float output is known, and the input that the quantised layers in front really deliver. From these come,
in closed form, the weights that fit best (a ridge regression, kept near the trained ones), their rounding in the
order of GPTQ, where the error of each rounded input is taken up by those not yet rounded (Frantar et al. 2023,
after Hassibi and Stork's optimal brain surgeon), and the bias. Layers left in FP16 are fitted alike, without rounding.
Fitting to the float output from the quantised input is GPTAQ's asymmetric calibration (Li et al. 2025). Positions
count as much as they matter to the network's outputs (:mod:`resvit_quantize.rounding.importance`). No labels, and no
random choices but the sampled rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.runtime.sessions import cpu_count
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.equalize.biases import add_biases
from resvit_quantize.graph.network import constant
from resvit_quantize.placement.grid import StoredWeight, largest_level, quantise_weight, require_finite, scale_from_amax
from resvit_quantize.placement.placement import Edge, EdgeKey, Placement, Weight, WeightKey, edge_key, weight_key
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.qdq.plan import Plan
from resvit_quantize.rounding.importance import position_importance
from resvit_quantize.rounding.layer_rows import LayerRows, can_fit, grouped_weight, ungrouped_weight
from resvit_quantize.settings import QuantizeSettings
from resvit_quantize.torch_graph.fake_quant import fake_quantize
from resvit_quantize.torch_graph.graph import TorchGraph

_DAMPING = 0.01
"""Of the mean diagonal, added to the Hessian: what GPTQ's authors use."""
_RIDGES = (0.03, 0.3)
"""How strongly the fit is held to the trained weights, as shares of the mean diagonal; rows held out decide."""
_HELD_OUT = 5
"""Every fifth row judges the fit and takes no part in it."""
_FEWEST_ROWS = 2 * _HELD_OUT
"""With fewer there is nothing to fit to: rounded to nearest."""
_DEAD = 1e-12
"""Inputs of less power are constant: 8-bit steps are at least 2^-20."""
_CLIPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
"""Ranges tried for each activation, as shares of the calibrated one."""
_BLOCK = 128


@dataclass
class Compensation:
    """What the pass decided: weights in 8 bits, clips of activations, and biases to add to layers' outputs [O]."""

    stored: dict[WeightKey, StoredWeight] = field(default_factory=dict)
    amax: dict[EdgeKey, float] = field(default_factory=dict)
    fitted: dict[str, np.ndarray] = field(default_factory=dict)
    """By the constant's name: weights of layers that are not quantised, fitted to what reaches them."""
    bias: dict[str, np.ndarray] = field(default_factory=dict)
    """By node name: what is added to the output, per channel."""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By node name: the output's noise-to-signal power ratio with plain rounding, and after compensation."""

    def insert_into(
        self, network: ir.Model, placement: Placement, bits: int, floors: Mapping[str, float] | None = None
    ) -> None:
        """Put Q/DQ pairs, weights and biases into the network that the pass ran on; ``floors`` as ``insert_qdq``."""
        for name, array in self.fitted.items():
            network.graph.initializers[name].const_value = ir.tensor(array, name=name)
        insert_qdq(network, placement, self.amax, self.stored, bits, floors)
        add_biases(network, self.bias)


def compensate(
    plan: Plan, images: Sequence[Batch], settings: QuantizeSettings, reporter: Reporter = SILENT
) -> Compensation:
    """Round all weights of the plan on calibration images, in chunks of the graph's batch.

    Every chunk's live activations stay in memory. Raises :class:`ResvitError` for weights that are not finite and
    graphs that torch cannot run.
    """
    graph = TorchGraph(plan.network)
    products = [product.node for product in plan.analysis.products if product.is_layer]
    threads = torch.get_num_threads()
    torch.set_num_threads(cpu_count())
    try:
        importance = position_importance(graph, products, images) if settings.methods.importance else {}
        run = _Run(graph, plan, images, settings, importance)
        with torch.inference_mode():
            for node in reporter.track(graph.nodes, "round weights", len(graph.nodes)):
                run.step(node)
    finally:
        torch.set_num_threads(threads)
    return run.compensation


Chunks: TypeAlias = "list[Tensor]"


class _Run:
    """Both networks' values, chunk by chunk, and what has been decided so far."""

    def __init__(
        self,
        graph: TorchGraph,
        plan: Plan,
        images: Sequence[Batch],
        settings: QuantizeSettings,
        importance: Mapping[ir.Node, Tensor],
    ) -> None:
        self.graph, self.settings, self.importance = graph, settings, importance
        self.compensation = Compensation(amax=dict(plan.amax))
        self.edges = {(edge.node, edge.index): edge for edge in plan.placement.edges}
        self.weights = {weight.node: weight for weight in plan.placement.weights}
        self.products = {p.node for p in plan.analysis.products if p.is_layer}
        self.readers = Counter(edge_key(edge) for edge in plan.placement.edges)
        self.shared = Counter(weight_key(weight)[0] for weight in plan.placement.weights)
        self.count = len(images)
        feeds = [graph.feeds(chunk) for chunk in images]
        self.exact: dict[str, Chunks] = {name: [each[name] for each in feeds] for name in graph.inputs}
        self.noisy = dict(self.exact)

    def step(self, node: ir.Node) -> None:
        """Compute one node in both networks, deciding about its weight first."""
        exact, noisy = self._inputs(self.exact, node), self._inputs(self.noisy, node)
        outcome = self._evaluated(node, exact)
        # Where nothing is quantised yet, the two are one, and cost the time and memory of one.
        same = all(self.exact.get(v.name) is self.noisy.get(v.name) for v in node.inputs if v is not None and v.name)
        self._keep(self.exact, node, outcome)
        if node in self.weights:
            noisy, same = self._decide(self.weights[node], exact, noisy), False
        elif node in self.products and not same:
            noisy = self._refit(node, exact, noisy)
        else:
            for index, chunks in enumerate(noisy):
                edge = self.edges.get((node, index))
                if edge is not None and chunks is not None:
                    noisy[index], same = [self._quantized(edge, chunk) for chunk in chunks], False
        if not same:
            outcome = self._evaluated(node, noisy)
            if (added := self.compensation.bias.get(str(node.name))) is not None:
                bias = _per_channel(node, torch.from_numpy(added), outcome[0][0])
                outcome = [[chunk + bias for chunk in outcome[0]]]
        self._keep(self.noisy, node, outcome)
        for name in self.graph.last_use[node]:
            self.exact.pop(name, None)
            self.noisy.pop(name, None)

    def _inputs(self, values: dict[str, Chunks], node: ir.Node) -> list[Chunks | None]:
        found: list[Chunks | None] = []
        for value in node.inputs:
            if value is None:
                found.append(None)
            elif value.name in self.graph.slots:
                found.append([self.graph.tensor(str(value.name))] * self.count)
            else:
                found.append(values[str(value.name)])
        return found

    def _evaluated(self, node: ir.Node, inputs: Sequence[Chunks | None]) -> list[Chunks]:
        """The node's outputs, each in chunks."""
        outputs: list[Chunks] = []
        for index in range(self.count):
            result = self.graph.evaluate(node, [None if chunks is None else chunks[index] for chunks in inputs])
            results = result if isinstance(result, tuple) else (result,)
            outputs = outputs or [[] for _ in results]
            for output, value in zip(outputs, results, strict=True):
                output.append(value)
        return outputs

    def _keep(self, values: dict[str, Chunks], node: ir.Node, outputs: list[Chunks]) -> None:
        values.update({str(v.name): chunks for v, chunks in zip(node.outputs, outputs, strict=False)})

    def _quantized(self, edge: Edge, value: Tensor) -> Tensor:
        clip, bits = self.compensation.amax[edge_key(edge)], self.settings.bits
        scale = torch.tensor(scale_from_amax(clip, edge.precision, bits))
        return fake_quantize(value, scale, edge.precision, bits)

    def _decide(self, place: Weight, exact: list[Chunks | None], noisy: list[Chunks | None]) -> list[Chunks | None]:
        """Choose range, weight and bias of one layer; returns its quantised inputs."""
        node, edge = place.node, self.edges[place.node, 0]
        array, identity = require_finite(place), weight_key(place)
        read, reached = exact[0], noisy[0]
        assert read is not None
        assert reached is not None
        fits = can_fit(node, array.shape) and self.shared[identity[0]] == 1
        if fits:
            rows = LayerRows(node, array.shape, self.count, self.importance.get(node))
            weight = grouped_weight(node, torch.from_numpy(np.array(array)))
            target, reaching = rows.of(read) @ weight, rows.of(reached)  # [G, R, O/G], without the bias
            fits = target.shape[1] >= _FEWEST_ROWS
        if fits:
            if self.settings.methods.output_ranges and self.readers[edge_key(edge)] == 1:
                self.compensation.amax[edge_key(edge)] = self._clip(reaching, weight, target, rows.weights(), edge)
            self._fit(place, self._quantized(edge, reaching), target, weight, rows.weights())
        elif identity not in self.compensation.stored:
            self.compensation.stored[identity] = self._nearest(place)
        restored = torch.from_numpy(self.compensation.stored[identity].restored(place.axis))
        quantized = [self._quantized(edge, chunk) for chunk in reached]
        return [quantized, [restored] * self.count, *noisy[2:]]

    def _refit(self, node: ir.Node, exact: list[Chunks | None], noisy: list[Chunks | None]) -> list[Chunks | None]:
        """Fit a layer that keeps its precision to its float output, from what reaches it."""
        value, array = node.inputs[1], constant(node.inputs[1])
        read, reached = exact[0], noisy[0]
        if value is None or array is None or read is None or reached is None or array.dtype != np.float32:
            return noisy
        if len(list(value.uses())) > 1 or not can_fit(node, array.shape):
            return noisy
        rows = LayerRows(node, array.shape, self.count, self.importance.get(node))
        trained = grouped_weight(node, torch.from_numpy(np.array(array)))
        inputs, target = rows.of(reached), rows.of(read) @ trained
        if target.shape[1] < _FEWEST_ROWS:
            return noisy
        fit = _Fit(inputs, target, trained, rows.weights(), self.settings.methods.bias_correction)
        fitted = fit.fitted()
        if fitted is trained:
            return noisy
        weight = ungrouped_weight(node, fitted, array.shape).contiguous()
        self.compensation.fitted[str(value.name)] = weight.numpy()
        self._correct(node, fit, fitted)
        return [noisy[0], [weight] * self.count, *noisy[2:]]

    def _correct(self, node: ir.Node, fit: _Fit, weight: Tensor) -> None:
        """Keep the bias that goes with a weight [G, K, O/G]."""
        if self.settings.methods.bias_correction:
            alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
            self.compensation.bias[str(node.name)] = (alpha * fit.bias(weight)).reshape(-1).numpy()

    def _nearest(self, place: Weight) -> StoredWeight:
        return StoredWeight(*quantise_weight(require_finite(place), place.axis, place.precision, self.settings.bits))

    def _clip(self, noisy: Tensor, weight: Tensor, target: Tensor, counts: Tensor, edge: Edge) -> float:
        """The range with the least error at the layer's output, each row of which counts ``counts`` [R, 1]."""
        calibrated = chosen = self.compensation.amax[edge_key(edge)]
        best = np.inf
        part = slice(None, None, max(noisy.shape[1] // 2048, 1))
        for share in _CLIPS:
            scale = torch.tensor(scale_from_amax(calibrated * share, edge.precision, self.settings.bits))
            quantized = fake_quantize(noisy[:, part], scale, edge.precision, self.settings.bits)
            difference = quantized @ weight - target[:, part]
            if self.settings.methods.bias_correction:
                # The bias takes up what is constant.
                difference = difference - _mean(difference, counts[part])
            error = float((difference.square() * counts[part]).sum())
            if error < best:
                best, chosen = error, calibrated * share
        return chosen

    def _fit(self, place: Weight, rows: Tensor, target: Tensor, trained: Tensor, counts: Tensor) -> None:
        """Fit, round, and correct the bias of a layer of ``trained`` weights [G, K, O/G].

        From quantised inputs [G, R, K] and float outputs [G, R, O/G].
        """
        node, bits = place.node, self.settings.bits
        fit = _Fit(rows, target, trained, counts, self.settings.methods.bias_correction)

        def matrices(stored: StoredWeight) -> Tensor:
            return grouped_weight(node, torch.from_numpy(stored.restored(place.axis)))

        plain = self._nearest(place)
        best = round_weight(fit.fitted(), fit.regular(_DAMPING), place, bits)
        before, after = fit.error(matrices(plain)) / fit.power, fit.error(matrices(best)) / fit.power
        if not after < before:
            best, after = plain, before
        self.compensation.stored[weight_key(place)] = best
        self.compensation.errors[str(node.name)] = before, after
        self._correct(node, fit, matrices(best))


class _Fit:
    """The ridge regression of a layer of ``trained`` weights [G, K, O/G].

    From inputs [G, R, K] as they reach it to float outputs [G, R, O/G] without their bias; each row counts
    ``counts`` [R, 1].
    """

    def __init__(self, rows: Tensor, target: Tensor, trained: Tensor, counts: Tensor, corrects: bool) -> None:
        held = torch.arange(rows.shape[1]) % _HELD_OUT == 0
        used = counts[~held]
        self.mean, self.wanted = (float(corrects) * _mean(part[:, ~held], used) for part in (rows, target))
        inputs, outputs = ((part - mean) * counts.sqrt() for part, mean in ((rows, self.mean), (target, self.wanted)))
        self.trained = trained
        # Zeros stay: they may be those of 2:4 sparsity, and others are as good.
        self.kept = trained != 0
        self.hessian = inputs[:, ~held].mT @ inputs[:, ~held]
        self.missing = inputs[:, ~held].mT @ (outputs[:, ~held] - inputs[:, ~held] @ trained)
        diagonal = self.hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        # Where all inputs of a group are dead, any number keeps the matrix regular.
        self.diagonal = torch.where(diagonal > _DEAD, diagonal, 1.0)
        self.held = inputs[:, held], outputs[:, held]
        self.power = float(self.held[1].square().sum()) + 1e-30

    def regular(self, ridge: float) -> Tensor:
        """The Hessian [G, K, K] with ``ridge`` of its mean diagonal added."""
        return self.hessian + ridge * self.diagonal * torch.eye(self.hessian.shape[1])

    def error(self, weight: Tensor) -> float:
        """The squared error on the rows that took no part."""
        inputs, outputs = self.held
        return float((inputs @ weight - outputs).square().sum())

    def fitted(self) -> Tensor:
        """The weights with the least error: the trained ones or one of the fits."""
        fits = [self.trained]
        for ridge in _RIDGES:
            change = torch.cholesky_solve(self.missing, torch.linalg.cholesky(self.regular(ridge)))
            fits.append(self.trained + change * self.kept)
        return min(fits, key=self.error)

    def bias(self, weight: Tensor) -> Tensor:
        """What a weight leaves missing of the mean output [G, 1, O/G]."""
        return self.wanted - self.mean @ weight


def round_weight(weight: Tensor, hessian: Tensor, place: Weight, bits: int = 8) -> StoredWeight:
    """Round ``weight`` float32 [G, K, O/G] one input at a time, the error of each taken up by those to come.

    What is zero stays zero (as in SparseGPT, Frantar and Alistarh 2023), so that sparse weights stay sparse.
    ``hessian`` [G, K, K] is that of the inputs and must be positive definite. Inputs of much power come first.
    """
    node, precision, largest = place.node, place.precision, largest_level(place.precision, bits)
    shape = require_finite(place).shape
    order = hessian.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True)
    whole = ungrouped_weight(node, weight, shape)
    _, scale = quantise_weight(whole.numpy(), place.axis, precision, bits)
    groups = weight.shape[0]
    kept = (weight != 0)[:, order]
    steps = torch.from_numpy(scale).reshape(groups, -1)  # [G, O/G]
    ordered = hessian[:, order][:, :, order].double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor = torch.linalg.cholesky(inverse, upper=True).float()  # [G, K, K]
    open_weight = weight[:, order].clone()
    grid = torch.empty_like(open_weight)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        block = open_weight[:, start:end]
        errors = torch.empty_like(block)
        for index in range(end - start):
            column = start + index
            value = block[:, index]
            near = torch.maximum(fake_quantize(value, steps, precision, bits), -steps * largest)
            near = near * kept[:, column]
            grid[:, column] = near
            error = (value - near) / factor[:, column, column, None]
            block[:, index:] -= factor[:, column, column:end, None] * error[:, None]
            errors[:, index] = error
        open_weight[:, end:] -= factor[:, start:end, end:].mT @ errors
    found = torch.empty_like(grid)
    found[:, order] = grid
    values = ungrouped_weight(node, found, shape).numpy()
    stored, _ = quantise_weight(values, place.axis, precision, bits, amax=scale.astype(np.float64) * largest)
    return StoredWeight(stored, scale)


def _mean(rows: Tensor, counts: Tensor) -> Tensor:
    """The mean [G, 1, N] of rows [G, R, N] that count ``counts`` [R, 1]."""
    return (rows * counts).sum(1, keepdim=True) / counts.sum().clamp_min(1e-30)


def _per_channel(node: ir.Node, bias: Tensor, output: Tensor) -> Tensor:
    return bias if node.op_type in ("MatMul", "Gemm") else bias.reshape(-1, *[1] * (output.ndim - 2))
