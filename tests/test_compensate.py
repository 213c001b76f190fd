"""Rounding that makes up for its own error: below rounding to nearest, on the grid, finite whatever the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from quantize_graphs import Graph, batches, outputs_of, sqnr
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import ranges_from
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.network import onnx_from_network
from resvit_quantize.placement.grid import largest_level, quantise_weight
from resvit_quantize.placement.placement import Weight, weight_key
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.qdq.plan import Plan, plan_quantization
from resvit_quantize.qdq.quantised import mean_errors
from resvit_quantize.settings import Methods, QuantizeSettings

torch = pytest.importorskip("torch")

from resvit_quantize.rounding.compensate import Compensation, compensate, round_weight  # noqa: E402
from resvit_quantize.rounding.layer_rows import LayerRows, can_fit, grouped_weight, ungrouped_weight  # noqa: E402
from resvit_quantize.torch_graph.fake_quant import fake_quantize  # noqa: E402
from resvit_quantize.torch_graph.graph import TorchGraph  # noqa: E402

PLAIN = Methods(smoothing=False, sparing=False)


def correlated(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Images whose channels are mixtures of four smooth sources and a little noise, each with its own mean."""
    random = np.random.default_rng(7)
    mix, offset = random.standard_normal((shape[0], 4)), random.standard_normal(shape[0])
    random = np.random.default_rng(seed)
    sources = random.standard_normal((count, 4, *shape[1:]))
    for axis in range(2, sources.ndim):
        sources = (sources + np.roll(sources, 1, axis)) / np.sqrt(2.0)
    images = np.einsum("cs,ns...->nc...", mix, sources) + offset.reshape(-1, *[1] * len(shape[1:]))
    return (images + 0.1 * random.standard_normal(images.shape)).astype(np.float32)


def chunks_of(images: np.ndarray, size: int) -> list[np.ndarray]:
    return [np.ascontiguousarray(images[start : start + size]) for start in range(0, len(images), size)]


def plan_of(path: Path, chunks: list[np.ndarray], settings: QuantizeSettings) -> Plan:
    statistics = collect_statistics(path, [{"input": chunk} for chunk in chunks])
    return plan_quantization(graph_from_onnx(path), ranges_from(statistics, "digest"), settings, statistics)


def everything(precision: Precision, bits: int = 8, methods: Methods = PLAIN) -> QuantizeSettings:
    return QuantizeSettings(precision, include=("*",), bits=bits, methods=methods)


def written(plan: Plan, found: Compensation | None, bits: int, out: Path) -> Path:
    """The quantised graph in FP32, with what was found or rounded to nearest."""
    if found is None:
        insert_qdq(plan.network, plan.placement, plan.amax, {}, bits)
    else:
        found.insert_into(plan.network, plan.placement, bits)
    onnx_from_network(plan.network, out)
    return out


