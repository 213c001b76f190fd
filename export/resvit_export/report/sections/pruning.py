"""The report's part on pruning: the widths that were chosen, and how much each group bears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from resvit_export.report.layout import wording

if TYPE_CHECKING:
    from resvit_export.records.prune import GroupCurve, PruneRecord
    from resvit_quantize.pruning.distill.options import DistillReport

WIDTH, HEIGHT = 240, 72
"""Of a curve's box."""


@dataclass(frozen=True)
class WidthRow:
    """A group's width before and after; ``whole`` and ``part`` are % of the widest group's channels."""

    group: str
    kind: str
    text: str
    whole: float
    part: float
    lost: str


@dataclass(frozen=True)
class Curve:
    """Answers kept against the share of units kept; ``path`` runs in a box of 240 by 72, both axes from 0 to 1."""

    group: str
    path: str
    points: tuple[tuple[float, float], ...]
    alt: str


@dataclass(frozen=True)
class Pruning:
    """What stands in the section."""

    sentences: tuple[str, ...]
    rows: tuple[WidthRow, ...]
    unchanged: int
    curves: tuple[Curve, ...]
    images: int
    left: tuple[tuple[str, str], ...]


def pruning_from_run(prune: PruneRecord, retrain: DistillReport | None) -> Pruning:
    """Lay out what was pruned and, where there was any, the training behind it."""
    chosen = prune.widths
    widths, curves = (chosen.groups, chosen.curves) if chosen else ((), ())
    widest = max((item.before * item.channels for item in widths), default=1)
    changed = [item for item in widths if item.before != item.after]
    ordered = sorted(curves, key=lambda curve: min(kept for _, kept in curve.points))
    return Pruning(
        tuple(_sentences(prune, retrain)),
        tuple(
            WidthRow(
                item.group,
                item.kind.value,
                f"{item.before} → {item.after}",
                round(100 * item.before * item.channels / widest, 2),
                round(100 * item.after * item.channels / widest, 2),
                wording.percent(item.importance_lost, 1),
            )
            for item in changed
        ),
        len(widths) - len(changed),
        tuple(_curve(curve) for curve in ordered),
        ordered[0].images if ordered else 0,
        tuple(chosen.left_alone.items()) if chosen else (),
    )


def _sentences(prune: PruneRecord, retrain: DistillReport | None) -> list[str]:
    found = []
    if prune.widths:
        found.append(f"{prune.widths.summary.capitalize()}, chosen by {prune.importance.value} importance.")
    if prune.sparsity:
        found.append(
            f"2:4 sparsity in {wording.plural(len(prune.sparsity.sparse), 'layer')}, "
            f"{wording.percent(prune.sparsity.share, 1)} of the weights of linear and convolutional layers."
        )
    if retrain is None:
        found.append("Nothing was trained behind it.")
    else:
        before, after, images = retrain.before, retrain.after, wording.plural(retrain.images, "image")
        if after.agreement is not None:
            found.append(
                f"Training on {images} took the agreement with the unpruned network from "
                f"{wording.percent(before.agreement, 2)} to {wording.percent(after.agreement, 2)} "
                f"on {wording.plural(retrain.held_out, 'held-out image')}."
            )
        else:
            found.append(
                f"Training on {images} took the loss from {before.loss:.3g} to {after.loss:.3g}, and the error to "
                f"signal from {before.nsr:.3g} to {after.nsr:.3g}, "
                f"on {wording.plural(retrain.held_out, 'held-out image')}."
            )
        found.append(f"The loss is of {retrain.objective}.")
    return [*found, *prune.notes]


def _curve(curve: GroupCurve) -> Curve:
    points = sorted(curve.points)
    drawn = tuple((round(x * WIDTH, 1), round((1.0 - y) * HEIGHT, 1)) for x, y in points)
    path = "M" + "L".join(f"{x} {y}" for x, y in drawn)
    told = ", ".join(f"{wording.percent(y, 1)} at {wording.percent(x, 0)} kept" for x, y in reversed(points))
    return Curve(curve.group, path, drawn, f"{curve.group}: {told}")
