"""Kernels of our own on their way through a build: found, validated, compiled, carried to the device, or refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run

MODEL = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt", "--data", "fashion-mnist"]
OURS = "ai.resvit"


def stage(folder: Path, name: str, file: str) -> Path:
    (found,) = folder.glob(f"{name}-*/{file}")
    return found


def document(folder: Path, name: str, file: str) -> dict:
    return json.loads(stage(folder, name, file).read_bytes())


def ours(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == OURS]


def fields(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def from_bundle(folder: Path, name: str) -> onnx.ModelProto:
    (bundle,) = folder.glob("bundle-*/*.resvit")
    with zipfile.ZipFile(bundle) as archive:
        return onnx.load_from_string(archive.read(name))


@pytest.mark.slow
@pytest.mark.whole
def test_every_attention_block_and_the_bridge_is_one_node_and_the_gate_scores_that_file(
    finished_run: Callable[..., Path],
) -> None:
    plain = finished_run("jetson-orin", "--plugins", "off")
    folder = finished_run("jetson-orin", "--plugins", "on")
    found = document(folder, "fuse", "fusion.json")
    assert sorted(match["op_type"] for match in found["matches"]) == [
        *["ResvitAttentionQ"] * 3,
        "ResvitBridgeW8NormQ",
    ]
    assert found["refusals"] == []
    # What is shipped is what was fused, and what was fused was validated.
    shipped = from_bundle(folder, "model.onnx")
    assert shipped == onnx.load(stage(folder, "fuse", "model.onnx"))
    onnx.checker.check_model(shipped, full_check=True)
    assert {function.name for function in shipped.functions} == {node.op_type for node in ours(shipped)}
    assert not any(node.op_type == "Softmax" for node in shipped.graph.node)
    with_ours, without = (document(path, "validate", "verdict.json") for path in (folder, plain))
    assert with_ours["verdict"] == "accepted"
    low, high = without["interval"]
    assert low <= with_ours["stages"][-1]["drop"] <= high
    assert with_ours["stages"][-1]["agreement"] > 0.99


@pytest.mark.slow
@pytest.mark.whole
def test_jetpack_6_gets_each_kernel_in_its_node_and_no_functions(finished_run: Callable[..., Path]) -> None:
    folder = finished_run("jetson-orin", "--plugins", "on")
    copy = from_bundle(folder, "model.tensorrt.onnx")
    assert not copy.functions
    for node in ours(copy):
        carried = fields(node)
        assert carried["plugin_namespace"] == b"resvit"
        assert "aot" not in carried
        assert b".target sm_87" in carried["kernel_ptx"]
        assert b".version 8.5" in carried["kernel_ptx"]
        assert carried["kernel_entry"] in carried["kernel_ptx"]
        assert len(carried["kernel_inputs"]) == len(node.input)
    plan = document(folder, "compile", "plan.json")
    assert "resvit-engine plugin --out libresvit_plugins.so" in plan["commands"]
    assert "--dynamicPlugins=./libresvit_plugins.so" in plan["commands"][-1]
    assert plan["settings"]["plugins"] == "library"
    assert any("4 kernels of our own" in text for text in document(folder, "audit", "audit.json")["sentences"])


@pytest.mark.slow
@pytest.mark.whole
def test_newer_tensorrt_gets_them_ahead_of_time(finished_run: Callable[..., Path]) -> None:
    folder = finished_run("jetson-thor", "--plugins", "on")
    copy = from_bundle(folder, "model.tensorrt.onnx")
    assert {function.name for function in copy.functions} == {node.op_type for node in ours(copy)}
    assert len(ours(copy)) == 4
    for node in ours(copy):
        assert fields(node)["aot"] == 1
        assert b".target sm_110a" in fields(node)["kernel_ptx"]
    plan = document(folder, "compile", "plan.json")
    assert plan["commands"] == ["resvit-engine build embed-nano-jetson-thor-int8.resvit --trust KEY.pub"]


@pytest.mark.slow
@pytest.mark.whole
def test_attention_in_8_bits_has_scales_of_its_own_and_passes_the_gate(finished_run: Callable[..., Path]) -> None:
    folder = finished_run("jetson-orin", "--plugins", "on", "--plugin-attention", "8bit")
    model = onnx.load(stage(folder, "fuse", "model.onnx"))
    attention = [json.loads(fields(node)["config"]) for node in ours(model) if "Attention" in node.op_type]
    assert len(attention) == 3
    for config in attention:
        assert config["dtype"] == "int8"
        assert len({config["q_scale"], config["k_scale"], config["v_scale"]}) == 3
    assert document(folder, "validate", "verdict.json")["verdict"] == "accepted"


@pytest.mark.whole
def test_auto_says_which_way_was_taken(finished_run: Callable[..., Path]) -> None:
    folder = finished_run("jetson-orin")
    assert not list(folder.glob("fuse-*"))
    sentences = document(folder, "audit", "audit.json")["sentences"]
    assert any(
        "No kernel of our own goes into the engine: no kernel of ours was ever measured" in text for text in sentences
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--target", "rtx-4090", "--plugins", "on"], "TensorRT for RTX takes no plugins"),
        (["fuse", "--target", "rtx-4090"], "TensorRT for RTX takes no plugins"),
        (["fuse", "--target", "jetson-orin", "--plugins", "off"], "--plugins off"),
        (["build", "--target", "jetson-orin", "--plugin-attention", "8bit"], "no kernel of ours was ever measured"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    workspace: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    command, *rest = arguments
    assert run([command, *MODEL, "--run", "runs/r", *rest]) == ExitCode.IMPOSSIBLE
    assert said in capfd.readouterr().err
    assert not list(Path("runs/r").glob("fold-*"))


@pytest.mark.slow
@pytest.mark.whole
def test_a_kernel_that_does_not_fit_leaves_the_plain_graph(workspace: Path) -> None:
    Path("net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    input_shape = (1, 28, 28)\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.patch = nn.Conv2d(1, 160, 4, 4)\n"
        "        self.attention = nn.MultiheadAttention(160, 1, batch_first=True)\n"
        "        self.head = nn.Linear(160, 10)\n"
        "    def forward(self, x):\n"
        "        t = self.patch(x).flatten(2).transpose(1, 2)\n"
        "        return self.head((t + self.attention(t, t, t, need_weights=False)[0]).mean(1))\n"
    )
    arguments = ["--model", "net.py:Net", "--data", "fashion-mnist", "--target", "jetson-orin", "--plugins", "on"]
    preprocess = ["--preprocess", "mean=0.286", "--preprocess", "std=0.353"]
    assert run(["fuse", *arguments, *preprocess, "--run", "runs/wide", "--quiet"]) == 0
    found = document(Path("runs/wide"), "fuse", "fusion.json")
    assert found["matches"] == []
    reasons = {refusal["kind"]: refusal["reason"] for refusal in found["refusals"]}
    assert "a head of 160" in reasons["attention"]
    assert "its filter is 4x4" in reasons["bridge"]
    assert not list(Path("runs/wide").glob("fuse-*/model.onnx"))
