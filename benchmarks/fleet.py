"""How time, state and memory of a fleet grow with its devices: the scheduler and state that ship, devices in memory.

python benchmarks/fleet.py [--sizes 100,1000,10000]

For each size, in a process of its own: release 1 goes to all; release 2 goes out while one device in 100 is away and
one in 200 has no disk, and once more when they are back; a third fails on one device of the last wave and goes back
from all; a fourth goes out and is rolled back by hand. Seconds are CPU time of the process, so that other programs do
not count; they hold everything but the devices' own work and the network, which are what takes time in a real fleet.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from fleet_memory import MACHINE, MemoryDevice, MemoryTransport
from machine import describe_machine

from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.keys.private import load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey
from resvit_engines.process import peak_memory_mib
from resvit_engines.targets.table import Builder, find_target
from resvit_export.fleet import commands
from resvit_export.fleet.plan import Fleet, fleet_from_document
from resvit_export.fleet.state import DATABASE, Phase, Status

RESULTS = Path(__file__).parent / "results" / "fleet.md"
STEPS = (
    *("first release", "second, 1.5% in the way", "second, again", "third, stopped and taken back"),
    *("fourth", "rollback"),
)


def bundle(folder: Path, release: int) -> Path:
    """A signed bundle with what a fleet looks at."""
    engine = EngineReport(
        target="rtx-4090", builder=Builder.RTX, builder_version="1.7.1.116", sm=89, bytes=6, sha256="0" * 64,
        seconds=1.0, peak_mib=1, inputs=(), outputs=(), kernels=(), warnings=(),
    )  # fmt: skip
    path = folder / f"{release}.resvit"
    manifest = Manifest("net", release=release, target=find_target("rtx-4090"), precision="fp16", engine=engine)
    write_bundle(path, manifest, {"engine.plan": b"%d" % release}, load_signing_key(str(folder / "release.key")))
    return path


def fleet_of(folder: Path, release: int, count: int) -> Fleet:
    """The fleet's file for a release."""
    document: dict[str, Any] = {
        "name": "cameras",
        "release": {"bundles": [str(bundle(folder, release))], "key": str(folder / "release.key")},
        "rollout": {"waves": [1, "10%", "100%"], "parallel": 8},
        "health": {"latency": 2.0, "command": "true"},
        "types": {"camera": {"target": "rtx-4090", "devices": [f"ssh://cam-[00001..{count:05d}]"]}},
    }
    return fleet_from_document(document, folder / "fleet.toml")


def simulated(count: int) -> dict[str, Any]:
    """All steps with ``count`` devices; CPU seconds of each, peak memory in MiB, bytes of state and page."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_key_pair(folder / "release.key", folder / "release.pub", lambda raw: PublicKey(raw, "release"))
        devices = {f"ssh://cam-{number:05d}": MemoryDevice() for number in range(1, count + 1)}
        transport = MemoryTransport(devices)
        all_of_them = list(devices.values())

        def apply(step: str, release: int, phase: Phase) -> dict[Status, int]:
            start = time.process_time()
            outcome, seen = commands.apply(fleet_of(folder, release, count), transport)
            seconds[step] = time.process_time() - start
            assert outcome.release.phase is phase, outcome
            assert len(seen.devices) == count
            return outcome.counts

        def all_run(release: int) -> None:
            assert {device.runs() for device in all_of_them} == {release}

        apply(STEPS[0], 1, Phase.OUT)
        all_run(1)
        away, full = all_of_them[50::100], all_of_them[80::200]
        for device in away:
            device.away = True
        for device in full:
            device.machine = dataclasses.replace(MACHINE, free_disk_mib=10)
        counts = apply(STEPS[1], 2, Phase.GOING_OUT)
        assert (counts[Status.UNREACHABLE], counts[Status.BLOCKED]) == (len(away), len(full))
        for device in (*away, *full):
            device.away, device.machine = False, MACHINE
        apply(STEPS[2], 2, Phase.OUT)
        all_run(2)
        all_of_them[-1].command_code = 1
        apply(STEPS[3], 3, Phase.STOPPED)
        all_run(2)
        all_of_them[-1].command_code = 0
        apply(STEPS[4], 4, Phase.OUT)
        all_run(4)
        start = time.process_time()
        commands.rollback(fleet_of(folder, 4, count), transport)
        seconds[STEPS[5]] = time.process_time() - start
        all_run(2)
        state = folder / "cameras.fleet"
        sizes = {name: (state / name).stat().st_size for name in (DATABASE, commands.PAGE)}
    return {
        "devices": count,
        "seconds": seconds,
        "peak_mib": peak_memory_mib(),
        "state_bytes": sizes[DATABASE],
        "page_bytes": sizes[commands.PAGE],
    }


def written(rows: list[dict[str, Any]]) -> str:
    """The table."""
    machine = describe_machine()
    lines = [
        "# A fleet of simulated devices",
        "",
        f"By `benchmarks/fleet.py` on {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}.",
        "",
        "Scheduler, state, health checks and page are those that ship; devices are in memory and answer at once. CPU "
        "seconds of the host's process for each step, for all devices.",
        "",
        f"| devices | {' | '.join(STEPS)} | all, ms a device | peak memory, MiB | state, KiB | state, bytes a device "
        "| page, KiB |",
        f"|{'---:|' * (len(STEPS) + 6)}",
    ]
    for row in rows:
        total = sum(row["seconds"].values())
        steps = " | ".join(f"{row['seconds'][step]:.2f}" for step in STEPS)
        lines.append(
            f"| {row['devices']:,} | {steps} | {1000 * total / row['devices']:.2f} | {row['peak_mib']} | "
            f"{row['state_bytes'] / 1024:.0f} | {row['state_bytes'] / row['devices']:.0f} | "
            f"{row['page_bytes'] / 1024:.0f} |"
        )
    return "\n".join([*lines, ""])


@click.command()
@click.option("--sizes", default="100,1000,10000", show_default=True)
@click.option("--one", type=int, hidden=True)
def main(sizes: str, one: int | None) -> None:
    """Simulate fleets of several sizes."""
    if one is not None:
        click.echo(json.dumps(simulated(one)))
        return
    rows = []
    for size in sizes.split(","):
        command = [sys.executable, __file__, "--one", size]
        rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
        click.echo(json.dumps(rows[-1]))
    RESULTS.write_text(written(rows))
    click.echo(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
