"""Both efforts from a float model to a file: what is spared and why, what each method changes, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from quantize_graphs import Graph, basic_block, outputs_of, sqnr
from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.channels import amax_for_output
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges, ranges_from
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.analysis import analyse
from resvit_quantize.graph.network import constant, network_from_onnx
from resvit_quantize.qdq.plan import _widened_channels, plan_quantization
from resvit_quantize.qdq.report import QuantizeReport
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import Effort, Methods, QuantizeSettings

pytestmark = pytest.mark.whole

pytest.importorskip("torch")

INT8 = QuantizeSettings(Precision.INT8)
METHODS = [field.name for field in fields(Methods)]
BEST = replace(INT8, effort=Effort.BEST)
IMAGES = np.random.default_rng(0).standard_normal((48, 3, 16, 16)).astype(np.float32)


def network(path: Path, batch: int | str = 4, stem: int = 16, blocks: int = 3, colours: int = 3) -> Path:
    """A stem of ``stem`` channels on half the rows and columns, residual blocks of 48, one norm with outliers, a head.

    With three blocks the stem is 0.6% of the multiply-accumulates, with one and 48 channels 4%.
    """
    g = Graph(batch, colours, 16, 16)
    weight, bias = g.weight("stem.weight", stem, colours, 3, 3), g.weight("stem.bias", stem)
    value = g.op("Conv", "input", weight, bias, name="stem/Conv", strides=[2, 2], pads=[1] * 4)
    value = g.op("Relu", value, name="stem/Relu")
    for index in range(blocks):
        value = basic_block(g, value, 48, f"trunk.{index}", stem if index == 0 else 48)
    tokens = g.op("Transpose", g.op("Reshape", value, g.ints(-1, 48, 64)), perm=[0, 2, 1])
    spread = np.where(np.arange(48) % 8 == 3, 20.0, 1.0).astype(np.float32)
    scale, offset = g.constant("norm.weight", spread), g.constant("norm.bias", 0.2 * spread)
    tokens = g.op("LayerNormalization", tokens, scale, offset, name="norm/LayerNormalization")
    hidden = g.op("Gelu", g.linear(tokens, 48, 64, "mlp.fc1"), name="mlp/Gelu")
    pooled = g.op("ReduceMean", g.linear(hidden, 64, 48, "mlp.fc2"), g.ints(1), name="pool", keepdims=0)
    weight, bias = g.weight("head.weight", 10, 48), g.weight("head.bias", 10)
    return g.save(path, g.op("Gemm", pooled, weight, bias, name="head", transB=1))


def calibrated(path: Path, images: np.ndarray = IMAGES) -> tuple[Ranges, Statistics]:
    statistics = collect_statistics(path, [{"input": images[at : at + 4]} for at in range(0, len(images), 4)])
    return ranges_from(statistics, "digest"), statistics


def source(images: np.ndarray = IMAGES, size: int = 5) -> Callable[[int], Iterator[Batch]]:
    """Batches that do not fit the model's."""

    def images_of(count: int) -> Iterator[Batch]:
        for start in range(0, min(count, len(images)), size):
            yield Batch(images[:count][start : start + size], None)

    return images_of


def quantized(path: Path, settings: QuantizeSettings, out: Path) -> QuantizeReport:
    ranges, statistics = calibrated(path)
    return quantize_model(path, ranges, settings, out, statistics=statistics, images=source())


def reasons(report: QuantizeReport) -> dict[str, tuple[str, str]]:
    return {node.name: (node.precision, node.reason) for node in report.nodes}


def placed(path: Path, settings: QuantizeSettings) -> set[str]:
    ranges, statistics = calibrated(path)
    plan = plan_quantization(graph_from_onnx(path), ranges, settings, statistics)
    return {str(weight.node.name) for weight in plan.placement.weights}


