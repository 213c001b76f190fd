"""A page with every device of a fleet: what it runs, how fast, and why not, where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.files import write_atomic
from resvit_export.fleet.plan import Fleet
from resvit_export.fleet.state import DeviceState, ReleaseState, Status, now
from resvit_export.report.layout.template import environment
from resvit_export.report.layout.wording import NOTHING, number

TITLES = {
    Status.RUNS: "runs it",
    Status.WAITING: "waiting",
    Status.AT_WORK: "at work",
    Status.UNREACHABLE: "unreachable",
    Status.BLOCKED: "blocked",
    Status.BACK: "went back",
    Status.FAILED: "failed",
}
"""In the order in which they are shown."""
_MARKS = {
    Status.RUNS: "good",
    Status.FAILED: "bad",
    Status.BACK: "bad",
    Status.BLOCKED: "odd",
    Status.UNREACHABLE: "odd",
}


@dataclass(frozen=True)
class Row:
    """One device, as it is shown."""

    name: str
    type: str
    status: str
    mark: str
    wave: str
    version: str
    before: str
    latency: str
    facts: str
    why: str
    when: str


def html_from_fleet(fleet: Fleet, release: ReleaseState | None, devices: Sequence[DeviceState], at: str) -> str:
    """The page; the same state gives the same text. Raises ``ResvitError`` if Jinja2 is not installed."""
    counts = [(TITLES[status], sum(device.status is status for device in devices), _MARKS.get(status, ""))
              for status in TITLES]  # fmt: skip
    return (
        environment()
        .get_template("fleet.html.j2")
        .render(
            name=fleet.name,
            release=release,
            phase=release.phase.value if release else "",
            waves=", ".join(str(wave) for wave in fleet.rollout.waves),
            types=[(kind.name, kind.target, len(kind.devices)) for kind in fleet.types],
            counts=[(title, f"{count:,}", mark) for title, count, mark in counts if count],
            total=f"{len(devices):,}",
            rows=[_row(device) for device in devices],
            at=at,
        )
    )


def write_page(path: Path, fleet: Fleet, release: ReleaseState | None, devices: Sequence[DeviceState]) -> None:
    """Write the page, whole or not at all."""
    write_atomic(path, html_from_fleet(fleet, release, devices, now()).encode())


def _row(device: DeviceState) -> Row:
    return Row(
        device.name.removeprefix("ssh://"),
        device.type,
        TITLES[device.status],
        _MARKS.get(device.status, ""),
        str(device.wave) if device.wave else NOTHING,
        device.digest[:12] if device.digest else NOTHING,
        device.before[:12] if device.before else NOTHING,
        f"{number(device.latency_ms, 3)} ms" if device.latency_ms is not None else NOTHING,
        device.facts,
        f"{device.problem} {device.fix}".strip(),
        device.when,
    )
