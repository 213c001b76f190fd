"""Recovery where calibration alone fails: trained hybrids at very few quantisation levels, on Fashion-MNIST.

    python benchmarks/recover.py --model resvit:embed-nano --checkpoint tests/assets/embed-nano.pt --bits 4 --bits 3

Trains on the training split without its labels, and scores all 10,000 test images: float, calibrated only, and
recovered. The drop is the float model's top-1 less the other's, with its 95% interval (paired). Few bits are
simulated inside INT8; no device is faster with them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from machine import write_result

from resvit_calibrate.answers.classes import Predictions, compare
from resvit_calibrate.data.image_sets import open_image_sets, open_training_images
from resvit_calibrate.data.training_images import TrainingImages
from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import Ranges, ranges_from
from resvit_calibrate.ranges.statistics import Statistics
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_calibrate.tasks.classification import Classification
from resvit_engines.progress import Reporter, reporter
from resvit_engines.targets.table import Precision
from resvit_export.models.reference import resvit_config
from resvit_quantize.quantize import quantize_model
from resvit_quantize.recovery.options import RecoverOptions
from resvit_quantize.recovery.recover import pinned_ranges, recover_model, settings_behind_recovery
from resvit_quantize.settings import QuantizeSettings

BATCH = 128


def export(name: str, checkpoint: Path, folder: Path) -> Path:
    """Export the float ONNX with a free batch, as the tool does it."""
    command = [str(Path(sys.executable).with_name("resvit-export")), "export", "--model", name, "--batch", "1:8:128"]
    done = subprocess.run(
        [*command, "--checkpoint", str(checkpoint), "--run", str(folder), "--json"], stdout=subprocess.PIPE, check=True
    )
    return Path(json.loads(done.stdout)["folder"]) / "model.onnx"


def calibrated(model: Path, images: ImageSet) -> tuple[Ranges, Statistics]:
    """Calibrate."""
    statistics = collect_statistics(model, images.batches(BATCH))
    return ranges_from(statistics, images.digest), statistics


def score(reference: Predictions, model: Path, images: ImageSet) -> dict[str, Any]:
    """Top-1, drop with interval (percentage points), agreement and SQNR (dB) against the float model."""
    plain = compare(reference, Classification({}).answers(onnx_runner(model), images, BATCH)).to_json()
    return {key: plain[key] for key in ("top1", "drop", "interval", "agreement", "sqnr_db")}


def case(
    model: Path,
    settings: QuantizeSettings,
    sets: tuple[ImageSet, ImageSet, TrainingImages],
    options: RecoverOptions,
    folder: Path,
    report: Reporter,
) -> dict[str, Any]:
    """One model at one number of bits: calibrated only, and recovered."""
    calibration, validation, training = sets
    reference = Classification({}).answers(onnx_runner(model), validation, BATCH)
    ranges, statistics = calibrated(model, calibration)
    quantize_model(model, ranges, settings, folder / "calibrated.onnx", statistics=statistics)
    recovered = folder / "recovered.onnx"
    state = folder / "state"
    made = recover_model(model, ranges, settings, training, recovered, state, options, report, statistics=statistics)
    again = pinned_ranges(calibrated(recovered, calibration)[0], made.clips)
    quantize_model(recovered, again, settings_behind_recovery(settings), folder / "quantized.onnx")
    return {
        "bits": settings.bits,
        "float_top1": float((reference.answers == reference.labels).mean()),
        "calibrated": score(reference, folder / "calibrated.onnx", validation),
        "recovered": score(reference, folder / "quantized.onnx", validation),
        "recovery": {key: value for key, value in made.to_json().items() if key != "clips"},
    }


@click.command()
@click.option("--model", default="resvit:embed-nano", show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), default=Path("tests/assets/embed-nano.pt"))
@click.option("--bits", type=int, multiple=True, default=(4, 3), show_default=True)
@click.option("--epochs", default=3, show_default=True)
@click.option("--images", default=20_000, show_default=True, help="Training images, held-out ones included.")
@click.option("--test-images", type=int, help="[default: all 10,000]")
@click.option("--name", default="recover", show_default=True, help="Of the result file.")
def main(
    model: str, checkpoint: Path, bits: tuple[int, ...], epochs: int, images: int, test_images: int | None, name: str
) -> None:
    """Show what recovery brings where calibration alone fails."""
    import torch

    report = reporter(quiet=False)
    config = resvit_config(model.removeprefix("resvit:"))
    preprocess = Preprocess((28, 28), 1, mean=config.mean, std=config.std)
    calibration, validation = open_image_sets(
        DataSpec("fashion-mnist", calibration_images=512, validation_images=test_images), preprocess
    )
    training = open_training_images("fashion-mnist", validation, images, 0, preprocess)
    options = RecoverOptions(epochs=epochs)
    cases = []
    for count in bits:
        with tempfile.TemporaryDirectory() as folder:
            exported = export(model, checkpoint, Path(folder) / "run")
            settings = QuantizeSettings(Precision.INT8, bits=count)
            sets = calibration, validation, training
            cases.append(case(exported, settings, sets, options, Path(folder), report))
        shown = {key: cases[-1][key] for key in ("bits", "float_top1", "calibrated", "recovered")}
        click.echo(json.dumps({**shown, "seconds": cases[-1]["recovery"]["seconds"]}, indent=2))
    result = {
        "model": model,
        "train_images": len(training),
        "test_images": len(validation),
        "epochs": epochs,
        "threads": torch.get_num_threads(),
        "cases": cases,
    }
    click.echo(f"written: {write_result(name, result)}")


if __name__ == "__main__":
    main()
