"""Known faults of TensorRT: each pattern with and without, by target and release; the copy; what is said where."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from deformable_graphs import graph as deformable_graph
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.choice import with_tensorrt
from resvit_engines.targets.faults import (
    FAULTS,
    Fault,
    Pattern,
    faults_of,
    is_rewritten,
    open_faults,
    releases_without,
    warnings_for,
)
from resvit_engines.targets.software import CUDA_OF_TENSORRT, version_of
from resvit_engines.targets.table import TARGETS, Builder, find_target
from resvit_export.cli.main import cli
from resvit_export.to_tensorrt.copy import onnx_for_tensorrt
from resvit_export.to_tensorrt.fault_patterns import found_from_json, found_to_json, patterns_in
from resvit_export.tools.known_faults import fault_checks

TOKENS, WIDTH, SIDE = 16, 8, 4
ORIN = find_target("jetson-orin")


def attention(
    path: Path,
    *,
    scaled: str = "queries",
    reduced: bool = False,
    constant_queries: bool = False,
    split: bool = False,
    softmax: bool = True,
) -> Path:
    """One head over [1, 16 tokens, 8] behind a LayerNorm, in opset 20, and a copy of the image as second output."""
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "gain": np.ones(WIDTH, np.float32),
        "wq": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "wk": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "wv": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "root": np.array(WIDTH**-0.25, np.float32),
        "inverse": np.array([WIDTH**0.25], np.float32),
    }
    nodes = [helper.make_node("LayerNormalization", ["x", "gain"], ["normed"], name="norm")]
    keys_of = "normed"
    if reduced:
        weights |= {
            "to_map": np.array([1, WIDTH, SIDE, SIDE], np.int64),
            "to_tokens": np.array([1, WIDTH, -1], np.int64),
            "reduce": random.standard_normal((WIDTH, WIDTH, 2, 2)).astype(np.float32),
        }
        nodes += [
            helper.make_node("Transpose", ["normed"], ["turned"], perm=[0, 2, 1]),
            helper.make_node("Reshape", ["turned", "to_map"], ["map"]),
            helper.make_node("Conv", ["map", "reduce"], ["small"], name="reduction", strides=[2, 2]),
            helper.make_node("Reshape", ["small", "to_tokens"], ["few"]),
            helper.make_node("Transpose", ["few"], ["fewer"], perm=[0, 2, 1]),
        ]
        keys_of = "fewer"
    nodes += [helper.make_node("MatMul", [keys_of, "wk"], ["k"], name="k")]
    if constant_queries:
        weights["q"] = random.standard_normal((1, 1, WIDTH)).astype(np.float32)
    else:
        nodes.append(helper.make_node("MatMul", ["normed" if split else "x", "wq"], ["q"], name="q"))
    nodes.append(helper.make_node("MatMul", [keys_of if split else "x", "wv"], ["v"], name="v"))
    queries, keys = "q", "k"
    if scaled in ("queries", "both") and not constant_queries:
        nodes.append(helper.make_node("Mul", ["q", "root"], ["q_scaled"], name="scale_q"))
        queries = "q_scaled"
    if scaled == "both":
        nodes.append(helper.make_node("Div", ["k", "inverse"], ["k_scaled"], name="scale_k"))
        keys = "k_scaled"
    nodes += [
        helper.make_node("Transpose", [keys], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", [queries, "kt"], ["scores"], name="scores"),
        helper.make_node("Softmax" if softmax else "Sigmoid", ["scores"], ["shares"], name="softmax"),
        helper.make_node("MatMul", ["shares", "v"], ["y"], name="mix"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, TOKENS, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None, WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def sampling(path: Path, mode: str) -> Path:
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 4, 8, 8]), ("grid", [1, 5, 5, 2]), ("y", [1, 4, 5, 5]))
    ]
    graph = helper.make_graph(
        [helper.make_node("GridSample", ["x", "grid"], ["y"], "sample", mode=mode)], "graph", infos[:2], infos[2:]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("pattern", "there", "absent"),
    [
        (Pattern.ATTENTION, {}, {"softmax": False}),
        (Pattern.BOTH_SCALED, {"scaled": "both"}, {"scaled": "queries"}),
        (Pattern.REDUCED_KEYS, {"reduced": True, "split": True}, {"split": True}),
        (Pattern.CONSTANT_QUERY, {"constant_queries": True}, {}),
        (Pattern.SHARED_INPUT, {"split": True}, {}),
    ],
    ids=lambda value: value.name if isinstance(value, Pattern) else "",
)
def test_each_pattern_of_attention_is_found_where_it_is_and_nowhere_else(
    tmp_path: Path, pattern: Pattern, there: dict[str, bool], absent: dict[str, bool]
) -> None:
    found = patterns_in(attention(tmp_path / "there.onnx", **there))  # type: ignore[arg-type]
    assert pattern in found
    assert found[pattern][0] in {"scores", "norm"}
    assert pattern not in patterns_in(attention(tmp_path / "absent.onnx", **absent))  # type: ignore[arg-type]
    assert found_from_json(json.loads(json.dumps(found_to_json(found)))) == found


def test_a_patch_embedding_in_front_of_queries_and_keys_is_no_reduction(tmp_path: Path) -> None:
    """The stem's strided convolution leads to both sides of the first block."""
    model = onnx.load(attention(tmp_path / "model.onnx", split=True))
    stem = helper.make_node("Conv", ["image", "patch"], ["patches"], name="stem", strides=[2, 2])
    flat = helper.make_node("Reshape", ["patches", "rows"], ["flat"])
    turned = helper.make_node("Transpose", ["flat"], ["x"], perm=[0, 2, 1])
    graph = helper.make_graph(
        [stem, flat, turned, *model.graph.node],
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        list(model.graph.output),
        [
            *model.graph.initializer,
            numpy_helper.from_array(np.zeros((WIDTH, 3, 2, 2), np.float32), "patch"),
            numpy_helper.from_array(np.array([1, WIDTH, -1], np.int64), "rows"),
        ],
    )
    path = tmp_path / "stem.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    found = patterns_in(path)
    assert Pattern.ATTENTION in found
    assert Pattern.REDUCED_KEYS not in found


