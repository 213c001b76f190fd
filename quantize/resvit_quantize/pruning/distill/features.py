"""Whether a student can learn from its teacher, and at which places inside the network."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from resvit_engines.errors import ResvitError
from resvit_quantize.pruning.distill.loss import outputs_of
from resvit_quantize.pruning.distill.options import DistillOptions
from resvit_quantize.pruning.losses import answers

MOST_FEATURES = 4


def compared_features(
    student: nn.Module, teacher: nn.Module, images: Tensor, options: DistillOptions
) -> tuple[str, ...]:
    """Try both networks on ``images`` [B, C, H, W], and return the modules whose outputs are compared.

    Raises ``ResvitError`` where one of them cannot read the images, where they answer with other shapes, where there
    is nothing to train, and for features of ``options`` that are not there or differ in shape.
    """
    shapes: list[list[torch.Size]] = []
    for module, name in ((student, "pruned"), (teacher, "unpruned")):
        try:
            with torch.no_grad():
                shapes.append([output.shape for output in answers(module, images)])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ResvitError(
                f"The {name} network cannot read images of shape {list(images.shape)}: {error}",
                "Give training images as the network takes them.",
            ) from error
    if not shapes[0] or shapes[0] != shapes[1]:
        raise ResvitError(
            f"The pruned network answers with {[list(s) for s in shapes[0]]} and the unpruned one with "
            f"{[list(s) for s in shapes[1]]}, so the two cannot be compared.",
            "Leave the outputs as they are when you prune.",
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ResvitError("The pruned network has no parameter that may be trained.", "Set requires_grad on some.")
    if options.features is None:
        wanted = options.feature_weight > 0.0
        return feature_paths(student, teacher, images) if wanted else ()
    _check_features(student, teacher, options.features, images)
    return options.features


def _check_features(student: nn.Module, teacher: nn.Module, paths: tuple[str, ...], images: Tensor) -> None:
    found: list[dict[str, torch.Size]] = []
    for module in (student, teacher):
        known = {name for name, _ in module.named_modules()}
        with torch.no_grad(), outputs_of(module, tuple(path for path in paths if path in known)) as seen:
            answers(module, images)
        found.append({path: value.shape for path, value in seen.items()})
    for path in paths:
        if found[0].get(path) is None or found[0].get(path) != found[1].get(path):
            raise ResvitError(
                f"'{path}' is no module that returns a tensor of one shape in both networks.",
                "Name other features, or leave the choice to distillation.",
            )


def feature_paths(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Up to four modules, spread over the depth, whose outputs have one shape in both networks.

    Residual stages and blocks, and the norms of tokens, stand for the depth; what is inside a block, and what the
    network returns anyway, does not. Runs both on ``images`` [B, C, H, W],
    without gradients.
    """
    every = [name for name, _ in teacher.named_modules() if name]
    shared = {name for name, _ in student.named_modules()}
    with torch.no_grad(), outputs_of(teacher, tuple(n for n in every if n in shared)) as teacher_outputs:
        returned = {leaf.data_ptr() for leaf in answers(teacher, images)}
    with torch.no_grad(), outputs_of(student, tuple(teacher_outputs)) as student_outputs:
        answers(student, images)
    parts = dict(teacher.named_modules())
    # In the order in which they finished; a stage and its last block return one tensor, and count once.
    chosen: dict[int, str] = {}
    for path, output in teacher_outputs.items():
        same = path in student_outputs and student_outputs[path].shape == output.shape and output.ndim >= 2
        if same and output.data_ptr() not in returned and _is_milestone(path, parts, teacher_outputs):
            chosen.setdefault(output.data_ptr(), path)
    found = list(chosen.values())
    count = min(MOST_FEATURES, len(found))
    return tuple(found[round((index + 1) * len(found) / count) - 1] for index in range(count))


def _is_milestone(path: str, parts: dict[str, nn.Module], outputs: dict[str, Tensor]) -> bool:
    part = parts[path]
    holds = any(True for child in part.children() for _ in child.parameters())  # not so a norm with its activation
    if not holds and not re.search(r"(Layer|RMS)Norm", type(part).__name__):
        return False
    names = path.split(".")
    above = [".".join(names[:depth]) for depth in range(1, len(names))]
    return not any(name in outputs and _is_block(name, parts) for name in above)


def _is_block(path: str, parts: dict[str, nn.Module]) -> bool:
    """Whether it is one of several in a row, and no row itself."""
    parent = parts.get(path.rpartition(".")[0])
    rows = (nn.Sequential, nn.ModuleList)
    return isinstance(parent, rows) and not isinstance(parts[path], rows)
