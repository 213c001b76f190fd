"""NVIDIA ModelOpt's own ONNX quantiser, as a second opinion: its placement, its ranges, our report.

The extra ``resvit-export[modelopt]`` installs it. It runs on the CPU and is imported nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from resvit_calibrate.ranges.estimators import Estimator
from resvit_engines.errors import ResvitError
from resvit_engines.files import write_atomic
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysis import Analysis, analyse
from resvit_quantize.graph.network import constant, network_from_onnx, onnx_from_network
from resvit_quantize.graph.schema import is_float
from resvit_quantize.modelopt.quiet import quiet_modelopt
from resvit_quantize.placement.patterns import nodes_matching
from resvit_quantize.qdq.half import KeptFloat
from resvit_quantize.qdq.report import QuantizeReport, Suit, as_it_is, report_from_graph
from resvit_quantize.settings import QuantizeSettings

_AUTOCAST_BATCHES = 8
_ESTIMATORS = {Estimator.MAX: "max", Estimator.ENTROPY: "entropy"}
_REASON = "ModelOpt's placement"


def quantize_with_modelopt(
    model: Path,
    batches: Iterable[Any],
    settings: QuantizeSettings,
    out: Path,
    reporter: Reporter = SILENT,
    suit: Suit = as_it_is,
) -> QuantizeReport:
    """Write ModelOpt's INT8 or FP8 post-training quantisation of ``model``, or its AutoCast to FP16, to ``out``.

    ``batches`` yields objects with ``images`` float32 [B, C, H, W], or arrays by input name. ModelOpt knows the
    estimators ``max`` and ``entropy``; others are replaced by ``max``, with a warning. ``suit`` rewrites the file for a
    builder before it is reported on. Raises
    :class:`ResvitError` with code MISSING where ModelOpt does not import, and with ModelOpt's message where it
    fails.
    """
    if settings.include:
        raise ResvitError(
            "ModelOpt's quantiser cannot be told to include single nodes.",
            "Drop --include, or use --quantizer resvit.",
        )
    network = network_from_onnx(model)
    analysis = analyse(network)
    estimator = _ESTIMATORS.get(settings.estimator, "max")
    if settings.precision is not Precision.FP16 and settings.estimator not in _ESTIMATORS:
        reporter.warn(f"ModelOpt has no estimator '{settings.estimator.value}'; 'max' is used instead.")
    products = [p.node for p in analysis.products]
    refused = nodes_matching(settings.exclude, products, "--exclude")
    excluded = [*_exact(n for n in products if n in refused), *_exact(_infinite(network))]
    reader = _Reader(network, batches)
    with tempfile.TemporaryDirectory(prefix="resvit-modelopt-") as scratch:
        source = Path(scratch) / "float.onnx"
        onnx_from_network(network, source)
        if settings.precision is Precision.FP16:
            data = _autocast(source, reader, excluded)
        else:
            data = _quantized(source, reader, excluded, settings.precision, estimator)
    proto = _checked(data)
    data = proto.SerializeToString(deterministic=True)
    result = ir.serde.deserialize_model(proto)
    write_atomic(out, data)
    result = suit(out) or result
    return report_from_graph(
        analysis,
        result,
        _reasons(analysis, refused),
        _kept(result),
        precision=settings.precision.value,
        quantizer="modelopt",
        estimator=estimator,
        sizes=(model.stat().st_size, out.stat().st_size),
    )


class _Reader:
    """Batches in the form that ModelOpt pulls: a first one to look at, then one after the other."""

    def __init__(self, network: ir.Model, batches: Iterable[Any]) -> None:
        self.feeds = self._feeds(network.graph.inputs[0], batches)
        self.first = next(self.feeds, None)
        self.taken = False
        if self.first is None:
            raise ResvitError(
                "There is no calibration image, and ModelOpt would make up random ones.", "Give a data set with images."
            )

    def _feeds(self, entry: ir.Value, batches: Iterable[Any]) -> Iterator[dict[str, np.ndarray]]:
        fixed = entry.shape[0] if entry.shape is not None and len(entry.shape) else None
        for batch in batches:
            whole = batch if isinstance(batch, dict) else batch.feeds(str(entry.name))
            count = len(next(iter(whole.values())))
            size = fixed if isinstance(fixed, int) else max(count, 1)
            for start in range(0, count - size + 1, size):
                yield {name: array[start : start + size] for name, array in whole.items()}

    def get_first(self) -> dict[str, np.ndarray] | None:
        """The first batch, without using it up."""
        return self.first

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, ``None`` at the end."""
        if not self.taken:
            self.taken = True
            return self.first
        return next(self.feeds, None)


