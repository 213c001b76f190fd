"""What is compared: every quantiser in the settings that its own documentation recommends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peers.images import StoredImages

INT8, FP8 = "int8", "fp8"
LINEAR = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Job:
    """One quantisation: from the float ONNX (or the network that it came from) to ``out``.

    ``source`` names the network as ``--model`` does, ``checkpoint`` its weights: for quantisers of PyTorch modules.
    """

    model: Path
    source: str
    checkpoint: Path | None
    calibration: StoredImages
    batch: int
    precision: str
    bits: int
    out: Path


@dataclass(frozen=True)
class Work:
    """A quantiser with its imports done. ``run`` is what is timed.

    ``answers`` is for results that are no ONNX file: from images to (logits float32 [N, K], share of
    multiply-accumulates quantised, the layers left out). ``notes`` says what the reader of the table must know.
    """

    run: Callable[[], None]
    answers: Callable[[StoredImages], tuple[npt.NDArray[np.float32], float, list[str]]] | None = None
    notes: Callable[[], list[str]] = list


@dataclass(frozen=True)
class Method:
    """One row: ``module`` has ``work(job, settings) -> Work``; ``packages`` must be installed for it."""

    name: str
    label: str
    module: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...] = (INT8,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    native_bits: bool = False
    """Whether it quantises to fewer than 8 bits itself; the others' graphs are coarsened."""
    ablation: bool = False
    """Whether it is ours less one of its methods, and so no row of the comparison itself."""


def _ours(name: str, label: str, **settings: Any) -> Method:
    native = bool(settings.pop("native", True))
    return Method(name, label, "ours", ("onnxruntime", "onnx-ir"), (INT8, FP8), settings, native)


def _modelopt(name: str, label: str, **settings: Any) -> Method:
    return Method(name, label, "modelopt_onnx", ("nvidia-modelopt", "onnxruntime"), (INT8, FP8), settings)


def _ort(name: str, label: str, **settings: Any) -> Method:
    return Method(name, label, "ort", ("onnxruntime",), (INT8,), settings)


def _nncf(name: str, label: str, **settings: Any) -> Method:
    return Method(name, label, "nncf_onnx", ("nncf", "onnxruntime"), (INT8,), settings)


def _torch(name: str, label: str, precision: str, config: str) -> Method:
    packages = ("nvidia-modelopt", "requests", "torch")
    return Method(name, label, "modelopt_torch", packages, (precision,), {"config": config}, precision == INT8)


METHODS: tuple[Method, ...] = (
    _ours("ours-fast", "resvit, fast", effort="fast"),
    _ours("ours-best", "resvit, best", effort="best"),
    _ours("ours-coarsened", "resvit, fast, ranges for 8 bits", effort="fast", native=False),
    _modelopt("modelopt-entropy", "ModelOpt ONNX, default, entropy", method="entropy"),
    _modelopt("modelopt-max", "ModelOpt ONNX, default, max", method="max"),
    _modelopt("modelopt-linear-entropy", "ModelOpt ONNX, Conv/MatMul/Gemm, entropy", method="entropy", types=LINEAR),
    _modelopt("modelopt-linear-max", "ModelOpt ONNX, Conv/MatMul/Gemm, max", method="max", types=LINEAR),
    _modelopt(
        "modelopt-weighted-entropy",
        "ModelOpt ONNX, Conv/MatMul/Gemm without attention, entropy",
        method="entropy",
        types=LINEAR,
        disable_mha_qdq=True,
    ),
    _ort("ort-minmax", "ONNX Runtime, min-max", method="MinMax"),
    _ort("ort-percentile", "ONNX Runtime, percentile 99.999", method="Percentile"),
    _ort("ort-entropy", "ONNX Runtime, entropy (2048 bins)", method="Entropy", num_bins=2048, num_quantized_bins=128),
    _ort(
        "ort-linear-percentile",
        "ONNX Runtime, Conv/MatMul/Gemm, symmetric, percentile 99.999",
        method="Percentile",
        types=LINEAR,
        symmetric=True,
    ),
    _ort(
        "ort-weighted-percentile",
        "ONNX Runtime, Conv/MatMul/Gemm without attention, symmetric, percentile 99.999",
        method="Percentile",
        types=LINEAR,
        symmetric=True,
        weighted_alone=True,
    ),
    _nncf("nncf", "NNCF, transformer, fast bias correction", fast_bias_correction=True),
    _nncf("nncf-accurate", "NNCF, transformer, full bias correction", fast_bias_correction=False),
    _torch("modelopt-torch-smoothquant", "ModelOpt torch, SmoothQuant", INT8, "INT8_SMOOTHQUANT_CFG"),
    _torch("modelopt-torch-int8", "ModelOpt torch, INT8 default", INT8, "INT8_DEFAULT_CFG"),
    _torch("modelopt-torch-fp8", "ModelOpt torch, FP8 default", FP8, "FP8_DEFAULT_CFG"),
)

# Ours less one accuracy method at a time, by the fields of ``resvit_quantize.settings.Methods``.
ABLATIONS: tuple[Method, ...] = tuple(
    Method(
        f"ours-{effort}-no-{name.replace('_', '-')}",
        f"resvit, {effort}, no {name.replace('_', ' ')}",
        "ours",
        ("onnxruntime", "onnx-ir"),
        (INT8, FP8),
        {"effort": effort, "without": (name,)},
        native_bits=True,
        ablation=True,
    )
    for effort, names in (
        ("fast", ("smoothing", "shifting", "output_ranges", "bias_correction", "sparing")),
        ("best", ("smoothing", "shifting", "output_ranges", "importance", "sparing")),
    )
    for name in names
)

# ModelOpt's as cpu_target.py runs them: what is not quantised stays in FP32, for which processors have kernels.
ON_CPU: tuple[Method, ...] = (
    _modelopt("modelopt-cpu-max", "ModelOpt ONNX, max, FP32", method="max", high_precision_dtype="fp32"),
    _modelopt(
        "modelopt-cpu-weighted-max",
        "ModelOpt ONNX, Conv/MatMul/Gemm without attention, max, FP32",
        method="max",
        types=LINEAR,
        disable_mha_qdq=True,
        high_precision_dtype="fp32",
    ),
)

COMPARED = (*METHODS, *ABLATIONS)
BY_NAME = {method.name: method for method in (*COMPARED, *ON_CPU)}


def rows_of(names: tuple[str, ...], bits: tuple[int, ...], ablation: bool = False) -> list[tuple[Method, str, int]]:
    """All (method, precision, bits) of the table, INT8 by falling bits and then FP8; ``ablation`` adds ours with less.

    The control with coarsened ranges only says something below 8 bits.
    """
    chosen = [m for m in COMPARED if (m.name in names if names else ablation or not m.ablation)]
    rows = [
        (method, INT8, count)
        for count in sorted(bits, reverse=True)
        for method in chosen
        if INT8 in method.precisions and not (method.name == "ours-coarsened" and count == 8)
    ]
    return rows + [(m, FP8, 8) for m in chosen if FP8 in m.precisions and m.name != "ours-coarsened" and 8 in bits]
