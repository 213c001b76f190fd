"""Boxes, masks and depths go through the same resizing as their images, and come back."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import (
    BoxTarget,
    DepthTarget,
    Geometry,
    MaskTarget,
    TargetOptions,
    carried,
    digest_of_target,
    identity,
    in_view,
)
from resvit_engines.errors import ResvitError

SIDES = st.integers(1, 90)
PREPARED = st.builds(
    Preprocess,
    size=st.tuples(SIDES, SIDES),
    resize=st.sampled_from(["stretch", "crop", "letterbox"]),
    crop_fraction=st.sampled_from([1.0, 0.875, 0.5]),
    padding=st.sampled_from(["end", "centre"]),
)


def boxes_of(*rows: tuple[float, ...]) -> BoxTarget:
    count = len(rows)
    boxes = np.array(rows, np.float32).reshape(count, 4)
    return BoxTarget(boxes, np.arange(count, dtype=np.int64), np.zeros(count, np.bool_))


def within(geometry: Geometry) -> tuple[float, float, float, float]:
    """The part of the image that the network sees: x1, y1, x2, y2 in the image's pixels."""
    whole = np.array([[0, 0, geometry.size[1], geometry.size[0]]], np.float32)
    return tuple(geometry.boxes_to_image(whole)[0].tolist())


# --- boxes --------------------------------------------------------------------------------------------------------


@given(PREPARED, SIDES, SIDES, st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_boxes_come_back(preprocess, height, width, shares):
    geometry = preprocess.geometry(height, width)
    x1, x2 = sorted(shares[:2])
    y1, y2 = sorted(shares[2:])
    boxes = np.array([[x1 * width, y1 * height, x2 * width, y2 * height]], np.float32)
    there = geometry.boxes_to_network(boxes)
    np.testing.assert_allclose(geometry.boxes_to_image(there), boxes, rtol=0, atol=2e-5 * max(height, width))
    back = geometry.boxes_to_image(np.array([[-1e4, -1e4, 1e4, 1e4]]))
    assert back.tolist() == [[0, 0, width, height]]


@given(PREPARED, SIDES, SIDES)
def test_carried_boxes_are_inside_and_have_an_area(preprocess, height, width):
    geometry = preprocess.geometry(height, width)
    corners = [(x, y, x + 3.0, y + 2.0) for x in (-2.0, 0.0, width - 1.0, width + 1.0) for y in (-1.0, 0.5, height)]
    got = carried(boxes_of(*corners), geometry)
    assert (got.boxes >= 0).all()
    assert (got.boxes[:, 2] <= geometry.size[1]).all()
    assert (got.boxes[:, 3] <= geometry.size[0]).all()
    assert ((got.boxes[:, 2:] - got.boxes[:, :2]) > 0).all()
    assert len(got.boxes) == len(got.classes) == len(got.crowd)


def test_the_whole_image_fills_what_it_became():
    for resize, wanted in {
        "stretch": [0, 0, 40, 20],
        "letterbox": [0, 0, 20, 20],
        "crop": [0, -10, 40, 30],
    }.items():
        geometry = Preprocess((20, 40), resize=resize).geometry(60, 60)
        np.testing.assert_allclose(geometry.boxes_to_network(np.array([0, 0, 60, 60])), wanted)
    centred = Preprocess((20, 40), resize="letterbox", padding="centre").geometry(60, 60)
    assert centred.boxes_to_network(np.array([[0, 0, 60, 60]])).tolist() == [[10, 0, 30, 20]]


def test_a_box_that_was_cropped_away_is_dropped_and_one_at_the_edge_is_cut():
    geometry = Preprocess((10, 10), resize="crop").geometry(10, 30)
    assert within(geometry) == (10, 0, 20, 10)
    target = boxes_of((0, 0, 10, 10), (5, 2, 15, 4), (12, 1, 14, 3), (20, 0, 30, 10), (9, 0, 10.5, 1))
    got = carried(target, geometry)
    assert got.boxes.tolist() == [[0, 2, 5, 4], [2, 1, 4, 3], [0, 0, 0.5, 1]]
    assert got.classes.tolist() == [1, 2, 4]


def test_no_boxes_stay_no_boxes():
    got = carried(boxes_of(), identity(4, 5))
    assert (got.boxes.shape, got.classes.shape, got.crowd.shape) == ((0, 4), (0,), (0,))


# --- masks and depths ---------------------------------------------------------------------------------------------


def numbered(height: int, width: int) -> np.ndarray:
    return np.arange(height * width, dtype=np.int32).reshape(height, width)


@given(PREPARED, SIDES, SIDES)
def test_masks_come_back_exactly(preprocess, height, width):
    geometry = preprocess.geometry(height, width)
    image = numbered(height, width)
    there = geometry.mask_to_network(image)
    assert there.shape == geometry.size
    if geometry.scale_x >= 1 and geometry.scale_y >= 1:
        # Nothing was made smaller: every pixel of the image that the network sees comes back.
        back = geometry.mask_to_image(there)
        seen = back != -1
        np.testing.assert_array_equal(back[seen], image[seen])
        x1, y1, x2, y2 = within(geometry)
        assert seen[int(np.ceil(y1)) : int(y2), int(np.ceil(x1)) : int(x2)].all()
    if geometry.scale_x <= 1 and geometry.scale_y <= 1:
        # Nothing was made larger: every pixel of the input that is not padding comes back.
        network = numbered(*geometry.size)
        inside = geometry.mask_to_network(np.zeros((height, width), np.int8)) == 0
        again = geometry.mask_to_network(geometry.mask_to_image(network))
        np.testing.assert_array_equal(again[inside], network[inside])


@given(PREPARED, SIDES, SIDES)
def test_masks_are_resized_as_pillow_resizes_images(preprocess, height, width):
    geometry = preprocess.geometry(height, width)
    image = (numbered(height, width) % 251).astype(np.uint8)
    nearest = dataclasses.replace(
        preprocess, interpolation="nearest", channels=1, mean=(0.0,), std=(1.0,), pad_value=255
    )
    got = nearest.fit(image)[:, :, 0]
    clear = [
        np.abs(place - np.rint(place)) > 1e-6
        for place in (
            (np.arange(geometry.size[0]) + 0.5 - geometry.shift_y) / geometry.scale_y,
            (np.arange(geometry.size[1]) + 0.5 - geometry.shift_x) / geometry.scale_x,
        )
    ]
    # Where a centre falls exactly between two pixels, either is the nearest.
    there = geometry.mask_to_network(image, 255)
    np.testing.assert_array_equal(there[np.ix_(*clear)], got[np.ix_(*clear)])


@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
def test_boxes_masks_and_pictures_stay_together(resize):
    """A bright rectangle in a picture, its mask and its box land on the same pixels."""
    preprocess = Preprocess((96, 128), 1, resize, interpolation="nearest", padding="centre", pad_value=7)
    picture = np.zeros((300, 200), np.uint8)
    picture[120:180, 60:140] = 200
    geometry = preprocess.geometry(300, 200)
    seen = preprocess.fit(picture)[:, :, 0] == 200
    mask = carried(MaskTarget((picture == 200).astype(np.int16)), geometry).classes
    np.testing.assert_array_equal(mask == 1, seen)
    assert mask.dtype == np.int16
    rows, columns = np.nonzero(seen)
    box = carried(boxes_of((60, 120, 140, 180)), geometry).boxes[0]
    np.testing.assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1)


