"""Does TensorRT for RTX build and run an engine on this GPU, whatever its table of GPUs says?

    python -m gpu_parts.rtx_here --out result.json

One convolution, built for no named GPU, which is the one that is here; then read back by the runtime.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from resvit_engines.gpu import local_sm


def network() -> bytes:
    """A convolution of 16 channels and ReLU in FP16, as ONNX."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float16)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["map"], pads=[1] * 4),
        helper.make_node("Relu", ["map"], ["out"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 16, 32, 32]) for name in ("input", "out")]
    graph = helper.make_graph(nodes, "conv", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()  # type: ignore[attr-defined, no-any-return]


def tried() -> dict[str, Any]:
    """What came of each step, with the library's own words where one did not work."""
    import tensorrt_rtx_bindings as rtx

    said: list[str] = []

    class Log(rtx.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= rtx.ILogger.WARNING:
                said.append(message[:300])

        def __init__(self) -> None:
            rtx.ILogger.__init__(self)

    log = Log()
    builder = rtx.Builder(log)
    graph = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    found: dict[str, Any] = {
        "sm": local_sm(),
        "version": rtx.__version__,
        "parsed": False,
        "built": False,
        "opened": False,
    }
    found["parsed"] = bool(rtx.OnnxParser(graph, log).parse(network()))
    if found["parsed"]:
        plan = builder.build_serialized_network(graph, builder.create_builder_config())
        found["built"] = plan is not None
        if plan is not None:
            found["opened"] = rtx.Runtime(log).deserialize_cuda_engine(plan) is not None
    return {**found, "said": said[:20]}


def main() -> None:
    """Try it and write what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(json.dumps(tried()))


if __name__ == "__main__":
    main()
