"""What each unit of a network is worth: how much is lost when it goes, on one scale for all layers.

Taylor and Hessian-aware importance both rest on a mask of ones in front of whatever reads a unit: the derivative of
an image's loss by that mask is minus the first-order change when the unit goes, and its mean square is the Fisher
information, which stands for the second derivative. Since a mask has no unit of its own, numbers of a trunk channel,
a head and an MLP channel compare.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ResvitError
from resvit_quantize.pruning.groups import Group, Kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from resvit_quantize.pruning.choose.masks import Masks
    from resvit_quantize.pruning.losses import Loss


class Importance(str, enum.Enum):
    """How units are compared."""

    MAGNITUDE = "magnitude"
    """The unit's share of the squared weights that write and read it, the mean over these tensors (Han et al. 2015,
    "Learning both weights and connections", over a whole group as in Fang et al. 2023, "DepGraph"). The units of a
    group sum to one: a share of a layer's energy is the error to signal there if inputs were white."""
    TAYLOR = "taylor"
    """The squared first-order change of a batch's mean loss, the mean over batches: (sum of weight times gradient)^2
    (Molchanov et al. 2019, "Importance estimation for neural network pruning", with the gate where it is read)."""
    HESSIAN = "hessian"
    """The second-order change of the loss per image, the first order taken as zero at a trained optimum (LeCun et al.
    1990, "Optimal brain damage") and the second derivative as the Fisher information of the mask, image by image
    (Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning"). In nats per image for a
    classifier, else in error to signal of the outputs."""

    def __str__(self) -> str:
        return str(self.value)


Batches = Iterable[tuple["Tensor", "Tensor | None"]]
"""Images [B, C, H, W] as the module wants them, and labels int64 [B] where there are any (negative: unknown)."""


