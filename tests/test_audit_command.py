"""The command ``audit``, the stage behind it, and the gate."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention_graphs import ALL_PLACES, attention_graph
from engine_reports import engine_report
from quantize_graphs import Graph
from resvit_engines.audit.kernels import Kernel
from resvit_engines.audit.record import SkippedAudit, audit_from_json
from resvit_engines.builder import builder as build
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.progress import SILENT
from resvit_engines.records import Record
from resvit_engines.targets.table import find_target
from resvit_engines.trt.io_tensor import IoTensor
from resvit_export.cli.main import run
from resvit_export.stage import File
from resvit_export.stages.audit import Audit
from resvit_export.stages.quantize import Halve

MODEL = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt", "--data", "fashion-mnist"]
FAST = ["--calibration-images", "32", "--validation-images", "64", "--no-search", "--run", "runs/x"]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed"
)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == code
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def layer_file(path: Path, kernels: tuple[Kernel, ...], io: tuple[str, ...]) -> Path:
    """The kernels as TensorRT 11's inspector would write them."""

    def tensors(kernel: Kernel, side: str) -> list[dict[str, Any]]:
        sides = (getattr(kernel, f"{side}{part}") for part in ("_names", "s", "_shapes"))
        return [{"Name": n, "Datatype": t, "Dimensions": list(s)} for n, t, s in zip(*sides, strict=True)]

    layers = [
        {
            "Name": kernel.name,
            "LayerType": kernel.type,
            "Inputs": tensors(kernel, "input"),
            "Outputs": tensors(kernel, "output"),
            "TacticName": kernel.tactic,
            "Metadata": "\x1e".join(f"[ONNX Layer: {layer}]" for layer in kernel.layers),
        }
        for kernel in kernels
    ]
    path.write_text(json.dumps({"Layers": layers, "I/O Tensors": [{"Name": name} for name in io]}))
    return path


