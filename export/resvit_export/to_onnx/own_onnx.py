"""Take a user's own float ONNX: checked, and brought into the form that our export writes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from resvit_calibrate.runtime.behaviour import coupled_error, couples_images, refuse_random
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ResvitError
from resvit_engines.files import sha256_file
from resvit_export.loading.inputs import IMAGE, ShapeWish, in_order, random_feeds
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.to_onnx.canonical import canonicalise, image_first, infer_shapes, optimize
from resvit_export.to_onnx.report import (
    ExportReport,
    inputs_of_graph,
    measure_parity,
    report_of,
    selects_rows,
    shape_of,
    write_model,
)

OLDEST_OPSET = 20
"""Older models are converted up: FP16 scales of Q/DQ need 19, and 20 is what our own export writes."""

NEWEST_OPSET = 23

_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")


def import_onnx(path: Path, out: Path, wishes: Sequence[ShapeWish] = ()) -> tuple[NetworkRecord, ExportReport]:
    """Check the float ONNX at ``path`` and write it to ``out`` in canonical form; returns its record and a report.

    Weights in external files are read from the model's own folder only. Models older than opset 20 are
    converted up. Input and outputs are renamed as our export names them, nodes get unique names, constants are
    folded. ``wishes`` say sizes that the file leaves open. The copy's outputs are compared with the original's on
    random images.

    Raises ``ResvitError`` for a network that is random or whose images hang on each other; for a damaged or invalid
    file, external data outside its folder, a model that is quantised or in half precision already, operators outside
    ONNX, control flow that stays after folding, no image among the inputs, sizes that are not fixed, and NaN in the
    weights.
    """
    proto = _load(path)
    _refuse_foreign(proto, path)
    notes: list[str] = []
    proto = _converted(proto, path, notes)
    model = ir.serde.deserialize_model(proto)
    own = _take_inputs(model, path, wishes)
    _require_finite(model, path)
    infer_shapes(model)
    optimize(model)
    refuse_branches(model)
    outputs = [shape_of(value) if value.shape is not None else () for value in model.graph.outputs]
    single = "logits" if len(outputs) == 1 and len(outputs[0]) == 2 else "output"
    names = [single] if len(outputs) == 1 else [f"output_{index}" for index in range(len(outputs))]
    canonicalise(model, list(own.values()), names)
    image_first(model)
    _require_known_shapes(model, path)
    write_model(model, out)
    batch, *shape = shape_of(model.graph.inputs[0])
    batches = (batch,) if isinstance(batch, int) else (1, 2)
    session, inputs, sets = onnx_runner(path), inputs_of_graph(model), selects_rows(model)

    def original(arrays: Arrays) -> Arrays:
        return session({name: arrays[ours] for name, ours in own.items()})

    draw = functools.partial(random_feeds, inputs)
    refuse_random(original, draw, path.name, batch=batches[0])
    moved = couples_images(original, draw, batch=batch if isinstance(batch, int) else None, sets=sets)
    if moved is not None:
        raise coupled_error(
            path.name, moved, "Export it again for batch 1, without a dynamic axis, or mend its forward."
        )
    parity = measure_parity(
        original, onnx_runner(out), inputs, batches, what=f"{path.name} in canonical form", sets=sets
    )
    report = report_of(model, out, parity, batches, notes)
    classes = report.outputs[0][1][1] if single == "logits" else None
    record = NetworkRecord(
        input_shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        num_classes=classes if isinstance(classes, int) else None,
        preprocess=None,
        dynamic_batch=not isinstance(batch, int),
        digest=sha256_file(out),
        inputs=report.inputs,
        notes=tuple(notes),
    )
    return record, report


def refuse_branches(model: ir.Model) -> None:
    """Raise ``ResvitError`` where control flow is left in the graph."""
    for node in model.graph:
        if node.op_type in ("If", "Loop", "Scan"):
            raise ResvitError(
                f"The graph holds control flow that depends on values: {node.op_type} '{node.name}'.",
                "Export the network again with torch.onnx.export(dynamo=True), or give the PyTorch network itself.",
            )


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ResvitError(f"The model {path} does not exist.", "Check the path given to --model.")
    damaged = f"{path} is not a readable ONNX model ({path.stat().st_size:,} bytes)"
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ResvitError(f"{damaged}.", "The file is truncated or foreign; export it again.") from error
    if not proto.graph.node:
        raise ResvitError(f"{damaged}: it holds no operators.", "The file is empty or foreign; export it again.")
    _check_external_data(proto, path)
    try:
        onnx.load_external_data_for_model(proto, str(path.resolve().parent))
        for tensor in _tensors(proto.graph):
            tensor.ClearField("data_location")  # so that the same weights give the same bytes, wherever they lay
        if proto.ByteSize() < 2**31 - 1:
            onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ResvitError(
            f"{path} is not valid ONNX: {str(error).strip().splitlines()[0]}", "Export it again."
        ) from error
    except (OSError, ValueError) as error:
        raise ResvitError(f"{damaged}: its external data: {error}", "Copy the weight files again.") from error
    return proto


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    folder = path.resolve().parent
    for tensor in _tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = folder / location
        inside = location and not os.path.isabs(location) and file.resolve().is_relative_to(folder)  # noqa: PTH117
        if not inside or ".." in Path(location).parts:
            raise ResvitError(
                f"{path}: the weights {tensor.name} lie outside the model's folder ('{location}').",
                "Put the model and its weight files into one folder and save it again with onnx.save.",
            )
        try:
            end = int(entries.get("offset", "0")) + int(entries.get("length", "0"))
        except ValueError:
            end = -1
        if not file.is_file() or not 0 <= end <= file.stat().st_size:
            raise ResvitError(
                f"{path}: the weight file '{location}' is missing or too short for {tensor.name}.",
                "Copy it beside the model again.",
            )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _refuse_foreign(proto: onnx.ModelProto, path: Path) -> None:
    functions = {(function.domain, function.name) for function in proto.functions}
    for node in proto.graph.node:
        if node.op_type in _QUANTISED or node.op_type.startswith("QLinear"):
            raise ResvitError(
                f"{path} is quantised already: it holds {node.op_type} ('{node.name}').",
                "Give the float model; quantising is what is done here.",
            )
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in functions:
            raise ResvitError(
                f"{path} holds {node.domain}.{node.op_type} ('{node.name}'), which is no standard ONNX operator.",
                "Export the model without runtime-specific optimisation.",
            )
    half = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    for tensor in proto.graph.initializer:
        if tensor.data_type in half and len(tensor.dims) > 1:
            raise ResvitError(
                f"{path} is in half precision already ({tensor.name}).",
                "Give the float32 model; converting is what is done here.",
            )


def _converted(proto: onnx.ModelProto, path: Path, notes: list[str]) -> onnx.ModelProto:
    version = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if version > NEWEST_OPSET:
        raise ResvitError(
            f"{path} uses ONNX opset {version}; up to {NEWEST_OPSET} can be read.",
            f"Export it again with opset_version={NEWEST_OPSET} or less.",
        )
    if version >= OLDEST_OPSET:
        return proto
    try:
        converted = onnx.version_converter.convert_version(proto, OLDEST_OPSET)
    except (RuntimeError, ValueError) as error:
        raise ResvitError(
            f"{path} (opset {version}) cannot be converted to opset {OLDEST_OPSET}: {str(error).splitlines()[0][:200]}",
            f"Export it again with opset_version={OLDEST_OPSET}.",
        ) from error
    notes.append(f"converted from opset {version} to {OLDEST_OPSET}")
    return converted


def _take_inputs(model: ir.Model, path: Path, wishes: Sequence[ShapeWish]) -> dict[str, str]:
    """Fix the sizes that ``wishes`` say; the inputs' names in the file, and what they are called from here on."""
    graph = model.graph
    for value in list(graph.inputs):
        if value.name in graph.initializers:
            graph.inputs.remove(value)
    by_name = {str(value.name): value for value in graph.inputs}
    for wish in wishes:
        if wish.input.name not in by_name:
            raise ResvitError(
                f"{path} has no input {wish.input.name}.",
                f"It has {', '.join(by_name) or 'none'}: name those in --shape.",
            )
        _fix(by_name[wish.input.name], wish, path)
    for value in graph.inputs:
        sizes = list(value.shape) if value.shape is not None else []
        if sizes and not isinstance(sizes[0], int):
            value.shape = ir.Shape([str(sizes[0].value) if sizes[0].value else "batch", *sizes[1:]])
    inputs = inputs_of_graph(model)
    batches = {str(value.name): shape_of(value)[0] for value in graph.inputs}
    if len(set(batches.values())) > 1:
        told = ", ".join(f"{name}: {size}" for name, size in batches.items())
        raise ResvitError(
            f"{path}: its inputs have different batches ({told}).",
            "Export it so that every input has one entry for each image, along its first axis.",
        )
    image = next((item.name for item in inputs if item.is_image), None)
    in_order(inputs)
    return {item.name: IMAGE if item.name == image else item.name for item in inputs}


