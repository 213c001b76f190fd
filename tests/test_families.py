"""The matrix of networks: what stands in it, how one model is run, and a sample of it that goes through."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, which imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("families")


@pytest.mark.whole
def test_every_architecture_that_transformers_lists_is_in_it(families: Any) -> None:
    from transformers.models.auto import modeling_auto

    found = list(families.transformers_cases())
    kinds, classes = {case.kind for case in found}, {case.name for case in found}
    for listed in families.MAPPINGS:
        for kind, named in dict(getattr(modeling_auto, f"MODEL_FOR_{listed}_MAPPING_NAMES")).items():
            # Without a head once is enough, and two kinds may share a class.
            assert kind in kinds or {named} <= classes, (listed, kind)
    assert len(list(families.timm_cases())) >= 120


@pytest.mark.whole
def test_timms_names_exist_and_every_family_is_in_it(families: Any) -> None:
    from resvit_export.loading.libraries import import_timm

    timm = import_timm()
    names = [case.kind for case in families.timm_cases()]
    assert len(set(names)) == len(names)
    assert [name for name in names if not timm.is_model(name)] == []
    assert set(timm.list_modules()) <= {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in names}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("work", "code"),
    [
        (lambda: 3, 3),
        (lambda: 1 / 0, 1),
        (lambda: len(bytearray(3 << 30)) and 0, 1),
        (lambda: time.sleep(60), -1),
        (os.abort, -2),
    ],
    ids=["refused", "raises", "memory", "time", "killed"],
)
def test_one_model_cannot_end_the_run(families: Any, work: Callable[[], int], code: int, tmp_path: Path) -> None:
    found, peak = families.in_own_process(work, tmp_path / "log", seconds=2.0, memory=2.0)
    assert found == code
    assert peak > 0


def test_what_the_caller_has_reserved_is_not_counted(families: Any, tmp_path: Path) -> None:
    with mmap.mmap(-1, 3 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        code, _ = families.in_own_process(lambda: len(bytes(64 * 2**20)) == 0, tmp_path / "log", 100.0, 2.0)
    assert code == 0


def test_what_is_done_is_not_done_again(families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [families.Case(name, "timm", name, f"timm:{name}") for name in ("one", "two")]
    done: list[str] = []

    def row_of(case: Any, folder: Path, *_: object) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        done.append(case.name)
        code = 0 if case.name == "one" else 3
        return {
            "name": case.name,
            "kind": case.kind,
            "listed": "timm",
            "code": code,
            "seconds": 1.0,
            "problem": "p|q",
            "fix": "",
        }

    monkeypatch.setattr(families, "cases", lambda: cases)
    monkeypatch.setattr(families, "row_of", row_of)
    arguments = {"runs": tmp_path / "runs", "records": tmp_path / "rows.jsonl", "only": (), "until": "export",
                 "share": "1/1", "seconds": 1, "memory": 1.0}  # fmt: skip
    for again in ((), (), (3,)):
        families.main.callback(**arguments, out=tmp_path / "table.md", again=again, table_only=False)
    assert done == ["one", "two", "two"]
    text = (tmp_path / "table.md").read_text()
    assert "timm: 1 of 2 go through, 0 of them to a bundle, 1 refused" in text
    assert "p\\|q" in text


def test_a_row_comes_from_the_run_that_went_further(families: Any, tmp_path: Path) -> None:
    case = families.Case("one", "backbone", "one")
    row = {"name": "one", "kind": "one", "listed": "backbone", "code": 0, "seconds": 1.0}
    records = tmp_path / "rows.jsonl"
    assert families.furthest(families.recorded_rows(records), case) is None
    for until, own in (
        ("export", {"stages": ["fold"]}),
        ("export", {"stages": ["fold", "export"]}),
        ("prune", {"code": 3, "problem": "p", "fix": "f"}),
        ("bundle", {"stages": list(families.STAGES), "bundles": 1}),
    ):
        with records.open("a") as file:
            file.write(json.dumps({"until": until, **row, **own}) + "\n")
        found = families.furthest(families.recorded_rows(records), case)
        assert found["stages"] == own.get("stages", ["fold", "export"])
        assert found["pruned"] == (None if until == "export" else "refused")
    blame = {"outputs_db": 9.0, "under_noise_db": 25.0, "noise_db": 40.5, "places": 3, "lossy": []}
    text = families.table([{**found, **families.blamed(blame)}], 4)
    assert "| 25.0 dB: us |" in text
    assert "1 of 4 architectures were run" in text
    assert "transformers, images: 1 of 1 go through, 1 of them to a bundle\n" in text


@pytest.mark.whole
def test_what_reads_more_than_an_image_is_counted_apart(families: Any, tmp_path: Path) -> None:
    # The sentence is the tool's own: the table tells by it.
    (case,) = [case for case in families.cases() if case.name == "OwlViTForObjectDetection"]
    asks = families.row_of(case, tmp_path / "model", "export", 1e6, 16.0)
    assert asks["code"] == 3
    assert families.outcome(asks) == families.NO_FUNCTION
    other = {**asks, "name": "another", "problem": "A size that windows do not divide."}
    assert families.outcome(other) == "refused"
    text = families.table([asks, other], 2)
    assert "films: 0 of 1 go through, 0 of them to a bundle, 1 refused; 1 more are no function of one image" in text


@pytest.mark.whole
def test_parts_that_see_are_rows_of_their_own(families: Any) -> None:
    from resvit_export.loading.libraries import import_transformers

    transformers = import_transformers()
    names = [case.name for case in families.cases()]
    assert len(set(names)) == len(names)
    for kind, architecture in families.TOWERS:
        assert hasattr(transformers, architecture), (kind, architecture)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("ConvNextV2ForImageClassification", {"mlp", "embed"}),  # hidden channels that a parameter of their own scales
        ("CvtForImageClassification", {"mlp", "embed"}),  # a class token that is split off and joined again
        ("HieraForImageClassification", {"mlp", "heads", "embed"}),  # queries that a pool takes from more tokens
    ],
)
def test_what_can_be_pruned_is_found_and_what_is_not_followed_is_said(
    families: Any, name: str, kinds: set[str], tmp_path: Path
) -> None:
    import torch
    from family_models import SMALL, write_folder

    from resvit_export.loading.load import load_network
    from resvit_export.loading.spec import ModelSpec
    from resvit_quantize.pruning.find.discover import groups_from_module
    from resvit_quantize.pruning.groups import Kind

    (case,) = [case for case in families.cases() if case.name == name]
    small = SMALL.get(case.kind)
    shape = (small.channels, *small.size) if small is not None and small.size is not None else None
    network = load_network(ModelSpec(f"hf:{write_folder(case.kind, name, tmp_path)}", input_shape=shape))
    found = groups_from_module(network.module, torch.zeros(1, *network.input_shape), frozenset(Kind) - {Kind.BLOCKS})
    assert {group.kind.value for group in found.groups} == kinds
    assert all(why.strip() for why in found.left_alone.values())


SAMPLE = (
    "RTDetrV2ForObjectDetection",
    "DFineForObjectDetection",
    "ConditionalDetrForObjectDetection",
    "ZoeDepthForDepthEstimation",
    "MaskFormerForInstanceSegmentation",
    "EomtForUniversalSegmentation",
    "VitMatteForImageMatting",
    "DINOv3ViTBackbone",
    "MobileViTV2ForImageClassification",
    "ResNetForImageClassification",
    "timm:test_vit",
    "timm:test_resnet",
)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_goes_through_to_a_bundle(families: Any, name: str, tmp_path: Path) -> None:
    (case,) = [case for case in families.cases() if case.name == name]
    row = families.row_of(case, tmp_path / "model", "bundle", 1e6, 16.0)
    assert families.outcome(row) == "goes through", row.get("problem")
    assert row["bundles"] == 1
    json.dumps(row)
