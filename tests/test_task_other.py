from __future__ import annotations

import sys

import numpy as np
import pytest

from resvit_calibrate.answers.classes import Predictions
from resvit_calibrate.gate.gate import VerdictKind, judge
from resvit_calibrate.images.targets import BoxTarget
from resvit_calibrate.tasks.kinds import kind_of, task_named, task_of
from resvit_engines.errors import ResvitError
from task_images import Images, network

METRICS = """
import numpy as np

def near(outputs, labels):
    return 1.0 / (1.0 + np.abs(outputs["a"][:, 0] - labels))

def wrong_shape(outputs, labels):
    return np.zeros(3)

def not_a_number(outputs, labels):
    scores = near(outputs, labels)
    scores[0] = np.nan
    return scores

def raises(outputs, labels):
    return outputs["missing"]

NUMBER = 3
"""


@pytest.fixture
def metrics(tmp_path) -> str:
    (tmp_path / "own_metrics.py").write_text(METRICS)
    return str(tmp_path / "own_metrics.py")


def outputs(count: int = 50, noise: float = 0.0):
    random = np.random.default_rng(0)
    labels = random.integers(0, 9, count)
    clean = labels[:, None] + random.normal(0, 0.2, (count, 6))
    images = Images(None, labels=labels)
    return network(a=(clean + noise * random.normal(size=clean.shape)).astype(np.float32)), images


def test_the_users_metric_decides(metrics, tmp_path):
    task = task_named("other", {}, f"{metrics}:near")
    first, second = (task.answers(*outputs(noise=noise), 8) for noise in (0.0, 0.05))
    got = task.compare(first, second)
    assert got.metric == "near"
    assert got.interval[0] < got.drop < got.interval[1]
    assert got.drop == pytest.approx(100 * (first.scores.mean() - second.scores.mean()))
    assert judge(got, 50.0).reason.startswith("the near drop is ")
    assert judge(got, 50.0).kind is VerdictKind.ACCEPTED
    far = task.answers(*outputs(noise=5.0), 8)
    assert judge(task.compare(first, far), 1.0).kind is VerdictKind.REJECTED
    assert task.changed(first, far)[0]["outcome"] == "lost"
    first.save(tmp_path / "a.npz")
    assert task.compare(task.load((tmp_path / "a.npz").read_bytes(), "a.npz"), second).to_json() == got.to_json()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong_shape", r"returned the shape \[3\] for 8 images"),
        ("not_a_number", "NaN or infinity for 1 of 8 images"),
        ("raises", "failed: KeyError"),
        ("NUMBER", "has a int there"),
        ("missing", "has nothing of that name"),
    ],
)
def test_metrics_that_are_none(metrics, name, said):
    with pytest.raises(ResvitError, match=said):
        task_named("other", {}, f"{metrics}:{name}").answers(*outputs(), 8)


