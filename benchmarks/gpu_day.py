"""Everything that a lent GPU is to be asked, in calls of less than ten minutes, each going on where the last one ended.

    python benchmarks/gpu_day.py --budget 540
    python benchmarks/gpu_day.py --budget 540 --wheels wheels/      # for libraries that the machine lacks
    python benchmarks/gpu_day.py --take gpu-day.json                # later, elsewhere: what came back from there

Tests marked gpu; kernels beside PyTorch's (``kernels.py --record``); engines of the hybrids in FP16, INT8 and FP8 by
TensorRT, ``trtexec`` and TensorRT for RTX, beside what was predicted of them; ``--tune quick``. Each part is a process
with a log of its own; what does not fit into the budget is left for the next call. Where a part cannot be done (no such
library, no such GPU in the builder's table) the table says why, and the others are done. ``gpu-day.json`` holds all
that is known, with the end of each log, below 16 MiB, and ``gpu-day.md`` the table: these two are what to bring back.
With ``gpu-day.json`` in the folder ``--results`` another machine goes on where it ends.

The script itself needs Python and its standard library, for the machine may be bare.

Exit codes: 0 all that can be done here is done; 2 a misspelt command line; 3 a file that is none of this script's;
7 there is no GPU here, and nothing was done; 8 a part failed or ended three times too late, its reason is in the table;
9 nothing can be written; 13 parts are left for the next call; 130 interrupted, and what was done is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_parts.parts import PARTS
from gpu_parts.schedule import BOOK, DONE, IMPOSSIBLE, Book, BookError, Part, Place, interruptible, run_parts
from gpu_parts.table import markdown
from gpu_parts.wheels import install_wheels

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("engines", "calibrate", "quantize", "export")
OK, INPUT, NO_GPU, FAILED, SYSTEM, LEFT, INTERRUPTED = 0, 3, 7, 8, 9, 13, 130


def environment(site: Path) -> dict[str, str]:
    """What the parts run in: this checkout, and the wheels that were carried along behind it."""
    folders = [*(str(ROOT / wing) for wing in WINGS), str(ROOT / "benchmarks"), str(site)]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    data = ROOT / "data" / "fashion-mnist"
    return {"RESVIT_FASHION_MNIST": str(data), **os.environ, **own} if data.is_dir() else {**os.environ, **own}


def asked(environment: Mapping[str, str], *modules: str) -> Any:
    """The answer of ``gpu_parts.look``."""
    done = subprocess.run(
        [sys.executable, "-m", "gpu_parts.look", *modules], env=dict(environment), stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def place_here(results: Path, work: Path) -> Place:
    """This checkout on this machine."""
    known = environment(work / "site")
    return Place(
        ROOT,
        results.resolve(),
        work.resolve(),
        known,
        look=lambda: asked(known),
        missing=lambda modules: asked(known, *modules) if modules else [],
        found=lambda programs: next((path for name in programs if (path := shutil.which(name))), None),
    )


def say(text: str) -> None:
    """Tell what goes on."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def take(file: Path) -> int:
    """Put what came back into the repository: times into ``measured.json``, the table into ``results/``."""
    from kernels import MEASURED, record
    from machine import RESULTS

    book = Book(file)
    try:
        done = {name: part["result"] for name, part in book.parts.items() if part["status"] == DONE}
        kept = record([row for name, result in done.items() if name.startswith("kernels-") for row in result["rows"]])
        text = markdown(book.machine, book.parts, tuple(book.parts))
    except (KeyError, TypeError, AttributeError) as error:
        raise BookError(f"{file} holds a result that none of the parts wrote: {error!r}") from error
    (RESULTS / "gpu-day.md").write_text(text)
    say(f"{kept} cases in {MEASURED}; written: {RESULTS / 'gpu-day.md'}")
    return OK


def run(parts: Sequence[Part], place: Place, wheels: Path | None, budget: float, again: Sequence[str] = ()) -> int:
    """Do what fits into ``budget`` seconds; returns the exit code. What is known of ``again`` is forgotten first."""
    end = time.monotonic() + budget
    machine = place.look()
    if machine.get("sm") is None:
        say("There is no NVIDIA GPU here, or no driver for it: nothing was done. Call this where one is.")
        return NO_GPU
    place.results.mkdir(parents=True, exist_ok=True)
    place.work.mkdir(parents=True, exist_ok=True)
    book = Book(place.results / BOOK)
    book.machine = dict(machine)
    for name in again:
        book.parts.pop(name, None)
    book.save()
    try:
        with interruptible():
            for refused in install_wheels(wheels, place.work / "site", say) if wheels else ():
                say(f"not installed: {refused}")
            left = run_parts(parts, place, book, end - time.monotonic(), say)
    except KeyboardInterrupt:
        say("Interrupted: call again with the same folders, and it goes on.")
        return INTERRUPTED
    finally:
        text = markdown(book.machine, book.parts, [part.name for part in parts])
        (place.results / "gpu-day.md").write_text(text)
    sys.stdout.write(text)
    if left:
        say(f"left for the next call: {', '.join(left)}")
        return LEFT
    bad = [part.name for part in parts if book.parts[part.name]["status"] not in (DONE, IMPOSSIBLE)]
    return FAILED if bad else OK


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS, place: Place | None = None) -> int:
    """Parse, and do it. Tests hand in parts and a place of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for this call (540)")
    parser.add_argument("--results", type=Path, default=Path("runs/gpu-day"), help="small files (runs/gpu-day)")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-work"), help="large files (runs/gpu-work)")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, whole or in pieces NAME.whl.00")
    parser.add_argument("--only", action="append", metavar="PART", help="these parts alone; repeat it")
    parser.add_argument("--again", action="append", default=[], metavar="PART", help="forget what is known of it")
    parser.add_argument("--list", action="store_true", help="the names of the parts, and nothing else")
    parser.add_argument("--take", type=Path, metavar="FILE", help=f"put a {BOOK} that came back into this repository")
    given = parser.parse_args(arguments)
    names = {part.name for part in parts}
    if unknown := sorted({*(given.only or ()), *given.again} - names):
        parser.error(f"there is no part {', '.join(unknown)} (--list)")
    if given.budget <= 0:
        parser.error("--budget must be above 0")
    if given.wheels and not given.wheels.is_dir():
        parser.error(f"there is no folder {given.wheels}")
    if given.list:
        sys.stdout.write("".join(f"{part.name}\n" for part in parts))
        return OK
    try:
        if given.take:
            return take(given.take)
        chosen = [part for part in parts if not given.only or part.name in given.only]
        return run(chosen, place or place_here(given.results, given.work), given.wheels, given.budget, given.again)
    except BookError as error:
        say(f"error: {error}")
        return INPUT
    except OSError as error:
        say(f"error: {error}")
        return SYSTEM


if __name__ == "__main__":
    raise SystemExit(main())
