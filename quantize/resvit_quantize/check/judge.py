"""How far quantised networks answer from the float one, image by image, so that differences can be told from noise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from resvit_calibrate.answers.apart import Shared, shared_of
from resvit_calibrate.runtime.runner import OnnxRunner, onnx_runner
from resvit_calibrate.runtime.sessions import Array, Arrays
from resvit_engines.rows import paired_rows

FEWEST = 4
"""Images below which nothing can be told from noise; the first look is at so many."""
LIKELY, REAL, SURE = 1.0, 2.0, 3.0
"""Standard errors that a difference must exceed: to be taken among ways that cost the same, to be worth a cost, and to
be told from the first look alone."""
_LEAST_DB = 0.2
"""A gain that is worth a change."""
_MOST_DB = 20.0
"""What one image alone can count for."""
_HUGE = 1e12
_CLASSES = 3
_GRIDS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, eq=False)
class Errors:
    """Of each image, or of each batch where outputs do not tell images apart."""

    noise: Array
    """float64 [N, outputs]: squared error."""
    signal: Array
    """float64 [N, outputs]: the squares of what the float outputs differ by from those of the first images."""
    alike: Array | None
    """float64 [N]: the share of positions at which the arg-max is the float network's; None without classes."""

    @property
    def ratios(self) -> Array:
        """float64 [N]: each one's part of the noise-to-signal ratio of all."""
        known = self.signal.sum(0) > 0
        whole = self.noise[:, known] / self.signal.sum(0)[known]
        return np.asarray(np.nan_to_num(whole, nan=_HUGE, posinf=_HUGE).clip(max=_HUGE).sum(1) / max(known.sum(), 1))

    @property
    def sqnr_db(self) -> float:
        """Pooled over all images; infinite without noise."""
        total = float(self.ratios.sum())
        return -10.0 * math.log10(total) if total > 0 else math.inf

    @property
    def agreement(self) -> float | None:
        """The mean of ``alike``."""
        return None if self.alike is None else float(self.alike.mean())


def joined(parts: Sequence[Errors]) -> Errors:
    """Those of all images."""
    alike = [part.alike for part in parts if part.alike is not None]
    return Errors(
        np.concatenate([part.noise for part in parts]),
        np.concatenate([part.signal for part in parts]),
        np.concatenate(alike) if len(alike) == len(parts) else None,
    )


@dataclass(frozen=True)
class Gain:
    """How much better one way is than another, in dB, with its standard error over images."""

    gain_db: float
    noise_db: float
    disagrees: bool
    """Whether its decisions are worse beyond what images differ."""
    alone: float = 0.0
    """What images taken alone gain on average, in its standard errors: where a few images hold most of the noise, their
    sum tells little, and the others much."""

    def beyond(self, errors: float) -> bool:
        """Whether it exceeds so many standard errors, together or each alone, and no decisions are lost."""
        clear = self.alone > errors or self.gain_db > errors * self.noise_db
        return self.gain_db > _LEAST_DB and clear and not self.disagrees

    @property
    def is_real(self) -> bool:
        """Whether it is beyond the noise of these images."""
        return self.beyond(REAL)

    @property
    def is_possible(self) -> bool:
        """Whether more images may show one: a standard error more would be worth a change."""
        return self.gain_db + self.noise_db > _LEAST_DB


def gain(before: Errors, after: Errors) -> Gain:
    """What ``after`` gains over ``before`` on the same images; the error is the jackknife's."""
    one, other = before.ratios, after.ratios
    count = len(one)
    tiny = 1e-30
    value = 10.0 * math.log10((one.sum() + tiny) / (other.sum() + tiny))
    if count < FEWEST:
        return Gain(value, math.inf, False)
    without = 10.0 * np.log10((one.sum() - one + tiny).clip(tiny) / (other.sum() - other + tiny).clip(tiny))
    noise = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    each = (10.0 * np.log10((one + tiny) / (other + tiny))).clip(-_MOST_DB, _MOST_DB)
    spread = float(each.std(ddof=1)) / math.sqrt(count)
    alone = float(each.mean()) / max(spread, tiny)
    disagrees = False
    if before.alike is not None and after.alike is not None:
        lost = before.alike - after.alike
        disagrees = float(lost.mean()) > REAL * float(lost.std(ddof=1)) / math.sqrt(count)
    return Gain(value, noise, disagrees, alone)


