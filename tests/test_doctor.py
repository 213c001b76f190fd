from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resvit_export.tools import doctor
from resvit_export.tools.doctor import Check, examine


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that packages are at other versions, or (None) not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if (chosen := versions[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return chosen

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_this_environment_passes_and_the_result_is_json() -> None:
    checks = examine()
    assert [check for check in checks if check.state == "fail"] == []
    names = by_name(checks)
    for name in (
        "Python",
        "click",
        "torch",
        "ONNX Runtime self-test",
        "TensorRT for RTX library",
        "NVIDIA GPU",
        "Disk",
    ):
        assert name in names
    assert all(check.fix for check in checks if check.state == "warn")
    assert json.loads(json.dumps([check.to_json() for check in checks]))[0]["name"] == "Python"


def test_a_missing_package_and_an_old_one_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch=None, timm="0.9.1")
    names = by_name(examine())
    assert (names["torch"].state, names["torch"].found) == ("fail", "not installed")
    assert names["torch"].fix == "pip install 'resvit-export[host]'"
    assert names["timm"].state == "fail"
    assert "needs >=1.0.20" in names["timm"].found
    assert "torch and torchvision" not in names


def test_torch_and_torchvision_must_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch="2.13.1+cu130", torchvision="0.27.1")
    check = by_name(examine())["torch and torchvision"]
    assert check.state == "fail"
    assert check.fix == "pip install 'torchvision==0.28.*'"


@pytest.mark.parametrize("works", [True, False])
def test_torchvision_is_imported_and_not_only_compared(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch="2.13.0+cpu", torchvision="0.28.0")
    doctor._import_problem.cache_clear()
    program = "raise SystemExit(0)" if works else "raise RuntimeError('operator torchvision::nms does not exist')"
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(executable=sys.executable))
    real = doctor.subprocess.run
    run = lambda command, **how: real([command[0], "-c", program], **how)  # noqa: E731
    monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=run))
    (check,) = doctor._torch_pair()
    doctor._import_problem.cache_clear()
    assert check.state == ("ok" if works else "warn")
    assert ("operator torchvision::nms does not exist" in check.found) is not works
    assert ("torchvision==0.28.0" in check.fix) is not works


def test_modelopt_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, **{"nvidia-modelopt": None})
    check = by_name(examine())["ModelOpt (optional)"]
    assert check.state == "warn"
    assert "resvit-export[modelopt]" in check.fix


def test_a_broken_package_does_not_stop_the_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("libfoo.so: cannot open shared object file\nmore")

    monkeypatch.setattr("resvit_calibrate.runtime.selftest.self_test", broken)
    names = by_name(examine())
    assert names["runtime"].state == "fail"
    assert names["runtime"].found == "RuntimeError: libfoo.so: cannot open shared object file"
    assert "Disk" in names


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        ("echo 'NVIDIA L4, 580.65, 8.9, 23034 MiB'", "ok", "NVIDIA L4, driver 580.65, SM 8.9, 23034 MiB"),
        ("echo 'no devices' >&2; exit 9", "warn", "nvidia-smi fails: no devices"),
        ("sleep 5", "warn", "nvidia-smi does not answer"),
    ],
)
def test_gpu(script: str, state: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "_TIMEOUT", 0.5)
    check = by_name(examine())["NVIDIA GPU"]
    assert check.state == state
    assert check.found.startswith(found)


def test_fashion_mnist_missing_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESVIT_FASHION_MNIST", str(tmp_path))
    check = by_name(examine())["Fashion-MNIST (optional)"]
    assert check.state == "warn"
    assert "dataset-fashion-mnist" in check.fix


@pytest.mark.whole
def test_it_runs_without_torch_and_without_onnx() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'onnx', 'onnxruntime', 'jinja2', 'PIL', 'timm'):\n"
        "    sys.modules[name] = None\n"
        "import resvit_export.tools.inspect\n"
        "from resvit_export.tools.doctor import examine\n"
        "checks = examine()\n"
        "assert len(checks) > 20, checks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
