"""Commands and files over the user's own OpenSSH: its configuration, keys, agent and known hosts, and never a password.

Everything runs through the program ``ssh``; nothing about the connection is stored. One connection is
shared by all commands (``ControlMaster``). Files are copied so that a lost connection costs nothing: what has
arrived is kept, checked by digest and continued.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import selectors
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import number_from_environment, open_outside
from resvit_engines.progress import SILENT, Reporter

T = TypeVar("T")

CONFIG_VARIABLE = "RESVIT_SSH_CONFIG"
"""Names another OpenSSH configuration file than the user's."""
PATIENCE_VARIABLE = "RESVIT_SSH_PATIENCE"
"""Seconds that a lost connection may take to come back, and that a device may say nothing."""
ANSWER_MOST = 16 << 20
"""Bytes of the longest answer to one command."""
_PATIENCE = 120.0
_LEAST_PATIENCE = 20.0
_LOSSES = 100
"""How often a connection may be lost while one thing is done."""
_SSH_FAILED = 255
_OPTIONS = {
    "BatchMode": "yes",  # fails instead of asking for a password or passphrase
    "ConnectTimeout": "15",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "LogLevel": "INFO",  # a quieter setting of the user's would hide why it failed
    "ControlMaster": "auto",
    "ControlPersist": "120",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
}
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
_HOST = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]{0,254}", re.ASCII)
_PLACE = re.compile(
    r"(?:(?P<name>[^:\[\]/]+)|\[(?P<number>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\])(?::(?P<port>[0-9]{1,5}))?"
)
_LOST = r"closed|reset|broken pipe|lost|mux_client|not responding|disconnect|software caused|eof"


class UnreachableError(ResvitError):
    """The device cannot be reached now; it may be later."""


@dataclass(frozen=True)
class Address:
    """Where a device is: a host or an alias of the user's configuration, with user and port where they were given."""

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def login(self) -> str:
        """``user@host``, as people type it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def by_hand(self) -> str:
        """The command that connects by hand."""
        return f"ssh {f'-p {self.port} ' if self.port else ''}{self.login}"

    def __str__(self) -> str:
        place = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{place}{f':{self.port}' if self.port else ''}"


@dataclass(frozen=True)
class Answer:
    """How a remote command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


def address_from(text: str) -> Address:
    """Read ``ssh://user@host:port``, where user and port may be missing.

    Raises ``ResvitError`` for anything else: a password, a path, and names that a program could take for an option.
    """
    fix = "Write it as ssh://user@host or ssh://user@host:port; the host may be an alias of your ~/.ssh/config."
    if not text.startswith("ssh://"):
        raise ResvitError(f"The device '{text}' is not an address that begins with ssh://.", fix)
    user, at, place = text.removeprefix("ssh://").removesuffix("/").rpartition("@")
    name, colon, _ = user.partition(":")
    if colon:
        host = place if _HOST.fullmatch(place) else "host"
        raise ResvitError(
            "The address holds a password, and passwords are never used or stored.",
            f"Use a key: ssh-copy-id {name if _USER.fullmatch(name) else 'user'}@{host}, then leave the password out.",
        )
    if at and not _USER.fullmatch(user):
        raise ResvitError(f"'{user}' in '{text}' cannot be the name of a user.", fix)
    found = _PLACE.fullmatch(place)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or (port is not None and not 0 < port < 1 << 16):
        raise ResvitError(f"The device '{text}' is not an address of a host.", fix)
    host = found["name"]
    if host is None:
        host = found["number"].replace("%25", "%")
        try:
            ipaddress.IPv6Address(host)
        except ValueError as error:
            raise ResvitError(f"The device '{text}' is not an address: {error}.", fix) from error
    elif not _HOST.fullmatch(host):
        raise ResvitError(f"'{host}' in '{text}' cannot be the name of a host.", fix)
    return Address(host, user or None, port)


