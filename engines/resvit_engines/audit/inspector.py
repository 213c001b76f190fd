"""The kernels of an engine from TensorRT's engine inspector: the JSON of TensorRT 8 to 11 and of ``trtexec``.

Two forms are read. Up to 10.x the file ends with ``Bindings``, a list of names, and each tensor has one field
``Format/Datatype``: a sentence that holds the type. From 11.0 on it ends with ``I/O Tensors``, a list of objects, and
``Format`` and ``Datatype`` are two fields (NVIDIA's guide "Migrating IEngineInspector Usage from TensorRT 10.x to
11.x"). TensorRT for RTX writes the second form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.audit.kernels import Kernel, onnx_layers
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside, text_from_outside

# Read in this order: BFloat16 holds "Float", and a format of FP8 may hold "INT8" as the width of its vectors.
_TYPES = (
    (re.compile(r"fp8|e4m3|e5m2|float8", re.I), "FP8"),
    (re.compile(r"fp4|e2m1|float4", re.I), "FP4"),
    (re.compile(r"bf16|bfloat16", re.I), "BFloat16"),
    (re.compile(r"fp16|half|float16", re.I), "Half"),
    (re.compile(r"fp32|float", re.I), "Float"),
    (re.compile(r"uint8", re.I), "UInt8"),
    (re.compile(r"int4", re.I), "Int4"),
    (re.compile(r"int8", re.I), "Int8"),
    (re.compile(r"int64", re.I), "Int64"),
    (re.compile(r"int32", re.I), "Int32"),
    (re.compile(r"bool", re.I), "Bool"),
)
UNKNOWN_TYPE = ""
"""Where the inspector does not say: "N/A due to dynamic shapes"."""
_NO_KERNEL = frozenset({"noop", "signal", "wait", "constant"})
_WRAPPED = re.compile(r"^(?:PWN|PWN_\w+|PointWise)\((.*)\)$")
_PROFILE = re.compile(r" \[profile \d+\]$")
_LAYERS_MOST = 1 << 30
_FIX_FILE = "Give the file that trtexec --exportLayerInfo wrote."
_FIX_DETAIL = (
    "Build with detailed profiling verbosity: 'trtexec --profilingVerbosity=detailed --exportLayerInfo=layers.json "
    "…', or config.profiling_verbosity = ProfilingVerbosity.DETAILED."
)


@dataclass(frozen=True)
class EngineLayers:
    """The kernels of an engine in order, and the names of its inputs and outputs.

    ``io_names`` has both, as the 10.x form does not tell them apart. ``form`` is ``10.x`` or ``11.x``.
    """

    kernels: tuple[Kernel, ...]
    io_names: frozenset[str]
    form: str


def layers_from_file(path: Path) -> EngineLayers:
    """Read what ``trtexec --exportLayerInfo`` or ``IEngineInspector`` wrote.

    Raises:
        ResvitError: INPUT for a file that is missing, is no such JSON, or holds names only.
    """
    data = read_outside(path, _LAYERS_MOST, f"The layer file {path}")
    return layers_from_json(text_from_outside(data, f"The layer file {path}", _FIX_FILE), str(path))


def layers_from_json(text: str, name: str = "the layer information") -> EngineLayers:
    """Read the inspector's JSON; ``name`` is what messages call it.

    Raises:
        ResvitError: INPUT where it is no such JSON, or holds names only.
    """
    try:
        # Some versions write the separators of Metadata, control characters, as they are.
        document = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise ResvitError(f"{name} is not JSON: {error}.", "Write it with trtexec --exportLayerInfo.") from error
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise ResvitError(
            f"{name} has no list 'Layers', so it is no engine layer information.",
            "Write it with trtexec --exportLayerInfo; a profile (--exportProfile) holds times, not layers.",
        )
    names_only = [layer for layer in layers if not isinstance(layer, dict) or "Inputs" not in layer]
    if names_only:
        raise ResvitError(
            f"{name} holds only the names of {len(names_only)} of {len(layers)} layers: nothing can be audited.",
            _FIX_DETAIL,
        )
    try:
        io_names, form = _io_names(document)
        kinds = [str(layer.get("LayerType", "")).lower() for layer in layers]
        kernels = tuple(_kernel(layer) for layer, kind in zip(layers, kinds, strict=True) if kind not in _NO_KERNEL)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ResvitError(
            f"{name} describes layers as no TensorRT does ({type(error).__name__}: {error}).", _FIX_FILE
        ) from error
    return EngineLayers(kernels, io_names, form)


def data_type(text: str) -> str:
    """The builder's word (``Float``, ``Half``, ``Int8`` …) for a type in any of the inspector's sentences.

    ``Thirty-two wide channel vectorized row major Int8 format`` gives ``Int8``; empty where it does not say.
    """
    if text.startswith("N/A"):
        return UNKNOWN_TYPE
    return next((word for pattern, word in _TYPES if pattern.search(text)), UNKNOWN_TYPE)


def _io_names(document: Mapping[str, Any]) -> tuple[frozenset[str], str]:
    tensors = document.get("I/O Tensors")
    if isinstance(tensors, list):
        return frozenset(str(t.get("Name", "")) for t in tensors if isinstance(t, dict)), "11.x"
    bindings = document.get("Bindings") or []
    return frozenset(_PROFILE.sub("", name) for name in bindings if isinstance(name, str)), "10.x"


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    inputs, outputs = _tensors(layer, "Inputs"), _tensors(layer, "Outputs")
    constants = [*_tensors(layer, "Constants"), *_weights(layer)]
    return Kernel(
        str(layer.get("Name", "")),
        str(layer.get("LayerType", "")),
        tuple(dtype for _, dtype, _ in inputs),
        tuple(dtype for _, dtype, _ in outputs),
        tuple(shape for _, _, shape in inputs),
        tuple(shape for _, _, shape in outputs),
        _layers(layer),
        tuple(dtype for _, dtype, _ in constants),
        tuple(shape for _, _, shape in constants),
        tuple(name for name, _, _ in inputs),
        tuple(name for name, _, _ in outputs),
        str(layer.get("TacticName", "")),
    )


def _tensors(layer: Mapping[str, Any], side: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each tensor; not those in the CPU's memory, which are shapes."""
    found = []
    for tensor in layer.get(side) or []:
        if isinstance(tensor, dict) and str(tensor.get("Location", "Device")).lower() != "host":
            said = tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or ""
            shape = tuple(int(size) for size in tensor.get("Dimensions") or ())
            found.append((_PROFILE.sub("", str(tensor.get("Name", ""))), data_type(str(said)), shape))
    return found


