"""What a fleet asks of a device: whose it is, whether it is well, and to go back from one version alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resvit_engines.cli.main import run
from resvit_engines.errors import ExitCode
from resvit_engines.install.claim import claim, claimed, release
from resvit_engines.install.install import rollback
from test_install import Device, bundle, refused
from test_signing import TRUST

HERE, THERE = "a" * 32, "b" * 32


def test_one_fleet_at_a_time(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert claimed(root) is None
    first = claim(root, "cameras", HERE, "ssh://a")
    assert claim(root, "cameras", HERE, "ssh://a") == first == claimed(root), "as often as it likes"
    said = refused(claim, root, "robots", THERE, "ssh://b", code=ExitCode.INPUT)
    assert "claimed by the fleet cameras" in said
    assert "which calls it ssh://a" in said
    assert "another state of this fleet" in refused(claim, root, "cameras", THERE, "ssh://a", code=ExitCode.INPUT)
    assert "is the same device as ssh://a" in refused(claim, root, "cameras", HERE, "ssh://b", code=ExitCode.INPUT)
    assert claim(root, "robots", THERE, "ssh://b", take_over=True).fleet == "robots"
    assert release(root) is not None
    assert release(root) is None
    claim(root, "cameras", HERE, "ssh://a")


def test_giving_up_makes_nothing(tmp_path: Path) -> None:
    assert release(tmp_path / "nothing") is None
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("data", [b"", b"[]", b'{"fleet": "x"}', b'{"fleet": "\\u001b", "holder": 1}'])
def test_a_claim_that_does_not_read_is_told_and_taken_away(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".fleet.json").write_bytes(data)
    refused(claimed, tmp_path, code=ExitCode.INPUT)
    refused(claim, tmp_path, "cameras", HERE, "ssh://a", code=ExitCode.INPUT)
    release(tmp_path)
    assert claim(tmp_path, "cameras", HERE, "ssh://a").fleet == "cameras"


@pytest.mark.parametrize(
    ("fleet", "holder", "device"), [("x" * 101, HERE, "a"), ("x", "a", "a"), ("x", HERE, "a\nb"), ("\x1b", HERE, "a")]
)
def test_claims_that_are_none(tmp_path: Path, fleet: str, holder: str, device: str) -> None:
    refused(claim, tmp_path, fleet, holder, device, code=ExitCode.INPUT)
    assert claimed(tmp_path) is None


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_command_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(tmp_path / "root")]
    assert told(capsys, "claim", *root) == {"claim": None, "was": None}
    made = told(capsys, "claim", "--fleet", "cameras", "--holder", HERE, "--device", "ssh://a", *root)
    assert made["claim"]["fleet"] == "cameras"
    assert run(["claim", *root]) == 0
    assert "The fleet cameras has this device" in capsys.readouterr().out
    assert "three parts" in told(capsys, "claim", "--fleet", "x", *root, code=ExitCode.INPUT)["error"]["problem"]
    both = told(capsys, "claim", "--release", "--take-over", *root, code=ExitCode.INPUT)
    assert "Say one of both" in both["error"]["fix"]
    assert told(capsys, "claim", "--release", *root)["was"]["holder"] == HERE
    assert run(["claim", "--release", *root]) == 0
    assert "No fleet" in capsys.readouterr().out


def test_going_back_from_one_version_alone(tmp_path: Path) -> None:
    device = Device(tmp_path / "root")
    device.install(bundle(tmp_path / "1", b"one"))
    device.install(bundle(tmp_path / "2", b"two", release=2))
    third = device.install(bundle(tmp_path / "3", b"three", release=3)).version

    def back(leave: str) -> str:
        return rollback(device.root, "net", TRUST, check=device.check, leave=leave).version.digest

    assert back("0" * 64) == third.digest, "another version runs: nothing is done"
    assert device.runs() == b"three"
    second = back(third.digest)
    assert device.runs() == b"two"
    assert back(third.digest) == second, "asked again, it goes no further back"
    assert device.runs() == b"two"


@pytest.mark.whole
def test_health_of_what_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from test_fleet_ssh import NAME, made

    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "release.pub"))
    root = ["--root", str(tmp_path / "root")]
    path = made(tmp_path, 4)
    none = told(capsys, "health", NAME, *root, code=ExitCode.INPUT)
    assert "not installed" in none["error"]["problem"]
    told(capsys, "install", str(path), *root)
    well = told(capsys, "health", NAME, "--seconds", "0.1", *root)
    assert (well["release"], well["golden"]["images"]) == (4, 4)
    assert well["latency_ms"] > 0
    some = told(capsys, "health", NAME, "--no-golden", "--seconds", "0", *root)
    assert (some["golden"], some["latency_ms"], some["digest"]) == (None, None, well["digest"])
    assert run(["health", NAME, "--seconds", "0.1", *root]) == 0
    assert "the median" in capsys.readouterr().out
    model = tmp_path / "root" / NAME / "current" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    told(capsys, "health", NAME, *root, code=ExitCode.UNTRUSTED)
