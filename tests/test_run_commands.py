"""``resvit-engine run`` and ``bench`` on signed bundles and on what is installed; ``resvit-export bench`` on runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine_reports import engine_report
from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.cli.main import run as engine_cli
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT
from resvit_engines.targets.table import Builder, find_target
from resvit_export.cli.main import run as export_cli
from resvit_export.stages import compile as compiling
from resvit_export.tools import bench as benching
from test_run import MANIFEST, by_numpy, pictures, small_model
from test_signing import KEY

TIMES = ["--iterations", "24", "--warmup", "0"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with a signed bundle, its key, images, and room to install."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RESVIT_TRUST", raising=False)
    monkeypatch.setenv("RESVIT_ROOT", str(folder / "root"))
    bundle(folder / "net.resvit")
    (folder / "release.pub").write_text(KEY.public.to_text())
    (folder / "release.pub").chmod(0o644)
    np.save(folder / "x.npy", pictures(6))
    return folder


def bundle(path: Path, key=KEY, name: str = "net", seed: int = 0) -> Path:
    model = small_model(path.with_suffix(".onnx"), seed=seed)
    golden = {}
    for end, array in (("input", pictures(4)), ("output", by_numpy(model, pictures(4)))):
        np.save(path.with_name(f"golden_{end}.npy"), array)
        golden[f"golden_{end}.npy"] = path.with_name(f"golden_{end}.npy")
    manifest = dataclasses.replace(MANIFEST, name=name, target=find_target("rtx-4090"))
    write_bundle(path, manifest, {"model.onnx": model, **golden}, key)
    for file in (model, *golden.values()):
        file.unlink()
    return path


def ran(capfd, *arguments: str, code: int = 0) -> str:
    assert engine_cli(list(arguments)) == code
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    return said.err if code else said.out


def test_a_bundle_runs(place, capfd, tmp_path) -> None:
    said = ran(capfd, "run", "net.resvit", "--input", "x.npy", "--output", "y.npy", "--trust", "release.pub")
    assert "not the engine" in said
    assert "There is no engine in this bundle" in said
    expected = by_numpy(small_model(tmp_path / "model.onnx"), pictures(6))
    np.testing.assert_allclose(np.load("y.npy"), expected, atol=5e-3)
    assert sorted(path.name for path in place.iterdir()) == ["net.resvit", "release.pub", "x.npy", "y.npy"]


def test_what_is_installed_runs_by_its_name(place, capfd) -> None:
    trust = ["--trust", "release.pub"]
    ran(capfd, "install", "net.resvit", *trust, "--rehearse")
    done = json.loads(ran(capfd, "run", "net", "--input", "x.npy", "--output", "y.npy", *trust, "--json"))
    assert (done["images"], done["output"], done["shape"]) == (6, "logits", [6, 5])
    version = next((place / "root/net/versions").iterdir())
    model = version / "model.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    Path("y.npy").unlink()
    said = ran(
        capfd, "run", "net", "--input", "x.npy", "--output", "y.npy", *trust, code=ExitCode.UNTRUSTED
    )  # fmt: skip
    assert "model.onnx" in said
    assert not Path("y.npy").exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda: Path("release.pub").write_text(signing("other").to_text()), ExitCode.UNTRUSTED),
        (lambda: bundle(Path("net.resvit"), key=None), ExitCode.UNTRUSTED),
        (lambda: Path("x.npy").write_bytes(b"no array"), ExitCode.INPUT),
        (lambda: Path("x.npy").unlink(), ExitCode.INPUT),
        (lambda: np.save("x.npy", pictures(1)[:, :, :4]), ExitCode.INPUT),
        (lambda: np.save("x.npy", (pictures(1) * 9).astype(np.uint8)), ExitCode.INPUT),
        (lambda: Path("net.resvit").unlink(), ExitCode.INPUT),
    ],
)
def test_what_cannot_be_run_leaves_no_output(place, capfd, change, code) -> None:
    change()
    ran(
        capfd, "run", "net.resvit", "--input", "x.npy", "--output", "y.npy", "--trust", "release.pub", code=code
    )  # fmt: skip
    assert not Path("y.npy").exists()


def signing(name: str):
    from test_signing import signing_key

    return signing_key(b"o" * 32, name).public


def test_another_output_is_named_or_refused(place, capfd) -> None:
    line = ["run", "net.resvit", "--input", "x.npy", "--output", "y.npy", "--trust", "release.pub", "--output-name"]
    assert "It has logits" in ran(capfd, *line, "features", code=ExitCode.INPUT)
    ran(capfd, *line, "logits")


def test_a_bundle_is_timed_alone_and_against_another(place, capfd) -> None:
    bundle(place / "other.resvit", seed=1)
    trust = ["--trust", "release.pub", *TIMES]
    assert "images/s" in ran(capfd, "bench", "net.resvit", *trust)
    alone = json.loads(ran(capfd, "bench", "net.resvit", "--batch", "3", *trust, "--json"))
    assert (alone["batch"], alone["iterations"], alone["gpu_ms"]) == (3, 24, None)
    both = json.loads(ran(capfd, "bench", "net.resvit", "--against", "other.resvit", *trust, "--json"))
    assert both["baseline"] == "other.resvit"
    assert "says nothing of the device" in both["runners"][1]["verdict"]
    assert ran(capfd, "bench", "net.resvit", "--against", "other.resvit", *trust, "-q").count("\n") == 1


def test_the_engine_cannot_be_asked_for_where_there_is_none(place, capfd) -> None:
    said = ran(capfd, "bench", "net.resvit", "--trust", "release.pub", "--runtime", "tensorrt", code=ExitCode.MISSING)
    assert "no engine" in said


def test_onnx_files_are_timed_side_by_side(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a.onnx", 0), ("b.onnx", 1)):
        small_model(tmp_path / name, seed=seed)
    assert export_cli(["bench", "--run", "a.onnx", "--run", "b.onnx", *TIMES, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [item["name"] for item in found["runners"]] == ["a.onnx: a.onnx", "b.onnx: b.onnx"]
    assert export_cli(["bench", "--run", "a.onnx", *TIMES]) == 0
    assert "not the engine" in capfd.readouterr().out
    assert export_cli(["bench", "--run", "a.onnx", "--runtime", "tensorrt"]) == ExitCode.INPUT
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for source, says in (("notes.txt", "no run folder"), ("empty", "recipe")):
        assert export_cli(["bench", "--run", source]) == ExitCode.INPUT
        assert says in capfd.readouterr().err


@pytest.fixture
def quantized_run(workspace) -> Path:
    line = "--model resvit:embed-nano --checkpoint runs/demo/embed-nano.pt --data fashion-mnist --target rtx-4090"
    few = "--calibration-images 32 --prune-macs 0.8 --run runs/slim -q"
    assert export_cli(["quantize", *line.split(), *few.split()]) == 0
    return workspace / "runs/slim"


@pytest.mark.slow
@pytest.mark.whole
def test_a_run_brings_what_it_is_compared_with(quantized_run, capfd, monkeypatch) -> None:
    """One run for everything: pruning and quantising take longer than all that is looked at here."""
    capfd.readouterr()
    assert export_cli(["bench", "--run", str(quantized_run), *TIMES, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [item["name"] for item in found["runners"]] == ["FP16, unpruned", "FP16, pruned", "INT8, pruned"]
    assert all("not the engine" in item["label"] for item in found["runners"])
    assert all(item["verdict"].endswith("says nothing of the device") for item in found["runners"][1:])

    finished = sorted(quantized_run.iterdir())
    sizes = {}
    for half in quantized_run.glob("half-*"):
        assert not any(line in (half / "model.onnx").read_bytes() for line in (b"QuantizeLinear",))
        sizes[half.name] = (half / "model.onnx").stat().st_size
    assert len(sizes) == 2
    assert export_cli(["bench", "--run", str(quantized_run), *TIMES, "-q"]) == 0
    assert capfd.readouterr().out.count("\n") == 2
    assert sorted(quantized_run.iterdir()) == finished

    assert export_cli(["bench", "--run", str(quantized_run), "--target", "a10"]) == ExitCode.INPUT
    assert "It was for rtx-4090" in capfd.readouterr().err
    code = export_cli(["bench", "--run", str(quantized_run), "--runtime", "rtx"])
    assert code == (ExitCode.IMPOSSIBLE if benching.why_not_here(Builder.RTX, 89) else 0)
    capfd.readouterr()

    # With a GPU: every network gets its engine, and what is opened is the file that was built.
    opened = []
    small = small_model(quantized_run / "small.onnx")

    def build(onnx, engine, *rest):
        engine.write_bytes(b"engine of " + onnx.parent.name.encode())
        return engine_report(builder=Builder.RTX, sm=89)

    def open_built(engine, sha256, report, onnx):
        opened.append((report.builder, engine.read_bytes(), sha256))
        assert onnx.name == "model.tensorrt.onnx"  # with what TensorRT alone reads, for an engine without weights
        return benching.open_onnx(small)

    monkeypatch.setattr(benching, "why_not_here", lambda *_, **__: None)
    monkeypatch.setattr(compiling, "build_engine", build)
    monkeypatch.setattr(benching, "open_built", open_built)
    runners, _ = benching._open_run(quantized_run, None, "auto", SILENT)
    assert list(runners) == ["FP16, unpruned", "FP16, pruned", "INT8, pruned"]
    assert [builder for builder, _, _ in opened] == [Builder.RTX] * 3
    assert len({content for _, content, _ in opened}) == len({sha256 for _, _, sha256 in opened}) == 3

    shutil.rmtree(next(quantized_run.glob("quantize-*")))
    with pytest.raises(ResvitError, match="'quantize' is not finished"):
        benching._open_run(quantized_run, None, "auto", SILENT)
