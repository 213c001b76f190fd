"""Arrays of others: what numpy wrote comes back, and of anything else there is one kind of error."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.run.npy import read_array

DTYPES = hnp.integer_dtypes() | hnp.floating_dtypes() | hnp.boolean_dtypes() | hnp.unsigned_integer_dtypes()
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=4))


def written(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def read(data: bytes) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npy"
        path.write_bytes(data)
        return read_array(path, "input")


@pytest.mark.whole
@given(ARRAYS, st.booleans())
@settings(deadline=None)
def test_what_numpy_wrote_comes_back(array: np.ndarray, fortran: bool) -> None:
    array = np.asfortranarray(array) if fortran else array
    back = read(written(array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.whole
@given(ARRAYS, st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_read_or_refused(array: np.ndarray, data: st.DataObject) -> None:
    content = bytearray(written(array))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:end])):
        try:
            assert read(damaged).ndim >= 1
        except ResvitError as error:
            refusal = error.code
        else:
            refusal = ExitCode.INPUT
        assert refusal == ExitCode.INPUT


def header(text: str, magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    return magic + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not begin as one"),
        (b"\x93NUMPY", "does not begin as one"),
        (b"PK\x03\x04 a zip archive", "does not begin as one"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"), "more than the 0 bytes"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (), }") + bytes(4), "no array of numbers"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "no array of numbers"),
        (header("{'descr': '<f9', 'fortran_order': False, 'shape': (1,), }"), "no type"),
        (header("{'descr': '<f4', 'descr': '<f4', 'shape': (1,), }"), "no array of numbers"),
        (header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }"), "no array of numbers"),
        (header("(" * 60000), "no array of numbers"),
        (header("{'descr': __import__('os').system('x'), 'fortran_order': False, 'shape': (1,), }"), "no array"),
    ],
)
def test_what_is_no_array(content: bytes, says: str) -> None:
    with pytest.raises(ResvitError, match=says) as caught:
        read(content)
    assert caught.value.code == ExitCode.INPUT
