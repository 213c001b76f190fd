"""Variants of one network timed in turns where they will run: which is faster, by how much, and how sure is that?"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resvit_engines.bench.bench import BenchSettings, bench_feeds
from resvit_engines.bench.beside import usage_now, usage_remarks
from resvit_engines.bench.clocks import Conditions, clock_warnings, conditions_now
from resvit_engines.bench.compare import Ratio, paired_ratio, rounds_in_turns
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record
from resvit_engines.run.runner import Runner

Opening = Callable[[], AbstractContextManager[Runner]]
"""Opens a variant's engine, for as long as its block lasts."""
_DRIFT = 1.25
"""A machine whose baseline moved further than this from one third of the rounds to the last is said to be uneven."""
_PROFILED = 10
"""Calls with a profiler, which tells each layer's time and makes the whole slower."""


@dataclass(frozen=True)
class VariantTimes:
    """Times of variants, taken in turns.

    ``groups`` hold the median ms of each round by variant. All stand in one, unless memory did not take them together:
    then the first variant, the baseline, is in every group. ``profiles`` are microseconds by layer, in order, of those
    variants whose runtime tells them. ``remarks`` are what speaks against trusting the times.
    """

    groups: tuple[Mapping[str, tuple[float, ...]], ...]
    before: Conditions = field(default_factory=Conditions)
    after: Conditions = field(default_factory=Conditions)
    remarks: tuple[str, ...] = ()
    profiles: Mapping[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Every variant, the baseline first."""
        return tuple(dict.fromkeys(name for group in self.groups for name in group))

    def ratio(self, slower: str, faster: str) -> Ratio:
        """How many times as fast ``faster`` is, with its interval of 95%: paired round by round.

        Of two that were not timed together each is held against the baseline beside it.
        """
        for group in self.groups:
            if slower in group and faster in group:
                return paired_ratio(group[slower], group[faster])
        return paired_ratio(self._over_baseline(slower), self._over_baseline(faster))

    def median_ms(self, name: str) -> float:
        """Of one call: the median over rounds."""
        return float(np.median([ms for group in self.groups for ms in group.get(name, ())]))

    def renamed(self, names: Mapping[str, str]) -> VariantTimes:
        """The same with other names for the variants; raises ``ResvitError`` INPUT where one is not among ``names``."""
        if unknown := sorted({*self.names, *self.profiles} - set(names)):
            raise ResvitError(f"Times came of {unknown[0]!r:.200}, which was not asked for.", "Run it again.")
        return VariantTimes(
            tuple({names[name]: ms for name, ms in group.items()} for group in self.groups),
            self.before,
            self.after,
            self.remarks,
            {names[name]: layers for name, layers in self.profiles.items()},
        )

    def _over_baseline(self, name: str) -> tuple[float, ...]:
        group = next(group for group in self.groups if name in group)
        return tuple(ms / base for ms, base in zip(group[name], group[self.names[0]], strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "groups": [{name: list(ms) for name, ms in group.items()} for group in self.groups],
            "conditions": {"before": self.before.to_json(), "after": self.after.to_json()},
            "remarks": list(self.remarks),
            "profiles": {
                name: [{"name": layer, "averageMs": us / 1e3} for layer, us in layers]
                for name, layers in self.profiles.items()
            },
        }

    @classmethod
    def from_json(cls, record: Record) -> VariantTimes:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        conditions, profiles = record.record("conditions"), record.record("profiles")
        groups = tuple(
            {name: group.numbers(name, _LEAST_MS) for name in group.names} for group in record.records("groups")
        )
        found = cls(
            groups,
            Conditions.from_json(conditions.record("before")),
            Conditions.from_json(conditions.record("after")),
            record.texts("remarks"),
            {
                name: tuple((row.text("name"), 1e3 * row.number("averageMs", 0, 1e9)) for row in profiles.records(name))
                for name in profiles.names
            },
        )
        if not found.names or any(
            found.names[0] not in group or len({len(ms) for ms in group.values()}) != 1 or not all(group.values())
            for group in groups
        ):
            raise record.refusal("groups", "rounds of variants, the first of them in every group")
        return found


_LEAST_MS = 1e-6


def time_variants(
    openings: Mapping[str, Opening],
    settings: BenchSettings,
    rounds: int,
    reporter: Reporter = SILENT,
    *,
    on_gpu: bool,
) -> VariantTimes:
    """Time variants in turns, the first the baseline; ``settings.seconds`` are for each of them.

    Where memory does not take all at once, they are timed in groups, the baseline in each.

    Raises:
        ResvitError: SYSTEM where not even two fit beside each other, and what opening an engine raises.
    """
    before, usage = conditions_now(on_gpu=on_gpu), usage_now(on_gpu=on_gpu)
    profiles: dict[str, tuple[tuple[str, float], ...]] = {}
    groups = tuple(_timed(openings, list(openings), settings, rounds, reporter, profiles))
    after = conditions_now(on_gpu=on_gpu)
    remarks = [*usage_remarks(usage, usage_now(on_gpu=on_gpu)), *clock_warnings(before, after)]
    for group in groups:
        remarks += drift_remarks(group[next(iter(openings))])
    return VariantTimes(groups, before, after, tuple(dict.fromkeys(remarks)), profiles)


def _timed(
    openings: Mapping[str, Opening],
    names: Sequence[str],
    settings: BenchSettings,
    rounds: int,
    reporter: Reporter,
    profiles: dict[str, tuple[tuple[str, float], ...]],
) -> list[dict[str, tuple[float, ...]]]:
    bench = BenchSettings(batch=settings.batch, seconds=settings.seconds, warmup=settings.warmup)
    try:
        with contextlib.ExitStack() as owned:
            runners = {name: owned.enter_context(openings[name]()) for name in names}
            taken = rounds_in_turns(runners, bench, rounds=rounds, reporter=reporter)
            for name, runner in runners.items():
                feeds = bench_feeds(runner, settings.batch, None)
                if name not in profiles and (layers := runner.layer_times(feeds, _PROFILED)):
                    profiles[name] = layers
            return [taken]
    except ResvitError as error:
        if error.code is not ExitCode.SYSTEM or len(names) < 3:
            raise
        problem = error.problem
    baseline, *others = names
    half = (len(others) + 1) // 2
    reporter.warn(f"{problem} Timing {half} variants at once instead of {len(others)}, the baseline beside them.")
    parts = (others[:half], others[half:])
    return [
        group for part in parts for group in _timed(openings, [baseline, *part], settings, rounds, reporter, profiles)
    ]


def drift_remarks(baseline_ms: Sequence[float]) -> tuple[str, ...]:
    """What is to be said of a machine whose speed moved while rounds were timed."""
    third = max(1, len(baseline_ms) // 3)
    early, late = (float(np.median(part)) for part in (baseline_ms[:third], baseline_ms[-third:]))
    if max(early, late) <= _DRIFT * min(early, late):
        return ()
    return (f"The machine's speed moved while it was timed: {early:.3f} ms at first, {late:.3f} ms at the end.",)