@pytest.mark.slow
@pytest.mark.whole
def test_the_engine_built_here_is_audited_beside_fp16(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/x", "rtx-4090", stages=("fold", "export"))
    made = answer(capsys, "audit", "--target", "rtx-4090", *MODEL, *FAST)
    audit = made["results"]["audit.json"]
    assert (audit["sm"], audit["stands_in"], audit["fused"]) == (89, "", True)
    fates = [pair["fate"] for pair in audit["pairs"] if not pair["weight"]]
    assert fates.count("consumed") == 17
    assert fates.count("inside") == 1
    assert [block["fused"] for block in audit["attention"]] == [True] * 3
    assert audit["totals"]["in_8_bits"] == {"conv": 6, "gemm": 12, "attention": 0}
    assert audit["fp16"]["in_8_bits"] == {"conv": 0, "gemm": 0, "attention": 0}
    assert audit["fp16"]["activation_bytes"] > 0
    assert any("norm/LayerNormalization" in moved["layers"] for moved in audit["fp32"])
    listing = json.loads(next(Path("runs/x").glob("audit-*/kernels.json")).read_bytes())
    assert list(listing) == ["fp16"]
    assert len(Record(listing, "kernels.json").records("fp16")) == audit["fp16"]["kernels"]
    assert answer(capsys, "audit", "--run", "runs/x")["reused"]


@pytest.mark.slow
@pytest.mark.whole
def test_for_a_jetson_the_kernels_are_predicted_by_tensorrts_rules_and_the_output_says_so(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/x", "jetson-orin", stages=("fold", "export"))
    made = answer(capsys, "build", "--target", "jetson-orin", *MODEL, *FAST, code=ExitCode.UNDECIDED)
    stages = {stage["stage"]: stage for stage in made["stages"]}
    audit = stages["audit"]["results"]["audit.json"]
    assert (audit["sm"], audit["builder"], audit["builder_version"]) == (87, "TensorRT", "10.3")
    assert audit["predicted"]
    assert audit["sentences"][0].startswith("Predicted by the rules of TensorRT 10.3 for SM 8.7. No engine for Jetson")
    fates = [pair["fate"] for pair in audit["pairs"] if not pair["weight"]]
    assert fates.count("consumed") >= 17
    assert audit["totals"]["in_8_bits"] == {"conv": 6, "gemm": 12, "attention": 0}
    # TensorRT writes 8 bits from its 8-bit kernels: fewer bytes than FP16, where TensorRT for RTX moves more.
    assert audit["totals"]["activation_bytes"] < audit["fp16"]["activation_bytes"]
    assert [block["fused"] for block in audit["attention"]] == [True] * 3
    assert [block["head_size"] for block in audit["attention"]] == [32] * 3
    listing = json.loads(next(Path("runs/x").glob("audit-*/kernels.json")).read_bytes())
    assert set(listing) == {"quantized", "fp16"}
    page = Path(made["report"]).read_text()
    assert "What fused" in page
    assert "Predicted by the rules of TensorRT 10.3" in page


@pytest.mark.whole
def test_without_the_builder_of_an_rtx_card_nothing_is_audited_and_the_gate_cannot_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ResvitError("TensorRT for RTX is not installed.", "pip install it.", ExitCode.MISSING)

    monkeypatch.setattr("resvit_export.stages.audit.build_engine", missing)
    onnx = File.of(attention_graph(tmp_path / "model.onnx", tokens=16, head=32, places=()))
    Audit(onnx, None, find_target("rtx-4090"), BuildSettings(), None, "").write(tmp_path, None, SILENT)
    audit = audit_from_json(json.loads((tmp_path / "audit.json").read_bytes()), "audit.json")
    assert isinstance(audit, SkippedAudit)
    assert "not installed" in audit.why
    with pytest.raises(ResvitError, match="cannot be answered"):
        audit.require_fused()


@pytest.mark.parametrize(("tokens", "fused", "rule"), [(512, True, None), (577, False, "length")])
def test_attention_that_breaks_a_rule_is_predicted_to_be_several_kernels(
    tmp_path: Path, tokens: int, fused: bool, rule: str | None
) -> None:
    onnx = File.of(attention_graph(tmp_path / "model.onnx", tokens=tokens, head=64, places=ALL_PLACES))
    Audit(onnx, None, find_target("jetson-orin"), BuildSettings(), None, "").write(tmp_path, None, SILENT)
    (block,) = json.loads((tmp_path / "audit.json").read_bytes())["attention"]
    assert block["fused"] is fused
    assert [breach["rule"] for breach in block["breaches"]] == ([] if rule is None else [rule])
    assert block["kernels"] == (1 if fused else 3)


def unfusable(path: Path) -> Path:
    """A classifier of 28x28 images whose attention has a head size of 8."""
    g = Graph(1, 1, 28, 28)
    tokens = g.op("Conv", "input", g.weight("patch.weight", 16, 1, 4, 4), name="patch/Conv", strides=[4, 4])
    tokens = g.op("Transpose", g.op("Reshape", tokens, g.ints(1, 16, 49)), perm=[0, 2, 1])
    mixed = [g.linear(tokens, 16, 16, f"attn.{name}") for name in "qkv"]
    q, k, v = (g.op("Transpose", g.op("Reshape", one, g.ints(1, 49, 2, 8)), perm=[0, 2, 1, 3]) for one in mixed)
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]), name="attn/MatMul")
    shares = g.op("Softmax", g.op("Mul", scores, g.constant("scale", np.float32(8**-0.5))), name="attn/Softmax")
    out = g.op("MatMul", shares, v, name="attn/MatMul_1")
    out = g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.ints(1, 49, 16))
    pooled = g.op("ReduceMean", g.op("Add", out, tokens), g.ints(1), keepdims=0)
    return g.save(path, g.linear(pooled, 16, 10, "head"))


