"""The rules of TensorRT's kernels: held to NVIDIA's published engines, and to small graphs and sums done by hand."""

from __future__ import annotations

import dataclasses
import importlib
import statistics
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantize_graphs import Graph, hybrid, ranges_of
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.ranges.estimators import Estimator
from resvit_engines.audit.kernels import Operation
from resvit_engines.targets.costs import CostModel
from resvit_engines.targets.layer_times import MeasuredTimes
from resvit_engines.targets.layer_work import Format, LayerKind, LayerWork, MatrixShape, Read
from resvit_engines.targets.speeds import SPEEDS, Speed
from resvit_engines.targets.table import Precision, find_target
from resvit_engines.targets.tensorrt_kernels import Role, TensorRtKernels
from resvit_engines.targets.tensorrt_rules import SOURCES, TIME_RULES, KernelWork, TimeRules, kernel_time
from resvit_export.recipe.choices import InputType
from resvit_export.stage import File
from resvit_export.stages.decide.predict import Pricing
from resvit_export.to_tensorrt.bindings import retype_bindings
from resvit_export.to_tensorrt.expectation import expectation_from_onnx
from resvit_export.to_tensorrt.predicted_kernels import predicted_kernels
from resvit_quantize.graph.fused_layers import layers_from_graph
from resvit_quantize.graph.network import network_from_onnx
from resvit_quantize.graph.quantised_edges import quantised_graph_from_onnx
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings

ROOT = Path(__file__).parent.parent
ENGINES = [path.stem for path in sorted((ROOT / "benchmarks" / "profiles").glob("*.json"))]
RESNET18 = [engine for engine in ENGINES if engine.startswith("resnet18")]
ONE_SM = Speed(10.0, 20.0, None, 5.0, 1.0, 100.0, 1, 3.0, "made up")
"""10 TFLOPS in FP16, 20 in INT8, 5 in TF32, 1 in FP32, 100 GB/s, one multiprocessor, 3 us a kernel."""
PLAIN = TimeRules(tile_half=0.0, step_us=0.0, overlap=1.0, product_memory=1.0, stream_memory=0.5, reformat_memory=0.25)


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's comparison; it imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("profile_comparison")


def test_there_are_ten_engines_and_their_layers_add_up(comparison: ModuleType) -> None:
    assert len(ENGINES) == 10
    assert set(ENGINES) == set(comparison.ENGINES)
    for engine in ENGINES:
        found = comparison.profile(engine)
        assert sum(layer.us for layer in found.layers) == pytest.approx(found.total_us, abs=1.0)
        assert found.latency_us < found.total_us
        assert len({layer.key for layer in found.layers}) == len(found.layers)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_told_within_the_goals(comparison: ModuleType, engine: str) -> None:
    found = comparison.compare(engine)
    assert found.wrong == ()
    assert found.products == sum(layer.fusion is not None for layer in comparison.profile(engine).layers)
    assert abs(found.latency_error) <= 0.20
    assert abs(found.profiled_error) <= 0.20
    assert statistics.median(found.layer_errors) <= 0.30
    # What is not told are changes of layout; and nothing is told that is not there.
    assert {key.partition(" ")[0] for key, _ in found.missed} <= {"layout", "output/Cast"}
    assert found.invented == ()


def test_the_order_of_the_resnet18_engines_and_the_gain_of_int8_are_told(comparison: ModuleType) -> None:
    found = {engine: comparison.compare(engine) for engine in ENGINES}
    ours = comparison.order(lambda engine: found[engine].latency_us)
    assert ours == comparison.order(lambda engine: comparison.profile(engine).latency_us)
    assert set(ours) == set(RESNET18)
    for _, predicted, measured in (*comparison.ratios(found), *comparison.profiled_ratios(found)):
        assert predicted / measured == pytest.approx(1.0, abs=0.15)
    assert all(met for _, _, met in comparison.judged(found))


@pytest.mark.slow
def test_rules_set_on_other_networks_are_not_far_off(comparison: ModuleType) -> None:
    for result in comparison.left_out().values():
        for found in result["engines"].values():
            assert abs(found.latency_error) <= 0.30
            assert statistics.median(found.layer_errors) <= 0.30


@pytest.mark.whole
def test_whole_engines_on_a_jetson_are_told(comparison: ModuleType) -> None:
    errors = [ours / theirs - 1 for _, _, _, ours, theirs in comparison.on_orin()]
    assert statistics.median(map(abs, errors)) <= 0.10
    assert max(map(abs, errors)) <= 0.30


