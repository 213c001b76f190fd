"""Builds by the real TensorRT for RTX, on graphs small enough for a fraction of a second each."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from engine_reports import engine_report
from resvit_engines.audit.kernels import kernels_from_log
from resvit_engines.builder import builder as build
from resvit_engines.builder import child as build_child
from resvit_engines.builder.builder import as_installed, build_engine, builds_here
from resvit_engines.builder.device_plan import plan_for_device
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.engine_file import describe_engine_file
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import Silent
from resvit_engines.records import Record
from resvit_engines.targets.choice import with_builder
from resvit_engines.targets.table import Builder, find_target
from resvit_engines.trt.io_tensor import IoTensor

pytestmark = pytest.mark.whole

onnx = pytest.importorskip("onnx")
rtx = pytest.mark.skipif(not build._installed("tensorrt_rtx_bindings"), reason="TensorRT for RTX is not installed")
linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc")


class Graph:
    """A small convolution net in FP16 with Q/DQ pairs, as the quantiser writes them."""

    def __init__(self, element: int) -> None:
        self.element = element
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes))
        return output

    def constant(self, name: str, values: np.ndarray, element: int | None = None) -> str:
        element = element or onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        self.constants.append(onnx.helper.make_tensor(name, element, values.shape, values.flatten().tolist()))
        return name

    def scaled(self, name: str, shape: tuple[int, ...]) -> list[str]:
        scale = self.constant(f"{name}_scale", np.full(shape, 0.01, np.float16))
        return [scale, self.constant(f"{name}_zero", np.zeros(shape), self.element)]

    def quantised(self, tensor: str) -> str:
        scale_and_zero = self.scaled(tensor, ())
        quantised = self.node("QuantizeLinear", [tensor, *scale_and_zero], f"{tensor}_q", axis=0)
        return self.node("DequantizeLinear", [quantised, *scale_and_zero], f"{tensor}_dq", axis=0)

    def conv(self, tensor: str, output: str, channels: int, filters: int) -> str:
        weights = self.random.integers(-8, 8, (filters, channels, 3, 3)).astype(np.float32)
        stored = self.constant(f"{output}_w", weights, self.element)
        scale_and_zero = self.scaled(stored, (filters,))
        weight = self.node("DequantizeLinear", [stored, *scale_and_zero], f"{output}_wdq", axis=0)
        self.node("Conv", [self.quantised(tensor), weight], f"{output}_sum", pads=[1, 1, 1, 1])
        return self.node("Relu", [f"{output}_sum"], output)


def small_model(path: Path, *, fp8: bool = False, batch: int | str = "batch", height: int | str = 8) -> Path:
    proto = onnx.TensorProto
    graph = Graph(proto.FLOAT8E4M3FN if fp8 else proto.INT8)
    half = graph.node("Cast", ["input"], "half", to=proto.FLOAT16)
    last = graph.conv(graph.conv(half, "layer1", 32, 32), "layer2", 32, 32)
    head = graph.constant("head_w", graph.random.standard_normal((32, 10)).astype(np.float16))
    flat = graph.node("Flatten", [graph.node("GlobalAveragePool", [last], "pool")], "flat")
    graph.node("Cast", [graph.node("MatMul", [flat, head], "head")], "logits", to=proto.FLOAT)
    info = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        graph.nodes,
        "small",
        [info("input", proto.FLOAT, [batch, 32, height, 8])],
        [info("logits", proto.FLOAT, [batch, 10])],
        graph.constants,
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("int8") / "model.onnx")


def refusal(*arguments, **options) -> ResvitError:
    with pytest.raises(ResvitError) as caught:
        build_engine(*arguments, **options)
    return caught.value


# The real builder


@rtx
@pytest.mark.parametrize(
    ("name", "sm", "fp8", "word"),
    [
        ("rtx-4090", 89, False, "Int8"),
        ("a10", 86, False, "Int8"),
        ("a100", 80, False, "Int8"),
        ("rtx-4090", 89, True, "FP8"),
    ],
)
def test_convolutions_come_out_in_the_precision_of_the_graph(tmp_path, name, sm, fp8, word) -> None:
    model, engine, log = small_model(tmp_path / "m.onnx", fp8=fp8), tmp_path / "engine.plan", tmp_path / "build.log"
    report = build_engine(model, engine, with_builder(find_target(name), Builder.RTX), BuildSettings(), Silent(), log)

    convs = {layer: k for k in report.kernels for layer in k.layers if layer.endswith("_sum/Conv")}
    assert set(convs) == {"layer1_sum/Conv", "layer2_sum/Conv"}
    assert all(kernel.inputs == (word,) for kernel in convs.values())
    assert convs["layer1_sum/Conv"].input_shapes == ((1, 32, 8, 8),)
    first = next(kernel for kernel in report.kernels if "half/Cast" in kernel.layers)
    assert (first.inputs, first.outputs, first.bytes_moved) == (("Float",), (word,), 32 * 8 * 8 * (4 + 1))

    assert report.sm == sm
    assert report.builder is Builder.RTX
    assert report.builder_version.startswith("1.")
    assert report.inputs == (IoTensor("input", (1, 32, 8, 8), "float32"),)
    assert report.outputs == (IoTensor("logits", (1, 10), "float32"),)
    assert report.bytes == engine.stat().st_size > 10_000
    assert report.seconds > 0
    assert 50 < report.peak_mib < 2000
    assert "Layers:" in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.log", "engine.plan", "m.onnx"]

    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["builder"] == "TensorRT for RTX"
    assert EngineReport.from_json(Record(plain, "engine.json")).to_json() == plain


@rtx
def test_a_batch_range_stays_dynamic_and_the_bytes_repeat(tmp_path, int8) -> None:
    reports = [
        build_engine(int8, tmp_path / f"{index}.plan", find_target("rtx-4090"), BuildSettings(batch=(1, 4, 8)))
        for index in range(2)
    ]
    assert reports[0].inputs[0].shape == (-1, 32, 8, 8)
    assert all(k.bytes_moved is None for k in reports[0].kernels if "layer1_sum/Conv" in k.layers)
    assert reports[0].sha256 == reports[1].sha256


@rtx
def test_the_batch_must_fit_the_graph(tmp_path) -> None:
    fixed = small_model(tmp_path / "fixed.onnx", batch=2)
    engine, target = tmp_path / "engine.plan", find_target("rtx-4090")
    assert "fixed batch of 2, but a batch of 1 to 8" in str(refusal(fixed, engine, target, BuildSettings((1, 4, 8))))
    assert build_engine(fixed, engine, target, BuildSettings((2, 2, 2))).inputs[0].shape == (2, 32, 8, 8)


@rtx
def test_only_the_batch_may_be_dynamic(tmp_path) -> None:
    model = small_model(tmp_path / "m.onnx", height="height")
    assert "only the batch may be dynamic" in str(refusal(model, tmp_path / "engine.plan", find_target("rtx-4090")))


@rtx
def test_fp8_for_a_gpu_without_it_fails_with_the_builders_words(tmp_path) -> None:
    a10 = with_builder(find_target("a10"), Builder.RTX)
    error = refusal(small_model(tmp_path / "m.onnx", fp8=True), tmp_path / "e.plan", a10)
    assert error.code is ExitCode.BUILD
    assert "sm86" in error.problem
    assert "int8" in error.fix
    assert not (tmp_path / "e.plan").exists()


@rtx
def test_an_unknown_op_is_named_with_its_node(tmp_path) -> None:
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Frobnicate", ["input"], ["logits"], name="blocks.0/Frobnicate")
    shape = ("input", onnx.TensorProto.FLOAT, [1, 3]), ("logits", onnx.TensorProto.FLOAT, [1, 3])
    graph = onnx.helper.make_graph([node], "g", [info(*shape[0])], [info(*shape[1])])
    onnx.save(onnx.helper.make_model(graph, ir_version=10), tmp_path / "odd.onnx")
    error = refusal(tmp_path / "odd.onnx", tmp_path / "e.plan", find_target("rtx-4090"))
    assert error.code is ExitCode.BUILD
    assert "'blocks.0/Frobnicate' (Frobnicate)" in error.problem
    assert [path.name for path in tmp_path.iterdir()] == ["odd.onnx"]


@rtx
def test_what_is_no_onnx_file_is_refused(tmp_path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    assert "parse" in refusal(tmp_path / "text.onnx", tmp_path / "e.plan", find_target("rtx-4090")).problem
    assert "There is no file" in refusal(tmp_path / "no.onnx", tmp_path / "e.plan", find_target("rtx-4090")).problem


@rtx
def test_a_users_own_modules_do_not_get_in_the_way(tmp_path, int8, monkeypatch) -> None:
    for name in ("json.py", "tensorrt_rtx_bindings.py", "errors.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert build_engine(int8, Path("engine.plan"), find_target("rtx-4090")).bytes > 0


@rtx
def test_tensorrt_itself_takes_the_same_path(tmp_path, int8, monkeypatch) -> None:
    """Its Python interface stands in for by TensorRT for RTX here, which has the same one."""
    (tmp_path / "tensorrt.py").write_text("from tensorrt_rtx_bindings import *\n__version__ = '10.3.0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(build, "local_sm", lambda: 87)
    target = find_target("jetson-orin")
    assert builds_here(target)
    report = build_engine(int8, tmp_path / "engine.plan", target)
    assert (report.builder, report.builder_version, report.sm) == (Builder.TENSORRT, "10.3.0", 87)


# A child that dies


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Let a given script stand in for the builder."""

    def use(script: str) -> None:
        command = [sys.executable, "-c", script]
        monkeypatch.setattr(build_child, "_worker_command", lambda request: [*command, str(request)])
        monkeypatch.setattr(build, "_installed", lambda module: module == "tensorrt_rtx_bindings")

    (tmp_path / "model.onnx").write_bytes(b"-")
    return use


