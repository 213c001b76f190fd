"""What dividing one run's work over workers costs: brute-force sensitivity by layers, and a search tried ahead.

    python benchmarks/divided.py [--images 64] [--validation-images 1000]

The trained nano hybrid is measured by brute force in one process, and by two local workers of Ray; then it is built
where the plain recipe is undecided, so that a search follows, without Ray and with it. Every process has one thread, as
Ray gives its workers. What both ways wrote must be the same bytes. "Divided" is the seconds of the whole command, with
the start of Ray and of the workers; "alone" those without Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from machine import describe_machine

from resvit_engines.files import write_atomic

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "divided.md"
CHECKPOINT = ROOT / "tests" / "assets" / "embed-nano.pt"
SWEEP = """targets = ["jetson-orin"]
precisions = ["int8"]

[models.nano]
model = {{ name = "resvit:embed-nano", checkpoint = "{checkpoint}" }}

[recipe]
data = {{ images = "fashion-mnist", validation_images = {images}, calibration_images = 4 }}
quantize = {{ calibrator = "max" }}
validate = {{ max_drop = 0.51, allow_rejected = true }}
"""
"""Ranges of four images and so narrow a limit leave the plain recipe undecided: a search follows."""


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--images", default=64, show_default=True, help="Images of the sensitivity.")
@click.option("--validation-images", default=1000, show_default=True, help="Images of each trial.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(*, images: int, validation_images: int, out: Path) -> None:
    """Measure both, and write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [sensitivity(folder, images), search(folder, validation_images)]
    write_atomic(out, page(rows).encode())


def sensitivity(folder: Path, images: int) -> tuple[str, float, float]:
    """What was divided, and the seconds of both ways: the stages before are finished in both."""
    network = ["--model", "resvit:embed-nano", "--checkpoint", str(CHECKPOINT), "--data", "fashion-mnist"]
    line = ["sensitivity", *network, "--calibration-images", "64", "--images", str(images), "--quiet"]
    runs = {"here": [], "over": ["--on", "local"]}
    for name in runs:
        command(*line, "--run", str(folder / name))
    by_force = [*line, "--method", "brute-force"]
    here, over = (command(*by_force, "--run", str(folder / name), *more) for name, more in runs.items())
    found = [
        sorted(path.read_bytes() for path in (folder / name).glob("sensitivity-*/sensitivity.json")) for name in runs
    ]
    assert found[0] == found[1], "the sensitivities differ"
    (document,) = (one for one in map(json.loads, found[0]) if one["method"] == "brute-force")
    count = 1 + len(document["layers"])
    return f"sensitivity by brute force: {count} passes over {images} images", here, over


def search(folder: Path, images: int) -> tuple[str, float, float]:
    """The same of a build with a search."""
    plan = folder / "sweep.toml"
    plan.write_text(SWEEP.format(checkpoint=CHECKPOINT, images=images))
    here = command("sweep", str(plan), "--out", str(folder / "one"), "--quiet")
    over = command("sweep", str(plan), "--out", str(folder / "two"), "--quiet", "--on", "local")
    found = [[path.read_bytes() for path in (folder / name).glob("*/search-*/search.json")] for name in ("one", "two")]
    assert len(found[0]) == 1, "the plain recipe was accepted"
    assert found[0] == found[1], "the searches differ"
    looks = len(json.loads(found[0][0])["looks"])
    return f"build with a search of {looks} looks on {images:,} images", here, over


def command(*words: str) -> float:
    """Run a command of ours; the seconds that it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "resvit_export", *words], check=True, env=environment, capture_output=True)
    return time.monotonic() - began


def page(rows: list[tuple[str, float, float]]) -> str:
    """The results as Markdown."""
    machine = describe_machine()
    lines = [
        "# What dividing one run costs",
        "",
        f"By `benchmarks/divided.py` on {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, with a "
        f"load of {os.getloadavg()[2]:.1f} in the last quarter of an hour. Both ways wrote the same bytes.",
        "",
        "| what | alone | divided |",
        "|---|---:|---:|",
    ]
    lines += [f"| {what} | {here:.0f} s | {over:.0f} s |" for what, here, over in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
