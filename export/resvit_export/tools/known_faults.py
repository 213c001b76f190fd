"""What the TensorRT of a target is known to answer wrongly, as lines of ``doctor``."""

from __future__ import annotations

from pathlib import Path

from resvit_engines.targets.faults import Fault, faults_of, is_rewritten, open_faults, releases_without
from resvit_engines.targets.own import Software, resolve_target
from resvit_engines.targets.table import Target
from resvit_export.tools.doctor import Check


def fault_checks(name: str, tensorrt: str | None = None, onnx: Path | None = None, batch: int = 1) -> list[Check]:
    """A line for each known fault of a target's TensorRT; with ``onnx`` for each that this graph may meet.

    ``batch`` is the largest of the profile. What the copy for TensorRT avoids is in order.

    Raises:
        ResvitError: IMPOSSIBLE for a target or release that there is not; INPUT for a file that is no ONNX model.
    """
    target = resolve_target(name, Software(tensorrt=tensorrt))
    title = f"{target.software} on {target.title}"
    faults = faults_of(target)
    if onnx is None:
        none = [Check(title, "ok", "no fault is known")]
        return [
            _line(fault, target, "with", releases_without(target, {fault.pattern}, fault.batch[0])) for fault in faults
        ] or none
    from resvit_export.to_tensorrt.fault_patterns import patterns_in

    patterns = patterns_in(onnx)
    found = open_faults(target, patterns, batch)
    ways = releases_without(target, patterns, batch) if found else ()
    lines = [_line(fault, target, patterns[fault.pattern][0] + ":", ways) for fault in found]
    return lines or [Check(title, "ok", f"{onnx.name} meets none of the {len(faults)} known faults")]


def _line(fault: Fault, target: Target, where: str, ways: tuple[str, ...] = ()) -> Check:
    name = f"TensorRT {target.tensorrt}"
    found = f"{where} {fault.pattern}: {fault.what} ({', '.join(fault.references)})"
    if fault.rewritten and is_rewritten(target, fault.pattern):
        return Check(name, "ok", found, f"The copy for TensorRT has {fault.rewritten} in its place.")
    fix = ", or ".join([*filter(None, [fault.way_out]), *ways])
    return Check(name, "warn", found, f"{fix[:1].upper()}{fix[1:]}." if fix else "No way out is known.")