def test_padding_is_unlabelled_and_of_unknown_depth():
    geometry = Preprocess((8, 8), resize="letterbox").geometry(4, 8)
    mask = carried(MaskTarget(np.full((4, 8), 3, np.int16)), geometry)
    assert mask.classes.tolist() == [[3] * 8] * 4 + [[-1] * 8] * 4
    depth = carried(DepthTarget(np.full((4, 8), 2.5, np.float32)), geometry)
    assert depth.depth.tolist() == [[2.5] * 8] * 4 + [[0.0] * 8] * 4
    assert depth.depth.dtype == np.float32


def test_the_same_size_changes_nothing():
    geometry = identity(5, 7)
    image = numbered(5, 7)
    np.testing.assert_array_equal(geometry.mask_to_network(image), image)
    np.testing.assert_array_equal(geometry.mask_to_image(image), image)
    assert geometry == Preprocess((5, 7), resize="none").geometry(5, 7)
    assert geometry == Preprocess((5, 7), resize="letterbox").geometry(5, 7)


# --- letterbox ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("padding", "rows"), [("end", slice(0, 10)), ("centre", slice(5, 15))])
def test_letterbox_fits_and_pads(padding, rows):
    image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    preprocess = Preprocess((20, 20), resize="letterbox", padding=padding, pad_value=(10, 20, 30))
    got = preprocess.fit(image)
    wanted = np.asarray(Image.fromarray(image).resize((20, 10), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(got[rows], wanted)
    rest = np.delete(got, np.arange(20)[rows], axis=0)
    assert (rest == (10, 20, 30)).all()


def test_letterbox_rounds_to_the_nearest_pixel():
    preprocess = Preprocess((64, 64), resize="letterbox", pad_value=255)
    # 64 * 100 / 150 = 42.67 rows, and 64 * 100 / 151 = 42.38.
    for width, rows in ((150, 43), (151, 42)):
        image = np.zeros((100, width, 3), np.uint8)
        assert int((preprocess.fit(image) == 0).all(axis=(1, 2)).sum()) == rows
        assert 100 * preprocess.geometry(100, width).scale_y == pytest.approx(rows)


def test_padding_with_the_mean_becomes_zero_whatever_rounding_would_do():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    preprocess = Preprocess(
        (16, 16), resize="letterbox", mean=mean, std=std, pad_value=[255 * value for value in mean], padding="centre"
    )
    got = preprocess.apply(np.full((4, 16, 3), 255, np.uint8))
    np.testing.assert_allclose(got[:, :6], 0, atol=1e-6)
    np.testing.assert_allclose(got[:, 10:], 0, atol=1e-6)
    assert (got[:, 6:10] > 1).all()


def test_padding_is_in_the_order_that_the_network_reads():
    preprocess = Preprocess((4, 4), resize="letterbox", channel_order="bgr", pad_value=(0, 51, 255))
    assert preprocess.fit(np.zeros((1, 4, 3), np.uint8))[3, 3].tolist() == [255, 51, 0]
    np.testing.assert_allclose(preprocess.apply(np.zeros((1, 4, 3), np.uint8))[:, 3, 3], [0, 0.2, 1])


def test_letterbox_is_recorded():
    first = Preprocess((8, 9), resize="letterbox", padding="centre", pad_value=114)
    plain = json.loads(json.dumps(first.to_json()))
    assert plain["pad_value"] == [114.0, 114.0, 114.0]
    assert plain["padding"] == "centre"
    assert Preprocess.from_json(plain) == first
    assert Preprocess.from_json({"size": [8, 9]}).padding == "end"


@pytest.mark.parametrize("wrong", [{"padding": "left"}, {"pad_value": 256}, {"pad_value": (1, 2)}, {"pad_value": "x"}])
def test_padding_that_cannot_be_used(wrong):
    with pytest.raises(ResvitError):
        Preprocess.from_json({"size": [4, 4], "resize": "letterbox", **wrong})


@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (3, 1001), (33, 31)])
def test_every_size_of_image_works(resize, shape):
    preprocess = Preprocess((32, 32), resize=resize)
    got = preprocess.apply(np.full((*shape, 3), 255, np.uint8))
    assert got.shape == (3, 32, 32)
    geometry = preprocess.geometry(*shape)
    mask = geometry.mask_to_network(np.ones(shape, np.int16))
    assert set(np.unique(mask)) <= {1, -1}
    assert (got[:, mask == 1] == 1).all()
    assert (got[:, mask == -1] == 0).all()


