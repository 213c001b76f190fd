"""What the user says about the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from resvit_engines.pictures.sizes import SizeRange
from resvit_export.loading.inputs import NetworkInput

Scalar = bool | int | float | str
"""What an argument of the model may be."""


@dataclass(frozen=True)
class ModelSpec:
    """Where the model is, its weights, its arguments, (C, H, W) of its image.

    ``inputs`` are named as the forward's parameters, where it reads more than the image. ``checkpoint_key`` says where
    in the checkpoint the weights are, where that is not left to what fits. ``sizes`` are those that the image may have,
    where that is more than one; the shape then has the usual one.
    """

    model: str
    checkpoint: Path | None = None
    model_args: Mapping[str, Scalar] = field(default_factory=dict)
    input_shape: tuple[int, int, int] | None = None
    inputs: tuple[NetworkInput, ...] = ()
    checkpoint_key: str | None = None
    sizes: SizeRange | None = None
