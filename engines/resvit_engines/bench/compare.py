"""Several runners side by side: is the quantised engine faster than FP16, and by how much?"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resvit_engines.bench.bench import BenchReport, BenchSettings, Samples, Stopwatch, joined, report_from
from resvit_engines.bench.clocks import conditions_now
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record
from resvit_engines.run.feeds import Arrays
from resvit_engines.run.onnx_on_cpu import NOT_THE_ENGINE
from resvit_engines.run.runner import Runner

ROUNDS = 20
_FEWEST = 6
"""Fewer pairs cannot exclude chance: at five, all on one side happens once in 16 times."""
_RESAMPLES = 4000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline, with its interval of confidence; above 1 is faster."""

    value: float
    low: float
    high: float

    @property
    def faster(self) -> bool:
        """Whether chance is excluded as the reason."""
        return self.low > 1.0

    @property
    def sentence(self) -> str:
        """Such as ``1.34x [1.30, 1.38]``."""
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"

    def to_json(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4)}

    @classmethod
    def from_json(cls, record: Record) -> Ratio:
        """What :meth:`to_json` wrote."""
        return cls(record.number("value"), record.number("low"), record.number("high"))


@dataclass(frozen=True)
class Comparison:
    """Reports by name, the first the baseline; for every other its ratio and the verdict on it, in words."""

    reports: dict[str, BenchReport]
    ratios: dict[str, Ratio]
    verdicts: dict[str, str]
    rounds: int

    @property
    def baseline(self) -> str:
        """What the others are compared with."""
        return next(iter(self.reports))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "baseline": self.baseline,
            "rounds": self.rounds,
            "runners": [
                {
                    "name": name,
                    **report.to_json(),
                    "faster": self.ratios[name].to_json() if name in self.ratios else None,
                    "verdict": self.verdicts.get(name),
                }
                for name, report in self.reports.items()
            ],
        }


def compare(
    runners: Mapping[str, Runner],
    settings: BenchSettings | None = None,
    images: Arrays | None = None,
    rounds: int = ROUNDS,
    reporter: Reporter = SILENT,
) -> Comparison:
    """Time several runners in turn, in many short rounds, so that heat and other programs meet all of them alike.

    In each round every runner gets the same share of ``settings.seconds``; the order turns round by round. The ratio
    is the median over rounds of baseline over candidate, each the median of its round; its interval is a percentile
    bootstrap over rounds (Efron 1979) of 95%. Speed is judged by the GPU's own time where there is one.

    Raises:
        ResvitError: INPUT for fewer than two runners or six rounds, and for a batch that one of them does not take.
    """
    settings = settings or BenchSettings()
    if len(runners) < 2 or rounds < _FEWEST:
        raise ResvitError(
            f"{len(runners)} runners in {rounds} rounds give no comparison.",
            f"Compare two or more, in {_FEWEST} rounds or more.",
        )
    with contextlib.ExitStack() as owned:
        watches: dict[str, Stopwatch] = {}
        calls: dict[str, int] = {}
        for name, runner in runners.items():
            watches[name] = owned.enter_context(Stopwatch(runner, settings, images))
            watches[name].warm_up()
            calls[name] = _calls_a_round(watches[name], settings, rounds)
        on_gpu = any(watch.on_gpu for watch in watches.values())
        before = conditions_now(on_gpu=on_gpu)
        taken = _in_turns(watches, calls, rounds, reporter)
        after = conditions_now(on_gpu=on_gpu)
        reports = {name: report_from(watch, joined(taken[name]), before, after) for name, watch in watches.items()}
    baseline = next(iter(reports))
    typical = {name: np.array([part.typical_ms for part in parts]) for name, parts in taken.items()}
    ratios = {name: paired_ratio(typical[baseline], typical[name]) for name in reports if name != baseline}
    verdicts = {name: verdict(ratio, baseline, reports[baseline], reports[name]) for name, ratio in ratios.items()}
    return Comparison(reports, ratios, verdicts, rounds)


def rounds_in_turns(
    runners: Mapping[str, Runner],
    settings: BenchSettings,
    images: Arrays | None = None,
    rounds: int = ROUNDS,
    reporter: Reporter = SILENT,
) -> dict[str, tuple[float, ...]]:
    """The time of one call of every runner in ms, by name: the median of each round, timed as ``compare`` does.

    Raises:
        ResvitError: INPUT for a batch that one of them does not take.
    """
    with contextlib.ExitStack() as owned:
        watches: dict[str, Stopwatch] = {}
        for name, runner in runners.items():
            watches[name] = owned.enter_context(Stopwatch(runner, settings, images))
            watches[name].warm_up()
        calls = {name: _calls_a_round(watch, settings, rounds) for name, watch in watches.items()}
        taken = _in_turns(watches, calls, rounds, reporter)
    return {name: tuple(part.typical_ms for part in parts) for name, parts in taken.items()}


def _in_turns(
    watches: Mapping[str, Stopwatch], calls: Mapping[str, int], rounds: int, reporter: Reporter
) -> dict[str, list[Samples]]:
    taken: dict[str, list[Samples]] = {name: [] for name in watches}
    for number in reporter.track(range(rounds), "timing rounds", rounds):
        names = list(watches)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            # One call outside the clock: the caches still hold the other runner's weights.
            watches[name].take(watches[name].streams)
            taken[name].append(watches[name].take(calls[name]))
    return taken


def paired_ratio(baseline_ms: Sequence[float] | np.ndarray[Any, Any], other_ms: Any) -> Ratio:
    """How many times faster ``other`` is, from the times [rounds] of both, paired round by round."""
    logs = np.log(np.asarray(baseline_ms, np.float64)) - np.log(np.asarray(other_ms, np.float64))
    picks = np.random.default_rng(0).integers(0, len(logs), (_RESAMPLES, len(logs)))
    medians = np.median(logs[picks], axis=1)
    edge = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(medians, (edge, 1 - edge))
    return Ratio(float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high)))


def verdict(ratio: Ratio, baseline: str, base: BenchReport, other: BenchReport) -> str:
    """Whether it was worth it, in words; there is no verdict where no device was timed."""
    if base.runtime != other.runtime:
        return f"no verdict: it ran by another runtime than {baseline}, {ratio.sentence} as fast"
    if other.gpu_ms is None and other.label.endswith(NOT_THE_ENGINE):
        return (
            f"no verdict: {ratio.sentence} as fast as {baseline} on this machine's processor, "
            "which says nothing of the device"
        )
    if ratio.faster:
        return f"faster than {baseline} by {ratio.sentence}"
    if ratio.high < 1.0:
        return f"not worth it: slower than {baseline}, {ratio.sentence} as fast"
    return f"not worth it: no faster than {baseline} that could be shown, {ratio.sentence} as fast"


def _calls_a_round(watch: Stopwatch, settings: BenchSettings, rounds: int) -> int:
    if settings.iterations is not None:
        return max(1, settings.iterations // rounds)
    sample = watch.take(2 * watch.streams)
    each = sample.seconds / len(sample.wall_ms)
    return max(watch.streams, int(settings.seconds / rounds / each), 1)
