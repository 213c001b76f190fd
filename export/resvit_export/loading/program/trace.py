"""A module as an exported program."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from resvit_calibrate.runtime.behaviour import refuse_random
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import SizeRange
from resvit_export.loading.axes.open_sizes import makes_numbers, require_open_program, sizes_stay_free, step_of_module
from resvit_export.loading.inputs import IMAGE, NetworkInput, random_feeds
from resvit_export.loading.program.check import (
    COUPLED,
    ONE_BATCH,
    batch_first,
    coupling_of,
    refuse_blind_program,
    refuse_random_program,
    require_batched,
    require_dense_float32,
)
from resvit_export.loading.program.facts import has_dynamic_batch, output_names, reading_nodes
from resvit_export.loading.program.run import runner_from_program
from resvit_export.loading.user_code import KnownValues, left_out_note, tensors_alone, user_error
from resvit_quantize.pruning.answers import tensors_in
from resvit_quantize.pruning.copies import forgetting


def program_from_module(
    module: nn.Module, inputs: tuple[int, int, int] | Sequence[NetworkInput], sizes: SizeRange | None = None
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export ``module`` in eval mode for images [B, C, H, W], B dynamic where the module allows; also notes.

    ``inputs`` are (C, H, W) of the only argument, or all inputs by the names of the forward's parameters. ``sizes``
    leave height and width of that only argument free, H and W being the usual ones. A module that
    works for one batch size only, or whose images hang on each other, is exported for batch 1, and a note says so; so
    does one of outputs that are left out, since they are no tensors. Raises ``ResvitError`` with the user's own message
    and line where the forward raises or branches on values, and where two runs on one image differ.
    """
    module.eval()
    several = [item for item in inputs if isinstance(item, NetworkInput)]
    alone = None if several else tuple(size for size in inputs if isinstance(size, int))
    with forgetting(module), tensors_alone(module) as left_out:
        said: tuple[str, ...] = ()
        if sizes is not None:
            if alone is None:
                raise ResvitError(
                    f"A range of sizes ({sizes}) was asked for, and the network reads more than one image alone.",
                    "Name one size, and build one engine for each size that is needed.",
                )
            said = (_sizes_note(sizes, step_of_module(module, alone[0], sizes)),)
        try:
            with torch.no_grad():
                _call(module, *_examples(several, alone, 1))
        except ResvitError:
            raise
        except Exception as error:
            raise _failing(error, module, several, alone) from error
        notes = left_out_note(left_out)
        program, why = _free_program(module, several, alone, sizes)
        try:
            _refuse_changed_inputs(module, several, alone)
            refuse_random_program(program, "The network")
            if COUPLED not in why:  # an image alone may be all that is left of it: less the mean of a batch of one
                refuse_blind_program(program, "The network")
            _refuse_random_module(module, several, alone)
        except ResvitError:
            raise
        except Exception as error:
            raise _failing(error, module, several, alone) from error
    return program, (*notes, *said, *why)


def _sizes_note(sizes: SizeRange, step: int | None) -> str:
    steps = "" if step is None else f" in steps of {step}" if step > 1 else ", any of them"
    return f"it takes images of {sizes} pixels (height x width){steps}"


