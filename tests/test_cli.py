from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from resvit_engines.errors import ExitCode
from resvit_export.cli.main import _COMMANDS, run

HEAVY = {"torch", "onnx", "onnxruntime", "timm", "onnx_ir", "PIL", "modelopt", "jinja2"}


def examples(command: str) -> list[str]:
    help_text = subprocess.run(
        [sys.executable, "-m", "resvit_export", *([command] if command else []), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "400", "PATH": "/usr/bin:/bin"},
    ).stdout
    return re.findall(r"^\s+(resvit-export .+)$", help_text.partition("Examples:")[2], flags=re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], *([name] for name in _COMMANDS)])
def test_help_comes_up_without_heavy_imports(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom resvit_export.cli.main import run\n"
        f"code = run({[*arguments, '--help']!r})\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout


def test_the_examples_of_every_help_run(workspace: Path) -> None:
    ran = 0
    for command in ("", *_COMMANDS):
        found = examples(command)
        assert found, f"{command} --help has no examples"
        for line in found:
            assert run(shlex.split(line)[1:]) == 0, line
            ran += 1
    assert ran >= 2 * len(_COMMANDS)


def test_the_commands_of_the_readme_run(workspace: Path) -> None:
    text = (ROOT / "README.md").read_text()
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
        if line.startswith("resvit-export")
    ]
    assert len(lines) >= 12
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, line


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^make (\w+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", "--directory", str(ROOT), target], check=True, capture_output=True)


def test_every_exit_code_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for code in ExitCode:
        assert re.search(rf"^\| {int(code)} \|", text, flags=re.MULTILINE), code


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("biuld", ExitCode.USAGE, "Did you mean 'build'"),
        ("build --precison int8", ExitCode.USAGE, "--precision"),
        ("build --target jetson-orin", ExitCode.INPUT, "--model"),
        ("build --model resvit:embed-nano --data fashion-mnist", ExitCode.INPUT, "--target"),
        ("build --model resvit:embed-nano --target l4", ExitCode.INPUT, "--data"),
        (
            "build --model resvit:embed-nano --target jetson-orni --data fashion-mnist",
            ExitCode.IMPOSSIBLE,
            "jetson-orin",
        ),
        ("build --model a --target jetson-orin --precision fp8 --data b", ExitCode.IMPOSSIBLE, "int8"),
        ("build --model a --target jetson-orin --jetpack 5.1 --data b", ExitCode.IMPOSSIBLE, "6.2"),
        ("build --model a --target jetson-orin --jetpack 6.0 --data b", ExitCode.IMPOSSIBLE, "6.2"),
        ("build --model resvit:embed-nano --target l4 --data fashionmnist", ExitCode.INPUT, "'fashionmnist' does not"),
        ("fold --model timm:vit_small_r26_s32_24", ExitCode.INPUT, "vit_small_r26_s32_224"),
        ("fold --model resvit:embed-nanno", ExitCode.INPUT, "embed-nano"),
        ("fold --model nowhere.onnx", ExitCode.INPUT, "export"),
        ("export --model nowhere.onnx", ExitCode.INPUT, "nowhere.onnx"),
        ("export --model nowhere.pt2", ExitCode.INPUT, "nowhere.pt2"),
        ("fold --model resvit:embed-nano --checkpoint gone.pt", ExitCode.INPUT, "gone.pt"),
        ("fold --model no.such.module:make", ExitCode.INPUT, "no.such.module"),
        ("fold --model resvit:embed-nano --model-arg image_size", ExitCode.INPUT, "KEY=VALUE"),
        ("inspect gone.onnx", ExitCode.INPUT, "gone.onnx"),
        ("report --model resvit:embed-nano --data fashion-mnist --target l4", ExitCode.INPUT, "nothing to report"),
    ],
)
def test_mistakes_get_a_sentence_and_a_code(
    line: str,
    code: ExitCode,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line.split()) == code
    said = capfd.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err


def test_impossible_wishes_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("build --model a --target jetson-orin --precision fp8 --data b".split()) == ExitCode.IMPOSSIBLE
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["build", "--model", "a", "--target", "orin", "--data", "b", "--json"]) == ExitCode.IMPOSSIBLE
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == ExitCode.IMPOSSIBLE
    assert "jetson-orin" in error["fix"]


def test_targets_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["targets", "--json"]) == 0
    targets = {item["name"]: item for item in json.loads(capsys.readouterr().out)["targets"]}
    assert targets["jetson-orin"]["sm"] == 87
    assert "fp8" not in targets["jetson-orin"]["precisions"]
    assert "fp8" in targets["l4"]["precisions"]


def test_a_plain_install_says_which_extra_is_missing(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'PIL', 'tomli_w'):\n    sys.modules[name] = None\n"
        "from resvit_export.cli.main import run\n"
        "sys.exit(run(['fold', '--model', 'resvit:embed-nano']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.MISSING, done.stderr
    assert "resvit-export[host]" in done.stderr
