"""A run is a folder of finished stages, each named by what went into it.

A stage lives in ``<stage>-<key>``, where the key digests its settings, the digests of its inputs and the versions
of the packages that computed it. The folder appears in one step when the stage is complete, so a stage that is
there is whole, one whose inputs and settings are unchanged is not done again, and a killed run continues where it
stopped. Stages that two targets share are therefore shared by themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import (
    atomic_directory,
    canonical_json,
    explain_os_errors,
    pretty_json,
    sha256_bytes,
    sha256_file,
)
from resvit_engines.process import peak_memory_mib
from resvit_engines.progress import Reporter

RECORD = "record.json"


@dataclass(frozen=True)
class Artifact:
    """One finished stage: where it lies, and its record (settings, inputs, output digests, cost)."""

    stage: str
    folder: Path
    record: Mapping[str, Any]
    reused: bool

    @property
    def digest(self) -> str:
        """Digest over the contents of all output files."""
        return sha256_bytes(canonical_json(self.record["outputs"]))

    @property
    def seconds(self) -> float:
        """Wall time that the stage took when it was computed."""
        return float(self.record["seconds"])

    def path(self, name: str) -> Path:
        """Path of one output file."""
        return self.folder / name

    def json(self, name: str) -> dict[str, Any]:
        """Content of one JSON output."""
        value: dict[str, Any] = json.loads(self.path(name).read_bytes())
        return value


class NotFinishedError(ResvitError):
    """A stage that was only looked up is not there yet."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"The stage '{stage}' is not finished.", f"Run 'resvit-export {stage}' or 'build' first.")


class RunFolder:
    """The folder of one run, held by one process at a time."""

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self.path = path
        self.reporter = reporter
        self._look_only = False

    @contextlib.contextmanager
    def looking_only(self) -> Iterator[None]:
        """Within the block stages are looked up and never computed: one that is missing raises."""
        before, self._look_only = self._look_only, True
        try:
            yield
        finally:
            self._look_only = before

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Hold the run for the length of the block; what a killed process left half-done is removed first.

        Raises ``ResvitError`` when another process holds it.
        """
        with explain_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ResvitError(
                    f"Another process is working in {self.path}.",
                    "Wait for it to end, or give another folder with --run.",
                    ExitCode.SYSTEM,
                ) from error
            for leftover in self.path.glob(".*.tmp"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
            yield self
        finally:
            os.close(lock)

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        packages: tuple[str, ...],
        work: Callable[[Path], None],
    ) -> Artifact:
        """Return the stage if it stands finished and intact, else let ``work`` fill its folder.

        ``inputs`` maps a name to a digest; ``packages`` are the distributions whose versions change the result.
        """
        facts = {
            "stage": name,
            "settings": dict(settings),
            "inputs": dict(inputs),
            "versions": {package: package_version(package) for package in ("resvit-export", *packages)},
        }
        key = sha256_bytes(canonical_json(facts))
        folder = self.path / f"{name}-{key[:12]}"
        record = self._intact(folder, key)
        if record is not None:
            if not self._look_only:
                self.reporter.say(f"{name}: unchanged ({folder.name})")
            return Artifact(name, folder, record, reused=True)
        if self._look_only:
            raise NotFinishedError(name)
        self.reporter.say(f"{name} …")
        start = time.monotonic()
        _reset_peak_memory()
        with self._full_disk_explained(folder), atomic_directory(folder) as partial:
            work(partial)
            record = {
                **facts,
                "key": key,
                "outputs": {
                    str(file.relative_to(partial)): {
                        "sha256": sha256_file(file),
                        "bytes": file.stat().st_size,
                    }
                    for file in sorted(partial.rglob("*"))
                    if file.is_file()
                },
                "seconds": round(time.monotonic() - start, 3),
                "peak_mib": peak_memory_mib(),
            }
            (partial / RECORD).write_bytes(pretty_json(record))
        self.reporter.say(f"{name}: {record['seconds']:.1f} s, peak {record['peak_mib']} MiB ({folder.name})")
        return Artifact(name, folder, record, reused=False)

    def _intact(self, folder: Path, key: str) -> dict[str, Any] | None:
        """The record of a finished stage, or ``None`` where there is none or a file was damaged since."""
        if not folder.is_dir():
            return None
        try:
            record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
            whole = record["key"] == key and all(
                (folder / name).stat().st_size == output["bytes"] and sha256_file(folder / name) == output["sha256"]
                for name, output in record["outputs"].items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            self.reporter.warn(f"{folder} is damaged (a file is missing or was changed); the stage is done again.")
            return None
        return record

    @contextlib.contextmanager
    def _full_disk_explained(self, folder: Path) -> Iterator[None]:
        """Name a full disk as such even where a library reports it as an error of its own."""
        try:
            yield
        except (ResvitError, KeyboardInterrupt):
            raise
        except Exception as error:
            if shutil.disk_usage(self.path).free < 1 << 20:
                raise ResvitError(
                    f"The disk is full: {folder} could not be written ({error}). Nothing was damaged.",
                    "Free some space and run the same command again; finished stages are kept.",
                    ExitCode.SYSTEM,
                ) from error
            raise


def package_version(name: str) -> str:
    """Installed version of a distribution, or ``absent``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
