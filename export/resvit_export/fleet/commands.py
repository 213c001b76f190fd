"""What the commands ``fleet apply``, ``fleet status`` and ``fleet rollback`` do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.remote.ssh import UnreachableError
from resvit_export.fleet.page import write_page
from resvit_export.fleet.plan import Fleet
from resvit_export.fleet.release import release_of
from resvit_export.fleet.rollout import Outcome, Rollout
from resvit_export.fleet.state import DeviceState, FleetState, Phase, ReleaseState, Status, opened_state
from resvit_export.fleet.transport import Transport

PAGE = "fleet.html"
"""In the fleet's folder, written anew by each command."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """How a fleet stands: its release, None before the first, its devices, and the page that shows them."""

    release: ReleaseState | None
    devices: tuple[DeviceState, ...]
    page: Path


def apply(
    fleet: Fleet, transport: Transport, reporter: Reporter = SILENT, *, again: bool = False, take_over: bool = False
) -> tuple[Outcome, Seen]:
    """Bring the fleet's release to its devices; raises as ``release_of`` and ``Rollout.apply``."""
    with opened_state(fleet.state, alone=True) as state:
        release = release_of(fleet, fleet.state, reporter, _pinned(fleet, state))
        try:
            outcome = Rollout(fleet, state, transport, reporter).apply(release, again=again, take_over=take_over)
        finally:
            page = _page(fleet, state)
        return outcome, Seen(state.release, state.devices, page)


def rollback(fleet: Fleet, transport: Transport, reporter: Reporter = SILENT) -> tuple[Outcome, Seen]:
    """Take the fleet's release back; raises as ``Rollout.rollback``, and INPUT where there is none."""
    with opened_state(fleet.state, alone=False):
        pass  # nothing is made where nothing was applied
    with opened_state(fleet.state, alone=True) as state:
        if state.release is None:
            raise ResvitError("No release has been applied to this fleet.", "Run: resvit-export fleet apply FILE")
        try:
            outcome = Rollout(fleet, state, transport, reporter).rollback()
        finally:
            page = _page(fleet, state)
        return outcome, Seen(state.release, state.devices, page)


def status(fleet: Fleet, transport: Transport | None = None, reporter: Reporter = SILENT) -> Seen:
    """How the fleet stands; with ``transport`` each device is asked what it runs, and that is written down."""
    with opened_state(fleet.state, alone=transport is not None) as state:
        if transport is not None:
            rollout = Rollout(fleet, state, transport, reporter)
            names = [device.name for device in state.devices]
            for _ in reporter.track(
                rollout.each(names, lambda name: _asked(name, state, transport)), "ask", len(names)
            ):
                pass
        return Seen(state.release, state.devices, _page(fleet, state))


def _asked(name: str, state: FleetState, transport: Transport) -> DeviceState:
    """Ask one device what runs there; one that runs something else than it should waits for the release again."""
    device = state.device(name)
    if device.model is None:
        return device
    try:
        with transport.open(name) as session:
            runs = session.installed().get(device.model)
    except UnreachableError as error:
        if device.status is Status.RUNS:
            return state.change(name, problem=error.problem, fix=error.fix)
        return state.change(name, status=Status.UNREACHABLE, problem=error.problem, fix=error.fix)
    except ResvitError as error:
        return state.change(name, problem=error.problem, fix=error.fix)
    same = runs is not None and runs.digest == device.digest
    if device.status is Status.RUNS and not same:
        what = f"{runs.digest[:12]}, release {runs.release}" if runs else "nothing"
        said = f"It ran the release, and runs {what} now: something else installed there."
        return state.change(name, status=Status.WAITING, may_run=False, problem=said, fix="Apply the fleet again.")
    if same and device.status is Status.RUNS and device.problem:
        return state.change(name, problem="", fix="")
    return device


def _pinned(fleet: Fleet, state: FleetState) -> str | None:
    """What the tag led to when this release began, as long as it is under way: a tag that moves changes nothing."""
    release = state.release
    if release is None or release.pinned is None or fleet.release.registry is None:
        return None
    same = release.pinned.startswith(fleet.release.registry.partition("@")[0] + "@")
    return release.pinned if same and release.phase in (Phase.GOING_OUT, Phase.GOING_BACK) else None


def _page(fleet: Fleet, state: FleetState) -> Path:
    path = fleet.state / PAGE
    write_page(path, fleet, state.release, state.devices)
    return path
