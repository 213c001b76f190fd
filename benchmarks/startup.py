"""CPU time of ``resvit-export --help``, beside that of an interpreter that does nothing.

python benchmarks/startup.py [--runs 30]

User plus system time of child processes, medians, interleaved. Wall time is not used: it says what else the
machine was doing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import click
from machine import write_result

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "resvit-export --help": ["resvit-export", "--help"],
    "resvit-export build --help": ["resvit-export", "build", "--help"],
    "resvit-export targets": ["resvit-export", "targets"],
}


def cpu_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


@click.command()
@click.option("--runs", default=30, show_default=True)
def main(runs: int) -> None:
    """Measure start-up."""
    script = Path(sys.executable).with_name("resvit-export")
    commands = {
        name: [str(script), *command[1:]] if command[0] == "resvit-export" else command
        for name, command in COMMANDS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(cpu_seconds(command))
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for name, seconds in medians.items():
        click.echo(f"{name:30} {seconds:.3f} s CPU (median of {runs})")
    click.echo(f"written: {write_result('startup', {'runs': runs, 'median_cpu_seconds': medians})}")


if __name__ == "__main__":
    main()
