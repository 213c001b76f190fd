"""Where in a checkpoint the weights of a network are.

Training scripts put them below keys of their own, and frameworks put names of their own before and into the weights'
names. Both are one thing here: a checkpoint is flattened to names such as ``state_dict.model.stem.0.weight``, and a
place is whatever stands before the network's own name. The place that fits the most of the network's tensors, by name
and shape, is the one; where several fit equally, averaged weights go first, and the user is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resvit_engines.errors import ResvitError
from resvit_export.loading.weights.file import LostArray

WRAPPER_SEGMENTS = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_forward_module", "_fsdp_wrapped_module", "_fpw_module"}
)
"""What torch.compile, activation checkpointing, Lightning's Fabric and FSDP put anywhere into names."""
_PARALLEL = "module"
"""What DataParallel and DeepSpeed put there; some networks have a part of that name themselves."""
PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.", "net.", "backbone.")
"""What usually stands before all names, for telling people of a checkpoint whose network is not known."""
COUNTERS = frozenset({"n_averaged"})
"""Tensors beside averaged weights that are none themselves."""

_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|avg|teacher)([._]|$)")
_LEARNING = re.compile(r"(^|_)online(_|$)")
"""What stands beside the averaged weights in one dictionary: those that they are the average of."""
_TOP = "."
_DEEPEST, _MOST_KEYS, _LONGEST_NAME = 32, 500_000, 1000
_MOST_PARTS, _MOST_PLACES, _NAMED = 48, 16, 5


@dataclass(frozen=True)
class Flat:
    """All tensors of a checkpoint by their full names."""

    tensors: Mapping[str, torch.Tensor]
    holders: Mapping[str, str]
    """By full name, the keys that lead to the dictionary that it is in, each with a dot behind it."""
    keys: tuple[str, ...]
    """The outermost keys, whatever they hold."""


@dataclass(frozen=True)
class Place:
    """Weights below one ``prefix`` (with its final dot, or empty): full names by the names that the network knows."""

    prefix: str
    path: str
    """The part of the prefix that is keys of dictionaries; what is behind it stands in the weights' own names."""
    names: Mapping[str, str]
    fitting: int
    """How many have the shape that the network wants."""
    unexpected: tuple[str, ...]
    """Full names of what lies there and is no tensor of the network."""
    beside: tuple[str, ...]
    """Full names of what lies in the same dictionaries, but not behind the prefix."""

    @property
    def key(self) -> str:
        """What ``--checkpoint-key`` calls it."""
        return self.prefix.removesuffix(".") or _TOP

    @property
    def averaged(self) -> bool:
        """Whether its name says that these are weights averaged over training."""
        return is_averaged(self.key)


def is_averaged(key: str) -> bool:
    """Whether keys with dots between them lead to averaged weights: the innermost that says so counts."""
    for part in reversed(key.lower().split(".")):
        if _AVERAGED.search(part):
            return True
        if _LEARNING.search(part):
            return False
    return False


def flattened(content: Any, path: Path) -> Flat:
    """All tensors below dictionaries with text as keys; one that contains itself is not entered again.

    Raises:
        ResvitError: where there are none, or two have one full name.
    """
    tensors: dict[str, torch.Tensor] = {}
    holders: dict[str, str] = {}
    waiting: list[tuple[str, tuple[int, ...], Mapping[Any, Any]]] = []
    if isinstance(content, Mapping):
        waiting.append(("", (id(content),), content))
    count = 0
    while waiting and count < _MOST_KEYS:
        holder, around, node = waiting.pop()
        below = []
        for key, value in node.items():
            count += 1
            if not isinstance(key, str) or len(holder) + len(key) > _LONGEST_NAME:
                continue
            name = holder + key
            if isinstance(value, torch.Tensor):
                if name in tensors:
                    raise ResvitError(
                        f"{path} holds two tensors called {name}.", "Save the weights again, under names of their own."
                    )
                tensors[name], holders[name] = value, holder
            elif isinstance(value, Mapping) and id(value) not in around and len(around) < _DEEPEST:
                below.append((f"{name}.", (*around, id(value)), value))
        waiting += reversed(below)  # in the file's own order
    keys = tuple(str(key)[:60] for key in content) if isinstance(content, Mapping) else ()
    if not tensors and any(isinstance(value, LostArray) for value in _values_of(content)):
        raise ResvitError(
            f"{path} holds arrays of NumPy in place of weights.",
            "Save them as tensors: torch.save({name: torch.from_numpy(array) for name, array in found.items()}, path).",
        )
    if not tensors:
        found = f"the keys {', '.join(keys[:8])}" if keys else f"a {type(content).__name__}"
        raise ResvitError(
            f"{path} holds no weights that could be found: it holds {found}.",
            "Give a file with the network's state_dict() in it, at the top or below any keys.",
        )
    return Flat(tensors, holders, keys)


def _values_of(content: Any) -> Iterator[Any]:
    """What a dictionary holds, and dictionaries in it."""
    for value in content.values() if isinstance(content, Mapping) else ():
        yield from value.values() if isinstance(value, Mapping) else (value,)


