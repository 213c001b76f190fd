"""Whatever a device of a fleet answers, it ends in a value or in one sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.remote.ssh import Answer, address_from
from resvit_export.fleet.ssh_transport import SshSession
from resvit_export.fleet.transport import Pull, Running
from test_install import refused
from test_outside import JSON

DIGEST = "a" * 64
PULL = Pull("oci://h/n:t@sha256:" + "0" * 64, "net", "cpu", None, None, False)
CALLS: dict[str, Callable[[SshSession], object]] = {
    "claim": lambda session: session.claim("fleet", "b" * 32, take_over=False),
    "installed": lambda session: session.installed(),
    "pull": lambda session: session.pull(PULL),
    "health": lambda session: session.health("net", golden=True, seconds=1.0),
    "rollback": lambda session: session.rollback("net", DIGEST),
    "command": lambda session: session.command("true", 5),
}


@dataclasses.dataclass
class Line:
    """A connection on whose other end somebody answers as it likes; ``asked`` is what it was told to do."""

    answer: Answer
    asked: list[str] = dataclasses.field(default_factory=list)
    address = address_from("ssh://cam")

    def run(self, script: str, stdin: bytes | None = None, seconds: float = 0.0) -> Answer:
        del stdin, seconds
        self.asked.append(script)
        return self.answer

    def patiently(self, action: Callable[[], Any]) -> Any:
        return action()


def session(stdout: str, code: int = 0, stderr: str = "") -> SshSession:
    return SshSession(Line(Answer(code, stdout, stderr)), "ssh://cam", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", CALLS)
@given(st.one_of(st.text(max_size=200), JSON.map(json.dumps)), st.sampled_from([0, 1, 3, 11, 124, 255]), st.text())
@settings(max_examples=60)
def test_any_answer_is_read_or_a_sentence(call: str, stdout: str, code: int, stderr: str) -> None:
    refusal = None
    try:
        CALLS[call](session(stdout, code, stderr))
    except ResvitError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code not in (ExitCode.OK, ExitCode.BUG, ExitCode.USAGE)
        assert "\x1b" not in str(refusal)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (11, ExitCode.MISMATCH),
        (8, ExitCode.BUILD),
        (1, ExitCode.MISSING),
        (2, ExitCode.MISSING),
        (77, ExitCode.MISSING),
    ],
)
def test_the_error_that_ended_it_there_is_the_error_here(code: int, found: ExitCode) -> None:
    said = json.dumps({"error": {"problem": "It is so.", "fix": "Do this.", "exit_code": code}})
    text = refused(CALLS["rollback"], session(said, code), code=found)
    assert "On ssh://cam: It is so." in text
    assert "Do this." in text


def test_a_device_without_our_program_is_told() -> None:
    text = refused(CALLS["installed"], session("", 127, "sh: 1: python: not found\n"), code=ExitCode.MISSING)
    assert "ended with 127" in text
    assert "not found" in text


def test_what_is_installed() -> None:
    version = {"digest": DIGEST, "release": 3}
    states = [
        {"name": "net", "running": version, "previous": None},
        {"name": "other", "running": {**version, "digest": "b" * 64}, "previous": {**version, "release": 2}},
        {"name": "broken", "running": None, "previous": None},
    ]
    found = session(json.dumps({"installed": states})).installed()
    assert found == {"net": Running(DIGEST, 3, None), "other": Running("b" * 64, 3, DIGEST)}


@pytest.mark.parametrize(("stderr", "code"), [("0\n", 0), ("warning\n7\n", 7), ("124", 124)])
def test_the_users_command(stderr: str, code: int) -> None:
    assert session("said", 0, stderr).command("a 'b'", 5) == (code, "said")


def test_the_users_command_is_one_word_of_the_script() -> None:
    there = session("", 0, "0")
    there.command("x'; touch /tmp/owned; '", 5)
    line: Any = there.connection
    (script,) = line.asked
    assert """sh -c 'x'"'"'; touch /tmp/owned; '"'"''""" in script


def test_time_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    del tmp_path
    monkeypatch.setattr("resvit_export.fleet.ssh_transport.Device", lambda connection: Asked())
    for said in ("", "now", "1e9", "1\n2"):
        assert "tells no time" in refused(session(said).facts, code=ExitCode.INPUT)
    assert session("0\n").facts()[1] < -1e9


class Asked:
    def machine(self) -> None:
        return None
