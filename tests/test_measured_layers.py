"""Times that TensorRT told of an engine's layers become a file of ``--measured-times``, which predictions follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.targets.costs import CostModel
from resvit_engines.targets.layer_times import measured_times_from_json
from resvit_engines.targets.layer_work import LayerWork
from resvit_engines.targets.table import Precision, find_target
from resvit_export.records.place import Place
from resvit_export.stage import File
from resvit_export.stages.decide.tune import Tune
from resvit_export.to_tensorrt.measured_layers import listed_engine, times_of_layers
from resvit_quantize.graph.fused_layers import layers_from_graph
from resvit_quantize.graph.network import network_from_onnx
from test_cpu_target import residual_and_linear

ORIN = find_target("jetson-orin")


@pytest.fixture
def works(tmp_path: Path) -> tuple[LayerWork, ...]:
    residual_and_linear(tmp_path / "float.onnx")
    return tuple(w for w in layers_from_graph(network_from_onnx(tmp_path / "float.onnx"), 1) if w.nodes)


def listing(path: Path, names: list[str]) -> Path:
    """Layers as TensorRT 10 lists them: a fused layer is called by its nodes."""
    tensor = {"Name": "t", "Dimensions": [1, 32, 8, 8], "Format/Datatype": "Row major linear FP16"}
    layers = [{"Name": name, "LayerType": "CaskConvolution" if "Reformat" not in name else "Reformat",
               "Inputs": [tensor], "Outputs": [tensor]} for name in names]  # fmt: skip
    path.write_text(json.dumps({"Layers": layers, "Bindings": ["input", "linear"]}))
    return path


def test_a_layer_gets_the_time_of_its_kernels(works, tmp_path: Path) -> None:
    names = [" + ".join(work.members) for work in works]
    rows = [(name, 10.0 + place) for place, name in enumerate(names)]
    copy = "Reformatting CopyNode for Input Tensor 0 to node_c1"
    engine = listed_engine(listing(tmp_path / "l.json", [copy, *names]), [(copy, 99.0), *rows])
    precisions = {"node_c2": Precision.INT8}
    found = times_of_layers(works, engine, precisions)
    assert {name: us for name, (_, us) in found.items()} == {w.name: 10.0 + i for i, w in enumerate(works)}
    assert {name for name, (precision, _) in found.items() if precision is Precision.INT8} == {"node_c2"}


def test_two_kernels_of_a_layer_add_up_and_one_of_two_layers_tells_neither(works, tmp_path: Path) -> None:
    second, third, *others, first = works
    split = list(first.members)
    assert len(split) == 2
    both = " + ".join((*second.members, *third.members))
    names = [*split, both, *(" + ".join(work.members) for work in others)]
    engine = listed_engine(listing(tmp_path / "l.json", names), [(name, 5.0) for name in names])
    found = times_of_layers(works, engine, {})
    assert found[first.name] == (Precision.FP16, 10.0)
    assert second.name not in found
    assert third.name not in found
    assert set(found) == {work.name for work in works} - {second.name, third.name}


def test_times_of_another_engine_are_refused(works, tmp_path: Path) -> None:
    names = [" + ".join(work.members) for work in works]
    with pytest.raises(ResvitError, match="of another engine") as caught:
        listed_engine(listing(tmp_path / "l.json", names), [("Conv_0", 5.0), ("Conv_1", 5.0)])
    assert caught.value.code is ExitCode.INPUT


def test_the_file_that_tuning_writes_is_what_predictions_follow(works, tmp_path: Path) -> None:
    (tmp_path / "plain.onnx").write_bytes(b"x")
    layers = {work.name: {"fp16": 7.0, "int8": 4.0} for work in works}
    place = Place({"gpu": "Jetson AGX Orin", "sm": 87, "tensorrt": "10.3.0", "host": "orin"}, "ssh://orin")
    folder = tmp_path / "tune"
    folder.mkdir()
    stage = Tune(
        plain=File.of(tmp_path / "plain.onnx"),
        effort="quick",
        place=place,
        regions=(),
        precisions={},
        sentences=(),
        faster=None,
        ms=None,
        best=None,
        remarks=(),
        layer_times=layers,
    )
    stage.fill(folder, None)  # type: ignore[arg-type]
    measured = measured_times_from_json(folder / "measured-times.json")
    assert measured.device == "Jetson AGX Orin (orin)"
    measured.require_known(work.name for work in works)
    costs = CostModel(works, ORIN, measured)
    in_int8 = {node: Precision.INT8 for work in works for node in work.nodes}
    for assignment, us in (({}, 7.0), (in_int8, 4.0)):
        for layer in costs.predict(assignment).layers:
            if layer.precision.value == ("fp16" if not assignment else "int8"):
                assert layer.measured
                assert layer.total_us - layer.reformat_us == pytest.approx(us)
    # Without any, none is written.
    (tmp_path / "none").mkdir()
    Tune(stage.plain, "quick", place, (), {}, (), None, None, None, (), {}).fill(tmp_path / "none", None)  # type: ignore[arg-type]
    assert not (tmp_path / "none/measured-times.json").exists()
    assert (folder / "tune.json").read_bytes() == (tmp_path / "none/tune.json").read_bytes()
    assert json.loads((folder / "tune.json").read_bytes())["place"] == pretty_and_back(place.facts)


def pretty_and_back(value: object) -> object:
    return json.loads(pretty_json(value))
