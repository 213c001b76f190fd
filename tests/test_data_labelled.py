"""What tools for labelling write: read as boxes and as masks, what is odd counted, and what is broken refused."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.naming import kind_of_folder, require_source
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.class_list import class_list_from_names
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL, BoxTarget, MaskTarget, TargetOptions
from resvit_engines.errors import ExitCode, ResvitError

COUNT = 12
SIZE = (16, 20)  # height, width
BOX = (2.0, 1.0, 9.0, 8.0)
POLYGON = [(10.0, 9.0), (18.0, 9.0), (18.0, 15.0), (10.0, 15.0)]
HOLE = [(12.0, 11.0), (16.0, 11.0), (16.0, 13.0), (12.0, 13.0)]


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(list(path.name.encode())).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


def pictures(folder: Path, first: int = 0) -> list[str]:
    return [picture(folder / f"{number:06}.png").name for number in range(first, first + COUNT)]


def text(path: Path, content: str | bytes | dict[str, Any] | list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(content) if isinstance(content, (dict, list)) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def png(covered: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray((covered * 255).astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def labelme_file(name: str, shapes: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    shapes = shapes if shapes is not None else [
        {"label": "cat", "shape_type": "rectangle", "points": [[9, 8], [2, 1]], "group_id": None},
        {"label": "dog", "shape_type": "polygon", "points": POLYGON, "group_id": None},
    ]  # fmt: skip
    return {
        "version": "5.0", "flags": {}, "shapes": shapes, "imagePath": name, "imageData": None,
        "imageHeight": SIZE[0], "imageWidth": SIZE[1], **more,
    }  # fmt: skip


def labelme(root: Path, first: int = 0) -> None:
    for name in pictures(root, first):
        text(root / f"{Path(name).stem}.json", labelme_file(name))


def via_regions() -> list[dict[str, Any]]:
    xs, ys = zip(*POLYGON, strict=True)
    return [
        {
            "shape_attributes": {"name": "rect", "x": 2, "y": 1, "width": 7, "height": 7},
            "region_attributes": {"type": "cat", "note": "x"},
        },
        {
            "shape_attributes": {"name": "polygon", "all_points_x": xs, "all_points_y": ys},
            "region_attributes": {"type": {"dog": True, "cat": False}, "note": ""},
        },
    ]


def via(root: Path, first: int = 0) -> None:
    entries = {f"{n}9": {"filename": n, "size": 9, "regions": via_regions()} for n in pictures(root, first)}
    text(root / "via_project.json", {"_via_settings": {}, "_via_img_metadata": entries})


def via_csv(root: Path, first: int = 0) -> None:
    rows = ["#filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"]
    for name in pictures(root, first):
        for number, region in enumerate(via_regions()):
            fields = [json.dumps(region[key]).replace('"', '""') for key in ("shape_attributes", "region_attributes")]
            rows.append(f'{name},9,"{{}}",2,{number},"{fields[0]}","{fields[1]}"')
    text(root / "via_region_data.csv", "\n".join(rows))


def createml(root: Path, first: int = 0) -> None:
    boxes = [
        {"label": "cat", "coordinates": {"x": 5.5, "y": 4.5, "width": 7, "height": 7}},
        {"label": "dog", "coordinates": {"x": 14, "y": 12, "width": 8, "height": 6}},
    ]
    text(root / "_annotations.createml.json", [{"image": n, "annotations": boxes} for n in pictures(root, first)])


def runs_of(covered: np.ndarray) -> str:
    """CVAT's: along the rows, the first of the background."""
    flat = covered.ravel()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    lengths = np.diff(edges).tolist()
    return ",".join(map(str, [0, *lengths] if flat[0] else lengths))


def cvat_images(root: Path, shapes: str, first: int = 0) -> str:
    sides = f'width="{SIZE[1]}" height="{SIZE[0]}"'
    names = pictures(root / "images", first)
    return "".join(f'<image id="{n}" name="{name}" {sides}>{shapes}</image>' for n, name in enumerate(names))


CVAT_META = (
    "<meta><task><labels><label><name>owl</name></label><label><name>cat</name></label><label><name>dog</name></label>"
    "</labels></task></meta>"
)
CVAT_SHAPES = (
    '<box label="cat" xtl="2" ytl="1" xbr="9.0" ybr="8" occluded="0"/>'
    f'<polygon label="dog" points="{";".join(f"{x},{y}" for x, y in POLYGON)}">'
    '<attribute name="a">1</attribute></polygon>'
)


def cvat(root: Path, first: int = 0) -> None:
    images = cvat_images(root, CVAT_SHAPES, first)
    text(root / "annotations.xml", f"<annotations><version>1.1</version>{CVAT_META}{images}</annotations>")


