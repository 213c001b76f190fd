"""Which regions keep Q/DQ: by measured times and the gate, with made-up machines and one real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from conftest import DEMO
from resvit_engines.bench.compare import Ratio, paired_ratio
from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run
from resvit_export.tune import FLOAT, Ways, search_regions
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.search.regions import Region, regions_of

REGIONS = tuple(Region(name, (f"{name}.0", f"{name}.1"), 0.25) for name in ("conv", "qkv", "mlp"))


class Machine:
    """A machine on which FP32 takes 10 ms, and each region in INT8 takes so many ms less (or more), with some noise."""

    def __init__(self, noise: float = 0.002, **saved: float) -> None:
        self.saved, self.noise, self.asked = saved, noise, []
        self.random = np.random.default_rng(0)
        self.ms: dict[str, np.ndarray] = {}

    def timed(self, variants: Mapping[str, frozenset[str]]) -> Machine:
        self.asked.append(dict(variants))
        for name, out in variants.items():
            true = 10.0 - sum(ms for region, ms in self.saved.items() if region not in out)
            self.ms[name] = true * (1 + self.noise * self.random.standard_normal(20))
        return self

    def ratio(self, slower: str, faster: str) -> Ratio:
        return paired_ratio(self.ms[slower], self.ms[faster])

    def median_ms(self, name: str) -> float:
        return float(np.median(self.ms[name]))


def searched(machine: Machine, accepts=lambda out: True, passes: int = 2):
    damage = {"conv": 1.0, "qkv": 2.0, "mlp": 30.0}
    ways = Ways(machine.timed, accepts, lambda region: damage[region.name])
    return search_regions(REGIONS, ways, passes, lambda said: None)


def test_regions_that_gain_nothing_go_back_to_floats() -> None:
    found = searched(Machine(conv=3.0, qkv=-0.5, mlp=1.0))
    assert found.out == {"qkv"}
    assert {name: choice.kept for name, choice in found.choices.items()} == {"conv": True, "qkv": False, "mlp": True}
    assert "stay in conv, mlp" in found.sentences[-1]


def test_a_gain_below_two_per_cent_is_none() -> None:
    assert searched(Machine(conv=3.0, qkv=0.05, mlp=1.0)).out == {"qkv"}


def test_a_gain_that_chance_explains_is_none() -> None:
    kept = {"conv": 0, "qkv": 0, "mlp": 0}
    for seed in range(20):
        machine = Machine(noise=0.2, conv=3.0, qkv=0.0, mlp=0.0)
        machine.random = np.random.default_rng(seed)
        for name, choice in searched(machine, passes=1).choices.items():
            kept[name] += choice.kept
    assert kept["conv"] >= 18
    assert max(kept["qkv"], kept["mlp"]) <= 3, kept


def test_where_nothing_gains_the_engine_is_float_and_says_so() -> None:
    found = searched(Machine(conv=-1.0, qkv=-0.5, mlp=0.0))
    assert found.out == {"conv", "qkv", "mlp"}
    assert "gains 2% on FP32" in found.sentences[0]
    assert "computes in FP32" in found.sentences[-1]


def test_what_the_gate_rejects_is_never_chosen() -> None:
    # The MLP hurts 30 times as much as the convolutions, for half of the gain: it goes first.
    found = searched(Machine(conv=2.0, qkv=1.0, mlp=1.0), accepts=lambda out: "mlp" in out)
    assert found.out == {"mlp"}
    assert "mlp goes back" in found.sentences[0]
    none = searched(Machine(conv=2.0, qkv=1.0, mlp=1.0), accepts=lambda out: False)
    assert none.out == {"conv", "qkv", "mlp"}


def test_the_plain_placement_wins_where_it_is_faster_as_a_whole() -> None:
    class Together(Machine):
        def timed(self, variants):
            super().timed(variants)
            for name, out in variants.items():
                self.ms[name] = np.full(20, 5.0 if not out else 10.0 if name == FLOAT else 4.99)
            return self

    found = searched(Together(), passes=1)
    # Each region alone seems to cost; all of them out is FP32, which is half as fast as the plain placement.
    assert found.out == frozenset()


def test_layers_that_are_alike_are_one_region(tmp_path: Path) -> None:
    from test_cpu_target import residual_and_linear

    residual_and_linear(tmp_path / "model.onnx")
    analysis = graph_from_onnx(tmp_path / "model.onnx").analysis
    names = {product.name for product in analysis.products}
    *convs, linear = regions_of(analysis, names)
    assert sum(len(region.nodes) for region in convs) == 4
    assert max(len(region.nodes) for region in convs) >= 2
    assert all("conv at 8x8" in region.name for region in convs)
    assert linear.name.endswith("linear 32x64 (1)")
    assert sum(region.share for region in (*convs, linear)) == pytest.approx(1.0)
    assert regions_of(analysis, set()) == ()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "jetson-orin"], "so far only for processors"),
        (["--target", "cpu", "--device", "ssh://there"], "--device names another one"),
    ],
)
def test_tuning_is_refused_where_nothing_can_be_timed(workspace: Path, capsys, arguments, says: str) -> None:
    code = run(["build", *DEMO.split(), "--run", "runs/tuned", "--tune", "quick", *arguments])
    assert code == ExitCode.IMPOSSIBLE
    assert says in capsys.readouterr().err
    assert not list((workspace / "runs/tuned").glob("export-*"))


@pytest.mark.slow
@pytest.mark.whole
def test_a_real_machine_is_tuned_and_a_killed_run_goes_on(workspace: Path, finished_run, capsys) -> None:
    shutil.copytree(finished_run("cpu"), workspace / "runs/tuned")
    capsys.readouterr()
    how = ["build", *DEMO.split(), "--target", "cpu", "--run", "runs/tuned", "--tune", "quick"]
    assert run([*how, "--json"]) in (ExitCode.OK, ExitCode.UNDECIDED)
    told = json.loads(capsys.readouterr().out)["tuned"]
    folder = workspace / "runs/tuned"
    record = json.loads(next(folder.glob("tune-*/tune.json")).read_text())
    assert record["sentences"] == told
    timings = sorted(folder.glob("timings-*"))
    assert len(timings) >= 2
    # As a kill would leave it: the choice is missing, measurements are there and are not made again.
    shutil.rmtree(next(folder.glob("tune-*")))
    stamps = [path.stat().st_mtime_ns for path in timings]
    assert run([*how, "--json"]) in (ExitCode.OK, ExitCode.UNDECIDED)
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("timings-*"))] == stamps
    assert json.loads(next(folder.glob("tune-*/tune.json")).read_text()) == record
