"""Stage ``sensitivity``: which layers the accuracy loss comes from, beside the others on the same run folder."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_export.recipe import Recipe
from resvit_export.run_folder import Artifact

if TYPE_CHECKING:
    from resvit_calibrate.answers.base import Task
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_export.pipeline import Pipeline
    from resvit_quantize.sensitivity.sensitivity import LayerDamage, Sensitivity

RESULT = "sensitivity.json"
METHODS = ("one-pass", "brute-force")


def measured_sensitivity(pipeline: Pipeline, images: int, method: str = METHODS[0]) -> Artifact:
    """The finished stage, after export and calibrate; ``sensitivity_from_json`` reads its ``sensitivity.json``.

    The first ``images`` of the calibration images are used. Raises ``ResvitError`` for FP16 and for ModelOpt's
    quantiser, and for a graph without gradients unless the method is brute-force.
    """
    recipe = pipeline.recipe
    if recipe.precision == "fp16":
        raise ResvitError("FP16 has no sensitivity: nothing is quantised.", "Say --precision int8 or fp8.")
    if recipe.quantizer != "resvit":
        raise ResvitError(
            "Sensitivity follows this tool's own placement and ranges, not ModelOpt's.",
            "Say --quantizer resvit.",
            ExitCode.IMPOSSIBLE,
        )
    pipeline.require_images()
    pipeline.require_images_alone("Sensitivity")
    model, ranges, data = pipeline.exported, pipeline.calibrated, pipeline.image_sets[0]
    precisions = _precisions(pipeline)
    return pipeline.run.stage(
        "sensitivity",
        {
            "precision": recipe.precision,
            "precisions": list(precisions),
            "calibrator": recipe.calibrator,
            "include": sorted(recipe.include),
            "exclude": sorted(recipe.exclude),
            "images": min(images, len(data)),
            "method": method,
            **({"task_options": dict(recipe.task_options)} if data.task == "detection" else {}),
            "seed": recipe.seed,
        },
        {"model": model.digest, "ranges": ranges.digest, "images": data.digest},
        ("torch", "onnx", "onnx-ir", "onnxruntime"),
        lambda folder: _sensitivity_into(
            folder,
            model.path("model.onnx"),
            ranges.path("ranges.json"),
            pipeline.task,
            data,
            min(images, len(data)),
            recipe,
            precisions,
            method,
            pipeline.reporter,
        ),
    )


def sensitivity_of(artifact: Artifact) -> Sensitivity:
    """What a finished stage found."""
    from resvit_quantize.sensitivity.sensitivity import sensitivity_from_json

    return sensitivity_from_json(artifact.json(RESULT))


def exclude_snippet(recipe: Recipe, layers: Sequence[LayerDamage]) -> str:
    """Lines for the recipe file that leave out these layers, and what it leaves out already."""
    patterns = dict.fromkeys([*recipe.exclude, *(glob.escape(layer.node) for layer in layers)])
    return "[quantize]\nexclude = [\n" + "".join(f"    {json.dumps(pattern)},\n" for pattern in patterns) + "]"


def _precisions(pipeline: Pipeline) -> tuple[str, ...]:
    """The recipe's precision first, then the other one if the target (where there is one) has it."""
    known = [p.value for p in pipeline.target.precisions] if pipeline.target else ["int8", "fp8"]
    return tuple(dict.fromkeys([pipeline.recipe.precision, *(p for p in ("int8", "fp8") if p in known)]))


def _sensitivity_into(
    folder: Path,
    model: Path,
    ranges: Path,
    task: Task,
    data: ImageSet,
    images: int,
    recipe: Recipe,
    precisions: tuple[str, ...],
    method: str,
    reporter: Reporter,
) -> None:
    """Write ``sensitivity.json``."""
    from resvit_calibrate.answers.replay import FirstImages
    from resvit_calibrate.ranges.ranges import load_ranges
    from resvit_export.work import quantize_settings
    from resvit_quantize.graph.analysed import graph_from_onnx
    from resvit_quantize.sensitivity.sensitivity import Method, brute_force_sensitivity, measure_sensitivity
    from resvit_quantize.sensitivity.task_loss import task_loss

    settings, graph = quantize_settings(recipe), graph_from_onnx(model)
    if Method(method) is Method.BRUTE_FORCE:
        found = brute_force_sensitivity(
            graph, load_ranges(ranges), settings, data.first(images, 16), reporter, precisions=precisions
        )
    else:
        loss = task_loss(task, data)
        found = measure_sensitivity(
            graph,
            load_ranges(ranges),
            settings,
            data.first(images, 16) if loss is None else FirstImages(data, images).batches(16),
            reporter,
            images,
            precisions=precisions,
            seed=recipe.seed,
            loss=loss,
        )
    (folder / RESULT).write_bytes(pretty_json(found.to_json()))
