"""The engine or the plan to build it, the targets, versions and digests, ready to be laid out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from resvit_engines.bench.bench import BenchReport
from resvit_engines.builder.device_plan import DevicePlan
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import TITLES
from resvit_engines.run.golden import GoldenReport
from resvit_export.records.device import DeviceResult
from resvit_export.report.layout import wording
from resvit_export.report.layout.data import ReportData


@dataclass(frozen=True)
class Kernel:
    """One kernel of the engine."""

    name: str
    kind: str
    types: str
    layers: str


def engine_facts(engine: EngineReport) -> list[tuple[str, str]]:
    """List what was built, by what, for what."""
    seconds, peak = engine.seconds, engine.peak_mib
    known = [kernel.bytes_moved for kernel in engine.kernels]
    moved = [size for size in known if size is not None]
    return [
        ("Target", engine.target),
        *([("Compute capability", f"SM {engine.sm}")] if engine.sm else []),
        ("Builder", f"{TITLES[engine.builder]} {engine.builder_version}".strip()),
        ("Size", wording.size(engine.bytes)),
        ("Build time", wording.NOTHING if seconds is None else f"{wording.number(seconds, 1)} s"),
        ("Peak memory of the build", wording.NOTHING if peak is None else f"{wording.number(peak, 0)} MiB"),
        ("Kernels", f"{len(known):,}"),
        ("Activations moved", wording.size(sum(moved) if moved and len(moved) == len(known) else None)),
    ]


def kernels_from_engine(engine: EngineReport) -> list[Kernel]:
    """List the kernels in the order in which they run."""
    return [
        Kernel(
            name=kernel.name,
            kind=kernel.type,
            types=_types(kernel.inputs, kernel.outputs),
            layers=", ".join(kernel.layers).replace(",", ", ").replace(",  ", ", "),
        )
        for kernel in engine.kernels
    ]


def kernel_counts(engine: EngineReport) -> list[tuple[str, str, int]]:
    """Count the kernels by type and by what they read and write, the most frequent first."""
    counts = Counter((kernel.kind, kernel.types) for kernel in kernels_from_engine(engine))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(kind, types, count) for (kind, types), count in ordered]


def target_rows(data: ReportData) -> list[tuple[str, str, str, str, str]]:
    """List the targets: title, SM, JetPack, TensorRT, precisions."""
    return [
        (
            target.title,
            str(target.sm or wording.NOTHING),
            target.jetpack or wording.NOTHING,
            target.tensorrt,
            ", ".join(sorted(precision.value.upper() for precision in target.precisions)),
        )
        for target in data.targets
    ]


def digests_from_run(data: ReportData) -> list[tuple[str, str]]:
    """List the digests given, the data's, and those of the bundle's files."""
    found = dict(data.digests or {})
    if data.verdict:
        found.setdefault("validation images", data.verdict.data_digest)
    if data.ranges:
        found.setdefault("calibration images", data.ranges.data_digest)
    for file in data.bundle.files if data.bundle else ():
        found.setdefault(f"bundle: {file.path}", file.sha256)
    return list(found.items())


def plan_settings(plan: DevicePlan) -> list[tuple[str, str]]:
    """List the plan's settings by name."""
    return [
        (key.replace("_mib", " (MiB)").replace("_", " "), wording.plain(value))
        for key, value in sorted(plan.all_settings.items())
    ]


def commands_from_plan(plan: DevicePlan) -> list[list[tuple[str, str]]]:
    """Split each command into words and the space behind each: a line breaks between words, not in an option."""
    return [words_of(command) for command in plan.commands]


def words_of(command: str) -> list[tuple[str, str]]:
    """The words of a command, each with the space behind it."""
    return re.findall(r"(\S+)(\s*)", command.strip())


def _types(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    sides = [", ".join(dict.fromkeys(name for name in side if name)) for side in (inputs, outputs)]
    return " \N{RIGHTWARDS ARROW} ".join(side for side in sides if side)


def facts_from_device(device: DeviceResult) -> list[tuple[str, str]]:
    """Lay out what came back: the device, its engine, the verdict on its answers, and its times."""
    machine, engine, bench, golden = device.job.machine, device.job.engine, device.job.bench, device.job.golden
    versions = (("JetPack", machine.jetpack), ("TensorRT", machine.tensorrt))
    software = [f"{name} {version}" for name, version in versions if version]
    built = f"{TITLES[engine.builder]} {engine.builder_version} in {wording.number(engine.seconds, 1)} s"
    rows = [
        ("Device", (machine.gpu if engine.sm else machine.processor) or machine.host),
        ("Software", ", ".join(software) or wording.NOTHING),
        ("Power mode, clocks", ", ".join(said or "not reported" for said in (machine.power_mode, machine.clocks))),
        ("Built by", built),
        ("Engine", wording.size(engine.bytes)),
    ]
    if isinstance(golden, GoldenReport) and golden.sqnr_db is not None:
        rows.append(("Golden outputs", f"{wording.number(golden.sqnr_db, 1)} dB from those that were validated"))
    if device.verdict:
        rows.append((f"Verdict on {device.images:,} images", device.verdict.reason))
    label = None
    if isinstance(bench, BenchReport):
        label = bench.label
        median, most = (wording.number(bench.latency_ms[share], 2) for share in ("p50", "p99"))
        rows.append((f"Time at batch {bench.batch}", f"median {median} ms, 99% below {most} ms"))
    return [*rows, ("Computed by", device.runner or label or wording.NOTHING)]
