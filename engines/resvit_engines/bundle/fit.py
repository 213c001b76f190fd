"""Whether a bundle is for this device: asked of its manifest, because asking the engine itself would run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import DeviceFacts
from resvit_engines.targets.table import version_of

_SPARE_MIB = 64
"""Disk that stays free beside what is unpacked."""
_RTX = "TensorRT for RTX"
_AMPERE = 80
"""Hardware-compatible engines run from Ampere on (NVIDIA's ``HardwareCompatibilityLevel.AMPERE_PLUS``)."""


def require_fit(manifest: Mapping[str, Any], facts: DeviceFacts, *, rehearse: bool = False) -> None:
    """Refuse a bundle that was made for another device.

    An engine is bound to the GPU and the TensorRT that built it; a bundle without an engine, to be built here, only
    to its target. ``rehearse`` leaves out everything but memory and disk, for a machine that stands in for the device.

    Raises:
        ResvitError: IMPOSSIBLE for another processor, GPU, JetPack or TensorRT, SYSTEM for too little memory or
            disk; INPUT where the manifest does not say what it is for.
    """
    for problem, fix, code in misfits(manifest, facts, rehearse=rehearse):
        raise ResvitError(problem, fix, code)


def misfits(
    manifest: Mapping[str, Any], facts: DeviceFacts, *, rehearse: bool = False
) -> Iterator[tuple[str, str, ExitCode]]:
    """Every reason why the bundle is not for this device, as problem, fix and exit code."""
    target, engine = manifest.get("target"), manifest.get("engine")
    if not isinstance(target, Mapping) or not isinstance(engine, Mapping | None):
        yield "The manifest does not say which device it is for.", "Make the bundle again.", ExitCode.INPUT
        return
    if not rehearse:
        for problem in _other_device(target, engine, facts):
            yield problem, _rebuild(target, facts), ExitCode.IMPOSSIBLE
    needed = need_mib(manifest)
    if 0 < facts.memory_mib < needed:
        yield (
            f"The engine needs {needed:,} MiB of memory, and this device has {facts.memory_mib:,} MiB.",
            "Build a smaller model, or with a smaller --batch.",
            ExitCode.SYSTEM,
        )
    unpacked = sum(int(entry["bytes"]) for entry in manifest["files"]) >> 20
    if facts.free_disk_mib < unpacked + _SPARE_MIB:
        yield (
            f"Unpacking needs {unpacked + _SPARE_MIB:,} MiB of disk, and {facts.free_disk_mib:,} MiB are free.",
            "Free some space, or choose a --root on another disk.",
            ExitCode.SYSTEM,
        )


def need_mib(manifest: Mapping[str, Any]) -> int:
    """Memory in MiB that running takes at the least: the engine with its weights, and its activations if recorded."""
    sizes = {entry["path"]: int(entry["bytes"]) for entry in manifest["files"]}
    engine = manifest.get("engine") or {}
    plan = sizes.get("engine.plan", sizes.get("model.onnx", 0))
    return (plan >> 20) + _whole(engine.get("device_memory_mib"))


def _other_device(target: Mapping[str, Any], engine: Mapping[str, Any] | None, facts: DeviceFacts) -> Iterator[str]:
    title = target.get("title") or target.get("name") or "another device"
    made = f"This bundle is for {title}"
    if target.get("arch") not in (None, facts.arch):
        yield f"{made} with an {target['arch']} processor, and this machine is {facts.arch}."
    if engine and engine.get("rehearsal"):
        yield f"The engine of this bundle comes from a rehearsal: it is not for {title}, but for a stand-in."
    yield from _other_gpu(made, target, engine, facts)
    jetpack = target.get("jetpack")
    if jetpack and facts.jetpack and version_of(jetpack)[:2] != version_of(facts.jetpack)[:2]:
        yield f"{made} with JetPack {jetpack}, and this device has JetPack {facts.jetpack}."
    yield from _other_tensorrt(made, target, engine, facts)


def _other_gpu(
    made: str, target: Mapping[str, Any], engine: Mapping[str, Any] | None, facts: DeviceFacts
) -> Iterator[str]:
    sm = _whole((engine or {}).get("sm") or target.get("sm"))
    if facts.sm is None:
        yield f"{made} (SM {sm / 10:.1f}), and this machine shows no NVIDIA GPU."
    elif engine and engine.get("hardware_compatible"):
        if facts.sm < _AMPERE:
            yield f"{made} or another GPU from SM 8.0 on, and this one is SM {facts.sm / 10:.1f}."
    elif facts.sm != sm:
        yield f"{made} (SM {sm / 10:.1f}), and this GPU is {facts.gpu or 'another'} (SM {facts.sm / 10:.1f})."


def _other_tensorrt(
    made: str, target: Mapping[str, Any], engine: Mapping[str, Any] | None, facts: DeviceFacts
) -> Iterator[str]:
    builder = str((engine or {}).get("builder") or (_RTX if target.get("builder") == "tensorrt-rtx" else "TensorRT"))
    wanted = str((engine or {}).get("builder_version") or target.get("tensorrt") or "")
    found = facts.rtx if builder == _RTX else facts.tensorrt
    if found is None:
        yield f"{made} and needs {builder} {wanted}, which is not installed here."
        return
    ours, theirs = version_of(found), version_of(wanted)
    if engine and engine.get("version_compatible"):
        fits = ours[:1] == theirs[:1] and ours[:3] >= theirs[:3]
    else:
        # An engine is for one build of TensorRT; a model to be built, for one minor version. Texts differ in length.
        digits = min(len(ours), len(theirs)) if engine else 2
        fits = ours[:digits] == theirs[:digits]
    if not fits:
        yield f"{made}, made with {builder} {wanted}, and here is {builder} {found}."


def _rebuild(target: Mapping[str, Any], facts: DeviceFacts) -> str:
    jetpack = f" --jetpack {facts.jetpack}" if target.get("jetpack") and facts.jetpack else ""
    return (
        f"Build one for this device: resvit-export build --target NAME{jetpack} (resvit-export targets lists the "
        "names; resvit-engine facts says what this machine is)."
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