@pytest.mark.parametrize(("mode", "new"), [("linear", True), ("cubic", True), ("nearest", False)])
def test_the_words_of_sampling(tmp_path: Path, mode: str, new: bool) -> None:
    assert (Pattern.SAMPLING_WORDS in patterns_in(sampling(tmp_path / "model.onnx", mode))) is new


def test_deformable_attention_is_found_and_plain_sampling_is_not(tmp_path: Path) -> None:
    ir.save(deformable_graph(), tmp_path / "model.onnx")
    assert Pattern.DEFORMABLE in patterns_in(tmp_path / "model.onnx")
    assert Pattern.DEFORMABLE not in patterns_in(sampling(tmp_path / "plain.onnx", "linear"))


def test_of_the_copy_only_what_is_left_is_told(tmp_path: Path) -> None:
    ir.save(deformable_graph(), tmp_path / "model.onnx")
    target = find_target("jetson-thor@7.2")
    assert onnx_for_tensorrt(tmp_path / "model.onnx", tmp_path / "copy.onnx", target)
    left = patterns_in(tmp_path / "copy.onnx")
    assert not {Pattern.DEFORMABLE, Pattern.SAMPLING_WORDS} & set(left)
    assert warnings_for(target, left, copied=True) == ()
    # What could not be rewritten is still there, and is told.
    before = patterns_in(tmp_path / "model.onnx")
    assert warnings_for(target, before) == ()
    assert any("GridSample" in sentence for sentence in warnings_for(target, before, copied=True))


