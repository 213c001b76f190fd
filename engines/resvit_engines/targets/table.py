"""The devices that engines are made for: what each can compute, and which TensorRT serves it.

Facts come from NVIDIA's support matrices and JetPack release notes. They live in the tables of this module, of
:mod:`resvit_engines.targets.software` and of :mod:`resvit_engines.targets.speeds`, and nowhere else; code asks the
table instead of comparing names.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import platform
from dataclasses import dataclass
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.records import Record
from resvit_engines.targets.software import (
    CUDA_OF_TENSORRT,
    JETPACKS,
    NEWEST_TENSORRT,
    OLDEST_ONNXRUNTIME,
    PTX_OF_CUDA,
    RTX_CUDA,
    RTX_VERSION,
    JetPack,
    version_of,
)
from resvit_engines.targets.speeds import SPEEDS, Speed


class Precision(str, enum.Enum):
    """The number format of the quantised matrix products; everything else is FP16 on GPUs, and FP32 on processors."""

    FP32 = "fp32"
    """Of processors alone: on GPUs nothing is gained by it."""
    FP16 = "fp16"
    INT8 = "int8"
    FP8 = "fp8"
    """E4M3: four exponent and three mantissa bits, largest value 448."""

    def __str__(self) -> str:
        return str(self.value)

    @property
    def quantises(self) -> bool:
        """Whether it is one of 8 bits."""
        return self in {Precision.INT8, Precision.FP8}


TENSOR_CORES = (Precision.FP16, Precision.INT8, Precision.FP8)
"""What the matrix products of a GPU may be in."""


class Builder(str, enum.Enum):
    """What turns the ONNX graph into an engine."""

    TENSORRT = "tensorrt"
    """TensorRT: measures kernels while it builds, so it runs where the GPU is."""
    RTX = "rtx"
    """TensorRT for RTX: builds on any Linux machine, without a GPU."""
    ONNXRUNTIME = "onnxruntime"
    """ONNX Runtime: for processors, x86-64 and aarch64."""

    def __str__(self) -> str:
        return str(self.value)


class Kind(str, enum.Enum):
    """The family of a device."""

    JETSON = "jetson"
    DATACENTER = "datacenter"
    """DGX Spark too, which has the software of one."""
    RTX = "rtx"
    CPU = "cpu"
    """A processor, without any GPU."""


ANY_ARCH = "any"
"""Of a target that is every machine's processor."""

RTX_SMS = frozenset({75, 80, 86, 89, 120, 121})
"""What TensorRT for RTX has code generators for."""

PROXY_SMS = {87: 86, 90: 89, 100: 120, 103: 120, 110: 120}
"""For GPUs that it does not serve, the nearest one that it does: the same tensor-core generation where there is one."""

FP8_SMS = frozenset({89, 90, 100, 103, 110, 120, 121})
"""GPUs with FP8 tensor cores: compute capability 8.9 and up."""

SPARSE_SMS = frozenset({80, 86, 87, 89, 90, 100, 103, 110, 120, 121})
"""GPUs with 2:4 structured sparsity: Ampere and up."""

ATTENTION_TENSORRT = (10, 14)
"""The first TensorRT whose ONNX parser reads opset 23 (``Attention``); older ones read up to opset 20."""

AOT_TENSORRT = (10, 9)
"""The first TensorRT whose plugins carry their kernel as PTX inside the engine."""