def importance_of(
    module: nn.Module,
    groups: Sequence[Group],
    method: Importance,
    batches: Batches,
    *,
    images: int = 256,
    seed: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:
    """The importance of every unit, float64 [units], by the name of the group; the larger the worse to lose.

    At most ``images`` images are looked at, in evaluation mode. The loss is cross-entropy where there are labels.
    Without, labels are drawn from the network's own answers (the true Fisher information); outputs that are no class
    scores are met with random signs, which in the mean gives the squared error to signal of the removal. ``seed``
    makes both repeatable. A block (``Kind.BLOCKS``) is skipped for a trial, and what the outputs lose by it measured.

    Raises ``ResvitError`` without images where they are needed, for NaN or infinity, and where no gradient is found.
    """
    chosen = _first(batches, images)
    blocks = [group for group in groups if group.kind is Kind.BLOCKS]
    others = [group for group in groups if group.kind is not Kind.BLOCKS]
    if not chosen and (blocks or (others and method is not Importance.MAGNITUDE)):
        raise ResvitError(
            "There are no images to tell the importance of what could be pruned by.",
            "Give images, or take importance by magnitude without blocks.",
        )
    with _Evaluating(module):
        if method is Importance.MAGNITUDE:
            found = {group.name: _magnitude(module, group) for group in others}
        else:
            found = _sensitivity(module, others, method, chosen, seed) if others else {}
        found |= {group.name: _skipped(module, group, method, chosen) for group in blocks}
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise ResvitError(
                f"The importance of {np.count_nonzero(~np.isfinite(values))} of the {len(values)} units of {name} is "
                "not a finite number.",
                "Check the weights and images for NaN and infinity.",
            )
    return found


def _first(batches: Batches, images: int) -> list[tuple[Tensor, Tensor | None]]:
    chosen: list[tuple[Tensor, Tensor | None]] = []
    left = images
    for pictures, labels in batches:
        if left <= 0:
            break
        if len(pictures):
            chosen.append((pictures[:left], None if labels is None else labels[:left]))
        left -= len(pictures)
    return chosen


class _Evaluating:
    """Evaluation mode, no gradients of parameters; all as it was on leaving."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = [(each, each.training) for each in module.modules()]
        self.wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()
        for parameter, _ in self.wanted:
            parameter.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for each, training in self.modes:
            each.training = training
        for parameter, wanted in self.wanted:
            parameter.requires_grad_(wanted)
            if not wanted:
                parameter.grad = None


def _magnitude(module: nn.Module, group: Group) -> npt.NDArray[np.float64]:
    from resvit_quantize.pruning.choose.masks import by_unit, over_axis

    parameters = dict(module.named_parameters(remove_duplicate=False))
    parts = [part for part in group.slices if part.tensor in parameters]
    parts = [part for part in parts if parameters[part.tensor].ndim > 1] or parts
    total = np.zeros(group.units)
    for part in parts:
        energy = over_axis(parameters[part.tensor].detach().double().square(), part.axis)
        units = by_unit(energy[None], part)[0].numpy()
        total += units / max(float(units.sum()), np.finfo(np.float64).tiny)
    return total / max(len(parts), 1)


def _skipped(
    module: nn.Module, group: Group, method: Importance, batches: Sequence[tuple[Tensor, Tensor | None]]
) -> npt.NDArray[np.float64]:
    import torch

    from resvit_quantize.pruning.losses import divergence, error_to_signal, outputs_of

    lost = 0.0
    with torch.no_grad():
        for images, _ in batches:
            whole = outputs_of(module, images)
            hooks = [module.get_submodule(name).register_forward_hook(_identity) for name in group.identities]
            try:
                without = outputs_of(module, images)
            finally:
                for hook in hooks:
                    hook.remove()
            measure = error_to_signal if method is Importance.MAGNITUDE else divergence
            lost += len(images) * measure(whole, without)
    change = lost / sum(len(images) for images, _ in batches)
    return np.full(group.units, change**2 if method is Importance.TAYLOR else change)


def _identity(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module, output
    return inputs[0]


def _sensitivity(
    module: nn.Module,
    groups: Sequence[Group],
    method: Importance,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    seed: int,
) -> dict[str, npt.NDArray[np.float64]]:
    """By the derivatives of each image's loss: ``TAYLOR`` and ``HESSIAN`` from the same pass."""
    import torch

    from resvit_quantize.pruning.choose.masks import Masks
    from resvit_quantize.pruning.losses import Loss

    loss = Loss(torch.Generator().manual_seed(seed))
    sums = {group.name: np.zeros(group.units) for group in groups}
    with torch.enable_grad(), Masks(module, groups, batches[0][0][:2]) as masks:
        for images, labels in batches:
            slopes = _slopes(module, masks, loss, images, labels)
            for name, each in slopes.items():
                sums[name] += _by_method(each, method)
    count = len(batches) if method is Importance.TAYLOR else sum(len(images) for images, _ in batches)
    scale = 0.5 if method is Importance.HESSIAN and loss.classifies else 1.0
    return {name: scale * total / count for name, total in sums.items()}


def _by_method(slopes: npt.NDArray[np.float64], method: Importance) -> npt.NDArray[np.float64]:
    """Of one batch, [B, units] into [units]."""
    squares = slopes.mean(0) ** 2 if method is Importance.TAYLOR else (slopes**2).sum(0)
    return np.asarray(squares, np.float64)


def _slopes(
    module: nn.Module, masks: Masks, loss: Loss, images: Tensor, labels: Tensor | None
) -> dict[str, npt.NDArray[np.float64]]:
    """The derivative of every image's loss by the mask of every unit, [B, units] by group."""
    size = masks.most_at_once or len(images)
    pieces: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        value = loss(module, images[part], None if labels is None else labels[part])
        try:
            value.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ResvitError(
                f"The network gives no gradients: {error}",
                "Take importance by magnitude, or change the module so that it can be differentiated.",
            ) from error
        pieces.append(masks.taken(len(images[part])))
    return {name: np.concatenate([piece[name].double().cpu().numpy() for piece in pieces]) for name in pieces[0]}
