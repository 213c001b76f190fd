"""Sweeps whose runs lie in a store that speaks S3, on loopback."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
import s3fs
from moto.server import ThreadedMotoServer

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_export.cli.main import run
from resvit_export.run_folder import RunFolder
from resvit_export.stage import RECORD, Artifact, Stage
from resvit_export.stages.quantize import Quantize
from resvit_export.sweep.store import RunStore

URL = "s3://bucket/sweeps/one"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def files(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> s3fs.S3FileSystem:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": server,
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if files.exists("bucket"):
        files.rm("bucket", recursive=True)
    files.mkdir("bucket")
    return files


@dataclass(frozen=True)
class Doubled(Stage[Artifact]):
    """A stage that counts how often it is done."""

    name: ClassVar[str] = "doubled"
    artifact: ClassVar[type[Artifact]] = Artifact
    packages: ClassVar[tuple[str, ...]] = ()
    times: ClassVar[list[int]] = []

    number: int

    def fill(self, folder: Path, reporter: Reporter) -> None:
        del reporter
        self.times.append(self.number)
        (folder / "inner").mkdir()
        (folder / "inner" / "result.txt").write_text(str(2 * self.number))


def done(folder: Path, number: int, store: RunStore | None = None) -> str:
    """Meet the store, do the stage where nobody has done it, and read its result."""
    store = store or RunStore.at(URL)
    store.meet("run", folder)
    runs = RunFolder(folder, SILENT, lambda stage: store.keep("run", stage))
    with runs.locked():
        made = runs.do(Doubled(number))
    return (made.folder / "inner" / "result.txt").read_text()


def times(number: int) -> int:
    return Doubled.times.count(number)


def test_what_one_machine_finished_another_does_not_do_again(files: s3fs.S3FileSystem, tmp_path: Path) -> None:
    assert done(tmp_path / "a", 11) == done(tmp_path / "b", 11) == "22"
    assert times(11) == 1
    (stage,) = (path.name for path in (tmp_path / "a").iterdir() if path.is_dir())
    assert sorted(files.find("bucket")) == [
        f"bucket/sweeps/one/run/{stage}/{name}" for name in ("inner/result.txt", RECORD)
    ]  # fmt: skip


def test_what_was_finished_while_the_store_was_away_is_brought_later(
    files: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    folder = tmp_path / "a"
    with RunFolder(folder, SILENT).locked() as runs:
        runs.do(Doubled(12))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ResvitError, match="cannot be used") as refused:
        done(folder, 12)
    assert refused.value.code is ExitCode.SYSTEM
    assert "AWS_ENDPOINT_URL" in refused.value.fix
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert done(folder, 12) == done(tmp_path / "b", 12) == "24"
    assert times(12) == 1
    assert files.find("bucket")


def test_a_stage_that_is_not_whole_or_was_changed_is_done_again(files: s3fs.S3FileSystem, tmp_path: Path) -> None:
    assert done(tmp_path / "a", 13) == "26"
    held = {key.rpartition("/")[2]: key for key in files.find("bucket")}
    files.pipe(held["result.txt"], b"66")
    assert done(tmp_path / "b", 13) == "26"  # and the store is mended by it
    assert times(13) == 2
    assert done(tmp_path / "c", 13) == "26"
    assert times(13) == 2
    files.rm(held[RECORD])
    assert done(tmp_path / "d", 13) == "26"
    assert times(13) == 3
    files.pipe(held[RECORD], b"{}")
    assert done(tmp_path / "e", 13) == "26"
    assert times(13) == 4


def test_what_was_damaged_here_is_not_shared(files: s3fs.S3FileSystem, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a", SILENT).locked() as runs:
        made, other = runs.do(Doubled(16)), runs.do(Doubled(17))
    (made.folder / "inner" / "result.txt").unlink()
    (other.folder / RECORD).write_text("{")
    RunStore.at(URL).meet("run", tmp_path / "a")
    assert files.find("bucket") == []
    assert done(tmp_path / "a", 16) == done(tmp_path / "b", 16) == "32"
    assert (times(16), times(17)) == (2, 1)


def test_what_is_no_stage_of_ours_stays_where_it_is(files: s3fs.S3FileSystem, tmp_path: Path) -> None:
    assert done(tmp_path / "a", 14) == "28"
    (record,) = (key for key in files.find("bucket") if key.endswith(RECORD))
    stage = record.split("/")[-2]
    other = f"doubled-{'0' * 12}"
    # A record that names what lies outside, and keys that do.
    document = json.loads(files.cat(record))
    document["outputs"]["../../escaped"] = document["outputs"]["inner/result.txt"]
    files.pipe(f"bucket/sweeps/one/run/{other}/{RECORD}", json.dumps(document).encode())
    for name in (f"{other}/../../escaped", f"{other}//absolute", f"x/{RECORD}", ".hidden", f"{stage}/more"):
        files.pipe(f"bucket/sweeps/one/run/{name}", b"x")
    assert done(tmp_path / "b" / "run", 14) == "28"
    assert times(14) == 1
    found = {str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert found == {"run/.lock", f"run/{stage}/{RECORD}", f"run/{stage}/inner/result.txt", f"run/{other}/{RECORD}"}


@pytest.mark.parametrize("url", ["s3://", "s3://b", "s3://Bucket/x", "s3://bucket/../x", "s3://bucket/a b", "s3://b/$"])
def test_an_address_that_is_none_is_refused_at_once(url: str, tmp_path: Path) -> None:
    assert run(["sweep", str(written(tmp_path)), "--out", url]) == ExitCode.INPUT


def test_a_bucket_that_is_not_there_and_a_missing_library(
    files: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResvitError, match="s3://elsewhere/x cannot be used"):
        done(tmp_path / "a", 15, RunStore.at("s3://elsewhere/x"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert run(["sweep", str(written(tmp_path)), "--out", URL]) == ExitCode.MISSING
    assert "resvit-export[s3]" in capsys.readouterr().err
    assert not files.find("bucket")


def test_credentials_that_are_wrong_are_told_without_a_secret(
    server: str, files: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert done(tmp_path / "a", 29) == "58"
    held = files.find("bucket")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWITHDRAWN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
    checks = f"{server}/moto-api/reset-auth"  # how many requests are let through before keys are asked for
    requests.post(checks, data=b"0", timeout=60).raise_for_status()
    try:
        with pytest.raises(ResvitError, match=f"The store {URL} cannot be used") as refused:
            done(tmp_path / "b", 29)
        assert refused.value.code is ExitCode.SYSTEM
        assert "AWS_SECRET_ACCESS_KEY" in refused.value.fix
        assert times(29) == 1
        assert run(["sweep", str(written(tmp_path)), "--out", URL]) == ExitCode.SYSTEM
        said = capsys.readouterr()
        assert "hunter2" not in str(refused.value) + said.out + said.err
        assert "cannot be used" in said.err
    finally:
        requests.post(checks, data=b"inf", timeout=60).raise_for_status()
    assert files.find("bucket") == held


def written(folder: Path) -> Path:
    (folder / "sweep.toml").write_text(SWEEP)
    return folder / "sweep.toml"


SWEEP = """
targets = ["jetson-orin"]
precisions = ["int8", "fp16"]
[models.small]
model = { name = "resvit:embed-nano", checkpoint = "runs/demo/embed-nano.pt" }
[recipe]
data = { images = "fashion-mnist", calibration_images = 32, validation_images = 64 }
"""


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_a_sweep_into_a_store_is_the_sweep_into_a_folder(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(workspace)

    def swept(*more: str) -> Any:
        capsys.readouterr()
        assert run(["sweep", str(path), "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    plain = swept("--out", str(workspace / "folder"))
    stored = swept("--out", URL)
    told = [[target["bundle"] for target in task["targets"]] for task in plain["tasks"]]
    assert all(map(all, told))
    assert told == [[target["bundle"] for target in task["targets"]] for task in stored["tasks"]]
    assert stored["entries"] == plain["entries"]
    # On another machine nothing is left to do, and over Ray's workers it is the same.
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "another"))
    monkeypatch.setattr(Quantize, "fill", None)
    assert swept("--out", URL)["entries"] == plain["entries"]
    pytest.importorskip("ray")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "workers"))
    assert swept("--out", URL, "--on", "local")["entries"] == plain["entries"]
