"""The examples of every command's help, and the README's commands, run as they stand, on a smaller network."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from resvit_engines.errors import ExitCode
from resvit_export.cli.main import _COMMANDS, cli, run

README = Path(__file__).parents[1] / "README.md"


def small(line: str) -> str:
    """The line with the nano network, whose trained weights the tests have, for the demo's."""
    return line.replace("embed-mini", "embed-nano")


def examples(command: str) -> list[str]:
    """The command lines under ``Examples`` of a command's help."""
    help_text = CliRunner().invoke(cli, [*([command] if command else []), "--help"]).output
    lines = re.findall(r"^\s+(resvit-export .+)$", help_text.partition("Examples:")[2], flags=re.MULTILINE)
    return [small(line) for line in lines]


def readme() -> list[str]:
    """The command lines of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return [small(line) for block in blocks for line in block.splitlines() if line.startswith("resvit-export")]


def test_there_are_examples_of_every_command() -> None:
    assert all(len(examples(command)) >= 1 for command in ("", *_COMMANDS))
    assert sum(len(examples(command)) for command in ("", *_COMMANDS)) >= 2 * len(_COMMANDS)
    assert len(readme()) >= 12


LINES = dict.fromkeys([*readme(), *(line for command in ("", *_COMMANDS) for line in examples(command))])


@pytest.mark.parametrize("line", [line for line in LINES if "--help" not in line])
def test_a_command_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name, an option or a choice that is not there is a usage error before anything runs."""
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r"--run (\S+)", line):
        (tmp_path / folder).mkdir(parents=True)
    name, *arguments = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    command.make_context(name, arguments).close()


SWEEP = """targets = ["jetson-orin"]
precisions = ["fp16"]

[models.nano]
model = { name = "resvit:embed-nano", checkpoint = "runs/demo/embed-nano.pt" }

[recipe]
data = { images = "fashion-mnist", validation_images = 600, calibration_images = 64 }
"""


def write_openssf_key(path: Path) -> None:
    """A private EC key in PEM."""
    secret = generate_private_key(SECP256R1())
    form = serialization.PrivateFormat.TraditionalOpenSSL
    path.write_bytes(secret.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


@pytest.mark.slow
def test_the_examples_of_every_help_run(workspace: Path) -> None:
    Path("sweep.toml").write_text(SWEEP)
    for command in ("", *_COMMANDS):
        for line in examples(command):
            if "inspect model.onnx" in line:
                shutil.copy(next(Path("runs/by-stage").glob("export-*/model.onnx")), "model.onnx")
            if "--openssf" in line:
                write_openssf_key(Path("runs/openssf.pem"))
            # What serves an engine of TensorRT's says so of a bundle without one: that is made where the GPU is.
            without_engine = line.startswith(("resvit-export serve-config triton", "resvit-export serve-config deep"))
            expected = ExitCode.IMPOSSIBLE if without_engine else 0
            assert run(shlex.split(line)[1:]) == expected, line


@pytest.mark.slow
def test_the_commands_of_the_readme_run(workspace: Path) -> None:
    for line in readme():
        assert run(shlex.split(line)[1:]) == 0, line
