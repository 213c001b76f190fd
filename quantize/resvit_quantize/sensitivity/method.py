"""How sensitivity is measured, as a value that costs no import."""

from __future__ import annotations

import enum


class Method(str, enum.Enum):
    """How damages are found."""

    GRADIENT = "one-pass"
    """Gradients: one forward and a few backward passes an image, for all layers together."""
    BRUTE_FORCE = "brute-force"
    """One layer quantised at a time and the whole network run: as many passes as there are layers."""

    def __str__(self) -> str:
        return str(self.value)
