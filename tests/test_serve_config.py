"""What Triton, DeepStream and ROS 2 are given: in their own forms, and saying what the bundle says."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest

from conftest import ROOT
from engine_reports import engine_report
from resvit_engines.answers.boxes import BoxReader, DetectionOptions
from resvit_engines.builder.engine_report import LibraryRecord
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.parts import ImageCount, ManifestVerdict
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.pictures.sizes import SizeRange
from resvit_engines.program.answers import Names
from resvit_engines.targets.table import Builder
from resvit_engines.trt.io_tensor import IoTensor
from resvit_export.cli.main import run
from resvit_export.serve.deepstream import _header, scaling_of
from resvit_export.serve.triton import Word, text_of
from task_bundles import GRAPHS, NAMES, SIZE, coloured, task_bundle

INPUT = IoTensor("input", (-1, 3, *SIZE), "float32")


@pytest.fixture
def written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command on the bundle of a task, with the record of an engine in it; returns folder and JSON."""

    def write(program: str, task: str, *more: str, code: int = 0, **changes: Any) -> Any:
        engine: dict[str, Any] = {"engine": engine_report(inputs=(INPUT,)), "build": BuildSettings(batch=(1, 4, 8))}
        bundle = task_bundle(tmp_path, task, b"the engine", **{**engine, **changes})
        out = tmp_path / "out"
        line = ["serve-config", program, str(bundle), "--out", str(out), "--trust", str(tmp_path / "release.pub")]
        assert run([*line, "--json", *more]) == code
        told = capsys.readouterr()
        if code:
            assert not out.exists()
            return told.err
        return out, json.loads(told.out)

    return write


@pytest.fixture(scope="module")
def model_config() -> Any:
    """Triton's own messages, by the client library that it publishes; the library itself would need gRPC."""
    (folder,) = importlib.util.find_spec("tritonclient").submodule_search_locations
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(folder) / "grpc" / "model_config_pb2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def configs(model_config: Any) -> Callable[[Path], dict[str, Any]]:
    """The configurations of a repository, parsed by name."""
    from google.protobuf import text_format

    def parse(folder: Path) -> dict[str, Any]:
        found = {}
        for path in folder.glob("*/config.pbtxt"):
            found[path.parent.name] = text_format.Parse(path.read_text(), model_config.ModelConfig())
            assert found[path.parent.name].name == path.parent.name
            assert (path.parent / "1").is_dir()
        return found

    return parse


def test_triton_gets_an_ensemble_that_fits_together(written: Any, configs: Any, model_config: Any) -> None:
    folder, said = written("triton", "classification")
    found = configs(folder)
    assert set(found) == {"net-classification", "net-classification-network", "net-classification-preprocess"}
    whole, network = found["net-classification"], found["net-classification-network"]
    prepare = found["net-classification-preprocess"]
    assert (network.platform, prepare.backend, whole.platform) == ("tensorrt_plan", "python", "ensemble")
    assert {config.max_batch_size for config in found.values()} == {8}
    first, second = whole.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == (prepare.name, network.name)
    assert dict(first.input_map) == {prepare.input[0].name: whole.input[0].name}
    assert dict(first.output_map) == {prepare.output[0].name: second.input_map[network.input[0].name]}
    assert set(second.output_map.values()) == {output.name for output in whole.output}
    assert list(prepare.output[0].dims) == list(network.input[0].dims) == [3, *SIZE]
    assert prepare.output[0].data_type == network.input[0].data_type == model_config.TYPE_FP32
    assert (whole.input[0].data_type, list(whole.input[0].dims)) == (model_config.TYPE_UINT8, [-1, -1, 3])
    assert list(network.dynamic_batching.preferred_batch_size) == [4, 8]
    assert network.instance_group[0].count == 2
    assert network.instance_group[0].kind == model_config.ModelInstanceGroup.KIND_GPU
    assert network.output[0].label_filename == "labels.txt"
    assert (folder / network.name / "labels.txt").read_text().split() == list(NAMES)
    assert (folder / network.name / "1/model.plan").read_bytes() == b"the engine"
    assert any("10.3.0" in note for note in said["notes"])
    for warm in network.model_warmup:
        (tensor,) = warm.inputs.values()
        data = (folder / network.name / "warmup" / tensor.input_data_file).read_bytes()
        assert len(data) == warm.batch_size * 4 * int(np.prod(tensor.dims))
    assert sorted(warm.batch_size for warm in network.model_warmup) == [1, 4, 8]


