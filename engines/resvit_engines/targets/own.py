"""Targets that are not in the table: the user's own device, and the machine that this runs on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine, this_machine
from resvit_engines.names import require_name
from resvit_engines.targets.choice import with_builder, with_tensorrt
from resvit_engines.targets.software import CUDA_OF_TENSORRT, PTX_OF_CUDA
from resvit_engines.targets.speeds import Speed
from resvit_engines.targets.table import RTX_SMS, TARGETS, Builder, Kind, Target, find_target

AUTO = "auto"
_NAME_MOST = 60
"""Of a recipe's own: the bundle's name holds the model's and the precision too."""
_SPEEDS = {item.name for item in dataclasses.fields(Speed)} - {"source", "note"}
_TEXTS = {"title", "arch", "tensorrt", "cuda", "jetpack"}
_NUMBERS = {"memory_mib", "workspace_mib"}
_WHOLE = {*_NUMBERS, "sms"}
_KEYS = {"like", *_TEXTS, *_NUMBERS, *_SPEEDS}
_MODULES = (
    ("orin nano", "jetson-orin-nano"),
    ("orin nx", "jetson-orin-nx"),
    ("orin", "jetson-orin"),
    ("thor", "jetson-thor"),
)

_LIBC_OF_PYTHON = {"3.10": "2.35", "3.12": "2.39"}
"""Of Ubuntu 22.04 and 24.04, which JetPack 6 and 7 are made from."""


@dataclass(frozen=True)
class Software:
    """What is chosen for a target; None is what its row says. ``tensorrt`` is a release such as ``10.13``."""

    jetpack: str | None = None
    builder: Builder | None = None
    tensorrt: str | None = None

    def on(self, row: Target) -> Target:
        """The row with this builder and this TensorRT; raises IMPOSSIBLE for what does not belong with it."""
        row = with_builder(row, self.builder)
        return row if self.tensorrt is None else with_tensorrt(row, self.tensorrt)


AS_IN_THE_TABLE = Software()


def resolve_target(name: str, software: Software = AS_IN_THE_TABLE, own: Mapping[str, Any] | None = None) -> Target:
    """Find a target by name: ``auto`` for this machine's GPU, one of ``own``, or a row of the table.

    ``own`` is the table ``[targets]`` of a recipe: by name, a mapping with ``like`` (the row to start from) and what
    differs.

    Raises:
        ResvitError: as ``find_target``, ``with_builder`` and ``with_tensorrt``; INPUT for a description of an own
            target that makes none; MISSING for ``auto`` without a GPU.
    """
    if name in (own or {}):
        return _own_target(name, (own or {})[name], software)
    found = target_here(software.jetpack) if name.strip().lower() == AUTO else find_target(name, software.jetpack)
    return software.on(found)


def _own_target(name: str, described: Any, software: Software) -> Target:
    fix = f'Write [targets.{name}] with like = "jetson-orin" and what differs: {", ".join(sorted(_KEYS - {"like"}))}.'
    if not isinstance(described, Mapping) or not isinstance(described.get("like"), str):
        raise ResvitError(f"The target '{name}' of the recipe does not say what it is like.", fix)
    require_name(name, "The recipe's target", _NAME_MOST)
    if unknown := sorted(set(described) - _KEYS):
        raise ResvitError(f"The target '{name}' of the recipe has '{unknown[0]}', which says nothing of a device.", fix)
    if any(target.name == name for target in TARGETS) or name == AUTO:
        raise ResvitError(
            f"The recipe describes a target of its own called '{name}', a name that is taken.", "Rename it."
        )
    for key, value in described.items():
        number = isinstance(value, int if key in _WHOLE else (int, float)) and not isinstance(value, bool)
        if not (number and value > 0 if key in _NUMBERS | _SPEEDS else isinstance(value, str)):
            raise ResvitError(f"{key} = {value!r} of the target '{name}' is of the wrong kind.", fix)
    base = software.on(find_target(described["like"], described.get("jetpack", software.jetpack)))
    if base.on_cpu:
        raise ResvitError(
            f"The target '{name}' of the recipe is like 'cpu', which every processor is: there is nothing to describe.",
            "Say --target cpu.",
        )
    said = _TEXTS - {"jetpack"} - ({"tensorrt"} if software.tensorrt or base.builder is Builder.RTX else set())
    changes = {key: described[key] for key in said | _NUMBERS if key in described}
    if "tensorrt" in changes and base.jetpack is None:
        changes.setdefault("cuda", CUDA_OF_TENSORRT.get(changes["tensorrt"], base.cuda))
    if changes.get("cuda", base.cuda) not in PTX_OF_CUDA:
        raise ResvitError(
            f"CUDA {changes['cuda']} of the target '{name}' is not known.", f"One of: {', '.join(PTX_OF_CUDA)}."
        )
    speed = base.speed
    if peaks := {
        key: described[key] if key in _WHOLE else float(described[key]) for key in _SPEEDS if key in described
    }:
        speed = Speed(**{**dataclasses.asdict(base.speed), **peaks, "source": "the recipe", "note": ""})
    made = dataclasses.replace(base, name=name, speed=speed, **{"title": name, **changes})
    if made.workspace_mib >= made.memory_mib:
        raise ResvitError(
            f"The target '{name}' has {made.memory_mib} MiB of memory, and its workspace takes {made.workspace_mib}.",
            "Set workspace_mib to less than memory_mib.",
        )
    return made


