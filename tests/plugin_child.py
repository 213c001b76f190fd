"""Run in a process of its own, where ``import tensorrt`` finds a stand-in; prints one line of JSON at the end.

``describe OP...``: registers the op types and calls what was registered as TensorRT calls it, over TensorRT's own
descriptors and symbolic sizes. ``parse FILE HOW [LIBRARY]``: has the ONNX parser read the file with plugins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp
from tensorrt_bindings.plugin import _lib, _tensor

from plugin_kernels import kernel_for
from resvit_engines.plugins.fields import LISTS, NAMES, fields_from_kernel
from resvit_engines.plugins.names import NAMESPACE, OP_TYPES
from resvit_engines.trt.aot_plugins import register_plugins

SHAPE = (2, 197, 384)


class Size(trt.IDimensionExpr):
    """A size that is known: TensorRT makes its own only while it builds."""

    @classmethod
    def of(cls, value):
        made = trt.IDimensionExpr.__new__(cls)
        made.value = value
        return made


class Arithmetic:
    """What TensorRT's expression builder computes."""

    def constant(self, value):
        assert type(value) is int
        return Size.of(value)

    def operation(self, op, first, second):
        a, b = first.value, second.value
        return Size.of({trt.DimensionOperation.PROD: a * b, trt.DimensionOperation.CEIL_DIV: -(-a // b)}[op])


def inputs_of(count, *, fake, dtype=trt.float16):
    descs = []
    for _ in range(count):
        desc = trtp.TensorDesc()
        desc.dtype = dtype
        desc.shape_expr = trtp.ShapeExprs(3, _is_dummy=True)
        if not fake:
            for axis, size in enumerate(SHAPE):
                desc.shape_expr[axis] = trtp.ShapeExpr(_tensor.SymInt32(Size.of(size)))
        desc._immutable = True
        descs.append(desc)
    return descs


def described(name):
    op, kernel = OP_TYPES[name], kernel_for(name)
    fields = {
        key: np.array(value, np.int32) if key in LISTS else value for key, value in fields_from_kernel(kernel).items()
    }
    plugin = _lib.QDP_REGISTRY[f"{NAMESPACE}::{name}"]
    # First TensorRT asks for data types alone, with sizes that are not there.
    _tensor.SymIntExpr._exprBuilder = None
    fakes = plugin.register_func(*inputs_of(len(op.inputs), fake=True), **fields)
    _tensor.SymIntExpr._exprBuilder = Arithmetic()
    inputs = inputs_of(len(op.inputs), fake=False)
    outputs = plugin.register_func(*inputs, **fields)
    entry, ptx, launch, scalars = plugin.aot_impl_func(*inputs, *fields.values(), outputs, 0)
    assert isinstance(launch, trtp.KernelLaunchParams)
    assert all(isinstance(scalar, trtp.SymInt32) for scalar in scalars)
    parts = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
    return {
        "fake": [(desc.dtype.name, len(desc.shape_expr)) for desc in fakes],
        "outputs": [(desc.dtype.name, [size._expr.value for size in desc.shape_expr]) for desc in outputs],
        "entry": entry,
        "ptx": ptx == kernel.ptx,
        "launch": [getattr(launch, part)._expr.value for part in parts],
        "scalars": [scalar._expr.value for scalar in scalars],
        "counts": [len(plugin.input_tensor_names), plugin.num_outputs],
        "attributes": list(plugin.input_attrs),
        "aot_attributes": plugin.aot_impl_attr_names,
    }


def made(name):
    """The ahead-of-time plugin that TensorRT's own creator makes of a node's attributes, asked for its data types."""
    op = OP_TYPES[name]
    # A field holds an address alone: what it points to must stay.
    values = {
        key: np.array(value, np.int32) if key in LISTS else value.encode()
        for key, value in fields_from_kernel(kernel_for(name)).items()
    }
    types = {True: trt.PluginFieldType.INT32, False: trt.PluginFieldType.CHAR}
    fields = [trt.PluginField(key, value, types[key in LISTS]) for key, value in values.items()]
    collection = trt.PluginFieldCollection(fields)
    creator = trt.get_plugin_registry().get_creator(name, "1", NAMESPACE)
    ahead = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, NAMESPACE, collection, trt.TensorRTPhase.BUILD, ahead)
    given = plugin.get_output_data_types([trt.float16] * len(op.inputs), [3] * len(op.inputs))
    return [plugin.get_num_outputs(), [dtype.name for dtype in given]]


def refusals():
    """What is said of tensors that are not the kernel's."""
    name = "ResvitAttentionBias"
    fields, plugin = fields_from_kernel(kernel_for(name)), _lib.QDP_REGISTRY[f"{NAMESPACE}::{name}"]
    said = []
    for inputs, changes in (
        (inputs_of(2, fake=True, dtype=trt.float32), {}),
        (inputs_of(2, fake=True), {"kernel_inputs": [1, 1, 1]}),
        (inputs_of(2, fake=True), {"kernel_grid": [1, 1, 0, 3, 1, 1, 0, 1, 0]}),
        (inputs_of(2, fake=True), {"kernel_grid": [1]}),
    ):
        try:
            plugin.register_func(*inputs, **{**fields, **changes})
        except Exception as error:
            said.append([type(error).__name__, str(error)])
    return said


def creators():
    registry = trt.get_plugin_registry()
    found = {creator.name: creator for creator in registry.all_creators if creator.plugin_namespace == NAMESPACE}
    types = {
        name: [(field.name, field.type.name) for field in registry.get_creator(name, "1", NAMESPACE).field_names]
        for name in found
    }
    assert all([name for name, _ in fields] == list(NAMES) for fields in types.values())
    return types


def parsed(file, how, library):
    from resvit_engines.plugins.nodes import plugin_nodes
    from resvit_engines.trt.api import Log, logger_into
    from resvit_engines.trt.plugin_layers import require_plugin_layers
    from resvit_engines.trt.plugin_library import load_plugin_library

    log = Log()

    class Echo(list):
        def append(self, text):
            print(text, flush=True)  # before the process may be ended

    log.lines = Echo()
    logger = logger_into(trt, log)
    nodes = plugin_nodes(Path(file))
    if how == "aot":
        register_plugins(trt, [node.op_type for node in nodes])
    elif how == "library":
        load_plugin_library(trt, Path(library).read_bytes())
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    print("PARSED", parser.parse_from_file(file), flush=True)
    require_plugin_layers(trt, network, nodes)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "describe":
        registry = trt.get_plugin_registry()
        if registry is None:  # over stub libraries
            _lib._register_plugin_creator = lambda *_: None
        register_plugins(trt, arguments)
        found = {"ops": {name: described(name) for name in arguments}, "refusals": refusals()}
        if registry is not None:
            found |= {"creators": creators(), "made": {name: made(name) for name in arguments}}
        print()
        print(json.dumps(found))
    else:
        parsed(arguments[0], arguments[1], arguments[2] if len(arguments) > 2 else None)