def test_a_name_of_a_class_is_one_line(written: Any) -> None:
    names = ("a\nb", "c", "d")
    verdict = ManifestVerdict("accepted", "as before", "classification", names, ImageCount(4, "0"))
    folder, _ = written("triton", "classification", verdict=verdict)
    labels = folder / "net-classification-network/labels.txt"
    assert labels.read_text().splitlines() == ["a\\nb", "c", "d"]


def test_triton_gets_several_outputs_instances_and_the_plugin_library(
    written: Any, configs: Any, tmp_path: Path
) -> None:
    report = engine_report(
        inputs=(INPUT,),
        plugins="library",
        plugin_layers=("bridge",),
        plugin_library=LibraryRecord("libp.so", "0" * 64),
        flags=("version_compatible",),
    )
    folder, said = written("triton", "detection", "--instances", "3", engine=report, beside={"libp.so": b"library"})
    network = configs(folder)["net-detection-network"]
    assert {output.name: list(output.dims) for output in network.output} == {"boxes": [3, 4], "scores": [3, 3]}
    assert network.instance_group[0].count == 3
    assert (folder / "net-detection-network/libp.so").read_bytes() == b"library"
    assert any("plugins=" in note for note in said["notes"])
    assert any("version-compatible" in note for note in said["notes"])


RANGE: dict[str, Any] = {
    "build": BuildSettings(batch=(1, 4, 8), sizes=SizeRange((8, 8), SIZE, (32, 48))),
    "input": IoTensor("input", ("B", 3, "height", "width"), "float32"),
    "outputs": (IoTensor("masks", ("B", 3, "height", "width"), "float32"),),
    "engine": engine_report(inputs=(IoTensor("input", (-1, 3, -1, -1), "float32"),)),
}


def test_triton_warms_up_a_range_of_sizes_with_whole_shapes(written: Any, configs: Any) -> None:
    folder, _ = written("triton", "segmentation", **RANGE)
    network = configs(folder)["net-segmentation-network"]
    assert list(network.input[0].dims) == list(network.output[0].dims) == [3, -1, -1]
    for warm in network.model_warmup:
        (tensor,) = warm.inputs.values()
        assert list(tensor.dims) == [3, *SIZE]  # Triton refuses -1 there
        data = (folder / network.name / "warmup" / tensor.input_data_file).read_bytes()
        assert len(data) == warm.batch_size * 4 * 3 * SIZE[0] * SIZE[1]
    said = json.loads((folder / "net-segmentation-preprocess/1/preprocess.json").read_bytes())
    assert said["preprocess"]["size"] == list(SIZE)


def test_deepstream_gets_the_usual_size_of_a_range(written: Any) -> None:
    folder, _ = written("deepstream", "segmentation", **RANGE)
    assert settings_of(folder / "config_infer_primary.txt")["infer-dims"] == "3;16;24"


def test_ros_takes_a_range_of_sizes(written: Any) -> None:
    folder, _ = written("ros2", "segmentation", **{**RANGE, "engine": None})
    assert (folder / "package.xml").is_file()


def test_a_run_folder_is_told_from_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run/bundle-1").mkdir(parents=True)
    task_bundle(tmp_path, "text").rename(tmp_path / "run/bundle-1/text.resvit")
    line = ["serve-config", "triton", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--json"]
    assert run([*line, "--trust", str(tmp_path / "release.pub")]) == ExitCode.INPUT
    said = json.loads(capsys.readouterr().out)["error"]
    assert "is a folder" in said["problem"]
    assert "bundle-1/text.resvit" in said["fix"]


def test_a_fixed_batch_goes_without_triton_s_batching(written: Any, configs: Any) -> None:
    fixed = dataclasses.replace(INPUT, shape=(2, 3, *SIZE))
    settings = BuildSettings(batch=(2, 2, 2))
    folder, _ = written("triton", "embedding", engine=engine_report(inputs=(fixed,)), build=settings)
    found = configs(folder)
    assert {config.max_batch_size for config in found.values()} == {0}
    network = found["net-embedding-network"]
    assert list(network.input[0].dims) == [2, 3, *SIZE]
    assert list(network.output[0].dims) == [2, 3]
    assert not network.HasField("dynamic_batching")
    assert network.model_warmup[0].batch_size == 1
    assert list(found["net-embedding"].input[0].dims) == [2, -1, -1, 3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine": None}, "holds no engine"),
        ({"engine": engine_report(builder=Builder.RTX)}, "TensorRT for RTX"),
        ({"engine": engine_report(flags=("strip_weights",))}, "without its weights"),
        ({"build": BuildSettings(batch=(2, 4, 8))}, "no fewer than 2"),
        ({"inputs": (INPUT, IoTensor("sizes", ("B", 2)))}, "reads sizes beside images"),
    ],
)
def test_what_triton_cannot_serve_is_refused(written: Any, changes: dict[str, Any], says: str) -> None:
    assert says in " ".join(written("triton", "classification", code=ExitCode.IMPOSSIBLE, **changes).split())


