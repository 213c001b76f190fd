"""Every call into TensorRT that differs, or might differ, between TensorRT 10, TensorRT 11 and TensorRT for RTX.

Imported by the builder's child process only. The module ``trt`` that the functions take is ``tensorrt`` or
``tensorrt_rtx_bindings``: their Python interfaces are the same but for the compute capabilities. Every name that is
used here stands in ``names``; ``config`` holds what watches and speeds up a build, ``engine`` the calls
that read an engine, ``running`` those that run it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, OutOfMemoryError, ResvitError
from resvit_engines.pictures.sizes import SizeRange
from resvit_engines.trt.io_tensor import IoTensor

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8e4m3fn"}
_FIX_GRAPH = "The ONNX file holds something that this builder cannot compile; the message names it."
_FIX_MEMORY = "Give the builder a smaller workspace or batch, or close other programs on this machine."
_FIX_STOPPED = "Run the same command again; finished stages are kept."
_FIX_FP8 = "This GPU has no FP8: quantise with --precision int8."


_INSTALL = {
    "tensorrt": "pip install tensorrt, where the GPU is",
    "tensorrt_rtx_bindings": "pip install 'resvit-export[host]'",
}


def load_tensorrt(module: str) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx_bindings``.

    Raises:
        ResvitError: MISSING where it is not installed or its libraries do not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ResvitError(
            f"The Python package {module} does not load: {error}.",
            f"On a workstation: {_INSTALL.get(module, 'install it')}. On a Jetson TensorRT comes with JetPack: "
            "use the system's Python, or a virtual environment made with --system-site-packages.",
            ExitCode.MISSING,
        ) from error


class Log:
    """What the builder said: all messages in order, and those that matter by severity."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def add(self, severity: str, text: str) -> None:
        """Record one message; ``severity`` is TensorRT's name for it."""
        self.messages.append(text)
        self.lines.append(f"[{severity[:1]}] {text}")
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self.errors.append(text.strip())
        elif severity == "WARNING" and text.strip() not in self.warnings:
            self.warnings.append(text.strip())


