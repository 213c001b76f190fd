"""Train a reference hybrid with a detection or a segmentation head on scenes, in minutes on a few CPU cores."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pickle
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.readers.scenes import SIZES, VALIDATION, Scene, Scenes, batches, normalised
from resvit_calibrate.readers.user.loader import Factory, StreamImageSet
from resvit_calibrate.runtime.sessions import Arrays
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file, canonical_json, pretty_json, sha256_bytes, sha256_file, write_atomic
from resvit_engines.progress import Reporter
from resvit_export.models.config import HybridConfig, Task

if TYPE_CHECKING:
    import torch

    from resvit_export.models.hybrid import Hybrid

_WARMUP = 0.15
_TEST_BATCH = 50
_GENERATOR = 1
"""Counts up when other scenes are made of the same seed."""


@dataclasses.dataclass(frozen=True)
class SceneRecipe:
    """What decides the trained weights: ``scenes`` new ones in every epoch.

    Raises ``ResvitError`` for a network that scenes cannot be made for.
    """

    config: HybridConfig
    scenes: int
    epochs: int
    seed: int
    tested: int = VALIDATION
    batch: int = 16
    peak_lr: float = 2e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        config = self.config
        if config.task is Task.CLASSIFICATION:
            raise ResvitError(
                f"{config.name} classifies whole images.", "Choose resvit:fpn-nano-det or resvit:fpn-nano-seg."
            )
        if config.in_channels != 1 or not all(SIZES[0] <= edge <= SIZES[1] for edge in config.image_size):
            raise ResvitError(
                f"{config.name} takes images of (C, H, W) {config.input_shape}; scenes have one channel and edges of "
                f"{SIZES[0]} to {SIZES[1]} pixels.",
                "Choose another image_size, or in_channels = 1.",
            )

    @property
    def key(self) -> str:
        """One digest of all of it: equal keys mean equal weights on one machine."""
        values = dataclasses.asdict(self) | {"config": self.config.to_json(), "generator": _GENERATOR}
        return sha256_bytes(canonical_json(values))

    def source(self) -> Scenes:
        """Where the scenes to train on come from."""
        height, width = self.config.image_size
        return Scenes("train", self.seed, (height, height), (width, width))


def finished(out: Path, key: str) -> dict[str, Any] | None:
    """The record of a finished training of this ``key``, if ``out`` is still what it wrote."""
    try:
        record: dict[str, Any] = json.loads(_beside(out, ".json").read_bytes())
        same = record["key"] == key and record["sha256"] == sha256_file(out)
    except (ResvitError, OSError, ValueError, KeyError, TypeError):
        return None
    return record if same else None


def train(recipe: SceneRecipe, out: Path, report: Reporter) -> dict[str, Any]:
    """Train from the last whole epoch on, test, and write ``out`` and its record; returns the record.

    ``out`` holds ``state_dict``, ``config`` and ``scores`` (see ``scores_of``). Raises ``ResvitError`` where the
    loss stops being finite.
    """
    import torch

    from resvit_export.models.hybrid import hybrid_from_config

    torch.manual_seed(recipe.seed)
    model: Hybrid = hybrid_from_config(recipe.config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.99))
    if state := _resumable(out, recipe.key, report):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        report.say(f"{out.name}: going on behind epoch {state['epochs']} of {recipe.epochs}")
    start = state or {"epochs": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    wall, cpu = time.monotonic() - start["seconds"], time.process_time() - start["cpu_seconds"]

    def keep(epochs: int) -> None:
        spent = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_file(_beside(out, ".resume")) as partial:
            torch.save({"key": recipe.key, "epochs": epochs} | spent | state, partial)

    keep(start["epochs"])  # and so learn now, not after the first epoch, that the folder cannot be written
    for epoch in range(start["epochs"], recipe.epochs):
        train_epoch(model, optimizer, recipe, epoch, report)
        keep(epoch + 1)
    scores = scores_of(model.eval(), recipe.tested, report)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_file(out) as partial:
        torch.save({"state_dict": weights, "config": recipe.config.to_json(), "scores": scores}, partial)
    record = {
        "key": recipe.key,
        "sha256": sha256_file(out),
        "model": recipe.config.name,
        "train_scenes": recipe.scenes * recipe.epochs,
        "test_scenes": recipe.tested,
        "scores": scores,
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "threads": torch.get_num_threads(),
    }
    write_atomic(_beside(out, ".json"), pretty_json(record))
    _beside(out, ".resume").unlink(missing_ok=True)
    return record


def train_epoch(
    model: Hybrid, optimizer: torch.optim.Optimizer, recipe: SceneRecipe, epoch: int, report: Reporter
) -> float:
    """One pass over the scenes of this epoch, which follow from seed and epoch alone; returns the mean loss."""
    import torch

    torch.manual_seed(recipe.seed * 1_000_003 + epoch + 1)
    model.train()
    size = min(recipe.batch, recipe.scenes)
    steps, total, what = recipe.scenes // size, 0.0, f"epoch {epoch + 1}/{recipe.epochs}"
    source = recipe.source()
    several = (list(source.scenes((epoch * steps + step) * size, size)) for step in range(steps))
    for step, scenes in enumerate(report.track(several, what, steps * size, weight=size)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_lr * one_cycle((epoch + step / steps) / recipe.epochs)
        loss = scene_loss(model, scenes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        total += loss.item()
    if not math.isfinite(total):
        raise ResvitError(f"The loss is not finite after {what}.", "Try another --seed.")
    report.say(f"{what}: loss {total / steps:.3f}")
    return total / steps


def scene_loss(model: Hybrid, scenes: list[Scene]) -> torch.Tensor:
    """The loss of the model's head on scenes, as one number."""
    import torch

    from resvit_export.models.heads import DetectionHead
    from resvit_export.models.training.losses import Boxes, detection_loss, segmentation_loss

    images = torch.from_numpy(normalised(np.stack([scene.pixels for scene in scenes])))
    features = model.features(images)
    if isinstance(model.head, DetectionHead):
        most = max(1, *(len(scene.classes) for scene in scenes))
        corners, classes = torch.zeros(len(scenes), most, 4), torch.full((len(scenes), most), -1)
        for index, scene in enumerate(scenes):
            count = len(scene.classes)
            corners[index, :count] = torch.from_numpy(scene.boxes().boxes)
            classes[index, :count] = torch.from_numpy(scene.classes)
        return detection_loss(model.head, model.head.raw(features), Boxes(corners, classes))
    masks = np.stack([scene.mask().classes for scene in scenes]).astype(np.int64)
    return segmentation_loss(model.head(features), torch.from_numpy(masks))


