"""What the README says can be typed, exists and runs."""

from __future__ import annotations

import re
import subprocess

from conftest import ROOT
from resvit_engines.errors import ExitCode


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^make (\w+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", "--directory", str(ROOT), target], check=True, capture_output=True)


def test_every_exit_code_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for code in ExitCode:
        assert re.search(rf"^\| {int(code)} \|", text, flags=re.MULTILINE), code
