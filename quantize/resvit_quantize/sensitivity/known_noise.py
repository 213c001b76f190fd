"""Noise of layers that was measured already: a sensitivity by brute force that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.files import make_folder, pretty_json, remove, write_atomic
from resvit_engines.records import record_from_file

_FILE = "noise.json"


@dataclass(frozen=True)
class NoiseSource:
    """What is quantised while noise is measured: one ``layer`` in this precision, or all that the rules choose."""

    precision: str
    layer: str | None
    """Its name; None stands for all together."""


class KnownNoise:
    """Noise-to-signal power by what is quantised, in one file of a folder; ``key`` says of what and on which images."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def read(self) -> dict[NoiseSource, float]:
        """What is there; nothing where that is damaged or of another key."""
        try:
            record = record_from_file(self.folder / _FILE)
            if record.sha256("key") != self.key:
                return {}
            found = {}
            for kept in record.records("noise"):
                layer = kept.optional("layer", kept.text)
                found[NoiseSource(kept.text("precision"), layer)] = float(kept.number("noise", 0))
        except ResvitError:
            return {}
        return found

    def write(self, noise: Mapping[NoiseSource, float]) -> None:
        """Keep it, in place of what is there; raises ``ResvitError`` SYSTEM where the disk is full."""
        kept = [{"precision": of.precision, "layer": of.layer, "noise": value} for of, value in noise.items()]
        make_folder(self.folder)
        write_atomic(self.folder / _FILE, pretty_json({"key": self.key, "noise": kept}))

    def remove(self) -> None:
        """Remove it, and the folder of all that is unfinished where it is empty then."""
        remove(self.folder)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