def test_texts_are_quoted_as_protobuf_reads_them(model_config: Any) -> None:
    from google.protobuf import text_format

    config = {"name": 'a "b"\n\\c', "max_batch_size": 1, "instance_group": [{"count": 2, "kind": Word("KIND_CPU")}]}
    found = text_format.Parse(text_of(config), model_config.ModelConfig())
    assert found.name == config["name"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """Puts stand-ins for modules that are not installed here in their places."""

    def put(name: str, **contents: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


def test_triton_s_preprocessing_is_the_manifest_s(written: Any, modules: Any) -> None:
    folder, _ = written("triton", "segmentation")

    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self.array = name, array

        def as_numpy(self) -> np.ndarray:
            return self.array

    class Response:
        def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    modules(
        "triton_python_backend_utils",
        Tensor=Tensor,
        InferenceResponse=Response,
        TritonError=str,
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    path = folder / "net-segmentation-preprocess/1/model.py"
    spec = importlib.util.spec_from_file_location("served", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({})
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3)).astype(np.uint8)
    good, bad = model.execute(
        [{"frames": Tensor("frames", frames)}, {"frames": Tensor("frames", frames.astype(np.float32))}]
    )
    how = PicturePreprocess(SIZE, resize="letterbox", interpolation="bilinear", padding="centre")
    np.testing.assert_array_equal(good.output_tensors[0].array, np.stack([how.apply(frame) for frame in frames]))
    assert good.output_tensors[0].name == "input"
    assert "float32" in bad.error


def settings_of(config: Path) -> dict[str, str]:
    lines = [line for line in config.read_text().splitlines() if "=" in line]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize(
    ("task", "kind", "parser"),
    [("classification", 1, "classifier"), ("detection", 0, "bbox"), ("segmentation", 2, "segm")],
)
def test_deepstream_is_told_scale_offsets_and_colours(written: Any, task: str, kind: int, parser: str) -> None:
    how = PicturePreprocess(
        SIZE, resize="letterbox", padding="centre", mean=(0.4, 0.5, 0.6), std=(0.25,), channel_order="bgr"
    )
    folder, _ = written("deepstream", task, preprocess=how.to_json())
    said = settings_of(folder / "config_infer_primary.txt")
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    offsets = np.array(list(map(float, said["offsets"].split(";"))))
    prepared = float(said["net-scale-factor"]) * (pixels[:, :, ::-1].astype(float) - offsets)
    np.testing.assert_allclose(prepared.transpose(2, 0, 1), how.apply(pixels), atol=1e-5)
    assert (said["model-color-format"], said["infer-dims"], said["network-type"]) == ("1", "3;16;24", str(kind))
    assert (said["maintain-aspect-ratio"], said["symmetric-padding"]) == ("1", "1")
    assert said["batch-size"] == "8"
    assert any(key.startswith(f"parse-{parser}") for key in said)
    for key in ("model-engine-file", "labelfile-path"):
        assert (folder / said[key]).is_file()
    assert set(said["output-blob-names"].split(";")) == set(GRAPHS[task][2])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"std": (0.2, 0.21, 0.2)}, "0.2, 0.21, 0.2"),
        ({"resize": "crop"}, "cut in the middle"),
        ({"resize": "letterbox", "pad_value": (114.0,)}, "padded with 114"),
        ({"channels": 4}, "4 channels"),
    ],
)
def test_what_deepstream_cannot_prepare_is_refused(how: dict[str, Any], says: str) -> None:
    with pytest.raises(ResvitError) as refused:
        scaling_of(PicturePreprocess(SIZE, **how))
    assert says in refused.value.problem
    assert refused.value.code is ExitCode.IMPOSSIBLE