def test_a_metric_of_an_installed_module(monkeypatch, tmp_path):
    (tmp_path / "some_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = task_named("other", {}, "some_metrics:near")
    assert len(task.answers(*outputs(), 8).scores) == 50
    sys.modules.pop("some_metrics")
    with pytest.raises(ResvitError, match=r"is not package\.module:function"):
        task_named("other", {}, "near")
    with pytest.raises(ResvitError, match="its own metric"):
        task_named("depth", {}, "some_metrics:near")


def test_without_a_metric_the_outputs_must_be_near():
    task = task_named("other", {"least_agreement": 0})
    first = task.answers(*outputs(), 8)
    verdict = judge(task.compare(first, task.answers(*outputs(noise=0.02), 8)), 1.0)
    assert verdict.kind is VerdictKind.ACCEPTED
    assert verdict.reason.startswith(
        "accuracy was not measured; the outputs' SQNR against the float network is 43.5 dB, "
    )
    assert verdict.reason.endswith("above the least of 20 dB")
    verdict = judge(task.compare(first, task.answers(*outputs(noise=5.0), 8)), 1.0)
    assert verdict.kind is VerdictKind.REJECTED
    assert verdict.reason.endswith("below the least of 20 dB")
    strict = task_named("other", {"least_sqnr_db": 60, "least_agreement": 0})
    assert judge(strict.compare(first, task.answers(*outputs(noise=0.05), 8)), 1.0).kind is VerdictKind.REJECTED
    assert judge(task.compare(first, first), 1.0).kind is VerdictKind.ACCEPTED
    broken = task.answers(network(a=np.full((50, 6), np.nan, np.float32)), outputs()[1], 8)
    assert "50 of 50 images" in judge(task.compare(first, broken), 1.0).reason
    assert len(task.changed(first, task.answers(*outputs(noise=5.0), 8))) > 40


@pytest.mark.parametrize("equal", [0.0, 0.5, 0.9])
def test_images_that_are_equal_carry_no_others(equal):
    """Equal outputs are worth 100 dB each: a mean of decibels would accept one half of noise for the other's sake."""
    task = task_named("other", {})
    clean = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    noisy = np.where(np.arange(200)[:, None] < 200 * equal, clean, clean[::-1] * 3)
    images = Images(None, count=200)
    first, second = (task.answers(network(a=value), images, 50) for value in (clean, noisy))
    got = task.compare(first, second)
    assert judge(got, 1.0).kind is VerdictKind.REJECTED
    assert got.candidate["SQNR"] == got.sqnr_db == pytest.approx(-10 * np.log10(1 - equal), abs=1.5)


def test_the_largest_outputs_carry_no_others():
    """One image of a hundred times the outputs has nearly all of the energy."""
    task = task_named("other", {})
    clean = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    clean[0] *= 1000
    noisy = np.where(np.arange(100)[:, None] == 0, clean, -clean)
    first, second = (task.answers(network(a=value), Images(None, count=100), 50) for value in (clean, noisy))
    assert first.raw.sqnr_db(second.raw) > 20
    assert judge(task.compare(first, second), 1.0).kind is VerdictKind.REJECTED


def test_one_image_of_ten_that_is_wrong_is_not_hidden_by_the_mean():
    """Noise of 0.4 of the amplitude on 12% of the images leaves the mean near the least, and misreads those."""
    task = task_named("other", {})
    random = np.random.default_rng(0)
    clean = random.normal(size=(600, 5, 7)).astype(np.float32)
    noise = 0.4 * random.normal(size=clean.shape) * (random.random(600) < 0.12)[:, None, None]
    first, second = (
        task.answers(network(a=x), Images(None, count=600), 50) for x in (clean, (clean + noise).astype(np.float32))
    )
    got = task.compare(first, second)
    assert got.pooled - 20.0 > -4.0
    assert got.low < 14.0
    verdict = judge(got, 1.0)
    assert verdict.kind is VerdictKind.REJECTED
    assert "(that of the worst 5%, plus 6)" in verdict.reason
    assert got.decisions is not None
    assert (
        f"the same at {got.decisions[0]:.1%} of the positions and everywhere in {got.decisions[1]:.1%}"
        in verdict.reason
    )
    assert got.decisions[0] > 0.9
    assert got.decisions[1] < got.decisions[0]


def compared(clean: np.ndarray, other: np.ndarray, **options: float):
    task, images = task_named("other", options), Images(None, count=len(clean))
    return task.compare(*(task.answers(network(a=x.astype(np.float32)), images, 50) for x in (clean, other)))


@pytest.mark.parametrize("offset", [0.0, 20.0, 1e4])
def test_what_is_the_same_for_all_images_is_no_signal(offset):
    """Logits with a common offset: noise as large as what tells images apart was 26 dB below the offset's energy."""
    random = np.random.default_rng(0)
    clean = random.normal(size=(200, 10))
    got = compared(clean + offset, clean + random.normal(size=clean.shape) + offset)
    assert got.pooled < 3.0
    verdict = judge(got, 1.0)
    assert verdict.kind is VerdictKind.REJECTED
    fine = compared(clean + offset, clean + 0.01 * random.normal(size=clean.shape) + offset)
    assert fine.pooled == pytest.approx(40.0, abs=1.5)
    assert judge(fine, 1.0).kind is VerdictKind.ACCEPTED


def test_blanks_carry_no_other_decisions():
    """CTC, blank by far ahead at 9 of 10 positions of every image, and all that is read drawn anew."""
    random = np.random.default_rng(0)
    clean = random.normal(size=(200, 40, 12))
    clean[:, :36, 0] += 25.0
    lost = clean.copy()
    lost[:, 36:] = random.normal(size=(200, 4, 12))
    got = compared(clean, lost, least_sqnr_db=0)
    assert got.decisions is not None
    assert got.decisions[0] > 0.9
    verdict = judge(got, 1.0)
    assert verdict.kind is VerdictKind.REJECTED
    read = max(int((x[:, 36:].argmax(2) != 0).sum()) for x in (clean, lost))
    same = clean[:, 36:].argmax(2)[clean[:, 36:].argmax(2) == lost[:, 36:].argmax(2)]
    assert got.agreement == (same != 0).sum() / read
    said = f"above the least of 0 dB; {got.agreement:.1%} of {read} decisions for another class than the commonest"
    assert said in verdict.reason
    assert judge(compared(clean, lost, least_sqnr_db=0, least_agreement=0), 1.0).kind is VerdictKind.ACCEPTED


@pytest.mark.parametrize(("wrong", "kind"), [(0.02, "accepted"), (0.04, "undecided"), (0.1, "rejected")])
@pytest.mark.parametrize("invented", [False, True])
def test_decisions_that_are_lost_or_invented_decide_too(wrong, kind, invented):
    random = np.random.default_rng(1)
    scores = np.zeros((400, 20, 3))
    scores[..., 0] = 1.0
    read = random.random(scores.shape[:2]) < 0.4
    scores[read, 1] = 5.0
    other = scores.copy()
    hit = np.where(read, not invented, invented) * random.random(read.shape) > 1.0 - wrong * (2 / 3 if invented else 1)
    other[hit] = (0.0, 0.0, 9.0) if invented else (6.0, 0.0, 0.0)
    got = compared(scores, other, least_sqnr_db=0)
    verdict = judge(got, 1.0)
    assert verdict.kind.value == kind
    if kind == "undecided":
        assert "images would decide" in verdict.reason
        assert verdict.images_needed > 400


def test_few_decisions_and_boxes_are_not_judged():
    random = np.random.default_rng(0)
    boxes = random.normal(size=(50, 5, 4))
    assert compared(boxes, boxes).kept is None
    few = np.zeros((50, 2))
    few[:, 0] = 1.0 + random.random(50)
    few[:5] = (0.0, 3.0)
    assert compared(few, few[::-1]).kept is None
    assert compared(np.tile(few, (2, 1)), np.tile(few, (2, 1))).kept.count == 10


@pytest.mark.parametrize("value", [0.0, 1.0, 300.0])
def test_a_float_network_that_sees_nothing_is_no_measure(value):
    clean = np.full((200, 10), value) * np.arange(10)
    for other in (clean, clean + 1e-3 * np.random.default_rng(0).normal(size=clean.shape)):
        verdict = judge(compared(clean, other), 1.0)
        assert verdict.kind is VerdictKind.UNDECIDED
        assert "gives the same outputs for every one of 200 images" in verdict.reason
    one = clean[:1] + 1.0
    assert judge(compared(one, one), 1.0).kind is VerdictKind.ACCEPTED


def test_one_output_that_is_always_the_same_counts_by_its_whole_energy():
    random = np.random.default_rng(0)
    clean, anchors = random.normal(size=(60, 1, 6)).astype(np.float32), np.full((60, 8), 3.0, np.float32)
    task, images = task_named("other", {}), Images(None, count=60)
    first = task.answers(network(a=clean, b=anchors), images, 50)
    near, far = (task.answers(network(a=clean, b=anchors + apart), images, 50) for apart in (0.03, 3.0))
    assert task.compare(first, near).pooled == pytest.approx(40.0, abs=0.1)
    assert judge(task.compare(first, far), 1.0).kind is VerdictKind.REJECTED


def test_unlabelled_images_do_without_a_metric():
    random = np.random.default_rng(0)
    task = task_named("other", {})
    run = network(a=random.normal(size=(5, 3, 4)), b=random.integers(0, 3, (5, 2)))
    got = task.answers(run, Images(None, count=5), 2)
    assert list(got.raw.outputs) == ["a"]
    with pytest.raises(ResvitError, match="no output of floating-point"):
        task.answers(network(b=np.zeros((5, 2), np.int64)), Images(None, count=5), 2)
    with pytest.raises(ResvitError, match=r"a has the shape \[3, 4\] for 2 images"):
        task.answers(lambda arrays: {"a": np.zeros((3, 4))}, Images(None, count=5), 2)


# --- which task ---------------------------------------------------------------------------------------------------

LOGITS, MAPS = {"name": "logits", "shape": ["batch", 10]}, {"name": "maps", "shape": ["batch", 21, 32, 32]}
BOXES = [{"name": "boxes", "shape": ["batch", 100, 4]}, {"name": "scores", "shape": ["batch", 100, 80]}]
DETR = [{"name": "logits", "shape": ["batch", 100, 92]}, {"name": "pred_boxes", "shape": ["batch", 100, 4]}]
DEPTH = {"name": "predicted_depth", "shape": ["batch", 64, 64]}


@pytest.mark.parametrize(
    ("outputs", "known", "kind"),
    [
        ([LOGITS], "classification", "classification"),
        ([{"name": "x", "shape": ["batch", 10]}], None, "classification"),
        ([LOGITS, MAPS], "classification", "classification"),
        ([LOGITS], "detection", "detection"),
        (BOXES, "detection", "detection"),
        (BOXES[::-1], None, "detection"),
        (DETR, "detection", "detection"),
        (BOXES, "segmentation", "segmentation"),
        ([MAPS], "segmentation", "segmentation"),
        ([DEPTH], "segmentation", "segmentation"),
        ([DEPTH], "depth", "depth"),
        ([DEPTH], None, "depth"),
        ([{"name": "x", "shape": ["batch", 1, 64, 64]}], "depth", "depth"),
        ([MAPS, DEPTH], "segmentation", "segmentation"),
        ([MAPS, DEPTH], None, "other"),
        ([{"name": "x", "shape": ["batch", 3, 4, 5, 6]}], None, "other"),
    ],
)
def test_the_task_is_told_from_outputs_and_targets(outputs, known, kind):
    assert kind_of(outputs, known) == kind
    assert task_of(outputs, known).name == kind


def test_the_task_for_a_users_metric_is_other(metrics):
    assert task_of([LOGITS], "classification", metric=f"{metrics}:near").name == "other"
    with pytest.raises(ResvitError, match="does not exist"):
        task_named("poses", {})


def test_classification_is_what_it_was(tmp_path):
    task = task_named("classification", {})
    labels = np.arange(40) % 8
    run = network(logits=np.eye(8, dtype=np.float32)[labels])
    found = task.answers(run, Images(None, labels=labels), 16)
    assert isinstance(found, Predictions)
    got = task.compare(found, found)
    assert got.reference == got.candidate == {"top-1": 1.0, "top-5": 1.0}
    found.save(tmp_path / "a.npz")
    assert len(task.load((tmp_path / "a.npz").read_bytes(), "a.npz").first(7)) == 7
    assert task.changed(found, found) == []
    with pytest.raises(ResvitError, match="no labels"):
        task.answers(run, Images([BoxTarget(np.zeros((0, 4)), np.zeros(0), np.zeros(0))] * 40), 8)
    with pytest.raises(ResvitError, match="no option"):
        task_named("classification", {"top_k": 3})
    assert task_named("classification", {"ignore": 255}).name == "classification"
