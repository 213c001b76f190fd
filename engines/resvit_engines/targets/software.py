"""The software that targets run: releases of TensorRT, of TensorRT for RTX and of JetPack, and what belongs to each.

Facts come from NVIDIA's release notes and support matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PTX_OF_CUDA = {"12.6": "8.5", "12.8": "8.7", "13": "9.0", "13.0": "9.0", "13.2": "9.2"}
"""The newest PTX version that a CUDA release's driver reads (the release notes of PTX ISA)."""

RTX_VERSION, RTX_CUDA = "1.7", "13"
"""The TensorRT for RTX that is served, and the CUDA that it is made for."""

CUDA_OF_TENSORRT = {
    **dict.fromkeys(("10.3", "10.4", "10.5", "10.6", "10.7"), "12.6"),
    **dict.fromkeys(("10.8", "10.9", "10.10", "10.11", "10.12"), "12.8"),
    **dict.fromkeys(("10.13", "10.14", "10.15", "10.16", "11.0", "11.1", "11.2", "11.3", "11.4"), "13"),
}
"""Every TensorRT release that is served, and the CUDA that is taken to be beside it: it says which PTX is read."""

NEWEST_TENSORRT = "11.4"

OLDEST_ONNXRUNTIME = "1.23"
"""The last ONNX Runtime for Python 3.10, and the oldest that the processor's engines are tried with."""

_FIRST_TENSORRT = {100: (10, 8), 103: (10, 8), 110: (10, 13), 120: (10, 8), 121: (10, 16)}
"""The first release with kernels for a compute capability, where not all have them."""


@dataclass(frozen=True)
class JetPack:
    """One JetPack release: the TensorRT that its image carries. ``refusal`` says why it is not served, if so.

    ``newer`` holds by TensorRT release the modules on which this JetPack takes it in place of the image's.
    """

    version: str
    tensorrt: str
    cuda: str
    python: str
    modules: tuple[str, ...]
    newer: Mapping[str, tuple[str, ...]]
    refusal: str = ""

    def tensorrts(self, module: str) -> tuple[str, ...]:
        """What ``module`` can run with this JetPack, the image's first."""
        return (self.tensorrt, *(version for version, modules in self.newer.items() if module in modules))


_ORINS = ("jetson-orin", "jetson-orin-nx", "jetson-orin-nano")
_TOO_OLD = "that is older than TensorRT 10, the first with the strongly typed FP16 and INT8 graphs used here"

JETPACKS: tuple[JetPack, ...] = (
    JetPack("5.1", "8.5", "11.4", "3.8", _ORINS, {}, refusal=_TOO_OLD),
    JetPack("6.0", "8.6", "12.2", "3.10", _ORINS, {}, refusal=_TOO_OLD),
    JetPack("6.1", "10.3", "12.6", "3.10", _ORINS, {"10.7": _ORINS}),
    JetPack("6.2", "10.3", "12.6", "3.10", _ORINS, {"10.7": _ORINS}),
    JetPack("7.1", "10.13", "13.0", "3.12", ("jetson-thor",), {}),
    JetPack("7.2", "10.16", "13.2", "3.12", (*_ORINS, "jetson-thor"), {"11.4": ("jetson-orin", "jetson-thor")}),
)


def tensorrts_for(sm: int) -> tuple[str, ...]:
    """The TensorRT releases with kernels for a discrete GPU of compute capability ``sm`` (89 is 8.9), oldest first."""
    first = _FIRST_TENSORRT.get(sm, (10, 3))
    return tuple(version for version in CUDA_OF_TENSORRT if version_of(version) >= first)


def version_of(text: str) -> tuple[int, ...]:
    """Turn ``"10.3"`` into ``(10, 3)``; stops at the first part that is no number."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()
