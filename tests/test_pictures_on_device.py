"""A picture that a device prepares by the manifest alone is, bit for bit, what the host validated."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from resvit_calibrate.answers.classes import compare
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.gate.gate import VerdictKind, judge
from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.cli.main import run as engine_cli
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.pictures.decode import Decoding, decode, deep_values, header_of
from resvit_engines.run.prepared import images_from, listed
from test_data import Heard
from test_numbering import predictions
from test_pixels import FORMATS, SETTINGS, colours, deep, given, turned

Values = npt.NDArray[Any]


def encoded(image: Image.Image, ending: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, Image.registered_extensions()[ending], **options)
    return stream.getvalue()


def png16(values: Values) -> bytes:
    """A PNG of 16 bits: grey, grey with alpha, RGB or RGBA, which Pillow does not write."""
    height, width, channels = values.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff16(values: Values, order: str) -> bytes:
    """An uncompressed RGB TIFF of 16 bits, in either order of bytes."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    entries = [(256, 4, width), (257, 4, height), (258, 3, None), (259, 3, 1), (262, 3, 2), (273, 4, None)]
    entries += [(277, 3, channels), (278, 4, height), (279, 4, len(pixels)), (284, 3, 1)]
    bits = 8 + 2 + 12 * len(entries) + 4
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    for tag, kind, value in entries:
        if value is None:
            data += struct.pack(f"{order}HHII", tag, kind, 3 if tag == 258 else 1, bits + 6 * (tag == 273))
        elif kind == 3:
            data += struct.pack(f"{order}HHIHH", tag, kind, 1, value, 0)
        else:
            data += struct.pack(f"{order}HHII", tag, kind, 1, value)
    return data + struct.pack(f"{order}IHHH", 0, 16, 16, 16) + pixels


