"""Symbolic sizes: a small grammar with bounds, instead of the Python that sympy would evaluate.

torch writes a size as sympy's ``srepr`` does, ``Mul(Integer(4), Symbol('s77', positive=True, integer=True))``, older
ones as ``4*s77``. Both are read here; numbers, symbols and the functions below are all there is. What an expression
could grow to when it is evaluated or expanded is bounded before anything evaluates it: no towers of powers.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resvit_export.loading.exported.errors import NotAllowedError, quoted

SYMBOL_BITS = 64
BITS_LIMIT = 4096
"""A size that may become larger than 2 to this is refused."""
_TERMS_LIMIT = 1000
_NODES_LIMIT, _DEPTH_LIMIT, _TEXT_LIMIT = 500, 40, 20_000
_POWER_LIMIT = 64

# torch numbers its symbols: s for sizes, u for sizes that depend on values, zf and zuf for floats.
_SYMBOL = re.compile(r"(s|u|zf|zuf)\d{1,6}")
_FLOAT = re.compile(r"-?\d{1,40}(\.\d{0,40})?(e[-+]?\d{1,2})?")
_LETTERS = re.compile(r"[\w ,.()'=+\-*/%<>!&|~]*", re.ASCII)
_ASSUMPTIONS = frozenset(
    {"integer", "positive", "negative", "nonnegative", "nonpositive", "nonzero", "real", "finite", "rational"}
)
_FUNCTIONS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("Add", "Mul", "Max", "Min", "And", "Or"), (0, 64)),
    **dict.fromkeys(("FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "Mod", "PythonMod"), (2, 2)),
    **dict.fromkeys(("CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "TruncToFloat", "ToFloat"), (1, 1)),
    **dict.fromkeys(("floor", "ceiling", "Abs", "Identity", "Not"), (1, 1)),
    **dict.fromkeys(("Eq", "Ne", "Ge", "Gt", "Le", "Lt", "Equality", "Unequality"), (2, 2)),
    **dict.fromkeys(("GreaterThan", "StrictGreaterThan", "LessThan", "StrictLessThan", "ExprCondPair"), (2, 2)),
    **dict.fromkeys(("ModularIndexing", "Where", "ITE"), (3, 3)),
    "RoundDecimal": (2, 2),
    "Piecewise": (1, 16),
}
"""What may be called, with the fewest and the most arguments."""
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_PRODUCTS = frozenset({"Mul", "CleanDiv", "IntTrueDiv", "FloatTrueDiv"})


@dataclass(frozen=True)
class _Extent:
    """How far an expression can grow: bits of its value, terms of its expanded form, and the nodes that it has."""

    bits: int = 1
    terms: int = 1
    nodes: int = 1


@functools.lru_cache(maxsize=4096)
def nodes_of_size(text: str) -> int:
    """Check a size expression and count its nodes; raises ``NotAllowedError`` where it is not arithmetic on sizes."""
    try:
        if len(text) > _TEXT_LIMIT:
            raise ValueError(f"{len(text):,} characters")
        if not _LETTERS.fullmatch(text):
            raise ValueError("no arithmetic has such characters")
        tree = ast.parse(text.strip(), mode="eval").body
        return _extent(tree, 0).nodes
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        first = str(error).partition("(<unknown>")[0].strip() or type(error).__name__
        raise NotAllowedError(f"a size is given as {quoted(text)} ({first})") from None


def _is_symbol(name: str) -> bool:
    return _SYMBOL.fullmatch(name) is not None


def _extent(tree: ast.expr, depth: int) -> _Extent:
    if depth > _DEPTH_LIMIT:
        raise ValueError("nested too deeply")
    if isinstance(tree, ast.Call):
        return _of_call(tree, depth)
    if isinstance(tree, ast.Constant) and isinstance(tree.value, (bool, int, float)):
        return _of_number(tree.value)
    if isinstance(tree, ast.Name):
        if not (_is_symbol(tree.id) or tree.id in ("true", "false")):
            raise ValueError(f"there is no {tree.id}")
        return _Extent(bits=SYMBOL_BITS)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        name = _OPERATORS[type(tree.op)]
        if name in _POWERS:
            return _power(tree.left, tree.right, depth)
        return _combined(name, [_extent(side, depth + 1) for side in (tree.left, tree.right)])
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, (ast.USub, ast.UAdd, ast.Invert)):
        return _combined("Abs", [_extent(tree.operand, depth + 1)])
    if isinstance(tree, ast.Compare) and len(tree.ops) == 1 and isinstance(tree.ops[0], _COMPARISONS):
        return _combined("Eq", [_extent(side, depth + 1) for side in (tree.left, tree.comparators[0])])
    if isinstance(tree, ast.Tuple) and len(tree.elts) == 2:  # a case of Piecewise in sympy's short form
        return _combined("ExprCondPair", [_extent(side, depth + 1) for side in tree.elts])
    raise ValueError(f"no {type(tree).__name__} is read")


def _of_call(call: ast.Call, depth: int) -> _Extent:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        raise ValueError("no * is read")
    if name in _LITERALS:
        return _LITERALS[name](call.args, call.keywords)
    if call.keywords:
        raise ValueError(f"{name} takes no names")
    if name in _POWERS and len(call.args) == 2:
        return _power(call.args[0], call.args[1], depth)
    fewest, most = _FUNCTIONS.get(name, (1, 0))
    if not fewest <= len(call.args) <= most:
        raise ValueError(f"there is no {name or 'such call'} of {len(call.args)}")
    return _combined(name, [_extent(argument, depth + 1) for argument in call.args])


def _combined(name: str, parts: Sequence[_Extent]) -> _Extent:
    bits = [part.bits for part in parts] or [1]
    terms = [part.terms for part in parts] or [1]
    several = max(bits) + len(bits)  # carries
    return _bounded(
        _Extent(
            sum(bits) if name in _PRODUCTS else several,
            math.prod(terms) if name in _PRODUCTS else sum(terms),
            1 + sum(part.nodes for part in parts),
        )
    )


def _power(base: ast.expr, exponent: ast.expr, depth: int) -> _Extent:
    """Of a power, or a shift, by a number that stands there."""
    part, number = _extent(base, depth + 1), _number(exponent)
    if number is None or abs(number) > _POWER_LIMIT:
        raise ValueError(f"a power by no number up to {_POWER_LIMIT}")
    times = max(1, math.ceil(abs(number)))
    return _bounded(_Extent(part.bits * times + times, math.comb(part.terms + times - 1, times), part.nodes + 2))


def _bounded(extent: _Extent) -> _Extent:
    if extent.bits > BITS_LIMIT or extent.terms > _TERMS_LIMIT or extent.nodes > _NODES_LIMIT:
        raise ValueError("it could grow too large")
    return extent


def _of_number(value: float) -> _Extent:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")
    return _bounded(_Extent(bits=max(1, value.bit_length()) if isinstance(value, int) else SYMBOL_BITS))


def _number(tree: ast.expr) -> float | None:
    """The value of 2, -2, Integer(2), Rational(1, 2) or 1/2; None for anything that is no number."""
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        inner = _number(tree.operand)
        return None if inner is None else -inner
    if isinstance(tree, ast.Constant) and isinstance(tree.value, (int, float)) and not isinstance(tree.value, bool):
        return tree.value if abs(tree.value) < 2**SYMBOL_BITS else None
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
        parts = [_number(argument) for argument in tree.args]
        if tree.func.id == "Integer" and len(parts) == 1:
            return parts[0]
        if tree.func.id == "Rational" and len(parts) == 2 and parts[0] is not None and parts[1]:
            return parts[0] / parts[1]
    return None


def _symbol(arguments: Sequence[ast.expr], keywords: Sequence[ast.keyword]) -> _Extent:
    name = arguments[0].value if len(arguments) == 1 and isinstance(arguments[0], ast.Constant) else None
    if not isinstance(name, str) or not _is_symbol(name):
        raise ValueError("a symbol that torch does not name so")
    for keyword in keywords:
        told = isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
        if keyword.arg not in _ASSUMPTIONS or not told:
            raise ValueError("something is assumed of a symbol that torch does not assume")
    return _Extent(bits=SYMBOL_BITS)


def _integers(arguments: Sequence[ast.expr], keywords: Sequence[ast.keyword]) -> _Extent:
    numbers = [_number(argument) for argument in arguments]
    values = [int(number) for number in numbers if number is not None and isinstance(number, int)]
    if keywords or not 1 <= len(values) <= 2 or len(values) != len(arguments):
        raise ValueError("a number is given as something else")
    return _combined("Mul", [_of_number(value) for value in values])


def _float(arguments: Sequence[ast.expr], keywords: Sequence[ast.keyword]) -> _Extent:
    text = arguments[0].value if len(arguments) == 1 and isinstance(arguments[0], ast.Constant) else None
    precise = [
        word.value.value for word in keywords if word.arg == "precision" and isinstance(word.value, ast.Constant)
    ]
    if not isinstance(text, str) or not _FLOAT.fullmatch(text) or len(precise) != len(keywords):
        raise ValueError("a number is given as something else")
    if any(type(digits) is not int or not 1 <= digits <= SYMBOL_BITS for digits in precise):
        raise ValueError("a number of more digits than torch writes")
    return _Extent(bits=SYMBOL_BITS * 8)


_LITERALS: dict[str, Callable[[Sequence[ast.expr], Sequence[ast.keyword]], _Extent]] = {
    "Symbol": _symbol,
    "Integer": _integers,
    "Rational": _integers,
    "Float": _float,
}
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "Add",
    ast.Sub: "Add",
    ast.Mult: "Mul",
    ast.Div: "IntTrueDiv",
    ast.FloorDiv: "FloorDiv",
    ast.Mod: "Mod",
    ast.Pow: "Pow",
    ast.LShift: "LShift",
    ast.RShift: "RShift",
    ast.BitAnd: "And",
    ast.BitOr: "Or",
}
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
