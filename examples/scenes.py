"""Write scenes of Fashion-MNIST items as files: COCO annotations to detect with, masks to segment with.

    python examples/scenes.py --out data/scenes

writes ``detection/{train,val}`` (``annotations.json`` beside ``images/``) and ``segmentation/{train,val}``
(``images/`` beside ``masks/``), of 96 to 160 pixels each way. Equal arguments give equal files.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from resvit_calibrate.readers.fashion_mnist import CLASS_NAMES, Split
from resvit_calibrate.readers.scenes import MASK_CLASSES, SIZES, Scene, Scenes
from resvit_engines.files import pretty_json, write_atomic
from resvit_engines.progress import Reporter, reporter
from resvit_export.models.training.errors import spoken_errors

NAMES: dict[Split, str] = {"train": "train", "test": "val"}


def write_scenes(source: Scenes, count: int, out: Path, report: Reporter) -> None:
    """Write the first ``count`` scenes below ``out/detection`` and ``out/segmentation``."""
    side = NAMES[source.split]
    detection, segmentation = out / "detection" / side, out / "segmentation" / side
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(report.track(source.scenes(0, count), f"write {side}", count)):
        name = f"{number:05}.png"
        picture = png(scene.pixels)
        write_atomic(detection / "images" / name, picture)
        write_atomic(segmentation / "images" / name, picture)
        write_atomic(segmentation / "masks" / name, png(scene.mask().classes.astype(np.uint8)))
        height, width = scene.pixels.shape
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        annotations += [
            {"id": len(annotations) + 1 + index, "image_id": number + 1} | each
            for index, each in enumerate(annotations_of(scene))
        ]
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASS_NAMES)]
    coco = {"images": images, "categories": categories, "annotations": annotations}
    write_atomic(detection / "annotations.json", pretty_json(coco))
    write_atomic(segmentation.parent / "classes.txt", "".join(f"{name}\n" for name in MASK_CLASSES).encode())


def annotations_of(scene: Scene) -> list[dict[str, Any]]:
    """A scene's items as COCO has them: ``bbox`` is x, y, width, height; ``area`` counts the pixels seen."""
    found = []
    for item, (x1, y1, x2, y2) in enumerate(scene.boxes().boxes.astype(int).tolist()):
        found.append(
            {
                "category_id": int(scene.classes[item]) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int((scene.instances == item).sum()),
                "iscrowd": 0,
            }
        )
    return found


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A grey image [H, W] as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("data/scenes"), show_default=True)
@click.option("--train", type=click.IntRange(1, 10**5), default=1000, show_default=True, help="Scenes to train on.")
@click.option("--val", type=click.IntRange(1, 10**5), default=500, show_default=True, help="Scenes to validate on.")
@click.option("--edges", type=(int, int), default=SIZES, show_default=True, help="Least and greatest edge in pixels.")
@click.option("--seed", type=click.IntRange(0, 10**6), default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress.")
def main(*, out: Path, train: int, val: int, edges: tuple[int, int], seed: int, quiet: bool) -> None:
    """Write both splits and say where they are."""
    with spoken_errors("writes all of them again"):
        write_scenes(Scenes("train", seed, edges, edges), train, out, reporter(quiet))
        write_scenes(Scenes("test", seed, edges, edges), val, out, reporter(quiet))
    click.echo(f"{out}: {train} scenes to train on and {val} to validate on, in detection/ and segmentation/")


if __name__ == "__main__":
    main()
