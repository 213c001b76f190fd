"""A run is a folder of finished stages, each named by what went into it.

A stage lives in ``<stage>-<key>`` (see ``stage.Key``). The folder appears in one step when the stage is complete, so a
stage that is there is whole, one whose value is unchanged is not done again, and a killed run continues where it
stopped. Stages that two targets share are therefore shared by themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_directory, explain_os_errors, make_folder, open_lock, pretty_json, sha256_file
from resvit_engines.names import is_relative_path
from resvit_engines.process import peak_memory_mib
from resvit_engines.progress import Reporter, detail, working
from resvit_engines.records import record_from_file
from resvit_export.recipe.choices import StageName
from resvit_export.stage import RECORD, A, Key, Output, Record, Stage, inputs_of

UNFINISHED = "unfinished"
"""The folder of what stages have done so far that take long."""
STAGE_FOLDER = re.compile(r"[a-z]+(-[a-z]+)*-[0-9a-f]{12}")
"""What folders of finished stages are called."""


class NotFinishedError(ResvitError):
    """A stage that was only looked up is not there yet."""

    def __init__(self, stage: str) -> None:
        own = f"'resvit-export {stage}' or 'build'" if stage in set(StageName) else "'resvit-export build'"
        super().__init__(f"The stage '{stage}' is not finished.", f"Run {own} first.")


class RunFolder:
    """The folder of one run, held by one process at a time."""

    def __init__(self, path: Path, reporter: Reporter, finished: Callable[[Path], None] | None = None) -> None:
        """``finished`` is told the folder of every stage that is done here."""
        self.path = path
        self.reporter = reporter
        self._tell = finished
        self._tell_first: Callable[[], None] | None = None
        self._look_only = self._look_back = False
        self._told: set[str] = set()
        """Finished stages of which was said that they are there."""
        self._done: set[str] = set()
        """Those of them that were done by way of this object: none of these is called reused."""

    @property
    def looks_only(self) -> bool:
        """Whether stages are looked up and never computed."""
        return self._look_only

    @contextlib.contextmanager
    def looking_only(self) -> Iterator[None]:
        """Within the block stages are looked up and never computed: one that is missing raises."""
        before, self._look_only = self._look_only, True
        try:
            yield
        finally:
            self._look_only = before

    @property
    def looks_back(self) -> bool:
        """Whether what is kept of the images stands for them."""
        return self._look_back

    @contextlib.contextmanager
    def looking_back(self) -> Iterator[None]:
        """As ``looking_only``, and no data is opened: images may have changed since, or be gone.

        What the run keeps of them stands for them; of a run that keeps nothing they are opened all the same.
        """
        before, self._look_back = self._look_back, True
        try:
            with self.looking_only():
                yield
        finally:
            self._look_back = before

    @contextlib.contextmanager
    def telling_the_first(self, done: Callable[[], None]) -> Iterator[None]:
        """Within the block ``done`` is called once, when the first stage is done anew."""
        self._tell_first = done
        try:
            yield
        finally:
            self._tell_first = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Hold the run for the length of the block; what a killed process left half-done is removed first.

        Raises ``ResvitError`` when another process holds it.
        """
        with explain_os_errors(self.path):
            make_folder(self.path)
            lock = open_lock(self.path / ".lock", 0o664)
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

    def unfinished(self, stage: Stage[Any]) -> tuple[Path, str]:
        """Where a stage may keep what it has done so far, for a process that goes on after a kill, and its key."""
        key = Key.of(stage)
        return self.path / UNFINISHED / self._folder(key).name, key.digest

    def do(self, stage: Stage[A]) -> A:
        """The finished stage: as it stands, if it is intact, else done now."""
        return self.do_together([stage], lambda missing: stage.fill(missing[0][1], self.reporter))[0]

    def take(self, name: str, files: Mapping[str, bytes]) -> None:
        """Keep a stage that was finished elsewhere, its files by their paths; it is checked when it is used.

        One that is there already stays.

        Raises:
            ResvitError: INPUT for names that are no stage's, SYSTEM where the disk is full.
        """
        folder = self.path / name
        if os.path.lexists(folder):
            return
        if not STAGE_FOLDER.fullmatch(name) or not all(map(is_relative_path, files)):
            raise ResvitError(f"{name!r:.100} is no finished stage.", "Have it done by the same version everywhere.")
        with atomic_directory(folder) as partial:
            for path, content in files.items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(content)
        self._done.add(name)
        self._told.add(name)
        if self._tell is not None:
            self._tell(folder)

    def has(self, stage: Stage[A]) -> bool:
        """Whether the stage was done once, whatever has become of its files."""
        return os.path.lexists(self._folder(Key.of(stage)))

    def is_ahead(self, stage: Stage[A]) -> bool:
        """Whether a stage is to be done: what would end the run behind it is looked for before."""
        return not self._look_only and not self.has(stage)

    def records(self, stage: str) -> Iterator[Record]:
        """What is kept of every finished stage of that name; one that cannot be read is passed over."""
        for folder in sorted(self.path.glob(f"{stage}-*")):
            with contextlib.suppress(ResvitError):
                yield read_record(folder)

    def do_together(
        self, stages: Sequence[Stage[A]], fill: Callable[[Sequence[tuple[Stage[A], Path]]], None]
    ) -> list[A]:
        """Several finished stages that share work: ``fill`` gets those that are missing, each with its folder."""
        keys = [Key.of(stage) for stage in stages]
        artifacts = [self._finished(stage, key) for stage, key in zip(stages, keys, strict=True)]
        missing = [index for index, artifact in enumerate(artifacts) if artifact is None]
        if missing and self._look_only:
            raise NotFinishedError(stages[missing[0]].name)
        if missing:
            names = ", ".join(dict.fromkeys(keys[index].stage for index in missing))
            start = time.monotonic()
            _reset_peak_memory()
            with contextlib.ExitStack() as owned:
                owned.enter_context(working(self.reporter, names))
                owned.enter_context(self._full_disk_explained(self._folder(keys[missing[0]])))
                partials = [owned.enter_context(atomic_directory(self._folder(keys[index]))) for index in missing]
                fill([(stages[index], partial) for index, partial in zip(missing, partials, strict=True)])
                # What was computed of a file that changed meanwhile belongs to no key.
                for file in {str(item.path): item for index in missing for item in inputs_of(stages[index])}.values():
                    file.require_unchanged()
                seconds, peak_mib = round((time.monotonic() - start) / len(missing), 3), peak_memory_mib()
                self._done |= {self._folder(keys[index]).name for index in missing}
                self._told |= self._done
                for index, partial in zip(missing, partials, strict=True):
                    record = _recorded(keys[index], partial, seconds, peak_mib)
                    artifacts[index] = _artifact(stages[index], self._folder(keys[index]), record, reused=False)
            if self._tell_first is not None:
                self._tell_first()
                self._tell_first = None
            if self._tell is not None:
                for index in missing:
                    self._tell(self._folder(keys[index]))
            places = ", ".join(self._folder(keys[index]).name for index in missing)
            self.reporter.say(f"{names}: {seconds * len(missing):.1f} s")
            detail(self.reporter, f"  in {places}, peak {peak_mib} MiB")
        return [artifact for artifact in artifacts if artifact is not None]

    def _folder(self, key: Key) -> Path:
        return self.path / f"{key.stage}-{key.digest[:12]}"

    def _finished(self, stage: Stage[A], key: Key) -> A | None:
        """The stage as it stands, or ``None`` where there is none or a file was damaged since."""
        folder = self._folder(key)
        if not os.path.lexists(folder):
            return None
        try:
            artifact = _artifact(stage, folder, _intact(folder, key), reused=folder.name not in self._done)
            agrees = stage.agrees(artifact)
        except ResvitError as error:
            self.reporter.warn(f"{folder} is damaged; the stage is done again. {error.problem}")
            return None
        if (changed := artifact.outdated()) is not None:
            self.reporter.say(f"{key.stage}: {changed} has changed since; the stage is done again")
            return None
        if not agrees:
            self.reporter.warn(f"{folder} is not what it was made from says; the stage is done again.")
            return None
        if not self._look_only and folder.name not in self._told:
            self._told.add(folder.name)
            self.reporter.say(f"{key.stage}: unchanged")
            detail(self.reporter, f"  in {folder.name}")
        return artifact

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


