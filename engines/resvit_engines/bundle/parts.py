"""What a manifest holds in groups: its files, golden files, image sets, verdict, and where an engine was built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from resvit_engines.machine import Machine
from resvit_engines.records import Record


@dataclass(frozen=True)
class BundledFile:
    """A file of the bundle: its name in it, its size in bytes and its digest."""

    path: str
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"path": self.path, "bytes": self.bytes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, record: Record) -> BundledFile:
        """What :meth:`to_json` wrote."""
        return cls(record.text("path"), record.whole("bytes"), record.sha256("sha256"))


@dataclass(frozen=True)
class GoldenFiles:
    """Which file holds the golden images, which the output that is judged, and which the rest, by tensor name.

    ``inputs`` are read beside the images; ``outputs`` name all outputs of a network that has several, the judged one
    with them. ``sets`` tells that the order of an output's rows means nothing. ``least_db`` is how near each
    output must be, by name: the SQNR in dB of what moves from image to image. ``at_sizes`` are the same of images of
    other sizes, where the network takes several.
    """

    input: str = "golden_input.npy"
    output: str = "golden_output.npy"
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    sets: bool = False
    least_db: Mapping[str, float] = field(default_factory=dict)
    at_sizes: tuple[GoldenFiles, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "input": self.input,
            "output": self.output,
            **({"inputs": dict(self.inputs)} if self.inputs else {}),
            **({"sets": True} if self.sets else {}),
            **({"outputs": dict(self.outputs)} if self.outputs else {}),
            **({"least_db": dict(self.least_db)} if self.least_db else {}),
            **({"at_sizes": [golden.to_json() for golden in self.at_sizes]} if self.at_sizes else {}),
        }

    @classmethod
    def from_json(cls, record: Record) -> GoldenFiles:
        """What :meth:`to_json` wrote."""
        others = tuple(map(cls._of_one_size, record.optional("at_sizes", record.records) or ()))
        return replace(cls._of_one_size(record), at_sizes=others)

    @classmethod
    def _of_one_size(cls, record: Record) -> GoldenFiles:
        inputs, outputs, least = (record.optional(key, record.record) for key in ("inputs", "outputs", "least_db"))
        return cls(
            record.file_name("input"),
            record.file_name("output"),
            {name: inputs.file_name(name) for name in inputs.names} if inputs else {},
            {name: outputs.file_name(name) for name in outputs.names} if outputs else {},
            record.optional("sets", record.flag) or False,
            {name: least.number(name, 0, 100) for name in least.names} if least else {},
        )


@dataclass(frozen=True)
class ImageCount:
    """How many images were used, and the digest of them all."""

    images: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"images": self.images, "digest": self.digest}

    @classmethod
    def from_json(cls, record: Record) -> ImageCount:
        """What :meth:`to_json` wrote."""
        return cls(record.whole("images"), record.text("digest"))


@dataclass(frozen=True)
class ManifestVerdict:
    """What validation found: ``accepted``, ``rejected`` or ``undecided``, why, for which task, on which images."""

    verdict: str
    reason: str
    task: str
    class_names: tuple[str, ...]
    validation: ImageCount

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; these stand in the manifest beside its other fields."""
        return {
            "verdict": self.verdict,
            "verdict_reason": self.reason,
            "task": self.task,
            "class_names": list(self.class_names),
            "validation": self.validation.to_json(),
        }

    @classmethod
    def from_json(cls, record: Record) -> ManifestVerdict:
        """What :meth:`to_json` wrote."""
        return cls(
            record.text("verdict"),
            record.text("verdict_reason"),
            record.text("task"),
            record.texts("class_names"),
            ImageCount.from_json(record.record("validation")),
        )


@dataclass(frozen=True)
class Recovery:
    """How much recovery trained: images, steps, the step that was kept, and the scores before and after."""

    images: int
    steps: int
    kept_step: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "images": self.images,
            "steps": self.steps,
            "kept_step": self.kept_step,
            "before": dict(self.before),
            "after": dict(self.after),
        }

    @classmethod
    def from_json(cls, record: Record) -> Recovery:
        """What :meth:`to_json` wrote."""
        return cls(
            record.whole("images"),
            record.whole("steps"),
            record.whole("kept_step"),
            record.plain("before"),
            record.plain("after"),
        )


@dataclass(frozen=True)
class BuiltOnDevice:
    """Of an engine that a device built: the digests of bundle and manifest that it was built from, and the machine.

    ``rehearsal`` tells that TensorRT for RTX stood in for TensorRT.
    """

    bundle: str
    manifest: str
    sm: int | None
    gpu: str | None
    tensorrt: str | None
    rtx: str | None
    jetpack: str | None
    arch: str
    rehearsal: bool

    @classmethod
    def on(cls, machine: Machine, bundle: str, manifest: str, *, rehearsal: bool) -> BuiltOnDevice:
        """What was built on ``machine`` from the bundle and manifest of these digests."""
        return cls(
            bundle, manifest, machine.sm, machine.gpu, machine.tensorrt, machine.rtx, machine.jetpack, machine.arch,
            rehearsal,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; these stand in the manifest beside its other fields."""
        return {
            "built_from": {"bundle": self.bundle, "manifest": self.manifest},
            "built_on": {
                "sm": self.sm,
                "gpu": self.gpu,
                "tensorrt": self.tensorrt,
                "jetpack": self.jetpack,
                "arch": self.arch,
                "rtx": self.rtx,
            },
            **({"rehearsal": True} if self.rehearsal else {}),
        }

    @classmethod
    def from_json(cls, record: Record) -> BuiltOnDevice:
        """What :meth:`to_json` wrote."""
        source, on = record.record("built_from"), record.record("built_on")
        return cls(
            source.sha256("bundle"),
            source.sha256("manifest"),
            on.optional("sm", on.whole),
            on.optional("gpu", on.text),
            on.optional("tensorrt", on.text),
            on.optional("rtx", on.text),
            on.optional("jetpack", on.text),
            on.text("arch"),
            record.optional("rehearsal", record.flag) or False,
        )
