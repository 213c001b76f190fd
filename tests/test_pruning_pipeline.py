"""Pruning on the whole way: through build, as a checkpoint that loads again, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run

pytestmark = pytest.mark.whole

MODEL = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt"]
DATA = ["--data", "fashion-mnist", "--validation-images", "2000"]


def result(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, object]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == code
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: ExitCode) -> str:
    capsys.readouterr()
    assert run([*arguments]) == code
    return capsys.readouterr().err


def results(document: dict[str, object], name: str, file: str) -> dict[str, object]:
    stages: list[dict[str, object]] = document["stages"]  # type: ignore[assignment]
    return next(item for item in stages if item["stage"] == name)["results"][file]  # type: ignore[index]


@pytest.mark.slow
def test_build_prunes_trains_quantises_and_judges_against_the_unpruned_network(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--prune-macs", "0.6", "--train-data", "fashion-mnist", "--prune-epochs", "1", "--train-images", "2000"]
    build = ["build", "--target", "rtx-4090", *MODEL, *DATA, *more, "--max-drop", "60", "--run", "runs/p"]
    made = result(capsys, *build)
    assert made["verdict"] == "accepted"
    pruned = results(made, "prune", "prune.json")
    assert 0.4 < pruned["after"]["macs"] / pruned["before"]["macs"] <= 0.6  # type: ignore[index]
    assert pruned["curves"]
    rows = results(made, "validate", "verdict.json")["stages"]
    assert [row["stage"] for row in rows] == ["pytorch", "pruned", "onnx float", "onnx int8"]  # type: ignore[union-attr]
    assert rows[0]["top1"] > 0.85  # type: ignore[index]
    # Training wins back what pruning lost; the quantised network is compared with the unpruned one.
    assert rows[2]["agreement"] > rows[1]["agreement"]  # type: ignore[index]
    assert rows[3]["agreement"] < 0.999  # type: ignore[index]
    again = result(capsys, *build)
    assert all(item["reused"] for item in again["stages"])  # type: ignore[union-attr,index]
    page = (workspace / "runs/p/report.html").read_text()
    assert "What each group bears" in page
    assert not (workspace / "runs/p/retrain.resume").exists()

    # The checkpoint is one like any other, in a process that never sees the pruning library.
    (weights,) = workspace.glob("runs/p/retrain-*/retrained.pt")
    code = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "from resvit_export.loading.spec import ModelSpec; from resvit_export.loading.load import load_network\n"
        "from pathlib import Path\n"
        f"network = load_network(ModelSpec('resvit:embed-nano', Path({str(weights)!r})))\n"
        "print(sum(p.numel() for p in network.module.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) == pruned["after"]["params"]  # type: ignore[index]
    # And so is the program.
    exported = result(capsys, "export", "--model", str(weights.with_suffix(".pt2")), "--run", "runs/q")
    assert exported["results"]["export.json"]["bytes"] < 0.9 * 1_100_000  # type: ignore[index]
    # A pruned network can be pruned further.
    once = ["prune", "--model", "resvit:embed-nano", "--checkpoint", str(weights), *DATA, "--prune-macs", "0.8"]
    twice = result(capsys, *once, "--run", "runs/r")
    document = twice["results"]["prune.json"]  # type: ignore[index]
    assert document["before"]["params"] == pruned["after"]["params"]  # type: ignore[index]
    (weights,) = workspace.glob("runs/r/prune-*/pruned.pt")
    result(capsys, "fold", "--model", "resvit:embed-nano", "--checkpoint", str(weights), "--run", "runs/s")


@pytest.mark.slow
def test_without_images_magnitude_decides_and_a_warning_is_given(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del workspace
    assert run(["prune", *MODEL, "--prune-params", "0.7", "--run", "runs/p"]) == 0
    shown = capsys.readouterr()
    assert "magnitude" in shown.out
    assert "Nothing is trained behind pruning" in shown.err


@pytest.mark.slow
def test_two_to_four_stays_in_the_quantised_weights(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    import onnx

    made = result(capsys, "prune", *MODEL, *DATA, "--sparsity", "2:4", "--run", "runs/p")
    document = made["results"]["prune.json"]  # type: ignore[index]
    assert document["sparsity"]["share"] > 0.5
    result(capsys, "quantize", *MODEL, *DATA, "--sparsity", "2:4", "--effort", "best", "--run", "runs/p")
    (path,) = workspace.glob("runs/p/quantize-*/model.onnx")
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    weights = [array for array in stored if array.dtype == np.int8 and array.ndim == 4 and array.shape[1] % 4 == 0]
    assert weights
    sparse = [(np.moveaxis(w, 1, -1).reshape(-1, 4) != 0).sum(1).max() <= 2 for w in weights]
    assert all(sparse)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--prune-macs", "0.5", "--prune-params", "0.5"], ExitCode.INPUT, "Choose one"),
        (["--prune-macs", "1.5"], ExitCode.INPUT, "out of range"),
        (["--prune-macs", "0.02"], ExitCode.INPUT, "can go"),
        (["--prune-latency", "0.5"], ExitCode.INPUT, "--target"),
        (["--prune-macs", "0.5", "--train-data", "nowhere"], ExitCode.INPUT, "does not exist"),
        ([], ExitCode.INPUT, "how far to prune"),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_a_reason(
    workspace: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: ExitCode, said: str
) -> None:
    del workspace
    assert said in refused(capsys, "prune", *MODEL, *DATA, *more, "--run", "runs/p", code=code)


def test_a_graph_without_modules_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del workspace
    message = refused(
        capsys, "prune", "--model", "m.onnx", "--prune-macs", "0.5", "--run", "runs/p", code=ExitCode.IMPOSSIBLE
    )
    assert "PyTorch modules" in message


@pytest.mark.slow
def test_a_structure_of_another_model_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "prune", *MODEL, *DATA, "--prune-macs", "0.7", "--run", "runs/p")
    (weights,) = workspace.glob("runs/p/prune-*/pruned.pt")
    message = refused(
        capsys,
        "fold",
        "--model",
        "resvit:fpn-nano",
        "--checkpoint",
        str(weights),
        "--run",
        "runs/q",
        code=ExitCode.INPUT,
    )
    assert "was pruned from another model" in message
