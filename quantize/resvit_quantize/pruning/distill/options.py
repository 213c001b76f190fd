"""How distillation trains, and what it reports."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_quantize.training.standing import TrainingReport, TrainingScore, training_from_json

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
    """Training images move by up to so many pixels each way; what is labelled in them then counts for nothing."""
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
class DistillReport(TrainingReport[DistillScore]):
    """What distillation did, for a record and the report."""

    features: tuple[str, ...]
    """Modules whose outputs were compared."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**super().to_json(), "features": list(self.features)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DistillReport:
        """Read what ``to_json`` wrote."""
        return cls(**{**training_from_json(document, DistillScore), "features": tuple(document["features"])})
