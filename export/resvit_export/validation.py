"""The validate stage: three runners on the same images, compared, judged and written down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_export.recipe import Recipe

if TYPE_CHECKING:
    from resvit_calibrate.data import ImageSet
    from resvit_calibrate.metrics import Comparison, Predictions

CHANGED_SHOWN = 24
GOLDEN_IMAGES = 4
"""Images that travel with the bundle, with the outputs that were validated."""
_PICTURE_SIDE = 224


@dataclass(frozen=True)
class Scoring:
    """How an ONNX file is run over images: its input's name, and the batch it is fixed to (``None``: any)."""

    input_name: str
    fixed_batch: int | None

    @property
    def batch_size(self) -> int:
        """Images per call: the fixed batch, or enough to keep the cores busy."""
        return self.fixed_batch or 16

    def predict(self, model: Path, images: ImageSet, reporter: Reporter, what: str) -> Predictions:
        """Run ``model`` on every image; a last batch that is too small is filled up and the filling dropped."""
        from resvit_calibrate.metrics import INPUT, predict
        from resvit_calibrate.runtime import onnx_runner

        session = onnx_runner(model)

        def runner(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
            batch = arrays[INPUT]
            count = len(batch)
            if self.fixed_batch and count < self.fixed_batch:
                batch = np.concatenate([batch, np.repeat(batch[-1:], self.fixed_batch - count, axis=0)])
            return {name: output[:count] for name, output in session({self.input_name: batch}).items()}

        return predict(runner, images, self.batch_size, reporter, what)


def validate(
    folder: Path,
    *,
    quantized: Path,
    baseline: Path,
    images: ImageSet,
    scoring: Scoring,
    recipe: Recipe,
    reporter: Reporter,
) -> None:
    """Score the quantised ONNX against the original network; write ``verdict.json`` and the changed images.

    The original is PyTorch where the model came as PyTorch, else the float ONNX. Before anything is scored, the
    runtime proves on known numbers that it quantises rightly.
    """
    from resvit_calibrate.gate import judge
    from resvit_calibrate.metrics import Predictions, changed_answers, compare
    from resvit_calibrate.runtime import runtime_note, self_test

    self_test()
    onnx_float = Predictions.load(baseline / "onnx.npz")
    has_torch = (baseline / "pytorch.npz").exists()
    original = Predictions.load(baseline / "pytorch.npz") if has_torch else onnx_float
    what = f"onnx {recipe.precision}"
    candidate = scoring.predict(quantized, images, reporter, f"validate ({what})")
    candidate.save(folder / "predictions.npz")
    golden = next(images.batches(GOLDEN_IMAGES)).images
    np.save(folder / "golden_input.npy", golden)
    np.save(folder / "golden_output.npy", candidate.logits[: len(golden)])

    comparison = compare(original, candidate, recipe.confidence)
    verdict = judge(comparison, recipe.max_drop, original.logits.shape[1], recipe.confidence)
    stages = [_row("pytorch" if has_torch else "onnx float", compare(original, original, recipe.confidence))]
    if has_torch:
        stages.append(_row("onnx float", compare(original, onnx_float, recipe.confidence)))
    stages.append(_row(what, comparison))

    changed = changed_answers(original, candidate)
    shown = changed[:CHANGED_SHOWN]
    document = {
        **verdict.to_json(),
        "max_drop": recipe.max_drop,
        "confidence": recipe.confidence,
        "images": len(images),
        "data": images.description,
        "data_digest": images.digest,
        "runtime_note": runtime_note(),
        "class_names": list(images.class_names or ()),
        "stages": stages,
        "changed_total": len(changed),
        "changed": shown,
    }
    (folder / "verdict.json").write_bytes(pretty_json(document))
    pictures = {
        f"image_{item['index']}": picture
        for item in shown
        if (picture := _picture(images, item["index"])) is not None
    }
    np.savez_compressed(folder / "changed.npz", **pictures)


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
