"""The list of bugs made on purpose stays true to the code, and the script that makes them tells which test notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from resvit_engines.errors import ResvitError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A module with one test that looks at it, and one that fails whatever it does."""
    tree = tmp_path / "tree"
    for folder in ("engines/resvit_toy", "tests", "data", ".git"):
        (tree / folder).mkdir(parents=True)
    (tree / "engines/resvit_toy/sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tree / "tests/test_sums.py").write_text(
        "from resvit_toy.sums import add\n\ndef test_zeros():\n    assert add(0, 0) == 0\n\n"
        "def test_two_numbers():\n    assert add(2, 3) == 5\n"
    )
    (tree / "tests/test_zeros.py").write_text(
        "from resvit_toy.sums import add\n\ndef test_0():\n    assert not add(0, 0)\n"
    )
    (tree / "tests/test_broken.py").write_text("def test_fails_anyway():\n    assert False\n")
    return tree


def test_every_mutation_finds_its_code_and_its_tests() -> None:
    from mutation_cases import MUTATIONS
    from mutations import mutated

    for mutation in MUTATIONS:
        compile(mutated(ROOT, mutation), mutation.file, "exec")
        assert all((ROOT / test).is_file() for test in mutation.tests), mutation
    assert len({mutation.file for mutation in MUTATIONS}) == len(MUTATIONS)
    assert {mutation.module.partition("/")[0] for mutation in MUTATIONS} == {
        "calibrate", "quantize", "engines", "export",
    }  # fmt: skip


@pytest.mark.slow
def test_a_bug_is_caught_by_the_test_that_fails_with_it_alone(tree: Path, tmp_path: Path) -> None:
    from mutation_cases import Mutation
    from mutations import caught_by, copied

    copy = copied(tree, tmp_path / "copy")
    assert (copy / "data").is_symlink()
    assert not (copy / ".git").exists()
    zeros, sums, broken = (f"tests/test_{name}.py" for name in ("zeros", "sums", "broken"))
    file = "engines/resvit_toy/sums.py"

    def minus(*tests: str) -> Mutation:
        return Mutation(file, "a + b", "a - b", "subtracts", tests)

    anyway: set[str] = set()
    assert caught_by(minus(zeros, sums), copy, anyway) == f"{sums}::test_two_numbers"
    assert caught_by(minus(zeros), copy, anyway) == ""
    assert not anyway
    assert caught_by(minus(zeros), copy, anyway, whole=True) == f"{sums}::test_two_numbers"
    assert anyway == {f"{broken}::test_fails_anyway"}
    with pytest.raises(ResvitError, match="no failed test"):
        caught_by(minus("tests/test_absent.py"), copy, anyway)
    assert (copy / file).read_text() == (tree / file).read_text()


def test_code_that_has_changed_or_moved_is_said(tree: Path) -> None:
    from mutation_cases import Mutation
    from mutations import mutated

    with pytest.raises(ResvitError, match="has 0 times"):
        mutated(tree, Mutation("engines/resvit_toy/sums.py", "a * b", "a", "", ()))
    with pytest.raises(ResvitError, match=r"has [3-9] times"):
        mutated(tree, Mutation("engines/resvit_toy/sums.py", "a", "b", "", ()))
    with pytest.raises(ResvitError, match="moved"):
        mutated(tree, Mutation("engines/resvit_toy/gone.py", "a", "b", "", ()))
