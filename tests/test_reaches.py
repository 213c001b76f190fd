"""Errors by reach are those of each grid by itself, and what was worked out of statistics is let go with them."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from resvit_calibrate.ranges.channels import channel_error, shift_error
from resvit_calibrate.ranges.known import digest_of, known
from resvit_calibrate.ranges.reaches import ReachErrors
from test_channels import laws, seen


def values(unit: float = 1.0) -> np.ndarray:
    x = np.stack([*laws(np.random.default_rng(2), 20_000).values()], axis=1)
    return (x / np.abs(x).max(axis=0) * 2.0 ** -np.arange(6) * unit).astype(np.float32)


@pytest.mark.parametrize("unit", [2.0**-70, 1.0, 3.0e30])
@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int8", 5), ("fp8", 8)])
def test_a_table_tells_what_each_grid_costs(precision: str, bits: int, unit: float) -> None:
    x = values(unit)
    scale = np.abs(x).max(axis=0).astype(np.float64) * np.linspace(1.0, 1.3, 6)
    clips = np.geomspace(0.02, 3.0, 150)
    table = ReachErrors(seen(x), precision, bits)
    for order in (slice(70, 90), slice(None), slice(None, None, -7)):  # it grows on both sides
        found = table(clips[order, None] * scale)
        alone = channel_error(seen(x), clips[order], precision, scale, bits, parts=2)
        assert found.shape == alone.shape
        ratio = found / alone
        assert abs(ratio.mean() - 1.0) < 0.005
        assert ratio.min() > 0.9
        assert ratio.max() < 1.5  # where a range just begins to cut what is evenly spread
    with pytest.raises(ValueError, match="reaches"):
        table(np.zeros((1, 6)))


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_the_error_behind_a_shift_is_that_of_drawn_values(share: float) -> None:
    x = np.random.default_rng(0).standard_normal((20_000, 8)).astype(np.float32)
    gelu = (x / (1.0 + np.exp(-1.702 * x)) * np.linspace(0.5, 2.0, 8)).astype(np.float32)
    low = float(-gelu.min())
    upper, lower = np.maximum(gelu.max(axis=0) * share, low), np.maximum(-low, -np.abs(gelu).max(axis=0))
    centre, clip = (upper + lower) / 2.0, float((upper - lower).max()) / 2.0
    moved = gelu - centre
    back = np.clip(np.rint(moved / clip * 127), -127, 127) / 127 * clip
    true = np.square(back - moved).mean(axis=0)
    assert shift_error(seen(gelu), centre, low, 1.0, clip).sum() == pytest.approx(true.sum(), rel=0.2)


def test_what_was_worked_out_is_asked_once_and_let_go() -> None:
    statistics = seen(values())
    asked: list[int] = []

    def work_out() -> int:
        asked.append(1)
        return len(asked)

    keys = [("a", digest_of(np.ones(3))), ("a", digest_of(np.zeros(3))), ("a", digest_of(np.ones(3)))]
    assert [known(statistics, key, work_out) for key in keys] == [1, 2, 1]
    shadow = weakref.ref(statistics)
    del statistics
    gc.collect()
    assert shadow() is None