def _quantized(source: Path, reader: _Reader, excluded: list[str], precision: Precision, estimator: str) -> bytes:
    with _contained():
        from modelopt.onnx.quantization import quantize

        target = source.with_name("quantized.onnx")
        quantize(
            str(source),
            quantize_mode=precision.value,
            calibration_data_reader=reader,
            calibration_method=estimator,
            calibration_eps=["cpu"],
            nodes_to_exclude=excluded,
            output_path=str(target),
            high_precision_dtype="fp16",
            dq_only=True,  # weights in 8 bits, where it would store them in FP16 with a Q in front
            log_level="WARNING",
        )
    if not target.is_file():
        raise _failure("it wrote no model")
    return target.read_bytes()


def _autocast(source: Path, reader: _Reader, excluded: list[str]) -> bytes:
    folder = source.with_name("batches")
    folder.mkdir()
    for index in range(_AUTOCAST_BATCHES):
        feeds = reader.get_next()
        if feeds is None:
            break
        arrays: dict[str, Any] = dict(feeds)
        np.savez(folder / f"{index:02}.npz", **arrays)
    with _contained():
        from modelopt.onnx.autocast import convert_to_mixed_precision

        cast = convert_to_mixed_precision(
            str(source),
            low_precision_type="fp16",
            nodes_to_exclude=excluded,
            keep_io_types=True,
            calibration_data=str(folder),
            providers=["cpu"],
        )
    return bytes(cast.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keep ModelOpt's output off the terminal and turn what it raises into a problem and a fix."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    vendor = logging.getLogger("modelopt")
    vendor.propagate = False
    try:
        with quiet_modelopt("ONNX quantiser", "use --quantizer resvit"):
            yield
    except ResvitError:
        raise
    except Exception as error:
        raise _failure(f"{type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise _failure(f"it exited with {error.code}") from error
    finally:
        root.handlers[:], root.level = handlers, level
        # ModelOpt's handlers hold on to the stream that they were made with.
        for name in [n for n in logging.root.manager.loggerDict if n.startswith("modelopt")]:
            logging.getLogger(name).handlers.clear()
        sys.stdout.flush()


def _failure(what: str) -> ResvitError:
    return ResvitError(
        f"ModelOpt's quantiser failed: {what}",
        "Use --quantizer resvit, or leave the nodes that it names out with --exclude.",
    )


def _checked(data: bytes) -> onnx.ModelProto:
    proto = onnx.load_model_from_string(data)
    # ModelOpt calls every unknown dimension "unk", and ONNX Runtime takes those for equal.
    del proto.graph.value_info[:]
    try:
        proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _failure(f"the model that it wrote does not check: {error}") from error
    return proto


def _infinite(network: ir.Model) -> list[ir.Node]:
    """Nodes that read or pass on infinite constants (a max-pooling's padding), whose range is no range."""
    found: list[ir.Node] = []
    for node in network.graph:
        arrays = [a for v in node.inputs if (a := constant(v)) is not None and a.dtype.kind == "f"]
        if any(np.isinf(a).any() for a in arrays):
            found += [node, *(use.node for output in node.outputs for use in output.uses())]
    return found


def _exact(nodes: Iterable[ir.Node]) -> list[str]:
    """ModelOpt reads names as regular expressions."""
    return [f"^{re.escape(str(node.name))}$" for node in nodes]


def _reasons(analysis: Analysis, refused: set[ir.Node]) -> dict[str, str]:
    return {p.name: "excluded by the recipe" if p.node in refused else _REASON for p in analysis.products}


def _kept(result: ir.Model) -> tuple[KeptFloat, ...]:
    flexible = ("Cast", "QuantizeLinear", "DequantizeLinear")
    nodes = [n for n in result.graph if n.op_type not in flexible and any(is_float(v) for v in n.outputs)]
    return tuple(KeptFloat(str(node.name), "ModelOpt keeps it in FP32") for node in nodes)