@dataclass(frozen=True)
class Target:
    """A device together with the software on it.

    ``sm`` is the compute capability without its dot (87 is 8.7; 0 for a processor). ``builder`` builds its engines: the
    one that serves it best, unless another is chosen (:mod:`resvit_engines.targets.choice`). ``tensorrt`` is the
    version that the engine is built with: of TensorRT for RTX where ``builder`` is that, of TensorRT elsewhere; of ONNX
    Runtime the oldest that serves. ``memory_mib`` is the GPU memory in MiB of the smallest module sold under this name
    (shared with the CPU on Jetson and DGX Spark); ``workspace_mib`` is the scratch memory that the builder may plan
    for, unless told otherwise. Of a processor both are placeholders.
    """

    name: str
    title: str
    sm: int
    kind: Kind
    builder: Builder
    tensorrt: str
    cuda: str
    memory_mib: int
    workspace_mib: int
    speed: Speed
    """Peak rates, bandwidth and cost per kernel."""
    jetpack: str | None = None
    python: str | None = None
    arch: str = "x86_64"
    notes: tuple[str, ...] = ()

    @property
    def precisions(self) -> frozenset[Precision]:
        """The precisions that its tensor cores and TensorRT, or its processor and ONNX Runtime, have kernels for."""
        if self.on_cpu:
            return frozenset({Precision.FP32, Precision.INT8})
        fp8 = {Precision.FP8} if self.sm in FP8_SMS else set()
        return frozenset({Precision.FP16, Precision.INT8} | fp8)

    @property
    def on_cpu(self) -> bool:
        """Whether it is a processor, of which nothing is asked that is about GPUs or TensorRT."""
        return self.builder is Builder.ONNXRUNTIME

    @property
    def float_precision(self) -> Precision:
        """What it computes in where nothing is quantised."""
        return Precision.FP32 if self.on_cpu else Precision.FP16

    def peak(self, precision: Precision) -> float | None:
        """Dense tensor-core rate in TFLOPS or TOPS; ``None`` where the GPU has no such tensor cores."""
        speed = self.speed
        if self.on_cpu:
            return None
        return {Precision.FP16: speed.fp16, Precision.INT8: speed.int8, Precision.FP8: speed.fp8}[precision]

    @property
    def sparsity(self) -> bool:
        """Whether it has 2:4 structured sparsity."""
        return self.sm in SPARSE_SMS

    @property
    def unified_memory(self) -> bool:
        """Whether CPU and GPU share one memory, so that a build competes with everything else."""
        return self.kind is Kind.JETSON or self.arch == "aarch64"

    @property
    def ptx(self) -> str:
        """The newest PTX that its driver reads; empty for a processor."""
        return "" if self.on_cpu else PTX_OF_CUDA[self.cuda]

    @property
    def plugins(self) -> str:
        """How kernels of our own reach an engine of TensorRT on it: ``aot``, inside the engine, or ``library``."""
        return "aot" if self._ahead_of_time else "library"

    @property
    def custom_kernels(self) -> str:
        """The same for people."""
        if self.on_cpu:
            return "none: they are for GPUs"
        if self.builder is Builder.RTX:
            return "none by TensorRT for RTX, which takes no plugins; by TensorRT ahead of time"
        return "ahead-of-time plugin or C++" if self._ahead_of_time else "C++ IPluginV3 library"

    @property
    def _ahead_of_time(self) -> bool:
        return version_of(self.tensorrt) >= AOT_TENSORRT

    @property
    def opset(self) -> int:
        """The newest ONNX opset that is worth writing for it: 23 keeps attention whole; 20 for all others."""
        if self.on_cpu:
            return 20
        return 23 if self.builder is Builder.RTX or version_of(self.tensorrt) >= ATTENTION_TENSORRT else 20

    @property
    def software(self) -> str:
        """What builds and runs the engine, for people: ``JetPack 6.2, TensorRT 10.3``."""
        if self.on_cpu:
            return f"ONNX Runtime {self.tensorrt} or newer"
        name = "TensorRT for RTX" if self.builder is Builder.RTX else "TensorRT"
        return f"JetPack {self.jetpack}, {name} {self.tensorrt}" if self.jetpack else f"{name} {self.tensorrt}"

    @property
    def describe(self) -> str:
        """One line for people."""
        precisions = ", ".join(p.value for p in Precision if p in self.precisions)
        capability = "" if self.on_cpu else f"SM {self.sm / 10:.1f}; "
        return f"{self.title} ({capability}{self.software}; {precisions})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for records, manifests and the ``targets`` table."""
        plain = dataclasses.asdict(self)
        plain.update(
            kind=self.kind.value,
            builder=self.builder.value,
            notes=list(self.notes),
            precisions=[p.value for p in Precision if p in self.precisions],
            sparsity=self.sparsity,
            opset=self.opset,
            ptx=self.ptx,
            custom_kernels=self.custom_kernels,
            unified_memory=self.unified_memory,
        )
        return plain

    @classmethod
    def from_json(cls, record: Record) -> Target:
        """What :meth:`to_json` wrote: a target of the user's own comes to the device this way.

        Raises:
            ResvitError: INPUT, naming the key, where it is malformed or of a kind that this version does not know.
        """
        return cls(
            record.name("name"),
            record.text("title"),
            record.whole("sm", 0, 999),
            record.choice("kind", Kind),
            record.choice("builder", Builder),
            record.text("tensorrt"),
            record.text("cuda"),
            record.whole("memory_mib", 1),
            record.whole("workspace_mib", 1),
            Speed.from_json(record.record("speed")),
            record.optional("jetpack", record.text),
            record.optional("python", record.text),
            record.text("arch"),
            record.texts("notes"),
        )


