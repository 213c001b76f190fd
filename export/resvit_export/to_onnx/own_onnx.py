"""Take a user's own float ONNX: checked, and brought into the form that our export writes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.runtime.behaviour import Draw, coupled_error, couples_images, refuse_blind, refuse_random
from resvit_calibrate.runtime.runner import OnnxRunner, Runner, onnx_runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ResvitError
from resvit_engines.files import sha256_file
from resvit_engines.pictures.sizes import SizeRange
from resvit_export.loading.axes.batch_axis import BROUGHT, batch_axis, to_the_front
from resvit_export.loading.inputs import IMAGE, NetworkInput, ShapeWish, in_order, random_feeds
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.to_onnx.branches import refuse_branches, take_known_branches
from resvit_export.to_onnx.canonical import BATCH, canonicalise, image_first, infer_shapes, optimize
from resvit_export.to_onnx.foreign.group_norms import write_out_group_norms
from resvit_export.to_onnx.foreign.measured_shapes import measure_shapes
from resvit_export.to_onnx.image_input import ImageEntrance, take_image
from resvit_export.to_onnx.onnx_file import (
    in_training,
    light,
    model_from_file,
    quantised_already,
    reading,
    refuse_sequences,
    require_fits,
    runnable,
    standard_opset,
)
from resvit_export.to_onnx.report import (
    ExportReport,
    inputs_of_graph,
    measure_parity,
    report_of,
    selects_rows,
    shape_of,
    write_model,
)
from resvit_quantize.graph.shapes import HEIGHT, WIDTH, say_sizes, sizes_of_graph

OLDEST_OPSET = 20
"""Older models are converted up: FP16 scales of Q/DQ need 19, and 20 is what our own export writes."""

NEWEST_OPSET = 23

_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Attention", "LSTM", "GRU", "RNN")


def import_onnx(
    path: Path, out: Path, wishes: Sequence[ShapeWish] = (), image: tuple[int, SizeRange] | None = None
) -> tuple[NetworkRecord, ExportReport]:
    """Check the float ONNX at ``path`` and write it to ``out`` in canonical form; returns its record and a report.

    Weights in external files are read from the model's own folder only. Models older than opset 20 are
    converted up. Input and outputs are renamed as our export names them, nodes get unique names, constants are
    folded; functions, and branches that no image decides, are written out. An image that comes as [B, H, W, C] or as
    whole numbers, cast or dequantised, is read as float32 [B, C, H, W]. ``wishes`` say sizes that the file leaves open;
    ``image`` says channels and sizes of its image, which may be a range. The copy's outputs are compared with the
    original's on random images.

    Raises ``ResvitError`` for all that ``model_from_file`` refuses, a network that is random or whose images hang on
    each other, products in another precision than float32, control flow that depends on values, no image among the
    inputs, sizes that are not fixed, and NaN in the weights.
    """
    notes: list[str] = []
    proto = _converted(model_from_file(path), path, notes)
    with reading(path):
        model = ir.serde.deserialize_model(proto)
        unread = _leave_out_unread(model, notes)
        wishes = [wish for wish in wishes if wish.input.name not in unread]
        own, entrance = _take_inputs(model, path, wishes, image, notes)
    sizes = sizes_of_graph(model)
    axes = _bring_into_form(model, path, list(own.values()), sizes, notes)
    with reading(path, "cannot be brought into the form that this tool works on"):
        write_model(model, out)
    batch = shape_of(model.graph.inputs[0])[0]
    batches = (batch,) if isinstance(batch, int) else (1, 2)
    inputs, sets = inputs_of_graph(model), selects_rows(model)
    with reading(path, "cannot be computed"):
        original = _original(path, unread, axes)
        written, before = onnx_runner(out), entrance.before()

    def reference(arrays: Arrays) -> Arrays:
        given = {**arrays, IMAGE: before(entrance.random(arrays[IMAGE]))}
        return original({name: given[ours] for name, ours in own.items()})

    with reading(path, "cannot be computed"):
        draw = functools.partial(random_feeds, inputs)
        if sizes is not None:
            notes.append(_require_sizes(reference, inputs[0], sizes, path))
        _require_entries(reference, draw, batches, path)
        refuse_random(reference, draw, path.name, batch=batches[0])
        moved = couples_images(reference, draw, batch=batch if isinstance(batch, int) else None, sets=sets)
        if moved is not None:
            raise coupled_error(
                path.name, moved, "Export it again for batch 1, without a dynamic axis, or mend its forward."
            )
        refuse_blind(reference, draw, path.name, batch=batches[0])
        parity = measure_parity(
            reference,
            lambda arrays: written({**arrays, IMAGE: entrance.random(arrays[IMAGE])}),
            inputs,
            batches,
            what=f"{path.name} in canonical form",
            sets=sets,
            sizes=sizes.checked[1:] if sizes else (),
        )
    report = report_of(model, out, parity, batches, notes)
    classes = report.outputs[0][1][1] if report.outputs[0][0] == "logits" else None
    channels, height, width = inputs[0].shape
    record = NetworkRecord(
        input_shape=(channels, height, width),
        num_classes=classes if isinstance(classes, int) else None,
        preprocess=_preprocess(entrance, channels, height, width),
        dynamic_batch=not isinstance(batch, int),
        digest=sha256_file(out),
        inputs=report.inputs,
        notes=tuple(notes),
        image_range=entrance.pixels,
        sizes=sizes,
    )
    return record, report


def _bring_into_form(
    model: ir.Model, path: Path, inputs: Sequence[str], sizes: SizeRange | None, notes: list[str]
) -> dict[int, int]:
    """Bring a graph whose inputs are ours already into canonical form, in place; raises as ``import_onnx``.

    Returns where the batch of outputs by number was, where it was not in front.
    """
    with reading(path):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _require_finite(model, path)
        _refuse_dropout(model, path)
        _infer_anew(model)
        write_out_group_norms(model)
        _require_float32(model, path)
        _require_small(model, path)
    with reading(path, "cannot be brought into the form that this tool works on"):
        optimize(model)
        if measure_shapes(model):
            optimize(model)
        if take_known_branches(model, measure_shapes):
            write_out_group_norms(model)
            optimize(model)
        refuse_branches(model)
        refuse_sequences(model, path)
        _require_small(model, path)
        _require_float32(model, path)
        _make_printable(model)
        canonicalise(model, inputs, _output_names(model))
        image_first(model)
        _name_batches(model)
        if sizes is not None:
            _keep_open(model, sizes)
        _require_known_shapes(model, path)
        axes = _batch_first(model, notes)
        _require_batched(model, path)
    return axes


def _preprocess(entrance: ImageEntrance, channels: int, height: int, width: int) -> Preprocess | None:
    """What feeds a network that normalises the image itself: the numbers of the picture as they are."""
    if entrance.pixels is None or channels not in (1, 3):
        return None
    low, high = entrance.pixels
    return Preprocess(
        size=(height, width),
        channels=channels,
        interpolation="bilinear",
        mean=(-low / (high - low),),
        std=(1 / (high - low),),
    )


def _converted(proto: onnx.ModelProto, path: Path, notes: list[str]) -> onnx.ModelProto:
    version = standard_opset(proto)
    if OLDEST_OPSET <= version <= NEWEST_OPSET:
        return proto
    wanted = min(max(version, OLDEST_OPSET), NEWEST_OPSET)
    try:
        with reading(path, f"(opset {version}) cannot be converted to opset {wanted}"):
            converted = light(proto, lambda part: onnx.version_converter.convert_version(part, wanted))
    except ResvitError as error:
        if version < OLDEST_OPSET:
            raise
        raise ResvitError(
            f"{path} uses ONNX opset {version}; up to {NEWEST_OPSET} can be read, and it holds what that has not "
            f"({error.problem.rpartition(': ')[2]}).",
            f"Export it again with opset_version={NEWEST_OPSET} or less.",
        ) from error
    notes.append(f"converted from opset {version} to {wanted}")
    return converted


def _leave_out_unread(model: ir.Model, notes: list[str]) -> tuple[str, ...]:
    """Take out inputs that nothing reads, unless they look like the image; returns their names."""
    unread = [
        value
        for value in model.graph.inputs
        if not list(value.uses()) and not value.is_graph_output() and (value.shape is None or len(value.shape) != 4)
    ]
    for value in unread:
        model.graph.inputs.remove(value)
        notes.append(f"nothing reads the input {value.name}; it is left out")
    return tuple(str(value.name) for value in unread)


def _take_inputs(
    model: ir.Model,
    path: Path,
    wishes: Sequence[ShapeWish],
    shape: tuple[int, SizeRange] | None,
    notes: list[str],
) -> tuple[dict[str, str], ImageEntrance]:
    """Fix the sizes that ``wishes`` say, and those of the image's ``shape``, and bring the image into our form.

    Returns the inputs' names in the file and what they are called from here on, and what the image was.
    """
    graph = model.graph
    by_name = {str(value.name): value for value in graph.inputs}
    for wish in wishes:
        if wish.input.name not in by_name:
            raise ResvitError(
                f"{path} has no input {wish.input.name}.",
                f"It has {', '.join(by_name) or 'none'}: name those in --shape.",
            )
        if wish.sizes is None:
            _fix(by_name[wish.input.name], wish, path)
        else:
            shape = (wish.input.shape[0], wish.sizes)
    model.metadata_props.clear()  # what the file says of itself by names of ours
    if shape is not None:
        _open_sizes(model, *shape, path)
    for value in graph.inputs:
        sizes = list(value.shape) if value.shape is not None else []
        if sizes and not isinstance(sizes[0], int):
            value.shape = ir.Shape([str(sizes[0].value) if sizes[0].value else "batch", *sizes[1:]])
    image, entrance = take_image(model)
    for node in graph:
        if node.op_type == "DequantizeLinear":  # of an input that is no image
            raise quantised_already(path, node.op_type, str(node.name))
    notes += entrance.notes(str(image))
    inputs = inputs_of_graph(model)
    batches = {str(value.name): shape_of(value)[0] for value in graph.inputs}
    if len(set(batches.values())) > 1:
        told = ", ".join(f"{name}: {size}" for name, size in batches.items())
        raise ResvitError(
            f"{path}: its inputs have different batches ({told}).",
            "Export it so that every input has one entry for each image, along its first axis.",
        )
    in_order(inputs)
    first = image or next(item.name for item in inputs if item.is_image)
    return {item.name: IMAGE if item.name == first else item.name for item in inputs}, entrance


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


def _open_sizes(model: ir.Model, channels: int, sizes: SizeRange, path: Path) -> None:
    """Give the image the sizes asked for, where the file leaves them open: a number, or a name of ours for a range."""
    images = [value for value in model.graph.inputs if value.shape is not None and len(value.shape) == 4]
    dims = list(images[0].shape or ()) if len(images) == 1 else []
    places = [axis for axis in (1, 3) if dims and dims[axis] == channels]
    if dims and not places and not isinstance(dims[1], int):
        places, dims[1] = [1], channels
    if not places:
        told = ", ".join(f"{value.name} {list(map(str, value.shape or ()))}" for value in model.graph.inputs)
        raise ResvitError(
            f"{path}: it reads {told or 'nothing'}, and --input-shape says one image of {channels} channels.",
            "Give the channels that the file has, or name every input with --shape.",
        )
    axes = (2, 3) if places[0] == 1 else (1, 2)
    for axis, name, (low, usual, high) in zip(axes, (HEIGHT, WIDTH), sizes.spans, strict=True):
        if isinstance(dims[axis], int) and not low == high == dims[axis]:
            raise ResvitError(
                f"{path}: its input {images[0].name} is {list(map(str, dims))}, and {sizes} pixels were asked for.",
                "Leave --input-shape out, or export the file again with height and width as dynamic axes.",
            )
        dims[axis] = ir.SymbolicDim(name) if low < high else usual
    images[0].shape = ir.Shape(dims)
    if not sizes.is_one:
        say_sizes(model, sizes)


def _require_sizes(reference: Runner, image: NetworkInput, sizes: SizeRange, path: Path) -> str:
    """Refuse a file that fails at one of the sizes, with the runtime's words; returns what to say of the sizes.

    Raises:
        ResvitError: INPUT.
    """
    for size in sizes.checked:
        feeds = random_feeds([image.at_size(size)], 1, np.random.default_rng(0))
        try:
            reference(feeds)
        except ResvitError as error:
            raise ResvitError(
                f"{path} does not take images of {size[0]}x{size[1]}, which {sizes} asks for: {error.problem}",
                "Name one size with --input-shape, and build one engine for each size that is needed; or export the "
                "file again from a network that computes with the image's own height and width.",
            ) from error
    return f"it takes images of {sizes} pixels (height x width)"


def _require_entries(reference: Runner, draw: Draw, batches: Sequence[int], path: Path) -> None:
    """Refuse outputs of as many rows as there is something to find: they have no entry for each image, or no size.

    Raises:
        ResvitError: INPUT.
    """
    random = np.random.default_rng(3)
    for batch in batches:
        one, other = ({name: array.shape for name, array in reference(draw(batch, random)).items()} for _ in range(2))
        for name, shape in one.items():
            if not shape or shape[0] != batch or shape != other[name]:
                images = f"{batch} image{'s' if batch > 1 else ''}"
                raise ResvitError(
                    f"{path}: its output {name} is {list(shape)} for {images} and {list(other[name])} for {images} "
                    "more: an engine's outputs have one entry for each image, and one size.",
                    "End the network in front of what finds a varying number of things (NonMaxSuppression, NonZero), "
                    "or let it give as many for every image (TopK).",
                )


def _refuse_dropout(model: ir.Model, path: Path) -> None:
    """Refuse a Dropout that drops: it would be left out by one runtime, and be random in another."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type != "Dropout" or node.domain or len(node.inputs) < 3:
            continue
        share, trains = (value.const_value.numpy() if value is not None and value.const_value is not None else None
                         for value in node.inputs[1:3])  # fmt: skip
        if trains is not None and trains.any() and (share is None or share.any()):
            raise in_training(path, node.op_type, str(node.name))


