"""One engine for images of several sizes: from --input-shape to profiles, golden images and the device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_standin import FakeCuda, FakeEngine, FakeTensorRT
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import ranges_from
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.device_plan import plan_for_device
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import extract_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.pictures.sizes import SizeRange, shape_from_text, size_from_text, sizes_from_numbers
from resvit_engines.records import Record
from resvit_engines.run.cuda import Cuda
from resvit_engines.run.engine_lane import open_lane
from resvit_engines.run.golden import golden_check
from resvit_engines.run.golden_files import sqnr_db
from resvit_engines.run.prepared import preprocess_at
from resvit_engines.run.runner import open_runner
from resvit_engines.targets.table import Precision, find_target
from resvit_engines.trt.io_tensor import IoTensor
from resvit_engines.trt.running import tensors_of_engine
from resvit_export.cli.main import run
from resvit_export.loading.load import load_network, network_from_module
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.program.trace import program_from_module
from resvit_export.loading.spec import ModelSpec
from resvit_export.recipe.file import recipe_from_toml, recipe_to_toml
from resvit_export.recipe.recipe import Recipe
from resvit_export.refusals import refuse_impossible
from resvit_export.to_onnx.export import onnx_from_program
from resvit_export.to_onnx.own_onnx import import_onnx
from resvit_quantize.fold.program import fold_program
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.shapes import static_shapes
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings
from size_networks import detector, fixed_positions, kept_size, open_heads, whole_numbers, windows

HERE = Path(__file__).parent / "size_networks.py"
SIZES = SizeRange((16, 16), (32, 32), (32, 48))
FEW = [
    "--task",
    "other",
    "--task-option",
    "least_agreement=0",
    "--preprocess",
    "mean=0.5",
    "--preprocess",
    "std=0.25",
    "--quiet",
]

side = st.integers(1, 4096)
spans = st.tuples(side, side, side).map(lambda three: tuple(sorted(three)))


def images_file(folder: Path, count: int = 24) -> Path:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, 10, 10, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=coarse.repeat(4, axis=1).repeat(4, axis=2))
    return folder / "images.npz"


@given(spans, spans, st.integers(1, 4096))
def test_a_range_is_read_as_it_is_written(height: tuple[int, ...], width: tuple[int, ...], channels: int) -> None:
    sizes = SizeRange(*zip(height, width, strict=True))
    assert sizes_from_numbers(sizes.numbers()) == sizes
    written = "x".join("..".join(map(str, span)) for span in (height, width))
    assert shape_from_text(f"{channels}x{written}") == (channels, sizes)
    assert sizes.holds(sizes.usual)
    assert set(sizes.all) <= set(sizes.checked)
    settings = BuildSettings(sizes=sizes)
    assert BuildSettings.from_json(Record(settings.to_json(), "record")) == settings


@pytest.mark.parametrize(
    ("text", "shape", "sizes"),
    [
        ("3x320..640x320..640", (3, 640, 640), "320..640x320..640"),
        ("3,320..480..640,640", (3, 480, 640), "320..480..640x640"),
        ("3x640..640x320", (3, 640, 320), None),
        ("3x64x64", (3, 64, 64), None),
    ],
)
def test_the_recipe_takes_ranges(text: str, shape: tuple[int, int, int], sizes: str | None, tmp_path: Path) -> None:
    recipe = Recipe(input_shape=text)
    assert recipe.shape == shape
    assert (None if recipe.sizes is None else str(recipe.sizes)) == sizes
    assert recipe.dynamic is (sizes is not None)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(tmp_path / "recipe.toml").sizes == recipe.sizes
    named = Recipe(shapes=(f"pixels=1x{text.replace(',', 'x')}",))
    assert named.sizes == recipe.sizes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3x640..320x640", "in rising order"),
        ("3..4x320x320", "leaves the channels open"),
        ("3x0..320x320", "is not CHANNELSxHEIGHTxWIDTH"),
        ("3x320..x320", "is not CHANNELSxHEIGHTxWIDTH"),
        ("3x1..2..3..4x320", "is not CHANNELSxHEIGHTxWIDTH"),
        ("3x320..99999999x320", "from 1 to 32768 pixels"),
    ],
)
def test_nonsense_is_refused(text: str, says: str) -> None:
    with pytest.raises(ResvitError, match=says) as refused:
        Recipe(input_shape=text)
    assert refused.value.code is ExitCode.INPUT


@pytest.mark.parametrize("shapes", [("a=1x3x8..16x8", "b=1x2"), ("a=1x8..16x8",), ("a=1x3x8..16x8:int64",)])
def test_ranges_of_what_is_no_image_are_refused(shapes: tuple[str, ...]) -> None:
    with pytest.raises(ResvitError):
        Recipe(shapes=shapes)


LOADERS = """
class Pictures:
    def __len__(self): return 4
    def __getitem__(self, index): return np.full((9, 9), index, np.uint8), index