def test_best_is_closer_to_float_than_fast_and_says_what_it_does(tmp_path: Path) -> None:
    path = network(tmp_path / "float.onnx", "batch")
    exact = outputs_of(path, IMAGES)["logits"]
    noise = {}
    for effort in Effort:
        report = quantized(path, replace(INT8, effort=effort, bits=5), tmp_path / "int8.onnx")
        noise[effort] = sqnr(exact, outputs_of(tmp_path / "int8.onnx", IMAGES)["logits"])
        assert report.effort == effort.value
    assert noise[Effort.BEST] > noise[Effort.FAST] + 2.0


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, "batch"])
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_best_takes_any_batch_and_both_precisions(tmp_path: Path, batch: int | str, precision: Precision) -> None:
    path = network(tmp_path / "float.onnx", batch, blocks=1)
    quantized(path, replace(BEST, precision=precision), tmp_path / "out.onnx")
    size = 1 if batch == 1 else 4
    before, after = (outputs_of(file, IMAGES[:size])["logits"] for file in (path, tmp_path / "out.onnx"))
    assert sqnr(before, after) > (30 if precision is Precision.INT8 else 20)


@pytest.mark.parametrize("effort", Effort)
def test_two_runs_write_the_same_bytes(tmp_path: Path, effort: Effort) -> None:
    path = network(tmp_path / "float.onnx", blocks=1)
    for name in ("one.onnx", "two.onnx"):
        quantized(path, replace(INT8, effort=effort), tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("effort", Effort)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_switch(tmp_path: Path, effort: Effort, method: str) -> None:
    path = network(tmp_path / "float.onnx", blocks=1, stem=8)
    settings = replace(INT8, effort=effort)
    quantized(path, settings, tmp_path / "on.onnx")
    report = quantized(path, replace(settings, methods=Methods(**{method: False})), tmp_path / "off.onnx")
    same = (tmp_path / "on.onnx").read_bytes() == (tmp_path / "off.onnx").read_bytes()
    assert same == (method == "importance" and effort is Effort.FAST)
    if method == "smoothing":
        assert not report.smoothed
    if method == "sparing":
        assert {name for name, (kind, _) in reasons(report).items() if kind == "fp16"} == {"head"}


def test_all_methods_off_are_the_estimators_ranges_alone(tmp_path: Path) -> None:
    path = network(tmp_path / "float.onnx", blocks=1)
    ranges, statistics = calibrated(path)
    off = replace(INT8, methods=Methods(**dict.fromkeys(METHODS, False)))
    quantize_model(path, ranges, off, tmp_path / "with.onnx", statistics=statistics)
    quantize_model(path, ranges, off, tmp_path / "without.onnx")
    assert (tmp_path / "with.onnx").read_bytes() == (tmp_path / "without.onnx").read_bytes()
    plan = plan_quantization(graph_from_onnx(path), ranges, off, statistics)
    assert plan.amax == {key: ranges.amax(key[0], "int8", Estimator.MSE) for key in plan.amax}


def test_best_without_images_is_refused(tmp_path: Path) -> None:
    path = network(tmp_path / "float.onnx", blocks=1)
    ranges, statistics = calibrated(path)
    with pytest.raises(ResvitError, match="learns from images"):
        quantize_model(path, ranges, BEST, tmp_path / "out.onnx", statistics=statistics)
    assert not (tmp_path / "out.onnx").exists()


def test_fewer_images_than_the_batch_are_refused(tmp_path: Path) -> None:
    path = network(tmp_path / "float.onnx", blocks=1)
    ranges, statistics = calibrated(path)
    few = source(IMAGES[:3])
    with pytest.raises(ResvitError, match="fewer calibration images than the model's batch"):
        quantize_model(path, ranges, BEST, tmp_path / "out.onnx", statistics=statistics, images=few)


def test_fp16_needs_no_images_at_any_effort(tmp_path: Path) -> None:
    path = network(tmp_path / "float.onnx", blocks=1)
    ranges, _ = calibrated(path)
    report = quantize_model(path, ranges, replace(BEST, precision=Precision.FP16), tmp_path / "out.onnx")
    assert report.macs_share == 0.0


def test_a_cheap_stem_stays_in_fp16_and_says_why(tmp_path: Path) -> None:
    path = network(tmp_path / "float.onnx")
    report = quantized(path, INT8, tmp_path / "out.onnx")
    precision, reason = reasons(report)["stem/Conv"]
    assert precision == "fp16"
    assert "reads the image" in reason
    assert 0.98 <= report.macs_share < 1.0
    assert {name for name, (kind, _) in reasons(report).items() if kind == "fp16"} == {"stem/Conv", "head"}


@pytest.mark.parametrize("settings", [
    replace(INT8, include=("stem/*",)),
    replace(INT8, include=("Conv",)),
    replace(INT8, precisions={"stem/Conv": Precision.INT8}),
    replace(INT8, methods=Methods(sparing=False)),
])  # fmt: skip
def test_a_stem_that_is_asked_for_is_quantised(tmp_path: Path, settings: QuantizeSettings) -> None:
    assert "stem/Conv" in placed(network(tmp_path / "float.onnx"), settings)


def test_a_stem_of_much_work_or_of_many_colours_is_quantised(tmp_path: Path) -> None:
    assert "stem/Conv" in placed(network(tmp_path / "dear.onnx", stem=48, blocks=1), INT8)
    path = network(tmp_path / "spectral.onnx", stem=8, colours=6)
    images = np.random.default_rng(0).standard_normal((8, 6, 16, 16)).astype(np.float32)
    ranges, statistics = calibrated(path, images)
    plan = plan_quantization(graph_from_onnx(path), ranges, INT8, statistics)
    assert "stem/Conv" in {weight.node.name for weight in plan.placement.weights}


@pytest.mark.parametrize(("stem", "blocks"), [(16, 3), (48, 1)])
def test_best_spares_no_more_than_two_per_cent(tmp_path: Path, stem: int, blocks: int) -> None:
    report = quantized(network(tmp_path / "float.onnx", stem=stem, blocks=blocks), BEST, tmp_path / "out.onnx")
    assert report.macs_share >= 0.98
    for name, (precision, reason) in reasons(report).items():
        assert precision == "int8" or name == "head" or "reads the image" in reason or "hurt most" in reason


def test_best_spares_the_layer_that_hurts_the_most_unless_it_is_asked_for(tmp_path: Path) -> None:
    """A layer of 0.3% of the work whose input reaches far beyond nearly all of its values is most of the noise."""
    g = Graph(4, 8, 16, 16)
    value = g.op("Relu", g.conv("input", 48, 8, name="first"), name="relu")
    for index in range(2):
        value = g.op("Relu", g.conv(value, 48, 48, name=f"conv{index}"))
    pooled = g.op("AveragePool", value, name="pool", kernel_shape=[4, 4], strides=[4, 4])
    # x³ reaches far where x is large.
    cubed = g.op("Mul", g.op("Mul", pooled, pooled), pooled, name="cube")
    small = g.conv(cubed, 48, 48, 1, name="narrow")
    rise = g.op("Resize", small, "", g.constant("sizes", np.array([1, 1, 4, 4], np.float32)), name="rise")
    path = g.save(tmp_path / "float.onnx", g.op("Relu", g.op("Add", rise, value, name="sum")))
    images = np.random.default_rng(0).standard_normal((16, 8, 16, 16)).astype(np.float32)
    ranges, statistics = calibrated(path, images)
    found = {}
    for name, settings in {"free": BEST, "asked": replace(BEST, include=("narrow",))}.items():
        out = tmp_path / f"{name}.onnx"
        report = quantize_model(path, ranges, settings, out, statistics=statistics, images=source(images))
        found[name] = reasons(report)["narrow"]
    assert found["free"][0] == "fp16"
    assert "hurt most" in found["free"][1]
    assert found["asked"][0] == "int8"


def test_ranges_weigh_each_channel_by_what_its_readers_make_of_it(tmp_path: Path) -> None:
    """One channel reaches far but is hardly read: the range serves the others; the estimator's serves both."""
    g = Graph(8, 64, 32)
    weight = g.random.standard_normal((32, 24)).astype(np.float32)
    weight[0] *= 1e-4
    path = g.save(tmp_path / "float.onnx", g.op("MatMul", "input", g.constant("w", weight), name="fc"))
    images = np.random.default_rng(0).standard_normal((8, 64, 32)).astype(np.float32)
    images[..., 0] *= 50
    statistics = collect_statistics(path, [{"input": images}])
    ranges = ranges_from(statistics, "digest")
    settings = replace(INT8, include=("fc",))
    plan = plan_quantization(graph_from_onnx(path), ranges, settings, statistics)
    clip = plan.amax["input", Precision.INT8]
    assert clip < 8
    assert ranges.amax("input", "int8", Estimator.MSE) > 50
    energy = np.square(weight, dtype=np.float64).sum(1)
    channels = _widened_channels(analyse(network_from_onnx(path)), statistics)["input"]
    absmax = statistics.tensors["input"].absmax
    assert clip == pytest.approx(amax_for_output(channels, energy, "int8", absmax), rel=1e-6)


def test_a_range_serves_all_readers_of_a_tensor(tmp_path: Path) -> None:
    """One reader needs the channel that reaches far, the other hardly reads it: whichever comes last."""
    random = np.random.default_rng(1)
    far, near = random.standard_normal((2, 32, 24)).astype(np.float32)
    far[1:] *= 0.1
    near[0] *= 1e-4
    images = random.standard_normal((8, 64, 32)).astype(np.float32)
    images[..., 0] *= 50
    energies = [np.square(weight, dtype=np.float64).sum(1) for weight in (far, near)]
    for name, weights in {"near last": (far, near), "far last": (near, far)}.items():
        g = Graph(8, 64, 32)
        outputs = [
            g.op("MatMul", "input", g.constant(f"w{i}", weight), name=f"fc{i}") for i, weight in enumerate(weights)
        ]
        path = g.save(tmp_path / f"{name}.onnx", *outputs)
        statistics = collect_statistics(path, [{"input": images}])
        settings = replace(INT8, include=("fc*",))
        plan = plan_quantization(graph_from_onnx(path), ranges_from(statistics, "digest"), settings, statistics)
        channels = _widened_channels(analyse(network_from_onnx(path)), statistics)["input"]
        absmax = statistics.tensors["input"].absmax
        alone = [amax_for_output(channels, energy, "int8", absmax) for energy in energies]
        clip = plan.amax["input", Precision.INT8]
        assert clip == pytest.approx(amax_for_output(channels, sum(energies), "int8", absmax), rel=1e-6), name
        assert all(abs(clip / other - 1) > 0.01 for other in alone)  # else the example shows nothing


def test_widened_channels_stay_within_the_tensor(tmp_path: Path) -> None:
    """A sample never reached further than all values; what is estimated does not either, nor falls behind it."""
    path = network(tmp_path / "float.onnx")
    _, statistics = calibrated(path)
    wide = _widened_channels(analyse(network_from_onnx(path)), statistics)
    assert wide
    grown = 0
    for name, channels in wide.items():
        entry = statistics.tensors[name]
        assert entry.channels is not None
        assert (channels.absmax >= entry.channels.absmax).all()
        assert channels.absmax.max() <= np.float32(max(entry.absmax, float(entry.channels.absmax.max())))
        grown += int((channels.absmax > entry.channels.absmax).sum())
    assert grown


def test_smoothing_shows_in_the_report_and_in_the_weights(tmp_path: Path) -> None:
    path = network(tmp_path / "float.onnx")
    ranges, statistics = calibrated(path)
    plan = plan_quantization(graph_from_onnx(path), ranges, INT8, statistics)
    assert "norm/LayerNormalization:0" in {item.tensor for item in plan.moved}
    moved = next(item for item in plan.moved if item.tensor == "norm/LayerNormalization:0")
    scaled = constant(plan.network.graph.initializers["norm.weight"])
    assert scaled is not None
    np.testing.assert_allclose(scaled * moved.scale, np.where(np.arange(48) % 8 == 3, 20.0, 1.0), rtol=1e-5)
    report = quantized(path, INT8, tmp_path / "out.onnx")
    (entry,) = [item for item in report.smoothed if item.tensor == moved.tensor]
    assert entry.gain_db == round(moved.gain_db, 2) > 0
    assert moved.tensor not in report.clips
    # Without statistics by channel nothing can move.
    assert plan_quantization(graph_from_onnx(path), ranges, INT8).moved == ()
