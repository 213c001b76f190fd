"""``resvit_engines.load``: frames in, the task's answers out, by what was signed and validated."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import io
import re
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import resvit_engines
from conftest import ROOT
from cuda_standin import FakeCuda, FakeEngine, FakeTensorRT
from engine_reports import engine_report
from resvit_engines.bundle.bundle import sign_bundle, write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.install.install import install_bundle
from resvit_engines.keys.public import load_trust
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.program.answers import UNSEEN
from resvit_engines.program.frames import Placement
from resvit_engines.run import engine_runner
from resvit_engines.run import runner as run
from resvit_engines.run.cuda import Cuda
from task_bundles import BOXES, GRAPHS, NAMES, SIZE, coloured, task_bundle
from test_signing import KEY, signing_key


@pytest.fixture
def loaded(tmp_path: Path):
    """Loads the bundle of a task on ONNX Runtime; closes it in the end."""
    models: list[Any] = []

    def loader(task: str, manifest: dict[str, Any] | None = None, **options: Any) -> Any:
        path = task_bundle(tmp_path, task, **(manifest or {}))
        models.append(resvit_engines.load(path, trust=tmp_path / "release.pub", runtime="onnxruntime", **options))
        return models[-1]

    yield loader
    for model in models:
        model.close()


@pytest.mark.parametrize("colour", [0, 1, 2])
def test_a_classifier_names_the_class(loaded: Any, colour: int) -> None:
    answer = loaded("classification")(coloured(30, 50, colour))
    assert (answer.best.number, answer.best.name) == (colour, NAMES[colour])
    assert answer.best.probability == pytest.approx(np.exp(10) / (np.exp(10) + 2), rel=1e-5)
    assert [item.number for item in answer.top(3)][1:] == sorted({0, 1, 2} - {colour})
    assert answer.probabilities.sum() == pytest.approx(1.0)


def test_boxes_are_in_pixels_of_the_frame(loaded: Any) -> None:
    """A frame of 64 x 48 in an input of 24 x 16 (width x height) lies at half its width in the middle."""
    answer = loaded("detection")(coloured(48, 64, 1))
    how = PicturePreprocess(SIZE, resize="letterbox", padding="centre")
    tall, wide, top, left = how.placed(48, 64)
    assert (tall, wide, top) == (16, 21, 0)
    wanted = [((x1 - left) * 64 / wide, y1 * 3, (x2 - left) * 64 / wide, y2 * 3) for x1, y1, x2, y2 in BOXES[[0, 2]]]
    wanted = [(max(x1, 0), y1, min(x2, 64), y2) for x1, y1, x2, y2 in wanted]
    np.testing.assert_allclose(answer.boxes, wanted, rtol=1e-5)  # the second overlaps the first
    share = wide / 24  # black beside the frame takes off the mean
    assert [(box.name, round(box.score, 4)) for box in answer] == [("green", share), ("green", round(0.7 * share, 4))]


def test_the_least_score_of_a_box_is_chosen(loaded: Any) -> None:
    assert len(loaded("detection", least_score=0.8)(coloured(48, 64, 1))) == 1
    assert len(loaded("detection", {"answers": {"options": {"shown": 0.0}, "classes": 3}})(coloured(48, 64, 1))) == 6


def test_classes_are_called_by_the_numbers_that_the_network_answers(loaded: Any) -> None:
    said = {"options": {"class_numbers": "id"}, "classes": 3, "class_ids": [1, 2, 90]}
    assert [box.name for box in loaded("detection", {"answers": said})(coloured(48, 64, 2))] == ["green"] * 2


def test_a_mask_lies_on_the_frame(loaded: Any) -> None:
    frame = np.concatenate([coloured(40, 30, 0), coloured(40, 50, 2)], axis=1)
    answer = loaded("segmentation")(frame)
    assert answer.classes.shape == (40, 80)
    assert (answer.classes[:, :28] == 0).all()
    assert (answer.classes[:, 32:] == 2).all()


def test_what_was_cut_off_has_no_answer(loaded: Any) -> None:
    """A wide frame is cut at both sides to 3:2."""
    frame = np.zeros((20, 90, 3), np.uint8)
    frame[:] = np.arange(90)[None, :, None] * 2
    answer = loaded("depth")(frame)
    assert answer.depths.shape == (20, 90)
    assert np.isnan(answer.depths[:, :29]).all()
    assert np.isnan(answer.depths[:, 61:]).all()
    middle = answer.depths[10, 32:58]
    np.testing.assert_allclose(middle, 3 * np.arange(32, 58) * 2 / 255, atol=0.03)
    how = PicturePreprocess(SIZE, resize="crop")
    labels = Placement.of(frame, how).labels(np.zeros(SIZE, np.int16), UNSEEN)
    np.testing.assert_array_equal(labels == UNSEEN, np.isnan(answer.depths))


def test_text_is_read(loaded: Any) -> None:
    stripes = [coloured(16, 4, colour) for colour in (0, 1, 1, 0, 1, 2)]
    assert loaded("text")(np.concatenate(stripes, axis=1)).text == "ggb"


def test_a_vector_and_outputs_of_no_task_are_given_as_they_are(loaded: Any) -> None:
    np.testing.assert_allclose(loaded("embedding")(coloured(9, 9, 1)).vector, [0, 1, 0], atol=1e-6)
    model = loaded("other")
    frame = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    np.testing.assert_array_equal(model(frame).arrays["negative"], -model.preprocess.apply(frame))


@pytest.mark.parametrize("task", GRAPHS)
def test_a_list_gives_a_list_whatever_the_sizes(loaded: Any, task: str) -> None:
    model = loaded(task)
    random = np.random.default_rng(1)
    frames = [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((16, 24), (40, 30), (9, 70))]
    answers = model(frames)
    assert len(answers) == 3
    for frame, answer in zip(frames, answers, strict=True):
        for field in dataclasses.fields(answer):
            if field.name not in ("names", "arrays"):
                np.testing.assert_array_equal(getattr(answer, field.name), getattr(model(frame), field.name))
    stack = np.stack([frames[0]] * 2)
    assert len(model(stack)) == 2
    assert len(model([frames[1]])) == 1


def test_bgr_is_said_once(loaded: Any) -> None:
    frame = coloured(20, 20, 0)
    assert loaded("classification", order="bgr")(frame[:, :, ::-1]).best.name == "red"
    assert loaded("classification", order="bgr")(frame).best.name == "blue"
    assert loaded("classification", order="bgr")(np.full((9, 9), 200, np.uint8)).probabilities.std() < 1e-6


def test_more_frames_than_a_batch_run_in_order_while_others_wait(loaded: Any) -> None:
    model = loaded("classification")
    colours = np.random.default_rng(3).integers(0, 3, 150)
    pending = [model.submit([coloured(8, 8, c) for c in part]) for part in np.split(colours, 5)]
    found = [answer.best.number for item in pending for answer in item.result()]
    assert found == colours.tolist()
    assert all(item.done() for item in pending)


def test_a_frame_s_memory_may_be_used_again_at_once(loaded: Any) -> None:
    model, frame = loaded("classification"), coloured(20, 20, 0)
    pending = model.submit(frame)
    frame[:] = coloured(20, 20, 2)
    assert pending.result().best.name == "red"


def test_several_threads_get_their_own_answers(loaded: Any) -> None:
    model = loaded("classification")

    def ask(number: int) -> bool:
        return all(model(coloured(12, 12, number % 3)).best.number == number % 3 for _ in range(5))

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(24)))


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (np.zeros((8, 8, 3), np.float32), "holds float32"),
        (np.zeros((3, 8, 8), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((8, 8, 4), np.uint8), "[8, 8, 4]"),
        (np.zeros((0, 8, 3), np.uint8), "0 x 8 pixels"),
        (np.zeros(8, np.uint8), "[8]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "No frame"),
        ([], "No frame"),
        ([np.zeros((8, 8, 3), np.uint8), "a.png"], "Frame 1 is a builtins.str"),
        (None, "NoneType"),
        (b"\x89PNG", "bytes"),
    ],
)
def test_what_is_no_frame_is_refused(loaded: Any, frame: Any, says: str) -> None:
    model = loaded("classification")
    with pytest.raises(ResvitError) as refused:
        model(frame)
    assert says in str(refused.value)
    assert refused.value.code is ExitCode.INPUT
    assert model(coloured(8, 8, 2)).best.name == "blue"


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"order": "rbg"}, ExitCode.INPUT, "order of channels"),
        ({"streams": 0}, ExitCode.INPUT, "streams"),
        ({"least_score": 1.5}, ExitCode.INPUT, "out of range"),
        ({"runtime": "tensorrt"}, ExitCode.MISSING, "no engine in this bundle"),
        ({"size": (32, 32)}, ExitCode.INPUT, r"one size, 16x24 .* and not 32x32.*Leave size= out"),
        ({"size": "16x24"}, ExitCode.INPUT, "size='16x24' is no size"),
        ({"size": 32}, ExitCode.INPUT, "size=32 is no size"),
        ({"size": (16,)}, ExitCode.INPUT, "is no size"),
        ({"size": (16, 24, 3)}, ExitCode.INPUT, "is no size"),
        ({"size": (16.0, 24.0)}, ExitCode.INPUT, "is no size"),
        ({"size": (True, 24)}, ExitCode.INPUT, "is no size"),
        ({"size": (0, 24)}, ExitCode.INPUT, "is no size"),
        ({"least_score": "0.3"}, ExitCode.INPUT, "out of range"),
        ({"least_score": float("nan")}, ExitCode.INPUT, "out of range"),
        ({"order": ["rgb"]}, ExitCode.INPUT, "order of channels"),
        ({"runtime": 5}, ExitCode.INPUT, "no runtime 5"),
        ({"trust": ["release.pub"]}, ExitCode.INPUT, "no path, as trust="),
        ({"root": 7}, ExitCode.INPUT, "no path, as root="),
    ],
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, options: dict[str, Any], code: ExitCode, says: str) -> None:
    path = task_bundle(tmp_path, "classification")
    settings = {"trust": tmp_path / "release.pub", "runtime": "onnxruntime", **options}
    with pytest.raises(ResvitError, match=f"(?s){says}") as refused:
        resvit_engines.load(path, **settings)
    assert refused.value.code is code


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("oci://registry.example/net:1", "neither a .resvit file nor an installed name.*resvit-engine pull"),
        ("net" * 2000, "neither a .resvit file nor an installed name"),
        (f"{'net' * 2000}.resvit", "There is no bundle"),
        ("net\0", "neither a .resvit file nor an installed name"),
        ("", "neither a .resvit file nor an installed name"),
        ("./net", "neither a .resvit file nor an installed name"),
        (b"net.resvit", "is no path, as what to load"),
        (None, "is no path, as what to load"),
    ],
)
def test_what_is_neither_a_bundle_nor_installed_is_said(tmp_path: Path, what: Any, says: str) -> None:
    with pytest.raises(ResvitError, match=f"(?s){says}") as refused:
        resvit_engines.load(what, root=tmp_path)
    assert refused.value.code is ExitCode.INPUT


def test_a_folder_is_told_from_a_bundle(tmp_path: Path) -> None:
    path = task_bundle(tmp_path, "classification")
    (tmp_path / "run.resvit").mkdir()
    path.rename(tmp_path / "run.resvit" / path.name)
    with pytest.raises(ResvitError, match=r"(?s)is a folder.*run\.resvit/classification\.resvit"):
        resvit_engines.load(tmp_path / "run.resvit", trust=tmp_path / "release.pub")


@pytest.mark.parametrize("size", [[16, 24], SIZE, np.array(SIZE)])
def test_a_size_is_any_sequence_of_two_whole_numbers(loaded: Any, size: Any) -> None:
    model = loaded("classification", size=size)
    assert model.preprocess.size == SIZE
    assert model(coloured(9, 9, 1)).best.name == "green"


@pytest.mark.parametrize("count", ["5", -1, 1.5, True, None])
def test_a_number_of_classes_is_one(loaded: Any, count: Any) -> None:
    answer = loaded("classification")(np.full((8, 8), 9, np.uint8).view(np.matrix))
    assert len(answer.top(np.int64(2))) == 2
    with pytest.raises(ResvitError, match="no number of classes"):
        answer.top(count)


@pytest.mark.parametrize(
    ("beside", "says"),
    [([1], "does not name"), ({1: 2}, "does not name"), ({"sizes": [[1], [1, 2]]}, "sizes"), ({"input": "x"}, "input")],
)
def test_what_is_read_beside_is_named(loaded: Any, beside: Any, says: str) -> None:
    with pytest.raises(ResvitError, match=says):
        loaded("classification")(coloured(8, 8, 1), beside)


def test_what_is_not_trusted_is_not_loaded(tmp_path: Path) -> None:
    path = task_bundle(tmp_path, "classification")
    other = tmp_path / "other.pub"
    other.write_text(signing_key(bytes(32), "other").public.to_text())
    other.chmod(0o644)
    with pytest.raises(ResvitError) as refused:
        resvit_engines.load(path, trust=other, runtime="onnxruntime")
    assert refused.value.code is ExitCode.UNTRUSTED
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ResvitError):
        resvit_engines.load(path, trust=tmp_path / "release.pub", runtime="onnxruntime")


def test_a_network_that_computes_something_else_is_not_loaded(tmp_path: Path, loaded: Any) -> None:
    path, with_golden = tmp_path / "wrong.resvit", loaded("classification").manifest
    wrong = tmp_path / "classification-golden_output.npy"
    np.save(wrong, -np.load(wrong))
    files = {"model.onnx": tmp_path / "classification.onnx", "golden_output.npy": wrong}
    files["golden_input.npy"] = tmp_path / "classification-golden_input.npy"
    write_bundle(path, dataclasses.replace(with_golden, files=()), files, KEY)
    with pytest.raises(ResvitError) as refused:
        resvit_engines.load(path, trust=tmp_path / "release.pub", runtime="onnxruntime")
    assert refused.value.code is ExitCode.MISMATCH


def test_a_bundle_without_golden_images_is_loaded_only_unchecked(tmp_path: Path, loaded: Any) -> None:
    model = loaded("classification")
    assert "4 golden images" in model.golden
    path = tmp_path / "bare.resvit"
    bare = dataclasses.replace(model.manifest, golden=None, files=())
    write_bundle(path, bare, {"model.onnx": tmp_path / "classification.onnx"}, KEY)
    trust = tmp_path / "release.pub"
    with pytest.raises(ResvitError, match="no golden images"):
        resvit_engines.load(path, trust=trust, runtime="onnxruntime")
    with resvit_engines.load(path, trust=trust, runtime="onnxruntime", check=False) as unchecked:
        assert unchecked.golden is None
        assert unchecked(coloured(8, 8, 1)).best.name == "green"


def test_images_that_the_maker_s_code_prepared_are_not_guessed(tmp_path: Path) -> None:
    path = task_bundle(tmp_path, "classification", preprocess={"factory": "own.py:made"})
    with pytest.raises(ResvitError, match=r"own\.py:made"):
        resvit_engines.load(path, trust=tmp_path / "release.pub", runtime="onnxruntime")


@pytest.mark.parametrize("answers", [{"options": {"shown": "much"}}, {"options": {"none": 1}}])
def test_a_manifest_that_says_nonsense_of_its_answers_is_refused(loaded: Any, answers: dict[str, Any]) -> None:
    model = loaded("detection", {"answers": answers})
    with pytest.raises(ResvitError):
        model(coloured(8, 8, 1))


def test_a_closed_model_says_so_and_closes_twice(loaded: Any) -> None:
    model = loaded("classification")
    pending = model.submit([coloured(8, 8, 1)] * 100)
    model.close()
    assert len(pending.result()) == 100
    model.close()
    with pytest.raises(ResvitError, match="closed"):
        model(coloured(8, 8, 1))


def test_what_is_installed_is_loaded_by_its_name(tmp_path: Path) -> None:
    path, trust = task_bundle(tmp_path, "embedding"), tmp_path / "release.pub"
    install_bundle(path, tmp_path / "root", load_trust(trust), check=lambda folder, manifest: None, rehearse=True)
    options: dict[str, Any] = {"trust": trust, "root": tmp_path / "root", "runtime": "onnxruntime"}
    with resvit_engines.load("net-embedding", **options) as model:
        np.testing.assert_allclose(model(coloured(9, 9, 0)).vector, [1, 0, 0], atol=1e-6)
    with pytest.raises(ResvitError, match="net-none"):
        resvit_engines.load("net-none", **options)


@pytest.fixture
def with_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bundle with the engine of the stand-in, images [B, 3, 2, 2] to the sum of all and its negative."""
    api = FakeCuda()

    def make(**engine: Any) -> tuple[Path, FakeCuda, FakeTensorRT]:
        fakes = FakeTensorRT(FakeEngine(api, **engine))
        monkeypatch.setattr(engine_runner, "load_cuda", lambda: Cuda(api))
        monkeypatch.setattr(engine_runner, "load_tensorrt", lambda module: fakes)
        monkeypatch.setattr(run, "installed", lambda module: True)
        path = tmp_path / "engine.resvit"
        task_bundle(tmp_path, "other")
        images = np.random.default_rng(0).random((3, 3, 2, 2)).astype(np.float32)
        sums = images.reshape(3, -1).sum(1)
        np.save(tmp_path / "in.npy", images)
        np.save(tmp_path / "out.npy", np.stack([sums, -sums], 1))
        (tmp_path / "engine.plan").write_bytes(b"engine of a test")
        how = PicturePreprocess((2, 2)).to_json()
        manifest = Manifest(name="net-engine", engine=engine_report(), preprocess=how, golden=GoldenFiles())
        files = {"engine.plan": tmp_path / "engine.plan", "golden_input.npy": tmp_path / "in.npy"}
        write_bundle(path, manifest, {**files, "golden_output.npy": tmp_path / "out.npy"}, KEY)
        return path, api, fakes

    return make


