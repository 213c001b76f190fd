"""Two engines by operator: rows with the kernels of each, what they fused, and where the time went."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from resvit_engines.audit.audit import movement_of
from resvit_engines.audit.compare.engine import Listed, ListedEngine
from resvit_engines.audit.compare.pairing import By, nodes_that_compute, pair_up
from resvit_engines.audit.kernel_totals import KernelTotals, kernel_totals
from resvit_engines.audit.kernels import Kernel

SLOWER = 1.05
"""From this ratio on a layer counts as slower; less is what two runs differ by."""
_LEAST = 0.002
"""Of the engine's time, so much must be lost for a layer to be named."""
_PRECISIONS = {"Half": "FP16", "Float": "FP32", "BFloat16": "BF16", "Int8": "INT8", "UInt8": "UINT8"}
_PRODUCT_WORDS = frozenset({"conv", "conv2d", "convtranspose", "biasadd", "gemm", "matmul", "einsum", "attention"})
_ACTIVATIONS = frozenset({"relu", "clip"})
KINDS = {
    "conv": "convolutions",
    "gemm": "matrix products",
    "attention": "attention",
    "plugin": "plugins",
    "other": "the rest",
    "reformat": "reformats and casts",
}


@dataclass(frozen=True)
class Side:
    """What one engine runs for an operator: its kernel, if it has one of its own, and what moves data for it."""

    kernel: Listed | None = None
    moves: tuple[Listed, ...] = ()

    @property
    def us(self) -> float | None:
        """Microseconds of all; None where nothing of it was timed."""
        all_of_it = (*([self.kernel] if self.kernel else []), *self.moves)
        timed = [listed.us for listed in all_of_it if listed.us is not None]
        return sum(timed) if timed else None

    @property
    def precision(self) -> str:
        """What it computes in, as people write it; empty where it is not told."""
        word = self.kernel.kernel.precision if self.kernel else ""
        return _PRECISIONS.get(word, word)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        kernel = self.kernel
        return {
            "kernel": _kernel_to_json(kernel) if kernel else None,
            "precision": self.precision or None,
            "moves": [{**_kernel_to_json(move), "does": movement_of(move.kernel)} for move in self.moves],
            "us": _rounded(self.us),
        }


@dataclass(frozen=True)
class Row:
    """One operator: its name, what kind of kernel it is, and both sides."""

    operator: str
    kind: str
    a: Side
    b: Side

    @property
    def ratio(self) -> float | None:
        """Time of the second over that of the first; None where one of them was not timed, or took none."""
        return self.b.us / self.a.us if self.a.us and self.b.us is not None else None

    @property
    def change_us(self) -> float:
        """How much longer the second takes, in microseconds."""
        return (self.b.us or 0.0) - (self.a.us or 0.0)

    @property
    def in_both(self) -> bool:
        """Whether both engines have a kernel of its own for it."""
        return self.a.kernel is not None and self.b.kernel is not None

    @property
    def differences(self) -> tuple[str, ...]:
        """What the second does otherwise: its precision, what it fused, how many kernels only move data."""
        found = []
        if self.in_both:
            before, after = self.a.precision, self.b.precision
            found += [f"{before} to {after}"] if before and after and before != after else []
            words, others = (_fused(side.kernel.kernel) if side.kernel else Counter() for side in (self.a, self.b))
            found += [f"+{word}" for word in (others - words)] + [f"-{word}" for word in (words - others)]
        else:
            found.append("only in the first" if self.a.kernel else "only in the second")
        moves = len(self.b.moves) - len(self.a.moves)
        if moves:
            found.append(f"{moves:+d} {'move' if abs(moves) == 1 else 'moves'}")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "operator": self.operator,
            "kind": self.kind,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "differences": list(self.differences),
        }


