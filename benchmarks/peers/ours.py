"""This project's quantiser, through the calls that the pipeline makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from peers.methods import Job, Work
from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ResvitError


def work(job: Job, settings: Mapping[str, Any]) -> Work:
    """Calibrate and quantise."""
    from resvit_calibrate.ranges.collect import collect_statistics
    from resvit_calibrate.ranges.ranges import ranges_from
    from resvit_quantize.quantize import quantize_model

    without = tuple(settings.get("without", ()))
    chosen = quantize_settings(job.precision, str(settings["effort"]), job.bits, without)

    def first(count: int) -> Iterator[Batch]:
        return job.calibration.first(count, job.batch)

    def run() -> None:
        statistics = collect_statistics(job.model, job.calibration.batches(job.batch))
        ranges = ranges_from(statistics, job.calibration.digest)
        quantize_model(job.model, ranges, chosen, job.out, statistics=statistics, images=first)

    return Work(run)


def quantize_settings(precision: str, effort: str, bits: int, without: tuple[str, ...] = ()) -> Any:
    """``QuantizeSettings`` for one row; raises ``ResvitError`` where this version has no such setting."""
    from resvit_engines.targets.table import Precision
    from resvit_quantize import settings
    from resvit_quantize.settings import QuantizeSettings

    known = {field.name for field in dataclasses.fields(QuantizeSettings)}
    extra: dict[str, Any] = {}
    for name, value, usual in (("effort", effort, "fast"), ("bits", bits, 8)):
        if name in known:
            extra[name] = value
        elif value != usual:
            raise ResvitError(f"This version has no setting {name} = {value}.", "Leave the row out with --only.")
    if without:
        if "methods" not in known:
            raise ResvitError("This version cannot leave a method out.", "Leave the row out with --only.")
        extra["methods"] = settings.Methods(**dict.fromkeys(without, False))
    return QuantizeSettings(Precision(precision), **extra)


def has_native_bits() -> bool:
    """Whether this version quantises to fewer than 8 bits itself."""
    from resvit_quantize.settings import QuantizeSettings

    return any(field.name == "bits" for field in dataclasses.fields(QuantizeSettings))
