"""A user's ONNX file as a plain model: parsed against what is allowed, with bounds on all that it declares.

A file of a few hundred bytes can name weights of terabytes, functions that double at every call, or somebody else's
files. What is read here has one graph, without functions of its own, whose tensors are as large as they say; libraries
that trust what they read come after. Everything that is wrong with a file is told as one kind of error.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
from onnx import AttributeProto, TensorProto

from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.loading.weights.onnx_proto import (
    file_inside,
    graphs_of,
    invalid,
    proto_from_file,
    tensors_of,
)
from resvit_export.to_onnx.foreign.group_norms import replace_withdrawn_group_norms

MOST_NODES = 100_000
"""With all functions written out; the largest hybrids have some 10,000."""
MOST_ELEMENTS = 1 << 30
"""Of any one tensor at one image: 4 GiB of float32, which no device here would hold."""
_DEEPEST_CALLS = 32
_LARGE = 1024
"""Bytes of a weight that no conversion of an operator has to read: sizes, scales and axes are smaller."""
_LONGEST_NAME = 4096
_IR_VERSION = 10
"""What our own export writes."""
_STANDARD = ("", "ai.onnx")
_MOVES = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Gather", "Split", "Concat")
_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
_SEQUENCES = ("Sequence", "SplitToSequence", "ConcatFromSequence")
_NO_TENSOR = (*_SEQUENCES, "Optional", "String", "Regex")
_TRAINS_BY_ATTRIBUTE = 14
"""The opset from which BatchNormalization says by an attribute that it trains; before, more outputs than one did."""
_FOREIGN = {
    "com.microsoft": "Give the model from before ONNX Runtime's optimiser, which writes such operators.",
    "ai.onnx.ml": "Leave that part out: what a network's numbers are called is said outside of it.",
    "": "Export the model without operators of one runtime's or library's own, or end it in front of them.",
}
"""What to do about operators of a domain, by how that begins."""
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_PLAIN = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    *_HALF,
    TensorProto.BOOL,
    TensorProto.UINT8,
    TensorProto.INT8,
    TensorProto.UINT16,
    TensorProto.INT16,
    TensorProto.UINT32,
    TensorProto.INT32,
    TensorProto.UINT64,
    TensorProto.INT64,
)
_ATTRIBUTES = (
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.STRING,
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
    AttributeProto.STRINGS,
)


def model_from_file(path: Path) -> onnx.ModelProto:
    """Read the float model at ``path``, with its weights, as one graph without functions of its own.

    Weights in external files are read from the model's own folder only. Initializers are not among the inputs.

    Raises ``ResvitError`` for a file that is damaged, invalid, quantised, in half precision, random, or beyond the
    bounds of this module; and for operators outside ONNX.
    """
    proto = bounded_model(path)
    with reading(path):
        _require_plain(proto, path)
        _read_external_data(proto, path)
        _require_whole_tensors(proto, path)
        weights = {tensor.name for tensor in proto.graph.initializer}
        proto = light(proto, lambda part: _checked(part, weights, path))
        if proto.functions:
            proto = light(proto, onnx.inliner.inline_local_functions)
        _require_plain(proto, path)
    return proto


def light(proto: onnx.ModelProto, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """What ``change`` makes of a model that it sees without its large weights, which stand among the inputs meanwhile.

    ONNX's own functions take a model as one message of protobuf, which ends at 2 GiB. Up to IR version 3 weights stood
    among the inputs too; later that makes them defaults, which nobody overrides here: none is there afterwards.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    own = [value for value in proto.graph.input if value.name not in weights]
    large = [tensor for tensor in proto.graph.initializer if tensor.ByteSize() > _LARGE]
    small = [tensor for tensor in proto.graph.initializer if tensor.ByteSize() <= _LARGE]
    apart = onnx.ModelProto()
    apart.graph.initializer.extend(large)
    _replace(proto.graph.initializer, small)
    _replace(
        proto.graph.input, [*own, *(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large)]
    )
    names = {tensor.name for tensor in apart.graph.initializer}
    changed = change(proto)
    _replace(changed.graph.input, [value for value in changed.graph.input if value.name not in names])
    changed.graph.initializer.extend(apart.graph.initializer)
    return changed


def _replace(field: Any, values: Sequence[Any]) -> None:
    """Let a repeated field of a message hold these values, some of which it may have held before."""
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(kept)


def bounded_model(path: Path) -> onnx.ModelProto:
    """Read the model at ``path`` as it is, quantised or not, without the weights that lie beside it.

    Raises ``ResvitError`` for a file that is damaged, invalid or beyond the bounds of this module.
    """
    proto = proto_from_file(path)
    with reading(path):
        _open_unknown_sizes(proto)
        _require_bounded(proto, path)
    return proto


