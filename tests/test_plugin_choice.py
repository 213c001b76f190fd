"""Whether kernels of our own are used: by wish, by measurement, or not, and always with a reason."""

from __future__ import annotations

import pytest

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.measure import results as measured
from resvit_engines.kernels.measure.results import Measured, measured_result
from resvit_engines.targets.choice import with_builder
from resvit_engines.targets.table import Builder, find_target
from resvit_export.recipe.recipe import Recipe
from resvit_export.to_tensorrt import plugin_choice as module
from resvit_export.to_tensorrt.plugin_choice import By, plugin_choice

ROW = Measured(87, "Jetson AGX Orin", "attention", "b1", 10.0, 20.0, "native")


def choose(target: str, builder: Builder | None = None, *, here: bool = False, **settings: str) -> module.PluginChoice:
    return plugin_choice(Recipe(**settings), with_builder(find_target(target), builder), here=here)


@pytest.mark.parametrize(
    ("target", "way"),
    [("jetson-orin", "library"), ("jetson-orin@7.2", "aot"), ("jetson-thor", "aot"), ("h100", "aot")],
)
def test_asked_for_they_reach_the_engine_as_its_tensorrt_can(target: str, way: str) -> None:
    choice = choose(target, plugins="on")
    assert (choice.by, choice.way) == (By.WISH, way)


def test_asked_for_where_the_builder_takes_none_they_are_refused_with_the_reason() -> None:
    with pytest.raises(ResvitError, match="TensorRT for RTX takes no plugins") as refused:
        choose("l4", Builder.RTX, plugins="on")
    assert refused.value.code is ExitCode.IMPOSSIBLE
    assert "--builder tensorrt" in refused.value.fix
    assert choose("l4", plugins="on") == module.PluginChoice(By.WISH, "aot", "--plugins on")


def test_off_is_off() -> None:
    assert choose("h100", here=True, plugins="off").by is By.NOTHING


def test_auto_measures_where_the_gpu_is() -> None:
    choice = choose("h100", here=True)
    assert (choice.by, choice.way) == (By.TIME, "aot")


def test_auto_elsewhere_goes_by_the_table_of_measured_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured_results", lambda: (ROW,))
    assert choose("jetson-orin").by is By.TABLE
    thor = choose("jetson-thor")
    assert thor.by is By.NOTHING
    assert "SM 11.0" in thor.reason
    assert choose("rtx-4090").reason == "TensorRT for RTX takes no plugins"


def test_attention_in_8_bits_needs_our_kernels_and_8_bits() -> None:
    assert choose("jetson-orin", plugins="on", plugin_attention="8bit").by is By.WISH
    with pytest.raises(ResvitError, match="--plugins off"):
        choose("jetson-orin", plugins="off", plugin_attention="8bit")
    with pytest.raises(ResvitError, match="the build is FP16"):
        choose("jetson-orin", plugins="on", plugin_attention="8bit", precision="fp16")


def test_a_result_counts_for_its_own_gpu_and_case_and_a_small_gain_is_none() -> None:
    close = Measured(87, "Jetson AGX Orin", "attention", "b2", 10.0, 10.2, "native")
    rows = (ROW, close)
    assert measured_result(87, "attention", "b1", rows) is ROW
    assert measured_result(90, "attention", "b1", rows) is None
    assert measured_result(87, "attention", "b3", rows) is None
    assert ROW.faster
    assert not close.faster


def test_the_results_that_are_shipped_are_readable() -> None:
    assert all(row.ours_us > 0 and row.other_us > 0 for row in measured.measured_results())
