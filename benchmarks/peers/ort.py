"""ONNX Runtime's static quantiser: S8S8, Q/DQ, weights per channel, after its own pre-processing.

Its guide calls S8S8 with Q/DQ the first choice, and asks for ``quant_pre_process`` before. Batches are fed one at a
time (``CalibStridedMinMax``): left alone it keeps every activation of every image. Its other option for this,
``CalibMaxIntermediateOutputs``, drops what it has collected (1.32), and is not used.
``quantize_static`` does not pass the number of histogram bins on, and entropy at its 128 bins returns min-max; the
ranges are therefore computed with its calibrator and handed over in its calibration cache.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peers.images import Reader
from peers.methods import Job, Work


def work(job: Job, settings: Mapping[str, Any]) -> Work:
    """Calibrate by ``method`` and quantise all supported operators, or ``types`` alone."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    method = CalibrationMethod[settings["method"]]
    types = list(settings.get("types", sorted({*QLinearOpsRegistry, *QDQRegistry})))
    remarks: list[str] = []
    options: dict[str, Any] = {"CalibStridedMinMax": 1}
    if settings.get("symmetric"):
        options |= {"ActivationSymmetric": True, "WeightSymmetric": True}

    def cached_ranges(model: Path, folder: Path) -> Path:
        reader = Reader(job.calibration, "input", job.batch)
        bins = {name: settings[name] for name in ("num_bins", "num_quantized_bins")}
        augmented = str(folder / "augmented.onnx")
        calibrator = create_calibrator(model, types, augmented, calibrate_method=method, extra_options=bins)
        for index in range(len(reader)):
            reader.set_range(index, index + 1)
            calibrator.collect_data(reader)
        save_tensors_data(calibrator.compute_data(), folder / "ranges.json")
        return folder / "ranges.json"

    def run() -> None:
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
            prepared = Path(scratch) / "prepared.onnx"
            try:
                quant_pre_process(str(job.model), str(prepared))
            except Exception as error:  # noqa: BLE001  it raises nothing narrower
                # What its own message and guide advise where symbolic shape inference does not come through.
                quant_pre_process(str(job.model), str(prepared), skip_symbolic_shape=True)
                remarks.append(f"pre-processed without symbolic shape inference, which ended with: {error}")
            cache = cached_ranges(prepared, Path(scratch)) if "num_bins" in settings else None
            quantize_static(
                str(prepared),
                str(job.out),
                Reader(job.calibration, "input", job.batch),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=types,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=unweighted(prepared) if settings.get("weighted_alone") else None,
                calibrate_method=method,
                extra_options=options,
                calibration_cache_path=cache,
            )

    return Work(run, notes=lambda: remarks)


def unweighted(model: Path) -> list[str]:
    """Names of the matrix products of two activations: its option ``MatMulConstBOnly`` does nothing with Q/DQ."""
    import onnx

    graph = onnx.load(str(model)).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in constants]
