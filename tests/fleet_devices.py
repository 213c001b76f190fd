"""Several loopback devices that share what is slow to make: one client configuration, one prepared environment."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from device_wheels import WHEELS
from loopback_device import LoopbackDevice
from resvit_engines.remote.device import ROOT, Device
from resvit_engines.remote.ssh import CONFIG_VARIABLE, Connection, address_from


class Devices:
    """``count`` devices below ``folder``; ``config`` is the SSH configuration that reaches all of them."""

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir(parents=True)
        self.all = [LoopbackDevice(folder / f"device-{number:02d}") for number in range(count)]
        first = self.all[0]
        for other in self.all[1:]:
            shutil.copy(first.root / "authorized_keys", other.root / "authorized_keys")
        hosts = "".join((device.root / "known_hosts").read_text() for device in self.all)
        (first.root / "known_hosts").write_text(hosts)
        self.config = first.config
        self._wheels: list[Path] = []

    @property
    def addresses(self) -> list[str]:
        """As a fleet's file lists them."""
        return [device.address for device in self.all]

    def start(self) -> None:
        """Start every server."""
        for device in self.all:
            device.start()

    def vanish(self) -> None:
        """All are gone."""
        for device in self.all:
            device.vanish()

    def prepare(self) -> None:
        """Install the device's side on the first, and lend it to the others, as an image that all were flashed with."""
        with Connection(address_from(self.all[0].address)) as connection:
            there = Device(connection)
            there.prepare(there.machine(), WHEELS, on_cpu=True)
        made = self.all[0].home / ROOT / "venv"
        for device in self.all[1:]:
            place = device.home / ROOT
            place.mkdir(parents=True)
            (place / "venv").symlink_to(made)

    def forget(self) -> None:
        """As they were after they were prepared."""
        for device in self.all:
            for path in (device.home / "versions", device.home / ROOT / "fleet", device.home / ROOT / "jobs"):
                shutil.rmtree(path, ignore_errors=True)
            for path in device.home.glob("*.flag"):
                path.unlink()


@contextlib.contextmanager
def devices(folder: Path, count: int) -> Iterator[Devices]:
    """Started and prepared devices, gone at the end; ``RESVIT_SSH_CONFIG`` names their configuration meanwhile."""
    found = Devices(folder, count)
    before = os.environ.get(CONFIG_VARIABLE)
    os.environ[CONFIG_VARIABLE] = str(found.config)
    try:
        found.start()
        found.prepare()
        yield found
    finally:
        found.vanish()
        os.environ.pop(CONFIG_VARIABLE) if before is None else os.environ.update({CONFIG_VARIABLE: before})
