"""Activation ranges as small pictures, those that clip most first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resvit_export.recipe.choices import Quantizer
from resvit_export.report.layout import wording
from resvit_export.report.layout.pictures import WIDTH, share_beyond, steps_from_histogram

if TYPE_CHECKING:
    from resvit_calibrate.ranges.ranges import Ranges, TensorRange
    from resvit_quantize.qdq.report import QuantizeReport

SHOWN = 24
"""Pictures shown at once; the others open on demand."""


@dataclass(frozen=True)
class RangePicture:
    """One tensor's histogram of absolute values; ``clip_at`` in SVG units of ``pictures.WIDTH``."""

    name: str
    path: str
    clip_at: float | None
    clip: str
    largest: str
    beyond: str
    views: str
    alt: str


def pictures_from_ranges(ranges: Ranges, quantize: QuantizeReport | None) -> list[RangePicture]:
    """Draw every tensor that has a histogram, with the clip that the chosen estimator gave.

    Ordered by the share of values clipped, then by how far beyond the clip the largest value lies. Tensors that are
    views of one another (reshaped, transposed) share one picture.
    """
    together: dict[tuple[object, ...], list[_Range]] = {}
    for name, tensor in ranges.tensors.items():
        counts, bin_width = tensor.histogram, tensor.bin_width
        if counts and bin_width > 0:
            largest = max(abs(tensor.minimum), abs(tensor.maximum))
            drawn = _Range(name, counts, bin_width, largest, _chosen_clip(name, tensor, quantize))
            together.setdefault((counts, bin_width, largest), []).append(drawn)
    shown = []
    for views in together.values():
        first, *others = sorted(views, key=lambda view: _in_counting_order(view.name))
        shown.append((first, len(others)))
    shown.sort(key=lambda item: (-item[0].beyond, item[0].held, _in_counting_order(item[0].name)))
    return [_picture(drawn, views) for drawn, views in shown]


@dataclass(frozen=True)
class _Range:
    name: str
    counts: tuple[int, ...]
    bin_width: float
    largest: float
    clip: float | None

    @property
    def clips(self) -> bool:
        return self.clip is not None and self.clip < self.largest * (1 - 1e-6)

    @property
    def beyond(self) -> float:
        return share_beyond(self.counts, self.bin_width, self.clip) if self.clip is not None and self.clips else 0.0

    @property
    def span(self) -> float:
        """What the picture's whole width stands for."""
        return self.largest or self.bin_width * len(self.counts)

    @property
    def held(self) -> float:
        """The clip as a part of the span."""
        return 1.0 if self.clip is None else self.clip / self.span


def _in_counting_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _chosen_clip(name: str, tensor: TensorRange, quantize: QuantizeReport | None) -> float | None:
    if quantize is None or quantize.quantizer == Quantizer.MODELOPT.value:  # which clips by ranges of its own
        return None
    if name in quantize.clips:
        return quantize.clips[name]
    if any(item.tensor == name for item in quantize.smoothed):  # in other units than the histogram
        return None
    return tensor.amax.get(quantize.precision, {}).get(quantize.estimator) or None


def _picture(drawn: _Range, views: int) -> RangePicture:
    clip, largest = wording.significant(drawn.clip), wording.significant(drawn.largest)
    share = wording.small_percent(drawn.beyond) if drawn.beyond > 0 else "< 0.001%"
    text = f"Histogram of {drawn.name}: largest value {largest}"
    if drawn.clip is not None:
        text += f", clipped at {clip}" if drawn.clips else ", not clipped"
    return RangePicture(
        name=drawn.name,
        path=steps_from_histogram(drawn.counts, drawn.bin_width, drawn.span),
        clip_at=None if drawn.clip is None else round(min(WIDTH * drawn.held, WIDTH), 1),
        clip=clip,
        largest=largest,
        beyond=f"{share} clipped" if drawn.clips else "not clipped",
        views=wording.plural(views, "view") if views else "",
        alt=text,
    )
