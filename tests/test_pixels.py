"""What a manifest's preprocessing says of an image is what the network was given, whatever the image came from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ResvitError
from test_data import Heard

Picture = tuple[Path, Image.Image]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def colours(seed: int, height: int = 24, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def deep(seed: int, most: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, most + 1, (24, 20)).astype(np.uint16))


FORMATS: dict[str, tuple[str, Callable[[int], Image.Image], dict[str, Any]]] = {
    "rgb": (".png", colours, {}),
    "grey": (".bmp", lambda seed: colours(seed).convert("L"), {}),
    "palette": (".png", lambda seed: colours(seed).quantize(17), {}),
    "gif": (".gif", lambda seed: colours(seed).quantize(200), {}),
    "alpha": (".png", lambda seed: colours(seed).convert("RGBA"), {}),
    "grey and alpha": (".png", lambda seed: colours(seed).convert("LA"), {}),
    "one bit": (".png", lambda seed: colours(seed).convert("1"), {}),
    "cmyk": (".jpg", lambda seed: colours(seed).convert("CMYK"), {}),
    "jpeg": (".jpg", colours, {"quality": 90}),
    "webp": (".webp", colours, {"lossless": True}),
    "16 bits": (".png", lambda seed: deep(seed, 65535), {}),
    "12 bits": (".tif", lambda seed: deep(seed, 4095), {}),
    **{f"orientation {n}": (".jpg", colours, {"exif": turned(n)}) for n in range(1, 9)},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "stretch": {},
    "crop": {"resize": "crop", "crop_fraction": 0.7, "interpolation": "bilinear"},
    "letterbox": {"resize": "letterbox", "pad_value": [114.0], "padding": "centre"},
    "as stored": {"exif": "ignore", "white": 4095, "channel_order": "bgr"},
}


def decoded(path: Path, said: dict[str, Any]) -> Image.Image:
    """The file's pixels, in the colours and the way round that the manifest says."""
    image: Image.Image = Image.open(path)
    if said["exif"] == "apply":
        turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}
        for turn in turns.get(image.getexif().get(0x0112, 1), []):
            image = image.transpose(Image.Transpose(turn))
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.minimum(np.floor(values * 256 / (said["white"] + 1)), 255).astype(np.uint8))
    if image.mode in ("LA", "1"):
        image = image.convert("L")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB").convert("L") if said["channels"] == 1 else image.convert("RGB")


