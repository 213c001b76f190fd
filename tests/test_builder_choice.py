"""Which builder makes a target's engine: by the table, as asked for, and said where that matters."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_reports import engine_report
from quantize_graphs import Graph
from resvit_engines.bundle.bundle import read_manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.machine import Machine
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.remote.job_result import Answers, DeviceBundle, JobResult, Skipped
from resvit_engines.targets.choice import with_builder
from resvit_engines.targets.table import Builder, find_target
from resvit_export.cli.main import run
from resvit_export.recipe.file import recipe_from_toml, recipe_to_toml
from resvit_export.recipe.recipe import Recipe
from resvit_export.run import runs_for
from resvit_export.run_folder import RunFolder
from resvit_export.stages.device import RunOnDevice, require_target_there
from test_audit import kernel

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed"
)
SELDOM = "8 bits are seldom faster than FP16 there"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, wherever this runs."""
    monkeypatch.setattr("resvit_engines.builder.builder.local_sm", lambda: None)


@pytest.fixture
def build(workspace: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Builds a small classifier of Fashion-MNIST, whose accuracy is no subject; returns stages, and what was said."""
    g = Graph(1, 1, 28, 28)
    map_ = g.op("Conv", "input", g.weight("stem.weight", 16, 1, 4, 4), name="stem/Conv", strides=[4, 4])
    map_ = g.op("Conv", g.op("Relu", map_), g.weight("conv.weight", 16, 16, 3, 3), name="conv/Conv", pads=[1, 1, 1, 1])
    pooled = g.op("ReduceMean", g.op("Relu", map_), g.ints(2, 3), keepdims=0)
    model = g.save(workspace / "toy.onnx", g.linear(pooled, 16, 10, "head"))
    scaling = ["--preprocess", "mean=0.5", "--preprocess", "std=0.25"]
    few = ["--calibration-images", "32", "--validation-images", "64", "--no-search", "--json", "--run", "runs/x"]

    def built(*arguments: str, again: bool = False, code: ExitCode = ExitCode.UNDECIDED) -> tuple[dict[str, Any], str]:
        network = [] if again else ["--model", str(model), "--data", "fashion-mnist", *scaling]
        capsys.readouterr()
        assert run(["build", *network, *arguments, *few]) == code
        out, err = capsys.readouterr()
        document = json.loads(out)
        stages = {stage["stage"]: stage for stage in document["stages"]}
        return {"file": Path(document["bundle"]) if document["bundle"] else None, **stages}, err

    return built


@rtx
@pytest.mark.whole
def test_for_an_l4_a_plan_is_made_and_an_engine_by_rtx_where_that_is_asked_for(build: Callable[..., Any]) -> None:
    plain, said = build("--target", "l4")
    assert SELDOM not in said
    results = plain["compile"]["results"]
    assert "engine.json" not in results
    plan = results["plan.json"]
    assert "this machine has no L4 (compute capability 8.9) with TensorRT 11.4 beside it" in plan["why"]
    assert any("trtexec" in command and "--saveEngine=engine.plan" in command for command in plan["commands"])
    manifest = read_manifest(plain["file"])
    assert manifest.target == find_target("l4")
    assert manifest.engine is None
    assert "engine.plan" not in {file.path for file in manifest.files}
    audit = plain["audit"]["results"]["audit.json"]
    assert audit["predicted"]
    assert audit["stands_in"].startswith("No engine for L4 was compiled")

    asked, said = build("--target", "l4", "--builder", "rtx")
    assert said.count(SELDOM) == 1
    assert asked["compile"]["results"]["engine.json"]["builder"] == "TensorRT for RTX"
    audit = asked["audit"]["results"]["audit.json"]
    assert audit["stands_in"] == ""
    assert SELDOM in audit["sentences"][-1]
    assert read_manifest(asked["file"]).target == with_builder(find_target("l4"), Builder.RTX)
    for stage in ("quantize", "compile", "audit", "bundle"):
        assert asked[stage]["folder"] != plain[stage]["folder"], stage

    # The run keeps what was asked for, and the other builder's stages are still there.
    assert 'builder = "rtx"' in Path("runs/x/recipe.toml").read_text()
    again, _ = build(again=True)
    assert again["compile"]["folder"] == asked["compile"]["folder"]
    back, said = build("--builder", "tensorrt", again=True)
    assert (back["compile"]["folder"], back["compile"]["reused"]) == (plain["compile"]["folder"], True)
    assert "So far" not in said


@rtx
@pytest.mark.whole
def test_a_run_from_before_says_that_the_builder_is_another_and_goes_on(build: Callable[..., Any]) -> None:
    build("--target", "l4", "--builder", "rtx")
    recipe = Path("runs/x/recipe.toml")
    recipe.write_text(recipe.read_text().replace('builder = "rtx"\n', ""))
    (record,) = Path("runs/x").glob("compile-*/record.json")
    # As records were written before either builder could be chosen.
    record.write_text(re.sub(r'"builder": "rtx"', '"builder": "tensorrt-rtx"', record.read_text()))
    made, said = build(again=True)
    assert "So far TensorRT for RTX built the engines for L4 in runs/x; it is TensorRT 11.4 now" in said
    assert "--builder rtx goes on as before" in said
    assert "plan.json" in made["compile"]["results"]
    assert "So far" not in build(again=True)[1], "said once: what is made now is there"


@rtx
@pytest.mark.whole
@pytest.mark.parametrize("reads", ["Half", "Int8"])
def test_the_gate_judges_the_engine_that_the_device_built_not_what_stands_in(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    there = Machine(89, "NVIDIA L4", "11.4.0", None, "x86_64", 60_000, 10_000, "3.11.7", memory_available_mib=9000)
    convolutions = kernel("c", "conv", reads, "Half", "stem/Conv", "conv/Conv")
    engine = engine_report(target="l4", sm=89, builder_version="11.4.0", kernels=(convolutions,))
    made = DeviceBundle("x.resvit", "0" * 64, "key", "id")
    job = JobResult(engine, False, there, Skipped("not run"), Answers(0, None), Skipped("not run"), made)

    def brought_back(stage: RunOnDevice, folder: Path, reporter: Reporter) -> None:
        (folder / "engine.json").write_bytes(pretty_json(engine.to_json()))
        (folder / "device.json").write_bytes(pretty_json({**job.to_json(), "images": 0, "verdict": None}))
        stage.audit.write(folder, folder, reporter)

    monkeypatch.setattr(RunOnDevice, "fill", brought_back)
    monkeypatch.setattr("resvit_export.stages.device.look_at_device", lambda *_, **__: there)
    code = ExitCode.REJECTED if reads == "Half" else ExitCode.UNDECIDED
    found, said = build("--target", "l4", "--require-fused", "--device", "ssh://server", code=code)
    assert found["audit"]["results"]["audit.json"]["failures"] == []
    failures = found["device"]["results"]["audit.json"]["failures"]
    assert [failure["problem"] for failure in failures] == (
        ["2 products are quantised but do not run in 8 bits: stem/Conv, conv/Conv"] if reads == "Half" else []
    )
    assert ("not run in 8 bits: stem/Conv, conv/Conv" in said) == (reads == "Half")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "jetson-orin", "--builder", "rtx"], "TensorRT for RTX builds no engine for Jetson AGX Orin"),
        (["--target", "h100", "--builder", "rtx"], "this is 9.0"),
        (["--target", "l4", "--target", "b200", "--builder", "rtx"], "no engine for B200"),
        (["--target", "l4", "--builder", "rtx", "--tensorrt", "10.13"], "so TensorRT 10.13 has no part in it"),
        (["--target", "rtx-4090", "--tensorrt", "10.13"], "--builder tensorrt"),
        (["--target", "rtx-4090", "--target", "rtx-5090", "--tensorrt", "10.13"], "--builder tensorrt"),
        (["--target", "l4", "--tensorrt", "10.2"], "with one of: 10.3, 10.4"),
        (["--target", "jetson-orin", "--tensorrt", "10.13"], "with one of: 10.3, 10.7."),
        (["--target", "jetson-thor@7.2", "--tensorrt", "10.13"], "with one of: 10.16, 11.4."),
        (["--target", "l4", "--builder", "rtx", "--plugins", "on"], "TensorRT for RTX takes no plugins"),
        (["--target", "l4", "--builder", "rtx", "--version-compatible"], "lean runtime"),
    ],
)
def test_what_no_builder_does_is_refused_before_any_work(
    workspace: Path, no_gpu: None, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    network = ["--model", "resvit:embed-nano", "--data", "fashion-mnist"]
    assert run(["build", *network, *arguments, "--run", "no"]) == ExitCode.IMPOSSIBLE
    assert says in capsys.readouterr().err
    assert not Path("no").exists()


def targets(folder: Path, **settings: Any) -> list[tuple[str, str, str]]:
    runs = runs_for(Recipe(model="resvit:embed-nano", **settings), RunFolder(folder, SILENT), SILENT)
    found = [run.require_target() for run in runs]
    return [(target.name, target.builder.value, target.tensorrt) for target in found]


def test_among_several_targets_a_release_goes_to_those_that_tensorrt_builds_for(tmp_path: Path, no_gpu: None) -> None:
    assert targets(tmp_path, targets=("rtx-4090", "l4"), tensorrt="10.13") == [
        ("rtx-4090", "rtx", "1.7"),
        ("l4", "tensorrt", "10.13"),
    ]
    assert targets(tmp_path, targets=("rtx-4090", "l4"), builder="tensorrt", tensorrt="10.16") == [
        ("rtx-4090", "tensorrt", "10.16"),
        ("l4", "tensorrt", "10.16"),
    ]
    assert targets(tmp_path, targets=("l4", "jetson-thor"), jetpack="7.2") == [
        ("l4", "tensorrt", "11.4"),
        ("jetson-thor", "tensorrt", "10.16"),
    ]
    assert targets(tmp_path, targets=("rtx-4090", "l4"), builder="rtx") == [
        ("rtx-4090", "rtx", "1.7"),
        ("l4", "rtx", "1.7"),
    ]


def test_a_target_of_ones_own_has_the_software_of_its_row_or_what_is_said(tmp_path: Path, no_gpu: None) -> None:
    own = {"box": {"like": "jetson-orin", "memory_mib": 65536}, "server": {"like": "l4", "tensorrt": "10.9"}}
    assert targets(tmp_path, targets=("box",), own_targets=own, tensorrt="10.7") == [("box", "tensorrt", "10.7")]
    assert targets(tmp_path, targets=("server",), own_targets=own) == [("server", "tensorrt", "10.9")]
    assert targets(tmp_path, targets=("server",), own_targets=own, tensorrt="11.1") == [("server", "tensorrt", "11.1")]
    assert targets(tmp_path, targets=("server",), own_targets=own, builder="rtx") == [("server", "rtx", "1.7")]


def test_where_the_gpu_is_the_release_that_is_there_builds_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = "resvit_engines.builder.builder"
    monkeypatch.setattr(f"{builder}.local_sm", lambda: 89)
    monkeypatch.setattr(f"{builder}._installed", lambda module: True)
    monkeypatch.setattr(f"{builder}.tensorrt_here", lambda: "10.13.3")

    def one(**settings: Any) -> tuple[str, bool]:
        (found,) = runs_for(Recipe(model="resvit:embed-nano", **settings), RunFolder(tmp_path, SILENT), SILENT)
        return found.require_target().tensorrt, found.builds_here

    assert one(targets="l4") == ("10.13", True)
    assert one(targets="l4", tensorrt="11.4") == ("11.4", False)
    own = {"server": {"like": "l4", "tensorrt": "10.9"}}
    assert one(targets="server", own_targets=own) == ("10.9", False)
    assert one(targets="a10") == ("11.4", False)
    assert one(targets="l4", builder="rtx") == ("1.7", True)


def test_the_recipe_keeps_builder_and_release(tmp_path: Path) -> None:
    recipe = Recipe(targets=("l4",), builder="tensorrt", tensorrt="10.13")
    path = tmp_path / "r.toml"
    path.write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(path) == recipe
    assert recipe.builder is Builder.TENSORRT
    with pytest.raises(ResvitError, match="builder = 'tensorrt-rtx' does not exist"):
        Recipe(builder="tensorrt-rtx")


@pytest.mark.parametrize(
    ("target", "installed", "code", "says"),
    [
        ("l4", "11.4.0.106", None, ""),
        ("l4", None, ExitCode.MISSING, "pip install 'tensorrt==11.4.*'"),
        ("l4", "10.13.3", ExitCode.IMPOSSIBLE, "Say --tensorrt 10.13."),
        ("rtx-4090", None, None, ""),
    ],
)
def test_a_device_with_another_tensorrt_is_refused_with_what_to_say(
    target: str, installed: str | None, code: ExitCode | None, says: str
) -> None:
    there = Machine(89, "NVIDIA L4", installed, None, "x86_64", 60_000, 10_000, "3.11.7")
    if code is None:
        require_target_there(find_target(target), there, "server")
        return
    with pytest.raises(ResvitError) as caught:
        require_target_there(find_target(target), there, "server")
    assert caught.value.code is code
    assert says in caught.value.fix