def test_grey_and_stretched_frames_are_told() -> None:
    told = scaling_of(PicturePreprocess(SIZE, channels=1, mean=(0.5,), std=(0.5,), interpolation="nearest"))
    assert (told.colours, told.keep_aspect, told.symmetric, told.filter) == (2, False, False, 0)
    assert scaling_of(PicturePreprocess(SIZE, resize="letterbox")).symmetric is False
    assert scaling_of(PicturePreprocess(SIZE, std=(0.2, 0.2, 0.2000001))).factor == pytest.approx(1 / 51)
    with pytest.raises(ResvitError, match=r"0\.2, 0\.2001"):
        scaling_of(PicturePreprocess(SIZE, std=(0.2, 0.2001, 0.2)))


@pytest.mark.parametrize("task", ["depth", "text", "embedding", "other"])
def test_deepstream_knows_no_other_task(written: Any, task: str) -> None:
    assert f"The task is {task}" in " ".join(written("deepstream", task, code=ExitCode.IMPOSSIBLE).split())


def test_deepstream_s_parser_reads_fp32_alone(written: Any) -> None:
    half = (IoTensor("boxes", ("B", 3, 4), "float16"), IoTensor("scores", ("B", 3, 3), "float16"))
    assert "is float16" in " ".join(written("deepstream", "detection", code=ExitCode.IMPOSSIBLE, outputs=half).split())


def compiled(folder: Path, header: str | None = None) -> ctypes.CDLL:
    """The parser of a folder, compiled against declarations of our own of DeepStream's header."""
    if header is not None:
        (folder / "resvit_bundle.h").write_text(header)
    here = ROOT / "tests/deepstream"
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-fPIC", "-shared"]
    library = folder / f"called-{len(list(folder.glob('called-*')))}.so"
    subprocess.run(
        ["g++", *flags, f"-I{folder}", f"-I{here}", "-o", str(library), str(here / "called.cpp")], check=True
    )
    return ctypes.CDLL(str(library))


HEADS: dict[str, tuple[dict[str, Any], int]] = {
    "anchor-free": ({}, 5),
    "anchor-free, logits": ({"activation": "sigmoid", "nms_iou": 0.3, "top_k": 7}, 5),
    "DETR, softmax": ({"boxes": "pred_boxes", "scores": "logits"}, 4),
    "DETR, sigmoid": ({"boxes": "pred_boxes", "scores": "logits", "top_k": 9}, 5),
    "centres in pixels": ({"box_format": "cxcywh", "nms_iou": 1.0}, 5),
}


