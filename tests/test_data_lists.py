"""A class for each picture by a list, in every form that people have them in, and no list taken for another."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.naming import kind_of_folder
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL
from resvit_engines.errors import ExitCode, ResvitError

NAMES = ("cat", "dog", "owl")
CLASSES = {f"{number}.png": number % 3 for number in range(12)}
Writer = Callable[[Path, dict[str, int]], None]


def pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng([number, *name.encode()]).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(values).save(path, "PNG")


def table(path: Path, rows: list[list[object]], separator: str = ",") -> None:
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows(rows)
    path.write_text(out.getvalue(), encoding="utf-8")


def caffe(folder: Path, rows: dict[str, int]) -> None:
    (folder / "val.txt").write_text("".join(f"{name} {number}\n" for name, number in rows.items()))


def numbers(folder: Path, rows: dict[str, int]) -> None:
    table(folder / "labels.csv", [[name, number] for name, number in rows.items()])


def names(folder: Path, rows: dict[str, int]) -> None:
    table(folder / "labels.csv", [["filename", "label"], *([name, NAMES[number]] for name, number in rows.items())])


def tabbed(folder: Path, rows: dict[str, int]) -> None:
    table(folder / "list.tsv", [[name, NAMES[number]] for name, number in rows.items()], "\t")


def semicolons(folder: Path, rows: dict[str, int]) -> None:
    head = ["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"]
    table(folder / "GT.csv", [head, *([name, 8, 8, 1, 1, 7, 7, number] for name, number in rows.items())], ";")


def kaggle(folder: Path, rows: dict[str, int]) -> None:
    table(folder / "train.csv", [["id", "breed"], *([Path(n).stem, NAMES[number]] for n, number in rows.items())])


def shares(folder: Path, rows: dict[str, int]) -> None:
    body = [[Path(name).stem, *(float(number == place) for place in range(3))] for name, number in rows.items()]
    table(folder / "GroundTruth.csv", [["image", *NAMES], *body])


def both(folder: Path, rows: dict[str, int]) -> None:
    body = [[number, name, NAMES[number], "x"] for name, number in rows.items()]
    table(folder / "all.csv", [["class_id", "path", "class_name", "remark"], *body])


def by_line(folder: Path, rows: dict[str, int]) -> None:
    lines = [json.dumps({"file_name": name, "label": number, "size": [8, 8]}) for name, number in rows.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def swapped(folder: Path, rows: dict[str, int]) -> None:
    table(folder / "x.csv", [[NAMES[number], name] for name, number in rows.items()])


WRITERS: tuple[Writer, ...] = (caffe, numbers, names, tabbed, semicolons, kaggle, shares, both, by_line, swapped)


def opened(data: object) -> Pools:
    pools = open_source(str(data), AS_USUAL)
    assert isinstance(pools, Pools)
    return pools


def classes_of(pixels) -> dict[str, int]:
    assert pixels.task == "classification"
    return {Path(name).name: int(number) for name, number in zip(pixels.files, pixels.labels, strict=True)}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("where", ["", "images", "train", "pics/deeper"])
def test_every_form_is_recognised_and_read(write: Writer, where: str, tmp_path: Path) -> None:
    rows = {f"deeper/{name}": number for name, number in CLASSES.items()} if "deeper" in where else CLASSES
    pictures(tmp_path / where.removesuffix("/deeper"), list(rows))
    if write in (kaggle, shares) and "deeper" in where:
        rows = CLASSES
        (tmp_path / "pics").rename(tmp_path / "x")
        (tmp_path / "x" / "deeper").rename(tmp_path / "train")
    write(tmp_path, rows)
    assert kind_of_folder(tmp_path) == "csv"
    file = next(path for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".png")
    for data in (tmp_path, file, f"csv:{tmp_path}", f"csv:{file}"):
        pixels = opened(data).calibration
        assert classes_of(pixels) == CLASSES
        assert pixels.class_names == (() if write in (caffe, numbers, semicolons, by_line) else NAMES)
    calibration, validation = open_image_sets(DataSpec(str(tmp_path), calibration_images=3), Preprocess((8, 8), 3))
    assert (len(calibration), len(validation)) == (3, 9)


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)


@given(st.lists(WORD.filter(lambda word: not word.isdecimal()), min_size=2, max_size=4, unique=True), st.booleans())
@example(called=["FILE", ":"], headed=False)
@example(called=["label", "class"], headed=False)
@example(called=["xmin", "region_shape_attributes"], headed=False)
@example(called=["path", "label"], headed=True)
@settings(max_examples=30)
def test_whatever_classes_are_called(tmp_path_factory: pytest.TempPathFactory, called: list[str], headed: bool) -> None:
    folder = tmp_path_factory.mktemp("called")
    pictures(folder, list(CLASSES))
    rows: list[list[object]] = [[name, called[number % len(called)]] for name, number in CLASSES.items()]
    table(folder / "labels.csv", [["file", "class"], *rows] if headed else rows)
    pixels = opened(f"csv:{folder}/labels.csv").calibration
    assert [pixels.class_names[number] for number in pixels.labels] == [row[1] for row in rows]  # type: ignore[index]
    assert list(pixels.class_names) == sorted({str(row[1]) for row in rows})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.png,cat\n1.png,dog\n0.png,dog\n", "Lines 1 and 3 of .* contradict each other: 0.png is cat and dog"),
        (
            "file,label\n0.png,1\n1.png,dog\n",
            "Line 3 of .* another thing than a number: 'dog', and line 2 by number: 1",
        ),
        ("file,label\n0.png,-1\n1.png,1\n", "Line 2 of .* another thing than a number: '-1'"),
        ("path,class_id,class_name\n0.png,1,cat\n1.png,1,dog\n", "Lines 2 and 3 of .* contradict each other: class 1"),
        ("0.png,cat\n1.png\n", "Line 2 of .* has 1 columns"),
        ("0.png,cat\n1.png,\n", "Line 2 of .* gives no class"),
        ("../0.png,cat\n", "leads out of the folder"),
        ("/etc/0.png,cat\n", "leads out of the folder"),
        ("x.png,cat\ny.png,dog\n", "No file of 2 that .* lists is in"),
        ("filename,width,height,class,xmin,ymin,xmax,ymax\n0.png,8,8,cat,1,1,2,2\n", "is a list of boxes"),
        ("file,cat,dog\n0.png,1,1\n1.png,1,0\n", "Line 2 of .* has 2 classes: cat, dog"),
        ("0.png 1 2\n1.png 1 3\n", "Line 1 of .* has several classes: 1 2"),
        ("0.png,1,2\n", "has 3 columns .* and nothing says what each is"),
        ("file,age,kind\n0.png,50,cat\n", "Nothing says which column .* is the class: file, age, kind"),
        ("file,text\n0.png,hello\n", "a text, and no class"),
        ("0.png\n1.png\n", "pictures alone, and no class"),
        ("", "lists no picture"),
    ],
)
def test_lists_that_cannot_be_read(text: str, said: str, tmp_path: Path) -> None:
    pictures(tmp_path, list(CLASSES))
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ResvitError, match=said) as caught:
        opened(f"csv:{tmp_path / 'labels.csv'}")
    assert caught.value.code is ExitCode.INPUT


def test_what_a_list_lacks_and_repeats_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path, list(CLASSES))
    rows = "".join(f"{name},{number + 1}\n" for name, number in CLASSES.items())
    (tmp_path / "labels.csv").write_text(f"{rows}0.png,1\nzz.png,2\n")
    pixels = opened(tmp_path).calibration
    said = " / ".join(pixels.notes)
    assert "1 files that" in said
    assert "zz.png" in said
    assert "1 lines of" in said
    assert "start at 1" in said


@pytest.mark.parametrize("write", [caffe, numbers, by_line])
def test_names_beside_numbers(write: Writer, tmp_path: Path) -> None:
    pictures(tmp_path / "images", list(CLASSES))
    write(tmp_path, CLASSES)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    assert opened(tmp_path).calibration.class_names == NAMES
    (tmp_path / "classes.txt").write_text("cat\ndog")
    pixels = opened(tmp_path).calibration
    assert pixels.class_names == ()
    assert any("lacks the class number 2" in note for note in pixels.notes)


def test_a_stem_of_two_files_is_asked_about(tmp_path: Path) -> None:
    pictures(tmp_path, [*CLASSES, "3.jpg"])
    kaggle(tmp_path, CLASSES)
    with pytest.raises(ResvitError, match=r"3 could be 3\.\w+ or 3\.\w+"):
        opened(tmp_path)


@pytest.mark.parametrize("write", [caffe, names, kaggle])
@pytest.mark.parametrize("how", ["lists", "folders", "column"])
def test_training_and_validation(how: str, write: Writer, tmp_path: Path) -> None:
    other = {f"v{name}": number for name, number in CLASSES.items()}
    if how == "folders":
        for part, rows in (("train", CLASSES), ("val", other)):
            pictures(tmp_path / part, list(rows))
            write(tmp_path / part, rows)
    elif how == "lists":
        for part, rows in (("train", CLASSES), ("val", other)):
            pictures(tmp_path / part, list(rows))
            write(tmp_path, rows)
            written = next(path for path in tmp_path.iterdir() if path.is_file() and not path.stem.startswith("my"))
            written.rename(tmp_path / f"my_{part}{written.suffix}")
    else:
        pictures(tmp_path, [*CLASSES, *other])
        body = [[name, n, "Train"] for name, n in CLASSES.items()] + [[name, n, "valid"] for name, n in other.items()]
        table(tmp_path / "all.csv", [["file", "label", "split"], *body])
    pools = opened(tmp_path)
    assert classes_of(pools.calibration) == CLASSES
    assert classes_of(pools.validation) == other


def test_a_list_of_what_folders_say_and_one_that_contradicts_them(tmp_path: Path) -> None:
    rows = {f"{NAMES[number]}/{name}": number for name, number in CLASSES.items()}
    pictures(tmp_path, list(rows))
    for write in (names, numbers):
        write(tmp_path, rows)
        assert kind_of_folder(tmp_path) == "folder"
    names(tmp_path, {**rows, "cat/0.png": 2})
    with pytest.raises(ResvitError, match=r"calls cat/0\.png 'owl', and it lies in the folder 'cat': 1 of 12"):
        opened(tmp_path)
    assert classes_of(opened(f"csv:{tmp_path}").calibration)["0.png"] == 2
    assert classes_of(opened(f"folder:{tmp_path}").calibration)["0.png"] == 0


def test_class_to_idx_beside_class_folders_numbers_them(tmp_path: Path) -> None:
    pictures(tmp_path, [f"{NAMES[number]}/{name}" for name, number in CLASSES.items()])
    (tmp_path / "class_to_idx.json").write_text(json.dumps({"owl": 0, "cat": 1, "dog": 2}))
    pixels = opened(tmp_path).calibration
    assert classes_of(pixels) == {name: (number + 1) % 3 for name, number in CLASSES.items()}
    assert pixels.class_names == ("owl", "cat", "dog")
    assert any("class_to_idx.json says" in note for note in pixels.notes)
    (tmp_path / "class_to_idx.json").write_text(json.dumps({"owl": 0, "cat": 1}))
    pixels = opened(tmp_path).calibration
    assert pixels.class_names == NAMES
    assert any("lacks the class dog" in note for note in pixels.notes)


SYNSETS = ("n01440764", "n01443537", "n01484850")


@pytest.mark.parametrize("how", ["in order", "solution", "caffe"])
@pytest.mark.parametrize("train", [True, False])
def test_imagenets_flat_validation_folder(how: str, train: bool, tmp_path: Path) -> None:
    rows = {f"ILSVRC2012_val_{number + 1:08}.JPEG": number % 3 for number in range(12)}
    pictures(tmp_path / "val", list(rows))
    synsets = [SYNSETS[number] for number in rows.values()]
    if train:
        pictures(tmp_path / "train", [f"{synset}/{synset}_{number}.JPEG" for synset in SYNSETS for number in range(3)])
    if how == "in order":
        (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(synsets) + "\n")
    elif how == "solution":
        body = [[Path(n).stem, f"{s} 1 2 3 4 {s} 5 6 7 8 "] for n, s in zip(rows, synsets, strict=True)]
        table(tmp_path / "LOC_val_solution.csv", [["ImageId", "PredictionString"], *body])
    else:
        caffe(tmp_path, rows)
    listed = "".join(f"{name} tench, Tinca tinca\n" for name in (*SYNSETS, "n01491361"))
    (tmp_path / "LOC_synset_mapping.txt").write_text(listed)
    pools = opened(tmp_path)
    validation = pools.validation if train else pools.calibration
    assert (pools.validation is not None) == train
    assert classes_of(validation) == rows
    assert validation.class_names == pools.calibration.class_names == (*SYNSETS, "n01491361")
    if train:
        assert len(pools.calibration) == 9


def test_the_development_kits_numbers_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "val", [f"ILSVRC2012_val_{number + 1:08}.JPEG" for number in range(4)])
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n361\n171\n822\n")
    with pytest.raises(ResvitError, match="not those that networks answer"):
        opened(tmp_path)


def test_classes_and_texts_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    pictures(tmp_path, list(CLASSES))
    for rows, kind in (
        ({name: f"word {number}" for number, name in enumerate(CLASSES)}, "text"),
        ({name: NAMES[number % 2] for name, number in CLASSES.items()}, "csv"),
        ({name: number * 70 for name, number in CLASSES.items()}, "text"),
        ({name: number % 2 for name, number in CLASSES.items()}, "csv"),
    ):
        (tmp_path / "labels.txt").write_text("".join(f"{name}\t{value}\n" for name, value in rows.items()))
        assert kind_of_folder(tmp_path) == kind
        assert opened(tmp_path / "labels.txt").calibration.task == {"csv": "classification"}.get(kind, kind)
    words = ("red", "green", "blue", "pink", "grey")
    doubtful = "".join(f"{name}\t{words[number % 5]}\n" for number, name in enumerate(CLASSES))
    (tmp_path / "labels.txt").write_text(doubtful)
    for data in (tmp_path, tmp_path / "labels.txt"):
        with pytest.raises(ResvitError) as caught:
            opened(data)
        assert f"`csv:{data}`" in caught.value.fix
        assert f"`text:{data}`" in caught.value.fix
        assert opened(f"csv:{data}").calibration.task == "classification"
        assert opened(f"text:{data}").calibration.task == "text"


def test_files_of_lines_that_are_no_lists(tmp_path: Path) -> None:
    pictures(tmp_path, [f"{NAMES[number]}/{name}" for name, number in CLASSES.items()])
    for text in ("1 cat\n2 dog\n", "0 0.5 0.5 0.1 0.1\n", "cat/0.png\ncat/3.png\n", "id,label\nzz,cat\n", "\x00\n"):
        (tmp_path / "notes.txt").write_text(text)
        (tmp_path / "submission.csv").write_text("id,label\n0,cat\n")
        assert kind_of_folder(tmp_path) == "folder", text


def test_names_alone_are_pictures_of_which_nothing_is_known(tmp_path: Path) -> None:
    pictures(tmp_path / "images", list(CLASSES))
    (tmp_path / "calibration.txt").write_text("images/1.png\nimages/2.png\nimages/zz.png\n")
    pixels = opened(tmp_path / "calibration.txt").calibration
    assert (pixels.task, len(pixels)) == (None, 2)
    assert any("zz.png" in note for note in pixels.notes)


ATTRIBUTES = ("Male", "Smiling", "Young")
CELEBA_NAMES = [f"{number:06}.jpg" for number in range(1, 13)]


def celeba(root: Path, ending: str = ".txt") -> None:
    below = "img_align_celeba" if ending == ".txt" else "img_align_celeba/img_align_celeba"
    pictures(root / below, CELEBA_NAMES)
    rows = [
        [name, *(1 if (number + place) % 3 else -1 for place in range(3))] for number, name in enumerate(CELEBA_NAMES)
    ]
    parts = [[name, number % 3] for number, name in enumerate(CELEBA_NAMES)]
    if ending == ".txt":
        head = f"{len(rows)}\n{' '.join(ATTRIBUTES)} \n"
        (root / "list_attr_celeba.txt").write_text(head + "".join(f"{' '.join(map(str, row))}\n" for row in rows))
        (root / "list_eval_partition.txt").write_text("".join(f"{name} {part}\n" for name, part in parts))
        (root / "identity_CelebA.txt").write_text(
            "".join(f"{name} {7 + n % 3}\n" for n, name in enumerate(CELEBA_NAMES))
        )
    else:
        table(root / "list_attr_celeba.csv", [["image_id", *ATTRIBUTES], *rows])
        table(root / "list_eval_partition.csv", [["image_id", "partition"], *parts])


@pytest.mark.skipif(shutil.which("awk") is None, reason="the command that is told is awk's")
@pytest.mark.parametrize("ending", [".txt", ".csv"])
def test_celebas_lists_are_named_with_a_command_that_makes_classes_of_them(ending: str, tmp_path: Path) -> None:
    celeba(tmp_path, ending)
    with pytest.raises(ResvitError, match=r"CelebA's lists \(list_attr_celeba.* no picture one class") as refused:
        kind_of_folder(tmp_path)
    command = refused.value.fix.split("`")[3]
    subprocess.run(["sh", "-c", command], check=True)
    pools = open_source(f"csv:{tmp_path / 'smiling.csv'}", AS_USUAL)
    assert isinstance(pools, Pools)
    assert pools.calibration.labels is not None
    assert pools.calibration.labels.tolist() == [int((number + 1) % 3 > 0) for number in range(12)]


@pytest.mark.parametrize("name", ["list_attr_celeba.txt", "list_eval_partition.txt"])
@pytest.mark.parametrize("prefix", ["", "csv:"])
def test_celebas_parts_and_attributes_are_never_taken_for_classes(prefix: str, name: str, tmp_path: Path) -> None:
    celeba(tmp_path)
    with pytest.raises(ResvitError, match="CelebA's lists"):
        open_source(f"{prefix}{tmp_path / name}", AS_USUAL)
    with pytest.raises(ResvitError, match="CelebA's lists"):
        open_source(f"{prefix}{tmp_path}", AS_USUAL)


def test_celebas_identities_are_classes(tmp_path: Path) -> None:
    celeba(tmp_path)
    pools = open_source(f"csv:{tmp_path / 'identity_CelebA.txt'}", AS_USUAL)
    assert isinstance(pools, Pools)
    assert pools.calibration.labels is not None
    assert set(pools.calibration.labels.tolist()) == {7, 8, 9}


def test_a_list_whose_class_nothing_says_is_refused_also_without_endings(tmp_path: Path) -> None:
    pictures(tmp_path / "images", [f"{number}.jpg" for number in range(12)])
    rows = [[number, "Men", "Apparel", "Shirts"] for number in range(12)]
    table(tmp_path / "styles.csv", [["id", "gender", "masterCategory", "articleType"], *rows])
    with pytest.raises(ResvitError, match=r"Nothing says which column of .*styles.csv is the class: id, gender"):
        kind_of_folder(tmp_path)


def test_ham10000_is_read_by_its_list_and_its_pieces_are_no_classes(tmp_path: Path) -> None:
    rows = [[f"HAM_{n}", f"ISIC_{n}", ("nv", "mel")[n % 2], "histo", 50] for n in range(12)]
    pictures(tmp_path / "images", [f"ISIC_{number}.jpg" for number in range(12)])
    table(tmp_path / "HAM10000_metadata.csv", [["lesion_id", "image_id", "dx", "dx_type", "age"], *rows])
    pools = open_source(str(tmp_path), AS_USUAL)
    assert isinstance(pools, Pools)
    assert pools.calibration.class_names == ("mel", "nv")
    for part in (1, 2):
        pictures(tmp_path / "pieces" / f"HAM10000_images_part_{part}", [f"ISIC_{part}{n}.jpg" for n in range(6)])
    with pytest.raises(ResvitError, match="these are pieces of one folder and no classes"):
        open_source(str(tmp_path / "pieces"), AS_USUAL)