def test_every_rule_has_its_source() -> None:
    assert set(SOURCES) == {field.name for field in dataclasses.fields(TimeRules)}
    assert all(said and source for said, source in SOURCES.values())


def product(rows: int, columns: int, depth: int, form: Format = Format.FP16, **more: object) -> KernelWork:
    shape = MatrixShape(rows, columns, depth, depth)
    return KernelWork(LayerKind.CONV, form, rows * columns * depth, 0, shape=shape, **more)  # type: ignore[arg-type]


def test_a_product_takes_whole_tiles_and_whole_rounds() -> None:
    # 256 x 128 x 64 multiply-accumulates are one tile, 4.19 million operations: 0.419 us at 10 TFLOPS.
    one = kernel_time(product(256, 128, 64), ONE_SM, PLAIN)
    assert (one.compute_us, one.memory_us, one.fixed_us) == pytest.approx((0.4194304, 0.0, 3.0))
    assert one.total_us == pytest.approx(3.4194304)
    # Eight multiprocessors, each an eighth as fast: one tile of 32 x 32 on each takes 4 of 32 of the columns.
    eight = dataclasses.replace(ONE_SM, sms=8)
    assert kernel_time(product(256, 128, 64), eight, PLAIN).compute_us == pytest.approx(0.4194304)
    # One row more is a tile more, and an odd depth is as deep as the next whole vector.
    assert kernel_time(product(257, 128, 64), ONE_SM, PLAIN).compute_us > one.compute_us
    assert kernel_time(product(256, 128, 57), ONE_SM, PLAIN).compute_us == pytest.approx(one.compute_us)
    assert kernel_time(product(256, 128, 33, Format.INT8), ONE_SM, PLAIN).compute_us == pytest.approx(0.2097152)


def test_a_tile_reaches_its_share_and_a_step_takes_its_time() -> None:
    half = dataclasses.replace(PLAIN, tile_half=256 * 128 / 384)
    assert kernel_time(product(256, 128, 64), ONE_SM, half).compute_us == pytest.approx(2 * 0.4194304)
    # 64 elements of two bytes are two steps of 64 bytes.
    slow = dataclasses.replace(PLAIN, step_us=5.0)
    assert kernel_time(product(256, 128, 64), ONE_SM, slow).compute_us == pytest.approx(10.0)


def test_traffic_goes_at_the_share_of_its_kind() -> None:
    moved = KernelWork(LayerKind.POOL, Format.FP16, 0, 100_000)
    assert kernel_time(moved, ONE_SM, PLAIN).memory_us == pytest.approx(2.0)
    changed = dataclasses.replace(moved, reformats=True)
    assert kernel_time(changed, ONE_SM, PLAIN).memory_us == pytest.approx(4.0)
    image = dataclasses.replace(changed, image=True)
    assert kernel_time(image, ONE_SM, PLAIN).memory_us == pytest.approx(1.0 / PLAIN.image_memory)
    # (3^1.5 + 4^1.5)^(1/1.5)
    both = dataclasses.replace(product(256, 128, 64), activation_bytes=41943)
    together = kernel_time(both, ONE_SM, dataclasses.replace(PLAIN, overlap=1.5))
    assert together.total_us - together.fixed_us == pytest.approx(0.4194304 * 2 ** (1 / 1.5), rel=1e-4)


def test_images_and_single_channels_run_on_the_plain_cores() -> None:
    rules = dataclasses.replace(PLAIN, plain_product=0.5, image_product=0.5)
    shape = MatrixShape(1000, 64, 27, 3)
    stem = KernelWork(LayerKind.CONV, Format.FP32, 1000 * 64 * 27, 0, shape=shape)
    assert kernel_time(stem, ONE_SM, rules).compute_us == pytest.approx(2 * 1000 * 64 * 27 / 1e6 / 0.5)
    eight = dataclasses.replace(stem, multiplies=Format.INT8)  # 3 channels padded to 4, four products at once
    assert kernel_time(eight, ONE_SM, rules).compute_us == pytest.approx(2 * 1000 * 64 * 36 / 4e6 / 0.5)
    assert kernel_time(dataclasses.replace(eight, pools=True), ONE_SM, rules).compute_us < 1.0
    depthwise = KernelWork(LayerKind.CONV, Format.INT8, 9000 * 32, 0, shape=MatrixShape(1000, 1, 9, 1, 32))
    floats = dataclasses.replace(depthwise, multiplies=Format.FP16)
    assert kernel_time(depthwise, ONE_SM, rules) == kernel_time(floats, ONE_SM, rules)


