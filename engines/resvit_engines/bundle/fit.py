"""Whether a bundle is for this device: asked of its manifest, because asking the engine itself would run it."""

from __future__ import annotations

from collections.abc import Iterator

from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import TITLES
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine
from resvit_engines.targets.software import version_of
from resvit_engines.targets.table import ANY_ARCH, Builder, Target

_SPARE_MIB = 64
"""Disk that stays free beside what is unpacked."""
_PROCESSORS = frozenset({"x86_64", "aarch64"})
_AMPERE = 80
"""Hardware-compatible engines run from Ampere on (NVIDIA's ``HardwareCompatibilityLevel.AMPERE_PLUS``)."""


def require_fit(manifest: Manifest, machine: Machine, *, rehearse: bool = False) -> None:
    """Refuse a bundle that was made for another device.

    An engine is bound to the GPU and the TensorRT that built it; a bundle without an engine, to be built here, only
    to its target. ``rehearse`` leaves out everything but memory and disk, for a machine that stands in for the device.

    Raises:
        ResvitError: IMPOSSIBLE for another processor, GPU, JetPack or TensorRT, SYSTEM for too little memory or
            disk; INPUT where the manifest does not say what it is for.
    """
    for problem, fix, code in misfits(manifest, machine, rehearse=rehearse):
        raise ResvitError(problem, fix, code)


def misfits(manifest: Manifest, machine: Machine, *, rehearse: bool = False) -> Iterator[tuple[str, str, ExitCode]]:
    """Every reason why the bundle is not for this device, as problem, fix and exit code."""
    target = manifest.target
    if target is None:
        yield "The manifest does not say which device it is for.", "Make the bundle again.", ExitCode.INPUT
        return
    if not rehearse:
        for problem in _other_device(target, manifest.engine, machine):
            yield problem, _rebuild(target, machine), ExitCode.IMPOSSIBLE
    needed = _memory_mib(manifest)
    if 0 < machine.memory_mib < needed:
        yield (
            f"The engine needs {needed:,} MiB of memory, and this device has {machine.memory_mib:,} MiB.",
            "Build a smaller model, or with a smaller --batch.",
            ExitCode.SYSTEM,
        )
    unpacked = sum(file.bytes for file in manifest.files) >> 20
    if machine.free_disk_mib < unpacked + _SPARE_MIB:
        yield (
            f"Unpacking needs {unpacked + _SPARE_MIB:,} MiB of disk, and {machine.free_disk_mib:,} MiB are free.",
            "Free some space, or choose a --root on another disk.",
            ExitCode.SYSTEM,
        )


def _memory_mib(manifest: Manifest) -> int:
    """Memory in MiB that running takes at the least: the engine, or the model, with its weights."""
    engine = manifest.size_of("engine.plan")
    return (engine if engine is not None else manifest.size_of("model.onnx") or 0) >> 20


def _other_device(target: Target, engine: EngineReport | None, machine: Machine) -> Iterator[str]:
    made = f"This bundle is for {target.title}"
    if target.arch not in {ANY_ARCH, machine.arch}:
        yield f"{made} with an {target.arch} processor, and this machine is {machine.arch}."
    if engine and engine.rehearsal:
        yield f"The engine of this bundle comes from a rehearsal: it is not for {target.title}, but for a stand-in."
    if target.on_cpu:
        yield from _other_onnxruntime(made, target, engine, machine)
        return
    yield from _other_gpu(made, target, engine, machine)
    jetpack = target.jetpack
    if jetpack and machine.jetpack and version_of(jetpack)[:2] != version_of(machine.jetpack)[:2]:
        yield f"{made} with JetPack {jetpack}, and this device has JetPack {machine.jetpack}."
    yield from _other_tensorrt(made, target, engine, machine)


def _other_gpu(made: str, target: Target, engine: EngineReport | None, machine: Machine) -> Iterator[str]:
    sm = engine.sm if engine else target.sm
    if machine.sm is None:
        yield f"{made} (SM {sm / 10:.1f}), and this machine shows no NVIDIA GPU."
    elif engine and engine.hardware_compatible:
        if machine.sm < _AMPERE:
            yield f"{made} or another GPU from SM 8.0 on, and this one is SM {machine.sm / 10:.1f}."
    elif machine.sm != sm:
        yield f"{made} (SM {sm / 10:.1f}), and this GPU is {machine.gpu or 'another'} (SM {machine.sm / 10:.1f})."


def _other_onnxruntime(made: str, target: Target, engine: EngineReport | None, machine: Machine) -> Iterator[str]:
    """An engine is for the release that optimised it; a model to be built, for that of its target and newer ones."""
    if machine.arch not in _PROCESSORS:
        yield f"{made}, and this machine's processor is {machine.arch}."
    if machine.onnxruntime is None:
        yield f"{made} and needs ONNX Runtime, which is not installed here (pip install onnxruntime)."
        return
    ours = version_of(machine.onnxruntime)[:2]
    if engine is not None and ours != version_of(engine.builder_version)[:2]:
        yield (
            f"{made}, made with ONNX Runtime {engine.builder_version}, and here is ONNX Runtime {machine.onnxruntime}."
        )
    elif engine is None and ours < version_of(target.tensorrt):
        yield f"{made} and needs ONNX Runtime {target.tensorrt} or newer; here is {machine.onnxruntime}."


def _other_tensorrt(made: str, target: Target, engine: EngineReport | None, machine: Machine) -> Iterator[str]:
    builder = engine.builder if engine else target.builder
    title, wanted = TITLES[builder], engine.builder_version if engine else target.tensorrt
    installed = machine.rtx if builder is Builder.RTX else machine.tensorrt
    if installed is None:
        yield f"{made} and needs {title} {wanted}, which is not installed here."
        return
    ours, theirs = version_of(installed), version_of(wanted)
    if engine and engine.version_compatible:
        fits = ours[:1] == theirs[:1] and ours[:3] >= theirs[:3]
    else:
        # An engine is for one build of TensorRT; a model to be built, for one minor version. Texts differ in length.
        digits = min(len(ours), len(theirs)) if engine else 2
        fits = ours[:digits] == theirs[:digits]
    if not fits:
        yield f"{made}, made with {title} {wanted}, and here is {title} {installed}."


def _rebuild(target: Target, machine: Machine) -> str:
    if target.on_cpu:
        return "Build it on this machine: 'resvit-engine build' with the bundle, or --device ssh://… from the host."
    said = f" --jetpack {machine.jetpack}" if target.jetpack and machine.jetpack else ""
    if machine.tensorrt and not target.jetpack and target.builder is Builder.TENSORRT:
        said = f" --tensorrt {'.'.join(map(str, version_of(machine.tensorrt)[:2]))}"
    return (
        f"Build one for this device: resvit-export build --target NAME{said} (resvit-export targets lists the "
        "names; resvit-engine facts says what this machine is)."
    )
