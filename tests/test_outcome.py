"""What a build ends with, what help shows first, and runs side by side."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from conftest import DEMO
from resvit_calibrate.gate.gate import VerdictKind
from resvit_calibrate.tasks.kinds import KINDS, lower_is_better
from resvit_engines.targets.speed_verdict import Evidence, SpeedKind, SpeedVerdict
from resvit_engines.targets.table import Precision, find_target
from resvit_export.cli.main import cli, run
from resvit_export.cli.outcome import next_commands, outcome
from resvit_export.cli.output import accuracy_table, comparison_table
from resvit_export.pipeline import Pipeline
from resvit_export.recipe.recipe import SETTINGS, Recipe
from resvit_export.records.verdict import ScoreRow
from resvit_export.report.comparison import Entry, pareto_front, write_comparison
from resvit_export.report.layout.data import ReportData
from resvit_export.report.page import html_from_run
from resvit_export.report.sections.accuracy import speed_half
from resvit_export.run import Run
from resvit_export.stage import Record
from resvit_export.stages.export import Exported


def options_of(text: str) -> set[str]:
    return set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", text, flags=re.MULTILINE))


def test_help_shows_ten_options_and_help_all_every_one() -> None:
    usual, every = (CliRunner().invoke(cli, ["build", flag]).output for flag in ("--help", "--help-all"))
    assert len(options_of(usual) - {"--help", "--help-all"}) == 10
    assert len(usual.partition("Examples:")[0].splitlines()) < 60
    settings = {item.flag for item in SETTINGS.values() if item.since is not None}
    assert settings <= options_of(every)
    assert {"--device", "--json", "--verbose"} <= options_of(every)
    assert "\nPruning:\n" in every
    assert "\nPruning:\n" not in usual


def test_options_of_one_command_alone_are_never_hidden() -> None:
    assert "--fp16-layers" in CliRunner().invoke(cli, ["audit", "--help"]).output


def speed(kind: SpeedKind) -> SpeedVerdict:
    return SpeedVerdict(kind, 1.3, Evidence.RULES, 0.15, "headline", "sentence")


def built(kind: VerdictKind = VerdictKind.ACCEPTED, **settings: Any) -> Any:
    """A finished build for a Jetson, as far as what comes next is concerned."""
    recipe = Recipe(model="resvit:embed-nano", targets=("jetson-orin",), data="fashion-mnist", **settings)
    here = SimpleNamespace(require_target=lambda: find_target("jetson-orin"), signing_key=lambda: "key")
    verdict = SimpleNamespace(images_needed=900, images=100, chance_level=False, interval=(0.1, 2.31), max_drop=1.0,
                              unit="percentage points")  # fmt: skip
    return SimpleNamespace(
        pipeline=SimpleNamespace(run=here, recipe=recipe),
        verdict=SimpleNamespace(kind=kind, verdict=verdict),
        speed=speed(SpeedKind.FASTER),
        rejection=None,
        folder=Path("my runs/x"),
        bundle=Path("my runs/x/net.resvit"),
        device=None,
        plan=object(),
    )


def test_three_commands_that_apply_come_next() -> None:
    device, by_hand, audit = (command for command, _ in next_commands(built()))
    assert shlex.split(device) == ["resvit-export", "build", "--run", "my runs/x", "--device", "ssh://USER@HOST"]
    assert by_hand == "resvit-engine build net.resvit --trust release.pub"
    assert audit.startswith("resvit-export audit")
    unsigned = built()
    unsigned.pipeline.run.signing_key = lambda: None
    assert "resvit-export sign" in next_commands(unsigned)[0][0]
    slow = built()
    slow.speed = speed(SpeedKind.NOT_KNOWN)
    assert "--precision fp16" in next_commands(slow)[0][0]


def test_after_doubt_and_rejection_come_what_would_help() -> None:
    doubt = [command for command, _ in next_commands(built(VerdictKind.UNDECIDED, validation_images=100))]
    assert doubt[0].endswith("--validation-images 900")
    assert doubt[1].endswith("--max-drop 2.4")
    refused = built(VerdictKind.REJECTED)
    refused.bundle, refused.rejection = None, object()
    commands = [command for command, _ in next_commands(refused)]
    assert len(commands) == 3
    assert commands[0].startswith("resvit-export sensitivity")
    assert commands[1].endswith("--effort best")


@pytest.mark.whole
def test_a_build_ends_on_one_screen(
    workspace: Path, seeded: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = seeded("runs/x")
    assert run(["build", "--target", "jetson-orin", *shlex.split(DEMO), "--run", folder]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert sum(max(1, math.ceil(len(line) / 80)) for line in lines) <= 24
    assert lines[0].startswith("ACCEPTED: the accuracy drop is ")
    assert any(line.startswith("SPEED NOT KNOWN: INT8 is predicted ") for line in lines)
    assert sum(line.startswith(("next: ", "or: ")) for line in lines) == 3
    assert f"report: {folder}/report.html" in lines
    assert all(len(line) <= 80 for line in lines if not re.search(r"resvit-|/", line))
    assert run(["build", "--run", folder, "--verbose"]) == 0
    assert "Sizes" in capsys.readouterr().out
    assert run(["build", "--run", folder, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["speed"]["speed"] == "not known"
    assert (document["exit_code"], len(document["next"])) == (0, 3)
    estimated, predicted = (
        json.loads(next(Path(folder).glob(f"{stage}-*/costs.json")).read_text())["gain"]
        for stage in ("estimate", "predict")
    )
    assert estimated == pytest.approx(predicted, rel=0.02)
    page = Path(folder, "report.html").read_text()
    assert "<title>Accepted, speed not known: " in page

    # Looking leaves the run as it is.
    recipe = Path(folder, "recipe.toml").read_bytes()
    assert run(["audit", "--run", folder, "--target", "jetson-orin", "--seed", "0", "--quiet"]) == 0
    assert run(["report", "--run", folder, "--release", "7"]) == 0
    assert Path(folder, "recipe.toml").read_bytes() == recipe

    capsys.readouterr()
    assert run(["report", folder, folder, "--out", "both.html", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [(entry["target"], entry["latency_by"]) for entry in both["entries"]] == [("jetson-orin", "predicted")] * 2
    assert Path("both.html").read_text().count("<circle") == 2
    assert run(["report", "runs/nothing"]) == 3
    assert run(["report", folder, "--max-drop", "1"]) == 3


def test_what_ships_is_called_what_it_is() -> None:
    run_of = SimpleNamespace(precision=Precision.INT8, target=find_target("jetson-orin"))
    for products, ships in (({"conv": Precision.INT8}, Precision.INT8), ({}, Precision.FP16)):
        pipeline: Any = SimpleNamespace(run=run_of, quantized=SimpleNamespace(eight_bit_products=products))
        assert Pipeline.ships.fget(pipeline) is ships  # type: ignore[attr-defined]
    target: Any = SimpleNamespace(
        require_target=lambda: find_target("jetson-orin"), recipe=Recipe(model="resvit:embed-nano")
    )
    assert Run.bundle_name(target, Precision.FP16) == "embed-nano-jetson-orin-fp16.resvit"


def test_an_onnx_of_ones_own_has_no_parity_with_pytorch() -> None:
    for stage, reference in (("Import", "your ONNX"), ("Export", "PyTorch")):
        record = Record("export", "k", {"is": stage}, {}, {}, 1.0, 1)
        assert Exported(Path("x"), record, reused=False).reference == reference


def test_fp16_that_was_asked_for_is_no_failure_of_speed(tmp_path: Path) -> None:
    one = built(precision="fp16")
    one.speed = SpeedVerdict(SpeedKind.FP16_ITSELF, 1.0, Evidence.SAME, None, "FP16, predicted 0.204 ms on X", "")
    one.verdict.kind, one.verdict.reason, one.verdict.blame = VerdictKind.ACCEPTED, "fine", None
    one.pipeline.variant = SimpleNamespace(tuned=None, search=None)
    one.report = tmp_path / "report.html"
    lines = list(outcome(one, brief=True))
    assert "[bold]SPEED[/]: FP16, predicted 0.204 ms on X" in lines
    assert not any("--precision fp16" in command for command, _ in next_commands(one))
    half = speed_half(one.speed)
    assert (half.kind, half.word, half.sentence) == ("open", "Speed", "FP16, predicted 0.204 ms on X.")
    page = html_from_run(ReportData(name="run", speed=one.speed))
    assert "<title>Not validated: run" in page
    assert "Not faster" not in page


def test_the_table_of_accuracy_fits_80_columns() -> None:
    values: dict[str, float | None] = {"top-1": 0.619, "top-5": 0.984}
    rows = [
        ScoreRow(stage, "top-1", "percentage points", 0.619, values, 0.995, "", 46.5, 0.3, (-10.38, 10.88))
        for stage in ("pytorch", "onnx float", "onnx int8")
    ]
    record: Any = SimpleNamespace(
        rows=rows, verdict=SimpleNamespace(confidence=0.95), data="all 1,000 images of x (test)"
    )
    screen = Console(width=140, file=io.StringIO())
    screen.print(accuracy_table(record))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("onnx int8" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_the_table_of_an_sqnr_has_no_drops() -> None:
    rows = [
        ScoreRow(stage, "SQNR", "dB", value, {"SQNR": value}, 1.0, "", value, drop, (-11.0, -9.5))
        for stage, value, drop in (("onnx float", 100.0, 0.0), ("onnx int8", 30.3, -10.32))
    ]
    record: Any = SimpleNamespace(rows=rows, verdict=SimpleNamespace(confidence=0.95), data="all 40 images of x")
    screen = Console(width=140, file=io.StringIO())
    screen.print(accuracy_table(record))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "drop" not in text
    assert "above least" in text
    assert "+10.32" in text
    assert "+9.50 … +11.00" in text


TOP1, ABS_REL, SQNR = ("top-1", False, "percentage points"), ("AbsRel", True, "points"), ("SQNR", False, "dB")


def entry(
    name: str,
    ms: float,
    value: float,
    drop: float = 0.0,
    target: str = "l4",
    metric: tuple[str, bool, str] = TOP1,
) -> Entry:
    return Entry(name, target, "INT8", 1, *metric, 0.9, value, drop, (0.0, 1.0), "accepted", ms, 1,
                 "predicted", speed(SpeedKind.FASTER), 1 << 20)  # fmt: skip


def test_the_front_is_what_nothing_beats_in_both() -> None:
    fast, good, same = entry("fast", 1.0, 0.8, 10.0), entry("good", 2.0, 0.9), entry("same", 2.0, 0.9)
    beaten = entry("beaten", 3.0, 0.85, 5.0)
    assert pareto_front([beaten, good, fast, same]) == [fast, good]
    # Of an error the smaller is the better one.
    errors = [entry(name, ms, value, metric=ABS_REL) for name, ms, value in (
        ("error", 1.0, 0.95), ("less", 2.0, 0.9), ("more", 3.0, 0.92))]  # fmt: skip
    assert [one.run for one in pareto_front(errors)] == ["error", "less"]


def test_of_an_sqnr_the_larger_is_the_better_one_and_is_told_in_db(tmp_path: Path) -> None:
    slower = entry("slower", 0.206, 30.3197, -10.32, metric=SQNR)
    good = entry("good", 0.204, 63.8, -43.8, metric=SQNR)
    assert pareto_front([slower, good]) == [good]
    write_comparison([slower, good], tmp_path / "c.html")
    screen = Console(width=140, file=io.StringIO())
    screen.print(comparison_table([slower, good]))
    for text in (screen.file.getvalue(), (tmp_path / "c.html").read_text()):  # type: ignore[attr-defined]
        assert "30.3 dB" in text
        assert "+10.3 dB" in text
        assert "above least" in text.lower().replace(" the ", " ")
        assert "drop" not in text.partition("<body>")[2].lower()
    assert {lower_is_better(kind) for kind in KINDS if kind != "depth"} == {False}
    assert lower_is_better("depth")


def test_the_page_of_a_comparison_draws_every_build(tmp_path: Path) -> None:
    entries = [entry("<b>", 1.0, 0.8, 10.0), entry("good", 2.0, 0.9), entry("else", 0.5, 0.9, target="jetson-orin")]
    write_comparison(entries, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert page.count("<circle") == 3
    assert page.count("<title>Pareto front of") == 2
    assert "<b>" not in page.partition("<body>")[2]
    assert "90.00%" in page