def by_the_manifest(path: Path, said: dict[str, Any]) -> npt.NDArray[np.float32]:
    """An image as somebody prepares it who has read the manifest, and none of our code."""
    image = decoded(path, said)
    height, width = said["size"]
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    kind, left, top = filters[said["interpolation"]], 0, 0
    if said["resize"] == "stretch":
        image = image.resize((width, height), kind)
    elif said["resize"] == "crop":
        short = math.floor(min(height, width) / said["crop_fraction"])
        scale = short / min(image.size)
        image = image.resize(
            tuple(short if side == min(image.size) else int(side * scale) for side in image.size), kind
        )
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    elif said["resize"] == "letterbox":
        scale = min(height / image.height, width / image.width)
        image = image.resize((round(image.width * scale), round(image.height * scale)), kind)
        left, top = (width - image.width) // 2, (height - image.height) // 2
    pixels = np.asarray(image, np.float64)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    sheet = np.full((height, width, pixels.shape[2]), said["pad_value"], np.float64)
    if said["channel_order"] == "bgr":
        pixels = pixels[:, :, ::-1]
    if said["resize"] == "letterbox":
        sheet[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    else:
        sheet = pixels
    ready = (sheet / 255 - np.array(said["mean"])) / np.array(said["std"])
    return ready.transpose(2, 0, 1).astype(np.float32)


def given(images: ImageSet) -> npt.NDArray[np.float32]:
    return np.concatenate([batch.images for batch in images.batches(4)])


def opened(data: str, preprocess: Preprocess, validation: str | None = None) -> tuple[ImageSet, ImageSet, list[str]]:
    heard = Heard()
    spec = DataSpec(data, validation, calibration_images=4, validation_images=None, unlabelled=True)
    return *open_image_sets(spec, preprocess, heard), heard.warnings


@pytest.mark.whole
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_read_as_the_manifest_says(
    name: str, channels: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    ending, make, options = FORMATS[name]
    for index in range(8):
        (tmp_path / "data" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        make(index).save(tmp_path / "data" / str(index % 2) / f"{index}{ending}", **options)
    preprocess = Preprocess((16, 16), channels, mean=(0.4,), std=(0.2,), **settings)
    # In classes, and no masks: few colours would be taken for them.
    _, images, _ = opened(f"folder:{tmp_path / 'data'}", preprocess)
    said = json.loads(json.dumps(images.preprocess.to_json()))
    own = {path.name: by_the_manifest(path, said) for path in (tmp_path / "data").rglob(f"*{ending}")}
    for one in given(images):
        nearest = min(float(np.abs(one - other).max()) for other in own.values())
        assert nearest < 1e-5


@pytest.mark.parametrize("size", [28, 20])
def test_arrays_are_read_as_the_manifest_says_also_where_a_crop_is_skipped(size: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, size, size, 3), np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.arange(12) % 2)
    preprocess = Preprocess((20, 20), 3, "crop", 0.7, mean=(0.4,), std=(0.2,))
    _, images, warned = opened(str(tmp_path / "d.npz"), preprocess)
    assert any("used whole" in text for text in warned) is (size == 20)
    said, own = images.preprocess.to_json(), []
    for index, image in enumerate(pixels):
        path = tmp_path / f"{index}.png"
        Image.fromarray(image).save(path)
        own.append(by_the_manifest(path, said))
    for one in given(images):
        assert min(float(np.abs(one - other).max()) for other in own) < 1e-5


def test_that_one_side_is_cut_and_the_other_is_not_is_said(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "d.npz",
        images=np.zeros((4, 20, 20, 3), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None],
    )
    for index in range(4):
        (tmp_path / "v" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        colours(index).save(tmp_path / "v" / str(index % 2) / f"{index}.png")
    preprocess = Preprocess((20, 20), 3, "crop", 0.7)
    calibration, validation, warned = opened(str(tmp_path / "d.npz"), preprocess, str(tmp_path / "v"))
    assert (calibration.preprocess.resize, validation.preprocess.resize) == ("none", "crop")
    assert any("the calibration images" in text and "do not show the same" in text for text in warned)


def test_what_a_loader_made_is_not_described(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def made(split):\n"
        "    for i in range(4):\n"
        "        yield np.full((1, 1, 8, 8), i + (split == 'validation') / 2, np.float32), np.array([i % 2])\n"
    )
    calibration, validation, _ = opened(f"{tmp_path / 'own.py'}:made", Preprocess((8, 8), 1))
    assert calibration.prepared
    assert validation.prepared


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_turned_images_are_counted_and_can_be_read_either_way(exif: Any, tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / "data" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        options = {"exif": turned(6)} if index < 5 else {}
        colours(index).save(tmp_path / "data" / str(index % 2) / f"{index}.jpg", **options)
    *_, warned = opened(str(tmp_path / "data"), Preprocess((16, 16), 3, exif=exif))
    (said,) = [text for text in warned if "EXIF" in text]
    assert said.startswith("5 of 8 images have an EXIF orientation")
    assert f"exif={'ignore' if exif == 'apply' else 'apply'}" in said


def annotated(root: Path, height: int, width: int) -> str:
    """Four images on their side, annotated as ``height`` by ``width``."""
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (root / "images").mkdir(parents=True)
    for index in range(4):
        colours(index, 24, 20).save(root / "images" / f"{index}.jpg", exif=turned(6))
        document["images"].append({"id": index, "file_name": f"{index}.jpg", "height": height, "width": width})
        box = {"id": index, "image_id": index, "category_id": 1, "bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0}
        document["annotations"].append(box)
    (root / "annotations.json").write_text(json.dumps(document))
    return str(root)


@pytest.mark.parametrize(("stored", "right"), [(True, "ignore"), (False, "apply")])
def test_boxes_that_lie_on_the_image_the_other_way_round_name_the_setting(
    stored: bool, right: Any, tmp_path: Path
) -> None:
    data = annotated(tmp_path / "coco", *((24, 20) if stored else (20, 24)))
    wrong: Any = "apply" if right == "ignore" else "ignore"
    assert given(opened(data, Preprocess((16, 16), 3, exif=right))[1]).shape[1:] == (3, 16, 16)
    with pytest.raises(ResvitError, match="EXIF orientation") as refused:
        given(opened(data, Preprocess((16, 16), 3, exif=wrong))[1])
    assert f"--preprocess exif={right}" in refused.value.fix


@pytest.mark.parametrize(("most", "white", "doubted"), [(65535, 4095, True), (4095, 255, True), (4095, 3500, False)])
def test_a_white_that_cuts_most_off_proves_nothing(most: int, white: int, doubted: bool, tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / "data" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        deep(index, most).save(tmp_path / "data" / str(index % 2) / f"{index}.png")
    _, images, warned = opened(str(tmp_path / "data"), Preprocess((16, 16), 1, white=white))
    assert any("is cut off" in text for text in warned)
    assert (f"say --preprocess white={most}" in images.doubt) == doubted


@pytest.mark.parametrize(("most", "white", "says"), [
    (4095, 65535, "hold 12 bits, say --preprocess white=4095"),
    (16383, 65535, "hold 14 bits, say --preprocess white=16383"),
    (4095, 4095, ""),
    (65535, 65535, ""),
    (65535, 4095, "above white=4095 is cut off"),
])  # fmt: skip
def test_images_of_fewer_bits_than_their_file_are_not_black_in_silence(
    most: int, white: int, says: str, tmp_path: Path
) -> None:
    for index in range(6):
        (tmp_path / "data" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        deep(index, most).save(tmp_path / "data" / str(index % 2) / f"{index}.png")
    _, images, warned = opened(str(tmp_path / "data"), Preprocess((16, 16), 1, white=white))
    about = [text for text in warned if "16-bit" in text]
    assert (says in about[0]) if says else not about
    if not says:
        assert float(given(images).max()) > 0.9


@pytest.mark.parametrize(
    "settings", [{"exif": "turn"}, {"white": 0}, {"white": 70000}, {"white": 1.5}, {"white": True}]
)
def test_settings_that_no_image_has_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ResvitError, match="preprocessing's"):
        Preprocess((8, 8), 3, **settings)
