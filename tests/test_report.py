from __future__ import annotations

import base64
import dataclasses
import io
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resvit_calibrate.ranges.ranges import Ranges, TensorRange
from resvit_engines.builder.device_plan import DevicePlan
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import BundledFile, GoldenFiles
from resvit_engines.records import Record
from resvit_engines.targets.costs import LayerTime, Prediction
from resvit_engines.targets.layer_work import LayerKind
from resvit_engines.targets.table import TARGETS, Precision
from resvit_export.records.costs import CostsRecord
from resvit_export.records.verdict import VerdictRecord
from resvit_export.report.layout.data import ChangedImage, ReportData
from resvit_export.report.layout.pictures import png_from_pixels, share_beyond, steps_from_histogram, ticks_between
from resvit_export.report.layout.wording import number, operations, percent, significant, size, small_percent
from resvit_export.report.page import html_from_run, write_report
from resvit_export.report.sections.accuracy import accuracy_from_verdict
from resvit_export.report.sections.network import kept_from_quantize
from resvit_export.report.sections.ranges import pictures_from_ranges
from resvit_export.to_onnx.report import ExportReport
from resvit_quantize.fold.program import FoldReport
from resvit_quantize.qdq.held_back import OURS, HeldBackCheck, MendedLayer, Tried
from resvit_quantize.qdq.report import QuantizeReport
from resvit_quantize.sensitivity.own_noise import OwnNoise

VOID = {"meta", "img", "wbr", "br", "link", "hr", "input"}
NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def stage(name: str, top1: float | None, agreement: float | None, sqnr_db: float | None, *drop: Any) -> dict[str, Any]:
    named = {"stage": name, "metric": "top-1", "unit": "percentage points", "agreement_of": "images"}
    found = {"value": top1, "values": {"top-1": top1}, "top1": top1, "agreement": agreement, "sqnr_db": sqnr_db}
    return {**named, **found, "drop": drop[0], "interval": list(drop[1:])}


def verdict(kind: str = "accepted", **changes: Any) -> VerdictRecord:
    drop, interval, reason = {
        "accepted": (0.21, [-0.02, 0.44], "within the limit of 1"),
        "rejected": (2.84, [2.31, 3.41], "above the limit of 1"),
        "undecided": (0.80, [-0.63, 2.26], "the limit of 1 lies inside"),
    }[kind]
    count = 500 if kind == "undecided" else 10_000
    reason = (
        f"the accuracy drop is {drop:.2f} percentage points, between {interval[0]:.2f} and {interval[1]:.2f} "
        f"at 95% confidence on {count} images: {reason}"
    )
    document = {
        "verdict": kind,
        "reason": reason,
        "interval": interval,
        "metric": "top-1",
        "unit": "percentage points",
        "task": "classification",
        "remarks": [],
        "golden": GoldenFiles().to_json(),
        "max_drop": 1.0,
        "confidence": 0.95,
        "images": count,
        "data_digest": "9a" * 32,
        "data": "fashion-mnist",
        "chance_level": False,
        "images_needed": 24_000 if kind == "undecided" else None,
        "runtime_note": "",
        "stages": [
            stage("pytorch", 0.9121, 1.0, None, 0.0, -0.04, 0.04),
            stage("onnx float", 0.9121, 1.0, 118.2, 0.0, -0.01, 0.01),
            stage("onnx int8", 0.9121 - drop / 100, 0.9842, 24.7, drop, *interval),
        ],
        "class_names": [],
        "changed_total": 158,
        "changed": [
            {"index": 17, "label": 6, "float": 6, "quantized": 0},
            {"index": 42, "label": 4, "float": 2, "quantized": 4},
        ],
    }
    return VerdictRecord.from_json({**document, **changes})


