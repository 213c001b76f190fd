"""How recovery trains, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_quantize.training.standing import TrainingReport, TrainingScore, training_from_json

FEWEST_IMAGES = 128


HELD_OUT = (64, 2000)
"""A tenth of the images is held out, within these bounds."""


@dataclass(frozen=True)
class RecoverOptions:
    """How to train. Raises ``ResvitError`` for values that nothing can be trained with."""

    epochs: int = 3
    batch: int = 32
    learning_rate: float = 3e-3
    """Peak of the cosine, relative to the size of each constant (as in Adafactor, Shazeer and Stern 2018), so that
    one value serves wide and narrow networks; for AdamW without decay. At most: see ``tries_rates``."""
    seed: int = 0
    limit: int | None = None
    """At most so many images, held-out ones included."""
    label_weight: float = 0.0
    """Of the cross-entropy with the labels, where there are any, beside the distance from the float model."""
    learned_clips: bool = True
    """Whether the clips of activations are trained too, or stay as calibrated."""
    tries_rates: bool = True
    """Whether training goes at the one of smaller rates that serves this network best, by one step of each."""
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises."""
    evaluate_every: int = 500
    """Steps between two looks at the held-out images; an epoch's end is always one."""
    patience: int = 4
    """Looks without an improvement after which training stops."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 1),
            ("batch", self.batch, 1),
            ("evaluate_every", self.evaluate_every, 1),
            ("patience", self.patience, 1),
            ("limit", FEWEST_IMAGES if self.limit is None else self.limit, FEWEST_IMAGES),
        ):
            if value < low:
                raise ResvitError(f"Recovery cannot train with {name} = {value}.", f"Give {low} or more.")
        if not (0.0 < self.learning_rate < 1.0 and self.label_weight >= 0.0 and 0.0 <= self.warmup < 1.0):
            raise ResvitError(
                f"Recovery cannot train with a learning rate of {self.learning_rate}, a label weight of "
                f"{self.label_weight} and a warm-up of {self.warmup}.",
                "Give a learning rate above 0, such as 3e-3; a label weight from 0; a warm-up from 0 to below 1.",
            )


USUAL = RecoverOptions()


@dataclass(frozen=True)
class Score(TrainingScore):
    """The fake-quantised graph against the float one."""

    train_loss: float | None = None
    """Mean over the training images since the last score."""

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f"agreement with float {self.agreement:.2%}, "
        return f"{agreement}noise to signal {10 * math.log10(max(self.nsr, 1e-30)):.1f} dB"


@dataclass(frozen=True)
class RecoverReport(TrainingReport[Score]):
    """What recovery did, for ``recover.json``."""

    trained: int
    """Constants that were trained."""
    clips: Mapping[str, Mapping[str, float]]
    """Largest magnitude by precision and tensor, of every activation that is quantised."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RecoverReport:
        """Read what ``to_json`` wrote."""
        return cls(**training_from_json(document, Score))
