from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from resvit_calibrate.answers.maps import step_for
from resvit_calibrate.answers.raw import joined_raw, raw_of
from resvit_calibrate.gate.gate import VerdictKind, judge
from resvit_calibrate.images.targets import BoxTarget, MaskTarget
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.answers.maps import classes_at, map_at
from resvit_engines.errors import ResvitError
from resvit_export.loading.libraries import import_timm
from task_images import SIZE, Images, network

TASK = task_named("segmentation", {})
CLASSES = 5


def masks(random: np.random.Generator, count: int, classes: int = CLASSES) -> list[MaskTarget]:
    """Rectangles of classes on class 0, with an unlabelled stripe."""
    found = []
    for _ in range(count):
        mask = np.zeros(SIZE, np.int16)
        for _ in range(3):
            top, left = random.integers(0, SIZE[0] - 12), random.integers(0, SIZE[1] - 12)
            mask[top : top + random.integers(6, 30), left : left + random.integers(6, 30)] = random.integers(1, classes)
        mask[:, :2] = -1
        found.append(MaskTarget(mask))
    return found


def scores(random, targets, noise: float, classes: int = CLASSES) -> np.ndarray:
    """Class scores [N, K, h, w]: right where ``noise`` does not overrule it."""
    true = np.stack([np.maximum(target.classes, 0) for target in targets])
    clean = (np.arange(classes)[:, None, None] == true[:, None]).astype(np.float32)
    return clean + noise * random.normal(size=clean.shape).astype(np.float32)


def answers(found: np.ndarray, targets, batch: int = 8, **images):
    return TASK.answers(network(masks=found), Images(targets, **images), batch)


@pytest.fixture
def torchmetrics():
    """It imports torchvision, which beside a CPU-only PyTorch needs two operators declared first."""
    import_timm()
    return importlib.import_module("torchmetrics.functional")


@pytest.mark.parametrize("classes", [5, 9])  # of nine, four are never there
def test_the_point_values_are_those_of_torchmetrics(classes, torchmetrics):
    random = np.random.default_rng(0)
    known = masks(random, 20)
    found = scores(random, known, 0.5, classes)
    found[:, 5:] -= 9.0
    got = TASK.compare(answers(found, known), answers(found, known))
    true = torch.tensor(np.stack([target.classes for target in known]).astype(np.int64))
    said = torch.tensor(found.argmax(1))
    settings = {"num_classes": classes, "ignore_index": -1, "average": "macro"}
    assert got.candidate["mIoU"] == pytest.approx(
        float(torchmetrics.classification.multiclass_jaccard_index(said, true, **settings)), abs=1e-6
    )
    assert got.candidate["Dice"] == pytest.approx(
        float(torchmetrics.classification.multiclass_f1_score(said, true, **settings)), abs=1e-6
    )
    assert 0.3 < got.candidate["mIoU"] < got.candidate["Dice"] < 1


def test_coarse_scores_are_interpolated_as_by_torch():
    random = np.random.default_rng(1)
    for small in ((12, 16), (24, 32), (1, 1), (48, 64)):
        coarse = random.normal(size=(4, *small)).astype(np.float32)
        large = torch.nn.functional.interpolate(torch.tensor(coarse)[None], size=SIZE, mode="bilinear")[0].numpy()
        np.testing.assert_allclose(map_at(coarse[0], SIZE), large[0], atol=1e-5)
        assert (classes_at(coarse, SIZE) == large.argmax(0)).mean() > 0.999
    known = masks(random, 3)
    assert answers(scores(random, known, 0.1)[:, :, ::4, ::4], known).maps.shape == (3, *SIZE)


def test_a_comparison_and_its_verdicts():
    random = np.random.default_rng(2)
    known = masks(random, 80)
    clean = scores(random, known, 0.35)
    first = answers(clean, known)
    second = answers(clean + 0.1 * random.normal(size=clean.shape).astype(np.float32), known)
    got = TASK.compare(first, second)
    assert got.interval[0] < got.drop < got.interval[1]
    assert got.drop == pytest.approx(100 * (got.reference["mIoU"] - got.candidate["mIoU"]))
    assert 0.9 < got.agreement < 1
    assert 10 < got.sqnr_db < 30
    assert judge(got, 50.0).reason.startswith("the mIoU drop is ")
    assert judge(got, 50.0).kind is VerdictKind.ACCEPTED
    assert judge(got, 0.0).kind is VerdictKind.REJECTED
    copy = TASK.compare(first, first)
    assert (copy.drop, copy.agreement) == (0.0, 1.0)
    assert judge(copy, 1.0).kind is VerdictKind.UNDECIDED
    few = TASK.compare(first.first(20), second.first(20))
    assert few.images == 20
    assert few.interval[1] - few.interval[0] > got.interval[1] - got.interval[0]


