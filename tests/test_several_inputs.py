"""Several inputs, from --shape to the engine's profiles, the bundle and what runs on the device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from conftest import copy_stages
from resvit_engines.bench.commands import arrays_from, golden_feeds
from resvit_engines.builder.device_plan import plan_for_device
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import extract_bundle
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.run.golden import golden_check
from resvit_engines.run.runner import open_runner
from resvit_engines.targets.table import find_target
from resvit_export.cli.main import run
from resvit_export.loading.inputs import NetworkInput, in_order, random_feeds, shape_wish, shape_wishes
from resvit_export.recipe.file import recipe_from_toml, recipe_to_toml
from resvit_export.recipe.recipe import Recipe
from two_inputs import network

pytestmark = pytest.mark.whole

HERE = Path(__file__).parent / "two_inputs.py"
SHAPES = ["--shape", "images=1..4x3x16x16", "--shape", "sizes=1..4x2:int64"]
FEW = ["--task", "other", "--task-option", "least_agreement=0", "--no-search", "--quiet"]


def one(folder: Path, pattern: str) -> Path:
    """One of the files: what is asked of it is the same for both targets."""
    return sorted(folder.glob(pattern))[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two inputs") / "run"
    model = ["--model", f"{HERE}:network", "--data", f"{HERE}:data", *SHAPES]
    targets = ["--target", "rtx-4090", "--target", "jetson-orin", "--run", str(folder)]
    assert run(["build", *model, *FEW, *targets]) == 0
    return folder


@pytest.mark.slow
def test_all_stages_know_both_inputs(built: Path) -> None:
    exported = json.loads(one(built, "export-*/export.json").read_bytes())
    assert exported["input"] == {"name": "input", "shape": ["batch", 3, 16, 16]}
    assert exported["inputs"][1] == {"name": "sizes", "shape": [2], "dtype": "int64"}
    quantised = onnx.load(one(built, "quantize-*/model.onnx"))
    assert [(item.name, item.type.tensor_type.elem_type) for item in quantised.graph.input] == [
        ("input", onnx.TensorProto.FLOAT),
        ("sizes", onnx.TensorProto.INT64),
    ]
    assert {node.op_type for node in quantised.graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    golden = json.loads(one(built, "validate-*/verdict.json").read_bytes())["golden"]
    assert golden["inputs"] == {"sizes": "golden_input_1.npy"}


@pytest.mark.slow
def test_the_engine_takes_a_range_of_batches_of_both(built: Path) -> None:
    engine = json.loads(one(built, "compile-*/engine.json").read_bytes())
    assert {item["name"]: item["shape"] for item in engine["inputs"]} == {"input": [-1, 3, 16, 16], "sizes": [-1, 2]}
    assert one(built, "compile-*/engine.plan").stat().st_size > 0
    plan = json.loads(one(built, "compile-*/plan.json").read_bytes())
    (command,) = [line for line in plan["commands"] if "trtexec" in line]
    assert "--minShapes=input:1x3x16x16,sizes:1x2" in command
    assert "--maxShapes=input:4x3x16x16,sizes:4x2" in command
    assert plan["settings"]["inputs"] == {"input": [3, 16, 16], "sizes": [2]}


@pytest.mark.slow
def test_the_bundle_runs_on_the_device_side(built: Path, tmp_path: Path) -> None:
    bundle = next(path for path in built.glob("bundle-*/*.resvit") if "jetson" in path.name)
    manifest = extract_bundle(bundle, tmp_path)
    assert [item.name for item in manifest.inputs] == ["input", "sizes"]
    assert golden_check(tmp_path, manifest, "onnxruntime").images >= 6
    with open_runner(tmp_path, manifest, "onnxruntime") as runner:
        feeds = golden_feeds(tmp_path, manifest, runner)
        assert feeds is not None
        first = runner(feeds)["boxes"]
        double = runner({**feeds, "sizes": 2 * feeds["sizes"]})["boxes"]
    np.testing.assert_allclose(double, 2 * first, rtol=1e-3)
    # Of other sizes, the golden outputs are not these.
    np.save(tmp_path / "golden_input_1.npy", 3 * feeds["sizes"])
    with pytest.raises(ResvitError, match="computes something else"):
        golden_check(tmp_path, manifest, "onnxruntime")


@pytest.mark.slow
def test_an_onnx_file_with_two_inputs(tmp_path: Path) -> None:
    path = tmp_path / "sized.onnx"
    arguments = (torch.zeros(2, 3, 16, 16), torch.ones(2, 2, dtype=torch.int64))
    shapes = {"images": {0: "n"}, "sizes": {0: "n"}}
    torch.onnx.export(network(), arguments, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    data = ["--data", f"{HERE}:data", "--target", "jetson-orin", "--run", str(tmp_path / "run")]
    assert run(["build", "--model", str(path), *data, *FEW, "--shape", "images=1x3x16x16"]) == 0
    exported = json.loads(one(tmp_path / "run", "export-*/export.json").read_bytes())
    assert [item["name"] for item in exported["inputs"]] == ["input", "sizes"]
    wrong = ["--shape", "photo=1x3x16x16", "--run", str(tmp_path / "wrong"), "--data", f"{HERE}:data"]
    assert run(["export", "--model", str(path), *wrong[:4]]) == ExitCode.INPUT


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_each_input_that_a_product_reads_has_its_own_range(tmp_path: Path, effort: str) -> None:
    shapes = [f"--shape={shape}" for shape in ("left=1..4x3x16x16", "right=1..4x3x16x16", "angles=1..4x32")]
    few = ["--calibration-images", "16", "--target", "jetson-orin", "--effort", effort, "--quiet"]
    arguments = ["--model", f"{HERE}:pair", "--data", f"{HERE}:pairs", *shapes, "--run", str(tmp_path), *few]
    assert run(["quantize", *arguments]) == 0
    ranges = json.loads(one(tmp_path, "calibrate-*/ranges.json").read_bytes())["tensors"]
    left, right, angles = (ranges[name]["amax"]["int8"]["max"] for name in ("input", "right", "angles"))
    assert 2 < right / left < 4
    assert angles > 0
    model = onnx.load(one(tmp_path, "quantize-*/model.onnx"))
    read = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {"input", "right"} <= read


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", f"{HERE}:data"], "needs images, sizes, and nothing says what images, sizes are"),
        (["--data", f"{HERE}:data", "--shape", "images=1x3x16x16"], "nothing says what sizes is"),
        (["--data", f"{HERE}:data", *SHAPES, "--shape", "size=1..4x2"], "has no parameter size"),
        (["--data", f"{HERE}:data", *SHAPES, "--batch", "8"], "--batch says 8, and --shape 1..4"),
        (["--data", f"{HERE}:data", "--shape", "images=1x3x16x16", "--shape", "sizes=1x2:int46"], "unknown type int46"),
        (["--data", f"{HERE}:data", SHAPES[0], SHAPES[1], "--shape", "sizes=1..4x5:int64"], "fails on the inputs"),
        (["--data", f"{HERE}:without_sizes", *SHAPES], "gives nothing of that name"),
        (["--data", f"{HERE}:wrong_sizes", *SHAPES], r"the data gives int64 [1, 3]"),
        (["--data", f"{HERE}:too_much", *SHAPES], "gives angle, which the network does not read"),
        (["--data", f"{HERE}:data", *SHAPES, "--prune-macs", "0.5"], "Pruning works for networks that read images"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(
    arguments: list[str], words: str, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_stages(
        built, tmp_path / "run", ("fold", "export")
    )  # what is wrong after them is said without doing them again
    command = ["build", "--model", f"{HERE}:network", "--target", "jetson-orin", "--run", str(tmp_path / "run")]
    code = run([*command, *arguments, "--task", "other", "--no-search", "--quiet"])
    assert code in (ExitCode.INPUT, ExitCode.IMPOSSIBLE)
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_sensitivity_learning_and_recovery_know_both_inputs(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    copy_stages(built, folder)
    arguments = ["--model", f"{HERE}:network", "--data", f"{HERE}:data", *SHAPES, "--run", str(folder), *FEW]
    for method in ("one-pass", "brute-force"):
        more = ["--task", "other", "--target", "rtx-4090", "--images", "4", "--method", method]
        assert run(["sensitivity", *arguments[: -len(FEW)], *more, "--quiet"]) == 0
    gradient, measured = (
        json.loads(path.read_bytes()) for path in sorted(folder.glob("sensitivity-*/sensitivity.json"))
    )
    assert {gradient["method"], measured["method"]} == {"one-pass", "brute-force"}
    assert run(["build", *arguments, "--target", "rtx-4090", "--effort", "best"]) == 0
    learned = [json.loads(path.read_bytes()) for path in folder.glob("quantize-*/quantize.json")]
    assert {each["effort"] for each in learned} == {"fast", "best"}
    training = ["--train-data", f"{HERE}:training", "--recover", "always", "--recover-epochs", "1"]
    assert run(["build", *arguments, "--target", "rtx-4090", *training]) == 0
    assert json.loads(one(folder, "recover-*/recover.json").read_bytes())["trained"] > 4


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "batch"),
    [
        ("pixel_values=1..8x3x224x224", (3, 224, 224), "float32", (1, 8, 8)),
        ("x=2x3x8x8", (3, 8, 8), "float32", (2, 2, 2)),
        ("sizes=1..4..16x2:int64", (2,), "int64", (1, 4, 16)),
        ("camera.angle=3", (), "float32", (3, 3, 3)),
    ],
)
def test_shapes_that_read(text: str, shape: tuple, dtype: str, batch: tuple) -> None:
    wish = shape_wish(text)
    assert (wish.input.shape, wish.input.dtype, wish.batch) == (shape, dtype, batch)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3x224x224", "is not NAME=BATCH"),
        ("x=", "is not NAME=BATCH"),
        ("x=1x2x224..640", "neither the batch nor height or width"),
        ("x=8..1x3x8x8", "in rising order"),
        ("x=0x3x8x8", "in rising order"),
        ("x=1..2..3..4x3", "in rising order"),
        ("x=1x0x8", "no number above 0"),
        ("x=1x3.5x8", "no number above 0"),
        ("x=1x2:half", "unknown type half"),
    ],
)
def test_shapes_that_do_not_read(text: str, words: str) -> None:
    with pytest.raises(ResvitError) as caught:
        shape_wish(text)
    assert words in f"{caught.value.problem} {caught.value.fix}"


def test_wishes_together() -> None:
    with pytest.raises(ResvitError, match="names the input a twice"):
        shape_wishes(["a=1x2", "a=1x3"])
    with pytest.raises(ResvitError, match=r"different batches \(a: 1, b: 1..4\)"):
        shape_wishes(["a=1x2", "b=1..4x3"])
    recipe = Recipe(shapes=("a=1..4x3x8x8", "b=1..4x2:int64"))
    assert recipe.batch_range == (1, 4, 4)
    assert Recipe(shapes=("a=2x3x8x8",), batch="2").batch_range == (2, 2, 2)


def test_a_recipe_keeps_shapes(tmp_path: Path) -> None:
    recipe = Recipe(shapes=("a=1..4x3x8x8", "b=1..4x2:int64"))
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(tmp_path / "recipe.toml").shapes == recipe.shapes


def test_the_image_comes_first() -> None:
    sizes, image = NetworkInput("sizes", (2,), "int64"), NetworkInput("pixels", (3, 8, 8))
    assert [item.name for item in in_order([sizes, image])] == ["input", "sizes"]
    with pytest.raises(ResvitError, match="None of the network's inputs is an image"):
        in_order([sizes])
    with pytest.raises(ResvitError, match="calls another input than its image 'input'"):
        in_order([image, NetworkInput("input", (2,))])
    feeds = random_feeds(in_order([sizes, image]), 5, np.random.default_rng(0))
    assert {name: (value.shape, value.dtype.name) for name, value in feeds.items()} == {
        "input": ((5, 3, 8, 8), "float32"),
        "sizes": ((5, 2), "int64"),
    }


def test_a_plan_with_one_input_is_as_it_was() -> None:
    settings = BuildSettings(batch=(1, 2, 4))
    plan = plan_for_device(find_target("jetson-orin"), settings, (3, 8, 8), dynamic_batch=True)
    assert "inputs" not in plan.to_json()["settings"]
    assert "--optShapes=input:2x3x8x8 " in f"{plan.commands[-1]} "


def test_inputs_of_the_device_command(tmp_path: Path) -> None:
    for name in ("images", "sizes", "a=b"):
        np.save(tmp_path / f"{name}.npy", np.ones((2, 3)))
    images, beside = arrays_from([str(tmp_path / "images.npy"), f"sizes={tmp_path / 'sizes.npy'}"])
    assert images.shape == (2, 3)
    assert list(beside) == ["sizes"]
    assert arrays_from([str(tmp_path / "a=b.npy")])[1] == {}
    with pytest.raises(ResvitError, match="0 files of images"):
        arrays_from([f"sizes={tmp_path / 'sizes.npy'}"])
