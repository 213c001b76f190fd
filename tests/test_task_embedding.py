from __future__ import annotations

import numpy as np
import pytest

from resvit_calibrate.gate.gate import VerdictKind, judge
from resvit_calibrate.tasks.kinds import kind_of, task_named
from resvit_engines.errors import ResvitError
from task_images import Images, network

CLASSES, WIDTH = 8, 16


def embedded(count: int = 160, spread: float = 0.3, noise: float = 0.0):
    """Vectors around one centre a class, of any length; the same ones with noise."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, count)
    centres = random.normal(size=(CLASSES, WIDTH))
    vectors = centres[labels] + spread * random.normal(size=(count, WIDTH))
    vectors = vectors * random.uniform(0.1, 10, (count, 1))
    noisy = vectors + noise * np.abs(vectors) * random.normal(size=vectors.shape)
    return noisy.astype(np.float32), Images(None, labels=labels)


def answers(vectors: np.ndarray, images: Images, **options: object):
    return task_named("embedding", options).answers(network(embedding=vectors), images, 16)


def brute_recall(vectors: np.ndarray, labels: np.ndarray, depth: int) -> float:
    """Recall by loops over all pairs."""
    right = []
    for i, query in enumerate(vectors):
        if (labels == labels[i]).sum() < 2:
            continue
        cosines = [
            -np.inf if j == i else query @ other / np.linalg.norm(query) / np.linalg.norm(other)
            for j, other in enumerate(vectors.astype(np.float64))
        ]
        right.append(labels[i] in labels[np.argsort(cosines)[::-1][:depth]])
    return float(np.mean(right))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_recall_is_that_of_all_pairs(spread):
    vectors, images = embedded(60, spread)
    task = task_named("embedding", {})
    mine = answers(vectors, images)
    got = task.compare(mine, mine)
    assert got.reference["recall@1"] == pytest.approx(brute_recall(vectors, images.known, 1))
    assert got.reference["recall@5"] == pytest.approx(brute_recall(vectors, images.known, 5))
    assert got.drop == 0.0
    assert got.candidate["mean cosine distance"] == pytest.approx(0.0, abs=1e-6)


def test_the_gate_judges_the_fall_of_recall(tmp_path):
    task = task_named("embedding", {})
    clean, little, much = (answers(*embedded(noise=noise)) for noise in (0.0, 0.05, 5.0))
    near, far = task.compare(clean, little), task.compare(clean, much)
    assert judge(near, 5.0).kind is VerdictKind.ACCEPTED
    assert judge(far, 5.0).kind is VerdictKind.REJECTED
    assert near.agreement > far.agreement
    assert far.candidate["mean cosine distance"] > near.candidate["mean cosine distance"] > 0
    rows = task.changed(clean, much)
    assert {row["outcome"] for row in rows} <= {"lost", "gained"}
    assert len(rows) == far.worse + far.better
    clean.save(tmp_path / "a.npz")
    assert task.compare(task.load((tmp_path / "a.npz").read_bytes(), "a.npz"), much).to_json() == far.to_json()


def test_a_gallery_of_the_float_network_is_another_question():
    """All candidates turned by the same rotation find each other as before, and nothing of the float network's."""
    vectors, images = embedded(spread=0.2)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    task = task_named("embedding", {})
    got = task.compare(answers(vectors, images), answers(vectors @ rotation, images))
    assert got.candidate["recall@1"] > 0.95
    assert got.candidate["recall@1 in the float gallery"] < 0.5


@pytest.mark.parametrize("constant", ["float", "quantised"])
def test_embeddings_that_are_all_equal(constant):
    vectors, images = embedded()
    same = np.repeat(vectors[:1], len(vectors), axis=0)
    pair = (same, same) if constant == "float" else (vectors, same)
    first, second = (answers(each, images) for each in pair)
    verdict = judge(task_named("embedding", {}).compare(first, second), 5.0)
    assert "the same embedding for every" in verdict.reason
    assert verdict.kind is (VerdictKind.UNDECIDED if constant == "float" else VerdictKind.REJECTED)


def test_random_embeddings_are_no_baseline():
    vectors, images = embedded(spread=100.0)
    mine = answers(vectors, images)
    verdict = judge(task_named("embedding", {}).compare(mine, mine), 5.0)
    assert verdict.kind is VerdictKind.UNDECIDED
    assert "not clearly better than picking one at random" in verdict.reason


def test_nan_is_rejected():
    vectors, images = embedded()
    broken = vectors.copy()
    broken[3, 2] = np.nan
    task = task_named("embedding", {})
    assert judge(task.compare(answers(vectors, images), answers(broken, images)), 50.0).kind is VerdictKind.REJECTED
    with pytest.raises(ResvitError, match="reference network gives NaN"):
        task.compare(answers(broken, images), answers(vectors, images))


def test_what_cannot_be_asked():
    vectors, images = embedded(8)
    with pytest.raises(ResvitError, match="have no labels"):
        answers(vectors, Images(None, count=8))
    with pytest.raises(ResvitError, match="No class has two images"):
        answers(vectors, Images(None, labels=np.arange(8)))
    with pytest.raises(ResvitError, match=r"is an output \[B, D\]"):
        task_named("embedding", {}).answers(network(tokens=np.zeros((8, 4, 16), np.float32)), images, 4)
    with pytest.raises(ResvitError, match="called b"):
        answers(vectors, images, output="b")


def test_pooled_maps_and_one_of_several_outputs():
    vectors, images = embedded()
    outputs = {"pooled": vectors[:, :, None, None], "logits": np.zeros((len(vectors), 4), np.float32)}
    task = task_named("embedding", {"output": "pooled"})
    mine = task.answers(network(**outputs), images, 16)
    assert np.array_equal(mine.vectors, vectors)
    assert kind_of([{"name": "pooled", "shape": [1, 16, 1, 1]}], "classification") == "classification"


def test_zeros_are_no_distance_apart_and_said():
    random = np.random.default_rng(0)
    labels = random.integers(0, 8, 160)
    vectors = (random.normal(size=(8, 16))[labels] + 0.3 * random.normal(size=(160, 16))).astype(np.float32)
    zeros = vectors.copy()
    zeros[:40] = 0
    task, images = task_named("embedding", {}), Images(None, labels=labels)
    clean, part = (task.answers(network(embedding=value), images, 16) for value in (vectors, zeros))
    same = task.compare(part, part)
    assert same.candidate["mean cosine distance"] == pytest.approx(0.0, abs=1e-6)
    assert "gives zeros for 40 images" in same.caveat
    assert task.compare(clean, part).candidate["mean cosine distance"] == pytest.approx(0.25, abs=1e-6)
    assert task.compare(clean, part).caveat == ""
