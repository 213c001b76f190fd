from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import CHECKPOINT
from quantize_graphs import Graph, basic_block, batches, hybrid, ranges_of
from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import Ranges, ranges_from
from resvit_calibrate.readers.fashion_mnist import read_split
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.table import Precision
from resvit_export.cli.main import run
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_export.recipe.file import recipe_from_toml
from resvit_export.stages.decide.sensitivity import exclude_snippet
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.sensitivity.exclude import exclude_lists
from resvit_quantize.sensitivity.method import Method
from resvit_quantize.sensitivity.products import quantizable_products
from resvit_quantize.sensitivity.sensitivity import (
    LayerDamage,
    Sensitivity,
    brute_force_sensitivity,
    layers_to_exclude,
    measure_sensitivity,
    sensitivity_from_json,
    sqnr_db,
)
from resvit_quantize.settings import QuantizeSettings

INT8 = QuantizeSettings(Precision.INT8)


def images(count: int, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def linear_chain(path: Path, batch: int | str = "batch", outputs: int = 1) -> Path:
    """Two convolutions and a mean: one number an image, in which every layer's error is linear."""
    g = Graph(batch, 3, 8, 8)
    value = g.conv(g.conv("input", 32, 3, name="a.0.conv/Conv"), 32, 32, name="a.1.conv/Conv")
    value = g.op("ReduceMean", value, g.ints(1, 2, 3), name="mean", keepdims=0)
    value = g.op("Unsqueeze", value, g.ints(1))
    scaled = [value, *(g.op("Mul", value, g.constant(f"k{i}", np.float32(3.0) * np.ones(1, np.float32)))
                       for i in range(outputs - 1))]  # fmt: skip
    return g.save(path, *scaled)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranges, np.ndarray]:
    """The trained reference hybrid as ONNX, its ranges and 48 real images."""
    path = tmp_path_factory.mktemp("trained") / "model.onnx"
    program, _ = fold_program(load_network(ModelSpec(model="resvit:embed-nano", checkpoint=CHECKPOINT)).program)
    onnx_from_program(program, path, opset=20, batch=None)
    pixels = read_split("train")[0][:48, None].astype(np.float32)
    x = (pixels / 255 - 0.286) / 0.353
    return path, ranges_from(collect_statistics(path, [Batch(x, None)]), "digest"), x


def rank_correlation(first: list[float], second: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@pytest.mark.slow
@pytest.mark.whole
def test_one_pass_ranks_as_brute_force_does(trained: tuple[Path, Ranges, np.ndarray]) -> None:
    model, ranges, x = trained
    fast = measure_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x))
    slow = brute_force_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x))
    assert [layer.node for layer in fast.layers] == [layer.node for layer in slow.layers]
    assert len(fast.layers) == 20
    for precision in ("int8", "fp8"):
        ours, true = ([layer.damage[precision] for layer in s.layers] for s in (fast, slow))
        assert rank_correlation(ours, true) > 0.95
        assert fast.total(precision) == pytest.approx(slow.total(precision), rel=0.25)
        assert 0.5 < slow.together[precision] / fast.total(precision) < 2.0
        assert fast.together[precision] == pytest.approx(slow.together[precision], rel=0.02)
        assert fast.coverage(precision) > 0.98
    head = fast.layers[-1]
    assert (head.group, head.quantized) == ("head", ())
    assert head.damage["int8"] > 0


def test_it_is_exact_where_the_network_is_linear_and_has_one_output(tmp_path: Path) -> None:
    model, x = linear_chain(tmp_path / "model.onnx"), images(5, 3, 8, 8)
    ranges = ranges_of(model, x)
    fast = measure_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x[:2], x[2:]), probes=1)
    slow = brute_force_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x))
    assert (fast.images, slow.images) == (5, 5)
    for one, two in zip(fast.layers, slow.layers, strict=True):
        for precision in ("int8", "fp8"):
            assert one.damage[precision] == pytest.approx(two.damage[precision], rel=1e-2)


def test_each_of_several_outputs_counts_by_its_own_power(tmp_path: Path) -> None:
    x = images(4, 3, 8, 8)
    single, double = (linear_chain(tmp_path / f"{n}.onnx", outputs=n) for n in (1, 2))
    for measure in (measure_sensitivity, brute_force_sensitivity):
        one, two = (
            measure(graph_from_onnx(model), ranges_of(model, x), INT8, batches(x)) for model in (single, double)
        )
        for first, second in zip(one.layers, two.layers, strict=True):
            assert second.damage["int8"] == pytest.approx(2 * first.damage["int8"], rel=1e-3)
        assert two.together["int8"] == pytest.approx(2 * one.together["int8"], rel=1e-3)


