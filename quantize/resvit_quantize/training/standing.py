"""What both trainings share, recovery's and distillation's: where one stands, its rate, and its distances."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from resvit_calibrate.images.image_set import Batch


@dataclass(kw_only=True)
class Standing:
    """Where training stands; what a killed one needs beside its weights and optimiser."""

    best: dict[str, Tensor] = field(default_factory=dict)
    """The weights of the best score, on the CPU."""
    epoch: int = 0
    batch: int = 0
    """Batches of the epoch that are done."""
    step: int = 0
    stale: int = 0
    """Scores since the best one."""
    best_index: int = 0
    seconds: float = 0.0
    train_loss: float = 0.0
    train_steps: int = 0
    history: list[dict[str, float | int | None]] = field(default_factory=list)
    """All scores, as plain values."""
    finite: bool = True
    """Whether the loss was a finite number so far."""

    def add(self, score: TrainingScore, kept: Callable[[], dict[str, Tensor]]) -> None:
        """Append ``score``, and keep the weights that ``kept`` gives if they are the best so far."""
        self.history.append(dataclasses.asdict(score))
        self.train_loss, self.train_steps = 0.0, 0
        if len(self.history) > 1:
            best = self.history[self.best_index]["loss"]
            if not score.loss < (best if best is not None and math.isfinite(best) else math.inf):
                self.stale += 1
                return
        self.best, self.best_index, self.stale = kept(), len(self.history) - 1, 0


def warmed_cosine(peak: float, warmup: float, progress: float) -> float:
    """The learning rate: up in a line, down in a cosine; ``progress`` goes from 0 to 1."""
    if progress < warmup:
        return peak * (0.05 + 0.95 * progress / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Σ (output - target)² / Σ target²."""
    output, target = output.float(), target.float()
    return (output - target).square().sum() / target.square().sum().clamp_min(1e-12)


def softened_divergence(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean divergence of the softened answers of class scores [B, K] from those of ``target``.

    Multiplied by the temperature squared, so that its gradient does not depend on it (Hinton et al. 2015).
    """
    log_p = F.log_softmax(output.float() / temperature, dim=1)
    log_q = F.log_softmax(target.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class TrainingImages(Protocol):
    """Images that can be read in any order; ``resvit_calibrate.data.training_images`` has one for each kind of data."""

    digest: str
    task: str | None
    """What is known of them, as of an ``ImageSet``."""
    class_ids: tuple[int, ...]
    """The numbers that the data itself gives to class 0, 1, 2…, where it has others."""

    def __len__(self) -> int: ...

    def batches_at(self, positions: npt.NDArray[np.int64], batch_size: int, skip: int = 0) -> Iterator[Batch]:
        """Stream the images at ``positions``, less the first ``skip`` batches; the same call gives the same."""
        ...


class Stop(str, enum.Enum):
    """Why training ended."""

    FINISHED = "all epochs are done"
    NO_BETTER = "the held-out images stopped improving"
    NOT_FINITE = "the loss was not a finite number"


@dataclass(frozen=True)
class TrainingScore:
    """A student against its teacher on the held-out images, behind ``step`` steps."""

    step: int
    loss: float
    """Of the answers alone, without maps inside the network; what the best weights are chosen by."""
    nsr: float
    """Noise to signal: Σ (teacher - student)² / Σ teacher², over all outputs."""
    agreement: float | None
    """Share of images with the teacher's class; ``None`` where the output is not [B, K]."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; what JSON cannot hold becomes None."""
        plain = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls: type[S], document: Mapping[str, Any]) -> S:
        """Read what ``to_json`` wrote; a distance that was not finite becomes NaN."""
        distances = {key: math.nan for key in ("loss", "nsr") if document[key] is None}
        return cls(**{**document, **distances})


S = TypeVar("S", bound=TrainingScore)


@dataclass(frozen=True)
class TrainingReport(Generic[S]):
    """What a training did, for a record and the report."""

    before: S
    after: S
    """Of the weights that were kept: the best ones, which may be the first."""
    history: tuple[S, ...]
    stop: Stop
    images: int
    held_out: int
    epochs: int
    steps: int
    seconds: float
    """Of all calls together, where one went on from another."""
    device: str
    objective: str
    """What the answers' loss was, in words."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        scores = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {
            **plain,
            **scores,
            "history": [score.to_json() for score in self.history],
            "stop": self.stop.value,
            "kept_step": self.after.step,
        }


def training_from_json(document: Mapping[str, Any], score: type[TrainingScore]) -> dict[str, Any]:
    """The fields of a :class:`TrainingReport` with such scores, from what its ``to_json`` wrote."""
    scores = {key: score.from_json(document[key]) for key in ("before", "after")}
    history = tuple(score.from_json(item) for item in document["history"])
    kept = {key: value for key, value in document.items() if key != "kept_step"}
    return {**kept, **scores, "history": history, "stop": Stop(document["stop"])}
