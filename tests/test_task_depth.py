from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from resvit_calibrate.gate.gate import VerdictKind, judge
from resvit_calibrate.images.targets import DepthTarget, MaskTarget
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.errors import ResvitError
from resvit_export.loading.libraries import import_timm
from task_images import SIZE, Images, network

TASK = task_named("depth", {})


def depths(random: np.random.Generator, count: int) -> list[DepthTarget]:
    found = []
    for _ in range(count):
        far = random.uniform(2, 20)
        depth = np.linspace(1, far, SIZE[0])[:, None] * random.uniform(0.8, 1.2, SIZE)
        depth[random.random(SIZE) < 0.2] = 0  # unknown
        found.append(DepthTarget(depth.astype(np.float32)))
    return found


def guesses(random, known, noise: float) -> np.ndarray:
    true = np.stack([np.where(target.depth > 0, target.depth, 5.0) for target in known])
    return (true * np.exp(noise * random.normal(size=true.shape))).astype(np.float32)


def answers(found, known, task=TASK):
    return task.answers(network(depth=found), Images(known), 8)


@pytest.fixture
def torchmetrics():
    """It imports torchvision, which beside a CPU-only PyTorch needs two operators declared first."""
    import_timm()
    return importlib.import_module("torchmetrics.functional")


@pytest.mark.whole
def test_the_point_values_are_means_over_images_of_those_of_torchmetrics(torchmetrics):
    random = np.random.default_rng(0)
    known = depths(random, 15)
    found = guesses(random, known, 0.2)
    got = TASK.compare(answers(found, known), answers(found[:, None], known))
    errors, near = [], []
    for one, target in zip(found, known, strict=True):
        there = target.depth > 0
        said, true = torch.tensor(one[there]), torch.tensor(target.depth[there])
        errors.append(float(torchmetrics.mean_absolute_percentage_error(said, true)))
        near.append(float((torch.maximum(said / true, true / said) < 1.25).float().mean()))
    assert got.candidate["AbsRel"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert got.candidate["delta 1"] == pytest.approx(np.mean(near), rel=1e-6)
    assert (got.drop, got.agreement) == (0.0, 1.0)


def test_a_comparison_and_its_verdicts(tmp_path):
    random = np.random.default_rng(1)
    known = depths(random, 60)
    clean = guesses(random, known, 0.1)
    first, second = answers(clean, known), answers(clean * np.exp(0.02 * random.normal(size=clean.shape)), known)
    got = TASK.compare(first, second)
    low, high = got.interval
    assert low < got.drop < high
    assert got.drop == pytest.approx(100 * (got.candidate["AbsRel"] - got.reference["AbsRel"]))
    assert got.drop > 0
    assert 0.9 < got.agreement < 1
    verdict = judge(got, 1.0)
    assert verdict.kind is VerdictKind.ACCEPTED
    assert verdict.reason.startswith(f"the AbsRel drop is {got.drop:.2f} points, between {low:.2f}")
    far = TASK.compare(first, answers(clean * 1.5, known))
    assert judge(far, 1.0).kind is VerdictKind.REJECTED
    assert len(TASK.changed(first, answers(clean * 1.5, known))) == 60
    first.save(tmp_path / "a.npz")
    assert TASK.compare(TASK.load((tmp_path / "a.npz").read_bytes(), "a.npz"), second).to_json() == got.to_json()
    assert TASK.compare(first.first(9), second.first(9)).images == 9
    assert TASK.drawing(first, 2)["depth"].shape == SIZE


def test_one_depth_everywhere_is_worth_nothing():
    known = depths(np.random.default_rng(2), 30)
    flat = answers(np.full((30, *SIZE), 4.0, np.float32), known)
    verdict = judge(TASK.compare(flat, flat), 50.0)
    assert verdict.chance_level
    assert "one depth everywhere" in verdict.reason


def test_relative_and_inverted_depths():
    random = np.random.default_rng(3)
    known = depths(random, 20)
    clean = guesses(random, known, 0.05)
    plain = answers(clean, known)
    scaled = task_named("depth", {"align": "median"})
    np.testing.assert_allclose(answers(clean * 7, known, scaled).abs_rel, answers(clean, known, scaled).abs_rel, 1e-4)
    inverted = task_named("depth", {"inverted": True})
    np.testing.assert_allclose(answers(1 / clean, known, inverted).abs_rel, plain.abs_rel, 1e-4)
    coarse = answers(clean[:, ::2, ::2], known)
    assert coarse.maps.shape == plain.maps.shape


def test_what_cannot_be_measured():
    random = np.random.default_rng(4)
    known = depths(random, 6)
    clean = guesses(random, known, 0.05)
    broken = clean.copy()
    broken[0, 0, 0] = np.nan
    first, second = answers(clean, known), answers(broken, known)
    assert "1 of 6 images" in judge(TASK.compare(first, second), 100.0).reason
    with pytest.raises(ResvitError, match="1 of 6"):
        TASK.compare(second, first)
    with pytest.raises(ResvitError, match="known depth"):
        answers(clean[:1], [DepthTarget(np.zeros(SIZE, np.float32))])
    blank = answers(clean[:2], [known[0], DepthTarget(np.zeros(SIZE, np.float32))])
    assert TASK.compare(blank, blank).candidate["AbsRel"] == pytest.approx(first.abs_rel[0])
    with pytest.raises(ResvitError, match="depths for every image, and the data has masks"):
        answers(clean[:1], [MaskTarget(np.zeros(SIZE, np.int16))])
    with pytest.raises(ResvitError, match=r"the network has a \[1, 3, 48, 64\]"):
        TASK.answers(network(a=np.zeros((1, 3, *SIZE), np.float32)), Images(known[:1]), 1)
    with pytest.raises(ResvitError, match="align"):
        task_named("depth", {"align": "affine"})