@pytest.mark.whole
@pytest.mark.parametrize("head", HEADS)
def test_the_parser_finds_the_boxes_that_validation_finds(written: Any, head: str, tmp_path: Path) -> None:
    options, known = HEADS[head]
    names = (options.get("boxes", "boxes"), options.get("scores", "scores"))
    tensors = (IoTensor(names[0], ("B", 40, 4), "float32"), IoTensor(names[1], ("B", 40, 5), "float32"))
    answers = {"options": options, "classes": known}
    folder, _ = written("deepstream", "detection", outputs=tensors, answers=answers)
    library = compiled(folder)
    reader = BoxReader(
        DetectionOptions(**options), {names[0]: np.zeros((1, 40, 4)), names[1]: np.zeros((1, 40, 5))}, known
    )
    random = np.random.default_rng(0)
    for turn in range(40):
        corner = random.random((40, 2)) * 0.8
        boxes = np.concatenate([corner, corner + random.random((40, 2)) * 0.4], axis=1)
        if reader.centres:
            boxes = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
        boxes = (boxes if reader.normalized else boxes * np.array([24, 16, 24, 16])).astype(np.float32)
        scores = random.random((40, 5)) if reader.activation == "none" else random.standard_normal((40, 5)) * 3
        scores = (np.round(scores, 1) if turn % 2 else scores).astype(np.float32)  # equals, every other time
        found = np.zeros((200, 6), np.float32)
        least = float(random.choice([0.0, 0.3, 0.6]))
        count = library.boxes(
            boxes.ctypes.data_as(ctypes.c_void_p), scores.ctypes.data_as(ctypes.c_void_p), 40, 5, *SIZE,
            ctypes.c_float(least), 0, found.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        wanted = reader.read(boxes, scores, SIZE)
        corners = np.clip(wanted.boxes, 0, np.array([24, 16, 24, 16], np.float32))
        kept = (wanted.scores >= least) & (corners[:, 2:] > corners[:, :2]).all(axis=1)
        assert count == kept.sum() > 0
        np.testing.assert_array_equal(found[:count, 5], wanted.classes[kept])
        np.testing.assert_allclose(found[:count, 4], wanted.scores[kept], rtol=1e-6)
        np.testing.assert_allclose(found[:count, :2], corners[kept, :2], atol=1e-5)
        np.testing.assert_allclose(found[:count, 2:4], (corners[:, 2:] - corners[:, :2])[kept], atol=1e-5)
    assert library.boxes(boxes.ctypes.data_as(ctypes.c_void_p), None, 40, 5, *SIZE, ctypes.c_float(0), 0, None) == -1
    pointer = scores.ctypes.data_as(ctypes.c_void_p)
    assert library.boxes(pointer, pointer, 40, 5, *SIZE, ctypes.c_float(0), 1, None) == -1  # FP16


@pytest.mark.whole
def test_the_parser_names_classes_and_masks(written: Any, tmp_path: Path) -> None:
    folder, _ = written("deepstream", "segmentation")
    names = ("a;b", 'c "d" 9', "größer")
    library = compiled(folder, _header({"SCORES": "output"}, names))
    random = np.random.default_rng(0)
    for _ in range(20):
        scores = np.round(random.standard_normal((3, *SIZE)) - 2, 1).astype(np.float32)
        classes = np.zeros(SIZE, np.int32)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (scores, classes))
        first, second = pointers
        assert library.masks(first, 3, *SIZE, second) == 1
        np.testing.assert_array_equal(classes, scores.argmax(axis=0))
        row, confidence, label = scores[:, 0, 0].copy(), ctypes.c_float(), ctypes.create_string_buffer(99)
        number = library.best(
            row.ctypes.data_as(ctypes.c_void_p), 3, ctypes.c_float(0.0), ctypes.byref(confidence), label
        )
        powers = np.exp(row.astype(np.float64) - row.max())
        assert number == row.argmax()
        assert label.value.decode() == names[number]
        assert confidence.value == pytest.approx(float(powers.max() / powers.sum()), rel=1e-6)
    sure = np.array([0.25, 0.5, 0.25], np.float32).ctypes.data_as(ctypes.c_void_p)
    assert library.best(sure, 3, ctypes.c_float(0.4), ctypes.byref(confidence), label) == 1
    assert confidence.value == 0.5
    assert library.best(sure, 3, ctypes.c_float(0.6), ctypes.byref(confidence), label) == -1


