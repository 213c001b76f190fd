"""Change what every parser of outside data reads, for as long as one likes, and count how reading it ends.

    python benchmarks/parser_faults.py
    python benchmarks/parser_faults.py --seconds 300 --only ONNX

Every case must be read, or be refused as a user's fault in words without control characters; nothing may be written
outside of its folder, executed, or take longer than a minute. Anything else is listed. ``tests/test_parsers.py`` runs
samples of the same. Writes ``results/parser-faults.md``.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FrameType

import click
from machine import RESULTS, describe_machine
from parsers import Parser, ended, parsers

_MEMORY = 16 << 30  # bytes: what data asks for must be refused, or fail here, and not take the machine down
_LONGEST = 60  # seconds, after which a case counts as one that hangs


class HangsError(BaseException):
    """A case that does not end; none of the handlers of what is tried takes it for something else."""


def attack(parser: Parser, seconds: float, dice: random.Random, folder: Path) -> tuple[Counter[str], float]:
    """How the cases of so many seconds ended, and the seconds of the slowest."""
    ends: Counter[str] = Counter()
    slowest, until = 0.0, time.monotonic() + seconds
    while time.monotonic() < until:
        start = time.monotonic()
        signal.alarm(_LONGEST)
        try:
            ends[ended(parser, dice, folder)] += 1
        except HangsError:
            ends["does not end"] += 1
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
        shutil.rmtree(folder)
        folder.mkdir()
    return ends, slowest


def _hangs(*_: int | FrameType | None) -> None:
    raise HangsError


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="For each parser.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, help="Parsers whose name has this in it.")
def main(seconds: float, seed: int, only: tuple[str, ...]) -> None:
    """Try every parser in turn."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.signal(signal.SIGALRM, _hangs)
    rows: list[tuple[str, Counter[str], float]] = []
    for name, parser in parsers().items():
        if only and not any(part in name for part in only):
            continue
        with tempfile.TemporaryDirectory() as place:
            rows.append((name, *attack(parser, seconds, random.Random(f"{seed} {name}"), Path(place).resolve())))
        _, ends, slowest = rows[-1]
        click.echo(f"{name}: {dict(ends)}, slowest {slowest:.2f} s")
    if not only:
        (RESULTS / "parser-faults.md").write_text(_page(rows, seconds, seed))
    sys.exit(any(set(ends) - {"read", "refused"} for _, ends, _ in rows))


def _page(rows: list[tuple[str, Counter[str], float]], seconds: float, seed: int) -> str:
    machine = describe_machine()
    cases = sum(sum(ends.values()) for _, ends, _ in rows)
    wrong = [(name, what, count) for name, ends, _ in rows for what, count in ends.items() if what not in _GOOD]
    lines = [
        "# Parsers of outside data",
        "",
        f"`python benchmarks/parser_faults.py --seconds {seconds:g} --seed {seed}`; {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB; Python {machine['python']}, "
        f"torch {machine['versions']['torch']}, onnx {machine['versions']['onnx']}.",
        "",
        f"{len(rows)} parsers, {cases:,} cases; {sum(count for *_, count in wrong):,} ended in anything but a value or "
        "one error that is the user's, touched something else, or took over a minute.",
        "",
        "| parser of | cases | read | refused | wrong | slowest, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, ends, slowest in rows:
        total = sum(ends.values())
        bad = total - ends["read"] - ends["refused"]
        lines.append(f"| {name} | {total:,} | {ends['read']:,} | {ends['refused']:,} | {bad:,} | {slowest:.2f} |")
    lines += [f"\n- {name}: {what} ({count:,} times)" for name, what, count in wrong]
    return "\n".join(lines) + "\n"


_GOOD = ("read", "refused")


if __name__ == "__main__":
    main()
