"""Data sets as Hugging Face's own library writes them: every form, and every way to name one wrongly."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets, open_training_images
from resvit_calibrate.data.naming import absolute_source, is_factory, kind_of_folder, require_source
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.class_list import class_list_from_names
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL
from resvit_calibrate.readers.hugging_face import tables
from resvit_calibrate.readers.hugging_face.reference import wanted_from
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.recipe.file import absolute_reference

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("cat", "dog", "owl")
SMALL = Preprocess((8, 8), 3)


def rows(count: int, first: int = 0) -> list[np.ndarray]:
    return [np.random.default_rng(first + n).integers(0, 256, (8, 8, 3), np.uint8) for n in range(count)]


def data_set(count: int, first: int = 0, labels: list[Any] | None = None, feature: Any = None) -> Any:
    features = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=list(NAMES))}
    values = {
        "image": [Image.fromarray(image) for image in rows(count, first)],
        "label": labels if labels is not None else [number % 3 for number in range(count)],
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def divided() -> Any:
    return datasets.DatasetDict({"train": data_set(12), "test": data_set(9, 100)})


def saved(root: Path) -> Path:
    divided().save_to_disk(str(root))
    return root


def parquet(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    for name, part in divided().items():
        part.to_parquet(str(root / "data" / f"{name}-00000-of-00001.parquet"))
    return root


def converted(root: Path) -> Path:
    """As the hub converts what is uploaded: a folder of each configuration, a folder of each part."""
    for name, part in divided().items():
        (root / "default" / name).mkdir(parents=True)
        part.to_parquet(str(root / "default" / name / "0000.parquet"))
    return root


def plain_parquet(root: Path) -> Path:
    """As pandas or a script of one's own writes it: bytes alone, and numbers."""
    root.mkdir()
    for name, first in (("train", 0), ("valid", 100)):
        count = 12 if name == "train" else 9
        part = data_set(count, first).data.table
        table = pa.table({"png": part.column("image").combine_chunks().field("bytes"), "target": part.column("label")})
        pq.write_table(table, root / f"{name}.parquet", row_group_size=5)
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("HF_HOME", str(home))
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return home


def built(cache: Path, source: Path, name: str = "me___My_Pets", config: str = "default") -> Path:
    """What `load_dataset` leaves in its cache, by the library itself, under the name that the hub would give."""
    loaded = datasets.load_dataset(str(source), cache_dir=str(cache / "made"))
    (folder,) = (cache / "made").glob("*/*/*/*/dataset_info.json")
    place = cache / "datasets" / name / config / "0.0.0" / "0123abcd"
    shutil.copytree(folder.parent, place)
    assert loaded["train"].num_rows == 12
    shutil.rmtree(cache / "made")
    return place


def opened(data: object) -> Pools:
    require_source(str(data))
    pools = open_source(str(data), AS_USUAL)
    assert isinstance(pools, Pools)
    return pools


@pytest.mark.parametrize("write", [saved, parquet, converted, plain_parquet])
@pytest.mark.parametrize("prefix", ["", "hf-dataset:"])
def test_every_form_is_read_as_the_library_reads_it(write: Callable[[Path], Path], prefix: str, tmp_path: Path) -> None:
    root = write(tmp_path / "pets")
    assert kind_of_folder(root) == "hf-dataset"
    pools = opened(f"{prefix}{root}")
    assert pools.validation is not None
    for pixels, count, first in ((pools.calibration, 12, 0), (pools.validation, 9, 100)):
        assert pixels.task == "classification"
        assert pixels.class_names == (() if write is plain_parquet else NAMES)
        assert [int(label) for label in pixels.labels] == [number % 3 for number in range(count)]  # type: ignore[union-attr]
        for number, image in enumerate(rows(count, first)):
            assert (pixels.read(number) == image).all()
    calibration, validation = open_image_sets(DataSpec(f"{prefix}{root}", calibration_images=5), SMALL)
    assert (len(calibration), len(validation)) == (5, 9)
    assert sum(len(batch.images) for batch in calibration.batches(2)) == 5
    assert len(open_training_images(str(root), validation, 7, 0, SMALL)) == 7