@linux
@pytest.mark.parametrize(
    ("script", "code", "says"),
    [
        ("import os; os.kill(os.getpid(), 9)", ExitCode.SYSTEM, "killed (signal 9)"),
        ("import os, sys; print('so be it', flush=True); os.kill(os.getpid(), 11)", ExitCode.BUILD, "SIGSEGV"),
        ("print('so be it'); raise SystemExit(3)", ExitCode.BUILD, "so be it"),
        ("pass", ExitCode.BUILD, "without a result"),
    ],
)
def test_a_dead_child_is_one_clear_error_and_no_file(tmp_path, child, script, code, says) -> None:
    child(script)
    error = refusal(tmp_path / "model.onnx", tmp_path / "engine.plan", find_target("rtx-4090"))
    assert error.code is code
    assert says in error.problem
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_an_old_engine_survives_a_failed_build(tmp_path, child) -> None:
    child("import json, sys; open(json.load(open(sys.argv[1]))['engine'], 'w').write('half'); sys.exit(1)")
    (tmp_path / "engine.plan").write_bytes(b"old")
    refusal(tmp_path / "model.onnx", tmp_path / "engine.plan", find_target("rtx-4090"))
    assert (tmp_path / "engine.plan").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.plan", "model.onnx"]


@pytest.mark.slow
@linux
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_the_child_ends_too(tmp_path, how) -> None:
    (tmp_path / "model.onnx").write_bytes(b"-")
    builder = "import json,os,sys,time; from resvit_engines.builder.worker import _die_with; "
    builder += "r=json.load(open(sys.argv[1])); _die_with(r['parent']); "
    builder += (
        "open(r['onnx']+'.pid.tmp','w').write(str(os.getpid())); os.rename(r['onnx']+'.pid.tmp',r['onnx']+'.pid'); "
    )
    builder += "time.sleep(60)"
    parent = textwrap.dedent(f"""
        import signal
        import sys
        from pathlib import Path
        from resvit_engines.builder import builder as build
        from resvit_engines.builder import child as build_child
        from resvit_engines.errors import ResvitError
        from resvit_engines.targets.table import find_target
        # Whoever runs the tests in the background makes them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        build_child._worker_command = lambda request: [sys.executable, "-c", {builder!r}, str(request)]
        build._installed = lambda module: module == "tensorrt_rtx_bindings"
        try:
            build.build_engine(Path("model.onnx"), Path("engine.plan"), find_target("rtx-4090"))
        except ResvitError as error:
            sys.exit(int(error.code))
    """)
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    note = tmp_path / "model.onnx.pid"
    wait_until(note.exists)
    pid = int(note.read_text())
    process.send_signal(how)
    assert process.wait(10) == (ExitCode.INTERRUPTED if how is signal.SIGINT else -signal.SIGKILL)
    wait_until(lambda: has_ended(pid))
    assert not (tmp_path / "engine.plan").exists()
    if how is signal.SIGINT:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.pid"]


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@linux
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, child) -> None:
    child("pass")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert refusal(tmp_path / "model.onnx", closed / "e.plan", find_target("rtx-4090")).code is ExitCode.SYSTEM