import numpy as np
def ready(): yield np.zeros((1, 3, 8, 8), np.float32), [0]
def pictures(): return Pictures()
"""


def test_pictures_of_a_function_come_in_any_size(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(LOADERS)
    recipe = Recipe(model="timm:resnet18", input_shape="3x64..128x64", data=f"{tmp_path}/file.py:pictures")
    refuse_impossible(recipe, find_target("l4"))


@pytest.mark.parametrize(
    "settings",
    [
        {"prune_macs": 0.5},
        {"sparsity": "2:4"},
        {"recover": "always", "train_data": "fashion-mnist"},
        {"latency_budget": "0.7x"},
        {"effort": "best"},
        {"quantizer": "modelopt"},
        {"plugins": "on"},
        {"shapes": ("a=1x2",)},
        {"data": "file.py:ready"},
        {"validation_data": "file.py:ready"},
    ],
)
def test_what_needs_one_size_is_refused_by_name(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.py").write_text(LOADERS)
    recipe = Recipe(model="timm:resnet18", input_shape="3x64..128x64", **settings)  # type: ignore[arg-type]
    with pytest.raises(ResvitError, match=r"works for one image size.*64\.\.128x64") as refused:
        refuse_impossible(recipe, find_target("rtx-4090"))
    assert refused.value.code is ExitCode.IMPOSSIBLE
    assert "--input-shape 3x128x64" in refused.value.fix


def test_the_plan_names_the_sizes() -> None:
    settings = BuildSettings(batch=(1, 2, 4), sizes=SizeRange((320, 320), (480, 640), (640, 640)))
    plan = plan_for_device(find_target("jetson-orin"), settings, (3, 480, 640), dynamic_batch=True)
    command = plan.commands[-1]
    assert "--minShapes=input:1x3x320x320 --optShapes=input:2x3x480x640 --maxShapes=input:4x3x640x640" in command
    one = plan_for_device(
        find_target("jetson-orin"), dataclasses.replace(settings, batch=(1, 1, 1)), (3, 480, 640), dynamic_batch=False
    )
    assert "--minShapes=input:1x3x320x320" in one.commands[-1]
    assert type(plan).from_json(Record(plan.to_json(), "plan")) == plan


def test_calibration_images_take_turns_in_size(tmp_path: Path) -> None:
    spec = DataSpec(str(images_file(tmp_path)), calibration_images=8, validation_images=4, unlabelled=True)
    images, _ = open_image_sets(spec, Preprocess((40, 40), crop_fraction=0.9, resize="crop"))
    sizes = [(40, 40), (16, 24), (64, 48)]
    seen = [batch.images for batch in images.batches_in_sizes(sizes, 2)]
    assert [batch.shape[2:] for batch in seen] == [(40, 40), (16, 24), (64, 48), (40, 40)]
    assert sum(map(len, seen)) == 8
    again = [batch.images for batch in images.batches_in_sizes(sizes, 2)]
    assert all(np.array_equal(one, other) for one, other in zip(seen, again, strict=True))
    usual = next(images.batches(8)).images
    np.testing.assert_array_equal(seen[0], usual[:2])
    np.testing.assert_array_equal(seen[3], usual[6:])
    assert [len(batch.images) for batch in images.batches_in_sizes(sizes, 64)] == [2, 2, 2, 2]
    few = [len(batch.images) for batch in images.at([0, 1]).batches_in_sizes(sizes, 8)]  # type: ignore[attr-defined]
    assert few == [2, 2, 2]


@pytest.mark.whole
def test_a_fixed_position_embedding_is_refused() -> None:
    spec = ModelSpec("object:fixed", input_shape=(3, 32, 32), sizes=SizeRange((16, 16), (32, 32), (32, 32)))
    with pytest.raises(ResvitError, match="does not take images of 16x16") as refused:
        network_from_module(fixed_positions(), spec)
    assert "--input-shape 3x32x32" in refused.value.fix
    assert "self.positions" in refused.value.problem


@pytest.mark.whole
def test_sizes_that_the_stride_does_not_divide_are_refused() -> None:
    spec = ModelSpec("object:net", input_shape=(3, 66, 64), sizes=SizeRange((36, 32), (66, 64), (66, 64)))
    with pytest.raises(ResvitError, match="does not take images of 66x64") as refused:
        network_from_module(detector(), spec)
    assert "--input-shape 3x32..64x32..64" in refused.value.fix


@pytest.mark.whole
def test_python_numbers_of_sizes_and_of_the_batch_stay_free() -> None:
    sizes = SizeRange((16, 16), (32, 32), (32, 48))
    network = network_from_module(whole_numbers(), ModelSpec("object:net", input_shape=(3, 32, 32), sizes=sizes))
    assert network.record().dynamic_batch
    assert network.record().sizes == sizes
    module = whole_numbers()
    for shape in ((1, 3, 16, 48), (3, 3, 32, 16)):
        images = torch.randn(shape)
        (answer,) = network.runner()({"input": images.numpy()}).values()
        np.testing.assert_allclose(answer, module(images).detach().numpy(), atol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize("batch", [1, None])
def test_the_number_of_heads_is_known_whatever_the_size(batch: int | None, tmp_path: Path) -> None:
    spec = ModelSpec("object:net", input_shape=(3, 32, 32), sizes=SizeRange((16, 16), (32, 32), (32, 48)))
    program, _ = fold_program(program_from_module(open_heads(), (3, 32, 32), spec.sizes)[0])
    onnx_from_program(program, tmp_path / "net.onnx", opset=23, batch=batch, sizes=spec.sizes)
    model = ir.load(tmp_path / "net.onnx")
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    assert [value.shape[1] for value in attention.inputs[:3]] == [2, 2, 2]
    splits = [value.producer().inputs[0].producer() for value in attention.inputs[:3]]
    assert [node.op_type for node in splits] == ["Reshape"] * 3
    for node in splits:
        shape = ir.convenience.get_const_tensor(node.inputs[1])
        assert (shape is None) == (batch is None)
        assert shape is None or list(shape.numpy()) == [1, -1, 2, 8]


@pytest.mark.slow
def test_a_size_that_tracing_keeps_is_refused() -> None:
    spec = ModelSpec("object:net", input_shape=(3, 32, 32), sizes=SizeRange((16, 16), (32, 32), (32, 32)))
    with pytest.raises(ResvitError, match="answers images of 16x16 otherwise"):
        network_from_module(kept_size(), spec)


@pytest.mark.slow
def test_a_saved_program_takes_the_sizes_that_it_was_exported_for(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    free = {2: torch.export.Dim.AUTO(min=16, max=32), 3: torch.export.Dim.AUTO(min=16, max=48)}
    shapes = ({0: torch.export.Dim.AUTO(min=1), **free},)
    program = torch.export.export(detector(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    network = load_network(ModelSpec(str(path), input_shape=(3, 32, 32), sizes=SIZES))
    assert network.input_shape == (3, 32, 32)
    assert network.record().sizes == SIZES
    assert NetworkRecord.from_json(network.record().to_json()) == network.record()
    with pytest.raises(ResvitError, match="nothing says which of them"):
        load_network(ModelSpec(str(path)))
    with pytest.raises(ResvitError, match=r"takes images of 16\.\.32x16\.\.48"):
        load_network(ModelSpec(str(path), input_shape=(3, 64, 48), sizes=SizeRange((16, 16), (64, 48), (64, 48))))


@pytest.mark.slow
def test_operators_are_written_without_arithmetic_on_what_is_known(tmp_path: Path) -> None:
    spec = ModelSpec("object:net", input_shape=(3, 32, 32), sizes=SizeRange((16, 16), (32, 32), (32, 48)))
    program = network_from_module(windows(), spec).program
    report = onnx_from_program(program, tmp_path / "net.onnx", opset=20, batch=1, sizes=spec.sizes)
    assert report.input[1] == (1, 3, "height", "width")
    assert report.parity_max_rel < 1e-4
    assert "InstanceNormalization" in report.operators
    assert not {"GroupNormalization", "Sqrt", "ReduceMean"} & set(report.operators)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    model = ["--model", f"{HERE}:detector", "--data", str(images_file(folder)), "--calibration-images", "12"]
    shape = ["--input-shape", "3x16..32x16..32..48"]
    targets = ["--target", "rtx-4090", "--target", "jetson-orin", "--run", str(folder / "run")]
    assert run(["build", *model, *shape, *FEW, "--allow-rejected", *targets]) == 0
    return folder / "run"


def read(built: Path, pattern: str) -> dict[str, object]:
    document: dict[str, object] = json.loads(sorted(built.glob(pattern))[0].read_bytes())
    return document


@pytest.mark.slow
def test_stages_keep_the_sizes_open(built: Path) -> None:
    exported = read(built, "export-*/export.json")
    assert exported["input"] == {"name": "input", "shape": [1, 3, "height", "width"]}
    assert SIZES.numbers() == read(built, "export-*/network.json")["sizes"]
    assert any("in steps of 8" in note for note in read(built, "export-*/network.json")["notes"])  # type: ignore[attr-defined]
    quantised = onnx.load(sorted(built.glob("quantize-*/model.onnx"))[0])
    (image,) = quantised.graph.input
    dims = image.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == [1, 3, "height", "width"]
    assert {node.op_type for node in quantised.graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    assert "in sizes of" in str(read(built, "calibrate-*/images.json")["description"])
    assert "dB at 16x16" in str(read(built, "validate-*/verdict.json")["runtime_note"])


@pytest.mark.slow
def test_work_is_counted_at_the_usual_size(built: Path) -> None:
    products = graph_from_onnx(sorted(built.glob("export-*/model.onnx"))[0]).analysis.products
    work = {product.node.op_type + str(index): product.macs for index, product in enumerate(products)}
    assert all(work.values())
    first = products[0]
    assert first.macs == 16 * 16 * 8 * 3 * 9  # stride 2 of 32x32
    assert {product.rows for product in products if product.node.op_type == "Gemm"} <= {64, None}


@pytest.mark.slow
def test_profiles_have_the_sizes(built: Path) -> None:
    engine = read(built, "compile-*/engine.json")
    assert {item["name"]: item["shape"] for item in engine["inputs"]} == {"input": [1, 3, -1, -1]}  # type: ignore[attr-defined]
    (command,) = [line for line in read(built, "compile-*/plan.json")["commands"] if "trtexec" in line]  # type: ignore[attr-defined]
    assert "--minShapes=input:1x3x16x16 --optShapes=input:1x3x32x32 --maxShapes=input:1x3x32x48" in command


@pytest.mark.slow
def test_the_bundle_is_checked_at_every_size(built: Path, tmp_path: Path) -> None:
    bundle = next(path for path in built.glob("bundle-*/*.resvit") if "jetson" in path.name)
    manifest = extract_bundle(bundle, tmp_path)
    assert manifest.build is not None
    assert manifest.build.sizes == SIZES
    assert manifest.golden is not None
    assert [golden.input for golden in manifest.golden.at_sizes] == ["golden_16x16_input.npy", "golden_32x48_input.npy"]
    assert golden_check(tmp_path, manifest, "onnxruntime").images > 0
    with open_runner(tmp_path, manifest, "onnxruntime") as runner:
        assert runner({"input": np.zeros((1, 3, 24, 40), np.float32)})["boxes"].shape == (1, 60, 4)
    # Of another network at one size, the check of that size speaks.
    outputs = np.load(tmp_path / "golden_16x16_output.npy")
    np.save(tmp_path / "golden_16x16_output.npy", -outputs)
    with pytest.raises(ResvitError, match="images of 16x16"):
        golden_check(tmp_path, manifest, "onnxruntime")


@pytest.fixture(scope="module")
def open_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector as users' exporters write it: sizes are read from the tensors by Shape, Gather and Concat."""
    path = tmp_path_factory.mktemp("open") / "open.onnx"
    free = {0: "n", 2: "h", 3: "w"}
    torch.onnx.export(
        detector(), (torch.zeros(1, 3, 32, 32),), path, dynamo=False, input_names=["x"], dynamic_axes={"x": free},
        opset_version=18,
    )  # fmt: skip
    return path


