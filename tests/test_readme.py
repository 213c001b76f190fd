"""What the README says can be typed, exists and runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import BEFORE_QUANTIZE, ROOT
from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run


def run_readme() -> None:
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


@pytest.mark.whole
def test_the_commands_of_the_readme_run(workspace: Path, seeded: Callable[..., str]) -> None:
    """In folders where what several commands would do alike is finished: the network's way up to its ranges."""
    seeded("runs/embed-nano")
    for folder in ("runs/mine", "runs/both"):
        seeded(folder, "l4", "jetson-orin", stages=BEFORE_QUANTIZE)
    run_readme()


@pytest.mark.slow
def test_the_commands_of_the_readme_run_from_nothing(workspace: Path) -> None:
    run_readme()


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^make (\w+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", "--directory", str(ROOT), target], check=True, capture_output=True)


def test_every_exit_code_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for code in ExitCode:
        assert re.search(rf"^\| {int(code)} \|", text, flags=re.MULTILINE), code
