"""What may be chosen for a target: its builder, and the release of TensorRT that builds on the device."""

from __future__ import annotations

import dataclasses

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.software import (
    CUDA_OF_TENSORRT,
    JETPACKS,
    NEWEST_TENSORRT,
    RTX_CUDA,
    RTX_VERSION,
    tensorrts_for,
    version_of,
)
from resvit_engines.targets.table import RTX_SMS, Builder, Kind, Precision, Target


def with_builder(target: Target, builder: Builder | None) -> Target:
    """The target with its engines built by ``builder``; None is the one that serves it best.

    Raises:
        ResvitError: IMPOSSIBLE where TensorRT for RTX has no kernels for that GPU.
    """
    if builder is None or builder is target.builder:
        return target
    if target.on_cpu or builder is Builder.ONNXRUNTIME:
        raise ResvitError(
            f"Engines for {target.title} are ONNX Runtime's, and TensorRT's are for GPUs."
            if target.on_cpu
            else f"ONNX Runtime makes engines for processors (--target cpu), and {target.title} is a GPU.",
            "Leave --builder out.",
            ExitCode.IMPOSSIBLE,
        )
    if builder is Builder.TENSORRT:
        cuda = CUDA_OF_TENSORRT[NEWEST_TENSORRT]
        return dataclasses.replace(target, builder=builder, tensorrt=NEWEST_TENSORRT, cuda=cuda)
    if target.sm not in RTX_SMS:
        served = ", ".join(f"{sm / 10:.1f}" for sm in sorted(RTX_SMS))
        raise ResvitError(
            f"TensorRT for RTX builds no engine for {target.title}: it serves compute capability {served}, and this is "
            f"{target.sm / 10:.1f}.",
            f"Leave --builder out: TensorRT builds it on the {target.title}.",
            ExitCode.IMPOSSIBLE,
        )
    return dataclasses.replace(target, builder=builder, tensorrt=RTX_VERSION, cuda=RTX_CUDA)


def rtx_in_place(target: Target, precision: Precision) -> tuple[str, ...]:
    """What ``--builder rtx`` means for 8 bits where TensorRT is what serves the target best: a sentence, else none."""
    if target.builder is not Builder.RTX or target.kind is Kind.RTX or precision is Precision.FP16:
        return ()
    return (
        f"TensorRT for RTX builds for {target.title} in place of TensorRT: built without the GPU, its 8-bit kernels "
        "write accumulators, so 8 bits are seldom faster than FP16 there, and none of it tells what TensorRT does.",
    )


def with_tensorrt(target: Target, version: str) -> Target:
    """The target with another release of TensorRT, such as ``10.13``; a patch release counts as its minor one.

    Raises:
        ResvitError: IMPOSSIBLE for a release that is not served on this target, with those that are, and where
            TensorRT for RTX builds for it.
    """
    if target.on_cpu:
        raise ResvitError(
            f"ONNX Runtime serves {target.title}, so TensorRT {version} has no part in it.",
            "Leave --tensorrt out.",
            ExitCode.IMPOSSIBLE,
        )
    if target.builder is Builder.RTX:
        fix = "Leave --tensorrt out, or say --builder tensorrt to build by TensorRT where that GPU is."
        raise ResvitError(
            f"TensorRT for RTX {target.tensorrt} builds for {target.title}, so TensorRT {version} has no part in it.",
            fix,
            ExitCode.IMPOSSIBLE,
        )
    asked, choices = version_of(version.strip())[:2], tensorrts_of(target)
    release = next((choice for choice in choices if version_of(choice) == asked), None)
    if release is None:
        beside = f" with JetPack {target.jetpack}" if target.jetpack else ""
        raise ResvitError(
            f"TensorRT {version} is not served on {target.title}{beside}.",
            f"Use --tensorrt with one of: {', '.join(choices)}.",
            ExitCode.IMPOSSIBLE,
        )
    cuda = target.cuda if target.jetpack else CUDA_OF_TENSORRT[release]
    return dataclasses.replace(target, tensorrt=release, cuda=cuda)


def tensorrts_of(target: Target) -> tuple[str, ...]:
    """The releases of TensorRT that can be chosen for it: on a Jetson those that its JetPack takes."""
    if target.on_cpu:
        return ()
    if target.jetpack is None:
        return tensorrts_for(target.sm)
    row = next(row for row in JETPACKS if row.version == target.jetpack)
    return row.tensorrts(target.name)
