"""Times of layers measured on the device, read from a JSON file.

The file holds microseconds per call, by layer and precision::

    {"device": "Jetson AGX Orin 64GB, MAXN",
     "layers": {"blocks.0.mlp.fc1/MatMul": {"fp16": 41.2, "int8": 25.9},
                "stem.conv/Conv": {"fp16": 60.1, "int8": 38.0}}}

A layer's name is that of its matrix product (or norm, or pool) in the ONNX graph, as ``search.json`` and
``costs.json`` list them. Such times come from one engine per precision: ``trtexec --dumpProfile --separateProfileRun
--exportProfile=times.json`` writes ``averageMs`` per fused layer, whose name contains those of its nodes; sum the
kernels of a layer and multiply by 1000. Layers that are missing are predicted, and scaled by the median of measured
over predicted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, read_outside
from resvit_engines.targets.table import TENSOR_CORES, Precision

_FIX = 'Write {"device": "…", "layers": {"node name": {"fp16": microseconds, "int8": microseconds}}}.'


@dataclass(frozen=True)
class MeasuredTimes:
    """Microseconds by layer name and precision, and the device that they were measured on."""

    device: str
    layers: Mapping[str, Mapping[Precision, float]]

    def of(self, names: Iterable[str], precision: Precision) -> float | None:
        """The time under the first of ``names`` that was measured in this precision."""
        return next((self.layers[n][precision] for n in names if precision in self.layers.get(n, {})), None)

    def require_known(self, names: Iterable[str]) -> None:
        """Refuse a file of which not one layer is in the network.

        Raises:
            ResvitError: with a few names of the network.
        """
        known = list(names)
        if not set(known) & set(self.layers):
            raise ResvitError(
                f"None of the {len(self.layers)} layers that were measured is in this network.",
                "Name layers as in the ONNX graph, for example: " + ", ".join(known[:3]) + ".",
            )


def measured_times_from_json(path: Path) -> MeasuredTimes:
    """Read measured times.

    Raises:
        ResvitError: for a file that is missing, is no JSON, or holds anything but positive, finite times.
    """
    if not os.path.lexists(path):
        raise ResvitError(f"There are no measured times at {path}.", "Check --measured-times.")
    name = f"The file of measured times {path}"
    document = json_from_outside(read_outside(path, what=name), name, _FIX)
    if not isinstance(document, dict) or not isinstance(document.get("layers"), dict) or not document["layers"]:
        raise ResvitError(f"The measured times {path} name no layers.", _FIX)
    device = document.get("device", "")
    if not isinstance(device, str):
        raise ResvitError(f"In the measured times {path}, the device is not a text.", _FIX)
    layers = {str(name): _times(str(name), item, path) for name, item in document["layers"].items()}
    return MeasuredTimes(device, layers)


def _times(name: str, item: object, path: Path) -> dict[Precision, float]:
    if not isinstance(item, dict) or not item:
        raise ResvitError(f"In the measured times {path}, the layer '{name}' has no times by precision.", _FIX)
    times: dict[Precision, float] = {}
    for key, value in item.items():
        if key not in [p.value for p in TENSOR_CORES]:
            choices = ", ".join(p.value for p in TENSOR_CORES)
            raise ResvitError(
                f"In the measured times {path}, '{name}' has the precision '{key}'.", f"Choose from {choices}."
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ResvitError(
                f"In the measured times {path}, '{name}' takes {value!r} microseconds in {key}.",
                "Give positive numbers.",
            )
        times[Precision(key)] = float(value)
    return times
