"""The power mode and clocks that a timing was made under: figures without them cannot be compared.

On a Jetson ``nvpmodel`` and devfreq say it (``jetson_clocks`` locks the clocks), elsewhere ``nvidia-smi``. Nothing is
changed.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from resvit_engines.machine import this_machine
from resvit_engines.records import Record

NOT_REPORTED = "not reported"
_QUERY = ("clocks.sm", "clocks.max.sm", "power.limit", "power.max_limit", "temperature.gpu")
_MOVED = 0.03


@dataclass(frozen=True)
class Conditions:
    """How a machine stood. ``sm_mhz`` and ``max_sm_mhz`` are GPU clocks, ``power_limit_w`` watts, ``gpu_c`` °C."""

    power_mode: str = NOT_REPORTED
    clocks: str = NOT_REPORTED
    sm_mhz: float | None = None
    max_sm_mhz: float | None = None
    power_limit_w: float | None = None
    gpu_c: float | None = None

    @property
    def locked(self) -> bool | None:
        """Whether the GPU clock is known to be fixed; None where nothing says so."""
        if self.clocks.startswith("locked"):
            return True
        return False if self.clocks.startswith("not locked") else None

    @property
    def sentence(self) -> str:
        """In words."""
        limit = "" if self.power_limit_w is None else f", limit {self.power_limit_w:.0f} W"
        heat = "" if self.gpu_c is None else f", {self.gpu_c:.0f} °C"
        return f"power mode {self.power_mode}{limit}; GPU clock {self.clocks}{heat}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "locked": self.locked}

    @classmethod
    def from_json(cls, record: Record) -> Conditions:
        """What :meth:`to_json` wrote."""
        return cls(
            record.text("power_mode"),
            record.text("clocks"),
            record.optional("sm_mhz", record.number),
            record.optional("max_sm_mhz", record.number),
            record.optional("power_limit_w", record.number),
            record.optional("gpu_c", record.number),
        )


def conditions_now(*, on_gpu: bool) -> Conditions:
    """Read power mode and clocks. What is not to be had says "not reported"; without a GPU nothing is asked for."""
    if not on_gpu:
        return Conditions()
    machine = this_machine()
    numbers = smi_numbers(_smi())
    return Conditions(
        machine.power_mode or NOT_REPORTED,
        machine.clocks or NOT_REPORTED,
        numbers.get("clocks.sm"),
        numbers.get("clocks.max.sm"),
        numbers.get("power.limit"),
        numbers.get("temperature.gpu"),
    )


def smi_numbers(line: str) -> dict[str, float]:
    """The numbers in a line of ``nvidia-smi --format=csv,noheader,nounits``; ``[N/A]`` and the like are left out."""
    found = {}
    for name, text in zip(_QUERY, line.strip().split("\n")[0].split(","), strict=False):
        try:
            found[name] = float(text)
        except ValueError:
            continue
    return found


def clock_warnings(before: Conditions, after: Conditions) -> tuple[str, ...]:
    """What speaks against trusting a timing made between the two."""
    found = []
    if before.locked is False:
        found.append("The GPU's clocks are not locked: run 'sudo jetson_clocks' (and choose the power mode) first.")
    if before.sm_mhz and after.sm_mhz and abs(after.sm_mhz / before.sm_mhz - 1) > _MOVED:
        found.append(f"The GPU clock went from {before.sm_mhz:.0f} to {after.sm_mhz:.0f} MHz while it was timed.")
    return tuple(found)


def _smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--id=0", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
