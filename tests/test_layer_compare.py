"""Layer by layer: with ONNX Runtime on both sides, one of them with a wrong weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.cli.main import run
from resvit_export.tools.layer_compare import compare_layers, first_departure
from tensorrt_standin import standin_environment
from test_build import small_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("polygraphy")

IMAGES = {"input": np.random.default_rng(1).standard_normal((2, 32, 8, 8)).astype(np.float32)}


@pytest.fixture(scope="module", params=[False, True], ids=["int8", "fp8"])
def model(request, tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "model.onnx", fp8=request.param)


def runtime(change=lambda graph: None):
    """ONNX Runtime as the other side, after ``change`` to its graph."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    from resvit_calibrate.runtime.runner import onnx_runner

    def runner(model: bytes):
        proto = onnx.load_from_string(model)
        change(proto.graph)
        return OnnxrtRunner(onnx_runner(proto.SerializeToString(), optimize=False).session)

    return runner


def test_equal_sides_differ_nowhere(model) -> None:
    found = compare_layers(model, IMAGES, runtime())
    assert (found[0].tensor, found[-1].tensor) == ("half", "logits")
    assert {"layer1_sum", "layer1", "layer2_sum", "head"} <= {item.tensor for item in found}
    assert all(item.error == item.largest == 0 for item in found)
    assert first_departure(found) is None


@pytest.mark.parametrize(("factor", "error"), [(3.0, 2.0), (float("nan"), float("inf"))])
def test_the_layer_that_goes_wrong_is_named(model, factor, error) -> None:
    def spoil(graph) -> None:
        scale = next(item for item in graph.initializer if item.name == "layer2_w_scale")
        wrong = onnx.numpy_helper.to_array(scale) * np.float16(factor)
        scale.CopyFrom(onnx.numpy_helper.from_array(wrong, scale.name))

    departure = first_departure(compare_layers(model, IMAGES, runtime(spoil)))
    assert (departure.tensor, departure.op) == ("layer2_wdq", "DequantizeLinear")
    assert departure.error == pytest.approx(error, rel=0.01)
    # Of the activations, the convolution is the first.
    departure = first_departure(compare_layers(model, IMAGES, runtime(spoil), ["layer1", "layer2_sum", "logits"]))
    assert (departure.tensor, departure.node, departure.op) == ("layer2_sum", "layer2_sum/Conv", "Conv")


def test_a_tensor_that_is_not_there_is_refused(model) -> None:
    with pytest.raises(ResvitError, match="no tensor 'layer9'"):
        compare_layers(model, IMAGES, runtime(), ["layer9"])


@pytest.mark.whole
def test_tensorrt_takes_the_graph_with_all_its_outputs(model, tmp_path) -> None:
    """Up to the engine, by the stand-in: running it takes a GPU."""
    script = """
import json, sys
from pathlib import Path
from polygraphy.backend.trt import EngineBytesFromNetwork
from resvit_export.tools.layer_compare import _with_outputs, tensorrt_network
model = _with_outputs(Path(sys.argv[1]), ["layer1", "layer2_sum", "logits"])
network = tensorrt_network(model)
_, parsed, _ = network()
print(json.dumps([parsed.get_output(index).name for index in range(parsed.num_outputs)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model)],
        env={**os.environ, **standin_environment(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == ["layer1", "layer2_sum", "logits"], done.stderr


def test_the_command_compares_what_this_machine_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.onnx"
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"], "relu"), onnx.helper.make_node("Abs", ["y"], ["z"], "abs")]
    ends = [value(name, onnx.TensorProto.FLOAT, [2, 3]) for name in ("x", "z")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), model)
    np.save(tmp_path / "x.npy", np.ones((5, 3), np.float32))
    line = ["layers", "--onnx", str(model), "--input", str(tmp_path / "x.npy")]
    assert run([*line, "--against", "onnxruntime", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["node"] for item in found["layers"]] == ["relu", "abs"]
    assert found["first_departure"] is None
    # An engine that computes something else in its second layer.
    negate = runtime(lambda graph: setattr(graph.node[1], "op_type", "Neg"))
    monkeypatch.setattr("resvit_export.tools.layer_compare.optimised_runner", negate)
    assert run([*line, "--against", "onnxruntime", "-q"]) == ExitCode.MISMATCH
    assert "first layer that departs is abs" in capsys.readouterr().err
    np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
    assert run([*line, "--against", "onnxruntime"]) == ExitCode.INPUT
    assert "has the shape [2, 4]" in capsys.readouterr().err
