"""The builder's child process: one engine, one result file, then exit.

A builder takes gigabytes and, where it fails, may take its process with it. Here that process is nobody else's.
Run as ``python -m resvit_engines.builder.worker REQUEST.json``; ``build`` and ``refit`` write the request.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from resvit_engines.audit.kernels import kernels_from_log
from resvit_engines.builder import timing_cache
from resvit_engines.builder.steps import StepsToParent
from resvit_engines.errors import ExitCode, OutOfMemoryError, ResvitError
from resvit_engines.files import explain_os_errors, sha256_bytes, write_atomic
from resvit_engines.ort import sessions
from resvit_engines.pictures.sizes import sizes_from_numbers
from resvit_engines.plugins.nodes import PluginNode, plugin_nodes
from resvit_engines.process import peak_memory_mib
from resvit_engines.trt import aot_plugins as trt_plugins
from resvit_engines.trt import api as trt_api
from resvit_engines.trt import config as trt_config
from resvit_engines.trt import engine as trt_engine
from resvit_engines.trt import plugin_layers as trt_layers
from resvit_engines.trt import plugin_library as trt_library

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main(arguments: list[str]) -> int:
    """Do what the request file asks for; the result, or the error, goes to its ``result`` file."""
    request = json.loads(Path(arguments[0]).read_text())
    if not _die_with(int(request["parent"])):
        return 1
    log, result_file = trt_api.Log(), Path(request["result"])
    engine = None
    try:
        if request["kind"] == "refit":
            result = _refit(request, log)
        elif request["kind"] == "optimise":
            result = _optimise(request, log)
        else:
            result, engine = _build(request, log)
    except ResvitError as error:
        result = {"problem": error.problem, "fix": error.fix, "code": int(error.code)}
        result["memory"] = isinstance(error, OutOfMemoryError)
    finally:
        if request["log"]:
            Path(request["log"]).write_text("\n".join(log.lines) + "\n", errors="replace")
    write_atomic(result_file, json.dumps(result).encode())
    # Last, with everything else safe: it takes memory once more, and may end this process.
    if engine is not None and request["layers"]:
        result["notes"] += _describe(request, engine, Path(request["layers"]))
        write_atomic(result_file, json.dumps(result).encode())
    return 0


def _build(request: dict[str, Any], log: trt_api.Log) -> tuple[dict[str, Any], Any]:
    start = time.monotonic()
    trt = trt_api.load_tensorrt(request["module"])
    logger = trt_api.logger_into(trt, log)
    builder = trt_api.builder_from(trt, logger, log)
    nodes = _prepare_plugins(trt, request)
    network = trt_api.network_from_onnx(trt, builder, logger, Path(request["onnx"]))
    plugin_layers = trt_layers.require_plugin_layers(trt, network, nodes) if nodes else ()
    config = trt_api.configure(trt, builder, **request["config"])
    sizes = sizes_from_numbers(request["sizes"]) if request["sizes"] else None
    trt_api.set_shapes(builder, config, network, tuple(request["batch"]), sizes)
    trt_config.watch(trt, config, StepsToParent(socket.socket(fileno=request["steps"])))
    folder = request["timing_cache"] and Path(request["timing_cache"])
    owner = timing_cache.Owner(**request["owner"], version=str(trt.__version__))
    notes = _start_from_cache(config, folder, owner) if folder else []
    inputs, outputs = trt_api.io_tensors(network)
    engine = trt_api.engine_from_network(builder, network, config, log)
    if folder:
        notes += _keep_cache(config, folder, owner)
    _write(Path(request["engine"]), engine)
    result = {
        "version": str(trt.__version__),
        "seconds": time.monotonic() - start,
        "peak_mib": peak_memory_mib(),
        "inputs": [tensor.to_json() for tensor in inputs],
        "outputs": [tensor.to_json() for tensor in outputs],
        "kernels": [kernel.to_json() for kernel in kernels_from_log(log.messages)],
        "warnings": log.warnings,
        "timing_cache": owner.file_name if folder else None,
        "plugin_layers": list(plugin_layers),
        "notes": notes,
    }
    return result, engine


def _optimise(request: dict[str, Any], log: trt_api.Log) -> dict[str, Any]:
    """The graph as ONNX Runtime's optimiser leaves it: 8-bit kernels in place of Q/DQ, as one file."""
    start = time.monotonic()
    optimised = sessions.optimised_onnx(Path(request["onnx"]), Path(request["engine"]))
    log.lines += [f"{kernel.type} {kernel.name}" for kernel in optimised.kernels]
    return {
        "version": optimised.version,
        "seconds": time.monotonic() - start,
        "peak_mib": peak_memory_mib(),
        "inputs": [tensor.to_json() for tensor in optimised.inputs],
        "outputs": [tensor.to_json() for tensor in optimised.outputs],
        "kernels": [kernel.to_json() for kernel in optimised.kernels],
        "warnings": [],
        "timing_cache": None,
        "plugin_layers": [],
        "notes": [],
    }


