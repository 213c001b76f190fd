from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resvit_engines.builder import timing_cache
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_directory, atomic_file, write_atomic
from resvit_engines.install import state as install_state
from resvit_engines.progress import SILENT, Quiet, Reporter
from resvit_engines.remote.job_folder import JobFolder
from resvit_export.run_folder import NotFinishedError, RunFolder
from resvit_export.stage import RECORD, Artifact, File, Stage
from test_outside import JSON


class Counter:
    """Counts how often a stage is done."""

    def __init__(self, content: bytes = b"result") -> None:
        self.calls, self.content = 0, content

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "out.bin").write_bytes(self.content)


@dataclass(frozen=True)
class Setting:
    a: int = 1


@dataclass(frozen=True)
class Made(Stage[Artifact]):
    name: ClassVar[str] = "fold"
    packages: ClassVar[tuple[str, ...]] = ("numpy",)

    setting: Setting = Setting()
    input: str = "d"

    def fill(self, folder: Path, reporter: Reporter) -> None:
        WORK["fold"](folder)


WORK: dict[str, Callable[[Path], None]] = {}
"""What the stage does: no part of its value, so that a test can count."""


def do(folder: Path, work: Callable[[Path], None], stage: Made = Made()) -> Artifact:
    WORK["fold"] = work
    return RunFolder(folder, SILENT).do(stage)


def test_an_unchanged_stage_is_not_done_again(tmp_path: Path) -> None:
    work = Counter()
    first = do(tmp_path, work)
    second = do(tmp_path, work)
    assert work.calls == 1
    assert (first.reused, second.reused) == (False, True)
    assert first.digest == second.digest
    assert first.path("out.bin").read_bytes() == b"result"


@pytest.mark.parametrize("other", [Made(setting=Setting(2)), Made(input="e")])
def test_other_settings_or_inputs_are_another_stage_and_the_old_one_stays(tmp_path: Path, other: Made) -> None:
    work = Counter()
    old = do(tmp_path, work)
    new = do(tmp_path, work, other)
    assert work.calls == 2
    assert old.folder != new.folder
    assert old.folder.exists()


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "record"])
def test_a_damaged_stage_is_done_again(tmp_path: Path, damage: str) -> None:
    work = Counter()
    artifact = do(tmp_path, work)
    out = artifact.path("out.bin")
    if damage == "truncate":
        out.write_bytes(b"res")
    elif damage == "change":
        out.write_bytes(b"resulT")
    elif damage == "remove":
        out.unlink()
    else:
        artifact.path("record.json").write_text("{")
    again = do(tmp_path, work)
    assert work.calls == 2
    assert again.path("out.bin").read_bytes() == b"result"


OTHER_FORMS: dict[str, Callable[[Path], object]] = {
    "no record": lambda folder: (folder / RECORD).unlink(),
    "empty": lambda folder: (folder / RECORD).write_text(""),
    "a list": lambda folder: (folder / RECORD).write_text("[]"),
    "deep": lambda folder: (folder / RECORD).write_text("[" * 100_000),
    "no UTF-8": lambda folder: (folder / RECORD).write_bytes(b"\xff\xfe{}"),
    "a folder": lambda folder: ((folder / RECORD).unlink(), (folder / RECORD).mkdir()),
    "a pipe": lambda folder: ((folder / RECORD).unlink(), os.mkfifo(folder / RECORD)),
    "outputs a list": lambda folder: changed(folder, outputs=[1]),
    "outputs of null": lambda folder: changed(folder, outputs={"out.bin": None}),
    "no outputs": lambda folder: changed(folder, outputs={}),
    "an output elsewhere": lambda folder: changed(folder, outputs={"../x": {"sha256": "0" * 64, "bytes": 1}}),
    "bytes a text": lambda folder: changed(folder, outputs={"out.bin": {"sha256": "0" * 64, "bytes": "x"}}),
    "no seconds": lambda folder: changed(folder, seconds=None),
    "value a list": lambda folder: changed(folder, value=[]),
    "versions a list": lambda folder: changed(folder, versions=[["a"]]),
    "another key": lambda folder: changed(folder, key="0" * 64),
    "a file of no stage": lambda folder: (folder / "other").write_text("x"),
    "a link": lambda folder: ((folder / "out.bin").rename(folder.parent / "m"),
                              (folder / "out.bin").symlink_to(folder.parent / "m")),
    "a pipe for a file": lambda folder: ((folder / "out.bin").unlink(), os.mkfifo(folder / "out.bin")),
    "the stage is a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
    "the stage is a link that leads nowhere": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
}  # fmt: skip
"""What may become of a finished stage."""


