"""What a network is for: classes, boxes, masks, depths, vectors, texts or something else, each with its metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from resvit_calibrate.answers.base import Answers, Task
from resvit_calibrate.data.naming import existing
from resvit_calibrate.gate.comparison import Comparison
from resvit_calibrate.tasks.classification import Classification
from resvit_calibrate.tasks.depth import Depth
from resvit_calibrate.tasks.detection import Detection
from resvit_calibrate.tasks.embedding import Embedding
from resvit_calibrate.tasks.other import Other
from resvit_calibrate.tasks.segmentation import Segmentation
from resvit_calibrate.tasks.text import Text
from resvit_engines.answers.boxes import PAIRS
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside, text_from_outside

__all__ = ["KINDS", "Answers", "Comparison", "Task", "kind_of", "task_named", "task_of"]

_TASKS: dict[
    str, type[Classification] | type[Detection] | type[Segmentation] | type[Depth] | type[Embedding] | type[Text]
] = {task.name: task for task in (Classification, Detection, Segmentation, Depth, Embedding, Text)}
KINDS = (*_TASKS, Other.name)


def task_named(kind: str, options: Mapping[str, Any], metric: str | None = None) -> Task:
    """Make the task ``kind``, one of ``KINDS``.

    ``options`` are its own (see the dataclass of each task); ``metric`` names a function of the user's, which makes
    any network the task ``other``.

    Raises:
        ResvitError: for a kind, an option or a metric that does not exist, or a metric beside another task.
    """
    if kind not in KINDS:
        raise ResvitError(f"The task '{kind}' does not exist.", f"Choose {', '.join(KINDS)}, or auto.")
    if metric is not None and kind != Other.name:
        raise ResvitError(
            f"The task {kind} has its own metric, and {metric} was given.", "Say --task other, or leave --metric out."
        )
    return Other(options, metric) if kind == Other.name else _TASKS[kind](options)


def lower_is_better(kind: str) -> bool:
    """Whether the smaller value of the task's first metric is the better one, as of an error."""
    return kind != Other.name and _TASKS[kind].lower_is_better


def with_files_read(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a task with the content of the file in the place of its name, where ``characters`` names one.

    Raises:
        ResvitError: for a file that is no text, or not there.
    """
    named = options.get("characters")
    path = existing(named) if isinstance(named, str) else None
    if path is None or not path.is_file():
        if isinstance(named, str) and _is_like_a_file(named):
            raise ResvitError(
                f"There is no file {named}.",
                "Check the path of the characters, or write them themselves: characters=0123456789.",
            )
        return dict(options)
    fix = "Give a file with one character a line, as UTF-8, in the order of the network's classes."
    return {**options, "characters": text_from_outside(read_outside(path), str(path), fix)}


def _is_like_a_file(named: str) -> bool:
    """Whether it ends as files do, or is a path in which some character stands twice, as in no list of characters."""
    ends = re.search(r"[\w/-]\.(txt|dict|keys?|csv|tsv|json|ya?ml)$", named, re.IGNORECASE)
    return "\n" not in named and (ends is not None or ("/" in named and len(set(named)) < len(named)))


def task_of(
    outputs: Sequence[Mapping[str, Any]],
    targets_kind: str | None,
    options: Mapping[str, Any] | None = None,
    metric: str | None = None,
) -> Task:
    """The task that ``kind_of`` tells; with the user's own ``metric``, ``other``. Raises as ``task_named``."""
    kind = Other.name if metric is not None else kind_of(outputs, targets_kind)
    return task_named(kind, options or {}, metric)


def kind_of(outputs: Sequence[Mapping[str, Any]], targets_kind: str | None) -> str:
    """Tell the task by what the data knows (``ImageSet.task``); where that is nothing, by the outputs.

    Outputs are given by ``name`` and ``shape``. A pair of boxes and scores detects. One output [B, K] (or one called
    ``logits``) classifies, [B, K, h, w] segments, [B, 1, h, w] and [B, h, w] are depths; all else is ``other``.
    Outputs that the data's task can't read are refused when they are first scored, with their names.
    """
    if targets_kind in _TASKS:
        return str(targets_kind)
    shapes = {str(item["name"]): list(item["shape"]) for item in outputs}
    ranks = {name: len(shape) for name, shape in shapes.items()}
    if any(ranks.get(boxes) == 3 and ranks.get(scores) == 3 for boxes, scores in PAIRS):
        return Detection.name
    if ranks.get("logits") == 2 or list(ranks.values()) == [2]:
        return Classification.name
    if len(shapes) == 1:
        shape = next(iter(shapes.values()))
        if len(shape) in (3, 4):
            return Segmentation.name if len(shape) == 4 and shape[1] != 1 else Depth.name
    return Other.name
