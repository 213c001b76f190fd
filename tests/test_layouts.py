"""Whatever a folder of pictures and masks looks like, no mask is ever calibrated on as if it were a picture."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.targets import AS_USUAL
from resvit_calibrate.readers.layouts import layouts_in, refuse_unread, require_read
from resvit_calibrate.readers.mixtures import refuse_masks
from resvit_engines.errors import ExitCode, ResvitError

COUNT = 6
PICTURES = ("images", "Images", "img", "JPEGImages", "rgb")
ABOUT = ("masks", "annotations", "labels", "SegmentationClass", "gt", "Seg", "depth")


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(path)


def numbers(number: int) -> np.ndarray:
    return np.random.default_rng(1000 + number).integers(0, 3, (16, 16)).astype(np.uint8)


def mask(path: Path, number: int, kind: str = "grey") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers(number))
    if kind == "palette":
        image = image.convert("P")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    elif kind == "deep":
        image = Image.fromarray(numbers(number).astype(np.uint16))
    elif kind == "colours":
        image = Image.fromarray(np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)[numbers(number)])
    image.save(path)


def layout(root: Path, first: str, second: str, where: str, kind: str, ending: str) -> None:
    """Pictures and masks as people lay them out: plain, in parts above the two folders, or in parts below them."""
    parts = {"plain": ("",), "above": ("train", "val"), "below": ("training", "validation")}[where]
    for part, number in itertools.product(parts, range(COUNT)):
        serial = number + 100 * parts.index(part)
        above, below = (part, "") if where == "above" else ("", part)
        picture(root / above / first / below / f"{number:03}.png", serial)
        mask(root / above / second / below / f"{number:03}{ending}", serial, kind)


def opened(root: Path) -> str:
    """The task of the pools that ``root`` opens as, or the code with which it was refused."""
    try:
        source = open_source(str(root), AS_USUAL)
    except ResvitError as error:
        return f"refused {int(error.code)}"
    assert isinstance(source, Pools)
    assert len(source.calibration)
    return str(source.calibration.task)


@pytest.mark.whole
@given(
    st.sampled_from(PICTURES),
    st.sampled_from(ABOUT),
    st.sampled_from(["plain", "above", "below"]),
    st.sampled_from(["grey", "palette", "deep", "colours"]),
    st.sampled_from([".png", ".bmp"]),
)
@settings(deadline=None, max_examples=40)
def test_pictures_beside_what_is_about_them_are_no_classes(
    first: str, second: str, where: str, kind: str, ending: str
) -> None:
    if kind == "deep" and ending == ".bmp":
        ending = ".png"  # BMP holds 8 bits
    with tempfile.TemporaryDirectory() as name:
        layout(Path(name), first, second, where, kind, ending)
        assert opened(Path(name)) in ("segmentation", "depth", "refused 3")


@pytest.mark.parametrize("where", ["plain", "above", "below"])
@pytest.mark.parametrize("second", ["annotations", "SegmentationClass", "masks"])
def test_the_known_layouts_are_read(tmp_path: Path, second: str, where: str) -> None:
    layout(tmp_path, "images", second, where, "palette", ".png")
    assert opened(tmp_path) == "segmentation"
    parts = layouts_in(tmp_path)[0].parts
    assert len(parts) == (1 if where == "plain" else 2)


@pytest.mark.parametrize("ending", [".mat", ".csv", ".geojson"])
def test_what_is_recognised_and_not_read_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    for number in range(COUNT):
        picture(tmp_path / "images" / f"{number}.png", number)
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{number}{ending}").write_text("0 0.5 0.5 0.4 0.4\n")
    with pytest.raises(ResvitError, match=r"images and labels.*not of a kind") as caught:
        require_read(layouts_in(tmp_path)[0], tmp_path)
    assert caught.value.code == ExitCode.INPUT
    assert opened(tmp_path) == "refused 3"


def test_a_folder_above_the_data_is_named(tmp_path: Path) -> None:
    layout(tmp_path / "mine", "images", "masks", "plain", "grey", ".png")
    with pytest.raises(ResvitError, match="has no class folders") as caught:
        refuse_unread(tmp_path)
    assert str(tmp_path / "mine") in caught.value.fix


@pytest.mark.parametrize("tail", ["annot", "_masks", "_labels", "_gt"])
def test_folders_about_each_other_are_no_classes(tmp_path: Path, tail: str) -> None:
    for number in range(COUNT):
        picture(tmp_path / "street" / f"{number}.png", number)
        mask(tmp_path / f"street{tail}" / f"{number}.png", number)
    with pytest.raises(ResvitError, match=f"street{tail}"):
        refuse_unread(tmp_path)
    assert opened(tmp_path) == "segmentation"
    for file in (tmp_path / f"street{tail}").iterdir():
        file.rename(file.with_name(f"other{file.name}"))  # nothing says which mask is whose
    assert opened(tmp_path) == "refused 3"


@pytest.mark.parametrize("kind", ["grey", "palette", "deep"])
@pytest.mark.parametrize("how", ["a folder of masks", "only masks", "names", "endings"])
def test_masks_among_class_folders_are_told_by_their_pixels_or_names(tmp_path: Path, how: str, kind: str) -> None:
    for number in range(COUNT):
        if how != "only masks":
            picture(tmp_path / "a" / f"{number}.{'jpg' if how == 'endings' else 'png'}", number)
            picture(tmp_path / "b" / f"{number}.{'jpg' if how == 'endings' else 'png'}", number + 50)
        if how == "names":
            mask(tmp_path / "a" / f"{number}_mask.png", number, kind)
        elif how == "endings":
            mask(tmp_path / "a" / f"{number}.png", number, kind)
        else:
            mask(tmp_path / "z" / f"m{number}.png", number, kind)
            mask(tmp_path / "y" / f"n{number}.png", number, kind)
    with pytest.raises(ResvitError, match=r"masks?|about the pictures") as caught:
        refuse_masks(tmp_path)
    assert caught.value.fix


@given(st.integers(0, 1 << 30), st.sampled_from(["L", "RGB", "I;16"]))
@settings(deadline=None, max_examples=30)
def test_photographs_are_no_masks(seed: int, mode: str) -> None:
    generator = np.random.default_rng(seed)
    root = Path(tempfile.mkdtemp())
    try:
        for number in range(COUNT):
            path = root / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            shape = (24, 24, 3) if mode == "RGB" else (24, 24)
            dtype = np.uint16 if mode == "I;16" else np.uint8
            values = np.clip(generator.normal(120, 40, shape), 0, 255).astype(dtype)
            Image.fromarray(values * 16 if mode == "I;16" else values).save(path)
        refuse_masks(root)
        assert opened(root) == "classification"
    finally:
        shutil.rmtree(root)
