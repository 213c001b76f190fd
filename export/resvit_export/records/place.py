"""Where variants of a network are timed: this machine, or a device over SSH."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resvit_engines.machine import Machine
from resvit_engines.targets.table import Target

_FACTS = ("gpu", "sm", "processor", "arch", "tensorrt", "rtx", "jetpack", "onnxruntime", "power_mode", "host")
_OF_ONE_MACHINE = ("host",)


@dataclass(frozen=True)
class Place:
    """What it is and what is installed there (``facts``), the same under any ``address`` (None: this machine).

    ``rehearse`` lets TensorRT for RTX stand in for TensorRT, and the processor for the GPU: then times say nothing.
    """

    facts: Mapping[str, Any]
    address: str | None = field(default=None, compare=False)
    rehearse: bool = False

    @classmethod
    def of(cls, machine: Machine, target: Target, address: str | None = None, *, rehearse: bool = False) -> Place:
        """The machine, with what of it makes times for the target other ones."""
        known = dataclasses.asdict(machine)
        about_gpu = ("gpu", "sm", "tensorrt", "rtx", "jetpack", "power_mode")
        names = [name for name in _FACTS if not (target.on_cpu and name in about_gpu)]
        names = [name for name in names if target.on_cpu or name != "onnxruntime"]
        return cls({name: known[name] for name in names if known[name]}, address, rehearse)

    @property
    def kind(self) -> dict[str, Any]:
        """What it shares with every machine of its kind that has the same software."""
        return {name: value for name, value in self.facts.items() if name not in _OF_ONE_MACHINE}

    @property
    def title(self) -> str:
        """For people."""
        what = self.facts.get("gpu") or self.facts.get("processor") or self.facts.get("arch", "this machine")
        host = self.facts.get("host")
        return f"{what} ({host})" if host else str(what)
