"""A wrong file of each kind for every option that names one, and wrong values in the environment: never exit code 1."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import resvit_engines.cli.main
import resvit_export.cli.main
from resvit_engines.audit.inspector import layers_from_json
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.remote.ssh import PATIENCE_VARIABLE, Connection, address_from
from resvit_engines.targets.layer_times import measured_times_from_json
from resvit_export.recipe.file import recipe_from_toml
from resvit_export.recipe.recipe import SETTINGS
from resvit_export.stages.device import IMAGES_MIB_VARIABLE, images_that_fit
from test_on_device import ORIN
from test_outside import JSON

EXPORT, ENGINE = resvit_export.cli.main.run, resvit_engines.cli.main.run
PREPROCESS = ("--preprocess", "mean=0.5", "--preprocess", "std=0.5")
COMMANDS: dict[str, tuple[Callable[[list[str]], int], Sequence[str]]] = {
    "inspect": (EXPORT, ("inspect", "FILE")),
    "model": (EXPORT, ("export", "--model", "./FILE.onnx", "--target", "rtx-4090", "--run", "r")),
    "recipe": (EXPORT, ("build", "--recipe", "FILE")),
    "run folder": (EXPORT, ("report", "--run", "FILE")),
    "bench": (EXPORT, ("bench", "--run", "FILE", "--seconds", "0.1")),
    "layer file": (EXPORT, ("audit", "--layers", "FILE", "--onnx", "ok.onnx")),
    "audited onnx": (EXPORT, ("audit", "--layers", "layers.json", "--onnx", "FILE")),
    "fp16 layers": (EXPORT, ("audit", "--layers", "layers.json", "--onnx", "ok.onnx", "--fp16-layers", "FILE")),
    "compared onnx": (EXPORT, ("layers", "--onnx", "FILE", "--input", "ok.npy", "--against", "onnxruntime")),
    "compared images": (EXPORT, ("layers", "--onnx", "ok.onnx", "--input", "FILE", "--against", "onnxruntime")),
    "measured times": (
        EXPORT,
        ("build", "--target", "rtx-4090", "--model", "./ok.onnx", "--data", "ok.npy", "--measured-times", "FILE",
         "--latency-budget", "1x", "--run", "m", *PREPROCESS),
    ),
    "verified bundle": (ENGINE, ("verify", "FILE")),
    "installed bundle": (ENGINE, ("install", "FILE", "--root", "root")),
    "bundle that runs": (ENGINE, ("run", "FILE", "--input", "ok.npy", "--output", "o.npy")),
    "images": (ENGINE, ("run", "ok", "--input", "FILE", "--output", "o.npy", "--root", "root")),
    "timed bundle": (ENGINE, ("bench", "FILE")),
    "job's bundle": (ENGINE, ("build", "FILE", "--job", "job")),
    "trust": (ENGINE, ("verify", "kinds/zip", "--trust", "FILE")),
}  # fmt: skip
KINDS = ("text", "picture", "empty", "folder", "pipe", "zip", "half JSON", "list", "object", "zeros", "deep", "TOML",
         "device", "absent")  # fmt: skip


def make_kinds(folder: Path) -> None:
    folder.mkdir()
    (folder / "text").write_text("hello\n")
    Image.new("RGB", (8, 8)).save(folder / "picture", "PNG")
    (folder / "empty").write_bytes(b"")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("a", "b")
    (folder / "half JSON").write_text('{"a": [1, ')
    (folder / "list").write_text("[1, 2]")
    (folder / "object").write_text('{"layers": {"a": 1}, "Layers": [{"Inputs": 3}], "format": "x"}')
    (folder / "zeros").write_bytes(bytes(1000))
    (folder / "deep").write_text("[" * 100_000)
    (folder / "TOML").write_text("[model]\nname = 3\n[data]\ncalibration = [[[1]]]\n")
    (folder / "device").symlink_to("/dev/zero")
    for kind in KINDS:
        (folder / f"{kind}.onnx").symlink_to(kind)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_kinds(tmp_path / "kinds")
    value = (oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy")
    graph = oh.make_graph([oh.make_node("Relu", ["x"], ["y"])], "g", [next(value)], [next(value)])
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8), "ok.onnx")
    np.save("ok.npy", np.zeros((1, 3, 8, 8), np.float32))
    Path("layers.json").write_text('{"Layers": [], "Bindings": []}')
    return tmp_path


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_file_is_a_users_fault(
    place: Path, command: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, arguments = COMMANDS[command]
    code = run([part.replace("FILE", f"kinds/{kind}") for part in arguments])
    said = capsys.readouterr()
    assert code not in (ExitCode.OK, ExitCode.BUG), said.err
    assert "No such option" not in said.err
    assert "bug in" not in said.err


def test_an_onnx_has_bounds_wherever_it_is_given(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("huge.onnx").open("wb") as stream:
        stream.write(Path("ok.onnx").read_bytes())
        stream.truncate(1 << 40)  # a file of holes
    call = oh.make_node("f0", ["x"], ["y"], domain="own")
    opsets = [oh.make_opsetid("", 17), oh.make_opsetid("own", 1)]
    doubling = []
    for number in range(31):
        inner, domain = (f"f{number + 1}", "own") if number < 30 else ("Relu", "")
        calls = [oh.make_node(inner, [first], [second], domain=domain) for first, second in ("xm", "my")]
        doubling.append(oh.make_function("own", f"f{number}", ["x"], ["y"], calls, opsets))
    value = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy"]
    graph = oh.make_graph([call], "g", value[:1], value[1:])
    onnx.save(oh.make_model(graph, functions=doubling, opset_imports=opsets, ir_version=8), "doubling.onnx")
    for name, says in (("huge.onnx", "holds at most 2 GiB"), ("doubling.onnx", "written out, its functions are")):
        for command in ("audited onnx", "compared onnx", "model"):
            run, arguments = COMMANDS[command]
            code = run([part.replace("./FILE.onnx", name).replace("FILE", name) for part in arguments])
            assert (code, says in capsys.readouterr().err) == (ExitCode.INPUT, True), (name, command)


def read_text(text: str, read: Callable[[Path], object]) -> ExitCode | None:
    """What reading a file of this text ends with: nothing, or the code of its error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(text.encode(errors="replace"))
        try:
            read(path)
        except ResvitError as error:
            return error.code
    return None


