"""Deformable attention of every model that has it: found, one node, and every value behind it stays what it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import deformable_models
from deformable_graphs import CONSTANTS, LINES, SHAPES, given, graph, layer
from deformable_models import HEADS, LEVELS, MODELS, QUERIES, WIDTH
from fusion_graphs import computed, fused, graph_of, refusal
from fusion_models import Built, plain_names, values_of
from quantize_graphs import sqnr
from resvit_engines.kernels.deformable import (
    DeformableConfig,
    deformable_reference,
    deformable_refusal,
    traffic_bytes,
)
from resvit_engines.targets.table import Precision
from resvit_quantize.fusion.fuse import config_of, fuse, our_nodes
from resvit_quantize.fusion.match import Kind

ONLY = Kind.DEFORMABLE
ALIKE = {Precision.FP16: 40.0, Precision.INT8: 25.0}
"""dB between the plain graph and ours. The plain one rounds places, samples, products and sums to FP16, ours only the
result; in INT8 a difference in the last digit can turn a rounding, which is then a whole step."""
IN_8_BITS = 18.0
OF_IMAGES = ("deformable_detr", "mask2former", "oneformer")
POINTS = {"d_fine": (3, 6, 3), "deim": (3, 6, 3)}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("rt_detr", "d_fine") else pytest.mark.slow) for name in MODELS]
)
def test_every_models_deformable_attention_becomes_one_node(tmp_path: Path, name: str) -> None:
    levels = LEVELS[: 1 if name == "lw_detr" else 3]
    built = Built(tmp_path, f"{Path(deformable_models.__file__)}:{name}", 20)
    for precision, least in ALIKE.items():
        plain, model = (ir.load(built.path(precision)) for _ in range(2))
        report = fuse(model, frozenset({ONLY}))
        check(model)
        assert report.refusals == ()
        (node,) = our_nodes(model)
        config = config_of(node)
        assert (config,) == tuple(match.config for match in report.matches)
        assert isinstance(config, DeformableConfig)
        assert (config.heads, config.head_size) == (HEADS, WIDTH // HEADS)
        assert tuple(zip(config.heights, config.widths, strict=True)) == levels
        assert config.points == POINTS.get(name, (4,) * len(levels) if name != "lw_detr" else config.points)
        assert config.queries == (sum(h * w for h, w in levels) if name in OF_IMAGES else QUERIES)
        assert config.unit
        assert not any(left.op_type == "GridSample" for left in model.graph)
        assert_alike(plain, model, built.images, least)
    for dtype in ("int8", "fp8"):
        plain, model = (ir.load(built.path(Precision.FP16)) for _ in range(2))
        (match,) = fuse(model, frozenset({ONLY}), operands=built.operands(dtype)).matches
        check(model)
        assert match.config.dtype == dtype
        (node,) = our_nodes(model)
        assert [value.producer().op_type == "QuantizeLinear" for value in node.inputs] == [True, False, False]
        assert_alike(plain, model, built.images, IN_8_BITS)


def check(model: ir.Model) -> None:
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


def assert_alike(plain: ir.Model, model: ir.Model, images: np.ndarray, least: float) -> None:
    kept = plain_names(plain) & plain_names(model)
    right, got = values_of(plain, images, kept), values_of(model, images, kept)
    far = {name: sqnr(right[name], got[name]) for name in right if np.any(right[name])}
    assert len(far) > 4
    assert {name: round(value, 1) for name, value in far.items() if not value >= least} == {}


def test_the_node_computes_what_the_reference_does() -> None:
    plain, model = graph(), graph()
    (match,) = fused(model, ONLY).matches
    assert match.config == DeformableConfig(2, 8, (5, 2), (3, 2), (3, 3), 5, place_dtype="fp16")
    assert match.shapes == ((1, 19, 16), (1, 5, 2, 2, 3, 2), (1, 5, 2, 6))
    assert len(match.nodes) == 5
    inputs = given()
    (right,), (got,) = computed(plain, **inputs), computed(model, **inputs)
    reference = deformable_reference(match.config, *inputs.values())
    # The reference sums in float64, the body in FP32: both may end on either side of a rounding.
    np.testing.assert_allclose(got, reference, rtol=2.0**-10, atol=1e-4)
    np.testing.assert_allclose(got, right, rtol=0.02, atol=0.02)


def test_places_that_are_none_give_none_in_the_body_too() -> None:
    model = graph()
    fused(model, ONLY)
    inputs = given()
    inputs["places"][0, 1, 0, 0, 0, 0] = np.nan
    inputs["places"][1, 2, 1, 1, 0, 1] = -np.inf
    inputs["places"][2, 2, 1, 1, 0, 1] = 6e4
    (got,) = computed(model, **inputs)
    rows = np.isnan(got).reshape(3, 5, 2, 8)
    assert rows[0, 1, 0].all()
    assert rows[1, 2, 1].all()
    assert rows.sum() == 16


def test_a_grid_that_is_computed_otherwise_is_read_as_it_is() -> None:
    plain, model = graph(shift=np.float16(0.5)), graph(shift=np.float16(0.5))
    (match,) = fused(model, ONLY).matches
    assert not match.config.unit
    inputs = given()
    np.testing.assert_allclose(computed(model, **inputs)[0], computed(plain, **inputs)[0], rtol=0.02, atol=0.02)


def test_eight_bits_behind_it_become_part_of_it() -> None:
    lines = LINES.replace("out = Tr", "real = Tr") + " out = QuantizeLinear (real, scale, zero)\n"
    made = {"scale": np.float16(0.03), "zero": np.int8(0), "outputs": "int8[N, 5, 16] out"}
    plain, model = graph(lines, **made), graph(lines, **made)
    (match,) = fused(model, ONLY).matches
    assert (match.op_type, match.config.out_dtype) == ("ResvitDeformableQ", "int8")
    inputs = given()
    (right,), (got,) = computed(plain, **inputs), computed(model, **inputs)
    assert np.abs(got - right).max() <= 1
    assert np.abs(right).max() > 10


def changes() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """What is changed, to what, the reason, and other constants."""
    yield 'mode = "linear", padding_mode = "zeros"> (image2', 'mode = "nearest"> (image2', "with mode nearest", {}
    yield 'padding_mode = "zeros"> (image2', 'padding_mode = "border"> (image2', "with padding_mode border", {}
    yield "align_corners = 0, mode", "align_corners = 1, mode", "aligned corners", {}
    yield "Concat <axis = -1> (samples1, samples2)", "Concat <axis = -1> (samples2, samples1)", "one tensor", {}
    yield "ReduceSum <keepdims = 0> (weighted, last)", "ReduceMean <keepdims = 0> (weighted, last)", "not summed", {}
    yield "out = Transpose <perm = [0, 2, 1]> (rows)", "out = Reshape (rows, order)", "order", {"order": [-1, 5, 16]}
    yield "shares0 = Transpose <perm = [0, 2, 1, 3]> (weights)", "shares0 = Identity (weights)", "its weights", {}
    yield "heads = Transpose <perm = [0, 2, 1, 3, 4, 5]> (grids)", "heads = Identity (grids)", "its places", {}
    yield "turned = Transpose <perm = [0, 2, 3, 1]>", "turned = Transpose <perm = [0, 3, 2, 1]>", "tensor of values", {}


@pytest.mark.parametrize(("old", "new", "reason", "constants"), changes())
def test_what_is_not_the_pattern_stays_with_the_reason(
    old: str, new: str, reason: str, constants: dict[str, Any]
) -> None:
    assert old in LINES
    assert reason in refusal(graph(LINES.replace(old, new), **constants), ONLY)


def test_values_in_fp32_are_found_and_no_kernel_serves_them() -> None:
    """Whoever reads pixels by Gather can use what is found; who wants a kernel is refused with the reason."""
    shapes = SHAPES.replace("float16", "float")
    model = graph_of(
        LINES, shapes, "float[N, 5, 16] out", **{**CONSTANTS, "factor": np.float32(2), "shift": np.float32(1)}
    )
    reason = "its values are FP32 and its output FP32"
    assert refusal(model, ONLY, decide=lambda match: deformable_refusal(match.config, 87)) == reason
    (match,) = fused(model, ONLY).matches
    assert (match.config.dtype, match.config.out_dtype) == ("fp32", "fp32")


def test_a_sampling_that_nothing_weighs_is_no_deformable_attention() -> None:
    model = graph_of(
        ' out = GridSample <mode = "linear"> (x, grid)\n',
        "float16[N, 8, 5, 3] x, float16[N, 7, 7, 2] grid",
        "float16[N, 8, 7, 7] out",
    )
    report = fused(model, ONLY)
    assert (report.matches, report.refusals) == ((), ())


def test_samples_that_are_an_output_stay() -> None:
    model = graph(outputs="float16[N, 5, 16] out, float16[M, 8, 5, 3] samples2")
    assert "something else reads what GridSample_14 samples" in refusal(model, ONLY)


def test_another_configuration_is_another_result() -> None:
    """What is compared above would show a level that is read in the place of another."""
    model = graph()
    (match,) = fused(model, ONLY).matches
    inputs = given()
    wrong = dataclasses.replace(match.config, heights=(2, 5), widths=(2, 3))
    right = deformable_reference(match.config, *inputs.values())
    assert np.abs(deformable_reference(wrong, *inputs.values()) - right).max() > 0.1


FIGURES = {
    "| RT-DETR decoder, 640 px, 300 queries |": (((80, 80), (40, 40), (20, 20)), (4, 4, 4), 300),
    "| Deformable DETR encoder, 800 x 1066 px |": (((100, 134), (50, 67), (25, 34), (13, 17)), (4, 4, 4, 4), 17821),
    "| Mask2Former pixel decoder, 1024 px |": (((32, 32), (64, 64), (128, 128)), (4, 4, 4), 21504),
}


@pytest.mark.parametrize("row", FIGURES)
def test_the_documentation_tells_the_bytes_that_the_graphs_move(row: str) -> None:
    sides, points, queries = FIGURES[row]
    nodes = [node for node in layer(sides, points, queries).graph if node.op_type != "Reshape"]
    tensors = (value for node in nodes for value in (*node.inputs, *node.outputs) if value.dtype == ir.DataType.FLOAT16)
    moved = sum(2 * math.prod(value.shape) for value in tensors if len(value.shape))
    heights, widths = zip(*sides, strict=True)
    config = DeformableConfig(8, 32, heights, widths, points, queries, place_dtype="fp16")
    shapes = ((1, config.positions, 256), (1, queries, 8, config.samples, 2), (1, queries, 8, config.samples))
    ours = traffic_bytes(config, shapes)
    eight = traffic_bytes(dataclasses.replace(config, dtype="int8"), shapes)
    figures = " | ".join(f"{number / 1e6:,.1f}" for number in (ours, eight))
    said = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"{row} {len(nodes)} | {moved / 1e6:,.1f} | 1 | {figures} |" in said


def test_a_layer_cut_and_joined_as_by_later_models_is_found() -> None:
    (match,) = fused(layer(((8, 6), (4, 3)), (3, 5), 7), ONLY).matches
    assert match.config == DeformableConfig(8, 32, (8, 4), (6, 3), (3, 5), 7, place_dtype="fp16")
