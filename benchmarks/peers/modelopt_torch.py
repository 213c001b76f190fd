"""NVIDIA ModelOpt's quantiser of PyTorch modules, evaluated in PyTorch with its fake quantisers.

Its guide: ``INT8_SMOOTHQUANT_CFG`` for transformers, ``INT8_DEFAULT_CFG`` for CNNs, ``FP8_DEFAULT_CFG`` for FP8.
Fewer bits are set on its fake quantisers once they are calibrated: ranges by largest magnitude do not depend on bits,
and SmoothQuant is refused for any other number than 8.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from peers.coverage import weighted_macs
from peers.images import StoredImages
from peers.methods import Job, Work


def work(job: Job, settings: Mapping[str, Any]) -> Work:
    """Quantise the network that the float ONNX was exported from."""
    import modelopt.torch.quantization as mtq
    import torch
    from torch import nn

    from resvit_export.loading.checkpoint import load_checkpoint
    from resvit_export.loading.factories import module_from_name

    module = module_from_name(job.source, {})
    if job.checkpoint is not None:
        load_checkpoint(module, job.checkpoint)
    module.eval()
    config = copy.deepcopy(getattr(mtq, settings["config"]))
    found: dict[str, nn.Module] = {}

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            for part in job.calibration.batches(job.batch):
                model(torch.from_numpy(part.images))

    def run() -> None:
        found["model"] = mtq.quantize(module, config, forward)
        if job.bits != 8:
            _set_bits(found["model"], job.bits)

    def answers(images: StoredImages) -> tuple[npt.NDArray[np.float32], float, list[str]]:
        model = found["model"].eval()
        total = sum(macs for _, macs in weighted_macs(job.model))
        quantized, left = _quantized_macs(model, torch.from_numpy(next(images.batches(1)).images))
        with torch.inference_mode():
            parts = [model(torch.from_numpy(part.images)).float().numpy() for part in images.batches(job.batch)]
        return np.concatenate(parts), quantized / total, left

    return Work(run, answers, lambda: ["scored in PyTorch with its fake quantisers: it was not exported"])


def _set_bits(model: Any, bits: int) -> None:
    """Let every fake quantiser of 8-bit integers use ``bits``, over the range that it has."""
    for name, part in model.named_modules():
        if name.endswith("_quantizer") and getattr(part, "num_bits", None) == 8:
            part.num_bits = bits


def _quantized_macs(model: Any, image: Any) -> tuple[int, list[str]]:
    """Multiply-accumulates for one image of the layers whose input and weight are both quantised; the others."""
    import torch
    from torch import nn

    counts: dict[str, int] = {}
    hooks = []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for name, layer in layers.items():

        def count(layer: Any, _: Any, out: Any, name: str = name) -> None:
            counts[name] = counts.get(name, 0) + out.numel() * layer.weight[0].numel()

        hooks.append(layer.register_forward_hook(count))
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    total, left = 0, []
    for name, macs in counts.items():
        quantizers = [getattr(layers[name], kind, None) for kind in ("input_quantizer", "weight_quantizer")]
        if all(quantizer is not None and quantizer.is_enabled for quantizer in quantizers):
            total += macs
        else:
            left.append(name)
    return total, left
