from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from engine_reports import engine_report
from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ResvitError
from resvit_engines.files import sha256_file
from resvit_engines.keys.private import SigningKey, load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey
from resvit_export.tools.inspect import ROWS, describe_file, render


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


PARAMETERS = 8 * 3 * 9 + 8 + 2 * 8 + 8 * 10 + 10


def quantized_onnx(path: Path, external: bool = False) -> Path:
    """x -> Q -> DQ -> Conv(int8 weight -> DQ) -> Gemm (fp32)."""
    tensors = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "w": np.ones((8, 3, 3, 3), np.int8),
        "w_scale": np.full(8, 0.1, np.float32),
        "w_zero": np.zeros(8, np.int8),
        "fc": np.ones((8, 10), np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], name="stem/Conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "fc"], ["logits"], name="head/Gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="test")
    if external:
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def shown(path: Path, trust: Path | None = None, *, brief: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120)
    for item in render(describe_file(path, trust), brief=brief):
        console.print(item)
    return out.getvalue()


def test_checkpoint_with_wrapper_and_prefix(tmp_path: Path) -> None:
    weights = {f"module.{key}": value for key, value in Net().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights, "optimizer": {}}, tmp_path / "c.pth")
    found = describe_file(tmp_path / "c.pth")
    assert list(found)[:4] == ["kind", "file", "bytes", "sha256"]
    assert found["kind"] == "checkpoint"
    assert found["wrapper"] == "state_dict"
    assert found["prefix"] == "module."
    assert found["beside_the_weights"] == ["epoch", "optimizer"]
    assert found["parameters"] == PARAMETERS
    assert found["dtypes"] == [
        {"dtype": "float32", "tensors": 8, "values": PARAMETERS + 16},
        {"dtype": "int64", "tensors": 1, "values": 1},
    ]
    assert {"name": "module.conv.weight", "shape": [8, 3, 3, 3], "dtype": "float32"} in found["tensors"]
    assert "module.conv.weight" in shown(tmp_path / "c.pth")
    assert "module.conv.weight" not in shown(tmp_path / "c.pth", brief=True)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/resvit-inspect-was-here"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Evil()))
    torch.save({"model": _Evil()}, tmp_path / "zip.pt")
    for name in ("raw.pt", "zip.pt"):
        with pytest.raises(ResvitError):
            describe_file(tmp_path / name)
    assert not Path("/tmp/resvit-inspect-was-here").exists()


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b.running_mean": torch.zeros(5)}, path, {"format": "pt"})
    found = describe_file(path)
    assert found["parameters"] == 6
    assert [entry["dtype"] for entry in found["dtypes"]] == ["bfloat16", "float32"]
    assert found["metadata"] == {"format": "pt"}


def test_program(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(Net().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "p.pt2")
    found = describe_file(tmp_path / "p.pt2")
    assert found["kind"] == "exported program"
    assert found["inputs"] == [{"name": "x", "shape": ["dynamic", 3, 8, 8], "dtype": "float32"}]
    assert found["outputs"][0]["shape"] == ["dynamic", 10]
    assert found["operators"]["aten.conv2d.default"] == 1
    assert found["pickled_weights"] == []
    assert "aten.conv2d.default" in shown(tmp_path / "p.pt2")


def test_onnx_counts_bytes_per_dtype_and_follows_weights_to_their_layer(tmp_path: Path) -> None:
    found = describe_file(quantized_onnx(tmp_path / "q.onnx"))
    assert found["opset"] == {"ai.onnx": 20}
    assert found["inputs"] == [{"name": "x", "shape": ["batch", 3, 8, 8], "dtype": "float32"}]
    assert (found["quantize_nodes"], found["dequantize_nodes"], found["nodes"]) == (1, 2, 7)
    assert found["weights"] == [
        {"dtype": "float32", "tensors": 3, "bytes": 4 * (1 + 8 + 80)},
        {"dtype": "int8", "tensors": 3, "bytes": 216 + 8 + 1},
    ]
    assert found["largest_layers"] == [
        {"name": "head/Gemm", "op": "Gemm", "shape": [8, 10], "dtype": "float32", "bytes": 320},
        {"name": "stem/Conv", "op": "Conv", "shape": [8, 3, 3, 3], "dtype": "int8", "bytes": 216 + 32 + 8},
    ]
    text = shown(tmp_path / "q.onnx")
    assert "stem/Conv" in text
    assert "batch \N{MULTIPLICATION SIGN} 3 \N{MULTIPLICATION SIGN} 8" in text


def test_onnx_with_external_weights(tmp_path: Path) -> None:
    path = quantized_onnx(tmp_path / "e.onnx", external=True)
    found = describe_file(path)
    assert found["external_files"] == ["weights.bin"]
    assert found["weights"][0]["bytes"] == 4 * 89
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ResvitError, match="shorter than it says"):
        describe_file(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ResvitError, match="not there"):
        describe_file(path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ResvitError, match="outside the model's folder"):
        describe_file(path)


def test_engine(tmp_path: Path) -> None:
    engine = tmp_path / "engine.plan"
    engine.write_bytes(b"vtrt" + bytes(20) + bytes([1, 7, 1, 116]) + bytes(100))
    found = describe_file(engine)
    assert (found["kind"], found["format"], found["version"]) == ("engine", "tensorrt-rtx", "1.7.1.116")
    (tmp_path / "engine.json").write_text(
        json.dumps(engine_report(sha256=found["sha256"], target="rtx-4090").to_json())
    )
    assert describe_file(engine)["target"] == "rtx-4090"
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(ResvitError, match="digests differ"):
        describe_file(engine)