def sums_of(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return (frames.reshape(len(frames), -1).astype(np.float32) / 255).sum(1)


def test_an_engine_runs_on_streams_of_its_own_and_gives_everything_back(
    tmp_path: Path, with_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, api, _ = with_engine(profile=(2, 4))
    monkeypatch.setattr(run, "local_sm", lambda: 87)
    frames = np.random.default_rng(1).integers(0, 256, (11, 2, 2, 3)).astype(np.uint8)
    with resvit_engines.load(path, trust=tmp_path / "release.pub", streams=2) as model:
        assert model.batch == (2, 4)
        assert model.why == ""
        answers = model(frames)
        found = np.array([answer.arrays["logits"][0] for answer in answers])
        np.testing.assert_allclose(found, sums_of(frames), rtol=1e-5)
        assert api.left()["stream"] == 3  # the golden check's, and two
        assert api.calls["cudaHostAlloc"] >= 4
        assert api.calls["cudaGraphLaunch"] > 0
    assert not api.left()


def test_an_engine_of_another_device_falls_to_the_cpu_with_a_warning_or_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "local_sm", lambda: 90)
    path = task_bundle(tmp_path, "classification", engine=engine_report())
    with pytest.raises(ResvitError, match=r"SM 8\.7, and this GPU has SM 9\.0") as refused:
        resvit_engines.load(path, trust=tmp_path / "release.pub", runtime="tensorrt")
    assert refused.value.code is ExitCode.IMPOSSIBLE
    with (
        pytest.warns(RuntimeWarning, match=r"on the CPU: The engine is for SM 8\.7"),
        resvit_engines.load(path, trust=tmp_path / "release.pub") as model,
    ):
        assert model(coloured(8, 8, 0)).best.name == "red"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resvit_engines.load(path, trust=tmp_path / "release.pub", runtime="onnxruntime").close()


def test_nan_is_no_answer(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from resvit_engines.run.onnx_on_cpu import CpuLane

    model = loaded("classification")
    monkeypatch.setattr(CpuLane, "results", lambda lane: {"logits": np.full((1, 3), np.nan, np.float32)})
    with pytest.raises(ResvitError, match="NaN") as refused:
        model(coloured(8, 8, 0))
    assert refused.value.code is ExitCode.MISMATCH


def test_a_stream_that_failed_is_free_again(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from resvit_engines.run.onnx_on_cpu import CpuLane

    model = loaded("classification", streams=1)

    def broken(lane: object) -> None:
        raise ResvitError("The GPU is gone.", "Start again.", ExitCode.SYSTEM)

    with monkeypatch.context() as patch:
        patch.setattr(CpuLane, "submit", broken)
        for _ in range(5):
            with pytest.raises(ResvitError, match="gone"):
                model(coloured(8, 8, 0))
    assert model(coloured(8, 8, 0)).best.name == "red"
    assert threading.active_count() < 50


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "docs/program.md").read_text(), re.DOTALL))
def test_every_example_of_the_page_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for task in re.findall(r'load\("(\w+)\.resvit"', block):
        task_bundle(tmp_path, task)
    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "release.pub"))
    frames = [coloured(30, 40, colour) for colour in (0, 1, 2)]
    exec(compile(block, "docs/program.md", "exec"), {"frames": frames, "frame": frames[1], "show": print})
    assert capsys.readouterr().out


