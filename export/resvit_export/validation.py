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
    from resvit_calibrate.answers.base import Task
    from resvit_calibrate.gate.comparison import Comparison
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.ranges.diagnostics import Remark
    from resvit_calibrate.runtime.sessions import Array, Arrays

CHANGED_SHOWN = 24
DRAWN = 8
"""Of these, those over which answers are drawn: each takes a row of the report."""
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
    task: Task,
    quantized: Path,
    floating: Path,
    statistics: Path,
    baseline: Path,
    reference: Path | None,
    images: ImageSet,
    batch_size: int,
    sets: bool,
    recipe: Recipe,
    reporter: Reporter,
) -> None:
    """Score the quantised ONNX against the original network; write ``verdict.json`` and the changed images.

    The original is PyTorch where the model came as PyTorch, else the float ONNX. Before anything is scored, the
    runtime proves on known numbers that it quantises rightly. ``sets`` says that the graph selects its answers, so
    that their order means nothing.
    """
    from resvit_calibrate.answers.classes import INPUT
    from resvit_calibrate.gate.gate import judge
    from resvit_calibrate.ranges.diagnostics import tell
    from resvit_calibrate.runtime.runner import checked_runner
    from resvit_calibrate.runtime.selftest import runtime_note, self_test

    self_test()
    onnx_float = task.load(baseline)
    original = task.load(reference / "pytorch.npz") if reference else onnx_float
    what = f"onnx {recipe.precision}"
    golden = next(images.batches(GOLDEN_IMAGES)).feeds(INPUT)
    runner, remark = checked_runner(quantized, golden, sets=sets)
    if remark:
        reporter.warn(remark)
    candidate = task.answers(runner, images, batch_size, reporter, f"validate ({what})")
    candidate.save(folder / "predictions.npz")

    comparison = task.compare(original, candidate, recipe.confidence)
    verdict = judge(comparison, recipe.max_drop, recipe.confidence)
    itself = task.compare(original, original, recipe.confidence)
    stages = [_row("pytorch" if reference else "onnx float", itself)]
    if reference and (reference / "pruned.npz").exists():
        before = task.load(reference / "pruned.npz")
        stages.append(_row("pruned", task.compare(original, before, recipe.confidence)))
    if reference:
        stages.append(_row("onnx float", task.compare(original, onnx_float, recipe.confidence)))
    stages.append(_row(what, comparison))

    remarks = _clipping(quantized, floating, statistics, images, batch_size)
    tell(remarks, reporter)
    changed = task.changed(original, candidate)
    shown = changed[: DRAWN if changed and task.drawing(original, changed[0]["index"]) else CHANGED_SHOWN]
    document = {
        **verdict.to_json(),
        "task": task.name,
        "confidence": recipe.confidence,
        "images": len(images),
        "data": images.description,
        "data_digest": images.digest,
        "runtime_note": f"{runtime_note()} {remark}".strip(),
        "remarks": [item.to_json() for item in remarks],
        "golden": _golden_into(folder, golden, runner(golden), sets),
        "class_names": list(images.class_names or ()),
        "stages": stages,
        "changed_total": len(changed),
        "changed": shown,
    }
    (folder / "verdict.json").write_bytes(pretty_json(document))
    pictures = _pictures(task, images, original, candidate, shown, batch_size)
    np.savez_compressed(folder / "changed.npz", **pictures)  # type: ignore[arg-type]  # of the names, none is an option


