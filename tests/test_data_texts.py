"""Pictures with texts: lists of every form, texts beside pictures, and what is mistaken for neither."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data.image_sets import DataSpec, open_image_sets
from resvit_calibrate.data.naming import kind_of_folder
from resvit_calibrate.data.sources import open_source
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL, TextTarget
from resvit_calibrate.readers.texts import TextPixels
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent

TEXTS = {"a.png": "one", "b.png": "two words", "c d.png": 'a "quoted", text', "e.png": "ünï ❤"}
SIMPLE = {"a.png": "one", "b.png": "two words", "e.png": "ünï ❤"}


def pictures(folder: Path, names: list[str], size: tuple[int, int] = (32, 8)) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
        Image.fromarray(values).save(path)


def tabbed(folder: Path, rows: dict[str, str]) -> None:
    (folder / "rec_gt.txt").write_text("".join(f"{name}\t{text}\n" for name, text in rows.items()), encoding="utf-8")


def icdar(folder: Path, rows: dict[str, str]) -> None:
    (folder / "gt.txt").write_text("".join(f'{name}, "{text}"\n' for name, text in rows.items()), encoding="utf-8-sig")


def spaced(folder: Path, rows: dict[str, str]) -> None:
    (folder / "labels.txt").write_text("\r\n".join(f"{name} {text}" for name, text in rows.items()), encoding="utf-8")


def with_header(folder: Path, rows: dict[str, str]) -> None:
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["split", "file_name", "text"])
        writer.writerows(["train", name, text] for name, text in rows.items())


def two_columns(folder: Path, rows: dict[str, str]) -> None:
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows.items())


def tabs_with_header(folder: Path, rows: dict[str, str]) -> None:
    lines = [f"{text}\ttrain\t{name}\n" for name, text in rows.items()]
    (folder / "labels.tsv").write_text("Text\tsplit\tfile\n" + "".join(lines), encoding="utf-8")


def by_line(folder: Path, rows: dict[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def beside(folder: Path, rows: dict[str, str]) -> None:
    for name, text in rows.items():
        (folder / name).with_suffix(".gt.txt").write_text(f"{text}\n", encoding="utf-8")


def texts_of(data: str) -> dict[str, str]:
    pools = open_source(data, AS_USUAL)
    pixels = pools.calibration  # type: ignore[union-attr]
    assert isinstance(pixels, TextPixels)
    return dict(zip(pixels.files, pixels.texts, strict=True))


@pytest.mark.parametrize("write", [tabbed, icdar, spaced, with_header, two_columns, tabs_with_header, by_line, beside])
def test_every_form_is_recognised_and_read(write: Callable[[Path, dict[str, str]], None], tmp_path: Path) -> None:
    rows = SIMPLE if write is spaced else TEXTS
    pictures(tmp_path, list(rows))
    write(tmp_path, rows)
    assert kind_of_folder(tmp_path) == "text"
    assert texts_of(str(tmp_path)) == texts_of(f"text:{tmp_path}") == rows


@pytest.mark.parametrize("titles", ["file,label", "image,Ground Truth", "img_path,transcription", "id,words"])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_titles_are_no_line_of_text(titles: str, separator: str, tmp_path: Path) -> None:
    pictures(tmp_path, list(SIMPLE))
    rows = "".join(f"{name}{separator}{text}\n" for name, text in SIMPLE.items())
    file = tmp_path / ("labels.csv" if separator == "," else "labels.tsv")
    file.write_text(titles.replace(",", separator) + "\n" + rows, encoding="utf-8")
    pools = open_source(f"text:{tmp_path}", AS_USUAL)
    assert texts_of(f"text:{tmp_path}") == SIMPLE
    assert not pools.calibration.notes  # type: ignore[union-attr]


def test_a_list_itself_and_pictures_in_a_folder_of_their_own(tmp_path: Path) -> None:
    pictures(tmp_path / "images", list(TEXTS))
    tabbed(tmp_path, TEXTS)
    assert texts_of(str(tmp_path / "rec_gt.txt")) == texts_of(str(tmp_path)) == TEXTS


def test_what_a_list_names_twice_and_is_not_there_is_left_out_once(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png"])
    (tmp_path / "gt.txt").write_text("a.png\tone\nzz.png\ttwo\nzz.png\ttwo\n")
    pixels = open_source(str(tmp_path), AS_USUAL).calibration  # type: ignore[union-attr]
    assert pixels.texts == ("one",)
    assert any(note.startswith("1 files that ") and "zz.png" in note for note in pixels.notes)


@pytest.mark.parametrize("layout", ["folders", "lists"])
def test_training_and_validation(layout: str, tmp_path: Path) -> None:
    parts = {"train": {f"{i}.png": f"t{i}" for i in range(4)}, "val": {f"v{i}.png": f"v{i}" for i in range(3)}}
    for part, rows in parts.items():
        folder = tmp_path / part if layout == "folders" else tmp_path
        pictures(folder, list(rows))
        if layout == "folders":
            tabbed(folder, rows)
        else:
            (tmp_path / f"rec_gt_{part}.txt").write_text("".join(f"{a}\t{b}\n" for a, b in rows.items()))
    pictures(tmp_path / "test", ["z.png"])
    pools = open_source(str(tmp_path), AS_USUAL)
    said = [note for note in pools.calibration.notes if "train and val are used, test not" in note]  # type: ignore[union-attr]
    assert len(said) == (layout == "folders")
    assert pools.calibration.texts == tuple(parts["train"].values())  # type: ignore[union-attr]
    assert pools.validation.texts == tuple(parts["val"].values())  # type: ignore[union-attr]


def test_class_numbers_and_lists_of_names_are_no_texts(tmp_path: Path) -> None:
    pictures(tmp_path, [f"cat/{i}.png" for i in range(3)] + [f"dog/x{i}.png" for i in range(3)])
    for text in ("cat/0.png 0\ndog/x0.png 1\n", "cat/0.png\ndog/x0.png\n", "cats and dogs\n"):
        (tmp_path / "labels.txt").write_text(text)
        assert kind_of_folder(tmp_path) == "folder"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"../a.png\tone\n", "leads out of the folder"),
        (b"a.png\tone\na.png\ttwo\n", "another text than a line before"),
        (b"a.png\tone\nnothing here at all\n", "line 2 of .* is no file and text"),
        (b"a.png\tcaf\xe9\n", "is not UTF-8: line 1"),
        ("a.png\tone\n".encode("utf-16"), "is UTF-16"),
        (b"zz.png\tone\n", "No file of 1 that"),
        (b"\n\n", "lists no picture"),
    ],
)
def test_lists_that_cannot_be_read(text: bytes, said: str, tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png"])
    (tmp_path / "gt.txt").write_bytes(text)
    with pytest.raises(ResvitError, match=said):
        open_source(f"text:{tmp_path / 'gt.txt'}", AS_USUAL)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gt.txt", "a.png,80\nb.png,81, or so\n"),
        ("gt.txt", "a.png   80\nb.png  81, or so\n"),
        ("gt.txt", ".\\a.png\t80\n.\\b.png\t81, or so\n"),
        ("gt.txt", "# image text\n# more\na.png\t80\nb.png\t81, or so\n"),
        ("gt.txt", "zz.png\t79\na.png\t80\nb.png\t81, or so\n"),
        ("gt.txt", "{root}/a.png\t80\n{root}/b.png\t81, or so\n"),
        ("annotations.txt", "a.png\t80\nb.png\t81, or so\n"),
        ("labels.csv", "file_name;text\na.png;80\nb.png;81, or so\n"),
        ("labels.csv", 'a.png;80\n"b.png";"81, or so"\n'),
        ("metadata.csv", "split\tfile_name\ttext\nx\ta.png\t80\nx\tb.png\t81, or so\n"),
    ],
)
@pytest.mark.parametrize("part", ["", "train", "val"])
def test_a_list_that_is_written_otherwise_is_found_in_its_folder(part: str, name: str, text: str, tmp_path: Path):
    for folder in (tmp_path / "train", tmp_path / "val") if part else (tmp_path,):
        pictures(folder, ["a.png", "b.png"])
        (folder / name).write_text(text.replace("{root}", str(folder)))
    assert kind_of_folder(tmp_path) == "text"
    pools = open_source(str(tmp_path), AS_USUAL)
    pixels = pools.validation if part == "val" else pools.calibration  # type: ignore[union-attr]
    assert isinstance(pixels, TextPixels)
    assert dict(zip(pixels.files, pixels.texts, strict=True)) == {"a.png": "80", "b.png": "81, or so"}


@pytest.mark.parametrize("name", ["gt.txt", "labels.csv"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "is UTF-16, as"),
        ("utf-16-le", "is UTF-16 without the mark"),
        ("utf-16-be", "is UTF-16 without the mark"),
        ("gb18030", "is not UTF-8: line 1"),
        ("latin-1", "is not UTF-8: line 1"),
    ],
)
@pytest.mark.parametrize("part", ["", "train", "val"])
def test_a_list_in_another_encoding_is_named_and_never_dropped(
    part: str, encoding: str, said: str, name: str, tmp_path: Path
):
    for folder in ("train", "val") if part else ("",):
        pictures(tmp_path / folder, ["a.png", "b.png"])
        (tmp_path / folder / name).write_text("a.png,caf\xe9\nb.png,two\n", encoding="utf-8")
    (tmp_path / part / name).write_bytes("a.png,caf\xe9\nb.png,two\n".encode(encoding))
    for data in (f"{tmp_path}", f"text:{tmp_path}"):
        with pytest.raises(ResvitError, match=said) as caught:
            open_source(data, AS_USUAL)
        assert str(tmp_path / part / name) in str(caught.value)


def test_a_list_of_texts_whose_pictures_are_elsewhere_is_refused_and_others_are_not(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png"])
    for text, said in (("/data/a.png\tone\n", "leads out of"), ("x/a.png\tone\n", "No file of 1 that")):
        (tmp_path / "gt.txt").write_text(text)
        with pytest.raises(ResvitError, match=said):
            kind_of_folder(tmp_path)
        (tmp_path / "gt.txt").unlink()
    (tmp_path / "train.txt").write_text("/data/a.png\tone\n")
    with pytest.raises(ResvitError, match="lists pictures that are here under other paths"):
        kind_of_folder(tmp_path)
    (tmp_path / "train.txt").write_text("x/c.png\tone\n")
    assert kind_of_folder(tmp_path) == "folder"
    (tmp_path / "labels.txt").write_bytes("Äpfel und Birnen\n".encode("latin-1"))
    assert kind_of_folder(tmp_path) == "folder"


def test_numbers_that_are_read_off_are_texts(tmp_path: Path) -> None:
    rows = {f"{i}.png": f"{i * 7919 % 10000:04}" for i in range(30)}
    pictures(tmp_path, list(rows))
    for write in (tabbed, spaced, two_columns):
        write(tmp_path, rows)
        assert kind_of_folder(tmp_path) == "text"
        for file in tmp_path.glob("*.[tc][xs][tv]"):
            file.unlink()


class _Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def test_texts_come_with_their_images_and_long_lines_are_counted(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(12)]
    pictures(tmp_path, names, size=(40, 8))
    pictures(tmp_path, names[:3], size=(120, 8))
    tabbed(tmp_path, {name: f"text {name}" if name != "4.png" else "" for name in names} | {"gone.png": "gone"})
    heard = _Heard()
    spec = DataSpec(str(tmp_path), calibration_images=4)
    preprocess = Preprocess((16, 80), channels=1, resize="letterbox")
    calibration, validation = open_image_sets(spec, preprocess, heard)
    assert calibration.task == validation.task == "text"
    found = {
        target.text for images in (calibration, validation) for batch in images.batches(5) for target in batch.targets
    }
    assert found == {f"text {name}" for name in names if name != "4.png"} | {""}
    assert all(isinstance(validation.target(index), TextTarget) for index in range(len(validation)))
    said = "\n".join(heard.said)
    assert "1 files that" in said
    assert "texts of" in said
    assert "lines are longer than 80:16" in said
    heard.said.clear()
    open_image_sets(spec, Preprocess((16, 80), channels=1), heard)
    assert "resize=letterbox" in "\n".join(heard.said)
    assert "12 of 12 lines" not in "\n".join(heard.said)
    heard.said.clear()
    tabbed(tmp_path, dict.fromkeys(names[3:], "t"))
    open_image_sets(spec, Preprocess((16, 80), channels=1), heard)
    assert not any("letterbox" in line for line in heard.said), "all are of the network's shape already"


def test_another_text_is_another_set(tmp_path: Path) -> None:
    pictures(tmp_path, list(TEXTS))
    digests = set()
    for texts in (TEXTS, {**TEXTS, "a.png": "One"}):
        tabbed(tmp_path, texts)
        digests.add(open_image_sets(DataSpec(str(tmp_path), calibration_images=1), Preprocess((8, 32), 1))[1].digest)
    assert len(digests) == 2
