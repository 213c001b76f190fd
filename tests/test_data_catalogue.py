"""A small sample of every layout that people have data in: each is recognised as itself and as nothing else."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from conftest import CHECKPOINT
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.naming import kind_of_folder, require_source
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL, TargetOptions
from resvit_calibrate.readers.labelled.formats import Labels
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.cli.main import run
from test_data_labelled import FORMATS

COUNT = 12
NAMES = ("cat", "dog", "owl")
COLOURS = np.array([[0, 0, 0], [128, 64, 128], [0, 128, 0]], np.uint8)


def picture(path: Path, number: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return path.name


def pictures(folder: Path, count: int = COUNT, first: int = 0) -> list[str]:
    return [picture(folder / f"{number:04}.png", number) for number in range(first, first + count)]


def mask(path: Path, number: int, kind: str = "grey") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(1000 + number).integers(0, 3, (16, 16)).astype(np.uint8)
    image = Image.fromarray(COLOURS[values] if kind == "colours" else values)
    if kind == "palette":
        image = image.convert("P")
        image.putpalette(COLOURS.ravel().tolist())
    image.save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def yolo(root: Path) -> None:
    for name in pictures(root / "images"):
        text(root / "labels" / f"{Path(name).stem}.txt", "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.2 0.2\n")
    text(root / "data.yaml", "train: images\nval: images\nnames: [cat, dog]\n")


def darknet(root: Path) -> None:
    for name in pictures(root):
        text(root / f"{Path(name).stem}.txt", "0 0.5 0.5 0.5 0.5\n")


def coco(root: Path) -> None:
    names = pictures(root / "images")
    images = [{"id": str(at), "file_name": name, "width": 16, "height": 16.0} for at, name in enumerate(names)]
    boxes = [
        {
            "id": at,
            "image_id": at,
            "category_id": "1",
            "bbox": [1, "1", 8, 8],
            "iscrowd": None,
            "segmentation": [[1, 1, 9, 1, 9, 9]],
        }
        for at in range(COUNT)
    ]
    categories = [{"id": 1, "name": "cat"}]
    text(root / "annotations.json", json.dumps({"images": images, "annotations": boxes, "categories": categories}))


def voc(root: Path) -> None:
    for name in pictures(root / "JPEGImages"):
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        body = f"<annotation><object><name>cat</name>{box}</object></annotation>"
        text(root / "Annotations" / f"{Path(name).stem}.xml", body)


def pairs(first: str, second: str, kind: str = "grey") -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for number, name in enumerate(pictures(root / first)):
            mask(root / second / name, number, kind)

    return make


def camvid(root: Path) -> None:
    pairs("images", "masks", "colours")(root)
    rows = "".join(f"{n},{r},{g},{b}\n" for n, (r, g, b) in zip(NAMES, COLOURS.tolist(), strict=True))
    text(root / "class_dict.csv", f"name,r,g,b\n{rows}")


def cityscapes(root: Path) -> None:
    for number in range(COUNT):
        picture(root / "leftImg8bit/train/ulm" / f"ulm_{number:06}_leftImg8bit.png", number)
        mask(root / "gtFine/train/ulm" / f"ulm_{number:06}_gtFine_labelTrainIds.png", number)
        mask(root / "gtFine/train/ulm" / f"ulm_{number:06}_gtFine_color.png", number)
        picture(root / "leftImg8bit/val/bonn" / f"bonn_{number:06}_leftImg8bit.png", 50 + number)
        mask(root / "gtFine/val/bonn" / f"bonn_{number:06}_gtFine_labelTrainIds.png", number)


def depth(root: Path) -> None:
    for name in pictures(root / "images"):
        (root / "depth").mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16), 1000, np.uint16)).save(root / "depth" / name)


def nested(root: Path) -> None:
    for number in range(COUNT):
        picture(root / NAMES[number % 3] / f"sub{number % 2}" / f"{number}.png", number)


def numbered(root: Path) -> None:
    nested(root)
    text(root / "class_to_idx.json", json.dumps({"owl": 0, "dog": 1, "cat": 2}))


def without_endings(root: Path) -> None:
    nested(root)
    for file in sorted(root.rglob("*.png")):
        file.rename(file.with_suffix(""))


def listed(name: str, line: str, head: str = "") -> Callable[[Path], None]:
    def make(root: Path) -> None:
        names = pictures(root / "images")
        rows = [line.format(name=n, stem=Path(n).stem, word=NAMES[at % 3], at=at % 3) for at, n in enumerate(names)]
        text(root / name, head + "".join(rows))

    return make


def imagenet(root: Path) -> None:
    for number in range(COUNT):
        picture(root / "val" / f"ILSVRC2012_val_{number + 1:08}.png", number)
    lines = "".join(f"n0144076{number % 3}\n" for number in range(COUNT))
    text(root / "imagenet_2012_validation_synset_labels.txt", lines)


def texts(root: Path) -> None:
    rows = "".join(f"images/{name}\tline {at} of it\n" for at, name in enumerate(pictures(root / "images")))
    text(root / "rec_gt.txt", rows)


def tars(root: Path) -> None:
    for part in range(2):
        with tarfile.open(root / f"{part:06}.tar", "w") as archive:
            for number in range(6 * part, 6 * part + 6):
                picture(root / "x" / "p.png", number)
                archive.add(root / "x" / "p.png", f"{number:04}.png")
                text(root / "x" / "p.cls", str(number % 3))
                archive.add(root / "x" / "p.cls", f"{number:04}.cls")
                for file in (root / "x").iterdir():
                    file.unlink()
                (root / "x").rmdir()


def hugging_face(root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8) for number in range(COUNT)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    columns = {"image": [Image.fromarray(image) for image in images], "label": [at % 3 for at in range(COUNT)]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(root))


def parquet(root: Path) -> None:
    pytest.importorskip("pyarrow")
    hugging_face(root / "saved")
    import datasets

    datasets.load_from_disk(str(root / "saved")).to_parquet(str(root / "data.parquet"))
    shutil.rmtree(root / "saved")


def films(root: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(root / "film.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for number in range(COUNT):
            values = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24").reformat(format="bgr0")))
        out.mux(stream.encode(None))


def flat(root: Path) -> None:
    pictures(root)


LAYOUTS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "YOLO": (yolo, "yolo", "detection"),
    "darknet": (darknet, "yolo", "detection"),
    "COCO with nulls and texts": (coco, "coco", "detection"),
    "VOC's boxes": (voc, "voc", "detection"),
    "VOC's masks": (pairs("JPEGImages", "SegmentationClass", "palette"), "masks", "segmentation"),
    "ADE20K": (pairs("images", "annotations"), "masks", "segmentation"),
    "Cityscapes": (cityscapes, "masks", "segmentation"),
    "masks of colours": (camvid, "masks", "segmentation"),
    "depth": (depth, "depth", "depth"),
    "nested folders": (nested, "folder", "classification"),
    "class_to_idx": (numbered, "folder", "classification"),
    "files without endings": (without_endings, "folder", "classification"),
    "CSV": (listed("labels.csv", "{name},{word}\n"), "csv", "classification"),
    "Kaggle": (listed("train.csv", "{stem},{word}\n", "id,breed\n"), "csv", "classification"),
    "tabs": (listed("list.tsv", "{name}\t{at}\n"), "csv", "classification"),
    "Caffe": (listed("val.txt", "{name} {at}\n"), "csv", "classification"),
    "ImageNet": (imagenet, "csv", "classification"),
    "texts": (texts, "text", "text"),
    "shards": (tars, "tar", "classification"),
    "Hugging Face's arrow": (hugging_face, "hf-dataset", "classification"),
    "parquet": (parquet, "hf-dataset", "classification"),
    "films": (films, "video", None),
    "unlabelled": (flat, "folder", None),
    **{name: (make, kind, "detection") for name, (make, kind) in FORMATS.items()},
}
KINDS = (
    *("folder", "csv", "coco", "yolo", "voc", "masks", "depth", "text", "tar", "hf-dataset", "video", "frames"),
    *get_args(Labels),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognised_as_itself_and_read(layout: str, tmp_path: Path) -> None:
    make, kind, task = LAYOUTS[layout]
    make(tmp_path)
    assert kind_of_folder(tmp_path) == kind
    pools = open_source(str(tmp_path), AS_USUAL)
    assert isinstance(pools, Pools)
    assert pools.calibration.task == task
    assert len(pools.calibration) == COUNT
    spec = DataSpec(str(tmp_path), calibration_images=4, unlabelled=task is None)
    calibration, validation = open_image_sets(spec, Preprocess((16, 16), 3))
    assert len(calibration) == 4
    for images in (calibration, validation):
        assert images.task == task
        assert sum(len(batch.images) for batch in images.batches(4)) == len(images) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_taken_for_another_of_its_own_accord(layout: str, tmp_path: Path) -> None:
    make, kind, task = LAYOUTS[layout]
    make(tmp_path)
    for other in KINDS:
        # Who says `folder:` says that they are classes, and `text:` that text files beside pictures hold texts.
        # Who says `frames:` says that nothing is known of them.
        if other in (kind, "folder", "frames") or (layout, other) == ("darknet", "text"):
            continue
        try:
            pools = open_source(f"{other}:{tmp_path}", AS_USUAL)
        except ResvitError:
            continue
        assert isinstance(pools, Pools)
        # Where another kind can be told by the user, it is one that reads the same files for the same task.
        assert pools.calibration.task == task, other


def test_cocos_outlines_are_masks_where_the_task_is_segmentation(tmp_path: Path) -> None:
    coco(tmp_path)
    pools = open_source(str(tmp_path), TargetOptions(outlines=True))
    assert isinstance(pools, Pools)
    assert pools.calibration.task == "segmentation"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("one.png", b"\x89PNG\r\n\x1a\n", "is a picture, and data are many"),
        ("one", b"\xff\xd8\xff\xe0\0\x10JFIF", "is a picture, and data are many"),
        ("frames.mp4", b"\0\0\0\x18xxxxmp42", "is called like a film and does not begin like one"),
        ("images.npy", b"\x93NUMPY\x01\0", "is one NumPy array without labels"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        ("a", b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        ("a.tfrecord", b"x", "is a file of TensorFlow's records"),
        ("a.pkl", b"\x80\x04", "is a pickle, which would run code"),
        ("a.db", b"SQLite format 3\0", "is a database of SQLite's"),
        ("a.mat", b"MATLAB 5.0 MAT-file", "is a file of MATLAB's"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c", "is an archive"),
        ("a.csv.gz", b"\x1f\x8b\x08", "is compressed"),
        ("net.onnx", b"\x08\x08", "is a network and no images"),
        ("net.pth", b"PK\x03\x04", "is weights and no images"),
        ("photos.zip", b"PK\x03\x04", "is a ZIP archive that cannot be opened"),
        ("empty", b"", "is of no kind of data that is read"),
    ],
)
def test_a_file_of_no_kind_is_refused_before_anything_is_done(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ResvitError, match=said):
        require_source(str(tmp_path / name))


def test_archives_and_databases_are_named_for_what_they_are(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png", 1)
    shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "x")
    with pytest.raises(ResvitError, match=r"is a ZIP archive, with a.png in it.\n.*Unpack it"):
        require_source(str(tmp_path / "photos.zip"))
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8))
    for name in ("b.npz", "b", "b.zip"):  # what a .npz is called is no matter
        shutil.copy(tmp_path / "a.npz", tmp_path / name)
        require_source(str(tmp_path / name))
        assert isinstance(open_source(str(tmp_path / name), AS_USUAL), Pools)
    (tmp_path / "db").mkdir()
    text(tmp_path / "db" / "data.mdb", "x")
    with pytest.raises(ResvitError, match=r"is an LMDB.\n.*examples/lmdb"):
        require_source(str(tmp_path / "db"))


@pytest.mark.parametrize("option", ["--data", "--validation-data", "--train-data"])
@pytest.mark.parametrize("data", ["absent", "hf-dataset:absent", "torchvision:MNIST:absent", "video:absent", "a.h5"])
def test_data_that_a_command_names_is_looked_at_before_its_first_stage(
    option: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    text(tmp_path / "a.h5", "x")
    flat(tmp_path / "photos")
    own = ["--data", "photos"] if option != "--data" else []
    line = ["calibrate", "--model", "resvit:embed-nano", "--checkpoint", str(CHECKPOINT), option, data, *own]
    assert run([*line, "--run", "x"]) == ExitCode.INPUT
    assert "fold: " not in capsys.readouterr().err
    assert not list((tmp_path / "x").glob("fold-*"))


def test_a_folder_of_two_kinds_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for name in ("images", "masks", "depth"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    with pytest.raises(ResvitError, match="could be several kinds of data"):
        require_source(str(tmp_path))