def test_a_fixed_batch_is_filled_up_and_estimates_the_same(tmp_path: Path) -> None:
    x = images(6, 3, 8, 8)
    free, fixed = linear_chain(tmp_path / "free.onnx"), linear_chain(tmp_path / "fixed.onnx", batch=4)
    ranges = ranges_of(free, x)
    expected = measure_sensitivity(graph_from_onnx(free), ranges, INT8, batches(x))
    found = measure_sensitivity(graph_from_onnx(fixed), ranges, INT8, batches(x), probes=256)
    assert found.images == 6
    assert found.together["int8"] == pytest.approx(expected.together["int8"], rel=1e-3)
    for one, two in zip(found.layers, expected.layers, strict=True):
        assert one.damage["int8"] == pytest.approx(two.damage["int8"], rel=0.25)


@pytest.mark.whole
def test_one_image_that_makes_most_of_the_noise_says_little_where_all_count_evenly(tmp_path: Path) -> None:
    model, x = linear_chain(tmp_path / "model.onnx"), images(12, 3, 8, 8)
    ranges = ranges_of(model, x)
    odd = x.copy()
    odd[0] *= 30.0  # far beyond the ranges
    settings = replace(INT8, include=("*",))

    def shares(pixels: np.ndarray, evenly: bool) -> list[float]:
        found = measure_sensitivity(
            graph_from_onnx(model), ranges, settings, batches(pixels), precisions=("int8",), evenly=evenly
        )
        if evenly:
            assert sum(layer.damage["int8"] for layer in found.layers) == pytest.approx(1.0)
        return [layer.damage["int8"] / sum(each.damage["int8"] for each in found.layers) for layer in found.layers]

    usual, even, pooled = shares(x, True), shares(odd, True), shares(odd, False)
    assert np.abs(np.subtract(even, usual)).max() < 0.15
    assert np.abs(np.subtract(pooled, usual)).max() > 0.3


def test_the_same_seed_gives_the_same_and_another_nearly(tmp_path: Path) -> None:
    model, x = hybrid(tmp_path / "model.onnx"), images(8, 3, 16, 16)
    ranges = ranges_of(model, x)
    first, again, other = (
        measure_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x), seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert other.total("int8") == pytest.approx(first.total("int8"), rel=0.5)


def test_the_shortcut_of_a_residual_belongs_to_the_convolution_that_feeds_it(tmp_path: Path) -> None:
    g = Graph("batch", 3, 8, 8)
    value = basic_block(g, g.op("Relu", g.conv("input", 32, 3, name="stem/Conv")), 32, "block")
    model, x = g.save(tmp_path / "model.onnx", value), images(2, 3, 8, 8)
    quantizable = quantizable_products(graph_from_onnx(model), ranges_of(model, x), INT8, Precision.INT8)
    product = quantizable.products["block.conv2/Conv"]
    assert [edge.node.name for edge in product.edges] == ["block.conv2/Conv", "block/Add"]
    assert [edge.node.name for edge in quantizable.products["block.conv1/Conv"].edges] == ["block.conv1/Conv"]
    clone = quantizable.plan.network.clone()
    placed = quantizable.placement_of(["block.conv2/Conv"], clone)
    assert {edge.node for edge in placed.edges} <= set(clone.graph)
    fast = measure_sensitivity(graph_from_onnx(model), ranges_of(model, x), INT8, batches(x), probes=64)
    slow = brute_force_sensitivity(graph_from_onnx(model), ranges_of(model, x), INT8, batches(x))
    for one, two in zip(fast.layers, slow.layers, strict=True):
        assert one.damage["int8"] == pytest.approx(two.damage["int8"], rel=0.4)


def test_the_error_of_a_shortcut_adds_to_that_of_its_convolution(tmp_path: Path) -> None:
    """A residual without activations: one number an image, linear in every error, so that both ways must agree."""
    g = Graph("batch", 3, 8, 8)
    value = g.conv("input", 32, 3, name="stem/Conv")
    # So small that the shortcut's error is the larger one.
    weight = g.constant("main.weight", 0.2 * g.random.standard_normal((32, 32, 1, 1)).astype(np.float32) / 32)
    main = g.op("Conv", value, weight, name="main/Conv")
    value = g.op("Add", main, value, name="add")
    mean = g.op("Unsqueeze", g.op("ReduceMean", value, g.ints(1, 2, 3), keepdims=0), g.ints(1))
    model, x = g.save(tmp_path / "model.onnx", mean), images(6, 3, 8, 8)
    ranges = ranges_of(model, x)
    product = quantizable_products(graph_from_onnx(model), ranges, INT8, Precision.INT8).products["main/Conv"]
    assert {edge.node.name for edge in product.edges} == {"main/Conv", "add"}
    fast = measure_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x), probes=1, precisions=("int8",))
    slow = brute_force_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x), precisions=("int8",))
    for one, two in zip(fast.layers, slow.layers, strict=True):
        assert one.damage["int8"] == pytest.approx(two.damage["int8"], rel=1e-2)


