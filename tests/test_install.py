"""Installing, rolling back and looking: what may run is whole, signed, fitting and computes what was validated."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.cli.main import run
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.install.install import Installed, install_bundle, installed_version, rollback, status
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public import PublicKey, TrustStore
from resvit_engines.machine import Machine
from resvit_engines.targets.table import find_target
from test_signing import KEY, TRUST, repacked, signing_key

FACTS = Machine(
    sm=89, gpu="NVIDIA L4", tensorrt=None, jetpack=None, arch="x86_64", memory_mib=60_000, free_disk_mib=10_000,
    python="3.11.7", rtx="1.7.1.116",
)  # fmt: skip


def bundle(
    path: Path, content: bytes = b"weights", key: SigningKey | None = KEY, target: str = "rtx-4090", **manifest: Any
) -> Path:
    full = Manifest(**{"name": "net", "target": find_target(target), **manifest})
    write_bundle(path, full, {"model.onnx": content, "data/golden.npy": b"golden"}, key)
    return path


@dataclasses.dataclass
class Device:
    """An installation root with the trust and facts that a test gives it."""

    root: Path
    trust: TrustStore = TRUST
    facts: Machine = FACTS
    checked: list[Path] = dataclasses.field(default_factory=list)
    outputs_differ: bool = False

    def check(self, folder: Path, manifest: Manifest) -> None:
        self.checked.append(folder)
        assert (folder / "model.onnx").exists()
        assert manifest.name
        if self.outputs_differ:
            raise ResvitError("The outputs differ.", "Build again.", ExitCode.MISMATCH)

    def install(self, path: Path, **options: Any) -> Installed:
        return install_bundle(path, self.root, self.trust, check=self.check, machine=self.facts, **options)

    def rollback(self, name: str = "net") -> Installed:
        return rollback(self.root, name, self.trust, check=self.check)

    def runs(self, name: str = "net") -> bytes:
        return (self.root / name / "current/model.onnx").read_bytes()

    def versions(self, name: str = "net") -> list[str]:
        return sorted(path.name for path in (self.root / name / "versions").iterdir())


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "root")


def refused(function, *arguments, code: ExitCode, **named) -> str:
    with pytest.raises(ResvitError) as caught:
        function(*arguments, **named)
    assert caught.value.code is code, caught.value
    return str(caught.value)


def test_install_update_and_roll_back(device: Device, tmp_path: Path) -> None:
    first = device.install(bundle(tmp_path / "1", b"one"))
    assert (first.before, device.runs()) == (None, b"one")
    assert (device.root / "net/current").readlink() == Path("versions") / first.version.version
    second = device.install(bundle(tmp_path / "2", b"two", release=2))
    assert second.before == first.version
    assert (second.version.release, second.version.key, device.runs()) == (2, "release", b"two")
    assert device.rollback().version == first.version
    assert device.runs() == b"one"
    assert "no earlier version" in refused(device.rollback, code=ExitCode.INPUT)
    found = installed_version(device.root, "net", TRUST)
    assert found.manifest.release == 1
    (state,) = status(device.root)
    assert (state.name, state.running, state.previous) == ("net", first.version, None)
    # The one that was rolled back does not come back by itself, and an older one than it needs to be asked for.
    third = device.install(bundle(tmp_path / "3", b"three", release=3))
    assert (third.before, device.rollback().version) == (first.version, first.version)


def test_the_last_three_versions_are_kept(device: Device, tmp_path: Path) -> None:
    names = [device.install(bundle(tmp_path / str(n), f"{n}".encode(), release=n)).version.version for n in range(1, 6)]
    assert device.versions() == sorted(names[2:])
    assert device.rollback().version.version == names[3]
    assert device.rollback().version.version == names[2]
    assert "no earlier version" in refused(device.rollback, code=ExitCode.INPUT)
    assert device.runs() == b"3"


def test_a_lower_release_is_refused_unless_asked_for(device: Device, tmp_path: Path) -> None:
    device.install(bundle(tmp_path / "5", b"five", release=5))
    old = bundle(tmp_path / "4", b"four", release=4)
    message = refused(device.install, old, code=ExitCode.INPUT)
    assert "release 4" in message
    assert "--allow-downgrade" in message
    assert device.runs() == b"five"
    device.install(bundle(tmp_path / "same", b"rebuilt", release=5))
    device.install(old, allow_downgrade=True)
    assert device.runs() == b"four"
    # The highest ever installed still counts, through downgrade and rollback.
    assert "release 5" in refused(device.install, bundle(tmp_path / "3", b"3", release=3), code=ExitCode.INPUT)
    device.install(bundle(tmp_path / "6", b"six", release=6))
    device.rollback()
    refused(device.install, bundle(tmp_path / "55", b"55", release=5), code=ExitCode.INPUT)
    assert device.runs() == b"four"


def test_installing_the_same_again_changes_nothing(device: Device, tmp_path: Path) -> None:
    path = bundle(tmp_path / "1")
    once, twice = device.install(path), device.install(path)
    assert once.folder == twice.folder
    assert twice.before is None
    assert len(device.checked) == 2  # the golden inputs ran both times
    assert device.versions() == [once.version.version]
    device.outputs_differ = True
    refused(device.install, path, code=ExitCode.MISMATCH)


def test_a_damaged_copy_of_what_is_installed_is_not_called_installed(device: Device, tmp_path: Path) -> None:
    made = bundle(tmp_path / "1", b"one")
    device.install(made)
    data = bytearray(made.read_bytes())
    data[data.rindex(b"one")] ^= 1
    made.write_bytes(data)
    assert "damaged" in refused(device.install, made, code=ExitCode.INPUT)
    assert device.runs() == b"one"


def test_a_damaged_version_is_replaced_without_being_touched_while_it_is_current(
    device: Device, tmp_path: Path
) -> None:
    path = bundle(tmp_path / "1", b"one")
    first = device.install(path)
    (first.folder / "model.onnx").write_bytes(b"eno")
    assert "model.onnx" in refused(installed_version, device.root, "net", TRUST, code=ExitCode.UNTRUSTED)
    again = device.install(path)
    assert again.folder.name == f"{first.folder.name}.1"
    assert device.runs() == b"one"
    assert installed_version(device.root, "net", TRUST).folder == again.folder
    for change in ("extra", "manifest.json", "signature.json", "data"):
        if change == "data":
            (again.folder / "data/golden.npy").unlink()
            (again.folder / "data/golden.npy").symlink_to("../model.onnx")
        else:
            before = (again.folder / change).read_bytes() if change != "extra" else None
            (again.folder / change).write_bytes((before or b"").replace(b"net", b"nex") + b" ")
        refused(installed_version, device.root, "net", TRUST, code=ExitCode.UNTRUSTED)
        if change != "data":
            (again.folder / change).unlink()
            if before is not None:
                (again.folder / change).write_bytes(before)
    # A link to the very same bytes, which somebody else may change later.
    (again.folder / "data/golden.npy").unlink()
    (tmp_path / "elsewhere").write_bytes(b"golden")
    (again.folder / "data/golden.npy").symlink_to(tmp_path / "elsewhere")
    refused(installed_version, device.root, "net", TRUST, code=ExitCode.UNTRUSTED)
    (again.folder / "signature.json").unlink()
    assert "not signed" in refused(installed_version, device.root, "net", TRUST, code=ExitCode.UNTRUSTED)


def everything_that_is_refused(folder: Path) -> list[tuple[str, Path, ExitCode, dict[str, Any]]]:
    """Bundles of release 2 with one thing wrong in each: name, path, exit code and options."""
    stranger, tampered, forged = signing_key(bytes(32), "stranger"), folder / "tampered", folder / "forged"
    repacked(bundle(tampered, release=2), model=b"WEIGHTS")
    other = bundle(folder / "another-model", b"other", name="other")
    repacked(bundle(forged, release=2), manifest=b"{}")
    untrusted, input_, impossible = ExitCode.UNTRUSTED, ExitCode.INPUT, ExitCode.IMPOSSIBLE
    return [
        ("unsigned", bundle(folder / "a", key=None, release=2), untrusted, {}),
        ("unknown key", bundle(folder / "b", key=stranger, release=2), untrusted, {}),
        ("tampered file", tampered, input_, {}),
        ("tampered manifest", forged, untrusted, {}),
        ("wrong device", bundle(folder / "c", target="jetson-orin", release=2), impossible, {}),
        ("another model", other, input_, {"expect": "net"}),
        ("name that leads elsewhere", bundle(folder / "d", name="../net", release=2), input_, {}),
        ("no name", bundle(folder / "e", name=None, release=2), input_, {}),
        ("old", bundle(folder / "f", release=0), input_, {}),
        ("no bundle", folder / "absent", input_, {}),
    ]


def test_whatever_is_refused_leaves_the_old_version_running(device: Device, tmp_path: Path) -> None:
    first = device.install(bundle(tmp_path / "1", b"one"))
    device.checked.clear()
    before = sorted(str(path) for path in tmp_path.glob("root/**/*"))
    for what, path, code, options in everything_that_is_refused(tmp_path):
        message = refused(device.install, path, code=code, **options)
        assert "→" in message, what
        assert device.runs() == b"one", what
        assert sorted(str(path) for path in tmp_path.glob("root/**/*")) == before, what
    assert not device.checked
    assert status(device.root)[0].running == first.version


def test_expired_and_revoked_keys(device: Device, tmp_path: Path) -> None:
    device.install(bundle(tmp_path / "1", b"one"))
    device.install(bundle(tmp_path / "2", b"two"))
    expired = PublicKey(KEY.public.raw, "release", date(2024, 1, 1), date(2025, 1, 1))
    device.trust = TrustStore((expired,))
    assert "expired" in refused(device.install, bundle(tmp_path / "3", b"three"), code=ExitCode.UNTRUSTED)
    # What was installed while the key was good goes on.
    assert installed_version(device.root, "net", device.trust).manifest.name == "net"
    device.rollback()
    assert device.runs() == b"one"
    device.trust = TrustStore((PublicKey(KEY.public.raw, "release", revoked=True),))
    refused(device.install, tmp_path / "2", code=ExitCode.UNTRUSTED)
    assert "revoked" in refused(installed_version, device.root, "net", device.trust, code=ExitCode.UNTRUSTED)


def test_outputs_that_differ_stop_an_installation_and_a_rollback(device: Device, tmp_path: Path) -> None:
    device.install(bundle(tmp_path / "1", b"one"))
    device.install(bundle(tmp_path / "2", b"two"))
    device.outputs_differ = True
    versions = device.versions()
    refused(device.install, bundle(tmp_path / "3", b"three"), code=ExitCode.MISMATCH)
    refused(device.rollback, code=ExitCode.MISMATCH)
    assert (device.runs(), device.versions()) == (b"two", versions)


def test_a_check_that_breaks_leaves_nothing(device: Device, tmp_path: Path) -> None:
    def broken(folder: Path, manifest: Manifest) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        install_bundle(bundle(tmp_path / "1"), device.root, TRUST, check=broken, machine=FACTS)
    assert device.versions() == []
    assert not (device.root / "net/current").exists()
    assert status(device.root)[0].current is None


def test_models_do_not_touch_each_other(device: Device, tmp_path: Path) -> None:
    device.install(bundle(tmp_path / "1", b"one"))
    device.install(bundle(tmp_path / "2", b"two", name="other", release=0))
    assert (device.runs(), device.runs("other")) == (b"one", b"two")
    assert [state.name for state in status(device.root)] == ["net", "other"]
    (device.root / "other/state.json").write_bytes((device.root / "net/state.json").read_bytes())
    assert "is 'net', where other belongs" in refused(device.install, tmp_path / "2", code=ExitCode.INPUT)
    assert [bool(state.problem) for state in status(device.root)] == [False, True]


@pytest.mark.parametrize("link", ["/etc", "../../elsewhere", "versions/../../x", "versions/nothing-like-it", "file"])
def test_a_current_that_leads_elsewhere_is_not_followed(device: Device, tmp_path: Path, link: str) -> None:
    device.install(bundle(tmp_path / "1"))
    current = device.root / "net/current"
    current.unlink()
    if link == "file":
        current.write_text("versions")
    else:
        current.symlink_to(link)
    assert "not a link to one of its versions" in refused(
        installed_version, device.root, "net", TRUST, code=ExitCode.SYSTEM
    )


def test_a_state_from_before_power_was_lost_is_understood(device: Device, tmp_path: Path) -> None:
    first = device.install(bundle(tmp_path / "1", b"one"))
    second = device.install(bundle(tmp_path / "2", b"two"))
    third = device.install(bundle(tmp_path / "3", b"three"))
    # Everything but the last step of the third: its link was never written.
    link = device.root / "net/current"
    link.unlink()
    link.symlink_to(Path("versions") / second.version.version)
    (state,) = status(device.root)
    assert (state.running, state.previous) == (second.version, first.version)
    assert device.install(tmp_path / "3").before == second.version
    assert device.rollback().version == second.version
    assert third.folder.exists()


def test_everything_is_on_the_disk_before_the_switch(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    flush, replace = os.fsync, Path.replace

    def noted(handle: int) -> None:
        flush(handle)
        synced.append(os.fstat(handle).st_ino)

    def replaced(self: Path, target: Path) -> Path:
        if target.name == "current":
            new = self.parent / self.readlink()
            wanted = [new, *new.rglob("*"), new.parent, self.parent, self.parent / "state.json"]
            assert {path.stat().st_ino for path in wanted} <= set(synced)
            assert len(wanted) >= 9
            synced.clear()
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", replaced)
    done = device.install(bundle(tmp_path / "1"))
    assert (device.root / "net").stat().st_ino in synced  # the switch itself is, when success is reported
    assert done.folder.exists()


@pytest.mark.whole
def test_a_switch_is_one_rename(device: Device, tmp_path: Path) -> None:
    """Somebody who opens ``current`` all the time always finds a whole version."""
    device.install(bundle(tmp_path / "1", b"one"))
    seen: set[bytes] = set()
    stop = threading.Event()
    faults: list[BaseException] = []

    def look() -> None:
        while not stop.is_set():
            try:
                seen.add(device.runs())
            except OSError as error:
                faults.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for n in range(2, 12):
            device.install(bundle(tmp_path / f"{n}", f"{n}".encode()))
            while f"{n}".encode() not in seen and not faults:
                pass
    finally:
        stop.set()
        watcher.join()
    assert not faults


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESVIT_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr("resvit_engines.cli.installing.golden_of", lambda runtime: lambda folder, manifest: None)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/release.pub").write_text(KEY.public.to_text())
    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "keys"))
    one, two = bundle(tmp_path / "1", b"one"), bundle(tmp_path / "2", b"two", release=2)

    assert run(["status"]) == 0
    assert "Nothing is installed" in capsys.readouterr().out
    assert run(["verify", str(one), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["release"], said["signed_by"]["keyid"]) == ("net", 1, KEY.public.keyid)
    for path in (one, two):
        assert run(["install", str(path), "--rehearse", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["version"]["rehearsal"] is True
    assert run(["install", str(one), "--rehearse"]) == ExitCode.INPUT
    assert "--allow-downgrade" in capsys.readouterr().err
    assert run(["install", str(two), "--rehearse", "--expect", "other"]) == ExitCode.INPUT
    assert run(["rollback", "net"]) == 0
    said = capsys.readouterr().out
    assert "release 1" in said
    assert "resvit-engine rollback" not in said  # there is nothing to go back to
    assert "install its bundle again" in said
    assert run(["status", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["installed"]
    assert (entry["running"]["release"], entry["previous"], entry["highest_release"]) == (1, None, 2)
    assert run(["status"]) == 0
    assert "(rehearsal)" in capsys.readouterr().out
    assert run(["rollback", "other"]) == ExitCode.INPUT
    assert "installed: net" in capsys.readouterr().err

    (tmp_path / "keys/release.pub").unlink()
    for command in (["verify", str(one)], ["install", str(one)]):
        assert run(command) == ExitCode.UNTRUSTED
        assert "holds no public key" in capsys.readouterr().err
    plain = bundle(tmp_path / "plain", key=None)
    assert run(["verify", str(plain), "--json"]) == ExitCode.UNTRUSTED
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit_code"] == 10
    assert "keygen" in err