def quantize(**changes: Any) -> QuantizeReport:
    nodes: list[dict[str, Any]] = [
        {
            "name": f"blocks.{block}.{part}/MatMul",
            "op": "MatMul",
            "group": "transformer",
            "macs": 29_000_000,
            "weighted": True,
            "precision": "int8",
            "reason": "",
        }
        for block in range(8)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    nodes += [
        {
            "name": f"blocks.{block}.attn/MatMul_{index}",
            "op": "MatMul",
            "group": "transformer",
            "macs": 7_450_000,
            "weighted": True,
            "precision": "fp16",
            "reason": "attention matmul: FP16 is faster than INT8 on Orin",
        }
        for block in range(8)
        for index in (0, 1)
    ]
    nodes += [
        {
            "name": "head.fc/Gemm",
            "op": "Gemm",
            "group": "head",
            "macs": 3840,
            "weighted": True,
            "precision": "fp16",
            "reason": "classifier head: costs nothing in FP16",
        },
        {
            "name": "backbone.stem.conv/Conv",
            "op": "Conv",
            "group": "stem",
            "macs": 118_000_000,
            "weighted": True,
            "precision": "fp16",
            "reason": "excluded by the pattern 'backbone.stem.*'",
        },
    ]
    document = {
        "precision": "int8",
        "quantizer": "resvit",
        "estimator": "mse",
        "groups": {
            "stem": {"nodes": 1, "quantized_nodes": 0, "macs": 118_000_000, "quantized_macs": 0},
            "trunk": {"nodes": 24, "quantized_nodes": 24, "macs": 1_904_000_000, "quantized_macs": 1_904_000_000},
            "bridge": {"nodes": 1, "quantized_nodes": 1, "macs": 19_300_000, "quantized_macs": 19_300_000},
            "transformer": {"nodes": 48, "quantized_nodes": 32, "macs": 1_047_200_000, "quantized_macs": 928_000_000},
            "head": {"nodes": 1, "quantized_nodes": 0, "macs": 3840, "quantized_macs": 0},
        },
        "macs_share": 0.9232,
        "nodes": nodes,
        "fp32": [{"name": "blocks.7.norm1/LayerNormalization", "reason": "an activation reaches 91,204, beyond FP16"}],
        "effort": "fast",
        "clips": {},
        "smoothed": [],
        "bytes_before": 104_017_973,
        "bytes_after": 26_742_769,
    }
    return QuantizeReport.from_json({**document, **changes})


def ranges(tensors: int = 30) -> Ranges:
    random = np.random.default_rng(0)
    found = {}
    for index in range(tensors):
        values = np.abs(random.standard_t(2 + index % 7, 20_000)) * (1 + index % 5)
        largest = float(values.max())
        histogram = np.histogram(values, 64, (0, largest))[0]
        clip = float(np.quantile(values, 0.999 if index % 3 else 1.0))
        amax = {"int8": {"max": largest, "mse": clip}}
        tensor = TensorRange(-largest * 0.9, largest, amax, tuple(histogram.tolist()), largest / 64)
        found[f"blocks.{index}.mlp.fc1/Gelu_output_0"] = tensor
    found["blocks.3.mlp.fc1/Reshape_output_0"] = found["blocks.3.mlp.fc1/Gelu_output_0"]
    found["logits"] = TensorRange(-4.0, 9.0, {}, (), 0.0)
    return Ranges(found, 512, "4c" * 32)


def engine() -> EngineReport:
    kernels = [
        {
            "name": f"_gemm_mha_v2_0x{index:04x}",
            "type": "gemm" if index % 3 else "kgen",
            "inputs": ["Int8"] if index % 3 else ["Half", "Half"],
            "outputs": ["Half"],
            "input_shapes": [[1, 150_528]] if index % 3 else [[1, 37_632], [1, 37_632]],
            "output_shapes": [[1, 75_264]],
            "layers": [f"blocks.{index}.attn.qkv/MatMul", f"blocks.{index}.attn.qkv/Add"],
            "constants": [],
            "constant_shapes": [],
            "input_names": [],
            "output_names": [],
            "tactic": "",
        }
        for index in range(40)
    ]
    document = {
        "target": "rtx-4090",
        "builder": "TensorRT for RTX",
        "builder_version": "1.7.1",
        "sm": 89,
        "bytes": 27_911_040,
        "seconds": 7.31,
        "peak_mib": 1204,
        "sha256": "3d" * 32,
        "inputs": [],
        "outputs": [],
        "warnings": [],
        "kernels": kernels,
    }
    return EngineReport.from_json(Record(document, "engine.json"))


def plan(**changes: Any) -> DevicePlan:
    document = {
        "target": "jetson-orin",
        "why": "An engine is bound to the GPU that built it, and an x86 machine cannot build for Orin. Run this there.",
        "commands": [
            "unzip resvit-small-int8.resvit -d resvit-small",
            "/usr/src/tensorrt/bin/trtexec --onnx=resvit-small/model.onnx --stronglyTyped "
            "--minShapes=input:1x3x224x224 --optShapes=input:1x3x224x224 --maxShapes=input:8x3x224x224 "
            "--memPoolSize=workspace:1024 --saveEngine=resvit-small.plan",
        ],
        "notes": ["Lock the clocks before timing."],
        "settings": {
            "batch": [1, 1, 8],
            "workspace_mib": 1024,
            "optimization_level": 3,
            "input": "input",
            "input_shape": [3, 224, 224],
            "dynamic_batch": True,
        },
    }
    return DevicePlan.from_json(Record({**document, **changes}, "plan.json"))


def images() -> list[ChangedImage]:
    random = np.random.default_rng(1)
    grid = np.add.outer(np.arange(28), np.arange(28))
    return [
        ChangedImage(
            pixels=((grid * (index + 3) + random.integers(0, 40, (28, 28))) % 256).astype(np.uint8)[..., None],
            label=index % 10,
            float_class=(index + index % 2) % 10,
            quantized_class=(index + (index + 1) % 2 * (1 + index % 3)) % 10,
            names=NAMES,
        )
        for index in range(12)
    ]


def full(kind: str = "accepted") -> ReportData:
    return ReportData(
        name="resvit_small_r26 on jetson-orin",
        fold=FoldReport.from_json(
            {
                "items": [{"kind": "weight_standardisation", "where": f"backbone.stages.{i}.conv1"} for i in range(9)]
                + [{"kind": "batch_norm", "where": f"backbone.stages.{i}.bn"} for i in range(3)],
                "max_abs_error": 3.1e-6,
                "max_rel_error": 4.4e-7,
            }
        ),
        export=ExportReport.from_json(
            {
                "opset": 20,
                "operators": {"Conv": 27},
                "parity_batches": [1, 2],
                "notes": [],
                "nodes": 612,
                "parity_max_abs": 1.9e-5,
                "parity_max_rel": 2.2e-6,
                "input": {"name": "input", "shape": ["batch", 3, 224, 224]},
                "outputs": [{"name": "logits", "shape": ["batch", 10]}],
                "parameters": 25_912_330,
                "bytes": 104_017_973,
            }
        ),
        ranges=ranges(),
        quantize=quantize(),
        verdict=verdict(kind),
        engine=engine(),
        plan=plan(),
        bundle=Manifest(files=(BundledFile("model.onnx", 5, "be" * 32),)),
        recipe='[model]\nname = "resvit-small"\n\n[quantize]\nprecision = "int8"\nestimator = "mse"\n',
        targets=[target for target in TARGETS if target.name in ("jetson-orin", "rtx-4090")],
        versions={"resvit-export": "0.1.0", "torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": "1.32.0"},
        digests={"checkpoint": "1f" * 32, "float ONNX": "2e" * 32, "engine": "3d" * 32},
        images=images(),
    )


class _Outline(HTMLParser):
    """Check that tags nest, and gather what a reader or a browser would meet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def headings(self) -> list[str]:
        return [str(attrs["id"]) for tag, attrs in self.attributes if tag == "h2"]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "word"), [("accepted", "Accepted"), ("rejected", "Rejected"), ("undecided", "Undecided")]
)
def test_the_verdict_comes_first_in_words(kind: str, word: str) -> None:
    page = _Outline(html_from_run(full(kind)))
    assert (
        page.text.index(word) < page.text.index(verdict(kind).reason[1:] + ".") < page.text.index("Accuracy by stage")
    )
    header = dict(page.attributes)["header"]
    assert header["class"] == f"hero {kind}"
    assert ("About 24,000 images would settle it" in page.text) == (kind == "undecided")


def test_every_stage_has_its_section_and_a_missing_one_has_none() -> None:
    assert _Outline(html_from_run(full())).headings() == [
        "accuracy",
        "groups",
        "kept",
        "sizes",
        "ranges",
        "changed",
        "engine",
        "plan",
        "network",
        "targets",
        "recipe",
        "versions",
    ]
    empty = _Outline(html_from_run(ReportData(name="run")))
    assert empty.headings() == []
    assert "Not validated" in empty.text
    assert empty.text.count("not run") == 8
    half = dataclasses.replace(full(), verdict=None, engine=None, plan=None, images=(), quantize=None)
    assert _Outline(html_from_run(half)).headings() == [
        "sizes",
        "ranges",
        "network",
        "targets",
        "recipe",
        "versions",
    ]


@pytest.mark.whole
@pytest.mark.parametrize("stage", [f.name for f in dataclasses.fields(ReportData) if f.name != "name"])
def test_any_one_stage_may_be_missing(stage: str) -> None:
    default = () if stage in ("images", "targets", "next_commands", "preprocess") else None
    _Outline(html_from_run(dataclasses.replace(full(), **{stage: default})))


def test_the_page_asks_the_network_for_nothing() -> None:
    page = html_from_run(full())
    for tag, attributes in _Outline(page).attributes:
        assert tag not in ("script", "link", "iframe")
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith("data:")
    assert "http://" not in page
    assert "https://" not in page
    assert "url(#" in page
    assert not re.search(r"url\((?!#)", page)


def test_everything_is_escaped() -> None:
    evil = "<script>alert('&')</script>\x1b]0;owned\x07\x00\x9b\u202e\udc80"
    node = {"name": evil, "op": evil, "group": evil, "macs": 1, "weighted": True, "precision": "fp16", "reason": evil}
    data = dataclasses.replace(
        full(),
        name=evil,
        recipe=evil,
        quantize=quantize(nodes=[node]),
        verdict=verdict(reason=evil, data=evil),
        images=[dataclasses.replace(image, names=[evil] * 10) for image in images()],
        plan=plan(target=evil, why=evil, commands=[evil], notes=[evil]),
        digests={evil: evil},
    )
    page = html_from_run(data)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;" in page
    assert "\\x1b]0;owned\\x07\\x00\\x9b\\u202e\\x80" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\ud800-\udfff]", page)
    _Outline(page)


@pytest.mark.whole
def test_same_data_same_page(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", full())
    write_report(tmp_path / "b.html", full())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == html_from_run(full())


def test_pictures_and_tables_can_be_read_aloud() -> None:
    page = _Outline(html_from_run(full()))
    for tag, attributes in page.attributes:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    ids = [attrs["id"] for _, attrs in page.attributes if attrs.get("id")]
    assert len(ids) == len(set(ids))


def test_drop_intervals_share_one_axis_with_the_limit() -> None:
    laid = accuracy_from_verdict(verdict("rejected"))
    last = laid.rows[-1]
    assert last.side == "over"
    assert last.left is not None
    assert last.dot is not None
    assert last.right is not None
    assert 0 <= laid.zero_at < laid.limit_at < last.left < last.dot < last.right <= 100
    assert laid.rows[0].dot is None
    accepted = accuracy_from_verdict(verdict("accepted")).rows[-1]
    assert accepted.side == ""
    assert accuracy_from_verdict(verdict("undecided")).rows[-1].side == "across"
    assert accepted.interval == "\N{MINUS SIGN}0.02 to 0.44"


def test_an_sqnr_is_held_against_the_least_one_and_not_called_a_drop() -> None:
    def row(name: str, sqnr: float, drop: float, *interval: float) -> dict[str, Any]:
        known = {"metric": "SQNR", "unit": "dB", "agreement_of": "", "value": sqnr, "values": {"SQNR": sqnr}}
        return {"stage": name, "agreement": 0.99, "sqnr_db": sqnr, "drop": drop, "interval": list(interval), **known}

    stages = [row("pytorch", 100.0, -80.0, -80.0, -80.0), row("onnx int8", 30.3, -10.32, -11.0, -9.5)]
    record = verdict(metric="SQNR", unit="dB", max_drop=0.0, stages=stages)
    page = _Outline(html_from_run(ReportData(name="run", verdict=record, least_sqnr_db=20.0))).text
    for text in ("30.3 dB", "Least SQNR allowed", "20 dB", "Above the least", "+10.3 dB", "9.50 to 11.00"):
        assert text in page
    assert "100.0" not in page
    assert "Largest drop" not in page
    assert "Drop" not in page


def test_the_next_commands_stand_on_the_page_whole() -> None:
    commands = [("resvit-export build --run 'my run' --device ssh://USER@HOST", "build it there"), ("next", "or this")]
    page = _Outline(html_from_run(dataclasses.replace(full(), next_commands=commands)))
    assert page.headings()[0] == "next"
    assert "Build it there" in page.text
    assert all(command in page.text for command, _ in commands)
    assert "next" not in _Outline(html_from_run(full())).headings()


def test_the_preprocessing_stands_on_the_page_step_by_step() -> None:
    page = _Outline(
        html_from_run(dataclasses.replace(full(), preprocess=[("resize", "stretched to 28 x 28, bilinear")]))
    )
    assert "preprocess" in page.headings()
    assert "Resize" in page.text
    assert "stretched to 28 x 28, bilinear" in page.text


def test_a_verdict_without_numbers_still_renders() -> None:
    rows = [stage("onnx int8", None, None, None, None, None, None)]
    broken = verdict("rejected", reason="The quantised network returns NaN.", stages=rows)
    text = _Outline(html_from_run(ReportData(name="run", verdict=broken))).text
    assert "returns NaN" in text


def test_who_is_to_blame_for_a_low_ratio_is_said_below_the_verdict() -> None:
    blame = OwnNoise(9.2, 12.5, 40.5, 77, (("blocks.3.mlp.fc1/Gelu_output_0", 21.0),))
    page = html_from_run(ReportData(name="run", verdict=verdict("rejected", blame=blame.to_json())))
    assert "The network&#39;s own sensitivity is to blame" in page
    assert "the float network keeps 12.5 dB" in page
    assert "to blame" not in html_from_run(ReportData(name="run", verdict=verdict("rejected")))


def test_chance_level_is_said_in_words() -> None:
    page = html_from_run(ReportData(name="run", verdict=verdict("undecided", chance_level=True)))
    assert "no drop can be measured" in page


def test_the_held_back_check_is_told_with_its_figures_and_what_its_layers_take() -> None:
    tried = (
        Tried(OURS, 18.2, 0.986),
        Tried("plain max", 14.9, 0.978, -3.3, 1.5),
        Tried("all methods, 1 layer in FP16", 20.9, 0.99, 2.7, 0.4),
    )
    check = HeldBackCheck(16, False, tried, tried[2].what, (MendedLayer("stem.dw/Conv", 0.31, 0.004),))
    times = [
        LayerTime(name, LayerKind.CONV, Precision.FP16, 1.0, 1.0, 1.0, 0.0, total, 1, 1, 1)
        for name, total in (("stem.dw/Conv", 12.5), ("wide/Conv", 87.5))
    ]
    predicted = Prediction("l4", tuple(times))
    costs = CostsRecord(predicted, predicted)
    held = quantize(held_back=check.to_json())
    page = html_from_run(dataclasses.replace(full(), quantize=held, costs=costs))
    section = page[page.index('id="held-back"') : page.index('id="costs"')]
    for text in (
        "16 calibration images",
        "18.2 dB",
        "97.8%",
        "-3.3 ± 1.5 dB",
        "Taken: all methods, 1 layer in FP16",
        "31%",
    ):
        assert text in section
    assert "Left in FP16 because their error is out of line: 1 layer, 12.5 of 100.0 µs." in page
    assert "Left in FP16 as heads" not in page
    (node, *_) = held.nodes
    head = dataclasses.replace(node, name="wide/Conv", group="head", precision="fp16", weighted=True)
    held = dataclasses.replace(held, nodes=(*held.nodes, head))
    page = html_from_run(dataclasses.replace(full(), quantize=held, costs=costs))
    assert "Left in FP16 as heads: 1 layer, 87.5 of 100.0 µs." in page
    assert 'id="held-back"' not in html_from_run(full())


def test_kept_nodes_are_grouped_by_reason_with_the_most_arithmetic_first() -> None:
    kept = kept_from_quantize(quantize())
    assert [(item.count, item.macs) for item in kept] == [
        ("16 nodes", "3.9% of the arithmetic"),
        ("1 node", "3.8% of the arithmetic"),
        ("1 node", "< 0.001% of the arithmetic"),
        ("1 node", ""),
    ]
    assert kept[3].nodes == [("blocks.7.norm1/LayerNormalization", "", "FP32")]


def test_ranges_that_clip_most_come_first() -> None:
    pictures = pictures_from_ranges(ranges(), quantize())
    assert len(pictures) == 30
    clipping = [picture.beyond != "not clipped" for picture in pictures]
    assert clipping == sorted(clipping, reverse=True)
    assert sum(clipping) == 20
    assert [picture.views for picture in pictures if picture.name.startswith("blocks.3.")] == ["1 view"]
    without = pictures_from_ranges(ranges(), None)
    assert all(picture.clip_at is None for picture in without)
    assert [picture.name[:9] for picture in without[8:12]] == ["blocks.8.", "blocks.9.", "blocks.10", "blocks.11"]


def test_share_beyond_a_clip() -> None:
    assert share_beyond([6, 2, 2], 1.0, 2.0) == pytest.approx(0.2)
    assert share_beyond([6, 2, 2], 1.0, 1.5) == pytest.approx(0.3)
    assert share_beyond([6, 2, 2], 1.0, 9.0) == 0.0
    assert share_beyond([0, 0], 1.0, 0.5) == 0.0


def test_histogram_path() -> None:
    assert steps_from_histogram([0, 5], 1.0, 2.0) == "M0 48L0.0 48.0H80.0L80.0 2.0H160.0V48Z"
    assert steps_from_histogram([], 1.0, 1.0) == "M0 48V48Z"


def test_ticks() -> None:
    assert ticks_between(-0.2, 1.1) == ([0.0, 0.5, 1.0], 1)
    assert ticks_between(-3.0, 40.0) == ([0.0, 10.0, 20.0, 30.0, 40.0], 0)
    assert ticks_between(0.0, 0.05)[1] == 2


def test_words() -> None:
    assert number(-0.001) == "0.00"
    assert number(-1.5, 1) == "\N{MINUS SIGN}1.5"
    assert number(None) == "\N{EN DASH}"
    assert percent(0.98765) == "98.77%"
    assert [small_percent(v) for v in (0, 4e-6, 0.00031, 0.0995, 0.12)] == ["0%", "< 0.001%", "0.031%", "10%", "12%"]
    assert size(512) == "0.5 KiB"
    assert size(3 << 20) == "3.0 MiB"
    assert significant(1_236.0) == "1,240"
    assert significant(-0.01234) == "\N{MINUS SIGN}0.0123"
    assert operations(4_210_000_000) == "4.21 G"
    assert operations(118_000_000) == "118 M"


def test_png_holds_the_pixels() -> None:
    from PIL import Image

    color = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    for pixels in (color, color[..., :1], color[..., 0]):
        read = np.asarray(Image.open(io.BytesIO(png_from_pixels(pixels))))
        assert np.array_equal(read, pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    large = png_from_pixels(np.zeros((1000, 600, 3), np.uint8))
    assert struct.unpack(">II", large[16:24]) == (150, 250)
    assert zlib.crc32(large[12:29]) == struct.unpack(">I", large[29:33])[0]
    page = html_from_run(full())
    assert base64.b64encode(png_from_pixels(images()[0].pixels)).decode() in page
