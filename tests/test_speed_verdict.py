"""The verdict's second half: faster than FP16, not faster, or not known, and by what evidence."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.costs import CostModel, Prediction
from resvit_engines.targets.layer_work import LayerKind, LayerWork, Read
from resvit_engines.targets.speed_verdict import (
    Evidence,
    SpeedKind,
    SpeedVerdict,
    judge_speed,
    measured_floats,
    measured_speed,
)
from resvit_engines.targets.table import Precision, find_target
from resvit_export.api import Built
from resvit_export.recipe.recipe import Recipe
from resvit_export.refusals import require_gain

FASTER, NOT_FASTER, NOT_KNOWN = SpeedKind.FASTER, SpeedKind.NOT_FASTER, SpeedKind.NOT_KNOWN


def predictions(target: str, macs: int = 4_000_000_000) -> tuple[Prediction, Prediction]:
    """Two convolutions in FP16 and in INT8."""
    works = [LayerWork("cast", LayerKind.POINTWISE, (Read("x", 64),), "t0", 64)]
    for index in range(2):
        read = (Read(f"t{index}", 64, follows=True),)
        works.append(LayerWork(f"c{index}", LayerKind.CONV, read, f"t{index + 1}", 64, macs, 64, nodes=(f"c{index}",)))
    costs = CostModel(works, find_target(target))
    return costs.predict({}), costs.predict({"c0": Precision.INT8, "c1": Precision.INT8})


def speed_of(target: str, gain: float, measured: str = "") -> SpeedVerdict:
    """The verdict where INT8 is ``gain`` times as fast; layers whose names begin with ``measured`` were timed."""
    fp16, int8 = predictions(target)
    scale = fp16.total_us / int8.total_us / gain
    layers = tuple(
        dataclasses.replace(
            layer, total_us=layer.total_us * scale, measured=bool(measured) and layer.name.startswith(measured)
        )
        for layer in int8.layers
    )
    return judge_speed(fp16, dataclasses.replace(int8, layers=layers), find_target(target))


@pytest.mark.parametrize(
    ("gain", "kind", "words"),
    [
        (1.3, FASTER, "1.30 times as fast as FP16"), (1.1, NOT_KNOWN, "15% off, so time both"),
        (0.95, NOT_KNOWN, "15% off, so time both"), (0.8, NOT_FASTER, "build with --precision fp16"),
    ],
)  # fmt: skip
def test_rules_that_may_be_off_decide_nothing_within_it(gain: float, kind: SpeedKind, words: str) -> None:
    speed = speed_of("h100", gain)
    assert (round(speed.gain, 6), speed.kind, speed.evidence) == (gain, kind, Evidence.RULES)
    assert words in speed.sentence
    assert ("--precision fp16" in speed.sentence) is (kind is NOT_FASTER)
    assert speed.evidence.value in speed.headline


def test_what_a_prediction_counts_that_an_engines_list_has_inside_attention_is_said() -> None:
    fp16, int8 = predictions("h100")
    said = "with the copies of packed queries, keys and values"
    assert said not in judge_speed(fp16, int8, find_target("h100")).sentence
    packed = dataclasses.replace(int8.layers[0], kind=LayerKind.ATTENTION, kernels=2)
    layers = (packed, *int8.layers[1:])
    assert said in judge_speed(fp16, dataclasses.replace(int8, layers=layers), find_target("h100")).sentence


@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0])
def test_what_no_engine_was_held_to_decides_nothing(gain: float) -> None:
    speed = speed_of("rtx-4090", gain)
    assert (speed.kind, speed.evidence, speed.off_by) == (NOT_KNOWN, Evidence.PEAKS, None)
    assert "no engine was ever held to this, so time both" in speed.headline


def test_times_of_the_device_decide_and_some_of_them_do_not() -> None:
    assert [speed_of("rtx-4090", gain, "c").kind for gain in (1.1, 1.01, 0.9)] == [FASTER, NOT_FASTER, NOT_FASTER]
    some = [speed_of("h100", gain, "c0") for gain in (1.1, 0.8)]
    assert [(speed.kind, speed.evidence) for speed in some] == [
        (NOT_KNOWN, Evidence.LAYER_TIMES), (NOT_FASTER, Evidence.LAYER_TIMES),
    ]  # fmt: skip


def test_a_network_without_8_bits_is_what_it_is() -> None:
    fp16, _ = predictions("h100")
    speed = judge_speed(fp16, fp16, find_target("h100"))
    assert (speed.kind, speed.gain, speed.evidence) == (SpeedKind.FP16_ITSELF, 1.0, Evidence.SAME)
    asked = speed.for_wish(Precision.FP16)
    assert (asked.kind, asked.to_json()["speed"]) == (SpeedKind.FP16_ITSELF, "FP16 itself")
    assert asked.headline.startswith("FP16, predicted ")
    instead = speed.for_wish(Precision.INT8)
    assert instead.kind is NOT_FASTER
    assert instead.headline.startswith("What ships is FP16: predicted ")
    for verdict in (speed_of("h100", 1.3), speed_of("h100", 0.8)):
        assert verdict.for_wish(Precision.INT8) is verdict


def test_fixed_cost_is_named_where_it_is_most_of_the_time() -> None:
    fp16, int8 = predictions("jetson-orin", macs=10)
    speed = judge_speed(fp16, int8, find_target("jetson-orin"))
    fixed = sum(layer.fixed_us for layer in fp16.layers) / 1e3
    assert f"{fixed:.3f} ms of FP16's are the fixed cost of kernels" in speed.sentence


@pytest.mark.parametrize(
    "recipe",
    [Recipe(even_if_slower=True), Recipe(precision="fp16"), Recipe(latency_budget="1x")],  # type: ignore[arg-type]
)
def test_a_build_that_gains_nothing_is_refused_unless_it_insists(recipe: Recipe) -> None:
    require_gain(speed_of("h100", 0.95), Recipe())
    require_gain(speed_of("rtx-4090", 0.5), Recipe())
    require_gain(speed_of("h100", 0.8), recipe)
    with pytest.raises(ResvitError, match=r"INT8 is predicted 0\.80 times as fast as FP16") as refused:
        require_gain(speed_of("h100", 0.8), Recipe())
    assert refused.value.code is ExitCode.NOT_FASTER
    assert "--even-if-slower" in refused.value.fix


@pytest.mark.parametrize(
    ("gain", "accuracy", "recipe", "code"),
    [
        (1.3, ExitCode.OK, Recipe(), ExitCode.OK),
        (1.0, ExitCode.OK, Recipe(), ExitCode.OK),
        (0.8, ExitCode.OK, Recipe(), ExitCode.NOT_FASTER),
        (0.8, ExitCode.OK, Recipe(even_if_slower=True), ExitCode.OK),
        (0.8, ExitCode.OK, Recipe(precision="fp16"), ExitCode.OK),  # type: ignore[arg-type]
        (0.8, ExitCode.UNDECIDED, Recipe(), ExitCode.UNDECIDED),
        (0.8, ExitCode.REJECTED, Recipe(allow_rejected=True), ExitCode.NOT_FASTER),
    ],
)
def test_both_halves_are_in_the_exit_code(gain: float, accuracy: ExitCode, recipe: Recipe, code: ExitCode) -> None:
    verdict = SimpleNamespace(verdict=SimpleNamespace(verdict=SimpleNamespace(exit_code=accuracy)))
    pipeline: Any = SimpleNamespace(recipe=recipe, validated=verdict, speed=speed_of("h100", gain))
    assert Built(pipeline, (), report=None).exit_code is code  # type: ignore[arg-type]


@pytest.mark.parametrize(("gain", "kind"), [(1.5, SpeedKind.FASTER), (1.0, SpeedKind.NOT_FASTER)])
def test_where_both_engines_were_timed_that_decides(gain: float, kind: SpeedKind) -> None:
    found = measured_speed(gain, f"{gain:.2f}x [0.99, 1.60]", (2.0, 2.0 * gain), "INT8", find_target("cpu"))
    assert (found.kind, found.evidence) == (kind, Evidence.ENGINES)
    assert f"INT8 was measured {gain:.2f}x" in found.headline
    assert "as fast as FP32" in found.headline


@pytest.mark.parametrize("target", ["cpu", "jetson-orin"])
def test_what_ended_in_floats_was_measured_and_says_so(target: str) -> None:
    row = find_target(target)
    floats = row.float_precision.value.upper()
    found = measured_floats("0.80x [0.78, 0.82]", (2.5, 2.0), "INT8", row)
    assert (found.kind, found.gain, found.evidence, found.faster) == (NOT_FASTER, 1.0, Evidence.ENGINES, False)
    assert found.headline == (
        f"measured, so {floats} ships: the fastest in INT8 is 0.80x [0.78, 0.82] as fast (2.500 against 2.000 ms)"
    )
    assert "gains and is accepted" in measured_floats("", None, "INT8", row).headline
