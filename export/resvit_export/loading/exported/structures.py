"""How a program's inputs and outputs are nested: tree specifications, read without looking up a single class.

torch's own reader imports what a specification names: the factory of a ``defaultdict``, the class of an enumeration,
anything else. Here only tuples, lists and dictionaries come out. Containers of other classes that hold their parts by
name (named tuples, dataclasses, transformers' outputs) are read as dictionaries with these names, which is all that
output names are taken from; nothing else is a structure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from resvit_export.loading.exported.errors import NotAllowedError, quoted
from resvit_export.loading.exported.names import is_identifier, is_text

_SEQUENCES = {
    "builtins.tuple": tuple,
    "torch.Size": tuple,
    "builtins.list": list,
    "torch.fx.immutable_collections.immutable_list": list,
    "collections.deque": list,
}
_MAPPINGS = ("builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict")
_FACTORIES = ("list", "dict", "tuple", "set", "int", "float", "str", "bool")
_TEXT_LIMIT, _DEPTH_LIMIT, _LEAF_LIMIT = 1 << 20, 16, 10_000
_KEY_LIMIT = 2**63


@dataclass
class _Reader:
    named_tuples: Mapping[str, Sequence[str]]
    leaves: int = 0

    def structure(self, node: Any, depth: int = 0) -> pytree.TreeSpec:
        if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
            raise NotAllowedError("a structure of its inputs or outputs is not written as torch writes one")
        kind, context, children = node["type"], node["context"], node["children_spec"]
        if kind is None and context is None and children == []:
            self.leaves += 1
            if self.leaves > _LEAF_LIMIT:
                raise NotAllowedError(f"its inputs or outputs are more than {_LEAF_LIMIT:,}")
            return pytree.treespec_leaf()
        if not isinstance(kind, str) or not isinstance(children, list) or depth > _DEPTH_LIMIT:
            raise NotAllowedError(f"its inputs or outputs are held by {quoted(kind)}")
        parts = [self.structure(child, depth + 1) for child in children]
        if kind in _SEQUENCES:
            length = _context(context)
            if not (length is None or (kind == "collections.deque" and type(length) is int)):
                raise NotAllowedError(f"{quoted(kind)} among its inputs or outputs says {quoted(context)}")
            return pytree.TreeSpec(_SEQUENCES[kind], None, parts)
        keys = self._keys(kind, context)
        if len(keys) != len(parts) or len(set(keys)) != len(keys):
            raise NotAllowedError(f"{quoted(kind)} among its inputs or outputs has other keys than parts")
        return pytree.TreeSpec(dict, keys, parts)

    def _keys(self, kind: str, context: Any) -> list[Any]:
        if kind in _MAPPINGS:
            return _checked(kind, _context(context), is_key)
        if kind == "collections.defaultdict" and isinstance(context, dict):
            factory = (context.get("default_factory_module"), context.get("default_factory_name"))
            known = factory[0] == "builtins" and factory[1] in _FACTORIES
            if known and set(context) == {"default_factory_module", "default_factory_name", "dict_context"}:
                return _checked(kind, context["dict_context"], is_key)
        elif kind == "collections.namedtuple" and isinstance(context, str) and context in self.named_tuples:
            return list(self.named_tuples[context])
        elif kind.count(".") and all(is_identifier(part) for part in kind.split(".")):
            fields = _context(context)
            if isinstance(fields, list) and len(fields) == 2 and all(isinstance(part, list) for part in fields):
                _checked(
                    kind, fields[1], is_identifier
                )  # a dataclass: the fields that hold something, those that don't
                fields = fields[0]
            return _checked(kind, fields, is_identifier)
        raise NotAllowedError(f"its inputs or outputs are held by {quoted(kind)} with {quoted(context)}")


def structure_from_text(text: str, named_tuples: Mapping[str, Sequence[str]]) -> pytree.TreeSpec:
    """The structure that ``text`` describes, of tuples, lists and dictionaries.

    ``named_tuples`` has the field names of the named tuples in it. Raises ``NotAllowedError`` for anything else.
    """
    if len(text) > _TEXT_LIMIT:
        raise NotAllowedError("a structure of its inputs or outputs is too long")
    match _json(text):
        case [1, node]:
            return _Reader(named_tuples).structure(node)
    raise NotAllowedError("a structure of its inputs or outputs is not written as torch writes one")


def is_key(value: object) -> bool:
    """Whether something may be the key of a dictionary of inputs or outputs: text or a number."""
    return is_text(value) or (type(value) is int and abs(value) < _KEY_LIMIT)


def _checked(kind: str, keys: object, allowed: Any) -> list[Any]:
    if not isinstance(keys, list) or not all(allowed(key) for key in keys):
        raise NotAllowedError(f"{quoted(kind)} among its inputs or outputs has the keys {quoted(keys)}")
    return keys


def _context(text: object) -> Any:
    return _json(text) if isinstance(text, str) and len(text) <= _TEXT_LIMIT else text if text is None else {}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotAllowedError(f"a structure of its inputs or outputs is no JSON: {quoted(text)}") from error
