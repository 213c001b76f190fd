"""``build --device``: the stage ``device`` of a run, and what it refuses before anything is copied."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from device_wheels import WHEELS
from loopback_device import loopback_device, missing
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine
from resvit_engines.remote.ssh import CONFIG_VARIABLE
from resvit_engines.remote.wheelhouse import WHEELS_VARIABLE
from resvit_engines.targets.table import find_target
from resvit_export.cli.main import run
from resvit_export.stages.device import describe, images_that_fit, require_target_there

ORIN = Machine(87, "NVIDIA Jetson AGX Orin", "10.3.0.30", "6.2", "aarch64", 32000, 50000, "3.10.12", "MAXN",
                   memory_available_mib=20000)  # fmt: skip


def test_the_right_device_is_taken() -> None:
    require_target_there(find_target("jetson-orin"), ORIN, "ssh://orin")
    require_target_there(find_target("jetson-orin"), dataclasses.replace(ORIN, jetpack="6.2.1"), "ssh://orin")


@pytest.mark.parametrize(
    ("change", "says", "fix"),
    [
        ({"sm": 110}, "11.0", "Name the target"),
        ({"sm": None, "gpu": None}, "no NVIDIA GPU", "rehearse"),
        ({"jetpack": "6.1"}, "JetPack 6.1", "--jetpack 6.1"),
        ({"jetpack": "7.2"}, "JetPack 7.2", "--jetpack 7.2"),
        ({"tensorrt": None}, "no TensorRT", "nvidia-jetpack"),
        ({"tensorrt": "10.7.0"}, "has TensorRT 10.7.0, and the bundle was made for TensorRT 10.3", "--tensorrt 10.7"),
    ],
)
def test_another_device_is_refused_at_once(change, says: str, fix: str) -> None:
    with pytest.raises(ResvitError, match=says) as caught:
        require_target_there(find_target("jetson-orin"), dataclasses.replace(ORIN, **change), "ssh://orin")
    assert fix in caught.value.fix


def test_as_many_images_go_as_fit() -> None:
    shape = [3, 224, 224]  # 0.57 MiB each
    assert images_that_fit(shape, 100, ORIN) == 100
    assert images_that_fit(shape, 5000, ORIN) == (512 << 20) // (4 * 3 * 224 * 224)
    assert images_that_fit(shape, 5000, dataclasses.replace(ORIN, memory_available_mib=400)) == 174
    assert images_that_fit(shape, 5000, dataclasses.replace(ORIN, free_disk_mib=0)) == 0


def test_a_device_is_described_in_one_line() -> None:
    line = describe(ORIN, "ssh://orin")
    assert line.startswith("ssh://orin: NVIDIA Jetson AGX Orin, JetPack 6.2, TensorRT 10.3.0.30, 20000 of 32000 MiB")
    assert "power mode MAXN" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "orin"], "begins with ssh://"),
        (["--rehearse"], "--device"),
        (["--device", "ssh://orin", "--target", "rtx-4090"], "several targets"),
    ],
)
def test_wishes_that_make_no_sense_are_refused_before_any_work(workspace: Path, capsys, arguments, says: str) -> None:
    code = run(["build", *BUILD, *arguments])
    assert code == ExitCode.INPUT
    assert says in capsys.readouterr().err
    assert not list((workspace / "runs").glob("demo/embed-nano/export*"))


BUILD = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt", "--data", "fashion-mnist",
         "--target", "jetson-orin", "--validation-images", "300", "--calibration-images", "64",
         "--optimization-level", "0", "--run", "runs/there"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_a_build_ends_on_the_device(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config" / "keys").mkdir(parents=True)
    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "config" / "keys"))
    monkeypatch.setenv(WHEELS_VARIABLE, str(WHEELS))
    with loopback_device(tmp_path / "device") as device:
        monkeypatch.setenv(CONFIG_VARIABLE, str(device.config))
        code = run(["build", *BUILD, "--device", device.address, "--rehearse", "--json"])
        told = capsys.readouterr()
        assert code in (ExitCode.OK, ExitCode.UNDECIDED), told.err
        stage = next((workspace / "runs/there").glob("device-*"))
        names = {file.name for file in stage.iterdir()}
        assert {"engine.plan", "engine.json", "build.log", "predictions.npz", "device.json"} <= names
        found = json.loads((stage / "device.json").read_text())
        assert found["rehearsal"] is True
        assert found["images"] == 300
        # ONNX Runtime answers here and there: the verdict must be the host's, image by image.
        scored = next((workspace / "runs/there").glob("score-*"))
        files = (scored / "answers.npz", stage / "predictions.npz")
        here, there = (np.load(file)["logits"] for file in files)
        assert (here.argmax(1) == there.argmax(1)).mean() > 0.98
        assert found["verdict"]["verdict"] in ("accepted", "undecided")
        assert (tmp_path / "config" / "own.key").stat().st_mode & 0o777 == 0o600
        page = (workspace / "runs/there/report.html").read_text()
        assert 'id="there"' in page
        assert "A rehearsal: TensorRT for RTX stood in" in page
        # Finished: the device is asked what it is, and nothing is done again.
        assert run(["build", *BUILD, "--device", device.address, "--rehearse"]) == code
        told = capsys.readouterr()
        assert "device: unchanged" in told.err
        assert "REHEARSAL" in told.out
