"""The whole way, on the trained reference hybrid and part of the real Fashion-MNIST."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from conftest import BEFORE_QUANTIZE
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.bundle.bundle import extract_bundle, read_manifest, verify_bundle
from resvit_engines.errors import ExitCode
from resvit_engines.keys.public import read_public_key
from resvit_export.cli.main import run

MODEL = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt", "--data", "fashion-mnist"]


def result(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, object]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == code
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def stage(document: dict[str, object], name: str) -> dict[str, object]:
    stages: list[dict[str, object]] = document["stages"]  # type: ignore[assignment]
    return next(item for item in stages if item["stage"] == name)


@pytest.mark.whole
def test_int8_for_a_jetson_is_validated_and_bundled(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/embed-nano", "jetson-orin")
    made = result(capsys, "build", "--precision", "int8", "--target", "jetson-orin", *MODEL)
    assert made["verdict"] == "accepted"
    verdict = stage(made, "validate")["results"]["verdict.json"]  # type: ignore[index]
    original, onnx_float, quantized = verdict["stages"]
    assert original["top1"] > 0.85
    assert onnx_float["agreement"] == 1.0
    assert onnx_float["sqnr_db"] > 80
    assert quantized["agreement"] > 0.985
    assert quantized["sqnr_db"] > 25
    coverage = stage(made, "quantize")["results"]["quantize.json"]  # type: ignore[index]
    assert coverage["macs_share"] > 0.98
    assert coverage["groups"]["head"]["quantized_nodes"] == 0

    bundle = Path(str(made["bundle"]))
    manifest = verify_bundle(bundle)
    assert manifest.verdict.verdict == "accepted"
    assert manifest.target.sm == 87
    assert any("trtexec" in command for command in manifest.plan.commands)
    assert zipfile.is_zipfile(bundle)
    extract_bundle(bundle, workspace / "unpacked")
    golden = np.load(workspace / "unpacked" / "golden_input.npy")
    expected = np.load(workspace / "unpacked" / "golden_output.npy")
    model = workspace / "unpacked" / "model.onnx"
    np.testing.assert_allclose(onnx_runner(model)({"input": golden})["logits"], expected, atol=1e-3)
    operators = {node.op_type for node in onnx.load(model).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert str(workspace) not in json.dumps(manifest.to_json())


@pytest.mark.slow
@pytest.mark.whole
def test_an_engine_for_an_rtx_card_is_built_here_and_shares_the_folded_network(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/x", "jetson-orin")
    # All that is the card's own but the folded network: that must be the Jetson's.
    seeded("runs/x", "rtx-4090", stages=("export", "calibrate", "baseline", "reference"))
    first = result(capsys, "build", "--target", "jetson-orin", *MODEL, "--run", "runs/x")
    second = result(capsys, "build", "--target", "rtx-4090", *MODEL, "--run", "runs/x")
    assert stage(second, "fold")["reused"]
    assert stage(second, "fold")["folder"] == stage(first, "fold")["folder"]
    engine = stage(second, "compile")["results"]["engine.json"]  # type: ignore[index]
    assert engine["sm"] == 89
    assert engine["bytes"] > 100_000
    assert any("Int8" in str(kernel["inputs"]) for kernel in engine["kernels"])
    manifest = read_manifest(Path(str(second["bundle"])))
    assert "engine.plan" in {file.path for file in manifest.files}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("precision", ["fp8", "fp16"])
def test_other_precisions(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str], precision: str
) -> None:
    seeded("runs/embed-nano", "rtx-4090", stages=BEFORE_QUANTIZE)
    made = result(capsys, "build", "--target", "rtx-4090", "--precision", precision, *MODEL)
    assert made["verdict"] == "accepted"
    quantized = stage(made, "validate")["results"]["verdict.json"]["stages"][-1]  # type: ignore[index]
    assert quantized["sqnr_db"] > {"fp8": 20, "fp16": 45}[precision]


@pytest.mark.slow
@pytest.mark.whole
def test_the_same_inputs_give_the_same_bundle_and_a_second_build_does_nothing(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    # One begins with what was built elsewhere, in another folder and process; the other from nothing.
    seeded("one/same", "jetson-orin")
    bundles = [
        Path(str(result(capsys, "build", "--target", "jetson-orin", *MODEL, "--run", f"{place}/same")["bundle"]))
        for place in ("one", "two")
    ]
    assert bundles[0].read_bytes() == bundles[1].read_bytes()
    again = result(capsys, "build", "--run", "one/same")
    assert all(item["reused"] for item in again["stages"])  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.whole
def test_the_recipe_of_a_run_reproduces_it(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    for folder in ("runs/a", "runs/b"):
        seeded(folder, "rtx-4090", stages=BEFORE_QUANTIZE)
    first = result(capsys, "quantize", "--target", "rtx-4090", "--exclude", "blocks.1*", *MODEL, "--run", "runs/a")
    second = result(capsys, "quantize", "--recipe", "runs/a/recipe.toml", "--run", "runs/b")
    assert Path(str(first["folder"])).name == Path(str(second["folder"])).name
    for file in ("model.onnx", "quantize.json"):
        one, two = (Path(str(item["folder"])) / file for item in (first, second))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
@pytest.mark.whole
def test_an_onnx_model_skips_the_torch_stages(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/torch", "rtx-4090", stages=("fold", "export"))
    exported = result(capsys, "export", "--target", "rtx-4090", *MODEL[:4], "--run", "runs/torch")
    model = Path(str(exported["folder"])) / "model.onnx"
    normal = ["--preprocess", "mean=0.286", "--preprocess", "std=0.353"]
    made = result(capsys, "build", "--model", str(model), "--target", "rtx-4090", "--data", "fashion-mnist", *normal)
    assert [item["stage"] for item in made["stages"]][:2] == ["export", "calibrate"]  # type: ignore[attr-defined]
    verdict = stage(made, "validate")["results"]["verdict.json"]  # type: ignore[index]
    assert [item["stage"] for item in verdict["stages"]] == ["onnx float", "onnx int8"]
    assert made["verdict"] == "accepted"


@pytest.mark.slow
@pytest.mark.whole
def test_a_rejected_model_is_neither_compiled_nor_bundled_unless_allowed(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seeded: Callable[..., str]
) -> None:
    seeded("runs/embed-nano", "rtx-4090", stages=BEFORE_QUANTIZE)
    # A quantiser that clips all activations to a hundredth: what a bad calibration does, made certain.
    from resvit_quantize.qdq import insert as qdq

    honest = qdq.scale_from_amax
    monkeypatch.setattr(
        qdq, "scale_from_amax", lambda amax, *rest: honest(amax / (100 if np.ndim(amax) == 0 else 1), *rest)
    )
    made = result(capsys, "build", "--target", "rtx-4090", "--no-search", *MODEL, code=ExitCode.REJECTED)
    assert made["verdict"] == "rejected"
    assert made["bundle"] is None
    assert Path(str(made["report"])).exists()
    assert not list(Path("runs/embed-nano").glob("compile-*"))
    allowed = result(capsys, "build", "--target", "rtx-4090", "--no-search", *MODEL, "--allow-rejected")
    manifest = read_manifest(Path(str(allowed["bundle"])))
    assert manifest.verdict.verdict == "rejected"
    assert "did not accept" in manifest.warning


@pytest.mark.whole
def test_too_few_images_are_undecided_and_the_number_needed_is_said(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/embed-nano", "rtx-4090", stages=("fold", "export", "calibrate", "quantize"))
    few = ["--validation-images", "40"]
    found = result(capsys, "validate", "--target", "rtx-4090", *MODEL, *few, code=ExitCode.UNDECIDED)
    verdict = found["results"]["verdict.json"]  # type: ignore[index]
    assert verdict["verdict"] == "undecided"
    assert verdict["images_needed"] > 40
    assert str(verdict["images_needed"]) in verdict["reason"].replace(",", "")


@pytest.mark.slow
@pytest.mark.whole
def test_a_baseline_at_chance_level_is_called_out(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = ["--model", "resvit:embed-nano", "--data", "fashion-mnist"]
    found = result(capsys, "validate", "--target", "rtx-4090", *random, code=ExitCode.UNDECIDED)
    verdict = found["results"]["verdict.json"]  # type: ignore[index]
    assert verdict["chance_level"]


@pytest.mark.slow
@pytest.mark.whole
def test_the_modelopt_quantizer_goes_through_the_same_gate(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    pytest.importorskip("modelopt")
    seeded("runs/embed-nano", "rtx-4090", stages=BEFORE_QUANTIZE)
    made = result(capsys, "build", "--target", "rtx-4090", "--quantizer", "modelopt", *MODEL)
    assert made["verdict"] == "accepted"
    report = stage(made, "quantize")["results"]["quantize.json"]  # type: ignore[index]
    assert report["quantizer"] == "modelopt"
    assert report["macs_share"] > 0.5


@pytest.mark.slow
@pytest.mark.whole
def test_a_dynamic_batch(workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]) -> None:
    seeded("runs/embed-nano", "rtx-4090", stages=("fold", "reference"))
    made = result(capsys, "build", "--target", "rtx-4090", "--batch", "1:4:8", *MODEL)
    assert made["verdict"] == "accepted"
    engine = stage(made, "compile")["results"]["engine.json"]  # type: ignore[index]
    assert engine["inputs"][0]["shape"][0] == -1


@pytest.mark.slow
@pytest.mark.whole
def test_no_path_of_this_machine_travels(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way of naming data and model, looked for in all of the bundle's bytes."""
    from resvit_calibrate.readers.fashion_mnist import read_split

    images, labels = read_split("test")
    np.savez("set.npz", images=images, labels=labels)
    Path("net.py").write_text(
        "from resvit_export.models.reference import resvit_model\nmake = lambda: resvit_model('embed-nano')\n"
    )
    own = ["--model", "net.py:make", "--checkpoint", "runs/demo/embed-nano.pt", "--data", "set.npz"]
    assert run(["keygen", "my.key", "-q"]) == 0
    own += ["--key", "my.key", "--timing-cache", "kept"]
    made = result(capsys, "build", "--target", "rtx-4090", *own)
    assert made["verdict"] == "accepted"
    assert str(workspace).encode() not in Path(str(made["bundle"])).read_bytes()
    said = result(capsys, "inspect", str(made["bundle"]), "--trust", "my.pub")
    assert (said["signature"], said["signed_by"]) == ("verified", [read_public_key(Path("my.pub")).keyid])


