"""Recovery: on graphs of known structure, and by way of the command line on a trained hybrid."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from quantize_graphs import Graph, hybrid, outputs_of, ranges_of, sqnr
from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import Silent
from resvit_engines.targets.table import Precision
from resvit_export.cli.main import run
from resvit_quantize.check.choose import HeldBack
from resvit_quantize.check.contest import Contest
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.placement.grid import scale_from_amax
from resvit_quantize.qdq.held_back import MendedLayer
from resvit_quantize.qdq.plan import plan_quantization
from resvit_quantize.quantize import quantize_model
from resvit_quantize.recovery.options import RecoverOptions, RecoverReport
from resvit_quantize.recovery.recover import on_grid, pinned_ranges, recover_model, settings_behind_recovery
from resvit_quantize.recovery.student import trainable_constants
from resvit_quantize.settings import QuantizeSettings
from resvit_quantize.training.standing import Stop

pytestmark = pytest.mark.whole

COARSE = QuantizeSettings(Precision.INT8, Estimator.MAX, bits=3)
FAST = RecoverOptions(epochs=2, batch=16, learning_rate=1e-2, evaluate_every=8)


class Images:
    """Random images; ``broken_from`` makes all from that batch on NaN, ``killed_at`` interrupts there."""

    def __init__(self, count: int, shape: tuple[int, ...], killed_at: int | None = None) -> None:
        self.pixels = np.random.default_rng(1).standard_normal((count, *shape)).astype(np.float32)
        self.digest = "random"
        self.left = killed_at

    def __len__(self) -> int:
        return len(self.pixels)

    def batches_at(self, positions: npt.NDArray[np.int64], batch_size: int, skip: int = 0) -> Iterator[Batch]:
        for start in range(skip * batch_size, len(positions), batch_size):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            yield Batch(self.pixels[positions[start : start + batch_size]], None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hybrid(tmp_path_factory.mktemp("hybrid") / "float.onnx")


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(320, (3, 16, 16))


@pytest.fixture(scope="module")
def ranges(model: Path, images: Images) -> Ranges:
    return ranges_of(model, images.pixels[:64])


@pytest.fixture(scope="module")
def done(
    model: Path, ranges: Ranges, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RecoverReport]:
    out = tmp_path_factory.mktemp("done") / "recovered.onnx"
    return out, recover_model(model, ranges, COARSE, images, out, out.with_name("state"), FAST)


def constants(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_the_error_falls_and_what_is_shipped_has_it(
    model: Path, ranges: Ranges, images: Images, done: tuple[Path, RecoverReport], tmp_path: Path
) -> None:
    recovered, report = done
    assert report.after.nsr < 0.7 * report.before.nsr
    assert report.after.loss == min(score.loss for score in report.history)
    assert report.after.agreement is not None
    assert report.before.agreement is not None
    assert report.after.agreement >= report.before.agreement
    assert not recovered.with_name("state").exists()
    # Through the passes that ship it, on images that no one trained on.
    fresh = np.random.default_rng(2).standard_normal((256, 3, 16, 16)).astype(np.float32)
    expected = outputs_of(model, fresh)["logits"]
    quantize_model(model, ranges, COARSE, tmp_path / "plain.onnx")
    again = pinned_ranges(ranges_of(recovered, images.pixels[:64]), report.clips)
    quantize_model(recovered, again, settings_behind_recovery(COARSE), tmp_path / "better.onnx")
    plain, better = (sqnr(expected, outputs_of(tmp_path / f, fresh)["logits"]) for f in ("plain.onnx", "better.onnx"))
    assert better > plain + 1.0


def test_only_what_may_be_trained_has_changed(model: Path, ranges: Ranges, done: tuple[Path, RecoverReport]) -> None:
    before, after = constants(model), constants(done[0])
    trained = set(trainable_constants(plan_quantization(graph_from_onnx(model), ranges, COARSE)))
    assert {"stem/Conv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.norm1.bias", "head.bias"} <= trained
    assert "pos_embed" not in trained
    assert before.keys() == after.keys()
    for name, array in before.items():
        same = array.tobytes() == after[name].tobytes()
        assert same == (name not in trained), name
    nodes = [[(n.op_type, *n.input, *n.output) for n in onnx.load(p).graph.node] for p in (model, done[0])]
    assert nodes[0] == nodes[1]


def test_masks_preprocessing_and_epsilons_are_not_trained(tmp_path: Path) -> None:
    g = Graph("batch", 3, 16, 16)
    value = g.op("Sub", "input", g.constant("mean", np.full((1, 3, 1, 1), 0.5, np.float32)))
    value = g.op("Mul", value, g.constant("std", np.array([[[1.0]], [[2.0]], [[3.0]]], np.float32)))
    value = g.conv(value, 32, 3, name="first")
    value = g.op("Add", value, g.constant("offset", np.ones((1, 32, 1, 1), np.float32)))
    value = g.op("Mul", value, g.constant("half", np.array(0.5, np.float32)))
    value = g.op("Softmax", g.op("Add", value, g.constant("mask", np.zeros((16,), np.float32))), axis=-1)
    value = g.conv(value, 32, 32, name="second")
    path = g.save(tmp_path / "m.onnx", value)
    pixels = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    plan = plan_quantization(graph_from_onnx(path), ranges_of(path, pixels), COARSE)
    trained = {"first.weight", "first.bias", "offset", "second.weight", "second.bias"}
    assert set(trainable_constants(plan)) == trained


def test_quantising_recovered_weights_again_changes_nothing(ranges: Ranges, done: tuple[Path, RecoverReport]) -> None:
    from resvit_quantize.placement.grid import quantise_weight

    weights = constants(done[0])
    grids = on_grid(plan_quantization(graph_from_onnx(done[0]), ranges, COARSE))
    assert len(grids) > 5
    for name, axis, precision in grids.values():
        values, scale = quantise_weight(weights[name], axis, precision, COARSE.bits)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        assert np.array_equal(values.astype(np.float32) * scale.reshape(shape), weights[name])
        assert np.abs(values).max() <= 3


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_weight_scales_in_torch_are_those_of_the_quantiser(precision: Precision) -> None:
    torch = pytest.importorskip("torch")
    from resvit_quantize.placement.placement import Weight
    from resvit_quantize.recovery.student import weight_scale

    weight = (10.0 ** np.random.default_rng(0).uniform(-9, 7, (300, 1, 1, 1))).astype(np.float32)
    weight[0] = 0.0
    place = Weight(None, 1, 0, precision)  # type: ignore[arg-type]
    found = weight_scale(torch.from_numpy(weight), place, 8).numpy()
    assert np.array_equal(found[:, 0, 0, 0], scale_from_amax(weight[:, 0, 0, 0], precision))


@pytest.mark.parametrize("killed_at", [14, 25])
def test_a_killed_training_goes_on_to_the_same_weights(
    model: Path, ranges: Ranges, done: tuple[Path, RecoverReport], tmp_path: Path, killed_at: int
) -> None:
    killed = Images(320, (3, 16, 16), killed_at)
    out, state = tmp_path / "recovered.onnx", tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        recover_model(model, ranges, COARSE, killed, out, state, FAST)
    assert state.exists()
    assert not out.exists()
    said: list[str] = []

    class Listening(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    killed.left = None
    report = recover_model(model, ranges, COARSE, killed, out, state, FAST, Listening())
    assert any("going on behind step" in line for line in said)
    assert any("recover: about" in line for line in said)
    assert out.read_bytes() == done[0].read_bytes()
    assert dataclasses.replace(report, seconds=0.0) == dataclasses.replace(done[1], seconds=0.0)


def test_a_loss_that_is_not_finite_ends_it_and_the_best_weights_stay(
    model: Path, ranges: Ranges, images: Images, tmp_path: Path
) -> None:
    from resvit_quantize.recovery import training as torch_recover

    steps = 0
    honest = torch_recover.distance

    def breaking(outputs, targets, labels, options):  # type: ignore[no-untyped-def]
        nonlocal steps
        loss = honest(outputs, targets, labels, options)
        if loss.requires_grad:
            steps += 1
        # The first steps are the one that rates are tried by, and those that time the rest.
        return loss * float("nan") if loss.requires_grad and steps > 1 + 3 + 12 else loss

    warned: list[str] = []

    class Listening(Silent):
        def warn(self, text: str) -> None:
            warned.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_recover, "distance", breaking)
        report = recover_model(
            model, ranges, COARSE, images, tmp_path / "out.onnx", tmp_path / "state", FAST, Listening()
        )
    assert report.stop is Stop.NOT_FINITE
    assert report.steps == 12
    assert report.after.step == 8
    assert "best weights" in warned[0]
    assert all(np.isfinite(array).all() for array in constants(tmp_path / "out.onnx").values())
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["kept_step"] == 8


def test_training_that_makes_it_worse_stops_and_keeps_the_first_weights(
    model: Path, ranges: Ranges, images: Images, tmp_path: Path
) -> None:
    wild = RecoverOptions(
        epochs=50, batch=16, learning_rate=0.5, tries_rates=False, warmup=0.0, evaluate_every=2, patience=2
    )
    report = recover_model(model, ranges, COARSE, images, tmp_path / "out.onnx", tmp_path / "state", wild)
    assert report.stop is Stop.NO_BETTER
    assert report.steps == 4
    assert report.after == report.before


@pytest.mark.parametrize("bits", [8, 3])
def test_steps_are_as_long_as_the_error_is_large(
    model: Path, ranges: Ranges, images: Images, tmp_path: Path, bits: int
) -> None:
    found = []
    for tries in (True, False):
        options = RecoverOptions(epochs=1, batch=16, tries_rates=tries)
        settings = dataclasses.replace(COARSE, bits=bits)
        report = recover_model(model, ranges, settings, images, tmp_path / "out.onnx", tmp_path / "state", options)
        found.append(report.history[-1].nsr / report.before.nsr)
    if bits == 8:  # what few bits want is too long a step here, which an epoch does not make good again
        assert found[0] < 0.8 < 1.0 < found[1]
    else:
        assert found[0] == found[1] < 0.8


def test_a_graph_whose_batch_is_fixed_is_trained_in_pieces(tmp_path: Path) -> None:
    g = Graph(2, 3, 16, 16)
    value = g.op("Relu", g.conv("input", 32, 3, name="first"), name="relu")
    value = g.conv(value, 32, 32, name="second")
    path = g.save(tmp_path / "m.onnx", g.op("Reshape", value, g.ints(2, 32, 256)))
    images = Images(128, (3, 16, 16))
    ranges = ranges_of(path, images.pixels[:2])
    options = RecoverOptions(epochs=1, batch=7)
    report = recover_model(path, ranges, COARSE, images, tmp_path / "out.onnx", tmp_path / "state", options)
    assert report.after.nsr < report.before.nsr
    assert report.after.agreement is None


def test_what_cannot_be_recovered_says_so(model: Path, ranges: Ranges, images: Images, tmp_path: Path) -> None:
    out, state = tmp_path / "out.onnx", tmp_path / "state"
    with pytest.raises(ResvitError, match="nothing to recover"):
        recover_model(model, ranges, QuantizeSettings(Precision.FP16), images, out, state)
    with pytest.raises(ResvitError, match="100 training images"):
        recover_model(model, ranges, COARSE, Images(100, (3, 16, 16)), out, state)
    with pytest.raises(ResvitError, match="epochs = 0"):
        RecoverOptions(epochs=0)


# --- the command line ---------------------------------------------------------------------------------------------

MODEL = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt", "--data", "fashion-mnist"]
TRAIN = ["--train-data", "fashion-mnist", "--train-images", "600", "--recover-epochs", "1"]


def result(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, object]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == code
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bits everywhere: what calibration alone cannot save."""
    honest = QuantizeSettings.__post_init__

    def with_bits(self: QuantizeSettings) -> None:
        object.__setattr__(self, "bits", 3 if self.precision == Precision.INT8 else 8)
        honest(self)

    monkeypatch.setattr(QuantizeSettings, "__post_init__", with_bits)


