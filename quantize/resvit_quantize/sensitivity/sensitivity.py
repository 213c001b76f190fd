"""Which layers the accuracy loss comes from: the noise that quantising each one alone adds at the outputs.

A layer's *damage* is a noise-to-signal power ratio, ``E||y_q - y||² / E||y||²`` over images, where ``y`` are the
network's outputs, each image's less their mean (what all classes share changes no answer), and ``y_q`` the outputs
with this one layer quantised: its input, its weight, and the shortcut of the residual Add that it feeds. Several
outputs are normalised one by one and summed. ``-10 log10(damage)`` is the SQNR in dB.

The one-pass method takes it to first order in the layer's own error, hence the damage to second order: with
``d`` the error at the layer's output, computed beside the float forward from its quantised input and weight, and
``J`` the Jacobian from there to the outputs, ``damage = E||J d||² / E||y||²``. ``||J d||²`` needs no Jacobian: for
random signs ``u`` at the outputs, ``E_u[((Jᵀu)·d)²]`` is just that (Hutchinson, "A stochastic estimator of the trace
of the influence matrix", 1990), and one backward pass gives ``Jᵀu`` at all layers. A few ``u`` an image do, since
the images average them. Damages of independent small errors add up, so a layer's share of the sum is what leaving it
out saves (the same sum underlies Dong et al., "HAWQ-V2", NeurIPS 2020).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.readers.user.loader import in_batches_of
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.sensitivity.method import Method
from resvit_quantize.sensitivity.products import QuantizableProducts, quantizable_products, sharing_a_network
from resvit_quantize.settings import QuantizeSettings

if TYPE_CHECKING:
    from resvit_quantize.sensitivity.known_noise import KnownNoise, NoiseSource
    from resvit_quantize.sensitivity.task_loss import TaskLoss

COVERAGE = 0.98
"""The share of the multiply-accumulates that a short list of exclusions should leave quantised."""


@dataclass(frozen=True)
class LayerDamage:
    """One product and what quantising it alone does."""

    node: str
    module: str
    group: str
    op: str
    macs: int
    """Multiply-accumulates for one image."""
    quantized: tuple[str, ...]
    """The precisions in which the rules and the recipe quantise it."""
    damage: dict[str, float]
    """Noise-to-signal power ratio by precision."""

    @property
    def block(self) -> str:
        """The module path up to its last number: the block that the layer is part of."""
        found = re.match(r".*\.\d+(?=\.)|\d+(?=\.)", self.module)
        return found[0] if found else self.module.rpartition(".")[0] or self.module or self.node


@dataclass(frozen=True)
class Sensitivity:
    """The damages of all layers, in the order of the graph."""

    method: Method
    precision: str
    """What the recipe quantises to."""
    images: int
    macs: int
    """Multiply-accumulates of all convolutions and weighted products for one image, also those never quantised."""
    together: dict[str, float]
    """The measured noise-to-signal power ratio with all quantised at once that the rules quantise, by precision."""
    layers: tuple[LayerDamage, ...]
    measure: str = "outputs"
    """What noise is measured in: ``outputs``, or ``loss``, the task's own."""

    def ranked(self, precision: str) -> list[LayerDamage]:
        """Layers that can have this precision, the worst first."""
        known = [layer for layer in self.layers if precision in layer.damage]
        return sorted(known, key=lambda layer: (-layer.damage[precision], layer.node))

    def chosen(self, precision: str) -> list[LayerDamage]:
        """Those that the rules and the recipe quantise, the worst first."""
        return [layer for layer in self.ranked(precision) if precision in layer.quantized]

    def total(self, precision: str) -> float:
        """The sum of the damages of all that is quantised."""
        return math.fsum(layer.damage[precision] for layer in self.chosen(precision))

    def share(self, layer: LayerDamage, precision: str) -> float:
        """The part of the total, 0 to 1, that leaving a layer out saves; 0 where it is left out already."""
        total = self.total(precision)
        return layer.damage[precision] / total if total > 0 and precision in layer.quantized else 0.0

    def shares_by(self, key: str, precision: str) -> dict[str, float]:
        """Shares summed by an attribute of the layers (``group``, ``block``), the largest first."""
        sums: dict[str, float] = {}
        for layer in self.chosen(precision):
            name = str(getattr(layer, key))
            sums[name] = sums.get(name, 0.0) + self.share(layer, precision)
        return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))

    def coverage(self, precision: str, without: Iterable[LayerDamage] = ()) -> float:
        """The share of the multiply-accumulates, 0 to 1, that is quantised ``without`` these layers."""
        left = {layer.node for layer in without}
        done = sum(layer.macs for layer in self.chosen(precision) if layer.node not in left)
        return done / self.macs if self.macs else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers = [{**asdict(layer), "quantized": list(layer.quantized)} for layer in self.layers]
        return {**asdict(self), "method": self.method.value, "layers": layers}