def places_for(flat: Flat, shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """Every place that holds weights of a network with tensors of these ``shapes`` by name, the best first.

    What wraps the network as a whole counts for nothing on either side: a checkpoint of its only part fits it.
    """
    found = _ranked(flat, shapes, WRAPPER_SEGMENTS)
    if any(f".{_PARALLEL}." in name for name in flat.tensors):
        found += _ranked(flat, shapes, WRAPPER_SEGMENTS | {_PARALLEL})
    outermost = {name.partition(".")[0] for name in shapes}
    if len(outermost) == 1 and all("." in name for name in shapes):
        found += _ranked(flat, shapes, WRAPPER_SEGMENTS, outer=f"{outermost.pop()}.")
    found.sort(key=lambda place: (-place.fitting, len(place.unexpected), -len(place.names), not place.averaged))
    different: dict[frozenset[str], Place] = {}
    for place in found:
        different.setdefault(frozenset(place.names.values()), place)
    return list(different.values())


def place_named(found: list[Place], flat: Flat, key: str, path: Path) -> Place:
    """The place that the user named by its key, or by a part of it.

    Raises:
        ResvitError: where no weights of the network are there.
    """
    for fits in (str.__eq__, lambda own, said: own.startswith(f"{said}."), lambda own, said: f".{said}." in f".{own}."):
        if named := [place for place in found if fits(place.key, key)]:
            return named[0]
    count = sum(name.startswith(f"{key}.") for name in flat.tensors)
    raise ResvitError(
        f"{path} has {f'{count} tensors, but none of the network,' if count else 'nothing'} below '{key}'.",
        f"The network's tensors are below {' or '.join(repr(place.key) for place in found[:_NAMED])} ('.' is the top)."
        if found
        else f"Its outermost keys are {', '.join(flat.keys[:8])}.",
    )


def likely_place(flat: Flat) -> tuple[str, dict[str, torch.Tensor], tuple[str, ...]]:
    """Of a checkpoint whose network is not known, the dictionary with the most tensors, and others with as many.

    Returns its keys with dots between them, the tensors in it by name, and the others' keys. What optimisers keep is
    numbered, and not among them.
    """
    dictionaries: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.tensors.items():
        holder = flat.holders[name]
        dictionaries.setdefault(holder, {})[name[len(holder) :]] = tensor
    most = max(map(len, dictionaries.values()))
    first, *others = sorted(
        (holder for holder, tensors in dictionaries.items() if len(tensors) == most),
        key=lambda holder: not is_averaged(holder),
    )
    return first.removesuffix("."), dictionaries[first], tuple(other.removesuffix(".") for other in others)


def _ranked(flat: Flat, shapes: Mapping[str, tuple[int, ...]], drop: frozenset[str], outer: str = "") -> list[Place]:
    """Places under which names of the network are, those behind its ``outer`` part: all prefixes that occur."""
    wanted = {_joined(name.removeprefix(outer).split("."), drop): name for name in shapes}
    if len(wanted) < len(shapes):  # the network itself has parts of these names
        wanted, drop = {name.removeprefix(outer): name for name in shapes}, frozenset()
    names: dict[str, dict[str, str]] = {}
    for full in flat.tensors:
        for prefix, rest in _cuts(full, drop):
            if rest in wanted:
                names.setdefault(prefix, {}).setdefault(wanted[rest], full)
    fitting = {
        prefix: sum(_shape(flat.tensors[full]) == shapes[name] for name, full in own.items())
        for prefix, own in names.items()
    }
    likely = sorted(names, key=lambda prefix: (-fitting[prefix], -len(names[prefix])))[:_MOST_PLACES]
    return [_place(flat, prefix, names[prefix], fitting[prefix]) for prefix in names if prefix in likely]


def _place(flat: Flat, prefix: str, names: Mapping[str, str], fitting: int) -> Place:
    used = set(names.values())
    holders = {flat.holders[full] for full in used}
    rest = [
        full
        for full, holder in flat.holders.items()
        if holder in holders and full not in used and full[len(holder) :] not in COUNTERS
    ]
    path = min(holders, key=len)
    return Place(
        prefix,
        path if prefix.startswith(path) else prefix,
        names,
        fitting,
        tuple(full for full in rest if full.startswith(prefix)),
        tuple(full for full in rest if not full.startswith(prefix)),
    )


def _cuts(full: str, drop: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Every way to cut a full name into what stands before a network's name, and that name."""
    parts = full.split(".")
    for cut in range(len(parts) if len(parts) <= _MOST_PARTS else 0):
        if not cut or parts[cut] not in drop:  # a wrapper belongs to what stands before
            yield "".join(f"{part}." for part in parts[:cut]), _joined(parts[cut:], drop)


def _joined(parts: list[str], drop: frozenset[str]) -> str:
    return ".".join(part for part in parts if part not in drop)


def _shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    return None if tensor.is_nested else tuple(tensor.shape)