def test_without_the_builders_package_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "_installed", lambda module: False)
    error = refusal(tmp_path / "model.onnx", tmp_path / "e.plan", find_target("rtx-4090"))
    assert error.code is ExitCode.MISSING
    assert "pip install" in error.fix


# Who builds


@pytest.mark.parametrize(
    ("name", "builder", "gpu", "tensorrt", "here"),
    [
        ("rtx-4090", None, None, None, True),
        ("rtx-4090", None, 90, "11.4.0", True),
        ("rtx-4090", Builder.TENSORRT, 89, "11.4.0", True),
        ("rtx-4090", Builder.TENSORRT, None, "11.4.0", False),
        ("l4", None, None, None, False),
        ("l4", None, None, "11.4.0", False),
        ("l4", None, 86, "11.4.0", False),
        ("l4", None, 89, None, False),
        ("l4", None, 89, "11.4.1", True),
        # Another release than the one that was asked for.
        ("l4", None, 89, "10.13.3", False),
        ("l4", Builder.RTX, None, None, True),
        ("h100", None, 90, "11.4.0", True),
        ("h100", None, 90, None, False),
        ("h100", None, None, "11.4.0", False),
        ("jetson-orin", None, None, "10.3.0", False),
        ("jetson-orin", None, 87, "10.3.0", True),
        # A Jetson builds with what its image has.
        ("jetson-orin", None, 87, "10.7.0", True),
    ],
)
def test_who_builds(monkeypatch, name, builder, gpu, tensorrt, here) -> None:
    monkeypatch.setattr(build, "local_sm", lambda: gpu)
    monkeypatch.setattr(build, "_installed", lambda module: tensorrt is not None or module != "tensorrt")
    monkeypatch.setattr(build, "tensorrt_here", lambda: tensorrt)
    assert builds_here(with_builder(find_target(name), builder)) is here


