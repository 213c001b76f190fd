"""The builder's child process: one engine, one result file, then exit.

A builder takes gigabytes and, where it fails, may take its process with it. Here that process is nobody else's.
Run as ``python -m resvit_engines.rtx_worker REQUEST.json``; the request is written by ``resvit_engines.build``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from resvit_engines import trt_api
from resvit_engines.errors import ResvitError
from resvit_engines.files import explain_os_errors
from resvit_engines.kernels import kernels_from_log

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main(arguments: list[str]) -> int:
    """Build what the request file asks for; the result, or the error, goes to its ``result`` file."""
    request = json.loads(Path(arguments[0]).read_text())
    if not _die_with(int(request["parent"])):
        return 1
    log = trt_api.Log()
    try:
        result = _engine_from_request(request, log)
    except ResvitError as error:
        result = {"problem": error.problem, "fix": error.fix, "code": int(error.code)}
    finally:
        if request["log"]:
            Path(request["log"]).write_text("\n".join(log.lines) + "\n", errors="replace")
    Path(request["result"]).write_text(json.dumps(result))
    return 0


def _engine_from_request(request: dict[str, Any], log: trt_api.Log) -> dict[str, Any]:
    start = time.monotonic()
    trt = trt_api.load_tensorrt(request["module"])
    logger = trt_api.logger_into(trt, log)
    builder = trt_api.builder_from(trt, logger, log)
    network = trt_api.network_from_onnx(trt, builder, logger, Path(request["onnx"]))
    config = trt_api.configure(trt, builder, request["workspace_mib"], request["optimization_level"], request["sm"])
    if request["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    trt_api.set_batch(builder, config, network, tuple(request["batch"]))
    inputs, outputs = trt_api.tensor_facts(network)
    engine = trt_api.engine_from_network(builder, network, config, log)
    path = Path(request["engine"])
    with explain_os_errors(path):
        path.write_bytes(engine)
    return {
        "version": str(trt.__version__),
        "seconds": time.monotonic() - start,
        "peak_mib": _peak_mib(),
        "inputs": inputs,
        "outputs": outputs,
        "kernels": [kernel.to_json() for kernel in kernels_from_log(log.messages)],
        "warnings": log.warnings,
    }


def _peak_mib() -> int:
    """Peak resident memory of this process in MiB: VmHWM, since ru_maxrss counts the parent's before exec too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    return 0


def _die_with(parent: int) -> bool:
    """Have the kernel end this process when its parent ends; False if the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
