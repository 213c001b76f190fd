"""What was compared on held-back calibration images, and what was taken: a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OURS = "all methods"


@dataclass(frozen=True)
class Tried:
    """One way to quantise, on the held-back images."""

    what: str
    sqnr_db: float
    """Pooled over images; noise-to-signal ratios of several outputs are averaged. Infinite without noise."""
    agreement: float | None
    """The share of positions, 0 to 1, at which the outputs' arg-max is the float network's; None without classes."""
    gain_db: float = 0.0
    """How much better than our methods on the same images; with layers in FP16 or the head in 8 bits, than the same
    without."""
    noise_db: float = 0.0
    """The standard error of that gain, over images."""
    images: int = 0
    """How many it was judged on: fewer where the first look told enough."""


@dataclass(frozen=True)
class MendedLayer:
    """A layer that stays in FP16 because its error is out of line."""

    node: str
    noise: float
    """Its share of the predicted noise at the outputs, 0 to 1."""
    macs: float
    """Its share of the multiply-accumulates, 0 to 1."""


@dataclass(frozen=True)
class HeldBackCheck:
    """Our methods beside plain ranges, by the error at the outputs on images that no range was taken from."""

    images: int
    """As many as the way was judged on that saw most."""
    by_halves: bool
    """Whether each half of the images was judged by ranges of the other, there being too few to hold any back."""
    tried: tuple[Tried, ...]
    taken: str
    mended: tuple[MendedLayer, ...] = ()
    note: str = ""
    """Why something was not tried."""
    precisions: Mapping[str, str] = field(default_factory=dict)
    """By node, what these images decided: layers in FP16, heads in 8 bits."""

    @property
    def plain(self) -> bool:
        """Whether plain ranges or fewer methods were better."""
        return not self.taken.startswith(OURS)

    @property
    def sentence(self) -> str:
        """What was compared, the figures, and what was taken."""
        if not self.tried:
            return f"Held-back check: none ({self.note})."
        on = f"{self.images} calibration images" + (
            ", each half judged by ranges of the other" if self.by_halves else " that no range was taken from"
        )
        figures = ", ".join(
            f"{item.what} {figure(item)}" + (f" on {item.images} of them" if item.images < self.images else "")
            for item in self.tried
        )
        note = f" {self.note}" if self.note else ""
        return f"Held-back check, on {on}: {figures}. Taken: {self.taken}.{note}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        tried = [{name: _plain(value) for name, value in asdict(item).items()} for item in self.tried]
        return {**asdict(self), "tried": tried, "mended": [asdict(item) for item in self.mended]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> HeldBackCheck:
        """Read what ``to_json`` wrote."""
        tried = tuple(
            Tried(
                str(item["what"]),
                float(item["sqnr_db"]),
                None if item["agreement"] is None else float(item["agreement"]),
                float(item["gain_db"]),
                float(item["noise_db"]),
                int(item["images"]),
            )
            for item in document["tried"]
        )
        mended = tuple(MendedLayer(**item) for item in document["mended"])
        return cls(**{**document, "tried": tried, "mended": mended})


def figure(item: Tried) -> str:
    """SQNR and agreement in a few words."""
    same = "" if item.agreement is None else f" ({item.agreement:.1%} of the arg-max alike)"
    return f"{item.sqnr_db:.1f} dB{same}"


def _plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
