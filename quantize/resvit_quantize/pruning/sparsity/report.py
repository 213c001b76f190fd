"""Which weights 2:4 sparsity masks, and which layers it leaves alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class SparseMethod(str, enum.Enum):
    """How the two of four are chosen."""

    MAGNITUDE = "magnitude"
    """The smaller two go (Mishra et al. 2021)."""
    SPARSEGPT = "sparsegpt"
    """Those go whose loss the other weights can make up for, and these do (Frantar and Alistarh 2023); needs
    images."""


class Layout(str, enum.Enum):
    """What the axes of a weight are."""

    LINEAR = "linear"
    """[out, in]."""
    CONV = "conv"
    """[out, in / groups, taps...]."""


@dataclass(frozen=True)
class LeftAlone:
    """A layer that stays dense, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, eq=False)
class SparseReport:
    """What became sparse."""

    masks: dict[str, Tensor]
    """Bool, by the name of the parameter: False where the weight is zero now and must stay so in training."""
    share: float
    """Share of all weights of linear and convolutional layers that lie in layers with the pattern."""
    left: tuple[LeftAlone, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the masks themselves."""
        left = {item.layer: item.reason for item in self.left}
        return {"sparse": sorted(self.masks), "share": self.share, "left": left}
