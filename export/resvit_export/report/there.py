"""What the device said of its engine, ready to be laid out."""

from __future__ import annotations

from resvit_export.report import wording
from resvit_export.report.data import Json


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