def sensitivity_from_json(document: Mapping[str, Any]) -> Sensitivity:
    """What ``to_json`` wrote. Raises :class:`ResvitError` for anything else."""
    try:
        layers = (LayerDamage(**{**item, "quantized": tuple(item["quantized"])}) for item in document["layers"])
        return Sensitivity(**{**document, "method": Method(document["method"]), "layers": tuple(layers)})
    except (KeyError, TypeError, ValueError) as error:
        raise ResvitError("This is no record of sensitivities.", "Run 'resvit-export sensitivity' again.") from error


def sqnr_db(damage: float) -> float:
    """A noise-to-signal power ratio as SQNR in dB; infinite without noise."""
    return -10.0 * math.log10(damage) if damage > 0 else math.inf


def layers_to_exclude(
    sensitivity: Sensitivity, precision: str, *, target: float = 0.5, coverage: float = 0.0
) -> tuple[LayerDamage, ...]:
    """The fewest layers whose leaving out brings the damage down to ``target`` of the total, the worst first.

    Layers that would bring the quantised share of multiply-accumulates below ``coverage`` are passed over; then
    the target may be missed, and the list holds all the others that save at least 1%.
    """
    total, saved = sensitivity.total(precision), 0.0
    taken: list[LayerDamage] = []
    for layer in sensitivity.chosen(precision):
        if saved >= (1.0 - target) * total or (coverage and layer.damage[precision] < 0.01 * total):
            break
        if sensitivity.coverage(precision, [*taken, layer]) >= coverage:
            taken.append(layer)
            saved += layer.damage[precision]
    return tuple(taken)


def measure_sensitivity(
    graph: AnalysedGraph,
    ranges: Ranges,
    settings: QuantizeSettings,
    images: Iterable[Batch],
    reporter: Reporter = SILENT,
    total: int = 0,
    *,
    precisions: tuple[str, ...] = ("int8", "fp8"),
    probes: int = 4,
    seed: int = 0,
    loss: TaskLoss | None = None,
    evenly: bool = False,
) -> Sensitivity:
    """Estimate all damages in one pass over ``images``, in batches of any size (``total`` of them, for the progress).

    With ``loss``, the images have their targets, and a damage is ``E[(g·d)²] / E[L²]``: the squared
    change of an image's loss to first order, against the loss itself; ``g`` is its gradient at the layer's output.

    ``evenly``, every image counts as much, however much noise it makes: then shares of layers are told, and no ratios.

    ``probes`` backward passes are made for an image. The same seed gives the same result on the same machine.
    Memory is that of one image's forward and backward pass, or of the batch that the model is fixed to. Raises
    :class:`ResvitError` for operators without a gradient here (use ``brute_force_sensitivity``), no images, and
    outputs that are not finite.
    """
    from resvit_quantize.sensitivity.one_pass import DamageEstimate, threads_for

    formats = _formats(graph, ranges, settings, precisions)
    estimates = [
        DamageEstimate(group, settings.bits, probes, seed, loss, evenly=evenly) for group in sharing_a_network(formats)
    ]
    count = 0
    size = estimates[0].batch
    with threads_for(sum(product.macs for product in formats[0].plan.analysis.products)):
        for batch in reporter.track(in_batches_of(size, images), "sensitivity", total, size):
            for estimate in estimates:
                estimate.add(batch)
            count += len(batch.images)
    _require_images(count)
    damage: dict[str, dict[str, float]] = {}
    together: dict[str, float] = {}
    for estimate in estimates:
        damage.update(estimate.damage())
        together.update(estimate.together())
    found = _sensitivity(Method.GRADIENT, settings, count, formats, damage, together)
    return found if loss is None else replace(found, measure="loss")