@pytest.mark.parametrize(("release", "joined"), [("10.3", False), ("10.7", True)])
def test_queries_alone_are_scaled_for_the_release_that_errs_on_both(tmp_path: Path, release: str, joined: bool) -> None:
    model = attention(tmp_path / "model.onnx", scaled="both")
    target = with_tensorrt(ORIN, release)
    assert onnx_for_tensorrt(model, tmp_path / "copy.onnx", target) is joined
    if joined:
        assert Pattern.BOTH_SCALED not in patterns_in(tmp_path / "copy.onnx")
        assert [node.name for node in onnx.load(tmp_path / "copy.onnx").graph.node if "scale" in node.name] == [
            "scale_q"
        ]
        x = np.random.default_rng(1).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
        was, now = (
            onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for path in (model, tmp_path / "copy.onnx")
        )
        np.testing.assert_allclose(now, was, rtol=1e-4, atol=1e-5)


def test_scales_that_others_read_or_that_are_no_scalars_stay(tmp_path: Path) -> None:
    target = with_tensorrt(ORIN, "10.7")
    model = onnx.load(attention(tmp_path / "model.onnx", scaled="both"))
    model.graph.output.append(helper.make_tensor_value_info("k_scaled", TensorProto.FLOAT, [1, TOKENS, WIDTH]))
    onnx.save(model, tmp_path / "read.onnx")
    assert not onnx_for_tensorrt(tmp_path / "read.onnx", tmp_path / "copy.onnx", target)
    model = onnx.load(tmp_path / "model.onnx")
    (scale,) = [item for item in model.graph.initializer if item.name == "inverse"]
    scale.CopyFrom(numpy_helper.from_array(np.ones(WIDTH, np.float32), "inverse"))
    onnx.save(model, tmp_path / "vector.onnx")
    assert not onnx_for_tensorrt(tmp_path / "vector.onnx", tmp_path / "copy.onnx", target)


def test_rows_are_of_releases_that_are_served() -> None:
    for fault in FAULTS:
        first, last = version_of(fault.first), version_of(fault.last)
        assert first <= last <= max(map(version_of, CUDA_OF_TENSORRT))
        assert fault.fixed is None or version_of(fault.fixed) > last
        assert fault.references
        assert all("#" in reference for reference in fault.references)
        assert any(fault.threatens(version, sm) for version in CUDA_OF_TENSORRT for sm in fault.sms or {87})
        assert fault.way_out or fault.rewritten or fault.fixed


def test_tensorrt_for_rtx_has_none() -> None:
    everything = dict.fromkeys(Pattern, ("node",))
    for target in TARGETS:
        if target.builder is Builder.RTX:
            assert faults_of(target) == ()
            assert warnings_for(target, everything, 8) == ()
            assert not any(is_rewritten(target, pattern) for pattern in Pattern)


def test_jetpack_6_is_told_which_tensorrt_to_move_to() -> None:
    found = {Pattern.ATTENTION: ("a", "b", "c"), Pattern.BOTH_SCALED: ("a",), Pattern.SAMPLING_WORDS: ("s",)}
    (sentence,) = warnings_for(ORIN, found)
    assert "TensorRT 10.3" in sentence
    assert "attention (a and 2 more)" in sentence
    assert "NVIDIA/TensorRT#4419" in sentence
    assert releases_without(ORIN, found) == ("--tensorrt 10.7", "--jetpack 7.2, whose image has TensorRT 10.16")
    assert sentence.endswith("Way out: --tensorrt 10.7, or --jetpack 7.2, whose image has TensorRT 10.16.")
    assert warnings_for(with_tensorrt(ORIN, "10.7"), found) == ()
    assert warnings_for(find_target("jetson-orin@7.2"), found) == ()


def test_a_release_with_another_fault_of_the_same_graph_is_no_way_out() -> None:
    target = dataclasses.replace(find_target("rtx-5090"), builder=Builder.TENSORRT, tensorrt="10.3")
    assert releases_without(target, {Pattern.ATTENTION})[0] == "--tensorrt 10.8"
    assert releases_without(target, {Pattern.ATTENTION, Pattern.REDUCED_KEYS}, 4)[0] == "--tensorrt 10.8"
    segformer = dataclasses.replace(target, sm=86, tensorrt="11.4")
    assert releases_without(segformer, {Pattern.REDUCED_KEYS, Pattern.ATTENTION}, 4)[0] == "--tensorrt 10.10"


