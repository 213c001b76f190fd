"""What to quantise to, as values."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from resvit_calibrate.estimators import Estimator


class Precision(str, enum.Enum):
    """The number format of the quantised matrix products; everything else is FP16 in all three."""

    FP16 = "fp16"
    INT8 = "int8"
    FP8 = "fp8"
    """E4M3: four exponent and three mantissa bits, largest value 448."""


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantise.

    ``include`` and ``exclude`` are glob patterns on node names, module paths and op types (``Conv``); a module
    path matches with everything below it. ``include`` quantises nodes that the placement rules would leave in
    FP16 (the head, small products); ``exclude`` leaves nodes in FP16 and wins over ``include``.
    """

    precision: Precision
    estimator: Estimator = Estimator.MSE
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Other wings have their own enumeration with the same values.
        object.__setattr__(self, "precision", Precision(str(getattr(self.precision, "value", self.precision))))
