"""What others wrote is read within bounds: whatever lies at a path, there is a value or one kind of error."""

from __future__ import annotations

import json
import os
import re
import socket
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, pretty_json, sha256_file
from resvit_engines.outside import DEPTH_MOST, json_from_outside, open_outside, read_outside

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def odd_files(folder: Path) -> dict[str, Path]:
    """Everything at a path that is no plain file, by what it is called in the error."""
    pipe, place = folder / "pipe", folder / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "is a pipe": pipe,
        "socket": place,
        "is a folder": folder,
        "is a device": Path("/dev/zero"),
        "There is no file": folder / "absent",
        "symbolic links": folder / "loop",
        "null": Path("a\0b"),
        "too long": Path("x" * 5000),
    }


def test_only_plain_files_are_opened_and_nothing_waits(tmp_path: Path) -> None:
    for says, path in odd_files(tmp_path).items():
        for read in (open_outside, read_outside, sha256_file):
            with pytest.raises(ResvitError) as caught:
                read(path)
            assert says in caught.value.problem or says == "socket"
            assert caught.value.code == ExitCode.INPUT


def test_memory_is_taken_for_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"12345")
    tracemalloc.start()
    try:
        assert read_outside(path, 64 << 30) == b"12345"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_a_file_that_says_no_size_is_read_to_its_end() -> None:
    assert b"VmPeak" in read_outside(Path("/proc/self/status"))


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"12345")
    assert read_outside(path, 5) == b"12345"
    with pytest.raises(ResvitError, match="longer than the 4 bytes"):
        read_outside(path, 4)
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a file of holes
    with pytest.raises(ResvitError, match="longer than the 64 MiB"):
        read_outside(path)


@pytest.mark.whole
@given(JSON)
@settings(deadline=None)
def test_json_comes_back_as_it_was_written(value: object) -> None:
    for write in (canonical_json, pretty_json):
        assert json_from_outside(write(value), "it") == value


ALMOST_JSON = st.text(alphabet='[]{}":,0123456789eE+-.\\utrfalsn NaI')


@pytest.mark.whole
@given(st.binary() | ALMOST_JSON.map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_value_or_one_kind_of_error(data: bytes) -> None:
    try:
        value = json_from_outside(data, "it")
    except ResvitError as error:
        says = error.problem
    else:
        says = f"it does not read {json.dumps(value, allow_nan=False)}"
    assert says.startswith(("it does not read", "it is "))


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1" * 5000, "-1e999", "[" * 100_000, '{"a":' * 1000]
)
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ResvitError, match="does not read"):
        json_from_outside(text.encode(), "it")


def test_depth_has_a_bound() -> None:
    text = "[" * DEPTH_MOST + "]" * DEPTH_MOST
    json_from_outside(text.encode(), "it")
    with pytest.raises(ResvitError, match=f"more than {DEPTH_MOST} deep"):
        json_from_outside(f"[{text}]".encode(), "it")


@given(st.text(st.characters(exclude_categories=())))
@settings(deadline=None)
def test_names_that_are_not_utf8_are_written_as_valid_utf8_and_come_back(name: str) -> None:
    for write in (canonical_json, pretty_json):
        data = write({name: name})
        data.decode()
        # A pair of surrogates is one character to JSON, and in no file's name.
        if not re.search("[\ud800-\udbff][\udc00-\udfff]", name):
            assert json_from_outside(data, "it") == {name: name}
