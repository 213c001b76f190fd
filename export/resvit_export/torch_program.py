"""A module as an exported program, and a program as a function from arrays to arrays."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from resvit_calibrate.runtime import Arrays, Runner
from resvit_engines.errors import ResvitError
from resvit_engines.files import write_atomic
from resvit_export.factories import user_error

INPUT = "input"


def program_from_module(
    module: nn.Module, input_shape: tuple[int, int, int]
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export ``module`` in eval mode for images [B, C, H, W], B dynamic where the module allows; also notes.

    A module that works for one batch size only is exported for batch 1, and a note says so. Raises
    ``ResvitError`` with the user's own message and line where the forward raises or branches on values.
    """
    module.eval()
    try:
        with torch.no_grad():
            module(torch.zeros(1, *input_shape))
    except Exception as error:
        shape = ", ".join(map(str, (1, *input_shape)))
        raise user_error(
            error,
            f"The network fails on a batch of shape [{shape}]",
            "Check --input-shape (C,H,W), and that forward takes one image tensor.",
        ) from error
    try:
        program = _export(module, torch.zeros(2, *input_shape), dynamic=True)
        if has_dynamic_batch(program):
            return program, ()
    except Exception as error:
        reason = str(error)
        if "data-dependent" in reason.lower() or "Could not guard" in reason:
            raise _not_exportable(error) from error
    try:
        program = _export(module, torch.zeros(1, *input_shape), dynamic=False)
    except Exception as error:
        raise _not_exportable(error) from error
    return program, ("the network works for one batch size only; it is exported for batch 1",)


def has_dynamic_batch(program: ExportedProgram) -> bool:
    """Whether the first dimension of the input is free."""
    return fixed_batch_of(program) is None


def fixed_batch_of(program: ExportedProgram) -> int | None:
    """The one batch size that the program takes; None for a dynamic one."""
    size = _known(_input_value(program).shape[0])
    return size if isinstance(size, int) else None


def input_shape_of(program: ExportedProgram) -> tuple[int, int, int]:
    """(C, H, W) of the program's one image input; raises ``ResvitError`` where it has another signature."""
    shape = tuple(_known(size) for size in _input_value(program).shape)
    fixed = [size for size in shape[1:] if isinstance(size, int)]
    if len(shape) != 4 or len(fixed) != 3:
        raise ResvitError(
            f"The program's input has the shape {[str(size) for size in shape]}, not [B, C, H, W] with fixed C, H, W.",
            "Export the network for one image size, with one image tensor as input.",
        )
    return fixed[0], fixed[1], fixed[2]


def output_shapes(program: ExportedProgram) -> list[tuple[int | str, ...]]:
    """Shapes of the outputs, symbolic sizes as text."""
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    return [tuple(_known(size) for size in node.meta["val"].shape) for node in outputs]


def output_names(program: ExportedProgram) -> list[str]:
    """The keys of the dictionary, or the fields of the named tuple, that the forward returns.

    Others have no names: ``logits`` for one output [B, K], ``output`` for one of another shape, ``output_0`` and on
    for several.
    """
    shapes = output_shapes(program)
    if (own := _own_names(program, len(shapes))) is not None:
        return own
    if len(shapes) == 1:
        return ["logits" if len(shapes[0]) == 2 else "output"]
    return [f"output_{index}" for index in range(len(shapes))]


def runner_from_program(program: ExportedProgram) -> Runner:
    """Run a program in PyTorch: {"input": float32 [B, C, H, W]} → {"logits": float32 [B, K]}, for example.

    A program of fixed batch size takes any number of images: it runs in pieces, the last one padded.
    """
    return _runner(program.module(), output_names(program), fixed_batch_of(program))


def _runner(call: Callable[..., object], names: list[str], batch: int | None) -> Runner:
    def run(arrays: Arrays) -> Arrays:
        (images,) = arrays.values()
        size = batch or len(images)
        pieces = []
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for start in range(0, len(images), size):
                piece = np.ascontiguousarray(images[start : start + size], dtype=np.float32)
                padding = np.repeat(piece[-1:], size - len(piece), axis=0)
                leaves = torch.utils._pytree.tree_leaves(call(torch.from_numpy(np.concatenate([piece, padding]))))
                pieces.append([leaf.float().numpy()[: len(piece)] for leaf in leaves])
        return {name: np.concatenate([piece[i] for piece in pieces]) for i, name in enumerate(names)}

    return run


def write_by_memory(path: Path, save: Callable[[io.BytesIO], None]) -> None:
    """Write a file that PyTorch makes by way of memory: its own writer aborts the process on a full disk."""
    buffer = io.BytesIO()
    save(buffer)
    write_atomic(path, bytes(buffer.getbuffer()))


def _known(size: int | torch.SymInt) -> int | str:
    """A size as a number, also where tracing has pinned its symbol to one; a free size as text."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression)


def _own_names(program: ExportedProgram, count: int) -> list[str] | None:
    """The names that the outputs have in the forward's own structure, None where they have none that can be used."""
    spec = program.call_spec.out_spec
    if spec is None or spec.num_leaves != count:
        return None
    try:
        answer = torch.utils._pytree.tree_unflatten(list(range(count)), spec)
    except Exception:  # noqa: BLE001 a structure of a library that isn't loaded
        return None
    fields = getattr(answer, "_fields", None)
    named = dict(zip(fields, answer, strict=True)) if fields else answer
    if not isinstance(named, Mapping):
        return None
    found: dict[int, str] = {}
    for name, part in named.items():
        leaves = torch.utils._pytree.tree_leaves(part)
        found |= {leaf: str(name) if len(leaves) == 1 else f"{name}_{i}" for i, leaf in enumerate(leaves)}
    names = [found[index] for index in range(count)]
    usable = len(set(names)) == count and INPUT not in names and all(name.isidentifier() for name in names)
    return names if usable else None


def _input_value(program: ExportedProgram) -> torch.Tensor:
    names = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(nodes) != 1 or not isinstance(nodes[0].meta.get("val"), torch.Tensor):
        raise ResvitError(
            f"The network takes {len(names)} inputs; one image tensor [B, C, H, W] is expected.",
            "Wrap it in a module whose forward takes the image alone.",
        )
    value: torch.Tensor = nodes[0].meta["val"]
    return value


def _export(module: nn.Module, images: torch.Tensor, *, dynamic: bool) -> ExportedProgram:
    shapes = ({0: Dim.AUTO(min=1)},) if dynamic else None
    with torch.no_grad(), _symbolic_len(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(module, (images,), dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _symbolic_len(module: nn.Module) -> Iterator[None]:
    """Let ``len(tensor)`` give a size that may stay free, in the files that the network is written in.

    Python makes a number of whatever ``len`` returns, which fixes the batch to that of the example.
    """
    places = [vars(sys.modules[name]) for name in {type(part).__module__ for part in module.modules()}]
    own = [place for place in places if "len" not in place and not str(place.get("__name__")).startswith("torch.")]

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) else len(value)

    for place in own:
        place["len"] = length
    try:
        yield
    finally:
        for place in own:
            del place["len"]


def _not_exportable(error: Exception) -> ResvitError:
    return user_error(
        error,
        "The network cannot be turned into a graph, since its forward depends on values or uses what torch.export "
        "does not know",
        "Write that line with tensor operations (torch.where) or move the decision into the constructor.",
    )
