"""What came back from the device: what it is, the engine that it built, its answers and its times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_calibrate.gate.gate import Verdict, VerdictKind
from resvit_engines.builder.settings import EngineReport
from resvit_engines.errors import ExitCode
from resvit_engines.machine import DeviceFacts, facts_from_json


@dataclass(frozen=True)
class DeviceResult:
    """What ``device.json`` holds. ``images`` were answered; without any there is no verdict.

    ``bench`` and ``golden`` are as the device reports them, ``runner`` says what computed the answers.
    """

    device: DeviceFacts
    engine: EngineReport
    bench: Mapping[str, Any]
    golden: Mapping[str, Any]
    rehearsal: bool
    images: int
    verdict: Verdict | None
    runner: str | None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DeviceResult:
        """Read what the stage ``device`` wrote."""
        return cls(
            device=facts_from_json(document["facts"]),
            engine=EngineReport.from_json(document["engine"]),
            bench=document["bench"],
            golden=document["golden"],
            rehearsal=document["rehearsal"],
            images=document["images"],
            verdict=Verdict.from_json(document["verdict"]) if document["verdict"] else None,
            runner=document.get("runner"),
        )

    def exit_code(self, *, allow_rejected: bool) -> ExitCode:
        """What the process returns for the verdict on the device's answers."""
        if self.verdict is None or (self.verdict.kind is VerdictKind.REJECTED and allow_rejected):
            return ExitCode.OK
        return self.verdict.exit_code

    def lines(self, engine: str) -> tuple[str, ...]:
        """What came of it, for people; ``engine`` says where the engine lies."""
        lines = [
            f"device: {self.device.gpu or self.device.host}, {self.engine.builder} {self.engine.builder_version}: "
            f"{self.engine.bytes} bytes in {self.engine.seconds:.1f} s ({engine})"
        ]
        if self.verdict:
            lines.append(f"device verdict: {self.verdict.kind.value}; {self.verdict.reason} ({self.runner})")
        if "latency_ms" in self.bench:
            times = self.bench["latency_ms"]
            lines.append(
                f"device time: median {times['p50']:.2f} ms, 99% below {times['p99']:.2f} ms at batch "
                f"{self.bench['batch']} ({self.bench['label']})"
            )
            lines += [f"device: {remark}" for remark in self.bench["remarks"]]
        if self.rehearsal:
            lines.append(
                "device: this was a REHEARSAL; TensorRT for RTX stood in, and nothing of it is true of the device"
            )
        return tuple(lines)
