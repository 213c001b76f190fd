"""Whether a graph holds together: what is used was made before, by something that a graph may call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch._export.serde import schema

from resvit_export.loading.exported import operators
from resvit_export.loading.exported.errors import NotAllowedError, quoted
from resvit_export.loading.exported.names import is_identifier
from resvit_export.loading.exported.sizes import BITS_LIMIT, SYMBOL_BITS

_SHIFT_LIMIT = 64
_SUMS = ("_operator.add", "_operator.sub")
_POWERS = ("_operator.pow", "_operator.lshift")
_REFERENCES = (schema.TensorArgument, schema.SymIntArgument, schema.SymFloatArgument, schema.SymBoolArgument)


def check_graph(graph: schema.Graph) -> None:
    """Require that all that is used is there, nothing is made twice, and only what is allowed is called.

    Sizes are computed when a program runs: none of them may grow beyond all bounds there either. Raises
    ``NotAllowedError``.
    """
    if graph.custom_obj_values:
        raise NotAllowedError("it holds objects of custom classes")
    values = {*graph.tensor_values, *graph.sym_int_values, *graph.sym_float_values, *graph.sym_bool_values}
    bits: dict[str, int] = {}

    def make(made: Any, size: int) -> None:
        for name in _names(made):
            if name in bits or name not in values:
                raise NotAllowedError(f"its value {quoted(name)} is made twice, or nothing says what it is")
            bits[name] = size

    make(graph.inputs, SYMBOL_BITS)
    for node in graph.nodes:
        _check_call(node)
        if missing := [name for name in _names(node.inputs) if name not in bits]:
            raise NotAllowedError(f"its node {quoted(node.name)} uses {quoted(missing[0])}, which is not there")
        make(node.outputs, _bits_of(node, bits) if operators.is_on_sizes(node.target) else SYMBOL_BITS)
    if missing := [name for name in _names(graph.outputs) if name not in bits]:
        raise NotAllowedError(f"its output {quoted(missing[0])} is not there")


def _check_call(node: schema.Node) -> None:
    names = [argument.name for argument in node.inputs]
    known = operators.arguments_of(node.target)
    wrong = [name for name in names if (name not in known if known is not None else name and not is_identifier(name))]
    if wrong or len(set(names) - {""}) != len([name for name in names if name]):
        raise NotAllowedError(f"{quoted(node.target)} has no arguments {quoted(names)}")
    for graph in _parts(node.inputs, schema.GraphArgument):
        check_graph(graph.graph)
    for argument in _parts(node.inputs, schema.Argument):
        if argument.type == "as_operator":
            operators.arguments_of(argument.as_operator)


def _bits_of(node: schema.Node, bits: dict[str, int]) -> int:
    """How many bits the result of arithmetic on sizes can have."""
    sizes = [_bits_of_argument(argument.arg, bits) for argument in node.inputs] or [1]
    if node.target in _POWERS:
        exponent = node.inputs[-1].arg
        times = (
            exponent.as_int if exponent.type == "as_int" else exponent.as_float if exponent.type == "as_float" else -1
        )
        if not 0 <= times <= _SHIFT_LIMIT:
            raise NotAllowedError(f"its node {quoted(node.name)} takes a power that is no number up to {_SHIFT_LIMIT}")
        result = sizes[0] * max(1, int(times) + 1)
    elif node.target == "_operator.mul":
        result = sum(sizes)
    else:
        result = max(sizes) + (node.target in _SUMS)
    if result > BITS_LIMIT:
        raise NotAllowedError(f"its node {quoted(node.name)} makes a size that could grow too large")
    return result


def _bits_of_argument(argument: schema.Argument, bits: dict[str, int]) -> int:
    if argument.type == "as_int":
        return max(1, argument.as_int.bit_length())
    return max((bits[name] for name in _names(argument)), default=SYMBOL_BITS)


def _names(value: Any) -> list[str]:
    """The values of the graph that arguments refer to; what a region inside refers to is its own."""
    found = []
    for part in _parts(value, _REFERENCES):
        if isinstance(part, schema.TensorArgument):
            found.append(part.name)
        elif part.type == "as_name":
            found.append(part.as_name)
    return found


def _parts(value: Any, kind: Any) -> Iterator[Any]:
    """All records of a kind in a value, without those of regions inside."""
    if isinstance(value, kind):
        yield value
    if isinstance(value, list):
        for item in value:
            yield from _parts(item, kind)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _parts(item, kind)
    elif hasattr(value, "create"):
        yield from _parts(value.value, kind)
    elif dataclasses.is_dataclass(value) and not isinstance(value, schema.Graph):
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name), kind)