KITTI = (
    "cat 0.00 0 -1.58 2.0 1.0 9.0 8.0 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n"
    "dog 0.00 0 -1.58 10.0 9.0 18.0 15.0 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n"
)


def kitti(root: Path, first: int = 0) -> None:
    for name in pictures(root / "training/image_2", first):
        text(root / "training/label_2" / f"{Path(name).stem}.txt", KITTI)


def supervisely(root: Path, first: int = 0) -> None:
    objects = [
        {"classTitle": "cat", "geometryType": "rectangle", "points": {"exterior": [[2, 1], [9, 8]], "interior": []}},
        {"classTitle": "dog", "geometryType": "polygon", "points": {"exterior": POLYGON, "interior": []}},
    ]
    for name in pictures(root / "ds/img", first):
        sides = {"height": SIZE[0], "width": SIZE[1]}
        text(root / "ds/ann" / f"{name}.json", {"description": "", "size": sides, "objects": objects})
    text(root / "meta.json", {"classes": [{"title": title, "shape": "any"} for title in ("owl", "cat", "dog")]})


def percent(x: float, y: float) -> tuple[float, float]:
    return x * 100 / SIZE[1], y * 100 / SIZE[0]


def studio_results() -> list[dict[str, Any]]:
    (x, y), (width, height) = percent(2, 1), percent(7, 7)
    common = {"from_name": "label", "to_name": "image", "original_height": SIZE[0], "original_width": SIZE[1]}
    box = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": ["cat"]}
    shape = {"points": [list(percent(*point)) for point in POLYGON], "polygonlabels": ["dog"]}
    return [{**common, "type": "rectanglelabels", "value": box}, {**common, "type": "polygonlabels", "value": shape}]


def label_studio(root: Path, first: int = 0) -> None:
    text(
        root / "project-1.json",
        [
            {
                "id": number,
                "data": {"image": f"/data/upload/1/0123abcd-{name}"},
                "annotations": [{"result": [], "was_cancelled": True}, {"result": studio_results()}],
            }
            for number, name in enumerate(pictures(root / "images", first))
        ],
    )


def label_studio_short(root: Path, first: int = 0) -> None:
    rows = []
    for name in pictures(root, first):
        results = [
            {**one["value"], **{key: one[key] for key in one if key[:9] == "original_"}} for one in studio_results()
        ]
        rows.append({"image": f"/data/local-files/?d=some/{name}", "id": 1, "label": results})
    text(root / "min.json", rows)


def tensorflow(root: Path, first: int = 0) -> None:
    rows = "".join(
        f"{name},{SIZE[1]},{SIZE[0]},cat,2,1,9,8\n{name},{SIZE[1]},{SIZE[0]},dog,10,9,18,15\n"
        for name in pictures(root, first)
    )
    text(root / "_annotations.csv", f"filename,width,height,class,xmin,ymin,xmax,ymax\n{rows}")


def open_images(root: Path, first: int = 0) -> None:
    rows = "".join(
        f"{Path(n).stem},xclick,/m/1,1,0.1,0.45,0.0625,0.5,0,0,0,0,0\n"
        f"{Path(n).stem},xclick,/m/2,1,0.5,0.9,0.5625,0.9375,0,0,0,0,0\n"
        for n in pictures(root / "train", first)
    )
    titles = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    text(root / "train-annotations-bbox.csv", f"{titles}\n{rows}")
    text(root / "class-descriptions-boxable.csv", "/m/1,cat\n/m/2,dog\n/m/3,owl\n")


FORMATS: dict[str, tuple[Callable[..., None], str]] = {
    "labelme": (labelme, "labelme"),
    "VIA": (via, "via"),
    "VIA's CSV": (via_csv, "via"),
    "CreateML": (createml, "createml"),
    "CVAT": (cvat, "cvat"),
    "KITTI": (kitti, "kitti"),
    "Supervisely": (supervisely, "supervisely"),
    "Label Studio": (label_studio, "label-studio"),
    "Label Studio, short": (label_studio_short, "label-studio"),
    "TensorFlow's list": (tensorflow, "boxes"),
    "Open Images": (open_images, "boxes"),
}
OUTLINED = ("labelme", "VIA", "VIA's CSV", "CVAT", "Supervisely", "Label Studio", "Label Studio, short")


def opened(root: Path | str, options: TargetOptions = AS_USUAL) -> Pools:
    require_source(str(root))
    pools = open_source(str(root), options)
    assert isinstance(pools, Pools)
    return pools


