"""What calibrating and quantising costs: ours and ModelOpt's, beside one plain float pass over the same images.

    python benchmarks/quantize_job.py --model timm:vit_small_r26_s32_224 --images 512

Each job runs in a process of its own, which reports the seconds of its work (imports left out) and its peak memory.
Plain and ours are interleaved, so that a busy machine slows both; the figure is the median of the paired ratios.
Weights and images are random: neither changes what is computed. One batch size serves the plain pass and ours;
ModelOpt's calibration takes the images in its own way.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import write_result

from resvit_calibrate.images.held_back import HELD_BACK
from resvit_calibrate.images.image_set import Batch
from resvit_engines.process import peak_memory_mib

POOL = 64


def images_in_batches(shape: tuple[int, ...], images: int, batch: int) -> Iterator[Batch]:
    """Seeded random images, at most 64 different ones: memory shall be the job's, not the data's."""
    pool = np.random.default_rng(0).standard_normal((min(images, POOL), *shape), dtype=np.float32)
    for start in range(0, images, batch):
        yield Batch(pool[np.arange(start, min(start + batch, images)) % len(pool)], None)


def first_of(batches: list[Batch], count: int) -> Iterator[Batch]:
    """The first so many images."""
    for batch in batches:
        if count > 0:
            yield batch.first(count)
        count -= len(batch.images)


def plain(model: Path, feed: Iterator[Batch], out: Path) -> Callable[[], None]:
    """One float pass, outputs dropped."""
    from resvit_calibrate.runtime.runner import onnx_runner

    del out

    def work() -> None:
        runner = onnx_runner(model)
        for batch in feed:
            runner({"input": batch.images})

    return work


def ours(model: Path, feed: Iterator[Batch], out: Path) -> Callable[[], None]:
    """All of ``--effort fast``: statistics, ranges, smoothing, biases, the check on held-back images, Q/DQ and FP16."""
    from resvit_calibrate.ranges.collect import collect_statistics
    from resvit_calibrate.ranges.ranges import ranges_from
    from resvit_engines.targets.table import Precision
    from resvit_quantize.check.choose import HeldBack
    from resvit_quantize.quantize import quantize_model
    from resvit_quantize.settings import QuantizeSettings

    def work() -> None:
        held = []
        while sum(len(batch.images) for batch in held) < HELD_BACK:
            held.append(next(feed))
        seen = collect_statistics(model, feed)
        ranges = ranges_from(seen, "random images")
        judged = HeldBack(lambda count: first_of(held, count), ranged=lambda count: first_of(held, count))
        quantize_model(model, ranges, QuantizeSettings(Precision.INT8), out, statistics=seen, held_back=judged)

    return work


def modelopt(model: Path, feed: Iterator[Batch], out: Path) -> Callable[[], None]:
    """ModelOpt's ONNX quantiser at its default, entropy calibration."""
    import modelopt.onnx.quantization  # noqa: F401  (imported before the clock starts)

    from resvit_calibrate.ranges.estimators import Estimator
    from resvit_engines.targets.table import Precision
    from resvit_quantize.modelopt.quantizer import quantize_with_modelopt
    from resvit_quantize.settings import QuantizeSettings

    def work() -> None:
        quantize_with_modelopt(model, feed, QuantizeSettings(Precision.INT8, Estimator.ENTROPY), out)

    return work


JOBS = {"plain": plain, "ours": ours, "modelopt": modelopt}


def export(name: str, folder: Path) -> Path:
    """Export the float ONNX with a free batch, as the tool does it."""
    command = [str(Path(sys.executable).with_name("resvit-export")), "export", "--model", name, "--batch", "1:8:64"]
    done = subprocess.run(
        [*command, "--target", "jetson-orin", "--run", str(folder), "--json"], stdout=subprocess.PIPE, check=True
    )
    return Path(json.loads(done.stdout)["folder"]) / "model.onnx"


def run_child(job: str, model: Path, images: int, batch: int, limit: float | None = None) -> dict[str, Any]:
    """Run one job in a process of its own; ``limit`` in seconds ends one that takes too long to wait for."""
    options = ["--model", str(model), "--images", str(images), "--batch", str(batch)]
    command = [sys.executable, __file__, "--child", job, *options]
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"ended after {limit:.0f} s"}
    if done.returncode:
        return {"failed": f"exit status {done.returncode}" + (" (killed)" if done.returncode == -9 else "")}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(job: str, model: Path, images: int, batch: int) -> None:
    from resvit_calibrate.runtime.runner import onnx_runner

    shape = tuple(int(size) for size in onnx_runner(model).session.get_inputs()[0].shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        work = JOBS[job](model, images_in_batches(shape, images, batch), Path(folder) / "out.onnx")
        start, cpu = time.perf_counter(), time.process_time()
        work()
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
    click.echo(json.dumps({"seconds": round(seconds, 2), "cpu": round(used, 2), "peak_mib": peak_memory_mib()}))


@click.command()
@click.option("--model", default="timm:vit_small_r26_s32_224", show_default=True)
@click.option("--images", default=512, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--modelopt-limit", default=1800.0, show_default=True, help="Seconds after which ModelOpt is ended.")
@click.option("--child", "job", type=click.Choice(list(JOBS)), hidden=True)
def main(model: str, images: int, batch: int, repeats: int, modelopt_limit: float, job: str | None) -> None:
    """Compare the cost of quantising with one plain pass."""
    if job:
        child(job, Path(model), images, batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        float_model = export(model, Path(folder))
        load = [round(value, 2) for value in os.getloadavg()]
        runs: dict[str, list[dict[str, Any]]] = {"plain": [], "ours": []}
        for _ in range(repeats):
            for name, results in runs.items():
                results.append(run_child(name, float_model, images, batch))
                click.echo(f"{name}: {results[-1]}")
        theirs = run_child("modelopt", float_model, images, batch, modelopt_limit)
        click.echo(f"modelopt: {theirs}")
    pairs = list(zip(runs["plain"], runs["ours"], strict=True))
    ours_seconds = statistics.median(result["seconds"] for result in runs["ours"])
    result = {
        "model": model,
        "images": images,
        "batch": batch,
        "load_average_before": load,
        "runs": {**runs, "modelopt": [theirs]},
        "time_ours_to_plain": round(statistics.median(b["seconds"] / a["seconds"] for a, b in pairs), 3),
        "memory_ours_to_plain": round(statistics.median(b["peak_mib"] / a["peak_mib"] for a, b in pairs), 3),
        "time_modelopt_to_ours": round(theirs["seconds"] / ours_seconds, 2) if "seconds" in theirs else None,
    }
    label = model.rpartition(":")[2]
    click.echo(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))
    click.echo(f"written: {write_result(f'quantize_job-{label}-{images}', result)}")


if __name__ == "__main__":
    main()
