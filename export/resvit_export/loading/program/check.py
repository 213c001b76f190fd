"""What is refused of a program that was exported: mixed images, random numbers, a blind network, other types."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from resvit_calibrate.runtime.behaviour import couples_images, refuse_blind, refuse_random
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ResvitError
from resvit_export.loading.axes.batch_axis import BROUGHT, batch_axis, with_batch_first
from resvit_export.loading.inputs import random_feeds
from resvit_export.loading.program.facts import (
    drawing_nodes,
    fixed_batch_of,
    floating_outputs,
    input_values,
    inputs_of,
    known_size,
    line_of,
    output_names,
    output_shapes,
    selects_rows,
)
from resvit_export.loading.program.run import runner_from_program

_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in ("conv1d", "conv2d", "conv3d", "convolution", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm",
                 "conv_transpose2d", "scaled_dot_product_attention", "einsum")
)  # fmt: skip
ONE_BATCH = "the network works for one batch size only; it is exported for batch 1"
COUPLED = "its answers depend on the other images of a batch; it is exported for batch 1"


def batch_first(program: ExportedProgram) -> tuple[str, ...]:
    """Bring the batch of every output to the front; returns a note for each that had it elsewhere."""
    sizes = {known_size(value.shape[0]) for value in input_values(program).values()}
    if len(sizes) != 1:
        return ()
    axes = [batch_axis(shape, next(iter(sizes))) for shape in output_shapes(program)]
    if not any(axes):
        return ()
    names = [name for name, axis in zip(output_names(program), axes, strict=True) if axis]
    with_batch_first(program, axes)
    return tuple(f"output {name}: {BROUGHT}" for name in names)


def require_batched(program: ExportedProgram) -> None:
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


def _drawn(program: ExportedProgram) -> Callable[[int, np.random.Generator], Arrays]:
    """What draws random inputs of a program."""
    return functools.partial(random_feeds, inputs_of(program))


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


def require_dense_float32(program: ExportedProgram) -> None:
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
