"""Layer files and profiles in TensorRT's own forms, from the engines of ``benchmarks/profiles``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).parent.parent / "benchmarks" / "profiles"
_FORMATS = {
    "fp32": "Row major linear FP32",
    "fp16": "Channel major FP16 format where channel % 8 == 0",
    "int8": "Thirty-two wide channel vectorized row major Int8 format",
    "int32": "Row major linear INT32",
}


def engine(name: str) -> dict[str, Any]:
    """One engine as it is kept."""
    document: dict[str, Any] = json.loads((PROFILES / f"{name}.json").read_text())
    return document


def layer_info(name: str, form: str = "10.x") -> dict[str, Any]:
    """What ``trtexec --exportLayerInfo`` writes of it with detailed verbosity; ``form`` is 10.x or 11.x.

    The tensors' names and weights are not kept in ``benchmarks/profiles``: of the weights their number is made up so
    that equal layers have equal ones, in every precision.
    """
    layers = []
    for index, row in enumerate(engine(name)["layers"]):
        layer = {
            "Name": row["name"],
            "LayerType": row["type"],
            "Inputs": [_tensor(f"in{index}_{place}", text, form) for place, text in enumerate(row["reads"])],
            "Outputs": [_tensor(f"out{index}_{place}", text, form) for place, text in enumerate(row["writes"])],
            "TacticName": row.get("tactic", ""),
        }
        if "Conv" in row["type"]:
            channels = _shape(row["writes"][0])[1]
            count = channels * _shape(row["reads"][0])[1] * 9
            layer |= {"OutMaps": channels, "Weights": {"Type": "Int8", "Count": count}}
        layers.append(layer)
    if form == "10.x":
        return {"Layers": layers, "Bindings": ["input", "output"]}
    return {"Layers": layers, "I/O Tensors": [{"Name": "input"}, {"Name": "output"}]}


def profile(name: str) -> list[dict[str, Any]]:
    """What ``trtexec --exportProfile`` writes of it."""
    rows = [
        {"name": row["name"], "timeMs": row["us"], "averageMs": row["us"] / 1e3, "medianMs": row["us"] / 1e3,
         "percentage": 1.0}
        for row in engine(name)["layers"]
    ]  # fmt: skip
    return [{"count": 1000}, *rows]


def times(name: str) -> list[dict[str, float]]:
    """What ``trtexec --exportTimes`` writes of it: runs around its latency."""
    latency = engine(name)["latency_us"] / 1e3
    return [{"computeMs": latency * share, "latencyMs": latency * share + 0.5} for share in (0.9, 1.0, 1.1)]


def written(folder: Path, name: str, form: str = "10.x") -> tuple[Path, Path, Path]:
    """The three files in ``folder``."""
    paths = []
    for kind, document in (("layers", layer_info(name, form)), ("profile", profile(name)), ("times", times(name))):
        path = folder / f"{name}.{kind}.json"
        path.write_text(json.dumps(document))
        paths.append(path)
    return paths[0], paths[1], paths[2]


def _tensor(name: str, text: str, form: str) -> dict[str, Any]:
    kind = text.partition(" ")[0]
    tensor = {"Name": name, "Dimensions": list(_shape(text))}
    said = _FORMATS.get(kind, kind)
    return tensor | ({"Format/Datatype": said} if form == "10.x" else {"Format": said, "Datatype": said})


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.partition(" ")[2].split("x")) or (math.prod(()),)
