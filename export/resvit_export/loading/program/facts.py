"""What an exported program tells of itself: its inputs and outputs, their names, shapes and sizes, its batch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import MOST_PIXELS, SizeRange
from resvit_export.loading.inputs import IMAGE, TYPES, NetworkInput, in_order
from resvit_export.loading.user_code import is_library


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


def line_of(node: torch.fx.Node) -> str:
    """The line of the user's that a node came from, in brackets; empty where it is not known."""
    lines = re.findall(r'File "(.*)", line (\d+), in \w+\n\s*(.*)', str(node.meta.get("stack_trace", "")))
    lines = [line for line in lines if not is_library(line[0])] or lines
    return f" ({Path(lines[-1][0]).name}, line {lines[-1][1]}: {lines[-1][2]})" if lines else ""


def has_dynamic_batch(program: ExportedProgram) -> bool:
    """Whether the first dimension of the input is free."""
    return fixed_batch_of(program) is None


def fixed_batch_of(program: ExportedProgram) -> int | None:
    """The one batch size that the program takes; None for a dynamic one."""
    sizes = [known_size(value.shape[0]) for value in input_values(program).values()]
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
    values = [value for value in input_values(program).values() if _is_image(value)]
    if not values or all(isinstance(known_size(size), int) for size in values[0].shape[2:]):
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
        shapes.append(tuple(known_size(size) for size in value.shape))
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


def known_size(size: int | torch.SymInt) -> int | str:
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


def input_values(program: ExportedProgram) -> dict[str, torch.Tensor]:
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
    for name, value in input_values(program).items():
        shape = tuple(known_size(size) for size in value.shape)
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
    known = known_size(size)
    if isinstance(known, int):
        return known, known
    assert isinstance(size, torch.SymInt)
    span = program.range_constraints.get(size.node.expr)
    unbounded = span is None or not span.upper.is_number or span.upper > MOST_PIXELS
    return (1, MOST_PIXELS + 1) if span is None or unbounded else (max(int(span.lower), 1), int(span.upper))


def _largest(program: ExportedProgram, size: int | torch.SymInt) -> int | str:
    """A size as a number, the largest of a free one; as text where it has no bound."""
    largest = _bounds(program, size)[1]
    return largest if largest <= MOST_PIXELS else known_size(size)


def reading_nodes(program: ExportedProgram) -> list[torch.fx.Node]:
    """The nodes that take a number out of a tensor while the network runs, which no ONNX graph can hand on."""
    readers = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
    return [node for node in program.graph.nodes if node.target in readers]
