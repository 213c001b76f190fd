"""Which build options a builder has for a target: said before any work, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.table import RTX_SMS, Builder, Kind, Target


class _Limit(NamedTuple):
    asked: Callable[[BuildSettings], bool]
    fails: Callable[[Target], bool]
    option: str
    reason: str


_LIMITS = (
    _Limit(
        lambda settings: settings.plugins != "off",
        lambda target: target.builder is Builder.RTX,
        "An engine with kernels of our own (--plugins)",
        "TensorRT for RTX takes no plugins",
    ),
    _Limit(
        lambda settings: settings.plugins != "off",
        lambda target: target.on_cpu,
        "An engine with kernels of our own (--plugins)",
        "they are for GPUs",
    ),
    _Limit(
        lambda settings: settings.sparse,
        lambda target: target.on_cpu,
        "An engine with kernels for 2:4 sparse weights (--sparsity)",
        "ONNX Runtime has none",
    ),
    *(
        _Limit(
            lambda settings, flag=flag: getattr(settings, flag),  # type: ignore[misc]
            lambda target: target.on_cpu,
            f"An engine with --{flag.replace('_', '-')}",
            "that is an option of TensorRT",
        )
        for flag in ("hardware_compatible", "version_compatible", "strip_weights")
    ),
    _Limit(
        lambda settings: settings.hardware_compatible,
        lambda target: target.kind is Kind.JETSON,
        "An engine for several GPUs (--hardware-compatible)",
        "TensorRT has hardware compatibility for desktop and datacenter GPUs only, and an engine for a Jetson runs on "
        "that module alone",
    ),
    _Limit(
        lambda settings: settings.version_compatible,
        lambda target: target.builder is Builder.RTX,
        "An engine for several versions (--version-compatible)",
        "that needs TensorRT's lean runtime, which TensorRT for RTX does not have",
    ),
    _Limit(
        lambda settings: settings.strip_weights,
        lambda target: target.builder is Builder.RTX,
        "An engine without weights (--strip-weights)",
        "TensorRT for RTX cannot leave the weights out without the GPU itself, and builds without it here",
    ),
)


def require_buildable(target: Target, settings: BuildSettings) -> None:
    """Refuse options that the target's builder does not have for it.

    Raises:
        ResvitError: IMPOSSIBLE, with the reason.
    """
    for limit in _LIMITS:
        if limit.asked(settings) and limit.fails(target):
            raise ResvitError(
                f"{limit.option} cannot be built for {target.title}: {limit.reason}.",
                "Leave that option out for this target.",
                ExitCode.IMPOSSIBLE,
            )


def compute_capabilities(target: Target, settings: BuildSettings) -> list[int]:
    """What TensorRT for RTX compiles for: the target, or with ``hardware_compatible`` it and every newer GPU.

    The target comes last: the kernels that are listed at the end of a build are then its own.
    """
    newer = [sm for sm in sorted(RTX_SMS) if sm > target.sm] if settings.hardware_compatible else []
    return [*newer, target.sm]
