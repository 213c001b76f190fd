"""Run kernels in Triton's interpreter, on the CPU, through the very launch description that plugins use.

Triton decides when it is imported whether its functions are compiled or interpreted. So the interpreter lives in a
process of its own, one for each process of tests, whatever those have imported.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from resvit_engines.kernels.launch import Source


def run_source(source: Source, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a kernel in float64; ``inputs`` hold the stored numbers of its tensor inputs, in any type.

    Scalars, grid and output shapes are computed from ``source.launch``. Outputs start as garbage: what the kernel does
    not write is seen.
    """
    pipe = _child()
    pickle.dump((source, [np.asarray(array) for array in inputs]), pipe.stdin)
    pipe.stdin.flush()
    done, result = pickle.load(pipe.stdout)
    if not done:
        raise RuntimeError(result)
    return result


@functools.cache
def _child() -> Any:
    child = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(child.kill)
    return child


def _interpreted(source: Source, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    import torch

    types = {
        "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int32": torch.int32,
        "int8": torch.int8, "fp8": torch.float8_e4m3fn, "bool": torch.bool,
    }  # fmt: skip
    launch, function = (
        source.launch,
        getattr(importlib.import_module(f"resvit_engines.kernels.triton.{source.module}"), source.function),
    )
    given = [
        torch.from_numpy(np.array(array, np.float64)).to(types[dtype])
        for array, dtype in zip(inputs, launch.inputs, strict=True)
    ]
    shapes = [array.shape for array in inputs]
    results = [
        torch.full([extent.at(shapes) for extent in result.shape], 77.0).to(types[result.dtype])
        for result in launch.outputs
    ]
    scalars = [extent.at(shapes) for extent in launch.scalars]
    names = [name for name, _ in source.arguments]
    arguments = dict(zip(names, [*given, *scalars, *results], strict=True))
    function[tuple(extent.at(shapes) for extent in launch.grid)](**arguments, **source.constants)
    return [result.to(torch.float64).numpy() for result in results]


def _round_as_a_gpu_does() -> None:
    """The interpreter cuts off where it converts to BF16 and FP8, and multiplies FP8 as FP16; GPUs do neither."""
    import ml_dtypes
    from triton.runtime import interpreter

    types = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn}

    def convert(bits: np.ndarray, have: Any, want: Any, _: Any) -> np.ndarray:
        numbers = bits.view(types[str(have)]).astype(np.float32).astype(types[str(want)])
        return numbers.view(f"uint{want.primitive_bitwidth}")

    def numbers(handle: Any) -> np.ndarray:
        scalar = handle.dtype.scalar
        return handle.data.view(types[str(scalar)]).astype(np.float32) if scalar.is_floating() else handle.data

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(numbers(a), numbers(b), dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(product, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def _serve() -> None:
    _round_as_a_gpu_does()
    replies, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            source, inputs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply: tuple[bool, Any] = (True, _interpreted(source, inputs))
        except Exception as error:
            reply = (False, f"{type(error).__name__}: {error}")
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    _serve()