def scores_of(model: Hybrid, scenes: int, report: Reporter) -> dict[str, float]:
    """The task's metrics by name on the first ``scenes`` test scenes, 0 to 1: mAP, or mIoU and Dice."""
    import torch

    config = model.config
    height, width = config.image_size
    source = Scenes("test", 0, (height, height), (width, width))
    factory = Factory("scenes", functools.partial(batches, source, scenes, config.task.value))
    preprocess = Preprocess(size=config.image_size, channels=1, mean=config.mean, std=config.std)

    def run(arrays: Arrays) -> Arrays:
        with torch.inference_mode():
            answer = model(torch.from_numpy(arrays["input"]))
        named = answer if isinstance(answer, dict) else {"output": answer}
        return {name: value.numpy() for name, value in named.items()}

    task = task_named(config.task.value, {})
    answers = task.answers_of(
        {"test": run}, StreamImageSet(factory, "validation", preprocess, None), _TEST_BATCH, report
    )["test"]
    return dict(task.compare(answers, answers).reference)


def parameter_groups(model: Hybrid, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and filters; leave biases, norms and embeddings alone."""
    groups: dict[float, list[torch.Tensor]] = {weight_decay: [], 0.0: []}
    for name, value in model.named_parameters():
        groups[weight_decay if name.endswith("weight") and value.ndim >= 2 else 0.0].append(value)
    return [{"params": values, "weight_decay": decay} for decay, values in groups.items()]


def one_cycle(progress: float) -> float:
    """The share of the peak rate (Smith and Topin 2018): up in a line, down in a cosine; ``progress`` from 0 to 1."""
    if progress < _WARMUP:
        return 0.04 + 0.96 * progress / _WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))


def _beside(out: Path, suffix: str) -> Path:
    """The file next to ``out`` that holds its record (".json") or its last whole epoch (".resume")."""
    return out.with_name(out.name + suffix)


def _resumable(out: Path, key: str, report: Reporter) -> dict[str, Any] | None:
    """The state behind the last whole epoch of this ``key``, if there is one."""
    import torch

    path = _beside(out, ".resume")
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        same = state["key"] == key
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, OSError):
        report.warn(f"{path} cannot be read; training starts from the beginning.")
        return None
    if not same:
        report.say(f"{path.name} is of other settings; training starts from the beginning.")
    return state if same else None