@pytest.mark.whole
def test_excluded_layers_are_measured_and_not_counted(tmp_path: Path) -> None:
    model, x = hybrid(tmp_path / "model.onnx"), images(2, 3, 16, 16)
    ranges = ranges_of(model, x)
    plain = measure_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x))
    less = measure_sensitivity(graph_from_onnx(model), ranges, replace(INT8, exclude=("stem/Conv",)), batches(x))
    stem = less.layers[0]
    assert (stem.node, stem.quantized) == ("stem/Conv", ("fp8",) if "fp8" in plain.layers[0].quantized else ())
    assert stem.damage["int8"] == pytest.approx(plain.layers[0].damage["int8"])
    assert less.share(stem, "int8") == 0.0
    assert less.total("int8") < plain.total("int8")
    assert less.coverage("int8") < plain.coverage("int8")
    wanted = measure_sensitivity(graph_from_onnx(model), ranges, replace(INT8, include=("head/Gemm",)), batches(x))
    assert "int8" in wanted.layers[-1].quantized


def test_fewer_levels_do_more_damage_and_only_in_int8(tmp_path: Path) -> None:
    model, x = hybrid(tmp_path / "model.onnx"), images(2, 3, 16, 16)
    eight, five = (
        measure_sensitivity(graph_from_onnx(model), ranges_of(model, x), replace(INT8, bits=b), batches(x))
        for b in (8, 5)
    )
    assert set(five.together) == {"int8"}
    # A step is 127/15 as large: 18.6 dB.
    assert sqnr_db(eight.total("int8")) - sqnr_db(five.total("int8")) == pytest.approx(18.6, abs=3)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    model, x = hybrid(tmp_path / "model.onnx"), images(2, 3, 16, 16)
    ranges = ranges_of(model, x)
    for measure in (measure_sensitivity, brute_force_sensitivity):
        with pytest.raises(ResvitError, match="FP16 is what"):
            measure(graph_from_onnx(model), ranges, QuantizeSettings(Precision.FP16), batches(x))
        with pytest.raises(ResvitError, match="no images"):
            measure(graph_from_onnx(model), ranges, INT8, [])
        with pytest.raises(ResvitError, match="NaN"):
            measure(graph_from_onnx(model), ranges, INT8, batches(x * np.float32(np.nan)))


def test_brute_force_takes_operators_without_a_gradient(tmp_path: Path) -> None:
    g = Graph("batch", 3, 8, 8)
    value = g.op("Relu", g.conv("input", 32, 3, name="first/Conv"))
    value = g.op("LpNormalization", g.conv(value, 32, 32, name="second/Conv"), axis=1)
    model, x = g.save(tmp_path / "model.onnx", value), images(3, 3, 8, 8)
    ranges = ranges_of(model, x)
    with pytest.raises(ResvitError, match="LpNormalization") as refused:
        measure_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x))
    assert refused.value.code == ExitCode.IMPOSSIBLE
    found = brute_force_sensitivity(graph_from_onnx(model), ranges, INT8, batches(x), precisions=("int8",))
    assert [layer.node for layer in found.layers] == ["first/Conv", "second/Conv"]
    assert all(20 < sqnr_db(layer.damage["int8"]) < 60 for layer in found.layers)


def layer(node: str, damage: float, macs: int = 100, module: str = "", quantized: bool = True) -> LayerDamage:
    return LayerDamage(node, module, "trunk", "Conv", macs, ("int8",) if quantized else (), {"int8": damage})


def hand_made(*layers: LayerDamage) -> Sensitivity:
    macs = sum(item.macs for item in layers)
    return Sensitivity(Method.GRADIENT, "int8", 4, macs, {"int8": 0.1}, layers)


def test_the_fewest_layers_that_halve_the_damage() -> None:
    found = hand_made(
        layer("a", 3.0, 500),
        layer("b", 4.0, 490),
        layer("c", 2.0, 5),
        layer("d", 1.0, 5),
        layer("e", 9.0, 0, "", False),
    )
    assert [item.node for item in layers_to_exclude(found, "int8")] == ["b", "a"]
    assert [item.node for item in layers_to_exclude(found, "int8", coverage=0.98)] == ["c", "d"]
    assert [item.node for item in layers_to_exclude(found, "int8", target=0.6)] == ["b"]
    assert found.total("int8") == 10.0
    assert found.share(found.layers[1], "int8") == 0.4
    assert found.coverage("int8", found.layers[:1]) == 0.5
    assert [item.node for item in found.ranked("int8")] == ["e", "b", "a", "c", "d"]


