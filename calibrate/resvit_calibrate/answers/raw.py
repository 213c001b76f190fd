"""The outputs themselves of the first images: how much noise quantisation put into them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.classes import sqnr

IMAGES = 64
"""Images whose outputs are kept."""
_BYTES = 64 << 20  # of all of them together

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Raw:
    """Outputs of the first images: float32 [n, values], by name; of integer outputs nothing is kept.

    Maps can be large: at most 64 images are kept, and of these every s-th value where they would take more
    than 64 MiB. The same values are kept of every network of the same outputs.
    """

    outputs: Mapping[str, Array] = field(default_factory=dict)

    def sqnr_db(self, other: Raw) -> float:
        """The lowest SQNR of an output in dB, this being the reference; infinite where all are equal."""
        return min(self.sqnr_by_output(other).values(), default=math.inf)

    def sqnr_by_output(self, other: Raw) -> dict[str, float]:
        """SQNR of every output in dB; NaN, which counts as the lowest, where the other's values are not finite."""
        found: dict[str, float] = {}
        for name, mine in self.outputs.items():
            theirs = other.outputs.get(name)
            fits = theirs is not None and theirs.shape == mine.shape
            found[name] = sqnr(mine, theirs) if fits and theirs is not None else math.nan
        broken = {name: value for name, value in found.items() if math.isnan(value)}
        return broken or found

    def first(self, count: int) -> Raw:
        """Only the first ``count`` images."""
        return Raw({name: value[:count] for name, value in self.outputs.items()})

    def to_arrays(self) -> dict[str, Array]:
        """Arrays for an ``.npz`` file."""
        names = np.array(list(self.outputs), dtype=np.str_)
        return {"raw_names": names, **{f"raw_{i}": value for i, value in enumerate(self.outputs.values())}}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Raw:
        """Read what ``to_arrays`` made."""
        return cls({str(name): arrays[f"raw_{i}"] for i, name in enumerate(arrays["raw_names"])})


def raw_of(
    outputs: Mapping[str, Array], count: int, before: int, images: int = IMAGES, most_bytes: int = _BYTES
) -> Raw:
    """What is kept of one batch's outputs [``count``, …], behind ``before`` images of the set.

    Behind the first ``images`` nothing is kept. All that is kept of a whole set takes at most ``most_bytes``.
    """
    wanted = {name: value for name, value in outputs.items() if value.ndim and value.dtype.kind == "f"}
    each = sum(4 * value[0].size for value in wanted.values())
    step, left = max(1, -(-each * images // most_bytes)), min(max(images - before, 0), count)
    with np.errstate(over="ignore"):
        return Raw({n: v[:left].reshape(left, v[0].size)[:, ::step].astype(np.float32) for n, v in wanted.items()})


def joined_raw(parts: Sequence[Raw]) -> Raw:
    """The outputs of several parts of a set, in order."""
    kept = [part for part in parts if any(len(value) for value in part.outputs.values())] or list(parts[:1])
    return Raw({name: np.concatenate([part.outputs[name] for part in kept]) for name in kept[0].outputs})
