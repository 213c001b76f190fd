"""Does the suite notice a bug? Each of ``mutation_cases`` is made in a copy of the tree, and its tests are run there.

    python benchmarks/mutations.py
    python benchmarks/mutations.py --only gate --only search --whole

The tree itself is never touched. A bug is caught where a test fails with it and passes without it: a test that fails
anyway proves nothing, and is left out and named. Only the test files that should notice are run, one after the other,
until one does; with ``--whole`` the whole suite has the last word on what they miss. A run over all of them writes
``results/mutations.md``, which lists those that no test noticed like the others: each is a test to write.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from machine import RESULTS, describe_machine
from mutation_cases import MUTATIONS, Mutation

from resvit_engines.errors import ResvitError
from resvit_export.models.training.errors import spoken_errors

ROOT = Path(__file__).resolve().parent.parent
WINGS = ("export", "quantize", "calibrate", "engines")
LINKED = ("data", ".venv")
"""What tests read and nobody changes: too large to copy."""
_LEFT_OUT = (".git", ".*_cache", ".hypothesis", "__pycache__", "runs", "dist", "build", *LINKED)
_NOTHING_LEFT = 5
"""How pytest ends where all tests are left out."""
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """The first test that fails with a mutation and not without it; empty where there is none."""

    mutation: Mutation
    test: str


def copied(tree: Path, into: Path) -> Path:
    """Copy everything that tests need into the folder ``into``, which must not be there yet."""
    top = {name: (tree / name).absolute() for name in LINKED if (tree / name).exists()}

    def ignored(folder: str, names: list[str]) -> set[str]:
        # Of a package that happens to be called `data` or `build`, nothing is left out.
        kept = () if Path(folder) == tree else ("runs", "dist", "build", "data")
        return set(shutil.ignore_patterns(*(name for name in _LEFT_OUT if name not in kept))(folder, names))

    shutil.copytree(tree, into, ignore=ignored)
    for name, place in top.items():
        (into / name).symlink_to(place)
    return into


def mutated(tree: Path, mutation: Mutation) -> str:
    """The text of the file with the bug in it; raises ``ResvitError`` where the old text isn't there exactly once."""
    path = tree / mutation.file
    if not path.is_file():
        raise ResvitError(
            f"There is no {mutation.file}.", "It was moved: say where it is now in benchmarks/mutation_cases.py."
        )
    text = path.read_text()
    if (found := text.count(mutation.old)) != 1:
        raise ResvitError(
            f"{mutation.file} has {found} times, not once: {mutation.old.strip()!r}.",
            "The code has changed: write the same mistake for it in benchmarks/mutation_cases.py.",
        )
    return text.replace(mutation.old, mutation.new)


@contextmanager
def applied(mutation: Mutation, tree: Path) -> Iterator[None]:
    """Within the block the file in ``tree`` has the bug; afterwards it is as it was."""
    path, broken = tree / mutation.file, mutated(tree, mutation)
    before = path.read_bytes()
    path.write_text(broken)
    try:
        yield
    finally:
        path.write_bytes(before)


def failing(tree: Path, tests: Sequence[str], without: Collection[str] = ()) -> str:
    """The first of ``tests`` (files or test ids) that fails in ``tree``, ``without`` some; empty where none does.

    Raises ``ResvitError`` where pytest finds no test, or ends in some other way than with a result.
    """
    path = os.pathsep.join(str(tree / wing) for wing in WINGS)
    # Compiled files are told apart by the second and the size of their source: a bug has neither of its own.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    left_out = [f"--deselect={test}" for test in sorted(without)]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *left_out, *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0 or (without and done.returncode == _NOTHING_LEFT):
        return ""
    failed = _FAILED.search(done.stdout)
    if failed is None:
        said = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise ResvitError(
            f"pytest ended with {done.returncode} and no failed test: {''.join(said)}.", f"Run it: {' '.join(command)}"
        )
    return failed[1]


def caught_by(mutation: Mutation, tree: Path, anyway: set[str], *, whole: bool = False) -> str:
    """The test in ``tree`` that notices the mutation; empty where none of its own does, nor any with ``whole``.

    ``anyway`` are tests that fail without any mutation: they prove nothing, are left out, and grow by those found.
    """
    for tests in (*([file] for file in mutation.tests), *([["tests"]] if whole else [])):
        while True:
            with applied(mutation, tree):
                found = failing(tree, tests, anyway)
            if not found:
                break
            if found in anyway:
                raise ResvitError(f"{found} cannot be left out: it isn't even collected.", "Mend that file first.")
            if not failing(tree, [found]):
                return found
            anyway.add(found)
    return ""


def table(findings: Sequence[Finding], anyway: Collection[str]) -> str:
    """Markdown with one row for each mutation, the tests that fail ``anyway``, and the machine."""
    machine = describe_machine()
    caught = sum(bool(finding.test) for finding in findings)
    lines = [
        "# Bugs made on purpose",
        "",
        f"{caught} of {len(findings)} are noticed. `python benchmarks/mutations.py` on {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + ".",
        "",
        "| module | what is wrong | noticed | by |",
        "|---|---|---|---|",
    ]
    for finding in findings:
        test = f"`{finding.test.removeprefix('tests/')}`" if finding.test else ""
        noticed = "yes" if finding.test else "**no**"
        cells = (f"`{finding.mutation.module}`", finding.mutation.meaning, noticed, test.replace("|", "\\|"))
        lines.append("| " + " | ".join(cells) + " |")
    if anyway:
        lines += [
            "",
            "Left out, for they fail without any of these bugs: " + ", ".join(f"`{x}`" for x in sorted(anyway)) + ".",
        ]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--only", multiple=True, help="Only mutations whose module holds this; nothing is written then.")
@click.option("--whole", is_flag=True, help="Run the whole suite on what the tests named for it miss.")
def main(only: tuple[str, ...], whole: bool) -> None:
    """Make every mistake once, and tell which test notices."""
    chosen = [item for item in MUTATIONS if not only or any(part in item.module for part in only)]
    findings, anyway = [], set[str]()
    with spoken_errors("begins again"), tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        if not chosen:
            raise ResvitError(
                f"No mutation is of {' or '.join(only)}.",
                f"There are: {', '.join(item.module for item in MUTATIONS)}.",
            )
        for item in chosen:  # before any test is run
            mutated(ROOT, item)
        tree = copied(ROOT, Path(folder) / "tree")
        for item in chosen:
            findings.append(Finding(item, caught_by(item, tree, anyway, whole=whole)))
            click.echo(f"{item.module}: {item.meaning}: {findings[-1].test or 'NOT NOTICED'}")
        for test in sorted(anyway):
            click.echo(f"fails without any bug, and was left out: {test}")
        if not only:
            (RESULTS / "mutations.md").write_text(table(findings, anyway))
            click.echo(f"written: {RESULTS / 'mutations.md'}")


if __name__ == "__main__":
    main()
