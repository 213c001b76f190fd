"""Whether a network takes images of several sizes, and whether its exported program then computes what it does.

Tracing tells neither: a sum of tokens and a fixed position embedding is traced as if their numbers were always the
same, and what a forward computes from sizes with Python's numbers becomes a constant. So the module itself is run at
the sizes of the range, before it is exported, and the program afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from resvit_calibrate.runtime.parity import differences
from resvit_calibrate.runtime.runner import Runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import Size, SizeRange, in_multiples
from resvit_export.loading.inputs import IMAGE
from resvit_export.loading.user_code import user_error
from resvit_quantize.pruning.answers import tensors_in

STEPS = (1, 2, 4, 8, 16, 32, 64, 7, 14, 28)
"""In what sizes may grow: strides of trunks, patches and windows."""
_USUAL_STEP = 32
_NUMBERS = re.compile(r"\b(?:int|float|torch_int|torch_float|linspace)\(")
_ONE_SIZE = "Name one size, as in --input-shape {}, and build one engine for each size that is needed"


def step_of_module(module: nn.Module, channels: int, sizes: SizeRange) -> int | None:
    """Run the module at every checked size, and find in which steps sizes may grow from the smallest one.

    Returns None where no step of ``STEPS`` that leads from the smallest size to the others works.

    Raises:
        ResvitError: INPUT where the module fails at one of the sizes, with its own words and what to do instead.
    """
    for size in sizes.checked:
        try:
            _leaves(module, channels, size)
        except Exception as error:
            raise _refusal(module, channels, sizes, size, error) from error
    open_sides = [low < high for low, _, high in sizes.spans]
    spans = [abs(a - b) for span in sizes.spans for a in span for b in span]
    for step in STEPS:
        grown = tuple(side + step * grows for side, grows in zip(sizes.smallest, open_sides, strict=True))
        if any(span % step for span in spans) or not sizes.holds((grown[0], grown[1])):
            continue
        if _runs(module, channels, (grown[0], grown[1])):
            return step
    return None


def require_open_program(
    program: ExportedProgram, module: nn.Module, channels: int, sizes: SizeRange, names: list[str], run: Runner
) -> None:
    """Hold the program against the module on random images of every checked size.

    ``names`` are those of the program's outputs, ``run`` is the program as a runner.

    Raises:
        ResvitError: INPUT where the program is of one size, fails at another or answers otherwise.
    """
    sets = any(node.target is torch.ops.aten.topk.default for node in program.graph.nodes)

    def original(arrays: Arrays) -> Arrays:
        answers = _answers(module, torch.from_numpy(arrays[IMAGE]))
        return dict(zip(names, (answer.detach().float().numpy() for answer in answers), strict=True))

    for size in sizes.checked:
        image = np.random.default_rng(0).standard_normal((1, channels, *size), dtype=np.float32)
        try:
            found = differences(original, run, {IMAGE: image}, sets=sets)
        except Exception as error:
            raise _specialised(module, channels, sizes, size, f"its program fails: {_reason(error)}") from error
        for name, one in found.items():
            if not one.same and not one.chaotic:
                told = f"output {name} is {list(one.shapes[1])} instead of {list(one.shapes[0])}"
                if one.shapes[0] == one.shapes[1]:
                    told = f"output {name} differs by {one.error:.3g} of {one.largest:.3g}"
                raise _specialised(module, channels, sizes, size, told)


def makes_numbers(module: nn.Module) -> bool:
    """Whether a file that the network is written in makes Python numbers, perhaps of sizes."""
    return any(_NUMBERS.search(_source(str(place.get("__name__")))) for place in _places(module))


@contextlib.contextmanager
def sizes_stay_free(module: nn.Module, *, numbers: bool) -> Iterator[None]:
    """Let ``len(tensor)`` give a size that may stay free, in the files that the network is written in.

    Python makes a number of whatever ``len`` returns, which fixes the batch to that of the example. ``numbers`` does
    the same to ``int`` and ``float``, to what transformers calls instead of them, and to ``torch.linspace``.
    """
    read: dict[str, Any] = {"len": _length}
    if numbers:
        read |= {"int": _Int, "float": _Float, "torch_int": _Int, "torch_float": _Float}
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for place in _places(module):
        for name, ours in read.items():
            if (name in place) == name.startswith(
                "torch_"
            ):  # a built-in that is not hidden, or an import that is there
                changed.append((place, name, place.get(name)))
                place[name] = ours
    try:
        with _FreeSteps() if numbers else contextlib.nullcontext():
            yield
    finally:
        for place, name, own in changed:
            if own is None:
                del place[name]
            else:
                place[name] = own


def _places(module: nn.Module) -> list[dict[str, Any]]:
    """The globals of the files that the network is written in."""
    names = {type(part).__module__ for part in module.modules()}
    return [vars(sys.modules[name]) for name in sorted(names) if name in sys.modules and not name.startswith("torch.")]


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return ""


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) else len(value)


class _FreeSteps(TorchFunctionMode):
    """``torch.linspace`` of as many steps as a free size is: torch.export keeps the number of the example."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            given = dict(zip(("start", "end", "steps"), args, strict=False)) | kwargs
            start, end, steps = (given.pop(name, None) for name in ("start", "end", "steps"))
            if isinstance(steps, torch.SymInt) and not any(isinstance(x, torch.Tensor) for x in (start, end)):
                kind = given.pop("dtype", None) or torch.get_default_dtype()
                count: Any = steps
                gaps = torch.sym_max(count - 1, 1)  # type: ignore[no-untyped-call]
                return start + torch.arange(count, dtype=kind, **given) * ((end - start) / gaps)
        return func(*args, **kwargs)


