"""What pruning counts as loss: of class scores in nats, of any other outputs as error to signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resvit_engines.errors import ResvitError
from resvit_quantize.pruning.answers import tensors_in
from resvit_quantize.pruning.copies import forgetting

Outputs: TypeAlias = "list[Tensor]"
"""The floating tensors among all that a network returns, in the order of its own tuple or dict."""


def answers(module: nn.Module, images: Tensor) -> Outputs:
    """Run ``module`` on images [B, C, H, W]."""
    with forgetting(module):
        found = tensors_in(module(images))
    return [tensor for tensor in found if tensor.is_floating_point()]


def outputs_of(module: nn.Module, images: Tensor) -> Outputs:
    """The same, of a network that has any, each [B, ...]; raises ``ResvitError`` for another."""
    found = answers(module, images)
    if not found or any(len(output) != len(images) for output in found):
        raise ResvitError(
            "The network's outputs are not one row for each image, so no loss of an image can be told.",
            "Prune a module whose outputs are tensors [B, ...].",
        )
    return found


def is_classifier(outputs: Sequence[Tensor]) -> bool:
    """Whether there is one output, and it scores classes: [B, K]."""
    return len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1


def divergence(whole: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    """Kullback-Leibler divergence in nats per image from the whole network's answers; error to signal of others."""
    if not is_classifier(whole):
        return error_to_signal(whole, pruned)
    target, answer = F.log_softmax(whole[0].double(), 1), F.log_softmax(pruned[0].double(), 1)
    return float(F.kl_div(answer, target, reduction="batchmean", log_target=True))


def error_to_signal(whole: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    """Squared error over squared signal of an image, the mean over outputs and images."""
    ratios = [
        ((b - a).double().flatten(1).square().sum(1) / _energy(a)).mean() for a, b in zip(whole, pruned, strict=True)
    ]
    return float(torch.stack(ratios).mean())


def _energy(output: Tensor) -> Tensor:
    """Squared signal of each image, [B]."""
    return output.detach().double().flatten(1).square().sum(1).clamp_min(1e-30)


class Loss:
    """The sum of the images' losses, a scalar, for a backward pass.

    Cross-entropy for class scores, against the label or one drawn from the scores where it is not known. For other
    outputs a probe whose squared derivative is, in the mean over signs, the error to signal of a small change.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.classifies = False

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        """Run the module on images [B, ...]; labels are int64 [B]."""
        outputs = outputs_of(module, images)
        if not any(output.requires_grad for output in outputs):
            raise ResvitError(
                "No output depends on what could be pruned by way of gradients.",
                "Take importance by magnitude, or remove torch.no_grad from the module.",
            )
        self.classifies = is_classifier(outputs)
        if not self.classifies:
            return torch.stack([self._probe(output) for output in outputs]).sum().div(len(outputs) ** 0.5)
        wanted = self._labels(outputs[0], labels)
        value: Tensor = F.cross_entropy(outputs[0], wanted, reduction="sum")
        return value

    def _labels(self, scores: Tensor, labels: Tensor | None) -> Tensor:
        shares = scores.detach().float().softmax(1).cpu()
        if not shares.isfinite().all():
            raise ResvitError(
                "The network's class scores hold NaN or infinity.", "Check the weights and images before pruning."
            )
        drawn = torch.multinomial(shares, 1, generator=self.generator)[:, 0]
        if labels is not None:
            known = labels.cpu().to(torch.int64)
            if len(known) != len(drawn) or bool((known >= scores.shape[1]).any()):
                raise ResvitError(
                    f"{len(known)} labels up to {int(known.max())} do not fit {len(drawn)} images of "
                    f"{scores.shape[1]} classes.",
                    "Give labels 0 to K-1, one per image, or no labels.",
                )
            drawn = torch.where(known >= 0, known, drawn)
        return drawn.to(scores.device)

    def _probe(self, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=self.generator).to(output) * 2 - 1
        norm = _energy(output).sqrt().to(output.dtype)
        return ((signs * output).flatten(1).sum(1) / norm).sum().cpu()
