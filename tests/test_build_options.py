"""What beyond a plain engine can be asked for, how a build shows where it is, and how it is stopped."""

from __future__ import annotations

import json
import socket

import pytest

pytest.importorskip("onnx")
from resvit_engines.builder.builder import build_engine, refit_engine
from resvit_engines.builder.limits import compute_capabilities, require_buildable
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.builder.steps import Percent, StepsFromChild, StepsToParent
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_file
from resvit_engines.progress import Silent
from resvit_engines.targets.choice import with_builder
from resvit_engines.targets.table import Builder, find_target
from test_build import rtx, small_model

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model") / "model.onnx")


# Options


@pytest.mark.parametrize(
    ("name", "builder", "option", "reason"),
    [
        ("jetson-orin", None, "hardware_compatible", "that module alone"),
        ("jetson-thor", Builder.TENSORRT, "hardware_compatible", "that module alone"),
        ("rtx-4090", None, "version_compatible", "lean runtime"),
        ("l4", Builder.RTX, "strip_weights", "without the GPU"),
    ],
)
def test_what_a_builder_cannot_do_is_refused_with_the_reason(name, builder, option, reason) -> None:
    with pytest.raises(ResvitError, match=reason) as caught:
        require_buildable(with_builder(find_target(name), builder), BuildSettings(**{option: True}))
    assert caught.value.code is ExitCode.IMPOSSIBLE
    assert f"--{option.replace('_', '-')}" in caught.value.problem


@pytest.mark.parametrize(
    ("name", "builder", "options"),
    [
        ("jetson-orin", None, ("version_compatible", "strip_weights")),
        ("l4", None, ("hardware_compatible", "version_compatible", "strip_weights")),
        ("rtx-4090", Builder.TENSORRT, ("hardware_compatible", "version_compatible", "strip_weights")),
        ("rtx-4090", None, ("hardware_compatible",)),
    ],
)
def test_what_it_can_do_is_not(name, builder, options) -> None:
    require_buildable(with_builder(find_target(name), builder), BuildSettings(**dict.fromkeys(options, True)))


def test_a_refusal_comes_before_any_work(tmp_path) -> None:
    with pytest.raises(ResvitError, match="lean runtime"):
        build_engine(
            tmp_path / "no.onnx", tmp_path / "e", find_target("rtx-4090"), BuildSettings(version_compatible=True)
        )


def test_options_change_the_settings_on_record_and_the_timing_cache_does_not(tmp_path) -> None:
    plain = BuildSettings()
    assert BuildSettings(timing_cache=tmp_path).to_json() == plain.to_json()
    assert BuildSettings(strip_weights=True).to_json() == {**plain.to_json(), "strip_weights": True}


@rtx
def test_one_engine_for_this_gpu_and_newer_ones(tmp_path, model) -> None:
    target, settings = find_target("rtx-4090"), BuildSettings(hardware_compatible=True)
    assert compute_capabilities(target, settings) == [120, 121, 89]
    assert compute_capabilities(target, BuildSettings()) == [89]
    report = build_engine(model, tmp_path / "wide.plan", target, settings)
    plain = build_engine(model, tmp_path / "plain.plan", target)
    assert report.to_json()["hardware_compatible"] is True
    assert "hardware_compatible" not in plain.to_json()
    assert report.sha256 != plain.sha256
    assert report.kernels == plain.kernels


@rtx
def test_fp8_goes_to_newer_gpus_too(tmp_path) -> None:
    model = small_model(tmp_path / "m.onnx", fp8=True)
    settings = BuildSettings(hardware_compatible=True)
    assert build_engine(model, tmp_path / "e.plan", find_target("rtx-4090"), settings).bytes > 0


@rtx
def test_there_is_no_timing_cache_where_nothing_is_timed(tmp_path, model) -> None:
    settings = BuildSettings(timing_cache=tmp_path / "cache")
    report = build_engine(model, tmp_path / "engine.plan", find_target("rtx-4090"), settings)
    assert report.timing_cache is None
    assert not (tmp_path / "cache").exists()


# Refit


@rtx
def test_only_the_verified_engine_is_read(tmp_path, model) -> None:
    """The digest is compared before TensorRT sees a byte; with the right one, it asks for the driver."""
    report = build_engine(model, tmp_path / "engine.plan", find_target("rtx-4090"))
    for digest, code in (("0" * 64, ExitCode.UNTRUSTED), (report.sha256, None)):
        with pytest.raises(ResvitError) as caught:
            refit_engine(tmp_path / "engine.plan", model, tmp_path / "out.plan", Builder.RTX, digest)
        if code:
            assert caught.value.code is code
        else:
            assert caught.value.code in (ExitCode.MISSING, ExitCode.BUILD)
        assert [path.name for path in tmp_path.iterdir()] == ["engine.plan"]
    assert sha256_file(tmp_path / "engine.plan") == report.sha256


# Progress


def lines(*events: list[object]) -> list[bytes]:
    return [json.dumps(event).encode() for event in events]


def test_steps_within_steps_become_per_cent() -> None:
    percent, seen = Percent(), []
    events = (
        ["start", "build", None, 2],
        ["start", "clone", "build", 4],
        *(["step", "clone", step] for step in range(4)),
        ["finish", "clone"],
        ["step", "build", 0],
        ["start", "time", "build", 10],
        ["step", "time", 4],
        ["finish", "time"],
        ["step", "build", 1],
    )
    for line in lines(*events):
        percent.read(line)
        seen.append(percent.done)
    assert seen == [0, 0, 12, 25, 37, 50, 50, 50, 50, 75, 75, 99]
    assert percent.phase == "build"


@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b"nonsense", b'["step", "unknown", 1]', b'["start", "a", null]'])
def test_a_damaged_line_changes_nothing(line) -> None:
    percent = Percent()
    percent.read(line)
    assert (percent.done, percent.phase) == (0, "")


def test_a_byte_or_the_parents_end_stops_the_child() -> None:
    for stop in (StepsFromChild.stop, StepsFromChild.close):
        steps = StepsFromChild()
        child = StepsToParent(socket.socket(fileno=steps.child_end.detach()))
        child.started("build", None, 3)
        assert child.stepped("build", 0) is True
        stop(steps)
        assert child.stepped("build", 1) is False
        steps.close()


class Follower(Silent):
    """Keeps what it is shown, and interrupts if told to."""

    def __init__(self, interrupt: bool = False) -> None:
        self.interrupt = interrupt
        self.seen: list[int] = []

    def track(self, items, what, total, weight=1, before=0):
        assert (what, total, weight) == ("building (percent)", 100, 1)
        if self.interrupt:
            raise KeyboardInterrupt
        for item in items:
            self.seen.append(item)
            yield item


@rtx
def test_a_build_counts_from_1_to_100(tmp_path, model) -> None:
    follower = Follower()
    build_engine(model, tmp_path / "engine.plan", find_target("rtx-4090"), reporter=follower)
    assert follower.seen == list(range(1, 101))


@rtx
def test_ctrl_c_is_obeyed_by_the_builder_itself(tmp_path, model) -> None:
    """It comes before the first step; the builder's own words tell that it was not just killed."""
    with pytest.raises(ResvitError) as caught:
        build_engine(
            model,
            tmp_path / "engine.plan",
            find_target("rtx-4090"),
            reporter=Follower(interrupt=True),
            log=tmp_path / "log",
        )
    assert caught.value.code is ExitCode.INTERRUPTED
    assert "Build canceled by user" in (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
