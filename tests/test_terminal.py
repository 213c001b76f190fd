"""Nothing that files, devices or libraries call themselves commands a terminal, whatever its encoding is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_engines.console import console, emit_json, run_command, table
from resvit_engines.errors import ResvitError, one_line, printable
from resvit_engines.progress import Lines, Quiet, Terminal
from resvit_engines.terminal import CleanStream, clean_streams

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202eb\r\x00\x7f\u2028\udcffé→"
ANY = st.text(st.characters(exclude_categories=()))


def commands(text: str, but: str = "") -> list[str]:
    """The characters of a text that a terminal acts on, or that turn others round."""
    turned = "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()
    return [
        mark
        for mark in text
        if mark not in but
        and (unicodedata.category(mark) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(mark) in turned)
    ]


@given(ANY)
@settings(deadline=None)
def test_a_line_is_one_line_and_commands_nothing(text: str) -> None:
    assert commands(one_line(text)) == []
    assert commands(printable(text), but="\n\t") == []
    assert printable(printable(text)) == printable(text)


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs", "M"])))
def test_what_is_text_stays(text: str) -> None:
    assert one_line(text) == text


@pytest.mark.whole
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp437"])
@given(text=ANY)
@settings(deadline=None)
def test_every_way_to_print_is_clean_in_every_encoding(encoding: str, text: str) -> None:
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    before = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = written
    try:
        Lines().say(text)
        Quiet().warn(text)
        Terminal().say(text)
        list(Terminal().track(range(2), text, 2))
        with clean_streams():
            click.echo(text)
            sys.stderr.write(text)
            console().print(table(text.replace("[", "("), ["a"], [[text]]))
            emit_json({text: text})
    finally:
        sys.stdout, sys.stderr = before
    written.flush()
    said = written.detach().getvalue().decode(encoding)
    assert commands(said, but="\n\t") == []


def test_colours_and_lines_of_our_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", screen)
    with clean_streams():
        console().print("[bold green]accepted[/bold green] \x1b[31m\nnext")
    assert "\x1b[1;32maccepted\x1b[0m \\x1b" in screen.getvalue()
    assert "\nnext" in screen.getvalue()


def test_an_error_has_its_own_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def fails(as_json: bool) -> None:
        raise ResvitError(f"It is {HOSTILE}\nerror: none", "Nothing\naccepted")

    assert run_command(fails, "p", ["--json"], missing="") == 3
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if not line.startswith(" ")] == [said.err.splitlines()[0]]
    assert commands(said.err + said.out, but="\n") == []
    assert json.loads(said.out)["error"]["problem"] == f"It is {printable(HOSTILE)}\nerror: none"


@pytest.mark.whole
@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_help_and_errors_on_a_terminal_that_is_not_utf8(variables: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **variables}
    name = os.fsdecode(b"n\xffa\x1b[31m\xe2\x86\x92")
    for arguments, code in ((["--help"], 0), (["inspect", name], 3), (["audit", "--layers", name, "--onnx", name], 3)):
        done = subprocess.run(
            [sys.executable, "-m", "resvit_export", *arguments],
            capture_output=True,
            env=environment,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert b"\x1b" not in done.stdout + done.stderr
        assert b"Unicode" not in done.stderr


@pytest.mark.whole
def test_nobody_reads(tmp_path: Path) -> None:
    for arguments in (["targets"], ["targets", "--json"], ["--help"]):
        command = [sys.executable, "-m", "resvit_export", *arguments]
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_clean_stream_is_wrapped_once() -> None:
    with clean_streams():
        first = sys.stdout
        with clean_streams():
            assert sys.stdout is first
        assert isinstance(first, CleanStream)
    assert not isinstance(sys.stdout, CleanStream)


def test_a_closed_stream_is_no_terminal() -> None:
    """Libraries that colour output ask at exit, when what is behind may be closed."""
    behind = io.StringIO()
    behind.close()
    assert not CleanStream(behind).isatty()
