"""What changed, drawn: boxes of both networks, masks, depths, and what differs between them."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest

from resvit_export.report.layout.data import ChangedImage, ReportData
from resvit_export.report.layout.drawings import drawing_of
from resvit_export.report.page import html_from_run

NAMES = ("coat", "bag")


def decoded(uri: str) -> np.ndarray:
    """The pixels [H, W, channels] of a PNG that the report wrote."""
    body = base64.b64decode(uri.partition(",")[2])
    width, height = (int.from_bytes(body[at : at + 4], "big") for at in (16, 20))
    channels = {0: 1, 2: 3}[body[25]]
    start = body.index(b"IDAT") + 4
    length = int.from_bytes(body[start - 8 : start - 4], "big")
    rows = np.frombuffer(zlib.decompress(body[start : start + length]), np.uint8).reshape(height, -1)[:, 1:]
    return rows.reshape(height, width, channels)


def boxes(*found: tuple[list[float], float, int]) -> dict[str, np.ndarray]:
    return {
        "boxes": np.array([box for box, _, _ in found], np.float32).reshape(-1, 4),
        "scores": np.array([score for _, score, _ in found], np.float32),
        "classes": np.array([number for _, _, number in found], np.int64),
        "known_boxes": np.array([[1, 1, 9, 9]], np.float32),
        "known_classes": np.array([1]),
    }


def test_boxes_tell_what_was_lost_and_what_is_new() -> None:
    same, lost, new = ([0, 0, 10, 10], 0.9, 1), ([20, 20, 28, 30], 0.6, 0), ([2, 20, 8, 26], 0.4, 0)
    moved = ([1, 0, 10, 10], 0.8, 1)
    drawing = drawing_of(np.zeros((32, 40, 1), np.uint8), boxes(same, lost), boxes(new, moved), NAMES)
    kinds = [[box.kind for box in panel.boxes] for panel in drawing.panels]
    assert kinds == [["known", "both", "lost"], ["known", "new", "both"]]
    assert [box.text for box in drawing.panels[0].boxes] == ["bag", "bag 0.90", "coat 0.60"]
    assert (drawing.panels[0].width, drawing.panels[0].height) == (40, 32)
    assert [meaning for _, meaning in drawing.legend] == ["both networks", "float only", "quantised only", "the truth"]


def test_one_box_is_the_partner_of_one_only_and_of_its_class() -> None:
    twice = boxes(([0, 0, 10, 10], 0.9, 1), ([0, 0, 10, 11], 0.8, 1), ([0, 0, 10, 10], 0.7, 0))
    drawing = drawing_of(np.zeros((32, 32, 1), np.uint8), boxes(([0, 0, 10, 10], 0.9, 1)), twice, None)
    assert [box.kind for box in drawing.panels[1].boxes] == ["known", "both", "new", "new"]
    assert drawing.panels[1].boxes[3].text == "class 0 0.70"


def test_an_image_without_boxes_is_drawn_as_well() -> None:
    drawing = drawing_of(np.zeros((8, 8, 3), np.uint8), boxes(), boxes(([0, 0, 4, 4], 0.5, 0)), NAMES)
    assert [len(panel.boxes) for panel in drawing.panels] == [1, 2]


def test_masks_show_where_they_differ() -> None:
    before = np.zeros((4, 6), np.int16)
    after = before.copy()
    after[1, 2] = 1
    drawing = drawing_of(np.full((8, 12, 1), 100, np.uint8), {"mask": before}, {"mask": after}, NAMES)
    pictures = [decoded(panel.uri) for panel in drawing.panels]
    assert [picture.shape for picture in pictures] == [(4, 6, 3)] * 3
    changed = (pictures[0] != pictures[1]).any(axis=2)
    np.testing.assert_array_equal(changed, before != after)
    np.testing.assert_array_equal((pictures[2] != 100).any(axis=2), before != after)
    assert drawing.panels[2].caption == "differ: 4.2%"
    assert [meaning for _, meaning in drawing.legend] == ["coat", "bag"]


def test_depths_share_one_scale_and_broken_ones_stand_out() -> None:
    before = np.linspace(1, 5, 12, dtype=np.float16).reshape(3, 4)
    after = before.copy()
    after[0, 0] = 3
    after[2, 3] = np.nan
    drawing = drawing_of(np.zeros((3, 4, 1), np.uint8), {"depth": before}, {"depth": after}, None)
    first, second, error = (decoded(panel.uri) for panel in drawing.panels)
    np.testing.assert_array_equal((first != second).any(axis=2), ~np.isclose(before, after))
    assert "1.00 to 5.00 m" in drawing.panels[0].caption
    assert "0 to 2.00 m" in drawing.panels[2].caption
    assert (error[0, 0] != error[1, 1]).any()
    assert tuple(second[2, 3]) == (230, 60, 40)


@pytest.mark.parametrize("drawing", [{}, {"classes": np.zeros(3)}])
def test_a_class_has_nothing_to_draw(drawing: dict) -> None:
    assert drawing_of(np.zeros((4, 4, 1), np.uint8), drawing, drawing, None) is None


def test_the_page_holds_the_panels_and_escapes_names() -> None:
    image = ChangedImage(
        np.zeros((32, 32, 1), np.uint8), None, "1 box", "2 boxes, 1 the same", ("<b>coat</b>", "bag"), "lost",
        boxes(([0, 0, 10, 10], 0.9, 0)), boxes(([0, 0, 10, 10], 0.9, 0), ([20, 20, 30, 30], 0.5, 1)),
    )  # fmt: skip
    page = html_from_run(ReportData(name="detector", verdict=None, images=[image]))
    assert page.count('<svg viewBox="0 0 32 32"') == 2
    assert 'rect class="new"' in page
    assert "&lt;b&gt;coat" in page
    assert "<b>coat" not in page
