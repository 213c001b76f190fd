"""Records of engines that nobody built."""

from __future__ import annotations

import dataclasses
from typing import Any

from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.targets.table import Builder

_PLAIN = EngineReport(
    target="jetson-orin", builder=Builder.TENSORRT, builder_version="10.3.0", sm=87, bytes=6, sha256="0" * 64,
    seconds=1.0, peak_mib=1, inputs=(), outputs=(), kernels=(), warnings=(),
)  # fmt: skip


def engine_report(**changes: Any) -> EngineReport:
    """The record of an engine for Jetson Orin by TensorRT 10.3, but for ``changes``."""
    return dataclasses.replace(_PLAIN, **changes)
