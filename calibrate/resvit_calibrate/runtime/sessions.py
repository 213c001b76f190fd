"""ONNX Runtime sessions on the CPU: opened and run with failures that say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from resvit_engines.errors import ExitCode, OutOfMemoryError, ResvitError, first_line, is_out_of_memory

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = dict[str, Array]
"""Arrays by the name of the graph input or output that they belong to."""

INTERNAL = "resvit."
"""How the names of what this project adds to a graph begin; no message shows them."""

_MOST_SHOWN = 8
"""Inputs that a message lists."""


def cpu_count() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session_options(*, float_math: bool = True, optimize: bool = True) -> Any:
    """ONNX Runtime's options as this project sets them: one thread per usable core, errors only in the log.

    ``float_math`` keeps Q/DQ unfused: each pair does what ONNX says, not what an integer kernel makes of it.
    Without ``optimize`` the graph runs node by node as it is written.
    """
    ort = onnxruntime_module()
    options = ort.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures come back as exceptions
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Up to 1.32 at least, it makes of Transpose, Cast and MatMul, as FP16 graphs have them, a graph on which the
    # process dies (https://github.com/microsoft/onnxruntime/issues/28392).
    options.add_session_config_entry("optimization.disable_specified_optimizers", "MatmulTransposeFusion")
    if float_math:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def open_session(model: Path | bytes, options: Any, *, folder: Path | None = None) -> Any:
    """Open a CPU session; ``folder`` is where the external data of a model given as bytes lies.

    Raises ResvitError when the file is missing, is no ONNX model, or holds what this runtime cannot run, and
    OutOfMemoryError.
    """
    ort = onnxruntime_module()
    if isinstance(model, Path) and not model.is_file():
        raise ResvitError(f"There is no model file {model}.", "Check the path.")
    add_weight_folder(options, folder)
    source = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        what = str(model) if isinstance(model, Path) else "the model"
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"Memory ran out while ONNX Runtime loaded {what}.",
                "Close what else takes memory, or use a machine with more.",
                ExitCode.SYSTEM,
            ) from error
        raise ResvitError(
            f"ONNX Runtime {ort.__version__} cannot load {what}: {first_line(error)}",
            "If the file is complete and passes onnx.checker, an operator or external data file is missing; "
            "export it again, or with a lower opset.",
        ) from error


def add_weight_folder(options: Any, folder: Path | None) -> None:
    """Say in a session's options where the external data of a model given as bytes lies, if it has any."""
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))


def run_session(session: Any, outputs: list[str], feeds: Arrays, *, frugal: bool = False) -> list[Array]:
    """Run a session, its failures told as ResvitError.

    A ``frugal`` run gives the memory of its activations back at its end: sessions that are open side by side and run
    in turn take no more than one of them.
    """
    try:
        values: list[Array] = session.run(outputs, feeds, _shrinking() if frugal else None)
    except Exception as error:
        shown = [
            f"{name} {value.dtype}{list(value.shape)}"
            for name, value in feeds.items()
            if not name.startswith(INTERNAL) and value.ndim
        ]
        shapes = ", ".join([*shown[:_MOST_SHOWN], *(["…"] if len(shown) > _MOST_SHOWN else [])])
        if is_out_of_memory(error):
            several = any(value.ndim and len(value) > 1 for value in feeds.values())
            raise OutOfMemoryError(
                f"Memory ran out while the model ran on {shapes}.",
                f"{'Use a smaller batch size, close' if several else 'Close'} what else takes memory, use smaller "
                "images (--input-shape), or a machine with more memory.",
                ExitCode.SYSTEM,
            ) from error
        wanted = ", ".join(
            f"{i.name} {i.type}{i.shape}" for i in session.get_inputs() if not i.name.startswith(INTERNAL) and i.shape
        )
        raise ResvitError(
            f"ONNX Runtime could not run the model on {shapes}: {first_line(error)}",
            f"The model declares {wanted}; check the image size, the channels and the batch size.",
        ) from error
    return values


def _shrinking() -> Any:
    options = onnxruntime_module().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def fixed_batch(session: Any) -> int | None:
    """The batch size that a session's model is fixed to: the first dimension of its first input, or None."""
    shape = session.get_inputs()[0].shape if session.get_inputs() else []
    return shape[0] if shape and isinstance(shape[0], int) and shape[0] > 0 else None


def onnxruntime_module() -> Any:
    """The onnxruntime package. Raises ResvitError (MISSING) where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ResvitError(
            "ONNX Runtime is not installed, and scoring a model needs it.",
            "Install it with: pip install 'resvit-export[host]'",
            ExitCode.MISSING,
        ) from error
    return onnxruntime
