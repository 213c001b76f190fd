"""The loss of a detector's outputs, and the ranking of layers by it."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.images.targets import BoxTarget
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import ranges_from
from resvit_calibrate.readers.scenes import detection
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Precision
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.sensitivity.sensitivity import measure_sensitivity, sensitivity_from_json
from resvit_quantize.sensitivity.task_loss import DetectionLoss, task_loss
from resvit_quantize.settings import QuantizeSettings
from task_images import Images

ASSET = Path(__file__).parent / "assets" / "fpn-nano-det.pt"
BOXES = np.array([[10, 10, 30, 40], [50, 20, 90, 60]], np.float32)


def target(boxes: np.ndarray = BOXES, classes: tuple = (1, 0), crowd: tuple = ()) -> BoxTarget:
    marks = np.zeros(len(boxes), np.bool_)
    marks[list(crowd)] = True
    return BoxTarget(boxes.reshape(-1, 4), np.array(classes, np.int64), marks)


def loss_of(outputs: dict[str, np.ndarray], known: BoxTarget, classes: int = 3, **options: object) -> torch.Tensor:
    images = Images([known])
    images.num_classes, images.task = classes, "detection"
    loss = task_loss(task_named("detection", options), images)
    assert isinstance(loss, DetectionLoss)
    batch = Batch(np.zeros((1, 1, 100, 100), np.float32), None, (known,))
    return loss({name: torch.from_numpy(value)[None] for name, value in outputs.items()}, batch)


def cells(found: np.ndarray = BOXES, likely: float = 0.9, classes: tuple = (1, 0)) -> dict[str, np.ndarray]:
    boxes = np.concatenate([found, np.array([[0, 0, 9, 9]] * 4, np.float32)])
    scores = np.full((len(boxes), 3), 0.01, np.float32)
    scores[range(len(found)), classes] = likely
    return {"boxes": boxes, "scores": scores}


def queries(found: np.ndarray = BOXES, softmax: bool = False) -> dict[str, np.ndarray]:
    centred = np.concatenate([(found[:, :2] + found[:, 2:]) / 2, found[:, 2:] - found[:, :2]], 1) / 100
    boxes = np.concatenate([centred, np.full((3, 4), 0.05)]).astype(np.float32)
    logits = np.full((5, 4 if softmax else 3), -4.0, np.float32)
    logits[[0, 1], [1, 0]] = 4.0
    if softmax:
        logits[2:, 3] = 4.0
    return {"pred_boxes": boxes, "logits": logits}


@pytest.mark.parametrize("right", [cells(), queries(), queries(softmax=True)])
def test_what_is_right_costs_least(right: dict[str, np.ndarray]) -> None:
    names = list(right)
    best = float(loss_of(right, target()))
    moved = {**right, names[0]: right[names[0]] * np.float32(1.1)}
    swapped = {**right, names[1]: right[names[1]][:, [1, 0, *range(2, right[names[1]].shape[1])]]}
    for worse in (moved, swapped):
        assert float(loss_of(worse, target())) > 1.5 * best


def test_noise_in_the_background_costs_nothing() -> None:
    right = cells()
    shaken = {**right, "boxes": right["boxes"].copy()}
    shaken["boxes"][2:] += 40
    np.testing.assert_allclose(float(loss_of(shaken, target())), float(loss_of(right, target())), rtol=1e-5)


def test_a_crowd_and_no_object_at_all() -> None:
    nothing = target(np.zeros((0, 4), np.float32), ())
    quiet, loud = (float(loss_of(cells(likely=score), nothing)) for score in (0.02, 0.9))
    assert quiet < 0.05 * loud
    assert float(loss_of(cells(), target(crowd=(0, 1)))) == pytest.approx(loud)


def test_the_loss_has_a_gradient_for_every_prediction_that_counts() -> None:
    outputs = {name: torch.from_numpy(value)[None].requires_grad_() for name, value in cells().items()}
    images = Images([target()])
    images.num_classes, images.task = 3, "detection"
    loss = DetectionLoss(task_named("detection", {}), images)
    loss(outputs, Batch(np.zeros((1, 1, 100, 100), np.float32), None, (target(),))).sum().backward()
    assert (outputs["scores"].grad.abs() > 0).all()
    assert outputs["boxes"].grad.isfinite().all()


def test_bad_targets_and_losses_are_said() -> None:
    with pytest.raises(ResvitError, match="boxes have the class 7, but the network knows classes 0 to 2"):
        loss_of(cells(), target(classes=(7, 0)))
    broken = cells()
    broken["scores"][0] = np.nan
    with pytest.raises(ResvitError, match="loss on the calibration images is NaN"):
        loss_of(broken, target())


def test_other_tasks_and_images_without_boxes_keep_to_the_outputs() -> None:
    images = Images([target()])
    images.task = None
    assert task_loss(task_named("detection", {}), images) is None
    images.task = "segmentation"
    assert task_loss(task_named("segmentation", {}), images) is None


@pytest.mark.slow
def test_a_detectors_layers_are_ranked_by_its_loss(tmp_path: Path) -> None:
    program = fold_program(load_network(ModelSpec("resvit:fpn-nano-det", ASSET)).program)[0]
    onnx_from_program(program, tmp_path / "model.onnx", opset=20)
    (images, known), *_ = detection()
    batch = Batch(images[:16], None, tuple(known[:16]))
    ranges = ranges_from(collect_statistics(tmp_path / "model.onnx", [batch]), "digest")
    held = Images(list(known[:16]))
    held.num_classes, held.task = 10, "detection"
    loss = task_loss(task_named("detection", {}), held)
    settings = QuantizeSettings(Precision.INT8)
    found = measure_sensitivity(
        graph_from_onnx(tmp_path / "model.onnx"), ranges, settings, [batch], precisions=("int8",), loss=loss
    )
    assert (found.measure, found.images) == ("loss", 16)
    assert sensitivity_from_json(found.to_json()) == found
    layers = {layer.node: layer.damage["int8"] for layer in found.layers if layer.quantized}
    by_outputs = measure_sensitivity(
        graph_from_onnx(tmp_path / "model.onnx"), ranges, settings, [Batch(batch.images, None)], precisions=("int8",)
    )
    assert by_outputs.measure == "outputs"
    assert set(layers) <= {layer.node for layer in by_outputs.layers}

    def smooth(outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        return outputs["scores"].square().sum((1, 2)) + 1e-3 * outputs["boxes"].square().mean((1, 2))

    # Each against what it really does, of a loss without an assignment that the noise itself may change.
    damage = measure_sensitivity(
        graph_from_onnx(tmp_path / "model.onnx"), ranges, settings, [batch], precisions=("int8",), loss=smooth
    )
    for node in ("trunk.stages.0.0.branch.0.conv/Conv", "blocks.0.mlp.fc1/MatMul", "head.box_towers.0.0.conv/Conv"):
        estimate = next(layer.damage["int8"] for layer in damage.layers if layer.node == node)
        alone = dataclasses.replace(settings, exclude=tuple(glob.escape(name) for name in layers if name != node))
        real = measure_sensitivity(
            graph_from_onnx(tmp_path / "model.onnx"), ranges, alone, [batch], precisions=("int8",), loss=smooth
        )
        assert 0.5 < estimate / real.together["int8"] < 2.0, node
