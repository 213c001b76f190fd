"""Wheels that were carried along, installed offline into a folder of their own.

Needs the standard library alone, and pip.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_PIECE = re.compile(r"(.+\.whl)\.(\d{2,3})")


def install_wheels(wheels: Path, site: Path, say: Callable[[str], None]) -> list[str]:
    """Install every wheel of a folder into ``site``, without a network; returns what was refused, with pip's reason.

    Wheels are taken one by one, so that one of another Python stops none of the others. A wheel larger than what can be
    carried at once may lie there in pieces, ``NAME.whl.00``, ``NAME.whl.01`` (``split -b 60M -d NAME.whl NAME.whl.``).
    What is installed already is not installed again.
    """
    site.mkdir(parents=True, exist_ok=True)
    refused = []
    for wheel in [*sorted(wheels.glob("*.whl")), *joined_pieces(wheels, site)]:
        seal = site / f".{wheel.name}.{wheel.stat().st_size}"
        if seal.is_file():
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--upgrade", "--target", str(site), str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [
                f"pip's exit code {done.returncode}"
            ]
            refused.append(f"{wheel.name}: {lines[0].strip()[:200]}")
            continue
        seal.touch()
        say(f"installed: {wheel.name}")
    return refused


def joined_pieces(wheels: Path, site: Path) -> list[Path]:
    """The wheels whose pieces lie in a folder, put together beside ``site``; of equal size, they are there already."""
    pieces: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted(wheels.iterdir()):
        if found := _PIECE.fullmatch(file.name):
            pieces.setdefault(found[1], []).append((int(found[2]), file))
    whole = []
    for name, parts in pieces.items():
        out = site.parent / "joined" / name
        out.parent.mkdir(parents=True, exist_ok=True)
        files = [file for _, file in sorted(parts)]
        if not out.is_file() or out.stat().st_size != sum(file.stat().st_size for file in files):
            partial = out.with_name(f"{name}.part")
            with partial.open("wb") as stream:
                for file in files:
                    with file.open("rb") as piece:
                        shutil.copyfileobj(piece, stream)
            partial.replace(out)
        whole.append(out)
    return whole
