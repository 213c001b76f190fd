"""The documentation as a site, what one can type from it, and what is published."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import click
import pytest
from packaging.version import Version

from conftest import ROOT
from resvit_engines.errors import ExitCode

PAGES = (
    *("index.md", "guide.md", "tasks.md", "models.md", "device.md", "fleets.md"),
    *("errors.md", "troubleshooting.md"),
)


def commands_of(page: str) -> list[list[str]]:
    """What stands in a page's blocks of shell commands, without what a shell would do with it."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_say_to_type_is_understood(page: str) -> None:
    from resvit_engines.cli.main import cli as engine
    from resvit_export.cli.main import cli as export

    typed = [words for words in commands_of(page) if words[0] in ("resvit-export", "resvit-engine")]
    for program, name, *arguments in typed:
        group = export if program == "resvit-export" else engine
        command = group.get_command(click.Context(group), name)
        assert command is not None, name
        try:
            command.make_context(name, list(arguments))
        except click.BadParameter as error:
            assert re.match(r"(Path|File) '.*' does not exist", error.message), error.message  # noqa: PT017
    assert typed or page != "index.md"


def test_every_exit_code_has_its_cause_and_cure() -> None:
    parts = re.split(r"^## (\d+): ", (ROOT / "docs" / "errors.md").read_text(), flags=re.MULTILINE)[1:]
    told = {int(number): text for number, text in zip(parts[::2], parts[1::2], strict=True)}
    assert sorted(told) == sorted(map(int, ExitCode))
    for code, text in told.items():
        assert code == 0 or ("**Cause.**" in text and "**Cure.**" in text) or "| cause | cure |" in text, code


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(("program", "module"), [("export", "resvit_export"), ("engine", "resvit_engines.cli")])
def test_shells_complete_commands(shell: str, program: str, module: str) -> None:
    asked = {
        **os.environ,
        f"_RESVIT_{program.upper()}_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": f"resvit-{program} ver" if program == "engine" else "resvit-export bu",
        "COMP_CWORD": "1" if shell != "fish" else "bu" if program == "export" else "ver",
    }
    entry = f"from {module}.{'cli.' if program == 'export' else ''}main import main; main()"
    start = f"import sys; sys.argv = ['resvit-{program}']; {entry}"
    done = subprocess.run([sys.executable, "-c", start], env=asked, capture_output=True, text=True, check=True)
    assert ("build" if program == "export" else "verify") in done.stdout


@pytest.mark.whole
def test_the_site_is_built_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, check=False, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {page.stem for page in pages} >= {Path(name).stem for name in PAGES} | {"reference"}
    for page in pages:
        text = page.read_text()
        fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\s\">]+)", text)
        assert not fetched, (page.name, fetched)
    assert "resvit_export.api.build" in (tmp_path / "site" / "reference.html").read_text()


@pytest.mark.slow
def test_wheel_and_sdist_are_built_and_the_wheel_serves_a_new_environment(tmp_path: Path) -> None:
    pytest.importorskip("build")
    make = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    done = subprocess.run(make, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = ((tmp_path / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source:
        inside = archive.namelist()
        packed = {name.partition("/")[2] for name in source.getnames()}
    version = wheel.name.split("-")[1]
    assert str(sdist.name) == f"resvit_export-{version}.tar.gz"
    assert Version(version) >= Version("0.1.0")
    assert {"engines/runtime/CMakeLists.txt", "engines/runtime/include/resvit/runtime.hpp"} <= packed
    assert not [name for name in inside if "__pycache__" in name or name.startswith("tests")]
    modules = {name for name in inside if name.endswith((".py", ".j2", ".css", ".js"))}
    assert {name.partition("/")[2] for name in packed if name.startswith("export/")} >= {
        name for name in modules if name.startswith("resvit_export/")
    }
    # A new environment with what the device wing depends on, and nothing of this checkout.
    venv.create(tmp_path / "new", with_pip=False)
    new = tmp_path / "new" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(new), "install", "--no-index", "--no-deps", "-q", str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    libraries = next(Path(place) for place in sys.path if place.endswith("site-packages"))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(libraries), "PYTHONSAFEPATH": "1"}
    where = "import resvit_engines, resvit_export; print(resvit_engines.__file__, resvit_export.__file__)"
    shown = subprocess.run([str(new), "-c", where], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.count(str(tmp_path / "new")) == 2
    for program, word in (("resvit-export", "jetson-orin"), ("resvit-engine", "")):
        command = [str(tmp_path / "new" / "bin" / program), *(["targets", "--json"] if word else ["--help"])]
        said = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert word in said.stdout