class Message:
    """A message of ROS 2: fields that are set by name, and messages within that are made when they are asked for."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = Message()
        setattr(self, name, made)
        return made


def messages(*names: str) -> dict[str, type]:
    return {name: type(name, (Message,), {}) for name in names}


class StandIn:
    """What the node uses of ``rclpy.node.Node``."""

    parameters: ClassVar[dict[str, str]] = {}

    def __init__(self, name: str) -> None:
        self.name, self.published, self.warned, self.subscribed = name, [], [], {}

    def declare_parameter(self, name: str, value: str) -> Any:
        return Message(value=self.parameters.get(name, value))

    def create_publisher(self, kind: type, topic: str, qos: Any) -> Any:
        return Message(publish=lambda message: self.published.append((topic, kind, message)))

    def create_subscription(self, kind: type, topic: str, callback: Any, qos: Any) -> None:
        self.subscribed[topic] = callback

    def get_logger(self) -> Any:
        return Message(info=lambda text: None, warning=lambda text, **_: self.warned.append(text))

    def destroy_node(self) -> None:
        pass


@pytest.fixture
def node(
    written: Any, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], tuple[Any, Any, Path]]]:
    """Imports the package of a task where stand-ins take ROS's place, and starts its node on the CPU."""
    made: list[Any] = []

    def start(task: str) -> tuple[Any, Any, Path]:
        out, _ = written("ros2", task, engine=None)
        modules("rclpy")
        modules("rclpy.node", Node=StandIn)
        qos = dict.fromkeys(("QoSDurabilityPolicy", "QoSReliabilityPolicy"), Message)
        modules("rclpy.qos", QoSProfile=Message, **{name: Message(TRANSIENT_LOCAL=1, BEST_EFFORT=2) for name in qos})
        modules("sensor_msgs.msg", **messages("Image"))
        modules("std_msgs.msg", **messages("String", "Float32MultiArray"))
        vision = ("Classification", "Detection2D", "Detection2DArray", "LabelInfo", "ObjectHypothesis")
        modules("vision_msgs.msg", **messages(*vision, "ObjectHypothesisWithPose", "VisionClass"))
        monkeypatch.syspath_prepend(str(out))
        said = {"bundle": str(tmp_path / f"{task}.resvit"), "trust": str(tmp_path / "release.pub")}
        monkeypatch.setattr(StandIn, "parameters", {**said, "runtime": "onnxruntime"})
        package = f"resvit_net_{task}"
        module = importlib.import_module(f"{package}.node")
        made.append(module.Answers())
        return made[-1], importlib.import_module(f"{package}.messages"), out

    yield start
    for one in made:
        if one.publisher_thread.is_alive():
            one.destroy_node()
    for name in [name for name in sys.modules if name.startswith("resvit_net_")]:
        monkeypatch.delitem(sys.modules, name)


def image_message(frame: np.ndarray, encoding: str = "rgb8", padding: int = 0) -> Message:
    height, width, channels = frame.shape
    rows = np.pad(frame.reshape(height, -1), ((0, 0), (0, padding)), constant_values=99)
    step = width * channels + padding
    return Message(
        header="at", height=height, width=width, encoding=encoding, step=step, data=rows.astype(np.uint8).tobytes()
    )


def test_the_node_publishes_boxes_in_the_image(node: Any) -> None:
    answers, _, _ = node("detection")
    answers.subscribed["image"](image_message(coloured(48, 64, 1), padding=5))
    answers.subscribed["image"](image_message(coloured(48, 64, 1)[:, :, ::-1], "bgr8"))
    answers.destroy_node()
    assert answers.warned == []
    (topic, kind, first), (_, _, second) = answers.published
    assert (topic, kind.__name__, first.header) == ("answers", "Detection2DArray", "at")
    best = first.detections[0]
    assert best.results[0].hypothesis.class_id == second.detections[0].results[0].hypothesis.class_id == "green"
    assert (best.bbox.center.position.y, best.bbox.size_y) == (pytest.approx(15.0), pytest.approx(18.0))


@pytest.mark.parametrize("task", ["classification", "segmentation", "depth", "text", "embedding"])
def test_the_node_publishes_the_answers_of_every_task(node: Any, task: str) -> None:
    answers, module, _ = node(task)
    frame = coloured(*SIZE, 1)
    for encoding in ("rgb8", "8UC3"):
        answers.subscribed["image"](image_message(frame if encoding == "rgb8" else frame[:, :, ::-1], encoding))
    answers.destroy_node()
    assert answers.warned == []
    published = [message for topic, kind, message in answers.published if topic == "answers"]
    assert len(published) == 2
    for message in published:
        assert isinstance(message, module.KINDS[task])
        if task == "classification":
            assert [one.class_id for one in message.results] == ["green", "red", "blue"]
        elif task == "segmentation":
            assert (message.encoding, message.step, message.height) == ("16SC1", 2 * SIZE[1], SIZE[0])
            assert set(np.frombuffer(message.data, "<i2")) == {1}
        elif task == "depth":
            assert np.frombuffer(message.data, "<f4").reshape(SIZE) == pytest.approx(1.0)
        elif task == "text":
            assert message.data == "g"
        else:
            assert message.data.tolist() == pytest.approx([0, 1, 0])
    if task == "segmentation":
        ((_, _, labels),) = [one for one in answers.published if one[0] == "label_info"]
        assert [(one.class_id, one.class_name) for one in labels.class_map] == list(enumerate(NAMES))


