from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError, EncodeError

from resvit_engines.console import run_command
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import refused
from resvit_export.cli.main import _COMMANDS, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAVY = {"torch", "onnx", "onnxruntime", "timm", "onnx_ir", "PIL", "modelopt", "jinja2"}


@pytest.fixture(scope="module")
def helps() -> dict[str, dict[str, object]]:
    """What each ``--help`` ends with and prints, and the heavy imports that are there by then; all in one process."""
    script = (
        "import contextlib, io, json, sys\n"
        "from resvit_export.cli.main import run\n"
        "found = {}\n"
        f"for name in {['', *_COMMANDS]!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "        code = run([*([name] if name else []), '--help'])\n"
        f"    heavy = sorted({HEAVY!r} & set(sys.modules))\n"
        "    found[name] = {'code': code, 'heavy': heavy, 'text': said.getvalue()}\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.whole
def test_what_people_type_is_there() -> None:
    """The declared commands are functions of this tree, and one of them is run as the installer writes it."""
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"resvit-export", "resvit-engine"}
    for script in scripts.values():
        module, name = script.split(":")
        code = f"import sys; sys.argv = ['x', '--version']; from {module} import {name}; sys.exit({name}())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script


@pytest.mark.whole
@pytest.mark.parametrize("command", ["", *_COMMANDS])
def test_help_comes_up_without_heavy_imports(command: str, helps: dict[str, dict[str, object]]) -> None:
    found = helps[command]
    assert (found["code"], found["heavy"]) == (0, [])
    assert "Examples:" in str(found["text"])


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("biuld", ExitCode.USAGE, "Did you mean 'build'"),
        ("deploy", ExitCode.USAGE, "The commands are: build, "),
        ("build --precison int8", ExitCode.USAGE, "--precision"),
        ("validate .", ExitCode.USAGE, "Did you mean --data .?"),
        ("build --preprocess mean=0.5 std=0.5", ExitCode.USAGE, "Did you mean --preprocess std=0.5?"),
        ("build --preprocess mean=0.5 std=0.5 x=1", ExitCode.USAGE, 'Did you mean --preprocess "std=0.5 x=1"?'),
        ("build --target l4 std=0.5", ExitCode.USAGE, "Every setting is an option of its own."),
        ("validate network.onnx", ExitCode.USAGE, "Did you mean --model network.onnx?"),
        ("validate weights.pth", ExitCode.USAGE, "Did you mean --checkpoint weights.pth?"),
        ("validate int8 fast", ExitCode.USAGE, "validate --help"),
        ("doctor weights.pth", ExitCode.USAGE, "doctor --help"),
        ("build --target jetson-orin", ExitCode.INPUT, "--model"),
        ("build --model resvit:embed-nano --data fashion-mnist", ExitCode.INPUT, "--target"),
        ("build --model resvit:embed-nano --target rtx-4090", ExitCode.INPUT, "--data"),
        (
            "build --model resvit:embed-nano --target jetson-orni --data fashion-mnist",
            ExitCode.IMPOSSIBLE,
            "jetson-orin",
        ),
        ("build --model a --target jetson-orin --precision fp8 --data b", ExitCode.IMPOSSIBLE, "int8"),
        ("build --model a --target jetson-orin --jetpack 5.1 --data b", ExitCode.IMPOSSIBLE, "6.2"),
        ("build --model a --target jetson-orin --jetpack 6.0 --data b", ExitCode.IMPOSSIBLE, "6.2"),
        (
            "build --model resvit:embed-nano --target rtx-4090 --data fashionmnist",
            ExitCode.INPUT,
            "'fashionmnist' does not",
        ),
        ("fold --model timm:vit_small_r26_s32_24", ExitCode.INPUT, "vit_small_r26_s32_224"),
        ("fold --model resvit:embed-nanno", ExitCode.INPUT, "embed-nano"),
        ("fold --model nowhere.onnx", ExitCode.INPUT, "export"),
        ("export --model nowhere.onnx", ExitCode.INPUT, "nowhere.onnx"),
        ("export --model nowhere.pt2", ExitCode.INPUT, "nowhere.pt2"),
        ("fold --model resvit:embed-nano --checkpoint gone.pt", ExitCode.INPUT, "gone.pt"),
        ("fold --model no.such.module:make", ExitCode.INPUT, "no.such.module"),
        ("fold --model resvit:embed-nano --model-arg image_size", ExitCode.INPUT, "KEY=VALUE"),
        ("inspect gone.onnx", ExitCode.INPUT, "gone.onnx"),
        (
            "report --model resvit:embed-nano --data fashion-mnist --target rtx-4090",
            ExitCode.INPUT,
            "nothing to report",
        ),
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


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_whatever_the_system_refuses_is_named_with_a_remedy(number: int) -> None:
    told = refused(OSError(number, os.strerror(number), "some/file"))
    assert "some/file" in told.problem
    assert "[Errno" not in told.problem
    assert told.fix
    assert told.code == ExitCode.SYSTEM
    assert "[Errno" not in refused(OSError(number, os.strerror(number))).problem


