"""What pruning took out of a network, as ``prune.json`` keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_quantize.pruning.choose.budget import Cost
from resvit_quantize.pruning.choose.choice import Width
from resvit_quantize.pruning.choose.importance import Importance
from resvit_quantize.pruning.groups import Kind
from resvit_quantize.pruning.sparsity.report import SparseMethod


@dataclass(frozen=True)
class GroupWidth(Width):
    """What became of one group, whose units are of ``channels`` channels each."""

    channels: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "kind": self.kind.value}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GroupWidth:
        """Read what ``to_json`` wrote."""
        return cls(**{**document, "kind": Kind(document["kind"])})


@dataclass(frozen=True)
class GroupCurve:
    """How much a group bears alone: ``points`` are the share of units kept and of answers that stay, each 0..1."""

    group: str
    kind: Kind
    points: tuple[tuple[float, float], ...]
    images: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        points = [list(point) for point in self.points]
        return {"group": self.group, "kind": self.kind.value, "points": points, "images": self.images}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GroupCurve:
        """Read what ``to_json`` wrote."""
        points = tuple((kept, alike) for kept, alike in document["points"])
        return cls(document["group"], Kind(document["kind"]), points, document["images"])


@dataclass(frozen=True)
class WidthsRecord:
    """The widths that were chosen for a budget, which left ``share`` of its cost; ``left_alone`` gives reasons by path.

    ``groups`` names every group that can be pruned, also those that stay whole. Without images there are no curves.
    """

    share: float
    before: Cost
    after: Cost
    groups: tuple[GroupWidth, ...]
    curves: tuple[GroupCurve, ...]
    left_alone: Mapping[str, str]

    @property
    def summary(self) -> str:
        """What remains, in a sentence."""
        before, after = self.before, self.after
        parts = [
            f"{after.macs / before.macs:.1%} of the multiply-accumulates",
            f"{after.params / before.params:.1%} of the weights",
        ]
        if before.latency_us and after.latency_us is not None:
            parts.append(f"{after.latency_us / before.latency_us:.1%} of the predicted latency")
        return f"pruned to {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; these stand in the record beside its other fields."""
        return {
            "share": self.share,
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
            "widths": [group.to_json() for group in self.groups],
            "curves": [curve.to_json() for curve in self.curves],
            "left_alone": dict(self.left_alone),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> WidthsRecord:
        """Read what ``to_json`` wrote."""
        return cls(
            document["share"],
            Cost(**document["before"]),
            Cost(**document["after"]),
            tuple(GroupWidth.from_json(item) for item in document["widths"]),
            tuple(GroupCurve.from_json(item) for item in document["curves"]),
            document["left_alone"],
        )


@dataclass(frozen=True)
class SparsityRecord:
    """Which parameters became 2:4 sparse, the share of weights in them, and by layer why others did not."""

    method: SparseMethod
    sparse: tuple[str, ...]
    share: float
    left: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"method": self.method.value, "sparse": list(self.sparse), "share": self.share, "left": dict(self.left)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SparsityRecord:
        """Read what ``to_json`` wrote."""
        method, sparse = SparseMethod(document["method"]), tuple(document["sparse"])
        return cls(method, sparse, document["share"], document["left"])


@dataclass(frozen=True)
class PruneRecord:
    """What ``prune.json`` holds: the widths for a budget, the sparse weights, or both."""

    importance: Importance
    notes: tuple[str, ...]
    widths: WidthsRecord | None
    sparsity: SparsityRecord | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "importance": self.importance.value,
            "notes": list(self.notes),
            **(self.widths.to_json() if self.widths else {}),
            **({"sparsity": self.sparsity.to_json()} if self.sparsity else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PruneRecord:
        """Read what ``to_json`` wrote."""
        return cls(
            Importance(document["importance"]),
            tuple(document["notes"]),
            WidthsRecord.from_json(document) if "widths" in document else None,
            SparsityRecord.from_json(document["sparsity"]) if "sparsity" in document else None,
        )
