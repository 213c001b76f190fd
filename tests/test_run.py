"""From an unpacked bundle to outputs: which runtime is taken, ONNX Runtime on the CPU, and the golden check."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine_reports import engine_report
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import BundledFile, GoldenFiles
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_file
from resvit_engines.ort import sessions
from resvit_engines.plugins.onnx_wire import with_float32_quantizers
from resvit_engines.records import Record
from resvit_engines.run import golden_files, onnx_on_cpu
from resvit_engines.run import runner as run
from resvit_engines.run.golden import TOLERANCE_DB, check_runner, golden_check
from resvit_engines.run.onnx_on_cpu import open_onnx
from resvit_engines.run.runner import open_runner
from resvit_engines.trt.io_tensor import IoTensor


def small_model(path: Path, batch: int | None = None, seed: int = 0, target=np.int8) -> Path:
    """A quantised network: images float32 [B, 3, 8, 8] → FP16 → Q/DQ → Gemm → logits float32 [B, 5]."""
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((192, 5)) / 14).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["input"], ["half"], "to_half", to=TensorProto.FLOAT16),
        helper.make_node("Flatten", ["half"], ["flat"], "flatten"),
        helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "dequantize"),
        helper.make_node("MatMul", ["dq", "weight"], ["product"], "matmul"),
        helper.make_node("Cast", ["product"], ["logits"], "to_float", to=TensorProto.FLOAT),
    ]
    initializers = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array(0.031, np.float16), "scale"),
        numpy_helper.from_array(np.zeros((), target), "zero"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch or "B", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch or "B", 5])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def pictures(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


def by_numpy(model: Path, images: np.ndarray) -> np.ndarray:
    """What the graph means: FP16 input, rounded to 8-bit steps, times the weights."""
    weight = numpy_helper.to_array(next(t for t in onnx.load(model).graph.initializer if t.name == "weight"))
    scale = np.float16(0.031)
    flat = images.reshape(len(images), -1).astype(np.float16)
    steps = np.clip(np.rint(flat.astype(np.float32) / np.float32(scale)), -128, 127)
    return (steps.astype(np.float32) * np.float32(scale)) @ weight.astype(np.float32)


@pytest.fixture
def folder(tmp_path) -> Path:
    """An unpacked bundle without an engine."""
    place = tmp_path / "bundle"
    place.mkdir()
    model = small_model(place / "model.onnx")
    np.save(place / "golden_input.npy", pictures(8))
    np.save(place / "golden_output.npy", by_numpy(model, pictures(8)))
    return place


MANIFEST = Manifest(input=IoTensor("input", ("B", 3, 8, 8)), golden=GoldenFiles())


def with_engine(folder: Path, **record) -> Manifest:
    (folder / "engine.plan").write_bytes(b"engine")
    file = BundledFile("engine.plan", 6, sha256_file(folder / "engine.plan"))
    return dataclasses.replace(MANIFEST, engine=engine_report(**record), files=(file,))


@pytest.fixture
def gpu(monkeypatch):
    """Makes this machine one with a GPU of this SM and with these modules."""

    def pretend(sm: int | None, *modules: str) -> None:
        monkeypatch.setattr(run, "local_sm", lambda: sm)
        monkeypatch.setattr(run, "installed", lambda module: module in modules)

    return pretend


@pytest.mark.parametrize("count", [1, 5, 130])
@pytest.mark.parametrize("batch", [None, 4])
def test_onnx_runtime_computes_what_the_graph_means(tmp_path, batch, count) -> None:
    model = small_model(tmp_path / "model.onnx", batch=batch)
    with open_onnx(model) as runner:
        found = runner({"input": pictures(count)})["logits"]
        assert runner.label.endswith("on the CPU, not the engine")
        assert runner.batch[0] == (batch or 1)
    assert found.shape == (count, 5)
    np.testing.assert_allclose(found, by_numpy(model, pictures(count)), atol=5e-3)


def test_onnx_runtime_survives_a_transposed_product_in_fp16(tmp_path) -> None:
    """Its own optimiser makes of this a graph on which the process dies: so in a process of its own."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], "turn", perm=[1, 0, 2]),
        helper.make_node("MatMul", ["turned", "weight"], ["y"], "multiply"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in (("x", ["B", 4, 8]), ("y", [4, "B", 8]))
    ]
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float16), "weight")
    graph = helper.make_graph(nodes, "turned", ends[:1], ends[1:], [weight])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )
    code = (
        "import numpy as np; from pathlib import Path; from resvit_engines.run.onnx_on_cpu import open_onnx\n"
        "x = np.arange(64, dtype=np.float16).reshape(2, 4, 8)\n"
        "with open_onnx(Path('model.onnx')) as runner:\n"
        "    assert np.array_equal(runner.run({'x': x})['y'], x.transpose(1, 0, 2))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_onnx_runtime_refuses_what_is_not_the_models(tmp_path) -> None:
    with open_onnx(small_model(tmp_path / "model.onnx")) as runner:
        for arrays, says in (({"images": pictures(1)}, "'input'"), ({"input": pictures(1)[..., :4]}, "[B, 3, 8, 8]")):
            with pytest.raises(ResvitError) as caught:
                runner(arrays)
            assert says in str(caught.value)
    with pytest.raises(ResvitError, match="closed"):
        runner({"input": pictures(1)})


def test_a_file_that_is_no_model_is_a_sentence(tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    for path in (tmp_path / "model.onnx", tmp_path / "absent.onnx"):
        with pytest.raises(ResvitError):
            open_onnx(path)


def test_without_onnx_runtime_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(sessions.importlib, "import_module", refuse)
    with pytest.raises(ResvitError) as caught:
        open_onnx(small_model(tmp_path / "model.onnx"))
    assert caught.value.code is ExitCode.MISSING


def test_an_old_runtime_gets_float32_in_front_of_its_quantizers(tmp_path, monkeypatch) -> None:
    """The casts change no value; what they lead around is in ONNX Runtime 1.23 and 1.24 alone."""
    model = small_model(tmp_path / "model.onnx")
    with open_onnx(model) as runner:
        plain = runner({"input": pictures(9)})["logits"]
    rewritten: list[int] = []
    monkeypatch.setattr(onnx_on_cpu, "_SOUND", (99, 0))
    monkeypatch.setattr(
        onnx_on_cpu, "with_float32_quantizers", lambda data: rewritten.append(1) or with_float32_quantizers(data)
    )
    with open_onnx(model) as runner:
        cast = runner({"input": pictures(9)})["logits"]
    assert rewritten
    np.testing.assert_allclose(cast, plain, atol=2e-3)


def test_the_casts_are_those_that_the_host_writes(tmp_path) -> None:
    """Against calibration's own rewriting, which uses the package onnx."""
    from resvit_calibrate.runtime.selftest import with_float32_quantizers as by_onnx

    body = [helper.make_node("QuantizeLinear", ["a", "b", "c"], ["d"])]
    function = helper.make_function("ai.resvit", "Mine", ["a", "b", "c"], ["d"], body, [helper.make_opsetid("", 20)])
    for kind in (np.int8, ml_dtypes.float8_e4m3fn):
        path = small_model(tmp_path / "model.onnx", target=kind)
        model = onnx.load(path)
        model.functions.append(function)
        onnx.save(model, path)
        ours = onnx.load_model_from_string(with_float32_quantizers(path.read_bytes()))
        theirs = onnx.load_model_from_string(by_onnx(path))
        for got, want in ((ours.graph, theirs.graph), (ours.functions[0], theirs.functions[0])):
            assert [(n.op_type, list(n.input), list(n.output)) for n in got.node] == [
                (n.op_type, list(n.input), list(n.output)) for n in want.node
            ]
        assert ours.graph.initializer == theirs.graph.initializer
        assert len(ours.graph.node) == (8 if kind is np.int8 else 6)
        onnx.checker.check_model(ours)


@pytest.mark.parametrize("data", [b"\xff", b"\x3a\x05ab", b"\x0f", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"])
def test_what_is_no_protobuf_is_refused(data) -> None:
    with pytest.raises(ResvitError, match="ONNX"):
        with_float32_quantizers(data)


def test_auto_takes_onnx_runtime_where_there_is_no_engine(folder, gpu) -> None:
    gpu(87, "tensorrt", "cuda.bindings")
    with open_runner(folder, MANIFEST) as runner:
        assert runner.runtime == "onnxruntime"
        assert "no engine" in runner.why


@pytest.mark.parametrize(
    ("sm", "modules", "why", "code"),
    [
        (None, ("tensorrt", "cuda.bindings"), "no NVIDIA GPU", ExitCode.IMPOSSIBLE),
        (89, ("tensorrt", "cuda.bindings"), "SM 8.7", ExitCode.IMPOSSIBLE),
        (87, ("cuda.bindings",), "TensorRT is not installed", ExitCode.MISSING),
        (87, ("tensorrt",), "cuda-bindings is not installed", ExitCode.MISSING),
    ],
)
def test_auto_says_why_it_is_not_the_engine(folder, gpu, sm, modules, why, code) -> None:
    gpu(sm, *modules)
    manifest = with_engine(folder)
    with open_runner(folder, manifest) as runner:
        assert why in runner.why
        assert runner({"input": pictures(2)})["logits"].shape == (2, 5)
    with pytest.raises(ResvitError) as caught:
        open_runner(folder, manifest, "tensorrt")
    assert caught.value.code is code
    assert why in caught.value.problem


def test_auto_takes_the_engine_where_it_can_run(folder, gpu, monkeypatch) -> None:
    gpu(87, "tensorrt", "cuda.bindings")
    taken = []
    monkeypatch.setattr(run, "open_engine", lambda *arguments: taken.append(arguments) or "the engine")
    manifest = with_engine(folder)
    assert open_runner(folder, manifest) == open_runner(folder, manifest, "tensorrt") == "the engine"
    assert taken[0][:3] == (folder / "engine.plan", manifest.files[0].sha256, manifest.engine)
    assert taken[0][3] == folder / "model.onnx"
    shutil.copy(folder / "model.onnx", folder / "model.tensorrt.onnx")
    open_runner(folder, manifest)
    assert taken[-1][3] == folder / "model.tensorrt.onnx"


def test_a_compatible_engine_runs_on_newer_gpus_alone(folder, gpu, monkeypatch) -> None:
    monkeypatch.setattr(run, "open_engine", lambda *arguments: "the engine")
    manifest = with_engine(folder, sm=80, flags=("hardware_compatible",))
    gpu(89, "tensorrt", "cuda.bindings")
    assert open_runner(folder, manifest) == "the engine"
    gpu(75, "tensorrt", "cuda.bindings")
    with open_runner(folder, manifest) as runner:
        assert "SM 7.5" in runner.why


def test_an_engine_is_run_by_what_built_it(folder, gpu) -> None:
    gpu(87, "tensorrt", "tensorrt_rtx_bindings", "cuda.bindings")
    with pytest.raises(ResvitError, match="cannot run it"):
        open_runner(folder, with_engine(folder), "rtx")
    with pytest.raises(ResvitError, match="no runtime 'trt'"):
        open_runner(folder, with_engine(folder), "trt")


@pytest.mark.parametrize("files", [(), (BundledFile("engine.plan", 6, "0" * 64),)])
def test_an_engine_that_the_manifest_does_not_hold_is_never_read(folder, gpu, files) -> None:
    """And there is no falling back: a changed engine is no reason to run something else."""
    gpu(87, "tensorrt", "cuda.bindings")
    manifest = dataclasses.replace(with_engine(folder), files=files)
    for runtime in ("auto", "tensorrt"):
        with pytest.raises(ResvitError) as caught:
            open_runner(folder, manifest, runtime)
        assert caught.value.code is ExitCode.UNTRUSTED


def test_a_graph_that_the_optimiser_breaks_runs_as_written(folder, monkeypatch) -> None:
    real = onnx_on_cpu.open_onnx

    def broken(model, *, optimize=True):
        runner = real(model, optimize=optimize)
        if optimize:
            honest = runner.run
            runner.run = lambda feeds: {name: value * -1 for name, value in honest(feeds).items()}
        return runner

    monkeypatch.setattr(run, "open_onnx", broken)
    with open_runner(folder, MANIFEST, "onnxruntime") as runner:
        assert not runner.optimized
    sqnr_db = golden_check(folder, MANIFEST).sqnr_db
    # None: not a bit differs.
    assert sqnr_db is None or sqnr_db > 60


def test_golden_outputs_pass(folder) -> None:
    report = golden_check(folder, MANIFEST)
    assert (report.images, report.agreement, report.tolerance_db) == (8, 1.0, TOLERANCE_DB)
    assert report.sqnr_db is None or report.sqnr_db > 50
    assert "not the engine" in report.label
    assert report.why == "There is no engine in this bundle"
    json.dumps(report.to_json(), allow_nan=False)
    assert "8 golden images" in report.sentence


class Told:
    """A runner that answers with what it is told."""

    label, why, runtime = "the engine", "", "tensorrt"
    inputs = (run.TensorSpec("input", (-1, 3, 8, 8), np.dtype(np.float32)),)

    def __init__(self, answer) -> None:
        self.answer = np.asarray(answer, np.float32)

    def __call__(self, arrays):
        return {"logits": self.answer}


def check(answer, expected):
    expected = np.asarray(expected, np.float32)
    return check_runner(Told(answer), pictures(len(expected)), expected, MANIFEST)


LOGITS = np.random.default_rng(3).standard_normal((64, 10)).astype(np.float32)


def noisy(db: float) -> np.ndarray:
    noise = np.random.default_rng(4).standard_normal(LOGITS.shape)
    return LOGITS + noise * np.linalg.norm(LOGITS) / np.linalg.norm(noise) * 10 ** (-db / 20)


@pytest.mark.parametrize("db", [60, 30, 20.5])
def test_rounding_passes(db) -> None:
    """At these levels some of 64 close answers do change, by no more than the noise explains."""
    assert check(noisy(db), LOGITS).sqnr_db == pytest.approx(db, abs=0.05)


def test_the_same_outputs_have_no_noise() -> None:
    report = check(LOGITS, LOGITS)
    assert (report.sqnr_db, report.max_abs, report.agreement) == (None, 0.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (noisy(19.5), "SQNR 19.5 dB"),
        (-LOGITS, "SQNR"),
        (LOGITS[::-1], "SQNR"),
        (LOGITS * 0, "SQNR 0.0 dB"),
        (np.where(np.arange(640).reshape(64, 10) == 7, np.nan, LOGITS), "1 of its outputs are NaN"),
        (np.where(np.arange(640).reshape(64, 10) == 7, np.inf, LOGITS), "NaN or infinite"),
        (LOGITS[:, :9], "[64, 9]"),
    ],
)
def test_other_outputs_are_a_mismatch(answer, says) -> None:
    with pytest.raises(ResvitError) as caught:
        check(answer, LOGITS)
    assert caught.value.code is ExitCode.MISMATCH
    assert says in caught.value.problem


def test_one_answer_that_changes_by_more_than_noise_is_a_mismatch() -> None:
    answer = LOGITS.copy()
    first, second = np.argsort(LOGITS[5])[[-1, -2]]
    answer[5, [first, second]] = answer[5, [second, first]]
    gap = LOGITS[5, first] - LOGITS[5, second]
    noise = 3 * 2**0.5 * np.linalg.norm(answer - LOGITS) / LOGITS.size**0.5
    assert gap > noise  # else the example shows nothing
    with pytest.raises(ResvitError, match="golden image 5 is answered"):
        check(answer, LOGITS)


def test_outputs_that_are_no_classes_have_no_answers() -> None:
    assert check(LOGITS.reshape(64, 2, 5), LOGITS.reshape(64, 2, 5)).agreement is None


def test_another_model_is_a_mismatch(folder) -> None:
    small_model(folder / "model.onnx", seed=9)
    with pytest.raises(ResvitError) as caught:
        golden_check(folder, MANIFEST)
    assert caught.value.code is ExitCode.MISMATCH


@pytest.mark.parametrize("name", ["../golden_input.npy", "/etc/passwd", 7, None, ""])
def test_golden_files_lie_in_the_folder(name) -> None:
    with pytest.raises(ResvitError, match=r"where a (file name|text) belongs"):
        GoldenFiles.from_json(Record({"input": name, "output": "golden_output.npy"}, "the manifest"))


def test_damaged_golden_files_are_a_sentence(folder) -> None:
    np.save(folder / "golden_output.npy", np.array([{}], object))
    with pytest.raises(ResvitError, match="npy"):
        golden_check(folder, MANIFEST)
    (folder / "golden_output.npy").unlink()
    with pytest.raises(ResvitError, match="no golden file"):
        golden_check(folder, MANIFEST)
    np.save(folder / "golden_output.npy", np.zeros((3, 5)))
    with pytest.raises(ResvitError, match="8 images and 3 outputs"):
        golden_files.golden_arrays(folder, MANIFEST.golden)
