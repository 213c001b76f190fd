"""Scales move through the network without changing it, and only where that pays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from quantize_graphs import Graph, outputs_of, sqnr, vit_block
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import Ranges, ranges_from
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.targets.table import Precision
from resvit_quantize.equalize.channel_flow import channel_flow
from resvit_quantize.equalize.smoothing import Moved, Reader, smooth
from resvit_quantize.graph.analysis import analyse
from resvit_quantize.graph.network import constant, network_from_onnx, onnx_from_network
from resvit_quantize.placement.placement import place
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import Methods, QuantizeSettings

NO_SMOOTHING = Methods(smoothing=False)


def images_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def outliers(width: int, factor: float = 30.0) -> np.ndarray:
    """One channel in eight is ``factor`` times as large as the others."""
    return np.where(np.arange(width) % 8 == 3, factor, 1.0).astype(np.float32)


def outlier_conv(g: Graph, value: str, out: int, into: int, name: str, size: int = 3, **attributes: object) -> str:
    """A convolution whose output channels differ in range."""
    weight = g.random.standard_normal((out, into, size, size)) * np.sqrt(2.0 / (into * size * size))
    array = (weight * outliers(out).reshape(-1, 1, 1, 1)).astype(np.float32)
    bias = g.constant(f"{name}.bias", (0.1 * g.random.standard_normal(out) * outliers(out)).astype(np.float32))
    attributes.setdefault("pads", [size // 2] * 4)
    return g.op("Conv", value, g.constant(f"{name}.weight", array), bias, name=name, **attributes)


def outlier_norm(g: Graph, value: str, width: int, name: str, op_type: str = "LayerNormalization") -> str:
    scale = g.constant(f"{name}.scale", outliers(width))
    inputs = [value, scale, g.constant(f"{name}.bias", 0.1 * outliers(width))]
    if op_type == "BatchNormalization":
        inputs += [g.constant(f"{name}.{part}", np.full(width, at, np.float32)) for part, at in [("m", 0), ("v", 1)]]
    attributes = {"num_groups": 4} if op_type == "GroupNormalization" else {}
    return g.op(op_type, *inputs, name=name, **attributes)


def smoothed(path: Path, images: np.ndarray, bits: int = 8) -> tuple[tuple[Moved, ...], ir.Model]:
    """Smooth the model for INT8 everywhere, and require that its outputs are what they were."""
    statistics = collect_statistics(path, [{"input": images}])
    channels = {n: entry.channels for n, entry in statistics.tensors.items() if entry.channels is not None}
    network = network_from_onnx(path)
    analysis = analyse(network)
    own = {product.name: Precision.INT8 for product in analysis.products if product.weight is not None}
    moved = smooth(network, place(analysis, Precision.INT8, precisions=own), channels, bits)
    out = path.with_suffix(".smooth.onnx")
    onnx_from_network(network, out)
    before, after = outputs_of(path, images), outputs_of(out, images)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-5 * float(np.abs(array).max()))
    return moved, network


def tensors(moved: tuple[Moved, ...]) -> set[str]:
    return {item.tensor for item in moved}


def ratio(network: ir.Model, path: Path, name: str) -> np.ndarray:
    """What each value of a constant was divided by."""
    before = constant(network_from_onnx(path).graph.initializers[name])
    after = constant(network.graph.initializers[name])
    assert before is not None
    assert after is not None
    return np.asarray(before / after)


@pytest.mark.parametrize("readers", [1, 3])
def test_a_layer_norm_gives_its_outliers_to_all_its_readers(tmp_path: Path, readers: int) -> None:
    g = Graph("batch", 20, 32)
    value = outlier_norm(g, "input", 32, "norm")
    ends = [g.linear(value, 32, 16 + 8 * index, f"fc{index}") for index in range(readers)]
    path = g.save(tmp_path / "float.onnx", *ends)
    moved, network = smoothed(path, images_of(4, 20, 32))
    assert tensors(moved) == {"norm:0"}
    # The factors stand in both constants of the norm, and the inverse in every reader's rows.
    scale = moved[0].scale
    assert scale[outliers(32) > 1].min() > 3 * scale[outliers(32) == 1].max()
    for name in ("norm.scale", "norm.bias"):
        np.testing.assert_allclose(ratio(network, path, name), scale, rtol=1e-5)
    for index in range(readers):
        rows = ratio(network, path, f"fc{index}.weight")
        np.testing.assert_allclose(rows, np.repeat(1 / scale[:, None], rows.shape[1], 1), rtol=1e-5)
    assert moved[0].gain_db > 3


def test_convolutions_with_a_relu_between_them(tmp_path: Path) -> None:
    g = Graph(2, 16, 8, 8)
    value = g.op("Relu", outlier_conv(g, "input", 24, 16, "a"), name="relu")
    path = g.save(tmp_path / "float.onnx", g.conv(value, 8, 24, name="b"))
    moved, network = smoothed(path, images_of(2, 16, 8, 8))
    assert tensors(moved) == {"relu:0"}
    np.testing.assert_allclose(ratio(network, path, "a.bias"), moved[0].scale, rtol=1e-5)


def test_both_sides_of_a_residual_share_one_factor(tmp_path: Path) -> None:
    g = Graph(2, 8, 8, 8)
    entry = g.op("Relu", outlier_conv(g, "input", 16, 8, "entry"), name="shortcut")
    inner = g.op("Relu", g.conv(entry, 16, 16, name="first"), name="inner")
    joined = g.op("Relu", g.op("Add", outlier_conv(g, inner, 16, 16, "second"), entry, name="add"), name="joined")
    path = g.save(tmp_path / "float.onnx", g.conv(joined, 8, 16, name="last"))
    moved, network = smoothed(path, images_of(2, 8, 8, 8))
    assert {"shortcut:0", "joined:0"} <= tensors(moved)
    scales = {item.tensor: item.scale for item in moved}
    np.testing.assert_array_equal(scales["shortcut:0"], scales["joined:0"])
    for name in ("entry.bias", "second.bias"):
        np.testing.assert_allclose(ratio(network, path, name), scales["joined:0"], rtol=1e-5)


def attention(g: Graph, value: str, width: int, tokens: int, heads: int) -> str:
    """Attention with a packed product whose value channels differ in range; one Split makes Q, K and V."""
    weight = g.random.standard_normal((width, 3 * width)) / np.sqrt(width)
    weight[:, 2 * width :] *= outliers(width)
    packed = g.op("MatMul", value, g.constant("qkv.weight", weight.astype(np.float32)), name="qkv/MatMul")
    packed = g.op("Add", packed, g.weight("qkv.bias", 3 * width), name="qkv/Add")
    split = g.op("Split", packed, g.ints(width, width, width), name="parts", outputs=3, axis=2)
    shaped = [
        g.op("Transpose", g.op("Reshape", part, g.ints(-1, tokens, heads, width // heads)), perm=perm)
        for part, perm in zip([split, "parts:1", "parts:2"], [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]], strict=True)
    ]
    scores = g.op("Softmax", g.op("MatMul", shaped[0], shaped[1], name="scores"), name="softmax")
    joined = g.op("Transpose", g.op("MatMul", scores, shaped[2], name="mix"), perm=[0, 2, 1, 3])
    flat = g.op("Reshape", joined, g.ints(-1, tokens, width), name="flat")
    return g.linear(flat, width, width, "proj")


@pytest.mark.parametrize("batch", ["batch", 4])
def test_attention_passes_the_factors_of_values_and_fixes_queries_and_keys(tmp_path: Path, batch: str | int) -> None:
    g = Graph(batch, 16, 32)
    path = g.save(tmp_path / "float.onnx", attention(g, "input", 32, 16, 4))
    moved, network = smoothed(path, images_of(4, 16, 32))
    assert tensors(moved) == {"flat:0"}
    factors = ratio(network, path, "qkv.bias")
    np.testing.assert_array_equal(factors[:64], 1.0)
    np.testing.assert_allclose(factors[64:], moved[0].scale, rtol=1e-5)
    np.testing.assert_array_equal(ratio(network, path, "qkv.weight")[:, :64], 1.0)


def test_a_whole_transformer_block_stays_what_it_was(tmp_path: Path) -> None:
    g = Graph("batch", 16, 32)
    value = vit_block(g, outlier_norm(g, "input", 32, "before"), 32, 16, 4, "block")
    path = g.save(tmp_path / "float.onnx", g.linear(outlier_norm(g, value, 32, "after"), 32, 8, "head"))
    moved, _ = smoothed(path, images_of(4, 16, 32))
    # The residual stream is normalised, and the GELU is in the way of the second half of the MLP.
    assert "after:0" in tensors(moved)
    assert not {"before:0", "block.mlp/Gelu:0"} & tensors(moved)


@pytest.mark.parametrize("group", [32, 4])
def test_grouped_and_depthwise_convolutions_read_and_write(tmp_path: Path, group: int) -> None:
    g = Graph(2, 8, 8, 8)
    value = g.op("Relu", outlier_conv(g, "input", 32, 8, "first"), name="one")
    value = g.op("Relu", outlier_conv(g, value, 32, 32 // group, "grouped", group=group), name="two")
    path = g.save(tmp_path / "float.onnx", g.conv(value, 8, 32, 1, name="last"))
    moved, network = smoothed(path, images_of(2, 8, 8, 8))
    assert tensors(moved) == {"one:0", "two:0"}
    scales = {item.tensor: item.scale for item in moved}
    # The grouped weight is divided by what it writes and multiplied by what it reads.
    per_group, outputs = 32 // group, scales["two:0"]
    inputs = scales["one:0"].reshape(group, 1, per_group).repeat(per_group, 1).reshape(32, per_group)
    expected = outputs[:, None] / inputs
    np.testing.assert_allclose(ratio(network, path, "grouped.weight")[:, :, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("row", [False, True])
def test_gemm_transposed_or_not_with_a_bias_of_one_or_two_axes(tmp_path: Path, transposed: int, row: bool) -> None:
    g = Graph("batch", 24)
    first = g.random.standard_normal((24, 32)) * outliers(32) / 5
    bias = (0.1 * g.random.standard_normal(32) * outliers(32)).astype(np.float32)
    weights = [first, g.random.standard_normal((32, 24)) / 5]
    names = [
        g.constant(f"w{i}", np.ascontiguousarray(w.T if transposed else w, np.float32)) for i, w in enumerate(weights)
    ]
    bias_name = g.constant("b0", bias[None] if row else bias)
    value = g.op("Relu", g.op("Gemm", "input", names[0], bias_name, name="a", transB=transposed), name="relu")
    path = g.save(tmp_path / "float.onnx", g.op("Gemm", value, names[1], name="b", transB=transposed))
    moved, network = smoothed(path, images_of(64, 24))
    assert tensors(moved) == {"relu:0"}
    np.testing.assert_allclose(ratio(network, path, "b0").reshape(-1), moved[0].scale, rtol=1e-5)


@pytest.mark.parametrize("op_type", ["BatchNormalization", "GroupNormalization"])
def test_the_affine_part_of_an_image_norm_is_a_writer(tmp_path: Path, op_type: str) -> None:
    g = Graph(2, 16, 8, 8, opset=21)
    value = outlier_norm(g, g.conv("input", 16, 16, name="first"), 16, "norm", op_type)
    value = g.op("Relu", g.state(value, 2, 16, 8, 8), name="relu")
    path = g.save(tmp_path / "float.onnx", g.conv(value, 8, 16, name="last"))
    moved, network = smoothed(path, images_of(2, 16, 8, 8))
    assert tensors(moved) == {"relu:0"}
    np.testing.assert_allclose(ratio(network, path, "norm.scale"), moved[0].scale, rtol=1e-5)


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool", "GlobalAveragePool", "LeakyRelu"])
def test_pooling_and_other_maps_of_one_channel_pass_factors_on(tmp_path: Path, pool: str) -> None:
    g = Graph(2, 8, 8, 8)
    value = outlier_conv(g, "input", 16, 8, "first")
    window = {"kernel_shape": [2, 2], "strides": [2, 2]} if pool in ("MaxPool", "AveragePool") else {}
    value = g.op(pool, value, name="pool", **window)
    path = g.save(tmp_path / "float.onnx", g.conv(value, 8, 16, 1, name="last"))
    assert tensors(smoothed(path, images_of(2, 8, 8, 8))[0]) == {"pool:0"}


def test_tokens_of_an_image_and_a_product_over_channels_last(tmp_path: Path) -> None:
    g = Graph(2, 8, 8, 8)
    value = outlier_conv(g, "input", 16, 8, "patches")
    last = g.op("Transpose", value, name="last", perm=[0, 2, 3, 1])  # [B, H, W, C]
    path = g.save(tmp_path / "float.onnx", g.linear(last, 16, 24, "fc"))
    assert tensors(smoothed(path, images_of(2, 8, 8, 8))[0]) == {"last:0"}


def gelu_behind(g: Graph, value: str) -> str:
    return g.conv(g.op("Gelu", value), 8, 16, name="last")


def graph_output(g: Graph, value: str) -> str:
    g.op("Relu", value, name="relu")
    return g.conv("relu:0", 8, 16, name="last")


def shared_weight(g: Graph, value: str) -> str:
    first = g.op("Relu", value, name="relu")
    weight = g.weight("shared", 16, 16, 1, 1)
    again = g.op("Conv", g.op("Sigmoid", g.op("Conv", first, weight, name="one")), weight, name="two")
    return g.op("Sigmoid", again)


def position_embedding(g: Graph, value: str) -> str:
    relu = g.op("Relu", g.op("Add", value, g.weight("position", 1, 16, 8, 8)), name="relu")
    return g.conv(relu, 8, 16, name="last")


@pytest.mark.parametrize("behind", [gelu_behind, graph_output, shared_weight, position_embedding])
def test_nothing_moves_where_something_else_reads(tmp_path: Path, behind: Callable[[Graph, str], str]) -> None:
    g = Graph(2, 8, 8, 8)
    end = behind(g, outlier_conv(g, "input", 16, 8, "first"))
    ends = [end, "relu:0"] if behind is graph_output else [end]
    path = g.save(tmp_path / "float.onnx", *ends)
    moved, network = smoothed(path, images_of(2, 8, 8, 8))
    assert moved == ()
    before = network_from_onnx(path).graph.initializers
    for name, value in network.graph.initializers.items():
        np.testing.assert_array_equal(constant(value), constant(before[name]))


def test_a_tensor_multiplied_with_itself_is_fixed(tmp_path: Path) -> None:
    g = Graph(1, 16, 16)
    value = outlier_norm(g, "input", 16, "norm")
    square = g.op("MatMul", value, value, name="square")
    path = g.save(tmp_path / "float.onnx", g.linear(square, 16, 16, "fc"))
    assert smoothed(path, images_of(1, 16, 16))[0] == ()


def test_a_transposed_activation_and_a_stack_of_matrices_are_fixed(tmp_path: Path) -> None:
    g = Graph(1, 16, 16)
    value = g.op("Squeeze", outlier_norm(g, "input", 16, "norm"), g.ints(0))
    turned = g.op("Gemm", value, g.weight("w", 16, 16), name="turned", transA=1)
    other = outlier_norm(g, "input", 16, "other")
    stack = g.op("MatMul", other, g.weight("stack", 3, 16, 16), name="stack")
    path = g.save(tmp_path / "float.onnx", g.linear(turned, 16, 16, "fc"), g.linear(stack, 16, 16, "fd"))
    assert smoothed(path, images_of(1, 16, 16))[0] == ()


def test_even_channels_stay_where_they_are(tmp_path: Path) -> None:
    """All channels hold the same values, and all rows of the weight, in another order."""
    g = Graph(256, 32)
    g.random = np.random.default_rng(3)
    constants = [g.constant(f"norm.{index}", np.full(32, at, np.float32)) for index, at in enumerate((1, 0, 0, 1))]
    value = g.op("BatchNormalization", "input", *constants, name="norm")
    rows = np.stack([g.random.permutation(np.linspace(-1, 1, 32)) for _ in range(32)])
    path = g.save(tmp_path / "float.onnx", g.op("MatMul", value, g.constant("w", rows.astype(np.float32)), name="fc"))
    column = images_of(256)
    assert smoothed(path, np.stack([g.random.permutation(column) for _ in range(32)], axis=1))[0] == ()


def test_dead_channels_and_weights_of_zeros_stay_finite(tmp_path: Path) -> None:
    g = Graph(2, 8, 8, 8)
    weight, bias = g.random.standard_normal((2, 16, 8, 1, 1)).astype(np.float32), np.zeros(16, np.float32)
    weight[0] *= outliers(16).reshape(-1, 1, 1, 1)
    weight[0, :2] = 0.0  # never anything but zero
    weight[1, :, 8:] = 0.0  # not even outliers are read, from half of the channels
    value = g.op("Conv", "input", g.constant("w0", weight[0]), g.constant("b0", bias), name="first")
    value = g.op("Conv", g.op("Relu", value, name="relu"), g.constant("w1", weight[1, :, :, :, :].repeat(2, 1)))
    path = g.save(tmp_path / "float.onnx", value)
    moved, network = smoothed(path, images_of(2, 8, 8, 8))
    assert all(np.isfinite(item.scale).all() and (item.scale > 0).all() for item in moved)
    assert all(np.isfinite(constant(value)).all() for value in network.graph.initializers.values())


def quantised_db(folder: Path, path: Path, images: np.ndarray, methods: Methods, bits: int = 8) -> float:
    statistics: Statistics = collect_statistics(path, [{"input": images}])
    ranges: Ranges = ranges_from(statistics, "digest")
    wanted = QuantizeSettings(Precision.INT8, include=("*",), methods=methods, bits=bits)
    quantize_model(path, ranges, wanted, folder / "int8.onnx", statistics=statistics)
    before, after = (outputs_of(file, images)["logits"] for file in (path, folder / "int8.onnx"))
    return sqnr(before, after)


def test_a_channel_that_is_small_by_chance_is_not_trusted(tmp_path: Path) -> None:
    """Of few images, a channel is large in one and small in the others: of another image it is another channel."""
    random = np.random.default_rng(4)
    seen, unseen = (
        random.standard_normal((8, 32, 4, 4)) * random.choice([0.1, 4.0], (8, 32, 1, 1), p=[0.9, 0.1]) for _ in range(2)
    )
    g = Graph("batch", 32, 4, 4)
    value = g.conv(g.op("Relu", g.conv("input", 32, 32, 1, "first"), name="relu"), 32, 32, 1, "second")
    weight = np.eye(32, dtype=np.float32).reshape(32, 32, 1, 1)
    g.constants = [numpy_helper.from_array(weight, c.name) if c.name == "first.weight" else c for c in g.constants]
    path = g.save(tmp_path / "float.onnx", value)
    statistics = collect_statistics(path, [{"input": seen.astype(np.float32)}])
    kept = {}
    for methods in (Methods(), NO_SMOOTHING):
        wanted = QuantizeSettings(Precision.INT8, include=("*",), methods=methods)
        out = tmp_path / "int8.onnx"
        quantize_model(path, ranges_from(statistics, "digest"), wanted, out, statistics=statistics)
        before, after = (outputs_of(file, unseen.astype(np.float32))["logits"] for file in (path, out))
        kept[methods.smoothing] = sqnr(before, after)
    assert kept[True] > kept[False] - 1.0


def outlier_linear(folder: Path) -> Path:
    """A norm with large channels, whose reader weighs them as much less as they are larger."""
    g = Graph("batch", 20, 32)
    value = outlier_norm(g, "input", 32, "norm")
    weight = g.random.standard_normal((32, 32)) / outliers(32)[:, None]
    product = g.op("MatMul", value, g.constant("fc.weight", weight.astype(np.float32)), name="fc/MatMul")
    return g.save(folder / "float.onnx", product)


def outlier_convs(folder: Path) -> Path:
    g = Graph(4, 16, 8, 8)
    value = g.op("Relu", outlier_conv(g, "input", 32, 16, "first"), name="relu")
    weight = g.random.standard_normal((16, 32, 1, 1)) / outliers(32).reshape(1, -1, 1, 1)
    return g.save(folder / "float.onnx", g.op("Conv", value, g.constant("w", weight.astype(np.float32)), name="last"))


@pytest.mark.parametrize(("build", "shape"), [(outlier_linear, (4, 20, 32)), (outlier_convs, (4, 16, 8, 8))])
def test_outlier_channels_cost_clearly_less(
    tmp_path: Path, build: Callable[[Path], Path], shape: tuple[int, ...]
) -> None:
    path, images = build(tmp_path), images_of(*shape)
    moved, _ = smoothed(path, images)
    gain = quantised_db(tmp_path, path, images, Methods()) - quantised_db(tmp_path, path, images, NO_SMOOTHING)
    assert gain > 3
    assert 0 < moved[0].gain_db < gain + 6


@st.composite
def chains(draw: st.DrawFn) -> tuple[Graph, str]:
    """Convolutions, norms, activations, pools, residuals and splits, in any order."""
    g, width = Graph(1, 8, 8, 8, opset=21), 8
    g.random = np.random.default_rng(draw(st.integers(0, 1000)))
    value = outlier_conv(g, "input", 8, 8, "stem")
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "depthwise", "relu", "gelu", "norm", "residual", "concat", "mul", "pool"]))
        if kind == "conv":
            wider = draw(st.sampled_from([8, 16]))
            value, width = outlier_conv(g, value, wider, width, f"conv{index}"), wider
        elif kind == "depthwise":
            value = outlier_conv(g, value, width, 1, f"depthwise{index}", group=width)
        elif kind in ("relu", "gelu"):
            value = g.op(kind.capitalize(), value)
        elif kind == "norm":
            value = outlier_norm(g, value, width, f"norm{index}", "BatchNormalization")
        elif kind == "residual":
            value = g.op("Add", value, outlier_conv(g, value, width, width, f"residual{index}", 1))
        elif kind == "concat":
            # Halves change places.
            split = g.op("Split", value, g.ints(width // 2, width // 2), outputs=2, axis=1)
            value = g.op("Concat", f"{split[:-1]}1", split, axis=1)
        elif kind == "mul":
            value = g.op("Mul", value, g.weight(f"factor{index}", 1, width, 1, 1))
        else:
            value = g.op("AveragePool", value, kernel_shape=[3, 3], pads=[1] * 4)
    return g, outlier_conv(g, value, 8, width, "last")


@pytest.mark.whole
@settings(max_examples=25, deadline=None)
@given(chains())
def test_no_chain_of_operators_changes(tmp_path_factory: pytest.TempPathFactory, chain: tuple[Graph, str]) -> None:
    g, end = chain
    path = g.save(tmp_path_factory.mktemp("chain") / "float.onnx", end)
    moved, _ = smoothed(path, images_of(1, 8, 8, 8))
    assert all(item.gain_db > 0 and (item.scale > 0).all() for item in moved)


@pytest.mark.parametrize(("op_type", "attributes", "shape"), [
    ("MatMul", {}, (6, 4)),
    ("Gemm", {"transB": 0}, (6, 4)),
    ("Gemm", {"transB": 1, "alpha": 0.5}, (4, 6)),
    ("Conv", {"group": 1}, (4, 6, 1, 1)),
    ("Conv", {"group": 2}, (4, 3, 1, 1)),
    ("Conv", {"group": 6}, (12, 1, 1, 1)),
])  # fmt: skip
def test_a_readers_view_of_its_weight(op_type: str, attributes: dict[str, float], shape: tuple[int, ...]) -> None:
    """The layer itself, on one position, says what each input channel and a constant input give."""
    from resvit_quantize.torch_graph.graph import attributes_of
    from resvit_quantize.torch_graph.operators import OPERATORS

    torch = pytest.importorskip("torch")
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    node = ir.node(op_type, [ir.Value(name="x"), ir.Value(name="w")], attributes)
    reader, mean = Reader(node, weight), np.arange(1.0, 7.0, dtype=np.float32)

    def layer(x: np.ndarray, array: np.ndarray) -> np.ndarray:
        x = x.reshape(-1, 6, 1, 1) if op_type == "Conv" else x
        result = OPERATORS[op_type]([torch.from_numpy(x), torch.from_numpy(array)], attributes_of(node))
        return np.asarray(result.reshape(len(x), -1).numpy())

    alpha = attributes.get("alpha", 1.0)
    np.testing.assert_allclose(reader.mean_output(mean), layer(mean[None], weight)[0], rtol=1e-5)
    energy = np.square(layer(np.eye(6, dtype=np.float32), weight) / alpha).sum(1)
    np.testing.assert_allclose(np.square(reader.by_input()).sum(1), energy, rtol=1e-5)
    scaled = reader.scaled(mean).astype(np.float32)
    np.testing.assert_allclose(layer(np.ones((1, 6), np.float32), scaled), layer(mean[None], weight), rtol=1e-5)


def test_what_cannot_be_told_is_fixed(tmp_path: Path) -> None:
    """A tensor that is asked for along an axis that mixes variables is free nowhere."""
    g = Graph(2, 8, 8, 8)
    path = g.save(tmp_path / "float.onnx", g.op("Relu", outlier_conv(g, "input", 16, 8, "first"), name="relu"))
    network = network_from_onnx(path)
    value = next(node for node in network.graph if node.op_type == "Relu").outputs[0]
    flow = channel_flow(network, {value: 2})
    assert not flow.tensors
    assert not flow.free[np.unique(flow.written[0].variables)].any()
