"""A module as an exported program, and a program as a function from arrays to arrays."""

from __future__ import annotations

import functools
import io
import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from resvit_calibrate.runtime.behaviour import couples_images, refuse_blind, refuse_random
from resvit_calibrate.runtime.runner import Runner, pieces
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ResvitError
from resvit_engines.files import write_atomic
from resvit_engines.pictures.sizes import MOST_PIXELS, SizeRange
from resvit_export.loading.axes.batch_axis import BROUGHT, batch_axis, with_batch_first
from resvit_export.loading.axes.open_sizes import makes_numbers, require_open_program, sizes_stay_free, step_of_module
from resvit_export.loading.inputs import IMAGE, TYPES, NetworkInput, in_order, random_feeds
from resvit_export.loading.user_code import KnownValues, is_library, left_out_note, tensors_alone, user_error
from resvit_quantize.pruning.copies import forgetting

_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in ("conv1d", "conv2d", "conv3d", "convolution", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm",
                 "conv_transpose2d", "scaled_dot_product_attention", "einsum")
)  # fmt: skip
COUPLED = "its answers depend on the other images of a batch; it is exported for batch 1"


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
            raise _failing(error, several, alone) from error
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
            raise _failing(error, several, alone) from error
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
                raise _failing(error, several, alone) from error
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
    why = "the network works for one batch size only; it is exported for batch 1"
    try:
        program = _export(module, *_examples(several, alone, 2), dynamic=True, sizes=sizes, numbers=numbers)
        said = _batch_first(program)
        _require_batched(program)
        _require_dense_float32(program)
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
    said = _batch_first(program)
    _require_batched(program)
    _require_dense_float32(program)
    return program, (*said, why)


def _batch_first(program: ExportedProgram) -> tuple[str, ...]:
    """Bring the batch of every output to the front; returns a note for each that had it elsewhere."""
    sizes = {_known(value.shape[0]) for value in _input_values(program).values()}
    if len(sizes) != 1:
        return ()
    axes = [batch_axis(shape, next(iter(sizes))) for shape in output_shapes(program)]
    if not any(axes):
        return ()
    names = [name for name, axis in zip(output_names(program), axes, strict=True) if axis]
    with_batch_first(program, axes)
    return tuple(f"output {name}: {BROUGHT}" for name in names)


def _require_batched(program: ExportedProgram) -> None:
    """Refuse outputs that never have one entry for each image, such as anchors that are alike for all."""
    nodes = program.graph.output_node().args[0]
    assert isinstance(nodes, (tuple, list))
    for name, shape, node in zip(output_names(program), output_shapes(program), nodes, strict=True):
        if isinstance(node, torch.fx.Node) and node.meta["val"].is_complex():
            raise ResvitError(
                f"The network's output {name} is complex, and no engine answers in complex numbers.",
                "Let its forward return torch.view_as_real of it, or its magnitude.",
            )
        if isinstance(node, torch.fx.Node) and free_unbacked_symbols(node.meta["val"].shape):
            raise ResvitError(
                f"The network's output {name} holds as much as an image happens to give: an engine's outputs have one "
                "entry for each image, and one size.",
                "End the network in front of what finds a varying number of things (nonzero, NMS, a mask as index), or "
                "let it give as many for every image (topk).",
            )
        if isinstance(shape[0], int) and shape[0] != (fixed_batch_of(program) or 1):
            raise ResvitError(
                f"The network's output {name} is {list(shape)} whatever the batch: there is no entry for each image.",
                "Leave it out of what the forward returns, or expand it along the batch.",
            )
        if 0 in shape:
            raise ResvitError(
                f"The network's output {name} is {list(shape)}: it holds no number.",
                "Check the sizes that its forward computes for this image.",
            )


def coupling_of(program: ExportedProgram) -> float | None:
    """How far an image's answers move with the other images of its batch (``couples_images``)."""
    sets, batch = selects_rows(program), fixed_batch_of(program)
    if drawing_nodes(program):
        return None  # each run differs from the last; that is said by itself
    return couples_images(runner_from_program(program), _drawn(program), batch=batch, sets=sets)


def selects_rows(program: ExportedProgram) -> bool:
    """Whether the program picks rows by score, so that their order hangs on rounding."""
    return any(node.target is torch.ops.aten.topk.default for node in program.graph.nodes)


def drawing_nodes(program: ExportedProgram) -> list[torch.fx.Node]:
    """The nodes that draw random numbers on which an output depends."""
    reached: set[torch.fx.Node] = set()
    pending = [program.graph.output_node()]
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending += node.all_input_nodes
    return [node for node in program.graph.nodes if node in reached and _draws(node)]


def _drawn(program: ExportedProgram) -> Callable[[int, np.random.Generator], Arrays]:
    """What draws random inputs of a program."""
    return functools.partial(random_feeds, inputs_of(program))


