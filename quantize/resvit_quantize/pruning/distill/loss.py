"""What a step of distillation is made of: how far the student is from its teacher, and shifted images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ResvitError
from resvit_quantize.pruning.distill.options import Answer, DistillOptions
from resvit_quantize.pruning.losses import Outputs
from resvit_quantize.training.objectives.objective import Teaching, unread
from resvit_quantize.training.standing import relative_error, softened_divergence


def is_class_score(target: Tensor, total: int, answer: Answer) -> bool:
    """Whether ``target``, one of ``total`` outputs, holds the scores [B, K] of one of K classes."""
    fits = target.ndim == 2 and target.shape[1] > 1
    return fits and (answer is Answer.CLASSES or (answer is Answer.BY_SHAPE and total == 1))


def distance(outputs: Outputs, targets: Outputs, options: DistillOptions) -> Tensor:
    """Mean over the outputs: the divergence of softened answers for classes, relative squared error for values."""
    parts: list[Tensor] = []
    for output, target in zip(outputs, targets, strict=True):
        if is_class_score(target, len(targets), options.answer):
            parts.append(softened_divergence(output, target, options.temperature))
        else:
            parts.append(relative_error(output, target))
    return torch.stack(parts).mean()


class Answering:
    """The loss of all answers: of the task where it has one, and the distance of those that it does not read.

    ``sample`` is what the teacher answers to a few images; ``told`` says in words what the loss is.
    """

    def __init__(self, teaching: Teaching | None, sample: Outputs, options: DistillOptions) -> None:
        self.options, self.names = options, teaching.outputs if teaching else ()
        shapes = {name: value.shape for name, value in zip(self.names, sample, strict=False)}
        fits = teaching is not None and len(self.names) == len(sample)
        self.objective = teaching.objective(shapes) if teaching and fits else None
        classes = any(is_class_score(value, len(sample), options.answer) for value in sample)
        plain = "the teacher's class scores: divergence" if classes else "the teacher's outputs: error to signal"
        self.told = self.objective.told if self.objective else plain

    def __call__(self, outputs: Outputs, targets: Outputs, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        if self.objective is None:
            return distance(outputs, targets, self.options)
        own, aim = (dict(zip(self.names, each, strict=True)) for each in (outputs, targets))
        loss = self.objective(own, aim, batch)
        left = unread(self.objective, aim)
        if not left:
            return loss
        return loss + distance([own[name] for name in left], [aim[name] for name in left], self.options)


def label_loss(outputs: Outputs, labels: Tensor, options: DistillOptions) -> Tensor:
    """Mean cross-entropy over the images with a label (0 or more), over all outputs that are classes."""
    known = labels >= 0
    scores = [output for output in outputs if is_class_score(output, len(outputs), options.answer)]
    if not scores or not bool(known.any()):
        return outputs[0].new_zeros((), dtype=torch.float32)
    largest, classes = int(labels.max()), min(score.shape[1] for score in scores)
    if largest >= classes:
        raise ResvitError(
            f"There are labels up to {largest}, and the network tells {classes} classes apart.",
            "Give labels from 0 that fit the network, or train without them (a label weight of 0).",
        )
    return torch.stack([F.cross_entropy(score.float()[known], labels[known]) for score in scores]).mean()


@contextlib.contextmanager
def outputs_of(module: nn.Module, paths: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """While open, every call of ``module`` puts what its parts at ``paths`` return into the dictionary."""
    seen: dict[str, Tensor] = {}
    parts = dict(module.named_modules())

    def keep(path: str, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.setdefault(path, output)

    handles = [parts[path].register_forward_hook(lambda _m, _i, out, path=path: keep(path, out)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Move each of the images [B, C, H, W] by up to ``pixels`` each way; its border is drawn out behind it."""
    if not pixels:
        return images
    height, width = images.shape[2:]
    padded = F.pad(images, (pixels, pixels, pixels, pixels), mode="replicate")
    corner = torch.randint(0, 2 * pixels + 1, (2, len(images), 1), device=images.device)
    rows = torch.arange(height, device=images.device) + corner[0]  # [B, H]
    columns = torch.arange(width, device=images.device) + corner[1]  # [B, W]
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
