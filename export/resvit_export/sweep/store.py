"""Finished stages of a sweep's runs in an object store, for machines that share no file system.

A stage is kept under its folder's name, which its inputs decide; the record, which holds the digest of every file,
comes last. So what a store holds of a stage is whole or counts as nothing, and what it gives back is checked as any
finished stage is (``run_folder.py``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError, first_line
from resvit_engines.files import atomic_directory, cache_folder
from resvit_engines.names import is_relative_path
from resvit_export.run_folder import STAGE_FOLDER, read_record
from resvit_export.stage import RECORD

SCHEME = "s3://"
_PLACE = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*")
_ANY_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_RECORD_MOST = 16 << 20
_FIX = (
    "Give credentials as for other programs that use S3 (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile), "
    "the address of one that is not Amazon's in AWS_ENDPOINT_URL, and name a bucket that is there."
)


def place_of(out: str) -> Path | RunStore:
    """Where runs go: the folder or the store that ``out`` names.

    Raises:
        ResvitError: INPUT for an address of something else; as ``RunStore.at``.
    """
    if out.startswith(SCHEME):
        return RunStore.at(out)
    if found := _ANY_SCHEME.match(out):
        raise ResvitError(
            f"{out!r:.200} names no place for runs: {found[0].rstrip('/')} is not spoken here.",
            "Give a folder, or s3://BUCKET/FOLDER. A folder of such a name: ./NAME.",
        )
    return Path(out)


@dataclass(frozen=True)
class RunStore:
    """The runs of a sweep below ``url``: ``s3://BUCKET/PREFIX``, in any store that speaks S3."""

    url: str

    @classmethod
    def at(cls, url: str) -> RunStore:
        """The store at ``url``, which is not looked at yet.

        Raises:
            ResvitError: INPUT for an address that is none; MISSING without the libraries.
        """
        place = url.removeprefix(SCHEME).rstrip("/")
        if not url.startswith(SCHEME) or not _PLACE.fullmatch(place) or not is_relative_path(place):
            raise ResvitError(f"{url!r} names no place in a store.", "Write it as s3://BUCKET/FOLDER.")
        try:
            import s3fs  # noqa: F401
        except ImportError as error:
            raise ResvitError(
                f"The library for S3 is not here ({error}).", "pip install 'resvit-export[s3]'", ExitCode.MISSING
            ) from error
        return cls(SCHEME + place)

    @property
    def scratch(self) -> Path:
        """Where runs lie on this machine while they are worked on; it is kept, so that a killed worker goes on."""
        return cache_folder("sweeps") / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def meet(self, run: str, folder: Path) -> None:
        """Give ``folder`` the finished stages of a run that it lacks, and the store those that it lacks.

        What is no stage of ours in the store is passed over.

        Raises:
            ResvitError: SYSTEM where the store cannot be reached or read, or the disk be written.
        """
        with _told(self.url) as files:
            prefix = f"{self.url.removeprefix(SCHEME)}/{run}/"
            held: dict[str, list[str]] = {}
            for key in files.find(prefix):
                stage, _, name = key.removeprefix(prefix).partition("/")
                if STAGE_FOLDER.fullmatch(stage) and is_relative_path(name):
                    held.setdefault(stage, []).append(name)
            for stage, names in held.items():
                if RECORD in names and not (folder / stage).exists():
                    _fetch(files, f"{prefix}{stage}", names, folder / stage)
        for path in sorted(folder.glob(f"*/{RECORD}")):
            stage = path.parent
            if STAGE_FOLDER.fullmatch(stage.name) and RECORD not in held.get(stage.name, ()) and _is_whole(stage):
                self.keep(run, stage)

    def keep(self, run: str, path: Path) -> None:
        """Put a file of a run into the store, or the folder of a finished stage, its record last.

        Without a name of a ``run`` it is the sweep's.

        Raises:
            ResvitError: SYSTEM as ``meet``.
        """
        sources = [path]
        if path.is_dir():
            sources = [path / name for name in read_record(path).outputs] + [path / RECORD]
        with _told(self.url) as files:
            for source in sources:
                key = "/".join(filter(None, (self.url, run, str(source.relative_to(path.parent)))))
                files.put_file(str(source), key)


def _fetch(files: Any, stage: str, names: list[str], folder: Path) -> None:
    """Copy a stage out of the store: its record first, and what that names."""
    if files.size(f"{stage}/{RECORD}") > _RECORD_MOST:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(folder) as partial:
        files.get_file(f"{stage}/{RECORD}", str(partial / RECORD))
        try:
            outputs = read_record(partial).outputs
        except ResvitError:
            outputs = {}
        for name, output in outputs.items():
            if name in names and files.size(f"{stage}/{name}") == output.bytes:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                files.get_file(f"{stage}/{name}", str(partial / name))


def _is_whole(stage: Path) -> bool:
    """Whether all that a finished stage's record names is there; what is not is done again, and kept then."""
    try:
        outputs = read_record(stage).outputs
        return all((stage / name).stat().st_size == output.bytes for name, output in outputs.items())
    except (ResvitError, OSError):
        return False


@contextmanager
def _told(url: str) -> Iterator[Any]:
    """The store's files; whatever its libraries raise is told with the store's address."""
    import fsspec

    try:
        yield fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    except ResvitError:
        raise
    except Exception as error:
        raise ResvitError(f"The store {url} cannot be used: {first_line(error)}.", _FIX, ExitCode.SYSTEM) from error
