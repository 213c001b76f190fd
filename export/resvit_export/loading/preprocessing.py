"""Which preprocessing a run uses: what the model says, with the user's settings on top."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ResvitError
from resvit_export.loading.network_record import NetworkRecord

if TYPE_CHECKING:
    from resvit_calibrate.images.preprocess import Preprocess


def preprocess_from(
    network: NetworkRecord, wished: Mapping[str, Any], data: str | None, objects: Mapping[str, Any] | None = None
) -> Preprocess:
    """Merge the model's own preprocessing with what is ``wished``; ``data`` names the images.

    ``objects`` are data sets in memory, by the names that stand for them.

    Mean and standard deviation are never guessed: a wrong pair costs accuracy without a sign. Data that a user's
    factory yields is preprocessed already, and needs neither.

    Raises ``ResvitError`` where they are missing, or a setting does not exist or does not fit.
    """
    from resvit_calibrate.images.preprocess import Preprocess

    channels, height, width = network.input_shape
    known = network.preprocess.to_json() if network.preprocess else {}
    names = [item.name for item in dataclasses.fields(Preprocess)]
    for key in wished:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise ResvitError(
                f"There is no preprocessing setting '{key}'.",
                f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}.",
            )
    normalising = [key for key in ("mean", "std") if key in wished]
    if network.image_range and normalising:
        low, high = network.image_range
        raise ResvitError(
            f"The network reads pixels from {low} to {high} and normalises them itself: "
            f"{' and '.join(normalising)} would normalise them twice.",
            "Leave mean and std out of the preprocessing.",
        )
    settings: dict[str, Any] = {
        "size": [height, width],
        "channels": channels,
        "resize": "stretch",
        "crop_fraction": 1.0,
        "interpolation": "bilinear",
        "channel_order": "rgb",
        **known,
        **wished,
    }
    if "mean" not in settings or "std" not in settings:
        if _gives_prepared(data, objects):
            settings.update(mean=[0.0] * channels, std=[1.0] * channels, resize="none")
        else:
            raise ResvitError(
                "The model does not say how its images are normalised, and guessing would cost accuracy silently.",
                "Say what it was trained with, for example --preprocess mean=0.485,0.456,0.406 "
                "--preprocess std=0.229,0.224,0.225.",
            )
    preprocess = Preprocess.from_json(settings)
    if tuple(preprocess.size) != (height, width) or preprocess.channels != channels:
        raise ResvitError(
            f"Preprocessing makes images of {preprocess.channels}x{preprocess.size[0]}x{preprocess.size[1]}, "
            f"but the model takes {channels}x{height}x{width}.",
            f"Leave size and channels out of the preprocessing, or say size={height}x{width}.",
        )
    return preprocess


def _gives_prepared(data: str | None, objects: Mapping[str, Any] | None) -> bool:
    from resvit_calibrate.data.sources import gives_prepared

    return data is not None and gives_prepared(data, objects)
