"""The search as part of a run: from the command line, with a network that one layer spoils in 8 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from resvit_calibrate.gate.gate import Verdict, VerdictKind
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.table import find_target
from resvit_export.cli.main import run
from resvit_export.recipe.recipe import Recipe
from resvit_export.refusals import require_searchable
from resvit_export.settle import hopeless
from resvit_quantize.check.choose import build

pytestmark = pytest.mark.whole

MODEL = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt", "--data", "fashion-mnist"]
FEW = [
    "--calibrator",
    "mse",
    "--validation-images",
    "2000",
    "--calibration-images",
    "64",
    "--run",
    "runs/x",
    "--target",
    "rtx-4090",
]


def result(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, object]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == code
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_a_spoilt_layer_is_found_left_high_and_a_budget_is_kept(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resvit_calibrate.ranges.ranges import Ranges

    honest = Ranges.amax
    # What the patch projection reads is clipped to a fiftieth, in INT8 and FP8; nothing may move it out of the way.
    monkeypatch.setattr("resvit_quantize.qdq.plan.smooth", lambda *_: ())
    # Nor may the check on held-back images, which leaves such a layer in FP16 by itself.
    monkeypatch.setattr("resvit_quantize.quantize.checked", lambda _, *given: (build(*given[:4]), None))
    spoilt = "trunk.stages.1.0.relu/Relu_output"
    monkeypatch.setattr(
        Ranges, "amax", lambda self, name, *rest: honest(self, name, *rest) / (50 if name == spoilt else 1)
    )
    plain = result(capsys, "validate", "--no-search", *MODEL, *FEW, code=ExitCode.REJECTED)
    assert plain["results"]["verdict.json"]["verdict"] == "rejected"  # type: ignore[index]

    found = result(capsys, "validate", "--search", *MODEL, *FEW)
    verdict = found["results"]["verdict.json"]  # type: ignore[index]
    assert verdict["verdict"] == "accepted"
    assert verdict["confidence"] > 0.95
    (path,) = Path("runs/x").glob("search-*/search.json")
    search = json.loads(path.read_text())
    assert search["accepted"]
    assert search["looks"][0]["verdict"] == "rejected"
    assert search["assignment"]["proj/Conv"] == "fp16"
    looks = [look["digest"] for look in search["looks"]]
    assert len(set(looks)) == len(looks)

    # Nothing is looked at twice, and the plain stages are still those of the run.
    before = sorted(Path("runs/x").glob("*-*"))
    again = result(capsys, "validate", "--search", *MODEL, *FEW)
    assert again["reused"]
    assert again["folder"] == found["folder"]
    assert sorted(Path("runs/x").glob("*-*")) == before

    # 8 bits are predicted to be no faster here at all: half of FP16's time is out of reach.
    result(capsys, "validate", *MODEL, *FEW, "--latency-budget", "0.5x", code=ExitCode.IMPOSSIBLE)
    kept = result(capsys, "validate", *MODEL, *FEW, "--latency-budget", "1x")
    assert kept["results"]["verdict.json"]["verdict"] == "accepted"  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"latency_budget": "3"}, ExitCode.INPUT),
        ({"latency_budget": "3ms", "precision": "fp16"}, ExitCode.IMPOSSIBLE),
        ({"latency_budget": "3ms", "quantizer": "modelopt"}, ExitCode.IMPOSSIBLE),
        ({"measured_times": "/nowhere/times.json"}, ExitCode.INPUT),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(settings: dict[str, str], code: ExitCode) -> None:
    with pytest.raises(ResvitError) as caught:
        require_searchable(Recipe(**settings), find_target("rtx-4090"))  # type: ignore[arg-type]
    assert caught.value.code is code
    with pytest.raises(ResvitError, match="needs a device"):
        require_searchable(Recipe(latency_budget="3ms"), None)


def test_too_few_images_for_any_network_are_not_searched_with() -> None:
    recipe = Recipe(max_drop=0.3)
    verdict = Verdict(VerdictKind.UNDECIDED, "", 0.3, 0.95, 500, (-1.0, 1.0))
    assert "500 images" in hopeless(verdict, recipe)
    assert hopeless(replace(verdict, images=5000), recipe) == ""
    guessed = replace(verdict, images=5000, chance_level=True, reason="no better than guessing")
    assert hopeless(guessed, recipe) == "no better than guessing."
