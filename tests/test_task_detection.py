from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from resvit_calibrate.answers.average_precision import matched
from resvit_calibrate.gate.gate import VerdictKind, judge
from resvit_calibrate.images.targets import BoxTarget, MaskTarget
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.answers.boxes import Boxes, BoxReader, DetectionOptions, overlaps, without_overlaps
from resvit_engines.errors import ResvitError
from task_images import SIZE, Images, detector, network, scenes

TASK = task_named("detection", {"nms_iou": 1.0})


def coco_says(found, known) -> tuple[float, float]:
    """MAP 50:95 and mAP 50 as pycocotools itself computes them from files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(box):
        x1, y1, x2, y2 = (float(edge) for edge in box)
        return {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}

    truth = [
        {**entry(box), "image_id": i, "category_id": int(kind), "iscrowd": int(crowd), "id": 0}
        for i, target in enumerate(known)
        for box, kind, crowd in zip(target.boxes, target.classes, target.crowd, strict=True)
    ]
    for number, item in enumerate(truth, 1):
        item["id"] = number
    answers = [
        {**entry(box), "image_id": i, "category_id": int(kind), "score": float(score)}
        for i, item in enumerate(found)
        for box, kind, score in zip(item.boxes, item.classes, item.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = {
            "images": [{"id": i} for i in range(len(known))],
            "annotations": truth,
            "categories": [{"id": i} for i in range(10)],
        }
        data.createIndex()
        judged = COCOeval(data, data.loadRes(answers), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return float(judged.stats[0]), float(judged.stats[1])


@pytest.mark.whole
@pytest.mark.parametrize("seed", range(6))
def test_the_point_value_is_that_of_pycocotools(seed):
    random = np.random.default_rng(seed)
    known = scenes(random, 40, crowds=0.15 if seed % 2 else 0.0)
    outputs = detector(random, known, noise=[0.3, 0.8, 2.0][seed % 3])
    if seed == 4:
        outputs["scores"] = np.round(outputs["scores"], 1)  # ties, within images and between them
    answers = TASK.answers(network(**outputs), Images(known, classes=4), 7)
    assert max(len(item.scores) for item in answers.found) == 100
    wanted = coco_says(answers.found, known)
    got = answers.matched.average_precision(np.ones((1, 40)))[0]
    assert 0.05 < wanted[0] < wanted[1]
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_an_image_drawn_twice_counts_as_two_images(seed):
    random = np.random.default_rng(seed)
    known = scenes(random, 12, classes=2)
    found = TASK.answers(network(**detector(random, known, classes=2)), Images(known, classes=2), 12).found
    times = random.multinomial(12, np.full(12, 1 / 12))
    again = [i for i, n in enumerate(times) for _ in range(n)]
    weighted = matched(found, known, 100).average_precision(times[None].astype(float))[0]
    wanted = coco_says([found[i] for i in again], [known[i] for i in again])
    np.testing.assert_allclose(weighted, wanted, atol=1e-12)


def test_no_more_than_a_hundred_boxes_of_an_image_count():
    random = np.random.default_rng(0)
    known = scenes(random, 5, classes=1)
    outputs = detector(random, known, classes=1, queries=150)
    answers = task_named("detection", {"nms_iou": 1.0, "top_k": 150}).answers(
        network(**outputs), Images(known, classes=1), 5
    )
    assert len(answers.found[0].scores) == 150
    np.testing.assert_allclose(
        answers.matched.average_precision(np.ones((1, 5)))[0], coco_says(answers.found, known), atol=1e-12
    )


def pair(seed: int = 0, count: int = 60, noise: float = 0.0, **settings):
    random = np.random.default_rng(seed)
    known = scenes(random, count)
    outputs = detector(random, known)
    images = Images(known, classes=4)
    other = {
        "boxes": outputs["boxes"] + random.normal(0, 1, outputs["boxes"].shape).astype(np.float32) * noise,
        "scores": np.clip(outputs["scores"] + random.normal(0, 0.02 * noise, outputs["scores"].shape), 0, 1),
    }
    task = task_named("detection", {"nms_iou": 1.0, **settings})
    return task, task.answers(network(**outputs), images, 16), task.answers(network(**other), images, 16)


@pytest.mark.whole
def test_a_comparison_and_its_verdicts():
    task, first, second = pair(noise=1.0)
    got = task.compare(first, second)
    assert got.drop == pytest.approx(100 * (got.reference["mAP 50:95"] - got.candidate["mAP 50:95"]))
    low, high = got.interval
    assert low < got.drop < high
    assert got.interval_at(0.99)[0] < low
    assert 0.5 < got.agreement < 1
    assert 0 < got.sqnr_db < 60
    assert task.compare(first, second).interval == got.interval  # seeded
    verdict = judge(got, 100.0)
    assert verdict.kind is VerdictKind.ACCEPTED
    assert verdict.reason.startswith(f"the mAP 50:95 drop is {got.drop:.2f} points, between {low:.2f} and {high:.2f}")
    assert judge(got, max(0.0, low - 0.1)).kind is VerdictKind.REJECTED
    undecided = judge(got, high - 0.1)
    assert undecided.kind is VerdictKind.UNDECIDED
    assert undecided.images_needed > 60
    assert undecided.to_json()["unit"] == "points"
    rows = task.changed(first, second)
    assert rows
    assert "boxes" in rows[0]["quantized"]
    drawn = task.drawing(first, rows[0]["index"])
    assert len(drawn["boxes"]) == len(drawn["scores"]) == len(drawn["classes"])
    assert drawn["scores"].min() >= 0.3


@pytest.mark.whole
def test_a_perfect_copy_of_few_images_is_no_proof():
    task, first, second = pair(count=60)
    got = task.compare(first, second)
    assert (got.drop, got.agreement, got.worse, got.better) == (0.0, 1.0, 0, 0)
    assert got.interval == pytest.approx((-6.02, 6.02), abs=0.01)  # as for classes: z² / (n + z²)
    verdict = judge(got, 1.0)
    assert verdict.kind is VerdictKind.UNDECIDED
    assert verdict.images_needed == 390


@pytest.mark.whole
def test_nan_is_rejected_with_the_count_and_never_a_reference():
    random = np.random.default_rng(1)
    known = scenes(random, 30)
    good = detector(random, known)
    bad = {name: value.copy() for name, value in good.items()}
    bad["boxes"][4, 2, 1] = np.nan
    images = Images(known, classes=4)
    first, second = (TASK.answers(network(**outputs), images, 8) for outputs in (good, bad))
    verdict = judge(TASK.compare(first, second), 100.0)
    assert verdict.kind is VerdictKind.REJECTED
    assert "NaN or infinity for 1 of 30 images" in verdict.reason
    with pytest.raises(ResvitError, match="1 of 30"):
        TASK.compare(second, first)


@pytest.mark.whole
def test_an_untrained_detector_is_undecided():
    random = np.random.default_rng(2)
    known = scenes(random, 50)
    nothing = {"boxes": detector(random, known, miss=1.0)["boxes"], "scores": random.random((50, 30, 4)) / 3}
    answers = TASK.answers(network(**nothing), Images(known, classes=4), 8)
    verdict = judge(TASK.compare(answers, answers), 50.0)
    assert verdict.kind is VerdictKind.UNDECIDED
    assert verdict.chance_level
    assert "not clearly above 1" in verdict.reason


@pytest.mark.whole
def test_saved_and_loaded(tmp_path):
    task, first, second = pair(noise=0.5, count=20)
    first.save(tmp_path / "a.npz")
    again = task.load((tmp_path / "a.npz").read_bytes(), "a.npz")
    assert len(again) == 20
    assert task.compare(again, second).to_json() == task.compare(first, second).to_json()
    few = task.compare(first.first(10), second.first(10))
    assert few.images == 10
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    with pytest.raises(ResvitError, match="cannot be read"):
        task.load((tmp_path / "a.npz").read_bytes(), "a.npz")
    with pytest.raises(ResvitError, match="cannot be compared"):
        task.compare(first, second.first(10))


# --- outputs ------------------------------------------------------------------------------------------------------


def read(outputs, classes=None, **options) -> Boxes:
    reader = BoxReader(DetectionOptions(**options), outputs, classes)
    return reader.read(outputs[reader.boxes][0], outputs[reader.scores][0], SIZE)


def test_the_detr_family_is_read_as_its_users_expect():
    logits = np.array([[[0.0, 2.0, -1.0], [3.0, 0.0, 5.0]]], np.float32)  # two classes and no object
    boxes = np.array([[[0.5, 0.5, 0.5, 0.25], [0.25, 0.25, 0.1, 0.1]]], np.float32)
    got = read({"logits": logits, "pred_boxes": boxes}, classes=2)
    powers = np.exp(logits[0])
    likely = powers / powers.sum(1, keepdims=True)
    assert got.classes[:2].tolist() == [1, 0]
    np.testing.assert_allclose(got.scores[:2], [likely[0, 1], likely[1, 0]], rtol=1e-5)
    assert len(got.scores) == 2  # one class a box
    np.testing.assert_allclose(got.boxes[0], [16, 18, 48, 30], atol=1e-4)
    got = read({"logits": logits, "pred_boxes": boxes}, classes=3)  # as many scores as classes: RT-DETR
    np.testing.assert_allclose(got.scores, 1 / (1 + np.exp(-np.sort(logits.ravel())[::-1])), rtol=1e-5)
    assert got.classes[0] == 2


def test_any_order_and_any_two_names():
    boxes, scores = np.zeros((1, 5, 4), np.float32), np.full((1, 5, 3), 0.5, np.float32)
    for outputs in ({"a": boxes, "b": scores}, {"b": scores, "a": boxes}):
        assert len(read(outputs, nms_iou=1.0).scores) == 15
    boxes = boxes + np.array([0, 0, 9, 9], np.float32)
    assert len(read({"x": boxes, "y": scores, "z": scores}, boxes="x", scores="z").scores) == 3  # one of each class


@pytest.mark.parametrize(
    ("outputs", "options", "said"),
    [
        ({"out": np.zeros((1, 5, 4))}, {}, r"boxes and scores, or pred_boxes and logits.*out \[1, 5, 4\]"),
        ({"boxes": np.zeros((1, 5, 4)), "scores": np.zeros((1, 4, 2))}, {}, r"boxes \[1, 5, 4\], scores \[1, 4, 2\]"),
        ({"boxes": np.zeros((1, 5)), "scores": np.zeros((1, 5))}, {}, r"not \[B, boxes, 4\]"),
        ({"boxes": np.zeros((1, 5, 4)), "scores": np.full((1, 5, 2), 3.0)}, {}, "not probabilities"),
        ({"a": np.zeros((1, 5, 4)), "b": np.zeros((1, 5, 4))}, {}, r"a \[1, 5, 4\], b"),
    ],
)
def test_outputs_that_are_no_boxes(outputs, options, said):
    with pytest.raises(ResvitError, match=said):
        read(outputs, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"box_form": "xyxy"}, "Did you mean box_format"),
        ({"box_format": "xywh"}, "does not exist"),
        ({"top_k": 0}, "out of range"),
        ({"nms_iou": "much"}, "wrong type"),
        ({"normalized": 1}, "wrong type"),
    ],
)
def test_options_that_mean_nothing(options, said):
    with pytest.raises(ResvitError, match=said) as raised:
        task_named("detection", options)
    assert said in str(raised.value) or said in raised.value.fix


def test_overlapping_boxes_of_a_class_go():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    assert overlaps(boxes[:1], boxes[1:2])[0, 0] == pytest.approx(90 / 110)
    assert without_overlaps(boxes, np.array([0, 0, 1, 0]), 0.5).tolist() == [0, 2, 3]
    assert without_overlaps(boxes, np.array([0, 0, 1, 0]), 0.9).tolist() == [0, 1, 2, 3]


def test_data_that_does_not_fit():
    boxes = np.zeros((1, 5, 4), np.float32)
    run = network(boxes=boxes, scores=np.full((1, 5, 2), 0.5))
    one = BoxTarget(np.array([[0, 0, 5, 5]], np.float32), np.array([7]), np.array([False]))
    with pytest.raises(ResvitError, match=r"class 7, but the network knows classes 0 to 1"):
        TASK.answers(run, Images([one]), 1)
    with pytest.raises(ResvitError, match="the data has masks"):
        TASK.answers(run, Images([MaskTarget(np.zeros(SIZE, np.int16))]), 1)
    with pytest.raises(ResvitError, match="the data has class labels"):
        TASK.answers(run, Images(None, labels=np.array([0])), 1)
    with pytest.raises(ResvitError, match="No image has a box"):
        TASK.answers(run, Images([BoxTarget(np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros(0, bool))]), 1)


def test_the_datas_own_class_numbers():
    one = BoxTarget(np.array([[0, 0, 5, 5]], np.float32), np.array([1]), np.array([False]))
    run = network(boxes=np.zeros((1, 5, 4), np.float32), scores=np.full((1, 5, 91), 0.5))
    task = task_named("detection", {"class_numbers": "id"})
    assert task.answers(run, Images([one], ids=(3, 90)), 1).known[0].classes.tolist() == [90]