def test_a_data_set_of_one_part_is_divided_and_a_part_can_be_named(tmp_path: Path) -> None:
    data_set(12).save_to_disk(str(tmp_path / "one"))
    assert opened(tmp_path / "one").validation is None
    root = saved(tmp_path / "pets")
    assert len(opened(f"hf-dataset:{root}:test").calibration) == 9
    assert len(opened(f"hf-dataset:{root}:split=train,label=label").calibration) == 12
    with pytest.raises(ResvitError, match=r"has no part 'val'.*\n.*train, test"):
        opened(f"hf-dataset:{root}:val")
    spec = DataSpec(f"hf-dataset:{root}:train", f"hf-dataset:{root}:test", 6)
    calibration, validation = open_image_sets(spec, SMALL)
    assert (len(calibration), len(validation)) == (6, 9)


def test_many_files_of_a_part_are_one_in_order(tmp_path: Path) -> None:
    data_set(12).save_to_disk(str(tmp_path / "many"), num_shards=5)
    pixels = opened(tmp_path / "many").calibration
    assert [(pixels.read(number) == image).all() for number, image in enumerate(rows(12))] == [True] * 12
    assert pixels.title(11) == "row 1 of data-00004-of-00005.arrow"


def test_by_name_out_of_the_cache_and_never_from_elsewhere(cache: Path, tmp_path: Path) -> None:
    place = built(cache, parquet(tmp_path / "pets"))
    (place / "cache-0123.arrow").write_bytes(b"what map() left")
    for name in ("me/My_Pets", "me/my-pets", "me/my-pets:train"):
        assert len(opened(f"hf-dataset:{name}").calibration) == 12
    assert not is_factory("hf-dataset:pets")
    with pytest.raises(
        ResvitError, match=r"no data set of that name in the cache .*it has me/My_Pets.*nothing is down"
    ):
        opened("hf-dataset:you/other")
    shutil.copytree(place, place.parents[2] / "big" / "0.0.0" / "0123abcd")
    with pytest.raises(ResvitError, match=r"several configurations: big, default\.\n.*me/my-pets:config=big"):
        opened("hf-dataset:me/my-pets")
    assert len(opened("hf-dataset:me/my-pets:config=big,split=test").calibration) == 9
    with pytest.raises(ResvitError, match="has no configuration 'huge'"):
        opened("hf-dataset:me/my-pets:config=huge")


def test_a_half_written_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    place = built(cache, parquet(tmp_path / "pets"))
    file = place / "dataset_info.json"
    file.write_text(file.read_text().replace('"num_examples": 12', '"num_examples": 14'))
    with pytest.raises(ResvitError, match="has 12 rows where 14 are described"):
        opened("hf-dataset:me/my-pets")


def test_what_the_hubs_client_fetched_is_found_by_name(cache: Path, tmp_path: Path) -> None:
    hub = cache / "hub" / "datasets--me--pets"
    parquet(hub / "snapshots" / "abc")
    (hub / "snapshots" / "older").mkdir()
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    assert len(opened("hf-dataset:me/pets").calibration) == 12


def test_columns_are_chosen_by_their_features_and_asked_for_where_two_could_be(tmp_path: Path) -> None:
    two = data_set(12).rename_column("label", "fine").add_column("coarse", [number % 2 for number in range(12)])
    two = two.cast_column("coarse", datasets.ClassLabel(names=["a", "b"])).add_column("weight", [0.5] * 12)
    two.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ResvitError) as caught:
        opened(tmp_path / "two")
    assert "fine and coarse" in caught.value.problem
    assert "weight (numbers)" in caught.value.problem
    assert f"hf-dataset:{tmp_path}/two:label=fine" in caught.value.fix
    pixels = opened(f"hf-dataset:{tmp_path}/two:label=coarse").calibration
    assert pixels.class_names == ("a", "b")
    assert "fine, weight not" in pixels.notes[0]
    with pytest.raises(ResvitError, match=r"holds 0\.5, which is no class"):
        opened(f"hf-dataset:{tmp_path}/two:label=weight")
    with pytest.raises(ResvitError, match="has no column 'breed'"):
        opened(f"hf-dataset:{tmp_path}/two:label=breed")
    with pytest.raises(ResvitError, match="holds classes, 2 by name, and no pictures"):
        opened(f"hf-dataset:{tmp_path}/two:image=coarse,label=fine")


