from __future__ import annotations

import itertools
import math

import pytest

from pairs import all_pairs, pairs_of, parametrize_by_pairs, values_among

SIZES = [(2, 2), (5, 6), (2, 2, 2, 3), (5, 6, 4, 9, 3, 4), (1, 7, 1, 2), (2,) * 12]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_two_values_meet_in_few_rows(sizes: tuple[int, ...]) -> None:
    values = [[f"{place}{index}" for index in range(size)] for place, size in enumerate(sizes)]
    rows = all_pairs(*values)
    met = {pair for row in rows for pair in pairs_of(row)}
    for one, other in itertools.combinations(range(len(sizes)), 2):
        for x, y in itertools.product(values[one], values[other]):
            assert ((one, x), (other, y)) in met
    most = math.prod(sorted(sizes)[-2:])
    assert most <= len(rows) <= min(math.prod(sizes), 2 * most + 8)
    assert all_pairs(*values) == rows


def test_equal_values_of_two_parameters_are_told_apart() -> None:
    assert sorted(all_pairs([False, True], [False, True])) == sorted(itertools.product([False, True], repeat=2))


def test_of_given_rows_those_stay_that_have_every_value_among_them() -> None:
    rows = [row for row in itertools.product("abc", "xyz", range(4)) if row[:2] != ("a", "x")]
    chosen = values_among(rows)
    assert set(chosen) <= set(rows)
    assert {part for row in chosen for part in enumerate(row)} == {part for row in rows for part in enumerate(row)}
    assert len(chosen) == 4


def test_the_rest_of_the_product_is_slow() -> None:
    values = ("ab", "xy", range(3))
    rows = parametrize_by_pairs(("one", "other", "third"), *values).args[1]
    assert [row.values for row in rows] == list(itertools.product(*values))
    quick = [row.values for row in rows if not row.marks]
    assert sorted(quick) == sorted(all_pairs(*values))
    assert all([mark.name for mark in row.marks] == ["slow"] for row in rows if row.values not in quick)