def stored(seed: int, most: int, channels: int = 1) -> Values:
    """Pixels [24, 20, C] of more than 8 bits, of which the darkest is 0 and the brightest ``most``."""
    values = np.random.default_rng(seed).integers(0, most + 1, (24, 20, channels)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, most
    return values


def plain(values: Values) -> Image.Image:
    return Image.fromarray(values[:, :, 0])


DEEP: dict[str, tuple[str, Callable[[int, int], bytes]]] = {
    "grey PNG": (".png", lambda seed, most: png16(stored(seed, most))),
    "grey PNG with alpha": (".png", lambda seed, most: png16(stored(seed, most, 2))),
    "colour PNG": (".png", lambda seed, most: png16(stored(seed, most, 3))),
    "colour PNG with alpha": (".png", lambda seed, most: png16(stored(seed, most, 4))),
    "grey TIFF": (".tif", lambda seed, most: encoded(plain(stored(seed, most)), ".tif")),
    "packed grey TIFF": (".tif", lambda seed, most: encoded(plain(stored(seed, most)), ".tif", compression="tiff_lzw")),
    "32-bit TIFF": (".tif", lambda seed, most: encoded(plain(stored(seed, most).astype(np.int32)), ".tif")),
    "colour TIFF": (".tif", lambda seed, most: tiff16(stored(seed, most, 3), "<")),
    "colour TIFF, high byte first": (".tiff", lambda seed, most: tiff16(stored(seed, most, 3), ">")),
}
FILES: dict[str, tuple[str, Callable[[int], bytes]]] = {
    name: (ending, lambda seed, make=make, ending=ending, options=options: encoded(make(seed), ending, **options))  # type: ignore[misc]
    for name, (ending, make, options) in FORMATS.items()
}
FILES |= {name: (ending, lambda seed, make=make: make(seed, 4095)) for name, (ending, make) in DEEP.items()}  # type: ignore[misc]
FILES["palette with a hole"] = (".png", lambda seed: encoded(colours(seed).quantize(17), ".png", transparency=b"\x80"))
FILES["turned PNG"] = (".png", lambda seed: encoded(colours(seed), ".png", exif=turned(6)))
FILES["turned TIFF"] = (".tif", lambda seed: encoded(colours(seed), ".tif", exif=turned(8)))


def folders(root: Path, ending: str, make: Callable[[int], bytes], count: int = 8) -> str:
    for index in range(count):
        place = root / "data" / str(index % 2) / f"{index}{ending}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(make(index))
    return f"folder:{root / 'data'}"


def sets_of(data: str, preprocess: Preprocess, said: Sequence[str] = ()) -> tuple[tuple[ImageSet, ImageSet], list[str]]:
    heard = Heard()
    spec = DataSpec(data, calibration_images=4, unlabelled=True, said=frozenset(said))
    return open_image_sets(spec, preprocess, heard), heard.warnings


def said_of(images: ImageSet) -> Any:
    return json.loads(json.dumps(images.preprocess.to_json()))


def require_same(images: ImageSet, files: Sequence[Path]) -> None:
    """Every image that the host validated is one of these files as the device prepares it, to the last bit."""
    made = {images_from(file, said_of(images))[0].tobytes() for file in files}
    assert {image.tobytes() for image in given(images)} <= made


@pytest.mark.whole
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_the_device_prepares_every_kind_of_file_as_the_host_did(
    name: str, channels: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    ending, make = FILES[name]
    data = folders(tmp_path, ending, make)
    preprocess = Preprocess((16, 16), channels, mean=(0.4,), std=(0.2,), **settings)
    (_, images), _ = sets_of(data, preprocess)
    require_same(images, sorted((tmp_path / "data").rglob(f"*{ending}")))
    # A folder gives the same as its files one by one, in the order of their names.
    together = images_from(tmp_path / "data" / "0", said_of(images))
    names = listed(tmp_path / "data" / "0").files
    assert [file.name for file in names] == sorted(file.name for file in names)
    one_by_one = [images_from(file, said_of(images)) for file in names]
    np.testing.assert_array_equal(together, np.concatenate(one_by_one))


def coco(root: Path, size: tuple[int, int], sizes: Sequence[tuple[int, int]], orientation: int) -> str:
    """Four images of ``size`` (height, width) as stored, annotated with ``sizes``."""
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (root / "images").mkdir(parents=True)
    for index, (height, width) in enumerate(sizes):
        colours(index, *size).save(root / "images" / f"{index}.png", exif=turned(orientation))
        entry = {"id": index, "file_name": f"{index}.png"}
        document["images"].append(entry | ({"height": height, "width": width} if height else {}))
        box = {"id": index, "image_id": index, "category_id": 1, "bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0}
        document["annotations"].append(box)
    (root / "annotations.json").write_text(json.dumps(document))
    return str(root)


def paired(root: Path, other: str, orientation: int) -> str:
    """Images, turned, beside masks or depths of the images as they are stored."""
    for index in range(8):
        for folder in ("images", other):
            (root / folder).mkdir(parents=True, exist_ok=True)
        colours(index).save(root / "images" / f"{index}.png", exif=turned(orientation))
        values = np.random.default_rng(index).integers(0, 3, (24, 20)).astype(np.uint8)
        beside = Image.fromarray(values if other == "masks" else (values.astype(np.uint16) + 1) * 1000)
        beside.save(root / other / f"{index}.png")
    return str(root)


@pytest.mark.parametrize("kind", ["coco", "masks", "depth"])
def test_so_it_does_for_images_with_boxes_masks_and_depths(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "d"
    data = coco(root, (24, 20), [(24, 20)] * 4, 6) if kind == "coco" else paired(root, kind, 6)
    (_, images), _ = sets_of(data, Preprocess((16, 16), 3, "letterbox", exif="ignore"))
    require_same(images, sorted((root / "images").iterdir()))


@pytest.mark.parametrize("size", [28, 20])
@pytest.mark.parametrize("kind", ["uint8", "uint16", ">u2", "float32", "float64", "float16"])
def test_so_it_does_for_arrays(kind: str, size: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((12, size, size, 3))
    wide = values if kind.startswith("float") else values * (255 if kind == "uint8" else 4095)
    np.savez(tmp_path / "d.npz", images=wide.astype(kind), labels=np.arange(12) % 2)
    white = 4095 if kind in ("uint16", ">u2") else 65535
    preprocess = Preprocess((20, 20), 3, "crop", 0.7, mean=(0.4,), std=(0.2,), white=white)
    (_, images), warned = sets_of(str(tmp_path / "d.npz"), preprocess)
    assert any("recorded as white=1" in text for text in warned) is kind.startswith("float")
    made = {image.tobytes() for image in images_from(tmp_path / "d.npz", said_of(images))}
    assert {image.tobytes() for image in given(images)} <= made


@pytest.mark.slow
def test_so_it_does_for_the_data_of_the_examples() -> None:
    from resvit_calibrate.readers.fashion_mnist import read_split

    heard = Heard()
    spec = DataSpec("fashion-mnist", calibration_images=4, validation_images=20)
    _, images = open_image_sets(spec, Preprocess((32, 32), 1, "letterbox", interpolation="bilinear"), heard)
    device = Preprocess.from_json(said_of(images))
    made = {device.prepare(encoded(Image.fromarray(image), ".png")).tobytes() for image in read_split("test")[0]}
    assert {image.tobytes() for image in given(images)} <= made


@pytest.mark.whole
@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("name", DEEP)
def test_few_bits_in_sixteen_are_read_rightly_or_in_doubt(name: str, bits: int, tmp_path: Path) -> None:
    ending, make = DEEP[name]
    most = (1 << bits) - 1
    data = folders(tmp_path, ending, lambda seed: make(seed, most))
    (_, dark), _ = sets_of(data, Preprocess((24, 20), 3))
    assert f"say --preprocess white={most}" in dark.doubt
    (_, right), _ = sets_of(data, Preprocess((24, 20), 3, white=most), ["white"])
    assert right.doubt == ""
    for index in range(8):
        values = deep_values((tmp_path / "data" / str(index % 2) / f"{index}{ending}").read_bytes())
        assert values is not None
        assert (int(values.min()), int(values.max())) == (0, most)
    assert float(given(right).max()) == 1.0
    assert abs(float(given(right).mean()) - 0.5) < 0.05
    # Who says that they are that dark is believed.
    assert sets_of(data, Preprocess((24, 20), 3), ["white"])[0][1].doubt == ""


def test_a_bright_image_does_not_hide_that_the_others_are_dark(tmp_path: Path) -> None:
    data = folders(tmp_path, ".png", lambda seed: png16(stored(seed, 65535 if seed == 3 else 4095)), 20)
    (_, images), _ = sets_of(data, Preprocess((24, 20), 1))
    assert "nine of ten of the 16-bit images reach 4095" in images.doubt


def test_arrays_of_few_bits_are_in_doubt_too(tmp_path: Path) -> None:
    values = np.stack([stored(seed, 4095) for seed in range(12)])
    np.savez(tmp_path / "d.npz", images=values, labels=np.arange(12) % 2)
    assert "white=4095" in sets_of(str(tmp_path / "d.npz"), Preprocess((24, 20), 1))[0][1].doubt


def test_images_in_doubt_are_never_accepted() -> None:
    truth = np.arange(400) % 10
    comparison = compare(predictions(truth, truth), predictions(truth, truth))
    assert judge(comparison, 1.0).kind is VerdictKind.ACCEPTED
    verdict = judge(comparison, 1.0, doubt="say --preprocess white=4095")
    assert verdict.kind is VerdictKind.UNDECIDED
    assert "white=4095" in verdict.reason


@pytest.mark.parametrize(("low", "high", "white", "says"), [
    (0.0, 1.0, 65535, ""),
    (0.0, 255.0, 65535, "white=255"),
    (0.0, 4095.0, 65535, "white=4095"),
    (-2.0, 2.0, 65535, "normalised"),
    (0.0, 255.0, 255, ""),
    (0.0, 1.0, 255, "where 255 should be white"),
    (0.0, 255.0, 1, "where 1 should be white"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["tiff", "npz"])
def test_floating_point_images_are_read_rightly_or_refused(
    kind: str, low: float, high: float, white: int, says: str, tmp_path: Path
) -> None:
    values = np.linspace(low, high, 8 * 24 * 20, dtype=np.float32).reshape(8, 24, 20)
    values[:, 0, 0], values[:, 0, 1] = low, high
    if kind == "tiff":
        data = folders(tmp_path, ".tif", lambda seed: encoded(Image.fromarray(values[seed]), ".tif"))
    else:
        np.savez(tmp_path / "d.npz", images=values, labels=np.arange(8) % 2)
        data = str(tmp_path / "d.npz")
    preprocess = Preprocess((24, 20), 1, white=white)
    if says:
        with pytest.raises(ResvitError) as refused:
            given(sets_of(data, preprocess)[0][1])
        assert says in refused.value.problem + refused.value.fix
        return
    (_, images), _ = sets_of(data, preprocess)
    assert images.preprocess.white == (1 if white == 65535 else white)
    right = {np.floor(image / high * 255 + 0.5).astype(np.uint8).tobytes() for image in values.astype(np.float64)}
    assert {np.rint(image * 255).astype(np.uint8).tobytes() for image in given(images)} <= right


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".tif", ".png", ".jpg"])
def test_ignored_orientations_leave_pixels_as_they_are_stored(ending: str, orientation: int) -> None:
    """Pillow turns a TIFF by itself."""
    image = colours(1)
    data = encoded(image, ending, exif=turned(orientation))
    as_stored = decode(encoded(image, ending))
    np.testing.assert_array_equal(decode(data, Decoding(upright=False)), as_stored)
    assert (header_of(data).height, header_of(data).width, header_of(data).orientation) == (24, 20, orientation)
    shape = decode(data).shape[:2]
    assert shape == ((20, 24) if orientation >= 5 else (24, 20))


@pytest.mark.parametrize(("size", "orientation", "annotated"), [
    ((24, 20), 3, (24, 20)),  # on its head: the size is the same either way
    ((24, 24), 6, (24, 24)),
    ((24, 20), 6, (0, 0)),  # no size is given
])  # fmt: skip
def test_boxes_that_may_lie_either_way_are_in_doubt_until_it_is_said(
    size: tuple[int, int], orientation: int, annotated: tuple[int, int], tmp_path: Path
) -> None:
    data = coco(tmp_path / "d", size, [annotated] * 4, orientation)
    assert "exif=ignore if as stored" in sets_of(data, Preprocess((16, 16), 3))[0][1].doubt
    assert sets_of(data, Preprocess((16, 16), 3), ["exif"])[0][1].doubt == ""


def test_sizes_of_some_tell_for_all_and_both_ways_at_once_are_refused(tmp_path: Path) -> None:
    data = coco(tmp_path / "a", (24, 20), [(20, 24), (0, 0), (20, 24), (0, 0)], 6)
    assert sets_of(data, Preprocess((16, 16), 3))[0][1].doubt == ""
    both = coco(tmp_path / "b", (24, 20), [(20, 24), (24, 20), (20, 24), (24, 20)], 6)
    with pytest.raises(ResvitError, match="2 are annotated upright and 2 as they are stored"):
        sets_of(both, Preprocess((16, 16), 3))


@pytest.mark.parametrize("other", ["masks", "depth"])
def test_masks_the_other_way_round_name_the_setting(other: str, tmp_path: Path) -> None:
    with pytest.raises(ResvitError) as refused:
        sets_of(paired(tmp_path / "d", other, 6), Preprocess((16, 16), 3))
    assert "--preprocess exif=ignore" in refused.value.fix


def test_pictures_of_a_makers_own_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(colours(0), ".png"))
    for said, name in (({"factory": "own.py:made"}, "own.py:made"), (None, "does not name")):
        with pytest.raises(ResvitError, match=name) as refused:
            images_from(tmp_path / "a.png", said)
        assert ".npy" in refused.value.fix
    ready = np.zeros((2, 3, 8, 8), np.float32)
    np.save(tmp_path / "x.npy", ready)
    np.testing.assert_array_equal(images_from(tmp_path / "x.npy", {"factory": "own.py:made"}), ready)


def test_a_loader_is_named_in_the_set(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def made(split):\n"
        "    for i in range(4):\n"
        "        yield np.full((1, 1, 8, 8), i + (split == 'validation') / 2, np.float32), np.array([i % 2])\n"
    )
    (_, validation), _ = sets_of(f"{tmp_path / 'own.py'}:made", Preprocess((8, 8), 1))
    assert validation.factory == "own.py:made"


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.png", b"no picture", "cannot be read as a picture"),
    ("a.png", b"", "the file is empty"),
    ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "recognised"),
    ("a.npz", b"PK\3\4", "npz"),
    ("a.txt", b"x", "holds no pictures, but a.txt"),
    ("a.png", encoded(Image.fromarray(np.full((9, 9), 0.5, np.float32)), ".tif"), "which value is white"),
    ("a.png", encoded(colours(0), ".png")[:60], "cannot be read as a picture"),
])  # fmt: skip
def test_what_cannot_be_prepared_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    source = tmp_path / name if name.endswith("npz") else tmp_path
    with pytest.raises(ResvitError, match=says) as refused:
        images_from(source, Preprocess((8, 8)).to_json())
    assert refused.value.code is ExitCode.INPUT


@pytest.mark.parametrize("entry", [{}, {"size": 5}, {"size": [8, 8], "resize": "fold"}, {"size": [8, 8], "new": 1}])
def test_a_preprocessing_that_is_none_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(colours(0), ".png"))
    with pytest.raises(ResvitError, match="preprocessing"):
        images_from(tmp_path, entry)