def best_of(ways: Mapping[str, Errors], standing: str) -> str:
    """The way that none of the others beats, by more than one standard error; ``standing`` where it is as good."""
    name = standing
    # What beats another keeps more at the outputs, so that this ends.
    while better := [other for other in ways if other != name and gain(ways[name], ways[other]).beyond(LIKELY)]:
        name = max(better, key=lambda other: ways[other].sqnr_db)
    return name


@dataclass(eq=False)
class _Session:
    network: ir.Model
    users: int = 0
    runner: OnnxRunner | None = None


class Sessions:
    """Sessions of quantised networks, whose weights beside the file lie in ``folder``.

    ``one`` keeps a single one open: a session takes several times the bytes of its weights.
    """

    def __init__(self, folder: Path, *, one: bool = False) -> None:
        self.folder, self.one = folder, one
        self._known: list[_Session] = []

    def take(self, network: ir.Model) -> _Session:
        """That of a network; one that differs from another in the scales of activations alone shares its session.

        Raises :class:`ResvitError` for what does not load.
        """
        found = next((known for known in self._known if same_graph(known.network, network)), None)
        if found is None:
            found = _Session(network)
            self.runner(found)
            self._known.append(found)
        found.users += 1
        return found

    def runner(self, session: _Session) -> OnnxRunner:
        """What asks it; opened, where another took its place."""
        if session.runner is None:
            for other in self._known if self.one else ():
                other.runner = None
            proto = ir.serde.serialize_model(session.network)
            # A constant that is an input as well can be fed.
            for name in _scales(session.network):
                proto.graph.input.append(ir.serde.serialize_value(session.network.graph.initializers[name]))
            session.runner = onnx_runner(proto.SerializeToString(), folder=self.folder)
        return session.runner

    def leave(self, session: _Session) -> None:
        """Let it go, where nobody else asks it."""
        session.users -= 1
        if not session.users:
            session.runner = None
            self._known.remove(session)


class Judge:
    """The float network's answers to a few images, asked for as they are needed."""

    def __init__(
        self, model: Path, batches: Sequence[Arrays], *, sets: bool = False, sessions: Sessions | None = None
    ) -> None:
        """Judge by the float ONNX ``model`` on one batch or more.

        ``sets`` says that rows of outputs may change places. Where outputs do not tell the images of a batch apart,
        each is asked for alone. ``sessions`` may be shared with others.
        """
        self.sets, self.sessions = sets, sessions or Sessions(model.parent)
        runner = dataclasses.replace(onnx_runner(model), frugal=True)
        self.batches = cut(batches, max(FEWEST, runner.batch or 1))
        self._expected = [runner(self.batches[0])]
        if not self._apart(self.batches[0], self._expected[0]):
            self.batches = cut(batches, 1)
            self._expected = [runner(self.batches[0])]
        self._float: OnnxRunner | None = runner
        if self.sessions.one:
            self.expected(len(self.batches) - 1)

    def expected(self, at: int) -> Arrays:
        """The answers to batch ``at``, once all before it are there."""
        while len(self._expected) <= at:
            assert self._float is not None
            self._expected.append(self._float(self.batches[len(self._expected)]))
        if len(self._expected) == len(self.batches):
            self._float = None
        return self._expected[at]

    def answers(self, network: ir.Model) -> Answers:
        """Open ``network`` to be asked; raises :class:`ResvitError` for what does not load."""
        constants = {name: _array(network.graph.initializers[name]) for name in _scales(network)}
        return Answers(self, self.sessions.take(network), constants)

    @functools.cached_property
    def _shared(self) -> tuple[list[int], dict[str, Shared]]:
        """How many images each of the first batches has, and what these share of each output."""
        first = self.expected(0)
        apart = self._apart(self.batches[0], first)
        sizes: list[int] = []
        while len(sizes) < len(self.batches) and sum(sizes) < FEWEST:
            sizes.append(len(next(iter(self.batches[len(sizes)].values()))) if apart else 1)
        shared = {}
        for name in _floats(first):
            parts = [_rows(self.expected(at)[name], rows) for at, rows in enumerate(sizes)]
            if len({part.shape[1] for part in parts}) == 1:
                shared[name] = shared_of(np.concatenate(parts))
        return sizes, shared

    def _signal(self, at: int, name: str, true: Array) -> Array:
        """The signal energy [N] of the images of batch ``at`` in one output."""
        sizes, shared = self._shared
        if name not in shared:
            return np.asarray(np.square(true).sum(1))
        start = sum(sizes[:at])
        members = shared[name].members[start : start + sizes[at]] if at < len(sizes) else None
        return shared[name].signal(true, members)

    def against(self, at: int, found: Arrays) -> Errors:
        """The errors of answers to batch ``at``."""
        batch, expected = self.batches[at], self.expected(at)
        answer = dict(paired_rows(expected, found)) if self.sets else found
        names = _floats(expected)
        rows = len(next(iter(batch.values()))) if self._apart(batch, expected) else 1
        with np.errstate(over="ignore", invalid="ignore"):
            pairs = [(_rows(expected[n], rows), _rows(answer[n], rows)) for n in names]
            noise = np.stack([np.square(true - own).sum(1) for true, own in pairs], 1)
            signal = np.stack([self._signal(at, n, true) for n, (true, _) in zip(names, pairs, strict=True)], 1)
        shares = list(_alike(expected, answer, names, rows))
        return Errors(noise, signal, np.mean(shares, axis=0) if shares else None)

    def _apart(self, batch: Arrays, expected: Arrays) -> bool:
        images = len(next(iter(batch.values())))
        return all(expected[name].ndim and len(expected[name]) == images for name in _floats(expected))