def _fix(value: ir.Value, wish: ShapeWish, path: Path) -> None:
    """Give an input the sizes of a wish, where the file leaves them open."""
    sizes, wanted = list(value.shape) if value.shape is not None else [], wish.input.shape
    same = len(sizes) == len(wanted) + 1 and all(
        not isinstance(own, int) or own == asked for own, asked in zip(sizes[1:], wanted, strict=True)
    )
    if not same:
        raise ResvitError(
            f"{path}: its input {value.name} is {list(map(str, sizes))}, and --shape says {wish.input}.",
            "Leave --shape out, or export the network for that size.",
        )
    value.shape = ir.Shape([sizes[0], *wanted])


def _require_finite(model: ir.Model, path: Path) -> None:
    for name, value in model.graph.initializers.items():
        if value.const_value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            continue
        array = value.const_value.numpy()
        # A scalar or a mask may be -inf; a weight may not be anything but finite.
        if np.isnan(array).any() or (array.ndim > 0 and np.isposinf(array).any()):
            raise ResvitError(
                f"{path}: {name} holds NaN or infinite values.",
                "Training has diverged or the file is damaged; take an earlier checkpoint.",
            )


def _require_known_shapes(model: ir.Model, path: Path) -> None:
    for value in model.graph.outputs:
        if value.shape is None or any(size == "None" for size in shape_of(value)[1:]):
            raise ResvitError(
                f"{path}: the shape of its output {value.name} cannot be inferred.",
                "Export the network for one image size, with static shapes but for the batch.",
            )
