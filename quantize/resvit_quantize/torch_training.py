"""What both trainings share, recovery's and distillation's: where one stands, its rate, and its distances."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True)
class Standing:
    """Where training stands; what a killed one needs beside its weights and optimiser."""

    best: dict[str, Tensor]
    """On the CPU."""
    epoch: int = 0
    batch: int = 0
    """Batches of the epoch that are done."""
    step: int = 0
    stale: int = 0
    """Looks at the held-out images since the best one."""
    best_index: int = 0
    seconds: float = 0.0
    train_loss: float = 0.0
    train_steps: int = 0
    history: list[dict[str, float | int | None]] = field(default_factory=list)
    """All scores, as plain values."""


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
