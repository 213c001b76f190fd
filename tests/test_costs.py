from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from resvit_engines.errors import ResvitError
from resvit_engines.targets.costs import CostModel, Efficiency, layer_times
from resvit_engines.targets.layer_times import MeasuredTimes, measured_times_from_json
from resvit_engines.targets.layer_work import LayerKind, LayerWork, Read
from resvit_engines.targets.speeds import Speed
from resvit_engines.targets.table import TARGETS, Builder, Precision, Target, find_target
from resvit_engines.targets.tensorrt_rules import TimeRules

FP16, INT8, FP8 = Precision.FP16, Precision.INT8, Precision.FP8


def conv(name: str, reads: str, elements: int, written: int, macs: int, weights: int = 0) -> LayerWork:
    read = (Read(reads, elements, follows=True),)
    return LayerWork(name, LayerKind.CONV, read, f"{name}:out", written, macs, weights, nodes=(name,))


def pointwise(name: str, reads: str, elements: int) -> LayerWork:
    return LayerWork(name, LayerKind.POINTWISE, (Read(reads, elements),), f"{name}:out", elements)


@pytest.fixture
def target() -> Target:
    """10 TFLOPS in FP16, 20 in 8 bits, 100 GB/s, 3 us a kernel; TensorRT itself, with epilogues in the kernel."""
    speed = Speed(10.0, 20.0, 20.0, 5.0, 1.0, 100.0, 1, 3.0, "made up")
    return dataclasses.replace(find_target("h100"), speed=speed, builder=Builder.TENSORRT)


@pytest.fixture
def rtx(target: Target) -> Target:
    """The same by TensorRT for RTX."""
    return dataclasses.replace(target, builder=Builder.RTX)


IDEAL = Efficiency(compute=1.0, memory=1.0)


def test_a_layer_takes_the_longer_of_arithmetic_and_traffic_and_its_kernel(rtx: Target) -> None:
    # 5e7 MACs are 1e8 operations: 10 us at 10 TFLOPS. 100 kB and 200 kB at 100 GB/s: 1 and 2 us, weights 0.5.
    busy = conv("busy", "x", 50_000, 100_000, 50_000_000, 25_000)
    (time,) = CostModel([busy], rtx, efficiency=IDEAL).predict({}).layers
    assert (time.compute_us, time.memory_us, time.fixed_us, time.reformat_us) == pytest.approx((10.0, 3.5, 3.0, 0.0))
    assert time.total_us == pytest.approx(13.0)
    assert (time.activation_bytes, time.weight_bytes, time.kernels) == (300_000, 50_000, 1)


def test_a_layer_of_tensorrt_is_priced_by_its_rules(target: Target) -> None:
    busy = conv("busy", "x", 50_000, 100_000, 50_000_000, 25_000)
    rules = TimeRules(overlap=1.0, product_memory=1.0, stream_memory=1.0, attention=1.0)
    (time,) = CostModel([busy], target, rules=rules).predict({}).layers
    assert (time.compute_us, time.memory_us, time.fixed_us, time.reformat_us) == pytest.approx((10.0, 3.5, 3.0, 0.0))
    assert time.total_us == pytest.approx(16.5)
    # In INT8 half the time, half of the read and of the weights; the output is the graph's, in FP16.
    (time,) = CostModel([busy], target, rules=rules).predict({"busy": INT8}).layers
    assert (time.compute_us, time.memory_us, time.total_us) == pytest.approx((5.0, 2.75, 10.75))


def test_efficiency_stretches_both_sides(rtx: Target) -> None:
    busy = conv("busy", "x", 50_000, 100_000, 50_000_000)
    (time,) = CostModel([busy], rtx, efficiency=Efficiency(0.5, 0.25)).predict({}).layers
    assert (time.compute_us, time.memory_us) == pytest.approx((20.0, 12.0))


def test_a_tensor_is_written_in_the_formats_that_its_readers_want(target: Target) -> None:
    works = [conv("a", "x", 1000, 1000, 0), conv("b", "a:out", 1000, 1000, 0), pointwise("sum", "a:out", 1000)]
    model = CostModel(works, target)

    def facts(**assignment: Precision) -> list[tuple[int, int]]:
        return [(time.activation_bytes, time.kernels) for time in model.predict(assignment).layers]

    assert facts() == [(4000, 1), (4000, 1), (4000, 1)]
    # b reads INT8: a writes FP16 for the sum, and a kernel of its own makes INT8 of it (reads 2000, writes 1000).
    assert facts(a=INT8, b=INT8) == [(1000 + 2000 + 3000, 2), (1000 + 2000, 1), (4000, 1)]
    # Without the sum an 8-bit convolution writes INT8 at once; an FP16 one cannot.
    model = CostModel(works[:2], target)
    assert facts(a=INT8, b=INT8) == [(2000, 1), (3000, 1)]
    assert facts(b=INT8) == [(2000 + 2000 + 3000, 2), (3000, 1)]
    # INT8 and FP8 are two formats.
    works = [pointwise("norm", "x", 1000), conv("b", "norm:out", 1000, 10, 0), conv("c", "norm:out", 1000, 10, 0)]
    model = CostModel(works, target)
    assert facts(b=INT8, c=FP8)[0] == (2000 + 1000 + 1000, 1)
    assert facts(b=INT8, c=INT8)[0] == (2000 + 1000, 1)