def test_the_example_of_the_readme_is_the_page_s() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    assert all(block in (ROOT / "docs/program.md").read_text() for block in blocks)


@pytest.mark.whole
def test_what_a_build_validated_is_what_a_program_feeds(
    finished_run: Callable[..., Path], fashion_folder: Path, tmp_path: Path
) -> None:
    """The golden input is, bit for bit, what becomes of the very pictures handed over as frames."""
    (bundle,) = finished_run("jetson-orin").glob("bundle-*/*.resvit")
    sign_bundle(bundle, KEY, tmp_path / "signed.resvit")
    (tmp_path / "release.pub").write_text(KEY.public.to_text())
    (tmp_path / "release.pub").chmod(0o644)
    with gzip.open(fashion_folder / "t10k-images-idx3-ubyte.gz") as stream:
        pictures = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(fashion_folder / "t10k-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(), np.uint8, offset=8)
    with resvit_engines.load(tmp_path / "signed.resvit", trust=tmp_path / "release.pub") as model:
        made = {model.preprocess.apply(picture).tobytes() for picture in pictures}
        with zipfile.ZipFile(bundle) as archive:
            golden = np.load(io.BytesIO(archive.read("golden_input.npy")))
        feeds = {image.tobytes() for image in golden}
        assert len(feeds & made) == len(feeds) - 2  # the others are black, and noise
        answers = model(list(pictures[:300]))
        assert {answer.best.name for answer in answers} <= set(model.manifest.verdict.class_names)
        assert np.mean([answer.best.number == label for answer, label in zip(answers, labels, strict=False)]) > 0.8
        assert model.manifest.answers == {"options": {}, "classes": 10, "class_ids": []}


def test_importing_the_package_imports_nothing_that_is_heavy() -> None:
    code = "import resvit_engines, sys; print(sorted({'numpy', 'click', 'cryptography', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        resvit_engines.unload  # noqa: B018