def test_an_image_that_is_none_is_passed_over(node: Any) -> None:
    answers, _, _ = node("classification")
    take = answers.subscribed["image"]
    take(image_message(coloured(8, 8, 1), "bayer_rggb8"))
    short = image_message(coloured(8, 8, 1))
    short.data = short.data[:-1]
    take(short)
    take(Message(header="", height=0, width=0, encoding="rgb8", step=0, data=b""))
    take(image_message(coloured(8, 8, 2)[:, :, :1], "mono8"))
    answers.destroy_node()
    assert len(answers.warned) == 3
    assert "bayer_rggb8" in answers.warned[0]
    assert len(answers.published) == 1


def test_what_goes_wrong_with_one_image_ends_nothing(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, _, _ = node("classification")
    module = sys.modules["resvit_net_classification.node"]
    made, seen = module.message_of, []

    def odd(answer: Any, header: Any) -> Any:
        seen.append(header)
        if len(seen) < 5:
            raise ValueError("odd")
        return made(answer, header)

    monkeypatch.setattr(module, "message_of", odd)
    taker = threading.Thread(
        target=lambda: [answers.subscribed["image"](image_message(coloured(8, 8, 1))) for _ in range(5)], daemon=True
    )
    taker.start()
    taker.join(60)
    assert not taker.is_alive(), "images are taken on"
    answers.destroy_node()
    assert len(answers.warned) == 4
    assert "ValueError: odd" in answers.warned[0]
    assert len(answers.published) == 1


def test_the_package_is_one_of_ament(node: Any, modules: Any) -> None:
    _, _, out = node("text")
    package = "resvit_net_text"
    root = ElementTree.fromstring((out / "package.xml").read_text())
    assert root.findtext("name") == package
    assert "vision_msgs" in [one.text for one in root.findall("exec_depend")]
    assert (out / "resource" / package).is_file()
    assert not [file for file in out.rglob("*") if file.is_file() and "@PACKAGE@" in file.read_text()]
    done: dict[str, Any] = {}
    modules("setuptools", setup=lambda **said: done.update(said))
    exec(compile((out / "setup.py").read_text(), "setup.py", "exec"), {})
    assert done["entry_points"] == {"console_scripts": [f"node = {package}.node:main"]}
    assert all((out / file).is_file() for _, files in done["data_files"] for file in files)
    modules("launch", LaunchDescription=list)
    modules("launch.actions", DeclareLaunchArgument=lambda name, **said: name)
    modules("launch.substitutions", LaunchConfiguration=lambda name: f"${name}")
    modules("launch_ros.actions", Node=lambda **said: said)
    modules("launch_ros.parameter_descriptions", ParameterValue=lambda value, value_type: (value, value_type))
    space: dict[str, Any] = {}
    exec(compile((out / f"launch/{package}.launch.py").read_text(), "launch", "exec"), space)
    *arguments, started = space["generate_launch_description"]()
    assert arguments == ["bundle", "trust", "runtime", "image"]
    assert (started["package"], started["executable"]) == (package, "node")
    assert started["remappings"] == [("image", "$image")]
    assert started["parameters"] == [{name: (f"${name}", str) for name in ("bundle", "trust", "runtime")}]


def test_no_message_holds_the_outputs_of_no_task(written: Any) -> None:
    assert "no message holds" in " ".join(written("ros2", "other", code=ExitCode.IMPOSSIBLE).split())


@pytest.mark.parametrize("program", ["triton", "deepstream", "ros2"])
def test_nothing_is_overwritten_or_taken_unsigned(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = task_bundle(tmp_path, "classification")
    line = ["serve-config", program, str(bundle), "--out", str(tmp_path), "--trust", str(tmp_path / "release.pub")]
    assert run(line) == ExitCode.INPUT
    assert "not an empty folder" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "none").mkdir()
    line[4:] = [str(tmp_path / "new"), "--trust", str(tmp_path / "none")]
    assert run(line) == ExitCode.UNTRUSTED
    assert not (tmp_path / "new").exists()


def test_instances_are_triton_s_alone(written: Any) -> None:
    assert "is of Triton" in written("ros2", "text", "--instances", "2", code=ExitCode.INPUT)


def test_names_of_classes_stay_apart() -> None:
    assert Names({3: "tree"})[3] == "tree"
    assert Names({})[4] == "4"
