"""How much of a network may remain, and which widths a group may have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.layer_times import MeasuredTimes
from resvit_engines.targets.table import Precision, Target
from resvit_quantize.pruning.choose.costs import TILES, Attending, Costs, Weighted, Weights, Widths, layer_us
from resvit_quantize.pruning.groups import Group, Kind


@dataclass(frozen=True)
class Budget:
    """The share that may remain, above 0 and at most 1, of exactly one of the three measures.

    ``precision`` is the one that the network will run in: widths land on its tiles. ``latency`` is by the cost model
    of ``target``, scaled by the times ``measured`` on it. ``least`` is the share of its units that every group keeps,
    and of the blocks beside one another. ``allowed`` are the kinds of which groups were looked for: the others are
    named where the budget cannot be met.
    Raises ``ResvitError`` for values that make no budget.
    """

    macs: float | None = None
    latency: float | None = None
    params: float | None = None
    precision: Precision = Precision.FP16
    target: Target | None = None
    measured: MeasuredTimes | None = None
    least: float = 0.1
    allowed: frozenset[Kind] = frozenset(Kind)

    def __post_init__(self) -> None:
        """Check all values."""
        given = {name: share for name, share in self._shares().items() if share is not None}
        if len(given) != 1:
            raise ResvitError(
                f"A budget is one of macs, latency and params; {len(given)} were given.",
                "Give exactly one share that may remain, such as macs=0.5.",
            )
        for name, share in (*given.items(), ("least", self.least)):
            if not (math.isfinite(share) and 0 < share <= 1):
                raise ResvitError(
                    f"{name}={share} is no share that may remain.",
                    f"Give a number above 0 and at most 1: 0.5 keeps half{_percent(share)}.",
                )
        if self.latency is not None and self.target is None:
            raise ResvitError("A latency budget needs a target to predict times for.", "Name the target.")
        if self.target is not None and self.target.peak(self.precision) is None:
            raise ResvitError(
                f"{self.target.name} has no {self.precision.value} tensor cores.",
                f"Choose {' or '.join(sorted(each.value for each in self.target.precisions))}.",
                ExitCode.IMPOSSIBLE,
            )

    @property
    def share(self) -> float:
        """What may remain."""
        return next(share for share in self._shares().values() if share is not None)

    @property
    def measure(self) -> str:
        """Of what: ``macs``, ``latency`` or ``params``."""
        return next(name for name, share in self._shares().items() if share is not None)

    @property
    def noun(self) -> str:
        """The measure in words."""
        words = {"macs": "multiply-accumulates", "latency": "predicted latency", "params": "parameters"}
        return words[self.measure]

    def _shares(self) -> dict[str, float | None]:
        return {"macs": self.macs, "latency": self.latency, "params": self.params}


def _percent(share: float) -> str:
    return f", so {share:g}% would be {share / 100:g}" if 1 < share <= 100 else ""


@dataclass(frozen=True)
class Cost:
    """What a network takes per image. ``latency_us`` is predicted, and ``None`` without a target."""

    macs: int
    params: int
    latency_us: float | None = None


def cost_of(costs: Costs, widths: Widths, budget: Budget) -> Cost:
    """All measures at these widths."""
    latency = (
        None if budget.target is None else costs.latency_us(widths, budget.target, budget.precision, budget.measured)
    )
    return Cost(costs.macs(widths), costs.params(widths), latency)


def legal_widths(group: Group, budget: Budget) -> tuple[int, ...]:
    """How many units the group may keep, ascending, all of them at the end.

    Channels go in steps of the precision's tile: multiples of 8 (FP16), 16 (FP8) or 32 (INT8), which keeps 2:4
    sparsity possible too. A group narrower than two tiles goes in steps of the largest power of two that leaves it
    two widths. Heads go one by one, since a head is whole; a block stays or goes. Never less than the budget's
    ``least`` share, nor than one step; a width that is no multiple stays legal where it is the network's own.
    """
    if group.kind is Kind.BLOCKS:
        return (0, 1)
    step = 1 if group.kind is Kind.HEADS else TILES[budget.precision] // math.gcd(TILES[budget.precision], group.width)
    if step > 1 and 2 * step > group.units:
        step = 1 << max(0, (group.units // 2).bit_length() - 1)
    first = math.ceil(max(1, budget.least * group.units - 1e-9) / step) * step
    return (*range(first, group.units, step), group.units)


class Meter:
    """The budget's measure at any widths, and how it changes; layers are costed once for each of their widths."""

    def __init__(self, costs: Costs, groups: Iterable[Group], budget: Budget) -> None:
        self.budget = budget
        self.units = {group.name: group.units for group in groups}
        self._parts: tuple[Weighted | Attending | Weights, ...] = (
            costs.parameters if budget.measure == "params" else costs.layers
        )
        self._scale = (
            {} if budget.target is None else costs.time_scale(budget.target, budget.precision, budget.measured)
        )
        self._names = [tuple(sorted(part.groups & self.units.keys())) for part in self._parts]
        self._touched: dict[str, list[int]] = {name: [] for name in self.units}
        for i, names in enumerate(self._names):
            for name in names:
                self._touched[name].append(i)
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}
        self.neighbours = {
            name: frozenset(other for i in touched for other in self._names[i])
            for name, touched in self._touched.items()
        }
        """By group, those whose savings hang on its width, itself among them."""

    def total(self, widths: Widths) -> float:
        """The measure at these widths."""
        return sum(self._cost(i, widths) for i in range(len(self._parts)))

    def change(self, widths: Widths, moves: Mapping[str, int]) -> float:
        """What the measure gains where the groups of ``moves`` go to the widths there."""
        after = {**widths, **moves}
        touched = sorted({i for name in moves for i in self._touched[name]})
        return sum(self._cost(i, after) for i in touched) - sum(self._cost(i, widths) for i in touched)

    def _cost(self, part: int, widths: Widths) -> float:
        names = self._names[part]
        key = part, tuple(widths.get(name, self.units[name]) for name in names)
        if key not in self._known:
            self._known[key] = self._measured(self._parts[part], dict(zip(names, key[1], strict=True)))
        return self._known[key]

    def _measured(self, part: Weighted | Attending | Weights, widths: Widths) -> float:
        if isinstance(part, Weights):
            return part.elements(widths)
        if self.budget.measure == "latency" and self.budget.target is not None:
            scale = self._scale[part.name]
            return scale * layer_us(part, widths, self.budget.target, self.budget.precision)
        return part.macs(widths)
