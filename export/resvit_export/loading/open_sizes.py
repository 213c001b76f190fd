"""Whether a network takes images of several sizes, and whether its exported program then computes what it does.

Tracing tells neither: a sum of tokens and a fixed position embedding is traced as if their numbers were always the
same, and what a forward computes from sizes with Python's numbers becomes a constant. So the module itself is run at
the sizes of the range, before it is exported, and the program afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from resvit_calibrate.runtime.parity import differences
from resvit_calibrate.runtime.runner import Runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import Size, SizeRange, in_multiples
from resvit_export.loading.inputs import IMAGE
from resvit_export.loading.user_code import user_error

STEPS = (1, 2, 4, 8, 16, 32, 64, 7, 14, 28)
"""In what sizes may grow: strides of trunks, patches and windows."""
_USUAL_STEP = 32
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
        leaves = torch.utils._pytree.tree_leaves(module(image))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
