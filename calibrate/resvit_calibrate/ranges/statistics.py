"""Statistics of a whole model, and the .npz file that holds them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from resvit_calibrate.observe.histogram import LOG_BINS, ChannelStatistics, TensorStatistics
from resvit_calibrate.runtime.sessions import Array
from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file

_NO_CHANNELS = ChannelStatistics(
    np.zeros(0, np.int64),
    np.zeros(0),
    np.zeros(0),
    np.zeros(0, np.float32),
    np.zeros((0, LOG_BINS), np.int32),
    0,
)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics by tensor name, of every float activation of the model."""

    tensors: dict[str, TensorStatistics]
    images: int


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write statistics as an .npz without pickled objects, whole or not at all.

    Arrays that tensors share are written once; those of the channels lie one tensor behind the other.
    """
    table = list(statistics.tensors.values())
    histograms, histogram_of = _shared([entry.histogram for entry in table])
    images, images_of = _shared([entry.image_absmax for entry in table])
    channels = [entry.channels for entry in table if entry.channels is not None]
    about = {
        "images": statistics.images,
        "names": list(statistics.tensors),
        "histogram_of": histogram_of,
        "images_of": images_of,
        "channels_of": [0 if entry.channels is None else entry.channels.count.size for entry in table],
        "anchors": [entry.anchor for entry in channels],
    }
    halves = [_NO_CHANNELS, *(half for entry in channels for half in _halves_of(entry))]
    with atomic_file(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            count=np.array([entry.count for entry in table], np.int64),
            minimum=np.array([entry.minimum for entry in table]),
            maximum=np.array([entry.maximum for entry in table]),
            bin_width=np.array([entry.bin_width for entry in table]),
            histograms=np.stack(histograms) if histograms else np.zeros((0, 0), np.int64),
            image_absmax=np.stack(images) if images else np.zeros((0, 0), np.float32),
            channel_count=np.concatenate([entry.count for entry in halves]),
            channel_mean=np.concatenate([entry.mean for entry in halves]),
            channel_mean_square=np.concatenate([entry.mean_square for entry in halves]),
            channel_absmax=np.concatenate([entry.absmax for entry in halves]),
            channel_log_histogram=np.concatenate([entry.log_histogram for entry in halves]),
        )


def statistics_from_npz(data: bytes, where: str) -> Statistics:
    """Read what ``save_statistics`` wrote, which errors call ``where``. Raises ResvitError for anything else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return _statistics({key: stored[key] for key in stored.files})
    except Exception as error:
        raise ResvitError(f"{where} does not hold calibration statistics.", "Run the calibrate stage again.") from error


def _statistics(stored: dict[str, Array]) -> Statistics:
    about: dict[str, Any] = json.loads(stored["about"].tobytes())
    ends = np.cumsum(about["channels_of"]).tolist()
    anchors = iter(about["anchors"])
    histograms, images = list(stored["histograms"]), list(stored["image_absmax"])
    columns = zip(
        about["names"],
        stored["count"].tolist(),
        stored["minimum"].tolist(),
        stored["maximum"].tolist(),
        about["histogram_of"],
        stored["bin_width"].tolist(),
        about["channels_of"],
        ends,
        about["images_of"],
        strict=True,
    )
    tensors = {}
    for name, count, low, high, histogram, width, size, end, image in columns:
        halves = (slice(2 * end - 2 * size, 2 * end - size), slice(2 * end - size, 2 * end))
        tensors[name] = TensorStatistics(
            count,
            low,
            high,
            None if histogram is None else histograms[histogram],
            width,
            _channels(stored, halves, next(anchors)) if size else None,
            None if image is None else images[image],
        )
    return Statistics(tensors, int(about["images"]))


def _channels(stored: dict[str, Array], halves: tuple[slice, slice], anchor: int) -> ChannelStatistics:
    first, second = (
        ChannelStatistics(
            stored["channel_count"][half],
            stored["channel_mean"][half],
            stored["channel_mean_square"][half],
            stored["channel_absmax"][half],
            stored["channel_log_histogram"][half],
            anchor,
        )
        for half in halves
    )
    return ChannelStatistics.of_halves(first, second)


def _halves_of(channels: ChannelStatistics) -> tuple[ChannelStatistics, ...]:
    if channels.halves:
        return channels.halves
    nothing = {
        field: np.zeros_like(getattr(channels, field))
        for field in ("count", "mean", "mean_square", "absmax", "log_histogram")
    }
    return channels, dataclasses.replace(channels, **nothing)


def _shared(arrays: list[Array | None]) -> tuple[list[Array], list[int | None]]:
    """The different arrays, each once, and for every place the number of its own."""
    number: dict[int, int] = {}
    different: list[Array] = []
    places: list[int | None] = []
    for array in arrays:
        if array is not None and id(array) not in number:
            number[id(array)] = len(different)
            different.append(array)
        places.append(None if array is None else number[id(array)])
    return different, places
