"""What a quantised engine does, beside the FP16 engine of the same model: kernels and bytes, without a GPU.

    python benchmarks/engine_work.py --model timm:vit_small_r26_s32_224

TensorRT for RTX compiles FP16, our INT8 and FP8, and ModelOpt's INT8 and FP8 (its default placement), all for batch 1,
and lists every kernel with what it reads and writes. Weights and images are random: the compiler does not look at them,
so neither kernels nor bytes depend on ranges. SM 86 stands in for Jetson Orin (87), SM 89 for H100 (90): a proxy.

FP16 and ours go through the pipeline's own stages, so each engine is the one that ``resvit-export build`` makes.
``plain`` is our quantised ONNX as TensorRT itself gets it, without the forms that are for TensorRT for RTX alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import RESULTS, write_result

from resvit_calibrate.images.image_set import Batch
from resvit_engines.audit.kernel_totals import kernel_totals
from resvit_engines.builder.builder import build_engine
from resvit_engines.errors import ResvitError
from resvit_engines.targets.choice import with_builder
from resvit_engines.targets.table import Builder, find_target

TARGETS = {sm: with_builder(find_target(name), Builder.RTX) for sm, name in ((86, "a10"), (89, "rtx-4090"))}
COLUMNS = ("engine", "kernels", "8-bit conv", "8-bit gemm", "8-bit attention", "reformats", "MB", "of FP16", "weights")


@dataclass(frozen=True)
class Variant:
    """One way to an engine: who quantises, to what, and in which form it is compiled."""

    name: str
    precision: str
    modelopt: bool = False
    plain: bool = False


VARIANTS = (
    Variant("FP16", "fp16"),
    Variant("FP16 plain", "fp16", plain=True),
    Variant("INT8", "int8"),
    Variant("INT8 plain", "int8", plain=True),
    Variant("INT8 ModelOpt", "int8", modelopt=True),
    Variant("FP8", "fp8"),
    Variant("FP8 plain", "fp8", plain=True),
    Variant("FP8 ModelOpt", "fp8", modelopt=True),
)


def export(name: str, folder: Path) -> Path:
    """Export the float ONNX at batch 1, as the tool does it for a target of opset 20."""
    command = [str(Path(sys.executable).with_name("resvit-export")), "export", "--model", name, "--batch", "1"]
    done = subprocess.run(
        [*command, "--target", "jetson-orin", "--run", str(folder), "--json"], stdout=subprocess.PIPE, check=True
    )
    return Path(json.loads(done.stdout)["folder"]) / "model.onnx"


def images(model: Path, count: int) -> Iterator[Batch]:
    """Seeded random images, one a batch."""
    from resvit_calibrate.runtime.runner import onnx_runner

    shape = tuple(int(size) for size in onnx_runner(model).session.get_inputs()[0].shape[1:])
    for image in np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32):
        yield Batch(image[None], None)


def quantized(variant: Variant, model: Path, count: int, folder: Path) -> Path:
    """Write the ONNX that the variant compiles."""
    from resvit_calibrate.ranges.collect import collect_statistics
    from resvit_calibrate.ranges.estimators import Estimator
    from resvit_calibrate.ranges.ranges import ranges_from, ranges_from_json, save_ranges
    from resvit_calibrate.ranges.statistics import save_statistics, statistics_from_npz
    from resvit_engines.targets.table import Precision
    from resvit_export.to_tensorrt.copy import onnx_for_tensorrt, suit_builder
    from resvit_quantize.modelopt.quantizer import quantize_with_modelopt
    from resvit_quantize.quantize import quantize_model
    from resvit_quantize.settings import QuantizeSettings

    out = folder / f"{variant.name}.onnx"
    if variant.modelopt:
        settings = QuantizeSettings(Precision(variant.precision), Estimator.MAX)
        quantize_with_modelopt(model, images(model, count), settings, out)
        return out
    kept, seen = folder / "ranges.json", folder / "statistics.npz"
    if not kept.exists():
        statistics = collect_statistics(model, images(model, count))
        save_statistics(statistics, seen)
        save_ranges(ranges_from(statistics, "random images"), kept)
    settings = QuantizeSettings(Precision(variant.precision))
    quantize_model(
        model,
        ranges_from_json(kept.read_bytes(), str(kept)),
        settings,
        out,
        statistics=statistics_from_npz(seen.read_bytes(), str(seen)),
    )
    suit_builder(out, None if variant.plain else Builder.RTX)
    copy = out.with_suffix(".tensorrt.onnx")
    return copy if onnx_for_tensorrt(out, copy) else out


def table(sm: int, engines: dict[str, dict[str, Any]]) -> str:
    """The engines of one SM as a Markdown table."""
    lines = [f"SM {sm}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    base = engines["FP16"]["activation_bytes"]
    for name, found in engines.items():
        if "failed" in found:
            lines.append(f"| {name} | {found['failed'][:80]} |" + " |" * (len(COLUMNS) - 2))
            continue
        shares = [f"{found['in_8_bits'][work]} of {found['of'][work]}" for work in found["of"]]
        size = found["activation_bytes"]
        mega = f"{size / 1e6:.3g}" if size < 1e8 else f"{size / 1e6:.0f}"
        weights = f"{found['constant_bytes'] / 1e6:.3g} MB"
        cells = [name, str(found["kernels"]), *shares, str(found["reformats"]), mega, f"{size / base:.2f}", weights]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--model", default="timm:vit_small_r26_s32_224", show_default=True)
@click.option("--images", "count", default=8, show_default=True, help="Random calibration images.")
@click.option("--sm", "sms", type=click.Choice([str(sm) for sm in TARGETS]), multiple=True, default=("86", "89"))
def main(model: str, count: int, sms: tuple[str, ...]) -> None:
    """Compile every variant for every SM and tabulate what the engines do."""
    engines: dict[int, dict[str, dict[str, Any]]] = {int(sm): {} for sm in sms}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = export(model, folder / "run")
        for variant in VARIANTS:
            try:
                onnx = quantized(variant, source, count, folder)
            except ResvitError as error:  # ModelOpt's own failures too: the table shall show them.
                for found in engines.values():
                    found[variant.name] = {"failed": str(error).splitlines()[0]}
                continue
            for sm, found in engines.items():
                if variant.precision == "fp8" and sm < 89:
                    continue
                report = build_engine(onnx, folder / "engine.plan", TARGETS[sm])
                found[variant.name] = {**kernel_totals(report.kernels).to_json(), "engine_bytes": report.bytes}
                click.echo(f"SM {sm} {variant.name}: {found[variant.name]['kernels']} kernels", err=True)
    label = model.rpartition(":")[2]
    text = "\n\n".join(table(sm, found) for sm, found in engines.items())
    click.echo(text)
    (RESULTS / f"engine_work-{label}.md").write_text(f"# {model}\n\n{text}\n")
    result = {"model": model, "builder": report.builder_version, "batch": 1, "images": count}
    path = write_result(f"engine_work-{label}", {**result, "sm": {str(sm): found for sm, found in engines.items()}})
    click.echo(f"written: {path}")


if __name__ == "__main__":
    main()
