"""Addresses, what ssh says, and files over a real sshd on loopback whose connections are cut."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback_device import LoopbackDevice, loopback_device, missing
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import Silent
from resvit_engines.remote.progress_events import EventLog, replay
from resvit_engines.remote.ssh import CONFIG_VARIABLE, Address, Connection, UnreachableError, address_from, ssh_error
from resvit_engines.remote.ssh_files import download, upload

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackDevice]:
    with loopback_device(tmp_path / "device") as started:
        monkeypatch.setenv(CONFIG_VARIABLE, str(started.config))
        yield started


class Heard(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


class Cutter(Silent):
    """Cuts the connection once, after a number of pieces."""

    def __init__(self, device: LoopbackDevice, after: int, times: int = 1) -> None:
        self.device, self.after, self.times = device, after, times
        self.seen: list[int] = []

    def track(self, items, what, total, weight=1, before=0):
        self.seen.append(total)
        for number, item in enumerate(items):
            if number == self.after and self.times:
                self.times -= 1
                assert self.device.drop_connections() > 0
            yield item


def test_addresses() -> None:
    assert address_from("ssh://orin") == Address("orin")
    assert address_from("ssh://nvidia@Orin-7.local:2222/") == Address("Orin-7.local", "nvidia", 2222)
    assert str(address_from("ssh://a@b:22")) == "ssh://a@b:22"
    assert Address("b", "a", 2222).by_hand == "ssh -p 2222 a@b"
    for text, address in {
        "ssh://[::1]": Address("::1"),
        "ssh://u@[2001:db8::1]:2222": Address("2001:db8::1", "u", 2222),
        "ssh://[fe80::1%25eth0]:22": Address("fe80::1%eth0", None, 22),
    }.items():
        assert address_from(text) == address_from(str(address_from(text))) == address


@pytest.mark.parametrize(
    "text",
    [
        "orin",
        "ssh://",
        "ssh://-oProxyCommand=x",
        "ssh://-l@host",
        "ssh://h/path",
        "ssh://h:x",
        "ssh://a b",
        "ssh://h;x",
        "ssh://h\nid",
        "ssh://@h",
        "ssh://u@v@h",
        "ssh://h..h",
        "ssh://h%0aid",
        "ssh://u%h@h",
        "ssh://h:0",
        "ssh://h:65536",
        "ssh://h:\u0662\u0662",
        "ssh://[::1",
        "ssh://[1.2.3.4]",
        "ssh://2001:db8::1",
        f"ssh://{'a' * 5000}",
        "ssh://\x1b[31mh",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ResvitError, match=r"cannot be the name|not an address") as caught:
        address_from(text)
    assert "\x1b" not in str(caught.value)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ResvitError) as caught:
        address_from("ssh://me:secret@host")
    assert "secret" not in str(caught.value)
    assert "ssh-copy-id me@host" in caught.value.fix


@pytest.mark.parametrize(
    ("said", "problem", "fix", "later"),
    [
        ("ssh: connect to host b port 22: Connection refused", "refuses", "systemctl", True),
        ("ssh: connect to host b port 22: Connection timed out", "does not answer", "network", True),
        ("ssh: connect to host b port 22: No route to host", "does not answer", "network", True),
        ("ssh: Could not resolve hostname b: Name or service not known", "No host is called b", "IP", False),
        ("a@b: Permission denied (publickey,password).", "did not accept", "ssh-copy-id a@b", False),
        ("Host key verification failed.", "not known yet", "Connect once by hand", False),
        ("@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "another host key",
         "ssh-keygen -R b", False),
        ("client_loop: send disconnect: Broken pipe", "was lost", "ssh a@b", True),
        ("Connection reset by 10.0.0.1 port 22", "was lost", "ssh a@b", True),
        ("", "was lost", "ssh a@b", True),
        ("/home/a/.ssh/config: line 3: Bad configuration option: x", "configuration", "Mend", False),
    ],
)  # fmt: skip
def test_what_ssh_says_becomes_a_sentence(said: str, problem: str, fix: str, later: bool) -> None:
    error = ssh_error(said, Address("b", "a"))
    assert problem in error.problem
    assert fix in error.fix
    assert isinstance(error, UnreachableError) == later
    assert error.code == ExitCode.SYSTEM


@pytest.mark.whole
def test_commands_run_in_the_devices_home(device: LoopbackDevice) -> None:
    with Connection(address_from(device.address)) as connection:
        answer = connection.run('pwd; echo "it\'s" >&2; exit 3')
        assert (answer.code, answer.stdout.strip(), answer.stderr.strip()) == (3, str(device.home), "it's")
        assert connection.run("cat", b"\x01 in").stdout == "\x01 in"


def test_an_unknown_host_key_is_not_accepted(device: LoopbackDevice) -> None:
    device.write_client_config(known_hosts="nobody")
    with pytest.raises(ResvitError, match="not known yet") as caught, Connection(address_from(device.address)):
        pass
    assert f"ssh -p {device.port} 127.0.0.1" in caught.value.fix
    assert not (device.root / "nobody").exists()


def test_a_changed_host_key_is_named(device: LoopbackDevice) -> None:
    kind, key = (device.root / "other_key.pub").read_text().split()[:2]
    (device.root / "known_hosts").write_text(f"[127.0.0.1]:{device.port} {kind} {key}\n")
    with pytest.raises(ResvitError, match="another host key"), Connection(address_from(device.address)):
        pass


def test_no_password_is_ever_asked_for(device: LoopbackDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    program = tmp_path / "askpass"
    program.write_text(f"#!/bin/sh\ntouch {asked}\necho secret\n")
    program.chmod(0o755)
    for name, value in {"SSH_ASKPASS": str(program), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":9"}.items():
        monkeypatch.setenv(name, value)
    device.write_client_config(key="other_key")
    with pytest.raises(ResvitError, match="Passwords are never asked for") as caught:
        Connection(address_from(device.address)).__enter__()
    assert "ssh-copy-id" in caught.value.fix
    assert not asked.exists()


def test_nobody_at_the_port(device: LoopbackDevice) -> None:
    device.stop()
    with pytest.raises(UnreachableError, match="refuses connections"), Connection(address_from(device.address)):
        pass


@pytest.mark.whole
def test_files_go_there_and_come_back(device: LoopbackDevice, tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_bytes(os.urandom(3_000_000))
    with Connection(address_from(device.address)) as connection:
        assert upload(connection, file, "some where/a 'file'")
        assert (device.home / "some where" / "a 'file'").read_bytes() == file.read_bytes()
        assert not upload(connection, file, "some where/a 'file'")
        download(connection, "some where/a 'file'", tmp_path / "back" / "it")
        assert (tmp_path / "back" / "it").read_bytes() == file.read_bytes()
        with pytest.raises(ResvitError, match="not on"):
            download(connection, "nothing", tmp_path / "nothing")
    assert list((device.home / "some where").iterdir()) == [device.home / "some where" / "a 'file'"]


@pytest.mark.slow
@pytest.mark.whole
def test_an_upload_that_was_cut_goes_on_where_it_was(device: LoopbackDevice, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(40 << 20))
    heard, cutter = Heard(), Cutter(device, after=30)
    with Connection(address_from(device.address), heard, patience=60) as connection:
        assert upload(connection, file, "large", cutter)
    assert (device.home / "large").read_bytes() == file.read_bytes()
    assert cutter.seen[0] == 40
    assert cutter.seen[1] < 40, "it began again from the start"
    assert "was lost" in heard.lines[0]


@pytest.mark.whole
def test_an_upload_over_a_part_of_something_else_is_made_anew(device: LoopbackDevice, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"right" * 1000)
    (device.home / "file.part").write_bytes(b"wrong")
    with Connection(address_from(device.address)) as connection:
        assert upload(connection, file, "file")
    assert (device.home / "file").read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.whole
def test_a_download_that_was_cut_goes_on_where_it_was(device: LoopbackDevice, tmp_path: Path) -> None:
    (device.home / "large").write_bytes(os.urandom(40 << 20))
    cutter = Cutter(device, after=20)
    with Connection(address_from(device.address), patience=60) as connection:
        download(connection, "large", tmp_path / "large", cutter)
    assert (tmp_path / "large").read_bytes() == (device.home / "large").read_bytes()
    assert cutter.seen[1] < cutter.seen[0]
    assert list(tmp_path.glob(".large*")) == []


@pytest.mark.whole
def test_a_device_that_stays_away_gives_a_sentence(device: LoopbackDevice, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(40 << 20))
    with Connection(address_from(device.address), patience=0.3) as connection:

        class Gone(Silent):
            def track(self, items, what, total, weight=1, before=0):
                for number, item in enumerate(items):
                    if number == 10:
                        device.stop()
                    yield item

        with pytest.raises(UnreachableError, match="did not come back") as caught:
            upload(connection, file, "file", Gone())
    assert "run the same command" in caught.value.fix
    assert not (device.home / "file").exists()


@pytest.mark.whole
def test_a_full_disk_there_is_named(device: LoopbackDevice, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100_000)
    (device.home / "file.part").symlink_to("/dev/full")
    with (
        Connection(address_from(device.address)) as connection,
        pytest.raises(ResvitError, match=r"disk of .* is full"),
    ):
        upload(connection, file, "file")


def test_progress_crosses_a_file(tmp_path: Path) -> None:
    class Shown(Heard):
        def track(self, items, what, total, weight=1, before=0):
            self.lines.append(f"{what} {before}/{total}")
            count = sum(1 for _ in items)
            self.lines.append(f"{what} {before + count * weight}/{total}")
            yield from ()

    log = EventLog(tmp_path / "log", Silent())
    log.say("begin")
    list(log.track(range(3), "resumed", 70, 10, 40))
    for number in log.track(range(3), "outer", 6, 2):
        if number == 1:
            list(log.track(range(2), "inner", 2))
        log.say(f"at {number}")
    log.warn("done")
    log.close()
    shown = Shown()
    replay(iter(["no json", *(tmp_path / "log").read_text().splitlines()]), shown)
    assert shown.lines[0] == "begin"
    assert shown.lines[-1] == "warning: done"
    assert {"outer 6/6", "inner 2/2", "at 2", "resumed 40/70", "resumed 70/70"} <= set(shown.lines)


@pytest.mark.whole
def test_two_uploads_of_one_file_at_once_end_whole(device: LoopbackDevice, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(4 << 20))

    def send(failed: list[str]) -> None:
        try:
            with Connection(address_from(device.address)) as connection:
                upload(connection, file, "file")
        except ResvitError as error:
            failed.append(str(error))

    failed: list[str] = []
    threads = [threading.Thread(target=send, args=(failed,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One of the two may be told that its copy was disturbed; what arrives is whole in any case.
    assert len(failed) < 2, failed
    assert (device.home / "file").read_bytes() == file.read_bytes()
