"""Recognisers of text as cases: what is compared are lines, read by CTC, and not classes.

A line is read by the arg-max [T] of the first output [N, T, C], repeats and class 0, the blank, taken out (Graves et
al., "Connectionist Temporal Classification", 2006).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peers.images import StoredImages
from resvit_calibrate.gate.intervals import paired_difference
from resvit_calibrate.runtime.runner import OnnxRunner
from resvit_engines.errors import ResvitError
from resvit_engines.files import write_atomic

Line = list[int]
TEXTS = "texts.json"
"""The lines as they should be read, as classes, beside the stored images."""


def read_line(classes: npt.NDArray[np.int64]) -> Line:
    """The characters of one line [T], as classes."""
    first = np.concatenate([[True], classes[1:] != classes[:-1]])
    return [int(value) for value in classes[first & (classes != 0)]]


def store_texts(texts: Path, characters: Path, folder: Path, count: int) -> None:
    """Write the classes of ``count`` lines: of ``characters``, one to a line of the file, the first is class 1.

    A space that the file lacks is the class behind its last.

    Raises:
        ResvitError: INPUT for fewer texts than lines, and for a character that is in no class.
    """
    known = {text: at for at, text in enumerate(characters.read_text("utf-8").split("\n"), 1) if text}
    known.setdefault(" ", len(known) + 1)
    lines = json.loads(texts.read_text("utf-8"))[:count]
    if len(lines) < count:
        raise ResvitError(f"{texts} has {len(lines)} texts for {count} lines.", "Give the texts of these lines.")
    if lacking := sorted({text for line in lines for text in line} - known.keys()):
        raise ResvitError(f"{characters} lacks {' '.join(lacking)}.", "Give the network's own list of characters.")
    document = [[known[text] for text in line] for line in lines]
    write_atomic(folder / TEXTS, json.dumps(document).encode())


def compare_lines(
    floating: OnnxRunner, own: OnnxRunner, test: StoredImages, folder: Path, batch: int
) -> dict[str, Any]:
    """How a quantised recogniser reads the test lines beside the float one, under the names of a row of classes.

    ``agreement`` is the share of lines read as in float; ``top1``, ``drop`` and its interval are of lines read as
    ``texts.json`` of ``folder`` has them, and None where there is none. SQNR is pooled over the outputs' energy.
    """
    signal = noise = 0.0
    lines: dict[str, list[Line]] = {"float": [], "own": []}
    for part in test.batches(batch):
        true, found = (next(iter(runner({"input": part.images}).values())) for runner in (floating, own))
        signal += float(np.square(true, dtype=np.float64).sum())
        noise += float(np.square(true - found.astype(np.float64)).sum())
        for name, value in (("float", true), ("own", found)):
            lines[name] += [read_line(classes) for classes in value.argmax(-1)]
    alike = float(np.mean([one == other for one, other in zip(lines["float"], lines["own"], strict=True)]))
    row: dict[str, Any] = {
        "agreement": alike,
        "sqnr_db": 10.0 * float(np.log10(signal / noise)) if noise else None,
        "top1": None,
        "drop": None,
        "interval": [None, None],
    }
    if (folder / TEXTS).is_file():
        texts: list[Line] = json.loads((folder / TEXTS).read_bytes())
        right, still = (
            np.array([line == text for line, text in zip(lines[name], texts, strict=True)]) for name in ("float", "own")
        )
        lost, gained = int((right & ~still).sum()), int((still & ~right).sum())
        low, high = paired_difference(lost, gained, len(texts), 0.95)
        row |= {
            "reference_top1": float(right.mean()),
            "top1": float(still.mean()),
            "drop": 100.0 * (lost - gained) / len(texts),
            "interval": [100.0 * low, 100.0 * high],
        }
    return row
