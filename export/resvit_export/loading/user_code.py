"""The code that a user brought: whose line an error came from, and what a network returns, brought to tensors alone."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resvit_calibrate.readers.user.code import is_users
from resvit_engines.errors import ResvitError
from resvit_quantize.pruning.answers import parts_of

_SMALL = 64
"""Numbers in a weight or buffer whose values a forward may read."""
_NUMBERS = frozenset({"__bool__", "__int__", "__float__", "__index__", "item", "tolist"})
_HERE = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent


def user_error(error: BaseException, what: str, fix: str) -> ResvitError:
    """An error raised in the user's code, with its own message and the line of theirs that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not is_library(f.filename)]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    lines = [line for line in str(error).splitlines() if line.strip()]
    message = lines[0].strip()[:300] if lines else ""
    return ResvitError(f"{what}{place}: {type(error).__name__}: {message}", fix)


@contextlib.contextmanager
def told_as_user_errors(name: str) -> Iterator[None]:
    """Tell what the user's own code raises while the network ``name`` is loaded, wherever in it that may be.

    A module runs code of its owner's in its forward, and in ``train``, ``state_dict``, properties and hooks too. An
    error on the way through none of the user's files is ours, and stays what it is. ``SystemExit`` is never ours.
    """
    try:
        yield
    except ResvitError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = not any(is_users(frame.filename) for frame in frames if not frame.filename.startswith("<"))
        if ours and not isinstance(error, SystemExit):
            raise
        what = "ends the process" if isinstance(error, SystemExit) else "fails"
        raise user_error(
            error, f"The code of {name} {what} while it is loaded", "Mend that line; it runs when a network is loaded."
        ) from error


def is_library(filename: str) -> bool:
    """Whether a frame is of PyTorch, of Python's imports or of this package: no line that a user would mend."""
    path = Path(filename)
    return (
        filename.startswith("<")
        or path.is_relative_to(_HERE)
        or path.is_relative_to(_TORCH)
        or ("importlib" in path.parts or "contextlib.py" in path.parts)
    )


@contextlib.contextmanager
def tensors_alone(module: nn.Module) -> Iterator[list[str]]:
    """Let ``module`` return its tensors alone, in their own structure; gives what is left out, by place.

    The list is that of the last call. Raises ``ResvitError`` from the call where nothing is left.
    """
    forward, left_out = module.forward, []  # type: ignore[var-annotated]

    @functools.wraps(forward)
    def pruned(*args: Any, **kwargs: Any) -> Any:
        left_out.clear()
        answer = _pruned(forward(*args, **kwargs), "", left_out)
        if answer is None:
            raise ResvitError(
                f"The network returns no tensor with an entry for each image ({', '.join(left_out) or 'nothing'}).",
                "Let its forward return tensors [B, …].",
            )
        return answer

    own = "forward" in vars(module)
    module.forward = pruned
    try:
        yield left_out
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


class KnownValues(torch.overrides.TorchFunctionMode):
    """While a module is traced, let its forward read its own small weights and buffers: they are constant then.

    A flag that a layer sets at its first batch, a temperature that it learns, or a list of which layers mask, has a
    value; tracing forgets it, and ``if self.ready:`` and ``self.scale.item()`` fail. What is computed from such tensors
    alone is computed beside the trace, and handed out where Python asks for a number.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._own = [
            (place, name, tensor.detach().clone())
            for owner in module.modules()
            for place in (owner._buffers, owner._parameters)
            for name, tensor in place.items()
            if tensor is not None and 0 < tensor.numel() <= _SMALL
        ]
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``; beside it on the real values, where all its tensors are known."""
        named = kwargs or {}
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, named)) if isinstance(leaf, torch.Tensor)]
        known = tensors and all(_is_small(tensor) for tensor in tensors)
        if not known or any(self._value(tensor) is None for tensor in tensors):
            return func(*args, **named)
        real_args, real_named = torch.utils._pytree.tree_map_only(torch.Tensor, self._value, (args, named))
        if getattr(func, "__name__", "") in _NUMBERS:
            with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
                return func(*real_args, **real_named)
        answer = func(*args, **named)
        if isinstance(answer, torch.Tensor):
            with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
                real = func(*real_args, **real_named)
            if isinstance(real, torch.Tensor):
                self._known[id(answer)] = (answer, real)
        return answer

    def _value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        # Tracing puts other tensors in the place of the module's own.
        for place, name, real in self._own:
            if place.get(name) is tensor:
                self._known[id(tensor)] = (tensor, real)
                return real
        return None


def _is_small(tensor: torch.Tensor) -> bool:
    """Whether a tensor has few values at any batch: comparing a number that depends on it would fix the batch."""
    count = tensor.numel()
    return isinstance(count, int) and count <= _SMALL


def left_out_note(left_out: list[str]) -> tuple[str, ...]:
    """What to say of it."""
    return (f"left out of the outputs, since they are no tensors [B, …]: {', '.join(left_out)}",) if left_out else ()


def _pruned(value: Any, place: str, left_out: list[str]) -> Any:
    """``value`` without what is no tensor, in lists, tuples and dictionaries alone; None where nothing is left.

    It is the very object where it holds nothing else. Named tuples, dataclasses and dictionaries of a library's own
    become plain dictionaries with the same names: a program that is saved knows no other classes.
    """
    if isinstance(value, torch.Tensor) and value.dim():
        return value
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.Tensor, torch.SymInt, torch.SymFloat)):
        left_out.append(f"{place or 'the answer'} ({_told(value)})")
        return None
    parts = parts_of(value)
    if parts is None:
        raise ResvitError(
            f"The network returns a {type(value).__name__}{f' as {place}' if place else ''}, and no graph can.",
            "Let its forward return tensors [B, …], or lists, tuples, dictionaries or dataclasses of them.",
        )
    if isinstance(parts, dict):
        items = {key: _pruned(item, f"{place}.{key}" if place else str(key), left_out) for key, item in parts.items()}
        kept = {key: item for key, item in items.items() if item is not None}
        whole = len(kept) == len(parts) and all(kept[key] is item for key, item in parts.items())
        if kept and whole and type(value) in (dict, OrderedDict):
            return value
        return (OrderedDict(kept) if type(value) is OrderedDict else kept) or None
    listed = [_pruned(item, f"{place}[{index}]", left_out) for index, item in enumerate(parts)]
    left = [part for part in listed if part is not None]
    whole = len(left) == len(parts) and all(one is two for one, two in zip(listed, parts, strict=True))
    if left and whole and type(value) in (list, tuple):
        return value
    return (tuple(left) if isinstance(value, tuple) else left) or None


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a single number"
    return "None" if value is None else f"{type(value).__name__} {str(value)[:20]}"