class Answers:
    """What one quantised network answers, asked of more images as they are wanted."""

    def __init__(self, judge: Judge, session: _Session, constants: Arrays) -> None:
        self._judge, self._constants = judge, constants
        self._session: _Session | None = session
        self._known: list[Errors] = []

    def errors(self, batches: int) -> list[Errors]:
        """Of the first so many batches. Raises :class:`ResvitError` for what does not run."""
        for at in range(len(self._known), batches):
            self._known.append(self._judge.against(at, self._ask(self._judge.batches[at])))
        return self._known[:batches]

    def close(self) -> None:
        """Let the session go; errors that are known stay."""
        if self._session is not None:
            self._judge.sessions.leave(self._session)
            self._session = None

    def _ask(self, batch: Arrays) -> Arrays:
        assert self._session is not None
        runner = self._judge.sessions.runner(self._session)
        return dataclasses.replace(runner, frugal=True, constants=self._constants)(batch)


def cut(batches: Sequence[Arrays], most: int) -> list[Arrays]:
    """The same images in batches of at most so many."""
    return [
        {name: value[at : at + most] for name, value in batch.items()}
        for batch in batches
        for at in range(0, len(next(iter(batch.values()))), most)
    ]


def same_graph(one: ir.Model, other: ir.Model) -> bool:
    """Whether two networks differ in the scales of activations alone."""
    if [node.name for node in one.graph] != [node.name for node in other.graph]:
        return False
    if set(one.graph.initializers) != set(other.graph.initializers):
        return False
    scales = set(_scales(one))
    for name, value in one.graph.initializers.items():
        mine, theirs = _array(value), _array(other.graph.initializers[name])
        if mine is theirs or (name in scales and mine.shape == theirs.shape and mine.dtype == theirs.dtype):
            continue
        if not np.array_equal(mine, theirs):
            return False
    return scales == set(_scales(other))


def _scales(network: ir.Model) -> list[str]:
    """The scales of activations, by name: constants of one number that nodes of grids read, and nothing else does."""
    names = []
    for name, value in network.graph.initializers.items():
        uses = list(value.uses())
        alone = all(use.node.op_type in _GRIDS and use.idx == 1 for use in uses)
        if uses and alone and value.dtype is ir.DataType.FLOAT and _array(value).ndim == 0:
            names.append(name)
    return names


def _floats(answers: Arrays) -> list[str]:
    return [name for name, value in answers.items() if value.dtype.kind == "f"]


def _rows(value: Array, rows: int) -> Array:
    return value.astype(np.float64).reshape(rows, -1)


def _alike(expected: Arrays, found: Arrays, names: Sequence[str], rows: int) -> Iterator[Array]:
    """The share of equal decisions [rows] of each output with classes: along axis 1 of vectors and maps, else the last.

    Boxes are no classes.
    """
    for name in names:
        true, own = expected[name], found[name]
        axis = 1 if true.ndim in (2, 4) else -1
        if true.ndim in (2, 3, 4) and true.shape[axis] >= _CLASSES and own.shape == true.shape:
            if true.ndim == 3 and true.shape[axis] == 4:
                continue
            same = np.nan_to_num(own, nan=-np.inf).argmax(axis) == true.argmax(axis)
            yield same.reshape(rows, -1).mean(1)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
