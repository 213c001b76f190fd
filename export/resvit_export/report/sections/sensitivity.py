"""The chart of a sensitivity measurement: one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.files import write_atomic
from resvit_export.report.layout import wording
from resvit_export.report.layout.template import environment

if TYPE_CHECKING:
    from resvit_quantize.sensitivity.sensitivity import LayerDamage, Sensitivity


@dataclass(frozen=True)
class DamageBar:
    """One layer or group: ``width`` is its share in % of the largest one's."""

    name: str
    detail: str
    share: str
    width: float
    sqnr: tuple[str, ...] = ()
    kept: bool = False
    """Left in FP16 by the rules or the recipe: the bar shows what quantising it would add."""


def write_sensitivity_page(
    path: Path, name: str, sensitivity: Sensitivity, snippets: Sequence[tuple[str, str]]
) -> None:
    """Write the page as UTF-8, whole or not at all. ``snippets`` are titles and lines for the recipe."""
    precision = sensitivity.precision
    kinds = [precision, *(kind for kind in sensitivity.together if kind != precision)]
    page = environment().get_template("sensitivity.html.j2")
    text = page.render(
        name=name,
        precision=precision.upper(),
        images=wording.plural(sensitivity.images, "image"),
        method=sensitivity.method.value,
        of_loss=sensitivity.measure == "loss",
        kinds=[kind.upper() for kind in kinds],
        together=[
            (kind.upper(), wording.decibels(sensitivity.together[kind]), wording.decibels(sensitivity.total(kind)))
            for kind in kinds
        ],
        coverage=wording.percent(sensitivity.coverage(precision), 1),
        groups=_sums(sensitivity, "group"),
        blocks=_sums(sensitivity, "block"),
        layers=_layers(sensitivity, kinds),
        snippets=list(snippets),
    )
    write_atomic(path, text.encode())


def _sums(sensitivity: Sensitivity, key: str) -> list[DamageBar]:
    shares = sensitivity.shares_by(key, sensitivity.precision)
    largest = max(shares.values(), default=0.0) or 1.0
    return [
        DamageBar(name, "", wording.percent(share, 1), round(100 * share / largest, 2))
        for name, share in shares.items()
    ]


def _layers(sensitivity: Sensitivity, kinds: Sequence[str]) -> list[DamageBar]:
    precision = sensitivity.precision
    ranked = sensitivity.ranked(precision)
    largest = max((layer.damage[precision] for layer in ranked), default=0.0) or 1.0

    def bar(layer: LayerDamage) -> DamageBar:
        kept = precision not in layer.quantized
        return DamageBar(
            layer.node,
            f"{layer.group}, {wording.operations(layer.macs)} multiply-accumulates",
            "in FP16" if kept else wording.percent(sensitivity.share(layer, precision), 1),
            round(100 * layer.damage[precision] / largest, 2),
            tuple(wording.decibels(layer.damage.get(kind)) for kind in kinds),
            kept,
        )

    return [bar(layer) for layer in ranked]
