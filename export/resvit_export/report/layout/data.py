"""What the report is made of: what the finished stages wrote, as the dataclasses that wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from resvit_calibrate.ranges.ranges import Ranges
    from resvit_engines.audit.record import AuditRecord, SkippedAudit
    from resvit_engines.builder.device_plan import DevicePlan
    from resvit_engines.builder.engine_report import EngineReport
    from resvit_engines.bundle.manifest import Manifest
    from resvit_engines.targets.speed_verdict import SpeedVerdict
    from resvit_engines.targets.table import Target
    from resvit_export.records.costs import CostsRecord
    from resvit_export.records.device import DeviceResult
    from resvit_export.records.prune import PruneRecord
    from resvit_export.records.search import SearchRecord
    from resvit_export.records.verdict import VerdictRecord
    from resvit_export.to_onnx.report import ExportReport
    from resvit_quantize.fold.program import FoldReport
    from resvit_quantize.pruning.distill.options import DistillReport
    from resvit_quantize.qdq.report import QuantizeReport
    from resvit_quantize.recovery.options import RecoverReport


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
    """The records of every stage of a run; ``None`` where a stage has not run.

    Shares (top-1, agreement, macs_share) are 0..1; drops and intervals are in
    the unit that the verdict names; sizes are bytes.
    """

    name: str
    """What the page is called: the model's name, or the run folder's."""
    prune: PruneRecord | None = None
    retrain: DistillReport | None = None
    recover: RecoverReport | None = None
    fold: FoldReport | None = None
    export: ExportReport | None = None
    ranges: Ranges | None = None
    quantize: QuantizeReport | None = None
    verdict: VerdictRecord | None = None
    least_sqnr_db: float | None = None
    """What the SQNR must keep where there is no metric, in dB."""
    costs: CostsRecord | None = None
    speed: SpeedVerdict | None = None
    """What the costs are worth."""
    search: SearchRecord | None = None
    engine: EngineReport | None = None
    plan: DevicePlan | None = None
    audit: AuditRecord | SkippedAudit | None = None
    device: DeviceResult | None = None
    bundle: Manifest | None = None
    next_commands: Sequence[tuple[str, str]] = ()
    """Command lines that apply now, each with what it is for."""
    preprocess: Sequence[tuple[str, str]] = ()
    """What happens to an image before the network reads it, step by step."""
    recipe: str | None = None
    targets: Sequence[Target] = ()
    sizes: Mapping[str, int] | None = None
    """Bytes by what they are; without it the sizes that the stages wrote are used."""
    versions: Mapping[str, str] | None = None
    digests: Mapping[str, str] | None = None
    images: Sequence[ChangedImage] = ()
