"""One vector for a whole image: scores of classes, or an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resvit_engines.answers.options import Array, chosen_output
from resvit_engines.errors import ResvitError

OUTPUT = "logits"


@dataclass(frozen=True)
class EmbeddingOptions:
    """``output``: the output [B, D] (or [B, D, 1, 1]); None for the only one."""

    output: str | None = None


def vectors_of(options: EmbeddingOptions, outputs: Mapping[str, Array]) -> Array:
    """Vectors [B, D]; raises ``ResvitError`` where no output, or more than one, holds them."""
    flat = {
        name: value.reshape(len(value), -1)
        for name, value in outputs.items()
        if value.dtype.kind == "f" and value.ndim >= 2 and all(size == 1 for size in value.shape[2:])
    }
    pooled = ", or pool the tokens in the network's forward"
    return flat[chosen_output(flat, options.output, outputs, "An embedding is an output [B, D]", pooled)]


def logits_of(outputs: Mapping[str, Array], count: int) -> npt.NDArray[np.float32]:
    """The output ``logits``, or the only one, float32 [``count``, classes]; raises ``ResvitError`` for all else."""
    if OUTPUT not in outputs and len(outputs) != 1:
        raise ResvitError(
            f"The network has the outputs {', '.join(outputs)}; none is called `{OUTPUT}`.",
            f"Name the classification output `{OUTPUT}`.",
        )
    logits = np.asarray(outputs[OUTPUT] if OUTPUT in outputs else next(iter(outputs.values())))
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        raise ResvitError(
            f"The network's output has the shape {list(logits.shape)} for {count} images, not [{count}, classes].",
            "A classification network has one output of two or more classes.",
        )
    # A float16 or float64 output beyond float32 is infinite here, and is found as such.
    with np.errstate(over="ignore"):
        return logits.astype(np.float32)
