"""The shape of a pruned module, as plain data: enough to give an unpruned module of the same architecture that shape.

Needs no pruning library. A structure may come from a file that somebody else wrote: it can only make tensors
smaller, lower numbers that the module already has, and replace modules that are there by the identity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from resvit_engines.errors import ResvitError

Attribute: TypeAlias = int | tuple[int, ...]

_FIX = "Give the structure that was written together with the weights, and the architecture that was pruned."


@dataclass(frozen=True)
class Structure:
    """What differs between a pruned module and its architecture as it comes."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The new shape of every parameter and buffer that shrank, by its name in the state dict."""
    attributes: Mapping[str, Mapping[str, Attribute]] = field(default_factory=dict)
    """By module path, the numbers that went down: channels, features, heads, groups."""
    identities: tuple[str, ...] = ()
    """Modules that became the identity, in the order of their paths."""

    def followed_by(self, later: Structure) -> Structure:
        """This pruning and then another one of its result, as one structure of the original architecture."""
        identities = tuple(sorted({*self.identities, *later.identities}))

        def stays(path: str) -> bool:
            return not any(path == gone or path.startswith(f"{gone}.") for gone in identities)

        attributes: dict[str, dict[str, Attribute]] = {}
        for each in (self, later):
            for path, values in each.attributes.items():
                if stays(path):
                    attributes.setdefault(path, {}).update(values)
        shapes = {name: shape for name, shape in {**self.shapes, **later.shapes}.items() if stays(name)}
        return Structure(shapes, attributes, identities)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, which ``structure_from_json`` reads back."""
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {
                path: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
                for path, values in self.attributes.items()
            },
            "identities": list(self.identities),
        }


def structure_from_json(content: object) -> Structure:
    """Read a structure, given as JSON text or as the values in it; raises ``ResvitError`` for anything else."""
    if isinstance(content, str | bytes):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise ResvitError(f"The structure of the pruned model is no JSON: {error}.", _FIX) from error
    fields = _mapping(content, "the structure")
    unknown = sorted(set(fields) ^ {"shapes", "attributes", "identities"})
    if unknown:
        raise ResvitError(
            f"The structure of the pruned model has unknown or missing fields: {', '.join(unknown)}.", _FIX
        )
    shapes = {name: _numbers(shape, name) for name, shape in _mapping(fields["shapes"], "shapes").items()}
    attributes: dict[str, dict[str, Attribute]] = {}
    for path, values in _mapping(fields["attributes"], "attributes").items():
        attributes[path] = {
            name: _numbers(value, name) if isinstance(value, list) else _number(value, name)
            for name, value in _mapping(values, path).items()
        }
    identities = fields["identities"]
    if not isinstance(identities, list) or not all(isinstance(each, str) for each in identities):
        raise ResvitError("The structure's identities are not a list of module paths.", _FIX)
    return Structure(shapes, attributes, tuple(identities))


def apply_structure(module: nn.Module, structure: Structure) -> None:
    """Give ``module`` the pruned shape in place; what shrank is zero until a state dict is loaded.

    Nothing is changed when it does not fit: raises ``ResvitError`` for a tensor, attribute or module that is not
    there, and for a number that is not smaller than what is there.
    """
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    paths = dict(module.named_modules(remove_duplicate=False))
    for path in structure.identities:
        if not path or path not in paths:
            raise ResvitError(f"The model has no module '{path}' that could become the identity.", _FIX)
    for name, shape in structure.shapes.items():
        if name not in tensors:
            raise ResvitError(f"The model has no tensor '{name}'.", _FIX)
        if not _shrinks(tuple(tensors[name].shape), shape):
            raise ResvitError(
                f"{name} has the shape {tuple(tensors[name].shape)}, which pruning cannot make {shape}.", _FIX
            )
    for path, values in structure.attributes.items():
        if path not in paths:
            raise ResvitError(f"The model has no module '{path}'.", _FIX)
        for attribute, value in values.items():
            before = number_attributes(paths[path]).get(attribute)
            after = value if isinstance(value, tuple) else (value,)
            if before is None or isinstance(before, tuple) != isinstance(value, tuple):
                raise ResvitError(f"The model's module '{path}' has no number '{attribute}'.", _FIX)
            if not _shrinks(before if isinstance(before, tuple) else (before,), after):
                raise ResvitError(f"{path}.{attribute} is {before}, which pruning cannot make {value}.", _FIX)
    for name, shape in structure.shapes.items():
        set_tensor(module, name, torch.zeros(shape, dtype=tensors[name].dtype, device=tensors[name].device))
    for path, values in structure.attributes.items():
        for attribute, value in values.items():
            setattr(paths[path], attribute, value)
    for path in structure.identities:
        make_identity(module, path)


def number_attributes(module: nn.Module) -> dict[str, Attribute]:
    """The module's own attributes that are whole numbers, or tuples of them."""
    found: dict[str, Attribute] = {}
    for name, value in vars(module).items():
        several = value if isinstance(value, tuple) else (value,)
        if not name.startswith("_") and several and all(type(each) is int for each in several):
            found[name] = value
    return found


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` in the place of the parameter or buffer called ``name``."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    old = owner._parameters.get(last)
    if old is not None:
        owner._parameters[last] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        owner._buffers[last] = value


def make_identity(module: nn.Module, path: str) -> None:
    """Replace the submodule at ``path`` by the identity."""
    parent, _, last = path.rpartition(".")
    module.get_submodule(parent)._modules[last] = nn.Identity()


def _shrinks(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return len(before) == len(after) and all(1 <= new <= old for old, new in zip(before, after, strict=True))


def _mapping(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ResvitError(f"The structure of the pruned model is damaged: {what} is no table of names.", _FIX)
    return value


def _numbers(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ResvitError(f"The structure of the pruned model is damaged: {what} is no list of numbers.", _FIX)
    return tuple(_number(each, what) for each in value)


def _number(value: object, what: str) -> int:
    if type(value) is not int or value < 1:
        raise ResvitError(f"The structure of the pruned model is damaged: {what} holds {value!r}.", _FIX)
    return value