def _golden_into(folder: Path, feeds: Arrays, outputs: Arrays, sets: bool = False) -> dict[str, Any]:
    """Write golden images and outputs, and say which file holds what.

    ``golden_output.npy`` is the output that is judged, ``logits`` or the first; of several, the others are
    ``golden_output_1.npy`` and so on, and ``outputs`` names them all; ``inputs`` names what is read beside the images.
    Of ``sets``, the order of the rows is not compared.
    """
    first = "logits" if "logits" in outputs else next(iter(outputs))
    files = {first: "golden_output.npy"}
    files |= {name: f"golden_output_{i}.npy" for i, name in enumerate((n for n in outputs if n != first), 1)}
    from resvit_calibrate.answers.classes import INPUT

    np.save(folder / "golden_input.npy", feeds[INPUT])
    beside = {name: f"golden_input_{i}.npy" for i, name in enumerate((n for n in feeds if n != INPUT), 1)}
    for name, file in beside.items():
        np.save(folder / file, feeds[name])
    for name, file in files.items():
        value = outputs[name]
        np.save(folder / file, value.astype(np.float32) if value.dtype.kind == "f" else value)
    golden: dict[str, Any] = {"input": "golden_input.npy", "output": "golden_output.npy"}
    golden |= {"inputs": beside} if beside else {}
    golden |= {"sets": True} if sets else {}
    return golden if len(files) == 1 else {**golden, "outputs": files}


def _clipping(
    quantized: Path, floating: Path, statistics: Path, images: ImageSet, batch_size: int
) -> tuple[Remark, ...]:
    """Whether the ranges, known from ``quantize.json``, cut much of what the first validation images hold."""
    from resvit_calibrate.ranges.clipping import clipped_shares, shares_from_statistics
    from resvit_calibrate.ranges.diagnostics import clipping_remarks
    from resvit_calibrate.ranges.statistics import load_statistics

    clips = json.loads(quantized.with_name("quantize.json").read_bytes()).get("clips") or {}
    if not clips:
        return ()
    batches = images.batches(min(batch_size, CLIPPING_IMAGES))
    few = itertools.islice(batches, max(CLIPPING_IMAGES // batch_size, 1))
    seen = load_statistics(statistics)
    return clipping_remarks(clipped_shares(floating, clips, few), shares_from_statistics(seen, clips))


def _row(stage: str, comparison: Comparison) -> dict[str, Any]:
    plain = comparison.to_json()
    kept = ("top1", "metric", "unit", "value", "values", "agreement", "agreement_of", "sqnr_db", "drop", "interval")
    return {"stage": stage, **{key: plain[key] for key in kept if key in plain}}


def _pictures(
    task: Task, images: ImageSet, original: Any, candidate: Any, shown: Sequence[dict[str, Any]], batch_size: int
) -> dict[str, Array]:
    """The images that changed, and what is drawn over them, for ``changed.npz``."""
    found: dict[str, Array] = {}
    for item in shown:
        for who, answers in (("float", original), ("quantized", candidate)):
            drawing = task.drawing(answers, item["index"])
            found |= {f"{who}_{item['index']}_{name}": value for name, value in drawing.items()}
    indices = [int(item["index"]) for item in shown]
    # What is drawn lies on the grid of the input; what is only shown is shown as people see it.
    if found:
        seen = _as_read(images, indices, batch_size)
    else:
        seen = {index: _small(picture) for index in indices if (picture := images.image(index)) is not None}
    return {**found, **{f"image_{index}": picture for index, picture in seen.items()}}


def _small(picture: Array) -> Array:
    """At most 224 pixels a side: it goes into the report."""
    step = max(1, -(-max(picture.shape[:2]) // _PICTURE_SIDE))
    return np.ascontiguousarray(picture[::step, ::step])


def _as_read(images: ImageSet, indices: Sequence[int], batch_size: int) -> dict[int, Array]:
    """Images as the network reads them: uint8 [h, w, 1 or 3] by index, each stretched to the whole range of grey."""
    found: dict[int, Array] = {}
    wanted, first = set(indices), 0
    for batch in images.batches(batch_size):
        for index in sorted(wanted & set(range(first, first + len(batch.images)))):
            values = batch.images[index - first].transpose(1, 2, 0).astype(np.float64)
            low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
            scaled = 255.0 * (values - low.min()) / max(float((high - low.min()).max()), 1e-12)
            found[index] = np.rint(scaled if scaled.shape[2] in (1, 3) else scaled[..., :1]).astype(np.uint8)
        first += len(batch.images)
        if len(found) == len(wanted):
            break
    return found
