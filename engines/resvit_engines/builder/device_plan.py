"""The commands that build an engine on the machine that has the GPU, for engines that cannot be built here."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from resvit_engines.builder.settings import BuildSettings
from resvit_engines.plugins.library import LIBRARY
from resvit_engines.records import Record
from resvit_engines.targets.software import JETPACKS, version_of
from resvit_engines.targets.table import Kind, Target

_TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
_FIND_TRTEXEC = f"$(command -v trtexec || echo {_TRTEXEC})"


@dataclass(frozen=True)
class DevicePlan:
    """Why the engine is not built here, and the shell commands that build it where it can be."""

    target: str
    why: str
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    settings: BuildSettings
    """With the workspace that the target takes where none was asked for."""
    input_name: str
    input_shape: tuple[int, ...]
    """[C, H, W]."""
    dynamic_batch: bool
    inputs: Mapping[str, tuple[int, ...]]
    """Shapes without the batch by name, where the network reads more than images; else empty."""

    @property
    def all_settings(self) -> dict[str, Any]:
        """How to build, and what the network reads, by name as plain JSON values."""
        return {
            **self.settings.to_json(),
            "input": self.input_name,
            "input_shape": list(self.input_shape),
            "dynamic_batch": self.dynamic_batch,
            **({"inputs": {name: list(shape) for name, shape in self.inputs.items()}} if self.inputs else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in a run's ``plan.json``."""
        return {
            "target": self.target,
            "why": self.why,
            "commands": list(self.commands),
            "notes": list(self.notes),
            "settings": self.all_settings,
        }

    @classmethod
    def from_json(cls, record: Record) -> DevicePlan:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        settings = record.record("settings")
        inputs = settings.optional("inputs", settings.record)
        return cls(
            record.text("target"),
            record.text("why"),
            record.texts("commands"),
            record.texts("notes"),
            BuildSettings.from_json(settings),
            settings.text("input"),
            settings.wholes("input_shape", 1),
            settings.flag("dynamic_batch"),
            {name: inputs.wholes(name, 1) for name in inputs.names} if inputs else {},
        )


def plan_for_device(
    target: Target,
    settings: BuildSettings,
    input_shape: tuple[int, int, int],
    *,
    dynamic_batch: bool,
    bundle: str = "BUNDLE.resvit",
    onnx: str = "model.onnx",
    onnx_sha256: str | None = None,
    input_name: str = "input",
    beside: Mapping[str, Sequence[int]] | None = None,
    input_formats: Sequence[str] = (),
) -> DevicePlan:
    """Say in plain words why ``target`` is not built for here, and how to build there.

    ``input_shape`` is (C, H, W), ``beside`` the shapes of further inputs by name, without the batch;
    ``dynamic_batch`` is whether the ONNX file's batch is dynamic, as its sizes are where the settings have a range (a
    shape that is wholly fixed must not be named again). ``bundle`` is the file name of the bundle and ``onnx`` the
    model's path inside it. The commands are run in order beside the copied bundle: unpack, check, build. They need only
    Python's standard library and ``trtexec``, which every TensorRT installation brings. ``input_formats`` are the
    inputs' types as it takes them (``int8:chw``), in order, where it would not keep those of the file.
    """
    folder = PurePosixPath(bundle).stem
    shapes = {input_name: input_shape, **(beside or {})}
    commands = [
        f"python3 -m zipfile -e {shlex.quote(bundle)} {shlex.quote(folder)}",
        f"cd {shlex.quote(folder)}",
    ]
    if onnx_sha256:
        commands.append(f"echo {shlex.quote(f'{onnx_sha256}  {onnx}')} | sha256sum --check")
    if settings.plugins == "library":
        commands.append(f"resvit-engine plugin --out {LIBRARY}")
    if settings.plugins == "aot":
        # trtexec has no way to register what is written in Python.
        commands = [f"resvit-engine build {shlex.quote(bundle)} --trust KEY.pub"]
    else:
        open_shapes = shapes if dynamic_batch or settings.sizes else {}
        commands.append(_trtexec(target, settings, open_shapes, onnx, input_formats))
    return DevicePlan(
        target.name,
        _why(target),
        tuple(commands),
        _notes(target, settings),
        dataclasses.replace(
            settings,
            workspace_mib=settings.workspace_mib or target.workspace_mib,
            timing_cache=None,
            plugin_library=None,
        ),
        input_name,
        input_shape,
        dynamic_batch,
        {name: tuple(shape) for name, shape in shapes.items()} if beside else {},
    )


