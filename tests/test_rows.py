"""Answers that are sets: rows are paired before they are compared, and a wrong network still differs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from resvit_calibrate.runtime.parity import differences, flat_differences
from resvit_engines.rows import EDGE, paired_rows


def answers(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "logits": random.standard_normal((2, 100, 7), dtype=np.float32),
        "pred_boxes": random.random((2, 100, 4), dtype=np.float32),
    }


def shuffled(found: dict[str, np.ndarray], seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    order = np.stack([random.permutation(100) for _ in range(2)])
    return {name: np.take_along_axis(value, order[..., None], 1) for name, value in found.items()}


def test_another_order_is_the_same_answer() -> None:
    true = answers()
    for name, value in paired_rows(true, shuffled(true)).items():
        np.testing.assert_array_equal(value, true[name])


def test_rows_are_paired_jointly() -> None:
    true = answers()
    true["logits"][:] = 0.0  # alone, no row could be told from another
    paired = paired_rows(true, shuffled(true))
    np.testing.assert_array_equal(paired["pred_boxes"], true["pred_boxes"])


def test_the_edge_of_the_selection_may_differ_and_no_more() -> None:
    true = answers()
    few, many = (shuffled(true) for _ in range(2))
    few["logits"][:, : int(EDGE * 100)] += 9.0
    many["logits"][:, : int(EDGE * 100) + 3] += 9.0
    np.testing.assert_array_equal(paired_rows(true, few)["logits"], true["logits"])
    assert np.abs(paired_rows(true, many)["logits"] - true["logits"]).max() > 1.0


def test_a_wrong_network_stays_wrong() -> None:
    true, other = answers(), answers(5)
    paired = paired_rows(true, other)
    assert np.linalg.norm(paired["logits"] - true["logits"]) > 0.5 * np.linalg.norm(true["logits"])


@pytest.mark.parametrize("shape", [(2, 5), (3, 100, 7), (2, 99, 7)])
def test_other_shapes_come_back_as_they_are(shape: tuple[int, ...]) -> None:
    found = {"logits": np.ones(shape, np.float32)}
    assert paired_rows({"logits": np.zeros((2, 100, 7), np.float32)}, found)["logits"] is found["logits"]


def test_parity_allows_for_rounding_and_for_nothing_else() -> None:
    feeds = {"input": np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)}

    def steep(arrays: dict) -> dict:
        # Rounding the input moves this output by far more than the plain tolerance.
        return {"output": np.sin(3e4 * arrays["input"].astype(np.float64)).astype(np.float32)}

    def nudged(arrays: dict) -> dict:
        return steep({"input": (arrays["input"] * np.float32(1 + 6e-8)).astype(np.float32)})

    def wrong(arrays: dict) -> dict:
        return {"output": steep(arrays)["output"] + np.float32(0.05)}

    allowed = differences(steep, nudged, feeds)["output"]
    assert allowed.error > 1e-4
    assert allowed.same
    assert not differences(steep, wrong, feeds)["output"].same
    broken = differences(steep, lambda arrays: {"output": arrays["input"][:, :1]}, feeds)["output"]
    assert not broken.finite
    assert not broken.same


def test_a_network_that_rounding_throws_about_passes_with_no_translation() -> None:
    feeds = {"input": np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)}

    def chaotic(arrays: dict) -> dict:
        return {"output": np.sin(1e8 * arrays["input"].astype(np.float64)).astype(np.float32)}

    wrong = differences(chaotic, lambda arrays: {"output": -chaotic(arrays)["output"]}, feeds)["output"]
    assert wrong.allowed == pytest.approx(0.01 * wrong.largest)
    assert not wrong.same


def test_what_is_nearly_nothing_may_differ_by_units_of_one_where_rounding_moves_it_as_far() -> None:
    # A detector's map of an image with nothing on it, by a sigmoid that is exact to some units in the last place of 1.
    feeds = {"input": np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)}

    def near(shift: float, unit: float) -> Callable[[dict], dict]:
        return lambda arrays: {"output": unit * np.round(2.0 + np.sin(1e8 * arrays["input"] + shift))}

    assert differences(near(0.0, 6e-8), near(1.0, 6e-8), feeds)["output"].same
    assert not differences(near(0.0, 6e-6), near(1.0, 6e-6), feeds)["output"].same
    still = lambda arrays: {"output": 1e-7 * np.ones_like(arrays["input"])}  # noqa: E731
    moved = lambda arrays: {"output": 2e-7 * np.ones_like(arrays["input"])}  # noqa: E731
    assert not differences(still, moved, feeds)["output"].same


def test_parity_of_sets_does_not_see_their_order() -> None:
    true, feeds = answers(), {"input": np.zeros((2, 3, 4, 4), np.float32)}
    candidate = lambda _: shuffled(true)  # noqa: E731
    assert all(item.same for item in differences(lambda _: true, candidate, feeds, sets=True).values())
    assert not any(item.same for item in differences(lambda _: true, candidate, feeds).values())


def test_on_flat_images_what_rounding_decides_may_differ_and_what_is_lost_may_not() -> None:
    images = np.zeros((4, 3, 8, 8), np.float32)
    images[1], images[2, ..., 4:], images[3] = 1.0, 1.0, -2.0
    ones = np.ones(192, np.float32) / 192

    def mask(arrays: dict, threshold: float = -2.0) -> np.ndarray:
        # An image's mean is summed with rounding, and lies on the threshold where the image is flat.
        return np.where(arrays["input"].reshape(4, -1) @ ones > threshold, 5.0, -5.0)[:, None]

    def divided(arrays: dict, epsilon: float = 1e-3) -> np.ndarray:
        values = arrays["input"].reshape(4, -1).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return values / (np.abs(values) + epsilon)

    def network(arrays: dict) -> dict:
        return {"mask": mask(arrays), "ratio": divided(arrays)}

    by_rounding = lambda arrays: {"mask": mask(arrays, -2.0 - 3e-6), "ratio": divided(arrays)}  # noqa: E731
    assert (mask({"input": images}) != mask({"input": images}, -2.0 - 3e-6)).any()
    assert not flat_differences(network, by_rounding, {"input": images}).wrong
    for lost in (
        lambda arrays: {"mask": mask(arrays, 0.5), "ratio": divided(arrays)},
        lambda arrays: {"mask": mask(arrays), "ratio": divided(arrays, 0.0)},
        lambda arrays: {"mask": mask(arrays), "ratio": divided(arrays, 0.5)},
    ):
        assert flat_differences(network, lost, {"input": images}).wrong