def _draws(node: torch.fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is torch.ops.aten.dropout.default:
        return node.args[2] is True and float(node.args[1]) > 0.0  # type: ignore[arg-type]
    return torch.Tag.nondeterministic_seeded in node.target.tags and not _never_draws(node)


def _never_draws(node: torch.fx.Node) -> bool:
    """Whether an operator that can draw numbers is told to draw none: attention with a dropout of 0."""
    arguments = {argument.name: argument.default_value for argument in node.target._schema.arguments}  # type: ignore[union-attr]
    arguments |= dict(zip(arguments, node.args, strict=False)) | dict(node.kwargs)
    share = arguments.get("dropout_p", arguments.get("p"))
    off = any(arguments.get(name) is False for name in ("train", "training"))
    return off or (isinstance(share, (int, float)) and float(share) == 0.0)


def refuse_random_program(program: ExportedProgram, name: str) -> None:
    """Refuse a program that draws random numbers, with the line of the user's that does, where it is known.

    Raises:
        ResvitError: INPUT.
    """
    drawing = drawing_nodes(program)
    where = ""
    if drawing:
        where = f": {drawing[0].target} draws random numbers{line_of(drawing[0])}"
    refuse_random(runner_from_program(program), _drawn(program), name, batch=fixed_batch_of(program) or 1, drawn=where)


def refuse_blind_program(program: ExportedProgram, name: str) -> None:
    """Refuse a program that answers every image alike.

    Raises:
        ResvitError: INPUT.
    """
    run, whole = runner_from_program(program), {*output_names(program)} - {*floating_outputs(program)}
    refuse_blind(run, _drawn(program), name, batch=fixed_batch_of(program) or 1, whole=whole)


def line_of(node: torch.fx.Node) -> str:
    """The line of the user's that a node came from, in brackets; empty where it is not known."""
    lines = re.findall(r'File "(.*)", line (\d+), in \w+\n\s*(.*)', str(node.meta.get("stack_trace", "")))
    lines = [line for line in lines if not is_library(line[0])] or lines
    return f" ({Path(lines[-1][0]).name}, line {lines[-1][1]}: {lines[-1][2]})" if lines else ""


def _require_dense_float32(program: ExportedProgram) -> None:
    """Refuse sparse tensors, and products in another precision: that is chosen here, and compared with float32."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    for node in itertools.chain.from_iterable(graph.nodes for graph in graphs):  # what autocasts has one of its own
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
            raise ResvitError(
                f"The network computes with {str(value.layout).removeprefix('torch.')} tensors{line_of(node)}, and no "
                "engine has any but dense ones.",
                "Write that part with dense tensors (to_dense()).",
            )
        product = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _PRODUCTS
        if product and isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            raise ResvitError(
                f"The network computes {node.target} in {str(value.dtype).removeprefix('torch.')}{line_of(node)}.",
                "Leave torch.autocast and casts out of its forward: precisions are chosen here, against float32.",
            )


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
        leaves = torch.utils._pytree.tree_leaves(answer)
        return {
            str(i): leaf.detach().float().numpy() for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
        }

    with torch.random.fork_rng(devices=[]):
        refuse_random(run, functools.partial(random_feeds, inputs), "The network")


def has_dynamic_batch(program: ExportedProgram) -> bool:
    """Whether the first dimension of the input is free."""
    return fixed_batch_of(program) is None


def fixed_batch_of(program: ExportedProgram) -> int | None:
    """The one batch size that the program takes; None for a dynamic one."""
    sizes = [_known(value.shape[0]) for value in _input_values(program).values()]
    fixed = [size for size in sizes if isinstance(size, int)]
    return fixed[0] if fixed else None


def inputs_of(program: ExportedProgram) -> tuple[NetworkInput, ...]:
    """What the program reads: the image first, called ``input``, and the others by their own names.

    An image whose height or width is free, within bounds, has the largest here; ``sizes_of`` tells the range.

    Raises:
        ResvitError: where an input has no batch, or sizes that are not fixed, or none of them is an image.
    """
    return in_order(list(_named_inputs(program).values()))


def input_shape_of(program: ExportedProgram) -> tuple[int, int, int]:
    """(C, H, W) of the program's image; raises ``ResvitError`` where it has none."""
    channels, height, width = inputs_of(program)[0].shape
    return channels, height, width


def sizes_of(program: ExportedProgram) -> SizeRange | None:
    """The range of sizes that the program's image may have; None where it has one size."""
    values = [value for value in _input_values(program).values() if _is_image(value)]
    if not values or all(isinstance(_known(size), int) for size in values[0].shape[2:]):
        return None
    (low, high), (left, right) = (_bounds(program, size) for size in values[0].shape[2:])
    return SizeRange((low, left), (high, right), (high, right))


def input_names(program: ExportedProgram) -> list[str]:
    """The names of ``inputs_of`` in the order in which the program itself takes them."""
    own = _named_inputs(program)
    image = next(name for name, item in own.items() if item.is_image)
    return [IMAGE if name == image else name for name in own]


def output_shapes(program: ExportedProgram) -> list[tuple[int | str, ...]]:
    """Shapes of the outputs, symbolic sizes as text.

    Raises:
        ResvitError: INPUT where an output is no tensor with one entry for each image.
    """
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    shapes = []
    for number, node in enumerate(outputs):
        value = node.meta.get("val") if isinstance(node, torch.fx.Node) else node
        if not isinstance(value, torch.Tensor) or not value.dim():
            told = "a single number" if isinstance(value, torch.Tensor) else f"{value!r}, no tensor"
            raise ResvitError(
                f"Output {number} of the program is {told}: there is no entry for each image.",
                "Export it again from a module that returns tensors [B, …] alone.",
            )
        shapes.append(tuple(_known(size) for size in value.shape))
    return shapes


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


def floating_outputs(program: ExportedProgram) -> tuple[str, ...]:
    """The names of the outputs that are floating, in the forward's order."""
    nodes = program.graph.output_node().args[0]
    assert isinstance(nodes, (tuple, list))
    named = zip(output_names(program), nodes, strict=True)
    return tuple(
        name for name, node in named if not isinstance(node, torch.fx.Node) or node.meta["val"].is_floating_point()
    )


def runner_from_program(program: ExportedProgram) -> Runner:
    """Run a program in PyTorch: {"input": float32 [B, C, H, W]} → {"logits": float32 [B, K]}, for example.

    A program of fixed batch size takes any number of images: it runs in pieces, the last one padded.
    """
    call, names, batch = program.module(), output_names(program), fixed_batch_of(program)
    inputs = {item.name: np.dtype(item.dtype) for item in inputs_of(program)}
    order, structure = input_names(program), program.call_spec.in_spec

    def run(arrays: Arrays) -> Arrays:
        whole = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in inputs.items()}
        outputs = []
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for piece, size in pieces(whole, batch or len(whole[IMAGE])):
                leaves = [torch.from_numpy(piece[name]) for name in order]
                positional, keywords = torch.utils._pytree.tree_unflatten(leaves, structure)
                answer = torch.utils._pytree.tree_leaves(call(*positional, **keywords))
                outputs.append([leaf.detach().float().numpy()[:size] for leaf in answer])
        return {name: np.concatenate([part[i] for part in outputs]) for i, name in enumerate(names)}

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
    usable = len(set(names)) == count and IMAGE not in names and all(name.isidentifier() for name in names)
    return names if usable else None


