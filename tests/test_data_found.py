"""Layouts that other programs write: read where they can be, and else named for what they are; none is misread."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data.naming import kind_of_folder, require_source
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.pixels import BrokenImage
from resvit_calibrate.images.targets import AS_USUAL, BoxTarget, MaskTarget, TargetOptions
from resvit_engines.errors import ResvitError

COUNT = 8
ANNOTATION = (
    "<annotation><size><width>16</width><height>16</height></size><object><name>{name}</name><bndbox><xmin>2</xmin>"
    "<ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(list(str(path).encode())).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def opened(root: Path | str) -> Pools:
    pools = open_source(str(root), AS_USUAL)
    assert isinstance(pools, Pools)
    return pools


def sizes(pools: Pools) -> tuple[int, int | None]:
    return len(pools.calibration), None if pools.validation is None else len(pools.validation)


def annotated(folder: Path, name: str = "cat") -> None:
    for number in range(COUNT):
        picture(folder / f"{number}.jpg")
        text(folder / f"{number}.xml", ANNOTATION.format(name=name))


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        ((".",), (COUNT, None)),
        (("train", "valid"), (COUNT, COUNT)),
        (("cars", "dogs"), (2 * COUNT, None)),
        (("images",), (COUNT, None)),
    ],
)
def test_vocs_xml_files_may_lie_beside_their_pictures(
    folders: tuple[str, ...], parts: tuple[int, int | None], tmp_path: Path
) -> None:
    for number, folder in enumerate(folders):
        annotated(tmp_path / folder, ("cat", "dog")[number])
    assert kind_of_folder(tmp_path) == "voc"
    pools = opened(tmp_path)
    assert sizes(pools) == parts
    assert pools.calibration.task == "detection"
    assert pools.calibration.class_names == ("cat", "dog")[: len(folders)]
    assert not pools.calibration.notes
    target = pools.calibration.target(0, 16, 16)
    assert isinstance(target, BoxTarget)
    assert target.boxes.tolist() == [[1, 0, 9, 9]]


def test_xml_files_of_another_kind_make_no_boxes(tmp_path: Path) -> None:
    for number in range(COUNT):
        picture(tmp_path / f"{number}.jpg")
        text(tmp_path / f"{number}.xml", "<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    assert kind_of_folder(tmp_path) == "folder"


def class_folders(root: Path, classes: Sequence[str] = ("cat", "dog")) -> None:
    for name in classes:
        for number in range(COUNT // 2):
            picture(root / name / f"{number}.png")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("Train", "Val"),
        ("train", "dev"),
        ("training", "evaluation"),
        ("train2017", "val2017"),
    ],
)
def test_parts_are_no_classes_however_they_are_called(first: str, second: str, tmp_path: Path) -> None:
    for part in (first, second, "more"):
        class_folders(tmp_path / part)
    pools = opened(tmp_path)
    assert pools.calibration.class_names == ("cat", "dog")
    assert sizes(pools) == (COUNT, COUNT)
    assert f"{first} and {second} are used, more not" in " ".join(pools.calibration.notes)


@pytest.mark.parametrize("names", [("fold1", "fold2", "fold3"), ("split_0", "split_1"), ("Part 1", "Part 2")])
def test_folds_are_no_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        class_folders(tmp_path / name)
    with pytest.raises(ResvitError, match=r"these are folds and no classes.\n.*--validation-data"):
        opened(tmp_path)
    assert opened(f"folder:{tmp_path}").calibration.class_names == names


def test_the_same_folders_in_every_class_are_said(tmp_path: Path) -> None:
    for name in ("north", "south"):
        class_folders(tmp_path / name)
    assert "each has the folders cat, dog: if these are the classes" in opened(tmp_path).calibration.notes[0]


@pytest.mark.parametrize(("first", "second"), [("train2017", "val2017"), ("Train", "Val"), ("TRAIN", "TEST")])
def test_parts_of_boxes_are_parts_however_they_are_called(first: str, second: str, tmp_path: Path) -> None:
    for part in (first, second):
        for number in range(COUNT):
            picture(tmp_path / "images" / part / f"{number}.jpg")
            text(tmp_path / "labels" / part / f"{number}.txt", "0 0.5 0.5 0.5 0.5\n")
    assert sizes(opened(tmp_path)) == (COUNT, COUNT)


def coco(names: Sequence[str]) -> str:
    images = [{"id": number, "file_name": name, "width": 16, "height": 16} for number, name in enumerate(names)]
    boxes = [{"id": at, "image_id": at, "category_id": 1, "bbox": [1, 1, 8, 8]} for at in range(len(names))]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]})


@pytest.mark.parametrize(
    ("file", "pictures"),
    [
        ("annotations/{}.json", "{}"),
        ("{}.json", "images"),
        ("annotations/person_keypoints_{}2017.json", "{}2017"),
        ("annotations/shop_{}.json", "images/{}"),
        ("{}/annotations.coco.json", "{}/images"),
        ("{}/labels.json", "{}/data"),
    ],
)
def test_cocos_files_are_found_whatever_they_are_called(file: str, pictures: str, tmp_path: Path) -> None:
    for part in ("train", "val"):
        names = [f"{part}{number}.jpg" for number in range(COUNT)]
        for name in names:
            picture(tmp_path / pictures.format(part) / name)
        listed = [f"data/{name}" for name in names] if pictures.endswith("data") else names
        text(tmp_path / file.format(part), coco(listed))
    text(tmp_path / "annotations" / "captions_val.json", json.dumps({"images": [], "annotations": []}))
    assert kind_of_folder(tmp_path) == "coco"
    assert sizes(opened(tmp_path)) == (COUNT, COUNT)


FOREIGN = {
    "BDD100K": ("images", "labels/det.json", json.dumps([{"name": "0", "labels": [{"box2d": {}}]}]), "BDD100K"),
    "results": (".", "r.json", json.dumps([{"image_id": 1, "category_id": 1, "score": 0.5}]), "results of a network"),
    "DOTA": ("images", "labelTxt/0.txt", "imagesource:G\ngsd:0.1\n1 1 9 1 9 9 1 9 ship 0\n", "DOTA's labels"),
    "imagefolder": (
        "train",
        "train/metadata.jsonl",
        json.dumps({"file_name": "0.jpg", "objects": {"bbox": [[1, 1, 8, 8]], "categories": [0]}}),
        "Hugging Face's metadata with boxes",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_formats_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    folder, file, content, said = FOREIGN[name]
    for number in range(COUNT):
        picture(tmp_path / folder / f"{number}.jpg")
    text(tmp_path / file, content)
    with pytest.raises(ResvitError, match=rf"holds {said}|holds .*{said}") as refused:
        kind_of_folder(tmp_path)
    assert f"folder:{tmp_path}" in str(refused.value)
    assert len(opened(f"folder:{tmp_path}").calibration) == COUNT


@pytest.mark.parametrize(
    "rows", ["image_id,bbox\n0,[1]\n1,[1]\n", "ImageID,XMin,XMax,YMin,YMax\n0,0,1,0,1\n1,0,1,0,1\n"]
)
def test_a_list_of_boxes_is_named_also_where_it_names_no_endings(rows: str, tmp_path: Path) -> None:
    for number in range(COUNT):
        picture(tmp_path / "train" / f"{number}.jpg")
    text(tmp_path / "train.csv", rows)
    with pytest.raises(ResvitError, match="is a list of boxes"):
        kind_of_folder(tmp_path)


@pytest.mark.parametrize("above", ["photos", "data/data", "train"])
def test_a_folder_above_the_data_is_named(above: str, tmp_path: Path) -> None:
    class_folders(tmp_path / above)
    with pytest.raises(ResvitError, match=f"holds only `{above}`, with the folders cat, dog.\n.*Name that folder"):
        kind_of_folder(tmp_path)
    assert opened(tmp_path / above).calibration.class_names == ("cat", "dog")


def mask(path: Path, kind: str = "numbers") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(list(path.stem.encode())).integers(0, 2 if kind == "binary" else 3, (16, 16))
    shown = {
        "numbers": values.astype(np.uint8),
        "binary": (values * 255).astype(np.uint8),
        "colours": np.array([[0, 0, 0], [128, 64, 128], [0, 128, 0]], np.uint8)[values],
    }
    Image.fromarray(shown[kind]).save(path)


MASKED = {
    "CamVid": ("{}/{}.png", "{}annot/{}.png", True),
    "images and labels of each part": ("{}_images/{}.jpg", "{}_labels/{}.png", True),
    "Carvana": ("{}/{}.jpg", "{}_masks/{}_mask.gif", True),
    "ISIC": ("Task1-2_{}_Input/ISIC_{}.jpg", "Task1_{}_GroundTruth/ISIC_{}_segmentation.png", True),
    "DeepGlobe": ("{}/{}_sat.jpg", "{}/{}_mask.png", True),
    "beside": ("{}{}.jpg", "{}{}_label.png", False),
    "beside of one ending": ("{}{}.png", "{}{}_Mask.png", False),
    "by their starts": ("img_{}{}.png", "mask_{}{}.png", False),
    "a single part": ("train/{}{}_sat.jpg", "train/{}{}_mask.png", False),
    "MMSegmentation": ("img_dir/{}/{}.jpg", "ann_dir/{}/{}.png", True),
    "LoveDA's folders": ("images_png/{}{}.png", "masks_png/{}{}.png", False),
}


@pytest.mark.parametrize("kind", ["numbers", "binary"])
@pytest.mark.parametrize("name", MASKED)
def test_masks_are_found_by_their_names(name: str, kind: str, tmp_path: Path) -> None:
    first, second, divided = MASKED[name]
    for part in ("train", "val"):
        for number in range(COUNT):
            picture(tmp_path / first.format(part, number))
            mask(tmp_path / second.format(part, number), kind)
    assert kind_of_folder(tmp_path) == "masks"
    pools = opened(tmp_path)
    assert sizes(pools) == ((COUNT, COUNT) if divided else (2 * COUNT, None))
    assert pools.calibration.task == "segmentation"
    assert not any("left out" in note for note in pools.calibration.notes)
    shown = [pools.calibration.target(number, 16, 16) for number in range(COUNT)]
    found = {int(value) for target in shown if isinstance(target, MaskTarget) for value in np.unique(target.classes)}
    assert found == ({0, 1} if kind == "binary" else {0, 1, 2})


def loveda(root: Path, parts: Sequence[str] = ("Train", "Val")) -> None:
    for part in parts:
        for place in ("Urban", "Rural"):
            for number in range(COUNT):
                name = f"{number + 100 * (place == 'Rural')}.png"
                picture(root / part / place / "images_png" / name)
                values = np.random.default_rng(number).integers(0, 8, (16, 16)).astype(np.uint8)
                (root / part / place / "masks_png").mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / part / place / "masks_png" / name)


@pytest.mark.parametrize(
    ("within", "parts", "expected"),
    [
        (".", ("Train", "Val"), (2 * COUNT, 2 * COUNT)),
        (".", ("Train",), (2 * COUNT, None)),
        ("Train", ("Train",), (2 * COUNT, None)),
        ("Train/Rural", ("Train",), (COUNT, None)),
    ],
)
def test_loveda_is_read_from_its_root_on_down(
    within: str, parts: tuple[str, ...], expected: tuple[int, int | None], tmp_path: Path
) -> None:
    loveda(tmp_path, parts)
    for number in range(COUNT):  # as it is published: without masks
        picture(tmp_path / "Test" / "Urban" / "images_png" / f"{number}.png")
    pools = opened(tmp_path / within)
    assert kind_of_folder(tmp_path / within) == "masks"
    assert sizes(pools) == expected
    pool = pools.calibration
    assert pool.class_names[0] == "background"
    assert pool.class_names[6] == "agricultural"
    assert "0, no data, is unlabelled" in " ".join(pool.notes)
    for index in range(len(pool)):
        target = pool.target(index, 16, 16)
        stored = np.random.default_rng(int(Path(pool.title(index)).stem) % 100).integers(0, 8, (16, 16))
        assert isinstance(target, MaskTarget)
        assert np.array_equal(target.classes, stored - 1)  # 0 is -1, unlabelled


def test_loveda_keeps_its_values_where_all_eight_are_classes(tmp_path: Path) -> None:
    loveda(tmp_path, ("Train",))
    pools = open_source(str(tmp_path), TargetOptions(classes=8, ignore=(0,)))
    assert isinstance(pools, Pools)
    target = pools.calibration.target(0, 16, 16)
    assert isinstance(target, MaskTarget)
    assert set(np.unique(target.classes).tolist()) == {-1, 1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("name", ["CamVid", "DeepGlobe", "beside"])
def test_masks_in_colours_need_a_table(name: str, tmp_path: Path) -> None:
    first, second, _ = MASKED[name]
    for number in range(COUNT):
        picture(tmp_path / first.format("train", number))
        mask(tmp_path / second.format("train", number), "colours")
    with pytest.raises(ResvitError, match=r"masks in colours .*no table says which class"):
        kind_of_folder(tmp_path)
    text(tmp_path / "class_dict.csv", "name,r,g,b\nsky,0,0,0\nroad,128,64,128\ntree,0,128,0\n")
    assert opened(tmp_path).calibration.class_names == ("sky", "road", "tree")


@pytest.mark.parametrize(
    ("first", "second"),
    [("images/{}.jpg", "masks/{}.jpg"), ("{}.png", "{}_mask.jpg"), ("train/{}.png", "trainannot/{}.jpg")],
)
def test_masks_as_jpeg_are_named_with_how_to_make_png_of_them(first: str, second: str, tmp_path: Path) -> None:
    for number in range(COUNT):
        picture(tmp_path / first.format(number))
        mask(tmp_path / second.format(number), "binary")
    with pytest.raises(ResvitError, match=r"JPEG.*\n.*-format png"):
        kind_of_folder(tmp_path)


def test_masks_in_what_could_be_classes_are_read_where_the_user_says_so(tmp_path: Path) -> None:
    for name in ("benign", "malignant"):
        for number in range(COUNT):
            picture(tmp_path / name / f"{number}.png")
            mask(tmp_path / name / f"{number}_mask.png", "binary")
    with pytest.raises(ResvitError, match=r"lies beside(.|\n)*masks:"):
        opened(tmp_path)
    assert len(opened(f"masks:{tmp_path}").calibration) == 2 * COUNT


def test_pictures_that_are_called_like_masks_are_not_taken_for_such(tmp_path: Path) -> None:
    for number in range(COUNT):
        picture(tmp_path / f"{number}.png")
        picture(tmp_path / f"{number}_mask.png")
    with pytest.raises(ResvitError, match="called like a mask of a picture"):
        kind_of_folder(tmp_path)


def test_a_mask_of_two_classes_with_another_value_is_unusable(tmp_path: Path) -> None:
    for number in range(100):
        picture(tmp_path / "images" / f"{number:03}.png")
        mask(tmp_path / "masks" / f"{number:03}.png", "binary")
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(tmp_path / "masks" / "001.png")
    pool = opened(tmp_path).calibration
    with pytest.raises(BrokenImage, match="holds the value 7"):
        pool.target(1, 16, 16)


@pytest.mark.parametrize("junk", ["__MACOSX", "@eaDir", "$RECYCLE.BIN", ".ipynb_checkpoints"])
def test_what_other_programs_leave_is_no_class(junk: str, tmp_path: Path) -> None:
    class_folders(tmp_path)
    picture(tmp_path / junk / "cat" / "0.png")
    picture(tmp_path / "cat" / junk / "0.png")
    pool = opened(tmp_path).calibration
    assert pool.class_names == ("cat", "dog")
    assert len(pool) == COUNT
    assert f"left out: {junk}" in " ".join(pool.notes)


def listed(
    root: Path, line: str, head: str = "file,label\n", encoding: str = "utf-8", name: str = "labels.csv"
) -> Path:
    rows = [line.format(number=number, word=("cat", "dög")[number % 2], root=root) for number in range(COUNT)]
    for number in range(COUNT):
        picture(root / "pics" / f"{number}.jpg")
    return text(root / name, (head + "".join(f"{row}\n" for row in rows)).encode(encoding))


def test_absolute_paths_into_the_folder_are_read(tmp_path: Path) -> None:
    path = listed(tmp_path, "{root}/pics/{number}.jpg,{word}")
    for data in (tmp_path, path):
        assert opened(data).calibration.class_names == ("cat", "dög")
    names = [f"{tmp_path}/pics/{number}.jpg" for number in range(COUNT)]
    path.unlink()
    text(tmp_path / "annotations.json", coco(names))
    assert len(opened(tmp_path).calibration) == COUNT
    text(tmp_path / "annotations.json", coco([*names[1:], f"{tmp_path}/../pics/0.jpg"]))
    with pytest.raises(ResvitError, match="leads out of the folder"):
        opened(tmp_path)


@pytest.mark.parametrize("line", ["/content/drive/pics/{number}.jpg,{word}", "C:\\me\\pics\\{number}.jpg,{word}"])
def test_paths_of_another_machine_are_refused_with_the_folder_too(line: str, tmp_path: Path) -> None:
    listed(tmp_path, line)
    with pytest.raises(ResvitError, match="leads out of the folder of images"):
        kind_of_folder(tmp_path)


@pytest.mark.parametrize(("encoding", "said"), [("latin-1", "is not UTF-8"), ("utf-16", "is UTF-16")])
def test_a_list_in_another_encoding_is_refused_with_the_folder_too(encoding: str, said: str, tmp_path: Path) -> None:
    listed(tmp_path, "{number}.jpg,{word}", encoding=encoding)
    with pytest.raises(ResvitError, match=said):
        kind_of_folder(tmp_path)
    text(tmp_path / "labels.csv", "Beschreibung;Größe\nnichts;1\n".encode(encoding))
    assert kind_of_folder(tmp_path) == "folder"


@pytest.mark.parametrize(
    ("line", "head"),
    [("{number} {number}.jpg", ""), ("{number},{number}.jpg", ",path\n"), ("{number}.jpg,{number}", "")],
)
def test_numbers_of_pictures_are_no_classes(line: str, head: str, tmp_path: Path) -> None:
    path = listed(tmp_path, line, head, name="images.txt")
    with pytest.raises(ResvitError, match="these are numbers of pictures and no classes"):
        kind_of_folder(tmp_path)
    assert opened(f"csv:{path}").calibration.task == "classification"


@pytest.mark.parametrize("several", ["cat dög", "cat|dög", '"cat, dög"', "dög;cat", "cat|owl"])
def test_lines_with_several_classes_are_refused(several: str, tmp_path: Path) -> None:
    path = listed(tmp_path, "{number}.jpg,{word}")
    text(path, path.read_text().replace("7.jpg,dög", f"7.jpg,{several}"))
    with pytest.raises(ResvitError, match=r"Line 9 of .* has several classes"):
        opened(tmp_path)


def test_names_of_classes_may_begin_with_those_of_others(tmp_path: Path) -> None:
    path = listed(tmp_path, "{number}.jpg,{word}")
    text(path, path.read_text().replace("7.jpg,dög", '7.jpg,"cat, wild"'))
    pool = opened(f"csv:{path}").calibration
    assert pool.class_names == ("cat", "cat, wild", "dög")
    assert "'cat' and 'cat, wild': they are read as two classes" in " ".join(pool.notes)


def yolo(root: Path, line: str = "0 0.5 0.5 0.5 0.5") -> None:
    for part in ("train", "val"):
        for number in range(COUNT):
            picture(root / "images" / part / f"{number}.jpg")
            text(root / "labels" / part / f"{number}.txt", f"{line}\n")


@pytest.mark.parametrize("name", ["coco8.yaml", "my-data.yml", "data.yaml"])
def test_yolos_yaml_is_found_in_its_folder_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    yolo(tmp_path)
    text(tmp_path / "hyp.yaml", "lr0: 0.01\nnames: 3\n")
    text(tmp_path / name, "path: /content/coco8\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n")
    pools = opened(tmp_path)
    assert pools.calibration.class_names == ("cat", "dog")
    assert sizes(pools) == (COUNT, COUNT)
    text(tmp_path / "other.yaml", "train: images/val\nval: images/val\nnames: [a]\n")
    if name != "data.yaml":
        with pytest.raises(ResvitError, match=r"several files as YOLO's data\.yaml"):
            opened(tmp_path)


def test_the_number_of_classes_counts_without_their_names(tmp_path: Path) -> None:
    yolo(tmp_path)
    text(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnc: 80\n")
    pools = opened(tmp_path)
    assert pools.calibration.num_classes == 80
    assert pools.validation is not None
    assert pools.validation.num_classes == 80
    text(tmp_path / "labels" / "train" / "0.txt", "80 0.5 0.5 0.5 0.5\n")
    with pytest.raises(ResvitError, match="class 80, and there are 80 classes"):
        opened(tmp_path)


@pytest.mark.parametrize("line", ["1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5", "1 0.1 0.1 0.5 0.1 0.5 0.5"])
def test_turned_boxes_and_outlines_are_said(line: str, tmp_path: Path) -> None:
    yolo(tmp_path, line)
    pools = opened(tmp_path)
    assert "8 objects of" in pools.calibration.notes[0]
    assert "the upright boxes around them are read" in pools.calibration.notes[0]


def test_cocos_boxes_that_are_null_are_those_around_their_outlines(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(6)]
    for name in names:
        picture(tmp_path / "images" / name)
    document = json.loads(coco(names))
    runs = {"size": [16, 16], "counts": [17, 8, 8, 8, 215]}
    for entry, (box, outline) in zip(
        document["annotations"],
        [
            (None, [[2, 1, "9.5", 1, 9, 8]]),
            ([], runs),
            (None, None),
            (None, []),
            (None, {"size": [16, 16], "counts": "abc"}),
            ([1, 1, 8, 8], None),
        ],
        strict=True,
    ):
        entry["bbox"], entry["segmentation"] = box, outline
    del document["annotations"][0]["bbox"]
    text(tmp_path / "annotations.json", json.dumps(document))
    pool = opened(tmp_path).calibration
    boxes = [target.boxes.tolist() for i in range(6) if isinstance(target := pool.target(i, 16, 16), BoxTarget)]
    assert boxes == [[[2, 1, 9.5, 8]], [[1, 1, 3, 9]], [], [], [], [[1, 1, 9, 9]]]
    assert "2 annotations without a box, which have those around their outlines" in pool.notes[0]
    assert "3 annotations without a box and an outline" in pool.notes[1]


@pytest.mark.parametrize(
    ("behind", "part"), [("train[:8]", "train"), ("train[:50%]+test", "train"), ("train+test", "train")]
)
def test_slices_and_sums_of_hugging_faces_parts_are_named(behind: str, part: str) -> None:
    with pytest.raises(ResvitError, match=rf"asks for a slice or a sum of parts(.|\n)*hf-dataset:mnist:{part}`"):
        require_source(f"hf-dataset:mnist:{behind}")


@pytest.mark.parametrize("data", ["hf-dataset:", "video:", "torchvision:", "coco: ", "csv:"])
def test_a_prefix_with_nothing_behind_is_refused(data: str) -> None:
    with pytest.raises(ResvitError, match="names nothing"):
        require_source(data)


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.5, 1.0]])
def test_classes_may_be_kept_as_numbers_with_a_point(values: list[float], tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pictures = [picture(tmp_path / "x.png").read_bytes() for _ in range(COUNT)]
    (tmp_path / "x.png").unlink()
    table = pa.table({"image": pictures, "label": [values[number % 2] for number in range(COUNT)]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    pool = opened(tmp_path).calibration
    if values[0] == 0:
        assert pool.labels is not None
        assert pool.labels.tolist() == [0, 1] * (COUNT // 2)
    else:
        assert pool.labels is None
        assert "holds 0.5, which is no class" in " ".join(pool.notes)


def test_films_in_folders_below_are_said(tmp_path: Path) -> None:
    text(tmp_path / "monday" / "a.avi", b"RIFF\0\0\0\0AVI LIST" + bytes(64))
    with pytest.raises(ResvitError, match=r"holds films in folders below \(monday\)"):
        kind_of_folder(tmp_path)


def test_pictures_that_pillow_reads_are_taken_and_raw_files_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path)
    image = Image.open(tmp_path / "cat" / "0.png")
    for name in ("a.pcx", "a.ico", "a.dds", "b.bmp"):
        image.save(tmp_path / "cat" / name)
    (tmp_path / "cat" / "b.bmp").rename(tmp_path / "cat" / "b")
    text(tmp_path / "cat" / "c.txt", b"BMW is no bitmap, though it begins as one")
    text(tmp_path / "dog" / "a.dng", b"II*\0" + bytes(50))
    pool = opened(tmp_path).calibration
    assert len(pool) == COUNT + 4
    assert all(pool.read(number).shape[:2] == (16, 16) for number in range(len(pool)))
    assert "2 (1 .dng, 1 .txt); .dng are raw files of cameras" in pool.notes[0]


def packed(path: Path, root: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.add(file, str(file.relative_to(root)))


def test_a_tar_file_of_class_folders_has_their_classes(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos" / "all")
    packed(tmp_path / "photos.tar", tmp_path / "photos")
    pool = opened(tmp_path / "photos.tar").calibration
    assert pool.class_names == ("cat", "dog")
    assert "cat, dog are read as classes" in " ".join(pool.notes)
    class_folders(tmp_path / "parts" / "train")
    class_folders(tmp_path / "parts" / "val")
    packed(tmp_path / "parts.tar", tmp_path / "parts")
    assert opened(tmp_path / "parts.tar").calibration.labels is None


def test_shards_may_be_named_by_a_star(tmp_path: Path) -> None:
    for part in ("train-0", "train-1", "val-0"):
        class_folders(tmp_path / part)
        packed(tmp_path / f"{part}.tar", tmp_path / part)
    data = f"{tmp_path}/train-*.tar"
    require_source(data)
    assert len(opened(data).calibration) == 2 * COUNT
    with pytest.raises(ResvitError, match="does not exist"):
        require_source(f"{tmp_path}/none-*.tar")


def test_tiny_imagenets_validation_part_has_the_classes_of_its_list(tmp_path: Path) -> None:
    lines = ""
    for number in range(COUNT):
        synset = f"n0000000{number % 2}"
        picture(tmp_path / "train" / synset / "images" / f"{number}.JPEG")
        picture(tmp_path / "val" / "images" / f"val_{number}.JPEG")
        lines += f"val_{number}.JPEG\t{synset}\t0\t32\t44\t62\n"
    text(tmp_path / "val" / "val_annotations.txt", lines)
    pools = opened(tmp_path)
    assert pools.validation is not None
    assert pools.validation.labels is not None
    assert pools.validation.labels.tolist() == [0, 1] * (COUNT // 2)
    assert pools.validation.class_names == pools.calibration.class_names == ("n00000000", "n00000001")
    text(tmp_path / "val" / "val_annotations.txt", "../val_0.JPEG\tn00000000\n")
    with pytest.raises(ResvitError, match="leads out of the folder"):
        opened(tmp_path)