@dataclass(frozen=True)
class EngineComparison:
    """Two engines of one network; ``by`` is what pairs their kernels, ``rows`` are in the first one's order."""

    a: ListedEngine
    b: ListedEngine
    by: By
    rows: tuple[Row, ...]

    @property
    def timed(self) -> bool:
        """Whether the layers of both have times."""
        return self.a.timed and self.b.timed

    @cached_property
    def totals(self) -> tuple[KernelTotals, KernelTotals]:
        """Both engines, counted."""
        first, second = (kernel_totals([listed.kernel for listed in one.kernels]) for one in (self.a, self.b))
        return first, second

    @property
    def ratio(self) -> float | None:
        """Time of the second over the first's: of the whole engines where both are known, else of all layers."""
        if self.a.latency_us and self.b.latency_us:
            return self.b.latency_us / self.a.latency_us
        return self.b.total_us / self.a.total_us if self.a.total_us and self.b.total_us is not None else None

    @cached_property
    def slower(self) -> tuple[Row, ...]:
        """Operators of both that take longer in the second, the most time first."""
        least = _LEAST * (self.a.total_us or 0.0)
        found = [
            row
            for row in self.rows
            if row.in_both and row.ratio is not None and row.ratio >= SLOWER and row.change_us > least
        ]
        return tuple(sorted(found, key=lambda row: -row.change_us))

    @property
    def changed(self) -> tuple[Row, ...]:
        """All operators, those first whose time changed the most; without times those first that differ."""
        if self.timed:
            return tuple(sorted(self.rows, key=lambda row: -abs(row.change_us)))
        return tuple(sorted(self.rows, key=lambda row: not row.differences))

    def only(self, first: bool) -> tuple[Row, ...]:
        """Operators with a kernel of their own in one of the engines alone."""
        return tuple(row for row in self.rows if not row.in_both and (row.a.kernel is not None) is first)

    @cached_property
    def kinds(self) -> tuple[tuple[str, tuple[int, int], tuple[float | None, float | None]], ...]:
        """By kind of kernel: how many each engine has, and their microseconds."""
        found = []
        for kind in KINDS:
            sides = [[each for each in one.kernels if each.kernel.operation.value == kind] for one in (self.a, self.b)]
            if any(sides):
                times = [
                    sum(each.us or 0.0 for each in side) if one.timed else None
                    for side, one in zip(sides, (self.a, self.b), strict=True)
                ]
                found.append((kind, (len(sides[0]), len(sides[1])), (times[0], times[1])))
        return tuple(found)

    def moves(self, first: bool) -> dict[str, tuple[int, float | None]]:
        """Kernels that only move data, by what they do: how many, and their microseconds."""
        engine = self.a if first else self.b
        found: dict[str, tuple[int, float | None]] = {}
        for listed in engine.kernels:
            if listed.moves:
                what = movement_of(listed.kernel)
                count, us = found.get(what, (0, 0.0 if engine.timed else None))
                found[what] = (count + 1, None if us is None else us + (listed.us or 0.0))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "a": self._engine(first=True),
            "b": self._engine(first=False),
            "paired_by": self.by.value,
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "kinds": [
                {"kind": kind, "a": {"kernels": counts[0], "us": _rounded(times[0])},
                 "b": {"kernels": counts[1], "us": _rounded(times[1])}}
                for kind, counts, times in self.kinds
            ],
            "operators": [row.to_json() for row in self.rows],
            "slower": [row.operator for row in self.slower],
            "only_in_a": [row.operator for row in self.only(True)],
            "only_in_b": [row.operator for row in self.only(False)],
        }  # fmt: skip

    def _engine(self, *, first: bool) -> dict[str, Any]:
        engine, totals = (self.a, self.totals[0]) if first else (self.b, self.totals[1])
        return {
            "name": engine.name,
            "kernels": len(engine.kernels),
            "total_us": _rounded(engine.total_us),
            "latency_us": _rounded(engine.latency_us),
            "totals": totals.to_json() if engine.detailed else None,
            "moves": {what: {"kernels": count, "us": _rounded(us)} for what, (count, us) in self.moves(first).items()},
            "note": engine.note,
        }