def test_no_pictures_no_labels_and_labels_of_some(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(ResvitError, match=r"no column of pictures; it has: text \(texts\), label \(whole numbers\)"):
        opened(tmp_path / "words")
    data_set(12, labels=[-1] * 12).save_to_disk(str(tmp_path / "none"))
    assert opened(tmp_path / "none").calibration.task is None
    data_set(12, labels=[0, 1, None] * 4).save_to_disk(str(tmp_path / "some"))
    with pytest.raises(ResvitError, match="4 of 12 rows of some have no class in 'label', the first is row 2"):
        opened(tmp_path / "some")
    data_set(12, labels=["owl", "cat"] * 6, feature=datasets.Value("string")).save_to_disk(str(tmp_path / "texts"))
    pixels = opened(tmp_path / "texts").calibration
    assert (pixels.class_names, list(pixels.labels)) == (("cat", "owl"), [1, 0] * 6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        (lambda: pa.array(["owl", "cat"] * 6).dictionary_encode(), ("cat", "owl"), [1, 0] * 6),
        (lambda: pa.array([True, False] * 6), (), [1, 0] * 6),
        (lambda: pa.array([2, 0] * 6, pa.uint8()), (), [2, 0] * 6),
        (lambda: pa.array(["owl", "cat"] * 6, pa.large_string()), ("cat", "owl"), [1, 0] * 6),
        (lambda: pa.array([[0, 1], [1]] * 6), None, None),
        (lambda: pa.array([0.5, 1.0] * 6), None, None),
    ],
)
@pytest.mark.parametrize("binary", ["binary", "large_binary"])
def test_labels_of_any_type_that_other_programs_write(
    values: Callable[[], Any], names: tuple[str, ...] | None, labels: list[int] | None, binary: str, tmp_path: Path
) -> None:
    column = data_set(12).data.table.column("image").combine_chunks().field("bytes").cast(getattr(pa, binary)())
    pq.write_table(pa.table({"image": column, "label": values()}), tmp_path / "x.parquet")
    pixels = opened(tmp_path / "x.parquet").calibration
    assert (pixels.read(3) == rows(12)[3]).all()
    if labels is None:
        assert pixels.task is None
        assert re.search(
            r"says more of its pictures \(label: |the column 'label' .* no class: nothing", pixels.notes[-1]
        )
        return
    assert (pixels.class_names, list(pixels.labels)) == (names, labels)  # type: ignore[arg-type]


def test_classes_are_numbered_as_the_network_says(tmp_path: Path) -> None:
    root = saved(tmp_path / "pets")
    known = class_list_from_names("the model", dict(enumerate(("owl", "dog", "cat", "cow"))))
    spec = DataSpec(str(root), calibration_images=5, known_classes=known)
    _, validation = open_image_sets(spec, SMALL)
    assert list(validation.labels) == [2, 1, 0] * 3  # type: ignore[arg-type]
    assert validation.num_classes == 4


def test_paths_in_rows_stay_inside(tmp_path: Path, cache: Path) -> None:
    outside = tmp_path / "elsewhere.png"
    Image.fromarray(rows(1)[0]).save(outside)
    for name, path in (("out", str(outside)), ("up", "../elsewhere.png"), ("in", "own.png")):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": None, "path": path}] * 4, kind)
        (tmp_path / name).mkdir()
        shutil.copy(outside, tmp_path / name / "own.png")
        pq.write_table(pa.table({"image": column}), tmp_path / name / "x.parquet")
        pixels = opened(f"hf-dataset:{tmp_path}/{name}").calibration
        if name == "in":
            assert (pixels.read(0) == rows(1)[0]).all()
            continue
        with pytest.raises(ResvitError, match="which lead out of it"):
            pixels.read(0)


