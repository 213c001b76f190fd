"""The check on held-back images: methods that hurt are left out, layers out of line stay in FP16, and it is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize_graphs import Graph, outputs_of, sqnr
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.held_back import FEWEST, HELD_BACK, held_apart
from resvit_calibrate.images.image_set import Batch, DataSpec, ImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import ranges_from
from resvit_engines.errors import ExitCode, OutOfMemoryError
from resvit_engines.targets.table import Precision
from resvit_quantize.check.choose import Built, HeldBack, build, checked
from resvit_quantize.check.judge import Errors, Judge, Sessions, best_of, gain, joined
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.qdq.held_back import OURS, HeldBackCheck, MendedLayer, Tried
from resvit_quantize.qdq.report import QuantizeReport
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import Effort, Methods, QuantizeSettings

INT8 = QuantizeSettings(Precision.INT8)
PLAIN = Methods(smoothing=False, shifting=False, output_ranges=False, bias_correction=False)


def source(images: np.ndarray, size: int = 4) -> Callable[[int], Iterator[Batch]]:
    def images_of(count: int) -> Iterator[Batch]:
        for start in range(0, min(count, len(images)), size):
            yield Batch(images[:count][start : start + size], None)

    return images_of


def quantized(
    path: Path, out: Path, seen: np.ndarray, held_back: HeldBack | None, settings: QuantizeSettings = INT8
) -> QuantizeReport:
    statistics = collect_statistics(path, [{"input": seen[at : at + 4]} for at in range(0, len(seen), 4)])
    return quantize_model(
        path, ranges_from(statistics, "digest"), settings, out, statistics=statistics, held_back=held_back
    )


# Images.


def image_set(tmp_path: Path, count: int, *, alike: bool = False) -> ImageSet:
    pixels = np.random.default_rng(1).integers(0, 255, (count, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels[:1].repeat(count, 0) if alike else pixels)
    np.savez(tmp_path / "others.npz", images=255 - pixels[:2])
    where = str(tmp_path / "images.npz"), str(tmp_path / "others.npz")
    spec = DataSpec(*where, calibration_images=count, validation_images=2, unlabelled=True)
    return open_image_sets(spec, Preprocess((8, 8), 3))[0]


@pytest.mark.parametrize(("count", "held"), [(FEWEST, 8), (128, 16), (200, HELD_BACK)])
def test_the_first_images_are_held_back_and_no_range_is_taken_from_them(tmp_path: Path, count: int, held: int) -> None:
    images = image_set(tmp_path, count)
    apart = held_apart(images)
    assert apart.held is not None
    assert apart.held.contents == images.contents[:held]
    assert apart.ranges.contents == images.contents[held:]
    assert len(next(apart.held.batches(32)).images) == held


def test_of_few_images_none_is_held_back(tmp_path: Path) -> None:
    images = image_set(tmp_path, FEWEST - 1)
    apart = held_apart(images)
    assert apart.held is None
    assert apart.ranges is images


def test_where_all_images_are_equal_none_is_held_back(tmp_path: Path) -> None:
    assert held_apart(image_set(tmp_path, 100, alike=True)).held is None


# What differs beyond noise.


def errors(noise: np.ndarray, alike: np.ndarray | None = None) -> Errors:
    return Errors(noise[:, None], np.ones((len(noise), 1)), alike)


def test_a_gain_on_every_image_is_real_and_one_that_a_single_image_carries_is_not() -> None:
    noise = np.full(8, 0.1)
    assert gain(errors(noise), errors(noise / 2)).is_real
    assert gain(errors(noise), errors(noise / 2)).gain_db == pytest.approx(10 * math.log10(2))
    one = noise.copy()
    one[3] = 10.0
    assert gain(errors(one), errors(noise)).gain_db > 10.0
    assert not gain(errors(one), errors(noise)).is_real


def test_where_one_image_holds_most_of_the_noise_the_others_tell() -> None:
    noise = np.full(8, 0.1)
    noise[3] = 30.0
    after = noise / np.array([3.0, 4.0, 2.5, 1.05, 3.5, 3.0, 2.0, 4.0])
    found = gain(errors(noise), errors(after))
    assert found.gain_db < 2.0 * found.noise_db
    assert found.is_real
    assert not gain(errors(after), errors(noise)).is_real


def test_a_gain_that_costs_decisions_is_not_taken() -> None:
    noise = np.full(8, 0.1)
    assert not gain(errors(noise, np.full(8, 0.9)), errors(noise / 2, np.linspace(0.5, 0.6, 8))).is_real


def test_the_best_of_all_ways_is_taken_and_ours_where_none_is_better_by_more_than_noise() -> None:
    steady = np.linspace(0.9, 1.1, 8) * 0.1
    uneven = steady * np.array([0.4, 2.4, 0.5, 2.2, 0.4, 2.0, 0.5, 0.3])
    ways = {OURS: errors(steady), "plain max": errors(steady / 1.5), "without smoothing": errors(steady / 2.5)}
    assert best_of(ways, OURS) == "without smoothing"
    assert best_of({**ways, "without shifting": errors(steady / 2.6)}, OURS) == "without shifting"
    assert best_of({OURS: errors(steady), "plain max": errors(uneven)}, OURS) == OURS
    assert best_of({OURS: errors(uneven), "plain max": errors(steady)}, OURS) == OURS
    # More signal is kept, but fewer decisions.
    lost = errors(steady / 2.0, np.linspace(0.5, 0.6, 8))
    assert best_of({OURS: errors(steady, np.full(8, 0.9)), "plain max": lost}, OURS) == OURS


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_what_all_images_share_is_no_signal(tmp_path: Path, offset: float, size: int) -> None:
    """Outputs with a common offset are judged as those without: 25 dB of them were kept by noise alone."""
    random = np.random.default_rng(0)
    g = Graph("batch", 40)
    clean = g.op("Add", "input", g.constant("offset", np.full(40, offset, np.float32)))
    path = g.save(tmp_path / "m.onnx", clean)
    images = random.normal(size=(16, 40)).astype(np.float32)
    judge = Judge(path, [{"input": images[at : at + size]} for at in range(0, 16, size)])
    noise = 0.5 * random.normal(size=images.shape).astype(np.float32)
    parts, seen = [], 0
    for at, batch in enumerate(judge.batches):
        expected, rows = judge.expected(at), len(batch["input"])
        parts.append(judge.against(at, {n: v + noise[seen : seen + rows] for n, v in expected.items()}))
        seen += rows
    assert joined(parts).sqnr_db == pytest.approx(6.0, abs=1.0)
    same = Judge(path, [{"input": images[:1].repeat(8, 0)}])
    error = same.against(0, {n: v + noise[:4] for n, v in same.expected(0).items()})
    assert error.signal == pytest.approx(np.square(images[0] + offset).sum(), rel=1e-4)


def test_three_images_tell_nothing_and_numbers_that_are_not_finite_lose() -> None:
    noise = np.full(8, 0.1)
    assert not gain(errors(noise[:3]), errors(noise[:3] / 100)).is_real
    assert gain(errors(np.where(np.arange(8) == 2, np.nan, noise)), errors(noise)).gain_db > 100.0


# Methods.


def unlike(path: Path) -> Path:
    """Half of the hidden channels hang on features that calibration hardly shows."""
    g = Graph("N", 32, 32)
    weight = g.random.standard_normal((32, 64)).astype(np.float32) / 4
    weight[8:, :32] = 0.0
    weight[:8, 32:] = 0.0
    hidden = g.op("MatMul", "input", g.constant("fc1.weight", weight), name="fc1/MatMul")
    hidden = g.op("Relu", hidden, name="fc1/Relu")
    value = g.linear(hidden, 64, 48, "fc2")
    pooled = g.op("ReduceMean", value, g.ints(1), name="pool", keepdims=0)
    head, bias = g.weight("head.weight", 10, 48), g.weight("head.bias", 10)
    return g.save(path, g.op("Gemm", pooled, head, bias, name="head", transB=1))


def features(count: int, seed: int, first: float) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, 32, 32)).astype(np.float32)
    values[:, :, :8] *= first
    return values


def test_a_method_that_hurts_on_held_back_images_is_left_out(tmp_path: Path) -> None:
    path = unlike(tmp_path / "float.onnx")
    seen, held, others = features(64, 0, 0.01), features(16, 1, 1.0), features(64, 2, 1.0)
    expected = outputs_of(path, others)["logits"]
    before = quantized(path, tmp_path / "ours.onnx", seen, None)
    assert before.smoothed
    assert before.held_back is None
    quantized(path, tmp_path / "plain.onnx", seen, None, replace(INT8, methods=PLAIN))
    report = quantized(path, tmp_path / "checked.onnx", seen, HeldBack(source(held)))
    ours, plain, checked = (
        sqnr(expected, outputs_of(tmp_path / f"{name}.onnx", others)["logits"]) for name in ("ours", "plain", "checked")
    )
    assert ours < plain - 3.0
    assert checked > plain - 0.5
    check = report.held_back
    assert check is not None
    assert check.plain
    assert not report.smoothed
    assert (check.images, check.by_halves) == (16, False)
    assert [item.what for item in check.tried[:3]] == [OURS, "plain max", "plain percentile"]
    assert {item.images for item in check.tried} <= {4, 16}
    assert f"Taken: {check.taken}" in check.sentence


@pytest.mark.parametrize("apart", [True, False])
def test_large_networks_are_asked_one_at_a_time_with_the_same_result(
    tmp_path: Path, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, held = unlike(tmp_path / "float.onnx"), features(32, 0, 0.01), features(16, 1, 1.0)
    held_back = HeldBack(source(held if apart else seen), apart=apart)
    together = quantized(path, tmp_path / "together.onnx", seen, held_back)
    most, runner = [], Sessions.runner

    def counted(self: Sessions, session: Any) -> Any:
        found = runner(self, session)
        most.append(sum(known.runner is not None for known in {*self._known, session}))
        return found

    monkeypatch.setattr(Sessions, "runner", counted)
    quantized(path, tmp_path / "again.onnx", seen, held_back)
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr("resvit_quantize.check.choose.EXTERNAL_ABOVE", 0)
    assert quantized(path, tmp_path / "alone.onnx", seen, held_back) == together
    assert (tmp_path / "alone.onnx").read_bytes() == (tmp_path / "together.onnx").read_bytes()
    assert max(most) == 1


def test_outputs_that_do_not_tell_images_apart_are_judged_image_by_image(tmp_path: Path) -> None:
    g = Graph("N", 32, 32)
    hidden = g.op("Relu", g.linear("input", 32, 64, "fc1"), name="fc1/Relu")
    summed = g.op("ReduceSum", g.linear(hidden, 64, 48, "fc2"), g.ints(0), name="sum", keepdims=0)
    path = g.save(tmp_path / "float.onnx", summed)
    images = features(24, 0, 1.0)
    check = quantized(path, tmp_path / "out.onnx", images[:8], HeldBack(source(images[8:]))).held_back
    assert check is not None
    assert check.images in (4, 16)
    assert all(math.isfinite(item.noise_db) for item in check.tried)


def test_methods_that_serve_are_kept_and_the_file_is_the_same(tmp_path: Path) -> None:
    path = unlike(tmp_path / "float.onnx")
    report = quantized(path, tmp_path / "checked.onnx", features(64, 0, 1.0), HeldBack(source(features(16, 1, 1.0))))
    assert report.held_back is not None
    assert report.held_back.taken == OURS
    quantized(path, tmp_path / "ours.onnx", features(64, 0, 1.0), None)
    assert (tmp_path / "checked.onnx").read_bytes() == (tmp_path / "ours.onnx").read_bytes()


def test_of_few_images_each_half_judges_the_other_and_the_same_comes_out_again(tmp_path: Path) -> None:
    path, seen = unlike(tmp_path / "float.onnx"), features(8, 0, 1.0)
    held_back = HeldBack(source(seen), apart=False)
    reports = [quantized(path, tmp_path / f"{name}.onnx", seen, held_back) for name in "ab"]
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert reports[0] == reports[1]
    check = reports[0].held_back
    assert check is not None
    assert (check.images, check.by_halves) == (4, True)  # which leave no doubt


def test_too_few_images_are_said(tmp_path: Path) -> None:
    path, seen = unlike(tmp_path / "float.onnx"), features(3, 0, 1.0)
    check = quantized(path, tmp_path / "out.onnx", seen, HeldBack(source(seen), apart=False)).held_back
    assert check is not None
    assert check.sentence == "Held-back check: none (there are 3 images, and it takes 4)."


def test_where_memory_does_not_reach_nothing_is_compared_and_the_build_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = unlike(tmp_path / "float.onnx"), []

    def full(*_: object, frugal: bool) -> None:
        asked.append(frugal)
        raise OutOfMemoryError("Memory ran out.", "Close what takes it.", ExitCode.SYSTEM)

    seen = features(64, 1, 1.0)
    quantized(path, tmp_path / "unchecked.onnx", seen, None)
    monkeypatch.setattr("resvit_calibrate.runtime.runner.run_session", full)
    check = quantized(path, tmp_path / "checked.onnx", seen, HeldBack(source(features(16, 2, 1.0)))).held_back
    assert asked == [True]
    assert check is not None
    assert check.sentence == "Held-back check: none (memory ran out)."
    assert (tmp_path / "unchecked.onnx").read_bytes() == (tmp_path / "checked.onnx").read_bytes()


# Layers.


def uneven(path: Path) -> Path:
    """A depthwise convolution of one channel that is far larger than the others, and small weights on it."""
    g = Graph("N", 16, 16, 16)
    array = (g.random.standard_normal((64, 16, 3, 3)) / 12).astype(np.float32)
    array[:16] *= 2000.0
    first = g.constant("first.scaled", array)
    value = g.op("Relu", g.op("Conv", "input", first, name="first/Conv", pads=[1] * 4), name="first/Relu")
    array = (g.random.standard_normal((64, 1, 3, 3)) / 3).astype(np.float32)
    array[:16] /= 2000.0
    depthwise = g.constant("depthwise.weight", array)
    value = g.op("Conv", value, depthwise, name="depthwise/Conv", pads=[1] * 4, group=64)
    value = g.op("Relu", g.conv(value, 64, 64, name="wide/Conv"), name="wide/Relu")
    pooled = g.op("GlobalAveragePool", g.conv(value, 64, 64, name="last/Conv"), name="pool")
    flat = g.op("Flatten", pooled, name="flat")
    head, bias = g.weight("head.weight", 10, 64), g.weight("head.bias", 10)
    return g.save(path, g.op("Gemm", flat, head, bias, name="head", transB=1))


@pytest.mark.whole
def test_a_layer_out_of_line_stays_in_fp16_and_its_cost_is_told(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = uneven(tmp_path / "float.onnx")
    images = np.random.default_rng(0).standard_normal((72, 16, 16, 16)).astype(np.float32)
    seen, held, others = images[:32], images[32:48], images[48:]
    settings = replace(INT8, methods=Methods(smoothing=False, shifting=False))
    without = quantized(path, tmp_path / "ours.onnx", seen, HeldBack(source(held)), settings)
    report = quantized(path, tmp_path / "mended.onnx", seen, HeldBack(source(held), ranged=source(seen)), settings)
    expected = outputs_of(path, others)["logits"]
    ours, mended = (
        sqnr(expected, outputs_of(tmp_path / f"{name}.onnx", others)["logits"]) for name in ("ours", "mended")
    )
    assert mended > ours + 3.0
    assert without.held_back is not None
    assert without.held_back.mended == ()
    check = report.held_back
    assert check is not None
    assert [item.node for item in check.mended] == ["depthwise/Conv"]
    assert check.mended[0].macs < 0.02 < 0.3 < check.mended[0].noise
    assert check.precisions == {"depthwise/Conv": "fp16"}
    nodes = {node.name: (node.precision, node.reason) for node in report.nodes}
    assert nodes["depthwise/Conv"][0] == "fp16"
    assert nodes["depthwise/Conv"][1].startswith("its error is out of line")
    assert nodes["wide/Conv"][0] == "int8"
    asked = replace(settings, include=("depthwise/*",))
    kept = quantized(path, tmp_path / "asked.onnx", seen, HeldBack(source(held), ranged=source(seen)), asked)
    assert kept.held_back is not None
    assert "depthwise/Conv" not in {item.node for item in kept.held_back.mended}


def test_the_larger_bound_is_tried_where_the_smaller_one_gains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = uneven(tmp_path / "float.onnx")
    images = np.random.default_rng(0).standard_normal((48, 16, 16, 16)).astype(np.float32)
    small = (MendedLayer("last/Conv", 0.02, 0.01),)
    large = (*small, MendedLayer("depthwise/Conv", 0.9, 0.01))
    told = {0.02: small, 0.06: large}
    monkeypatch.setattr("resvit_quantize.check.choose.layers_out_of_line", lambda *_: (told, ""))
    settings = replace(INT8, methods=Methods(smoothing=False, shifting=False))
    held = HeldBack(source(images[32:]), ranged=source(images[:32]))
    check = quantized(path, tmp_path / "mended.onnx", images[:32], held, settings).held_back
    assert check is not None
    assert check.mended == large
    tried = {item.what: item.gain_db for item in check.tried if "in FP16" in item.what}
    assert list(tried) == [
        f"{check.taken.split(',')[0]}, {count} layers ({share}% of the multiply-accumulates) in FP16"
        for count, share in ((1, "1.0"), (2, "2.0"))
    ]
    assert tried[check.taken] > 3.0


# The record.


def test_the_record_comes_back_as_it_was() -> None:
    tried = (Tried(OURS, math.inf, None, images=16), Tried("plain max", 20.5, 0.98, -1.0, math.inf, 4))
    mended = (MendedLayer("conv", 0.3, 0.01),)
    check = HeldBackCheck(16, False, tried, OURS, mended, "Nothing else.", {"conv": "fp16"})
    assert HeldBackCheck.from_json(json.loads(json.dumps(check.to_json(), allow_nan=False))) == check
    assert "plain max 20.5 dB (98.0% of the arg-max alike) on 4 of them" in check.sentence


# What is learned.


def test_learned_rounding_starts_from_the_way_that_stands_and_is_held_against_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path, seen = wide_head(tmp_path / "float.onnx", tailed=False), np.random.default_rng(0)
    images = seen.standard_normal((80, 16, 32)).astype(np.float32)
    held_back = HeldBack(source(images[64:]), ranged=source(images[:64]))
    report = quantized(path, tmp_path / "best.onnx", images[:64], held_back, replace(INT8, effort=Effort.BEST))
    check = report.held_back
    assert check is not None
    assert check.taken == f"{OURS}, the head in 8 bits, with learned rounding"
    assert check.tried[-1].what == check.taken
    assert check.precisions == {"head/MatMul": "int8"}
    assert next(node for node in report.nodes if node.name == "head/MatMul").precision == "int8"
    assert report.effort == "best"
    fast = quantized(path, tmp_path / "fast.onnx", images[:64], held_back)
    assert fast.held_back is not None
    assert fast.held_back.tried == check.tried[:-1]
    assert (tmp_path / "fast.onnx").read_bytes() != (tmp_path / "best.onnx").read_bytes()


def test_where_memory_does_not_reach_to_judge_it_what_is_learned_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, images = unlike(tmp_path / "float.onnx"), features(80, 0, 1.0)
    statistics = collect_statistics(path, [{"input": images[at : at + 4]} for at in range(0, 64, 4)])
    ranges, graph = ranges_from(statistics, "digest"), graph_from_onnx(path)

    def learn(settings: QuantizeSettings, source: Any) -> Built:
        monkeypatch.setattr(Judge, "answers", full)
        return build(graph, ranges, settings, statistics)

    def full(*_: object) -> None:
        raise MemoryError

    held = HeldBack(source(images[64:]), ranged=source(images[:64]))
    _, check = checked(path, graph, ranges, INT8, statistics, held, learn)
    assert check.taken.endswith(", with learned rounding")
    assert "does not fit into memory beside the float network, and was not compared" in check.note


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_learned_is_taken_unless_it_is_worse(tmp_path: Path, bits: int) -> None:
    path = unlike(tmp_path / "float.onnx")
    images = features(80, 0, 1.0)
    statistics = collect_statistics(path, [{"input": images[at : at + 4]} for at in range(0, 64, 4)])
    ranges, graph, asked = ranges_from(statistics, "digest"), graph_from_onnx(path), []

    def learn(settings: QuantizeSettings, source: Any) -> Built:
        asked.append(source)
        return build(graph, ranges, replace(settings, bits=bits), statistics)

    for apart in (True, False):
        held = HeldBack(source(images[64:]), apart=apart, ranged=source(images[:64]))
        built, check = checked(path, graph, ranges, INT8, statistics, held, learn)
        taken = bits == 8 or not apart
        assert check.taken.endswith(", with learned rounding") is taken
        assert built.settings.bits == (bits if taken else 8)
        assert ("Learned rounding has seen all images" in check.note) is not apart
        assert sum("learned" in item.what for item in check.tried) == apart
    assert [each is None for each in asked] == [False, True]


# Heads.


def wide_head(path: Path, *, tailed: bool) -> Path:
    """A head of 200 classes, which is most of the arithmetic, on values of one size or with a long tail."""
    g = Graph("N", 16, 32)
    value = g.linear("input", 32, 64, "fc1")
    spread = g.op("Mul", value, g.constant("spread", np.float32(1.5 if tailed else 0.5)), name="spread/Mul")
    value = g.op("Exp" if tailed else "Tanh", spread, name="values")
    return g.save(path, g.linear(value, 64, 200, "head"))


@pytest.mark.parametrize("tailed", [False, True])
def test_a_head_that_costs_something_goes_to_8_bits_unless_the_outputs_lose_by_it(tmp_path: Path, tailed: bool) -> None:
    path = wide_head(tmp_path / "float.onnx", tailed=tailed)
    images = np.random.default_rng(0).standard_normal((80, 16, 32)).astype(np.float32)
    report = quantized(path, tmp_path / "out.onnx", images[:64], HeldBack(source(images[64:])))
    head = next(node for node in report.nodes if node.name == "head/MatMul")
    assert head.precision == ("fp16" if tailed else "int8")
    assert head.reason.startswith(
        f"the outputs {'lose too much by it' if tailed else 'keep as much with it'} in 8 bits"
    )
    assert "in FP16 it takes 86.2% of the multiply-accumulates and 0.0 MiB of weights" in head.reason
    check = report.held_back
    assert check is not None
    tried = check.tried[-1]
    assert tried.what.endswith("the head in 8 bits")
    assert (check.taken == tried.what) is not tailed
    assert check.sentence.count("the head in 8 bits") == (1 if tailed else 2)


@pytest.mark.parametrize(
    "settings",
    [
        replace(INT8, exclude=("head",)),
        replace(INT8, include=("head",)),
        replace(INT8, precisions={"fc1/MatMul": Precision.INT8}),
    ],
    ids=["excluded", "included", "searched"],
)
def test_a_head_that_somebody_decided_on_is_left_as_it_is(tmp_path: Path, settings: QuantizeSettings) -> None:
    path = wide_head(tmp_path / "float.onnx", tailed=False)
    images = np.random.default_rng(0).standard_normal((80, 16, 32)).astype(np.float32)
    report = quantized(path, tmp_path / "out.onnx", images[:64], HeldBack(source(images[64:])), settings)
    head = next(node for node in report.nodes if node.name == "head/MatMul")
    assert head.precision == ("int8" if settings.include else "fp16")
    assert report.held_back is not None
    assert not any("the head" in item.what for item in report.held_back.tried)
