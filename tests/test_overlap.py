"""Images that calibration and validation share, to the byte or nearly."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data import overlap as module
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.overlap import Overlap, overlap_of
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent
from resvit_export.cli.main import run
from resvit_export.records.verdict import VerdictRecord
from test_robustness import MODEL


def scene(seed: int) -> Image.Image:
    """A picture of its own: smooth colours, as photographs are."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(values).resize((384, 256), Image.Resampling.BICUBIC)


def folders(root: Path, calibration: list[bytes], validation: list[bytes]) -> tuple[str, str]:
    for part, files in (("calibration", calibration), ("validation", validation)):
        for number, data in enumerate(files):
            place = root / part / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03}.png").write_bytes(data)
    return str(root / "calibration"), str(root / "validation")


def coded(image: Image.Image, kind: str = "png", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def opened(places: tuple[str, str], reporter=None):
    spec = DataSpec(places[0], places[1], calibration_images=100)
    return open_image_sets(spec, Preprocess((32, 32), 3), reporter or Silent())


def test_the_same_picture_coded_or_sized_otherwise_is_found(tmp_path) -> None:
    shared = [scene(seed) for seed in range(4)]
    again = [
        coded(shared[0], "jpeg", quality=85),
        coded(shared[1].resize((640, 427), Image.Resampling.BICUBIC)),
        coded(Image.fromarray((np.asarray(shared[2], np.int16) + 3).clip(0, 255).astype(np.uint8))),
        coded(shared[3]),  # to the byte: left out of calibration
    ]
    calibration = [coded(one) for one in shared] + [coded(scene(seed)) for seed in range(100, 110)]
    validation = again + [coded(scene(seed)) for seed in range(200, 216)]
    found = overlap_of(*opened(folders(tmp_path, calibration, validation)))
    assert found == Overlap(exact=1, near=3, looked=20, calibration=13)
    assert found.sentence.startswith("3 of 20 validation images that were looked at show the same as one of 13")
    assert Overlap.from_json(found.to_json()) == found


def test_pictures_that_differ_in_one_place_are_different(tmp_path) -> None:
    """The same room with and without somebody in it: not a near-duplicate."""
    room = np.asarray(scene(0)).copy()
    other = room.copy()
    other[80:128, 120:168] = 255 - other[80:128, 120:168]
    calibration = [coded(Image.fromarray(room)), coded(scene(1))]
    validation = [coded(Image.fromarray(other)), coded(scene(2)), coded(scene(3))]
    found = overlap_of(*opened(folders(tmp_path, calibration, validation)))
    assert found == Overlap(0, 0, 3, 2)
    assert found.sentence == ""


def test_grey_and_colour_are_compared_as_pictures(tmp_path) -> None:
    grey = scene(0).convert("L")
    validation = [coded(grey.convert("RGB")), coded(scene(3))]
    found = overlap_of(*opened(folders(tmp_path, [coded(grey), coded(scene(1))], validation)))
    assert (found.near, found.exact) == (1, 0)


def test_of_many_validation_images_some_are_looked_at(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOOKED_AT", 10)
    validation = [coded(scene(seed)) for seed in range(200, 241)]
    found = overlap_of(*opened(folders(tmp_path, [coded(scene(0))], validation)))
    assert found.looked == 9  # every fifth of 41


def test_the_fast_comparison_finds_what_the_slow_one_does() -> None:
    random = np.random.default_rng(0)
    known = random.integers(0, 256, (40, 32, 32, 3)).astype(np.int16)
    for distance, near in ((8, True), (9, False)):
        for sign in (-1, 1):
            mark = known[7] + sign * distance  # every cell as far off as it may be
            assert module._alike(mark, known, module._coarse(known)) is near
            mark = known[7].copy()
            mark[3, 4, 1] += sign * distance
            assert module._alike(mark, known, module._coarse(known)) is near


def test_arrays_of_a_users_loader_are_not_pictures(tmp_path) -> None:
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def images(split):\n"
        "    for i in range(4):\n"
        "        seed = i + 10 * (split == 'validation')\n"
        "        values = np.random.default_rng(seed).normal(size=(2, 3, 32, 32)).astype(np.float32)\n"
        "        yield values, np.arange(2)\n"
    )
    sets = open_image_sets(DataSpec(f"{tmp_path / 'own.py'}:images"), Preprocess((32, 32), 3))
    assert overlap_of(*sets) == Overlap(0, 0, 0, 0)


@pytest.mark.parametrize("wrong", [{}, {"exact": -1, "near": 0, "looked": 0, "calibration": 0}, {"exact": "1"}])
def test_a_record_that_is_none(wrong) -> None:
    with pytest.raises(ResvitError):
        Overlap.from_json(wrong)


@pytest.mark.slow
def test_a_run_says_it_and_keeps_it(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calibration = [coded(scene(seed).convert("L")) for seed in range(40)]
    validation = [coded(scene(seed).convert("L").convert("RGB")) for seed in range(30, 70)]
    places = folders(Path("data"), calibration, validation)
    data = ["--data", places[0], "--validation-data", places[1]]
    settings = ["--target", "jetson-orin", "--task", "other", "--run", "runs/r"]
    code = run(["validate", *MODEL, *data, *settings])
    said = capfd.readouterr().err
    assert code in (0, 4, 5), said
    sentence = "10 of 40 validation images that were looked at show the same as one of 40 calibration images"
    assert said.count(sentence) == 1
    assert said.index(sentence) < said.index("calibrate:")
    verdict = next(Path("runs/r").glob("validate-*/verdict.json"))
    record = VerdictRecord.from_json(json.loads(verdict.read_bytes()))
    assert record.overlap == Overlap(0, 10, 40, 40)
    assert run(["report", "--run", "runs/r"]) == 0
    assert sentence in Path("runs/r/report.html").read_text()