def test_a_script_is_never_run(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "pets.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ResvitError, match=r"holds a loading script \(pets.py\) and no data"):
        opened(f"hf-dataset:{tmp_path}/pets")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("hf:pets", r"hf: is not a kind of it.*\n.*hf-dataset:pets is"),
        ("datasets:me/pets", "hf-dataset:me/pets is"),
        ("https://huggingface.co/datasets/mnist", "lies elsewhere, and nothing is downloaded"),
        ("rtsp://camera/1", "is a camera or a stream"),
    ],
)
def test_misspelt_names_and_data_elsewhere(data: str, said: str, cache: Path) -> None:
    with pytest.raises(ResvitError, match=said):
        require_source(data)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = saved(tmp_path / "pets")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ResvitError, match="needs pyarrow") as caught:
        open_source(str(root), AS_USUAL)
    assert caught.value.code is ExitCode.MISSING
    assert "resvit-export[datasets]" in caught.value.fix


def test_parts_that_were_saved_one_by_one_are_parts(tmp_path: Path) -> None:
    root = saved(tmp_path / "pets")
    (root / "dataset_dict.json").unlink()
    for data in (root, f"hf-dataset:{root}"):
        pools = opened(data)
        assert pools.validation is not None
        assert (len(pools.calibration), len(pools.validation)) == (12, 9)


@pytest.mark.parametrize("name", ["train/state.json", "dataset_dict.json", "train/data-00000-of-00001.arrow"])
@pytest.mark.parametrize("how", ["gone", "cut", "zeros", "words"])
def test_damaged_folders_end_in_a_sentence(name: str, how: str, tmp_path: Path) -> None:
    root = saved(tmp_path / "pets")
    file = root / name
    content = file.read_bytes()
    if how == "gone":
        (root / "train" / "state.json").unlink()
        file.unlink(missing_ok=True)
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "zeros": bytes(len(content)), "words": b"{}"}[how])
    with pytest.raises(ResvitError):
        opened(f"hf-dataset:{root}")


