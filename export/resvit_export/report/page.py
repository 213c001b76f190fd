"""Lay out the report: one template, its style inside, nothing fetched and nothing run by the browser."""

from __future__ import annotations

from pathlib import Path

from resvit_engines.files import write_atomic
from resvit_export.report.layout import pictures
from resvit_export.report.layout.data import ReportData
from resvit_export.report.layout.template import environment
from resvit_export.report.sections import accuracy, audit, device, network, pruning, ranges

_STAGES = ("fold", "export", "calibrate", "quantize", "validate", "compile", "audit", "bundle")


def html_from_run(data: ReportData) -> str:
    """Render the page; the same data gives the same text. Stages that have not run are left out and named.

    Raises ``ResvitError`` if Jinja2 is not installed.
    """
    page = environment().get_template("page.html.j2")
    drawn = ranges.pictures_from_ranges(data.ranges, data.quantize) if data.ranges else []
    return page.render(
        name=data.name,
        hero=accuracy.hero_from_run(data),
        stages=_stages(data),
        precision=(data.quantize.precision if data.quantize else "quantised").upper(),
        accuracy=accuracy.accuracy_from_verdict(data.verdict) if data.verdict else None,
        pruning=pruning.pruning_from_run(data.prune, data.retrain) if data.prune else None,
        curve_box=(pruning.WIDTH, pruning.HEIGHT),
        groups=network.groups_from_quantize(data.quantize) if data.quantize else [],
        kept=network.kept_from_quantize(data.quantize) if data.quantize else [],
        held_back=network.held_back_from_quantize(data.quantize) if data.quantize else None,
        sizes=network.sizes_from_run(data),
        facts=network.facts_from_run(data),
        folds=network.folds_from_run(data),
        ranges=drawn[: ranges.SHOWN],
        more_ranges=drawn[ranges.SHOWN :],
        clips_known=any(picture.clip_at is not None for picture in drawn),
        range_box=(pictures.WIDTH, pictures.HEIGHT),
        range_images=data.ranges.images if data.ranges else None,
        costs=network.costs_from_run(data),
        changed=accuracy.changed_from_run(data),
        changed_total=data.verdict.changed_total if data.verdict else 0,
        engine_warnings=data.engine.warnings if data.engine else (),
        engine=device.engine_facts(data.engine) if data.engine else [],
        kernel_counts=device.kernel_counts(data.engine) if data.engine else [],
        kernels=device.kernels_from_engine(data.engine) if data.engine else [],
        fusion=audit.fusion_from_audit(data.audit) if data.audit else None,
        there=device.facts_from_device(data.device) if data.device else None,
        rehearsal=bool(data.device and data.device.job.rehearsal),
        plan=data.plan,
        commands=device.commands_from_plan(data.plan) if data.plan else [],
        plan_settings=device.plan_settings(data.plan) if data.plan else [],
        targets=device.target_rows(data),
        next_commands=[(why, device.words_of(command)) for command, why in data.next_commands],
        preprocess=[(step[:1].upper() + step[1:], what) for step, what in data.preprocess],
        recipe=data.recipe,
        versions=list((data.versions or {}).items()),
        digests=device.digests_from_run(data),
    )


def write_report(path: Path, data: ReportData) -> None:
    """Write the page as UTF-8, whole or not at all."""
    write_atomic(path, html_from_run(data).encode())


def _stages(data: ReportData) -> list[tuple[str, bool]]:
    done = {
        "fold": data.fold,
        "export": data.export,
        "calibrate": data.ranges,
        "quantize": data.quantize,
        "validate": data.verdict,
        "compile": data.engine or data.plan,
        "audit": data.audit,
        "bundle": data.bundle,
    }
    first = [("prune", True)] if data.prune is not None else []
    first += [("retrain", True)] if data.retrain is not None else []
    return first + [(stage, done[stage] is not None) for stage in _STAGES]
