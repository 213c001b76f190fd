"""CVAT's own XML for images, version 1.1 (https://docs.cvat.ai/docs/manual/advanced/xml_format).

Classes are those of the file's labels, in their order. Lines, points and cuboids cover nothing that is exact, and are
left out and counted; so are tags, which are of whole pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from resvit_calibrate.readers.boxes.outlines import require_drawable
from resvit_calibrate.readers.boxes.xml_files import read_xml
from resvit_calibrate.readers.labelled.places import located
from resvit_calibrate.readers.labelled.recognise import format_of
from resvit_calibrate.readers.labelled.regions import Labelled, Picture, Region
from resvit_calibrate.readers.labelled.shapes import (
    ellipse,
    is_area,
    name_from,
    number_from,
    patch,
    points_from,
    polygon,
    size_from,
    turned_box,
)
from resvit_engines.errors import ResvitError

FORMAT = format_of(
    ".xml", (rb"<annotations>", rb"<image\s[^>]*\bname=|<track\s|<meta>[\s\S]*<labels>"), "CVAT's own XML"
)
_FIX = (
    "CVAT's XML for images has an `image` (name, width, height) with each `box` (label, xtl, ytl, xbr, ybr) and "
    "`polygon` (label, points) in it; export it again as `CVAT for images 1.1`."
)
_MOST_BYTES = 1 << 30
_SHAPES = ("box", "polygon", "ellipse", "mask")
_LEFT_OUT = ("polyline", "points", "cuboid", "skeleton", "tag")


class _Image(NamedTuple):
    name: str
    subset: str
    size: tuple[int, int]
    regions: list[Region]


def cvat_from(path: Path) -> Labelled:
    """The pictures that a file names. Raises ``ResvitError`` for another file, and where no picture is there."""
    images: list[_Image] = []
    labels: list[str] = []
    bare = 0

    def started(stack: tuple[str, ...], attributes: dict[str, str]) -> None:
        nonlocal bare
        if stack[1:] == ("track",):
            raise ResvitError(f"{path} holds tracks of a film.", "Export it from CVAT as `CVAT for images 1.1`.")
        if stack[1:] == ("image",):
            where = f"image {attributes.get('name', '')[:60]!r} of {path}"
            size = size_from(attributes.get("height"), attributes.get("width"), where, _FIX)
            images.append(_Image(attributes.get("name", ""), attributes.get("subset", ""), size, []))
        elif stack[1:-1] == ("image",) and stack[-1] in (*_SHAPES, *_LEFT_OUT):
            image = images[-1]
            region = _region(stack[-1], attributes, image.size, f"{stack[-1]} of {image.name!r} of {path}")
            bare += region is None
            image.regions.extend([region] if region is not None else [])

    def ended(stack: tuple[str, ...], text: str) -> None:
        if stack[1:2] == ("meta",) and stack[-3:] == ("labels", "label", "name") and text:
            labels.append(name_from(text, f"a label of {path}", _FIX))

    read_xml(path, started, ended, _FIX, _MOST_BYTES)
    if not images:
        raise ResvitError(f"{path} lists no images.", _FIX)
    below = [f"{image.subset}/{image.name}" if image.subset else image.name for image in images]
    found = located(path, [image.name for image in images], _FIX, below)
    kept = tuple(
        Picture(found.files[image.name], image.size, tuple(image.regions))
        for image in images
        if image.name in found.files
    )
    notes = (f"{bare} lines, points, cuboids and tags of {path} cover nothing, and are left out",) if bare else ()
    return Labelled(path, found.root, kept, tuple(dict.fromkeys(labels)), (*found.notes, *notes))


def _region(kind: str, told: dict[str, str], size: tuple[int, int], where: str) -> Region | None:
    """One shape; None of one that covers nothing."""
    if kind in _LEFT_OUT:
        return None
    name = name_from(told.get("label"), f"{where}: label", _FIX)

    def numbers(*keys: str) -> list[float]:
        return [number_from(told.get(key), f"{where}: {key}", _FIX) for key in keys]

    turned = number_from(told.get("rotation", "0"), f"{where}: rotation", _FIX)
    if kind == "box":
        left, top, right, bottom = numbers("xtl", "ytl", "xbr", "ybr")
        return turned_box(name, (left, top, right, bottom), turned)
    if kind == "ellipse":
        x, y, wide, high = numbers("cx", "cy", "rx", "ry")
        return ellipse(name, x, y, (wide, high), turned)
    if kind == "polygon":
        points = points_from([point.split(",") for point in told.get("points", "").split(";")], where, _FIX)
        return polygon(name, points) if is_area(points) else None
    left, top, width, height = (int(value) for value in numbers("left", "top", "width", "height"))
    require_drawable(size, where)
    require_drawable((height, width), where)
    lengths = [number_from(length, f"{where}: rle", _FIX) for length in told.get("rle", "").split(",")]
    if not all(length >= 0 and length.is_integer() for length in lengths) or sum(lengths) != height * width:
        raise ResvitError(f"{where}: its runs cover {sum(lengths):g} pixels of {height * width}.", _FIX)
    covered = np.repeat(np.arange(len(lengths)) % 2 == 1, np.array(lengths, np.int64))  # runs go along the rows
    return patch(name, covered.reshape(height, width), left, top, size)