@pytest.mark.parametrize(("batch", "told"), [(1, False), (2, True), (8, True)])
def test_a_fault_of_batches_is_told_where_the_profile_has_them(batch: int, told: bool) -> None:
    assert bool(open_faults(find_target("l4"), {Pattern.REDUCED_KEYS}, batch)) is told
    thor = find_target("jetson-thor")
    assert bool(open_faults(thor, {Pattern.SHARED_INPUT}, batch)) is not told
    assert not open_faults(ORIN, {Pattern.SHARED_INPUT}, batch)


def test_a_release_after_the_last_report_is_warned_about_and_one_known_to_be_right_is_not() -> None:
    (sentence,) = warnings_for(find_target("l4"), {Pattern.DEFORMABLE: ("d",)})
    assert "no later release is known to be right" in sentence
    assert not any(fault.threatens("10.5", 87) for fault in FAULTS if fault.fixed == "10.5")


def test_doctor_lists_a_target_and_looks_into_a_graph(tmp_path: Path) -> None:
    listed = fault_checks("jetson-orin")
    assert len(listed) == len(faults_of(ORIN))
    assert {check.state for check in listed} == {"ok", "warn"}
    model = attention(tmp_path / "model.onnx")
    (found,) = fault_checks("jetson-orin", None, model)
    assert found.state == "warn"
    assert "scores" in found.found
    assert "--tensorrt 10.7" in found.fix
    (clean,) = fault_checks("jetson-orin", "10.7", model)
    assert clean.state == "ok"
    assert fault_checks("rtx-4090")[0].state == "ok"
    with pytest.raises(ResvitError) as caught:
        fault_checks("jetson-orin", None, tmp_path / "none.onnx")
    assert caught.value.code == ExitCode.INPUT
    with pytest.raises(ResvitError) as caught:
        fault_checks("jetson-orin", "10.4")
    assert caught.value.code == ExitCode.IMPOSSIBLE


def test_the_command_doctor_takes_a_graph_only_with_a_target(tmp_path: Path) -> None:
    model = attention(tmp_path / "model.onnx")
    shown = CliRunner().invoke(cli, ["doctor", "--json", "--target", "jetson-orin", "--onnx", str(model)])
    assert shown.exit_code in (ExitCode.OK, ExitCode.MISSING)
    assert json.loads(shown.stdout)["checks"][-1]["name"] == "TensorRT 10.3"
    with pytest.raises(ResvitError, match="belong to --target"):
        CliRunner().invoke(cli, ["doctor", "--onnx", str(model)], catch_exceptions=False)


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (Path(__file__).parent.parent / "docs" / "faults.md").read_text()
    rows = [row for row in text.partition("<!-- table -->")[2].partition("<!-- end -->")[0].split("\n") if row]
    assert rows == [*HEAD, *map(documented, FAULTS)]


HEAD = (
    "| the graph has | taken for TensorRT | seen in | on | what goes wrong | way out | reports |",
    "|---|---|---|---|---|---|---|",
)


def documented(fault: Fault) -> str:
    """The row of docs/faults.md."""
    low, high = fault.batch
    where = [f"SM {sm / 10:.1f}" for sm in sorted(fault.sms or ())]
    where += [] if (low, high) == (1, None) else ["batch 1" if high == 1 else f"batches from {low} on"]
    links = ", ".join(
        f"[{reference}](https://github.com/{reference.replace('#', '/issues/')})" for reference in fault.references
    )
    until = f"to {fault.last}; right from {fault.fixed} on" if fault.fixed else f"to {fault.last}"
    done = [f"done here: {fault.rewritten}"] if fault.rewritten else []
    newer = [f"TensorRT {fault.fixed}"] if fault.fixed else []
    cells = (
        str(fault.pattern),
        f"{fault.first} {until}",
        fault.seen,
        ", ".join(where) or "any GPU",
        fault.what,
        "; ".join([*done, *newer, *filter(None, [fault.way_out])]),
        links,
    )
    return f"| {' | '.join(cells)} |"
