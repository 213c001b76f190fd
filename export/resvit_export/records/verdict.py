"""The verdict as a run keeps it: what the gate said, the accuracy stage by stage, and the images that changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resvit_calibrate.gate.gate import Verdict, VerdictKind
from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.records import Record

if TYPE_CHECKING:
    from resvit_calibrate.data.overlap import Overlap
    from resvit_calibrate.gate.comparison import Comparison
    from resvit_quantize.sensitivity.own_noise import OwnNoise


@dataclass(frozen=True)
class ScoreRow:
    """One stage of the network against the original; ``top1`` is None for tasks other than classification.

    None stands for what is no finite number, and is an edge of the interval where there is none.
    """

    stage: str
    metric: str
    unit: str
    value: float | None
    values: Mapping[str, float | None]
    agreement: float | None
    agreement_of: str
    sqnr_db: float | None
    drop: float | None
    interval: tuple[float | None, float | None]
    top1: float | None = None

    @classmethod
    def of(cls, stage: str, comparison: Comparison) -> ScoreRow:
        """What is kept of a comparison."""
        return cls.from_json({"stage": stage, **comparison.to_json()})

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ScoreRow:
        """Read what ``to_json`` wrote; more than that is passed over."""
        names = [item.name for item in dataclasses.fields(cls) if item.name in document]
        kept = {name: document[name] for name in names}
        return cls(**{**kept, "interval": tuple(document["interval"])})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {**dataclasses.asdict(self), "interval": list(self.interval)}
        return plain if self.top1 is not None else {key: value for key, value in plain.items() if key != "top1"}


@dataclass(frozen=True)
class ChangedAnswer:
    """An image that the original (``before``) and the quantised network (``after``) answer differently.

    Both are class numbers, or words; ``outcome`` says which of them is better, where that can be told.
    """

    index: int
    label: int | None
    before: int | str
    after: int | str
    outcome: str | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ChangedAnswer:
        """Read what ``Task.changed`` lists."""
        return cls(
            int(document["index"]), document["label"], document["float"], document["quantized"], document.get("outcome")
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        outcome = {} if self.outcome is None else {"outcome": self.outcome}
        return {"index": self.index, "label": self.label, "float": self.before, "quantized": self.after, **outcome}


@dataclass(frozen=True)
class VerdictRecord:
    """What ``verdict.json`` holds. ``golden`` says which file holds which golden array; ``diagnostics`` are doubts."""

    verdict: Verdict
    task: str
    data: str
    data_digest: str
    runtime_note: str
    diagnostics: tuple[Mapping[str, Any], ...]
    golden: GoldenFiles
    class_names: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    changed_total: int
    changed: tuple[ChangedAnswer, ...]
    reading: Mapping[str, Any] | None = None
    """How a device reads the outputs: see ``Manifest.answers``."""
    blame: OwnNoise | None = None
    """Where the outputs have a low SQNR: whether the network or its quantisation is to blame."""
    overlap: Overlap | None = None
    """How many images calibration and validation share."""

    @property
    def kind(self) -> VerdictKind:
        """Accepted, rejected or undecided."""
        return self.verdict.kind

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        return self.verdict.reason

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.verdict.to_json(),
            "task": self.task,
            "data": self.data,
            "data_digest": self.data_digest,
            "runtime_note": self.runtime_note,
            "remarks": list(self.diagnostics),
            "golden": self.golden.to_json(),
            "class_names": list(self.class_names),
            "stages": [row.to_json() for row in self.rows],
            "changed_total": self.changed_total,
            "changed": [item.to_json() for item in self.changed],
            "reading": self.reading,
            "blame": None if self.blame is None else self.blame.to_json(),
            "overlap": None if self.overlap is None else self.overlap.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> VerdictRecord:
        """Read what ``to_json`` wrote."""
        return cls(
            verdict=Verdict.from_json(document),
            task=document["task"],
            data=document["data"],
            data_digest=document["data_digest"],
            runtime_note=document["runtime_note"],
            diagnostics=tuple(document["remarks"]),
            golden=GoldenFiles.from_json(Record(document["golden"], "verdict.json", "golden")),
            class_names=tuple(document["class_names"]),
            rows=tuple(ScoreRow.from_json(row) for row in document["stages"]),
            changed_total=document["changed_total"],
            changed=tuple(ChangedAnswer.from_json(item) for item in document["changed"]),
            reading=document.get("reading"),
            blame=_blame_from_json(document.get("blame")),
            overlap=_overlap_from_json(document.get("overlap")),
        )


def _blame_from_json(document: Mapping[str, Any] | None) -> OwnNoise | None:
    if document is None:
        return None
    from resvit_quantize.sensitivity.own_noise import OwnNoise

    return OwnNoise.from_json(document)


def _overlap_from_json(document: Mapping[str, Any] | None) -> Overlap | None:
    if document is None:
        return None
    from resvit_calibrate.data.overlap import Overlap

    return Overlap.from_json(document)