@pytest.mark.whole
def test_the_gate_stops_a_build_before_the_bundle(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = unfusable(workspace / "toy.onnx")
    scaling = ["--preprocess", "mean=0.5", "--preprocess", "std=0.25"]
    build_it = ["build", "--model", str(model), "--data", "fashion-mnist", "--target", "rtx-4090", *scaling, *FAST]
    capsys.readouterr()
    assert run([*build_it, "--require-fused", "--json"]) == ExitCode.REJECTED
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert [stage["stage"] for stage in made["stages"]][-2:] == ["compile", "audit"]
    assert made["bundle"] is None
    assert "attention attn takes" in err
    assert "a head size of 8, where FP16 needs a multiple of 8 from 16 to 256" in err
    assert "What fused" in Path(made["report"]).read_text()
    assert "require_fused = true" in (workspace / "runs/x/recipe.toml").read_text()
    failed = answer(capsys, "audit", "--run", "runs/x", code=ExitCode.REJECTED)
    assert "attention attn" in failed["error"]["problem"]
    # Without the gate the same stages go on to the bundle.
    through = answer(capsys, *build_it, code=ExitCode.UNDECIDED)
    assert Path(through["bundle"]).exists()


@pytest.mark.whole
def test_an_engine_from_the_device_is_audited_by_its_own_layers(engine: Path, tmp_path: Path) -> None:
    back = tmp_path / "device"
    back.mkdir()
    shutil.copy(engine / "int8.json", back / "layers.json")
    ends = {"inputs": (IoTensor("x", (1,)),), "outputs": (IoTensor("y", (1,)),)}
    (back / "engine.json").write_bytes(pretty_json(engine_report(layers="layers.json", **ends).to_json()))
    onnx, not_read, target = File.of(engine / "int8.onnx"), File(tmp_path / "none", ""), find_target("jetson-orin")
    half = Halve(onnx, not_read, not_read, None)
    Audit(onnx, half, target, BuildSettings(), None, "").write(tmp_path, back, SILENT)
    audit = json.loads((tmp_path / "audit.json").read_bytes())
    assert (audit["builder_version"], audit["stands_in"], audit["fp16"]) == ("10.3.0", "", None)
    assert audit["attention"][0]["breaches"][0]["rule"] == "length"
    assert "built on the device" in audit["sentences"][-1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX whose INT8 attention is too long, its layer file, and that of an FP16 engine."""
    folder = tmp_path_factory.mktemp("layers")
    for name, places in (("int8", ALL_PLACES), ("fp16", ())):
        onnx = attention_graph(folder / f"{name}.onnx", tokens=577, head=64, places=places)
        report = build.build_engine(onnx, folder / "engine.plan", find_target("rtx-4090"))
        layer_file(folder / f"{name}.json", report.kernels, ("x", "y"))
    return folder


@pytest.mark.whole
def test_a_users_own_layer_file(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["--layers", str(engine / "int8.json"), "--onnx", str(engine / "int8.onnx")]
    audit = answer(capsys, "audit", *layers, "--fp16-layers", str(engine / "fp16.json"))
    assert audit["fused"] is False
    assert audit["fp16"]["kernels"] < audit["totals"]["kernels"]
    assert audit["attention"][0]["breaches"][0]["rule"] == "length"
    assert run(["audit", *layers]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "a length of 577, where INT8 ends at 512 tokens" in shown
    assert run(["audit", *layers, "--require-fused"]) == ExitCode.REJECTED
    assert "577" in capsys.readouterr().err
    half = ["--layers", str(engine / "fp16.json"), "--onnx", str(engine / "fp16.onnx")]
    assert run(["audit", *half, "--require-fused"]) == 0


@pytest.mark.whole
def test_layer_files_need_their_onnx_and_belong_together(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "--layers", str(engine / "int8.json")]) == ExitCode.INPUT
    assert "--onnx" in capsys.readouterr().err
    assert run(["audit", "--onnx", str(engine / "int8.onnx")]) == ExitCode.INPUT
    assert "--layers" in capsys.readouterr().err
    names = engine / "names.json"
    names.write_text('{"Layers": ["conv + relu"], "Bindings": []}')
    assert run(["audit", "--layers", str(names), "--onnx", str(engine / "int8.onnx")]) == ExitCode.INPUT
    assert "profilingVerbosity=detailed" in capsys.readouterr().err
    shutil.copy(names, engine / "no.onnx")
    assert run(["audit", "--layers", str(engine / "int8.json"), "--onnx", str(engine / "no.onnx")]) == ExitCode.INPUT
    assert "is not a readable ONNX model" in capsys.readouterr().err