def logger_into(trt: Any, log: Log) -> Any:
    """A TensorRT logger that hands every message, verbose ones too, to ``log``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.add(severity.name, msg)

    return Logger()


def builder_from(trt: Any, logger: Any, log: Log) -> Any:
    """Create the builder; real TensorRT needs a working driver for that.

    Raises:
        ResvitError: BUILD, with TensorRT's own words, where it cannot start.
    """
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        raise ResvitError(
            f"TensorRT {trt.__version__} does not start: {said_by(log) or error}",
            "Check that the NVIDIA driver works (nvidia-smi) and is new enough for this TensorRT.",
            ExitCode.BUILD,
        ) from error


def network_from_onnx(trt: Any, builder: Any, logger: Any, onnx: Path) -> Any:
    """Parse an ONNX file into a strongly typed network: precision is what the graph says, nothing else.

    Raises:
        ResvitError: BUILD with the parser's own message and the node that it stopped at.
    """
    # The flag must be set before TensorRT 11 and changes nothing from there on.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser_message(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ResvitError(
            f"The ONNX parser does not accept {onnx.name}: {'; '.join(errors) or 'no reason given'}.",
            "Write that part of the network with other operations and export it again.",
            ExitCode.BUILD,
        )
    return network


def parser_message(trouble: Any) -> str:
    """One error of the ONNX parser, with the node that it is about."""
    text = str(trouble.desc()).strip().rstrip(".")
    where = trouble.node_name() if trouble.node() >= 0 else ""
    return f"node {where!r} ({trouble.node_operator()}): {text}" if where else text


def set_shapes(
    builder: Any, config: Any, network: Any, batch: tuple[int, int, int], sizes: SizeRange | None = None
) -> None:
    """Give every input its batch, and an image whose height or width is open its sizes.

    What is one number becomes a fixed dimension, so that the compiler knows it and its kernel list names it; what
    varies becomes an optimisation profile.

    Raises:
        ResvitError: INPUT where the graph has another fixed batch, or an open dimension that nothing is said of.
    """
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        free = _free_axes(tensor.name, shape, batch, sizes)
        if not free:
            continue
        least, usual, most = (
            tuple(free[axis][turn] if axis in free else size for axis, size in enumerate(shape)) for turn in range(3)
        )
        tensor.shape = tuple(low if low == high else -1 for low, high in zip(least, most, strict=True))
        if least != most:
            dynamic = True
            profile.set_shape(tensor.name, least, usual, most)
    if dynamic:
        config.add_optimization_profile(profile)


def _free_axes(
    name: str, shape: tuple[int, ...], batch: tuple[int, int, int], sizes: SizeRange | None
) -> dict[int, tuple[int, int, int]]:
    """By open axis, the smallest, usual and largest that it is to be."""
    sides = dict(zip((2, 3), sizes.spans, strict=True)) if sizes is not None and len(shape) == 4 else {}
    if any(size < 0 and axis not in sides for axis, size in enumerate(shape) if axis):
        raise ResvitError(
            f"Input {name!r} has the shape {list(shape)}: only the batch may be dynamic, and height and width of an "
            "image where a range of sizes is given.",
            "Say the range, as in --input-shape 3x320..640x320..640, or export the model with fixed sizes.",
        )
    if shape and shape[0] >= 0 and {*batch} != {shape[0]}:
        raise ResvitError(
            f"Input {name!r} has a fixed batch of {shape[0]}, but {_batch(batch)} was asked for.",
            f"Ask for a batch of {shape[0]}, or export the model with a dynamic batch.",
        )
    return {axis: sides[axis] if axis else batch for axis, size in enumerate(shape) if size < 0}


def _batch(batch: tuple[int, int, int]) -> str:
    return f"a batch of {batch[0]}" if batch[0] == batch[2] else f"a batch of {batch[0]} to {batch[2]}"


def configure(
    trt: Any,
    builder: Any,
    *,
    workspace_mib: int,
    optimization_level: int,
    sms: Sequence[int] = (),
    sparse: bool = False,
    hardware_compatible: bool = False,
    version_compatible: bool = False,
    strip_weights: bool = False,
) -> Any:
    """The builder's settings.

    ``sms`` is for TensorRT for RTX alone, which builds for GPUs that are not there; one engine may serve several of
    them. ``strip_weights`` leaves the weights out of the engine: it then runs after a refit with the same ones.

    Raises:
        ResvitError: IMPOSSIBLE where this TensorRT for RTX has no code generator for one of ``sms``.
    """
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    config.builder_optimization_level = optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if sms:
        _set_capabilities(trt, config, sms)
    elif hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        # The weights come back as they were, so the builder may use kernels that depend on their values.
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    return config


def _set_capabilities(trt: Any, config: Any, sms: Sequence[int]) -> None:
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
        if capability is None:
            raise ResvitError(
                f"TensorRT for RTX {trt.__version__} cannot build for SM {sm / 10:.1f}.",
                "Build with TensorRT on a machine that has this GPU.",
                ExitCode.IMPOSSIBLE,
            )
        config.set_compute_capability(capability, index)


def engine_from_network(builder: Any, network: Any, config: Any, log: Log) -> Any:
    """Build, and return the serialised engine (a buffer).

    Raises:
        OutOfMemoryError: where its words say so.
        ResvitError: BUILD with TensorRT's own words, INTERRUPTED where it was told to stop.
    """
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        said = said_by(log)
        if any("BuildCanceled" in error for error in log.errors):
            raise ResvitError("The build was stopped; no engine was written.", _FIX_STOPPED, ExitCode.INTERRUPTED)
        problem = f"The builder failed: {said or 'it gave no reason'}"
        if "memory" in said.lower():
            raise OutOfMemoryError(problem, _FIX_MEMORY, ExitCode.BUILD)
        raise ResvitError(problem, _fix_for(said), ExitCode.BUILD)
    return engine


def said_by(log: Log) -> str:
    """The last errors, in TensorRT's own words."""
    return " | ".join(dict.fromkeys(log.errors[-3:]))


def _fix_for(said: str) -> str:
    lower = said.lower()
    return _FIX_FP8 if "fp8" in lower and "target" in lower else _FIX_GRAPH


def io_tensors(network: Any) -> tuple[tuple[IoTensor, ...], tuple[IoTensor, ...]]:
    """The network's inputs and outputs; a dynamic dimension is -1."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return tuple(map(_io_tensor, inputs)), tuple(map(_io_tensor, outputs))


def _io_tensor(tensor: Any) -> IoTensor:
    dtype = tensor.dtype
    name = dtype.name
    return IoTensor(tensor.name, tuple(int(size) for size in tensor.shape), _DTYPES.get(name, name.lower()))
