"""What a build is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import SizeRange, sizes_from_numbers
from resvit_engines.records import Record
from resvit_engines.targets.table import Builder

TITLES = {Builder.RTX: "TensorRT for RTX", Builder.TENSORRT: "TensorRT", Builder.ONNXRUNTIME: "ONNX Runtime"}
PLUGINS = ("off", "aot", "library")
"""How kernels of our own reach an engine: not at all, inside it (ahead of time), or by a library that it needs."""
FLAGS = ("sparse", "hardware_compatible", "version_compatible", "strip_weights")
"""What may be asked for beyond a plain build; in records only those that were."""


@dataclass(frozen=True)
class BuildSettings:
    """How to build: the batch as (smallest, usual, largest), and how hard the builder tries (0 to 5).

    ``sizes`` are those of the image, where the graph leaves its height or width open; None takes the graph's own.

    ``workspace_mib`` is the scratch memory in MiB that kernels may use; None takes the target's, or less where the
    memory that is free says so. ``sparse`` lets the builder take kernels for 2:4 sparse weights where it finds the
    pattern and they are faster. ``hardware_compatible`` asks for an engine that newer GPUs run too,
    ``version_compatible`` for one that later TensorRT of the same major version run too, ``strip_weights`` for one
    without weights, which ``build.refit_engine`` puts back. ``timing_cache`` is the folder that keeps what TensorRT
    measured. ``plugins`` is one of ``PLUGINS``, and the ONNX file must have been written for it; ``plugin_library`` is
    the compiled library, None to compile it on this machine.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    sizes: SizeRange | None = None
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
        return {name: True for name in FLAGS if getattr(self, name)}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of what makes another engine; the timing cache only makes a faster build.

        Without plugins there is no word of them, so that records from before there were any stay the same.
        """
        return {
            "batch": list(self.batch),
            **({"sizes": self.sizes.numbers()} if self.sizes else {}),
            "workspace_mib": self.workspace_mib,
            "optimization_level": self.optimization_level,
            **self.flags,
            **({"plugins": self.plugins} if self.plugins != "off" else {}),
        }

    @classmethod
    def from_json(cls, record: Record) -> BuildSettings:
        """What :meth:`to_json` wrote; without the folders and files of the machine that wrote it.

        Raises:
            ResvitError: INPUT, naming the key, where it is malformed.
        """
        batch = record.wholes("batch", 1)
        if len(batch) != 3:
            raise record.refusal("batch", "the smallest, usual and largest batch")
        sparse, hardware, version, strip = (bool(record.optional(flag, record.flag)) for flag in FLAGS)
        return cls(
            batch=(batch[0], batch[1], batch[2]),
            sizes=record.optional("sizes", lambda key: sizes_from_numbers(record.wholes(key, 1))),
            workspace_mib=record.optional("workspace_mib", record.whole),
            optimization_level=record.whole("optimization_level"),
            sparse=sparse,
            hardware_compatible=hardware,
            version_compatible=version,
            strip_weights=strip,
            plugins=record.optional("plugins", record.text) or "off",
        )
