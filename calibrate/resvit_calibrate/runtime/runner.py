"""A model as a function from arrays to arrays: what PyTorch, ONNX Runtime and TensorRT all become."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from resvit_calibrate.runtime.selftest import RuntimeHealth, runtime_note, self_test, with_float32_quantizers
from resvit_calibrate.runtime.sessions import Array, Arrays, fixed_batch, open_session, run_session, session_options
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import json_from_outside
from resvit_engines.pictures.encoding import ENCODING_KEY, INPUT_TYPE_KEY, InputEncoding
from resvit_engines.rows import paired_rows

__all__ = [
    "Array",
    "Arrays",
    "OnnxRunner",
    "Runner",
    "RuntimeHealth",
    "checked_runner",
    "onnx_runner",
    "pieces",
    "runtime_note",
    "scorable_opset",
    "self_test",
]

Runner: TypeAlias = Callable[[Arrays], Arrays]
"""A batch turned into outputs."""

_TOLERATED_DB = 10.0

_FLOATS: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
}


def scorable_opset() -> int:
    """The newest opset whose quantised graphs the installed ONNX Runtime runs on the CPU: 23, or 22 before 1.24.

    Release 1.23, the last for Python 3.10, has no QuantizeLinear of opset 23. Does not load the runtime.
    """
    version = importlib.metadata.version("onnxruntime").split(".")
    return 23 if (int(version[0]), int(version[1])) >= (1, 24) else 22


@dataclasses.dataclass(frozen=True)
class OnnxRunner:
    """An ONNX Runtime session as a ``Runner``: call it with a batch, get every graph output.

    A model of fixed batch size takes any number of images: they run in pieces of that size, the last one
    padded with its final image, and the padding's outputs are dropped.
    """

    session: Any
    dtypes: dict[str, np.dtype[Any] | None]
    """Graph inputs in order; the type to convert to, or None where the caller's type is passed on."""
    outputs: tuple[str, ...]
    batch: int | None
    """The batch size that the model is fixed to; None for a dynamic one."""
    encoding: InputEncoding | None = None
    """How prepared images become what the first input reads, where that is no float."""
    narrow: bool = False
    """Whether the outputs are FP16 for the engine's sake: they come back as FP32."""
    frugal: bool = False
    """Whether it gives its memory back after each run (:func:`run_session`)."""
    constants: Arrays = dataclasses.field(default_factory=dict)
    """Initialisers of the graph that are inputs as well, with what takes their place."""
    batch_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Outputs that come with their batch along another axis than the first; it is brought to the front."""

    def __call__(self, arrays: Arrays) -> Arrays:
        """Run one batch. Raises ResvitError for missing inputs, wrong shapes and failures of the runtime."""
        feeds = self.fed(arrays)
        if self.batch is None or not all(map(len, feeds.values())):
            return self._run(feeds)
        results = [
            # What has no entry for each image stays whole, so that whoever counts the entries finds it.
            {
                name: value[:size] if value.ndim and len(value) == self.batch else value
                for name, value in self._run(piece).items()
            }
            for piece, size in pieces(feeds, self.batch)
        ]
        if len(results) == 1:
            return results[0]
        return {
            name: np.concatenate([part[name] for part in results]) if results[0][name].ndim else first
            for name, first in results[0].items()
        }

    def fed(self, arrays: Arrays) -> Arrays:
        """The arrays of a batch as the model reads them. Raises ResvitError for missing inputs."""
        missing = [name for name in self.dtypes if name not in arrays]
        if missing:
            raise ResvitError(
                f"The model needs the input {missing[0]!r}, and the batch holds {sorted(arrays)}.",
                f"Name the arrays after the model's inputs: {list(self.dtypes)}.",
            )
        feeds = {
            name: np.ascontiguousarray(arrays[name], dtype=dtype) if dtype else arrays[name]
            for name, dtype in self.dtypes.items()
        }
        if self.encoding is not None:
            image = next(iter(self.dtypes))
            feeds[image] = np.ascontiguousarray(self.encoding.encode(feeds[image]))
        return feeds

    def _run(self, feeds: Arrays) -> Arrays:
        values = run_session(self.session, list(self.outputs), {**feeds, **self.constants}, frugal=self.frugal)
        found = dict(zip(self.outputs, values, strict=True))
        found |= {name: np.moveaxis(found[name], axis, 0) for name, axis in self.batch_axes.items()}
        if not self.narrow:
            return found
        return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in found.items()}


def pieces(feeds: Arrays, batch: int) -> Iterator[tuple[Arrays, int]]:
    """Cut a batch into batches of exactly ``batch`` images, each with how many of them are real.

    The last one is filled up by repeating its final image, so that no range sees a value that was not there.
    """
    total = len(next(iter(feeds.values())))
    for start in range(0, total, batch):
        part = {name: value[start : start + batch] for name, value in feeds.items()}
        size = min(batch, total - start)
        if size < batch:
            part = {
                name: np.concatenate([value, np.repeat(value[-1:], batch - size, axis=0)])
                for name, value in part.items()
            }
        yield part, size


def checked_runner(
    model: Path | bytes, arrays: Arrays, *, sets: bool = False, folder: Path | None = None
) -> tuple[OnnxRunner, str]:
    """Turn an ONNX model into a ``Runner`` whose optimised graph computes what the graph as written computes.

    Both run once on ``arrays``. Optimisers have been seen to break quantised graphs wholly, while rounding moves
    their outputs a little: where the two differ by more than a third of the signal (10 dB), the graph is run as
    written, slower. Answers that are ``sets`` have their rows paired first. Returns the runner and a sentence about it,
    empty where all is well.
    """

    def written() -> OnnxRunner:
        return onnx_runner(model, optimize=False, folder=folder)

    slow = written()(arrays)  # each session holds the weights: the first is gone before the next is opened
    optimized = onnx_runner(model, folder=folder)
    fast = optimized(arrays)
    fast = paired_rows(slow, fast) if sets else fast
    for name, expected in slow.items():
        signal = np.linalg.norm(expected.astype(np.float64))
        noise = np.linalg.norm(fast[name].astype(np.float64) - expected.astype(np.float64))
        if not noise <= signal * 10 ** (-_TOLERATED_DB / 20) and np.isfinite(signal):
            return written(), (
                "ONNX Runtime's optimised graph gives other outputs than the graph as written, so it was scored "
                "without optimisation."
            )
    return optimized, ""


def onnx_runner(
    model: Path | bytes, *, float_math: bool = True, optimize: bool = True, folder: Path | None = None
) -> OnnxRunner:
    """Turn an ONNX model, given as a file or as its bytes, into a ``Runner`` on the CPU.

    ``float_math`` keeps Q/DQ unfused, so that the result is what the graph means; without ``optimize`` the graph
    runs as it is written; ``folder`` is where the external data of bytes lies. Raises ResvitError for a model that
    cannot be loaded, and with code MISSING for a quantised one that this runtime gets wrong.
    """
    health = self_test()
    source = model
    if not health.exact:
        repaired = with_float32_quantizers(model)
        if repaired is not None:
            if not health.exact_with_casts:
                raise ResvitError(
                    f"ONNX Runtime {health.version} computes {', '.join(health.wrong)} wrongly: "
                    "this runtime cannot score a quantised model.",
                    "Install onnxruntime 1.32 or newer (Python 3.11 or newer).",
                    ExitCode.MISSING,
                )
            source = repaired
            folder = model.parent if isinstance(model, Path) else folder
    session = open_session(source, session_options(float_math=float_math, optimize=optimize), folder=folder)
    return OnnxRunner(
        session=session,
        dtypes={i.name: _FLOATS.get(i.type) for i in session.get_inputs()},
        outputs=tuple(o.name for o in session.get_outputs()),
        batch=fixed_batch(session),
        encoding=_encoding(session),
        narrow=INPUT_TYPE_KEY in session.get_modelmeta().custom_metadata_map,
    )


def _encoding(session: Any) -> InputEncoding | None:
    """What a file of ours says of its image in its metadata."""
    said = session.get_modelmeta().custom_metadata_map.get(ENCODING_KEY)
    if said is None:
        return None
    document = json_from_outside(said.encode(), f"The ONNX file's metadata {ENCODING_KEY}")
    return InputEncoding.from_json(document if isinstance(document, dict) else {})
