"""The predicted time of a quantised network and of the same one in FP16, as ``costs.json`` keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_engines.records import Record
from resvit_engines.targets.costs import Prediction
from resvit_quantize.search.search import Worth


@dataclass(frozen=True)
class CostsRecord:
    """What ``costs.json`` holds: both predictions, layer by layer, and what the difference is worth."""

    worth: Worth
    fp16: Prediction
    chosen: Prediction

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.worth.to_json(), "fp16": self.fp16.to_json(), "chosen": self.chosen.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CostsRecord:
        """Read what ``to_json`` wrote."""
        fp16, chosen = (Record(document[key], "costs.json", key) for key in ("fp16", "chosen"))
        return cls(Worth.from_json(document), Prediction.from_json(fp16), Prediction.from_json(chosen))
