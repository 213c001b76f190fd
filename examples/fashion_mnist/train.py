"""Train a small hybrid on Fashion-MNIST in a few minutes on two CPU cores.

    python examples/fashion_mnist/train.py --model resvit:embed-mini --out runs/fashion-mnist/embed-mini.pt

The checkpoint holds ``state_dict``, ``config`` (for ``resvit_model``) and ``top1`` (share of the 10 000 test
images), and loads with ``torch.load(..., weights_only=True)``. Killed, it goes on from the last whole epoch when
it is run again; finished and unchanged, it is skipped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.readers.fashion_mnist import read_split
from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file, canonical_json, pretty_json, sha256_bytes, sha256_file, write_atomic
from resvit_engines.progress import Reporter, reporter
from resvit_export.models.config import HybridConfig
from resvit_export.models.presets import MODEL_NAMES
from resvit_export.models.reference import resvit_config
from resvit_export.models.training.errors import spoken_errors

if TYPE_CHECKING:
    import torch

    from resvit_export.models.hybrid import Hybrid

SHIFT = 1
"""Training images move by up to this many pixels each way: all of them are centred and scaled already."""
SIDE, CLASSES = 28, 10


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, beside the images."""

    config: HybridConfig
    epochs: int
    seed: int
    per_epoch: int | None = None
    """Images of one epoch, others in each; None for all."""
    batch: int = 64
    peak_lr: float = 1.5e-3
    warmup: float = 0.2
    weight_decay: float = 0.05

    def key(self, images: Images) -> str:
        """One digest of recipe and images: equal keys mean equal weights on one machine."""
        values = dataclasses.asdict(self) | {"config": self.config.to_json(), "shift": SHIFT}
        return sha256_bytes(canonical_json(values) + images.digest().encode())


@dataclasses.dataclass(frozen=True)
class Images:
    """Pixels uint8 [N, 28, 28] and labels int64 [N], to train on and to test with."""

    train: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int64]
    test: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int64]

    def digest(self) -> str:
        """SHA-256 of everything."""
        parts = (self.train, self.train_labels, self.test, self.test_labels)
        return sha256_bytes(b"".join(sha256_bytes(part.tobytes()).encode() for part in parts))


def read_images(limit: int | None) -> Images:
    """Read both splits, or the first ``limit`` images of each."""
    train, train_labels = read_split("train")
    test, test_labels = read_split("test")
    return Images(train[:limit], train_labels[:limit], test[:limit], test_labels[:limit])


def config_of(model: str) -> HybridConfig:
    """The config behind ``resvit:NAME``, which must take square grey images of Fashion-MNIST's size or larger ones."""
    config = resvit_config(model.removeprefix("resvit:"))
    channels, height, width = config.input_shape
    if channels != 1 or height != width or height < SIDE or config.num_classes != CLASSES:
        names = [f"resvit:{name}" for name in MODEL_NAMES if name.endswith(("-nano", "-mini"))]
        raise ResvitError(
            f"{config.name} takes images of (C, H, W) {config.input_shape} and has {config.num_classes} outputs; "
            f"Fashion-MNIST's are (1, {SIDE}, {SIDE}), of {CLASSES} classes.",
            f"Choose one of {', '.join(names)}.",
        )
    return config


def finished(out: Path, key: str) -> dict[str, Any] | None:
    """The record of a finished training of this ``key``, if ``out`` is still what it wrote."""
    try:
        record: dict[str, Any] = json.loads(beside(out, ".json").read_bytes())
        same = record["key"] == key and record["sha256"] == sha256_file(out)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same else None


def beside(out: Path, suffix: str) -> Path:
    """The file next to ``out`` that holds its record (".json") or its last whole epoch (".resume")."""
    return out.with_name(out.name + suffix)


def train(recipe: Recipe, images: Images, out: Path, report: Reporter) -> dict[str, Any]:
    """Train from the last whole epoch on, test, and write ``out`` and its record; returns the record."""
    import torch

    from resvit_export.models.hybrid import hybrid_from_config

    key = recipe.key(images)
    torch.manual_seed(recipe.seed)
    model = hybrid_from_config(recipe.config).to(memory_format=torch.channels_last)
    # The second beta is lower than usual, since so short a training has no time for a long average.
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.99))
    if state := resumable(out, key, report):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        report.say(f"{out.name}: going on behind epoch {state['epochs']} of {recipe.epochs}")
    start = state or {"epochs": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    wall, cpu = time.monotonic() - start["seconds"], time.process_time() - start["cpu_seconds"]

    def keep(epochs: int) -> None:
        spent = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_file(beside(out, ".resume")) as partial:
            torch.save({"key": key, "epochs": epochs} | spent | state, partial)

    keep(start["epochs"])  # and so learn now, not after the first epoch, that the folder cannot be written
    for epoch in range(start["epochs"], recipe.epochs):
        train_epoch(model, optimizer, recipe, images, epoch=epoch, report=report)
        keep(epoch + 1)
    top1 = test_top1(model, recipe, images, report)
    # Plain strides: whoever loads the file need not know how it was trained.
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_file(out) as partial:
        torch.save({"state_dict": weights, "config": recipe.config.to_json(), "top1": top1}, partial)
    record = {
        "key": key,
        "sha256": sha256_file(out),
        "model": recipe.config.name,
        "train_images": len(images.train),
        "test_images": len(images.test),
        "top1": top1,
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "threads": torch.get_num_threads(),
    }
    write_atomic(beside(out, ".json"), pretty_json(record))
    beside(out, ".resume").unlink(missing_ok=True)
    return record


def resumable(out: Path, key: str, report: Reporter) -> dict[str, Any] | None:
    """The state behind the last whole epoch of this ``key``, if there is one."""
    import torch

    path = beside(out, ".resume")
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


def parameter_groups(model: Hybrid, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and filters; leave biases, norms and embeddings alone."""
    groups: dict[float, list[torch.Tensor]] = {weight_decay: [], 0.0: []}
    for name, value in model.named_parameters():
        groups[weight_decay if name.endswith("weight") and value.ndim >= 2 else 0.0].append(value)
    return [{"params": values, "weight_decay": decay} for decay, values in groups.items()]


def learning_rate(recipe: Recipe, progress: float) -> float:
    """One cycle (Smith and Topin 2018): up in a line, down in a cosine; ``progress`` goes from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.peak_lr * (0.04 + 0.96 * progress / recipe.warmup)
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)))


