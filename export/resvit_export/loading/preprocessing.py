"""Which preprocessing a run uses: what the model says, with the user's settings on top."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
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


def steps_of(
    preprocess: Preprocess, network: NetworkRecord, wished: Mapping[str, Any], factory: str | None
) -> list[tuple[str, str]]:
    """What happens to an image before the network reads it, each step with its numbers, and who said so.

    ``factory`` names the user's loader where that makes the input.
    """
    height, width = preprocess.size
    if factory is not None:
        return [("prepared by", f"{factory}, as {preprocess.channels} x {height} x {width}")]
    normalise = _normalise(preprocess)
    if network.image_range:
        low, high = network.image_range
        normalise = f"in the network itself, which reads pixels from {low} to {high}"
    said_by = [f"your settings ({', '.join(wished)})"] if wished else []
    said_by += ["the model"] if network.preprocess else []
    return [
        ("resize", _resize(preprocess)),
        ("channels", _channels(preprocess)),
        ("normalise", normalise),
        ("as said by", ", ".join([*said_by, "what is usual"])),
    ]


def _resize(preprocess: Preprocess) -> str:
    (height, width), how = preprocess.size, preprocess.interpolation
    to = f"{height} x {width}"
    if preprocess.resize == "none":
        return f"none: images are {to}"
    if preprocess.resize == "stretch":
        return f"stretched to {to}, {how}"
    if preprocess.resize == "letterbox":
        where = "at the right and bottom" if preprocess.padding == "end" else "on all sides"
        return f"fitted into {to}, {how}, filled with {_numbers(preprocess.pad_value)} {where}"
    covered = " x ".join(f"{side / preprocess.crop_fraction:.0f}" for side in preprocess.size)
    return f"until it covers {covered}, {how}; {to} from the middle"


def _channels(preprocess: Preprocess) -> str:
    return {1: "grey", 3: preprocess.channel_order.upper()}.get(preprocess.channels, str(preprocess.channels))


def _normalise(preprocess: Preprocess) -> str:
    mean, std = _numbers(preprocess.mean), _numbers(preprocess.std)
    return f"pixels / 255, less mean {mean}, over std {std}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in (values if len(set(values)) > 1 else values[:1]))