def boxes_of(pools: Pools, index: int = 0) -> list[tuple[str, list[float], bool]]:
    pool = pools.calibration
    target = pool.target(index, *SIZE)
    assert isinstance(target, BoxTarget)
    return [
        (pool.class_names[number], np.round(box, 3).tolist(), bool(crowd))
        for number, box, crowd in zip(target.classes.tolist(), target.boxes, target.crowd, strict=True)
    ]


def mask_of(root: Path | str, index: int = 0) -> tuple[np.ndarray, tuple[str, ...]]:
    pool = opened(root, TargetOptions(outlines=True)).calibration
    target = pool.target(index, *SIZE)
    assert isinstance(target, MaskTarget)
    assert pool.task == "segmentation"
    return target.classes, pool.class_names


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognised_and_gives_its_boxes(name: str, tmp_path: Path) -> None:
    make, kind = FORMATS[name]
    make(tmp_path)
    assert kind_of_folder(tmp_path) == kind
    pools = opened(tmp_path)
    assert pools.calibration.task == "detection"
    assert len(pools.calibration) == COUNT
    assert pools.validation is None
    assert boxes_of(pools) == [("cat", [2, 1, 9, 8], False), ("dog", [10, 9, 18, 15], False)]
    listed = name in ("CVAT", "Supervisely")
    assert pools.calibration.class_names == (("owl", "cat", "dog") if listed else ("cat", "dog"))
    assert pools.calibration.read(0).shape == (*SIZE, 3)
    assert len(opened(f"{kind}:{tmp_path}").calibration) == COUNT
    assert not any("left out" in note for note in pools.calibration.notes)


@pytest.mark.parametrize("name", OUTLINED)
def test_polygons_are_masks_where_the_task_is_segmentation(name: str, tmp_path: Path) -> None:
    FORMATS[name][0](tmp_path)
    mask, names = mask_of(tmp_path)
    wanted = np.zeros(SIZE, np.int64)
    wanted[1:8, 2:9], wanted[9:15, 10:18] = names.index("cat"), names.index("dog")
    assert names[0] == "background"
    assert np.array_equal(mask, wanted)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in OUTLINED])
def test_boxes_alone_make_no_masks(name: str, tmp_path: Path) -> None:
    FORMATS[name][0](tmp_path)
    with pytest.raises(ResvitError, match=r"upright boxes alone.*\n.*--task detection"):
        opened(tmp_path, TargetOptions(outlines=True))


@pytest.mark.parametrize("name", FORMATS)
def test_train_and_val_are_two_parts_with_classes_of_both(name: str, tmp_path: Path) -> None:
    make, _ = FORMATS[name]
    make(tmp_path / "train")
    make(tmp_path / "val", COUNT)
    make(tmp_path / "test", 2 * COUNT)
    pools = opened(tmp_path)
    assert pools.validation is not None
    assert (len(pools.calibration), len(pools.validation)) == (COUNT, COUNT)
    assert pools.calibration.class_names == pools.validation.class_names
    assert "train and val are used, test not" in " ".join(pools.calibration.notes)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("labelme", "KITTI", "Supervisely")])
def test_the_file_itself_may_be_named(name: str, tmp_path: Path) -> None:
    make, kind = FORMATS[name]
    make(tmp_path)
    endings = (".json", ".xml", ".csv")
    file = next(path for path in sorted(tmp_path.iterdir()) if path.suffix in endings and "class-" not in path.name)
    assert boxes_of(opened(file)) == boxes_of(opened(f"{kind}:{file}")) == boxes_of(opened(tmp_path))


def test_two_files_are_parts_by_their_names_and_else_refused(tmp_path: Path) -> None:
    entries = [{"image": name, "annotations": []} for name in pictures(tmp_path)]
    entries[0]["annotations"] = [{"label": "cat", "coordinates": {"x": 5, "y": 5, "width": 4, "height": 4}}]
    for name in ("a_train.json", "b.json"):
        text(tmp_path / name, entries)
    with pytest.raises(
        ResvitError, match=r"has 2 files as CreateML's annotations: a_train.json, b.json.\n.*Name the one"
    ):
        opened(tmp_path)
    (tmp_path / "b.json").rename(tmp_path / "a_val.json")
    pools = opened(tmp_path)
    assert pools.validation is not None


@pytest.mark.parametrize(("name", "other"), [("labelme", "VIA"), ("CVAT", "Open Images"), ("KITTI", "VIA's CSV")])
def test_of_two_formats_in_one_folder_it_is_said_which_is_taken(name: str, other: str, tmp_path: Path) -> None:
    for one in (name, other):
        FORMATS[one][0](tmp_path)
    taken = kind_of_folder(tmp_path)
    left = next(FORMATS[one][1] for one in (name, other) if FORMATS[one][1] != taken)
    assert f"which are not used: `{left}:{tmp_path}` takes them" in " ".join(opened(tmp_path).calibration.notes)