def test_tensorrt_for_rtx_leaves_the_epilogue_of_8_bit_layers_to_another_kernel(rtx: Target) -> None:
    works = [conv("a", "x", 1000, 1000, 0), conv("b", "a:out", 1000, 1000, 0)]
    first, _ = CostModel(works, rtx).predict({"a": INT8, "b": INT8}).layers
    # Reads INT8, writes FP32 accumulators; the other kernel reads those and writes INT8.
    assert (first.activation_bytes, first.kernels) == (1000 + 4000 + 4000 + 1000, 2)
    first, _ = CostModel([works[0], pointwise("add", "a:out", 1000)], rtx).predict({"a": INT8}).layers
    # A pointwise kernel behind it does that: no kernel more, 2 bytes more each way.
    assert (first.activation_bytes, first.kernels) == (1000 + 2000 + 4000, 1)


@pytest.mark.whole
def test_change_is_the_difference_of_totals(target: Target) -> None:
    works = [pointwise("in", "x", 5000)]
    for index in range(6):
        reads = works[-1].writes
        works.append(conv(f"c{index}", reads, 5000, 5000, 10**6 * (index + 1), 300))
        if index % 2:
            works.append(pointwise(f"p{index}", works[-1].writes, 5000))
    nodes = [work.name for work in works if work.nodes]
    for builder in (Builder.TENSORRT, Builder.RTX):
        model = CostModel(works, dataclasses.replace(find_target("h100"), builder=builder))
        for bits in range(1 << len(nodes)):
            assignment = {node: INT8 if bits >> i & 1 else FP16 for i, node in enumerate(nodes)}
            for node in nodes:
                for precision in (FP16, INT8, FP8):
                    after = model.total_us({**assignment, node: precision})
                    change = model.change_us(assignment, node, precision)
                    assert change == pytest.approx(after - model.total_us(assignment), abs=1e-9)


def test_only_weighted_layers_leave_fp16(target: Target) -> None:
    work = LayerWork("mha", LayerKind.ATTENTION, (Read("x", 10),), "y", 10, 10**6, nodes=("qk", "pv"))
    assert work.precision({"qk": INT8}) is FP16
    assert layer_times([work], {"qk": INT8}, target) == layer_times([work], {}, target)


def test_fp8_on_a_gpu_without_it_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="fp8"):
        layer_times([conv("a", "x", 1, 1, 1)], {"a": FP8}, find_target("jetson-orin"))


def test_measured_times_replace_and_scale_predictions(target: Target) -> None:
    works = [conv("a", "x", 1000, 1000, 10**7), conv("b", "a:out", 1000, 1000, 10**8), conv("c", "b:out", 9, 9, 0)]
    plain = CostModel(works, target).predict({}).layers
    measured = MeasuredTimes(
        "mine", {"a": {FP16: 3 * plain[0].total_us}, "b": {FP16: 2 * plain[1].total_us, INT8: 7.0}}
    )
    model = CostModel(works, target, measured)
    a, b, c = model.predict({}).layers
    assert (a.total_us, b.total_us) == pytest.approx((3 * plain[0].total_us, 2 * plain[1].total_us))
    assert (a.measured, b.measured, c.measured) == (True, True, False)
    assert c.total_us == pytest.approx(2.5 * plain[2].total_us)
    after = model.predict({"b": INT8}).layers
    assert after[1].total_us == pytest.approx(7.0 + after[1].reformat_us)
    assert model.change_us({}, "b", INT8) == pytest.approx(model.total_us({"b": INT8}) - model.total_us({}))
    json.dumps(model.predict({"b": INT8}).to_json(), allow_nan=False)


def test_measured_times_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text('{"device": "Orin", "layers": {"a/Conv": {"fp16": 12.5, "int8": 8}}}')
    times = measured_times_from_json(path)
    assert times.device == "Orin"
    assert times.of(["none", "a/Conv"], INT8) == 8.0
    assert times.of(["a/Conv"], FP8) is None
    times.require_known(["a/Conv", "b/Conv"])
    with pytest.raises(ResvitError, match="None of the 1 layers") as caught:
        times.require_known(["b/Conv"])
    assert "b/Conv" in caught.value.fix


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"layers": {}}', '{"layers": {"a": 3}}', '{"layers": {"a": {}}}',
        '{"layers": {"a": {"fp32": 1}}}', '{"layers": {"a": {"int8": 0}}}', '{"layers": {"a": {"int8": -1}}}',
        '{"layers": {"a": {"int8": NaN}}}', '{"layers": {"a": {"int8": true}}}', '{"layers": {"a": {"int8": "1"}}}',
        '{"device": 3, "layers": {"a": {"int8": 1}}}',
    ],
)  # fmt: skip
def test_measured_times_that_mean_nothing_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(ResvitError):
        measured_times_from_json(tmp_path / "times.json")
    with pytest.raises(ResvitError, match="no measured times"):
        measured_times_from_json(tmp_path / "absent.json")


def test_a_prediction_sums_its_layers() -> None:
    works = [conv("a", "x", 1000, 1000, 10**7), pointwise("p", "a:out", 1000)]
    for target in (target for target in TARGETS if not target.on_cpu):
        prediction = layer_times(works, {"a": INT8}, target)
        assert prediction.total_us == pytest.approx(sum(layer.total_us for layer in prediction.layers))
        assert prediction.kernels == sum(layer.kernels for layer in prediction.layers)
        assert prediction.to_json()["ms"] == pytest.approx(prediction.total_us / 1e3, abs=1e-6)
        assert dataclasses.asdict(prediction.layers[0])["precision"] == "int8"