@pytest.mark.parametrize(
    ("name", "gpu", "installed", "tensorrt"),
    [
        ("l4", 89, "10.13.3.9", "10.13"),
        ("l4", 86, "10.13.3.9", "11.4"),
        ("l4", None, None, "11.4"),
        ("jetson-orin", 87, "10.7.0", "10.3"),
        ("rtx-4090", 89, "10.13.3.9", "1.7"),
    ],
)
def test_where_the_gpu_is_the_tensorrt_that_is_there_builds(monkeypatch, name, gpu, installed, tensorrt) -> None:
    monkeypatch.setattr(build, "local_sm", lambda: gpu)
    monkeypatch.setattr(build, "_installed", lambda module: installed is not None or module != "tensorrt")
    monkeypatch.setattr(build, "tensorrt_here", lambda: installed)
    assert as_installed(find_target(name)).tensorrt == tensorrt


def test_a_tensorrt_that_is_not_served_is_refused_where_it_would_build(monkeypatch) -> None:
    monkeypatch.setattr(build, "local_sm", lambda: 89)
    monkeypatch.setattr(build, "_installed", lambda module: True)
    monkeypatch.setattr(build, "tensorrt_here", lambda: "10.2.0")
    with pytest.raises(ResvitError, match=r"TensorRT 10\.2\.0 is not served on L4") as caught:
        as_installed(find_target("l4"))
    assert caught.value.code is ExitCode.IMPOSSIBLE
    assert "10.3, " in caught.value.fix


