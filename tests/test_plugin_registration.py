"""Ahead-of-time plugins registered, and TensorRT's own parser at our nodes, as far as one goes without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT
from plugin_kernels import kernel_for
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.plugins.fields import NAMES, fields_from_kernel
from resvit_engines.plugins.names import DOMAIN, NAMESPACE, OP_TYPES, VERSION
from resvit_engines.plugins.nodes import PluginNode, plugin_nodes
from resvit_engines.trt.aot_plugins import plugin_api
from resvit_engines.trt.plugin_layers import require_plugin_layers
from resvit_engines.trt.plugin_library import load_plugin_library
from tensorrt_standin import NEWEST, library, standin_environment, stub_environment

onnx = pytest.importorskip("onnx")
SHAPE = (2, 197, 384)
CHILD = ROOT / "tests/plugin_child.py"


@pytest.fixture(scope="module")
def environments(tmp_path_factory) -> Any:
    made: dict[str, dict[str, str]] = {}

    def environment(version: str) -> dict[str, str]:
        if version not in made:
            folder = tmp_path_factory.mktemp("bindings")
            found = standin_environment(folder) if version == NEWEST else stub_environment(version, folder)
            path = os.pathsep.join([found["PYTHONPATH"], str(ROOT / "engines"), str(ROOT / "tests")])
            made[version] = {**os.environ, **found, "PYTHONPATH": path}
        return made[version]

    return environment


def child(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CHILD, *arguments], env=environment, capture_output=True, text=True, check=False
    )


# 10.13 checks annotations otherwise than 11.4 does; 10.3 has no plugins in Python.
@pytest.mark.whole
@pytest.mark.parametrize("version", ["10.13", "10.16", NEWEST])
def test_every_op_type_registers_and_describes_itself(version, environments) -> None:
    done = child(environments(version), "describe", *OP_TYPES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    titles = {"fp16": "HALF", "int8": "INT8"}
    for name, op in OP_TYPES.items():
        kernel, answer = kernel_for(name), found["ops"][name]
        launch, shapes = kernel.launch, [SHAPE] * len(op.inputs)
        outputs = [[titles[r.dtype], [size.at(shapes) for size in r.shape]] for r in launch.outputs]
        assert answer["outputs"] == outputs
        assert answer["fake"] == [[dtype, len(sizes)] for dtype, sizes in outputs]
        assert (answer["entry"], answer["ptx"]) == (kernel.entry, True)
        assert answer["launch"] == [*(size.at(shapes) for size in launch.grid), 128, 1, 1, 4096]
        assert answer["scalars"] == [size.at(shapes) for size in launch.scalars]
        assert answer["counts"] == [len(op.inputs), len(op.outputs)]
        # TensorRT gives all attributes to the second function, whatever it declares, in the order of the first.
        assert answer["attributes"] == answer["aot_attributes"] == list(NAMES)
    assert [kind for kind, _ in found["refusals"]] == ["ResvitError"] * 4
    assert "FLOAT in the graph and fp16" in found["refusals"][0][1]
    assert "3 inputs" in found["refusals"][1][1]
    assert "3 dimensions, too few" in found["refusals"][2][1]
    assert "kernel_grid" in found["refusals"][3][1]
    if version == NEWEST:
        assert sorted(found["creators"]) == sorted(OP_TYPES)
        assert found["creators"]["ResvitBridge"][:3] == [
            ["kernel_entry", "CHAR"], ["kernel_ptx", "CHAR"], ["kernel_block", "INT32"],
        ]  # fmt: skip
        assert found["made"]["ResvitBridgeNormQ"] == [2, ["INT8", "HALF"]]
        assert found["made"]["ResvitAttentionSplitBias"] == [1, ["HALF"]]


def model(path: Path, *, functions: bool = True, kernel: bool = True, op_type: str = "ResvitAttentionBias") -> Path:
    """x [B, 197, 384] through ReLU, and negated, into one node of ours."""
    helper, half = onnx.helper, onnx.TensorProto.FLOAT16
    fields = fields_from_kernel(kernel_for("ResvitAttentionBias")) if kernel else {}
    common = {"domain": DOMAIN, "plugin_namespace": NAMESPACE, "plugin_version": VERSION, "out_type": int(half)}
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["x"], ["b"]),
        helper.make_node(op_type, ["a", "b"], ["y"], name="blocks.0/attn", aot=1, **common, **fields),
        helper.make_node("Relu", ["y"], ["out"]),
    ]
    body = [helper.make_node("Add", ["fx", "fs"], ["fsum"]), helper.make_node("Relu", ["fsum"], ["fy"])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    function = helper.make_function(DOMAIN, op_type, ["fx", "fs"], ["fy"], body, opsets[:1], attributes=["out_type"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", half, ["batch", 197, 384])], [value("out", half, ["batch", None, None])]
    )
    made = helper.make_model(graph, opset_imports=opsets, functions=[function] if functions else [], ir_version=10)
    onnx.save(made, path)
    return path


def test_nodes_with_kernels_are_found_in_the_file(tmp_path) -> None:
    assert plugin_nodes(model(tmp_path / "a.onnx")) == (PluginNode("blocks.0/attn", "ResvitAttentionBias"),)
    assert plugin_nodes(model(tmp_path / "b.onnx", kernel=False)) == ()
    with pytest.raises(ResvitError, match="ResvitNovelty, which this version"):
        plugin_nodes(model(tmp_path / "c.onnx", op_type="ResvitNovelty"))
    (tmp_path / "d.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ResvitError, match="cannot be read as an ONNX file"):
        plugin_nodes(tmp_path / "d.onnx")


@pytest.mark.whole
@pytest.mark.parametrize("functions", [True, False])
def test_the_parser_takes_the_plugin_before_the_function(functions, tmp_path, environments) -> None:
    """And stops there: what stands in for TensorRT has no plugins in Python."""
    done = child(environments(NEWEST), "parse", model(tmp_path / "m.onnx", functions=functions), "aot")
    assert "Found registered plugin: ResvitAttentionBias. Importing this node as a plugin." in done.stdout
    assert "registered with an IPluginCreatorV3One creator only" in done.stdout
    assert "PARSED False" in done.stdout


def test_a_plugin_that_is_missing_is_an_error_with_the_name_of_the_node(tmp_path, environments) -> None:
    """TensorRT builds the function's body then, and says nothing."""
    done = child(environments(NEWEST), "parse", model(tmp_path / "m.onnx"), "none")
    assert "PARSED True" in done.stdout
    assert "Only 0 of 1 nodes became plugins in TensorRT 11.4" in done.stderr
    assert "'blocks.0/attn' (ResvitAttentionBias)" in done.stderr