def _output_names(model: ir.Model) -> list[str]:
    """What the outputs are called: as those of our own export."""
    outputs = [shape_of(value) if value.shape is not None else () for value in model.graph.outputs]
    if len(outputs) > 1:
        return [f"output_{index}" for index in range(len(outputs))]
    return ["logits" if len(outputs[0]) == 2 else "output"]


def _name_batches(model: ir.Model) -> None:
    """Call the first size of an output the batch where inference cannot tell; what runs is held to it afterwards."""
    if isinstance(shape_of(model.graph.inputs[0])[0], int):
        return
    for value in model.graph.outputs:
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape = ir.Shape([BATCH, *list(value.shape)[1:]])


def _keep_open(model: ir.Model, sizes: SizeRange) -> None:
    """Say the image's sizes in the canonical graph, and name sizes of outputs that shape inference leaves open."""
    say_sizes(model, sizes)
    for value in model.graph.outputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    size if isinstance(size, int) or size.value else ir.SymbolicDim(f"{value.name}_size_{axis}")
                    for axis, size in enumerate(value.shape)
                ]
            )


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


def _infer_anew(model: ir.Model) -> None:
    """Fill in all shapes; what the file says of inner values and outputs stays only where nothing else tells."""
    values = [*model.graph.outputs, *(value for node in model.graph for value in node.outputs)]
    told = {value: value.shape for value in values}
    free = {size.value for value in model.graph.inputs for size in value.shape or () if not isinstance(size, int)}
    for value in told:
        value.shape = None
    infer_shapes(model)
    for value, shape in told.items():
        if value.shape is None:
            value.shape = shape
        elif shape is not None and len(shape) == len(value.shape):
            pairs = zip(value.shape, shape, strict=True)
            value.shape = ir.Shape([_better_known(own, file, free) for own, file in pairs])


