"""Depths of a student that is taught by another network, and by known depths where there are any."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.images.targets import UNKNOWN_DEPTH, DepthTarget
from resvit_calibrate.tasks.depth import Depth
from resvit_quantize.training.objectives.maps import at_pixels, lattice
from resvit_quantize.training.objectives.objective import Objective, Outputs
from resvit_quantize.training.standing import relative_error

_SHARED = 0.5
"""How much of an error that all pixels share is forgiven (Eigen et al. 2014); all of it where depth has no scale."""


class DepthObjective(Objective):
    """A map [B, 1, h, w] or [B, h, w]: the scale-invariant error of logarithms (Eigen et al. 2014).

    Beside it stands the error to signal of the map, which alone has a gradient where depths are beyond what counts.
    """

    def __init__(self, task: Depth, output: str, *, labelled: bool) -> None:
        self.options, self.reads, self.labelled = task.options, (output,), labelled
        labels = " and the known depths" if labelled else ""
        self.told = f"the teacher's depths{labels}: scale-invariant error of logarithms, and error to signal"

    def loss(self, outputs: Outputs, targets: Outputs, batch: Batch) -> Tensor:
        """The mean over images."""
        values, aims = (each[self.reads[0]].float() for each in (outputs, targets))
        loss = relative_error(values, aims)
        maps, wanted = (each if each.ndim == 4 else each[:, None] for each in (values, aims))
        everywhere = torch.ones_like(wanted, dtype=torch.bool)
        loss = loss + self._scale_invariant(maps, self._logarithm(wanted), everywhere)
        if not batch.targets:
            return loss
        known: tuple[DepthTarget, ...] = batch.targets  # type: ignore[assignment]
        height, width = known[0].depth.shape
        rows, columns = lattice(height, width)
        depth = np.stack([target.depth[np.ix_(rows, columns)] for target in known])[:, None]
        low, high = self.options.min_depth, self.options.max_depth
        counts = (depth != UNKNOWN_DEPTH) & (depth >= low) & (depth <= high)
        true = torch.from_numpy(np.log(np.where(counts, depth, 1.0))).to(values)
        at = at_pixels(maps, (height, width), rows, columns)
        return loss + self._scale_invariant(at, true, torch.from_numpy(counts).to(values.device))

    def _logarithm(self, values: Tensor) -> Tensor:
        """Of the depths that a map says, held to those that count."""
        low, high = self.options.min_depth, self.options.max_depth
        if self.options.inverted:
            return -values.clamp(1.0 / high, 1.0 / low).log()
        return values.clamp(low, high).log()

    def _scale_invariant(self, values: Tensor, true: Tensor, counts: Tensor) -> Tensor:
        shared = 1.0 if self.options.align == "median" else _SHARED
        return scale_invariant(self._logarithm(values), true, counts, shared)


def scale_invariant(own: Tensor, true: Tensor, counts: Tensor, shared: float) -> Tensor:
    """Mean square of the differences of logarithms [B, ...], less ``shared`` of their mean's square, over images.

    Only pixels where ``counts`` is true are asked; an image without any loses nothing.
    """
    apart = torch.where(counts, own - true, 0.0).flatten(1)
    pixels = counts.flatten(1).sum(1).clamp(min=1)
    return (apart.square().sum(1) / pixels - shared * (apart.sum(1) / pixels).square()).mean()