def _free_program(
    module: nn.Module,
    several: Sequence[NetworkInput],
    alone: tuple[int, ...] | None,
    sizes: SizeRange | None,
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """As the forward is written, or else, where that keeps a size which was to be free, with its ``int`` reading them.

    ``int`` and ``float`` are left alone at first: they also name types, to which only those of Python will do.
    """

    def tried(numbers: bool) -> tuple[ExportedProgram, tuple[str, ...]]:
        program, why = _exported(module, several, alone, sizes, numbers=numbers)
        if sizes is not None and alone is not None:
            names, run = output_names(program), runner_from_program(program)
            try:
                require_open_program(program, module, alone[0], sizes, names, run)
            except ResvitError:
                raise
            except Exception as error:
                raise _failing(error, module, several, alone) from error
        return program, why

    again = makes_numbers(module)
    try:
        made = tried(False)
        if not again or made[1] in ((), (COUPLED,)):
            return made
        refused = None
    except ResvitError as error:
        if not again:
            raise
        refused = error
    try:
        return tried(True)
    except ResvitError:
        if refused is not None:
            raise refused from None
        return made


def _exported(
    module: nn.Module,
    several: Sequence[NetworkInput],
    alone: tuple[int, ...] | None,
    sizes: SizeRange | None,
    *,
    numbers: bool,
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """With a dynamic batch, unless the module has none or its images hang on each other; and a note where not."""
    why = ONE_BATCH
    try:
        program = _export(module, *_examples(several, alone, 2), dynamic=True, sizes=sizes, numbers=numbers)
        said = batch_first(program)
        require_batched(program)
        require_dense_float32(program)
        if has_dynamic_batch(program):
            if coupling_of(program) is None:
                return program, said
            why = COUPLED
    except ResvitError:
        raise
    except Exception as error:
        if _branches_on_values(error):
            raise _not_exportable(error) from error
    try:
        program = _export(module, *_examples(several, alone, 1), dynamic=False, sizes=sizes, numbers=numbers)
    except Exception as error:
        raise _not_exportable(error) from error
    said = batch_first(program)
    require_batched(program)
    require_dense_float32(program)
    return program, (*said, why)


def _refuse_changed_inputs(module: nn.Module, several: Sequence[NetworkInput], alone: tuple[int, ...] | None) -> None:
    """Refuse a forward that writes into its image: who asks it twice about one image gets two answers."""
    feeds = random_feeds(tuple(several) or (NetworkInput(IMAGE, alone or ()),), 1, np.random.default_rng(0))
    given = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = _call(module, (), given) if several else _call(module, tuple(given.values()), {})
    changed = [name for name, tensor in given.items() if not np.array_equal(tensor.numpy(), feeds[name])]
    if changed:
        raise ResvitError(
            f"The network writes into its own {'image' if changed[0] == IMAGE else changed[0]} while it runs.",
            "Let its forward compute a new tensor: x = x * 2 instead of x.mul_(2).",
        )


def _refuse_random_module(module: nn.Module, several: Sequence[NetworkInput], alone: tuple[int, ...] | None) -> None:
    """Refuse a module that Python's or numpy's random numbers move: tracing makes constants of them."""
    inputs = tuple(several) or (NetworkInput(IMAGE, alone or ()),)

    def run(arrays: Arrays) -> Arrays:
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = _call(module, (), given) if several else _call(module, tuple(given.values()), {})
        return {str(number): tensor.detach().float().numpy() for number, tensor in enumerate(tensors_in(answer))}

    with torch.random.fork_rng(devices=[]):
        refuse_random(run, functools.partial(random_feeds, inputs), "The network")


_Arguments: TypeAlias = "tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]"


def _examples(several: Sequence[NetworkInput], alone: tuple[int, ...] | None, batch: int) -> _Arguments:
    """Arguments to trace with: by name where there are several, ones for integers."""
    if alone is not None:
        return (torch.zeros(batch, *alone),), {}
    make = {True: torch.zeros, False: torch.ones}
    return (), {
        item.name: make[item.dtype == "float32"](batch, *item.shape, dtype=getattr(torch, item.dtype))
        for item in several
    }


def _call(module: nn.Module, positional: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> object:
    return module(*positional, **named)


def _failing(
    error: Exception, module: nn.Module, several: Sequence[NetworkInput], alone: tuple[int, ...] | None
) -> ResvitError:
    given = {item.name for item in several}
    optional = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is None and name not in given
    ]
    if optional and "NoneType" in str(error):
        are = "is" if len(optional) == 1 else "are"
        return user_error(
            error,
            f"The network fails where {', '.join(optional)} {are} None, as by default",
            "Let its forward answer without (the loss is the training's), or wrap it in a module that does; what an "
            "engine is to read besides the image is named with --shape.",
        )
    if alone is None:
        told = ", ".join(map(str, several))
        return user_error(
            error, f"The network fails on the inputs {told}", "Check the sizes and types given with --shape."
        )
    shape = ", ".join(map(str, (1, *alone)))
    return user_error(
        error,
        f"The network fails on a batch of shape [{shape}]",
        "Check --input-shape (C,H,W); of a forward that takes more than the image, name all with --shape.",
    )


def _export(
    module: nn.Module,
    positional: tuple[torch.Tensor, ...],
    named: dict[str, torch.Tensor],
    *,
    dynamic: bool,
    sizes: SizeRange | None,
    numbers: bool,
) -> ExportedProgram:
    free = {0: Dim.AUTO(min=1)} if dynamic else {}
    for axis, (low, _, high) in enumerate(sizes.spans if sizes else (), 2):
        if low < high:
            free[axis] = Dim.AUTO(min=low, max=high)
    shapes: Any = None
    if free:
        shapes = tuple(free for _ in positional) if positional else dict.fromkeys(named, free)
    made: ExportedProgram | None = None
    # PyTorch prints the whole graph up to a line that it cannot follow; the error says which line it is.
    unheard = contextlib.redirect_stderr(io.StringIO())
    with torch.no_grad(), sizes_stay_free(module, numbers=numbers), warnings.catch_warnings(), unheard:
        warnings.simplefilter("ignore")
        try:
            made = export(module, positional, named or None, dynamic_shapes=shapes, strict=False)
            if reading_nodes(made) == []:
                return made
        except Exception as error:
            if not _branches_on_values(error):
                raise
        try:
            with KnownValues(module):
                return export(module, positional, named or None, dynamic_shapes=shapes, strict=False)
        except Exception:
            if made is None:
                raise
            return made


def _branches_on_values(error: Exception) -> bool:
    reason = str(error)
    return "data-dependent" in reason.lower() or "Could not guard" in reason


def _not_exportable(error: Exception) -> ResvitError:
    return user_error(
        error,
        "The network cannot be turned into a graph, since its forward depends on values or uses what torch.export "
        "does not know",
        "Write that line with tensor operations (torch.where) or move the decision into the constructor.",
    )
