"""Shifts and factors behind activations of one sign: the network stays the same, and 8 bits lose less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from quantize_graphs import Graph, outputs_of, sqnr
from resvit_calibrate.observe.histogram import GrowingChannels
from resvit_calibrate.ranges.channels import shifted
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import ranges_from
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.network import constant, network_from_onnx, onnx_from_network
from resvit_quantize.qdq.plan import Plan, plan_quantization
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import Methods, QuantizeSettings

INT8 = QuantizeSettings(Precision.INT8, include=("*",))
SHAPE = (8, 16, 32)


def images_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def mlp(folder: Path, activation: str = "Gelu", readers: int = 1) -> Path:
    """Tokens through an activation into linear layers with and without a bias."""
    g = Graph("batch", *SHAPE[1:])
    value = g.op(activation, g.linear("input", 32, 48, "fc1"), name="act")
    outs = [g.linear(value, 48, 16 + 8 * index, f"fc2.{index}") for index in range(readers)]
    weight = g.weight("bare.weight", 48, 16)
    return g.save(folder / "float.onnx", *outs, g.op("MatMul", value, weight, name="bare/MatMul"))


def planned(path: Path, images: np.ndarray, settings: QuantizeSettings = INT8) -> Plan:
    """The plan, whose float network must compute what the model computes."""
    statistics = collect_statistics(path, [{"input": images}])
    plan = plan_quantization(graph_from_onnx(path), ranges_from(statistics, "digest"), settings, statistics)
    out = path.with_suffix(".plan.onnx")
    onnx_from_network(plan.network, out)
    before, after = outputs_of(path, images), outputs_of(out, images)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=2e-5 * float(np.abs(array).max()))
    return plan


def ops(plan: Plan) -> list[str]:
    """What stands between the activation and its readers."""
    return [node.op_type for node in plan.network.graph if str(node.name).endswith(("/factor", "/shift"))]


def quantised_db(path: Path, images: np.ndarray, settings: QuantizeSettings) -> float:
    statistics = collect_statistics(path, [{"input": images}])
    out = path.with_suffix(".int8.onnx")
    quantize_model(path, ranges_from(statistics, "digest"), settings, out, statistics=statistics)
    before, after = outputs_of(path, images), outputs_of(out, images)
    return min(sqnr(before[name], after[name]) for name in before)


@pytest.mark.whole
@pytest.mark.parametrize("activation", ["Gelu", "HardSwish", "Mish", "Sigmoid", "Softplus"])
@pytest.mark.parametrize("readers", [1, 2])
def test_activations_of_one_sign_gain_and_the_network_stays(tmp_path: Path, activation: str, readers: int) -> None:
    path, images = mlp(tmp_path, activation, readers), images_of(*SHAPE)
    plan = planned(path, images)
    assert "Add" in ops(plan)
    (key,) = [key for key in plan.amax if "act" in key[0]]
    statistics = collect_statistics(path, [{"input": images}])
    reach = statistics.tensors["act:0"].absmax
    assert plan.amax[key] < 0.7 * reach or plan.moved
    only_shift = replace(INT8, methods=Methods(smoothing=False))
    without = replace(INT8, methods=Methods(smoothing=False, shifting=False))
    gain = quantised_db(path, images, only_shift) - quantised_db(path, images, without)
    assert gain > 1.0


@pytest.mark.parametrize("last", ["Add", "Sub", "Mul"])
def test_a_learned_affine_behind_the_activation_is_part_of_it(tmp_path: Path, last: str) -> None:
    images = images_of(*SHAPE)
    g = Graph("batch", *SHAPE[1:])
    value = g.op("HardSwish", g.linear("input", 32, 48, "fc1"), name="act")
    for number, op in enumerate(("Mul", last)):
        value = g.op(op, value, g.constant(f"c{number}", np.array([1.7], np.float32)), name=f"affine.{number}")
    path = g.save(tmp_path / "float.onnx", g.linear(value, 48, 16, "fc2"))
    assert "Add" in ops(planned(path, images))
    without = replace(INT8, methods=Methods(smoothing=False, shifting=False))
    only_shift = replace(INT8, methods=Methods(smoothing=False))
    assert quantised_db(path, images, only_shift) > quantised_db(path, images, without) + 0.5


def test_an_offset_of_what_is_no_activation_stays(tmp_path: Path) -> None:
    images = images_of(*SHAPE)
    g = Graph("batch", *SHAPE[1:])
    value = g.op("Add", g.linear("input", 32, 48, "fc1"), g.constant("c", np.array(3.0, np.float32)), name="act")
    path = g.save(tmp_path / "float.onnx", g.linear(value, 48, 16, "fc2"))
    assert not ops(planned(path, images))


def test_fp8_is_finest_around_zero_and_is_not_shifted(tmp_path: Path) -> None:
    plan = planned(mlp(tmp_path), images_of(*SHAPE), replace(INT8, precision=Precision.FP8))
    assert "Add" not in ops(plan)


def test_a_relu_is_its_convolutions_and_stays(tmp_path: Path) -> None:
    assert ops(planned(mlp(tmp_path, "Relu"), images_of(*SHAPE))) == []


def test_a_product_of_both_signs_is_not_shifted(tmp_path: Path) -> None:
    g = Graph("batch", *SHAPE[1:])
    value = g.op("Mul", g.linear("input", 32, 48, "gate"), g.linear("input", 32, 48, "fc1"), name="act")
    plan = planned(g.save(tmp_path / "float.onnx", g.linear(value, 48, 16, "fc2")), images_of(*SHAPE))
    assert "Add" not in ops(plan)


@pytest.mark.parametrize(("size", "pads", "shifts"), [(1, 0, True), (3, 0, True), (3, 1, False)])
def test_padding_with_zeros_forbids_a_shift(tmp_path: Path, size: int, pads: int, shifts: bool) -> None:
    g = Graph(4, 16, 8, 8)
    value = g.op("HardSwish", g.conv("input", 24, 16, name="a"), name="act")
    weight = g.weight("b.weight", 8, 12, size, size)
    conv = g.op("Conv", value, weight, name="b", group=2, pads=[pads] * 4)
    plan = planned(g.save(tmp_path / "float.onnx", conv), images_of(4, 16, 8, 8))
    assert ("Add" in ops(plan)) is shifts


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-8])
def test_a_shift_of_what_fp16_cannot_hold_is_computed_in_fp32(tmp_path: Path, size: float) -> None:
    # Gates of ½ at images of nothing: behind a dozen blocks without norms, signals may be as small as that.
    g = Graph("batch", *SHAPE[1:])
    small = g.op("Mul", g.linear("input", 32, 48, "fc1"), g.constant("size", np.float32(size)), name="small")
    gate = g.op("Sigmoid", g.linear(small, 48, 48, "gate"), name="open")
    value = g.op("Mul", g.op("Relu", small, name="relu"), gate, name="act")
    weight = g.weight("fc2.weight", 48, 16)
    path, images = g.save(tmp_path / "float.onnx", g.op("MatMul", value, weight, name="fc2")), images_of(*SHAPE)
    assert "Add" in ops(planned(path, images))
    assert quantised_db(path, images, INT8) > 30.0


def test_other_readers_read_the_activation_itself(tmp_path: Path) -> None:
    g = Graph("batch", *SHAPE[1:])
    value = g.op("Gelu", g.linear("input", 32, 48, "fc1"), name="act")
    path = g.save(tmp_path / "float.onnx", g.linear(value, 48, 16, "fc2"), g.op("Tanh", value, name="other"))
    plan = planned(path, images_of(*SHAPE))
    assert "Add" in ops(plan)
    assert next(node for node in plan.network.graph if node.name == "other").inputs[0].name == "act:0"


def test_dead_and_constant_activations(tmp_path: Path) -> None:
    path = mlp(tmp_path)
    network = network_from_onnx(path)
    for name in ("fc1.weight", "fc1.bias"):
        array = np.array(constant(network.graph.initializers[name]))
        array[..., :47] = 0.0
        network.graph.initializers[name].const_value = ir.tensor(array, name=name)
    onnx_from_network(network, tmp_path / "dead.onnx")
    plan = planned(tmp_path / "dead.onnx", images_of(*SHAPE))
    assert all(np.isfinite(amax) and amax > 0 for amax in plan.amax.values())


def test_shifted_statistics_are_those_of_shifted_values() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((4000, 6)).astype(np.float32) * np.geomspace(0.5, 3, 6, dtype=np.float32)
    values = np.maximum(values, -0.1)  # one sign, nearly

    def counted(array: np.ndarray) -> GrowingChannels:
        grown = GrowingChannels(6)
        grown.add(
            array.ravel(),
            np.tile(np.arange(6, dtype=np.int32), len(array)),
            float(np.abs(array).max()),
            np.zeros(array.size, np.int64),
        )
        return grown

    small, centre = float(-values.min()), (values.max(0) + values.min(0)) / 2
    got = shifted(counted(values).statistics(), centre.astype(np.float64), small)
    want = counted((values - centre).astype(np.float32)).statistics()
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-5)
    np.testing.assert_allclose(got.mean_square, want.mean_square, rtol=1e-4)
    np.testing.assert_allclose(got.absmax, want.absmax, rtol=0.15)
    assert got.anchor == want.anchor
    # The same share of values above half of the range, channel by channel.
    upper = [entry.log_histogram[:, -3:].sum(1) / entry.count for entry in (got, want)]
    np.testing.assert_allclose(upper[0], upper[1], atol=0.08)