def read_record(folder: Path) -> Record:
    """The record of a finished stage; ``ResvitError`` INPUT where it is not what this version writes."""
    return Record.from_json(record_from_file(folder / RECORD))


def _recorded(key: Key, folder: Path, seconds: float, peak_mib: int) -> Record:
    """Digest what lies in a folder, and write the record beside it."""
    files = [folder / name for name in _names(folder)]
    outputs = {str(file.relative_to(folder)): Output(sha256_file(file), file.stat().st_size) for file in files}
    record = Record(key.stage, key.digest, key.value, key.versions, outputs, seconds, peak_mib)
    (folder / RECORD).write_bytes(pretty_json(record.to_json()))
    return record


def _artifact(stage: Stage[A], folder: Path, record: Record, *, reused: bool) -> A:
    """Read back as the kind that the stage says."""
    artifact: A = stage.artifact(folder, record, reused)  # type: ignore[assignment]  # a class variable holds no A
    return artifact


def _intact(folder: Path, key: Key) -> Record:
    """The record of a stage that is as it was when the record was written.

    Raises:
        ResvitError: with what was changed.
    """

    def damaged(problem: str) -> ResvitError:
        return ResvitError(problem, f"Remove {folder}.")

    record = read_record(folder)
    if record.key != key.digest:
        raise damaged(f"{RECORD} is that of another stage.")
    for name in sorted((set(_names(folder)) - {RECORD}) ^ set(record.outputs)):
        raise damaged(f"{name} is missing." if name in record.outputs else f"{name} is of no stage.")
    for name, output in record.outputs.items():
        file = folder / name
        try:
            same = not file.is_symlink() and file.stat().st_size == output.bytes and sha256_file(file) == output.sha256
        except OSError as error:
            raise damaged(f"{name} cannot be read: {error.strerror}.") from error
        if not same:
            raise damaged(f"{name} was changed.")
    return record


def _names(folder: Path) -> list[str]:
    """The paths below a folder of all that is no folder; links count, whatever they lead to."""
    return [
        str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()
    ]


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
