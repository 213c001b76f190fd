"""Print one table of several finished runs: what each holds, what it cost in accuracy, what it is predicted to gain.

Below it stand the prediction in words, what is to be done next, and where the report is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = (
    *("run", "target", "verdict", "float top-1", "INT8 top-1", "drop, points", "arithmetic left", "quantised"),
    *("predicted, FP16 = 1", "result"),
)


def result_of(run: Path) -> dict[str, object]:
    """Ask the run itself: a finished build only says again what it made."""
    command = [str(Path(sys.executable).with_name("resvit-export")), "build", "--run", str(run), "--json"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    document: dict[str, object] = json.loads(answer.stdout)
    return document


def row(run: Path) -> tuple[list[str], list[str]]:
    """The cells of the table, and the lines below it."""
    document = result_of(run)
    stages = {stage["stage"]: stage for stage in document["stages"]}  # type: ignore[attr-defined]
    verdict = stages["validate"]["results"]["verdict.json"]
    first, last = verdict["stages"][0], verdict["stages"][-1]
    compiled = stages["compile"]["results"]
    if "engine.json" in compiled:
        engine = compiled["engine.json"]
        target, following = engine["target"], []
        made = f"engine by {engine['builder']}, {engine['bytes'] / 1e6:.2f} MB"
    else:
        plan = compiled["plan.json"]
        target, made = plan["target"], "bundle that TensorRT builds there"
        following = [
            f"next: resvit-export build --run {run} --device ssh://USER@HOST",
            f"  or on the device: resvit-engine build {Path(str(document['bundle'])).name} --trust KEY.pub",
        ]
    low, high = last["interval"]
    predicted: dict[str, Any] = document["predicted"]  # type: ignore[assignment]
    pruned = stages["prune"]["results"]["prune.json"] if "prune" in stages else None
    left = pruned["after"]["macs"] / pruned["before"]["macs"] if pruned else 1.0
    cells = [
        str(run),
        target,
        str(document["verdict"]),
        f"{first['top1']:.2%}",
        f"{last['top1']:.2%}",
        f"{last['drop']:+.2f} ({low:+.2f} … {high:+.2f})",
        f"{left:.1%}",
        f"{stages['quantize']['results']['quantize.json']['macs_share']:.1%}",
        f"{predicted['gain']:.2f}",
        made,
    ]
    return cells, [f"{run}: {predicted['sentence']}", *following, f"report: {document['report']}"]


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(runs: tuple[Path, ...]) -> None:
    """Summarise finished RUNS."""
    table = Table(*COLUMNS, title="Fashion-MNIST, 10,000 test images", title_justify="left", box=box.SIMPLE_HEAD)
    rows = [row(run) for run in runs]
    for cells, _ in rows:
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
    console.print(table)
    for _, lines in rows:
        for line in lines:
            console.print(line, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
