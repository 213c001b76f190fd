"""The report's part on pruning: the widths that were chosen, and how much each group bears."""

from __future__ import annotations

from dataclasses import dataclass

from resvit_export.report.layout import wording
from resvit_export.report.layout.data import Json
from resvit_export.stages.prune import prune_summary

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


def pruning_from_run(prune: Json, retrain: Json | None) -> Pruning:
    """Lay out ``prune.json`` and, where there was training behind it, ``retrain.json``."""
    widths = prune.get("widths", [])
    widest = max((item["before"] * item["channels"] for item in widths), default=1)
    changed = [item for item in widths if item["before"] != item["after"]]
    curves = sorted(prune.get("curves", []), key=lambda curve: min(kept for _, kept in curve["points"]))
    return Pruning(
        tuple(_sentences(prune, retrain)),
        tuple(
            WidthRow(
                item["group"],
                item["kind"],
                f"{item['before']} → {item['after']}",
                round(100 * item["before"] * item["channels"] / widest, 2),
                round(100 * item["after"] * item["channels"] / widest, 2),
                wording.percent(item["importance_lost"], 1),
            )
            for item in changed
        ),
        len(widths) - len(changed),
        tuple(_curve(curve) for curve in curves),
        curves[0]["images"] if curves else 0,
        tuple(dict(prune.get("left_alone", {})).items()),
    )


def _sentences(prune: Json, retrain: Json | None) -> list[str]:
    found = []
    if "widths" in prune:
        found.append(f"{prune_summary(prune).capitalize()}, chosen by {prune['importance']} importance.")
    if "sparsity" in prune:
        sparse = prune["sparsity"]
        found.append(
            f"2:4 sparsity in {wording.plural(len(sparse['sparse']), 'layer')}, {wording.percent(sparse['share'], 1)} "
            f"of the weights of linear and convolutional layers."
        )
    if retrain is None:
        found.append("Nothing was trained behind it.")
    else:
        before, after = retrain["before"], retrain["after"]
        if after["agreement"] is not None:
            found.append(
                f"Training on {wording.plural(retrain['images'], 'image')} took the agreement with the unpruned "
                f"network from {wording.percent(before['agreement'], 2)} to {wording.percent(after['agreement'], 2)} "
                f"on {wording.plural(retrain['held_out'], 'held-out image')}."
            )
        else:
            found.append(
                f"Training on {wording.plural(retrain['images'], 'image')} took the error to signal from "
                f"{before['nsr']:.3g} to {after['nsr']:.3g}."
            )
    return found + list(prune.get("notes", []))


def _curve(curve: Json) -> Curve:
    points = sorted((float(x), float(y)) for x, y in curve["points"])
    drawn = tuple((round(x * WIDTH, 1), round((1.0 - y) * HEIGHT, 1)) for x, y in points)
    path = "M" + "L".join(f"{x} {y}" for x, y in drawn)
    told = ", ".join(f"{wording.percent(y, 1)} at {wording.percent(x, 0)} kept" for x, y in reversed(points))
    return Curve(curve["group"], path, drawn, f"{curve['group']}: {told}")