def brute_force_sensitivity(
    graph: AnalysedGraph,
    ranges: Ranges,
    settings: QuantizeSettings,
    images: Iterable[Batch],
    reporter: Reporter = SILENT,
    *,
    precisions: tuple[str, ...] = ("int8", "fp8"),
    store: KnownNoise | None = None,
) -> Sensitivity:
    """Measure all damages: one layer at a time through the Q/DQ pass, the rest in FP32, run by ONNX Runtime.

    Takes as many passes over the images as there are layers and precisions, and works for every operator. What is in
    the ``store`` is not measured again, and what is measured goes there. The images are kept in memory. Raises
    :class:`ResvitError` for no images, and outputs that are not finite.
    """
    from resvit_quantize.sensitivity.brute_force import measured_noise, sources_in

    batches = list(images)
    count = sum(len(batch.images) for batch in batches)
    _require_images(count)
    formats = _formats(graph, ranges, settings, precisions)
    wanted, known = sources_in(formats), store.read() if store else {}
    missing = [one for one in wanted if one not in known]
    found = measured_noise(formats, settings.bits, batches, missing)
    done = len(wanted) - len(missing)
    for one, noise in reporter.track(found, "sensitivity (layers)", len(wanted), before=done):
        known[one] = noise
        if store is not None:
            store.write(known)
    damage: dict[str, dict[str, float]] = {each.precision.value: {} for each in formats}
    together: dict[str, float] = {}
    for one in wanted:
        if one.layer is None:
            together[one.precision] = known[one]
        else:
            damage[one.precision][one.layer] = known[one]
    return _sensitivity(Method.BRUTE_FORCE, settings, count, formats, damage, together)


def noise_sources(
    graph: AnalysedGraph, ranges: Ranges, settings: QuantizeSettings, precisions: tuple[str, ...]
) -> list[NoiseSource]:
    """All whose noise ``brute_force_sensitivity`` measures, in its order; raises as that."""
    from resvit_quantize.sensitivity.brute_force import sources_in

    return sources_in(_formats(graph, ranges, settings, precisions))


def noise_of(
    graph: AnalysedGraph,
    ranges: Ranges,
    settings: QuantizeSettings,
    images: Iterable[Batch],
    precisions: tuple[str, ...],
    wanted: Iterable[NoiseSource],
) -> Iterator[tuple[NoiseSource, float]]:
    """The noise-to-signal power of some, to the bit as ``brute_force_sensitivity`` measures it; raises as that."""
    from resvit_quantize.sensitivity.brute_force import measured_noise

    return measured_noise(_formats(graph, ranges, settings, precisions), settings.bits, list(images), wanted)


def _formats(
    graph: AnalysedGraph, ranges: Ranges, settings: QuantizeSettings, precisions: tuple[str, ...]
) -> tuple[QuantizableProducts, ...]:
    wanted = [Precision(name) for name in dict.fromkeys(precisions)]
    if not wanted or not all(p.quantises for p in (*wanted, settings.precision)):
        raise ResvitError(
            "Sensitivity is measured for int8 and fp8: FP16 is what a layer is left in.", "Say --precision int8 or fp8."
        )
    if settings.bits < 8:
        wanted = [Precision.INT8]
    return tuple(quantizable_products(graph, ranges, settings, precision) for precision in wanted)


def _require_images(count: int) -> None:
    if not count:
        raise ResvitError("There are no images to measure sensitivity on.", "Say --data, and --images 1 or more.")


def _sensitivity(
    method: Method,
    settings: QuantizeSettings,
    images: int,
    formats: tuple[QuantizableProducts, ...],
    damage: Mapping[str, Mapping[str, float]],
    together: dict[str, float],
) -> Sensitivity:
    products = formats[0].plan.analysis.products
    layers = []
    for product in products:
        inside = {
            each.precision.value: product.name in each.chosen for each in formats if product.name in each.products
        }
        if inside:
            layers.append(
                LayerDamage(
                    node=product.name,
                    module=product.module,
                    group=product.part.value,
                    op=product.node.op_type,
                    macs=product.macs,
                    quantized=tuple(precision for precision, chosen in inside.items() if chosen),
                    damage={precision: damage[precision][product.name] for precision in inside},
                )
            )
    macs = sum(product.macs for product in products if product.weight is not None)
    return Sensitivity(method, settings.precision.value, images, macs, together, tuple(layers))