def _trtexec(
    target: Target, settings: BuildSettings, shapes: Mapping[str, Sequence[int]], onnx: str, formats: Sequence[str]
) -> str:
    options = [
        f"--onnx={onnx}",
        "--stronglyTyped",  # has no effect from TensorRT 11 on, where every network is
        "--saveEngine=engine.plan",
        f"--memPoolSize=workspace:{settings.workspace_mib or target.workspace_mib}",
        f"--builderOptimizationLevel={settings.optimization_level}",
        "--profilingVerbosity=detailed",
        "--timingCacheFile=timing.cache",
        "--skipInference",
        *(["--sparsity=enable"] if settings.sparse else []),
        *(["--hardwareCompatibilityLevel=ampere+"] if settings.hardware_compatible else []),
        *(["--versionCompatible"] if settings.version_compatible else []),
        *(["--stripWeights"] if settings.strip_weights else []),
        *([f"--dynamicPlugins=./{LIBRARY}"] if settings.plugins == "library" else []),
        *([f"--inputIOFormats={','.join(formats)}"] if formats else []),
    ]
    if shapes:
        image, sizes = next(iter(shapes)), settings.sizes
        each_size = (sizes.smallest, sizes.usual, sizes.largest) if sizes else (None, None, None)
        for option, batch, size in zip(("minShapes", "optShapes", "maxShapes"), settings.batch, each_size, strict=True):
            own = {**shapes, image: (shapes[image][0], *size)} if size else shapes
            each = (f"{name}:{'x'.join(map(str, (batch, *shape)))}" for name, shape in own.items())
            options.append(f"--{option}={','.join(each)}")
    # An archive of a newer TensorRT lies anywhere: its bin folder is then in front in PATH.
    program = _TRTEXEC if target.kind is Kind.JETSON and not _replaced(target) else _FIND_TRTEXEC
    return " ".join([program, *(shlex.quote(option) for option in options)])


def _replaced(target: Target) -> str:
    """The TensorRT of a Jetson's JetPack image where another is chosen in its place; empty where none is."""
    own = next((row.tensorrt for row in JETPACKS if row.version == target.jetpack), target.tensorrt)
    return own if target.kind is Kind.JETSON and version_of(own) != version_of(target.tensorrt) else ""


def _why(target: Target) -> str:
    if target.kind is Kind.JETSON:
        own = _replaced(target)
        carried = f"JetPack {target.jetpack} carries TensorRT {own or target.tensorrt}"
        chosen = f"; TensorRT {target.tensorrt} was chosen in its place" if own else ""
        return (
            f"An engine belongs to the GPU and the TensorRT that built it. {target.title} has compute capability "
            f"{target.sm / 10:.1f} and {carried}{chosen}, and no builder on "
            f"a workstation writes engines for it: copy the bundle to the {target.title} (or one exactly like it) "
            "and run these commands there."
        )
    return (
        f"TensorRT measures kernels on the GPU itself, and this machine has no {target.title} (compute capability "
        f"{target.sm / 10:.1f}) with {target.software} beside it: no engine was built. Copy the bundle to a machine "
        "that has both, and run these commands there."
    )


def _notes(target: Target, settings: BuildSettings) -> tuple[str, ...]:
    notes = ["The engine appears as engine.plan beside the model and runs only on this GPU and TensorRT version."]
    if settings.plugins == "aot":
        notes.append(
            "Kernels of our own go into the engine ahead of time; TensorRT takes them from Python, not from trtexec."
        )
    elif settings.plugins == "library":
        notes.append(
            f"The engine needs {LIBRARY}, which 'resvit-engine plugin' compiles for this TensorRT (g++, cmake and "
            "libnvinfer-headers-dev): whatever runs the engine must load it first."
        )
    if target.kind is Kind.JETSON:
        notes.append(_where_from(target))
        notes.append("For steady timing: sudo nvpmodel -m 0 && sudo jetson_clocks (the device may want a restart).")
    notes.append(
        "trtexec of TensorRT 11 ignores --stronglyTyped (every network is strongly typed) and times with CUDA graphs, "
        "spin waiting and no transfers by itself; on TensorRT 10 add --noDataTransfers --useSpinWait --useCudaGraph "
        "to compare times."
    )
    return tuple(notes)


def _where_from(target: Target) -> str:
    """How the TensorRT of the engine gets onto a Jetson."""
    own = _replaced(target)
    if not own:
        return "Use the TensorRT of the JetPack image: never pip install tensorrt on a Jetson."
    packages = (
        f"NVIDIA's archive TensorRT-{target.tensorrt}.*.l4t.aarch64-gnu.cuda-{target.cuda}.tar.gz or the repository "
        f"nv-tensorrt-local-tegra-repo-ubuntu2204-{target.tensorrt}.*"
    )
    if version_of(target.tensorrt) >= (11,):
        packages = f"NVIDIA's package of TensorRT {target.tensorrt} for Arm servers (SBSA, aarch64)"
    return (
        f"Not with the image's TensorRT {own}: install {packages} first. Of an archive, put bin in front in PATH and "
        "lib in LD_LIBRARY_PATH, and install the wheel in its python folder (never pip install tensorrt from an "
        f"index); 'trtexec --help | head -1' must say {target.tensorrt}, as v100700 does for 10.7."
    )