def _open_unknown_sizes(proto: onnx.ModelProto) -> None:
    """Leave a size of -1 open, as the exporters of MXNet, Keras and Paddle meant it and ONNX Runtime reads it."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if size.HasField("dim_value") and size.dim_value == -1:
                size.ClearField("dim_value")


def runnable(path: Path, unread: Collection[str] = ()) -> Path | bytes:
    """The model at ``path`` as ONNX Runtime takes it, which allows no two nodes of one name: then without their names.

    ``unread`` are inputs that it is to do without. Raises as ``bounded_model``.
    """
    proto = bounded_model(path)
    if unread:
        _replace(proto.graph.input, [value for value in proto.graph.input if value.name not in unread])
    twice = False
    for graph in graphs_of(proto, path):
        names = [node.name for node in graph.node if node.name]
        twice = twice or len(set(names)) < len(names)
    if not twice and not unread:
        return path
    for node in _nodes(proto, path) if twice else ():
        node.name = ""
    return bytes(proto.SerializeToString())


@contextlib.contextmanager
def reading(path: Path, what: str = "is not valid ONNX") -> Iterator[None]:
    """Tell whatever a library finds wrong with the model, in whatever words, as ``ResvitError``, and nothing beside it.

    What would be a fault of ours in a graph that we exported is the file's in one that somebody else wrote: nobody
    but its owner can mend it.
    """
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except ResvitError as error:
        if error.code is not ExitCode.BUG:
            raise
        raise ResvitError(error.problem, "Export it again, or name the PyTorch network itself.") from error
    except MemoryError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise ResvitError(
            f"{path} {what}: {(lines or [type(error).__name__])[0][:300]}",
            "Export it again; onnx.checker.check_model with full_check=True tells more.",
        ) from error
    finally:
        logging.disable(logged)


def _nodes(proto: onnx.ModelProto, path: Path) -> Iterator[onnx.NodeProto]:
    for graph in graphs_of(proto, path):
        yield from graph.node


def _require_bounded(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse what no exporter writes, or what would take hours to read."""
    domains = ["" if entry.domain in _STANDARD else entry.domain for entry in proto.opset_import]
    if "" not in domains:
        raise invalid(path, "it names no version of ONNX's operators", "Export the model again, at opset 20.")
    if len(set(domains)) < len(domains):
        raise invalid(path, "it names two versions of the same operators")
    for graph in graphs_of(proto, path):
        named = [*graph.input, *graph.output] if isinstance(graph, onnx.FunctionProto) else []
        if isinstance(graph, onnx.GraphProto):
            if graph.sparse_initializer:
                raise invalid(path, "it holds sparse weights", "Export it with dense weights.")
            for kind, values in (("input", graph.input), ("output", graph.output), ("weight", graph.initializer)):
                names = [value.name for value in values]
                if len(set(names)) < len(names):
                    twice = next(name for name in names if names.count(name) > 1)
                    raise invalid(path, f"it has two {kind}s of the name {twice!r}")
                named += names
        for node in graph.node:
            named += [*node.input, *node.output, node.name, node.op_type, node.domain]
            for attribute in node.attribute:
                if attribute.type not in _ATTRIBUTES:
                    raise invalid(
                        path, f"{node.op_type} '{node.name}' has the attribute {attribute.name!r} of an unknown kind"
                    )
        if any(not isinstance(name, str) for name in named):  # protobuf gives bytes that are no UTF-8 as they are
            raise invalid(path, "it holds a name that is not UTF-8")
        if any(len(name) > _LONGEST_NAME for name in named):
            raise invalid(path, f"it holds a name of over {_LONGEST_NAME:,} characters")
    _require_few_nodes(proto, path)
    _require_sane_inputs(proto, path)


def _require_few_nodes(proto: onnx.ModelProto, path: Path) -> None:
    """Count the nodes with all functions written out, which doubling functions make billions of."""
    functions = {(function.domain, function.name): function for function in proto.functions}
    for domain, name in functions:
        if domain in _STANDARD:
            raise invalid(path, f"it redefines the standard operator {name}")
    if len(functions) < len(proto.functions):
        raise invalid(path, "it defines one function twice")
    counts: dict[tuple[str, str], int] = {}

    def count(graph: onnx.GraphProto | onnx.FunctionProto, calls: tuple[tuple[str, str], ...]) -> int:
        if len(calls) > _DEEPEST_CALLS:
            raise invalid(path, f"its functions call each other over {_DEEPEST_CALLS} deep")
        total = 0
        for node in graph.node:
            key = (node.domain, node.op_type)
            total += 1
            if key in functions:
                if key in calls:
                    raise invalid(path, f"its function {node.op_type} calls itself")
                if key not in counts:
                    counts[key] = count(functions[key], (*calls, key))
                total += counts[key]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    total += count(attribute.g, calls)
        return total

    total = max(count(proto.graph, ()), *(count(function, ((function.domain, function.name),))
                                          for function in proto.functions), 0)  # fmt: skip
    if total > MOST_NODES:
        raise invalid(path, f"written out, its functions are {total:,} operators; {MOST_NODES:,} are read")


