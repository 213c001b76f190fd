"""One rule says what part of outputs is signal: for the gate, the check on held-back images and the diagnosis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantize_graphs import offset_convolutions, ranges_of
from resvit_calibrate.answers.apart import by_image, shared_of
from resvit_calibrate.answers.raw import Raw
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_calibrate.tasks.nearness import noise_shares
from resvit_engines.targets.table import Precision
from resvit_quantize.check.judge import Judge
from resvit_quantize.quantize import quantize_model
from resvit_quantize.sensitivity.own_noise import own_noise
from resvit_quantize.settings import QuantizeSettings


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("few", [2, 4, 20])
def test_a_mean_of_few_images_gives_the_energy_that_the_mean_of_all_would(offset: float, few: int) -> None:
    within, others = [], []
    for values in np.random.default_rng(0).normal(size=(1000, few + 20, 10)) + offset:
        shared = shared_of(values[:few])
        within.append(shared.signal(values[:few], shared.members).mean())
        others.append(shared.signal(values[few:]).mean())
    assert np.mean(within) == pytest.approx(10.0, rel=0.05)
    assert np.mean(others) == pytest.approx(10.0, rel=0.05)


def test_one_image_of_far_more_energy_takes_no_part_in_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=(40, 10))
    values[7] = 1e4
    shared = shared_of(values)
    assert not shared.members[7]
    assert np.delete(shared.signal(values, shared.members), 7).max() < 40.0


def test_where_nothing_differs_or_nothing_is_finite_the_whole_energy_counts() -> None:
    same = np.full((8, 5), 3.0) + 1e-6 * np.random.default_rng(0).normal(size=(8, 5))
    assert shared_of(same).constant
    assert shared_of(same).signal(same) == pytest.approx(45.0, rel=1e-4)
    one = shared_of(same[:1])
    assert (one.mean, one.constant) == (None, False)
    broken = shared_of(np.where(np.arange(8)[:, None] == 2, np.nan, same))
    assert (broken.mean, broken.constant) == (None, False)
    assert shared_of(np.arange(10.0).reshape(2, 5)).signal(np.ones((3, 4))) == pytest.approx(4.0)


def test_outputs_without_the_axis_of_the_images_are_not_told_apart() -> None:
    assert by_image(np.float32(1.0).reshape(()), 1) is None
    assert by_image(np.ones((3, 2), np.float32), 4) is None
    rows = by_image(np.ones((4, 2, 3), np.float16), 4)
    assert rows is not None
    assert (rows.shape, rows.dtype) == ((4, 6), np.float64)


def test_the_gate_the_check_and_the_diagnosis_measure_the_same(tmp_path: Path) -> None:
    path = offset_convolutions(tmp_path / "float.onnx")
    images, out = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32), tmp_path / "int8.onnx"
    quantize_model(path, ranges_of(path, images), QuantizeSettings(Precision.INT8, Estimator.MAX), out)
    expected, found = onnx_runner(path)({"input": images}), onnx_runner(out)({"input": images})
    told, whole = (own_noise(path, out, Precision.INT8, {"input": images}, apart=each) for each in (True, False))
    checked = Judge(path, [{"input": images}]).against(0, found)
    gate, _ = noise_shares(*(Raw({n: v.reshape(4, -1) for n, v in each.items()}) for each in (expected, found)))
    noise = sum(np.square(v.astype(np.float64) - found[n]).sum() for n, v in expected.items())
    assert told is not None
    assert whole is not None
    # Its session is one that measures every place, and rounds otherwise here and there.
    assert told.outputs_db == pytest.approx(checked.sqnr_db, abs=0.1)
    energy = sum(np.square(v.astype(np.float64)).sum() for v in expected.values())
    lost = 10 * np.log10(energy / checked.signal.sum())
    assert whole.outputs_db - told.outputs_db == pytest.approx(lost, abs=1e-6)
    assert lost > 10
    # The gate's shares are of each image, and an image that is near the others counts as the mean does.
    assert gate[:, 0] == pytest.approx(checked.noise[:, 0] / checked.signal[:, 0].clip(min=checked.signal.mean()))
    assert checked.noise.sum() == pytest.approx(noise)
