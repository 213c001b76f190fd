"""What may differ between two pipelines of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from resvit_export.run import Run
from resvit_export.stages.decide.search import Searched
from resvit_export.stages.decide.tune import Tuned

ORDER = (
    *("pruned", "retrained", "folded", "exported", "recovered", "calibrated", "quantized", "fused"),
    *("validated", "predicted"),
)
"""The stages up to the gate and its prediction."""


@dataclass(frozen=True)
class Variant:
    """What of a run may differ from its recipe: whether weights are trained, and precisions that were searched for
    or measured.

    ``confidence`` is the gate's, higher for what the search looks at after the plain recipe.
    """

    recovers: bool
    confidence: float
    precisions: Mapping[str, str] = field(default_factory=dict)
    search: Searched | None = None
    tuned: Tuned | None = None

    def order(self, run: Run) -> list[str]:
        """The stages of ``ORDER`` that a run has."""
        recipe = run.recipe
        left_out = {"pruned": not recipe.prunes, "retrained": not recipe.retrains, "fused": not run.fuses}
        left_out |= {
            "folded": run.network.from_onnx,
            "recovered": not self.recovers,
            "predicted": run.target is None or run.target.on_cpu,
        }
        return [name for name in ORDER if not left_out.get(name)]
