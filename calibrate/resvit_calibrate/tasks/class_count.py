"""Whether the data has as many classes as the network has outputs: told before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resvit_calibrate.images.class_list import REMEDY
from resvit_calibrate.images.image_set import ImageSet
from resvit_calibrate.tasks.embedding import Embedding
from resvit_calibrate.tasks.segmentation import Segmentation
from resvit_calibrate.tasks.text import Text
from resvit_engines.answers.boxes import BoxReader, DetectionOptions
from resvit_engines.answers.options import options_from
from resvit_engines.errors import ResvitError

_READERS: dict[str, type[Embedding] | type[Text]] = {task.name: task for task in (Embedding, Text)}


def require_outputs_for(
    images: ImageSet, kind: str, options: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse, before any work, outputs that the task cannot read, and more or fewer classes than the network has.

    ``outputs`` are given by ``name`` and ``shape``. Where the data does not say how many classes there are, only those
    that it has can be too many.

    Raises:
        ResvitError: with both numbers and the remedy.
    """
    shapes = {str(item["name"]): [n if isinstance(n, int) else 1 for n in item["shape"]] for item in outputs}
    if kind == "classification":
        shape = shapes.get("logits") or (next(iter(shapes.values())) if len(shapes) == 1 else [])
        if len(shape) == 2:
            _require_number(images, {shape[1]}, kind)
        return
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    if kind in _READERS:
        _READERS[kind](options).require_outputs(arrays)
    if kind == "detection":
        reader = BoxReader(options_from(DetectionOptions, kind, options), arrays, images.num_classes)
        if reader.options.class_numbers == "id" and images.class_ids:
            return
        _require_number(images, {reader.classes}, kind)
    elif kind == "segmentation":
        output = Segmentation(options).output_of(arrays)
        if output.ndim == 4:
            _require_number(images, {output.shape[1]}, kind)


def _require_number(images: ImageSet, allowed: set[int], kind: str) -> None:
    said, outputs = images.num_classes, max(allowed)
    labels = images.labels
    highest = int(labels.max()) + 1 if labels is not None and len(labels) else said or 0
    if highest > outputs or (said is not None and images.class_names and said != outputs):
        count = said if said is not None and images.class_names else highest
        what = {"classification": "classes", "detection": "categories", "segmentation": "classes of masks"}[kind]
        ids = (
            " If it answers with the data's own numbers, say --task-option class_numbers=id."
            if kind == "detection" and images.class_ids and max(images.class_ids) < outputs
            else ""
        )
        zero = (
            " If 0 means `unlabelled` and classes count from 1 (ADE20K), say --task-option ignore=0 and give --classes "
            'JSON with {"1": 0, "2": 1, …}.'
            if kind == "segmentation" and highest == outputs + 1
            else ""
        )
        raise ResvitError(
            f"The data has {count} {what} ({_names(images)}), and the network {outputs} outputs: nothing says "
            "which output each of them is.",
            REMEDY + ids + zero,
        )


def _names(images: ImageSet) -> str:
    names = images.class_names
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "") if names else images.description