def _better_known(own: int | ir.SymbolicDim, file: int | ir.SymbolicDim, free: Collection[str | None]) -> Any:
    """Of one size, what inference tells where that is a number or a free size of an input, else what the file says."""
    inferred = isinstance(own, int) or own.value in free
    return own if inferred or isinstance(file, int) or file.value is None else file


def _require_float32(model: ir.Model, path: Path) -> None:
    """Refuse products that are computed in another precision, wherever the weights are stored."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        dtype = node.outputs[0].dtype if node.outputs and node.op_type in _PRODUCTS else None
        if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise ResvitError(
                f"{path} is in half precision already ({node.op_type} '{node.name}' computes in {dtype.name.lower()}).",
                "Give the float32 model; converting is what is done here.",
            )
        if dtype is not None and dtype is not ir.DataType.FLOAT and dtype.is_floating_point():
            raise ResvitError(
                f"{path} computes {node.op_type} '{node.name}' in {dtype.name.lower()}, which no engine does.",
                "Export the float32 model (model.float()).",
            )


def _require_small(model: ir.Model, path: Path) -> None:
    """Refuse graphs with a tensor that no machine holds, before anything computes it."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if value.shape is not None:
                sizes = [size for size in value.shape if isinstance(size, int)]
                require_fits(math.prod(sizes), f"{path}: what {node.op_type} '{node.name}' gives")