def changed(folder: Path, **fields: object) -> None:
    record = json.loads((folder / RECORD).read_bytes())
    (folder / RECORD).write_text(json.dumps({**record, **fields}))


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_stage_of_another_form_is_done_again_with_a_sentence(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Counter()
    OTHER_FORMS[form](do(tmp_path, work).folder)
    WORK["fold"] = work
    again = RunFolder(tmp_path, Quiet()).do(Made())
    assert work.calls == 2
    assert again.path("out.bin").read_bytes() == b"result"
    assert capsys.readouterr().err.count("is damaged; the stage is done again.") == 1


@pytest.mark.whole
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_record_is_a_stage_to_be_done_again(tmp_path: Path, record: bytes) -> None:
    work = Counter()
    folder = do(tmp_path, work).folder
    (folder / RECORD).write_bytes(record)
    before = work.calls
    do(tmp_path, work)
    assert work.calls == before + 1


@pytest.mark.whole
@given(JSON)
@settings(deadline=None)
def test_a_document_of_another_form_is_a_users_fault(document: object) -> None:
    def reader(found: dict[str, Any]) -> object:
        return found["a"]["b"][0] / float(found["c"].lower())

    with tempfile.TemporaryDirectory() as place:
        artifact = do(Path(place), Counter(json.dumps(document).encode()))
        with pytest.raises(ResvitError) as caught:
            artifact.read("out.bin", reader)
    assert caught.value.code == ExitCode.INPUT
    with pytest.raises(ResvitError, match="does not hold other"):
        artifact.file("other")


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        do(tmp_path, fail)
    assert list(tmp_path.iterdir()) == []


def test_looking_only_never_works(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, SILENT)
    work = Counter()
    WORK["fold"] = work
    with run.looking_only(), pytest.raises(NotFinishedError):
        run.do(Made())
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


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def _link_elsewhere(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


IN_PLACE_OF_A_FILE = {"folder": Path.mkdir, "pipe": os.mkfifo, "loop": _link_to_itself, "link": _link_elsewhere}


@pytest.mark.parametrize("kind", [*IN_PLACE_OF_A_FILE, "socket"])
@pytest.mark.parametrize("lock", ["run", "install", "job", "cache"])
def test_something_else_where_a_lock_belongs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lock: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    owner = timing_cache.Owner("jetson-orin", 87, "tensorrt", "10.3.0")
    held: dict[str, tuple[str, Callable[[Path], contextlib.AbstractContextManager[object]]]] = {
        "run": (".lock", lambda folder: RunFolder(folder, SILENT).locked()),
        "install": (".lock", lambda folder: install_state.locked(folder, lambda: None)),
        "job": (".lock", lambda folder: JobFolder(folder).working(SILENT)),
        "cache": (f"{owner.file_name}.lock", lambda folder: timing_cache.locked(folder, owner)),
    }
    name, hold = held[lock]
    ({**IN_PLACE_OF_A_FILE, "socket": _socket}[kind])(Path(name))
    with pytest.raises(ResvitError) as caught, hold(Path()):
        pass
    assert caught.value.code == ExitCode.SYSTEM
    assert name in caught.value.problem
    assert "emove" in caught.value.fix
    assert not Path("elsewhere").exists()


@pytest.mark.whole
def test_killed_in_the_middle_of_a_stage_then_started_again(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from resvit_engines.progress import SILENT
        from resvit_export.run_folder import RunFolder
        from test_runfolder import do

        def work(folder):
            (folder / "out.bin").write_bytes(b"half")
            print("working", flush=True)
            time.sleep(60)

        with RunFolder(Path({str(tmp_path)!r}), SILENT).locked():
            do(Path({str(tmp_path)!r}), work)
    """)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "working\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    run = RunFolder(tmp_path, SILENT)
    with run.locked():
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
        artifact = do(tmp_path, Counter(b"whole"))
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

    record = do(tmp_path, work).record
    assert record.seconds >= 0.05
    assert record.peak_mib > 1
    assert record.versions["numpy"] != "absent"
    assert set(record.outputs) == {"out.bin"}


def test_stages_done_together_are_as_if_done_alone(tmp_path: Path) -> None:
    first, second = Made(input="a"), Made(input="b")
    seen: list[list[str]] = []

    def fill(missing: Sequence[tuple[Stage[Artifact], Path]]) -> None:
        seen.append([stage.input for stage, _ in missing if isinstance(stage, Made)])
        for stage, folder in missing:
            assert isinstance(stage, Made)
            (folder / "out.bin").write_text(stage.input)

    folder = RunFolder(tmp_path, SILENT)
    assert [one.path("out.bin").read_text() for one in folder.do_together([first, second], fill)] == ["a", "b"]
    assert not any(one.reused for one in folder.do_together([second, first], fill))  # by this command itself
    later, third = RunFolder(tmp_path, SILENT), Made(input="c")
    assert [one.reused for one in later.do_together([first, third], fill)] == [True, False]
    assert seen == [["a", "b"], ["c"]]
    assert do(tmp_path, Counter(), first).reused


@dataclass(frozen=True)
class Read(Stage[Artifact]):
    """Reads a file, and the finished stage before it."""

    name: ClassVar[str] = "read"

    source: File
    before: Artifact | None = None
    more: tuple[Artifact, ...] = ()

    def fill(self, folder: Path, reporter: Reporter) -> None:
        WORK["read"](folder)


def reading(changes: Path | None, content: bytes = b"evil") -> Callable[[Path], None]:
    """A stage's work, while which somebody changes a file."""

    def work(folder: Path) -> None:
        (folder / "out.bin").write_bytes(b"made of it")
        if changes is not None:
            changes.write_bytes(content)

    return work


@pytest.mark.parametrize("what", ["the user's file", "a stage's file", "one of many"])
def test_what_is_made_of_a_file_that_changes_meanwhile_is_not_kept(tmp_path: Path, what: str) -> None:
    (tmp_path / "own").write_bytes(b"own")
    first, second = do(tmp_path / "run", Counter()), do(tmp_path / "run", Counter(), Made(input="e"))
    stage = Read(File.of(tmp_path / "own"), first, (second,))
    changes = {"the user's file": stage.source.path, "a stage's file": first.path("out.bin")}
    run, changed = RunFolder(tmp_path / "run", SILENT), changes.get(what, second.path("out.bin"))
    WORK["read"] = reading(changed)
    with pytest.raises(ResvitError, match="not what was checked") as caught:
        run.do(stage)
    assert caught.value.code is ExitCode.INPUT
    assert str(changed) in caught.value.problem
    assert not list((tmp_path / "run").glob("read-*"))
    changed.write_bytes(b"own" if changed.name == "own" else b"result")
    WORK["read"] = reading(None)
    assert run.do(stage).path("out.bin").read_bytes() == b"made of it"


def test_a_record_of_a_stage_is_read_only_as_it_was_written(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        (folder / "verdict.json").write_text('{"verdict": "undecided"}')

    artifact = do(tmp_path, work)
    assert artifact.json("verdict.json") == {"verdict": "undecided"}
    artifact.path("verdict.json").write_text('{"verdict": "accepted!"}')
    for reader in (artifact.json, artifact.content):
        with pytest.raises(ResvitError, match="not what was checked"):
            reader("verdict.json")
    again = do(tmp_path, work)
    assert (again.reused, again.json("verdict.json")) == (False, {"verdict": "undecided"})


def test_a_stage_that_does_not_agree_with_what_it_is_made_of_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Counter()
    do(tmp_path, work)
    monkeypatch.setattr(Made, "agrees", lambda self, artifact: artifact.path("out.bin").read_bytes() != b"result")
    assert not do(tmp_path, work).reused
    monkeypatch.undo()
    assert do(tmp_path, work).reused
    assert work.calls == 2