def run(path: Path, images: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([outputs_of(path, chunk, optimize=False)["logits"] for chunk in chunks_of(images, size)])


def require_sound(plan: Plan, found: Compensation, bits: int) -> None:
    assert {weight_key(weight) for weight in plan.placement.weights} == set(found.stored)
    for weight in plan.placement.weights:
        stored = found.stored[weight_key(weight)]
        values = stored.values.astype(np.float32)
        assert np.isfinite(values).all()
        assert np.abs(values).max() <= largest_level(weight.precision, bits)
        assert np.isfinite(stored.scale).all()
        assert (stored.scale > 0).all()
    assert all(np.isfinite(bias).all() for bias in found.bias.values())
    assert all(np.isfinite(clip) and clip > 0 for clip in found.amax.values())
    for before, after in found.errors.values():
        assert 0 <= after <= before


def three_layers(g: Graph) -> str:
    value = g.op("Relu", g.conv("input", 32, 24, name="first"))
    value = g.op("Relu", g.conv(value, 32, 32, name="second"))
    return g.conv(value, 16, 32, 1, name="third")


@pytest.mark.whole
@pytest.mark.parametrize("batch", [1, 4, "batch"])
@pytest.mark.parametrize(("precision", "bits", "gain"), [(Precision.INT8, 4, 3.0), (Precision.FP8, 8, 1.5)])
def test_compensation_is_clearly_better_on_new_images(
    tmp_path: Path, precision: Precision, bits: int, gain: float, batch: int | str
) -> None:
    g = Graph(batch, 24, 8, 8)
    path = g.save(tmp_path / "float.onnx", three_layers(g))
    size = batch if isinstance(batch, int) else 8
    chunks = chunks_of(correlated(32, 24, 8, 8), size)
    settings = everything(precision, bits)
    plan = plan_of(path, chunks, settings)
    found = compensate(plan, batches(*chunks), settings)
    require_sound(plan, found, bits)
    unseen = correlated(16, 24, 8, 8, seed=1)
    exact = run(path, unseen, size)
    nearest = written(plan_of(path, chunks, settings), None, bits, tmp_path / "nearest.onnx")
    learned = written(plan, found, bits, tmp_path / "learned.onnx")
    assert sqnr(exact, run(learned, unseen, size)) > sqnr(exact, run(nearest, unseen, size)) + gain
    # The bias takes the mean of the error away, in each channel.
    error = run(learned, unseen, size) - exact
    off = np.abs(error.mean(axis=(0, 2, 3))) / error.std(axis=(0, 2, 3))
    assert off.max() < 0.15


def test_corrected_means_are_exact_where_all_rows_are_seen(tmp_path: Path) -> None:
    g = Graph("batch", 24)
    path = g.save(tmp_path / "float.onnx", g.linear("input", 24, 16, "fc"))
    images = correlated(400, 24)
    settings = everything(Precision.INT8, 3)
    plan = plan_of(path, [images], settings)
    found = compensate(plan, batches(images), settings)
    error = run(written(plan, found, 3, tmp_path / "int8.onnx"), images, 400) - run(path, images, 400)
    # The rows are drawn with replacement, and a fifth of them is held out.
    assert np.abs(error.mean(0)).max() < 0.1 * error.std(0).max() + 1e-6


def test_the_closed_form_takes_the_mean_error_of_the_weights(tmp_path: Path) -> None:
    """A linear layer's mean output error is (W - Ŵ) E[x], without any error of its input."""
    g = Graph("batch", 24)
    path = g.save(tmp_path / "float.onnx", g.linear("input", 24, 16, "fc"))
    images = correlated(256, 24)
    plan = plan_of(path, [images], everything(Precision.INT8, 3))
    place = plan.placement.weights[0]
    weight = plan.network.graph.initializers["fc.weight"].const_value.numpy()
    values, scale = quantise_weight(weight, place.axis, Precision.INT8, 3)
    expected = (images @ weight - images @ (values * scale)).mean(0)
    np.testing.assert_allclose(mean_errors(plan, 3)["fc/MatMul"], expected, rtol=1e-3, atol=1e-5)


def depthwise(g: Graph) -> str:
    return g.op("Conv", "input", g.weight("w", 16, 1, 3, 3), name="layer", group=16, pads=[1] * 4)


def grouped(g: Graph) -> str:
    return g.op("Conv", "input", g.weight("w", 32, 4, 3, 3), g.weight("b", 32), name="layer", group=4, pads=[1] * 4)


def strided(g: Graph) -> str:
    return g.op("Conv", "input", g.weight("w", 24, 16, 3, 3), name="layer", strides=[2, 1], pads=[1, 0, 0, 1])


def dilated(g: Graph) -> str:
    return g.op("Conv", "input", g.weight("w", 24, 16, 3, 3), name="layer", dilations=[2, 2], pads=[2] * 4)


def same_lower(g: Graph) -> str:
    weight = g.weight("w", 24, 16, 2, 3)
    return g.op("Conv", "input", weight, name="layer", auto_pad="SAME_LOWER", strides=[2, 2])


def gemm(g: Graph, **attributes: float) -> str:
    flat = g.op("Flatten", "input", name="flat")
    return g.op("Gemm", flat, g.weight("w", 24, 16 * 64), g.weight("b", 24), name="layer", transB=1, **attributes)


def scaled_gemm(g: Graph) -> str:
    return gemm(g, alpha=0.5, beta=2.0)


def token_product(g: Graph) -> str:
    tokens = g.op("Transpose", g.op("Reshape", "input", g.ints(-1, 16, 64)), perm=[0, 2, 1])
    return g.op("MatMul", tokens, g.weight("w", 16, 24), name="layer")


def transposed(g: Graph) -> str:
    return g.op("ConvTranspose", "input", g.weight("w", 16, 24, 2, 2), name="layer", strides=[2, 2])


def shared(g: Graph) -> str:
    weight = g.weight("w", 16, 16, 1, 1)
    inner = g.op("Relu", g.op("Conv", "input", weight, name="layer"))
    return g.op("Conv", inner, weight, name="again")


FITTED = [depthwise, grouped, strided, dilated, same_lower, gemm, scaled_gemm, token_product]


@pytest.mark.whole
@pytest.mark.parametrize("build", FITTED)
def test_every_kind_of_layer_gains(tmp_path: Path, build: Callable[[Graph], str]) -> None:
    g = Graph("batch", 16, 8, 8)
    path = g.save(tmp_path / "float.onnx", build(g))
    # A matrix product has one row an image.
    chunks = chunks_of(correlated(512 if build in (gemm, scaled_gemm) else 64, 16, 8, 8), 16)
    settings = everything(Precision.INT8, 4)
    plan = plan_of(path, chunks, settings)
    found = compensate(plan, batches(*chunks), settings)
    require_sound(plan, found, 4)
    before, after = found.errors["layer"]
    # Nine inputs leave little room; their own error is most of it.
    # Nine inputs leave little room; their own error is most of it.
    assert after < (0.97 if build is depthwise else 0.8) * before
    # What is predicted for the layer is what the graph then does, on the very images.
    images = np.concatenate(chunks)
    exact, learned = run(path, images, 16), run(written(plan, found, 4, tmp_path / "q.onnx"), images, 16)
    noise, channel = learned - exact, 2 if build is token_product else 1
    others = tuple(axis for axis in range(noise.ndim) if axis != channel)
    share = np.square(noise).sum() / np.square(exact - exact.mean(others, keepdims=True)).sum()
    assert share == pytest.approx(after, rel=0.35)


@pytest.mark.parametrize("build", [transposed, shared])
def test_what_cannot_be_fitted_is_rounded_to_nearest(tmp_path: Path, build: Callable[[Graph], str]) -> None:
    g = Graph(4, 16, 8, 8)
    path = g.save(tmp_path / "float.onnx", build(g))
    chunks = chunks_of(correlated(16, 16, 8, 8), 4)
    settings = everything(Precision.INT8)
    plan = plan_of(path, chunks, settings)
    found = compensate(plan, batches(*chunks), settings)
    require_sound(plan, found, 8)
    weight = plan.network.graph.initializers["w"].const_value.numpy()
    (stored,) = found.stored.values()
    np.testing.assert_array_equal(
        stored.values, quantise_weight(weight, plan.placement.weights[0].axis, Precision.INT8)[0]
    )
    assert not found.bias


def test_a_handful_of_rows_is_nothing_to_fit_to(tmp_path: Path) -> None:
    g = Graph(1, 16, 8, 8)
    path = g.save(tmp_path / "float.onnx", gemm(g))
    chunks = chunks_of(correlated(3, 16, 8, 8), 1)
    settings = everything(Precision.INT8)
    plan = plan_of(path, chunks, settings)
    found = compensate(plan, batches(*chunks), settings)
    require_sound(plan, found, 8)
    assert not found.bias


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
@pytest.mark.parametrize("build", [depthwise, grouped, strided, token_product])
def test_dead_inputs_and_weights_of_zeros_are_finite(
    tmp_path: Path, precision: Precision, build: Callable[[Graph], str]
) -> None:
    g = Graph("batch", 16, 8, 8)
    path = g.save(tmp_path / "float.onnx", build(g))
    model = ir.load(path)
    array = np.array(model.graph.initializers["w"].const_value.numpy())
    array[:2] = 0.0
    array[..., -1] = 0.0
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    ir.save(model, path)
    images = correlated(32, 16, 8, 8)
    images[:, :5] = 0.0  # more than a whole group
    images[:, 5] = 3.0
    settings = everything(precision)
    plan = plan_of(path, [images], settings)
    found = compensate(plan, batches(images), settings)
    require_sound(plan, found, 8)
    assert sqnr(run(path, images, 32), run(written(plan, found, 8, tmp_path / "q.onnx"), images, 32)) > 20


def test_images_of_zeros_are_survived(tmp_path: Path) -> None:
    g = Graph(2, 24, 8, 8)
    path = g.save(tmp_path / "float.onnx", three_layers(g))
    chunks = chunks_of(np.zeros((4, 24, 8, 8), np.float32), 2)
    settings = everything(Precision.INT8)
    plan = plan_of(path, chunks, settings)
    require_sound(plan, compensate(plan, batches(*chunks), settings), 8)


def test_methods_switch_ranges_and_biases(tmp_path: Path) -> None:
    g = Graph(4, 24, 8, 8)
    path = g.save(tmp_path / "float.onnx", three_layers(g))
    chunks = chunks_of(correlated(16, 24, 8, 8), 4)
    off = Methods(smoothing=False, sparing=False, output_ranges=False, bias_correction=False)
    # Ranges that keep the largest value are too long for four bits.
    plan = plan_of(path, chunks, replace(everything(Precision.INT8, 4), estimator=Estimator.MAX))
    found = compensate(plan, batches(*chunks), everything(Precision.INT8, 4, off))
    assert not found.bias
    assert found.amax == plan.amax
    require_sound(plan, found, 4)
    on = compensate(plan, batches(*chunks), everything(Precision.INT8, 4))
    assert set(on.bias) == {"first", "second", "third"}
    assert all(on.amax[key] < clip for key, clip in plan.amax.items())


def product(shape: tuple[int, ...], op_type: str = "MatMul", **attributes: object) -> tuple[Weight, np.ndarray]:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    value = ir.Value(name="w", shape=ir.Shape(shape), const_value=ir.tensor(array, name="w"))
    ir.Graph([], [], nodes=[], initializers=[value])
    node = ir.node(op_type, [ir.Value(name="x"), value], attributes)  # type: ignore[arg-type]
    return Weight(node, 1, 0 if op_type == "Conv" or attributes.get("transB") else 1, Precision.INT8), array


KINDS = [
    ((200, 24), "MatMul", {}),
    ((24, 160), "Gemm", {"transB": 1}),
    ((160, 24), "Gemm", {}),
    ((24, 8, 3, 3), "Conv", {"group": 2}),
    ((16, 1, 3, 3), "Conv", {"group": 16}),
]


@pytest.mark.parametrize(("shape", "op_type", "attributes"), KINDS)
@pytest.mark.parametrize("bits", [8, 3])
def test_an_identity_hessian_rounds_to_nearest(
    shape: tuple[int, ...], op_type: str, attributes: dict[str, object], bits: int
) -> None:
    place, array = product(shape, op_type, **attributes)
    weight = grouped_weight(place.node, torch.from_numpy(array))
    np.testing.assert_array_equal(ungrouped_weight(place.node, weight, shape).numpy(), array)
    hessian = torch.eye(weight.shape[1]).expand(weight.shape[0], -1, -1)
    stored = round_weight(weight, hessian, place, bits)
    values, scale = quantise_weight(array, place.axis, Precision.INT8, bits)
    np.testing.assert_array_equal(stored.values, values)
    np.testing.assert_array_equal(stored.scale, scale)


def test_two_equal_inputs_share_their_error_by_hand() -> None:
    """Where both inputs are always the same, what the first is rounded off by goes to the second."""
    place, _ = product((3, 1))
    array = np.array([[127.0], [10.4], [20.4]], np.float32)
    place.node.inputs[1].const_value = ir.tensor(array, name="w")  # type: ignore[union-attr]
    hessian = torch.tensor([[[9.0, 0, 0], [0, 1, 1], [0, 1, 1]]]) + 1e-4 * torch.eye(3)
    stored = round_weight(torch.from_numpy(array)[None], hessian, place)
    # 10.4 + 20.4 = 30.8: rounded one by one 30, together 31.
    assert stored.scale.tolist() == [1.0]
    assert stored.values[0] == 127
    assert stored.values[1:].sum() == 31


LAYERS = [depthwise, grouped, strided, dilated, same_lower, gemm, token_product]


@pytest.mark.parametrize("build", LAYERS)
def test_sampled_rows_times_the_weight_are_the_layers_outputs(tmp_path: Path, build: Callable[[Graph], str]) -> None:
    g = Graph("batch", 16, 8, 8)
    path = g.save(tmp_path / "float.onnx", build(g))
    network = ir.load(path)
    node = next(node for node in network.graph if node.name == "layer")
    array = node.inputs[1].const_value.numpy()
    assert can_fit(node, array.shape)
    seen: dict[str, list[torch.Tensor]] = {"inputs": [], "outputs": []}

    def reading(reader: ir.Node, index: int, value: torch.Tensor) -> torch.Tensor:
        if reader is graph_node and index == 0:
            seen["inputs"].append(value)
        return torch.zeros_like(value) if reader is graph_node and index == 2 else value

    def writing(writer: ir.Node, value: torch.Tensor) -> torch.Tensor:
        if writer is graph_node:
            seen["outputs"].append(value)
        return value

    graph = TorchGraph(network)
    graph_node = next(item for item in graph.nodes if item.name == "layer")
    chunks = chunks_of(correlated(6, 16, 8, 8), 3)
    for chunk in chunks:
        graph({"input": torch.from_numpy(chunk)}, reading, writing)
    rows = LayerRows(node, array.shape, len(chunks))
    found = rows.of(seen["inputs"]) @ grouped_weight(node, torch.from_numpy(np.array(array)))  # [G, R, O/G]
    found = found.transpose(0, 1).flatten(1)  # [R, O]
    picked = []
    for chunk, positions in zip(seen["outputs"], [positions for positions, _ in rows.drawn], strict=True):
        lined = chunk.flatten(2).mT.flatten(0, 1) if node.op_type == "Conv" else chunk.flatten(0, -2)
        picked.append(lined[positions])
    torch.testing.assert_close(found, torch.cat(picked), rtol=1e-4, atol=1e-4)
    # The same positions serve a second tensor.
    torch.testing.assert_close(rows.of(seen["inputs"]), rows.of(seen["inputs"]), rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "bits"), [(Precision.INT8, 8), (Precision.INT8, 4), (Precision.FP8, 8)])
