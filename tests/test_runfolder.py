from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_directory, atomic_file, write_atomic
from resvit_engines.progress import SILENT
from resvit_export.run_folder import NotFinishedError, RunFolder


class Counter:
    def __init__(self, content: bytes = b"result") -> None:
        self.calls = 0
        self.content = content

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "out.bin").write_bytes(self.content)


def test_an_unchanged_stage_is_not_done_again(tmp_path: Path) -> None:
    work = Counter()
    first = RunFolder(tmp_path, SILENT).stage("fold", {"a": 1}, {"x": "d"}, ("numpy",), work)
    second = RunFolder(tmp_path, SILENT).stage("fold", {"a": 1}, {"x": "d"}, ("numpy",), work)
    assert work.calls == 1
    assert (first.reused, second.reused) == (False, True)
    assert first.digest == second.digest
    assert first.path("out.bin").read_bytes() == b"result"


@pytest.mark.parametrize(("settings", "inputs"), [({"a": 2}, {"x": "d"}), ({"a": 1}, {"x": "e"})])
def test_other_settings_or_inputs_are_another_stage_and_the_old_one_stays(
    tmp_path: Path, settings: dict[str, int], inputs: dict[str, str]
) -> None:
    work = Counter()
    run = RunFolder(tmp_path, SILENT)
    old = run.stage("fold", {"a": 1}, {"x": "d"}, (), work)
    new = run.stage("fold", settings, inputs, (), work)
    assert work.calls == 2
    assert old.folder != new.folder
    assert old.folder.exists()


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "record"])
def test_a_damaged_stage_is_done_again(tmp_path: Path, damage: str) -> None:
    work = Counter()
    run = RunFolder(tmp_path, SILENT)
    artifact = run.stage("fold", {}, {}, (), work)
    out = artifact.path("out.bin")
    if damage == "truncate":
        out.write_bytes(b"res")
    elif damage == "change":
        out.write_bytes(b"resulT")
    elif damage == "remove":
        out.unlink()
    else:
        artifact.path("record.json").write_text("{")
    again = run.stage("fold", {}, {}, (), work)
    assert work.calls == 2
    assert again.path("out.bin").read_bytes() == b"result"


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        RunFolder(tmp_path, SILENT).stage("fold", {}, {}, (), fail)
    assert list(tmp_path.iterdir()) == []


def test_looking_only_never_works(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, SILENT)
    work = Counter()
    with run.looking_only(), pytest.raises(NotFinishedError):
        run.stage("fold", {}, {}, (), work)
    assert work.calls == 0


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path, SILENT).locked(),
        pytest.raises(ResvitError, match="Another process"),
        RunFolder(tmp_path, SILENT).locked(),
    ):
        pass
    with RunFolder(tmp_path, SILENT).locked():
        pass


def test_killed_in_the_middle_of_a_stage_then_started_again(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from resvit_engines.progress import SILENT
        from resvit_export.run_folder import RunFolder

        def work(folder):
            (folder / "out.bin").write_bytes(b"half")
            print("working", flush=True)
            time.sleep(60)

        run = RunFolder(Path({str(tmp_path)!r}), SILENT)
        with run.locked():
            run.stage("fold", {{}}, {{}}, (), work)
    """)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "working\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    run = RunFolder(tmp_path, SILENT)
    with run.locked():
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
        artifact = run.stage("fold", {}, {}, (), Counter(b"whole"))
    assert artifact.path("out.bin").read_bytes() == b"whole"


def _write_half_and_stop(path: Path) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(b"half of the new")
        raise KeyboardInterrupt


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "file"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        _write_half_and_stop(path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_the_disk_and_its_permissions_are_explained(tmp_path: Path, number: int) -> None:
    with pytest.raises(ResvitError) as caught, atomic_directory(tmp_path / "stage"):
        raise OSError(number, os.strerror(number))
    assert caught.value.code == ExitCode.SYSTEM
    assert "stage" in caught.value.problem
    assert list(tmp_path.iterdir()) == []


def test_seconds_and_memory_are_recorded(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        time.sleep(0.05)
        (folder / "out.bin").write_bytes(b"")

    record = RunFolder(tmp_path, SILENT).stage("fold", {}, {}, ("numpy",), work).record
    assert record["seconds"] >= 0.05
    assert record["peak_mib"] > 1
    assert record["versions"]["numpy"] != "absent"
    assert set(record["outputs"]) == {"out.bin"}
