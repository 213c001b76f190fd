"""Whether a network is a function of its image: the same twice, and whatever other images are in the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import numpy as np

from resvit_calibrate.runtime.parity import differences, moved_between_runs
from resvit_calibrate.runtime.runner import Runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ResvitError

Draw: TypeAlias = Callable[[int, np.random.Generator], Arrays]
"""Random inputs of a network: how many images, and from where the numbers come."""
_IMAGES = 3
"""Images of a batch that is compared with each of them alone."""


def refuse_random(run: Runner, draw: Draw, name: str, *, batch: int = 1, drawn: str = "") -> None:
    """Refuse a network that draws random numbers: it answers one image in two ways.

    ``drawn`` tells where it draws them, where that is known.

    Raises:
        ResvitError: INPUT.
    """
    feeds = draw(batch, np.random.default_rng(0))
    moved = moved_between_runs(run, feeds)
    if moved or drawn:
        raise ResvitError(
            f"{name} is random: two runs on one image differ{f' by {moved:.3g}' if moved else ''}{drawn}.",
            "Leave out what draws random numbers when it answers: F.dropout needs training=self.training, and noise "
            "belongs under 'if self.training'.",
        )


def refuse_blind(run: Runner, draw: Draw, name: str, *, batch: int = 1, whole: Collection[str] = ()) -> None:
    """Refuse a network that answers every image alike, to the last bit: weights that are zero, an image left unread.

    Images of full and of low contrast are tried, which saturate nothing together. ``whole`` are outputs of whole
    numbers, such as a class, which noise may well leave alike.

    Raises:
        ResvitError: INPUT.
    """
    random = np.random.default_rng(1)
    faint = {
        key: value * np.float32(0.1) if value.dtype.kind == "f" else value for key, value in draw(batch, random).items()
    }
    answers = [run(feeds) for feeds in (draw(batch, random), draw(batch, random), faint)]
    names = [key for key, value in answers[0].items() if value.dtype.kind == "f" and key not in whole]
    if not all(np.isfinite(answers[0][key]).all() for key in names):
        return  # NaN is alike too, and is told as what it is
    if names and all(np.array_equal(answers[0][key], other[key]) for key in names for other in answers):
        raise ResvitError(
            f"{name} answers every image alike ({', '.join(names)}): what it returns does not depend on its image.",
            "Check that the forward reads its image, and that the weights were loaded.",
        )


def couples_images(run: Runner, draw: Draw, *, batch: int | None = None, sets: bool = False) -> float | None:
    """How far an image's answers move with the other images of its batch; None where by no more than rounding.

    ``batch`` is the only one that the network takes, None where it takes any: then a batch is compared with its images
    one by one. Else images are asked again in other places, among others. ``sets`` as in ``differences``. Images differ
    in contrast, so that a statistic over the batch differs as well.
    """
    if batch == 1:
        return None
    random = np.random.default_rng(2)
    feeds = _of_unequal_contrast(draw(batch or _IMAGES, random))
    others = _of_unequal_contrast(draw(batch or _IMAGES, random))

    def alone(arrays: Arrays) -> Arrays:
        return _rows_together(
            [run({name: value[index : index + 1] for name, value in arrays.items()}) for index in range(_IMAGES)]
        )

    def elsewhere(arrays: Arrays) -> Arrays:
        assert batch is not None
        found = []
        for index in (0, batch - 1):
            place = (index + 1) % batch
            mixed = {name: np.array(others[name]) for name in arrays}
            for name, value in arrays.items():
                mixed[name][place] = value[index]
            found.append({name: value[place : place + 1] for name, value in run(mixed).items()})
        return _rows_together(found)

    def ends(arrays: Arrays) -> Arrays:
        return {name: value[[0, -1]] for name, value in run(arrays).items()}

    pair = (alone, run) if batch is None else (ends, elsewhere)
    found = differences(*pair, feeds, sets=sets).values()
    return max((one.error for one in found if one.finite and not one.same), default=None)


def coupled_error(name: str, moved: float, fix: str) -> ResvitError:
    """That the answers for one image hang on the others: what to say of it."""
    return ResvitError(
        f"{name} answers differently for an image alone and in a batch (by up to {moved:.3g}): its answers depend on "
        "the other images of the batch. A view with a hard-coded batch of 1, or statistics over the batch, do this.",
        fix,
    )


def _of_unequal_contrast(feeds: Arrays) -> Arrays:
    scaled = {}
    for name, value in feeds.items():
        factors = np.linspace(0.5, 2.0, len(value), dtype=np.float32).reshape(-1, *[1] * (value.ndim - 1))
        scaled[name] = value * factors if value.dtype == np.float32 else value
    return scaled


def _rows_together(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
