"""Training behind pruning: the pruned network learns to answer as the whole one does.

Knowledge distillation (Hinton et al. 2015) with hints from inside the network (FitNets, Romero et al. 2015), where
maps of the two still have one shape. It needs images, and no labels; labels help where there are any. Several GPUs
are served by torchrun and PyTorch's own DistributedDataParallel.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.recover import Stop, TrainingImages, TrainingReport, TrainingScore

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Answer", "DistillOptions", "DistillReport", "DistillScore", "Stop", "TrainingImages", "distill"]

FEWEST_IMAGES = 64
HELD_OUT_SHARE = 0.05
HELD_OUT = (128, 2048)
"""Held-out images, at least and at most; never more than a third of all."""


class Answer(str, enum.Enum):
    """What the outputs of the network say, which decides how two of them are compared."""

    BY_SHAPE = "by shape"
    """Classes where the only output is [B, K] with K > 1, values elsewhere."""
    CLASSES = "classes"
    """Every output [B, K] holds the scores of one of K classes: divergence of the softened answers."""
    VALUES = "values"
    """Relative squared error of every output."""


@dataclass(frozen=True)
class DistillOptions:
    """How to train. Raises ``ResvitError`` for values that nothing can be trained with."""

    epochs: int = 3
    batch: int = 64
    """Images in a step, of all GPUs together."""
    learning_rate: float = 1e-3
    """Peak of the cosine, for AdamW."""
    weight_decay: float = 0.01
    """Of matrices and filters; biases, norms and embeddings have none."""
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    ema: float = 0.998
    """Decay of the average of the weights, which is what is scored and kept; lower in the first steps."""
    temperature: float = 2.0
    """Softens the answers that are compared."""
    answer: Answer = Answer.BY_SHAPE
    feature_weight: float = 1.0
    """Of the relative squared error of maps inside the network, beside the distance of the answers."""
    features: tuple[str, ...] | None = None
    """Paths of the modules whose outputs are compared; ``None`` chooses some, empty compares none."""
    label_weight: float = 0.0
    """Of the cross-entropy with the labels, where there are any."""
    shift: int = 0
    """Training images move by up to so many pixels each way."""
    seed: int = 0
    limit: int | None = None
    """At most so many images, held-out ones included."""
    patience: int | None = None
    """Epochs without an improvement after which training stops; ``None`` trains them all."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 1),
            ("batch", self.batch, 2),  # BatchNorm has nothing to average over in a batch of one
            ("shift", self.shift, 0),
            ("patience", 1 if self.patience is None else self.patience, 1),
            ("limit", FEWEST_IMAGES if self.limit is None else self.limit, FEWEST_IMAGES),
        ):
            if value < low:
                raise ResvitError(f"Distillation cannot train with {name} = {value}.", f"Give {low} or more.")
        reals = {
            "learning_rate": (0.0 < self.learning_rate < 1.0, "above 0 and below 1, such as 1e-3"),
            "weight_decay": (0.0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup": (0.0 <= self.warmup < 1.0, "from 0 to below 1"),
            "clip": (self.clip > 0.0, "above 0"),
            "ema": (0.0 <= self.ema < 1.0, "from 0 to below 1"),
            "temperature": (0.0 < self.temperature < math.inf, "above 0"),
            "feature_weight": (0.0 <= self.feature_weight < math.inf, "0 or more"),
            "label_weight": (0.0 <= self.label_weight < math.inf, "0 or more"),
        }
        for name, (fits, wanted) in reals.items():
            if not fits:
                raise ResvitError(
                    f"Distillation cannot train with {name} = {getattr(self, name)}.", f"Give a number {wanted}."
                )


@dataclass(frozen=True)
class DistillScore(TrainingScore):
    """The averaged student against the teacher."""

    top1: float | None
    """Share of the labelled images with the right class; ``None`` without labels."""
    train_loss: float | None = None
    """Mean of the whole loss over the steps since the last score."""

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f"agreement with the unpruned model {self.agreement:.2%}, "
        top1 = "" if self.top1 is None else f"top-1 {self.top1:.2%}, "
        return f"{agreement}{top1}loss {self.loss:.4f}"


@dataclass(frozen=True)
class DistillReport(TrainingReport):
    """What distillation did, for a record and the report."""

    features: tuple[str, ...]
    """Modules whose outputs were compared."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**super().to_json(), "features": list(self.features)}


def distill(
    student: nn.Module,
    teacher: nn.Module,
    images: TrainingImages,
    options: DistillOptions,
    state_file: Path,
    key: str,
    reporter: Reporter = SILENT,
    masks: Mapping[str, Tensor] | None = None,
) -> DistillReport:
    """Train ``student`` in place until it answers as ``teacher`` does, and leave the best averaged weights in it.

    Both read images [B, C, H, W] and answer with tensors of equal shapes, in any nesting. ``masks`` are bool, by
    the name of a parameter of ``student``, and weights where a mask is False are zero throughout.

    ``state_file`` keeps what a killed call needs to go on where it stopped: written every two minutes, at each
    epoch's end and on Ctrl-C. One of another ``key``, which must tell student, teacher, images, options and masks
    apart, is ignored. The caller removes it as soon as the student is safe elsewhere; called again before that,
    this returns the same at once.

    Started by torchrun, every process trains on its own share of each batch, and the first one alone writes.

    Raises ``ResvitError`` for fewer than 64 images, for a module that cannot read them or has nothing to train,
    for outputs that differ in number or shape, and for masks, features and labels that do not fit.
    """
    from resvit_quantize.pruning.torch_distill import Training

    count = len(images) if options.limit is None else min(options.limit, len(images))
    if count < FEWEST_IMAGES:
        raise ResvitError(
            f"There are {count} training images; distillation needs {FEWEST_IMAGES} or more.",
            "Give more training images: thousands serve best.",
        )
    if student is teacher:
        raise ResvitError("The student and the teacher are one and the same module.", "Prune a copy of the model.")
    return Training(student, teacher, images, count, options, masks or {}, state_file, key, reporter).run()