def test_coco_beside_labelme_is_taken_and_said(tmp_path: Path) -> None:
    labelme(tmp_path)
    images = [{"id": n, "file_name": f"{n:06}.png"} for n in range(COUNT)]
    boxes = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 4, 4]}]
    found = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    text(tmp_path / "annotations.json", found)
    pools = opened(tmp_path)
    assert pools.calibration.class_names == ("x",)
    assert "also holds labelme's annotations (000000.json)" in " ".join(pools.calibration.notes)


def test_classes_txt_numbers_the_classes(tmp_path: Path) -> None:
    labelme(tmp_path)
    text(tmp_path / "classes.txt", "dog\nowl\ncat\n")
    assert opened(tmp_path).calibration.class_names == ("dog", "owl", "cat")
    text(tmp_path / "classes.txt", "dog\nowl\n")
    with pytest.raises(ResvitError, match=r"regions of 1 classes that the .*classes.txt lacks: cat"):
        opened(tmp_path)


def described(root: Path, shapes: list[dict[str, Any]], **more: Any) -> None:
    picture(root / "a.png")
    text(root / "a.json", labelme_file("a.png", shapes, **more))


def test_labelmes_other_shapes(tmp_path: Path) -> None:
    covered = np.zeros((4, 5), np.bool_)
    covered[1:, 2:] = True
    described(
        tmp_path,
        [
            {"label": "disc", "shape_type": "circle", "points": [[10, 8], [10, 13]]},
            {
                "label": "cut",
                "shape_type": "mask",
                "points": [[1, 2], [5, 5]],
                "mask": base64.b64encode(png(covered)).decode(),
            },
            {"label": "two", "shape_type": "polygon", "points": [[0, 0], [2, 0], [2, 2]], "group_id": 1},
            {"label": "two", "shape_type": "rectangle", "points": [[17, 14], [19, 15]], "group_id": 1},
            {"label": "edge", "shape_type": "line", "points": [[0, 0], [4, 4]]},
            {"label": "__ignore__", "shape_type": "rectangle", "points": [[0, 10], [4, 16]]},
        ],
    )
    pools = opened(tmp_path)
    found = boxes_of(pools)
    assert found[:3] == [("disc", [5, 3, 15, 13], False), ("cut", [3, 3, 6, 6], False), ("two", [0, 0, 19, 15], False)]
    assert sorted(found[3:]) == [(name, [0, 10, 4, 16], True) for name in ("cut", "disc", "two")]
    notes = " ".join(pools.calibration.notes)
    assert "1 lines and points" in notes
    assert "1 regions" in notes
    assert "of no class" in notes
    mask, names = mask_of(tmp_path)
    assert (mask[3:6, 3:6] == names.index("cut")).all()
    assert mask[8, 10] == names.index("disc")
    assert mask[14, 18] == mask[0, 1] == names.index("two")
    assert (mask[10:16, :4] == -1).all()
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    disc = (rows - 8) ** 2 + (columns - 10) ** 2 < 25
    assert (disc ^ (mask == names.index("disc"))).sum() <= 8  # the circle's own edge