def compare_engines(a: ListedEngine, b: ListedEngine) -> EngineComparison:
    """Put two engines of one network side by side.

    Raises:
        ResvitError: INPUT where they are of two networks.
    """
    pairing = pair_up(a, b)
    partner, backward = dict(pairing.pairs), {j: i for i, j in pairing.pairs}
    moves = _moves(a), _moves(b)
    alone = _behind(b, backward)
    rows: list[Row] = [_row(a, None, b, j, moves) for j in alone.get(-1, ())]
    for i, listed in enumerate(a.kernels):
        if not listed.moves:
            rows.append(_row(a, i, b, partner.get(i), moves))
            rows += [_row(a, None, b, j, moves) for j in alone.get(i, ())]
    return EngineComparison(a, b, pairing.by, tuple(rows))


def _row(
    a: ListedEngine, i: int | None, b: ListedEngine, j: int | None, moves: Sequence[dict[int, list[Listed]]]
) -> Row:
    sides = [
        Side(engine.kernels[index], tuple(moved.get(index, ()))) if index is not None else Side()
        for engine, index, moved in ((a, i, moves[0]), (b, j, moves[1]))
    ]
    kernels = [side.kernel.kernel for side in sides if side.kernel is not None]
    return Row(_label(kernels), kernels[0].operation.value, sides[0], sides[1])


def _behind(b: ListedEngine, backward: dict[int, int]) -> dict[int, list[int]]:
    """The second's kernels without a partner, by the first's kernel that they come behind; -1: before all."""
    found: dict[int, list[int]] = {}
    last = -1
    for j, listed in enumerate(b.kernels):
        if j in backward:
            last = backward[j]
        elif not listed.moves:
            found.setdefault(last, []).append(j)
    return found


def _moves(engine: ListedEngine) -> dict[int, list[Listed]]:
    """What only moves data, by the kernel that it does it for: the first that reads its output, else the next one."""
    readers: dict[str, int] = {}
    for index in reversed(range(len(engine.kernels))):
        if not engine.kernels[index].moves:
            readers.update(dict.fromkeys(engine.kernels[index].kernel.input_names, index))
    found: dict[int, list[Listed]] = {}
    following: int | None = next((i for i in reversed(range(len(engine.kernels))) if not engine.kernels[i].moves), None)
    for index in reversed(range(len(engine.kernels))):
        listed = engine.kernels[index]
        if not listed.moves:
            following = index
            continue
        reader = next((readers[name] for name in listed.kernel.output_names if name in readers), following)
        if reader is not None:
            found.setdefault(reader, []).insert(0, listed)
    return found


def _label(kernels: Sequence[Kernel]) -> str:
    """What people know an operator by: the layer whose weights it has, else the node of its product, else its first."""
    for kernel in kernels:
        if weight := next((name for name in kernel.layers if name.endswith(".weight")), None):
            return weight.removesuffix(".weight")
    for kernel in kernels:
        nodes = nodes_that_compute(kernel)
        if node := next((name for name in nodes if _word(name) in _PRODUCT_WORDS), nodes[0] if nodes else None):
            return node
    return kernels[0].name


def _fused(kernel: Kernel) -> Counter[str]:
    """What runs in a kernel beside its product, in the operators' words; TensorRT 8 leaves activations out."""
    return Counter(word for word in _words(kernel) if word and word not in _PRODUCT_WORDS | _ACTIVATIONS)


def _words(kernel: Kernel) -> Iterator[str]:
    for name in nodes_that_compute(kernel):
        yield _word(name)


def _word(name: str) -> str:
    """``layer1.0/Relu_3`` is a relu; empty for what is no operator's word."""
    word = re.sub(r"_*\d+$", "", name.rpartition("/")[2]).lower()
    return word if re.fullmatch(r"[a-z][a-z0-9]*", word) else ""


def _kernel_to_json(listed: Listed) -> dict[str, Any]:
    kernel = listed.kernel
    return {
        "name": kernel.name,
        "nodes": list(kernel.layers),
        "reads": list(kernel.inputs),
        "writes": list(kernel.outputs),
        "tactic": kernel.tactic,
        "us": _rounded(listed.us),
    }


def _rounded(us: float | None) -> float | None:
    return None if us is None else round(us, 3)
