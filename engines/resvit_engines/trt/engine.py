"""The calls into TensorRT that read an engine.

Reading an engine runs code from it. Call these only with an engine that this process has just built itself, or one
whose digest was compared with that of a signed manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.trt.api import Log, parser_message, said_by


def engine_from_bytes(trt: Any, logger: Any, log: Log, content: Any, *, host_code: bool = False) -> Any:
    """Deserialise a trusted engine; needs the GPU that it was built for.

    ``host_code`` allows the lean runtime that a version-compatible engine carries: code for the CPU.

    Raises:
        ResvitError: BUILD with TensorRT's own words.
    """
    try:
        runtime = trt.Runtime(logger)
    except (TypeError, RuntimeError) as error:
        raise ResvitError(
            f"TensorRT {trt.__version__} cannot run engines here: {said_by(log) or error}",
            "Check that the NVIDIA driver works (nvidia-smi) and is new enough for this TensorRT.",
            ExitCode.MISSING,
        ) from error
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise ResvitError(
            f"TensorRT {trt.__version__} cannot read the engine: {said_by(log) or 'it gave no reason'}",
            "An engine is read by the TensorRT version and the GPU that it was built for: build it again here.",
            ExitCode.BUILD,
        )
    return engine


def layers_of(trt: Any, engine: Any) -> str:
    """The engine's layers as JSON text, in the words of TensorRT's inspector."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def refit_from_onnx(trt: Any, engine: Any, logger: Any, log: Log, onnx: Path) -> Any:
    """Put the weights of ``onnx`` into a weight-stripped engine; returns the whole engine, serialised (a buffer).

    Raises:
        ResvitError: BUILD with TensorRT's own words, where the ONNX file is not the one that it was built from.
    """
    refitter = trt.Refitter(engine, logger)
    weights = trt.OnnxParserRefitter(refitter, logger)
    if not weights.refit_from_file(str(onnx)):
        errors = [parser_message(weights.get_error(index)) for index in range(weights.num_errors)]
        raise _mismatch(onnx, "; ".join(errors) or said_by(log))
    if not refitter.refit_cuda_engine():
        raise _mismatch(onnx, said_by(log))
    settings = engine.create_serialization_config()
    # Else a stripped engine would be written without its weights again.
    settings.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return engine.serialize_with_config(settings)


def _mismatch(onnx: Path, said: str) -> ResvitError:
    return ResvitError(
        f"The weights of {onnx.name} do not fit the stripped engine: {said or 'no reason given'}.",
        "Refit with the very ONNX file that the engine was built from.",
        ExitCode.BUILD,
    )
