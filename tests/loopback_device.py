"""A device on loopback: a real sshd with a home, a Python and a PATH of its own, and no torch.

TensorRT for RTX, through ``PYTHONPATH``, is where JetPack's own packages would be. ``make device-wheels`` fetches what
its virtual environment is made of.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from device_wheels import WHEELS, device_python

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")


def missing() -> str | None:
    """Why there can be no loopback device here, or None."""
    if SSHD is None:
        return "needs sshd: sudo apt-get install openssh-server"
    if not (WHEELS / ".ready").exists():
        return "needs the wheels of a device: make device-wheels"
    return None


class LoopbackDevice:
    """An sshd in ``root``; the device's home is ``home``, its address ``address``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.trust = self.home / ".config" / "resvit" / "keys"
        self.trust.mkdir(parents=True)
        (self.home / "tmp").mkdir()
        for key in ("host_key", "user_key", "other_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / key)], check=True)
        shutil.copy(root / "user_key.pub", root / "authorized_keys")
        self._make_system()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._server: subprocess.Popen[bytes] | None = None
        # By SHLVL bash takes itself for an inner shell, and leaves out the ~/.bashrc of whoever runs the tests.
        (root / "sshd_config").write_text(
            f"""Port {self.port}
ListenAddress 127.0.0.1
HostKey {root}/host_key
PidFile none
AuthorizedKeysFile {root}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication yes
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
ForceCommand {root}/enter
SetEnv SHLVL=2
"""
        )
        host = (root / "host_key.pub").read_text().split(None, 2)
        (root / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host[0]} {host[1]}\n")
        self.config = root / "ssh_config"
        self.write_client_config()

    @property
    def address(self) -> str:
        """As a user gives it."""
        return f"ssh://127.0.0.1:{self.port}"

    def write_client_config(self, key: str = "user_key", known_hosts: str = "known_hosts") -> None:
        """The client's configuration: which key it has, and which hosts it knows."""
        self.config.write_text(
            f"Host *\n  IdentityFile {self.root}/{key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.root}/{known_hosts}\n  StrictHostKeyChecking ask\n"
        )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        assert SSHD is not None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        log = (self.root / "sshd.log").open("ab")
        with log:
            self._server = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self.root / "sshd_config")], stderr=log, start_new_session=True
            )
        while True:
            assert self._server.poll() is None, (self.root / "sshd.log").read_text()
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)

    @property
    def server_pid(self) -> int:
        """The process that listens."""
        assert self._server is not None
        return self._server.pid

    def drop_connections(self) -> int:
        """Kill the server's processes of every open connection, as a cut cable would end them; returns how many."""
        assert self._server is not None
        children = [pid for pid in _children(self._server.pid) if _name(pid) == "sshd"]
        for pid in children:
            for inner in [inner for inner in _children(pid) if _name(inner) == "sshd"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(inner, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(children)

    def vanish(self) -> None:
        """The device is gone: no connection, no server, and no process of a job either."""
        self.stop()
        for pid in self.job_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def job_processes(self) -> list[int]:
        """The processes of jobs, the builder's child included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes()
                if f"HOME={self.home}".encode() in (folder / "environ").read_bytes().split(b"\0") and (
                    b"resvit_engines" in command
                ):
                    found.append(int(folder.name))
        return [pid for pid in found if _name(pid).startswith("python")]

    def freeze_jobs(self) -> None:
        """Stop the clock for every job."""
        for pid in self.job_processes():
            os.kill(pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def frozen_at(self, words: str) -> Iterator[None]:
        """Within the block, a job that says ``words`` is stopped at once, before anybody hears it; for one time."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                for log in self.home.glob(".local/share/resvit-device/jobs/*/progress.log"):
                    with contextlib.suppress(OSError):
                        if words in log.read_text():
                            self.freeze_jobs()
                            return

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def thaw_jobs(self) -> None:
        """Let them go on."""
        for pid in self.job_processes():
            os.kill(pid, signal.SIGCONT)

    def wait_for_jobs(self) -> None:
        """Until none runs."""
        while self.job_processes():
            time.sleep(0.05)

    def forget_jobs(self) -> None:
        """As if none had ever been."""
        shutil.rmtree(self.home / ".local/share/resvit-device/jobs", ignore_errors=True)

    def stop(self) -> None:
        """End the server and every connection."""
        if self._server is not None:
            self.drop_connections()
            self._server.kill()
            self._server.wait()
            self._server = None

    def _make_system(self) -> None:
        """Its programs and its preinstalled packages."""
        # Named, since root's would be in /etc.
        self.trust.chmod(0o700)
        (self.root / "bin").mkdir()
        (self.root / "bin" / "python3").symlink_to(device_python())
        packages = self.root / "dist-packages"
        packages.mkdir()
        for found in WHEELS.glob("system/*"):
            (packages / found.name).symlink_to(found.resolve())
        for found in _libraries_of_rtx():
            (packages / found.name).symlink_to(found)
        enter = self.root / "enter"
        enter.write_text(
            f"""#!/bin/sh
cd {self.home}
exec env -i HOME={self.home} PATH={self.root}/bin:/usr/bin:/bin PYTHONPATH={packages} PYTHONNOUSERSITE=1 \\
  OMP_NUM_THREADS=1 TMPDIR={self.home}/tmp RESVIT_TRUST={self.trust} RESVIT_ROOT={self.home}/versions \\
  sh -c "$SSH_ORIGINAL_COMMAND"
"""
        )
        enter.chmod(0o755)


@contextlib.contextmanager
def loopback_device(root: Path) -> Iterator[LoopbackDevice]:
    """A started device, stopped again at the end with all that still runs on it."""
    device = LoopbackDevice(root)
    device.start()
    try:
        yield device
    finally:
        device.vanish()


def _libraries_of_rtx() -> list[Path]:
    """The large libraries are the same for every Python: this one's are lent to the device."""
    import importlib.util

    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    return [Path(place) for place in spec.submodule_search_locations] if spec else []


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


if __name__ == "__main__":
    sys.exit(missing() or 0)
