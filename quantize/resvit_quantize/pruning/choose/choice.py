"""Which units go: the widths that meet a budget at the least loss of importance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ResvitError
from resvit_quantize.pruning.choose.budget import Budget, Cost, Meter, cost_of, legal_widths
from resvit_quantize.pruning.choose.costs import TILES, Costs
from resvit_quantize.pruning.groups import Group, Kept, Kind

Values = Mapping[str, npt.NDArray[np.float64]]
"""Importance by the group's name, [units]."""

_WELL_BELOW = 0.02
"""Share of the whole by which a choice that keeps less than it may is explained."""
_SLACK = 1e-9
"""Relative: what rounding may add to a cost."""


@dataclass(frozen=True)
class Width:
    """What became of one group. ``importance_lost`` is the share of its summed importance."""

    group: str
    kind: Kind
    before: int
    after: int
    importance_lost: float


@dataclass(frozen=True)
class Choice:
    """Which units stay, and what that costs. ``widths`` name every group, also those that stay whole."""

    kept: Kept
    before: Cost
    after: Cost
    widths: tuple[Width, ...]
    notes: tuple[str, ...] = ()


def choose_widths(groups: Sequence[Group], importance: Values, costs: Costs, budget: Budget) -> Choice:
    """The widths that keep the budget's measure at its share or below, by least importance lost for what is saved.

    Greedy over marginal gains: the step goes first that loses least importance per cost saved; every step changes
    what its neighbours save, and they are told anew (a layer's cost is the product of its two widths). Then whatever
    still fits is given back, most importance per cost first. In a group the least important units go first (of
    equals the last), and each counts ``units / those left``-fold: importances add to first order only, and the fewer
    are left, the less they make up for one another (compare the denominator of LAMP: Lee et al. 2021, "Layer-adaptive
    sparsity for the magnitude-based pruning"). Deterministic.

    Raises ``ResvitError`` where the budget cannot be met, with the nearest that can, and where importance does not
    fit the groups.
    """
    _check(groups, importance)
    search = _Search(groups, importance, costs, budget)
    widths = search.widths()
    return _choice(groups, importance, costs, budget, widths, search.limited())


def uniform_widths(groups: Sequence[Group], importance: Values, costs: Costs, budget: Budget) -> Choice:
    """The same share of units from every group, the largest that meets the budget, to its nearest width; blocks stay.

    Which units go is by importance, as in :func:`choose_widths`. Raises as that does.
    """
    _check(groups, importance)
    narrowing = [group for group in groups if group.kind is not Kind.BLOCKS]
    legal = {group.name: legal_widths(group, budget) for group in narrowing}
    meter = Meter(costs, groups, budget)
    limit = budget.share * meter.total({})
    # Each group takes its width nearest to the share; between these shares no group changes.
    middles = {g.name: [(a + b) / 2 / g.units for a, b in itertools.pairwise(legal[g.name])] for g in narrowing}
    shares = sorted({0.0, *(middle for each in middles.values() for middle in each)})

    def widths_at(share: float) -> dict[str, int]:
        return {name: legal[name][sum(middle <= share for middle in each)] for name, each in middles.items()}

    if meter.total(widths_at(0.0)) > limit * (1 + _SLACK):
        raise _unmet(budget, meter.total(widths_at(0.0)) / meter.total({}))
    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = meter.total(widths_at(shares[middle])) <= limit * (1 + _SLACK)
        low, high = (middle, high) if fits else (low, middle - 1)
    return _choice(groups, importance, costs, budget, widths_at(shares[low]))


@dataclass(frozen=True)
class _Step:
    """A group's next move: its widths after it, what it loses in importance, and what it saves."""

    ratio: float
    saved: float
    name: str
    moves: dict[str, int]

    @property
    def order(self) -> tuple[float, float, str]:
        """The best first: least loss per saving, then most saved, then by name."""
        return self.ratio, -self.saved, self.name