def _make_printable(model: ir.Model) -> None:
    """Take control characters out of the names that stay."""
    for node in model.graph:
        node.name = _printable(node.name)
    for name, value in list(model.graph.initializers.items()):
        if (clean := _printable(name)) != name:
            while clean in model.graph.initializers:
                clean = f"{clean}_"
            value.name = clean


def _printable(name: str | None) -> str | None:
    return name and "".join(letter if letter.isprintable() else "_" for letter in name)


def _original(path: Path, unread: Collection[str], axes: Mapping[int, int]) -> OnnxRunner:
    """The file without the inputs that are ``unread``, the batch of outputs by number brought to the front."""
    runner = onnx_runner(runnable(path, unread), folder=path.parent)
    return dataclasses.replace(runner, batch_axes={runner.outputs[number]: axis for number, axis in axes.items()})


def _batch_first(model: ir.Model, notes: list[str]) -> dict[int, int]:
    """Bring the batch of every output to the front, in place; returns where it was, by the output's number."""
    batch = shape_of(model.graph.inputs[0])[0]
    axes: dict[int, int] = {}
    for index, value in enumerate(model.graph.outputs):
        axis = batch_axis(shape_of(value), batch) if value.producer() is not None else None
        if axis is not None and value.shape is not None:
            name = str(value.name)
            permutation = to_the_front(axis, len(value.shape))
            value.name = f"{name}/own"
            node = ir.node("Transpose", [value], {"perm": permutation}, name=f"{name}/Transpose")
            turned = node.outputs[0]
            turned.name, turned.type = name, value.type
            turned.shape = ir.Shape([value.shape[each] for each in permutation])
            model.graph.append(node)
            model.graph.outputs[index] = turned
            axes[index] = axis
            notes.append(f"output {name}: {BROUGHT}")
    return axes


def _require_batched(model: ir.Model, path: Path) -> None:
    """Refuse outputs that do not have one entry for each image, such as anchors that are alike for all."""
    batch = shape_of(model.graph.inputs[0])[0]
    for value in model.graph.outputs:
        sizes = shape_of(value)
        if not sizes or (isinstance(sizes[0], int) and sizes[0] != batch):
            raise ResvitError(
                f"{path}: its output {value.name} is {list(sizes) if sizes else 'a single number'}, and not one entry "
                f"for each image of the batch ({batch}).",
                "Export the network without that output, or with the batch as its first size.",
            )
        if 0 in sizes:
            raise ResvitError(
                f"{path}: its output {value.name} is {list(sizes)}: it holds no number.", "Check the image's size."
            )


def _require_known_shapes(model: ir.Model, path: Path) -> None:
    for value in model.graph.outputs:
        if value.shape is None or any(size == "None" for size in shape_of(value)[1:]):
            raise ResvitError(
                f"{path}: the shape of its output {value.name} cannot be inferred.",
                "Export the network for one image size, with static shapes but for the batch.",
            )
