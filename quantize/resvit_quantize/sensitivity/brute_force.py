"""The noise that quantised layers add at the outputs, measured by running quantised graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.runtime.runner import OnnxRunner, checked_runner, onnx_runner
from resvit_engines.errors import ResvitError
from resvit_quantize.graph.external import weight_folder
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.sensitivity.known_noise import NoiseSource
from resvit_quantize.sensitivity.products import QuantizableProducts

Outputs = dict[str, npt.NDArray[np.float64]]
"""Float outputs by name, [N, elements], each image's less their mean."""


def sources_in(formats: Sequence[QuantizableProducts]) -> list[NoiseSource]:
    """All that is to be measured, precision by precision: what the rules quantise together, and each layer alone."""
    return [NoiseSource(each.precision.value, name) for each in formats for name in (None, *each.products)]


def measured_noise(
    formats: Sequence[QuantizableProducts],
    bits: int,
    batches: Sequence[Batch],
    wanted: Iterable[NoiseSource],
) -> Iterator[tuple[NoiseSource, float]]:
    """Noise-to-signal power of what is ``wanted``, each with that; the float networks are run when they are needed."""
    references: dict[str, tuple[Outputs, bool]] = {}
    by_name = {each.precision.value: each for each in formats}
    for one in wanted:
        each = by_name[one.precision]
        folder = weight_folder(each.plan.network)
        if one.precision not in references:
            clean = _outputs(onnx_runner(_bytes(each.plan.network), folder=folder), batches)
            optimize = _survives_optimizing(_quantized(each, each.products, bits), batches, folder)
            references[one.precision] = clean, optimize
        clean, optimize = references[one.precision]
        model = _quantized(each, sorted(each.chosen) if one.layer is None else [one.layer], bits)
        yield one, noise_to_signal(clean, _outputs(onnx_runner(model, optimize=optimize, folder=folder), batches))


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
