"""How far quantised networks answer from the float one, image by image, so that differences can be told from noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from resvit_calibrate.runtime.runner import onnx_runner, pieces
from resvit_calibrate.runtime.sessions import Array, Arrays, run_session
from resvit_engines.rows import paired_rows

_FEWEST = 4
"""Images below which nothing can be told from noise."""
_BEYOND = 2.0
"""Standard errors that a difference must exceed."""
_LEAST_DB = 0.2
"""A gain that is worth a change."""
_MOST_DB = 20.0
"""What one image alone can count for."""
_HUGE = 1e12
_CLASSES = 3


@dataclass(frozen=True, eq=False)
class Errors:
    """Of each image, or of each batch where outputs do not tell images apart."""

    noise: Array
    """float64 [N, outputs]: squared error."""
    signal: Array
    """float64 [N, outputs]: the float outputs' squares."""
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


@dataclass(frozen=True)
class Gain:
    """How much better one way is than another, in dB, with its standard error over images."""

    gain_db: float
    noise_db: float
    disagrees: bool
    """Whether its decisions are worse beyond what images differ."""
    steady: bool = False
    """Whether images taken alone gain, beyond what they differ: where a few images hold most of the noise, their sum
    tells little, and the others much."""

    @property
    def is_real(self) -> bool:
        """Whether it is beyond the noise of these images, together or each alone, and no decisions are lost."""
        beyond = self.steady or self.gain_db > _BEYOND * self.noise_db
        return self.gain_db > _LEAST_DB and beyond and not self.disagrees


def gain(before: Errors, after: Errors) -> Gain:
    """What ``after`` gains over ``before`` on the same images; the error is the jackknife's."""
    one, other = before.ratios, after.ratios
    count = len(one)
    tiny = 1e-30
    value = 10.0 * math.log10((one.sum() + tiny) / (other.sum() + tiny))
    if count < _FEWEST:
        return Gain(value, math.inf, False)
    without = 10.0 * np.log10((one.sum() - one + tiny).clip(tiny) / (other.sum() - other + tiny).clip(tiny))
    noise = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    alone = (10.0 * np.log10((one + tiny) / (other + tiny))).clip(-_MOST_DB, _MOST_DB)
    steady = float(alone.mean()) > _BEYOND * float(alone.std(ddof=1)) / math.sqrt(count)
    disagrees = False
    if before.alike is not None and after.alike is not None:
        lost = before.alike - after.alike
        disagrees = float(lost.mean()) > _BEYOND * float(lost.std(ddof=1)) / math.sqrt(count)
    return Gain(value, noise, disagrees, steady)


class Judge:
    """The float network's answers to a few images."""

    def __init__(self, model: Path, batches: Sequence[Arrays], *, sets: bool = False) -> None:
        """Ask the float ONNX ``model``; ``sets`` says that rows of outputs may change places."""
        runner = onnx_runner(model)
        self.batches, self.sets, self.folder = batches, sets, model.parent
        self.expected = [runner(batch) for batch in batches]

    def errors(self, network: ir.Model, others: Sequence[ir.Model] = ()) -> list[Errors]:
        """The errors of ``network``, and of ``others`` that differ from it in constants alone, in one session.

        Raises :class:`ResvitError` for what does not run.
        """
        differing = [_differing(network, other) for other in others]
        names = sorted({name for constants in differing for name in constants})
        proto = ir.serde.serialize_model(network)
        # A constant that is an input as well can be fed, and stays what it is otherwise.
        for name in names:
            value = network.graph.initializers[name]
            proto.graph.input.append(ir.serde.serialize_value(value))
        # Weights beside the file lie there still.
        runner = onnx_runner(proto.SerializeToString(), folder=self.folder)
        own = {name: _array(network.graph.initializers[name]) for name in names}
        return [
            self._against([self._run(runner, batch, {**own, **constants}) for batch in self.batches])
            for constants in ({}, *differing)
        ]

    def _run(self, runner, batch: Arrays, constants: Arrays) -> Arrays:  # type: ignore[no-untyped-def]
        feeds = {n: np.ascontiguousarray(batch[n], dtype=d) if d else batch[n] for n, d in runner.dtypes.items()}
        parts: list[Arrays] = []
        for piece, size in pieces(feeds, runner.batch or len(next(iter(feeds.values())))):
            values = run_session(runner.session, list(runner.outputs), {**piece, **constants})
            parts.append({n: v[:size] if v.ndim else v for n, v in zip(runner.outputs, values, strict=True)})
        return {n: np.concatenate([part[n] for part in parts]) if parts[0][n].ndim else parts[0][n] for n in parts[0]}

    def _against(self, answers: Sequence[Arrays]) -> Errors:
        noise, signal, alike = [], [], []
        for batch, expected, found in zip(self.batches, self.expected, answers, strict=True):
            images = len(next(iter(batch.values())))
            answer = dict(paired_rows(expected, found)) if self.sets else found
            names = [name for name, value in expected.items() if value.dtype.kind == "f"]
            apart = all(expected[name].ndim and len(expected[name]) == images for name in names)
            rows = images if apart else 1
            with np.errstate(over="ignore", invalid="ignore"):
                pairs = [(_rows(expected[n], rows), _rows(answer[n], rows)) for n in names]
                noise.append(np.stack([np.square(true - own).sum(1) for true, own in pairs], 1))
                signal.append(np.stack([np.square(true).sum(1) for true, _ in pairs], 1))
            shares = list(_alike(expected, answer, names, rows))
            alike.append(np.mean(shares, axis=0) if shares else None)
        every = [share for share in alike if share is not None]
        return Errors(
            np.concatenate(noise), np.concatenate(signal), np.concatenate(every) if len(every) == len(alike) else None
        )


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


def _differing(network: ir.Model, other: ir.Model) -> Arrays:
    """The constants of ``other`` that ``network`` has with other values."""
    found = {}
    for name, value in other.graph.initializers.items():
        mine, theirs = _array(network.graph.initializers[name]), _array(value)
        if mine is not theirs and not np.array_equal(mine, theirs):
            found[name] = theirs
    return found


def same_graph(one: ir.Model, other: ir.Model) -> bool:
    """Whether two networks differ in the values of scalar constants alone."""
    if [node.name for node in one.graph] != [node.name for node in other.graph]:
        return False
    if set(one.graph.initializers) != set(other.graph.initializers):
        return False
    for name, value in one.graph.initializers.items():
        mine, theirs = _array(value), _array(other.graph.initializers[name])
        if mine.shape != theirs.shape or (mine.size > 1 and not np.array_equal(mine, theirs)):
            return False
    return True


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