def _require_sane_inputs(proto: onnx.ModelProto, path: Path) -> None:
    weights = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in weights:
            continue
        if not value.type.HasField("tensor_type"):
            raise ResvitError(
                f"{path}: its input {value.name} is no tensor ({value.type.WhichOneof('value') or 'of no type'}).",
                "Export the network with tensors as inputs.",
            )
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim if size.HasField("dim_value")]
        if any(size < 1 for size in sizes):
            raise invalid(path, f"its input {value.name} has a size of {min(sizes)}")
        require_fits(math.prod(sizes), f"{path}: its input {value.name}")


def require_fits(elements: int, what: str) -> None:
    """Raise ``ResvitError`` for a tensor of more elements than ``MOST_ELEMENTS``."""
    if elements > MOST_ELEMENTS:
        raise ResvitError(
            f"{what} would hold {elements:,} numbers for one image; up to {MOST_ELEMENTS:,} are computed.",
            "Export the network for a smaller image.",
        )


def quantised_already(path: Path, op_type: str, name: str) -> ResvitError:
    """The error for a model that is no float one, where its node shows it."""
    return ResvitError(
        f"{path} is quantised already: it holds {op_type} ('{name}').",
        "Give the float model; quantising is what is done here.",
    )


def _dequantised_images(graph: onnx.GraphProto) -> set[str]:
    """What DequantizeLinear makes of the graph's inputs, by name: so a picture's normalisation can be written."""
    constants = {tensor.name for tensor in graph.initializer}
    pictures = {value.name for value in graph.input if value.name not in constants}
    found: set[str] = set()
    for node in graph.node:
        if node.domain in _STANDARD and node.input and node.input[0] in pictures:
            if node.op_type == "DequantizeLinear":
                found.update(node.output)
            elif node.op_type in _MOVES:
                pictures.update(node.output)
    return found


