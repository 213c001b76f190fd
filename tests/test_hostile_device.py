"""A device that lies: whatever it answers, nothing is written outside, everything ends, and the end is a sentence."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine
from resvit_engines.progress import Silent
from resvit_engines.records import Record, record_from_bytes
from resvit_engines.remote import device as device_module
from resvit_engines.remote import ssh as ssh_module
from resvit_engines.remote.device import Device, RemoteJob, listed_results
from resvit_engines.remote.job_result import JobResult, finished_result
from resvit_engines.remote.progress_events import replay
from resvit_engines.remote.ssh import PATIENCE_VARIABLE, Connection, UnreachableError, address_from
from resvit_engines.remote.ssh_files import download, upload
from resvit_export.stages.device import outputs_of, require_answers
from test_outside import JSON

MACHINE = {"arch": "aarch64", "memory_mib": 1, "free_disk_mib": 1, "python": "3.10.12"}
DIGEST = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"  # of 0123456789


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program ``ssh`` whose device answers by the script that a test writes, where ``$*`` is the command."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "ssh"
    program.write_text(f'#!/bin/bash\ncase "$*" in *" -O exit "*) exit 0;; esac\n. {tmp_path}/answers\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    monkeypatch.setattr(ssh_module, "_LEAST_PATIENCE", 0.5)
    answers = tmp_path / "answers"
    answers.write_text("")
    return answers


def connection() -> Connection:
    return Connection(address_from("ssh://dev"))


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# What it lists and sends.

HOSTILE_NAMES = (
    "outputs/../../x.npy", "outputs//etc/passwd", "/etc/passwd", "outputs/images-0.npy/../../x", "outputs/.npy",
    "outputs/images-0\x1b[31m.npy", "outputs/images-0.npy\x00", "outputs/IMAGES-0.npy", "outputs/images-0 .npy",
    "outputs/images-\u0660.npy", "outputs/images-0.npy\r", "..", "built/../x", "outputs\\images-0.npy",
    "../engine.plan",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_no_job_writes_is_refused(name: str) -> None:
    with pytest.raises(ResvitError, match="no job of ours writes") as caught:
        listed_results(f"built:\nengine.plan\n\noutputs/images-0.npy\n{name}\n", 1, "ssh://dev")
    assert caught.value.code == ExitCode.INPUT


def test_a_name_comes_once_and_not_in_thousands() -> None:
    listed = listed_results("built:\nengine.plan\nmodel.onnx\n\noutputs/images-0001-ab.npy\n", 1, "d")
    assert set(listed) == {"built/engine.plan", "outputs/images-0001-ab.npy"}
    for twice in ("engine.plan\nengine.plan", "outputs/images-0.npy\noutputs/images-0.npy"):
        with pytest.raises(ResvitError, match="no job of ours writes"):
            listed_results(f"built:\n{twice}\n", 1, "d")
    with pytest.raises(ResvitError, match="lists 5000 files"):
        listed_results("\n".join(f"outputs/images-{number}.npy" for number in range(5000)), 2, "d")


@given(st.text(), st.lists(st.sampled_from(["..", "/", "outputs", "images-0", ".npy", "-out1", "engine.plan", "\n"])))
@settings(deadline=None)
def test_whatever_is_listed_stays_in_the_folder(text: str, parts: list[str]) -> None:
    for answer in (text, "".join(parts)):
        try:
            names = listed_results(answer, 1, "d")
        except ResvitError:
            continue
        for name in names:
            assert Path(os.path.normpath(name)).parts[0] in ("built", "outputs")
            assert len(Path(name).parts) == 2


def test_fetching_writes_nothing_outside(ssh: Path, tmp_path: Path) -> None:
    ssh.write_text(
        'case "$*" in *"ls built outputs"*) printf "built:\\nengine.plan\\n\\noutputs/../../../victim\\n";;\n'
        f'*sha256sum*) echo "10 {DIGEST}  -"; echo none;;\n*"tail -c"*) printf 0123456789;; esac\n'
    )
    bundle = tmp_path / "b.resvit"
    bundle.write_bytes(b"bundle")
    (tmp_path / "victim").write_text("mine")
    into = tmp_path / "run" / "stage"
    into.mkdir(parents=True)
    with connection() as opened, pytest.raises(ResvitError, match=r"victim"):
        Device(opened).fetch(RemoteJob(bundle, "key"), into)
    assert (tmp_path / "victim").read_text() == "mine"
    assert below(tmp_path / "run") == set()


def test_what_was_announced_is_fetched_and_not_a_byte_more(ssh: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "engine.plan"
    announced = f'case "$*" in *sha256sum*) echo "10 {DIGEST}  -"; echo none;;\n*"tail -c"*) '
    ssh.write_text(announced + "printf 0123456789;; esac\n")
    with connection() as opened:
        download(opened, "x", out)
        assert out.read_bytes() == b"0123456789"
        out.unlink()
        ssh.write_text(announced + "cat /dev/zero;; esac\n")
        with pytest.raises(ResvitError, match="more of x than the 10 bytes"):
            download(opened, "x", out)
        with pytest.raises(ResvitError, match="has 10 bytes, and such a file has 9"):
            download(opened, "x", out, most=9)
        ssh.write_text(f'case "$*" in *sha256sum*) echo "99999999999999 {DIGEST}  -"; echo none;; esac\n')
        with pytest.raises(ResvitError, match="disk is full"):
            download(opened, "x", out, most=1 << 60)
    assert sum(path.stat().st_size for path in out.parent.iterdir()) <= 10


@pytest.mark.parametrize(
    "answer",
    ["", "none", "a b\nnone", "10\nnone", f"-1 {DIGEST} -\nnone", f"1e3 {DIGEST} -\nnone", "none\nnone\nnone",
     f"10 {DIGEST[:-1]}g -\nnone", f"9{'9' * 5000} {DIGEST} -\nnone", "\\x1b[2J\nnone"],
)  # fmt: skip
def test_a_size_and_digest_are_that(ssh: Path, tmp_path: Path, answer: str) -> None:
    ssh.write_text(f"case \"$*\" in *sha256sum*) printf '{answer}\\n';; esac\n")
    with connection() as opened, pytest.raises(ResvitError, match="does not answer as a Linux system does") as caught:
        download(opened, "x", tmp_path / "x")
    assert "\x1b" not in caught.value.problem


@pytest.mark.whole
def test_endless_and_silent_answers_end(ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(1 << 20))
    with connection() as opened:
        for endless in ("cat /dev/zero", "cat /dev/zero >&2"):
            ssh.write_text(f"exec {endless}\n")
            with pytest.raises(ResvitError, match="answers with more than 16 MiB"):
                opened.run("x")
        ssh.write_text("exec sleep 100\n")
        start = time.monotonic()
        with pytest.raises(UnreachableError, match="said nothing for 1 s"):
            opened.run("x")
        ssh.write_text('case "$*" in *sha256sum*) printf "none\\nnone\\n";; *) exec sleep 100;; esac\n')
        with pytest.raises(UnreachableError):
            upload(opened, file, "x")
        ssh.write_text(f'case "$*" in *sha256sum*) echo "10 {DIGEST}  -"; echo none;; *) exec sleep 100;; esac\n')
        monkeypatch.setattr(ssh_module, "_LOSSES", 2)
        with pytest.raises(UnreachableError):
            download(opened, "x", tmp_path / "x")
        assert time.monotonic() - start < 90


@pytest.mark.parametrize(
    ("state", "bound", "says"),
    [
        ('printf "alive\\nopen\\n"', "_SILENT_MOST", "showed no progress"),
        ('printf "alive\\nopen\\n{}\\n"', "_JOB_MOST", "takes more than"),
        ('printf "alive\\nopen\\n"; head -c 1000000 /dev/zero | tr "\\0" x', "_PROGRESS_MOST", "MiB of progress"),
    ],
)
def test_a_job_that_never_ends_is_left(
    ssh: Path, monkeypatch: pytest.MonkeyPatch, state: str, bound: str, says: str
) -> None:
    ssh.write_text(f'case "$*" in *progress.log*) {state};; esac\n')
    monkeypatch.setattr(device_module, bound, 0.2 if bound != "_PROGRESS_MOST" else 3 << 20)
    monkeypatch.setattr(device_module, "_POLL", 0.05)
    with connection() as opened, pytest.raises(ResvitError, match=says) as caught:
        Device(opened)._follow("job")
    assert caught.value.code == ExitCode.BUILD


# What it says.


@pytest.mark.parametrize(
    "changes",
    [{"arch": "../../x"}, {"python": "3.11\x1b[31m"}, {"gpu": "\x1b]0;owned\x07"}, {"host": "a\nb"},
     {"gpu": "a\u202eb"}, {"memory_mib": "x"}, {"memory_mib": -1}, {"memory_mib": 1.5}, {"sm": True},
     {"jetpack": "6; rm"}, {"gpu": "x" * 5000}, {"libc": 7}],
)  # fmt: skip
def test_a_machine_says_only_what_a_machine_can(changes: dict[str, object]) -> None:
    with pytest.raises(ResvitError, match=next(iter(changes))) as caught:
        Machine.from_json(Record({**MACHINE, **changes}, "it"))
    assert caught.value.problem.isprintable()


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 77, 130, 255, 999, -1, True, "x", None, 8.0])
def test_an_error_is_never_a_success_and_its_code_is_one_of_a_job(code: object) -> None:
    document = {"error": {"problem": "p", "fix": "f", "exit_code": code}}
    with pytest.raises(ResvitError) as caught:
        JobResult.from_json(finished_result(Record(document, "it"), "ssh://dev"))
    of_a_job = type(code) is int and code in (3, 6, 7, 8, 9, 10, 11, 130)
    expected = code if of_a_job else ExitCode.BUILD if code == 1 and type(code) is int else ExitCode.INPUT
    assert caught.value.code == expected


@pytest.mark.whole
@given(JSON, st.sampled_from(["error", "result"]))
@example("x", "error")
@example([], "error")
@settings(deadline=None)
def test_any_result_ends_in_a_sentence(value: object, key: str) -> None:
    data = json.dumps({key: value}).encode()
    with pytest.raises(ResvitError) as caught:
        JobResult.from_json(finished_result(record_from_bytes(data, "it"), "ssh://dev"))
    assert caught.value.code not in (ExitCode.OK, ExitCode.BUG)


class Counted(Silent):
    """Counts what it is shown."""

    def __init__(self) -> None:
        self.steps, self.said, self.depth, self.deepest = 0, 0, 0, 0

    def track(self, items, what, total, weight=1, before=0):
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        for item in items:
            self.steps += 1
            yield item
        self.depth -= 1

    def say(self, text: str) -> None:
        self.said += 1


EVENT = st.dictionaries(
    st.sampled_from(["begin", "total", "weight", "step", "end", "say", "warn"]),
    st.integers(-2, 5) | st.just(10**10) | st.just("x") | st.none() | st.lists(st.integers(), max_size=1),
)


@pytest.mark.whole
@given(st.lists(EVENT.map(json.dumps) | st.text(), max_size=30))
@example(["5", "[]", "[" * 5000])
@example(['{"begin": "b", "total": 3, "weight": 1}'] * 3000 + ['{"say": "x"}'])
@example(['{"begin": "b", "total": 3, "weight": 1}', '{"step": 10000000000}', '{"step": 2000000}', '{"end": 1}'])
@settings(deadline=None)
def test_any_progress_is_shown_or_left_out(lines: list[str]) -> None:
    shown = Counted()
    replay(iter(lines), shown)
    assert shown.deepest <= 8
    assert shown.steps <= 5 * max(1, len(lines))


# What it computed.


def npy(path: Path, value: object) -> Path:
    np.save(path, np.asarray(value), allow_pickle=True)
    return path


class Output:
    def __init__(self, name: str, *shape: int | str) -> None:
        self.name, self.shape = name, shape


def test_answers_are_those_of_the_network(tmp_path: Path) -> None:
    good = npy(tmp_path / "images-0.npy", np.zeros((4, 3), np.float32))
    arrays = outputs_of([good], ["y"])
    require_answers(arrays, [Output("y", "N", 3)], 4)
    for outputs, count, says in (
        ([Output("y", "N", 5)], 4, "have the shape"),
        ([Output("y", "N", 3, 3)], 4, "have the shape"),
        ([Output("z", "N", 3)], 4, "without z"),
        ([Output("y", "N", 3)], 5, "answered 4 of 5"),
    ):
        with pytest.raises(ResvitError, match=says):
            require_answers(arrays, outputs, count)
    with pytest.raises(ResvitError, match="NaN"):
        require_answers({"y": np.full((4, 3), np.nan)}, [Output("y", "N", 3)], 4)
    second = npy(tmp_path / "images-1.npy", np.zeros((4, 2), np.float32))
    with pytest.raises(ResvitError, match="several shapes"):
        outputs_of([good, second], ["y"])
    with pytest.raises(ResvitError, match="is of output 7"):
        outputs_of([npy(tmp_path / "images-0-out7.npy", [1.0])], ["y"])
