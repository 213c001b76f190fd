"""What may differ between two pipelines of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from resvit_export.stages.decide.search import Searched


@dataclass(frozen=True)
class Variant:
    """What of a run may differ from its recipe: whether weights are trained, and precisions that were searched for.

    ``confidence`` is the gate's, higher for what the search looks at after the plain recipe.
    """

    recovers: bool
    confidence: float
    precisions: Mapping[str, str] = field(default_factory=dict)
    search: Searched | None = None