def test_answering_the_commonest_class_everywhere_is_worth_nothing():
    random = np.random.default_rng(3)
    known = masks(random, 30)
    always = np.zeros((30, CLASSES, *SIZE), np.float32)
    always[:, 0] = 1
    verdict = judge(TASK.compare(answers(always, known), answers(always, known)), 50.0)
    assert verdict.kind is VerdictKind.UNDECIDED
    assert verdict.chance_level
    assert "commonest class" in verdict.reason


def test_nan_class_maps_and_files(tmp_path):
    random = np.random.default_rng(4)
    known = masks(random, 12)
    found = scores(random, known, 0.2)
    first = answers(found, known)
    broken = found.copy()
    broken[3, 0, 0, 0] = np.inf
    second = answers(broken, known)
    verdict = judge(TASK.compare(first, second), 100.0)
    assert verdict.kind is VerdictKind.REJECTED
    assert "1 of 12 images" in verdict.reason
    numbers = answers(found.argmax(1), known, classes=CLASSES)  # int64 [B, h, w]
    assert TASK.compare(first, numbers).drop == 0.0
    first.save(tmp_path / "a b.npz")
    again = TASK.load((tmp_path / "a b.npz").read_bytes(), "a.npz")
    assert again.maps.dtype == np.int16
    assert TASK.compare(again, second).to_json() == TASK.compare(first, second).to_json()
    rows = TASK.changed(first, second)
    assert [row["index"] for row in rows] == [3]
    assert rows[0]["outcome"] == "lost"
    np.testing.assert_array_equal(TASK.drawing(first, 3)["mask"], first.maps[3])


@pytest.mark.parametrize(
    ("outputs", "options", "said"),
    [
        ({"a": (5, 48, 64), "b": (5, 48, 64)}, {}, r"a \[1, 5, 48, 64\], b"),
        ({"a": (5, 48, 64), "b": (5, 48, 64)}, {"output": "c"}, "none of them is c"),
        ({"a": (5,)}, {}, r"a \[1, 5\]"),
        ({"a": (5, 20, 64)}, {}, "for images of 48 x 64"),
        ({"a": (1, 48, 64)}, {}, "two or more classes"),
        ({"a": (24, 32)}, {}, "at the input's size"),
        ({"a": (3, 48, 64)}, {}, "class 4, but the network knows classes 0 to 2"),
        ({"a": (48, 64)}, {}, "no class numbers"),
    ],
)
def test_outputs_that_are_no_masks(outputs, options, said):
    known = [MaskTarget(np.full(SIZE, 4, np.int16))]
    run = network(**{name: np.full((1, *shape), 0.5, np.float32) for name, shape in outputs.items()})
    with pytest.raises(ResvitError) as raised:
        task_named("segmentation", options).answers(run, Images(known), 1)
    import re

    assert re.search(said, f"{raised.value} {raised.value.fix}")


def test_data_without_masks():
    run = network(masks=np.zeros((1, 3, *SIZE), np.float32))
    box = BoxTarget(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    with pytest.raises(ResvitError, match="needs masks for every image, and the data has boxes"):
        TASK.answers(run, Images([box]), 1)
    blank = answers(np.zeros((2, 3, *SIZE), np.float32), [MaskTarget(np.full(SIZE, -1, np.int16))] * 2)
    with pytest.raises(ResvitError, match="No pixel"):
        TASK.compare(blank, blank)


def test_memory_is_bounded():
    assert step_for(100, (512, 512)) == 1
    step = step_for(5000, (1024, 1024))
    assert 5000 * (1024 // step) ** 2 * 2 <= 256 << 20
    outputs = {"a": np.ones((3, 10, 100), np.float16), "b": np.ones((3, 7), np.int64)}
    raw = joined_raw([raw_of(outputs, 3, before, 4, 4000) for before in (0, 3, 6)])
    assert list(raw.outputs) == ["a"]
    assert raw.outputs["a"].shape == (4, 250)
