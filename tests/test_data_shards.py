"""Pictures and classes in tar files, read where they lie."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.naming import is_factory, kind_of_folder, require_source
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL
from resvit_engines.errors import ExitCode, ResvitError

SMALL = Preprocess((8, 8), 3)


def picture(number: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def shard(path: Path, numbers: Sequence[int], how: str = "cls", **more: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            about = {"cls": str(number % 3), "json": json.dumps({"label": "abc"[number % 3]}), "none": ""}[how]
            members = {"png": picture(number), how: about.encode()} if about else {"png": picture(number)}
            for ending, data in {**members, **more}.items():
                info = tarfile.TarInfo(f"./{number:06}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def opened(data: object) -> Pools:
    pools = open_source(str(data), AS_USUAL)
    assert isinstance(pools, Pools)
    return pools


@pytest.mark.parametrize("how", ["cls", "json", "none"])
def test_every_way_to_name_them_reads_the_same(how: str, tmp_path: Path) -> None:
    for part in range(3):
        shard(tmp_path / f"{part:06}.tar", range(4 * part, 4 * part + 4), how, txt=b"a caption")
    assert kind_of_folder(tmp_path) == "tar"
    for data in (tmp_path, f"tar:{tmp_path}", f"{tmp_path}/{{000000..000002}}.tar"):
        require_source(str(data))
        assert not is_factory(str(data))
        pixels = opened(data).calibration
        assert len(pixels) == 12
        assert pixels.task == (None if how == "none" else "classification")
        assert how == "none" or pixels.labels.tolist() == [n % 3 for n in range(12)]  # type: ignore[union-attr]
        assert pixels.class_names == (("a", "b", "c") if how == "json" else ())
        for number in range(12):
            expected = np.asarray(Image.open(io.BytesIO(picture(number))))
            np.testing.assert_array_equal(pixels.read(number), expected)
        assert any("12 .txt" in note for note in pixels.notes)
    assert len(opened(tmp_path / "000001.tar").calibration) == 4
    if how != "none":
        calibration, validation = open_image_sets(DataSpec(str(tmp_path), calibration_images=3), SMALL)
        assert (len(calibration), len(validation)) == (3, 9)
        assert sum(len(batch.images) for batch in validation.batches(4)) == 9


@pytest.mark.parametrize("where", ["names", "folders"])
def test_training_and_validation(where: str, tmp_path: Path) -> None:
    for part, numbers in (("train", range(6)), ("val", range(6, 10))):
        shard(tmp_path / (f"{part}-000.tar" if where == "names" else f"{part}/000.tar"), numbers)
    pools = opened(tmp_path)
    assert (len(pools.calibration), len(pools.validation)) == (6, 4)  # type: ignore[arg-type]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    whole = tmp_path / "a.tar"
    shard(whole, range(4))
    data = whole.read_bytes()
    for changed, said in (
        (data[:-9000], "cut short|no usable tar"),
        (b"x" * 2000, "no usable tar"),
        (b"", "no usable tar"),
        (data[:512].replace(b"0", b"9") + data[512:], "no usable tar"),
    ):
        whole.write_bytes(changed)
        with pytest.raises(ResvitError, match=said) as caught:
            opened(whole)
        assert caught.value.code is ExitCode.INPUT
    for more, said in (
        ({"jpg": picture(1, "JPEG")}, "two pictures of one sample"),
        ({"cls": b""}, "holds no class"),
        ({"cls": b"1\n2"}, "holds no class"),
    ):
        shard(whole, range(4), "cls", **more)
        with pytest.raises(ResvitError, match=said):
            opened(whole)
    shard(whole, range(4), "none", json=b"[1")
    with pytest.raises(ResvitError, match="does not read as JSON"):
        opened(whole)
    for text, said in (
        (f"{tmp_path}/{{0..3}}.tar", "does not exist"),
        (f"{tmp_path}/{{3..0}}.tar", "names -2 files"),
        (f"{tmp_path}/a.tar.gz", "is compressed"),
    ):
        with pytest.raises(ResvitError, match=said):
            opened(text)


def test_a_shard_that_changes_is_noticed(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", range(6))
    images = open_image_sets(DataSpec(str(tmp_path), calibration_images=2), SMALL)[1]
    shard(tmp_path / "a.tar", range(10, 16))
    with pytest.raises(ResvitError, match="was changed after"):
        list(images.batches(2))
