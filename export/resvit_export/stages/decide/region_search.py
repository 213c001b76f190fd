"""Which regions of a network stay in 8 bits: by the times of variants, and by the gate.

What is measured, where, and how a variant is judged is asked through :class:`Ways`; nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from resvit_engines.bench.compare import Ratio

if TYPE_CHECKING:
    from resvit_quantize.search.regions import Region

WORTH = 1.02
"""Q/DQ stay in a region, and in a network, only where it is measured to be this many times as fast with them."""
FLOAT, PLAIN, TUNED = "float", "plain", "tuned"


@dataclass(frozen=True)
class RegionChoice:
    """One region: its products, and how many times as fast the network is with it in 8 bits; kept where that pays.

    ``known`` says that the ratio was measured before on the same kind of device, and not in this search.
    """

    name: str
    nodes: tuple[str, ...]
    share: float
    faster: Ratio
    kept: bool
    known: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "nodes": list(self.nodes),
            "share": round(self.share, 4),
            "faster": self.faster.to_json(),
            "kept": self.kept,
            "known": self.known,
        }


def pays(ratio: Ratio) -> bool:
    """Whether 8 bits are measured to gain what they must: in the median, and chance is excluded."""
    return ratio.value >= WORTH and ratio.faster


def decided(ratio: Ratio) -> bool:
    """Whether chance is excluded that another measurement chooses otherwise."""
    return pays(ratio) or ratio.high < WORTH


class Times(Protocol):
    """What a device says of variants that it timed in turns."""

    def ratio(self, slower: str, faster: str) -> Ratio:
        """How many times as fast ``faster`` is."""
        ...

    def median_ms(self, name: str) -> float:
        """Of one call."""
        ...


@dataclass(frozen=True)
class Ways:
    """How the search asks about variants, each named by its regions left in floats; that of none is plain.

    ``timed`` times variants by name in turns, ``accepts`` says whether the gate lets one pass, and ``damage`` how much
    a region hurts in 8 bits. ``floating`` names what is computed in without 8 bits, and ``where`` the machine.
    """

    timed: Callable[[Mapping[str, frozenset[str]]], Times]
    accepts: Callable[[frozenset[str]], bool]
    damage: Callable[[Region], float]
    floating: str = "FP32"
    where: str = "this processor"


@dataclass(frozen=True)
class Start:
    """What is known of regions before anything is timed: how many times as fast each was in another network.

    With ``trusted`` a region of which something is known is not measured by itself again.
    """

    known: Mapping[str, Ratio] = field(default_factory=dict)
    trusted: bool = False


@dataclass
class Found:
    """What the search chose: the regions left in floats, what is known of each region, and sentences for people.

    ``faster`` is how many times as fast as in floats the choice is; None where that is what it came to.
    """

    out: frozenset[str] = frozenset()
    choices: dict[str, RegionChoice] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    faster: Ratio | None = None
    ms: tuple[float, float] | None = None
    """Of the choice, and in floats."""
    best: tuple[Ratio, float, float] | None = None
    """How many times as fast as in floats the fastest is, and both times in ms, where none that was tried gains."""


def search_regions(
    regions: Sequence[Region], ways: Ways, passes: int, say: Callable[[str], None], start: Start | None = None
) -> Found:
    """Choose which ``regions`` are quantised.

    It starts from the plain placement, without the regions that are known not to pay. In each of the ``passes`` every
    region that is left is timed in floats beside the variant so far, all in one measurement, and one that began in
    floats is timed in 8 bits once; those without which it is no slower are left in floats. What remains is held against
    floats and the plain placement, and against the gate. It ends in floats where nothing else is faster and accepted.
    """
    start = start or Start()
    found, every = Found(), frozenset(region.name for region in regions)
    settled: set[str] = set()
    for region in regions:
        if (ratio := start.known.get(region.name)) is not None:
            found.choices[region.name] = _choice(region, ratio, known=True)
            found.out |= set() if pays(ratio) else {region.name}
            settled |= {region.name} if start.trusted and decided(ratio) else set()
    for number in range(passes):
        left = [region for region in regions if region.name not in settled]
        if not left:
            break
        times = ways.timed({PLAIN: found.out} | {region.name: found.out ^ {region.name} for region in left})
        out = set(found.out)
        for region in left:
            alone, inside = (PLAIN, region.name), region.name not in found.out
            ratio = times.ratio(*(alone[::-1] if inside else alone))
            found.choices[region.name] = _choice(region, ratio)
            if pays(ratio):
                out.discard(region.name)
            else:
                out.add(region.name)
                settled.add(region.name)
        if out == found.out:
            break
        dropped, taken, found.out = sorted(out - found.out), sorted(found.out - out), frozenset(out)
        said = [f"leaves {', '.join(dropped)} in {ways.floating}"] if dropped else []
        said += [f"takes {', '.join(taken)} back into 8 bits"] if taken else []
        say(f"tune: pass {number + 1} {' and '.join(said)}")
    return _held_against_floats(regions, found, every, ways, say)


def _held_against_floats(
    regions: Sequence[Region], found: Found, every: frozenset[str], ways: Ways, say: Callable[[str], None]
) -> Found:
    candidates = {TUNED: found.out, PLAIN: frozenset[str]()} if found.out else {PLAIN: found.out}
    while candidates := {name: out for name, out in candidates.items() if out != every}:
        times = ways.timed({FLOAT: every, **candidates})
        fast = [name for name in candidates if pays(times.ratio(FLOAT, name))]
        if not fast:
            best = min(candidates, key=times.median_ms)
            found.best = times.ratio(FLOAT, best), times.median_ms(best), times.median_ms(FLOAT)
            found.sentences.append(
                f"No placement of Q/DQ gains 2% on {ways.floating} on {ways.where}; the best is "
                f"{times.ratio(FLOAT, best).sentence} as fast."
            )
            break
        # Q/DQ that gain less than it takes are none: then the plain placement must be faster by as much.
        plain = PLAIN in fast and (TUNED not in fast or pays(times.ratio(TUNED, PLAIN)))
        name = PLAIN if plain else TUNED
        out = candidates[name]
        if ways.accepts(out):
            kept = ", ".join(region.name for region in regions if region.name not in out)
            ratio, ms = times.ratio(FLOAT, name), (times.median_ms(name), times.median_ms(FLOAT))
            found.sentences.append(
                f"Q/DQ stay in {kept}: {ms[0]:.3f} ms on {ways.where}, {ratio.sentence} as fast as {ways.floating} "
                f"({ms[1]:.3f} ms)."
            )
            found.out, found.faster, found.ms = out, ratio, ms
            return found
        worst = max((region for region in regions if region.name not in out), key=lambda r: _price(r, found, ways))
        found.sentences.append(f"The gate rejects the fastest placement: {worst.name} goes back to {ways.floating}.")
        say(f"tune: {found.sentences[-1]}")
        candidates = {TUNED: out | {worst.name}}
    found.out = every
    found.sentences.append(f"The engine computes in {ways.floating}: nothing that was tried gains and is accepted.")
    return found


def _choice(region: Region, ratio: Ratio, *, known: bool = False) -> RegionChoice:
    return RegionChoice(region.name, region.nodes, region.share, ratio, pays(ratio), known)


def _price(region: Region, found: Found, ways: Ways) -> float:
    """The damage of a region for each part that it gains."""
    gain = found.choices[region.name].faster.value - 1.0 if region.name in found.choices else 0.0
    return ways.damage(region) / max(gain, 1e-3)