def test_bundle(tmp_path: Path) -> None:
    path = tmp_path / "b.resvit"
    write_bundle(path, Manifest("demo"), {"model.onnx": b"weights"})
    found = describe_file(path)
    assert (found["kind"], found["whole"], found["signed_by"], found["name"]) == ("bundle", True, [], "demo")
    assert found["signature"] == "unsigned"
    assert "model.onnx" in shown(path)
    other_name = path.rename(tmp_path / "b.zip")
    assert describe_file(other_name)["kind"] == "bundle"


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SigningKey:
    """A key whose public half lies in ``release.pub``; this machine trusts none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("resvit_engines.keys.public.default_trust_folder", lambda: tmp_path / "nothing here")
    monkeypatch.delenv("RESVIT_TRUST", raising=False)
    make_key_pair(tmp_path / "release.key", tmp_path / "release.pub", lambda raw: PublicKey(raw, "release"))
    key = load_signing_key(str(tmp_path / "release.key"))
    assert key is not None
    return key


FRONT = ("kind", "whole", "signature", "signed_by", "signature_note", "file", "bytes", "sha256")


@pytest.mark.parametrize("signed", [False, True])
def test_a_manifest_says_nothing_of_who_signed_it(tmp_path: Path, release: SigningKey, signed: bool) -> None:
    """What it claims stands by itself, under whatever name: only a signature that was verified has a signer."""
    path, keyid = tmp_path / "b.resvit", release.public.keyid
    claims: dict[str, Any] = dict.fromkeys(("signed by", "Signed_by", "signer", "signed_by "), keyid)
    claims |= {"kind": "x", "whole": "yes, and verified", "signature": "verified", "signed_by": [keyid], "sha256": "0"}
    claims |= {"signature_note": "by release", "other": {"signed_by": keyid}, "file": "x", "bytes": 1}
    write_bundle(path, Manifest("demo", other=claims), {"model.onnx": b"weights"}, release if signed else None)
    honest = tmp_path / "honest.resvit"
    write_bundle(honest, Manifest("demo"), {"model.onnx": b"weights"}, release if signed else None)
    for trust in (None, tmp_path / "release.pub"):
        verified = signed and trust is not None
        found, wanted = describe_file(path, trust), describe_file(honest, trust)
        assert [found[name] for name in FRONT[:4]] == [wanted[name] for name in FRONT[:4]]
        assert found["sha256"] == sha256_file(path)
        assert found["other"] == sorted(claims)
        assert (keyid in shown(path, trust)) == (keyid in shown(honest, trust)) == verified
        assert found["signed_by"] == ([keyid] if verified else [])
        assert found["signature"] == ("verified" if verified else "not verified" if signed else "unsigned")
        assert set(found) - set(wanted) == {"other"}


def test_a_signature_that_does_not_hold_has_no_signer(tmp_path: Path, release: SigningKey) -> None:
    path = tmp_path / "b.resvit"
    write_bundle(path, Manifest("demo"), {"model.onnx": b"weights"}, release)
    assert describe_file(path, tmp_path / "release.pub")["signature_note"] == "by release"
    with (tmp_path / "release.pub").open("a") as stream:
        stream.write("Revoked: yes\n")
    found = describe_file(path, tmp_path / "release.pub")
    assert (found["signature"], found["signed_by"]) == ("not verified", [])
    assert "revoked" in found["signature_note"]
    (tmp_path / "release.pub").write_text("doubtful")
    assert "not an Ed25519" in describe_file(path, tmp_path / "release.pub")["signature_note"]
    forged = dataclasses.replace(release, sign=lambda data: release.sign(data + b"x"))
    write_bundle(path, Manifest("demo"), {"model.onnx": b"weights"}, forged)
    (tmp_path / "release.pub").write_text(release.public.to_text())
    assert "does not hold" in describe_file(path, tmp_path / "release.pub")["signature_note"]


@pytest.mark.parametrize("kind", ["c.pt", "w.safetensors", "p.pt2", "q.onnx", "engine.plan", "b.resvit"])
def test_truncated_empty_and_foreign_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "c.pt":
        torch.save(Net().state_dict(), path)
    elif kind == "w.safetensors":
        save_file(Net().state_dict(), path)
    elif kind == "p.pt2":
        torch.export.save(torch.export.export(Net().eval(), (torch.zeros(1, 3, 8, 8),)), path)
    elif kind == "q.onnx":
        quantized_onnx(path)
    elif kind == "b.resvit":
        write_bundle(path, Manifest(), {"model.onnx": b"weights" * 100})
    else:
        path.write_bytes(b"vtrt" + bytes(200))
        (tmp_path / "engine.json").write_text(json.dumps(engine_report().to_json()))
    whole = path.read_bytes()
    for content in (whole[: len(whole) * 2 // 3], whole[:40], b"", b"\x00" * 300, b"hello, world\n" * 20):
        path.write_bytes(content)
        with pytest.raises(ResvitError) as caught:
            describe_file(path)
        assert caught.value.fix


def test_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    for path in (tmp_path, tmp_path / "missing.onnx", tmp_path / "notes.txt", tmp_path / "other.zip"):
        with pytest.raises(ResvitError):
            describe_file(path)


def test_names_from_files_reach_the_terminal_as_plain_text() -> None:
    tensors = [{"name": f"[red]{index}[/red]\x1b[2J", "shape": [], "dtype": "x"} for index in range(ROWS + 5)]
    out = io.StringIO()
    console = Console(file=out, width=120)
    for item in render({"kind": "checkpoint", "tensors": tensors}):
        console.print(item)
    assert "[red]0[/red]" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "5 more with --json" in out.getvalue()
