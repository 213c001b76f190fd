"""How far a pickle may go before PyTorch's reader of plain tensors gets it.

``torch.load(weights_only=True)`` decides what a pickle may name. It sets no bound on what harmless parts add up to: a
tuple of two tuples of two tuples takes for ever to hash, one nested a million deep overflows the interpreter's stack,
a codec may need the square of its text. The pickle is walked here first, by its opcodes alone: nothing is made of it.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

MOST_OPCODES = 5_000_000
MOST_COST = 500_000_000
"""What hashing and copying may add up to, in items and characters: a few seconds."""
DEEPEST_TUPLE = 64
_TOO_MUCH = MOST_COST + 1

_MARK = pickletools.markobject
_KNOWN = frozenset(
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID"),
        *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
        *("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "LONG1", "SHORT_BINSTRING"),
        *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
    }
)
"""What ``torch.save`` writes, and PyTorch's reader knows."""
_PLAIN = _KNOWN.intersection(
    code.name for code in pickletools.opcodes if not code.stack_before and code.stack_after
) - {"MARK", "BINGET", "LONG_BINGET"}
"""Opcodes that put a value down and take none: nearly all of them in any checkpoint."""
_CODECS = ("latin1",)
"""How pickles of protocol 2 write bytes. Others can take the square of the text's length, or unpack a bomb."""


class PickleBoundsError(ValueError):
    """The pickle goes further than that of any checkpoint."""


class _Value:
    """What is known of one value: how deep its tuples are, what it weighs, and its text or number.

    ``weight`` counts items and characters, shared ones as often as they are reached. ``last`` of a tuple is its last
    entry's text or number.
    """

    __slots__ = ("depth", "last", "weight")

    def __init__(self, depth: int = 0, weight: int = 1, last: object = None) -> None:
        self.depth, self.weight, self.last = depth, weight, last


def require_bounded_pickle(stream: IO[bytes]) -> None:
    """Walk one pickle from where ``stream`` stands to its end.

    A value weighs as much as all that it holds. Making a tuple is free; what is hashed as a key, copied or handed to a
    function costs its weight.

    Raises:
        PickleBoundsError: for one that goes too far.
        ValueError: for a damaged one.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[int, _Value] = {}
    cost = 0
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > MOST_OPCODES:
                raise PickleBoundsError(f"it has more than {MOST_OPCODES:,} parts")
            if opcode.name in _PLAIN:
                stack.append(_Value(0, 1 + len(argument) if isinstance(argument, (str, bytes)) else 1, argument))
                continue
            if opcode.name not in _KNOWN:
                raise PickleBoundsError(f"torch.save writes no {opcode.name}; it is a pickle of something else")
            cost += _step(opcode, argument, stack, marks, memo)
            if cost > MOST_COST:
                raise PickleBoundsError("its parts refer to each other so often that reading them would not end")
    except PickleBoundsError:
        raise
    except MemoryError:  # a length that the file claims, and nothing else here takes much
        raise ValueError("its pickle is damaged (a part of it is longer than this machine's memory)") from None
    except Exception as error:  # pickletools raises many kinds for damaged bytes
        raise ValueError(f"its pickle is damaged ({error})") from error


def _step(opcode: Any, argument: Any, stack: list[_Value], marks: list[int], memo: dict[int, _Value]) -> int:
    """Do one opcode to the values' outlines; what it costs."""
    name = opcode.name
    if name == "MARK":
        marks.append(len(stack))
        return 0
    if name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
        return 0
    if name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
        return 0
    taken = _taken(opcode, stack, marks)
    if not opcode.stack_after:
        return 0
    if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
        return _put_in(name, stack[-1], taken)
    weight = min(_TOO_MUCH, 1 + sum(value.weight for value in taken))
    if name.startswith("TUPLE"):
        made = _Value(1 + max((value.depth for value in taken), default=0), weight, taken[-1].last if taken else None)
        if made.depth > DEEPEST_TUPLE:
            raise PickleBoundsError(f"it has tuples nested more than {DEEPEST_TUPLE} deep")
        stack.append(made)
        return 0
    if name == "REDUCE":
        _require_plain_call(taken[0].last, taken[1].last)
    stack.append(_Value(max((value.depth for value in taken), default=0), weight))
    return weight


def _taken(opcode: Any, stack: list[_Value], marks: list[int]) -> list[_Value]:
    """The values that an opcode takes off the stack; what it takes off and puts back stays there."""
    before = opcode.stack_before
    if _MARK in before:
        start = marks.pop()
        taken, stack[start:] = stack[start:], []
        rest = before.index(_MARK)
    else:
        kept = 1 if opcode.name in ("APPEND", "SETITEM") else 0
        count = len(before) - kept
        if count > len(stack) - kept:
            raise ValueError("it takes more than it has put down")
        taken, stack[len(stack) - count :] = stack[len(stack) - count :], []
        rest = kept
    if rest > len(stack):
        raise ValueError("it takes more than it has put down")
    return taken


def _put_in(name: str, holder: _Value, taken: list[_Value]) -> int:
    """Values into a list or dictionary; keys are hashed, and cost what they weigh."""
    holder.weight = min(_TOO_MUCH, holder.weight + sum(value.weight for value in taken))
    return sum(value.weight for value in taken[::2]) if name.startswith("SETITEM") else 0


def _require_plain_call(function: object, last: object) -> None:
    """Two functions that PyTorch lets through do more than keep what they are given."""
    if function == "_codecs encode" and last not in _CODECS:
        raise PickleBoundsError(f"it encodes text as {str(last)[:40]!r}")
    if function == "builtins bytearray" and isinstance(last, int):
        raise PickleBoundsError(f"it asks for {last:,} bytes that it does not hold")