def _input_values(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The tensors that the program reads, by name, in its own order."""
    names = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    values = {str(node.name): node.meta.get("val") for node in nodes}
    odd = [name for name, value in values.items() if not isinstance(value, torch.Tensor) or not value.dim()]
    if odd or not values or len(values) != len(names):
        raise ResvitError(
            f"The network's input {', '.join(odd) or '(none)'} is no tensor with one entry for each image.",
            "Wrap it in a module whose forward takes tensors [B, …] alone.",
        )
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _named_inputs(program: ExportedProgram) -> dict[str, NetworkInput]:
    """The same as ``NetworkInput``s, by name, in the program's own order."""
    found: dict[str, NetworkInput] = {}
    for name, value in _input_values(program).items():
        shape = tuple(_known(size) for size in value.shape)
        if _is_image(value):
            shape = (*shape[:2], *(_largest(program, size) for size in value.shape[2:]))
        fixed = tuple(size for size in shape[1:] if isinstance(size, int))
        dtype = str(value.dtype).removeprefix("torch.")
        if len(fixed) != len(shape) - 1 or dtype not in TYPES:
            raise ResvitError(
                f"The program's input {name} is {dtype} {[str(size) for size in shape]}: all sizes but the batch, and "
                f"height and width of an image within bounds, must be fixed, and the type one of {', '.join(TYPES)}.",
                "Export the network for one size, or with torch.export.Dim('height', min=320, max=640).",
            )
        found[name] = NetworkInput(name, fixed, dtype)
    return found


def _is_image(value: torch.Tensor) -> bool:
    return value.dim() == 4 and value.dtype == torch.float32


def _bounds(program: ExportedProgram, size: int | torch.SymInt) -> tuple[int, int]:
    """The smallest and the largest that a size may be; what has no bound is as large as ``int`` of infinity."""
    known = _known(size)
    if isinstance(known, int):
        return known, known
    assert isinstance(size, torch.SymInt)
    span = program.range_constraints.get(size.node.expr)
    unbounded = span is None or not span.upper.is_number or span.upper > MOST_PIXELS
    return (1, MOST_PIXELS + 1) if span is None or unbounded else (max(int(span.lower), 1), int(span.upper))


def _largest(program: ExportedProgram, size: int | torch.SymInt) -> int | str:
    """A size as a number, the largest of a free one; as text where it has no bound."""
    largest = _bounds(program, size)[1]
    return largest if largest <= MOST_PIXELS else _known(size)


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


def _failing(error: Exception, several: Sequence[NetworkInput], alone: tuple[int, ...] | None) -> ResvitError:
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
    with torch.no_grad(), sizes_stay_free(module, numbers=numbers), warnings.catch_warnings():
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


def reading_nodes(program: ExportedProgram) -> list[torch.fx.Node]:
    """The nodes that take a number out of a tensor while the network runs, which no ONNX graph can hand on."""
    readers = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
    return [node for node in program.graph.nodes if node.target in readers]


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
