"""What a stage is: a value that holds all it may see, its key, and what it leaves behind.

A stage is a frozen dataclass. Its fields are the artefacts that it reads, the settings that change its result and the
user's code that it runs; ``fill`` gets that value, a folder and a reporter, and nothing else. The key digests the value
together with the versions of the libraries that compute it, so that nothing can change a result without changing
the key.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from resvit_engines import records
from resvit_engines.errors import ResvitError
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file
from resvit_engines.outside import json_from_outside, read_outside
from resvit_engines.progress import Reporter

RECORD = "record.json"
_AT_ONCE_MOST = 16 << 30
"""Bytes of the longest file of a stage that is read at once: answers grow with the images."""
_OF_ANOTHER_FORM = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What reading a document raises that is not what this version writes."""
T = TypeVar("T")


@runtime_checkable
class Digested(Protocol):
    """Anything that one text tells from all that differs: images, files, artefacts, the user's network."""

    @property
    def digest(self) -> str:
        """That text."""
        ...


@dataclass(frozen=True)
class File:
    """A file and the SHA-256 of its content; where it lies is no part of what it is."""

    path: Path = dataclasses.field(compare=False)
    digest: str

    @classmethod
    def of(cls, path: Path) -> File:
        """Read the file's digest."""
        return cls(path, sha256_file(path))

    def require_unchanged(self) -> None:
        """Refuse a file that is not any more the one that was digested; raises ``ResvitError`` INPUT."""
        try:
            same = sha256_file(self.path) == self.digest
        except OSError:
            same = False
        if not same:
            raise _changed(self.path)

    def content(self) -> bytes:
        """What is in the file, the very bytes that were digested; raises ``ResvitError`` INPUT where it was changed."""
        data = read_outside(self.path, _AT_ONCE_MOST)
        if sha256_bytes(data) != self.digest:
            raise _changed(self.path)
        return data

    def read(self, parse: Callable[[bytes, str], T]) -> T:
        """What ``parse`` makes of the content, which errors call by the file's path; raises as both do."""
        return parse(self.content(), str(self.path))

    def json(self) -> Any:
        """The content parsed as JSON; raises as ``content``, and where it is none."""
        return self.read(json_from_outside)


@dataclass(frozen=True)
class Output:
    """One file of a finished stage."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Record:
    """What is kept of a finished stage: its key and all that went into it, its files, and what it cost.

    ``value`` is the stage as :func:`plain` writes it, ``seconds`` wall time, ``peak_mib`` peak memory in MiB.
    """

    stage: str
    key: str
    value: Any
    versions: Mapping[str, str]
    outputs: Mapping[str, Output]
    seconds: float
    peak_mib: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in ``record.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: records.Record) -> Record:
        """Read what ``to_json`` wrote; ``ResvitError`` INPUT, naming the key, for anything else."""
        files = record.record("outputs")
        outputs = {name: files.record(name) for name in files.names}
        return cls(
            stage=record.text("stage"),
            key=record.sha256("key"),
            value=record.plain("value"),
            versions=record.texts_by_name("versions"),
            outputs={name: Output(item.sha256("sha256"), item.whole("bytes")) for name, item in outputs.items()},
            seconds=float(record.number("seconds", 0)),
            peak_mib=record.whole("peak_mib"),
        )


@dataclass(frozen=True)
class Artifact:
    """One finished stage: where it lies, and its record. Each stage has its own kind, with what it holds by name."""

    folder: Path
    record: Record
    reused: bool

    @property
    def stage(self) -> str:
        """The name of the stage."""
        return self.record.stage

    @functools.cached_property
    def digest(self) -> str:
        """Digest over the contents of all files."""
        outputs = {name: dataclasses.asdict(output) for name, output in self.record.outputs.items()}
        return sha256_bytes(canonical_json(outputs))

    @property
    def seconds(self) -> float:
        """Wall time that the stage took when it was computed."""
        return self.record.seconds

    def path(self, name: str) -> Path:
        """Path of one file."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the stage wrote that file."""
        return name in self.record.outputs

    def file(self, name: str) -> File:
        """One file, with the digest that it had when it was written; ``ResvitError`` INPUT where there is none."""
        if not self.has(name):
            raise self._done_again(f"{self.folder} does not hold {name}.")
        return File(self.path(name), self.record.outputs[name].sha256)

    def outdated(self) -> str | None:
        """What the user's code read while the stage was computed, and is not the same now; None where all is."""
        return None

    def files(self) -> Iterator[File]:
        """All files that the stage wrote."""
        return map(self.file, self.record.outputs)

    def content(self, name: str) -> bytes:
        """One file as it was when it was written; raises ``ResvitError`` INPUT where it was changed since."""
        return self.file(name).content()

    def json(self, name: str) -> dict[str, Any]:
        """Content of one JSON file, as it was when it was written; raises as ``content``, and where it is none."""
        return self._parsed(name, self.file(name).json(), dict[str, Any])

    def read(self, name: str, reader: Callable[[dict[str, Any]], T]) -> T:
        """What ``reader`` makes of one JSON file.

        Raises:
            ResvitError: INPUT where the file is not what this version writes, whatever ``reader`` raises then.
        """
        return self._parsed(name, self.json(name), reader)

    def _parsed(self, name: str, document: Any, reader: Callable[[Any], T]) -> T:
        try:
            return reader(document)
        except _OF_ANOTHER_FORM as error:
            what = f"{type(error).__name__}: {error}"
            raise self._done_again(
                f"{self.path(name)} is of another form than this version writes ({what})."
            ) from error

    def _done_again(self, problem: str) -> ResvitError:
        return ResvitError(problem, f"Remove {self.folder} and run the same command: the stage is done again.")