def test_fake_quantisation_is_that_of_the_graph(tmp_path: Path, precision: Precision, bits: int) -> None:
    g = Graph("batch", 32)
    path = g.save(tmp_path / "float.onnx", g.op("MatMul", "input", g.constant("w", np.eye(32, dtype=np.float32))))
    images = 2 * correlated(64, 32)
    settings = everything(precision, bits)
    plan = plan_of(path, [images[:32]], settings)  # the others reach further: some are clipped
    out = written(plan, None, bits, tmp_path / "q.onnx")
    network = ir.load(out)
    scale = next(n for n in network.graph if n.op_type == "QuantizeLinear").inputs[1].const_value.numpy()
    exact = fake_quantize(torch.from_numpy(images), torch.tensor(scale), precision, bits).numpy()
    weight = next(n for n in network.graph if n.op_type == "DequantizeLinear" and n.name.startswith("MatMul"))
    stored, steps = (np.array(v.const_value.numpy()).astype(np.float32) for v in weight.inputs[:2])
    np.testing.assert_allclose(
        outputs_of(out, images, optimize=False)["logits"], exact @ (stored * steps), rtol=1e-5, atol=1e-6
    )


def test_gradients_pass_the_grid_and_stop_at_its_end() -> None:
    x = torch.tensor([0.26, -0.9, 200.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, scale, Precision.INT8).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
    # Learned step size: round(x/s) - x/s inside, the end of the grid outside.
    assert scale.grad.item() == pytest.approx((1 - 0.52) + (-2 + 1.8) + 127, abs=1e-4)


@pytest.mark.whole
def test_a_layer_left_in_fp16_makes_up_for_what_reaches_it(tmp_path: Path) -> None:
    g = Graph("batch", 24, 8, 8)
    path = g.save(tmp_path / "float.onnx", three_layers(g))
    chunks = chunks_of(correlated(64, 24, 8, 8), 16)
    own = {"third": Precision.FP16}
    settings = replace(everything(Precision.INT8, 3), precisions=own)
    plan = plan_of(path, chunks, settings)
    found = compensate(plan, batches(*chunks), settings)
    (name,) = found.fitted
    assert name == next(str(node.inputs[1].name) for node in plan.network.graph if node.name == "third")
    images = np.concatenate(chunks)
    exact = run(path, images, 16)
    with_fit = sqnr(exact, run(written(plan, found, 3, tmp_path / "a.onnx"), images, 16))
    found.fitted.clear()
    found.bias.pop("third")
    plan = plan_of(path, chunks, settings)
    assert with_fit > sqnr(exact, run(written(plan, found, 3, tmp_path / "b.onnx"), images, 16)) + 0.1


@pytest.mark.whole
def test_sparse_weights_stay_sparse(tmp_path: Path) -> None:
    g = Graph("batch", 24, 8, 8)
    path = g.save(tmp_path / "float.onnx", three_layers(g))
    model = ir.load(path)
    for name, value in model.graph.initializers.items():
        array = np.array(value.const_value.numpy())
        if array.ndim == 4:
            array[:, 1::2] = 0.0
            value.const_value = ir.tensor(array, name=name)
    ir.save(model, path)
    chunks = chunks_of(correlated(64, 24, 8, 8), 16)
    plan = plan_of(path, chunks, everything(Precision.INT8, 4))
    found = compensate(plan, batches(*chunks), everything(Precision.INT8, 4))
    assert found.stored
    for stored in found.stored.values():
        assert not stored.values[:, 1::2].any()
        assert stored.values[:, ::2].any()
    assert all(after < before for before, after in found.errors.values())
