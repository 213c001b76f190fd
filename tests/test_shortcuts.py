"""Shortcuts of which 8 bits leave little stay in FP16: a few channels hold most of the stream, one step is for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantize_graphs import Graph
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import ranges_from
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.qdq.plan import plan_quantization
from resvit_quantize.settings import Methods, QuantizeSettings

CHANNELS = 256
INT8 = QuantizeSettings(Precision.INT8)


def shortcuts(folder: Path, largest: float, settings: QuantizeSettings = INT8) -> int:
    """How many shortcuts of two blocks are quantised, where one channel is ``largest`` times as large as the others."""
    g = Graph("batch", CHANNELS, 4, 4)
    sizes = np.ones((1, CHANNELS, 1, 1), np.float32)
    sizes[0, 0] = largest
    # A Softsign keeps smoothing from evening the channels out.
    value = g.op("Add", g.op("Mul", g.op("Softsign", "input"), g.constant("sizes", sizes)), g.constant("c", sizes * 0))
    for block in ("a", "b"):
        hidden = g.op("Relu", g.conv(value, 16, CHANNELS, 1, name=f"{block}.in"))
        value = g.op("Add", g.conv(hidden, CHANNELS, 16, 1, name=f"{block}.out"), value, name=f"{block}/Add")
    path = g.save(folder / "float.onnx", g.op("Softsign", value))
    images = np.random.default_rng(0).standard_normal((8, CHANNELS, 4, 4)).astype(np.float32)
    statistics = collect_statistics(path, [{"input": images}])
    plan = plan_quantization(graph_from_onnx(path), ranges_from(statistics, "digest"), settings, statistics)
    assert {str(weight.node.name) for weight in plan.placement.weights} >= {"a.in", "a.out"}
    return sum(edge.node.op_type == "Add" for edge in plan.placement.edges)


@pytest.mark.parametrize("settings", [INT8, replace(INT8, bits=6)])
def test_even_channels_have_their_shortcuts_in_8_bits(tmp_path: Path, settings: QuantizeSettings) -> None:
    assert shortcuts(tmp_path, 1.0, settings) == 2


def test_a_stream_that_one_channel_dominates_keeps_its_shortcuts(tmp_path: Path) -> None:
    without_smoothing = Methods(smoothing=False)
    # The first block's; what it adds makes the channels of the second one's alike.
    assert shortcuts(tmp_path, 60.0, replace(INT8, methods=without_smoothing)) == 1
    assert shortcuts(tmp_path, 60.0, replace(INT8, methods=replace(without_smoothing, sparing=False))) == 2