def test_a_list_that_costs_much_coverage_has_one_beside_it_that_does_not() -> None:
    costly = hand_made(layer("a", 3.0, 500), layer("b", 4.0, 490), layer("c", 2.0, 5), layer("d", 1.0, 5))
    halving, cheap = exclude_lists(costly)
    assert halving.title == "To halve the damage (saves 70%, leaves 1.0% of the multiply-accumulates in INT8)"
    assert cheap.to_json() == {
        "purpose": "To keep 98% of the arithmetic quantised "
        "(saves 30%, leaves 99.0% of the multiply-accumulates in INT8)",
        "layers": ["c", "d"],
        "coverage": 0.99,
        "saves": pytest.approx(0.3),
    }
    assert len(exclude_lists(hand_made(layer("a", 9.0, 1), layer("b", 1.0, 999)))) == 1


def test_layers_without_damage_need_no_exclusion() -> None:
    found = hand_made(layer("a", 0.0), layer("b", 0.0))
    assert layers_to_exclude(found, "int8") == ()
    assert exclude_lists(found) == ()
    assert found.share(found.layers[0], "int8") == 0.0


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("blocks.0.mlp.fc1", "blocks.0"),
        ("trunk.stages.1.2.conv", "trunk.stages.1.2"),
        ("0.conv", "0"),
        ("stem.conv", "stem"),
        ("proj", "proj"),
        ("", "node"),
    ],
)
def test_the_block_of_a_module(module: str, block: str) -> None:
    assert layer("node", 1.0, module=module).block == block


def test_json_and_back() -> None:
    found = hand_made(layer("a", 3.0), layer("b", 4.0, quantized=False))
    assert sensitivity_from_json(json.loads(json.dumps(found.to_json()))) == found
    for wrong in ({}, {"layers": [{"node": "a"}]}, {**found.to_json(), "method": "guessing"}):
        with pytest.raises(ResvitError, match="no record"):
            sensitivity_from_json(wrong)


def test_the_snippet_is_a_recipe_and_keeps_what_is_excluded_already(tmp_path: Path) -> None:
    text = exclude_snippet(["blocks.1*"], [layer('odd[0]/"Conv"', 1.0), layer("b/Conv", 1.0)])
    (tmp_path / "resvit.toml").write_text(text)
    assert recipe_from_toml(tmp_path / "resvit.toml").exclude == ("blocks.1*", 'odd[[]0]/"Conv"', "b/Conv")


MODEL = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt", "--data", "fashion-mnist"]
SMALL = [*MODEL, "--calibration-images", "64"]


@pytest.mark.whole
@pytest.mark.usefixtures("exported")
def test_the_command_ends_with_a_list_that_the_quantiser_takes(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sensitivity", *SMALL, "--images", "8", "--run", "runs/x"]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "By group" in said
    assert "measured" in said
    snippet = said[said.index("[quantize]") : said.index("]\n", said.index("[quantize]") + 10) + 1]
    Path("mine.toml").write_text(snippet)
    left_out = recipe_from_toml(Path("mine.toml")).exclude
    assert left_out
    assert run(["quantize", "--recipe", "mine.toml", *SMALL, "--run", "runs/x", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["results"]["quantize.json"]["nodes"]
    assert {node["name"] for node in nodes if node["reason"] == "excluded by the recipe"} == set(left_out)

    page = (workspace / "runs" / "x" / "sensitivity.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert all(node["name"].rpartition("/")[0] in page for node in nodes if node["weighted"])
    assert run(arguments) == 0
    assert "sensitivity: unchanged" in capsys.readouterr().err


@pytest.mark.whole
@pytest.mark.usefixtures("exported")
def test_the_command_as_json(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sensitivity", *SMALL, "--images", "4", "--target", "jetson-orin", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == 4
    assert set(document["together"]) == {"int8"}
    assert sum(document["groups"].values()) == pytest.approx(1.0)
    assert sum(document["blocks"].values()) == pytest.approx(1.0)
    assert document["exclude"][0]["saves"] >= 0.5
    assert sensitivity_from_json({k: document[k] for k in hand_made().to_json()}).images == 4


def test_what_the_command_refuses(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sensitivity", *MODEL, "--precision", "fp16"]) == ExitCode.INPUT
    assert run(["sensitivity", *MODEL, "--quantizer", "modelopt"]) == ExitCode.IMPOSSIBLE
    assert run(["sensitivity", *MODEL[:4]]) == ExitCode.INPUT
    assert "Traceback" not in capsys.readouterr().err
