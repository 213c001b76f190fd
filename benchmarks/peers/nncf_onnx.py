"""NNCF's post-training quantisation of an ONNX model.

Its guide: ``ModelType.TRANSFORMER`` for networks with attention (which adds SmoothQuant and the mixed preset),
fast bias correction by default, the full one where accuracy is wanted, and some 300 calibration samples; here it
gets as many as every other quantiser.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peers.methods import Job, Work


def work(job: Job, settings: Mapping[str, Any]) -> Work:
    """Quantise with fast or full bias correction."""
    import nncf
    import onnx

    logging.getLogger("nncf").setLevel(logging.WARNING)

    def run() -> None:
        batches = [{"input": part.images} for part in job.calibration.batches(job.batch)]
        quantized = nncf.quantize(
            onnx.load(str(job.model)),
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            fast_bias_correction=settings["fast_bias_correction"],
        )
        onnx.save(quantized, str(job.out))

    return Work(run)
