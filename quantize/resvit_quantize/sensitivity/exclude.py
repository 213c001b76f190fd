"""Which layers to leave in FP16, as lists to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resvit_quantize.sensitivity.sensitivity import COVERAGE, LayerDamage, Sensitivity, layers_to_exclude


@dataclass(frozen=True)
class ExcludeList:
    """Layers that stay in FP16, and what that does."""

    purpose: str
    layers: tuple[LayerDamage, ...]
    coverage: float
    """The share of the multiply-accumulates that stays quantised, 0 to 1."""
    saves: float
    """The share of the damage that goes, 0 to 1."""
    precision: str

    @property
    def title(self) -> str:
        """The purpose with the numbers."""
        left = f"leaves {self.coverage:.1%} of the multiply-accumulates in {self.precision.upper()}"
        return f"{self.purpose} (saves {self.saves:.0%}, {left})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "purpose": self.title,
            "layers": [layer.node for layer in self.layers],
            "coverage": self.coverage,
            "saves": self.saves,
        }


def exclude_lists(found: Sensitivity) -> tuple[ExcludeList, ...]:
    """The shortest list that halves the damage; where less than ``COVERAGE`` stays quantised, also one that keeps it.

    Empty where no layer does damage.
    """
    precision = found.precision
    lists = [("To halve the damage", layers_to_exclude(found, precision))]
    if found.coverage(precision, lists[0][1]) < COVERAGE:
        cheap = layers_to_exclude(found, precision, coverage=COVERAGE)
        lists.append((f"To keep {COVERAGE:.0%} of the arithmetic quantised", cheap))
    return tuple(
        ExcludeList(
            purpose,
            layers,
            found.coverage(precision, layers),
            sum(found.share(layer, precision) for layer in layers),
            precision,
        )
        for purpose, layers in lists
        if layers
    )
