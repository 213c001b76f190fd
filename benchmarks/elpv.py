"""Two hybrids for solar cells: trained here, on the photographs of the package ``elpv-dataset``.

    python benchmarks/elpv.py --out runs/benchmarks/elpv.pt
    python benchmarks/elpv.py --model elpv-mobile --out runs/benchmarks/elpv-mobile.pt

2,624 electroluminescence photographs of solar cells, functional or defective (Deitsch et al., "Automatic
classification of defective photovoltaic module cells in electroluminescence images", Solar Energy 2019; CC BY-NC-SA
4.0: neither the photographs nor weights trained on them belong to this repository). Grey, 96 pixels; defective where
the experts' probability is at least one half; 75% to train with and 25% to test with, as its authors divide it, here
by seed and stratified by class and kind of cell.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.image_set import ImageSet
from resvit_calibrate.images.indexed import IndexedImageSet
from resvit_calibrate.images.pixels import ArrayPixels
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.progress import Reporter, reporter

if TYPE_CHECKING:
    import torch

    from resvit_export.models.hybrid import Hybrid

SIZE = 96
CLASS_NAMES = ("functional", "defective")
TEST_SHARE = 0.25
CELLS: dict[str, Any] = {
    "image_size": SIZE,
    "in_channels": 1,
    "mean": (0.52,),
    "std": (0.15,),
    "num_classes": 2,
    "dim": 96,
    "depth": 4,
    "head_dim": 32,
    "mlp_ratio": 2,
    "dropout": 0.1,
}


def hybrid() -> Hybrid:
    """An R10-like trunk to 36 tokens of 96 numbers, four transformer blocks; random weights. A model factory."""
    return _of("elpv", "embed-tiny", stage_depths=(1, 1, 1), stage_widths=(32, 64, 128))


def mobile() -> Hybrid:
    """The same behind a MobileNetV3-like trunk: hard-swish, squeeze-and-excitation, depthwise 5x5. A model factory."""
    return _of("elpv-mobile", "mobile-tiny")


def _of(name: str, like: str, **trunk: Any) -> Hybrid:
    from resvit_export.models.hybrid import hybrid_from_config
    from resvit_export.models.reference import resvit_config

    return hybrid_from_config(dataclasses.replace(resvit_config(like, **CELLS, **trunk), name=name))


HYBRIDS = {"elpv": hybrid, "elpv-mobile": mobile}
"""The factories by the name of the case."""


@dataclasses.dataclass(frozen=True)
class Cells:
    """Photographs uint8 [N, 300, 300] and labels int64 [N], to train with and to test with."""

    train: ArrayPixels
    test: ArrayPixels


def read_cells(seed: int = 0) -> Cells:
    """Read and divide the photographs; raises ``ResvitError`` (MISSING) where the package is not installed."""
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise ResvitError(
            "The photographs of solar cells are not installed.", "pip install elpv-dataset", ExitCode.MISSING
        ) from error
    images, probabilities, kinds = load_dataset()
    labels = (probabilities >= 0.5).astype(np.int64)
    in_test = np.zeros(len(labels), bool)
    random = np.random.default_rng(seed)
    for label in (0, 1):
        for kind in sorted(set(kinds)):
            group = random.permutation(np.flatnonzero((labels == label) & (kinds == kind)))
            in_test[group[: round(TEST_SHARE * len(group))]] = True
    parts = [
        ArrayPixels(f"elpv ({name})", images[chosen], labels[chosen], CLASS_NAMES)
        for name, chosen in (("train", ~in_test), ("test", in_test))
    ]
    return Cells(*parts)


def image_set(pixels: ArrayPixels, preprocess: Preprocess, count: int | None = None, seed: int = 0) -> ImageSet:
    """``count`` of the photographs, drawn by ``seed``, or all in their order."""
    order = np.arange(len(pixels))
    if count is not None and count < len(pixels):
        order = np.sort(np.random.default_rng(seed).permutation(len(pixels))[:count])
    return IndexedImageSet(pixels, order, preprocess)


def grey_96() -> Preprocess:
    """What the hybrid reads."""
    return Preprocess(size=(SIZE, SIZE), channels=1, mean=CELLS["mean"], std=CELLS["std"])


def train(name: str, out: Path, epochs: int, seed: int, report: Reporter, batch: int = 32) -> float:
    """Train one of ``HYBRIDS`` from random weights, write ``state_dict`` and ``top1`` to ``out``, and return top-1.

    Top-1 is that on the test part. The last epoch's weights are taken, whatever the test part says of them.
    """
    import torch
    import torch.nn.functional as F

    torch.manual_seed(seed)
    cells = read_cells()
    images, labels = _tensors(image_set(cells.train, grey_96()))
    model = HYBRIDS[name]()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = len(images) // batch
    # Defective cells are the smaller class, and the one that matters.
    weights = len(labels) / (2.0 * torch.bincount(labels).float())
    model.train()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images))[: steps * batch].split(batch)  # type: ignore[no-untyped-call]
        for step, index in enumerate(report.track(order, f"epoch {epoch + 1}/{epochs}", steps * batch, weight=batch)):
            done = (epoch + step / steps) / epochs
            rate = 1e-3 * (min(1.0, done / 0.1) if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = model(_turned(images[index]))
            loss = F.cross_entropy(logits, labels[index], weight=weights, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        report.say(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.3f}")
    model.eval()
    images, labels = _tensors(image_set(cells.test, grey_96()))
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(1) for part in images.split(64)])  # type: ignore[no-untyped-call]
    top1 = float((answers == labels).float().mean())
    plain = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_file(out) as partial:
        torch.save({"state_dict": plain, "top1": top1}, partial)
    return top1


def _tensors(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    batches = list(images.batches(256))
    labels: npt.NDArray[np.int64] = np.concatenate([b.labels for b in batches if b.labels is not None])
    return torch.from_numpy(np.concatenate([b.images for b in batches])), torch.from_numpy(labels)


def _turned(images: torch.Tensor) -> torch.Tensor:
    """Flip each image by chance both ways and swap its axes, shift it, and change its brightness: a cell has no top."""
    import torch
    import torch.nn.functional as F

    chance = torch.rand(5, len(images), 1, 1, 1)
    images = torch.where(chance[0] < 0.5, images.flip(2), images)
    images = torch.where(chance[1] < 0.5, images.flip(3), images)
    images = torch.where(chance[2] < 0.5, images.transpose(2, 3), images)
    images = images * (0.85 + 0.3 * chance[3]) + 0.3 * (chance[4] - 0.5)
    down, right = (int(torch.randint(0, 9, ())) for _ in range(2))
    side = images.shape[-1]
    return F.pad(images, (4, 4, 4, 4), mode="replicate")[:, :, down : down + side, right : right + side]


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--model", type=click.Choice(list(HYBRIDS)), default="elpv", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("runs/benchmarks/elpv.pt"))
@click.option("--epochs", type=click.IntRange(1, 1000), default=40, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
def main(model: str, out: Path, epochs: int, seed: int) -> None:
    """Train and print the test accuracy."""
    # Read when torch is first imported: threads that spin while they wait slow a shared machine down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        top1 = train(model, out, epochs, seed, reporter(quiet=False))
    except ResvitError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(int(error.code)) from None
    click.echo(f"{out}: top-1 {100 * top1:.2f}%")


if __name__ == "__main__":
    main()