def _prepare_plugins(trt: Any, request: dict[str, Any]) -> tuple[PluginNode, ...]:
    """Let TensorRT know the plugins that the file needs; returns the nodes that must become such."""
    if request["plugins"] == "off":
        return ()
    nodes = plugin_nodes(Path(request["onnx"]))
    if not nodes:
        raise ResvitError(
            f"{Path(request['onnx']).name} has no node with a kernel of ours, but plugins were asked for.",
            "Write the file for TensorRT with plugins, or build it without.",
        )
    if request["plugins"] == "aot":
        trt_plugins.register_plugins(trt, (node.op_type for node in nodes))
    else:
        trt_library.load_plugin_library(trt, Path(request["plugin_library"]).read_bytes())
    return nodes


def _refit(request: dict[str, Any], log: trt_api.Log) -> dict[str, Any]:
    start = time.monotonic()
    content = Path(request["stripped"]).read_bytes()
    # Compared here, on the bytes that are read next: nobody can change the file between the two.
    if sha256_bytes(content) != request["sha256"]:
        raise ResvitError(
            f"{Path(request['stripped']).name} is not the engine that was verified: its digest differs.",
            "Install the bundle again, and refit what it holds.",
            ExitCode.UNTRUSTED,
        )
    trt = trt_api.load_tensorrt(request["module"])
    logger = trt_api.logger_into(trt, log)
    if request["plugin_library"]:
        trt_library.load_plugin_library(trt, Path(request["plugin_library"]).read_bytes())
    engine = trt_engine.engine_from_bytes(trt, logger, log, content)
    whole = trt_engine.refit_from_onnx(trt, engine, logger, log, Path(request["onnx"]))
    _write(Path(request["engine"]), whole)
    return {"version": str(trt.__version__), "seconds": time.monotonic() - start, "notes": []}


def _write(path: Path, content: Any) -> None:
    with explain_os_errors(path):
        path.write_bytes(content)


def _start_from_cache(config: Any, folder: Path, owner: timing_cache.Owner) -> list[str]:
    cached = timing_cache.read_timing_cache(folder, owner)
    if trt_config.use_timing_cache(config, cached.content):
        return [cached.refusal] if cached.refusal else []
    return [f"TensorRT rejects the timing cache {folder / owner.file_name}: starting with an empty one."]


def _keep_cache(config: Any, folder: Path, owner: timing_cache.Owner) -> list[str]:
    """Add what was measured to what another build may have written meanwhile."""
    try:
        with timing_cache.locked(folder, owner):
            other = timing_cache.read_timing_cache(folder, owner).content
            timing_cache.write_timing_cache(folder, owner, trt_config.timing_cache_of(config, other))
    except ResvitError as error:  # an engine that took half an hour is not lost for its cache
        return [f"The timing cache was not kept: {error.problem}"]
    return []


def _describe(request: dict[str, Any], content: Any, path: Path) -> list[str]:
    """Write the layers of the engine just built; one that cannot be read here is not a failed build."""
    trt, log = trt_api.load_tensorrt(request["module"]), trt_api.Log()
    logger = trt_api.logger_into(trt, log)
    host_code = request["config"].get("version_compatible", False)
    try:
        engine = trt_engine.engine_from_bytes(trt, logger, log, content, host_code=host_code)
        write_atomic(path, trt_engine.layers_of(trt, engine).encode())
    except ResvitError as error:
        return [f"The engine's layers are not listed: {error.problem}"]
    return []


def _die_with(parent: int) -> bool:
    """Have the kernel end this process when its parent ends; False if the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
