"""Trained networks of others, as people bring them: what ``build`` with its defaults makes of each.

    resvit-export build --model 320n.onnx --input-shape 3,320,320 --data photos.npz --run runs/nudenet ...
    python benchmarks/trained_elsewhere.py runs/nudenet runs/orientation

Each argument is the folder of a run that ``build --precision int8 --task other --no-search`` has ended. "As it ships"
is the SQNR of the outputs on validation images; the columns before are those of the check on held-back images, which
saw others: ours, and plain ranges. "The least" is what the float network keeps under the least noise that 8 bits cost
at the same places, where the SQNR is under 20 dB. Speed is predicted for the run's target, INT8 over FP16. Rows are
kept in ``results/trained-elsewhere.json`` and written anew where a run is given again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from machine import describe_machine

from resvit_engines.files import write_atomic

RESULTS = Path(__file__).parent / "results"
HEADS = ("network", "images", "plain max", "plain percentile", "ours", "as it ships", "the least", "in 8 bits", "taken",
         "verdict", "INT8 over FP16")  # fmt: skip


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("runs", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(*, runs: tuple[Path, ...]) -> None:
    """Read each run, and write the table of all that are known."""
    kept = RESULTS / "trained-elsewhere.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    rows |= {run.name: row_of(run) for run in runs}
    write_atomic(kept, (json.dumps(rows, indent=1, sort_keys=True) + "\n").encode())
    write_atomic(RESULTS / "trained-elsewhere.md", page(rows).encode())


def row_of(run: Path) -> dict[str, Any]:
    """What a run's records say."""
    verdict, quantized, costs = (
        json.loads(next(run.glob(pattern)).read_bytes())
        for pattern in ("validate-*/verdict.json", "quantize-*/quantize.json", "predict-*/costs.json")
    )
    check = quantized["held_back"]
    return {
        "images": verdict["images"],
        "sqnr_db": verdict["stages"][-1]["sqnr_db"],
        "least_db": (verdict["blame"] or {}).get("under_noise_db"),
        "verdict": verdict["verdict"],
        "macs_share": quantized["macs_share"],
        "tried": {item["what"]: item["sqnr_db"] for item in check["tried"]},
        "taken": check["taken"],
        "gain": costs["gain"],
    }


def page(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    machine = describe_machine()

    def decibels(value: float | None) -> str:
        return "—" if value is None else f"{value:.1f} dB"

    lines = ["# Trained networks of others", "", " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    lines += [f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}.", ""]
    lines += [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name, row in sorted(rows.items()):
        tried = row["tried"]
        cells = [
            name,
            str(row["images"]),
            *(decibels(tried.get(what)) for what in ("plain max", "plain percentile", "all methods")),
            decibels(row["sqnr_db"]),
            decibels(row["least_db"]),
            f"{row['macs_share']:.1%}",
            row["taken"],
            row["verdict"],
            f"{row['gain']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
