"""The noise that quantised layers add at the outputs, measured by running quantised graphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.runtime.runner import OnnxRunner, checked_runner, onnx_runner
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.graph.external import weight_folder
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.sensitivity.products import QuantizableProducts

Outputs = dict[str, npt.NDArray[np.float64]]
"""Float outputs by name, [N, elements], each image's less their mean."""


def measured_noise(
    formats: Sequence[QuantizableProducts],
    bits: int,
    batches: Sequence[Batch],
    reporter: Reporter = SILENT,
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Noise-to-signal power by precision: of each layer quantised alone, and of all that the rules quantise."""
    runs = [(each, name) for each in formats for name in each.products]
    damage: dict[str, dict[str, float]] = {each.precision.value: {} for each in formats}
    together: dict[str, float] = {}
    references: dict[str, tuple[Outputs, bool]] = {}
    for each in formats:
        precision, folder = each.precision.value, weight_folder(each.plan.network)
        clean = _outputs(onnx_runner(_bytes(each.plan.network), folder=folder), batches)
        optimize = _survives_optimizing(_quantized(each, each.products, bits), batches, folder)
        noisy = _outputs(
            onnx_runner(_quantized(each, sorted(each.chosen), bits), optimize=optimize, folder=folder), batches
        )
        references[precision], together[precision] = (clean, optimize), noise_to_signal(clean, noisy)
    for each, name in reporter.track(runs, "sensitivity (layers)", len(runs)):
        (clean, optimize), folder = references[each.precision.value], weight_folder(each.plan.network)
        noisy = _outputs(onnx_runner(_quantized(each, [name], bits), optimize=optimize, folder=folder), batches)
        damage[each.precision.value][name] = noise_to_signal(clean, noisy)
    return damage, together


def noise_to_signal(reference: Outputs, candidate: Outputs) -> float:
    """``Σ||candidate - reference||² / Σ||reference||²``, summed over the outputs that are not constant."""
    ratio = 0.0
    for name, clean in reference.items():
        if signal := float(np.square(clean).sum()):
            ratio += float(np.square(candidate[name] - clean).sum()) / signal
    return ratio


def _quantized(each: QuantizableProducts, names: Iterable[str], bits: int) -> bytes:
    network = each.plan.network.clone()
    insert_qdq(network, each.placement_of(names, network), each.plan.amax, {}, bits)
    return _bytes(network)


def _bytes(network: ir.Model) -> bytes:
    return bytes(ir.serde.serialize_model(network).SerializeToString())


def _survives_optimizing(model: bytes, batches: Sequence[Batch], folder: Path | None) -> bool:
    """Whether ONNX Runtime's optimiser leaves a graph's outputs as they are; some FP8 graphs it breaks."""
    image = next(iter(onnx_runner(model, optimize=False, folder=folder).dtypes))
    return not checked_runner(model, batches[0].first(4).feeds(image), folder=folder)[1]


def _outputs(runner: OnnxRunner, batches: Sequence[Batch]) -> Outputs:
    image = next(iter(runner.dtypes))
    found: dict[str, list[npt.NDArray[np.float64]]] = {}
    for batch in batches:
        for name, value in runner(batch.feeds(image)).items():
            if np.issubdtype(value.dtype, np.floating):
                rows = value.reshape(len(batch.images), -1).astype(np.float64)
                found.setdefault(name, []).append(
                    rows - rows.mean(axis=1, keepdims=True) if rows.shape[1] > 1 else rows
                )
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    for name, value in whole.items():
        if not np.isfinite(value).all():
            raise ResvitError(
                f"The network's output '{name}' holds NaN or infinity.", "Check the checkpoint and the preprocessing."
            )
    return whole
