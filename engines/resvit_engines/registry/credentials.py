"""The credentials for a registry, as Docker's own configuration has them: ``docker login`` is all that is needed.

Read from ``$DOCKER_CONFIG/config.json``, else ``~/.docker/config.json``: the helper that ``credHelpers`` names for the
registry, else that of ``credsStore``, else what ``auths`` holds. Helpers are programs ``docker-credential-NAME``
(github.com/docker/docker-credential-helpers); one is run for one registry, with bounds on its time and its answer.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import expanded, read_outside
from resvit_engines.records import Record, record_from_bytes
from resvit_engines.registry.reference import HUB

CONFIG_VARIABLE = "DOCKER_CONFIG"
_CONFIG_MOST = 1 << 20
_ANSWER_MOST = 64 << 10
_SECONDS = 60.0
"""For a helper's answer: it may be asking somebody to unlock a key ring."""
_HUB_KEY = "https://index.docker.io/v1/"
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_BY_TOKEN = "<token>"  # noqa: S105
"""The user name that means: the secret is a token to be exchanged, not a password."""


@dataclass(frozen=True)
class Credentials:
    """A user's name and password; or, in their place, an identity token, or a token that is sent as it is."""

    user: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    @property
    def basic(self) -> str:
        """The value of the header ``Authorization`` by name and password."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def __repr__(self) -> str:  # a secret belongs into no message, whatever prints this
        return f"Credentials({self.user!r}, …)"


def credentials_for(authority: str) -> Credentials | None:
    """What Docker's configuration holds for a registry, ``HOST`` or ``HOST:PORT``; None where it holds nothing.

    Raises:
        ResvitError: INPUT where the configuration is malformed, MISSING where it names a helper that is not there,
            fails or does not end.
    """
    named = os.environ.get(CONFIG_VARIABLE)
    path = (expanded(named) if named else Path.home() / ".docker") / "config.json"
    if not os.path.lexists(path):
        return None
    data, keys = read_outside(path, _CONFIG_MOST), _keys(authority)
    try:
        config = record_from_bytes(data, str(path))
        helpers = config.optional("credHelpers", config.texts_by_name) or {}
        helper = next((helpers[key] for key in keys if key in helpers), None)
        helper = helper or config.optional("credsStore", config.text)
        auths = config.optional("auths", config.record)
        found = next((key for key in keys if auths and key in auths.names), None)
        entry = auths.record(found) if auths and found else None
        if not helper:
            return _from_entry(entry, path, authority) if entry else None
    except ResvitError as error:
        raise ResvitError(error.problem, f"Log in again: docker login {authority}", error.code) from error
    return _from_helper(helper, keys[0], path)


def _keys(authority: str) -> tuple[str, ...]:
    """Under which names ``docker login`` and its forerunners keep a registry."""
    if authority == HUB:
        return (_HUB_KEY, HUB, "index.docker.io")
    return (authority, f"https://{authority}", f"https://{authority}/", f"https://{authority}/v1/",
            f"https://{authority}/v2/", f"http://{authority}")  # fmt: skip


def _from_entry(entry: Record, path: Path, authority: str) -> Credentials | None:
    identity = entry.optional("identitytoken", entry.text) or ""
    registry = entry.optional("registrytoken", entry.text) or ""
    user, password = entry.optional("username", entry.text) or "", entry.optional("password", entry.text) or ""
    if encoded := entry.optional("auth", entry.text):
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError) as error:
            raise ResvitError(
                f"The credentials for {authority} in {path} do not read.", f"Make them anew: docker login {authority}"
            ) from error
    found = Credentials(user, password.rstrip("\0"), identity, registry)
    return found if found != Credentials() else None


def _from_helper(helper: str, key: str, path: Path) -> Credentials | None:
    if not _HELPER.fullmatch(helper):
        raise ResvitError(
            f"{path} names the credential helper {helper!r:.100}, which is no name of one.",
            "Write it without path and without docker-credential-.",
        )
    name = f"docker-credential-{helper}"
    program = shutil.which(name)
    if program is None:
        raise ResvitError(
            f"{path} names the credential helper {name}, which is not installed.",
            "Install it, or take credHelpers or credsStore out of that file and log in again.",
            ExitCode.MISSING,
        )
    code, answer = _asked(program, key)
    if code != 0:
        if b"not found" in answer.lower():
            return None
        said = answer.decode(errors="replace").strip().splitlines()[:1]
        raise ResvitError(
            f"The credential helper {name} failed ({'; '.join(said)[:200] or f'exit code {code}'}).",
            f"Try it by hand: echo {key} | {name} get",
            ExitCode.MISSING,
        )
    record = record_from_bytes(answer, f"the answer of {name}")
    user, secret = record.text("Username"), record.text("Secret")
    return Credentials(identity_token=secret) if user == _BY_TOKEN else Credentials(user, secret)


def _asked(program: str, key: str) -> tuple[int, bytes]:
    """Exit code and output of a helper that was asked for ``key``; it and all that it started ends in bounded time."""
    name, answer, end = Path(program).name, b"", time.monotonic() + _SECONDS
    with subprocess.Popen(
        [program, "get"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(OSError):  # it may have ended without reading
                process.stdin.write(f"{key}\n".encode())
                process.stdin.close()
            with selectors.DefaultSelector() as waiting:
                waiting.register(process.stdout, selectors.EVENT_READ)
                while waiting.select(max(end - time.monotonic(), 0)):
                    piece = os.read(process.stdout.fileno(), _ANSWER_MOST)
                    answer += piece
                    if not piece:
                        return process.wait(max(end - time.monotonic(), 0.1)), answer
                    if len(answer) > _ANSWER_MOST:
                        raise _unending(name, f"says more than {_ANSWER_MOST >> 10} KiB")
            raise _unending(name, f"does not answer within {_SECONDS:.0f} s")
        except subprocess.TimeoutExpired as error:
            raise _unending(name, f"does not end within {_SECONDS:.0f} s") from error
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _unending(name: str, what: str) -> ResvitError:
    return ResvitError(f"The credential helper {name} {what}.", "Try it by hand.", ExitCode.MISSING)
