"""The comparison's own logic: what it counts, what it coarsens, what it prints; and our own row, which is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from quantize_graphs import Graph
from resvit_engines.errors import ResvitError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """Conv 1→4 on 8x8 (2,304 multiply-accumulates), then a linear layer 64→10 per channel (2,560)."""
    graph = Graph("batch", 1, 8, 8)
    mapped = graph.conv("input", 4, 1, name="conv")
    rows = graph.op("Reshape", mapped, graph.ints(-1, 4, 64), name="reshape")
    return graph.save(tmp_path / "float.onnx", graph.linear(rows, 64, 10, "fc"))


def quantised(network: Path, out: Path, *products: str, dtype: Any = np.int8, rename: bool = False) -> Path:
    """Put Q/DQ in front of both operands of ``products``, weights stored, as a foreign quantiser would."""
    model = onnx.load(network)
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(0.05), "s"), numpy_helper.from_array(np.zeros((), dtype), "z")]
    )
    nodes = []
    for node in model.graph.node:
        if node.name in products:
            for index, name in enumerate(list(node.input[:2])):
                stored = f"{node.name}/{index}"
                if name in weights:
                    whole = np.clip(np.rint(weights[name] / 0.05), -127, 127).astype(dtype)
                    model.graph.initializer.append(numpy_helper.from_array(whole, f"{stored}/q"))
                else:
                    nodes.append(helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{stored}/q"]))
                back = [f"{stored}/dq"]
                nodes.append(helper.make_node("DequantizeLinear", [f"{stored}/q", "s", "z"], back, name=f"{stored}/DQ"))
                node.input[index] = back[0]
        if rename:
            node.name = f"renamed_{node.name}"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    model.opset_import[0].version = 21
    onnx.checker.check_model(model)
    onnx.save(model, out)
    return out


def test_coverage_counts_products_that_read_8_bits_on_both_sides(network: Path, tmp_path: Path) -> None:
    from peers.coverage import coverage, weighted_macs

    assert weighted_macs(network) == [("conv", 2304), ("fc/MatMul", 2560)]
    both = coverage(network, quantised(network, tmp_path / "q.onnx", "conv", "fc/MatMul"))
    assert (both.share, both.left) == (1.0, ())
    one = coverage(network, quantised(network, tmp_path / "q.onnx", "conv"))
    assert one.share == pytest.approx(2304 / 4864)
    assert one.left == ("fc/MatMul",)
    assert coverage(network, network).share == 0.0


def test_coverage_finds_renamed_nodes_by_their_weights(network: Path, tmp_path: Path) -> None:
    from peers.coverage import coverage

    graph = onnx.load(quantised(network, tmp_path / "q.onnx", "fc/MatMul", rename=True))
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [n if n in ("input", "logits") or n in {i.name for i in graph.graph.initializer} else f"v/{n}"
                        for n in names]  # fmt: skip
    onnx.save(graph, tmp_path / "renamed.onnx")
    assert coverage(network, tmp_path / "renamed.onnx").left == ("conv",)


def test_coverage_does_not_count_16_bits_nor_one_side_alone(network: Path, tmp_path: Path) -> None:
    from peers.coverage import coverage

    wide = quantised(network, tmp_path / "wide.onnx", "conv", "fc/MatMul", dtype=np.int16)
    assert coverage(network, wide).share == 0.0
    graph = onnx.load(quantised(network, tmp_path / "q.onnx", "conv"))
    convolution = next(node for node in graph.graph.node if node.name == "conv")
    convolution.input[0] = "input"
    onnx.save(graph, tmp_path / "half.onnx")
    assert coverage(network, tmp_path / "half.onnx").share == 0.0


@pytest.mark.whole
@given(
    bits=st.integers(2, 8),
    scale=st.floats(1e-4, 10),
    zero=st.one_of(st.integers(-128, 127).map(np.int8), st.integers(0, 255).map(np.uint8)),
)
def test_a_coarse_grid_keeps_the_range_and_holds_zero(bits: int, scale: float, zero: Any) -> None:
    from peers.coarsen import coarse_grid

    grid = coarse_grid(np.float32(scale), np.asarray(zero), bits)
    assert grid.high - grid.low <= 2**bits - 1
    assert grid.low <= int(grid.zero) <= grid.high
    low, high = (float(end) for end in grid.limits)
    symmetric = zero.dtype == np.int8 and zero == 0
    first, last = (-127, 127) if symmetric else (-128, 127) if zero.dtype == np.int8 else (0, 255)
    # Rounding the zero point moves an asymmetric range by half a coarse step.
    step = float(grid.scale)
    assert low == pytest.approx((first - int(zero)) * scale, abs=0.51 * step)
    assert high == pytest.approx((last - int(zero)) * scale, abs=0.51 * step)
    assert step == pytest.approx(scale * (127 / (2 ** (bits - 1) - 1) if symmetric else 255 / (2**bits - 1)))


def test_coarsening_leaves_few_levels_and_rounds_the_float_weights_again(network: Path, tmp_path: Path) -> None:
    from peers.coarsen import coarsen

    graph = onnx.load(network)
    whole = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    notes = coarsen(quantised(network, tmp_path / "q.onnx", "conv", "fc/MatMul"), network, tmp_path / "c.onnx", 3)
    assert notes == []
    coarse = onnx.load(tmp_path / "c.onnx")
    constants = {i.name: numpy_helper.to_array(i) for i in coarse.graph.initializer}
    stored = {node.name: node for node in coarse.graph.node if node.op_type == "DequantizeLinear"}
    step = 0.05 * 127 / 3
    for name, weight in (("conv/1/DQ", "conv.weight"), ("fc/MatMul/1/DQ", "fc.weight")):
        found, scale = (constants[i] for i in stored[name].input[:2])
        assert float(scale) == pytest.approx(step)
        assert np.array_equal(found, np.clip(np.rint(whole[weight] / scale), -3, 3))
    # The Q behind the input: images beyond the range end on its outermost level.
    quantise = next(node for node in coarse.graph.node if node.op_type == "QuantizeLinear")
    coarse.graph.output.append(helper.make_tensor_value_info(quantise.output[0], TensorProto.INT8, None))
    import onnxruntime

    session = onnxruntime.InferenceSession(coarse.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.linspace(-20, 20, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    levels = session.run([quantise.output[0]], {"input": images})[0]
    assert np.array_equal(levels, np.clip(np.rint(images / np.float32(step)), -3, 3))


def test_coarsening_says_where_the_float_weights_are_not_found(network: Path, tmp_path: Path) -> None:
    from peers.coarsen import coarsen

    other = Graph("batch", 1, 8, 8)
    other.save(tmp_path / "other.onnx", other.op("Relu", "input"))
    notes = coarsen(quantised(network, tmp_path / "q.onnx", "conv"), tmp_path / "other.onnx", tmp_path / "c.onnx", 5)
    assert len(notes) == 1
    assert notes[0].startswith("1 constants rounded again")


def stored_images(folder: Path, count: int) -> Any:
    from peers.images import store_images

    from resvit_calibrate.images.indexed import IndexedImageSet
    from resvit_calibrate.images.pixels import ArrayPixels
    from resvit_calibrate.images.preprocess import Preprocess

    pixels = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
    labels = np.arange(count, dtype=np.int64) % 3
    preprocess = Preprocess(size=(4, 4), channels=1)
    return store_images(IndexedImageSet(ArrayPixels("made", pixels, labels), range(count), preprocess), folder, 3)


def test_stored_images_come_back_as_they_were(tmp_path: Path) -> None:
    images = stored_images(tmp_path / "s", 7)
    batches = list(images.batches(3))
    assert [len(batch.images) for batch in batches] == [3, 3, 1]
    joined = np.concatenate([batch.images for batch in batches])
    assert np.allclose(joined.reshape(-1) * 255, np.arange(112))
    assert np.array_equal(images.labels, np.arange(7) % 3)
    written = (tmp_path / "s" / "images.f32").stat().st_mtime_ns
    stored_images(tmp_path / "s", 7)
    assert (tmp_path / "s" / "images.f32").stat().st_mtime_ns == written
    assert len(stored_images(tmp_path / "s", 5)) == 5


def test_stored_images_without_some_are_the_others(tmp_path: Path) -> None:
    images = stored_images(tmp_path / "s", 7)
    others = images.without(frozenset(images.contents[:2] + images.contents[4:5]))
    assert [int(label) for label in others.labels] == [2, 0, 2, 0]
    every, kept = (np.concatenate([batch.images for batch in some.batches(3)]) for some in (images, others))
    assert np.array_equal(kept, every[[2, 3, 5, 6]])
    assert others.digest != images.digest
    assert others.contents == tuple(images.contents[at] for at in (2, 3, 5, 6))


def test_a_reader_gives_every_image_once_whole_or_in_ranges(tmp_path: Path) -> None:
    from peers.images import Reader

    reader = Reader(stored_images(tmp_path, 7), "input", 2)
    first = reader.get_first()["input"]
    whole = []
    while (feed := reader.get_next()) is not None:
        whole.append(feed["input"])
    assert np.array_equal(first, whole[0])
    in_ranges = []
    for index in range(len(reader)):
        reader.set_range(index, index + 1)
        while (feed := reader.get_next()) is not None:
            in_ranges.append(feed["input"])
    assert [len(part) for part in in_ranges] == [2, 2, 2, 1]
    assert np.array_equal(np.concatenate(in_ranges), np.concatenate(whole))


@pytest.mark.parametrize("name", ["ours-fast", "ours-best", "ours-fast-no-smoothing"])
def test_our_own_row_quantises(name: str, tmp_path: Path) -> None:
    from peers import ours
    from peers.methods import BY_NAME, Job

    graph = Graph("batch", 1, 4, 4)
    mapped = graph.conv("input", 8, 1, name="conv")
    model = graph.save(tmp_path / "float.onnx", graph.op("Reshape", mapped, graph.ints(-1, 128), name="reshape"))
    images = stored_images(tmp_path / "s", 9)
    job = Job(model, "resvit:embed-nano", None, images, 3, "int8", 8, tmp_path / "model.onnx")
    ours.work(job, BY_NAME[name].settings).run()
    assert "QuantizeLinear" in [node.op_type for node in onnx.load(job.out).graph.node]


def test_a_line_is_read_without_repeats_and_blanks() -> None:
    from peers.lines import read_line

    assert read_line(np.array([0, 5, 5, 0, 5, 7, 7, 0])) == [5, 5, 7]
    assert read_line(np.zeros(4, int)) == []


def test_lines_are_compared_with_the_float_ones_and_with_their_texts(tmp_path: Path) -> None:
    from peers.lines import compare_lines, store_texts

    images = stored_images(tmp_path / "s", 4)
    (tmp_path / "texts.json").write_text('["ab", "a b", "b", "a", "more"]')
    (tmp_path / "characters.txt").write_text("a\nb\n")
    store_texts(tmp_path / "texts.json", tmp_path / "characters.txt", tmp_path / "s", 4)
    assert json.loads((tmp_path / "s" / "texts.json").read_text()) == [[1, 2], [1, 3, 2], [2], [1]]
    read = [[1, 0, 2], [1, 3, 2], [2, 2, 0], [0, 0, 0]]

    def answers(feeds: dict[str, np.ndarray], wrong: bool) -> dict[str, np.ndarray]:
        rows = [read[int(image[0, 0, 0] * 255) // 16] for image in feeds["input"]]
        logits = np.eye(4, dtype=np.float32)[np.array(rows)]
        return {"out": logits[:, ::-1] if wrong else logits}

    compared = compare_lines(lambda feeds: answers(feeds, False), lambda feeds: answers(feeds, True), images,
                             tmp_path / "s", 3)  # fmt: skip
    assert (compared["agreement"], compared["reference_top1"], compared["top1"], compared["drop"]) == (
        0.5,
        0.75,
        0.25,
        50,
    )
    with pytest.raises(ResvitError, match=r"lacks e m o r\."):
        store_texts(tmp_path / "texts.json", tmp_path / "characters.txt", tmp_path / "s", 5)


def row(name: str, agreement: float, *, share: float = 1.0, drop: float = 0.0, status: str = "ok") -> dict[str, Any]:
    numbers = {"top1": 0.9, "interval": [-0.1, 0.1], "sqnr_db": 41.0, "seconds": 1.0, "peak_mib": 100.0}
    known = {"name": name, "label": name.title(), "precision": "int8", "bits": 8, "status": status, "reason": "it fell"}
    shares = {"macs_share": share, "attention_share": 0.0}
    return {**known, **numbers, **shares, "agreement": agreement, "drop": drop, "notes": ["remark"]}


def test_the_table_marks_the_best_of_full_coverage_and_shows_failures() -> None:
    from peers.table import markdown

    rows = [row("ours-fast", 0.998), row("narrow", 0.9999, share=0.5), row("fallen", 0.0, status="failed")]
    text = markdown(rows, accurate=True)
    assert "**99.80**" in text
    assert "**99.99**" not in text
    assert "| Fallen | failed: it fell |" in text
    assert "top-1" not in markdown(rows, accurate=False)
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_goals_name_the_peers_that_agree_as_much() -> None:
    from peers.table import goals

    rows = [row("ours-fast", 0.998, drop=0.2), row("better", 0.999), row("narrow", 0.9999, share=0.5)]
    (found,) = goals(rows)
    assert found["peers_that_agree_as_much"] == ["better"]
    assert (found["coverage"], found["drop"], found["agreement"], found["sqnr"]) == (True, False, True, True)


def test_rows_are_of_falling_bits_and_the_control_is_not_at_8() -> None:
    from peers.methods import rows_of

    rows = [(method.name, precision, bits) for method, precision, bits in rows_of((), (5, 8))]
    assert ("ours-coarsened", "int8", 8) not in rows
    assert ("ours-coarsened", "int8", 5) in rows
    assert not any(precision == "fp8" and bits != 8 for _, precision, bits in rows)
    assert [bits for _, precision, bits in rows if precision == "int8"] == sorted(
        (bits for _, precision, bits in rows if precision == "int8"), reverse=True
    )
    assert not [r for r in rows_of((), (5,)) if r[1] == "fp8"]


@pytest.mark.whole
def test_a_quantiser_that_falls_is_a_reason(tmp_path: Path) -> None:
    from peers.children import Task, run_child

    stored_images(tmp_path / "images", 3)
    task = Task("ours-fast", "int8", 8, 8, str(tmp_path / "none.onnx"), "", None, str(tmp_path / "images"),
                str(tmp_path / "images"), "", 2, str(tmp_path / "work"))  # fmt: skip
    assert "none.onnx" in run_child("make", task, limit=120)["failed"]


def test_perturbed_weights_are_the_same_every_time_and_uneven() -> None:
    import torch
    from peers.cases import perturb
    from torch import nn

    def gains() -> torch.Tensor:
        module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(4096))
        perturb(module, torch.Generator().manual_seed(0))
        return module[1].weight.detach()

    assert torch.equal(gains(), gains())
    assert float(gains().max()) > 5 * float(gains().median())


def test_attention_in_fp8_rounds_what_its_products_read_and_nothing_else(tmp_path: Path) -> None:
    import onnx_ir as ir
    from attention_fp8 import SHIPPED, WAYS, answers, blocks_of, insert

    from quantize_graphs import batches, hybrid
    from resvit_calibrate.ranges.collect import collect_statistics
    from resvit_calibrate.runtime.runner import onnx_runner
    from resvit_quantize.graph.network import network_from_onnx

    path = hybrid(tmp_path / "float.onnx")
    images = np.random.default_rng(0).standard_normal((40, 3, 16, 16)).astype(np.float32)
    statistics = collect_statistics(path, batches(images))
    blocks = blocks_of(network_from_onnx(path))
    runners, scales = {SHIPPED: onnx_runner(path)}, {}
    for name, way in WAYS.items():
        network = ir.load(path)
        insert(network, path, statistics, way)
        pairs = [node for node in network.graph if node.op_type == "QuantizeLinear"]
        rounded = (way.shares is not None) + 3 * (way.others is not None)
        assert len(pairs) == rounded * len(blocks) > 0
        scales[name] = {str(node.name).split("/")[-2]: float(node.inputs[1].const_value.numpy()) for node in pairs}
        runners[name] = onnx_runner(bytes(ir.serde.serialize_model(network).SerializeToString()))
    assert scales["ModelOpt's: shares at 1/448"]["shares"] == pytest.approx(1 / 448, rel=1e-3)
    assert scales["ModelOpt's for diffusion: shares at 1"]["shares"] == 1.0
    assert scales["shares alone, at 1/448"].keys() == {"shares"}
    feeds = [{"input": images[at : at + 8]} for at in range(0, 40, 8)]
    found = answers(onnx_runner(path), runners, feeds, lines=False)
    assert found[SHIPPED].errors.sqnr_db > 100
    assert all(answer.same.shape == (40,) for answer in found.values())
    for name in WAYS:
        cell = found[name].cell(found[SHIPPED])
        assert 15 < cell["sqnr_db"] < 80
        assert cell["less_points"] == pytest.approx(100 * (1 - cell["same"]))


def test_decisions_are_classes_or_texts() -> None:
    from cpu_networks import decisions

    assert decisions(np.array([[0.1, 0.9], [0.8, 0.2]])) == [1, 0]
    steps = np.eye(4)[[[1, 1, 0, 1, 3, 3]]]  # [N, T, K]: a letter said twice, a blank, the same letter, another one
    assert decisions(steps) == [(1, 1, 3)]


def test_an_input_of_another_name_is_renamed_beside_the_file(network: Path) -> None:
    from cpu_networks import _with_input

    assert _with_input(network, "input") == network
    renamed = _with_input(network, "pixels")
    graph = onnx.load(renamed).graph
    assert [value.name for value in graph.input] == ["pixels"]
    assert not any("input" in node.input for node in graph.node)
    onnx.checker.check_model(renamed)


def test_the_peers_of_the_processor_are_methods_and_no_rows_of_the_other_comparison() -> None:
    from cpu_target import PEERS
    from peers.methods import BY_NAME, rows_of

    assert PEERS.keys() <= BY_NAME.keys()
    shown = {method.name for method, _, _ in rows_of((), (8,), ablation=True)}
    assert not {name for name in PEERS if "cpu" in name} & shown


def test_an_array_is_stored_as_the_peers_read_it(tmp_path: Path) -> None:
    from peers.images import Reader, store_array

    images = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)
    reader = Reader(store_array(images, tmp_path / "images"), "input", 1)
    assert np.array_equal(np.concatenate([reader.get_next()["input"] for _ in range(2)]), images)