@settings(max_examples=60)
@given(st.data())
def test_whatever_bytes_stand_in_a_file_they_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = tmp_path_factory.getbasetemp() / "hf-fuzzed"
    if not base.exists():
        base.mkdir()
        data_set(6).to_parquet(str(base / "a.parquet"))
        data_set(6).save_to_disk(str(base / "b"))
        shutil.copy(base / "b" / "data-00000-of-00001.arrow", base / "a.arrow")
    kind = data.draw(st.sampled_from(["parquet", "arrow"]))
    content = bytearray((base / f"a.{kind}").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = base / f"changed.{kind}"
    file.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        calibration, _ = open_image_sets(DataSpec(f"hf-dataset:{file}", calibration_images=3, unjudged=True), SMALL)
        list(calibration.batches(2))
    except ResvitError:
        pass


def test_of_parquet_only_what_is_asked_for_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plain_parquet(tmp_path / "pets")
    kept: list[int] = []
    before = tables._File._keep
    monkeypatch.setattr(tables._File, "_keep", lambda self, row, *rest: (kept.append(row), before(self, row, *rest)))
    pixels = opened(root).calibration
    pixels.fetch([11, 2, 3])
    pixels.read(2)
    pixels.fetch([3])
    assert kept == [2, 3, 11]


def test_references_are_parsed_and_made_absolute(tmp_path: Path) -> None:
    assert wanted_from("a/b") == wanted_from("a/b")
    assert wanted_from("me/pets:train").split == "train"
    assert wanted_from("C:/data/pets").where == "C:/data/pets"
    assert wanted_from("pets:image=img, label=fine").image == "img"
    for wrong in ("pets:lable=x", "pets:split=a,split=b", "pets:split="):
        with pytest.raises(ResvitError, match="says nothing that is known"):
            wanted_from(wrong)
    (tmp_path / "pets").mkdir()
    assert absolute_reference("hf-dataset:pets:test", tmp_path) == f"hf-dataset:{tmp_path}/pets:test"
    assert absolute_reference("coco:pets", tmp_path) == f"coco:{tmp_path}/pets"
    assert absolute_reference("hf-dataset:me/nets:test", tmp_path) == "hf-dataset:me/nets:test"
    assert absolute_source("package.module:function", tmp_path) is None


def test_a_description_that_is_no_description(tmp_path: Path) -> None:
    root = saved(tmp_path / "pets")
    for content in ({"splits": []}, {"splits": ["../x"]}, {"splits": [1]}, []):
        (root / "dataset_dict.json").write_text(json.dumps(content))
        with pytest.raises(ResvitError):
            opened(root)


BOXES = [[[1, 2, 8, 6], [9, 3, 2, 4]], [], [[20, 10, 8, 5]]] * 4
KINDS = [[1, 0], [], [1]] * 4


def detections(root: Path, form: str, kind: str = "xywh", shape: str = "lists", category: Any = None) -> str:
    """Boxes in any of the forms that data sets on the hub have them in."""

    def corners(box: list[float]) -> list[float]:
        x, y, width, height = box
        return {"xywh": box, "xyxy": [x, y, x + width, y + height], "shares": [value / 40 for value in box]}[kind]

    random = np.random.default_rng(0)
    boxes = [[corners(box) for box in found] for found in BOXES]
    named = category or datasets.ClassLabel(names=["cat", "dog"])
    kinds = KINDS if category is None else [[("cat", "dog")[n] for n in found] for found in KINDS]
    if shape == "lists":
        objects: Any = [{"bbox": b, "category": k} for b, k in zip(boxes, kinds, strict=True)]
        feature: Any = {
            "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
            "category": datasets.Sequence(named),
        }
    else:
        objects = [
            [{"bbox": b, "label": k} for b, k in zip(*pair, strict=True)] for pair in zip(boxes, kinds, strict=True)
        ]
        feature = [{"bbox": datasets.Sequence(datasets.Value("float32"), length=4), "label": named}]
    features = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": feature})
    pictures = [Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8)) for _ in range(12)]
    made = datasets.Dataset.from_dict(
        {"image_id": list(range(12)), "image": pictures, "objects": objects}, features=features
    )
    if form == "parquet":
        root.mkdir()
        made.to_parquet(str(root / "train.parquet"))
    else:
        made.save_to_disk(str(root))
    return f"hf-dataset:{root}"


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["xywh", "xyxy"])
@pytest.mark.parametrize("shape", ["lists", "objects"])
def test_boxes_are_read_whatever_their_four_numbers_are(form: str, kind: str, shape: str, tmp_path: Path) -> None:
    pixels = opened(detections(tmp_path / "pets", form, kind, shape)).calibration
    assert (pixels.task, pixels.class_names, len(pixels)) == ("detection", ("cat", "dog"), 12)
    target: Any = pixels.target(0, 30, 40)
    assert target.boxes.tolist() == [[1, 2, 9, 8], [9, 3, 11, 7]]
    assert target.classes.tolist() == [1, 0]
    assert len(pixels.target(1, 30, 40).boxes) == 0  # type: ignore[union-attr]
    assert any("image_id not" in note for note in pixels.notes)
    assert any(("two corners" in note) == (kind == "xyxy") for note in pixels.notes if "boxes of" in note)
    spec = DataSpec(f"hf-dataset:{tmp_path}/pets", calibration_images=4)
    calibration, validation = open_image_sets(spec, Preprocess((60, 80), 3))
    assert sum(len(batch.targets) for batch in validation.batches(3)) == 8  # type: ignore[arg-type]
    known = class_list_from_names("the model", {0: "dog", 1: "cow", 2: "cat"})
    spec = DataSpec(f"hf-dataset:{tmp_path}/pets", calibration_images=4, known_classes=known)
    calibration, _ = open_image_sets(spec, Preprocess((60, 80), 3))
    found = {int(n) for batch in calibration.batches(4) for one in batch.targets for n in one.classes}  # type: ignore[union-attr]
    assert found <= {0, 2}
    assert found


