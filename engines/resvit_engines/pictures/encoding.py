"""How prepared images become what an engine reads where that is no float: whole numbers, by a factor and an offset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ResvitError

if TYPE_CHECKING:
    import numpy.typing as npt

ENCODING_KEY = "resvit.input_encoding"
"""The entry of an ONNX file's metadata that holds it, as JSON."""
INPUT_TYPE_KEY = "resvit.input_type"
"""The entry that says what an ONNX file of ours reads where that is not FP32; its outputs are FP16 then."""
_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}
_CHANNELS_MOST = 4096


@dataclass(frozen=True)
class InputEncoding:
    """round(image · factor + offset) for each channel, cut to the range of ``dtype``: ``int8`` or ``uint8``.

    ``factor`` and ``offset`` hold one number for all channels, or one each. With ``uint8`` these are the pixels that
    the preprocessing began with; with ``int8`` it is what the first QuantizeLinear made.
    """

    dtype: str
    factor: tuple[float, ...]
    offset: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (*self.factor, *self.offset)
        fits = len(self.factor) == len(self.offset) and 0 < len(self.factor) <= _CHANNELS_MOST
        if self.dtype not in _RANGES or not fits or not all(map(math.isfinite, numbers)) or 0.0 in self.factor:
            raise ResvitError(
                "The encoding of the input is none: a type (int8, uint8), and a factor and an offset for each channel.",
                "Make the bundle again.",
            )

    def encode(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Images [N, C, H, W] as the engine reads them; those that are whole numbers already stay as they are.

        Raises:
            ResvitError: INPUT for images of another number of channels.
        """
        import numpy as np

        if images.dtype.kind != "f":
            return images
        if images.ndim != 4 or len(self.factor) not in (1, images.shape[1]):
            raise ResvitError(
                f"The images have the shape {list(images.shape)}, and the engine reads {len(self.factor)} channels.",
                "Give images [N, C, H, W], prepared as manifest.json says.",
            )
        factor, offset = (np.asarray(each, np.float32)[:, None, None] for each in (self.factor, self.offset))
        low, high = _RANGES[self.dtype]
        whole: npt.NDArray[Any] = np.rint(images.astype(np.float32) * factor + offset)
        return whole.clip(low, high).astype(self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"dtype": self.dtype, "factor": list(self.factor), "offset": list(self.offset)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> InputEncoding:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT where it is malformed."""
        sides = [plain.get(name) for name in ("factor", "offset")]
        numbers = all(
            isinstance(side, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in side)
            for side in sides
        )
        factor, offset = (tuple(map(float, side)) if numbers and side is not None else () for side in sides)
        return cls(str(plain.get("dtype")), factor, offset)