def test_an_orin_engine_is_not_built_elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "local_sm", lambda: None)
    assert refusal(tmp_path / "m", tmp_path / "e", find_target("jetson-orin")).code is ExitCode.IMPOSSIBLE


@pytest.mark.parametrize(
    "wrong", [{"batch": (4, 2, 8)}, {"batch": (0, 1, 1)}, {"optimization_level": 6}, {"workspace_mib": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(ResvitError):
        BuildSettings(**wrong)


# The plan for the device


def test_the_commands_for_a_jetson() -> None:
    plan = plan_for_device(
        find_target("jetson-orin-nano"),
        BuildSettings(batch=(1, 4, 8)),
        (3, 224, 224),
        dynamic_batch=True,
        bundle="my net.resvit",
        onnx_sha256="ab" * 32,
    )
    assert plan.commands == (
        "python3 -m zipfile -e 'my net.resvit' 'my net'",
        "cd 'my net'",
        f"echo '{'ab' * 32}  model.onnx' | sha256sum --check",
        "/usr/src/tensorrt/bin/trtexec --onnx=model.onnx --stronglyTyped --saveEngine=engine.plan"
        " --memPoolSize=workspace:1024 --builderOptimizationLevel=3 --profilingVerbosity=detailed"
        " --timingCacheFile=timing.cache --skipInference --minShapes=input:1x3x224x224"
        " --optShapes=input:4x3x224x224 --maxShapes=input:8x3x224x224",
    )


def test_a_fixed_batch_names_no_shapes_and_precision_flags_never_appear() -> None:
    for target in ("jetson-orin", "jetson-thor", "h100"):
        plan = plan_for_device(find_target(target), BuildSettings(), (3, 224, 224), dynamic_batch=False)
        line = plan.commands[-1]
        assert "Shapes" not in line
        assert not {"--fp16", "--int8", "--fp8", "--best"} & set(shlex.split(line))


def test_options_beyond_a_plain_engine_reach_trtexec() -> None:
    settings = BuildSettings(hardware_compatible=True, version_compatible=True, strip_weights=True, sparse=True)
    line = plan_for_device(find_target("h100"), settings, (3, 8, 8), dynamic_batch=False).commands[-1]
    wanted = {"--hardwareCompatibilityLevel=ampere+", "--versionCompatible", "--stripWeights", "--sparsity=enable"}
    assert wanted <= set(shlex.split(line))
    plain = plan_for_device(find_target("h100"), BuildSettings(), (3, 8, 8), dynamic_batch=False).commands[-1]
    assert not wanted & set(shlex.split(plain))


def test_the_unpack_command_and_the_check_really_work(tmp_path) -> None:
    manifest = write_bundle(tmp_path / "net.resvit", Manifest(), {"model.onnx": b"graph"})
    digest = manifest.files[0].sha256
    target, shape = find_target("jetson-orin"), (3, 8, 8)
    plan = plan_for_device(target, BuildSettings(), shape, dynamic_batch=True, bundle="net.resvit", onnx_sha256=digest)
    script = " && ".join(["set -e", *plan.commands[:-1]])
    done = subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "model.onnx: OK")


def test_the_plan_says_why_in_words() -> None:
    orin = plan_for_device(find_target("jetson-orin"), BuildSettings(), (3, 224, 224), dynamic_batch=True)
    assert all(words in orin.why for words in ("Jetson AGX Orin", "8.7", "JetPack 6.2", "TensorRT 10.3"))
    assert any("never pip install tensorrt" in note for note in orin.notes)
    h100 = plan_for_device(find_target("h100"), BuildSettings(), (3, 224, 224), dynamic_batch=True)
    assert "this machine has no H100 (compute capability 9.0) with TensorRT 11.4 beside it" in h100.why
    l4 = plan_for_device(find_target("l4"), BuildSettings(), (3, 224, 224), dynamic_batch=True)
    assert l4.why == h100.why.replace("H100", "L4").replace("9.0", "8.9")
    plain = json.loads(json.dumps(h100.to_json(), allow_nan=False))
    assert plain["settings"]["workspace_mib"] == 8192
    assert set(plain) == {"target", "why", "commands", "notes", "settings"}


# Logs and engine files


def test_kernels_are_read_from_the_log_of_tensorrt_10() -> None:
    listing = textwrap.dedent("""\
        Engine Layer Information:
        Layer(Reformat): Reformatting CopyNode, Tactic: 0x00000000000003ea, x (Float[1,3,8,8]) -> y (Int8[1,3:4,8,8])
        Layer(CaskConvolution): a/Conv + a/Relu, Tactic: 0x1f (k), y (Int8[1,3,8,8]), z (Half[1,4]) -> w (Half[1,4])
        not a kernel""")
    reformat, conv = kernels_from_log(["something else", listing])
    assert (reformat.type, reformat.inputs, reformat.outputs) == ("Reformat", ("Float",), ("Int8",))
    assert (conv.type, conv.layers) == ("CaskConvolution", ("a/Conv", "a/Relu"))
    assert (conv.inputs, conv.outputs, conv.input_shapes) == (("Int8", "Half"), ("Half",), ((1, 3, 8, 8), (1, 4)))
    assert conv.bytes_moved == 3 * 8 * 8 + 2 * 4 + 2 * 4


def test_a_log_without_kernels_gives_none() -> None:
    assert kernels_from_log(["nothing", "Layers:"]) == ()


def test_an_engine_file_is_described_without_reading_it_as_one(tmp_path) -> None:
    engine = tmp_path / "engine.plan"
    engine.write_bytes(b"vtrt" + bytes(20) + bytes([1, 7, 1, 116]) + b"rest")
    facts = describe_engine_file(engine)
    assert (facts.format, facts.version, facts.bytes) == ("tensorrt-rtx", "1.7.1.116", 32)
    assert (facts.sidecar, facts.sidecar_matches) == (None, None)

    (tmp_path / "engine.json").write_text(json.dumps(engine_report(target="rtx-4090", sha256=facts.sha256).to_json()))
    facts = describe_engine_file(engine)
    assert (facts.sidecar, facts.sidecar_matches, facts.target) == ("engine.json", True, "rtx-4090")

    engine.write_bytes(b"something else entirely, that is longer")
    facts = describe_engine_file(engine)
    assert (facts.format, facts.version, facts.sidecar_matches) == ("unknown", None, False)


@pytest.mark.parametrize("content", [None, b""])
def test_an_absent_or_empty_engine_is_refused(tmp_path, content) -> None:
    if content is not None:
        (tmp_path / "engine.plan").write_bytes(content)
    with pytest.raises(ResvitError, match="absent or empty"):
        describe_engine_file(tmp_path / "engine.plan")


@rtx
def test_a_real_engines_header_names_its_builder(tmp_path, int8) -> None:
    report = build_engine(int8, tmp_path / "engine.plan", find_target("rtx-4090"))
    (tmp_path / "engine.json").write_text(json.dumps(report.to_json()))
    facts = describe_engine_file(tmp_path / "engine.plan")
    assert (facts.format, facts.version) == ("tensorrt-rtx", report.builder_version)
    assert facts.sidecar_matches is True
