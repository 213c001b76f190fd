"""What a sweep's tasks cost beside their work: in this process, and over two local workers of Ray.

    python benchmarks/sweep.py [--images 400]

Three of the trained nano hybrids by two precisions for two targets are six tasks. The sweep runs three times: without
Ray; over Ray in another folder; and over Ray again, when all is done, where what is left is what a task costs beside
its work. Every task has one thread, as Ray gives its workers. "Working" is the sum of the tasks' seconds over the
seconds that all workers had, from the command's start to its page. The bundles of all three must be the same bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from machine import describe_machine

from resvit_engines.files import write_atomic

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "sweep.md"
NETWORKS = ("embed-nano", "fpn-nano", "mobile-nano")
SWEEP = """targets = ["jetson-orin", "l4"]
precisions = ["int8", "fp16"]

{models}
[recipe]
data = {{ images = "fashion-mnist", validation_images = {images}, calibration_images = 64 }}
validate = {{ allow_rejected = true }}
search = {{ enabled = false }}
"""
MODEL = '[models.{name}]\nmodel = {{ name = "resvit:{name}", checkpoint = "{checkpoint}" }}\n'


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--images", default=400, show_default=True, help="Validation images of each task.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(*, images: int, out: Path) -> None:
    """Run the three sweeps, and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "sweep.toml"
        checkpoints = ROOT / "tests" / "assets"
        models = "\n".join(MODEL.format(name=name, checkpoint=checkpoints / f"{name}.pt") for name in NETWORKS)
        plan.write_text(SWEEP.format(models=models, images=images))
        here = swept(plan, Path(folder) / "here")
        spread = swept(plan, Path(folder) / "spread", "--on", "local")
        again = swept(plan, Path(folder) / "spread", "--on", "local")
    assert bundles(here) == bundles(spread) == bundles(again), "the bundles differ"
    write_atomic(out, page(here, spread, again).encode())


def swept(plan: Path, root: Path, *options: str) -> dict[str, Any]:
    """One sweep: what it says of itself, and its wall-clock seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as a worker of Ray's has it, so that bytes can be compared
    began = time.monotonic()
    command = [sys.executable, "-m", "resvit_export", "sweep", str(plan), "--out", str(root), "--json", *options]
    said = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    return {**json.loads(said), "seconds": time.monotonic() - began}


def bundles(sweep: dict[str, Any]) -> list[str]:
    """The digests of all bundles, in order."""
    return [target["bundle"] for task in sweep["tasks"] for target in task["targets"]]


def page(here: dict[str, Any], spread: dict[str, Any], again: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = describe_machine()
    cores = machine["cores"]

    def work(sweep: dict[str, Any]) -> float:
        return sum(task["seconds"] for task in sweep["tasks"])

    tasks = len(here["tasks"])
    rows = [
        ("one after another", here, 1),
        (f"Ray, {cores} workers", spread, cores),
        ("the same again, all done", again, cores),
    ]
    lines = [
        "# What a sweep costs beside its work",
        "",
        f"By `benchmarks/sweep.py` on {machine['cpu']}, {cores} cores, Python {machine['python']}; {tasks} tasks of "
        f"two targets each; the {len(bundles(here))} bundles of all three sweeps are the same bytes.",
        "",
        "| sweep | seconds | of the tasks together | working | longest task | a task that is done |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, sweep, workers in rows:
        longest = max(task["seconds"] for task in sweep["tasks"])
        done = f"{work(sweep) / tasks:.2f} s" if sweep is again else ""
        share = work(sweep) / (workers * sweep["seconds"])
        lines.append(f"| {name} | {sweep['seconds']:.0f} | {work(sweep):.0f} | {share:.0%} | {longest:.0f} | {done} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
