"""``result.json`` of a job: what a device built, checked, answered and timed, or the error that ended it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from resvit_engines.bench.bench import BenchReport
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine
from resvit_engines.records import Record
from resvit_engines.run.golden import GoldenReport

_ENDS = ("INPUT", "IMPOSSIBLE", "MISSING", "BUILD", "SYSTEM", "UNTRUSTED", "MISMATCH", "INTERRUPTED")
_CODES = {**{ExitCode[name]: ExitCode[name] for name in _ENDS}, ExitCode.BUG: ExitCode.BUILD}
"""How a job can end in an error, and the exit code of that here: what is a bug there is none of this program here."""


class Written(Protocol):
    """What a phase or a job came to, which can be written."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...


@dataclass(frozen=True)
class Skipped:
    """In place of what a rehearsal could not do: why."""

    why: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"skipped": self.why}


@dataclass(frozen=True)
class Answers:
    """How many images were answered, and by what; ``why`` is why that was not the engine.

    Without images there is no ``runner``; ``skipped`` says why, where there were some.
    """

    images: int
    runner: str | None
    why: str | None = None
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        known = {"why": self.why, "skipped": self.skipped}
        said = {key: value for key, value in known.items() if value is not None}
        return {"images": self.images, "runner": self.runner, **said}

    @classmethod
    def from_json(cls, record: Record) -> Answers:
        """What :meth:`to_json` wrote."""
        return cls(
            record.whole("images"),
            record.optional("runner", record.text),
            record.optional("why", record.text),
            record.optional("skipped", record.text),
        )


@dataclass(frozen=True)
class DeviceBundle:
    """The bundle with the new engine: its file's name and digest, and the public key that signed it, as text."""

    name: str
    sha256: str
    key: str
    keyid: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "sha256": self.sha256, "key": self.key, "keyid": self.keyid}

    @classmethod
    def from_json(cls, record: Record) -> DeviceBundle:
        """What :meth:`to_json` wrote."""
        return cls(record.file_name("name"), record.sha256("sha256"), record.text("key"), record.text("keyid"))


@dataclass(frozen=True)
class JobResult:
    """What a job did, on which machine; ``rehearsal`` tells whether TensorRT for RTX stood in for TensorRT."""

    engine: EngineReport
    rehearsal: bool
    machine: Machine
    golden: GoldenReport | Skipped
    outputs: Answers
    bench: BenchReport | Skipped
    bundle: DeviceBundle

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "engine": self.engine.to_json(),
            "rehearsal": self.rehearsal,
            "facts": self.machine.to_json(),
            "golden": self.golden.to_json(),
            "outputs": self.outputs.to_json(),
            "bench": self.bench.to_json(),
            "bundle": self.bundle.to_json(),
        }

    @classmethod
    def from_json(cls, record: Record) -> JobResult:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        return cls(
            EngineReport.from_json(record.record("engine")),
            record.flag("rehearsal"),
            Machine.from_json(record.record("facts")),
            golden_from_json(record.record("golden")),
            Answers.from_json(record.record("outputs")),
            bench_from_json(record.record("bench")),
            DeviceBundle.from_json(record.record("bundle")),
        )


def golden_from_json(record: Record) -> GoldenReport | Skipped:
    """What was written of the golden check."""
    why = record.optional("skipped", record.text)
    return GoldenReport.from_json(record) if why is None else Skipped(why)


def bench_from_json(record: Record) -> BenchReport | Skipped:
    """What was written of the timing."""
    why = record.optional("skipped", record.text)
    return BenchReport.from_json(record) if why is None else Skipped(why)


def document_of(result: Written | ResvitError) -> dict[str, Any]:
    """How a job ended, as ``result.json`` holds it."""
    if isinstance(result, ResvitError):
        return {"error": {"problem": result.problem, "fix": result.fix, "exit_code": int(result.code)}}
    return {"result": result.to_json()}


def finished_result(record: Record, device: str) -> Record:
    """The result in what ``document_of`` wrote on ``device``.

    Raises:
        ResvitError: the error that ended the job there; INPUT, naming the key, where the document is malformed.
    """
    error = record.optional("error", record.record)
    if error is not None:
        code = error.whole("exit_code", 1, 255)
        if code not in _CODES:
            raise error.refusal("exit_code", f"one of {', '.join(str(int(known)) for known in _CODES)}")
        raise ResvitError(f"On {device}: {error.text('problem')}", error.text("fix"), _CODES[ExitCode(code)])
    return record.record("result")