def _require_plain(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse what is quantised, in half precision, random or in training, and operators that are not ONNX's."""
    functions = {(function.domain, function.name) for function in proto.functions}
    opset = standard_opset(proto)
    images = _dequantised_images(proto.graph)
    for node in _nodes(proto, path):
        standard = node.domain in _STANDARD
        quantised = standard and (node.op_type in _QUANTISED or node.op_type.startswith("QLinear"))
        if quantised and not images.intersection(node.output):
            raise quantised_already(path, node.op_type, node.name)
        known = onnx.defs.has(node.op_type) if standard else (node.domain, node.op_type) in functions
        if not known:
            raise ResvitError(
                f"{path} holds {'.'.join(filter(None, (node.domain, node.op_type)))} ('{node.name}'), which is no "
                "standard ONNX operator.",
                next((fix for start, fix in _FOREIGN.items() if node.domain.startswith(start)), _FOREIGN[""]),
            )
        if standard and node.op_type in _RANDOM:
            raise ResvitError(
                f"{path} draws random numbers: {node.op_type} ('{node.name}').",
                "Export the network for inference (model.eval()), so that the same image gets the same answer.",
            )
        if standard and node.op_type.startswith(_NO_TENSOR) and not node.op_type.startswith(_SEQUENCES):
            raise _no_tensor(path, node.op_type, node.name)
        if standard and node.op_type == "BatchNormalization" and _trains(node, opset):
            raise in_training(path, node.op_type, node.name)
    for tensor in tensors_of(proto, path):
        if tensor.data_type == TensorProto.STRING:
            raise _no_tensor(path, "texts", tensor.name)
        if tensor.data_type in _HALF and len(tensor.dims) > 1:
            raise _half(path, tensor.name)
        if tensor.data_type not in _PLAIN:
            names = {number: name for name, number in TensorProto.DataType.items()}
            kind = names.get(tensor.data_type, f"type {tensor.data_type}")
            raise invalid(path, f"the weights {tensor.name} are of {kind}, not of float32", "Give the float32 model.")


def standard_opset(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model is written in; 0 where it does not say."""
    return max((entry.version for entry in proto.opset_import if entry.domain in _STANDARD), default=0)


def refuse_sequences(model: ir.Model, path: Path) -> None:
    """Refuse lists of tensors that are still in a graph once its constants are folded; raises ``ResvitError``."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain in _STANDARD and node.op_type.startswith(_SEQUENCES):
            raise _no_tensor(path, "a list of tensors that only its images decide", str(node.name))


def _no_tensor(path: Path, what: str, name: str) -> ResvitError:
    return ResvitError(
        f"{path} holds {what} ('{name}'): sequences, optionals and text are in no engine.",
        "Export the network so that all of its values are tensors of numbers.",
    )


def _trains(norm: onnx.NodeProto, opset: int) -> bool:
    if opset < _TRAINS_BY_ATTRIBUTE:
        return sum(map(bool, norm.output)) > 1
    return any(attribute.name == "training_mode" and attribute.i for attribute in norm.attribute)


def in_training(path: Path, what: str, name: str) -> ResvitError:
    """That a file was exported as the network trains."""
    return ResvitError(
        f"{path} computes as in training: {what} '{name}' takes the batch's own statistics, or draws random numbers.",
        "Export the network for inference: model.eval() first, and no training=TrainingMode.TRAINING. A norm of each "
        "image's own statistics is InstanceNormalization.",
    )


def _half(path: Path, name: str) -> ResvitError:
    return ResvitError(
        f"{path} is in half precision already ({name}).", "Give the float32 model; converting is what is done here."
    )


def _bytes_of(tensor: TensorProto) -> int:
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    size: int = math.prod(tensor.dims) * itemsize
    return size


def _require_whole_tensors(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse tensors whose sizes and data do not agree, before anybody allocates what they declare."""
    for tensor in tensors_of(proto, path):
        if any(size < 0 for size in tensor.dims):
            raise invalid(path, f"the weights {tensor.name} have the sizes {list(tensor.dims)}")
        if tensor.HasField("segment"):
            raise invalid(path, f"the weights {tensor.name} come in segments")
        held = len(tensor.raw_data) if tensor.HasField("raw_data") else None
        if held is None:
            values = max(len(tensor.float_data), len(tensor.int32_data), len(tensor.int64_data),
                         len(tensor.double_data), len(tensor.uint64_data))  # fmt: skip
            complete = values == math.prod(tensor.dims)
        else:
            complete = held == _bytes_of(tensor)
        if not complete:
            raise invalid(
                path,
                f"the weights {tensor.name} should be {list(tensor.dims)}, and the file holds "
                f"{held if held is not None else values:,} {'bytes' if held is not None else 'numbers'}",
            )


def _read_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Take the weights that lie in other files into the model: from files in its own folder alone."""
    folder = path.resolve().parent
    total, files = 0, {}
    for tensor in tensors_of(proto, path):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = file_inside(folder, entries.get("location", ""), tensor.name, path)
        short = ResvitError(
            f"{path}: the weight file '{entries['location']}' is missing or too short for {tensor.name}.",
            "Copy it beside the model again.",
        )
        if any(size < 0 for size in tensor.dims) or not file.is_file():
            raise short
        needed, size = _bytes_of(tensor), file.stat().st_size
        start, length = entries.get("offset", "0"), entries.get("length", str(needed))
        if not (start.isascii() and start.isdigit() and len(start) < 20) or length != str(needed):
            raise short
        if int(start) + needed > size:
            raise short
        files[file], total = size, total + needed
        if total > 2 * sum(files.values()):
            raise invalid(path, f"its weights are {total:,} bytes, and its weight files hold less than half of that")
        with file.open("rb") as data:
            data.seek(int(start))
            tensor.raw_data = data.read(needed)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")  # so that the same weights give the same bytes, wherever they lay


def _is_sane(value: onnx.ValueInfoProto) -> bool:
    sizes = value.type.tensor_type.shape.dim
    return value.type.HasField("tensor_type") and all(
        size.dim_value > 0 for size in sizes if size.HasField("dim_value")
    )


def _checked(proto: onnx.ModelProto, weights: Collection[str], path: Path) -> onnx.ModelProto:
    """The model as ONNX's checker accepts it, without what only repeats or contradicts the rest."""
    proto.ir_version = max(proto.ir_version, _IR_VERSION)
    for value in proto.graph.output:
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.ClearField("type")  # then its shape is inferred
    replace_withdrawn_group_norms(proto, standard_opset(proto))
    if any(value.type.WhichOneof("value") is None for value in proto.graph.output):
        proto = onnx.shape_inference.infer_shapes(proto)
    told = [value for value in proto.graph.value_info if value.name not in weights and _is_sane(value)]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(told)
    if not proto.graph.output:
        raise invalid(path, "it has no output")
    for value in proto.graph.output:
        if not value.type.HasField("tensor_type"):
            raise ResvitError(
                f"{path}: its output {value.name} is no tensor ({value.type.WhichOneof('value') or 'of no type'}).",
                "Export the network with tensors as outputs.",
            )
        if any(size.HasField("dim_value") and size.dim_value < 0 for size in value.type.tensor_type.shape.dim):
            raise invalid(path, f"its output {value.name} has a negative size")
    onnx.checker.check_model(proto)
    return proto