def test_what_the_device_has_no_cores_for_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="fp8"):
        kernel_time(product(256, 128, 64, Format.FP8), ONE_SM)


@pytest.mark.parametrize("form", [Format.FP16, Format.INT8])
def test_never_more_for_fewer(form: Format) -> None:
    speed = SPEEDS["jetson-orin"]
    times = [kernel_time(product(rows, 96, 320, form), speed, TIME_RULES).total_us for rows in range(32, 6000, 97)]
    times += [kernel_time(product(5983, columns, 320, form), speed).total_us for columns in range(96, 2000, 31)]
    times += [kernel_time(product(5983, 1987, depth, form), speed).total_us for depth in range(320, 3000, 61)]
    assert times == sorted(times)


def roles(works: list[LayerWork], eight: set[str]) -> dict[str, list[tuple[str, list[str], list[str]]]]:
    """By layer its kernels: role, formats read, formats written."""
    made = TensorRtKernels(works)
    assignment = dict.fromkeys(eight, Precision.INT8)
    return {
        work.name: [
            (kernel.role.value, [f.form.value for _, f in kernel.reads], [f.form.value for _, f in kernel.writes])
            for kernel in made.of(work, assignment)
        ]
        for work in works
    }


def conv(name: str, *reads: Read) -> LayerWork:
    return LayerWork(name, LayerKind.CONV, reads, f"{name}:0", 64, 64, 64, nodes=(name,))


def test_an_8_bit_convolution_writes_8_bits_where_all_that_reads_it_quantises_at_one_scale() -> None:
    eight = {"form": Format.INT8, "scale": "a"}
    first = conv("first", Read("x", 64, **eight))  # type: ignore[arg-type]
    second, third = (conv(name, Read("first:0", 64, **eight)) for name in ("second", "third"))  # type: ignore[arg-type]
    everything = {"first", "second", "third"}
    assert roles([first, second, third], everything)["first"] == [("layer", ["int8"], ["int8"])]
    other = conv("third", Read("first:0", 64, form=Format.INT8, scale="b"))
    assert roles([first, second, other], everything)["first"] == [
        ("layer", ["int8"], ["fp16"]),
        ("quantize", ["fp16"], ["int8"]),
        ("quantize", ["fp16"], ["int8"]),
    ]
    floats = conv("third", Read("first:0", 64))
    assert roles([first, second, floats], everything)["first"][0] == ("layer", ["int8"], ["fp16"])


def test_what_a_convolution_adds_has_the_type_that_it_writes() -> None:
    given = Read("x", 64, form=Format.INT8, scale="a")
    behind = conv("behind", Read("sum:0", 64, form=Format.INT8, scale="a"))
    shortcut = Read("y", 64, form=Format.INT8, scale="b")
    assert roles([conv("sum", given, shortcut), behind], {"sum", "behind"})["sum"] == [
        ("layer", ["int8", "int8"], ["int8"])
    ]
    # A shortcut in floats: the sum is written in floats, and quantised by a kernel.
    assert roles([conv("sum", given, Read("y", 64)), behind], {"sum", "behind"})["sum"] == [
        ("layer", ["int8", "fp16"], ["fp16"]),
        ("quantize", ["fp16"], ["int8"]),
    ]
    # Nothing behind it quantises: the shortcut is dequantised by a kernel.
    assert roles([conv("sum", given, shortcut)], {"sum"})["sum"] == [
        ("dequantize", ["int8"], ["fp16"]),
        ("layer", ["int8", "fp16"], ["fp16"]),
    ]


def test_a_max_pool_runs_in_8_bits_where_its_readers_do() -> None:
    first = conv("first", Read("x", 64, form=Format.INT8, scale="a"))
    pool = LayerWork("pool", LayerKind.POOL, (Read("first:0", 64),), "pool:0", 16, commutes=True)
    last = conv("last", Read("pool:0", 16, form=Format.INT8, scale="b"))
    found = roles([first, pool, last], {"first", "last"})
    assert found["pool"] == [("layer", ["int8"], ["int8"])]
    assert found["first"] == [("layer", ["int8"], ["int8"])]
    average = dataclasses.replace(pool, commutes=False)
    assert roles([first, average, last], {"first", "last"})["pool"] == [
        ("layer", ["fp16"], ["fp16"]),
        ("quantize", ["fp16"], ["int8"]),
    ]