@pytest.mark.whole
@given(st.sampled_from(sorted(item.toml for item in SETTINGS.values())), JSON)
@settings(deadline=None, max_examples=200)
def test_any_value_of_any_setting_is_taken_or_refused(key: str, value: object) -> None:
    text = json.dumps(value)
    assert read_text(f"{key} = {text}", recipe_from_toml) in (None, ExitCode.INPUT, ExitCode.IMPOSSIBLE)


@pytest.mark.whole
@pytest.mark.parametrize(
    "text",
    [f"a = {'[' * 5000}", f"a = {'{a=' * 5000}", ".".join("a" * 5000) + " = 1", "a = " + "9" * 5000,
     "a = 2024-02-31", "a = 1e999", "a = nan", "\x00", "[[model]]", "model = 3", "[model.name]\nx = 1"],
)  # fmt: skip
def test_recipes_that_no_recipe_is(text: str) -> None:
    assert read_text(text, recipe_from_toml) == ExitCode.INPUT


@pytest.mark.whole
@given(st.text() | JSON.map(json.dumps))
@settings(deadline=None)
def test_any_text_is_a_recipe_or_refused(text: str) -> None:
    assert read_text(text, recipe_from_toml) in (None, ExitCode.INPUT)


@pytest.mark.whole
@given(JSON, st.dictionaries(st.sampled_from(["fp16", "int8", "x"]), JSON))
@settings(deadline=None)
def test_any_measured_times_are_read_or_refused(value: object, times: dict[str, object]) -> None:
    for document in (value, {"device": value, "layers": value}, {"layers": {"a": times}}):
        assert read_text(json.dumps(document), measured_times_from_json) in (None, ExitCode.INPUT)


LAYER = st.fixed_dictionaries(
    {"Inputs": JSON},
    optional=dict.fromkeys(("Name", "LayerType", "Outputs", "Constants", "Metadata", "TacticName", "Weights"), JSON),
)
TENSORS = st.fixed_dictionaries({"Inputs": st.lists(st.fixed_dictionaries({"Name": JSON, "Dimensions": JSON}))})


@pytest.mark.whole
@given(st.lists(LAYER | TENSORS, max_size=3), JSON)
@settings(deadline=None)
def test_any_layer_file_is_read_or_refused(layers: list[object], bindings: object) -> None:
    text = json.dumps({"Layers": layers, "Bindings": bindings})
    assert read_text(text, lambda path: layers_from_json(path.read_text())) in (None, ExitCode.INPUT)


@pytest.mark.parametrize("value", ["x", "-1", "0", "nan", "inf", "1e9", "1,5", "\x1b[2J", "9" * 400])
def test_numbers_of_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, value)
    with pytest.raises(ResvitError, match=PATIENCE_VARIABLE):
        Connection(address_from("ssh://h"))
    monkeypatch.setenv(IMAGES_MIB_VARIABLE, value)
    with pytest.raises(ResvitError, match=IMAGES_MIB_VARIABLE):
        images_that_fit([3, 8, 8], 1, ORIN)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "")
    assert Connection(address_from("ssh://h")).patience == 120
