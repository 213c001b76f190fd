"""What is resized without Pillow is, byte for byte, what Pillow makes of it, whichever version is installed."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.pictures.resample import luma, resized, resized_by_numpy

KERNELS = ("nearest", "bilinear", "bicubic", "lanczos")
SIDE = st.integers(1, 90)


def pixels_of(seed: int, height: int, width: int, channels: int) -> npt.NDArray[np.uint8]:
    """Noise, or every third time black and white, where sums run beyond 8 bits."""
    random = np.random.default_rng(seed)
    if seed % 3 == 0:
        return (random.integers(0, 2, (height, width, channels)) * 255).astype(np.uint8)
    return random.integers(0, 256, (height, width, channels)).astype(np.uint8)


def by_pillow(pixels: npt.NDArray[np.uint8], size: tuple[int, int], kernel: str, box: Any) -> npt.NDArray[np.uint8]:
    """Across and then down, in two calls: the order in which one call of Pillow goes depends on its version."""
    chosen = getattr(Image.Resampling, kernel.upper())
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    left, top, right, bottom = box
    if kernel == "nearest":
        made = image.resize(size[::-1], chosen, box=box)
    else:
        wide = image.resize((size[1], image.height), chosen, box=(left, 0, right, image.height))
        made = wide.resize(size[::-1], chosen, box=(0, top, size[1], bottom))
    return np.asarray(made).reshape(*size, pixels.shape[2])


@given(st.integers(0, 1 << 30), SIDE, SIDE, SIDE, SIDE, st.sampled_from([1, 3]), st.sampled_from(KERNELS))
def test_every_size_by_every_kernel(
    seed: int, height: int, width: int, tall: int, wide: int, channels: int, kernel: str
) -> None:
    pixels, box = pixels_of(seed, height, width, channels), (0.0, 0.0, float(width), float(height))
    wanted = by_pillow(pixels, (tall, wide), kernel, box)
    np.testing.assert_array_equal(resized_by_numpy(pixels, (tall, wide), kernel, box), wanted)
    np.testing.assert_array_equal(resized(pixels, (tall, wide), kernel), wanted)


@given(st.data(), st.integers(0, 1 << 30), SIDE, SIDE, SIDE, SIDE, st.sampled_from(KERNELS))
def test_a_part_whose_edges_lie_between_pixels(
    data: st.DataObject, seed: int, height: int, width: int, tall: int, wide: int, kernel: str
) -> None:
    left, top = data.draw(st.floats(0, width - 0.5)), data.draw(st.floats(0, height - 0.5))
    box = (left, top, data.draw(st.floats(left + 0.25, width)), data.draw(st.floats(top + 0.25, height)))
    pixels = pixels_of(seed, height, width, 3)
    wanted = by_pillow(pixels, (tall, wide), kernel, box)
    np.testing.assert_array_equal(resized_by_numpy(pixels, (tall, wide), kernel, box), wanted)


def test_a_camera_s_frame() -> None:
    frame = pixels_of(1, 1080, 1920, 3)
    whole = (0.0, 0.0, 1920.0, 1080.0)
    for kernel in KERNELS:
        wanted = by_pillow(frame, (224, 398), kernel, whole)
        np.testing.assert_array_equal(resized_by_numpy(frame, (224, 398), kernel, whole), wanted)


def test_colour_becomes_the_grey_that_pillow_makes() -> None:
    every = pixels_of(1, 300, 300, 3)
    np.testing.assert_array_equal(luma(every)[:, :, 0], np.asarray(Image.fromarray(every).convert("L")))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize(("height", "width"), [(37, 90), (90, 37), (32, 64), (3, 800), (16, 16)])
def test_frames_are_prepared_alike_without_pillow(
    channels: int, resize: Any, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = PicturePreprocess((32, 48), channels, resize, 0.875, mean=(0.4,), std=(0.2,), padding="centre")
    for given_channels in (1, 3):
        frame = pixels_of(5, height, width, given_channels)
        with_pillow = how.apply(frame)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "PIL", None)
            np.testing.assert_array_equal(how.apply(frame), with_pillow)