def test_a_picture_that_is_all_but_a_line_is_not_enlarged_whole(monkeypatch):
    """To cover 32x32, 1x4000 pixels would become 32x128000, and much larger ones more than any memory holds."""
    asked = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: asked.append(size) or resize(self, size, *a, **k)
    )
    line = np.zeros((1, 4000, 3), np.uint8)
    line[:, 2000:] = 255
    got = Preprocess((32, 32), resize="crop", interpolation="nearest").fit(line)
    assert asked == [(32, 32)]
    assert (got[:, :16] == 0).all()
    assert (got[:, 16:] == 255).all()


def test_none_says_which_sizes_do_not_fit():
    with pytest.raises(ResvitError, match="4x5 pixels"):
        Preprocess((4, 4), resize="none").geometry(4, 5)


# --- digests and options ------------------------------------------------------------------------------------------


def test_every_part_of_a_target_counts_in_its_digest():
    one = boxes_of((0, 0, 2, 2))
    others = [
        boxes_of(),
        boxes_of((0, 0, 2, 3)),
        BoxTarget(one.boxes, one.classes + 1, one.crowd),
        BoxTarget(one.boxes, one.classes, ~one.crowd),
        MaskTarget(np.zeros((2, 2), np.int16)),
        MaskTarget(np.zeros((1, 4), np.int16)),
        DepthTarget(np.zeros((2, 2), np.float32)),
    ]
    digests = [digest_of_target(target) for target in (one, *others)]
    assert len(set(digests)) == len(digests)
    assert digest_of_target(boxes_of((0, 0, 2, 2))) == digests[0]


def test_what_is_out_of_view_is_dropped():
    got = in_view(boxes_of((-5, -5, -1, -1), (3, 3, 3, 9), (1, 1, 2, 2)), 10, 10)
    assert got.classes.tolist() == [2]


def test_options_are_picked_out_of_a_tasks():
    assert TargetOptions.from_options({"kind": "segmentation"}) == TargetOptions()
    assert TargetOptions.from_options({"classes": 21, "ignore": 0}) == TargetOptions(21, (0,))
    assert TargetOptions.from_options({"ignore": [], "depth_scale": 1}) == TargetOptions(None, (), 1.0)
    for wrong in ({"classes": "21"}, {"ignore": [True]}, {"ignore": None}, {"depth_scale": "mm"}):
        with pytest.raises(ResvitError):
            TargetOptions.from_options(wrong)


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"classes": 40_000}, {"depth_scale": 0.0}, {"depth_scale": np.nan}])
def test_options_that_cannot_be_used(wrong):
    with pytest.raises(ResvitError):
        TargetOptions(**wrong)
