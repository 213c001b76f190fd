"""Timing caches: what TensorRT measured of kernels, kept for the next build on the same device and version.

A file holds one line of JSON about whose measurements these are, then TensorRT's own bytes. It is replaced in one
step under a lock, so that builds side by side add to it; a file of another device or version is never read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.files import explain_os_errors, held_lock, make_folder, sha256_bytes, write_atomic
from resvit_engines.outside import json_from_outside, read_outside


@dataclass(frozen=True)
class Owner:
    """Whose measurements: the device, its compute capability (87 is 8.7), the builder and the builder's version."""

    target: str
    sm: int
    builder: str
    version: str

    @property
    def file_name(self) -> str:
        """``jetson-orin-sm87-tensorrt-10.3.0.timing``."""
        name = f"{self.target}-sm{self.sm}-{self.builder}-{self.version}"
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name) + ".timing"


_CACHE_MOST = 1 << 30


@dataclass(frozen=True)
class Cached:
    """TensorRT's bytes, empty where there are none that may be used, and why not, if there was a file."""

    content: bytes = b""
    refusal: str = ""


def read_timing_cache(folder: Path, owner: Owner) -> Cached:
    """What is kept in ``folder`` for ``owner``.

    A damaged file, or one of another device or version under this name, gives an empty cache and a sentence.
    """
    path = folder / owner.file_name
    if not os.path.lexists(path):
        return Cached()
    try:
        whole = read_outside(path, _CACHE_MOST, f"The timing cache {path}")
    except ResvitError as error:
        return Cached(refusal=f"{error.problem.rstrip('.')}: starting with an empty one.")
    head, _, content = whole.partition(b"\n")
    try:
        header = json_from_outside(head, str(path))
    except ResvitError:
        header = None
    if not isinstance(header, dict) or header.pop("sha256", None) != sha256_bytes(content):
        return Cached(refusal=f"The timing cache {path} is damaged: starting with an empty one.")
    if header != asdict(owner):
        return Cached(refusal=f"The timing cache {path} is of another device or version: starting with an empty one.")
    return Cached(content)


def write_timing_cache(folder: Path, owner: Owner, content: bytes) -> None:
    """Keep TensorRT's bytes for ``owner``; call within ``locked``.

    Raises:
        ResvitError: SYSTEM where the file cannot be written.
    """
    path = folder / owner.file_name
    # Whoever died while writing held the lock that we hold now.
    for left in folder.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    header = {**asdict(owner), "sha256": sha256_bytes(content)}
    write_atomic(path, json.dumps(header).encode() + b"\n" + content)


@contextlib.contextmanager
def locked(folder: Path, owner: Owner) -> Iterator[None]:
    """Hold the lock of ``owner``'s file in ``folder``, which is made where it is missing; waits for it.

    Raises:
        ResvitError: SYSTEM where the folder or the lock file cannot be written.
    """
    path = folder / f"{owner.file_name}.lock"
    with explain_os_errors(path):
        make_folder(folder)
    with held_lock(path, 0o666):
        yield
