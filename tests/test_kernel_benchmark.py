"""The benchmark of kernels: its shapes, the rivals' arithmetic, the floor, and what is kept. Nothing is timed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernel_bounds import held
from resvit_engines.kernels.attention import attention_reference
from resvit_engines.kernels.bridge import BridgeConfig, bridge_reference
from resvit_engines.kernels.deformable import deformable_reference
from resvit_engines.kernels.measure.results import Measured, case_of

ROOT = Path(__file__).parent.parent
KINDS = ("attention", "bridge", "deformable")


@pytest.fixture(autouse=True)
def _benchmarks_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def cases(*arguments: Any) -> list[Any]:
    from kernel_peers.cases import all_cases

    return list(all_cases(*arguments))


def test_every_shape_belongs_to_its_kernel() -> None:
    for case in cases(KINDS):
        source = case.source(90)
        assert len(case.shapes) == len(source.launch.inputs), case.label
        patches = 4 if "MobileViT" in case.model else 1
        assert source.launch.outputs[0].shape[0].at(case.shapes) == case.batch * patches
        assert min(extent.at(case.shapes) for extent in source.launch.grid) >= 1
        assert case.bytes > 0
        assert case.operations > 0


def test_every_hybrid_is_there_at_every_batch() -> None:
    found = {(case.model.split(" 224")[0], case.batch) for case in cases(("bridge",))}
    assert len({model for model, _ in found}) >= 5
    assert {batch for _, batch in found} == {1, 8, 32}


def reference(case: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    if case.kind == "attention":
        return [attention_reference(case.config, *inputs)]
    if case.kind == "deformable":
        return [deformable_reference(case.config, *inputs)]
    return list(bridge_reference(case.config, *inputs))


@pytest.mark.whole
@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_rivals_compute_what_ours_does(kind: str, dtype: str) -> None:
    for case in sorted(cases((kind,), (dtype,), (1,)), key=lambda case: case.bytes)[: 7 if kind == "attention" else 1]:
        require_agreement(case)


def require_agreement(case: Any) -> None:
    import torch
    from kernel_peers.rivals import FUNCTIONS, TYPES

    kind, dtype = case.kind, case.dtype
    rng = np.random.default_rng(0)
    dtypes = case.source(90).launch.inputs
    inputs = [held(rng, shape, kind_, 0.03) for shape, kind_ in zip(case.shapes, dtypes, strict=True)]
    if kind == "bridge":
        inputs[1] /= 32 if dtype == "fp16" else 1
        inputs[1] = np.rint(inputs[1] * 256) / 256
        inputs[2] = np.full_like(inputs[2], 0.001) if dtype != "fp16" else inputs[2]
    if kind == "attention":
        # Logits of a few units, and not of hundreds, where all rests on one key.
        inputs[0] = np.rint(inputs[0] / 2) if dtype != "fp16" else inputs[0]
    tensors = [torch.from_numpy(value).to(TYPES[name]) for value, name in zip(inputs, dtypes, strict=True)]
    got = FUNCTIONS[kind](case)(*tensors)
    for one, real in zip(got if isinstance(got, tuple) else (got,), reference(case, inputs), strict=True):
        assert tuple(one.shape) == real.shape
        # PyTorch rounds to FP16 between its steps, which can end one step of 8 bits away.
        error = np.linalg.norm(one.to(torch.float64).numpy() - real) / np.linalg.norm(real)
        assert error < (0.002 if one.dtype == torch.float16 else 0.05)


def test_a_case_is_told_by_what_changes_its_work() -> None:
    config = BridgeConfig(64, 7, 7, 384, norm=True, out_dtype="int8", out_scale=0.1)
    shapes = ((8, 64, 7, 7), (384, 64), (50, 384), (384,), (384,))
    name = case_of(config, shapes)
    assert name == (
        "channels=64 height=7 width=7 embed=384 prefix=1 dtype=fp16 token_dtype=fp16 norm=1 out_dtype=int8 "
        "@ 8x64x7x7 384x64 50x384 384 384"
    )
    assert case_of(dataclasses.replace(config, out_scale=0.2, eps=1e-5, batch=8), shapes) == name
    assert case_of(dataclasses.replace(config, norm=False), shapes) != name
    assert case_of(config, ((1, 64, 7, 7), *shapes[1:])) != name


def test_cases_have_names_of_their_own() -> None:
    found = [(case.kind, case_of(case.config, case.shapes)) for case in cases(KINDS)]
    assert len(set(found)) == len(found)


def test_the_floor_is_the_larger_of_moving_and_multiplying() -> None:
    from kernels import floor_us

    case = dataclasses.replace(cases(("bridge",), ("fp16",), (1,))[0], bytes=2_000_000, operations=10**9)
    assert floor_us(case, 1000.0, None) == pytest.approx(2.0)
    assert floor_us(case, 1000.0, 1000.0) == pytest.approx(2.0)
    assert floor_us(case, 1000.0, 100.0) == pytest.approx(10.0)


def timed_row(case: str, ours: float, *, sm: int = 90) -> dict[str, Any]:
    return {
        "sm": sm, "device": "Test GPU", "kind": "bridge", "model": "R26", "dtype": "int8", "batch": 8, "case": case,
        "ours_us": ours, "best_other": "torch.compile", "best_other_us": 12.0, "floor_us": 3.0, "failed": {},
        "others_us": {"eager": 20.0, "torch.compile": 12.0},
    }  # fmt: skip


def test_what_is_recorded_is_what_the_choice_of_plugins_reads(tmp_path: Path) -> None:
    from kernels import record

    table = tmp_path / "measured.json"
    table.write_text("[]")
    refused = {"sm": 90, "kind": "bridge", "case": "c", "refused": "no"}
    assert record([timed_row("a", 6.0), timed_row("b", 24.0), refused], table) == 2
    assert record([timed_row("a", 5.0), timed_row("a", 7.0, sm=87)], table) == 2
    rows = [Measured(**row) for row in json.loads(table.read_text())]
    assert [(row.sm, row.case, row.ours_us) for row in rows] == [(87, "a", 7.0), (90, "a", 5.0), (90, "b", 24.0)]
    assert [row.faster for row in rows] == [True, True, False]


def test_tables_hold_every_row_and_the_least_ratio() -> None:
    from kernel_peers.table import measured_table

    gpu = {"device": "Test GPU", "sm": 90, "bandwidth_gb_s": 3000.0, "peak_tops": {"fp16": 700.0}, "torch": "2"}
    text = measured_table(gpu, [timed_row("a", 6.0), timed_row("b", 24.0)])
    assert "| 6.0 | 20.0 | 12.0 | torch.compile | 2.00 | 3.0 | 50% |" in text
    assert "int8 batch 8: at least 0.50x the best other, 12% of the floor" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.slow
@pytest.mark.whole
def test_cases_are_checked_timed_and_tabulated_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of the script, with made-up times in place of a GPU's."""
    import kernels
    import torch
    from click.testing import CliRunner
    from kernel_peers import clock, rivals

    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(clock, "measured_bandwidth", lambda: 3000.0)
    monkeypatch.setattr(clock, "measured_peak", lambda dtype: None if dtype == "int8" else 700.0)
    monkeypatch.setattr(clock, "time_ours", lambda kernel, case, copies, repeats: 4.0)
    monkeypatch.setattr(clock, "disagreement", lambda kernel, case, *_: 0.5 if case.model == "R26+ViT-S 384" else 0.0)
    monkeypatch.setattr(rivals, "inputs_of", lambda case, generator: [torch.zeros(1)])
    monkeypatch.setattr(clock, "copies_for", lambda tensors: 2)
    monkeypatch.setattr(clock, "time_rival", lambda function, context, copies, repeats: 8.0)
    monkeypatch.setattr(kernels, "MEASURED", tmp_path / "measured.json")
    (tmp_path / "measured.json").write_text("[]")
    monkeypatch.setattr(kernels.record, "__defaults__", (tmp_path / "measured.json",))
    command = "--kind bridge --dtype fp16 --batch 8 --no-compile --record --out"
    done = CliRunner().invoke(kernels.main, [*command.split(), str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    text = (tmp_path / "kernels-sm90.md").read_text()
    assert "| R26+ViT-S 224 | fp16 | 8 | 4.0 | 8.0 | eager | 2.00 |" in text
    assert "- R26+ViT-S 384 fp16: wrong: off by 0.5 of the norm" in text
    assert len(json.loads((tmp_path / "measured.json").read_text())) == 5
    assert len(json.loads((tmp_path / "kernels-sm90.json").read_text())["rows"]) == 6


@pytest.mark.whole
def test_static_rows_tell_of_the_code_or_of_the_refusal() -> None:
    from kernel_peers.table import static_table
    from kernels import static_rows

    from resvit_engines.targets.table import find_target

    pytest.importorskip("triton")
    chosen = [case for case in cases(("bridge",), ("int8", "fp8"), (8,)) if case.model == "R26+ViT-S 224"]
    rows = static_rows(chosen, [find_target("jetson-orin")])
    assert [("refused" in row) for row in rows] == [False, True]
    # Its operations at 54 TOPS, which take longer than its bytes, and 5 us for the kernel.
    assert rows[0]["floor_us"] == pytest.approx(2 * 8 * 49 * 2048 * 384 / 54e6 + 5.0, rel=0.01)
    text = static_table(rows)
    assert "| bridge | R26+ViT-S 224 | int8 | 8 |" in text
    both = static_table([*rows, {**rows[0], "batch": 32}])
    assert "| bridge | R26+ViT-S 224 | int8 | 8, 32 |" in both
    assert "- not there: " in text
