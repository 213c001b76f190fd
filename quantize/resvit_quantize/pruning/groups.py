"""What pruning removes, as plain data: groups of units, and where each unit sits in every tensor that it touches.

A unit is the least that can go: a channel of the trunk with all that reads it, an attention head, a hidden channel of
an MLP, a channel of the embedding, a whole block.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


class Kind(str, enum.Enum):
    """What the units of a group are."""

    CHANNELS = "channels"
    """Channels of the convolutional trunk; those of a residual stage go together."""
    HEADS = "heads"
    """Attention heads: rows of Q, K and V, and the columns of the projection that reads them."""
    MLP = "mlp"
    """Hidden channels between two linear layers."""
    EMBED = "embed"
    """Channels of the token stream."""
    BLOCKS = "blocks"
    """Residual blocks that become the identity; a group of one unit each."""

    def __str__(self) -> str:
        return str(self.value)


class Role(str, enum.Enum):
    """Which side of a channel a tensor is on."""

    WRITES = "writes"
    READS = "reads"


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the units of a group sit in one parameter or buffer."""

    tensor: str
    """Its name in the module's state dict."""
    axis: int
    index: npt.NDArray[np.int64]
    """[units, each]: the positions along ``axis`` that a unit takes up."""
    role: Role


@dataclass(frozen=True)
class Count:
    """An attribute of a module that says how many there are: ``each`` less for every unit that goes.

    Several groups may count in one attribute, as the input channels of a layer that reads a concatenation.
    """

    module: str
    attribute: str
    each: int
    as_tuple: bool = False
    """A tuple of one number, as LayerNorm's ``normalized_shape``."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units that one decision is made about: how many of them stay, and which."""

    name: str
    """The module path that writes them: the same in every run."""
    kind: Kind
    units: int
    slices: tuple[Slice, ...]
    counts: tuple[Count, ...]
    width: int = 1
    """Channels in one unit: those of a head, or of a group of a GroupNorm."""
    identities: tuple[str, ...] = ()
    """Modules that become the identity when the unit goes (``Kind.BLOCKS``)."""
    exact: bool = True
    """Whether removing a unit equals zeroing what reads it; not so where a norm runs over the units."""


Kept: TypeAlias = Mapping[str, npt.NDArray[np.int64]]
"""By the group's name, the units that stay, ascending; groups that are not named stay whole."""
