"""The records of ``torch.export``'s schema, each field of the type that the schema gives it, and nothing else.

What comes out are the schema's own dataclasses with canonical content: structures of tuples, lists and dictionaries,
tensors on the CPU, and neither guards (which are Python source) nor notes on where a node came from.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.union import _Union
from torch.utils import _pytree as pytree

from resvit_export.loading.exported.errors import NotAllowedError, quoted
from resvit_export.loading.exported.names import is_identifier, is_tensor_path, is_text
from resvit_export.loading.exported.sizes import nodes_of_size
from resvit_export.loading.exported.structures import structure_from_text

_DEPTH_LIMIT = 60
_ITEM_LIMIT = 200_000
_SIZE_NODES_LIMIT = 2_000_000
"""Of all size expressions together: torch takes about a minute for as many."""
_INTEGER_LIMIT = 2**64
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu")
_TAGS: dict[type, frozenset[str]] = {
    schema.InputSpec: frozenset({"user_input", "parameter", "buffer", "tensor_constant", "constant_input"}),
    schema.OutputSpec: frozenset({"user_output", "buffer_mutation", "parameter_mutation", "user_input_mutation"}),
    schema.Argument: frozenset(f.name for f in dataclasses.fields(schema.Argument)) - {"as_custom_obj"},
}
"""Alternatives that are read, where not all are: neither objects of custom classes, nor tokens, nor gradients."""
_NOT_READ: dict[tuple[type, str], Any] = {
    (schema.ExportedProgram, "guards_code"): [],
    (schema.ExportedProgram, "opset_version"): {},
    (schema.GraphModule, "metadata"): {},
}
_MODULE_STACK = re.compile(r"[\w .:\-+/@=\[\]()'<>]*,[\w .:\-+/@=\[\]()'<>]*,[\w.<>]*")
_Hints = dict[str, Any]


def _dialect(value: object) -> bool:
    return value in ("ATEN", "TRAINING", "")


_STRINGS: dict[tuple[type, str], Callable[[object], bool]] = {
    (schema.Node, "target"): lambda value: isinstance(value, str),
    (schema.Argument, "as_operator"): lambda value: isinstance(value, str),
    (schema.SymExpr, "expr_str"): lambda value: isinstance(value, str),
    (schema.ModuleCallSignature, "in_spec"): lambda value: isinstance(value, str),
    (schema.ModuleCallSignature, "out_spec"): lambda value: isinstance(value, str),
    (schema.ModuleCallEntry, "fqn"): is_text,
    (schema.Device, "type"): lambda value: value in _DEVICES,
    (schema.Node, "metadata"): lambda value: isinstance(value, str),
    (schema.Argument, "as_string"): is_text,
    (schema.Argument, "as_strings"): is_text,
    (schema.ConstantValue, "as_string"): is_text,
    (schema.ExportedProgram, "verifiers"): _dialect,
    (schema.ExportedProgram, "torch_version"): is_text,
    (schema.ExportedProgram, "range_constraints"): lambda value: isinstance(value, str) and nodes_of_size(value) > 0,
    (schema.GraphModule, "treespec_namedtuple_fields"): is_text,
    (schema.InputToParameterSpec, "parameter_name"): is_tensor_path,
    (schema.InputToBufferSpec, "buffer_name"): is_tensor_path,
    (schema.InputToTensorConstantSpec, "tensor_constant_name"): is_tensor_path,
    (schema.BufferMutationSpec, "buffer_name"): is_tensor_path,
    (schema.ParameterMutationSpec, "parameter_name"): is_tensor_path,
    (schema.NamedArgument, "name"): lambda value: isinstance(value, str) and (not value or value.isidentifier()),
    (schema.PayloadConfig, "config"): is_tensor_path,
    (schema.PayloadMeta, "path_name"): is_identifier,
}
"""What the texts of a field, or its keys, may be; all others are identifiers."""


def program_record(document: Any) -> schema.ExportedProgram:
    """``models/model.json`` as torch's own record of a program; raises ``NotAllowedError`` for anything else."""
    version = document.get("schema_version") if isinstance(document, dict) else None
    major = version.get("major") if isinstance(version, dict) else None
    if major != schema.SCHEMA_VERSION[0]:
        raise NotAllowedError(
            f"its schema is {quoted(major)}, and torch {torch.__version__.partition('+')[0]} writes "
            f"{schema.SCHEMA_VERSION[0]}; programs are not made to be read by other versions"
        )
    program: schema.ExportedProgram = _Reader().value(schema.ExportedProgram, document)
    _canonical(program.graph_module)
    if len(program.verifiers) != 1:
        raise NotAllowedError("it does not name one dialect")
    return program


def payload_record(document: Any) -> dict[str, schema.PayloadMeta]:
    """Weights or constants by their paths: where their bytes lie, and of what type and layout they are."""
    config: schema.PayloadConfig = _Reader().value(schema.PayloadConfig, document)
    return config.config


