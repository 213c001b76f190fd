"""The shapes of a graph's values; of one whose image may have several sizes, which these are, and what it is at one.

What counts work, bytes and tokens needs numbers: it looks at the graph at the usual size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from resvit_calibrate.runtime.sessions import add_weight_folder
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import Size, SizeRange, sizes_from_numbers
from resvit_quantize.graph.external import weight_folder
from resvit_quantize.graph.network import add_initializer, fold_constants

HEIGHT, WIDTH = "height", "width"
"""What the free sizes of the image are called."""
_KEY = "resvit.sizes"
_STORED = frozenset({"DequantizeLinear"})
"""What hangs on no size, and says that a weight is stored in 8 bits."""
"""Key of the model's metadata that holds the numbers of a ``SizeRange``."""
_MOST_ROUNDS = 32


def say_sizes(model: ir.Model, sizes: SizeRange) -> None:
    """Write into a model which sizes its image may have."""
    model.metadata_props[_KEY] = json.dumps(sizes.numbers())


def sizes_of_graph(model: ir.Model) -> SizeRange | None:
    """The sizes that a model says its image may have; None for one size.

    Raises:
        ResvitError: INPUT where what it says are no sizes.
    """
    said = model.metadata_props.get(_KEY)
    if said is None:
        return None
    try:
        numbers = json.loads(said)
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise ValueError(said)
    except (ValueError, RecursionError) as error:
        raise ResvitError(f"The model's {_KEY} is {said[:80]!r}, no list of numbers.", "Export it again.") from error
    return sizes_from_numbers(numbers)


def feed_shape(value: ir.Value, sizes: SizeRange | None, batch: int, size: Size | None = None) -> tuple[int, ...]:
    """The shape of one input at a batch, and of the image at a size: without one, at the usual."""
    open_ones = dict(zip((HEIGHT, WIDTH), size or (sizes.usual if sizes else (1, 1)), strict=True))
    return tuple(
        dim if isinstance(dim, int) else open_ones.get(str(dim.value), batch) if axis else batch
        for axis, dim in enumerate(value.shape or ())
    )


def at_size(model: ir.Model, size: Size, batch: int) -> ir.Model:
    """A copy for images [batch, C, *size]: what hung on the size is constant, and names are the same."""
    copy = model.clone()
    sizes = sizes_of_graph(copy)
    copy.metadata_props.pop(_KEY, None)
    values: Sequence[ir.Value] = [*copy.graph.outputs, *(value for node in copy.graph for value in node.outputs)]
    for value in values:
        value.shape = None
    for value in copy.graph.inputs:
        value.shape = ir.Shape(feed_shape(value, sizes, batch, size))
    for _ in range(_MOST_ROUNDS):
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
        if not _known_shapes_to_constants(copy):
            break
        fold_constants(copy, _STORED)
    return copy


def static_shapes(model: ir.Model, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of all values at a fixed batch size, and of several image sizes at the usual one.

    Values whose shape depends on data are left out.
    """
    if (sizes := sizes_of_graph(model)) is not None:
        model = at_size(model, sizes.usual, batch)
        values = [*model.graph.inputs, *(o for n in model.graph for o in n.outputs)]
    else:
        model = model.clone()
        values = _with_batch(model, batch)
    values += model.graph.initializers.values()
    return {str(v.name): tuple(v.shape.numpy()) for v in values if v.shape is not None and v.shape.is_static()}


def _with_batch(model: ir.Model, batch: int) -> list[ir.Value]:
    """Set the batch of a graph whose other sizes are fixed; returns its values."""
    symbols = {
        str(v.shape[0])
        for v in model.graph.inputs
        if v.shape is not None and len(v.shape) and not isinstance(v.shape[0], int)
    }
    values = [*model.graph.inputs, *model.graph.outputs, *(o for n in model.graph for o in n.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([batch if str(d) in symbols else d for d in value.shape])
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    return values


def observed_shapes(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, tuple[int, ...]]:
    """Shapes of values that two runs on one image of random numbers agree on, by name; others are left out."""
    import onnxruntime

    proto = ir.serde.serialize_model(model)
    given = {value.name for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer)}
    names = [str(value.name) for value in dict.fromkeys(values) if not value.is_initializer()]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    names = [name for name in names if name not in {value.name for value in proto.graph.input}]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    random = np.random.default_rng(0)
    try:
        add_weight_folder(options, weight_folder(model))
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        runs = [session.run(names, _random_feeds(model, random)) for _ in range(2)]
    except Exception:  # noqa: BLE001  # a graph that does not run has no shapes to observe
        return {}
    pairs = zip(names, *runs, strict=True)
    return {name: tuple(first.shape) for name, first, second in pairs if first.shape == second.shape}


def _random_feeds(model: ir.Model, random: np.random.Generator) -> dict[str, np.ndarray]:
    feeds, sizes = {}, sizes_of_graph(model)
    for value in model.graph.inputs:
        shape = feed_shape(value, sizes, 1)
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        numbers = random.standard_normal(shape) if np.issubdtype(dtype, np.floating) else np.ones(shape)
        feeds[str(value.name)] = numbers.astype(dtype)
    return feeds


def _known_shapes_to_constants(model: ir.Model) -> int:
    """Put constants in the place of the Shape and Size nodes of what has a known shape; returns how many."""
    count = 0
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type in ("Shape", "Size") and not node.domain else None
        if source is None or source.shape is None or not source.shape.is_static():
            continue
        result, dims = node.outputs[0], list(source.shape.numpy())
        if result.is_graph_output() or not list(result.uses()):
            continue
        if node.op_type == "Size":
            array = np.array(int(np.prod(dims, dtype=np.int64)), np.int64)
        else:
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
            array = np.array(dims[start:end], np.int64)
        name = str(result.name)
        result.name = f"{name}/computed"
        result.replace_all_uses_with(add_initializer(model, name, array))
        count += 1
    return count
