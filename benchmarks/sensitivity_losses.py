"""Which estimate ranks layers as the task's metric does: noise at the outputs, or the change of the task's own loss?

    python benchmarks/sensitivity_losses.py

Each layer alone is quantised to 3 bits, so that what it costs is seen, and the drop of the task's metric is measured
on test images. Both one-pass estimates, from other images, are held against it: Spearman's rank correlation, and how
many of the six worst layers are found. Results go to ``results/sensitivity_losses.json``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from machine import write_result

from resvit_calibrate.answers.base import Task
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import Batch, DataSpec, ImageSet
from resvit_calibrate.images.targets import MaskTarget
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import ranges_from
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.targets.table import Precision
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.sensitivity.products import quantizable_products
from resvit_quantize.sensitivity.sensitivity import measure_sensitivity
from resvit_quantize.sensitivity.task_loss import DetectionLoss
from resvit_quantize.settings import QuantizeSettings

ASSETS = Path(__file__).parent.parent / "tests" / "assets"
CASES = {
    "detection": ("fpn-nano-det", "resvit_calibrate.readers.scenes:detection", 96, 200),
    "segmentation": ("fpn-nano-seg", "resvit_calibrate.readers.scenes:segmentation", 96, 200),
    "classification": ("embed-nano", "fashion-mnist", 256, 3000),
}
WORST = 6


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--bits", type=click.IntRange(2, 8), default=3, show_default=True)
@click.option("--only", type=click.Choice(list(CASES)))
def main(*, bits: int, only: str | None) -> None:
    """Measure all tasks, or one, and keep the result."""
    torch.set_num_threads(1)
    rows = {task: measured(task, bits) for task in CASES if only in (None, task)}
    for task, row in rows.items():
        click.echo(f"{task}: {json.dumps({key: value for key, value in row.items() if key != 'layers'})}")
    if only is None:
        click.echo(write_result("sensitivity_losses", {"bits": bits, "tasks": rows}))


def measured(kind: str, bits: int) -> dict[str, Any]:
    """Both estimates' correlations with the real drops of one task."""
    name, data, few, many = CASES[kind]
    network = load_network(ModelSpec(f"resvit:{name}", ASSETS / f"{name}.pt"))
    assert network.preprocess is not None
    spec = DataSpec(data, calibration_images=few, validation_images=many)
    calibration, validation = open_image_sets(spec, network.preprocess)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        onnx_from_program(fold_program(network.program)[0], model, opset=20)
        ranges = ranges_from(collect_statistics(model, calibration.batches(32)), calibration.digest)
        settings = QuantizeSettings(Precision.INT8, bits=bits)
        task = task_named(kind, {})
        drops = real_drops(model, ranges, settings, task, validation)
        found: dict[str, Any] = {"model": name, "images": [few, many], "layers": drops}
        for how, loss in (("outputs", None), ("loss", loss_of(task, calibration))):
            damage = measure_sensitivity(
                graph_from_onnx(model), ranges, settings, calibration.first(few, 1), precisions=("int8",), loss=loss
            )
            estimate = {layer.node: layer.damage["int8"] for layer in damage.layers}
            found[how] = agreement(np.array([estimate[layer] for layer in drops]), np.array(list(drops.values())))
    return found


def real_drops(model: Path, ranges: Any, settings: QuantizeSettings, task: Task, images: ImageSet) -> dict[str, float]:
    """The drop of the task's metric with each layer alone quantised, in points, by node."""
    quantizable = quantizable_products(graph_from_onnx(model), ranges, settings, Precision.INT8)
    reference = task.answers(onnx_runner(model), images, 64)
    drops = {}
    for product in quantizable.products:
        network = quantizable.plan.network.clone()
        insert_qdq(network, quantizable.placement_of([product], network), quantizable.plan.amax, {}, settings.bits)
        runner = onnx_runner(bytes(ir.serde.serialize_model(network).SerializeToString()))
        drops[product] = float(task.compare(reference, task.answers(runner, images, 64)).drop)
    return drops


def loss_of(task: Task, images: ImageSet) -> Any:
    """The task's loss from labels, also where the product does not use it."""
    if task.name == "detection":
        return DetectionLoss(task, images)  # type: ignore[arg-type]
    if task.name == "segmentation":
        return _pixels
    labels = iter(np.asarray(images.labels)[: len(images)].tolist())

    def classes(outputs: Any, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(outputs["logits"], known(batch), reduction="none")

    order: dict[bytes, int] = {}
    for batch in images.batches(64):
        for image in batch.images:
            order[image.tobytes()] = next(labels)

    def known(batch: Batch) -> torch.Tensor:
        return torch.tensor([order[image.tobytes()] for image in batch.images])

    return classes


def _pixels(outputs: Any, batch: Batch) -> torch.Tensor:
    masks = [target.classes for target in batch.targets or () if isinstance(target, MaskTarget)]
    wanted = torch.from_numpy(np.stack(masks).astype(np.int64))
    return F.cross_entropy(outputs["output"], wanted, reduction="none").mean((1, 2))


def agreement(estimate: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """Spearman's rank correlation, and how many of the worst layers both name."""
    ranks = [np.argsort(np.argsort(values)) for values in (estimate, real)]
    shared = set(np.argsort(-estimate)[:WORST].tolist()) & set(np.argsort(-real)[:WORST].tolist())
    return {"spearman": round(float(np.corrcoef(*ranks)[0, 1]), 3), "worst_found": f"{len(shared)} of {WORST}"}


if __name__ == "__main__":
    main()