@pytest.mark.whole
def test_an_onnx_file_with_open_sizes(open_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    record, report = import_onnx(open_onnx, path, image=(3, SIZES))
    assert record.sizes == SIZES
    assert record.input_shape == (3, 32, 32)
    assert report.input[1] == ("batch", 3, "height", "width")
    products = graph_from_onnx(path).analysis.products
    assert products[0].macs == 16 * 16 * 8 * 3 * 9  # stride 2 of 32x32
    assert all(product.macs for product in products)
    work = static_shapes(ir.load(path), 2)
    assert work[report.outputs[0][0]] == (2, 64, 4)
    random = np.random.default_rng(0)
    batches = [{"input": random.standard_normal((3, 3, *size), dtype=np.float32)} for size in (*SIZES.all, SIZES.usual)]
    statistics = collect_statistics(path, batches)
    assert statistics.images == 12
    # Tokens differ from size to size, and channels are the same: both are told apart.
    tensors = statistics.tensors.values()
    assert {len(one.image_absmax) for one in tensors if one.image_absmax is not None} == {12}
    assert any(one.channels is not None and one.channels.count.size == 8 for one in tensors)
    ranges = ranges_from(statistics, "0" * 64)
    shipped = tmp_path / "int8.onnx"
    quantize_model(path, ranges, QuantizeSettings(Precision.INT8), shipped, statistics=statistics)
    floating, quantised = onnx_runner(path), onnx_runner(shipped)
    for size in (*SIZES.checked, (24, 40)):
        feeds = {"input": random.standard_normal((2, 3, *size), dtype=np.float32)}
        for true, found in zip(floating(feeds).values(), quantised(feeds).values(), strict=True):
            ratio = sqnr_db(true, found)
            assert ratio is None or ratio > 20
    engine = build_engine(shipped, tmp_path / "engine.plan", find_target("rtx-4090"), BuildSettings((1, 1, 2), SIZES))
    assert [tensor.shape for tensor in engine.inputs] == [(-1, 3, -1, -1)]
    with pytest.raises(ResvitError, match="only the batch may be dynamic"):
        build_engine(shipped, tmp_path / "engine.plan", find_target("rtx-4090"), BuildSettings((1, 1, 2)))


@pytest.mark.whole
def test_what_an_onnx_file_cannot_take_is_refused(open_onnx: Path, tmp_path: Path) -> None:
    out, one = tmp_path / "out.onnx", SizeRange((32, 32), (32, 32), (32, 32))
    record, report = import_onnx(open_onnx, out, image=(3, one))
    assert record.sizes is None
    assert report.input[1] == ("batch", 3, 32, 32)
    with pytest.raises(ResvitError, match="says one image of 4 channels"):
        import_onnx(open_onnx, out, image=(4, SIZES))
    with pytest.raises(ResvitError, match="all sizes but the batch"):
        import_onnx(open_onnx, out)
    odd = SizeRange((18, 16), (32, 32), (32, 32))
    with pytest.raises(ResvitError, match="does not take images of 18x16"):
        import_onnx(open_onnx, out, image=(3, odd))
    import_onnx(open_onnx, tmp_path / "fixed.onnx", image=(3, one))
    with pytest.raises(ResvitError, match="dynamic axes"):
        import_onnx(tmp_path / "fixed.onnx", out, image=(3, SIZES))


def test_a_lane_takes_every_size_within(tmp_path: Path) -> None:
    api = FakeCuda()
    engine = FakeEngine(api, batch=-1, profile=(1, 4), largest=6)
    tensors = tensors_of_engine(FakeTensorRT(engine), engine)
    assert tensors.largest == {"input": (3, 6, 6)}
    with open_lane(Cuda(api), engine, tensors, 4, cuda_graph=False, said=str) as lane:
        for shape in ((4, 3, 2, 2), (1, 3, 6, 4), (4, 3, 6, 6), (2, 3, 3, 5)):
            images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            lane.load({"input": images})
            lane.submit()
            lane.wait()
            np.testing.assert_allclose(lane.results()["logits"][:, 0], images.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
        with pytest.raises(ResvitError, match="does not take"):
            lane.load({"input": np.zeros((1, 3, 7, 7), np.float32)})


@pytest.mark.parametrize(
    ("size", "says"), [((480, 640), None), ((320, 320), None), ((300, 640), "is for images of"), ((480, 800), "these")]
)
def test_the_device_refuses_sizes_outside(size: tuple[int, int], says: str | None) -> None:
    sizes = SizeRange((320, 320), (480, 640), (640, 640))
    manifest = Manifest(build=BuildSettings(sizes=sizes), preprocess={"size": [480, 640]})
    if says is None:
        assert preprocess_at(manifest, size) == {"size": list(size)}
        return
    with pytest.raises(ResvitError, match=says):
        preprocess_at(manifest, size)


def test_a_bundle_of_one_size_refuses_another() -> None:
    manifest = Manifest(input=IoTensor("input", (1, 3, 480, 640)), preprocess={"size": [480, 640]})
    assert preprocess_at(manifest, (480, 640)) == {"size": [480, 640]}
    assert preprocess_at(manifest, None) == {"size": [480, 640]}
    with pytest.raises(ResvitError, match="of one size"):
        preprocess_at(manifest, (640, 640))
    with pytest.raises(ResvitError, match="is not HEIGHTxWIDTH"):
        size_from_text("480")
    assert size_from_text("480x640") == (480, 640)