@pytest.fixture(scope="module")
def real_library(tmp_path_factory) -> Path:
    """The C++ library by NVIDIA's headers of TensorRT 11; those of another major version are another interface."""
    headers = sorted((ROOT / "data/tensorrt-include").glob("11.*"))
    if not headers or shutil.which("g++") is None or not Path("/usr/local/cuda/include/cuda.h").is_file():
        pytest.skip("no headers of TensorRT 11 below data/tensorrt-include")
    path = tmp_path_factory.mktemp("library") / "libresvit_plugins.so"
    includes = ["-isystem", str(headers[-1]), "-isystem", "/usr/local/cuda/include"]
    source = ROOT / "engines/plugin/resvit_plugins.cpp"
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", *includes, source, "-o", path, "-ldl"], check=True)
    return path


def test_the_library_makes_a_plugin_of_what_the_real_parser_reads(tmp_path, environments, real_library) -> None:
    """The stand-in's parser ends the process where it would add the layer, since its network takes none."""
    file = model(tmp_path / "m.onnx", functions=False)
    done = child(environments(NEWEST), "parse", file, "library", real_library)
    assert "Found registered plugin: ResvitAttentionBias. Importing this node as a plugin." in done.stdout
    assert "Successfully created plugin: ResvitAttentionBias" in done.stdout


class Network:
    def __init__(self, *layers: tuple[str, str]) -> None:
        self.layers = [SimpleNamespace(name=name, type=kind) for name, kind in layers]
        self.num_layers = len(layers)

    def get_layer(self, index: int) -> SimpleNamespace:
        return self.layers[index]


TRT = SimpleNamespace(__version__="10.3.0", LayerType=SimpleNamespace(PLUGIN_V3="plugin"))


def test_plugin_layers_are_counted() -> None:
    network = Network(("a", "plugin"), ("x", "conv"), ("b", "plugin"))
    nodes = [PluginNode("a", "ResvitAttentionBias"), PluginNode("b", "ResvitBridge")]
    assert require_plugin_layers(TRT, network, nodes) == ("a", "b")
    many = [*nodes, *(PluginNode(f"n{index}", "ResvitAttention") for index in range(7))]
    with pytest.raises(ResvitError, match=r"2 of 9 .* 'n0' \(ResvitAttention\).* and 2 more") as caught:
        require_plugin_layers(TRT, network, many)
    assert caught.value.code is ExitCode.BUILD
    assert "'a'" not in caught.value.problem


def trt_with_registry(version: str, creators: tuple[Any, ...] = ()) -> tuple[SimpleNamespace, list[str]]:
    loaded: list[str] = []
    registry = SimpleNamespace(load_library=lambda path: loaded.append(path) or object(), all_creators=creators)
    return SimpleNamespace(__version__=version, get_plugin_registry=lambda: registry), loaded


@pytest.fixture(scope="module")
def tiny_library(tmp_path_factory) -> bytes:
    path = library(tmp_path_factory.mktemp("tiny") / "lib.so", "int resvitTensorRTMajor(void) { return 10; }")
    return path.read_bytes()


def test_the_library_is_loaded_from_memory_and_once(tiny_library) -> None:
    trt, loaded = trt_with_registry("10.3.0")
    load_plugin_library(trt, tiny_library)
    assert len(loaded) == 1
    assert Path(loaded[0]).read_bytes() == tiny_library
    trt, loaded = trt_with_registry("10.3.0", (SimpleNamespace(plugin_namespace=NAMESPACE),))
    load_plugin_library(trt, tiny_library)
    assert loaded == []


def test_a_library_for_another_tensorrt_never_reaches_it(tiny_library) -> None:
    trt, loaded = trt_with_registry("11.4.0.106")
    for content, words in ((tiny_library, "it was compiled for TensorRT 10"), (b"", "too short"), (b"x" * 999, "ELF")):
        with pytest.raises(ResvitError, match=rf"11\.4\.0\.106 cannot load the plugin library: .*{words}") as caught:
            load_plugin_library(trt, content)
        assert caught.value.code is ExitCode.BUILD
        assert "resvit-engine plugin" in caught.value.fix
    assert loaded == []


def test_a_tensorrt_without_such_plugins_is_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    with pytest.raises(ResvitError, match=r"TensorRT 10\.3\.0 has no ahead-of-time plugins") as caught:
        plugin_api(TRT)
    assert caught.value.code is ExitCode.IMPOSSIBLE
