"""Which images travel with a bundle, and how near an engine must come to what was validated of them."""

from __future__ import annotations

import math

import numpy as np

from resvit_calibrate.answers.classes import INPUT
from resvit_calibrate.runtime.runner import Runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.rows import paired_rows
from resvit_engines.run.golden_files import moving_sqnr_db

CHOSEN_AMONG = 32
"""Validation images, of which those are taken whose answers are the furthest apart."""
PICTURES = 6
_MARGIN_DB, _MOST_DB, _LEAST_DB = 10.0, 35.0, 10.0
_STEADY_DB = 15.0
"""An image without content is taken along where quantisation leaves its answers this near."""


def choose_golden(feeds: Arrays, shipped: Runner, floating: Runner, *, sets: bool) -> tuple[Arrays, dict[str, float]]:
    """Of ``feeds`` [N, …], the golden ones, and the SQNR in dB by output that an engine must keep of what moves.

    Six images whose answers differ the most; nearly equal ones would let any engine pass. With them an image of zeros,
    which divides by zero where an epsilon was lost, and one of noise, in which no two neighbours are alike, so that
    sampling the nearest is not sampling between them; both where the network answers them steadily, and none where the
    answers are ``sets``.

    What an engine's rounding moves is no more than what quantising moved: so it may be 10 dB worse than that, and need
    not be better than 35 dB, which FP16 sums in another order keep.
    """
    taken = _furthest_apart(shipped(feeds), min(PICTURES, len(feeds[INPUT])))
    chosen = {name: value[taken] for name, value in feeds.items()}
    if not sets:
        flat = {name: np.concatenate([value[:1]] * 2) for name, value in chosen.items()}
        flat[INPUT][0] = 0.0
        flat[INPUT][1] = np.random.default_rng(0).standard_normal(flat[INPUT][1].shape).astype(np.float32)
        whole = {name: np.concatenate([value, flat[name]]) for name, value in chosen.items()}
        before, after, count = floating(whole), shipped(whole), len(taken)
        steady = [index for index in (0, 1) if _steady(before, after, count + index)]
        chosen = {name: np.concatenate([value, flat[name][steady]]) for name, value in chosen.items()}
    expected, outputs = floating(chosen), shipped(chosen)
    outputs = paired_rows(expected, outputs) if sets else outputs
    least = {}
    for name, (true, found) in zip(outputs, zip(expected.values(), outputs.values(), strict=True), strict=True):
        own = moving_sqnr_db(true, found) if true.shape == found.shape and found.dtype.kind == "f" else None
        own = math.inf if own is None else own
        least[name] = round(min(max(own - _MARGIN_DB, _LEAST_DB), _MOST_DB), 1)
    return chosen, least


def _furthest_apart(outputs: Arrays, count: int) -> list[int]:
    """The first image, and one after the other that which is the furthest from all that are taken."""
    rows = []
    for value in outputs.values():
        flat = np.nan_to_num(value.astype(np.float64).reshape(len(value), -1))
        rows.append(flat / max(float(np.linalg.norm(flat)), 1e-300))
    answers = np.concatenate(rows, axis=1)
    taken, distance = [0], np.full(len(answers), np.inf)
    while len(taken) < count:
        distance = np.minimum(distance, np.square(answers - answers[taken[-1]]).sum(axis=1))
        taken.append(int(np.where(np.isin(np.arange(len(answers)), taken), -1.0, distance).argmax()))
    return taken


def _steady(before: Arrays, after: Arrays, index: int) -> bool:
    """Whether every output of one image is finite, and as near to the float network's as ``_STEADY_DB``."""
    for one, other in zip(before.values(), after.values(), strict=True):
        true, found = one[index].astype(np.float64), other[index].astype(np.float64)
        if not (np.isfinite(true).all() and np.isfinite(found).all()):
            return False
        if np.linalg.norm(found - true) > np.linalg.norm(true) * 10 ** (-_STEADY_DB / 20):
            return False
    return True
