"""The files of timing caches: one for each device and version, whole at any time, whoever writes beside it."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys

import pytest

from resvit_engines.builder.timing_cache import Owner, locked, read_timing_cache, write_timing_cache
from resvit_engines.errors import ExitCode, ResvitError

OWNER = Owner("jetson-orin", 87, "tensorrt", "10.3.0")
ADD = """
import os, sys
from pathlib import Path
from resvit_engines.builder.timing_cache import Owner, locked, read_timing_cache, write_timing_cache
folder, owner = Path(sys.argv[1]), Owner("jetson-orin", 87, "tensorrt", "10.3.0")
for _ in range(20):
    with locked(folder, owner):
        cached = read_timing_cache(folder, owner)
        assert cached.refusal == "", cached.refusal
        write_timing_cache(folder, owner, cached.content + b"x")
"""


def test_what_is_written_is_read(tmp_path) -> None:
    assert (read_timing_cache(tmp_path, OWNER).content, read_timing_cache(tmp_path, OWNER).refusal) == (b"", "")
    for content in (b"first\nlines\n", b"", b"\x00\xff" * 1000):
        write_timing_cache(tmp_path, OWNER, content)
        assert read_timing_cache(tmp_path, OWNER).content == content


@pytest.mark.parametrize("change", [{"target": "l4"}, {"sm": 89}, {"builder": "other"}, {"version": "10.13.3"}])
def test_devices_and_versions_have_files_of_their_own(tmp_path, change) -> None:
    other = dataclasses.replace(OWNER, **change)
    assert other.file_name != OWNER.file_name
    write_timing_cache(tmp_path, OWNER, b"orin")
    assert read_timing_cache(tmp_path, other).content == b""
    # Nor does a file that was renamed pass for another's.
    (tmp_path / OWNER.file_name).rename(tmp_path / other.file_name)
    cached = read_timing_cache(tmp_path, other)
    assert cached.content == b""
    assert "another device or version" in cached.refusal


@pytest.mark.whole
def test_no_damaged_byte_reaches_tensorrt(tmp_path) -> None:
    write_timing_cache(tmp_path, OWNER, b"measured")
    path = tmp_path / OWNER.file_name
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        assert read_timing_cache(tmp_path, OWNER).content == b""
        path.write_bytes(whole[:index])
        assert read_timing_cache(tmp_path, OWNER).content == b""
    path.write_bytes(whole)
    assert read_timing_cache(tmp_path, OWNER).content == b"measured"


@pytest.mark.whole
def test_builds_side_by_side_lose_nothing(tmp_path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", ADD, str(tmp_path)]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert read_timing_cache(tmp_path, OWNER).content == b"x" * 80


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_killed_while_writing_it_leaves_the_old_one_and_the_next_cleans_up(tmp_path) -> None:
    write_timing_cache(tmp_path, OWNER, b"old")
    dies = ADD.replace("for _", "import shutil\nfrom resvit_engines import files\n"
                       "files._sync = lambda path: os.kill(os.getpid(), 9)\nfor _")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", dies, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    assert read_timing_cache(tmp_path, OWNER).content == b"old"
    with locked(tmp_path, OWNER):
        write_timing_cache(tmp_path, OWNER, b"new")
    assert read_timing_cache(tmp_path, OWNER).content == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [OWNER.file_name, f"{OWNER.file_name}.lock"]


def test_a_folder_that_is_none_is_one_clear_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResvitError) as caught, locked(tmp_path / "file" / "cache", OWNER):
        pass
    assert caught.value.code is ExitCode.SYSTEM
