"""What the kernels of an engine say about its work, and that ours do less: with TensorRT for RTX, without a GPU."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from quantize_graphs import Graph, ranges_of
from resvit_engines.audit.kernel_totals import kernel_totals
from resvit_engines.audit.kernels import Kernel, Operation, kernels_from_log
from resvit_engines.builder.builder import build_engine
from resvit_engines.records import Record
from resvit_engines.targets.table import Builder, Precision, find_target
from resvit_export.to_tensorrt.copy import suit_builder
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed"
)
LISTING = """Layers:
Name: a/Conv_myl0_1, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [1,4,8,8], Strides: [256,1,32,4], \
Datatype: Int8, Format: Any }], Constants: [ { Name: w, Dimensions: [16,4,3,3], Strides: [36,1,12,4], Datatype: Int8, \
Format: Any }, { Name: s, Dimensions: [1,16,1,1], Strides: [16,1,1,1], Datatype: Float, Format: Any }], \
Outputs: [ { Name: y, Dimensions: [1,16,8,8], Strides: [1,1,1,1], Datatype: Half, Format: Any }], TacticName: t, \
StreamId: 0, Metadata: [ONNX Layer: a/Conv]
Name: sig, LayerType: signal, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
Name: __myl_MulMinMaxRounCast_myl0_2, LayerType: kgen, Inputs: [ { Name: y, Dimensions: [1,16,8,8], Strides: [1], \
Datatype: Half, Format: Any }], Constants: [], Outputs: [ { Name: z, Dimensions: [1,16,8,8], Strides: [1], \
Datatype: Int8, Format: Any }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: z/QuantizeLinear]"""


def kernel(name: str, kind: str = "kgen", inputs: tuple[str, ...] = ("Half",), outputs: str = "Half") -> Kernel:
    return Kernel(name, kind, inputs, (outputs,), ((1, 8),) * len(inputs), ((1, 8),), ())


def test_kernels_and_their_constants_are_read_and_signals_are_no_kernels() -> None:
    conv, quantise = kernels_from_log([LISTING])
    assert (conv.operation, conv.precision) == (Operation.CONV, "Int8")
    assert conv.bytes_moved == 4 * 64 + 2 * 16 * 64
    assert conv.constant_bytes == 16 * 4 * 9 + 4 * 16
    assert quantise.operation is Operation.REFORMAT
    assert Kernel.from_json(Record(conv.to_json(), "a kernel")) == conv


@pytest.mark.parametrize(
    ("found", "work", "precision"),
    [
        (kernel("__myl_FcAddAdd_myl0_12", "runtime_fusion", ("Half", "Half")), Operation.GEMM, "Half"),
        # The weight is dequantised on the way: an FP16 product, though the activation is INT8.
        (kernel("__myl_CastMulFc_myl0_2", "runtime_fusion", ("Int8", "Half")), Operation.GEMM, "Half"),
        (kernel("blocks.0/MatMul_myl0_1", "gemm", ("FP8",)), Operation.GEMM, "FP8"),
        (kernel("_gemm_mha_v2_myl0_16", outputs="Int8"), Operation.ATTENTION, "Half"),
        (kernel("__myl_MoveReshTran_myl0_4"), Operation.REFORMAT, "Half"),
        (kernel("__myl_Mul_myl0_4"), Operation.OTHER, "Half"),
        (kernel("__myl_MulMinMaxRounCast_myl0_4", outputs="Int8"), Operation.REFORMAT, "Half"),
        (kernel("__myl_AddReluMulMinMaxRounCast_myl0_4", outputs="Int8"), Operation.OTHER, "Half"),
        (kernel("Reformatting CopyNode", "Reformat"), Operation.REFORMAT, "Half"),
    ],
)
def test_what_a_kernel_does_is_read_from_its_name(found: Kernel, work: Operation, precision: str) -> None:
    assert (found.operation, found.precision) == (work, precision)


def test_the_table_counts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("engine_work", None)
    import engine_work

    kernels = (*kernels_from_log([LISTING]), kernel("a/MatMul_myl0_1", "gemm"))
    found = kernel_totals(kernels).to_json()
    assert (found["kernels"], found["reformats"]) == (3, 1)
    assert found["of"] == {"conv": 1, "gemm": 1, "attention": 0}
    assert found["in_8_bits"] == {"conv": 1, "gemm": 0, "attention": 0}
    assert found["activation_bytes"] == (256 + 2048) + (2048 + 1024) + 32
    text = engine_work.table(86, {"FP16": found, "INT8 ModelOpt": {"failed": "it says why"}})
    assert "| FP16 | 3 | 1 of 1 | 0 of 1 | 0 of 0 | 1 | 0.00541 | 1.00 |" in text
    assert "it says why" in text


def bottleneck(path: Path) -> Path:
    """Convolutions with GroupNorm between them and an identity shortcut: 32 channels on 16x16 maps."""
    g = Graph(1, 32, 16, 16)
    value = g.op("Relu", g.conv("input", 32, 32, name="stem/Conv"))
    for block in range(2):
        main = value
        for index in range(2):
            main = g.conv(main, 32, 32, name=f"{block}.conv{index}/Conv")
            ones, zeros = (g.constant(f"{block}.{index}.{n}", np.full(8, n, np.float32)) for n in (1, 0))
            rows = g.op("InstanceNormalization", g.op("Reshape", main, g.ints(0, 8, -1)), ones, zeros)
            maps = g.op("Reshape", rows, g.ints(0, 32, 16, 16))
            main = g.op(
                "Add",
                g.op("Mul", maps, g.weight(f"{block}.{index}.w", 32, 1, 1)),
                g.weight(f"{block}.{index}.b", 32, 1, 1),
            )
            main = main if index else g.op("Relu", main)
        value = g.op("Relu", g.op("Add", main, value, name=f"{block}/Add"))
    return g.save(path, g.conv(value, 32, 32, name="last/Conv"))


@pytest.mark.whole
@rtx
def test_the_form_for_rtx_makes_int8_do_less_than_fp16(tmp_path: Path) -> None:
    source = bottleneck(tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((1, 32, 16, 16)).astype(np.float32)
    kernels: dict[tuple[str, bool], tuple[Kernel, ...]] = {}
    for precision in (Precision.FP16, Precision.INT8):
        model = tmp_path / f"{precision.value}.onnx"
        quantize_model(source, ranges_of(source, images), QuantizeSettings(precision), model)
        copy = tmp_path / f"{precision.value}.rtx.onnx"
        shutil.copyfile(model, copy)
        suit_builder(copy, Builder.TENSORRT)
        assert copy.read_bytes() == model.read_bytes()
        suit_builder(copy, Builder.RTX)
        assert copy.read_bytes() != model.read_bytes()
        for path in (model, copy):
            report = build_engine(path, tmp_path / "engine.plan", find_target("rtx-4090"))
            kernels[precision.value, path is copy] = report.kernels
    moved = {key: sum(kernel.bytes_moved or 0 for kernel in found) for key, found in kernels.items()}
    assert moved["int8", True] < 0.6 * moved["int8", False]
    assert moved["fp16", True] < moved["fp16", False]
    assert moved["int8", True] < 0.85 * moved["fp16", True]
    # The last convolution's scale and bias have no kernel behind to go into.
    assert len(kernels["int8", True]) <= len(kernels["fp16", True]) + 1
    convs = [kernel for kernel in kernels["int8", True] if kernel.operation is Operation.CONV]
    assert [(kernel.precision, kernel.outputs) for kernel in convs] == [("Int8", ("Half",))] * 6
