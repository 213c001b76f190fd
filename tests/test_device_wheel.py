"""The slim wheel for devices."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from resvit_engines.errors import ExitCode
from resvit_engines.machine import Machine
from resvit_engines.remote.wheel import GPU_REQUIREMENTS, REQUIREMENTS, pip_platforms, write_device_wheel
from resvit_engines.remote.wheelhouse import device_environment, missing_requirements, needed
from resvit_export.cli.main import run

pytestmark = pytest.mark.whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_device_wheel(tmp_path / "a"), write_device_wheel(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 2 << 20


def test_it_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(write_device_wheel(tmp_path)) as wheel:
        names = set(wheel.namelist())
    sources = ROOT / "engines/resvit_engines"
    modules = {f"resvit_engines/{file.relative_to(sources).as_posix()}" for file in sources.rglob("*.py")}
    assert modules <= names
    others = {name.removeprefix("resvit_engines/") for name in names - modules if ".dist-info/" not in name}
    # The source of the plugin library is compiled on the device; what kernels took is read there, too.
    source = {f"plugin_source/{file.name}" for file in (ROOT / "engines/plugin").iterdir()}
    assert "plugin_source/resvit_plugins.cpp" in source
    assert others == {"py.typed", "kernels/measure/measured.json", *source}


def test_it_requires_what_the_project_requires_of_a_device() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(REQUIREMENTS) == sorted(project["dependencies"])
    # A device's driver may be of CUDA 12; PyTorch on a workstation brings the next version.
    lowest = [text.partition(",")[0] for text in project["optional-dependencies"]["device"]]
    assert [text.partition(",")[0] for text in GPU_REQUIREMENTS] == lowest
    assert all(text.endswith(",<13") for text in GPU_REQUIREMENTS)
    assert not any(word in " ".join(REQUIREMENTS) for word in ("torch", "onnx"))


def test_pip_installs_it_with_its_command(tmp_path: Path) -> None:
    wheel = write_device_wheel(tmp_path)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, capture_output=True, check=True)
    assert (tmp_path / "venv/bin/resvit-engine").exists()
    assert list(Path(target).glob("resvit_engines-*.dist-info"))
    done = subprocess.run(
        [python, "-m", "resvit_engines.machine"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert '"arch"' in done.stdout


def test_facts_are_read_from_the_wheel_before_anything_is_installed(tmp_path: Path) -> None:
    wheel = write_device_wheel(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import resvit_engines.machine as m; print(m.__file__); m.main()"  # noqa: E501
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(wheel))


def test_platforms_that_a_jetson_takes() -> None:
    tags = pip_platforms("aarch64", "2.35")
    assert tags[0] == "manylinux_2_35_aarch64"
    assert tags[-2:] == ("manylinux_2_17_aarch64", "manylinux2014_aarch64")
    assert pip_platforms("aarch64", None) == ("manylinux_2_17_aarch64", "manylinux2014_aarch64")


def test_conditions_are_those_of_the_device_and_not_of_this_python(tmp_path: Path) -> None:
    orin = Machine(87, None, None, "6.2", "aarch64", 1, 1, "3.10.12")
    thor = Machine(110, None, None, "7.1", "aarch64", 1, 1, "3.12.3")
    assert "tomli>=2.0" in needed(REQUIREMENTS, device_environment(orin))
    assert "tomli>=2.0" not in needed(REQUIREMENTS, device_environment(thor))
    with zipfile.ZipFile(tmp_path / "Some_Thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "Some_Thing-1.0.dist-info/METADATA",
            "Name: Some_Thing\nRequires-Dist: some.thing; python_version < '4'\n"
            "Requires-Dist: other>=2; python_full_version < '3.11'\nRequires-Dist: never; extra == 'x'\n\nbody\n",
        )
    assert missing_requirements(tmp_path, device_environment(orin)) == ["other>=2"]
    assert missing_requirements(tmp_path, device_environment(thor)) == []


def test_the_command_writes_it_and_fetches_for_a_jetson(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Machine] = []
    monkeypatch.setattr("resvit_engines.remote.wheelhouse.download_wheels", lambda facts, folder: asked.append(facts))
    assert run(["wheel", str(tmp_path / "out"), "--target", "jetson-orin", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wheels"] == [Path(found["wheel"]).name]
    assert [(facts.arch, facts.python, facts.libc, facts.sm) for facts in asked] == [("aarch64", "3.10", "2.35", 87)]
    assert run(["wheel", str(tmp_path / "out"), "--target", "jetson-thor", "--jetpack", "7.2"]) == 0
    assert asked[-1].python == "3.12"
    assert "--no-index --find-links out" in capsys.readouterr().out
    assert run(["wheel", str(tmp_path / "out"), "--target", "l4"]) == ExitCode.IMPOSSIBLE