def test_many_pictures_are_refused_before_memory_ends(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(colours(0), ".png"))
    with pytest.raises(ResvitError, match="GiB"):
        images_from(tmp_path, Preprocess((60000, 60000)).to_json())


def test_without_pillow_arrays_work_and_pictures_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(colours(0), ".png"))
    np.savez(tmp_path / "same.npz", images=np.arange(128, dtype=np.uint8).reshape(2, 8, 8))
    np.savez(tmp_path / "larger.npz", images=np.arange(162, dtype=np.uint8).reshape(2, 9, 9))
    np.save(tmp_path / "x.npy", np.ones((1, 3, 8, 8), np.float32))
    said = Preprocess((8, 8), mean=(0.4,), std=(0.2,)).to_json()
    right = {name: images_from(tmp_path / f"{name}.npz", said) for name in ("same", "larger")}
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ResvitError, match="Pillow, which is not installed") as refused:
        images_from(tmp_path / "a.png", said)
    assert refused.value.code is ExitCode.MISSING
    for name, images in right.items():
        np.testing.assert_array_equal(images_from(tmp_path / f"{name}.npz", said), images)
    assert images_from(tmp_path / "x.npy", said).shape == (1, 3, 8, 8)


def test_run_answers_for_pictures_by_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from resvit_engines.bundle.bundle import write_bundle
    from resvit_engines.targets.table import find_target
    from test_run import MANIFEST, by_numpy, small_model
    from test_signing import KEY

    monkeypatch.chdir(tmp_path)
    preprocess = Preprocess((8, 8), mean=(0.4,), std=(0.2,), exif="ignore", white=4095)
    model = small_model(tmp_path / "net.onnx")
    told = {"yes": preprocess.to_json(), "no": {"factory": "own.py:made"}}
    for name, said in told.items():
        manifest = dataclasses.replace(MANIFEST, target=find_target("l4"), preprocess=said)
        write_bundle(tmp_path / f"{name}.resvit", manifest, {"model.onnx": model}, KEY)
    Path("release.pub").write_text(KEY.public.to_text())
    Path("release.pub").chmod(0o644)
    Path("photos").mkdir()
    for index in range(6):
        colours(index).save(f"photos/{index}.png", exif=turned(6))
    deep(7, 4095).save("photos/7.png")
    Path("photos/list.txt").write_text("none")
    line = ["--input", "photos", "--output", "y.npy", "--trust", "release.pub", "--runtime", "onnxruntime", "--json"]
    assert engine_cli(["run", "yes.resvit", *line]) == 0
    done = json.loads(capfd.readouterr().out)
    assert done["files"] == [f"photos/{index}.png" for index in (0, 1, 2, 3, 4, 5, 7)]
    assert done["left_out"] == ["list.txt"]
    prepared = np.stack([preprocess.prepare(Path(file).read_bytes()) for file in done["files"]])
    np.testing.assert_allclose(np.load("y.npy"), by_numpy(model, prepared), atol=1e-4)
    assert engine_cli(["run", "no.resvit", *line]) == ExitCode.INPUT
    assert "own.py:made" in capfd.readouterr().err
