"""Copies of a module that share nothing with it, and runs that leave nothing behind in it.

A forward may keep what it computed: an attention bias gathered from its table, a cached property, a buffer that is made
on the first image. Such a tensor hangs on the graph of gradients, so that Python cannot copy it, and it is out of date
as soon as the weights that it came from are pruned or trained.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from resvit_engines.errors import ExitCode, ResvitError

_KEPT = frozenset(vars(nn.Module())) - {"_buffers"}
"""What PyTorch itself keeps in a module and no forward computes: parameters, submodules, hooks."""
_CONTAINERS = (dict, list, set, deque)
_ATOMS = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_Module = TypeVar("_Module", bound=nn.Module)


@contextlib.contextmanager
def forgetting(module: nn.Module) -> Iterator[None]:
    """Take out of ``module``, on leaving, what runs inside left in attributes, buffers, containers and hooks.

    In training mode all stays: running statistics are meant to move. Hooks go with the attribute that says that they
    are there, or the next run would set them again, beside themselves (transformers' collectors of hidden states).
    """
    before = [(table, copy.copy(table)) for table in _tables(module)]
    hooks = [(registry, set(registry)) for registry in _hooks(module)]
    try:
        yield
    finally:
        if not module.training:
            for table, content in before:
                _put_back(table, content)
            for registry, known in hooks:
                for key in set(registry) - known:
                    del registry[key]


def copy_of(module: _Module) -> _Module:
    """A copy of ``module`` in the same mode that shares no tensor with it and holds no answers of earlier runs.

    Computed tensors become plain ones; hooks, weak references and functions that hold a part of the module hold the
    copy's. What cannot be copied and is no tensor (a lock, a generator, an open file) is shared.
    Raises ``ResvitError`` (INPUT) for a module that cannot be copied all the same.
    """
    held = [value for table in _tables(module) for value in _values(table)]
    memo = {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    try:
        made = _deep_copy(module, memo, held)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ResvitError(
            f"The network cannot be copied, which pruning needs: {type(error).__name__}: {lines[0] if lines else ''}",
            "Keep what cannot be copied out of the module's attributes, or export the network unpruned.",
            ExitCode.INPUT,
        ) from error
    _rebind(made, memo)
    _forget_cached(made)
    return made


def _deep_copy(module: _Module, memo: dict[int, Any], held: list[Any]) -> _Module:
    """Fill ``memo`` on the way; where something refuses, share what refuses and try again."""
    first = dict(memo)
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # noqa: BLE001 - whatever a part of the user's raises; what it is comes below
        memo.clear()
        memo.update(first)
        known = {id(value): value for value in (*module.modules(), *held) if isinstance(value, (Tensor, nn.Module))}
        memo.update({id(value): value for value in held if not isinstance(value, _ATOMS) and _refuses(value, known)})
        return copy.deepcopy(module, memo)


def _refuses(value: object, known: dict[int, Any]) -> bool:
    """Whether Python cannot copy a value, tensors and modules in it left aside. Containers are never shared."""
    if isinstance(value, (*_CONTAINERS, tuple)):
        return False
    try:
        copy.deepcopy(value, dict(known))
    except Exception:  # noqa: BLE001 - whatever the user's object raises says the same
        return True
    return False


def _forget_cached(module: nn.Module) -> None:
    """Drop cached properties, and let parts drop what they cache in evaluation: those that do so do it in ``train``."""
    for part in module.modules():
        for name in [name for name in vars(part) if _is_cached_property(type(part), name)]:
            del vars(part)[name]
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    module.train(modes[0][1])
    for part, training in modes:
        part.training = training


def _is_cached_property(owner: type, name: str) -> bool:
    return any(isinstance(vars(base).get(name), functools.cached_property) for base in owner.__mro__)


def _rebind(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let weak references and closures in a copy hold parts of the copy: Python copies neither."""
    for table in _tables(module, kept=frozenset()):
        pairs = list(table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ())
        for key, value in pairs:
            if isinstance(value, weakref.ref) and id(value()) in memo:
                table[key] = weakref.ref(memo[id(value())])
            elif isinstance(value, types.FunctionType) and value.__closure__:
                table[key] = _rebound(value, memo)


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    cells = []
    for cell in function.__closure__ or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # an empty cell
            inside = None
        ours = isinstance(inside, (nn.Module, Tensor)) and id(inside) in memo
        cells.append(types.CellType(memo[id(inside)]) if ours else cell)
    if all(one is other for one, other in zip(cells, function.__closure__ or (), strict=True)):
        return function
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    """Where the parts of a module keep what is called around their forward."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    beside = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return [getattr(part, name) for part in module.modules() for name in (*names, *beside)]


def _tables(module: nn.Module, kept: frozenset[str] = _KEPT) -> list[Any]:
    """The dicts, lists, sets and deques that hold what a module's parts and the plain objects in them have.

    What stands under the names in ``kept`` is not looked into.
    """
    parts = {id(part) for part in module.modules()}
    found: list[Any] = []
    seen: set[int] = set()
    pending: list[Any] = list(module.modules())
    while pending:
        value = pending.pop()
        if id(value) in seen or (isinstance(value, _ATOMS) and id(value) not in parts):
            continue
        seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            found.append(value)
            pending += _values(value)
        elif isinstance(value, tuple):
            pending += value
        elif isinstance(own := getattr(value, "__dict__", None), dict) and not _of_python(value):
            found.append(own)
            pending += [item for name, item in own.items() if id(value) not in parts or name not in kept]
    return found


def _of_python(value: object) -> bool:
    """Whether an object is the standard library's own (a thread, a logger), whose inside is none of ours."""
    return type(value).__module__.partition(".")[0] in sys.stdlib_module_names - {"types"}


def _values(table: Any) -> list[Any]:
    return list(table.values() if isinstance(table, dict) else table)


def _put_back(table: Any, content: Any) -> None:
    """Give a container its content of before; one that still holds the very same objects is not touched."""
    if isinstance(table, dict):
        for name in [name for name in table if name not in content and name not in _KEPT]:
            del table[name]
        table.update({name: value for name, value in content.items() if name not in _KEPT})
    elif len(table) != len(content) or any(a is not b for a, b in zip(table, content, strict=True)):
        table.clear()
        (table.update if isinstance(table, set) else table.extend)(content)
