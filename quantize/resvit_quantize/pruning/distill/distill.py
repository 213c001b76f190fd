"""Training behind pruning: the pruned network learns to answer as the whole one does.

Knowledge distillation (Hinton et al. 2015) with hints from inside the network (FitNets, Romero et al. 2015), where
maps of the two still have one shape. It needs images, and no labels; labels help where there are any. Several GPUs
are served by torchrun and PyTorch's own DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.pruning.distill.options import FEWEST_IMAGES, DistillOptions, DistillReport
from resvit_quantize.training.standing import TrainingImages

if TYPE_CHECKING:
    from torch import Tensor, nn

    from resvit_quantize.training.objectives.objective import Teaching


def distill(
    student: nn.Module,
    teacher: nn.Module,
    images: TrainingImages,
    options: DistillOptions,
    state_file: Path,
    key: str,
    reporter: Reporter = SILENT,
    masks: Mapping[str, Tensor] | None = None,
    teaching: Teaching | None = None,
) -> DistillReport:
    """Train ``student`` in place until it answers as ``teacher`` does, and leave the best averaged weights in it.

    Both read images [B, C, H, W] and answer with tensors of equal shapes, in any nesting. ``masks`` are bool, by
    the name of a parameter of ``student``, and weights where a mask is False are zero throughout. ``teaching`` says
    what the answers are, and so what loses: boxes, masks or depths; without it their distance does.

    ``state_file`` keeps what a killed call needs to go on where it stopped: written every two minutes, at each
    epoch's end and on Ctrl-C. One of another ``key``, which must tell student, teacher, images, options and masks
    apart, is ignored. The caller removes it as soon as the student is safe elsewhere; called again before that,
    this returns the same at once.

    Started by torchrun, every process trains on its own share of each batch, and the first one alone writes.

    Raises ``ResvitError`` for fewer than 64 images, for a module that cannot read them or has nothing to train,
    for outputs that differ in number or shape, and for masks, features and labels that do not fit.
    """
    from resvit_quantize.pruning.distill.training import train

    count = len(images) if options.limit is None else min(options.limit, len(images))
    if count < FEWEST_IMAGES:
        raise ResvitError(
            f"There are {count} training images; distillation needs {FEWEST_IMAGES} or more.",
            "Give more training images: thousands serve best.",
        )
    if student is teacher:
        raise ResvitError("The student and the teacher are one and the same module.", "Prune a copy of the model.")
    return train(student, teacher, images, count, options, masks or {}, state_file, key, reporter, teaching)