def _weights(layer: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Weights and bias of a convolution, of which only type and count are told."""
    found: list[tuple[str, str, tuple[int, ...]]] = []
    for key, rows in (("Weights", layer.get("OutMaps")), ("Bias", None)):
        entry = layer.get(key)
        if isinstance(entry, dict) and entry.get("Count"):
            count = int(entry["Count"])
            shape = (int(rows), count // int(rows)) if rows else (count,)
            found.append((key, data_type(str(entry.get("Type", ""))), shape))
    return found


def _layers(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """The ONNX nodes that a layer computes: from its metadata, else, before 8.6, from its name."""
    if layer.get("Metadata"):
        return onnx_layers(str(layer["Metadata"]))
    return () if "Metadata" in layer else nodes_of_name(_PROFILE.sub("", str(layer.get("Name", ""))))


def nodes_of_name(name: str) -> tuple[str, ...]:
    """The ONNX nodes in the name of a layer: ``Conv_0 + Relu_1``; none in those that TensorRT made up."""
    if name.startswith(("Reformatting CopyNode", "__my")):
        return ()
    return tuple(dict.fromkeys(node for part in name.split(" + ") for node in _unwrapped(part)))


def _unwrapped(name: str) -> list[str]:
    """``PWN(PWN(Sigmoid_12), Mul_13)`` is the pointwise kernel of two nodes."""
    while match := _WRAPPED.match(name):
        name = match[1]
    return [
        part for inner in name.split(", ") for part in ([inner] if not _WRAPPED.match(inner) else _unwrapped(inner))
    ]
