"""What came back from the device: what the job there did, and the gate's verdict on its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_calibrate.gate.gate import Verdict, VerdictKind
from resvit_engines.bench.bench import BenchReport
from resvit_engines.builder.settings import TITLES
from resvit_engines.errors import ExitCode
from resvit_engines.records import Record
from resvit_engines.remote.job_result import JobResult


@dataclass(frozen=True)
class DeviceResult:
    """What ``device.json`` holds. ``images`` were answered, by ``runner``; without any there is no verdict."""

    job: JobResult
    images: int
    verdict: Verdict | None
    runner: str | None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DeviceResult:
        """Read what the stage ``device`` wrote."""
        return cls(
            JobResult.from_json(Record(document, "device.json")),
            document["images"],
            Verdict.from_json(document["verdict"]) if document["verdict"] else None,
            document.get("runner"),
        )

    def exit_code(self, *, allow_rejected: bool) -> ExitCode:
        """What the process returns for the verdict on the device's answers."""
        if self.verdict is None or (self.verdict.kind is VerdictKind.REJECTED and allow_rejected):
            return ExitCode.OK
        return self.verdict.exit_code

    def lines(self, engine: str) -> tuple[str, ...]:
        """What came of it, for people; ``engine`` says where the engine lies."""
        machine, built, bench = self.job.machine, self.job.engine, self.job.bench
        name = (machine.gpu if built.sm else machine.processor) or machine.host
        lines = [
            f"device: {name}, {TITLES[built.builder]} {built.builder_version}: {built.bytes} "
            f"bytes in {built.seconds or 0.0:.1f} s ({engine})"
        ]
        if self.verdict:
            lines.append(f"device verdict: {self.verdict.kind.value}; {self.verdict.reason} ({self.runner})")
        if isinstance(bench, BenchReport):
            lines.append(
                f"device time: median {bench.latency_ms['p50']:.2f} ms, 99% below {bench.latency_ms['p99']:.2f} ms at "
                f"batch {bench.batch} ({bench.label})"
            )
            lines += [f"device: {warning}" for warning in bench.warnings]
        if self.job.rehearsal:
            lines.append(
                "device: this was a REHEARSAL; TensorRT for RTX stood in, and nothing of it is true of the device"
            )
        return tuple(lines)