class _Search:
    def __init__(self, groups: Sequence[Group], importance: Values, costs: Costs, budget: Budget) -> None:
        self.budget = budget
        self.groups = {group.name: group for group in groups}
        self.meter = Meter(costs, groups, budget)
        self.legal = {group.name: legal_widths(group, budget) for group in groups}
        self.lost = {group.name: _curve(importance[group.name]) for group in groups}
        self.inside = {group.name: _inside(group, groups) for group in groups if group.kind is Kind.BLOCKS}
        """Of each block, the groups that go with it."""
        self.most_gone = _most_gone([self.groups[name] for name in self.inside], budget.least)
        self.now = {group.name: group.units for group in groups}

    def widths(self) -> dict[str, int]:
        whole = self.meter.total(self.now)
        limit = self.budget.share * whole * (1 + _SLACK)
        total = whole
        steps = {name: self._down(name) for name in self.groups}
        while total > limit:
            best = min((step for step in steps.values() if step is not None), key=lambda s: s.order, default=None)
            if best is None:
                raise _unmet(self.budget, self.meter.total(self.now) / whole)
            self.now |= best.moves
            total = self.meter.total(self.now) if total - best.saved <= limit else total - best.saved
            for name in self._stale(best):
                steps[name] = self._down(name)
        self._give_back(limit)
        return self.now

    def limited(self) -> tuple[str, ...]:
        """Why the widths found keep clearly less than they may: the step back that is the smallest, and too large."""
        whole, share = self.meter.total({name: group.units for name, group in self.groups.items()}), self.budget.share
        kept = self.meter.total(self.now) / whole
        backs = [
            (self.meter.total(self.now | moves) / whole, name, moves[name])
            for name, moves in ((name, self._back(name)) for name in self.groups)
            if moves
        ]
        too_large = [back for back in backs if back[0] > share]
        if kept >= share - _WELL_BELOW or not too_large:
            return ()
        then, name, width = min(too_large)
        group = self.groups[name]
        if group.kind is Kind.BLOCKS:
            how = f"blocks go whole, and with {group.identities[0] if group.identities else name}"
        else:
            heads = group.kind is Kind.HEADS
            unit = "heads go whole" if heads else f"channels go in steps for {self.budget.precision.value}"
            now, back = (units * (1 if heads else group.width) for units in (self.now[name], width))
            how = f"{unit}, and with the smallest one back, {name} from {now} to {back},"
        return (f"{kept:.1%} of the {self.budget.noun} remain where {share:.1%} may: {how} they would be {then:.1%}",)

    def _back(self, name: str) -> dict[str, int]:
        """The moves that take a group to its next larger width, with those that go with a block."""
        if self.now[name] == self.groups[name].units or self._gone(name):
            return {}
        return {name: next(width for width in self.legal[name] if width > self.now[name])}

    def _stale(self, step: _Step) -> list[str]:
        """The groups whose next step is another after this one."""
        names = {other for name in step.moves for other in self.meter.neighbours[name]} | step.moves.keys()
        if step.name in self.inside:
            names |= self.inside.keys() | set(self.inside[step.name])
        names |= {block for block, inner in self.inside.items() if names & set(inner)}
        return [name for name in self.groups if name in names]

    def _gone(self, name: str) -> bool:
        """Whether a block that is gone took the group along."""
        return any(self.now[block] == 0 and name in inner for block, inner in self.inside.items())

    def _down(self, name: str) -> _Step | None:
        """The next narrower width that saves anything."""
        if self._gone(name):
            return None
        if name in self.inside and not self._may_go(name):
            return None
        for width in reversed([w for w in self.legal[name] if w < self.now[name]]):
            # What a block takes along need not have been narrowed before.
            moves = {name: width} | {inner: self.groups[inner].units for inner in self.inside.get(name, ())}
            saved = -self.meter.change(self.now, moves)
            if saved > 0:
                loss = sum(self.lost[each][w] - self.lost[each][self.now[each]] for each, w in moves.items())
                return _Step(loss / saved, saved, name, moves)
        return None

    def _may_go(self, block: str) -> bool:
        parent = _parent(self.groups[block])
        gone = sum(self.now[other] == 0 for other in self.inside if _parent(self.groups[other]) == parent)
        return gone < self.most_gone[parent]

    def _give_back(self, limit: float) -> None:
        """Widen again while it fits, most importance per cost first."""
        while True:
            room = limit - self.meter.total(self.now)
            ups = [step for name in self.groups for step in self._ups(name, room)]
            if not ups:
                return
            self.now |= min(ups, key=lambda step: step.order).moves

    def _ups(self, name: str, room: float) -> list[_Step]:
        if self.now[name] == self.groups[name].units or name in self.inside or self._gone(name):
            return []
        found = []
        for width in (w for w in self.legal[name] if w > self.now[name]):
            grown = self.meter.change(self.now, {name: width})
            if grown > room:
                break
            won = float(self.lost[name][self.now[name]] - self.lost[name][width])
            found.append(_Step(-won / max(grown, 1e-30), -won, name, {name: width}))
        return found[:1]


