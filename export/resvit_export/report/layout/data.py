"""What the report is made of: the stages' own JSON, as loaded from the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Json = Mapping[str, Any]


@dataclass(frozen=True)
class ChangedImage:
    """An image whose answer differs between the float and the quantised network."""

    pixels: npt.NDArray[np.uint8]
    """[H, W, 1 or 3], or [H, W] for grey, as it came from the data set."""
    label: int | None
    float_class: int | str
    """A class, or what was answered in words."""
    quantized_class: int | str
    names: Sequence[str] | None = None
    """Class names by index; without them the indices are shown."""
    outcome: str | None = None
    """``lost``, ``gained`` or ``neutral``, where it does not follow from the classes."""
    before: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """What ``Task.drawing`` gave of the float network, and ``after`` of the quantised one."""
    after: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """The JSON of every stage of a run; ``None`` where a stage has not run.

    The keys are those that the stages write (prune.json, retrain.json, fold.json, export.json, ranges.json,
    quantize.json, verdict.json, costs.json, search.json, engine.json, plan.json, audit.json, device.json and
    the bundle's manifest).
    Shares (top1, agreement, macs_share) are 0..1; drops and intervals are in
    the unit that the verdict names; sizes are bytes.
    """

    name: str
    """What the page is called: the model's name, or the run folder's."""
    prune: Json | None = None
    retrain: Json | None = None
    fold: Json | None = None
    export: Json | None = None
    ranges: Json | None = None
    quantize: Json | None = None
    verdict: Json | None = None
    costs: Json | None = None
    search: Json | None = None
    engine: Json | None = None
    plan: Json | None = None
    audit: Json | None = None
    device: Json | None = None
    bundle: Json | None = None
    recipe: str | None = None
    targets: Sequence[Json] = ()
    sizes: Mapping[str, int] | None = None
    """Bytes by what they are; without it the sizes that the stages wrote are used."""
    versions: Mapping[str, str] | None = None
    digests: Mapping[str, str] | None = None
    images: Sequence[ChangedImage] = ()