def train_epoch(
    model: Hybrid,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    images: Images,
    *,
    epoch: int,
    report: Reporter,
) -> None:
    """One pass over the training images, in an order that follows from seed and epoch alone."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(recipe.seed * 1_000_003 + epoch + 1)
    order = drawn(len(images.train), recipe, epoch)
    steps = max(1, len(order) // recipe.batch)
    order = order[: steps * recipe.batch].split(recipe.batch)
    padded = F.pad(torch.tensor(images.train), (SHIFT, SHIFT, SHIFT, SHIFT))
    labels = torch.tensor(images.train_labels)
    model.train()
    total_loss, hits, seen = 0.0, 0, steps * len(order[0])
    what = f"epoch {epoch + 1}/{recipe.epochs}"
    for step, index in enumerate(report.track(order, what, seen, weight=len(order[0]))):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, (epoch + step / steps) / recipe.epochs)
        logits = model(prepared(shifted_and_flipped(padded, index), recipe.config))
        loss = F.cross_entropy(logits, labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * len(index)
        hits += int((logits.argmax(1) == labels[index]).sum())
    if not math.isfinite(total_loss):
        raise ResvitError(f"The loss is not finite after {what}.", "Try another --seed.")
    report.say(f"{what}: loss {total_loss / seen:.3f}, {100 * hits / seen:.1f}% right while training")


def drawn(count: int, recipe: Recipe, epoch: int) -> torch.Tensor:
    """The images of one epoch, in its order: all, or the next of an order that stays until every image was seen."""
    import torch

    if recipe.per_epoch is None or recipe.per_epoch >= count:
        return torch.randperm(count)
    first = epoch * recipe.per_epoch
    places = torch.arange(first, first + recipe.per_epoch)
    whole = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed))
    return whole[places % count]


def shifted_and_flipped(padded: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Cut one window out of each padded image, mirrored for half of them: uint8 [B, 28, 28], by one gather."""
    import torch

    side = padded.shape[1] - 2 * SHIFT
    corner = torch.randint(0, 2 * SHIFT + 1, (2, len(index), 1))
    rows = torch.arange(side) + corner[0]
    columns = torch.arange(side).repeat(len(index), 1)
    columns = torch.where(torch.rand(len(index), 1) < 0.5, columns, side - 1 - columns) + corner[1]
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def prepared(pixels: torch.Tensor, config: HybridConfig) -> torch.Tensor:
    """Pixels uint8 [B, 28, 28] → float32 [B, 1, H, W], resized and normalised as the config says.

    Where they are enlarged, that is done as calibration, validation and the device do it.
    """
    import torch

    if config.image_size == (SIDE, SIDE):
        return (pixels[:, None].float() / 255 - config.mean[0]) / config.std[0]
    preprocess = Preprocess(size=config.image_size, channels=1, mean=config.mean, std=config.std)
    return torch.from_numpy(np.stack([preprocess.apply(image) for image in pixels.numpy()]))


def test_top1(model: Hybrid, recipe: Recipe, images: Images, report: Reporter) -> float:
    """Share of the test images whose highest score is the label's."""
    import torch

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(images.test), 500):
            part = slice(start, start + 500)
            yield torch.tensor(images.test[part]), torch.tensor(images.test_labels[part])

    model.eval()
    hits = 0
    with torch.inference_mode():
        for pixels, labels in report.track(batches(), "test", len(images.test), weight=500):
            hits += int((model(prepared(pixels, recipe.config)).argmax(1) == labels).sum())
    return hits / len(images.test)


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--model", default="resvit:embed-nano", show_default=True, help="A small reference hybrid.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Checkpoint. [runs/fashion-mnist/MODEL.pt]"
)
@click.option("--epochs", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option("--per-epoch", type=click.IntRange(min=64), help="Images of one epoch, others in each.  [default: all]")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first images of each split: for a trial.")
@click.option("--quiet", is_flag=True, help="No progress.")
def main(
    *, model: str, out: Path | None, epochs: int, per_epoch: int | None, seed: int, limit: int | None, quiet: bool
) -> None:
    """Train and print the test accuracy."""
    # Read when torch is first imported. Threads that spin while they wait make this several times slower as soon
    # as another process wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with spoken_errors("goes on from the last whole epoch"):
        recipe = Recipe(config_of(model), epochs, seed, per_epoch)
        out = out or Path("runs", "fashion-mnist", f"{recipe.config.name}.pt")
        images = read_images(limit)
        record = finished(out, recipe.key(images))
        if record:
            click.echo(f"{out}: finished before and unchanged, top-1 {100 * record['top1']:.2f}%")
            return
        record = train(recipe, images, out, reporter(quiet))
    click.echo(
        f"{out}: top-1 {100 * record['top1']:.2f}% of {record['test_images']} test images, "
        f"{record['seconds']:.0f} s ({record['cpu_seconds']:.0f} s of CPU time)"
    )


if __name__ == "__main__":
    main()
