"""What the check on held-back images takes and gives, on trained networks that nobody tuned for.

    resvit-export calibrate --model rec.onnx --data runs/lines/train-lines.npz ...
    python benchmarks/held_back.py runs/rec runs/lite0 --images 200

Each argument is the folder of a run that `resvit-export calibrate` has finished. What it calibrated is quantised to
INT8 as `--effort fast` did it without the check, with plain ranges and no method, and as it ships, and held against
the float ONNX on validation images that took no part. A cell has the SQNR of the outputs, pooled over all images, the
share of positions whose arg-max is the float network's (along axis 1 of vectors and maps, the last axis of sequences)
and the share of images of which every position's is. With `--lines`, for recognisers of text whose blank is class 0,
it ends with the share of lines that read the same, repeats and blanks taken out. Seconds and CPU seconds are those of
quantising without and with the check, on whatever else the machine had to do. Rows are kept in
`results/held-back.json` and written anew where a run is given again.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import describe_machine
from peers.lines import read_line

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.held_back import held_apart
from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import ranges_from_json
from resvit_calibrate.ranges.statistics import statistics_from_npz
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.files import write_atomic
from resvit_engines.targets.table import Precision
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.preprocessing import preprocess_from
from resvit_export.recipe.file import recipe_from_toml
from resvit_quantize.check.choose import held_back_of
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import Methods, QuantizeSettings

RESULTS = Path(__file__).parent / "results"
_INT8 = QuantizeSettings(Precision.INT8)
_PLAIN = Methods(smoothing=False, shifting=False, output_ranges=False, bias_correction=False)
_WAYS = {
    "ours, unchecked": _INT8,
    "plain max": dataclasses.replace(_INT8, estimator=Estimator.MAX, methods=_PLAIN),
    "plain percentile": dataclasses.replace(_INT8, estimator=Estimator.PERCENTILE, methods=_PLAIN),
}
_BATCH = 8


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--images", default=200, show_default=True, help="Validation images.")
@click.option("--lines", is_flag=True, help="The first output is CTC's, [N, positions, classes], with the blank first.")
def main(*, runs: tuple[Path, ...], images: int, lines: bool) -> None:
    """Measure each run, and write the table of all that are known."""
    kept = RESULTS / "held-back.json"
    for run in runs:
        click.echo(run.name, err=True)
        row = measured(run, images, lines=lines)
        rows: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
        rows[run.name] = row
        write_atomic(kept, (json.dumps(rows, indent=1) + "\n").encode())
        write_atomic(RESULTS / "held-back.md", page(rows).encode())


def image_sets(run: Path, images: int) -> tuple[ImageSet, ImageSet]:
    """The run's calibration images, and others."""
    (stored,) = run.glob("export-*/network.json")
    network = NetworkRecord.from_json(json.loads(stored.read_bytes()))
    recipe = recipe_from_toml(run / "recipe.toml")
    assert recipe.data is not None
    spec = DataSpec(
        recipe.data,
        recipe.validation_data,
        calibration_images=recipe.calibration_images,
        validation_images=images,
        seed=recipe.seed,
        unlabelled=True,
        unjudged=True,
    )
    return open_image_sets(spec, preprocess_from(network, recipe.preprocess, recipe.data))


