"""The signal of outputs is what differs between images: what all of them share would drown the noise on the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_LOUDEST = 0.05
"""Share of the images, those with the most energy, that takes no part in the mean: they would draw it to themselves."""
_ALIKE = 1e-10
"""Share of an output's energy in what differs between images below which it is the same for every image: a
hundred-thousandth of its size, which the order of float32's sums can make."""


@dataclass(frozen=True, eq=False)
class Shared:
    """What images share of one output.

    ``mean`` float64 [values] is over those of the images that ``members`` bool [N] names; None where there is none to
    take out: of a single image, of numbers that are not finite, and where ``constant`` says that the output is the same
    for all of them.
    """

    mean: Floats | None
    members: npt.NDArray[np.bool_]
    constant: bool = False

    def signal(self, values: Floats, members: npt.NDArray[np.bool_] | None = None) -> Floats:
        """The energy of each row of ``values`` [N, values] about the mean, [N]; the whole energy where there is none.

        ``members`` bool [N] says which rows the mean was taken of, by default none. A mean of few images is nearer to
        those few, and farther from all others, than that of all would be: both are made good.
        """
        if self.mean is None or self.mean.shape != values.shape[1:]:
            return np.asarray(np.square(values).sum(1))
        count = int(self.members.sum())
        inside = np.zeros(len(values), bool) if members is None else members
        factors = np.where(inside, count / (count - 1), count / (count + 1))
        return np.asarray(factors * np.square(values - self.mean).sum(1))


def shared_of(values: Floats) -> Shared:
    """What the images share of one output [N, values]."""
    energy = np.square(values).sum(1)
    every = np.ones(len(values), bool)
    if len(values) < 2 or not np.isfinite(energy).all():
        return Shared(None, every)
    members = energy <= np.quantile(energy, 1.0 - _LOUDEST, method="higher")
    found = Shared(members.astype(np.float64) @ values / members.sum(), members)
    if found.signal(values, members)[members].sum() <= _ALIKE * energy[members].sum():
        return Shared(None, every, constant=True)
    return found


def by_image(outputs: npt.NDArray[Any], images: int) -> Floats | None:
    """An output as float64 [images, values]; None where its first axis is not that of the images."""
    if not outputs.ndim or len(outputs) != images:
        return None
    return outputs.astype(np.float64).reshape(images, -1)
