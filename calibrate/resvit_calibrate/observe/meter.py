"""Adds up what an observed model measures, batch by batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from resvit_calibrate.observe.histogram import GrowingChannels, GrowingHistogram, TensorStatistics
from resvit_calibrate.observe.layouts import ChannelMap, channel_map, plain_layout, reshaped, transposed
from resvit_calibrate.observe.observers import RANKS, ROWS, SHAPES, STARTS, STEPS, VALUES, ObservedModel
from resvit_calibrate.runtime.sessions import Array, Arrays, run_session

SAMPLE = 1 << 14
"""Values sampled per tensor and batch, at most, where a batch is of 16 images or fewer."""
SAMPLE_OF_IMAGE = 1 << 10
"""The same per image of a larger batch: small images must not be seen less closely for going through together."""
PROBE_STEP = 1009
_MOST_CHANNELS = 1 << 14


class Meter:
    """Extremes, histograms, channels and images of the tensors of one observed model.

    Without ``channels`` neither channels nor images are kept apart.
    """

    def __init__(self, observed: ObservedModel, random: np.random.Generator, *, channels: bool = True) -> None:
        self.observed = observed
        self.random = random
        self.by_channel = channels
        count = len(observed.measured)
        self.minima, self.maxima = np.full(count, np.inf), np.full(count, -np.inf)
        self.histograms = {name: GrowingHistogram() for name in observed.sampled}
        self.row = {name: index for index, name in enumerate(observed.measured)}
        self.outputs = [VALUES] + ([SHAPES, RANKS, ROWS] if observed.sampled else [])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.probed: tuple[int, ...] | None = None
        """The shape of the image that ``sizes`` were learnt from."""
        self.sizes = np.zeros(0, np.int64)  # [S], values per image
        self.rows_per_image: dict[str, int] = {}
        self.starts = self.steps = self.sizes
        self.batch = 0
        self.maps: dict[str, list[tuple[GrowingChannels, ChannelMap]]] = {}
        # By reader; None where they cannot be told.
        self.channels: dict[str, GrowingChannels | None] = {}
        self.batches = self.taken = 0
        """Batches, and images in them, that were added."""
        self.images: dict[str, list[Array] | None] = {name: [] if channels else None for name in observed.sampled}

    def probe(self, session: Any, piece: Arrays, fixed: int | None) -> None:
        """Learn how large the sampled tensors are for images of this size, from one where the batch size is free."""
        self.probed, self.batch = piece[self.observed.input].shape[1:], 0
        if not self.observed.sampled:
            return
        one = piece if fixed else {name: value[:1] for name, value in piece.items()}
        index = np.zeros(len(self.observed.sampled), np.int64)
        feeds = {**one, STARTS: index, STEPS: index + PROBE_STEP}
        shapes = self._shapes(*run_session(session, [SHAPES, RANKS], feeds))
        sizes = np.array([math.prod(shapes[name]) for name in self.observed.sampled], np.int64)
        self.sizes = np.maximum(sizes // (fixed or 1), 1)
        # Where a batch is fixed, only a first axis as long as the batch can be told to be the images.
        rows = self._rows(shapes)
        self.rows_per_image = {name: 1 if fixed and fixed == count else count for name, count in rows.items()}

    def placement(self, batch: int) -> Arrays:
        """The strides for this batch size, and starts drawn anew: feeds of the observed model."""
        if not self.observed.sampled:
            return {}
        if batch != self.batch:
            self.batch = batch
            most = max(SAMPLE, SAMPLE_OF_IMAGE * batch)
            self.steps = np.array([coprime_step(int(size) * batch, most) for size in self.sizes], np.int64)
        self.starts = self.random.integers(0, self.steps)
        return {STARTS: self.starts, STEPS: self.steps}

    def add(
        self,
        values: Array,
        shapes: Array | None = None,
        ranks: Array | None = None,
        rows: Array | None = None,
        *,
        real: int,
    ) -> bool:
        """Take one batch's measurements, of which ``real`` images are no padding.

        False, and nothing taken, if anything is NaN or infinite.
        """
        low, high, sums = self.observed.extremes(values)
        samples = values[: values.size - low.size - high.size - sums.size]
        # A sum may overflow where a huge number stands for "none"; a NaN anywhere makes it NaN and not infinite.
        if np.isnan(sums).any() or not all(np.isfinite(part).all() for part in (low, high, samples)):
            return False
        self.minima, self.maxima = np.minimum(self.minima, low), np.maximum(self.maxima, high)
        if shapes is None or ranks is None or rows is None:
            return True
        self._take_shapes(shapes, ranks)
        self.batches += 1
        sizes = np.array([math.prod(self.shapes[name]) for name in self.observed.sampled], np.int64)
        lengths = np.maximum(-((self.starts - sizes) // self.steps), 0)
        # Padding comes last in the batch, so what is sampled of it comes last in the sample.
        kept = np.maximum(-((self.starts - sizes * real // self.batch) // self.steps), 0)
        begins = np.cumsum(lengths) - lengths
        for index, name in enumerate(self.observed.sampled):
            sample = samples[begins[index] : begins[index] + kept[index]]
            absmax = max(map(abs, self._extremes(name)))
            self.histograms[name].add(sample, absmax)
            if self.maps.get(name):
                flat = self.starts[index] + self.steps[index] * np.arange(sample.size)
                for counter, mapping in self.maps[name]:
                    if counter.wants_more(self.batches):
                        counter.add(sample, mapping.of(flat), absmax, self.taken + flat * self.batch // sizes[index])
        if self.by_channel:
            self._take_rows(rows, real)
        self.taken += real
        return True

    def _rows(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        """How many rows each tensor's extremes are put out in."""
        whole = self.observed.in_one_row
        return {name: 1 if name in whole or not shapes[name] else shapes[name][0] for name in self.observed.by_row}

    def _shapes(self, shapes: Array, ranks: Array) -> dict[str, tuple[int, ...]]:
        ends = np.cumsum(ranks)[:-1]
        parts = np.split(shapes, ends)
        return {name: tuple(part.tolist()) for name, part in zip(self.observed.shaped, parts, strict=True)}

    def _take_shapes(self, shapes: Array, ranks: Array) -> None:
        """Find the channels anew where the batch has another shape than the last one."""
        found = self._shapes(shapes, ranks)
        if found == self.shapes:
            return
        self.shapes, self.maps = found, {}
        for name in self.observed.channel_axes if self.by_channel else ():
            mapping = self._channel_map(name)
            channels = mapping.channels if mapping else 0
            counter = self.channels.setdefault(name, GrowingChannels(channels) if channels else None)
            if mapping is None or counter is None or counter.channels != channels:
                self.channels[name] = None
            else:
                self.maps.setdefault(self.observed.root(name), []).append((counter, mapping))

    def _channel_map(self, name: str) -> ChannelMap | None:
        """The channels of a tensor in the flat index of its root; None where they cannot be told."""
        first, *others = self.observed.chain(name)
        layout = plain_layout(self.shapes[first])
        for other in others:
            if other in self.observed.perms:
                layout = transposed(layout, self.observed.perms[other])
            else:
                found = reshaped(layout, self.shapes[other])
                if found is None:
                    return None
                layout = found
        rank = len(layout)
        axis = self.observed.channel_axes[name]
        axis = (1 if rank == 4 else -1) if axis is None else axis
        if rank < 2 or axis % rank == 0:  # the first axis is that of the images
            return None
        mapping = channel_map(layout, axis)
        return mapping if mapping is not None and 0 < mapping.channels <= _MOST_CHANNELS else None

    def _take_rows(self, rows: Array, real: int) -> None:
        lengths = self._rows(self.shapes)
        ends = dict(zip(lengths, np.cumsum([*lengths.values()]).tolist(), strict=True))
        highs, lows = np.split(rows, 2)
        for name, parts in self.images.items():
            source, relu = self.observed.derived.get(name, (name, False))
            if parts is None or lengths[source] != self.rows_per_image[source] * self.batch:
                self.images[name] = None
                continue
            place = slice(ends[source] - lengths[source], ends[source])
            high, low = highs[place], lows[place]
            # Minus infinity here can only be a mask; anything else has been refused.
            largest = np.maximum(high, 0.0 if relu else np.where(np.isneginf(low), 0.0, -low))
            parts.append(np.maximum(largest, 0.0).reshape(self.batch, -1).max(axis=1)[:real])

    def _extremes(self, name: str) -> tuple[float, float]:
        source, relu = self.observed.derived.get(name, (name, False))
        low, high = float(self.minima[self.row[source]]), float(self.maxima[self.row[source]])
        return (max(low, 0.0), max(high, 0.0)) if relu else (low, high)

    def statistics(self) -> dict[str, TensorStatistics]:
        """Everything added up, derived tensors included."""
        images = {name: np.concatenate(parts) for name, parts in self.images.items() if parts}
        tensors = {}
        for name in (*self.observed.measured, *self.observed.derived):
            root = self.observed.root(name)
            histogram = self.histograms.get(root)
            counter = self.channels.get(name)
            low, high = self._extremes(name)
            if histogram is None:
                tensors[name] = TensorStatistics(0, low, high, None, 0.0)
                continue
            tensors[name] = TensorStatistics(
                histogram.count,
                low,
                high,
                histogram.counts,
                histogram.bin_width,
                channels=counter.statistics() if counter else None,
                image_absmax=images.get(root),
            )
        return tensors


def coprime_step(size: int, most: int = SAMPLE) -> int:
    """The smallest stride that leaves at most ``most`` of ``size`` values and shares no factor with it.

    The size is the product of the dimensions, so the stride is coprime to each of them.
    """
    if size <= most:
        return 1
    return next(step for step in itertools.count(-(-size // most)) if np.gcd(step, size) == 1)