def target_here(jetpack: str | None = None, machine: Machine | None = None) -> Target:
    """The target of this machine's first GPU, or of ``machine``.

    Raises:
        ResvitError: MISSING without a GPU or its driver; IMPOSSIBLE for one that is not served.
    """
    machine = machine or this_machine()
    name, sm = machine.gpu or "", machine.sm
    module = next((module for words, module in _MODULES if "jetson" in name.lower() and words in name.lower()), None)
    if module is not None:
        row = find_target(module, jetpack or machine.jetpack)
        memory = machine.memory_mib or row.memory_mib
        return dataclasses.replace(row, memory_mib=memory, workspace_mib=min(row.workspace_mib, memory // 4))
    if sm is None:
        raise ResvitError(
            "This machine has no NVIDIA GPU with a working driver, so --target auto finds nothing.",
            "Name the device: 'resvit-export targets' lists them; --target cpu is the processor of any machine.",
            ExitCode.MISSING,
        )
    rows = [row for row in TARGETS if row.sm == sm and row.kind not in {Kind.JETSON, Kind.CPU}]
    named = [
        row for row in rows if any(re.search(rf"\b{words}\b", name) for words in re.findall(r"[\w ]*\w", row.title))
    ]
    if named:
        return max(named, key=lambda row: len(row.title))
    if not rows:
        served = ", ".join(sorted({f"{row.sm / 10:.1f}" for row in TARGETS if not row.on_cpu}))
        raise ResvitError(
            f"{name or 'The GPU'} has compute capability {sm / 10:.1f}, which is not served.",
            f"Served are {served}.",
            ExitCode.IMPOSSIBLE,
        )
    card = re.search(r"\b(RTX|GeForce|TITAN)\b", name) is not None
    row = next((row for row in rows if (row.kind is Kind.RTX) == card), rows[0])
    note = f"Its speed and memory are those of {row.title}: predicted times are wrong by what the two differ."
    short = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-") or f"sm-{sm}"
    found = dataclasses.replace(row, name=short, title=name or short, notes=(*row.notes, note))
    if not card or sm not in RTX_SMS:
        return found
    return dataclasses.replace(with_builder(found, Builder.RTX), kind=Kind.RTX)


def jetson_machine(target: Target) -> Machine:
    """What a Jetson with its usual software is, as far as installing on it goes.

    Raises:
        ResvitError: IMPOSSIBLE for a target whose Python is not known, because no image comes with it.
    """
    if target.python is None:
        raise ResvitError(
            f"Which Python a machine with {target.title} has, its name does not tell.",
            "On that machine: pip install resvit-export.",
            ExitCode.IMPOSSIBLE,
        )
    libc = _LIBC_OF_PYTHON[target.python]
    memory = target.memory_mib
    return Machine(
        target.sm, target.title, target.tensorrt, target.jetpack, target.arch, memory, 0, target.python, libc=libc
    )
