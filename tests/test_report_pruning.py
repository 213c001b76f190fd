"""The report's part on pruning."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resvit_export.records.prune import PruneRecord
from resvit_export.report.layout.data import ReportData
from resvit_export.report.page import html_from_run
from resvit_export.report.sections.pruning import HEIGHT, WIDTH, pruning_from_run
from resvit_quantize.pruning.distill.options import DistillReport

PRUNE = PruneRecord.from_json(
    {
        "importance": "hessian",
        "share": 0.5,
        "before": {"macs": 1000, "params": 400, "latency_us": None},
        "after": {"macs": 490, "params": 200, "latency_us": None},
        "widths": [
            {
                "group": "trunk.0",
                "kind": "channels",
                "before": 64,
                "after": 16,
                "channels": 1,
                "importance_lost": 0.125,
            },
            {"group": "attn", "kind": "heads", "before": 4, "after": 4, "channels": 32, "importance_lost": 0.0},
        ],
        "curves": [
            {"group": "attn", "kind": "heads", "points": [[1.0, 1.0], [0.5, 0.9]], "images": 64},
            {"group": "trunk.0", "kind": "channels", "points": [[1.0, 1.0], [0.25, 0.4]], "images": 64},
        ],
        "left_alone": {"head": "its channels stay"},
        "notes": ["a note"],
    }
)
SCORE = {"step": 0, "loss": 1.0, "nsr": 0.5, "agreement": 0.5, "top1": None, "train_loss": None}
RETRAIN = DistillReport.from_json(
    {
        "before": SCORE,
        "after": {**SCORE, "agreement": 0.975},
        "history": [SCORE],
        "stop": "all epochs are done",
        "images": 1000,
        "held_out": 50,
        "epochs": 1,
        "steps": 9,
        "seconds": 1.0,
        "device": "cpu",
        "kept_step": 0,
        "objective": "the teacher's boxes",
        "features": [],
    }
)


def test_widths_are_drawn_beside_the_widest_and_curves_by_sensitivity() -> None:
    found = pruning_from_run(PRUNE, RETRAIN)
    (row,) = found.rows
    assert (row.group, row.text, row.lost) == ("trunk.0", "64 → 16", "12.5%")
    assert (row.whole, row.part) == (50.0, 12.5)
    assert found.unchanged == 1
    assert [curve.group for curve in found.curves] == ["trunk.0", "attn"]
    assert found.curves[0].points == ((0.25 * WIDTH, round(0.6 * HEIGHT, 1)), (WIDTH, 0.0))
    assert "49.0% of the multiply-accumulates" in found.sentences[0]
    assert any("50.00% to 97.50%" in sentence for sentence in found.sentences)
    assert "The loss is of the teacher's boxes." in found.sentences


def test_the_page_has_the_section_only_where_something_was_pruned() -> None:
    data = ReportData("x", prune=PRUNE)
    page = html_from_run(data)
    assert "What each group bears" in page
    assert "Nothing was trained behind it." in page
    assert "its channels stay" in page
    assert "What each group bears" not in html_from_run(replace(data, prune=None))


@pytest.mark.parametrize("sparsity", [{"method": "sparsegpt", "sparse": ["a", "b"], "share": 0.8, "left": {}}])
def test_sparsity_alone(sparsity: dict[str, object]) -> None:
    record = PruneRecord.from_json({"importance": "hessian", "notes": [], "sparsity": sparsity})
    found = pruning_from_run(record, None)
    assert not found.rows
    assert "2 layers" in found.sentences[0]
