"""The validate stage: three runners on the same images, compared, judged and written down."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_export.recipe import Recipe

if TYPE_CHECKING:
    from resvit_calibrate.data import ImageSet
    from resvit_calibrate.metrics import Comparison
    from resvit_calibrate.remarks import Remark

CHANGED_SHOWN = 24
GOLDEN_IMAGES = 4
"""Images that travel with the bundle, with the outputs that were validated."""
_PICTURE_SIDE = 224
CLIPPING_IMAGES = 64
"""Images that tell whether validation looks like calibration."""


def images_per_call(shape: Sequence[int]) -> int:
    """How many images [C, H, W] go through a runner at once: 16 of 224 x 224, more of smaller ones, at most 128.

    Enough to keep the cores busy and calls rare; memory stays far below what one engine build takes.
    """
    return max(1, min(128, 2_500_000 // math.prod(shape)))


def validate(
    folder: Path,
    *,
    quantized: Path,
    floating: Path,
    statistics: Path,
    baseline: Path,
    reference: Path | None,
    images: ImageSet,
    batch_size: int,
    recipe: Recipe,
    reporter: Reporter,
) -> None:
    """Score the quantised ONNX against the original network; write ``verdict.json`` and the changed images.

    The original is PyTorch where the model came as PyTorch, else the float ONNX. Before anything is scored, the
    runtime proves on known numbers that it quantises rightly.
    """
    from resvit_calibrate.gate import judge
    from resvit_calibrate.metrics import INPUT, Predictions, changed_answers, compare, predict
    from resvit_calibrate.remarks import tell
    from resvit_calibrate.runtime import checked_runner, runtime_note, self_test

    self_test()
    onnx_float = Predictions.load(baseline)
    original = Predictions.load(reference / "pytorch.npz") if reference else onnx_float
    what = f"onnx {recipe.precision}"
    golden = next(images.batches(GOLDEN_IMAGES)).images
    runner, remark = checked_runner(quantized, {INPUT: golden})
    if remark:
        reporter.warn(remark)
    candidate = predict(runner, images, batch_size, reporter, f"validate ({what})")
    candidate.save(folder / "predictions.npz")
    np.save(folder / "golden_input.npy", golden)
    np.save(folder / "golden_output.npy", candidate.logits[: len(golden)])

    comparison = compare(original, candidate, recipe.confidence)
    verdict = judge(comparison, recipe.max_drop, original.logits.shape[1], recipe.confidence)
    stages = [_row("pytorch" if reference else "onnx float", compare(original, original, recipe.confidence))]
    if reference and (reference / "pruned.npz").exists():
        before = Predictions.load(reference / "pruned.npz")
        stages.append(_row("pruned", compare(original, before, recipe.confidence)))
    if reference:
        stages.append(_row("onnx float", compare(original, onnx_float, recipe.confidence)))
    stages.append(_row(what, comparison))

    remarks = _clipping(quantized, floating, statistics, images, batch_size)
    tell(remarks, reporter)
    changed = changed_answers(original, candidate)
    shown = changed[:CHANGED_SHOWN]
    document = {
        **verdict.to_json(),
        "max_drop": recipe.max_drop,
        "confidence": recipe.confidence,
        "images": len(images),
        "data": images.description,
        "data_digest": images.digest,
        "runtime_note": f"{runtime_note()} {remark}".strip(),
        "remarks": [item.to_json() for item in remarks],
        "class_names": list(images.class_names or ()),
        "stages": stages,
        "changed_total": len(changed),
        "changed": shown,
    }
    (folder / "verdict.json").write_bytes(pretty_json(document))
    pictures: dict[str, Any] = {
        f"image_{item['index']}": picture for item in shown if (picture := _picture(images, item["index"])) is not None
    }
    np.savez_compressed(folder / "changed.npz", **pictures)


def _clipping(
    quantized: Path, floating: Path, statistics: Path, images: ImageSet, batch_size: int
) -> tuple[Remark, ...]:
    """Whether the ranges, known from ``quantize.json``, cut much of what the first validation images hold."""
    from resvit_calibrate.clipping import clipped_shares, shares_from_statistics
    from resvit_calibrate.remarks import clipping_remarks
    from resvit_calibrate.statistics import load_statistics

    clips = json.loads(quantized.with_name("quantize.json").read_bytes()).get("clips") or {}
    if not clips:
        return ()
    batches = images.batches(min(batch_size, CLIPPING_IMAGES))
    few = itertools.islice(batches, max(CLIPPING_IMAGES // batch_size, 1))
    seen = load_statistics(statistics)
    return clipping_remarks(clipped_shares(floating, clips, few), shares_from_statistics(seen, clips))


def _row(stage: str, comparison: Comparison) -> dict[str, Any]:
    plain = comparison.to_json()
    return {"stage": stage, **{key: plain[key] for key in ("top1", "agreement", "sqnr_db", "drop", "interval")}}


def _picture(images: ImageSet, index: int) -> np.ndarray[Any, Any] | None:
    """The image as people see it, at most 224 pixels a side: it goes into the report."""
    picture = images.image(index)
    if picture is None:
        return None
    step = max(1, -(-max(picture.shape[:2]) // _PICTURE_SIDE))
    return np.ascontiguousarray(picture[::step, ::step])
