"""A quantised graph with nodes of our own, wherever a kernel serves the target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.kernels.measure.results import case_of, measured_result
from resvit_engines.targets.table import Target
from resvit_export.to_tensorrt.plugin_choice import By
from resvit_export.to_tensorrt.plugin_kernels import refusal

if TYPE_CHECKING:
    import onnx_ir as ir

    from resvit_quantize.fusion.fuse import Operands
    from resvit_quantize.fusion.match import FusionReport, Kind, Match


def fused_network(
    model: Path, kinds: frozenset[Kind], target: Target, *, by: By = By.WISH, operands: Operands | None = None
) -> tuple[ir.Model, FusionReport]:
    """The model with every part of these kinds that a kernel serves on the target as a node of ours."""
    import onnx_ir

    from resvit_quantize.fusion.fuse import fuse

    network = onnx_ir.load(model)

    def decide(match: Match) -> str | None:
        return refusal(match.config, target) or (_not_faster(match, target) if by is By.TABLE else None)

    return network, fuse(network, kinds, decide, operands)


def _not_faster(match: Match, target: Target) -> str | None:
    case = case_of(match.config, match.shapes)
    result = measured_result(target.sm, match.kind.value, case)
    if result is None:
        return f"nobody measured it on SM {target.sm / 10:.1f}"
    if result.faster:
        return None
    return f"on {result.device} it took {result.ours_us:.1f} µs, and {result.other} {result.other_us:.1f} µs"
