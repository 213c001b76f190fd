"""The predicted time of a quantised network and of the same one in FP16, as ``costs.json`` keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_engines.records import Record
from resvit_engines.targets.costs import Prediction
from resvit_engines.targets.speed_verdict import SpeedVerdict, judge_speed
from resvit_engines.targets.table import Target


@dataclass(frozen=True)
class CostsRecord:
    """What ``costs.json`` holds: both predictions, layer by layer."""

    fp16: Prediction
    chosen: Prediction

    def speed(self, target: Target) -> SpeedVerdict:
        """What the difference is worth on ``target``, which the predictions are for."""
        return judge_speed(self.fp16, self.chosen, target)

    def to_json(self, target: Target) -> dict[str, Any]:
        """Plain JSON values, with what the difference is worth on ``target``."""
        return {**self.speed(target).to_json(), "fp16": self.fp16.to_json(), "chosen": self.chosen.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CostsRecord:
        """Read the predictions that ``to_json`` wrote; more than that is passed over."""
        fp16, chosen = (Record(document[key], "costs.json", key) for key in ("fp16", "chosen"))
        return cls(Prediction.from_json(fp16), Prediction.from_json(chosen))
