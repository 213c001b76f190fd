"""All pairs of parameter values in few rows, where a full product would be many.

Nearly all faults of combinations show where two values meet (Kuhn, Wallace and Gallo, "Software fault interactions and
implications for software testing", 2004). Rows are chosen greedily and are the same in every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

Pair = tuple[tuple[int, Any], tuple[int, Any]]
"""Two parameters by their places, each with a value."""


def pairs_of(row: Sequence[Any]) -> Iterator[Pair]:
    """Every two values of a row, with their places."""
    return itertools.combinations(enumerate(row), 2)


def all_pairs(*values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with one value of each parameter, in which every value meets every value of every other parameter."""
    left = dict.fromkeys(
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(values)), 2)
        for x, y in itertools.product(range(len(values[a])), range(len(values[b])))
    )
    rows = []
    while left:
        (a, x), (b, y) = next(iter(left))
        row = {a: x, b: y}
        for place in range(len(values)):
            if place not in row:
                row[place] = max(
                    range(len(values[place])),
                    key=lambda value: sum(_ordered((place, value), other) in left for other in row.items()),
                )
        for pair in pairs_of([row[place] for place in range(len(values))]):
            left.pop(pair, None)
        rows.append(tuple(values[place][row[place]] for place in range(len(values))))
    return rows


def values_among(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Those of the rows, in their order, that together have every value that any of them has in its place."""
    left = {part for row in rows for part in enumerate(row)}
    chosen = set()
    while left:
        best = max(range(len(rows)), key=lambda index: len(left.intersection(enumerate(rows[index]))))
        left.difference_update(enumerate(rows[best]))
        chosen.add(best)
    return [rows[index] for index in sorted(chosen)]


def parametrize_by_pairs(names: Sequence[str], *values: Sequence[Any]) -> pytest.MarkDecorator:
    """The full product of the values, of which all but the rows of ``all_pairs`` are marked slow."""
    needed = set(all_pairs(*(range(len(known)) for known in values)))
    indices = itertools.product(*(range(len(known)) for known in values))
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(known[index] for known, index in zip(values, row, strict=True)),
                marks=() if row in needed else pytest.mark.slow,
            )
            for row in indices
        ],
    )


def _ordered(one: tuple[int, Any], other: tuple[int, Any]) -> Pair:
    return (one, other) if one[0] < other[0] else (other, one)
