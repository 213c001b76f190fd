"""Pages with lines of text on photos and plain paper, as a detector of text sees them, and crops of the photos.

    python benchmarks/text_pages.py --photos photos/ --out runs/pages

Writes ``train-pages.npz``, ``pages.npz``, ``train-photos.npz`` and ``photos.npz`` (``images`` uint8 [N, H, W, 3]): the
lines are those of ``text_lines.py``. The same seed gives the same pictures wherever fonts and photos are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from PIL import Image
from text_lines import FONTS, fonts_in, line, text_of

PAGE, CROP = 416, 320


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--photos", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/pages"), show_default=True)
@click.option("--calibration", default=96, show_default=True)
@click.option("--test", default=64, show_default=True)
@click.option("--seed", default=5, show_default=True)
def main(*, photos: Path, out: Path, calibration: int, test: int, seed: int) -> None:
    """Draw all four sets."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(photos.iterdir())]
    random, fonts = np.random.default_rng(seed), fonts_in(FONTS)
    for name, count in (("train-pages", calibration), ("pages", test)):
        pages = [page(pictures, fonts, random) for _ in range(count)]
        np.savez_compressed(out / f"{name}.npz", images=np.stack(pages))
    for name, count in (("train-photos", calibration), ("photos", test)):
        np.savez_compressed(out / f"{name}.npz", images=np.stack([crop(pictures, CROP, random) for _ in range(count)]))


def crop(pictures: Sequence[npt.NDArray[np.uint8]], size: int, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A square part of one of the photos, half of them mirrored."""
    picture = pictures[random.integers(len(pictures))]
    height, width = picture.shape[:2]
    side = random.integers(min(height, width) // 2, min(height, width))
    top, left = random.integers(height - side + 1), random.integers(width - side + 1)
    part = Image.fromarray(picture[top : top + side, left : left + side]).resize((size, size))
    return np.asarray(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part)


def page(
    pictures: Sequence[npt.NDArray[np.uint8]], fonts: list[Path], random: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Lines of text of several sizes below each other, on a photo or on plain paper."""
    paper = np.full((PAGE, PAGE, 3), random.integers(180, 256, 3), np.uint8)
    found = crop(pictures, PAGE, random).copy() if random.random() < 0.5 else paper
    top = int(random.integers(0, 30))
    while top < PAGE - 20:
        drawn, height = line(text_of(random), fonts, random), int(random.integers(14, 40))
        width = min(PAGE - 10, int(320 * height / 48 * random.uniform(0.9, 1.1)))
        if top + height > PAGE:
            break
        left = int(random.integers(0, PAGE - width))
        found[top : top + height, left : left + width] = np.asarray(Image.fromarray(drawn).resize((width, height)))
        top += height + int(random.integers(4, 50))
    return found


if __name__ == "__main__":
    main()
