"""A pruned detector and a pruned segmenter, taught by what they were: their metrics come back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resvit_calibrate.data.training_images import TrainingImages
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.readers.scenes import Scenes, batches
from resvit_calibrate.readers.user.loader import Factory, StreamImageSet
from resvit_calibrate.tasks.kinds import task_named
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_quantize.pruning.apply import prune
from resvit_quantize.pruning.choose.budget import Budget
from resvit_quantize.pruning.choose.choice import choose_widths
from resvit_quantize.pruning.choose.importance import Importance, importance_of
from resvit_quantize.pruning.choose.recorder import costs_from_module
from resvit_quantize.pruning.copies import copy_of
from resvit_quantize.pruning.distill.distill import distill
from resvit_quantize.pruning.distill.options import DistillOptions, DistillReport
from resvit_quantize.pruning.find.discover import groups_from_module
from resvit_quantize.pruning.groups import Kind
from resvit_quantize.training.objectives.objective import Teaching

ASSETS = Path(__file__).parent / "assets"
NETWORKS = {"detection": ("fpn-nano-det", ("boxes", "scores"), 10), "segmentation": ("fpn-nano-seg", ("output",), 11)}


def scenes(task: str, split: str, count: int, seed: int = 0) -> StreamImageSet:
    factory = Factory("scenes", functools.partial(batches, Scenes(split, seed), count, task))
    return StreamImageSet(
        factory, "calibration", Preprocess(size=(96, 96), channels=1, mean=(0.286,), std=(0.353,)), None
    )


def drop_of(task: str, teacher: nn.Module, student: nn.Module, images: StreamImageSet) -> float:
    """Points of the task's metric that the student is behind its teacher."""

    def run(module: nn.Module, arrays: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            answer = module.eval()(torch.from_numpy(arrays["input"]))
        named = answer if isinstance(answer, dict) else {"output": answer}
        return {name: value.numpy() for name, value in named.items()}

    judge = task_named(task, {})
    runners = {name: functools.partial(run, each) for name, each in (("teacher", teacher), ("student", student))}
    answers = judge.answers_of(runners, images, 50)
    return judge.compare(answers["teacher"], answers["student"]).drop


@pytest.mark.slow
@pytest.mark.parametrize("task", list(NETWORKS))
def test_a_pruned_network_gets_its_metric_back(tmp_path: Path, task: str) -> None:
    model, names, classes = NETWORKS[task]
    teacher = load_network(ModelSpec(f"resvit:{model}", ASSETS / f"{model}.pt")).module
    assert teacher is not None
    example = torch.zeros(2, 1, 96, 96)
    pruned = copy_of(teacher).eval()
    found = groups_from_module(pruned, example, frozenset({Kind.CHANNELS}))
    importance = importance_of(pruned, found.groups, Importance.MAGNITUDE, [], images=0, seed=0)
    choice = choose_widths(
        found.groups, importance, costs_from_module(pruned, example[:1], found.groups), Budget(macs=0.8)
    )
    prune(pruned, found.groups, choice.kept)
    train, test = TrainingImages(scenes(task, "train", 640)), scenes(task, "test", 100)
    before = drop_of(task, teacher, pruned, test)

    def trained(teaching: Teaching | None) -> tuple[float, DistillReport]:
        student, options = copy_of(pruned), DistillOptions(epochs=2, batch=32)
        report = distill(student, teacher, train, options, tmp_path / "state", str(teaching), teaching=teaching)
        return drop_of(task, teacher, student, test), report

    teaching = Teaching.of(task_named(task, {}), train, classes, names, selects=False)
    after, report = trained(teaching)
    without, plain = trained(None)
    assert before > 2.0
    assert after < 0.7 * before
    if task == "detection":  # of masks, whose loss is much like the plain one, both bring about as much back
        assert after < without
    assert report.after.loss < report.before.loss
    assert report.objective.startswith(
        "the teacher's boxes and labelled boxes" if task == "detection" else "the teacher's map"
    )
    assert plain.objective == "the teacher's outputs: error to signal"
    assert np.isfinite([score.loss for score in report.history]).all()