def numpy_runs_out() -> None:
    np.empty(1 << 50)


def torch_runs_out() -> None:
    torch.empty(1 << 50)


def protobuf_runs_out() -> None:
    try:
        raise DecodeError("Error parsing message with type 'onnx.ModelProto': Arena alloc failed")
    except DecodeError as error:
        raise ValueError("the file is none") from error


def protobuf_runs_out_writing() -> None:
    raise EncodeError("Failed to serialize proto")


@pytest.mark.parametrize("runs_out", [torch_runs_out, protobuf_runs_out, protobuf_runs_out_writing])
def test_a_want_of_memory_that_nobody_told_is_no_bug(
    runs_out: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    group = click.Group(commands={"read": click.Command("read", callback=runs_out)})
    assert run_command(group, "tool", ["read"], missing="") == ExitCode.SYSTEM
    assert "Memory ran out: " in capsys.readouterr().err


@pytest.mark.parametrize("runs_out", [numpy_runs_out, torch_runs_out, protobuf_runs_out])
def test_a_want_of_memory_is_no_fault_of_the_file(
    runs_out: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def read() -> None:
        try:
            runs_out()
        except Exception as error:
            raise ResvitError("m.onnx cannot be read.", "Export it again.") from error

    group = click.Group(commands={"read": read})
    assert run_command(group, "tool", ["read"], missing="") == ExitCode.SYSTEM
    said = capsys.readouterr().err
    assert "Memory ran out: m.onnx cannot be read." in said
    assert "a machine with more memory" in said


@pytest.mark.parametrize("caught", [False, True])
def test_an_interrupt_that_a_library_renames_is_one(caught: bool, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def read() -> None:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                raise ImportError("initialization failed") from error
        except ImportError as error:
            if caught:
                raise ResvitError("ONNX Runtime is not installed.", "Install it.", ExitCode.MISSING) from error
            raise

    group = click.Group(commands={"read": read})
    assert run_command(group, "tool", ["read"], missing="") == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.startswith("error: Interrupted.")


def test_an_error_that_says_what_was_interrupted_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def build() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ResvitError("The build was interrupted.", "Again.", ExitCode.INTERRUPTED) from None

    group = click.Group(commands={"build": build})
    assert run_command(group, "tool", ["build"], missing="") == ExitCode.INTERRUPTED
    assert "The build was interrupted." in capsys.readouterr().err


def test_errors_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["build", "--model", "a", "--target", "orin", "--data", "b", "--json"]) == ExitCode.IMPOSSIBLE
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == ExitCode.IMPOSSIBLE
    assert "jetson-orin" in error["fix"]
    assert run(["build", "--precison", "int8", "--json"]) == ExitCode.USAGE
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == ExitCode.USAGE
    assert "--precison" in error["problem"]


def test_targets_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["targets", "--json"]) == 0
    targets = {item["name"]: item for item in json.loads(capsys.readouterr().out)["targets"]}
    assert targets["jetson-orin"]["sm"] == 87
    assert "fp8" not in targets["jetson-orin"]["precisions"]
    assert "fp8" in targets["rtx-4090"]["precisions"]


@pytest.mark.whole
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
