"""The engine inspector's JSON, in the forms of TensorRT 8 to 11."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resvit_engines.audit.inspector import data_type, layers_from_file, layers_from_json
from resvit_engines.audit.kernels import Operation
from resvit_engines.errors import ExitCode, ResvitError


def tensor(name: str, dims: list[int], said: str, **more: Any) -> dict[str, Any]:
    """A tensor as TensorRT 10 writes it: format and type in one sentence."""
    return {"Name": name, "Location": "Device", "Dimensions": dims, "Format/Datatype": said, **more}


def tensor_11(name: str, dims: list[int], dtype: str, form: str = "Row major linear format") -> dict[str, Any]:
    return {"Name": name, "Dimensions": dims, "Strides": [1] * len(dims), "Datatype": dtype, "Format": form}


WIDE = "Thirty-two wide channel vectorized row major Int8 format"
TEN: dict[str, Any] = {
    "Layers": [
        {
            "Name": "stem/Quantize",
            "LayerType": "Reformat",
            "Inputs": [tensor("image", [1, 3, 8, 8], "Row major linear FP32")],
            "Outputs": [tensor("image_q", [1, 3, 8, 8], "Four wide channel vectorized row major Int8 format")],
            "Origin": "QDQ",
            "TacticValue": "0x0",
            "Metadata": "[ONNX Layer: stem/Q]",
        },
        {
            "Name": "stem.weight + stem/Conv + PWN(stem/Relu)",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("image_q", [1, 3, 8, 8], WIDE), tensor("res", [1, 32, 8, 8], "Row major linear FP16")],
            "Outputs": [tensor("y", [1, 32, 8, 8], "Channel major FP16 format where channel % 8 == 0")],
            "OutMaps": 32,
            "Weights": {"Type": "Int8", "Count": 864},
            "Bias": {"Type": "Float", "Count": 32},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_i8f16_i8i32_f32_nhwckrsc_nhwc",
            "Metadata": "[ONNX Layer: stem/DQ]\u001e[ONNX Layer: stem/Conv]\u001e[ONNX Layer: stem/Relu]",
        },
        {"Name": "shape", "LayerType": "NoOp", "Inputs": [], "Outputs": []},
        {
            "Name": "_gemm_mha_v2_myl0_4",
            "LayerType": "kgen",
            "Inputs": [tensor(name, [2, 50, 32], "Int8") for name in "qkv"],
            "Outputs": [tensor("o", [2, 50, 32], "Half")],
            "TacticName": "_gemm_mha_v2_0x1",
            "Metadata": "[ONNX Layer: attn/MatMul]\u001f[ONNX Layer: attn/Softmax]\u001f[ONNX Layer: attn/MatMul_1]",
        },
        {
            "Name": "resvit",
            "LayerType": "PluginV3",
            "Inputs": [tensor("o", [2, 50, 32], "Row major linear FP16 format")],
            "Outputs": [tensor("logits", [1, 10], "Row major linear FP32")],
            "Metadata": "[ONNX Layer: head/ResvitAttention]",
        },
    ],
    "Bindings": ["image", "logits"],
}
ELEVEN: dict[str, Any] = {
    "Layers": [
        {
            "Name": "fc/MatMul_myl0_1",
            "LayerType": "gemm",
            "Inputs": [tensor_11("image", [-1, 64], "FP8")],
            "Constants": [tensor_11("w", [64, 10], "FP8"), tensor_11("scale", [1], "Float")],
            "Outputs": [tensor_11("logits", [-1, 10], "BFloat16")],
            "TacticName": "__myelin_CASK_STUB",
            "Metadata": "[ONNX Layer: fc/MatMul]",
        }
    ],
    "I/O Tensors": [
        {"Name": "image", "IOMode": "Input", "DataType": "FP8", "Dimensions": [-1, 64], "Location": "Device"},
        {"Name": "logits", "IOMode": "Output", "DataType": "BFloat16", "Dimensions": [-1, 10], "Location": "Device"},
    ],
    "Engine Metadata": {"Multi-Device": "Disabled"},
}
EIGHT: dict[str, Any] = {
    "Layers": [
        {
            "Name": "QuantizeLinear_2",
            "LayerType": "Reformat",
            "Inputs": [tensor("in", [1, 3, 8, 8], "Row major linear FP32")],
            "Outputs": [tensor("q", [1, 3, 8, 8], WIDE)],
        },
        {
            "Name": "w + QuantizeLinear_7 + Conv_9 + PWN(PWN(Sigmoid_12), Mul_13)",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("q", [1, 3, 8, 8], WIDE)],
            "Outputs": [tensor("o [profile 1]", [1, 32, 8, 8], WIDE)],
        },
        {
            "Name": "Reformatting CopyNode for Output Tensor 0 to w + Conv_9",
            "LayerType": "Reformat",
            "Inputs": [tensor("o", [1, 32, 8, 8], WIDE)],
            "Outputs": [tensor("out", [1, 32, 8, 8], "Row major linear FP16 format")],
        },
    ],
    "Bindings": ["in", "out", "in [profile 1]", "out [profile 1]"],
}


def test_the_form_of_tensorrt_10() -> None:
    found = layers_from_json(json.dumps(TEN))
    assert found.form == "10.x"
    assert found.io_names == {"image", "logits"}
    quantise, conv, attention, plugin = found.kernels
    assert (quantise.operation, quantise.inputs, quantise.outputs) == (Operation.REFORMAT, ("Float",), ("Int8",))
    assert quantise.layers == ("stem/Q",)
    assert (conv.operation, conv.precision) == (Operation.CONV, "Int8")
    assert (conv.inputs, conv.outputs) == (("Int8", "Half"), ("Half",))
    assert conv.bytes_moved == 3 * 64 + 2 * 32 * 64 + 2 * 32 * 64
    assert conv.constant_bytes == 864 + 4 * 32
    assert conv.layers == ("stem/DQ", "stem/Conv", "stem/Relu")
    assert (attention.operation, attention.precision) == (Operation.ATTENTION, "Int8")
    assert attention.layers == ("attn/MatMul", "attn/Softmax", "attn/MatMul_1")
    assert plugin.operation is Operation.PLUGIN
    assert plugin.output_names == ("logits",)


def test_the_form_of_tensorrt_11() -> None:
    found = layers_from_json(json.dumps(ELEVEN))
    assert found.form == "11.x"
    assert found.io_names == {"image", "logits"}
    (gemm,) = found.kernels
    assert (gemm.operation, gemm.precision, gemm.outputs) == (Operation.GEMM, "FP8", ("BFloat16",))
    assert gemm.constant_bytes == 640 + 4
    assert gemm.bytes_moved is None  # the batch is dynamic


def test_before_there_was_metadata_names_tell_the_nodes() -> None:
    quantise, conv, copy = layers_from_json(json.dumps(EIGHT)).kernels
    assert quantise.layers == ("QuantizeLinear_2",)
    assert conv.layers == ("w", "QuantizeLinear_7", "Conv_9", "Sigmoid_12", "Mul_13")
    assert conv.output_names == ("o",)
    assert copy.layers == ()
    assert layers_from_json(json.dumps(EIGHT)).io_names == {"in", "out"}


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("Row major linear FP32", "Float"),
        ("Row major linear FP16 format (kLINEAR)", "Half"),
        ("Channel major FP16 format where channel % 4 == 0", "Half"),
        (WIDE, "Int8"),
        ("Row major Int8 format", "Int8"),
        ("Int8", "Int8"),
        ("UInt8", "UInt8"),
        ("BFloat16", "BFloat16"),
        ("Row major linear BF16 format", "BFloat16"),
        ("FP8", "FP8"),
        ("Row major linear INT64 format", "Int64"),
        ("Bool", "Bool"),
        ("N/A due to dynamic shapes", ""),
        ("", ""),
    ],
)
def test_types_are_read_from_sentences_and_words(said: str, word: str) -> None:
    assert data_type(said) == word


def test_a_type_that_is_not_told_leaves_the_bytes_open() -> None:
    layer = {**TEN["Layers"][0], "Inputs": [tensor("image", [1, 3, 8, 8], "N/A due to dynamic shapes")]}
    (kernel,) = layers_from_json(json.dumps({"Layers": [layer], "Bindings": []})).kernels
    assert kernel.bytes_moved is None


def test_shapes_in_the_cpus_memory_are_no_activations() -> None:
    layer = {**TEN["Layers"][0]}
    layer["Inputs"] = [*layer["Inputs"], {**tensor("shape", [4], "Int32"), "Location": "Host"}]
    (kernel,) = layers_from_json(json.dumps({"Layers": [layer], "Bindings": []})).kernels
    assert kernel.inputs == ("Float",)


def test_separators_may_stand_unescaped(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEN).replace("\\u001e", "\x1e").encode())
    assert layers_from_file(file).kernels == layers_from_json(json.dumps(TEN)).kernels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "no list 'Layers'"),
        ('[{"count": 3}, {"name": "conv", "averageMs": 0.1}]', "no list 'Layers'"),
        ('{"Layers": ["stem/Conv + stem/Relu", "fc/MatMul"], "Bindings": []}', "only the names of 2 of 2 layers"),
        ('{"Layers": [{"Name": "stem/Conv"}], "Bindings": []}', "only the names of 1 of 1 layers"),
    ],
)
def test_what_is_no_layer_information_is_refused(text: str, words: str) -> None:
    with pytest.raises(ResvitError, match=words) as caught:
        layers_from_json(text)
    assert caught.value.code is ExitCode.INPUT


def test_names_only_say_how_to_get_more(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    file.write_text('{"Layers": ["stem/Conv"]}')
    with pytest.raises(ResvitError) as caught:
        layers_from_file(file)
    assert "--profilingVerbosity=detailed" in caught.value.fix


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResvitError, match=r"gone\.json"):
        layers_from_file(tmp_path / "gone.json")
