"""The examples that every command's help ends with run as they stand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from conftest import BEFORE_QUANTIZE
from resvit_export.cli.main import _COMMANDS, cli, run


def examples(command: str) -> list[str]:
    """The command lines under ``Examples`` of a command's help."""
    help_text = CliRunner().invoke(cli, [*([command] if command else []), "--help"]).output
    return re.findall(r"^\s+(resvit-export .+)$", help_text.partition("Examples:")[2], flags=re.MULTILINE)


def run_examples() -> None:
    ran = 0
    for command in ("", *_COMMANDS):
        found = examples(command)
        assert found, f"{command} --help has no examples"
        for line in found:
            assert run(shlex.split(line)[1:]) == 0, line
            ran += 1
    assert ran >= 2 * len(_COMMANDS)


@pytest.mark.whole
def test_the_examples_of_every_help_run(workspace: Path, seeded: Callable[..., str]) -> None:
    """In folders where what several examples would do alike is finished: the network's way up to its ranges."""
    seeded("runs/embed-nano")
    seeded("runs/both", "l4", "jetson-orin")
    for folder in ("runs/fused", "runs/l4-fp8", "runs/l4-fp16", "runs/searched", "runs/by-stage"):
        seeded(folder, "l4", "jetson-orin", stages=BEFORE_QUANTIZE)
    run_examples()


@pytest.mark.slow
def test_the_examples_of_every_help_run_from_nothing(workspace: Path) -> None:
    run_examples()
