"""Whether a network's answers fit other class numbers than the data's: a baseline on wrong numbers proves nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_calibrate.gate.intervals import paired_difference

_GAIN = 0.01
"""Shares of all classes' recall that another numbering must win at least."""
_CLEARLY = 0.25
"""By so much more than twice its own recall a class that moves must be recognised under its other number."""
_RIGHT = 0.5
_TIMES_CHANCE = 20.0
_FEWEST_IMAGES = 8
_SHOWN = 12
Numbers = npt.NDArray[np.int64]


class Pairs(NamedTuple):
    """How often (or on how many pixels) class ``known`` was answered as ``answered`` in an image: four arrays [M]."""

    image: Numbers
    known: Numbers
    answered: Numbers
    times: Numbers


@dataclass(frozen=True)
class OtherNumbering:
    """The output that each class of the data is likely to be, and the recall (mean over classes) both ways, 0 to 1."""

    outputs: dict[int, int]
    own: float
    other: float

    @property
    def moved(self) -> dict[int, int]:
        """The classes whose output is not that of their number."""
        return {known: output for known, output in self.outputs.items() if known != output}

    def words(self, names: Sequence[str] = ()) -> str:
        """What was found, with the likely class list; ``names`` are the data's, by number."""

        def called(number: int) -> str:
            return names[number] if number < len(names) else str(number)

        steps = {output - known for known, output in self.outputs.items()}
        if len(steps) == 1 and len(self.outputs) > 1:
            step = next(iter(steps))
            how = f"every class of the data is {abs(step)} {'lower' if step > 0 else 'higher'} than the network's"
        else:
            shown = list(self.moved.items())[:_SHOWN]
            how = ", ".join(f"class {known} ({called(known)}) is output {output}" for known, output in shown)
            how += f" and {len(self.moved) - _SHOWN} more" if len(self.moved) > _SHOWN else ""
        listed = {called(known): output for known, output in self.outputs.items()}
        remedy = (
            f"--classes with {json.dumps(listed, ensure_ascii=False)}" if len(listed) <= 2 * _SHOWN else "--classes"
        )
        return (
            f"the float network's answers fit other class numbers much better (right {100 * self.other:.1f}% of the "
            f"time instead of {100 * self.own:.1f}%, mean over classes): {how}; what is measured on wrong numbers "
            f"proves nothing: give {remedy} if that is so, or correct the data"
        )


def other_numbering(pairs: Pairs, confidence: float) -> OtherNumbering | None:
    """The numbering that the answers fit much better than their own; None where there is none.

    It is fitted on one half of the images and measured on the other, both ways, so that it does not profit from chance;
    classes count alike, however many images or pixels they have. It must recognise the classes that it moves, win over
    the data's own numbering on significantly more images than it loses, and be right more than half of the time (or 20
    times as often as guessing, where that is less).
    """
    images = np.unique(pairs.image)
    classes, place = np.unique(pairs.known, return_inverse=True)
    if len(images) < _FEWEST_IMAGES or len(classes) < 2:
        return None
    share = pairs.times / np.bincount(place, pairs.times)[place]
    half = np.random.default_rng(0).permutation(len(images)) % 2
    second = half[np.searchsorted(images, pairs.image)] == 1
    hit = np.zeros(len(share))
    for part in (second, ~second):
        fitted = _assigned(pairs, share, ~part)
        hit += np.where(part & (pairs.answered == _looked_up(fitted, pairs.known)), share, 0.0)
    own_hit = np.where(pairs.answered == pairs.known, share, 0.0)
    outputs = _assigned(pairs, share, np.ones(len(share), np.bool_))
    moves = _looked_up(outputs, pairs.known) != pairs.known
    moved = sum(known != output for known, output in outputs.items())
    if not moved:
        return None
    own, other = own_hit.sum() / len(classes), hit.sum() / len(classes)
    before, behind = own_hit[moves].sum() / moved, hit[moves].sum() / moved
    if other - own < _GAIN or behind < _CLEARLY + 2 * before or other < min(_RIGHT, _TIMES_CHANCE / len(classes)):
        return None
    number = np.searchsorted(images, pairs.image)
    apart = np.bincount(number, hit - own_hit, len(images))
    won, lost = int((apart > 1e-12).sum()), int((apart < -1e-12).sum())
    if paired_difference(won, lost, len(images), confidence)[0] <= 0.0:
        return None
    return OtherNumbering(outputs, float(own), float(other))


def _assigned(pairs: Pairs, share: npt.NDArray[Any], part: npt.NDArray[np.bool_]) -> dict[int, int]:
    """An output of its own for each known class: the likeliest first, then as numbered wherever that does as well."""
    known, answered = pairs.known[part], pairs.answered[part]
    both, place = np.unique(np.stack([known, answered]), axis=1, return_inverse=True)
    recall = np.bincount(place.ravel(), share[part], both.shape[1])
    recalls = {(int(k), int(a)): float(r) for k, a, r in zip(*both, recall, strict=True)}
    outputs: dict[int, int] = {}
    taken: set[int] = set()
    for k, a in sorted(recalls, key=lambda pair: (-recalls[pair], pair[0] != pair[1], pair)):
        if k not in outputs and a not in taken:
            outputs[k] = a
            taken.add(a)
    for chain in _chains(outputs):
        if sum(recalls.get((k, k), 0.0) for k in chain) >= sum(recalls[k, outputs[k]] for k in chain):
            outputs |= {k: k for k in chain}
    return outputs


def _chains(outputs: dict[int, int]) -> list[set[int]]:
    """Classes that take each other's outputs, together."""
    chains: list[set[int]] = []
    for known, output in outputs.items():
        joined = {known} | ({output} if output in outputs else set())
        apart = [chain for chain in chains if not chain & joined]
        chains = [*apart, joined.union(*(chain for chain in chains if chain & joined))]
    return chains


def _looked_up(outputs: dict[int, int], known: Numbers) -> Numbers:
    """The output of each; classes that were not fitted keep their number."""
    classes, place = np.unique(known, return_inverse=True)
    table = np.array([outputs.get(int(number), int(number)) for number in classes], np.int64)
    return np.asarray(table[place])