class _Like(type):
    """What stands for a type of Python: an instance of that is one of it."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.__bases__)


class _Int(int, metaclass=_Like):
    """``int``, but for a size that is free: that stays so."""

    def __new__(cls, *values: Any, **named: Any) -> Any:
        symbolic = bool(values) and isinstance(values[0], (torch.SymInt, torch.SymFloat))
        return torch.sym_int(values[0]) if symbolic else int(*values, **named)  # type: ignore[no-untyped-call]


class _Float(float, metaclass=_Like):
    """``float``, but for a size that is free: that stays so."""

    def __new__(cls, *values: Any) -> Any:
        symbolic = bool(values) and isinstance(values[0], (torch.SymInt, torch.SymFloat))
        return torch.sym_float(values[0]) if symbolic else float(*values)  # type: ignore[no-untyped-call]


def _refusal(module: nn.Module, channels: int, sizes: SizeRange, size: Size, error: Exception) -> ResvitError:
    multiples = in_multiples(sizes, _USUAL_STEP)
    fitting = multiples != sizes and all(_runs(module, channels, other) for other in multiples.checked)
    if fitting and not multiples.is_one:
        fix = f"It takes multiples of {_USUAL_STEP}: give --input-shape {channels}x{multiples}."
    else:
        fix = f"{_one_size(module, channels, sizes)}."
    height, width = size
    return user_error(error, f"The network does not take images of {height}x{width}, which {sizes} asks for", fix)


def _specialised(module: nn.Module, channels: int, sizes: SizeRange, size: Size, why: str) -> ResvitError:
    height, width = size
    return ResvitError(
        f"Exported for {sizes}, the network answers images of {height}x{width} otherwise than it does itself: {why}. "
        "Its forward makes Python numbers of the size, or keeps what it computed for another one.",
        f"{_one_size(module, channels, sizes)}; or let its forward compute with tensor.shape alone.",
    )


def _one_size(module: nn.Module, channels: int, sizes: SizeRange) -> str:
    """What to do instead of a range; timm's transformers can be told to resize their position embedding."""
    hint = ""
    if getattr(module, "dynamic_img_size", None) is False:
        hint = " (or let it resize its position embedding: --model-arg dynamic_img_size=true)"
    return _ONE_SIZE.format("x".join(map(str, (channels, *sizes.usual)))) + hint


def _runs(module: nn.Module, channels: int, size: Size) -> bool:
    try:
        _leaves(module, channels, size)
    except Exception:  # noqa: BLE001  whatever a forward raises
        return False
    return True


def _leaves(module: nn.Module, channels: int, size: Size) -> list[torch.Tensor]:
    return _answers(module, torch.zeros(1, channels, *size))


def _answers(module: Callable[..., object], image: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tensors_in(module(image))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
