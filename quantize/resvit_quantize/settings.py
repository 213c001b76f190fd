"""What to quantise to, and how hard to try, as values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from resvit_calibrate.ranges.estimators import Estimator
from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Precision


class Effort(str, enum.Enum):
    """How much time the quantiser takes for accuracy."""

    FAST = "fast"
    """Closed forms on the calibration statistics alone."""
    BEST = "best"
    """Also fits rounding, ranges and biases to the calibration images, layer by layer."""

    def __str__(self) -> str:
        return str(self.value)


class Rules(str, enum.Enum):
    """Whose kernels Q/DQ are placed for."""

    TENSORRT = "tensorrt"
    """Q/DQ on what weighted layers read; everything else in FP16."""
    ONNXRUNTIME = "onnxruntime"
    """ONNX Runtime's on a processor: Q/DQ also on what 8-bit layers write, in unsigned bytes; everything else in
    FP32."""


@dataclass(frozen=True)
class Methods:
    """Which accuracy methods are used; ``docs/accuracy.md`` shows what each earns."""

    smoothing: bool = True
    """Scales move between channels and weights where that costs nothing at run time."""
    shifting: bool = True
    """Activations of one sign, such as GELU's, are moved to the middle of the grid in the kernel that computes them."""
    output_ranges: bool = True
    """Ranges are chosen for the least error at the layer's output, not of the tensor itself."""
    importance: bool = True
    """Under ``Effort.BEST``, tokens and positions of maps count as much as they matter to the network's outputs."""
    bias_correction: bool = True
    """Biases take back the mean error that quantised weights cause."""
    sparing: bool = True
    """Up to 2% of the multiply-accumulates stay in FP16: the convolution that reads the image, or, under
    ``Effort.BEST``, the layers that were measured to hurt the most; and so do shortcuts that 8 bits leave little of."""


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantise.

    ``include`` and ``exclude`` are glob patterns on node names, module paths and op types (``Conv``); a module
    path matches with everything below it. ``include`` quantises nodes that the placement rules would leave in
    FP16 (the head, small products); ``exclude`` leaves nodes in FP16 and wins over ``include``. ``precisions``
    gives single nodes, by name, a precision of their own; ``exclude`` and what is impossible win over it.

    ``bits`` below 8 simulates a coarser integer grid inside INT8 (activations and weights), to tell methods
    apart; no device is faster with it. Raises ``ResvitError`` for bits outside 2 to 8, or with FP8.
    """

    precision: Precision
    estimator: Estimator = Estimator.MSE
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    effort: Effort = Effort.FAST
    methods: Methods = Methods()
    precisions: Mapping[str, Precision] = field(default_factory=dict)
    bits: int = 8
    rules: Rules = Rules.TENSORRT

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or (self.bits < 8 and self.precision is not Precision.INT8):
            raise ResvitError(f"bits = {self.bits} cannot be simulated.", "Use 2 to 8, below 8 with int8 only.")