@pytest.fixture
def one_out_of_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check on held-back images leaves a layer in the middle in FP16."""

    def mended(contest: Contest, name: str, held: HeldBack) -> tuple[str, tuple[MendedLayer, ...], str]:
        del held
        way, weighted = contest.settings(name), [item for item in contest.graph.analysis.products if item.weight]
        layer = str(weighted[len(weighted) // 2].node.name)
        contest.enter({"one in FP16": dataclasses.replace(way, precisions={layer: Precision.FP16})}, against=name)
        contest.errors("one in FP16")
        return "one in FP16", (), ""

    monkeypatch.setattr("resvit_quantize.check.choose._mended", mended)


@pytest.mark.slow
@pytest.mark.usefixtures("exported", "coarse", "one_out_of_line")
def test_a_build_that_calibration_cannot_save_is_recovered(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "jetson-orin", *MODEL, "--calibration-images", "128", "--no-search"]
    rejected = result(capsys, "build", *arguments, "--run", "runs/x", code=ExitCode.REJECTED)
    made = result(capsys, "build", *arguments, *TRAIN, "--run", "runs/x", "--allow-rejected")
    stages: list[dict[str, dict[str, dict[str, dict[str, float]]]]] = made["stages"]  # type: ignore[assignment]
    names = [str(item["stage"]) for item in stages]
    assert names == [
        "fold",
        "export",
        "recover",
        "calibrate",
        "quantize",
        "validate",
        "predict",
        "compile",
        "audit",
        "bundle",
    ]
    report = stages[2]["results"]["recover.json"]
    assert report["after"]["nsr"] < report["before"]["nsr"]
    decided = rejected["stages"][3]["results"]["quantize.json"]["held_back"]["precisions"]  # type: ignore[index]
    assert list(decided.values()) == ["fp16"]
    nodes = {node["name"]: node["precision"] for node in stages[4]["results"]["quantize.json"]["nodes"]}  # type: ignore[index]
    assert decided.items() <= nodes.items(), "what held-back images decided is not trained with"
    plain = rejected["stages"][4]["results"]["verdict.json"]["stages"][-1]  # type: ignore[index]
    better = stages[5]["results"]["verdict.json"]["stages"][-1]  # type: ignore[index]
    assert better["agreement"] > plain["agreement"]  # type: ignore[index]
    assert better["top1"] > plain["top1"]  # type: ignore[index]
    again = result(capsys, "build", "--run", "runs/x")
    assert again["bundle"] == made["bundle"]
    assert all(item["reused"] for item in again["stages"])  # type: ignore[attr-defined]
    assert run(["report", "--run", "runs/x", "-q"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_recovery_is_not_used_where_calibration_is_enough(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "validate", "--target", "rtx-4090", *MODEL, *TRAIN)
    assert found["results"]["verdict.json"]["verdict"] == "accepted"  # type: ignore[index]
    assert not list(Path("runs/embed-nano").glob("recover-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("exported", "coarse")
def test_a_rejection_says_that_training_images_are_missing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["build", "--target", "rtx-4090", *MODEL, "--calibration-images", "64", "--no-search", "-q"])
    assert code == ExitCode.REJECTED
    assert "--train-data with training images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        (["--recover"], "no images to train on"),
        (["--recover", "--train-data", "nowhere"], "does not exist"),
        (["--recover", "always", "--train-data", "fashion-mnist", "--precision", "fp16"], "not for fp16"),
        (["--recover", "--train-data", "fashion-mnist", "--quantizer", "modelopt"], "by modelopt"),
        (["--recover", "--train-data", "fashion-mnist", "--recover-epochs", "0"], "recover_epochs"),
    ],
)
def test_wishes_that_cannot_be_fulfilled(
    workspace: Path, capsys: pytest.CaptureFixture[str], wish: list[str], problem: str
) -> None:
    code = run(["build", "--target", "rtx-4090", *MODEL, *wish, "-q"])
    assert code in (ExitCode.INPUT, ExitCode.IMPOSSIBLE)
    assert problem in capsys.readouterr().err
    assert not list(Path("runs").glob("*/fold-*"))


# --- images to train on -------------------------------------------------------------------------------------------


def test_training_images_come_in_the_order_asked_for_without_validation_images(tmp_path: Path) -> None:
    from resvit_calibrate.data.image_sets import open_image_sets, open_training_images
    from resvit_calibrate.images.image_set import DataSpec
    from resvit_calibrate.images.preprocess import Preprocess

    pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(60) % 3)
    preprocess, data = Preprocess((8, 8), 1), str(tmp_path / "a.npz")
    _, validation = open_image_sets(DataSpec(data, calibration_images=40), preprocess)
    found = open_training_images(data, validation, 1000, 0, preprocess)
    assert len(found) == 30
    order = np.array([5, 2, 29, 7, 11], np.int64)
    batches = list(found.batches_at(order, 2))
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    alone = [next(found.batches_at(order[i : i + 1], 1)).images[0] for i in range(5)]
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), np.stack(alone))
    behind = list(found.batches_at(order, 2, skip=1))
    assert np.array_equal(behind[0].images, batches[1].images)
    seen = {image.tobytes() for batch in validation.batches(9) for image in batch.images}
    assert not seen & {image.tobytes() for image in alone}


def test_a_stream_is_mixed_the_same_way_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resvit_calibrate.data import training_images as training
    from resvit_calibrate.data.image_sets import open_training_images
    from resvit_calibrate.images.preprocess import Preprocess

    (tmp_path / "loader.py").write_text(
        "import numpy as np\n"
        "def make(split='calibration'):\n"
        "    yield np.arange(40, dtype=np.float32).reshape(40, 1, 1, 1), np.arange(40)\n"
    )

    class Nothing:
        contents = ()

    monkeypatch.setattr(training, "_WINDOW_BYTES", 64)
    found = open_training_images(f"{tmp_path}/loader.py:make", Nothing(), 30, 0, Preprocess((1, 1), 1))  # type: ignore[arg-type]
    order = np.random.default_rng(0).permutation(30)[:20]
    batches = list(found.batches_at(order, 8))
    labels = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
    assert sorted(labels) == sorted(order)
    assert list(labels) != sorted(order)
    assert np.array_equal(labels, np.concatenate([batch.images for batch in batches])[:, 0, 0, 0])
    again = list(found.batches_at(order, 8, skip=1))
    assert np.array_equal(again[0].images, batches[1].images)