def _jetson(name: str, title: str, sm: int, jetpack: str, *, memory_mib: int, workspace_mib: int) -> Target:
    row = next(row for row in JETPACKS if row.version == jetpack)
    return Target(
        name, title, sm, Kind.JETSON, Builder.TENSORRT, row.tensorrt, row.cuda, memory_mib, workspace_mib,
        SPEEDS[name], jetpack=row.version, python=row.python, arch="aarch64",
    )  # fmt: skip


_SM80 = "--builder rtx: SM 8.0 is in the builder of TensorRT for RTX 1.7, not in NVIDIA's support matrix for it."
_SPARK = "--builder rtx: NVIDIA promises engines that move between systems, not from x86-64 to Arm: build on the Spark."


def _gpu(name: str, title: str, sm: int, kind: Kind, memory_mib: int, *notes: str, **other: Any) -> Target:
    rtx = kind is Kind.RTX
    builder, tensorrt = (Builder.RTX, RTX_VERSION) if rtx else (Builder.TENSORRT, NEWEST_TENSORRT)
    cuda = RTX_CUDA if rtx else CUDA_OF_TENSORRT[tensorrt]
    return Target(name, title, sm, kind, builder, tensorrt, cuda, memory_mib, 8192, SPEEDS[name], notes=notes, **other)


TARGETS: tuple[Target, ...] = (
    _jetson("jetson-orin", "Jetson AGX Orin", 87, "6.2", memory_mib=32768, workspace_mib=4096),
    _jetson("jetson-orin-nx", "Jetson Orin NX", 87, "6.2", memory_mib=8192, workspace_mib=2048),
    _jetson("jetson-orin-nano", "Jetson Orin Nano", 87, "6.2", memory_mib=4096, workspace_mib=1024),
    _jetson("jetson-thor", "Jetson Thor", 110, "7.1", memory_mib=65536, workspace_mib=8192),
    _gpu("a100", "A100", 80, Kind.DATACENTER, 40960, _SM80),
    _gpu("a10", "A10", 86, Kind.DATACENTER, 24576),
    _gpu("l4", "L4", 89, Kind.DATACENTER, 24576),
    _gpu("l40s", "L40S", 89, Kind.DATACENTER, 49152),
    _gpu("h100", "H100", 90, Kind.DATACENTER, 81920),
    _gpu("h200", "H200", 90, Kind.DATACENTER, 144384),
    _gpu("b200", "B200", 100, Kind.DATACENTER, 184320),
    _gpu("rtx-4090", "GeForce RTX 4090", 89, Kind.RTX, 24576),
    _gpu("rtx-5090", "GeForce RTX 5090", 120, Kind.RTX, 32768),
    _gpu("dgx-spark", "DGX Spark (GB10)", 121, Kind.DATACENTER, 131072, _SPARK, arch="aarch64"),
    Target(
        "cpu", "Processor (x86-64, aarch64)", 0, Kind.CPU, Builder.ONNXRUNTIME, OLDEST_ONNXRUNTIME, "", 1024, 1,
        SPEEDS["cpu"], arch=ANY_ARCH,
    ),
)  # fmt: skip
"""Every target by its name, Jetsons with the JetPack that is assumed unless another is named."""