@pytest.mark.slow
@pytest.mark.whole
def test_two_targets_share_what_does_not_differ(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    # Each target's own; what they share is still to be made, and by one of them only.
    for target in ("jetson-orin", "rtx-4090"):
        seeded("both", target, stages=("export", "calibrate", "quantize"))
    capsys.readouterr()  # of the builds that these stages come from, where this test is the first to ask for them
    line = "build --json --target rtx-4090 --target jetson-orin --precision int8 --model resvit:embed-nano "
    line += "--checkpoint runs/demo/embed-nano.pt --data fashion-mnist --validation-images 400 --run both"
    assert run([*shlex.split(line), "--max-drop", "3"]) == 0
    found = json.loads(capsys.readouterr().out)["targets"]
    assert set(found) == {"rtx-4090", "jetson-orin"}
    stages = {name: {stage["stage"]: stage for stage in item["stages"]} for name, item in found.items()}
    assert not any(stages[name]["fold"]["reused"] for name in stages)  # made by this command, once for both
    assert stages["rtx-4090"]["fold"]["folder"] == stages["jetson-orin"]["fold"]["folder"]
    assert len(list(Path("both").glob("reference-*"))) == 1
    assert "engine.json" in stages["rtx-4090"]["compile"]["results"]
    assert "plan.json" in stages["jetson-orin"]["compile"]["results"]
    assert {Path(item["report"]).name for item in found.values()} == {"report-rtx-4090.html", "report-jetson-orin.html"}
    # The recipe that the run keeps names both, and repeats it.
    assert run(["report", "--run", "both"]) == 0
    assert run(["sensitivity", "--run", "both"]) == ExitCode.INPUT
    assert "Name one of them" in capsys.readouterr().err


def test_a_target_that_cannot_is_refused_before_any_work(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "build --target rtx-4090 --target jetson-orin --precision fp8 --model resvit:embed-nano --data fashion-mnist"
    assert run([*shlex.split(line), "--run", "no"]) == ExitCode.IMPOSSIBLE
    assert "FP8 needs compute capability 8.9" in capsys.readouterr().err
    assert not Path("no").exists()
