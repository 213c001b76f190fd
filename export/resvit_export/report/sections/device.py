"""The engine or the plan to build it, the targets, versions and digests, ready to be laid out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_export.report.layout import wording
from resvit_export.report.layout.data import Json, ReportData


@dataclass(frozen=True)
class Kernel:
    """One kernel of the engine."""

    name: str
    kind: str
    types: str
    layers: str


def engine_facts(engine: Json) -> list[tuple[str, str]]:
    """List what was built, by what, for what."""
    seconds, peak = engine.get("seconds"), engine.get("peak_mib")
    kernels = engine.get("kernels") or []
    bytes_moved = [kernel.get("bytes") for kernel in kernels]
    moved = sum(bytes_moved) if bytes_moved and None not in bytes_moved else None
    builder = f"{wording.plain(engine.get('builder'))} {engine.get('builder_version') or ''}".strip()
    return [
        ("Target", wording.plain(engine.get("target"))),
        ("Compute capability", _capability(engine.get("sm"))),
        ("Builder", builder),
        ("Size", wording.size(engine.get("bytes"))),
        ("Build time", wording.NOTHING if seconds is None else f"{wording.number(seconds, 1)} s"),
        ("Peak memory of the build", wording.NOTHING if peak is None else f"{wording.number(peak, 0)} MiB"),
        ("Kernels", f"{len(kernels):,}"),
        ("Activations moved", wording.size(moved)),
    ]


def kernels_from_engine(engine: Json) -> list[Kernel]:
    """List the kernels in the order in which they run."""
    return [
        Kernel(
            name=str(kernel.get("name", "")),
            kind=str(kernel.get("type", "")),
            types=_types(kernel),
            layers=wording.plain(kernel.get("layers") or "").replace(",", ", ").replace(",  ", ", "),
        )
        for kernel in engine.get("kernels") or []
    ]


def kernel_counts(engine: Json) -> list[tuple[str, str, int]]:
    """Count the kernels by type and by what they read and write, the most frequent first."""
    counts = Counter((kernel.kind, kernel.types) for kernel in kernels_from_engine(engine))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(kind, types, count) for (kind, types), count in ordered]


def target_rows(data: ReportData) -> list[tuple[str, str, str, str, str]]:
    """List the targets: title, SM, JetPack, TensorRT, precisions."""
    return [
        (
            str(target.get("title") or target.get("name", "")),
            wording.plain(target.get("sm")),
            wording.plain(target.get("jetpack")),
            wording.plain(target.get("tensorrt")),
            ", ".join(sorted(str(item).upper() for item in target.get("precisions") or ())),
        )
        for target in data.targets
    ]


def digests_from_run(data: ReportData) -> list[tuple[str, str]]:
    """List the digests given, the data's, and those of the bundle's files."""
    found = dict(data.digests or {})
    if digest := (data.verdict or {}).get("data_digest"):
        found.setdefault("validation images", str(digest))
    if digest := (data.ranges or {}).get("data_digest"):
        found.setdefault("calibration images", str(digest))
    for name, entry in _bundle_files(data.bundle or {}):
        digest = entry.get("sha256") or entry.get("digest") if isinstance(entry, Mapping) else entry
        if digest:
            found.setdefault(f"bundle: {name}", str(digest))
    return list(found.items())


def plan_settings(plan: Json) -> list[tuple[str, str]]:
    """List the plan's settings."""
    settings: Json = plan.get("settings") or {}
    return [
        (str(key).replace("_mib", " (MiB)").replace("_", " "), wording.plain(value)) for key, value in settings.items()
    ]


def commands_from_plan(plan: Json) -> list[list[tuple[str, str]]]:
    """Split each command into words and the space behind each: a line breaks between words, not in an option."""
    return [re.findall(r"(\S+)(\s*)", str(command).strip()) for command in plan.get("commands") or []]


def _bundle_files(bundle: Json) -> list[tuple[str, Any]]:
    files = bundle.get("files") or {}
    if isinstance(files, Mapping):
        return [(str(name), entry) for name, entry in sorted(files.items())]
    return [(str(entry.get("name") or entry.get("path")), entry) for entry in files if isinstance(entry, Mapping)]


def _capability(sm: Any) -> str:
    return wording.NOTHING if sm is None else f"SM {wording.plain(sm)}"


def _types(kernel: Json) -> str:
    sides = [_unique(kernel.get(side)) for side in ("inputs", "outputs")]
    return " \N{RIGHTWARDS ARROW} ".join(side for side in sides if side)


def _unique(tensors: Any) -> str:
    if not isinstance(tensors, (list, tuple)):
        return "" if tensors is None else str(tensors)
    names = [
        str(tensor.get("dtype") or tensor.get("type") or "") if isinstance(tensor, Mapping) else str(tensor)
        for tensor in tensors
    ]
    return ", ".join(dict.fromkeys(name for name in names if name))


def facts_from_device(device: Json) -> list[tuple[str, str]]:
    """Lay out ``device.json``: the device, its engine, the verdict on its answers, and its times."""
    facts, engine, bench, golden = device["facts"], device["engine"], device["bench"], device["golden"]
    software = [
        f"{name} {facts[key]}" for name, key in (("JetPack", "jetpack"), ("TensorRT", "tensorrt")) if facts[key]
    ]
    rows = [
        ("Device", facts["gpu"] or facts["host"]),
        ("Software", ", ".join(software) or wording.NOTHING),
        ("Power mode, clocks", ", ".join(facts[key] or "not reported" for key in ("power_mode", "clocks"))),
        ("Built by", f"{engine['builder']} {engine['builder_version']} in {wording.number(engine['seconds'], 1)} s"),
        ("Engine", wording.size(engine["bytes"])),
    ]
    if golden.get("sqnr_db") is not None:
        rows.append(("Golden outputs", f"{wording.number(golden['sqnr_db'], 1)} dB from those that were validated"))
    if device["verdict"]:
        rows.append((f"Verdict on {device['images']:,} images", device["verdict"]["reason"]))
    if "latency_ms" in bench:
        times = bench["latency_ms"]
        median, most = wording.number(times["p50"], 2), wording.number(times["p99"], 2)
        rows.append((f"Time at batch {bench['batch']}", f"median {median} ms, 99% below {most} ms"))
    return [*rows, ("Computed by", device.get("runner") or bench.get("label") or wording.NOTHING)]
