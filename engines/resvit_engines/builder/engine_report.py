"""``engine.json``: what came out of a build, beside the engine and in the manifest of its bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resvit_engines.audit.kernels import Kernel
from resvit_engines.builder.settings import FLAGS, PLUGINS, TITLES
from resvit_engines.records import Record
from resvit_engines.targets.table import Builder
from resvit_engines.trt.io_tensor import IoTensor, io_tensors_from_json

_BUILDERS = {title: builder for builder, title in TITLES.items()}


@dataclass(frozen=True)
class LibraryRecord:
    """The plugin library that an engine needs: the name of its file, beside the engine, and its digest."""

    name: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "sha256": self.sha256}

    @classmethod
    def from_json(cls, record: Record) -> LibraryRecord:
        """What :meth:`to_json` wrote."""
        return cls(record.file_name("name"), record.sha256("sha256"))


@dataclass(frozen=True)
class EngineReport:
    """What came out of a build, without reading the engine: its kernels are from the builder's log.

    ``seconds`` is wall-clock time, ``peak_mib`` the child's peak resident memory in MiB, both None in a bundle, whose
    bytes must not depend on them; ``bytes`` is the size of the engine file. A dynamic dimension of ``inputs`` and
    ``outputs`` is -1. ``workspace_mib`` is the limit that the build succeeded with. ``timing_cache`` and ``layers``
    are names of files: of the cache in its folder, and beside the engine of TensorRT's own JSON about its layers
    (only where the engine's GPU is). ``flags`` are those of the settings. ``plugin_layers`` are the names of the
    layers that are kernels of ours, and ``plugin_library`` is what must be loaded before the engine is read, if
    anything. ``rehearsal`` tells of a build on a device whether TensorRT for RTX stood in; None for one on a host.
    """

    target: str
    builder: Builder
    builder_version: str
    sm: int
    bytes: int
    sha256: str
    seconds: float | None
    peak_mib: int | None
    inputs: tuple[IoTensor, ...]
    outputs: tuple[IoTensor, ...]
    kernels: tuple[Kernel, ...]
    warnings: tuple[str, ...]
    workspace_mib: int | None = None
    timing_cache: str | None = None
    layers: str | None = None
    flags: tuple[str, ...] = ()
    plugins: str = "off"
    plugin_layers: tuple[str, ...] = ()
    plugin_library: LibraryRecord | None = None
    rehearsal: bool | None = None

    @property
    def hardware_compatible(self) -> bool:
        """Whether newer GPUs run it too."""
        return "hardware_compatible" in self.flags

    @property
    def version_compatible(self) -> bool:
        """Whether later TensorRT of the same major version runs it too."""
        return "version_compatible" in self.flags

    @property
    def strip_weights(self) -> bool:
        """Whether it has no weights, and needs those of its ONNX file before it runs."""
        return "strip_weights" in self.flags

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in a run's ``engine.json``."""
        spent = {"seconds": None if self.seconds is None else round(self.seconds, 3), "peak_mib": self.peak_mib}
        return {
            "target": self.target,
            "builder": TITLES[self.builder],
            "builder_version": self.builder_version,
            "sm": self.sm,
            "bytes": self.bytes,
            "sha256": self.sha256,
            **{name: value for name, value in spent.items() if value is not None},
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
            "kernels": [kernel.to_json() for kernel in self.kernels],
            "warnings": list(self.warnings),
            "workspace_mib": self.workspace_mib,
            "timing_cache": self.timing_cache,
            "layers": self.layers,
            **dict.fromkeys(self.flags, True),
            **self._plugins(),
            **({} if self.rehearsal is None else {"rehearsal": self.rehearsal}),
        }

    def _plugins(self) -> dict[str, Any]:
        if self.plugins == "off":
            return {}
        library = {"plugin_library": self.plugin_library.to_json()} if self.plugin_library else {}
        return {"plugins": self.plugins, "plugin_layers": list(self.plugin_layers), **library}

    @classmethod
    def from_json(cls, record: Record) -> EngineReport:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        library = record.optional("plugin_library", record.record)
        return cls(
            target=record.text("target"),
            builder=_BUILDERS[record.text("builder", _BUILDERS)],
            builder_version=record.text("builder_version"),
            sm=record.whole("sm", 0, 999),
            bytes=record.whole("bytes"),
            sha256=record.sha256("sha256"),
            seconds=record.optional("seconds", lambda key: record.number(key, 0)),
            peak_mib=record.optional("peak_mib", record.whole),
            inputs=io_tensors_from_json(record.records("inputs")),
            outputs=io_tensors_from_json(record.records("outputs")),
            kernels=tuple(map(Kernel.from_json, record.records("kernels"))),
            warnings=record.texts("warnings"),
            workspace_mib=record.optional("workspace_mib", lambda key: record.whole(key, 1)),
            timing_cache=record.optional("timing_cache", record.file_name),
            layers=record.optional("layers", record.file_name),
            flags=tuple(flag for flag in FLAGS if record.optional(flag, record.flag)),
            plugins=record.optional("plugins", lambda key: record.text(key, PLUGINS)) or "off",
            plugin_layers=record.optional("plugin_layers", record.texts) or (),
            plugin_library=LibraryRecord.from_json(library) if library else None,
            rehearsal=record.optional("rehearsal", record.flag),
        )