def find_target(name: str, jetpack: str | None = None) -> Target:
    """Look up a target by name, a Jetson with the JetPack on it (``"6.2"``; patch releases such as 6.2.1 count as it).

    ``jetson-thor@7.2`` says both at once, and wins over ``jetpack``.

    Raises:
        ResvitError: IMPOSSIBLE for an unknown name (with the nearest ones), a JetPack that is too old, unknown, or
            not made for this module, and a JetPack given for something that is no Jetson.
    """
    wanted, at, version = name.strip().lower().replace("_", "-").replace(" ", "-").partition("@")
    jetpack = version if at else jetpack
    target = next((target for target in TARGETS if target.name == wanted), None)
    if target is None:
        raise ResvitError(f"There is no target called {name!r}.", _nearest(wanted), ExitCode.IMPOSSIBLE)
    if jetpack is None:
        return target
    if target.kind is not Kind.JETSON:
        raise ResvitError(
            f"{target.title} is not a Jetson, so JetPack {jetpack} does not belong with it.",
            "Leave the JetPack version out.",
            ExitCode.IMPOSSIBLE,
        )
    row = _jetpack_row(target, jetpack)
    return dataclasses.replace(target, jetpack=row.version, tensorrt=row.tensorrt, cuda=row.cuda, python=row.python)


def proxy_target(target: Target) -> Target:
    """The device as TensorRT for RTX can stand in for it: the same table row, with the nearest GPU that it serves.

    What it compiles shows which kernels that builder fuses; it does not run on the device. A target whose builder is
    TensorRT for RTX or ONNX Runtime stays as it is.
    """
    if target.builder is not Builder.TENSORRT:
        return target
    sm = target.sm if target.sm in RTX_SMS else PROXY_SMS[target.sm]
    return dataclasses.replace(
        target,
        sm=sm,
        kind=Kind.RTX,
        builder=Builder.RTX,
        tensorrt=RTX_VERSION,
        cuda=RTX_CUDA,
        jetpack=None,
        arch=platform.machine(),
    )


def require_precision(target: Target, precision: Precision) -> None:
    """Refuse a precision that the target has no kernels for.

    Raises:
        ResvitError: IMPOSSIBLE, with the reason and what to use instead.
    """
    if precision in target.precisions:
        return
    if target.on_cpu:
        raise ResvitError(
            f"ONNX Runtime has no {precision.value} kernels for processors that are worth having: it computes in FP32 "
            "and INT8 there.",
            "Use --precision int8 or fp32 for this target.",
            ExitCode.IMPOSSIBLE,
        )
    if precision is Precision.FP32:
        raise ResvitError(
            f"What is not quantised computes in FP16 on {target.title}; FP32 is for processors (--target cpu).",
            "Use --precision fp16 for this target.",
            ExitCode.IMPOSSIBLE,
        )
    raise ResvitError(
        f"{target.title} cannot run {precision.value}: FP8 needs compute capability 8.9 or newer, "
        f"and this is {target.sm / 10:.1f}.",
        "Use --precision int8 for this target.",
        ExitCode.IMPOSSIBLE,
    )


def _jetpack_row(target: Target, jetpack: str) -> JetPack:
    asked = version_of(jetpack.strip())
    served = [row for row in JETPACKS if not row.refusal and target.name in row.modules]
    choices = ", ".join(row.version for row in served)
    row = next((row for row in JETPACKS if version_of(row.version) == asked[:2]), None)
    if asked and asked[0] < 6:
        row = JETPACKS[0]
    if row is None:
        raise ResvitError(
            f"JetPack {jetpack} is not in the table.",
            f"For {target.title}, use one of: {choices} (`cat /etc/nv_tegra_release` on the device tells its release).",
            ExitCode.IMPOSSIBLE,
        )
    if row.refusal:
        raise ResvitError(
            f"JetPack {jetpack} cannot be served: it carries TensorRT {row.tensorrt}, and {row.refusal}.",
            f"Flash {target.title} with one of: {choices}.",
            ExitCode.IMPOSSIBLE,
        )
    if row not in served:
        raise ResvitError(
            f"JetPack {jetpack} does not run on {target.title}.",
            f"For {target.title}, use one of: {choices}.",
            ExitCode.IMPOSSIBLE,
        )
    return row


def _nearest(wanted: str) -> str:
    names = [target.name for target in TARGETS]
    parts = [part for part in wanted.split("-") if len(part) > 1 and part != "jetson"]
    near = [name for name in names if any(part in name for part in parts)]
    near += [name for name in difflib.get_close_matches(wanted, names, n=3, cutoff=0.5) if name not in near]
    every = f"All targets: {', '.join(names)}."
    return f"Did you mean {' or '.join(near[:4])}? {every}" if near else every