def test_boxes_that_could_be_either_are_asked_for(tmp_path: Path) -> None:
    data = detections(tmp_path / "pets", "arrow")
    made = datasets.load_from_disk(str(tmp_path / "pets"))
    objects = [{"bbox": [[2, 2, 5, 6]], "category": [0]} for _ in range(12)]
    small = made.remove_columns("objects").add_column("objects", objects)
    small.save_to_disk(str(tmp_path / "either"))
    with pytest.raises(ResvitError) as caught:
        opened(f"hf-dataset:{tmp_path}/either")
    assert "could be either" in caught.value.problem
    assert f"hf-dataset:{tmp_path}/either:boxes=xywh" in caught.value.fix
    for kind, right in (("xywh", 7), ("xyxy", 5)):
        pixels = opened(f"hf-dataset:{tmp_path}/either:boxes={kind}").calibration
        assert pixels.target(0, 30, 40).boxes.tolist()[0][2] == right  # type: ignore[union-attr]
    with pytest.raises(ResvitError, match="neither xywh nor xyxy"):
        opened(f"{data}:boxes=cxcywh")
    with pytest.raises(ResvitError, match="are shares of the pictures' sizes"):
        opened(detections(tmp_path / "shares", "arrow", "shares"))


def test_categories_by_name_and_broken_objects(tmp_path: Path) -> None:
    pixels = opened(detections(tmp_path / "texts", "arrow", category=datasets.Value("string"))).calibration
    assert pixels.class_names == ("cat", "dog")
    made = datasets.load_from_disk(str(tmp_path / "texts")).remove_columns("objects")
    for name, objects, said in (
        ("uneven", {"bbox": [[1, 2, 30, 20]], "category": [0, 1]}, "has 1 boxes and 2 categories"),
        ("three", {"bbox": [[1.0, 2, 3]], "category": [0]}, "has the box .1.0, 2.0, 3.0. with the category 0"),
        ("negative", {"bbox": [[1.0, 2, 30, 20]], "category": [-1]}, "with the category -1"),
        ("outside", {"bbox": [[10.0, 2, 5, 900]], "category": [0]}, "do not fit into their pictures"),
        ("nothing", {"bbox": [[0.5]][:0], "category": [0][:0]}, "."),
    ):
        made.add_column("objects", [objects] * 12).save_to_disk(str(tmp_path / name))
        with pytest.raises(ResvitError, match=said):
            opened(f"hf-dataset:{tmp_path}/{name}")


@pytest.mark.parametrize("form", [None, "torch"])
def test_a_stream_gives_its_first_pictures(tmp_path: Path, form: str | None) -> None:
    root = parquet(tmp_path / "files")
    files = {"train": sorted(map(str, root.rglob("train*.parquet")))}
    stream = datasets.load_dataset("parquet", data_files=files, streaming=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ResvitError, match="with the parts train") as refused:
        open_source("object:x", AS_USUAL, {"object:x": stream})
    assert "Give one of its parts" in refused.value.fix
    part = stream["train"].with_format(form)
    pools = open_source("object:x", AS_USUAL, {"object:x": part}, most=7)
    assert isinstance(pools, Pools)
    assert len(pools.calibration) == 7
    assert (pools.calibration.class_names, pools.calibration.labels.tolist()) == (NAMES, [0, 1, 2, 0, 1, 2, 0])  # type: ignore[union-attr]
    for number, image in enumerate(rows(7)):
        assert (pools.calibration.read(number) == image).all()
