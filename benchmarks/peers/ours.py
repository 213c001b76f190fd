"""This project's quantiser, through the calls that the pipeline makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peers.methods import Job, Work

if TYPE_CHECKING:
    from resvit_quantize.settings import QuantizeSettings


def work(job: Job, settings: Mapping[str, Any]) -> Work:
    """Calibrate and quantise."""
    from resvit_calibrate.images.held_back import held_apart
    from resvit_calibrate.ranges.collect import collect_statistics
    from resvit_calibrate.ranges.ranges import ranges_from
    from resvit_quantize.check.choose import held_back_of
    from resvit_quantize.quantize import quantize_model

    without = tuple(settings.get("without", ()))
    chosen = quantize_settings(job.precision, str(settings["effort"]), job.bits, without)

    def run() -> None:
        apart = held_apart(job.calibration)
        statistics = collect_statistics(job.model, apart.ranges.batches(job.batch))
        quantize_model(
            job.model,
            ranges_from(statistics, apart.ranges.digest),
            chosen,
            job.out,
            statistics=statistics,
            images=lambda count: job.calibration.first(count, job.batch),
            held_back=held_back_of(apart, job.batch),
        )

    return Work(run)


def quantize_settings(precision: str, effort: str, bits: int, without: tuple[str, ...] = ()) -> QuantizeSettings:
    """The settings of one row."""
    from resvit_engines.targets.table import Precision
    from resvit_quantize.settings import Effort, Methods, QuantizeSettings

    methods = Methods(**dict.fromkeys(without, False))
    return QuantizeSettings(Precision(precision), effort=Effort(effort), bits=bits, methods=methods)