def measured(run: Path, images: int, *, lines: bool = False) -> dict[str, Any]:
    """One network's row."""
    (model,) = run.glob("export-*/model.onnx")
    (stored,) = run.glob("calibrate-*/ranges.json")
    (counted,) = run.glob("calibrate-*/statistics.npz")
    ranges = ranges_from_json(stored.read_bytes(), str(stored))
    statistics = statistics_from_npz(counted.read_bytes(), str(counted))
    calibration, validation = image_sets(run, images)
    held_back = held_back_of(held_apart(calibration), _BATCH)
    batches = [batch.feeds() for batch in validation.batches(_BATCH)]
    floating = onnx_runner(model)
    expected = [floating(batch) for batch in batches]
    row: dict[str, Any] = {"ranges": ranges.images, "images": len(validation), "cells": {}, "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        for way, settings in {**_WAYS, "shipped": _INT8}.items():
            start, used = time.perf_counter(), time.process_time()
            held = held_back if way == "shipped" else None
            report = quantize_model(model, ranges, settings, out, statistics=statistics, held_back=held)
            row["seconds"][way] = [time.perf_counter() - start, time.process_time() - used]
            row["cells"][way] = {**near(out, batches, expected, lines=lines), "macs": report.macs_share}
            if report.held_back:
                row["check"] = report.held_back.to_json()
    return row


def near(model: Path, batches: list[Any], expected: list[Any], *, lines: bool = False) -> dict[str, float]:
    """SQNR of the lowest output, and how much of the decisions of the first output are the float network's."""
    runner = onnx_runner(model)
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    positions, whole, read = [], [], []
    for batch, true in zip(batches, expected, strict=True):
        own = runner(batch)
        for name, value in true.items():
            signal[name] = signal.get(name, 0.0) + float(np.square(value, dtype=np.float64).sum())
            error = value.astype(np.float64) - own[name]
            noise[name] = noise.get(name, 0.0) + float(np.square(error).sum())
        name = next(iter(true))
        axis = 1 if true[name].ndim in (2, 4) else -1
        same = (true[name].argmax(axis) == own[name].argmax(axis)).reshape(len(true[name]), -1)
        positions.append(same.mean(1))
        whole.append(same.all(1))
        if lines:
            pairs = zip(true[name].argmax(-1), own[name].argmax(-1), strict=True)
            read += [read_line(one) == read_line(other) for one, other in pairs]
    ratios = [10.0 * np.log10(signal[name] / max(noise[name], 1e-30)) for name in signal]
    return {
        "sqnr_db": float(min(ratios)),
        "positions": float(np.concatenate(positions).mean()),
        "samples": float(np.concatenate(whole).mean()),
        **({"lines": float(np.mean(read))} if lines else {}),
    }


def page(rows: dict[str, Any]) -> str:
    """The table."""
    machine = describe_machine()
    lines = ["# The check on held-back images", "", " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    lines += [f"{machine['cpu']}; onnxruntime {machine['versions']['onnxruntime']}.", ""]
    ways = [*_WAYS, "shipped"]
    lines += [
        f"| network | {' | '.join(ways)} | taken | seconds (CPU), without and with |",
        "|---" * (len(ways) + 3) + "|",
    ]
    for name, row in sorted(rows.items()):
        cells = [_cell(row["cells"][way]) for way in ways]
        pair = [
            f"{each[0]:.0f} ({each[1]:.0f})" for each in (row["seconds"]["ours, unchecked"], row["seconds"]["shipped"])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['check']['taken']} | {', '.join(pair)} |")
    lines += ["", "What was tried on the held-back images:", ""]
    for name, row in sorted(rows.items()):
        check = row["check"]
        how = "by halves" if check["by_halves"] else "held back"
        lines += [
            f"**{name}**: ranges from {row['ranges']} images, {check['images']} {how}; {row['images']} test images.",
            "",
        ]
        lines += ["| tried | images | SQNR | arg-max alike | gained over all methods |", "|---|---|---|---|---|"]
        for index, item in enumerate(check["tried"]):
            same = "—" if item["agreement"] is None else f"{item['agreement']:.1%}"
            gained = f"{float(item['gain_db']):+.1f} ± {float(item['noise_db']):.1f} dB" if index else ""
            lines.append(f"| {item['what']} | {item['images']} | {float(item['sqnr_db']):.1f} | {same} | {gained} |")
        mended = ", ".join(f"{item['node']} ({item['noise']:.0%})" for item in check["mended"])
        lines += ["", f"In FP16, with the share of the predicted noise: {mended}.", ""] if mended else [""]
    return "\n".join(lines)


def _cell(cell: dict[str, float]) -> str:
    read = f" · {cell['lines']:.1%}" if "lines" in cell else ""
    return f"{cell['sqnr_db']:.1f} dB · {cell['positions']:.1%} · {cell['samples']:.1%}{read} ({cell['macs']:.1%} MACs)"


if __name__ == "__main__":
    main()