A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class Stage(abc.ABC, Generic[A]):
    """The value of one stage. A finished one is read back as ``artifact``; ``packages`` are what computes it."""

    name: ClassVar[str]
    artifact: ClassVar[type[Artifact]] = Artifact
    packages: ClassVar[tuple[str, ...]] = ()

    def libraries(self) -> tuple[str, ...]:
        """The distributions whose versions change the result."""
        return self.packages

    @abc.abstractmethod
    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Compute the stage and write its files into ``folder``, which nobody sees before it is whole."""

    def agrees(self, artifact: A) -> bool:
        """Whether a finished stage, whole as it is, says the same as what it was made from."""
        del artifact
        return True


def inputs_of(value: object) -> Iterator[File]:
    """Every file that a stage reads: those among its fields, and those of the finished stages there."""
    if isinstance(value, File):
        yield value
    elif isinstance(value, Artifact):
        yield from value.files()
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from inputs_of(getattr(value, item.name))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from inputs_of(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from inputs_of(part)


def plain(value: object) -> Any:
    """A value as JSON that differs wherever it does: what computes a digest of itself is that, a dataclass its fields.

    Raises:
        TypeError: for what can be told apart by nothing, such as a function: it has no place in a stage.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    # A digest that is a field like the others tells only what it was taken of.
    if isinstance(value, Digested) and not any(item.name == "digest" for item in fields):
        return value.digest
    if dataclasses.is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields if item.compare}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=canonical_json)
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a stage cannot hold {type(value).__name__}: nothing tells one from another")


@dataclass(frozen=True)
class Key:
    """What makes a stage this one: its value, and the versions of what computes it."""

    stage: str
    value: Any
    versions: Mapping[str, str]

    @classmethod
    def of(cls, stage: Stage[Any]) -> Key:
        """The one place where a key is made."""
        packages = ("resvit-export", *stage.libraries())
        value = {"is": type(stage).__name__, **plain(stage)}
        return cls(stage.name, value, {package: package_version(package) for package in packages})

    @functools.cached_property
    def digest(self) -> str:
        """The key as 64 hexadecimal digits."""
        return sha256_bytes(canonical_json({"stage": self.stage, "value": self.value, "versions": dict(self.versions)}))


def _changed(path: Path) -> ResvitError:
    return ResvitError(
        f"{path} is not what was checked: it was changed after it was made, so nothing is made of it.",
        "Run the same command again: what was changed is made anew. Let nothing else write there.",
    )


@functools.cache
def package_version(name: str) -> str:
    """Installed version of a distribution, or ``absent``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
