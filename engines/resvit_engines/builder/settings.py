"""What a build is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.audit.kernels import Kernel
from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Builder

TITLES = {Builder.RTX: "TensorRT for RTX", Builder.TENSORRT: "TensorRT"}
PLUGINS = ("off", "aot", "library")
"""How kernels of our own reach an engine: not at all, inside it (ahead of time), or by a library that it needs."""
_FLAGS = ("sparse", "hardware_compatible", "version_compatible", "strip_weights")


@dataclass(frozen=True)
class BuildSettings:
    """How to build: the batch as (smallest, usual, largest), and how hard the builder tries (0 to 5).

    ``workspace_mib`` is the scratch memory in MiB that kernels may use; None takes the target's, or less where the
    memory that is free says so. ``sparse`` lets the builder take kernels for 2:4 sparse weights where it finds the
    pattern and they are faster. ``hardware_compatible`` asks for an engine that newer GPUs run too,
    ``version_compatible`` for one that later TensorRT of the same major version run too, ``strip_weights`` for one
    without weights, which ``build.refit_engine`` puts back. ``timing_cache`` is the folder that keeps what TensorRT
    measured. ``plugins`` is one of ``PLUGINS``, and the ONNX file must have been written for it; ``plugin_library`` is
    the compiled library, None to compile it on this machine.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    workspace_mib: int | None = None
    optimization_level: int = 3
    sparse: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None
    plugins: str = "off"
    plugin_library: Path | None = None

    def __post_init__(self) -> None:
        smallest, usual, largest = self.batch
        if not 1 <= smallest <= usual <= largest:
            raise ResvitError(
                f"A batch of {smallest}, {usual}, {largest} makes no sense.",
                "Give the smallest, the usual and the largest batch, in this order, from 1 up.",
            )
        if not 0 <= self.optimization_level <= 5:
            raise ResvitError(
                f"There is no optimisation level {self.optimization_level}.", "Use 0 (fast build) to 5 (thorough)."
            )
        if self.plugins not in PLUGINS:
            raise ResvitError(f"There is no way {self.plugins!r} for plugins.", f"Use one of {', '.join(PLUGINS)}.")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ResvitError(
                f"A workspace of {self.workspace_mib} MiB is too small.", "Give it at least some hundred MiB."
            )

    @property
    def flags(self) -> dict[str, bool]:
        """What is asked for beyond a plain build."""
        return {name: True for name in _FLAGS if getattr(self, name)}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of what makes another engine; the timing cache only makes a faster build.

        Without plugins there is no word of them, so that records from before there were any stay the same.
        """
        return {
            "batch": list(self.batch),
            "workspace_mib": self.workspace_mib,
            "optimization_level": self.optimization_level,
            **self.flags,
            **({"plugins": self.plugins} if self.plugins != "off" else {}),
        }


@dataclass(frozen=True)
class EngineReport:
    """What came out of a build, without reading the engine: its kernels are from the builder's log.

    ``seconds`` is wall-clock time, ``peak_mib`` the child's peak resident memory in MiB, ``bytes`` the size of the
    engine file. ``inputs`` and ``outputs`` hold name, shape (-1: dynamic) and dtype of each. ``workspace_mib`` is the
    limit that the build succeeded with. ``timing_cache`` and ``layers`` are names of files: of the cache in its
    folder, and beside the engine of TensorRT's own JSON about its layers (only where the engine's GPU is).
    ``flags`` are those of the settings. ``plugin_layers`` are the names of the layers that are kernels of ours, and
    ``plugin_library`` is name and digest of the library that must be loaded before the engine is read, if any.
    """

    target: str
    builder: Builder
    builder_version: str
    sm: int
    bytes: int
    sha256: str
    seconds: float
    peak_mib: int
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    kernels: tuple[Kernel, ...]
    warnings: tuple[str, ...]
    workspace_mib: int | None = None
    timing_cache: str | None = None
    layers: str | None = None
    flags: tuple[str, ...] = ()
    plugins: str = "off"
    plugin_layers: tuple[str, ...] = ()
    plugin_library: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in a run's ``engine.json``."""
        return {
            "target": self.target,
            "builder": TITLES[self.builder],
            "builder_version": self.builder_version,
            "sm": self.sm,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "seconds": round(self.seconds, 3),
            "peak_mib": self.peak_mib,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "kernels": [kernel.to_json() for kernel in self.kernels],
            "warnings": list(self.warnings),
            "workspace_mib": self.workspace_mib,
            "timing_cache": self.timing_cache,
            "layers": self.layers,
            **dict.fromkeys(self.flags, True),
            **self._plugins(),
        }

    def _plugins(self) -> dict[str, Any]:
        if self.plugins == "off":
            return {}
        library = {"plugin_library": self.plugin_library} if self.plugin_library else {}
        return {"plugins": self.plugins, "plugin_layers": list(self.plugin_layers), **library}
