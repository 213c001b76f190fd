"""What measuring costs: a plain ONNX Runtime pass against the statistics pass over the same images.

    python benchmarks/calibration.py --model timm:vit_small_r26_s32_224 --images 512

Both passes are timed whole (opening the model, running every batch) and interleaved, so that a busy machine slows
both; the figure is the median of the paired ratios. Peak memory comes from a child process each. Weights and images
are random: neither changes what is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_result

from resvit_calibrate.runtime import Arrays, onnx_runner
from resvit_calibrate.statistics import collect_statistics


def onnx_from_timm(name: str, path: Path) -> tuple[int, int, int]:
    """Export a timm model with random weights and a free batch size; returns its (C, H, W)."""
    import torch

    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", "qnms(Tensor dets) -> Tensor"):
        # timm imports torchvision, whose CUDA build fails beside CPU torch unless these operators exist.
        operator, signature = schema.split("(", 1)
        try:
            torch.library.define(f"torchvision::{operator}", f"({signature}")
        except RuntimeError:
            break
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    shape: tuple[int, int, int] = model.default_cfg["input_size"]
    program = torch.onnx.export(
        model,
        (torch.zeros(2, *shape),),
        dynamo=True,
        opset_version=20,
        verbose=False,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    program.save(str(path))
    return shape


def shape_of(path: Path) -> tuple[int, ...]:
    """The (C, H, W) of an ONNX model's first input."""
    return tuple(int(size) for size in onnx_runner(path).session.get_inputs()[0].shape[1:])


def batches(shape: tuple[int, ...], images: int, batch: int) -> Iterator[Arrays]:
    """Seeded random images, at most 64 different ones."""
    pool = np.random.default_rng(0).standard_normal((min(images, max(64, batch)), *shape), dtype=np.float32)
    for start in range(0, images, batch):
        yield {"input": pool[np.arange(start, min(start + batch, images)) % len(pool)]}


def plain_pass(model: Path, feed: Iterator[Arrays]) -> None:
    """The float model over every batch, outputs dropped."""
    runner = onnx_runner(model)
    for arrays in feed:
        runner(arrays)


def statistics_pass(model: Path, feed: Iterator[Arrays]) -> None:
    """The pass that is measured."""
    collect_statistics(model, feed)


PASSES = {"plain": plain_pass, "statistics": statistics_pass}


def peak_mib(which: str, model: Path, shape: tuple[int, ...], images: int, batch: int) -> int:
    """Peak resident memory in MiB of a child process that does one pass."""
    command = [sys.executable, __file__, "--child", which, "--model", str(model)]
    command += ["--images", str(images), "--batch", str(batch)]
    command += ["--shape", *map(str, shape)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_peak_mib() -> int:
    """Peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage reports the parent's peak where that is higher: it survives fork and exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def compare(model: Path, name: str, images: int, batch: int, repeats: int) -> dict[str, Any]:
    """Time both passes in turn, and measure the memory of each."""
    shape = shape_of(model)
    seconds: dict[str, list[float]] = {which: [] for which in PASSES}
    load = [round(value, 2) for value in os.getloadavg()]
    for _ in range(repeats):
        for which, run in PASSES.items():
            start = time.perf_counter()
            run(model, batches(shape, images, batch))
            seconds[which].append(time.perf_counter() - start)
    peaks = {which: peak_mib(which, model, shape, images, batch) for which in PASSES}
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["statistics"], strict=True)]
    return {
        "model": name,
        "images": images,
        "batch": batch,
        "seconds": {which: [round(value, 3) for value in values] for which, values in seconds.items()},
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratios": [round(ratio, 3) for ratio in ratios],
        "peak_mib": peaks,
        "memory_ratio": round(peaks["statistics"] / peaks["plain"], 3),
        "load_average": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="timm:vit_small_r26_s32_224", help="timm:NAME or an ONNX file")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=sorted(PASSES), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model = Path(options.model)
        PASSES[options.child](model, batches(tuple(options.shape), options.images, options.batch))
        sys.stdout.write(str(own_peak_mib()))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model)
        if options.model.startswith("timm:"):
            model = Path(folder) / "model.onnx"
            onnx_from_timm(options.model.removeprefix("timm:"), model)
        result = compare(model, options.model, options.images, options.batch, options.repeats)
    label = options.model.removeprefix("timm:") if options.model.startswith("timm:") else model.stem
    path = write_result(f"calibration-{label}", result)
    sys.stdout.write(json.dumps(result, indent=2) + f"\n{path}\n")


if __name__ == "__main__":
    main()