def _curve(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Importance lost at each number of units kept, [units + 1]; see :func:`choose_widths` for the weights."""
    units = len(values)
    weighted = np.sort(values) * units / np.arange(units, 0, -1)
    return np.asarray(np.concatenate([[0.0], np.cumsum(weighted)])[::-1], np.float64)


def _inside(block: Group, groups: Sequence[Group]) -> tuple[str, ...]:
    """The groups all of whose tensors lie in the block."""
    paths = tuple(f"{path}." for path in block.identities)
    return tuple(
        group.name
        for group in groups
        if group is not block
        and (
            (group.slices and all(part.tensor.startswith(paths) for part in group.slices))
            or (group.kind is Kind.BLOCKS and all(f"{path}.".startswith(paths) for path in group.identities))
        )
    )


def _parent(block: Group) -> str:
    return block.identities[0].rpartition(".")[0] if block.identities else ""


def _most_gone(blocks: Sequence[Group], least: float) -> dict[str, int]:
    """By the module that holds blocks side by side, how many of them may go."""
    beside: dict[str, int] = {}
    for block in blocks:
        beside[_parent(block)] = beside.get(_parent(block), 0) + 1
    return {parent: count - math.ceil(max(1, least * count - 1e-9)) for parent, count in beside.items()}


def _check(groups: Sequence[Group], importance: Values) -> None:
    for group in groups:
        values = importance.get(group.name)
        if values is None or values.shape != (group.units,) or not np.isfinite(values).all() or (values < 0).any():
            raise ResvitError(
                f"The importance of {group.name} is not {group.units} finite numbers of at least 0.",
                "Take the importance of the very groups that are chosen from.",
            )


def _unmet(budget: Budget, nearest: float) -> ResvitError:
    shown = math.ceil(nearest * 1000) / 1000
    others = [kind.value for kind in Kind if kind not in budget.allowed]
    return ResvitError(
        f"At most {max(0.0, 1 - shown):.3f} of the {budget.noun} can go, and {1 - budget.share:.3f} should: "
        f"every group is then at its least width.",
        f"Let {shown:.3f} or more remain"
        + (f", or allow more kinds beside those allowed now (--prune-what: {', '.join(others)})." if others else "."),
    )


def _choice(
    groups: Sequence[Group],
    importance: Values,
    costs: Costs,
    budget: Budget,
    widths: Mapping[str, int],
    limited: tuple[str, ...] = (),
) -> Choice:
    kept: dict[str, npt.NDArray[np.int64]] = {}
    rows = []
    for group in groups:
        values, after = importance[group.name], widths.get(group.name, group.units)
        stay = np.sort(np.argsort(-values, kind="stable")[:after]).astype(np.int64)
        if after < group.units:
            kept[group.name] = stay
        lost = 1.0 - float(values[stay].sum() / values.sum()) if values.sum() > 0 else 0.0
        rows.append(Width(group.name, group.kind, group.units, after, min(max(lost, 0.0), 1.0)))
    counts = {name: len(units) for name, units in kept.items()}
    notes = (*_notes(groups, widths, budget), *limited)
    return Choice(kept, cost_of(costs, {}, budget), cost_of(costs, counts, budget), tuple(rows), notes)


def _notes(groups: Sequence[Group], widths: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
    tile = TILES[budget.precision]
    narrow = [g for g in groups if g.kind not in (Kind.BLOCKS, Kind.HEADS) and g.units * g.width < 2 * tile]
    gone = [g.identities[0] for g in groups if g.kind is Kind.BLOCKS and widths.get(g.name, 1) == 0 and g.identities]
    notes = []
    if narrow:
        notes.append(
            f"{len(narrow)} groups are narrower than two tiles of {tile} channels ({budget.precision.value}) and go "
            f"in smaller steps: {', '.join(g.name for g in narrow[:3])}{', …' if len(narrow) > 3 else ''}"
        )
    if gone:
        notes.append(f"blocks that are skipped: {', '.join(gone)}")
    return tuple(notes)
