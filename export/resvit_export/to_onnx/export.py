"""From an exported program to the float ONNX that every later stage works on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from torch import fx
from torch.export import ExportedProgram

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ResvitError, first_line
from resvit_engines.pictures.sizes import SizeRange
from resvit_export.loading.program.facts import (
    fixed_batch_of,
    input_names,
    inputs_of,
    line_of,
    output_names,
    reading_nodes,
)
from resvit_export.loading.program.run import runner_from_program
from resvit_export.to_onnx.branches import refuse_branches
from resvit_export.to_onnx.canonical import canonicalise, fix_batch, image_first, optimize, unique
from resvit_export.to_onnx.own_onnx import import_onnx
from resvit_export.to_onnx.report import (
    ExportReport,
    inputs_of_graph,
    measure_parity,
    report_of,
    selects_rows,
    write_model,
)
from resvit_export.to_onnx.translations import translations
from resvit_quantize.graph.external import EXTERNAL_ABOVE
from resvit_quantize.graph.shapes import say_sizes

__all__ = ["ExportReport", "import_onnx", "onnx_from_program"]

OPSETS = (20, 23)


_RESHAPES = (torch.ops.aten.reshape.default, torch.ops.aten.view.default)
_TURNS = (torch.ops.aten.transpose.int, torch.ops.aten.permute.default)
_SDPA, _CLONE = torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.clone.default


def onnx_from_program(
    program: ExportedProgram,
    path: Path,
    *,
    opset: int = 20,
    batch: int | None = None,
    external_above: int = EXTERNAL_ABOVE,
    sizes: SizeRange | None = None,
) -> ExportReport:
    """Write ``program`` as ONNX and hold its outputs against PyTorch's on random images.

    ``opset`` 20 is what TensorRT 10.3 reads; 23 keeps ``Attention`` and ``GroupNormalization`` whole. ``batch``
    None leaves the batch dynamic (size ``"batch"``), a number fixes it, and all shapes become constants. ``sizes`` are
    those of the image, of a program that takes several: ``"height"`` and ``"width"`` stay free, and the file says which
    they may be. The image is ``input`` float32 [B, C, H, W] and comes first, the output of a classifier ``logits``
    [B, K]. The same program gives the same bytes.

    Raises ``ResvitError`` for an operator that ONNX lacks, for a batch that the program cannot have, and where
    the outputs differ by more than rounding.
    """
    if opset not in OPSETS:
        raise ResvitError(f"Opset {opset} is not written.", f"Choose one of {', '.join(map(str, OPSETS))}.")
    inputs, own = inputs_of(program), fixed_batch_of(program)
    if own is not None and batch not in (None, own):
        raise ResvitError(
            f"The network works for batch {own} only, and batch {batch} was asked for.",
            f"Ask for batch {own}, or write its forward so that the batch size is free.",
        )
    names = output_names(program)
    model = _translate(program, opset)
    fixed = batch or own
    if fixed is not None:
        fix_batch(model, fixed)
    optimize(model)
    refuse_branches(model)
    canonicalise(model, input_names(program), names)
    image_first(model)
    if sizes is not None:
        say_sizes(model, sizes)
        inputs = inputs_of_graph(model)
    write_model(model, path, external_above)
    batches = (1, 2) if fixed is None else (fixed,)
    notes = () if batch is not None or own is None else (f"the batch is fixed to {own}: the network allows no other",)
    parity = measure_parity(
        runner_from_program(program),
        onnx_runner(path),
        inputs,
        batches,
        what="ONNX against PyTorch",
        sets=selects_rows(model),
        sizes=sizes.checked[1:] if sizes else (),
        graph=path,
    )
    return report_of(model, path, parity, batches, notes)


@contextlib.contextmanager
def _in_order(program: ExportedProgram) -> Iterator[None]:
    """Let what attention gives, turned, be brought into order before it is reshaped: ONNX has no strides.

    torch.onnx makes views of such reshapes, by the strides that are known of attention's output, and computes these
    strides anew: of another of its kernels, they are others. The copy is dropped with what else does nothing.
    """
    graph, made = program.graph, []
    for node in list(graph.nodes):
        turned = node.args[0] if node.target in _RESHAPES else None
        if isinstance(turned, fx.Node) and turned.target in _TURNS and getattr(turned.args[0], "target", None) is _SDPA:
            with graph.inserting_before(node):
                order = graph.call_function(_CLONE, (turned,), {"memory_format": torch.contiguous_format})
            order.meta = {**turned.meta, "val": turned.meta["val"].contiguous()}
            node.replace_input_with(turned, order)
            made.append((order, turned))
    try:
        yield
    finally:
        for order, turned in made:
            order.replace_all_uses_with(turned)
            graph.erase_node(order)


def _translate(program: ExportedProgram, opset: int) -> ir.Model:
    with warnings.catch_warnings(), _in_order(program):
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(
                program,
                opset_version=opset,
                dynamo=True,
                verbose=False,
                optimize=False,
                custom_translation_table=translations(program, opset),
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if reading := reading_nodes(program):
                raise ResvitError(
                    f"The network takes a number out of a tensor while it runs{line_of(reading[0])}, which the image "
                    "may change, and no graph can.",
                    "Leave out .item(), float() and int() there, and compute with the tensor.",
                ) from error
            reason = first_line(cause)
            raise ResvitError(
                f"The network cannot be written as ONNX opset {opset}: {reason}",
                "Replace that operation in the network by standard ones.",
            ) from error
    assert made is not None
    if made.model.opset_imports[""] != opset:
        raise ResvitError(
            f"The network needs ONNX opset {made.model.opset_imports['']}, and the target reads {opset}.",
            "Replace the newer operation, or choose a target with a newer TensorRT.",
        )
    return _with_names_of_their_own(made.model)


def _with_names_of_their_own(model: ir.Model) -> ir.Model:
    """Rename what an operator computes where a weight or input has that name: a buffer called ``index``, say."""
    taken = {str(value.name) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        for value in node.outputs:
            value.name = unique(str(value.name), taken)
    return model