def quantised(graph: Graph, value: str, name: str) -> str:
    """A tensor through Q/DQ."""
    scale, zero = graph.constant(f"{name}/scale", np.float32(0.1)), graph.constant(f"{name}/zero", np.int8(0))
    stored = graph.op("QuantizeLinear", value, scale, zero, name=f"{name}/Q")
    return graph.op("DequantizeLinear", stored, scale, zero, name=f"{name}/DQ")


def convolution(graph: Graph, value: str, name: str) -> str:
    """A convolution whose weight is stored in 8 bits."""
    stored = graph.constant(f"{name}/weight", np.ones((8, 8, 3, 3), np.int8))
    scale, zero = (
        graph.constant(f"{name}/ws", np.ones(8, np.float32)),
        graph.constant(f"{name}/wz", np.zeros(8, np.int8)),
    )
    weight = graph.op("DequantizeLinear", stored, scale, zero, name=f"{name}/weight/DQ", axis=0)
    return graph.op("Conv", quantised(graph, value, f"{name}/in"), weight, name=name, pads=[1] * 4)


def test_a_quantised_hybrid_is_listed_kernel_by_kernel(tmp_path: Path) -> None:
    path, out = hybrid(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    quantize_model(path, ranges_of(path, images), QuantizeSettings(Precision.INT8, Estimator.MAX), out)
    kernels = predicted_kernels(out, 1, expectation_from_onnx(out).attention)
    assert [kernel.name for kernel in kernels if kernel.operation is Operation.REFORMAT] == [
        "quantize input", "logits/Cast",
    ]  # fmt: skip
    stem, *_ = (kernel for kernel in kernels if kernel.operation is Operation.CONV)
    assert (stem.precision, stem.outputs) == ("Int8", ("Int8",))
    assert stem.layers[:3] == ("stem/Conv", "stem/Relu", "MaxPool_2")  # an image's convolution takes its max pool in
    (attention,) = (kernel for kernel in kernels if kernel.operation is Operation.ATTENTION)
    assert (attention.inputs, attention.outputs) == (("Half",), ("Int8",))
    assert [kernel.precision for kernel in kernels if kernel.operation is Operation.GEMM] == ["Int8"] * 4 + ["Half"]
    # Only the network's own ends are FP32, and every tensor is written before it is read.
    reads = [read for kernel in kernels for read in zip(kernel.input_names, kernel.inputs, strict=True)]
    assert {name for name, kind in reads if kind == "Float"} == {"input"}
    written = {"input"}
    for kernel in kernels:
        assert written.issuperset(kernel.input_names)
        written.update(kernel.output_names)
        assert kernel.bytes_moved


def residual(path: Path, *, shortcut: bool | None) -> Path:
    """Three convolutions, the second with a residual Add: in floats, or with Q/DQ, on the shortcut or not."""
    g = Graph(1, 8, 4, 4)
    apply = convolution if shortcut is not None else lambda g, value, name: g.conv(value, 8, 8, name=name)
    inner = g.op("Relu", apply(g, "input", "one"), name="relu1")
    side = quantised(g, "input", "side") if shortcut else "input"
    out = g.op("Relu", g.op("Add", apply(g, inner, "two"), side, name="add"), name="relu2")
    return g.save(path, apply(g, out, "three"))


PIXELS = Preprocess((16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
IMAGE = 3 * 16 * 16
ENDS = {  # by what the engine reads: bytes that the first kernels read, and what they are, in INT8 and in FP16
    InputType.FP32: (4 * IMAGE, ["input"], ["input (cast)"]),
    InputType.FP16: (2 * IMAGE, ["input"], []),
    InputType.INT8: (IMAGE, [], []),
    InputType.UINT8: (IMAGE, ["resvit.pixels/Cast"], ["resvit.pixels/Cast"]),
}


@pytest.mark.parametrize("kind", InputType)
def test_an_image_costs_what_it_is_read_in(tmp_path: Path, kind: InputType) -> None:
    path, out = hybrid(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    quantize_model(path, ranges_of(path, images), QuantizeSettings(Precision.INT8, Estimator.MAX), out)
    eight = dict(quantised_graph_from_onnx(out).eight_bit)
    assert "stem/Conv" in eight
    size, first, half_first = ENDS[kind]
    orin = find_target("jetson-orin")
    price = Pricing(File.of(path), orin, 1, None, kind, PIXELS)
    chosen, fp16 = price.of_quantised(out, eight)
    ends = [next(i for i, layer in enumerate(p.layers) if layer.name == "stem/Conv") for p in (chosen, fp16)]
    before = [[layer for layer in p.layers[:end] if layer.kernels] for p, end in zip((chosen, fp16), ends, strict=True)]
    assert [[layer.name for layer in each] for each in before] == [first, half_first]
    if first:  # It reads the image, and writes the stem's 8 bits.
        assert sum(layer.activation_bytes for layer in before[0]) == size + IMAGE
    if half_first:
        assert sum(layer.activation_bytes for layer in before[1]) == size + 2 * IMAGE
    # What ships is audited by the same rules; packed queries, keys and values are one entry of two kernels.
    network = ir.load(out)
    retype_bindings(network, kind, PIXELS)
    ir.save(network, tmp_path / "bound.onnx")
    kernels = predicted_kernels(tmp_path / "bound.onnx", 1, expectation_from_onnx(out).attention)
    assert len(kernels) == chosen.kernels - 1
    (stem,) = (kernel for kernel in kernels if "stem/Conv" in kernel.layers)
    assert "MaxPool_2" in stem.layers
    # By TensorRT for RTX: the float graph alone, and what the stem reads in 8 bits is quantised from FP16.
    chosen, fp16 = dataclasses.replace(price, target=find_target("rtx-4090")).of_quantised(out, eight)
    assert [layer.name for layer in fp16.layers[: ends[1]] if layer.kernels] == half_first
    quantises = next(layer for layer in chosen.layers if layer.name == "input").kernels if kind is InputType.FP16 else 0
    assert quantises == (kind is InputType.FP16)


def test_whole_numbers_are_converted_in_both_precisions(tmp_path: Path) -> None:
    g = Graph(1, 8, 4, 4)
    g.input = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.INT64, (1, 8, 4, 4))
    whole = g.op("Cast", "input", to=onnx.TensorProto.FLOAT, name="whole")
    path = g.save(tmp_path / "float.onnx", g.conv(whole, 8, 8, name="conv"))
    in_floats = [work.name for work in layers_from_graph(network_from_onnx(path)) if work.kernels]
    assert in_floats == ["whole", "conv", "logits (cast)"]
    known = quantised_graph_from_onnx(path)
    formats_known = [work.name for work in layers_from_graph(known.model, edges=known.edges) if work.kernels]
    assert formats_known == ["whole", "conv"]  # Here the convolution is in FP32, and so is what it answers.


@pytest.mark.parametrize(("shortcut", "kernels"), [(True, 4), (False, 5)])
def test_a_network_is_priced_with_its_qdq_where_they_stand(tmp_path: Path, shortcut: bool, kernels: int) -> None:
    model = File.of(residual(tmp_path / "float.onnx", shortcut=None))
    path = residual(tmp_path / "int8.onnx", shortcut=shortcut)
    eight = dict.fromkeys(("one", "two", "three"), Precision.INT8)
    chosen, fp16 = Pricing(model, find_target("jetson-orin"), 1, None).of_quantised(path, eight)
    # Without Q/DQ on the shortcut a kernel more quantises what the second convolution writes. The last in 8 bits writes
    # the network's FP32 itself; in FP16 another kernel casts, as at the end of resnet18-a100-b32-fp16.
    assert (chosen.kernels, fp16.kernels) == (kernels, 5)
    times = MeasuredTimes("mine", {"input": {Precision.FP16: 5.0}, "one": {Precision.INT8: 50.0}})
    graph = quantised_graph_from_onnx(path)
    model_of = CostModel(layers_from_graph(graph.model, edges=graph.edges), find_target("jetson-orin"), times)
    assert next(layer.total_us for layer in model_of.predict(eight).layers if layer.name == "one") == pytest.approx(
        50.0
    )


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_graph_with_qdq_is_read_as_the_float_graph_and_its_8_bit_edges(tmp_path: Path, shortcut: bool) -> None:
    found = quantised_graph_from_onnx(residual(tmp_path / "m.onnx", shortcut=shortcut))
    assert found.eight_bit == dict.fromkeys(("one", "two", "three"), Precision.INT8)
    assert {(node.name, index) for node, index in found.edges} == {
        ("one", 0), ("two", 0), ("three", 0), *({("add", 1)} if shortcut else ())
    }  # fmt: skip
    assert {edge.dequantize for edge in found.edges.values()} >= {"one/in/DQ", "two/in/DQ"}
    works = layers_from_graph(found.model, edges=found.edges)
    assert [work.name for work in works] == ["input", "one", "two", "three"]
    assert works[2].members == ("two", "add", "relu2")
    (last,) = [k for k in TensorRtKernels(works).of(works[2], found.eight_bit) if k.role is Role.LAYER]
    assert [form.eight for _, form in last.writes] == [shortcut]
