"""One engine as its layer files list it: every kernel in order, with its time where a profile tells."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.audit.compare.times import (
    LAYERS_MOST,
    is_profile,
    latency_from_file,
    profile_from_file,
    profile_from_json,
    summed,
)
from resvit_engines.audit.inspector import layers_from_json, nodes_of_name
from resvit_engines.audit.kernels import Kernel, Operation
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, read_outside, text_from_outside

_FIX_LAYERS = "Give what trtexec --exportLayerInfo (with --profilingVerbosity=detailed) or --exportProfile wrote."
_PROFILE = re.compile(r" \[profile \d+\]$")
_COPIES = ("Reformatting CopyNode", "__mye", "QuantizeLinear", "DequantizeLinear")
_APART = 2.0
"""How many times as long as its layers together, or as short, a run can be: a profiler costs tenths, not more."""
_LEAST_KNOWN = 0.5
"""Of the kernels, and of the time, a profile must know so much to be of the same engine."""


@dataclass(frozen=True)
class Listed:
    """One kernel, and its mean time in microseconds; None where none was measured."""

    kernel: Kernel
    us: float | None = None

    @property
    def moves(self) -> bool:
        """Whether it computes nothing."""
        return self.kernel.operation is Operation.REFORMAT


@dataclass(frozen=True)
class ListedEngine:
    """The kernels of an engine in order. ``latency_us`` is that of the whole engine without a profiler, where known.

    Of an engine whose profile alone is there (``detailed`` is False) types and shapes are not known. ``note`` says
    what else there is to be said of it.
    """

    name: str
    kernels: tuple[Listed, ...]
    latency_us: float | None = None
    detailed: bool = True
    note: str = ""

    @property
    def timed(self) -> bool:
        """Whether layers have times."""
        return any(listed.us is not None for listed in self.kernels)

    @property
    def total_us(self) -> float | None:
        """The sum over all layers of a run with a profiler; None without one."""
        return sum(listed.us or 0.0 for listed in self.kernels) if self.timed else None


def engine_from_file(path: Path, profile: Path | None = None, times: Path | None = None) -> ListedEngine:
    """An engine by the layer file of ``trtexec`` or of the engine inspector, or by its profile alone.

    Raises:
        ResvitError: INPUT for a file that is neither, for a profile of another engine, and as the readers of each.
    """
    what = f"The layer file {path}"
    data = read_outside(path, 1 << 30, what)
    document = None
    if data.lstrip()[:1] == b"[":
        document = json_from_outside(data, what, _FIX_LAYERS)
        if not is_profile(document):
            raise ResvitError(f"{path} lists neither layers nor their times.", _FIX_LAYERS)
        rows = profile_from_json(document, f"The profile {path}")
        kernels = tuple(Listed(_named_kernel(name), us) for name, us in rows)
        engine = ListedEngine(path.stem, kernels, detailed=False)
    else:
        layers = layers_from_json(text_from_outside(data, what, _FIX_LAYERS), str(path))
        engine = engine_from_kernels(path.stem, layers.kernels)
    return with_times(engine, profile, times)


def engine_from_kernels(name: str, kernels: Sequence[Kernel], note: str = "") -> ListedEngine:
    """An engine whose kernels are known already; raises INPUT where there are none, or more than any engine has."""
    if not kernels:
        raise ResvitError(f"{name} lists no kernels.", "Build it with detailed profiling verbosity.")
    if len(kernels) > LAYERS_MOST:
        raise ResvitError(f"{name} lists {len(kernels):,} layers, more than any engine has.", _FIX_LAYERS)
    return ListedEngine(name, tuple(map(Listed, kernels)), note=note)


def with_times(engine: ListedEngine, profile: Path | None, times: Path | None = None) -> ListedEngine:
    """The engine with the times of a profile of its layers, and with its latency.

    Raises:
        ResvitError: INPUT where the profile names other layers, or its layers take a time that is not that of the runs,
            so that one of them is of another engine or network.
    """
    if profile is not None:
        engine = dataclasses.replace(engine, kernels=_timed(engine, profile))
    if times is not None:
        latency, layers = latency_from_file(times), engine.total_us
        if layers and not 1 / _APART <= latency / layers <= _APART:
            raise ResvitError(
                f"The file of times {times} is of another engine than {engine.name}: its runs take {latency:,.0f} us, "
                f"and the layers {layers:,.0f} us together.",
                "Give the times and the profile of one build, at one batch.",
            )
        engine = dataclasses.replace(engine, latency_us=latency)
    return engine


def _timed(engine: ListedEngine, profile: Path) -> tuple[Listed, ...]:
    rows = profile_from_file(profile)
    measured = summed([(_PROFILE.sub("", name), us) for name, us in rows])
    total, found = sum(us for _, us in rows), 0
    kernels = []
    for listed in engine.kernels:
        waiting = measured.get(_PROFILE.sub("", listed.kernel.name))
        found += waiting is not None
        kernels.append(Listed(listed.kernel, waiting.pop(0) if waiting else None))
    known = sum(listed.us or 0.0 for listed in kernels)
    if found < _LEAST_KNOWN * len(kernels) or known < _LEAST_KNOWN * total:
        first = next((name for name, _ in rows), "")
        raise ResvitError(
            f"The profile {profile} is of another engine than {engine.name}: it knows {found} of its {len(kernels)} "
            f"layers, and its first is {first[:120]!r}.",
            "Give the profile and the layers of one build.",
        )
    return tuple(kernels)


def _named_kernel(name: str) -> Kernel:
    """What a profile tells of a layer: its name, and in it the nodes."""
    plain = _PROFILE.sub("", name)
    copies = plain.startswith(_COPIES) and " + " not in plain
    return Kernel(plain, "Reformat" if copies else "", (), (), (), (), nodes_of_name(plain))
