"""Our nodes as ahead-of-time plugins of TensorRT (10.9 and later): the kernel goes into the engine, as PTX.

Two functions per op type tell TensorRT everything: one describes the outputs, the other gives the kernel and its
launch. Both read all of it from the node's attributes (``fields``), with sizes as TensorRT's symbolic expressions.
Neither the device that runs the engine nor the engine itself needs this module. What TensorRT does with the two:
docs.nvidia.com/deeplearning/tensorrt, "Extending TensorRT with custom layers: quickly deployable plugins".
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.launch import Extent
from resvit_engines.plugins.fields import DATA_TYPES, NAMES, TEXTS, CompiledNode, kernel_from_fields
from resvit_engines.plugins.names import NAMESPACE, OP_TYPES, OpType

_OLDEST = "10.9"


def plugin_api(trt: Any) -> Any:
    """TensorRT's module for plugins in Python.

    Raises:
        ResvitError: IMPOSSIBLE where this TensorRT has no ahead-of-time plugins.
    """
    try:
        plugin = importlib.import_module("tensorrt.plugin")
    except (ImportError, OSError):
        plugin = None
    if not hasattr(plugin, "aot_impl"):
        raise ResvitError(
            f"TensorRT {trt.__version__} has no ahead-of-time plugins; they came with {_OLDEST}.",
            "Use the plugin library instead ('resvit-engine plugin' builds it), or build without plugins.",
            ExitCode.IMPOSSIBLE,
        )
    return plugin


def register_plugins(trt: Any, op_types: Iterable[str]) -> None:
    """Tell TensorRT how to make layers of the op types named; once each in a process, before a file is parsed.

    Raises:
        ResvitError: IMPOSSIBLE where this TensorRT has no ahead-of-time plugins.
    """
    plugin = plugin_api(trt)
    for name in dict.fromkeys(op_types):
        op = OP_TYPES[name]
        plugin.register(f"{NAMESPACE}::{name}")(_described(trt, plugin, op))
        plugin.aot_impl(f"{NAMESPACE}::{name}")(_launched(plugin, op))


def _described(trt: Any, plugin: Any, op: OpType) -> Callable[..., Any]:
    """The function that turns descriptors of the inputs and the attributes into descriptors of the outputs."""

    def describe(*inputs: Any, **fields: Any) -> Any:
        node = _checked(kernel_from_fields(fields), op, inputs)
        return tuple(
            plugin.from_shape_expr(
                tuple(_symbolic(plugin, size, inputs) for size in result.shape), trt.DataType(DATA_TYPES[result.dtype])
            )
            for result in node.launch.outputs
        )

    returned = types.GenericAlias(tuple, (plugin.TensorDesc,) * len(op.outputs))
    return _with_signature(describe, plugin, op, returned)


def _launched(plugin: Any, op: OpType) -> Callable[..., Any]:
    """The function that gives the kernel's name, its PTX, the launch, and the extra arguments."""

    def launch(*arguments: Any) -> Any:
        # TensorRT gives inputs, attributes in the order in which they were declared, outputs, and the tactic.
        inputs = arguments[: len(op.inputs)]
        fields = dict(zip(NAMES, arguments[len(op.inputs) : -2], strict=True))
        node = _checked(kernel_from_fields(fields), op, inputs)
        x, y, z = (_symbolic(plugin, extent, inputs) for extent in node.launch.grid)
        parameters = plugin.KernelLaunchParams(
            grid_x=x, grid_y=y, grid_z=z, block_x=node.threads, shared_mem=node.shared_bytes
        )
        scalars = plugin.SymIntExprs(len(node.launch.scalars))
        for index, extent in enumerate(node.launch.scalars):
            scalars[index] = plugin.SymInt32(_symbolic(plugin, extent, inputs))
        return node.entry, node.ptx, parameters, scalars

    returned = types.GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymExprs))
    return _with_signature(launch, plugin, op, returned)


def _with_signature(function: Callable[..., Any], plugin: Any, op: OpType, returned: Any) -> Callable[..., Any]:
    """TensorRT learns names and types of inputs and attributes from a function's signature, and nothing else."""
    ends = () if function.__name__ == "describe" else ("outputs", "tactic")
    # Only the first function may, and must, have annotations: versions before 11 trip over an array's in the second.
    empty = inspect.Parameter.empty
    tensor, text, numbers = (empty, empty, empty) if ends else (plugin.TensorDesc, str, NDArray[np.int32])
    attributes = {name: text if name in TEXTS else numbers for name in NAMES}
    names = {**dict.fromkeys(op.inputs, tensor), **attributes, **dict.fromkeys(ends, empty)}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for name, annotation in names.items()
    ]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return function


def _checked(node: CompiledNode, op: OpType, inputs: Sequence[Any]) -> CompiledNode:
    """Refuse a kernel that is not for these tensors."""
    launch = node.launch
    expected = (len(op.inputs), len(op.outputs))
    if (len(launch.inputs), len(launch.outputs)) != expected:
        raise _unfit(op, f"it has {len(launch.inputs)} inputs and {len(launch.outputs)} outputs, not {expected}")
    for name, desc, wanted in zip(op.inputs, inputs, launch.inputs, strict=True):
        dtype = desc.dtype
        if int(dtype) != DATA_TYPES[wanted]:
            raise _unfit(op, f"the input {name!r} is {dtype.name} in the graph and {wanted} in the kernel")
    extents = [*launch.grid, *launch.scalars, *(size for result in launch.outputs for size in result.shape)]
    for term in (term for extent in extents for term in extent.terms):
        desc = inputs[term.input]
        if term.axis >= len(desc.shape_expr):
            raise _unfit(op, f"its input {term.input} has {len(desc.shape_expr)} dimensions, too few for the kernel")
    return node


def _unfit(op: OpType, reason: str) -> ResvitError:
    return ResvitError(
        f"A kernel does not fit its node of kind {op.name}: {reason}.",
        "Write the file for TensorRT again with this version of resvit-export.",
        ExitCode.BUILD,
    )


def _symbolic(plugin: Any, extent: Extent, inputs: Sequence[Any]) -> Any:
    """An extent over the inputs' symbolic shapes."""
    whole: Any = None
    for term in extent.terms:
        desc = inputs[term.input]
        size = desc.shape_expr[term.axis]
        size = size if term.divisor == 1 else plugin.cdiv(size, term.divisor)
        whole = size if whole is None else whole * size
    if whole is None:
        return _constant(plugin, extent.factor, inputs)
    return whole if extent.factor == 1 else whole * extent.factor


def _constant(plugin: Any, value: int, inputs: Sequence[Any]) -> Any:
    # Where TensorRT only asks for data types, sizes are fake; before 10.16 a constant would then be made by the
    # expression builder of an earlier call, which may be gone.
    fake = any(size.is_fake for desc in inputs for size in desc.shape_expr)
    return plugin.ShapeExpr() if fake else plugin.ShapeExpr(value)
