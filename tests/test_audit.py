"""The fusion audit: fates of Q/DQ by hand, and attention rules against what TensorRT for RTX really compiles."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from attention_graphs import ALL_PLACES, attention_graph
from resvit_engines.audit.attention_rules import breaches_of
from resvit_engines.audit.audit import audit_engine
from resvit_engines.audit.expectation import Attention, Consumer, Expectation, Plugin, QdqPair
from resvit_engines.audit.findings import Fate, FusionAudit, Subject
from resvit_engines.audit.kernels import Kernel
from resvit_engines.audit.record import audit_from_json, record_of
from resvit_engines.audit.text import failures_of, sentences_of
from resvit_engines.builder.builder import build_engine
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.targets.table import find_target
from resvit_export.to_tensorrt.expectation import expectation_from_onnx

pytestmark = pytest.mark.whole

SUBJECT = Subject("rtx-4090", 89, "TensorRT for RTX", "1.7", 1)
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed"
)


def kernel(name: str, kind: str, reads: str, writes: str, *layers: str, **more: Any) -> Kernel:
    """A kernel over tensors [1, 100] of the types named, such as ``Int8+Half``."""
    inputs, outputs = tuple(reads.split("+")), tuple(writes.split("+"))
    shapes = ((1, 100),)
    return Kernel(name, kind, inputs, outputs, shapes * len(inputs), shapes * len(outputs), layers, **more)


def pair(name: str, *consumers: Consumer, weight: bool = False) -> QdqPair:
    return QdqPair(name, None if weight else f"{name}/Q", f"{name}/DQ", "int8", weight, consumers)


CONV = Consumer("conv", "Conv", True)
ADD = Consumer("add", "Add", False)


def audit(*kernels: Kernel, pairs: tuple[QdqPair, ...] = (), io: tuple[str, ...] = (), **more: Any) -> FusionAudit:
    expectation = Expectation(pairs, more.pop("attention", ()), more.pop("plugins", ()))
    return audit_engine(SUBJECT, expectation, kernels, io, **more)


QUANTISE = kernel("__myl_MulMinMaxRounCast_myl0_0", "kgen", "Half", "Int8", "x/Q")
INT8_CONV = kernel("conv_myl0_1", "correlation", "Int8", "Half", "conv", "x/DQ")


@pytest.mark.parametrize(
    ("consumer", "kernels", "fate"),
    [
        (CONV, [INT8_CONV], Fate.CONSUMED),
        (CONV, [kernel("conv_myl0_1", "correlation", "Int8", "Half", "conv")], Fate.CONSUMED),
        # Dequantised on the way into an FP16 product.
        (CONV, [kernel("__myl_CastMulFc_myl0_1", "runtime_fusion", "Int8+Half", "Half", "conv", "x/DQ")], Fate.HIGHER),
        (
            CONV,
            [
                kernel("__myl_CastMul_myl0_1", "kgen", "Int8", "Half", "x/DQ"),
                kernel("conv_myl0_2", "correlation", "Half", "Half", "conv"),
            ],
            Fate.SEPARATE,
        ),
        (ADD, [kernel("__myl_CastMulAdd_myl0_1", "kgen", "Int8+Half", "Half", "add", "x/DQ")], Fate.CONSUMED),
        (ADD, [kernel("__myl_MulRounMulAdd_myl0_1", "kgen", "Half+Half", "Half", "x/Q", "add", "x/DQ")], Fate.INSIDE),
        (ADD, [kernel("Dequantize", "Reformat", "Int8", "Half", "x/DQ")], Fate.SEPARATE),
        (CONV, [kernel("other", "kgen", "Half", "Half", "elsewhere")], Fate.UNLISTED),
        # What moves the 8-bit tensor does not dequantise it.
        (
            CONV,
            [
                kernel("Transpose", "Reformat", "Int8", "Int8", "x/DQ"),
                kernel("conv_myl0_1", "correlation", "Half", "Half", "conv"),
            ],
            Fate.HIGHER,
        ),
    ],
)
def test_the_fate_of_a_pair(consumer: Consumer, kernels: list[Kernel], fate: Fate) -> None:
    (found,) = audit(*kernels, pairs=(pair("x", consumer),)).pairs
    assert found.fate is fate


def test_of_several_readers_the_worst_counts() -> None:
    unfused = kernel("Dequantize", "Reformat", "Int8", "Half", "x/DQ")
    (found,) = audit(INT8_CONV, unfused, pairs=(pair("x", CONV, ADD),)).pairs
    assert [fate for _, fate, _ in found.readers] == [Fate.CONSUMED, Fate.SEPARATE]
    assert found.fate is Fate.SEPARATE


def test_a_quantiser_of_its_own_is_told_and_does_not_fail() -> None:
    found = audit(QUANTISE, INT8_CONV, pairs=(pair("x", CONV),))
    assert found.pairs[0].alone == QUANTISE.name
    assert any("1 kernel only quantises" in text and "x" in text for text in sentences_of(found))
    assert failures_of(found) == ()
    fused = kernel("__myl_ReluMulMinMaxRounCast_myl0_0", "kgen", "Half", "Int8", "relu", "x/Q")
    assert audit(fused, INT8_CONV, pairs=(pair("x", CONV),)).pairs[0].alone == ""


def test_fp32_is_counted_between_kernels_and_not_at_the_networks_ends() -> None:
    first = kernel("cast", "kgen", "Float", "Half", "in/Cast", input_names=("image",), output_names=("a",))
    middle = kernel("norm", "kgen", "Half", "Float", "norm", input_names=("a",), output_names=("b",))
    last = kernel("head", "kgen", "Float", "Float", "norm", "fc", input_names=("b",), output_names=("logits",))
    found = audit(first, middle, last, io=("image", "logits"))
    assert [(moved.kernel, moved.what) for moved in found.fp32] == [("norm", "writes FP32"), ("head", "reads FP32")]
    assert "2 kernels read or write FP32 between layers: norm." in sentences_of(found)


def test_reformats_say_what_they_do() -> None:
    kernels = [
        QUANTISE,
        kernel("__myl_CastMul_myl0_1", "kgen", "Int8", "Half"),
        kernel("__myl_Cast_myl0_2", "kgen", "Float", "Half"),
        kernel("__myl_Tran_myl0_3", "kgen", "Half", "Half"),
    ]
    found = audit(*kernels)
    assert [moved.what for moved in found.reformats] == ["quantises", "dequantises", "converts", "moves"]
    assert found.totals.reformats == 4


def test_plugins_that_are_missing_fail() -> None:
    there = kernel("attn/ResvitAttention", "PluginV3", "Half", "Half", "attn/ResvitAttention")
    plugins = (Plugin("attn/ResvitAttention", "ResvitAttention"), Plugin("b/ResvitNorm", "ResvitNorm"))
    found = audit(there, plugins=plugins)
    assert (found.plugin_layers, [plugin.node for plugin in found.plugins_missing]) == (1, ["b/ResvitNorm"])
    with pytest.raises(ResvitError, match="b/ResvitNorm"):
        record_of(found).require_fused()
    record_of(audit(there, plugins=plugins[:1])).require_fused()


def test_the_gate_names_products_that_are_not_in_8_bits_and_the_stand_in() -> None:
    half = kernel("conv_myl0_1", "correlation", "Half", "Half", "conv")
    found = audit(kernel("__myl_CastMul_myl0_0", "kgen", "Int8", "Half", "x/DQ"), half, pairs=(pair("x", CONV),))
    found = dataclasses.replace(found, subject=dataclasses.replace(SUBJECT, stands_in="SM 8.6 stands in."))
    with pytest.raises(ResvitError, match="stands in") as caught:
        record_of(found).require_fused()
    assert caught.value.code is ExitCode.REJECTED
    assert "conv" in caught.value.problem
    assert "--exclude" in caught.value.fix
    written = json.loads(pretty_json(record_of(found, ["a note"]).to_json()))
    assert written["fused"] is False
    assert audit_from_json(written, "audit.json") == record_of(found, ["a note"])
    with pytest.raises(ResvitError, match=r"pairs\[0\].fate of audit.json is 'lost'"):
        audit_from_json({**written, "pairs": [{**written["pairs"][0], "fate": "lost"}]}, "audit.json")


def test_a_quantised_weight_alone_is_no_quantised_product() -> None:
    half = kernel("conv_myl0_1", "correlation", "Half", "Half", "conv")
    found = audit(half, pairs=(pair("w", CONV, weight=True),))
    assert found.quantized_products == {}
    assert failures_of(found) == ()


def test_the_fp16_engine_stands_beside_it() -> None:
    half = [kernel("a", "gemm", "Half", "Half"), kernel("b", "gemm", "Half", "Half")]
    int8 = [kernel("a", "gemm", "Int8", "Int8"), kernel("b", "gemm", "Int8", "Half")]
    better = sentences_of(audit(*int8, fp16=half))[1]
    assert "2 kernels move 0.0005 MB" in better
    # A prediction of the same network counts more of the one and less of the other, and says so too.
    assert "as an engine lists kernels and whole tensors" in better
    assert "the FP16 engine's 2 move 0.0008 MB (0.62 times as much)" in better
    worse = sentences_of(audit(*half, kernel("c", "gemm", "Half", "Half"), fp16=half))[1]
    assert "1.50 times as much; what 8 bits gain is in the products and weights alone" in worse
    dynamic = dataclasses.replace(int8[0], input_shapes=((-1, 100),))
    assert "without 1 of them" in sentences_of(audit(dynamic, int8[1], fp16=half))[1]


def test_a_region_that_the_listing_does_not_open_is_not_judged() -> None:
    block = Attention("attn", ("attn/MatMul", "attn/Softmax", "attn/MatMul_1"), 32, 50, 50, "fp16", "none", False)
    region = kernel("{ForeignNode[attn/MatMul...fc]}", "Myelin", "Half", "Half", *block.nodes)
    found = audit(region, attention=(block,))
    assert found.attention[0].fused is None
    assert failures_of(found) == ()
    assert any("does not show" in text and "attn" in text for text in sentences_of(found))


BLOCK = Attention("attn", ("a", "b"), 64, 197, 197, "int8", "none", False, quantized=ALL_PLACES)


@pytest.mark.parametrize(
    ("changed", "rules"),
    [
        ({}, []),
        ({"head_size": 16}, []),
        ({"head_size": 48}, ["head size"]),
        ({"query_length": 512, "key_length": 512}, []),
        ({"key_length": 577}, ["length"]),
        ({"quantized": ("operands", "softmax")}, ["placement"]),
        ({"whole": True}, ["placement"]),
        ({"head_size": 48, "key_length": 577}, ["head size", "length"]),
        ({"precision": "fp16", "head_size": 48, "key_length": 577, "quantized": ()}, []),
        ({"precision": "fp8", "head_size": 48, "key_length": 577, "quantized": ("operands", "softmax")}, []),
        ({"precision": "fp8", "quantized": ("operands",)}, ["placement"]),
        ({"precision": "fp16", "head_size": 12}, ["head size"]),
        ({"precision": "fp16", "head_size": 8}, ["head size"]),
        ({"precision": "bf16", "head_size": 256}, []),
        ({"precision": "fp16", "head_size": 264}, ["head size"]),
        ({"precision": "fp16", "foreign": ("Tanh",)}, ["mask"]),
        ({"precision": "fp32", "head_size": 8}, ["precision"]),
        ({"head_size": None, "query_length": None, "key_length": None}, []),
    ],
)
def test_rules_of_one_kernel_attention(changed: dict[str, Any], rules: list[str]) -> None:
    found = breaches_of(dataclasses.replace(BLOCK, **changed))
    assert [breach.rule for breach in found] == rules
    assert all(breach.mend for breach in found)


@rtx
@pytest.mark.parametrize(
    ("made", "fuses", "rule"),
    [
        ({}, True, None),
        ({"whole": True}, True, None),
        ({"mask": "computed"}, True, None),
        ({"tokens": 577, "head": 64}, True, None),
        ({"head": 8}, False, "head size"),
        ({"half": False}, False, "precision"),
        ({"half": False, "whole": True}, False, "precision"),
        ({"between": "Tanh"}, False, "mask"),
        ({"places": ALL_PLACES}, True, None),
        ({"places": ALL_PLACES, "mask": "constant"}, True, None),
        ({"places": ALL_PLACES, "head": 48}, False, "head size"),
        ({"places": ALL_PLACES, "tokens": 577, "head": 64}, False, "length"),
        ({"places": ("operands", "output")}, False, "placement"),
        ({"places": ("operands", "softmax"), "fp8": True, "tokens": 577, "head": 48}, True, None),
        ({"places": ("operands", "output"), "fp8": True}, False, "placement"),
    ],
)
def test_the_rules_are_those_of_the_compiler(
    tmp_path: Path, made: dict[str, Any], fuses: bool, rule: str | None
) -> None:
    model = attention_graph(tmp_path / "model.onnx", **made)
    report = build_engine(model, tmp_path / "engine.plan", find_target("rtx-4090"))
    expectation = expectation_from_onnx(model)
    found = audit_engine(SUBJECT, expectation, report.kernels, {"x", "m", "y"})
    (block,) = found.attention
    assert block.fused is fuses
    assert [breach.rule for breach in breaches_of(block.block)] == ([rule] if rule else [])
    assert (block.block.mask, block.block.whole) == (made.get("mask", "none"), made.get("whole", False))
    assert (block.block.head_size, block.block.key_length) == (made.get("head", 32), made.get("tokens", 64))
    if fuses:
        eight = "FP8" if made.get("fp8") else "Int8"
        assert block.precision == (eight if made.get("places") else "Half")
        assert "1 of 1 attention blocks run as one kernel" in " ".join(sentences_of(found))
    else:
        assert any(rule in breach.rule for breach in block.breaches)
        with pytest.raises(ResvitError, match="attention attn takes"):
            record_of(found).require_fused()


@rtx
def test_qdq_in_front_of_a_whole_attention_node_is_computed_in_fp16(tmp_path: Path) -> None:
    model = attention_graph(tmp_path / "model.onnx", whole=True, places=("operands",))
    report = build_engine(model, tmp_path / "engine.plan", find_target("rtx-4090"))
    found = audit_engine(SUBJECT, expectation_from_onnx(model), report.kernels, {"x", "y"})
    assert found.attention[0].fused
    assert {item.fate for item in found.pairs} == {Fate.HIGHER}
    assert found.quantized_products == {"attn/Attention": False}


@rtx
def test_the_input_and_output_of_the_network_are_no_fp32_between_layers(tmp_path: Path) -> None:
    report = build_engine(attention_graph(tmp_path / "m.onnx"), tmp_path / "engine.plan", find_target("rtx-4090"))
    found = audit_engine(SUBJECT, expectation_from_onnx(tmp_path / "m.onnx"), report.kernels, {"x", "y"})
    assert found.fp32 == ()
    assert len(audit_engine(SUBJECT, Expectation((), (), ()), report.kernels, ()).fp32) == 2