class _Reader:
    """One walk over a document; what is counted is counted over all of it."""

    def __init__(self) -> None:
        self.size_nodes = 0

    def value(self, kind: Any, data: Any, owner: tuple[type, str] = (object, "it"), depth: int = 0) -> Any:
        if depth > _DEPTH_LIMIT:
            raise NotAllowedError("it is nested too deeply")
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            inner = next(argument for argument in arguments if argument is not type(None))
            return None if data is None else self.value(inner, data, owner, depth + 1)
        if origin is list:
            if not isinstance(data, list) or len(data) > _ITEM_LIMIT:
                raise _wrong(owner, "a list", data)
            return [self.value(arguments[0], item, owner, depth + 1) for item in data]
        if origin is dict:
            if not isinstance(data, dict) or len(data) > _ITEM_LIMIT:
                raise _wrong(owner, "an object", data)
            return {_text(owner, key): self.value(arguments[1], item, owner, depth + 1) for key, item in data.items()}
        if dataclasses.is_dataclass(kind):
            return self._record(kind, data, owner, depth + 1)
        return _scalar(kind, data, owner)

    def _record(self, kind: Any, data: Any, owner: tuple[type, str], depth: int) -> Any:
        hints = _hints(kind)
        if not isinstance(data, dict) or not data.keys() <= hints.keys():
            raise _wrong(owner, kind.__name__, data)
        if issubclass(kind, _Union):
            tag = next(iter(data), "")
            if len(data) != 1 or tag not in _TAGS.get(kind, hints.keys()):
                raise NotAllowedError(f"{_said(owner)} is {quoted(tag)}, which networks of tensors have no use for")
            return kind.create(**{tag: self.value(hints[tag], data[tag], (kind, tag), depth)})
        if kind is schema.Node:
            data = {**data, "metadata": _labels(data.get("metadata"))}
        fields = {
            name: _NOT_READ[kind, name]
            if (kind, name) in _NOT_READ
            else self.value(hint, data[name], (kind, name), depth)
            for name, hint in hints.items()
            if name in data
        }
        missing = [f.name for f in dataclasses.fields(kind) if f.name not in fields and _is_needed(f)]
        if missing:
            raise NotAllowedError(f"{_said(owner)} has no {missing[0]}")
        record = kind(**fields)
        if isinstance(record, schema.SymExpr):
            self.size_nodes += nodes_of_size(record.expr_str)
            if self.size_nodes > _SIZE_NODES_LIMIT:
                raise NotAllowedError("its symbolic sizes are too many")
        if isinstance(record, schema.TensorMeta) and record.layout != schema.Layout.Strided:
            raise NotAllowedError("one of its tensors is sparse")
        # A program that was exported on another device computes the same on the CPU.
        return schema.Device("cpu") if isinstance(record, schema.Device) else record


def _canonical(module: schema.GraphModule) -> None:
    """Structures without classes, and of the signatures of modules the outermost one's."""
    named = {name: definition.field_names for name, definition in module.treespec_namedtuple_fields.items()}
    module.treespec_namedtuple_fields = {}
    outermost = [entry for entry in module.module_call_graph if not entry.fqn]
    if len(outermost) != 1 or (signature := outermost[0].signature) is None:
        raise NotAllowedError("it does not say how it is called")
    module.module_call_graph = outermost
    given = structure_from_text(signature.in_spec, named)
    parts = given.children()
    if given.type is not tuple or [part.type for part in parts] != [tuple, dict]:
        raise NotAllowedError("its inputs are not arguments and named arguments")
    if not all(is_identifier(name) for name in parts[1].context):
        raise NotAllowedError(f"its inputs are named {quoted(parts[1].context)}")
    signature.in_spec = pytree.treespec_dumps(given)
    signature.out_spec = pytree.treespec_dumps(structure_from_text(signature.out_spec, named))


def _scalar(kind: Any, data: Any, owner: tuple[type, str]) -> Any:
    if kind is str:
        return _text(owner, data)
    if kind is float:
        named = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
        if isinstance(data, str) and data in named:
            return named[data]
        if (type(data) in (int, float) and abs(data) < _INTEGER_LIMIT) or type(data) is float:
            return float(data)
    elif kind is bool:
        if isinstance(data, bool):
            return data
    elif isinstance(kind, type) and issubclass(kind, enum.IntEnum):
        if type(data) is int and data in {member.value for member in kind}:
            return data
    elif type(data) is int and abs(data) < _INTEGER_LIMIT:
        return data
    raise _wrong(owner, kind.__name__, data)


def _text(owner: tuple[type, str], data: Any) -> str:
    if not _STRINGS.get(owner, is_identifier)(data):
        raise _wrong(owner, "a name of that kind", data)
    return str(data)


def _labels(metadata: Any) -> dict[str, str]:
    """Which modules a node was traced in, for the names of layers; all else is left out, and this where it is odd."""
    stack = metadata.get("nn_module_stack") if isinstance(metadata, dict) else None
    if isinstance(stack, str) and all(_MODULE_STACK.fullmatch(level) for level in stack.split(";")):
        return {"nn_module_stack": stack}
    return {}


def _wrong(owner: tuple[type, str], expected: str, data: Any) -> NotAllowedError:
    return NotAllowedError(f"{_said(owner)} is {quoted(data)} and not {expected}")


def _said(owner: tuple[type, str]) -> str:
    return "its description" if owner[0] is object else f"its {owner[0].__name__}.{owner[1]}"


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _hints(kind: type) -> _Hints:
    return typing.get_type_hints(kind, globalns=vars(schema))