def test_labelmes_picture_may_lie_elsewhere_or_in_the_file_itself(tmp_path: Path) -> None:
    inside = picture(tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").unlink()
    picture(tmp_path / "images" / "b.png")
    picture(tmp_path / "images" / "c.png")
    picture(tmp_path / "images" / "alone.png")
    text(tmp_path / "json/a.json", labelme_file("a.png", imageData=base64.b64encode(inside).decode()))
    text(tmp_path / "json/b.json", labelme_file("..\\images\\b.png"))
    text(tmp_path / "json/c.json", labelme_file("../../../etc/passwd"))
    text(tmp_path / "json/d.json", labelme_file("d.png"))
    text(tmp_path / "json/settings.json", {"a": 1})
    pools = opened(tmp_path)
    assert {Path(pools.calibration.title(number)).name for number in range(3)} == {"a.json", "b.png", "c.png"}
    assert len(pools.calibration) == 3
    for number in range(3):
        assert pools.calibration.read(number, seen=pools.calibration.look(number)).shape == (*SIZE, 3)
        assert len(boxes_of(pools, number)) == 2
    notes = " ".join(pools.calibration.notes)
    assert "1 files of labelme's" in notes
    assert "json/d.json" in notes
    assert "json/settings.json" in notes
    assert "1 pictures of" in notes
    assert "images/alone.png" in notes
    assert "read out of labelme's files" in notes


def test_a_picture_that_two_files_describe(tmp_path: Path) -> None:
    labelme(tmp_path)
    text(tmp_path / "again.json", labelme_file("000000.png"))
    assert "1 entries of" in " ".join(opened(tmp_path).calibration.notes)
    other = labelme_file("000000.png", [{"label": "cat", "points": [[0, 0], [4, 0], [4, 4]]}])
    text(tmp_path / "again.json", other)
    with pytest.raises(ResvitError, match=r"describes 1 pictures more than once, and differently: 000000.png"):
        opened(tmp_path)


def test_a_box_under_two_classes_and_boxes_beyond_or_without_area_are_counted(tmp_path: Path) -> None:
    rectangle = {"shape_type": "rectangle"}
    described(
        tmp_path,
        [
            {"label": "a", "points": [[1, 1], [5, 5]], **rectangle},
            {"label": "b", "points": [[1, 1], [5, 5]], **rectangle},
            {"label": "a", "points": [[10, 10], [30, 30]], **rectangle},
            {"label": "a", "points": [[40, 40], [50, 50]], **rectangle},
        ],
    )
    pools = opened(tmp_path)
    assert [box for _, box, _ in boxes_of(pools)] == [[1, 1, 5, 5], [1, 1, 5, 5], [10, 10, 20, 16]]
    notes = " ".join(pools.calibration.notes)
    assert "1 boxes that stand twice under different classes (in a.png)" in notes
    assert "1 boxes that reach beyond" in notes
    assert "1 boxes of" in notes


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (["x"], "is no shape"),
        ([{"shape_type": "polygon", "points": []}], "label is None"),
        ([{"label": "\x1b[2J", "points": []}], "no class's name"),
        ([{"label": "a", "points": 5}], "where points should be"),
        ([{"label": "a", "points": [[1, 2, 3]]}], "where 2 numbers should be"),
        ([{"label": "a", "points": [[1, None]]}], "no number of pixels"),
        ([{"label": "a", "points": [[1, 1e300]]}], "no number of pixels"),
        ([{"label": "a", "points": [[1, True]]}], "no number of pixels"),
        ([{"label": "a", "shape_type": "circle", "points": [[1, 1]]}], "a circle of 1 points"),
        ([{"label": "a", "shape_type": "banana", "points": [[1, 1]]}], "type 'banana'"),
        ([{"label": "a", "shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "@"}], "no PNG in base64"),
        ([{"label": "a", "shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "AAAA"}], "no PNG that can"),
    ],
)
def test_labelmes_broken_shapes_are_refused_by_file_and_number(shapes: list[Any], said: str, tmp_path: Path) -> None:
    described(tmp_path, shapes)
    with pytest.raises(ResvitError, match=rf"shapes\[0\] of .*a\.json.*{said}") as refused:
        opened(tmp_path)
    assert refused.value.code == ExitCode.INPUT


@pytest.mark.parametrize("size", [{"imageHeight": -1}, {"imageHeight": 1.5}, {"imageWidth": "x"}, {"imageWidth": None}])
def test_a_size_that_is_none(size: dict[str, Any], tmp_path: Path) -> None:
    described(tmp_path, [{"label": "a", "points": [[1, 1], [5, 1], [5, 5]]}], **size)
    with pytest.raises(ResvitError, match=r"a\.json"):
        opened(tmp_path)


BROKEN: dict[str, tuple[str, str, str, str]] = {
    # format, what stands in its files, what instead, and what is said
    "VIA without a shape": ("VIA", '"shape_attributes": {"name": "rect"', '"shape": {"name": "rect"', "no `shape_attr"),
    "VIA of another shape": ("VIA", '"name": "rect"', '"name": "cube"', "shape 'cube', which is not known"),
    "VIA's text": ("VIA", '"width": 7', '"width": "w"', "width is 'w', and no number"),
    "VIA's lists": ("VIA", '"all_points_x": [10.0, ', '"all_points_x": [', "not as many `all_points_x`"),
    "VIA of several": ("VIA", '"cat": false', '"cat": true', "is of several classes: dog, cat"),
    "VIA upwards": ("VIA", '"filename": "000001.png"', '"filename": "../000001.png"', "leads out of the folder"),
    "CreateML without": ("CreateML", '"coordinates": {"x": 5.5', '"coords": {"x": 5.5', "has no `coordinates`"),
    "CreateML below 0": ("CreateML", '"width": 7', '"width": -7', "box of negative size"),
    "CreateML's label": ("CreateML", '"label": "cat"', '"label": ""', "no class's name"),
    "CVAT's number": ("CVAT", 'xtl="2"', 'xtl="two"', "xtl is 'two'"),
    "CVAT's size": ("CVAT", 'height="16"', 'height="0"', "size is '0' by '20'"),
    "CVAT's points": ("CVAT", "10.0,9.0;", "10.0;", "where 2 numbers should be"),
    "CVAT's class": ("CVAT", '<box label="cat"', '<box label="cow"', "1 classes that the list of classes lacks: cow"),
    "CVAT's film": ("CVAT", "<version>", "<track id='0'/><version>", "holds tracks of a film"),
    "CVAT's end": ("CVAT", "</annotations>", "", "is no XML"),
    "CVAT's entities": (
        "CVAT",
        "<annotations>",
        '<!DOCTYPE a [<!ENTITY b "c">]><annotations>',
        "declares entities, which an annotation does not need",
    ),
    "CVAT's depth": ("CVAT", "<version>", "<a>" * 99 + "</a>" * 99 + "<version>", "deeper than any annotation"),
    "KITTI's field": ("KITTI", " 46.70 -1.59", " 46.70", "is no object"),
    "KITTI's scores": ("KITTI", " 46.70 -1.59", " 46.70 -1.59 0.9", "results of a network"),
    "KITTI's order": ("KITTI", "2.0 1.0 9.0 8.0", "9.0 1.0 2.0 8.0", "its right before its left"),
    "Supervisely's size": ("Supervisely", '"size"', '"sizes"', "has no `size`"),
    "Supervisely's kind": ("Supervisely", '"rectangle"', '"cube"', "type 'cube'"),
    "Supervisely's title": ("Supervisely", '"classTitle": "dog"', '"classTitle": "cow"', "lacks: cow"),
    "Label Studio's labels": ("Label Studio", '["cat"]', '["cat", "dog"]', "has 2 labels, not one"),
    "Label Studio's size": ("Label Studio", '"original_height": 16', '"original_height": 0', "size is 0 by 20"),
    "a list's number": ("TensorFlow's list", "cat,2,", "cat,two,", "line 2 of .* is 'two'"),
    "a list's order": ("TensorFlow's list", "cat,2,1,9,8", "cat,9,1,2,8", "line 2 .*its right before its left"),
    "a list's fields": ("TensorFlow's list", "cat,2,1,9,8", "cat,2,1", "line 2 .*has 6 columns"),
    "a list's class": ("TensorFlow's list", "cat,2,1,9,8", ",2,1,9,8", "line 2 .*no class's name"),
    "a list's sizes": ("TensorFlow's list", "20,16,cat", "21,16,cat", "2 different sizes"),
    "Open Images' shares": ("Open Images", "0.1,0.45", "10,45", f"{COUNT} boxes beyond 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    made, before, after, said = BROKEN[name]
    make, kind = FORMATS[made]
    make(tmp_path)
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file() and file.suffix != ".png"]
    file = [file for file in files if before in file.read_text()][-1]
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(ResvitError, match=said) as refused:
        opened(f"{kind}:{tmp_path}")
    assert refused.value.code == ExitCode.INPUT


@pytest.mark.parametrize("name", FORMATS)
def test_pictures_that_are_not_there_are_counted_and_without_any_refused(name: str, tmp_path: Path) -> None:
    make, kind = FORMATS[name]
    make(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    files[-1].unlink()
    pools = opened(tmp_path)
    assert len(pools.calibration) == COUNT - 1
    assert f"{files[-1].stem}" in " ".join(pools.calibration.notes)
    for file in files[:-1]:
        file.unlink()
    with pytest.raises(ResvitError, match=r"\n"):
        opened(f"{kind}:{tmp_path}")


def test_kittis_dont_care_counts_for_nothing_in_any_class(tmp_path: Path) -> None:
    kitti(tmp_path)
    ignored = "DontCare -1 -1 -10 0.0 10.0 5.0 16.0 -1 -1 -1 -1000 -1000 -1000 -10\n"
    text(tmp_path / "training/label_2/000000.txt", KITTI + ignored)
    pools = opened(tmp_path)
    assert pools.calibration.class_names == ("cat", "dog")
    assert boxes_of(pools)[2:] == [("cat", [0, 10, 5, 16], True), ("dog", [0, 10, 5, 16], True)]
    for name in pictures(tmp_path / "testing/image_2", 50):  # as KITTI's own: without labels
        assert name
    assert len(opened(tmp_path).calibration) == COUNT


def test_kitti_as_other_tools_lay_it_out_is_not_taken_for_yolo(tmp_path: Path) -> None:
    for name in pictures(tmp_path / "images"):
        text(tmp_path / "labels" / f"{Path(name).stem}.txt", KITTI)
    assert kind_of_folder(tmp_path) == "kitti"
    assert len(boxes_of(opened(tmp_path))) == 2


def test_via_without_attributes_has_one_class_and_some_without_count_for_nothing(tmp_path: Path) -> None:
    entries = {}
    for name in pictures(tmp_path):
        regions = via_regions()
        for region in regions:
            region["region_attributes"] = {}
        entries[name] = {"filename": name, "regions": {str(at): region for at, region in enumerate(regions)}}
    text(tmp_path / "via.json", entries)
    assert [name for name, _, _ in boxes_of(opened(tmp_path))] == ["object", "object"]
    entries["000000.png"]["regions"]["0"]["region_attributes"] = {"anything": "cat"}
    text(tmp_path / "via.json", entries)
    pools = opened(tmp_path)
    assert [(name, crowd) for name, _, crowd in boxes_of(pools)] == [("cat", False), ("cat", True)]
    assert f"{2 * COUNT - 1} regions of" in " ".join(pools.calibration.notes)
    entries["000000.png"]["regions"]["0"]["region_attributes"] = {"colour": "red", "shape": "round"}
    text(tmp_path / "via.json", entries)
    with pytest.raises(ResvitError, match=r"which attribute of .* is the class: colour, shape"):
        opened(tmp_path)


def test_cvats_masks_ellipses_and_turned_boxes(tmp_path: Path) -> None:
    covered = np.zeros((4, 6), np.bool_)
    covered[0, 0] = covered[1:3, 2:5] = True
    shapes = (
        f'<mask label="cut" rle="{runs_of(covered)}" left="12" top="1" width="6" height="4"/>'
        '<ellipse label="disc" cx="5" cy="5" rx="4" ry="2" rotation="90"/>'
        '<box label="turned" xtl="2" ytl="11" xbr="8" ybr="13" rotation="90"/>'
        '<polyline label="cut" points="1,1;2,2"/>'
    )
    text(tmp_path / "annotations.xml", f"<annotations>{cvat_images(tmp_path, shapes)}</annotations>")
    pools = opened(tmp_path)
    assert boxes_of(pools) == [
        ("cut", [12, 1, 17, 4], False), ("disc", [3, 1, 7, 9], False), ("turned", [4, 9, 6, 15], False)
    ]  # fmt: skip
    assert f"{COUNT} lines, points" in " ".join(pools.calibration.notes)
    mask, names = mask_of(tmp_path)
    assert np.array_equal((mask == names.index("cut"))[1:5, 12:18], covered)
    assert (mask[9:15, 4:6] == names.index("turned")).all()
    shapes = '<mask label="cut" rle="1,2" left="0" top="0" width="6" height="4"/>'
    text(tmp_path / "annotations.xml", f"<annotations>{cvat_images(tmp_path, shapes)}</annotations>")
    with pytest.raises(ResvitError, match=r"its runs cover 3 pixels of 24"):
        opened(tmp_path)


def test_supervisely_has_bitmaps_and_holes(tmp_path: Path) -> None:
    covered = np.zeros((3, 4), np.bool_)
    covered[1:, 1:] = True
    packed = base64.b64encode(zlib.compress(png(covered))).decode()
    objects = [
        {"classTitle": "cut", "geometryType": "bitmap", "bitmap": {"data": packed, "origin": [1, 2]}},
        {"classTitle": "ring", "geometryType": "polygon", "points": {"exterior": POLYGON, "interior": [HOLE]}},
        {"classTitle": "ring", "geometryType": "line", "points": {"exterior": [[1, 1], [2, 2]], "interior": []}},
    ]
    picture(tmp_path / "ds/img/a.png")
    file = {"size": {"height": SIZE[0], "width": SIZE[1]}, "objects": objects}
    text(tmp_path / "ds/ann/a.png.json", file)
    assert boxes_of(opened(tmp_path)) == [("cut", [2, 3, 5, 5], False), ("ring", [10, 9, 18, 15], False)]
    mask, names = mask_of(tmp_path)
    wanted = np.zeros(SIZE, np.int64)
    wanted[3:5, 2:5], wanted[9:15, 10:18] = names.index("cut"), names.index("ring")
    wanted[11:13, 12:16] = 0
    assert np.array_equal(mask, wanted)
    bomb = base64.b64encode(zlib.compress(bytes(65 << 20), 1)).decode()
    objects[0]["bitmap"]["data"] = bomb  # type: ignore[index]
    text(tmp_path / "ds/ann/a.png.json", file)
    with pytest.raises(ResvitError, match="bitmap is no PNG"):
        opened(tmp_path)


def test_label_studio_counts_what_others_said_and_turns_boxes_around_their_corner(tmp_path: Path) -> None:
    (x, y), (width, height) = percent(10, 4), percent(6, 2)
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 90, "rectanglelabels": ["cat"]}
    result = {"type": "rectanglelabels", "from_name": "a", "to_name": "b", "original_height": 16, "original_width": 20}
    brush = {**result, "type": "brushlabels", "value": {"rle": [1], "brushlabels": ["cat"]}}
    first = {"result": [{**result, "value": value}, brush]}
    tasks = [{"data": {"image": f"s3://bucket/{name}"}, "annotations": [first, first]} for name in pictures(tmp_path)]
    text(tmp_path / "export.json", tasks)
    pools = opened(tmp_path)
    assert boxes_of(pools) == [("cat", [8, 4, 10, 10], False)]
    notes = " ".join(pools.calibration.notes)
    assert f"{COUNT} results of" in notes
    assert "neither boxes nor polygons" in notes


def test_open_images_groups_are_crowds_and_its_classes_have_their_names(tmp_path: Path) -> None:
    open_images(tmp_path)
    file = tmp_path / "train-annotations-bbox.csv"
    file.write_text(file.read_text().replace("0.0625,0.5,0,0,0", "0.0625,0.5,0,0,1"))
    assert boxes_of(opened(tmp_path)) == [("cat", [2, 1, 9, 8], True), ("dog", [10, 9, 18, 15], False)]
    (tmp_path / "class-descriptions-boxable.csv").unlink()
    assert opened(tmp_path).calibration.class_names == ("/m/1", "/m/2")


def test_a_line_without_a_box_is_a_picture_that_shows_nothing(tmp_path: Path) -> None:
    names = pictures(tmp_path)
    text(tmp_path / "boxes.csv", f"path,x1,y1,x2,y2,class\n{names[0]},1,1,5,5,cat\n{names[1]},,,,,\n")
    pools = opened(tmp_path)
    assert len(pools.calibration) == 2
    assert boxes_of(pools, 1) == []


def test_a_json_file_deeper_than_any_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    deep = "[" * 100_000
    text(tmp_path / "a.json", f'{{"shapes": [], "imagePath": "a.png", "x": {deep}')
    with pytest.raises(ResvitError, match=r"a\.json"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        *(("TensorFlow's list", name) for name in ("labels.csv", "metadata.csv", "train.csv")),
        *(("VIA's CSV", name) for name in ("labels.csv", "metadata.csv", "train.csv")),
        ("TensorFlow's list", "annotations.csv"),
        ("TensorFlow's list", "gt.csv"),
        ("TensorFlow's list", "boxes.tsv"),
    ],
)
def test_lists_of_boxes_are_no_lists_of_texts_or_classes_whatever_they_are_called(
    made: str, name: str, tmp_path: Path
) -> None:
    make, kind = FORMATS[made]
    make(tmp_path)
    (before,) = tmp_path.glob("*.csv")
    content = before.read_text()
    before.unlink()
    text(tmp_path / name, content.replace(",", "\t") if name.endswith(".tsv") else content)
    assert kind_of_folder(tmp_path) == kind
    assert len(boxes_of(opened(tmp_path))) == 2


def test_kittis_archives_unpacked_beside_each_other(tmp_path: Path) -> None:
    kitti(tmp_path)
    for inner, archive in (("image_2", "data_object_image_2"), ("label_2", "data_object_label_2")):
        (tmp_path / archive / "training").mkdir(parents=True)
        (tmp_path / "training" / inner).rename(tmp_path / archive / "training" / inner)
    (tmp_path / "training").rmdir()
    assert kind_of_folder(tmp_path) == "kitti"
    pools = opened(tmp_path)
    assert len(pools.calibration) == COUNT
    assert len(boxes_of(pools)) == 2


@pytest.mark.parametrize("outlines", [False, True])
def test_the_networks_classes_number_boxes_and_masks(outlines: bool, tmp_path: Path) -> None:
    labelme(tmp_path)
    names = ("background", "dog", "owl", "cat") if outlines else ("dog", "owl", "cat")
    listed = class_list_from_names("the test", dict(enumerate(names)))
    reading = TargetOptions(outlines=outlines)
    spec = DataSpec(str(tmp_path), calibration_images=4, reading=reading, classes=listed)
    images, _ = open_image_sets(spec, Preprocess(SIZE, 3))
    assert images.class_names == names
    batch = next(iter(images.batches(1)))
    assert batch.targets is not None
    target = batch.targets[0]
    if isinstance(target, BoxTarget):
        assert target.classes.tolist() == [2, 0]
    else:
        assert isinstance(target, MaskTarget)
        assert set(np.unique(target.classes).tolist()) == {0, 1, 3}
