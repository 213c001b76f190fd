"""What messages tell people to type exists: every command, option and name of a file that a text spells."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import resvit_engines.cli.main
import resvit_export.cli.main

ROOT = Path(__file__).parent.parent
WINGS = ("export", "quantize", "calibrate", "engines")
PROGRAMS = {
    "resvit-export": resvit_export.cli.main.cli,
    "resvit-engine": resvit_engines.cli.main.cli,
}


class Text(NamedTuple):
    """A text of a module, with what is put into it left out."""

    place: str
    line: int
    words: str


@functools.cache
def texts() -> tuple[Text, ...]:
    return tuple(
        text
        for wing in WINGS
        for path in sorted((ROOT / wing).rglob("*.py"))
        for text in _texts_of(ast.parse(path.read_text()), str(path.relative_to(ROOT)))
    )


def _texts_of(tree: ast.Module, place: str) -> Iterator[Text]:
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and isinstance(node.body[0], ast.Expr)
    }
    # A command's own docstring is what its --help prints.
    printed = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_command") and isinstance(node.body[0], ast.Expr)
    }
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(node.values)
            words = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "\N{REPLACEMENT CHARACTER}"
                for part in node.values
            )
            yield Text(place, node.lineno, words)
    for node in ast.walk(tree):
        plain = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if plain and node not in inside and (node not in docstrings or node in printed):
            yield Text(place, node.lineno, node.value)


@functools.cache
def commands(program: str) -> dict[str, frozenset[str]]:
    """The options of each command."""
    group = PROGRAMS[program]
    context = click.Context(group)
    found = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = list(command.commands.values()) if isinstance(command, click.Group) else []
        params = [item for one in (command, *inner) for item in one.params]
        found[name] = frozenset(option for item in params for option in (*item.opts, *item.secondary_opts)) | {"--help"}
    return found


_FLAG = re.compile(r"(?<![\w/-])--[A-Za-z][A-Za-z0-9-]*")
_COMMAND = re.compile(r"(resvit-(?:export|engine)) (?:(?=-)|([a-z][a-z-]*))")
_NOT_A_COMMAND = frozenset({"that", "or", "on", "unpacked"})
"""What follows the name of a program in sentences about it."""
_FILE = re.compile(
    r"(?<![\w./\N{REPLACEMENT CHARACTER}-])[\w-]+\.(?:json|npz|npy|toml|txt|onnx|plan|pub|key|html|resvit|log|md)\b"
)
FOREIGN = {
    "trtexec": "exportLayerInfo profilingVerbosity exportProfile stronglyTyped noDataTransfers useSpinWait "
    "useCudaGraph exportTimes separateProfileRun",
    "Triton": "backend-config",
    "pip": "no-deps no-index find-links force-reinstall disable-pip-version-check no-input",
    "virtual environment": "system-site-packages",
    "venv": "system-site-packages clear",
    "apt-get": "reinstall",
    "sha256sum": "check",
    "ray start": "head",
    "date": "set",
    "benchmarks/kernels.py": "record",
}
"""Options of others' programs, each of which stands beside the program's name."""


def options(*programs: str) -> frozenset[str]:
    return frozenset(option for program in programs for found in commands(program).values() for option in found)


def sentences() -> Iterator[Text]:
    """Texts with words in them; one argument of a command line is none."""
    return (text for text in texts() if " " in text.words.strip())


def foreign(flag: str, text: Text) -> bool:
    module = (ROOT / text.place).read_text()
    return any(flag.removeprefix("--") in flags.split() and program in module for program, flags in FOREIGN.items())


@pytest.mark.whole
def test_every_command_in_a_message_exists() -> None:
    for text in texts():
        for program, name in _COMMAND.findall(text.words):
            assert not name or name in commands(program) or name in _NOT_A_COMMAND, text


@pytest.mark.whole
def test_every_option_in_a_message_exists_where_it_is_printed() -> None:
    """In the command that the message names, in that of its module, else in the program that has the wing."""
    checked = 0
    for text in sentences():
        wing = text.place.partition("/")[0]
        known = options(*PROGRAMS) if wing == "engines" or "resvit-engine" in text.words else options("resvit-export")
        for match in _FLAG.finditer(text.words):
            if match[0].endswith("-") or foreign(match[0], text):  # the rest is put in
                continue
            named = [*_COMMAND.finditer(text.words, 0, match.start())]
            behind = named and not re.search(r"[\n.;`'\"]", text.words[named[-1].end() : match.start()])
            program, name = named[-1].groups() if behind else ("", "")
            assert match[0] in (commands(program)[name] if name in commands(program or "resvit-export") else known), (
                text
            )
            checked += 1
    assert checked > 150


@pytest.mark.whole
def test_messages_of_a_command_name_its_own_options() -> None:
    for program, group in PROGRAMS.items():
        context = click.Context(group)
        for name in commands(program):
            command = group.get_command(context, name)
            assert command is not None
            assert command.callback is not None
            place = command.callback.__module__.replace(".", "/")
            same = [other for other in commands(program) if _module(group, other) == command.callback.__module__]
            own = frozenset().union(*(commands(program)[other] for other in same))
            for text in sentences():
                if text.place.endswith(f"{place}.py") and not _COMMAND.search(text.words):
                    flags = {flag for flag in _FLAG.findall(text.words) if not foreign(flag, text)}
                    others = [other for other in commands(program) if re.search(rf"\b{other}\b", text.words)]
                    known = own.union(*(commands(program)[other] for other in others))
                    assert flags <= known, (text, sorted(flags - known))


def _module(group: click.Group, name: str) -> str:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert command.callback is not None
    return command.callback.__module__


@functools.cache
def written_names() -> str:
    """All that the product itself reads, writes or documents, in one text."""
    names = [text.words for text in texts() if " " not in text.words]
    return "\n".join([*names, *(path.name for path in ROOT.rglob("*.md") if ".venv" not in path.parts)])


_EXAMPLE = re.compile(
    r"(?:FILE|KEY|NAME|ROOT|table|logits|images|release|root|net|net-[\w-]+|model-[\w-]+|keys-\d|fleet|sweep)\.\w+"
    r"|CMakeLists\.txt"
)


@pytest.mark.whole
def test_every_file_in_a_message_is_one_of_the_products_or_plainly_an_example() -> None:
    known = written_names()
    for text in sentences():
        for name in _FILE.findall(text.words):
            assert _EXAMPLE.fullmatch(name) or name in known, (text, name)


@pytest.mark.whole
def test_every_part_of_the_repository_in_a_message_is_there() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for text in texts():
        for extra in re.findall(r"resvit-export\[(\w+)\]", text.words):
            assert f"\n{extra} = [" in project, text
        for path in re.findall(r"(?<![\w/])(?:docs|examples|benchmarks)/[\w/.-]+", text.words):
            assert (ROOT / path.rstrip(".")).exists(), text
