"""NVIDIA ModelOpt's ONNX quantiser.

Its guide: entropy calibration is the default for INT8 and FP8 and max the other choice; calibration data is
required for accuracy; the rest is left at its defaults (FP16 beside the quantised operators, unless said otherwise).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peers.images import Reader
from peers.methods import Job, Work


def work(job: Job, settings: Mapping[str, Any]) -> Work:
    """Quantise with ``method``, limited to the operator ``types`` if given; attention is left out if so set."""
    from modelopt.onnx.quantization import quantize

    types = settings.get("types")

    def run() -> None:
        quantize(
            str(job.model),
            quantize_mode=job.precision,
            calibration_data_reader=Reader(job.calibration, "input", job.batch),
            calibration_method=settings["method"],
            calibration_eps=["cpu"],
            op_types_to_quantize=list(types) if types else None,
            high_precision_dtype=settings.get("high_precision_dtype", "fp16"),
            disable_mha_qdq=bool(settings.get("disable_mha_qdq")),
            output_path=str(job.out),
            log_level="WARNING",
        )

    return Work(run)
