from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ResvitError
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.preprocessing import preprocess_from, steps_of


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)


def test_normalises_each_channel():
    image = np.full((2, 2, 3), (0, 51, 255), np.uint8)
    got = Preprocess((2, 2), mean=(0.5, 0.2, 0.0), std=(0.5, 1.0, 2.0)).apply(image)
    assert got.dtype == np.float32
    assert got.shape == (3, 2, 2)
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got[:, 0, 0], [-1.0, 0.0, 0.5], atol=1e-7)


def test_bgr_swaps_before_the_mean():
    image = np.full((2, 2, 3), (255, 0, 51), np.uint8)
    got = Preprocess((2, 2), mean=(0.2, 0.0, 1.0), channel_order="bgr").apply(image)
    np.testing.assert_allclose(got[:, 0, 0], [0.0, 0.0, 0.0], atol=1e-7)


@pytest.mark.parametrize("resize", ["stretch", "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_native_size_is_exact(resize, channels):
    image = picture(28, 28, channels)
    got = Preprocess((28, 28), channels, resize).apply(image)
    np.testing.assert_array_equal(np.rint(got * 255), image.transpose(2, 0, 1))


def test_crop_covers_then_cuts_the_middle():
    image = picture(100, 300)
    whole = Preprocess((100, 100), resize="crop").fit(image)
    np.testing.assert_array_equal(whole, image[:, 100:200])
    part = Preprocess((50, 50), resize="crop", crop_fraction=0.5).fit(image)
    np.testing.assert_array_equal(part, image[25:75, 125:175])
    tall = Preprocess((20, 40), resize="crop").fit(picture(80, 40))
    np.testing.assert_array_equal(tall, picture(80, 40)[30:50])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolation_is_pillows(interpolation):
    image = picture(40, 30)
    got = Preprocess((16, 24), resize="stretch", interpolation=interpolation).fit(image)
    chosen = getattr(Image.Resampling, interpolation.upper())
    # Across, then down: from 13 on Pillow chooses the order by the size.
    wanted = Image.fromarray(image).resize((24, 40), chosen).resize((24, 16), chosen)
    np.testing.assert_array_equal(got, np.asarray(wanted))


def test_grey_and_colour_become_what_the_network_reads():
    grey = picture(8, 8, 1)
    got = Preprocess((8, 8), 3).fit(grey)
    assert (got == grey).all()
    luma = Preprocess((1, 1), 1).fit(np.array([[[255, 0, 0]]], np.uint8))
    assert luma.tolist() == [[[76]]]
    assert Preprocess((8, 8), 1).apply(grey[:, :, 0]).shape == (1, 8, 8)


def test_none_refuses_another_size():
    with pytest.raises(ResvitError, match="8x9 pixels"):
        Preprocess((8, 8), resize="none").apply(picture(8, 9))


def test_json_round_trip():
    first = Preprocess((224, 192), 3, "crop", 0.875, "lanczos", (0.485, 0.456, 0.406), (0.2, 0.2, 0.3), "bgr")
    assert Preprocess.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert Preprocess((2, 2), 3, mean=(0.5,)) == Preprocess((2, 2), 3, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"size": [0, 4]},
        {"size": [4]},
        {"size": 4},
        {"size": [4.5, 4]},
        {"size": [4, 4], "channels": 0},
        {"size": [4, 4], "channels": True},
        {"size": [4, 4], "channels": 10**9},
        {"size": [4, 4], "resize": "squash"},
        {"size": [4, 4], "interpolation": "cubic"},
        {"size": [4, 4], "crop_fraction": 0},
        {"size": [4, 4], "crop_fraction": float("nan")},
        {"size": [4, 4], "crop_fraction": "all"},
        {"size": [4, 4], "std": [0.0]},
        {"size": [4, 4], "std": 1.0},
        {"size": [4, 4], "mean": [0.1, 0.2]},
        {"size": [4, 4], "mean": [float("inf")]},
        {"size": [4, 4], "mean": ["a"]},
        {"size": [4, 4], "resize": []},
        {"size": [4, 4], "colour": "rgb"},
    ],
)
def test_unusable_entries_are_refused_with_a_fix(entries):
    with pytest.raises(ResvitError) as caught:
        Preprocess.from_json(entries)
    assert caught.value.fix


def test_more_channels_than_a_picture_has_come_as_arrays_of_the_networks_size():
    preprocess = Preprocess((4, 4), 5)
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 5)).astype(np.uint8)
    assert np.array_equal(preprocess.fit(image), image)
    assert preprocess.apply(image).shape == (5, 4, 4)
    for picture in (image[:, :, :3], image[:, :, 0], np.zeros((8, 8, 5), np.uint8)):
        with pytest.raises(ResvitError, match="reads 5 channels"):
            preprocess.fit(picture)


def test_what_the_user_says_wins_over_the_model_and_the_rest_is_the_models():
    own = Preprocess((8, 6), mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), resize="letterbox")
    network = NetworkRecord((3, 8, 6), None, own, dynamic_batch=True, digest="")
    assert preprocess_from(network, {}, None) == own
    found = preprocess_from(network, {"resize": "crop", "mean": [0.0]}, None)
    assert found == dataclasses.replace(own, resize="crop", mean=(0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "stretched to 8 x 10, bicubic|RGB|pixels / 255, less mean 0, over std 1"),
        ({"resize": "crop", "crop_fraction": 0.8}, "until it covers 10 x 12, bicubic; 8 x 10 from the middle"),
        ({"resize": "letterbox", "pad_value": (114.0,)}, "fitted into 8 x 10, bicubic, filled with 114 at the right"),
        ({"resize": "none", "channel_order": "bgr"}, "none: images are 8 x 10|BGR"),
        ({"mean": (0.485, 0.456, 0.406), "std": (0.5,)}, "less mean 0.485, 0.456, 0.406, over std 0.5"),
        ({"channels": 1}, "grey"),
    ],
)
def test_the_steps_are_told_with_their_numbers(settings, words):
    preprocess = Preprocess(**{"size": (8, 10), **settings})
    network = NetworkRecord((preprocess.channels, 8, 10), 3, preprocess, True, "")
    steps = dict(steps_of(preprocess, network, {"std": 0.5}, None))
    assert all(word in "; ".join(steps.values()) for word in words.split("|")), steps
    assert steps["as said by"] == "your settings (std), the model, what is usual"
    own = dataclasses.replace(network, image_range=(0, 255))
    assert "from 0 to 255" in dict(steps_of(preprocess, own, {}, None))["normalise"]
    (made,) = steps_of(preprocess, network, {}, "net:loader")
    assert made == ("prepared by", f"net:loader, as {preprocess.channels} x 8 x 10")
