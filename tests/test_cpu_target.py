"""``--target cpu``: ONNX Runtime's 8-bit kernels are really used, and the way from build to device is real."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from conftest import DEMO
from device_wheels import WHEELS
from loopback_device import loopback_device, missing
from resvit_calibrate.ranges.ranges import Ranges, TensorRange
from resvit_engines.builder.builder import build_engine
from resvit_engines.bundle.fit import misfits
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.cli.main import run as engine_run
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_file
from resvit_engines.machine import bytes_saturate, processor_from_cpuinfo, this_machine
from resvit_engines.ort import sessions
from resvit_engines.remote.ssh import CONFIG_VARIABLE
from resvit_engines.remote.wheel import CPU_REQUIREMENTS, requirements_for
from resvit_engines.remote.wheelhouse import WHEELS_VARIABLE
from resvit_engines.run.onnx_on_cpu import open_cpu_engine
from resvit_engines.targets.table import Precision, find_target
from resvit_export.cli.main import run
from resvit_quantize.placement.grid import unsigned_grid
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings, Rules

CPU = find_target("cpu")
RNG = np.random.default_rng(0)


def residual_and_linear(path: Path, *, activation: str = "Relu", head: bool = True) -> None:
    """conv, activation, a residual block of two convolutions, then tokens through one linear layer."""
    values: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def const(name: str, *shape: int, scale: float = 0.2) -> str:
        values.append(numpy_helper.from_array((scale * RNG.standard_normal(shape)).astype(np.float32), name))
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def conv(source: str, name: str) -> str:
        return node("Conv", [source, const(f"{name}.w", 32, 32, 3, 3), const(f"{name}.b", 32)], name, pads=[1] * 4)

    first = node(activation, [conv("input", "c1")], "a1")
    inner = node("Relu", [conv(first, "c2")], "a2")
    joined = node("Relu", [node("Add", [conv(inner, "c3"), first], "sum")], "a3")
    last = conv(joined, "c4")
    if head:
        shape = numpy_helper.from_array(np.array([1, 32, 64]), "shape")
        values.append(shape)
        tokens = node("Transpose", [node("Reshape", [last, "shape"], "flat")], "tokens", perm=[0, 2, 1])
        product = node("MatMul", [tokens, const("linear.w", 32, 64)], "product")
        last = node("Add", [product, const("linear.b", 64)], "linear")
    outputs = [helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)]
    inputs = [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 32, 8, 8])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)


def ranges_of(model: Path, image: np.ndarray) -> Ranges:
    """What the tensors really reach on one image."""
    import onnxruntime

    proto = onnx.load(model)
    names = [name for node in proto.graph.node for name in node.output]
    proto.graph.ClearField("output")
    proto.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = {**dict(zip(names, session.run(names, {"input": image}), strict=True)), "input": image}
    tensors = {n: TensorRange(float(a.min()), float(a.max()), {}, (), 0.0) for n, a in found.items()}
    return Ranges(tensors, 1, "none")


@pytest.fixture
def image() -> np.ndarray:
    return RNG.standard_normal((1, 32, 8, 8)).astype(np.float32)


def quantised(folder: Path, image: np.ndarray, **settings: object) -> Path:
    model, out = folder / "float.onnx", folder / "int8.onnx"
    how = QuantizeSettings(Precision.INT8, rules=Rules.ONNXRUNTIME, include=("*",), **settings)  # type: ignore[arg-type]
    quantize_model(model, ranges_of(model, image), how, out)
    return out


def test_a_residual_block_and_a_linear_layer_get_8_bit_kernels(tmp_path: Path, image: np.ndarray) -> None:
    residual_and_linear(tmp_path / "float.onnx")
    report = build_engine(quantised(tmp_path, image), tmp_path / "engine.plan", CPU)
    kinds = collections.Counter(kernel.type for kernel in report.kernels)
    assert kinds["QLinearConv"] == 4
    assert kinds["QLinearAdd"] == 1
    assert kinds["MatMulIntegerToFloat"] == 1
    # ReLUs are the zero points' business, and no layer is left in FP32.
    assert not kinds.keys() & {"Conv", "Relu", "MatMul", "Gemm"}
    assert (report.builder.value, report.sm) == ("onnxruntime", 0)


@pytest.mark.parametrize("activation", ["Relu", "HardSwish", "Sigmoid"])
def test_the_kernels_compute_what_the_graph_means(tmp_path: Path, image: np.ndarray, activation: str) -> None:
    residual_and_linear(tmp_path / "float.onnx", activation=activation)
    build_engine(tmp_path / "float.onnx", tmp_path / "float.plan", CPU)
    report = build_engine(quantised(tmp_path, image), tmp_path / "int8.plan", CPU)
    answers = []
    for name in ("float", "int8"):
        plan = tmp_path / f"{name}.plan"
        with open_cpu_engine(plan, sha256_file(plan), threads=1) as runner:
            answers.append(runner({"input": image})["linear"])
    noise = np.linalg.norm(answers[1] - answers[0]) / np.linalg.norm(answers[0])
    assert noise < 0.03
    assert sum(kernel.type == "QLinearConv" for kernel in report.kernels) >= 3


def test_a_convolution_that_the_graph_puts_out_stays_float(tmp_path: Path, image: np.ndarray) -> None:
    residual_and_linear(tmp_path / "float.onnx", head=False)
    report = build_engine(quantised(tmp_path, image), tmp_path / "engine.plan", CPU)
    kinds = collections.Counter(kernel.type for kernel in report.kernels)
    assert (kinds["QLinearConv"], kinds["Conv"]) == (3, 1)


def test_unsigned_bytes_hold_zero_exactly() -> None:
    for low, high in ((0.0, 6.0), (-0.17, 4.0), (-2.0, 2.0), (-3.0, 0.0), (0.0, 0.0)):
        scale, zero = unsigned_grid(low, high)
        assert zero.dtype == np.uint8
        reached = (np.array([0, 255]) - int(zero)) * float(scale)
        assert reached[0] <= low + float(scale)
        assert reached[1] >= high - float(scale)


def test_an_engine_that_was_changed_is_not_loaded(tmp_path: Path, image: np.ndarray) -> None:
    del image
    residual_and_linear(tmp_path / "float.onnx")
    report = build_engine(tmp_path / "float.onnx", tmp_path / "engine.plan", CPU)
    (tmp_path / "engine.plan").write_bytes((tmp_path / "engine.plan").read_bytes() + b"\0")
    with pytest.raises(ResvitError) as caught:
        open_cpu_engine(tmp_path / "engine.plan", report.sha256)
    assert caught.value.code is ExitCode.UNTRUSTED


def test_what_is_no_graph_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ResvitError, match=r"cannot load model\.onnx") as caught:
        build_engine(tmp_path / "model.onnx", tmp_path / "engine.plan", CPU)
    assert caught.value.code is ExitCode.BUILD
    assert not (tmp_path / "engine.plan").exists()


def test_which_machine_takes_the_bundle() -> None:
    here = this_machine()
    manifest = Manifest("net-cpu-int8", target=CPU)
    assert list(misfits(manifest, here)) == []
    assert list(misfits(manifest, dataclasses.replace(here, arch="aarch64"))) == []
    for change, says in (
        ({"onnxruntime": None}, "not installed here"),
        ({"onnxruntime": "1.19.2"}, "needs ONNX Runtime 1.23 or newer; here is 1.19.2"),
        ({"arch": "riscv64"}, "processor is riscv64"),
    ):
        ((problem, _, code),) = misfits(manifest, dataclasses.replace(here, **change))
        assert says in problem
        assert code is ExitCode.IMPOSSIBLE


def test_a_processor_names_its_instructions_for_8_bits() -> None:
    intel = "model name\t: Xeon\nflags\t\t: fpu avx512_vnni amx_tile amx_int8\n"
    assert processor_from_cpuinfo(intel) == "Xeon (amx_int8, avx512_vnni)"
    assert processor_from_cpuinfo("Features\t: fp asimd asimddp\n") == "asimddp"
    assert processor_from_cpuinfo("") is None


def test_a_device_gets_onnx_runtime_for_its_processor_alone() -> None:
    here = dataclasses.replace(this_machine(), sm=None)
    assert not set(CPU_REQUIREMENTS) & set(requirements_for(here))
    assert set(CPU_REQUIREMENTS) <= set(requirements_for(here, on_cpu=True))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--precision", "fp8"], "no fp8 kernels"),
        (["--precision", "fp16"], "no fp16 kernels"),
        (["--plugins", "on"], "they are for GPUs"),
        (["--tensorrt", "10.13"], "has no part in it"),
        (["--builder", "rtx"], "TensorRT's are for GPUs"),
        (["--latency-budget", "1ms"], "--latency-budget is not for"),
        (["--prune-latency", "0.5"], "--prune-latency is not for"),
        (["--quantizer", "modelopt"], "places Q/DQ for TensorRT"),
        (["--hardware-compatible"], "option of TensorRT"),
        (["--require-fused"], "its rules are TensorRT's"),
    ],
)
def test_what_is_about_tensorrt_is_refused_before_any_work(workspace: Path, capsys, arguments, says: str) -> None:
    code = run(["build", *DEMO.split(), "--target", "cpu", "--run", "runs/cpu", *arguments])
    assert code == ExitCode.IMPOSSIBLE
    assert says in capsys.readouterr().err
    assert not list((workspace / "runs/cpu").glob("export-*"))


@pytest.mark.whole
def test_from_build_to_run(workspace: Path, finished_run, tmp_path: Path, monkeypatch, capsys) -> None:
    del workspace
    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "keys"))
    assert run(["keygen", str(tmp_path / "release.key")]) == 0
    built = finished_run("cpu")
    record = json.loads(next(built.glob("validate-*/verdict.json")).read_text())
    assert record["verdict"] == "accepted"
    engine = json.loads(next(built.glob("compile-*/engine.json")).read_text())
    assert sum(kernel["type"] == "QLinearConv" for kernel in engine["kernels"]) == 6
    assert sum(kernel["type"] == "MatMulIntegerToFloat" for kernel in engine["kernels"]) == 12
    page = (built / "report.html").read_text()
    assert "ONNX Runtime" in page
    bundle, signed = next(built.glob("bundle-*/*.resvit")), tmp_path / "net.resvit"
    signed.write_bytes(bundle.read_bytes())
    assert run(["sign", str(signed), "--key", str(tmp_path / "release.key")]) == 0
    trust, root = ["--trust", str(tmp_path / "release.pub")], ["--root", str(tmp_path / "root")]
    capsys.readouterr()
    assert engine_run(["install", str(signed), *trust, *root]) == 0
    assert "golden images" in capsys.readouterr().out
    images = next(built.glob("score-*/golden_input.npy"))
    answer = tmp_path / "out.npy"
    assert (
        engine_run(["run", "embed-nano-cpu-int8", "--input", str(images), "--output", str(answer), *trust, *root]) == 0
    )
    told = capsys.readouterr().out
    assert "Not by the engine" not in told
    assert "not the engine" not in told
    expected = np.load(next(built.glob("score-*/golden_output.npy")))
    assert (np.load(answer).argmax(1) == expected.argmax(1)).mean() >= 0.85
    assert engine_run(["bench", "embed-nano-cpu-int8", "--seconds", "0.2", "--json", *trust, *root]) == 0
    assert json.loads(capsys.readouterr().out)["latency_ms"]["p50"] > 0


@pytest.mark.whole
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_a_build_ends_on_the_device_with_real_times(
    workspace: Path, finished_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run("cpu"), workspace / "runs/there")
    (tmp_path / "config" / "keys").mkdir(parents=True)
    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "config" / "keys"))
    monkeypatch.setenv(WHEELS_VARIABLE, str(WHEELS))
    how = [*DEMO.split(), "--target", "cpu", "--run", "runs/there"]
    with loopback_device(tmp_path / "device") as device:
        monkeypatch.setenv(CONFIG_VARIABLE, str(device.config))
        assert run(["build", *how, "--device", device.address, "--rehearse"]) == ExitCode.IMPOSSIBLE
        assert "nothing to rehearse" in capsys.readouterr().err
        code = run(["build", *how, "--device", device.address, "--json"])
        told = capsys.readouterr()
        assert code == ExitCode.OK, told.err
    stage = next((workspace / "runs/there").glob("device-*"))
    found = json.loads((stage / "device.json").read_text())
    assert found["rehearsal"] is False
    assert found["engine"]["builder"] == "ONNX Runtime"
    assert (found["images"], found["verdict"]["verdict"]) == (2500, "accepted")
    assert found["golden"]["sqnr_db"] is None or found["golden"]["sqnr_db"] > 20
    assert found["bench"]["latency_ms"]["p50"] > 0
    assert "not the engine" not in found["bench"]["label"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512f", True), ("fpu avx512_vnni amx_int8", False), ("avx2 avx_vnni", False), ("", True)],
)
def test_what_adds_four_products_of_bytes_does_not_saturate(flags: str, expected: bool) -> None:
    assert bytes_saturate(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n") is expected
    assert bytes_saturate("Features\t: asimddp\n") is True


@pytest.mark.parametrize("saturates", [False, True])
def test_weights_stay_signed_where_nothing_saturates(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    """Unsigned ones take three to four times as long on processors with VNNI."""
    monkeypatch.setattr(sessions, "bytes_saturate", lambda: saturates)
    residual_and_linear(tmp_path / "float.onnx")
    sessions.optimised_onnx(quantised(tmp_path, image), tmp_path / "engine.plan")
    graph = onnx.load(tmp_path / "engine.plan").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weights = {types[node.input[3]] for node in graph.node if node.op_type == "QLinearConv"}
    if saturates:  # ONNX Runtime decides it then, by the processor
        assert weights <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    else:
        assert weights == {onnx.TensorProto.INT8}


def test_the_largest_sums_are_exact_on_this_processor() -> None:
    """All bytes at their ends, for every number of rows that a kernel takes at once, and more."""
    ort = sessions.load_onnxruntime()
    for rows in (1, 5, 16, 33, 64):
        for columns in (16, 40):
            values = [numpy_helper.from_array(np.full((96, columns), 127, np.int8), "w")]
            values += [numpy_helper.from_array(np.uint8(0), "za"), numpy_helper.from_array(np.int8(0), "zb")]
            nodes = [helper.make_node("MatMulInteger", ["x", "w", "za", "zb"], ["y"])]
            ends = [
                helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [rows, 96]),
                helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [rows, columns]),
            ]
            model = helper.make_model(
                helper.make_graph(nodes, "g", ends[:1], ends[1:], values),
                opset_imports=[helper.make_opsetid("", 20)], ir_version=9,
            )  # fmt: skip
            session = sessions.open_session(ort, model.SerializeToString(), sessions.engine_options(ort, 1), "graph")
            found = session.run(None, {"x": np.full((rows, 96), 255, np.uint8)})[0]
            assert (found == 255 * 127 * 96).all(), (rows, columns)


def test_a_pooling_computes_in_fp32(tmp_path: Path, image: np.ndarray) -> None:
    """ONNX Runtime's MaxPool of bytes is many times as slow; left alone it moves Q/DQ over it."""
    values = [
        numpy_helper.from_array((0.1 * RNG.standard_normal((32, 32, 3, 3))).astype(np.float32), name)
        for name in ("w1", "w2")
    ]
    nodes = [
        helper.make_node("Conv", ["input", "w1"], ["c1"], "c1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["a1"], "a1"),
        helper.make_node("MaxPool", ["a1"], ["p1"], "p1", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Conv", ["p1", "w2"], ["c2"], "c2", pads=[1] * 4),
        helper.make_node("Sigmoid", ["c2"], ["s2"], "s2"),
    ]
    inputs = [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 32, 8, 8])]
    outputs = [helper.make_tensor_value_info("s2", onnx.TensorProto.FLOAT, None)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, values),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=9,
    )  # fmt: skip
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "float.onnx")
    build_engine(quantised(tmp_path, image), tmp_path / "engine.plan", CPU)
    graph = onnx.load(tmp_path / "engine.plan").graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    (pool,) = (node for node in graph.node if node.op_type == "MaxPool")
    assert made[pool.input[0]] == "DequantizeLinear"
    assert sum(node.op_type == "QLinearConv" for node in graph.node) == 2