class Connection:
    """An SSH connection to one device, opened by ``with`` and shared by everything that is done through it.

    ``patience`` is how many seconds a lost connection may take to come back before :meth:`patiently` gives up.

    Raises on opening:
        UnreachableError: the device does not answer.
        ResvitError: MISSING without ssh, SYSTEM where host key or login are refused.
    """

    def __init__(self, address: Address, reporter: Reporter = SILENT, patience: float | None = None) -> None:
        self.address = address
        self.reporter = reporter
        self.patience = number_from_environment(PATIENCE_VARIABLE, _PATIENCE) if patience is None else patience
        self._last_contact = 0.0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Connection:
        if config := os.environ.get(CONFIG_VARIABLE):
            open_outside(Path(config), f"{config}, which {CONFIG_VARIABLE} names").close()  # ssh would wait for a pipe
        # A socket's path may have about 100 characters, and some systems have long temporary folders.
        place = "/tmp" if len(tempfile.gettempdir()) > 60 else None  # noqa: S108  (mkdtemp makes it private)
        self._folder = tempfile.TemporaryDirectory(prefix="resvit-ssh-", dir=place)
        try:
            self.run("true")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            command = [*self._ssh(), "-O", "exit", "--", self.address.login]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, check=False, timeout=_LEAST_PATIENCE)
            self._folder.cleanup()
            self._folder = None

    @property
    def silence(self) -> float:
        """Seconds that a device may say nothing where an answer is due at once."""
        return max(self.patience, _LEAST_PATIENCE)

    def run(self, script: str, stdin: bytes | None = None, seconds: float = 0.0) -> Answer:
        """Run ``script`` by ``sh`` in the home folder of the device and wait for it; its exit status is in the answer.

        It may take ``seconds``, or :attr:`silence` where that is longer.

        Raises:
            UnreachableError: the connection is lost, or there is no answer in time.
            ResvitError: ssh itself failed, or the answer is longer than ``ANSWER_MOST``.
        """
        with self.start(script, subprocess.DEVNULL if stdin is None else subprocess.PIPE) as process:
            if process.stdin is not None and stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(stdin)
                    process.stdin.close()
                process.stdin = None
            stdout, stderr = self.listen(process, max(seconds, self.silence))
        self.settle(process.returncode, stderr)
        return Answer(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))

    def listen(self, process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bytes]:
        """What a started script still prints until it ends, on standard output and error; ended where it is too much.

        Raises:
            UnreachableError: it did not end within ``seconds``.
            ResvitError: INPUT, it printed more than ``ANSWER_MOST`` bytes.
        """
        assert process.stdout is not None
        assert process.stderr is not None
        end = time.monotonic() + seconds
        said = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        try:
            with selectors.DefaultSelector() as waiting:
                for number in said:
                    waiting.register(number, selectors.EVENT_READ)
                while waiting.get_map():
                    for key in self.ready(waiting, end - time.monotonic(), seconds):
                        piece = os.read(key.fd, 1 << 16)
                        said[key.fd] += piece
                        if not piece:
                            waiting.unregister(key.fd)
                        if len(said[key.fd]) > ANSWER_MOST:
                            raise ResvitError(
                                f"{self.address} answers with more than {ANSWER_MOST >> 20} MiB.",
                                f"No device of ours does that. Look at what it prints at login: {self.address.by_hand}",
                            )
            try:
                process.wait(max(end - time.monotonic(), 1.0))
            except subprocess.TimeoutExpired as error:
                raise self._silent(seconds) from error
        finally:
            if process.poll() is None:
                process.kill()
        return bytes(said[process.stdout.fileno()]), bytes(said[process.stderr.fileno()])

    def ready(self, waiting: selectors.BaseSelector, left: float, seconds: float) -> list[selectors.SelectorKey]:
        """What can be read or written next; ``UnreachableError``, naming ``seconds``, after ``left`` seconds."""
        ready = waiting.select(left) if left > 0 else []
        if not ready:
            raise self._silent(seconds)
        return [key for key, _ in ready]

    def _silent(self, seconds: float) -> UnreachableError:
        return UnreachableError(
            f"{self.address} said nothing for {seconds:.0f} s.",
            f"Check that it works, and that this ends: {self.address.by_hand} true",
            ExitCode.SYSTEM,
        )

    def start(self, script: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start ``script`` on the device with pipes to it."""
        command = [*self._ssh(), "--", self.address.login, f"sh -c {shlex.quote(script)}"]
        try:
            return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise ResvitError(
                "The program ssh is not installed.", "Install OpenSSH's client.", ExitCode.MISSING
            ) from error

    def settle(self, code: int, stderr: bytes) -> None:
        """Raise what ssh's own failure means; note that there was contact otherwise."""
        if code == _SSH_FAILED or code < 0:
            raise ssh_error(stderr.decode(errors="replace"), self.address)
        self._last_contact = time.monotonic()

    def patiently(self, action: Callable[[], T]) -> T:
        """Do ``action``, and again from its start where the connection was lost and comes back in time.

        Raises ``UnreachableError`` when the device has been away for longer than ``patience``.
        """
        losses = 0
        while True:
            try:
                return action()
            except UnreachableError as error:
                away = time.monotonic() - self._last_contact
                losses += 1
                if away > self.patience or losses > _LOSSES:
                    raise UnreachableError(
                        f"The connection to {self.address} was lost and did not come back within "
                        f"{self.patience:.0f} s. The last that ssh said: {error.problem}",
                        "When the device answers again, run the same command: what was copied and done there is kept.",
                        ExitCode.SYSTEM,
                    ) from error
                if losses == 1:
                    self.reporter.warn(f"The connection to {self.address} was lost; trying for {self.patience:.0f} s.")
                time.sleep(min(2.0, self.patience / 10))

    def _ssh(self) -> list[str]:
        config = os.environ.get(CONFIG_VARIABLE)
        assert self._folder is not None, "the connection is not open"
        options = {**_OPTIONS, "ControlPath": f"{self._folder.name}/c"}
        return [
            "ssh",
            *(("-F", config) if config else ()),
            *(("-p", str(self.address.port)) if self.address.port else ()),
            *(part for name, value in options.items() for part in ("-o", f"{name}={value}")),
        ]


def ssh_error(stderr: str, address: Address) -> ResvitError:
    """What ssh's own words mean, as a problem and a fix."""
    said = " ".join(line.strip() for line in stderr.strip().splitlines() if not line.startswith("@"))
    last = stderr.strip().splitlines()[-1].strip() if stderr.strip() else "nothing"
    hand = address.by_hand

    def refused(problem: str, fix: str) -> ResvitError:
        return ResvitError(problem, fix, ExitCode.SYSTEM)

    def away(problem: str, fix: str) -> ResvitError:
        return UnreachableError(problem, fix, ExitCode.SYSTEM)

    if re.search(r"IDENTIFICATION HAS CHANGED|host key .* has changed", stderr, re.IGNORECASE):
        return refused(
            f"{address} shows another host key than before: it was set up anew, or something else answers.",
            f"If you know why, forget the old key with ssh-keygen -R {address.host} and connect once by hand: {hand}",
        )
    if "Host key verification failed" in stderr or "host key is known" in stderr:
        return refused(
            f"The host key of {address} is not known yet.",
            f"Connect once by hand, compare the fingerprint and answer yes: {hand}",
        )
    if "Permission denied" in stderr or "Too many authentication failures" in stderr:
        port = f"-p {address.port} " if address.port else ""
        return refused(
            f"{address} did not accept a key of yours ({last}). Passwords are never asked for.",
            f"Install your key there, ssh-copy-id {port}{address.login}; a key with a passphrase must be in ssh-agent.",
        )
    if re.search(r"Could not resolve hostname|Name or service not known", stderr):
        return refused(
            f"No host is called {address.host} ({last}).", "Check the name, or give its IP address: ssh://user@IP."
        )
    if "Connection refused" in stderr:
        return away(
            f"{address} refuses connections: no SSH server listens there.",
            "Check the port, and on the device: sudo systemctl status ssh (sudo apt install openssh-server).",
        )
    if re.search(r"timed out|No route to host|unreachable|Host is down", stderr, re.IGNORECASE):
        return away(f"{address} does not answer ({last}).", "Check that it is on, and on this network.")
    if re.search(r"Bad owner or permissions|[Bb]ad configuration|Can't open user config", stderr):
        return refused(f"Your SSH configuration cannot be used: {said}", "Mend it until this works: " + hand)
    if not said or re.search(_LOST, stderr, re.IGNORECASE):
        return away(f"The connection to {address} was lost ({last}).", f"Check that this works: {hand}")
    return refused(f"ssh could not connect to {address}: {said}", f"Check that this works: {hand}")


def quoted(*words: str) -> str:
    """Words as one line of shell."""
    return shlex.join(words)
