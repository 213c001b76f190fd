"""The C++ runtime against Python's: frames prepared, outputs read and engines run with the same bytes as result.

Compiled with the address and undefined-behaviour sanitizers, and with the thread sanitizer, which end a program at its
first fault, over stand-ins for TensorRT and CUDA.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import resvit_engines
from conftest import ROOT
from cuda_standin import FakeCuda, FakeTensorRT
from engine_reports import engine_report
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import extract_bundle, write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles, ImageCount, ManifestVerdict
from resvit_engines.bundle.unpacked import read_trusted_folder
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes
from resvit_engines.pictures.encoding import InputEncoding
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.pictures.sizes import SizeRange
from resvit_engines.program.frames import Placement
from resvit_engines.program.reading import reading_of
from resvit_engines.records import Record
from resvit_engines.run import engine_runner
from resvit_engines.run import runner as run
from resvit_engines.run.cuda import Cuda
from resvit_engines.targets.table import Builder, find_target
from resvit_engines.trt.io_tensor import IoTensor
from runtime_driver import Harness, PlanEngine, compiled, written
from test_signing import KEY, TRUST, signing_key

pytestmark = pytest.mark.slow  # Compiling with sanitizers takes a minute.

SOURCE = ROOT / "engines/runtime"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(compiled(tmp_path_factory.mktemp("runtime"), "address"))


# Frames


class Case:
    """A way to prepare, a frame, and what Python makes of it."""

    def __init__(
        self, folder: Path, number: int, settings: dict[str, Any], frame: np.ndarray, spare: int = 0, order: str = "rgb"
    ) -> None:
        self.settings, self.frame, self.order = settings, frame, order
        rows = np.pad(frame.reshape(len(frame), -1), ((0, 0), (0, spare)), constant_values=7)
        names = [folder / f"{number}.{end}" for end in ("json", "rgb", "f32")]
        names[0].write_text(json.dumps(settings))
        names[1].write_bytes(rows.tobytes())
        height, width, channels = frame.shape
        self.line = f"prepare {names[0]} {names[2]} {names[1]} {height} {width} {channels} {spare} {order}"
        self.out = names[2]

    def check(self, answer: str) -> None:
        frame = self.frame[:, :, ::-1] if self.order == "bgr" else self.frame
        wanted = PicturePreprocess.from_json(self.settings).apply(frame)
        assert answer == "ok " + " ".join(map(str, wanted.shape)), (answer, self.settings)
        found = np.frombuffer(self.out.read_bytes(), np.float32).reshape(wanted.shape)
        assert found.tobytes() == wanted.tobytes(), (self.settings, self.frame.shape, np.abs(found - wanted).max())


def settings_of(dice: random.Random) -> dict[str, Any]:
    channels = dice.choice([1, 3, 3])

    def values(low: float, high: float) -> list[float]:
        return [dice.uniform(low, high) for _ in range(dice.choice([1, channels]))]

    said: dict[str, Any] = {"size": [dice.randint(1, 60), dice.randint(1, 60)], "channels": channels}
    options = {
        "resize": dice.choice(["stretch", "crop", "letterbox"]),
        "interpolation": dice.choice(["nearest", "bilinear", "bicubic", "lanczos"]),
        "crop_fraction": dice.choice([1.0, 0.875, 0.9, dice.uniform(0.2, 1.0)]),
        "mean": values(0, 1),
        "std": values(0.1, 1),
        "channel_order": dice.choice(["rgb", "bgr"]),
        "padding": dice.choice(["end", "centre"]),
        "pad_value": values(0, 255),
        "exif": "ignore",
        "white": 4095,
    }
    return said | {name: value for name, value in options.items() if dice.random() < 0.8}


def frame_of(dice: random.Random, size: Sequence[int]) -> np.ndarray:
    noise = np.random.default_rng(dice.randrange(1 << 30))
    height, width = dice.choice(
        [(dice.randint(1, 90), dice.randint(1, 90)), tuple(size), (dice.randint(1, 3), dice.randint(80, 300)),
         (dice.randint(80, 300), dice.randint(1, 3)), (size[0], dice.randint(1, 90))]
    )  # fmt: skip
    shape = (height, width, dice.choice([1, 3]))
    edges = noise.integers(0, 2, shape) * 255  # overshoot of the filters is cut at black and white
    return (edges if dice.random() < 0.3 else noise.integers(0, 256, shape)).astype(np.uint8)


def test_random_frames_are_prepared_byte_for_byte_alike(harness: Harness, tmp_path: Path) -> None:
    dice = random.Random(20)
    cases = []
    for number in range(600):
        settings = settings_of(dice)
        frame, order = frame_of(dice, settings["size"]), dice.choice(["rgb", "bgr"])
        order = order if frame.shape[2] == 3 else "rgb"
        cases.append(Case(tmp_path, number, settings, frame, dice.choice([0, 0, 5]), order))
    for case, answer in zip(cases, harness([case.line for case in cases]), strict=True):
        case.check(answer)


def test_the_usual_sizes_of_cameras(harness: Harness, tmp_path: Path) -> None:
    frame = np.random.default_rng(1).integers(0, 256, (1080, 1920, 3)).astype(np.uint8)
    usual = {"size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    ways = [
        {**usual, "resize": "crop", "crop_fraction": 0.875, "interpolation": "bicubic"},
        {**usual, "size": [640, 640], "resize": "letterbox", "padding": "centre", "pad_value": [114.0]},
        {**usual, "resize": "stretch", "interpolation": "lanczos", "channel_order": "bgr"},
    ]
    cases = [Case(tmp_path, number, way, frame) for number, way in enumerate(ways)]
    for case, answer in zip(cases, harness([case.line for case in cases]), strict=True):
        case.check(answer)


@pytest.mark.parametrize(
    "change",
    [
        {"size": None}, {"size": [0, 4]}, {"size": [4]}, {"size": [4.5, 4]}, {"size": "4x4"}, {"channels": 0},
        {"channels": True}, {"resize": "squash"}, {"resize": 1}, {"interpolation": "box"}, {"crop_fraction": 0},
        {"crop_fraction": 1.5}, {"mean": [0.1, 0.2]}, {"mean": "x"}, {"mean": 0.5}, {"std": [0.0]}, {"std": []},
        {"pad_value": [300]}, {"channel_order": "gbr"}, {"padding": "left"}, {"exif": "maybe"}, {"white": 0},
        {"white": 70_000}, {"surprise": 1}, {"resize": "none", "size": [5, 5]}, {"channels": 4},
    ],
)  # fmt: skip
def test_what_python_refuses_is_refused(harness: Harness, tmp_path: Path, change: dict[str, Any]) -> None:
    settings = {name: value for name, value in {"size": [4, 4], **change}.items() if value is not None}
    case = Case(tmp_path, 0, settings, np.zeros((4, 6, 3), np.uint8))
    (answer,) = harness([case.line])
    assert answer.startswith("error 3 "), answer
    with pytest.raises(ResvitError):
        PicturePreprocess.from_json(settings).apply(case.frame)


def test_json_that_is_none(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "frame").write_bytes(bytes(48))
    deep = b'{"size": ' + b"[" * 100 + b"]" * 100 + b"}"
    texts = [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000, deep, b'{"size": 1e999}']
    lines = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}").write_bytes(text)
        lines.append(f"prepare {tmp_path / str(number)} {tmp_path / 'out'} {tmp_path / 'frame'} 4 4 3 0 rgb")
    assert all(answer.startswith("error 3 ") for answer in harness(lines))


# Answers


def said_of(task: str, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The part of a manifest that says how outputs are read."""
    names = ["cat", "dog", "Wolf \u00e4", "cow"]
    answers = {"options": options, "classes": 4, "class_ids": [3, 7, 9, 12], **more}
    return {"verdict": "accepted", "task": task, "class_names": names, "answers": answers}


def outputs_of(noise: np.random.Generator, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: (noise.standard_normal(shape) * 3).astype(np.float32) for name, shape in shapes.items()}


Made = Callable[[np.random.Generator, tuple[int, int]], dict[str, np.ndarray]]


def likely(noise: np.random.Generator, boxes: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    corners = noise.random((2, boxes, 4)).astype(np.float32) * np.array([*size[::-1]] * 2, np.float32)
    corners[:, :, 2:] += corners[:, :, :2] / 2
    return {"boxes": corners, "scores": noise.random((2, boxes, 4)).astype(np.float32) ** 2}


READ: dict[str, tuple[dict[str, Any], Made]] = {
    "scores of classes": (said_of("classification", {}), lambda noise, size: outputs_of(noise, logits=(2, 4))),
    "many classes": (said_of("classification", {}), lambda noise, size: outputs_of(noise, out=(2, 1000))),
    "probabilities": (
        said_of("classification", {}),
        lambda noise, size: {"logits": np.full((2, 300), 1 / 300, np.float32)},
    ),
    "boxes": (said_of("detection", {}), lambda noise, size: likely(noise, 40, size)),
    "boxes without suppression": (
        said_of("detection", {"nms_iou": 1, "top_k": 30, "score_threshold": 0.2, "class_numbers": "id"}),
        lambda noise, size: likely(noise, 40, size),
    ),
    "boxes by numbers": (
        said_of("detection", {"class_numbers": "id", "shown": 0.5}),
        lambda noise, size: likely(noise, 9, size),
    ),
    "queries, softmax": (
        said_of("detection", {}),
        lambda noise, size: outputs_of(noise, pred_boxes=(2, 30, 4), logits=(2, 30, 5)),
    ),
    "queries, sigmoid, suppressed": (
        said_of("detection", {"nms_iou": 0.4, "shown": 0.1}),
        lambda noise, size: outputs_of(noise, pred_boxes=(2, 2000, 4), logits=(2, 2000, 4)),
    ),
    "named otherwise": (
        said_of("detection", {"boxes": "b", "scores": "s", "activation": "sigmoid", "box_format": "cxcywh"}),
        lambda noise, size: outputs_of(noise, b=(2, 20, 4), s=(2, 20, 4), x=(2, 3)),
    ),
    "masks": (said_of("segmentation", {}), lambda noise, size: outputs_of(noise, m=(2, 4, *size))),
    "coarse masks": (
        said_of("segmentation", {"output": "m"}),
        lambda noise, size: outputs_of(noise, x=(2, 1, 2, 2), m=(2, 5, size[0] // 4, size[1] // 4)),
    ),
    "class numbers": (
        said_of("segmentation", {}),
        lambda noise, size: {"m": noise.integers(0, 30, (2, *size)).astype(np.int32)},
    ),
    "FP16 masks": (
        said_of("segmentation", {}),
        lambda noise, size: {"m": noise.standard_normal((2, 3, size[0] // 2, size[1] // 2)).astype(np.float16)},
    ),
    "depths": (said_of("depth", {}), lambda noise, size: {"d": noise.random((2, 1, *size)).astype(np.float32)}),
    "coarse inverse depths": (
        said_of("depth", {"inverted": True, "max_depth": 80, "min_depth": 0.5}),
        lambda noise, size: {"d": noise.random((2, size[0] // 4, size[1] // 4)).astype(np.float16)},
    ),
    "a row of depths": (said_of("depth", {}), lambda noise, size: {"d": noise.random((2, 1, 1, 3)).astype(np.float32)}),
    "text by CTC": (
        said_of("text", {"characters": "ab\u00df\u20ac", "decoder": "ctc", "blank": 0}),
        lambda noise, size: outputs_of(noise, t=(2, 40, 5)),
    ),
    "text, classes first": (
        said_of("text", {"characters": "abcd\u00e9", "decoder": "ctc", "blank": -1}),
        lambda noise, size: outputs_of(noise, t=(2, 6, 40)),
    ),
    "text by positions": (
        said_of("text", {"characters": "x\nyy\n \r\nz\n", "decoder": "positions", "end": 4}),
        lambda noise, size: outputs_of(noise, t=(2, 12, 5)),
    ),
    "text with a start": (
        said_of("text", {"characters": "ab c", "end": 0}),
        lambda noise, size: outputs_of(noise, t=(2, 12, 6)),
    ),
    "vectors": (said_of("embedding", {}), lambda noise, size: outputs_of(noise, v=(2, 17, 1, 1))),
    "all outputs": (
        said_of("other", {}),
        lambda noise, size: {**outputs_of(noise, v=(2, 3), w=(3, 2)), "n": np.arange(4, dtype=np.int64).reshape(2, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_outputs_are_read_byte_for_byte_alike(harness: Harness, tmp_path: Path, what: str) -> None:
    said, make = READ[what]
    manifest = Manifest(
        verdict=ManifestVerdict("accepted", "", said["task"], tuple(said["class_names"]), ImageCount(1, "")),
        answers=said["answers"],
    )
    reading = reading_of(manifest)
    dice, noise = random.Random(7), np.random.default_rng(7)
    lines, wanted = [], []
    (tmp_path / "reading.json").write_text(json.dumps(said))
    for number in range(12):
        settings = {
            "size": [dice.randint(1, 6) * 4, dice.randint(1, 6) * 4],
            "resize": dice.choice(["stretch", "crop", "letterbox"]),
            "padding": dice.choice(["end", "centre"]),
            "crop_fraction": dice.choice([1.0, 0.8]),
        }
        (tmp_path / f"{number}.json").write_text(json.dumps(settings))
        how = PicturePreprocess.from_json(settings)
        frames = [np.zeros((dice.randint(1, 40), dice.randint(1, 40), 3), np.uint8) for _ in range(2)]
        outputs = make(noise, how.size)
        files = []
        for name, array in outputs.items():
            np.save(tmp_path / f"{number}-{name}.npy", array)
            files.append(f"{name} {tmp_path / f'{number}-{name}.npy'}")
        least = dice.choice([-1, 0.25])
        sizes = " ".join(f"{frame.shape[0]} {frame.shape[1]}" for frame in frames)
        places_in = f"{tmp_path / 'reading.json'} {tmp_path / f'{number}.json'} {tmp_path / f'{number}.out'}"
        lines.append(f"read {places_in} {least} 2 {sizes} {' '.join(files)}")
        places = [Placement.of(frame, how) for frame in frames]
        wanted.append(written(reading.answers(outputs, places, None if least < 0 else least)))
    assert harness(lines) == ["ok 2"] * 12
    for number, answer in enumerate(wanted):
        assert (tmp_path / f"{number}.out").read_bytes() == answer, number


@pytest.mark.parametrize(
    ("task", "options", "outputs", "code"),
    [
        ("classification", {}, {"logits": np.full((2, 4), np.nan, np.float32)}, ExitCode.MISMATCH),
        ("classification", {}, {"logits": np.zeros((3, 4), np.float32)}, ExitCode.INPUT),
        ("classification", {}, {"a": np.zeros((2, 4), np.float32), "b": np.zeros((2, 4), np.float32)}, ExitCode.INPUT),
        ("detection", {}, {"boxes": np.zeros((2, 3, 4), np.float32), "scores": np.full((2, 3, 4), 7, np.float32)},
         ExitCode.INPUT),
        ("detection", {}, {"boxes": np.zeros((2, 3, 4), np.float32)}, ExitCode.INPUT),
        ("segmentation", {}, {"m": np.zeros((2, 3, 5, 5), np.float32)}, ExitCode.INPUT),
        ("depth", {}, {"d": np.zeros((2, 3), np.float32)}, ExitCode.INPUT),
        ("text", {"characters": "abc"}, {"t": np.zeros((2, 9, 4), np.float32)}, ExitCode.INPUT),
        ("text", {"characters": "abc"}, {"t": np.zeros((2, 9, 9), np.float32)}, ExitCode.INPUT),
        ("embedding", {"output": "w"}, {"v": np.zeros((2, 4), np.float32)}, ExitCode.INPUT),
    ],
)  # fmt: skip
def test_outputs_that_are_none_of_the_task_are_refused_as_python_does(
    harness: Harness, tmp_path: Path, task: str, options: dict[str, Any], outputs: dict[str, np.ndarray], code: ExitCode
) -> None:
    said = said_of(task, options)
    (tmp_path / "reading.json").write_text(json.dumps(said))
    (tmp_path / "how.json").write_text('{"size": [16, 16]}')
    words = []
    for name, array in outputs.items():
        np.save(tmp_path / f"{name}.npy", array)
        words.append(f"{name} {tmp_path / f'{name}.npy'}")
    line = f"read {tmp_path / 'reading.json'} {tmp_path / 'how.json'} {tmp_path / 'out'} -1 2 9 9 9 9 {' '.join(words)}"
    (answer,) = harness([line])
    assert answer.startswith(f"error {int(code)} "), answer
    manifest = Manifest(
        verdict=ManifestVerdict("accepted", "", task, tuple(said["class_names"]), ImageCount(1, "")),
        answers=said["answers"],
    )
    place = Placement.of(np.zeros((9, 9, 3), np.uint8), PicturePreprocess((16, 16)))
    with pytest.raises(ResvitError) as refused:
        reading_of(manifest).answers(outputs, [place, place])
    assert refused.value.code is code


def test_half_precision_is_converted_as_ieee_has_it(harness: Harness) -> None:
    assert harness(["halves"]) == ["ok 0"]


# Bundles


@pytest.fixture
def installed(tmp_path: Path) -> tuple[Path, Path]:
    """An unpacked signed bundle, and the public key."""
    manifest = Manifest(
        name="net", release=7, target=find_target("l4"), preprocess=PicturePreprocess((8, 8)).to_json(),
        other={"note": "Gr\u00f6\u00dfe \U0001f600"},
    )  # fmt: skip
    path = tmp_path / "net.resvit"
    write_bundle(path, manifest, {"engine.plan": b"engine" * 1000, "data/golden.npy": b"golden", "empty": b""}, KEY)
    extract_bundle(path, tmp_path / "net")
    return tmp_path / "net", key_file(tmp_path / "release.pub")


def key_file(path: Path, **changes: Any) -> Path:
    path.write_text(dataclasses.replace(KEY.public, **changes).to_text())
    path.chmod(0o644)
    return path


def test_a_bundle_is_opened(harness: Harness, installed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, key = installed
    (tmp_path / "current").symlink_to(folder)
    digest = read_trusted_folder(folder, TRUST).digest
    line = f"{folder} {key}"
    answers = harness(
        [f"check {line}", f"open {tmp_path / 'current'} {key}", f"open {line} engine.plan", f"open {line} empty"]
    )
    assert answers == [f"ok net 7 {digest} 3", f"ok net 7 {digest} 3", "ok 6000", "ok 0"]
    assert harness([f"open {line} absent", f"open {line} ../release.pub", f"open {tmp_path / 'no'} {key}"]) == [
        "error 3 The bundle has no file absent.",
        "error 3 The bundle has no file ../release.pub.",
        f"error 3 There is no folder {tmp_path / 'no'}.",
    ]


CHANGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: _flip(folder / "engine.plan", 100),
    "a file cut": lambda folder: (folder / "engine.plan").write_bytes(b"engine"),
    "a file lost": lambda folder: (folder / "data/golden.npy").unlink(),
    "a file added": lambda folder: (folder / "data/more").write_bytes(b""),
    "a file that is a link": lambda folder: _linked(folder / "engine.plan"),
    "a manifest changed": lambda folder: _flip(folder / "manifest.json", 40),
    "a signature changed": lambda folder: _flip(folder / "signature.json", 150),
    "a signature in another form": lambda folder: (folder / "signature.json").write_text(
        json.dumps(json.loads((folder / "signature.json").read_text()))
    ),
    "no signature": lambda folder: (folder / "signature.json").unlink(),
    "a signature without end": lambda folder: (folder / "signature.json").write_bytes(b"[" * 60_000),
    "a large signature": lambda folder: (folder / "signature.json").write_bytes(b" " * 70_000),
}


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_refused_as_python_refuses_it(
    harness: Harness, installed: tuple[Path, Path], change: str
) -> None:
    folder, key = installed
    CHANGES[change](folder)
    with pytest.raises(ResvitError) as refused:
        read_trusted_folder(folder, TRUST)
    (answer,) = harness([f"check {folder} {key}"])
    assert answer.startswith(f"error {int(refused.value.code)} "), answer
    assert refused.value.code is ExitCode.UNTRUSTED


def test_every_bit_of_signature_and_manifest_counts(
    harness: Harness, installed: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, key = installed
    lines = []
    for name in ("signature.json", "manifest.json"):
        data = (folder / name).read_bytes()
        for place in range(0, 8 * len(data), 7 if name == "signature.json" else 97):
            copy = tmp_path / f"{name}-{place}"
            copy.mkdir()
            for other in ("signature.json", "manifest.json"):
                (copy / other).write_bytes((folder / other).read_bytes())
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            (copy / name).write_bytes(changed)
            lines.append(f"open {copy} {key}")
    assert len(lines) > 300
    answers = harness(lines)
    assert all(answer.startswith("error 10 ") for answer in answers)


def test_keys_of_files_and_folders(harness: Harness, installed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, key = installed
    stranger = tmp_path / "stranger.pub"
    stranger.write_text(signing_key(bytes(32)).public.to_text())
    revoked = key_file(tmp_path / "old.pub", revoked=True)
    withdrawn = tmp_path / "withdrawn"
    withdrawn.mkdir()
    shutil.copy(key, withdrawn / "release.pub")
    (withdrawn / "revoked").write_text(f"# lost\n{KEY.public.keyid}\n")
    open_to_all = tmp_path / "open.pub"
    shutil.copy(key, open_to_all)
    open_to_all.chmod(0o666)
    broken = {
        "empty": "",
        "misspelt": key.read_text() + "Revokd: yes\n",
        "half": key.read_text()[:60],
        "none": "\0" * 99,
        "twice": key.read_text() + key.read_text(),
        "weak": signing_key(bytes(32)).public.to_text().replace("MCow", "MCoX"),
    }
    for name, text in broken.items():
        (tmp_path / f"{name}.pub").write_text(text)
    named = [
        stranger, revoked, withdrawn / "release.pub", withdrawn, open_to_all,
        *(tmp_path / f"{name}.pub" for name in broken),
    ]  # fmt: skip
    answers = harness([f"open {folder} {path}" for path in named])
    assert all(answer.startswith("error 10 ") for answer in answers), answers
    assert harness([f"open {folder} {tmp_path / 'absent.pub'}"])[0].startswith("error 3 ")
    # Withdrawn at the usual place, and so under any name.
    (answer,) = harness([f"open {folder} {key}"], RESVIT_TRUST=str(withdrawn))
    assert "revoked" in answer
    expired = tmp_path / "expired.pub"
    expired.write_text("Created: 2020-01-01\nExpires: 2021-01-01\n" + key.read_text())
    several = tmp_path / "several"
    several.mkdir()
    shutil.copy(stranger, several)
    shutil.copy(key, several)
    assert all(answer.startswith("ok ") for answer in harness([f"open {folder} {at}" for at in (expired, several)]))


# Engines


IMAGE = "input input float32 -1 3 16 24 min 1 3 16 24 max 4 3 16 24"
PLANS: dict[str, tuple[str, list[str], dict[str, Any], dict[str, Any]]] = {
    "classification": (IMAGE, ["output logits float32 1 2 0 linear -1 12"], {}, {}),
    "detection": (
        IMAGE,
        ["output pred_boxes float32 2 0.5 0 likely -1 20 4", "output logits float32 3 2 0 linear -1 20 4"],
        {"nms_iou": 0.7},
        {"resize": "letterbox", "padding": "centre"},
    ),
    "segmentation": (
        IMAGE.replace("min 1", "min 2"),
        ["output masks float16 4 1 0 linear -1 5 4 6"],
        {},
        {"resize": "letterbox"},
    ),
    "depth": (
        IMAGE.replace("float32", "float16"),
        ["output depth float32 5 3 0.2 positive -1 1 8 12"],
        {},
        {"resize": "crop"},
    ),
    "text": (
        "input input float32 2 3 16 24",
        ["output text float32 6 1 0 linear 2 30 5"],
        {"characters": "ab\u00e4d", "decoder": "ctc", "blank": 0},
        {},
    ),
    "embedding": (IMAGE.replace("float32", "uint8"), ["output vector float32 7 1 0 linear -1 9"], {}, {}),
    "other": (
        IMAGE.replace("float32", "int8"),
        ["output a float32 8 1 0 linear -1 3", "output b int32 9 9 0 linear -1 2 2"],
        {},
        {},
    ),
}
ENCODED = {"uint8": ((255.0,), (0.0,)), "int8": ((127.0, 64.0, 90.0), (0.0, 1.5, -2.5))}


@dataclasses.dataclass(frozen=True)
class Installed:
    folder: Path
    bundle: Path
    plan: Path
    key: Path


def engine_bundle(harness: Harness, folder: Path, task: str, *, shuffled: bool = False, **changes: Any) -> Installed:
    """A bundle with an engine of the stand-in's for a task, signed, and with golden files that it made itself.

    ``shuffled`` gives the rows of every image's golden answers in another order.
    """
    image, outputs, options, how = PLANS[task]
    plan = folder / f"{task}.plan"
    plan.write_text("\n".join(["engine", image, *outputs]) + "\n")
    tensors = PlanEngine(FakeCuda(), harness, plan).tensors
    kind = tensors[0].type
    encoding = InputEncoding(kind, *ENCODED[kind]) if kind in ENCODED else None
    images = np.random.default_rng(3).random((4, 3, 16, 24)).astype(np.float32)
    golden = encoding.encode(images) if encoding else images.astype(kind)
    batch = tensors[0].sizes[0]
    fewest, most = (batch, batch) if batch > 0 else (tensors[0].least[0], tensors[0].most[0])
    names: dict[str, str] = {}
    files: dict[str, Any] = {"engine.plan": plan, "golden_input.npy": folder / f"{task}-in.npy"}
    np.save(folder / f"{task}-in.npy", golden)
    for at, one in enumerate(sorted(tensors[1:], key=lambda tensor: tensor.name != "logits")):
        made = [
            harness.computed(folder, plan, one.name, part, np.empty(one.shape_for(part.shape), one.type))
            for part in np.split(golden, len(golden) // fewest)
        ]
        names[one.name] = f"golden_output{f'_{at}' if at else ''}.npy"
        whole = np.concatenate(made)
        np.save(folder / f"{task}-{names[one.name]}", whole[:, ::-1] if shuffled else whole)
        files[names[one.name]] = folder / f"{task}-{names[one.name]}"
    size = PicturePreprocess((16, 24), interpolation="bilinear", mean=(0.4,), std=(0.3,), **how)
    settings: dict[str, Any] = {
        "name": f"net-{task}",
        "target": find_target("jetson-orin"),
        "engine": engine_report(sha256=sha256_bytes(plan.read_bytes())),
        "build": BuildSettings(batch=(fewest, fewest, most)),
        "input": IoTensor("input", ("B", 3, 16, 24), kind, encoding),
        "golden": GoldenFiles(outputs=names if len(names) > 1 else {}, sets=shuffled),
        "verdict": ManifestVerdict("accepted", "", task, ("cat", "dog", "cow", "owl"), ImageCount(4, "0")),
        "answers": {"options": options, "classes": 4, "class_ids": []},
        "preprocess": size.to_json(),
        **changes,
    }
    bundle = folder / f"{task}.resvit"
    write_bundle(bundle, Manifest(**settings), files, KEY)
    unpacked = folder / f"net-{task}"
    shutil.rmtree(unpacked, ignore_errors=True)
    extract_bundle(bundle, unpacked)
    return Installed(unpacked, bundle, plan, key_file(folder / "release.pub"))


def frames(folder: Path, count: int = 7) -> tuple[list[np.ndarray], str]:
    """Frames of many sizes, and the words that name them to the harness."""
    dice, made, words = random.Random(5), [], []
    for number in range(count):
        frame = frame_of(dice, (16, 24))
        made.append(frame)
        (folder / f"frame{number}").write_bytes(frame.tobytes())
        words.append(f"{folder / f'frame{number}'} {frame.shape[0]} {frame.shape[1]} {frame.shape[2]} 0 rgb")
    return made, " ".join(words)


@pytest.fixture
def python_engine(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Callable[[Installed], Any]:
    """Loads the bundle by ``resvit_engines.load`` over Python's stand-ins, with the same engine behind them."""

    def loaded(one: Installed) -> Any:
        api = FakeCuda()
        fakes = FakeTensorRT(PlanEngine(api, harness, one.plan))
        monkeypatch.setattr(engine_runner, "load_cuda", lambda: Cuda(api))
        monkeypatch.setattr(engine_runner, "load_tensorrt", lambda module: fakes)
        monkeypatch.setattr(run, "installed", lambda module: True)
        monkeypatch.setattr(run, "local_sm", lambda: 87)
        return resvit_engines.load(one.bundle, trust=one.key, runtime="tensorrt", streams=1)

    return loaded


@pytest.mark.parametrize("task", PLANS)
def test_frames_get_the_answers_that_python_gives(
    harness: Harness, python_engine: Any, tmp_path: Path, task: str
) -> None:
    one = engine_bundle(harness, tmp_path, task)
    made, words = frames(tmp_path)
    answers = harness([f"run {one.folder} {one.key} {tmp_path / f'{graph}'} 2 1 {graph} 1 {words}" for graph in (1, 0)])
    with python_engine(one) as model:
        wanted = written(model(made))
        assert answers == [f"ok TensorRT 10.3.0; {model.golden}"] * 2
        assert "the very outputs" in answers[0]
    assert (tmp_path / "1").read_bytes() == wanted
    assert (tmp_path / "0").read_bytes() == wanted


def test_a_size_is_chosen_where_the_engine_takes_several(harness: Harness, tmp_path: Path) -> None:
    PLANS["sizes"] = (
        "input input float32 -1 3 -1 -1 min 1 3 8 8 max 2 3 32 32",
        ["output masks float32 4 1 0 linear -1 3 -2 -3"],
        {},
        {},
    )
    try:
        build = BuildSettings(batch=(1, 1, 2), sizes=SizeRange((8, 8), (16, 24), (32, 32)))
        one = engine_bundle(harness, tmp_path, "sizes", build=build)
    finally:
        del PLANS["sizes"]
    _, words = frames(tmp_path, 3)
    assert harness([f"run {one.folder} {one.key} {tmp_path / 'out'} 1 1 1 1 {words}"])[0].startswith("ok ")


def test_threads_share_a_model_without_a_race(tmp_path: Path, harness: Harness) -> None:
    one = engine_bundle(harness, tmp_path, "detection")
    _, words = frames(tmp_path, 5)
    threads = Harness(compiled(tmp_path / "thread", "thread"))
    lines = [f"run {one.folder} {one.key} {tmp_path / str(streams)} {streams} 6 1 1 {words}" for streams in (1, 3)]
    assert all(answer.startswith("ok ") for answer in threads(lines))
    assert harness([f"run {one.folder} {one.key} {tmp_path / 'alone'} 1 1 0 1 {words}"])[0].startswith("ok ")
    assert {(tmp_path / name).read_bytes() for name in ("1", "3")} == {(tmp_path / "alone").read_bytes()}


TROUBLE: dict[str, tuple[dict[str, str], int, str]] = {
    "no GPU": ({"RESVIT_TEST_FAIL": "cudaGetDevice 1 100"}, 7, "cudaGetDevice failed"),
    "another GPU": ({"RESVIT_TEST_SM": "90"}, 6, "The engine is for SM 8.7, and this GPU has SM 9.0."),
    "no runtime": ({"RESVIT_TEST_TROUBLE": "runtime"}, 7, "TensorRT cannot run engines here"),
    "no context": ({"RESVIT_TEST_TROUBLE": "context"}, 9, "could not make an execution context"),
    "a refused run": ({"RESVIT_TEST_TROUBLE": "run"}, 9, "TensorRT could not run the engine"),
    "no memory on the device": ({"RESVIT_TEST_FAIL": "cudaMalloc 3 2"}, 9, "cudaMalloc failed: out of memory"),
    "no pinned memory": ({"RESVIT_TEST_FAIL": "cudaHostAlloc 2 2"}, 9, "cudaHostAlloc failed"),
    "no stream": ({"RESVIT_TEST_FAIL": "cudaStreamCreateWithFlags 2 2"}, 9, "cudaStreamCreateWithFlags failed"),
    "a copy that fails": ({"RESVIT_TEST_FAIL": "cudaMemcpyAsync 4 700"}, 9, "cudaMemcpyAsync failed"),
    "a fault while computing": ({"RESVIT_TEST_FAIL": "cudaStreamSynchronize 4 700"}, 9, "cudaStreamSynchronize failed"),
    "a graph that fails": ({"RESVIT_TEST_FAIL": "cudaGraphLaunch 1 700"}, 9, "cudaGraphLaunch failed"),
    "no recording": ({"RESVIT_TEST_FAIL": "cudaStreamBeginCapture 1 901"}, 0, "the very outputs"),
    "a broken recording": ({"RESVIT_TEST_FAIL": "cudaStreamEndCapture 1 901"}, 0, "the very outputs"),
    "a run that cannot be recorded": ({"RESVIT_TEST_TROUBLE": "capture"}, 0, "the very outputs"),
    "no executable": ({"RESVIT_TEST_FAIL": "cudaGraphInstantiate 1 2"}, 0, "the very outputs"),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_every_trouble_is_a_sentence_and_leaves_nothing_taken(harness: Harness, tmp_path: Path, what: str) -> None:
    environment, code, says = TROUBLE[what]
    one = engine_bundle(harness, tmp_path, "classification", build=BuildSettings(batch=(1, 1, 1)))
    _, words = frames(tmp_path, 2)
    line = f"run {one.folder} {one.key} {tmp_path / 'out'} 1 1 1 {int(what != 'a run that cannot be recorded')} {words}"
    (answer,) = harness([line], **environment)
    assert answer.startswith(f"error {code} " if code else "ok "), answer
    assert says in answer or what == "a run that cannot be recorded"


def engineless(**report: Any) -> dict[str, Any]:
    return {"engine": engine_report(**report)}


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no engine": ({"engine": None}, 7, "There is no engine in this bundle."),
    "for the CPU": (engineless(builder=Builder.ONNXRUNTIME), 6, "built by ONNX Runtime"),
    "for RTX": (engineless(builder=Builder.RTX), 6, "built by TensorRT for RTX"),
    "without weights": (engineless(flags=("strip_weights",)), 6, "without its weights"),
    "prepared by code": ({"preprocess": {"factory": "file.py:make"}}, 3, "the maker's own code, file.py:make"),
    "nothing said of frames": ({"preprocess": None}, 3, "by code that it does not name"),
    "an option that is none": ({"answers": {"options": {"shown": 2}}}, 3, "ok"),
    "golden files lost": ({"golden": None}, 3, "no golden images"),
    "golden files misnamed": ({"golden": GoldenFiles(input="engine.plan")}, 3, "holds no array of numbers"),
    "outputs unlike": ({"golden": GoldenFiles(output="golden_input.npy")}, 11, "computes something else"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bundles_that_cannot_run_are_refused_with_the_reason(harness: Harness, tmp_path: Path, what: str) -> None:
    changes, code, says = REFUSED[what]
    task = "detection" if "options" in str(changes) else "classification"
    one = engine_bundle(harness, tmp_path, task, **changes)
    _, words = frames(tmp_path, 1)
    (answer,) = harness([f"run {one.folder} {one.key} {tmp_path / 'out'} 1 1 1 1 {words}"])
    assert answer.startswith(f"error {code} "), answer
    assert says in answer or says == "ok", answer


def test_an_engine_that_computes_something_else_is_not_used(harness: Harness, tmp_path: Path) -> None:
    one = engine_bundle(harness, tmp_path, "classification")
    for line, says in (
        ("output logits float32 99 2 0 linear -1 12", "SQNR"),
        ("output logits float32 1 2 0 nan -1 12", "NaN or infinite"),
        ("output logits float32 1 2 0 linear -1 11", "the output is [4, 11]"),
        ("output logits float32 1 2 0 unknown -1 12", "depends on what is in the images"),
        ("output logits bfloat16 1 2 0 linear -1 12", "of a type that is not read here"),
    ):
        other = tmp_path / "other"
        other.mkdir()
        (other / "engine.plan").write_text(f"engine\n{IMAGE}\n{line}\n")
        manifest = read_trusted_folder(one.folder, TRUST).manifest
        files = {file.path: one.folder / file.path for file in manifest.files} | {"engine.plan": other / "engine.plan"}
        write_bundle(other / "net.resvit", dataclasses.replace(manifest, files=()), files, KEY)
        extract_bundle(other / "net.resvit", other / "net")
        _, words = frames(tmp_path, 1)
        (answer,) = harness([f"run {other / 'net'} {one.key} {tmp_path / 'out'} 1 1 1 1 {words}"])
        assert answer.startswith(("error 11 ", "error 6 ")), answer
        assert says in answer
        shutil.rmtree(other)


def test_answers_that_are_sets_are_paired_before_they_are_compared(harness: Harness, tmp_path: Path) -> None:
    _, words = frames(tmp_path, 1)
    for sets, begins in ((True, "ok TensorRT 10.3.0; 4 golden images: the very outputs"), (False, "error 11 ")):
        one = engine_bundle(harness, tmp_path, "detection", shuffled=True)
        if not sets:
            manifest = read_trusted_folder(one.folder, TRUST).manifest
            assert manifest.golden is not None
            golden = dataclasses.replace(manifest.golden, sets=False)
            files = {file.path: one.folder / file.path for file in manifest.files}
            write_bundle(one.bundle, dataclasses.replace(manifest, golden=golden, files=()), files, KEY)
            extract_bundle(one.bundle, tmp_path / "ordered")
            one = dataclasses.replace(one, folder=tmp_path / "ordered")
        (answer,) = harness([f"run {one.folder} {one.key} {tmp_path / 'out'} 1 1 1 1 {words}"])
        assert answer.startswith(begins), answer


def test_tensorrt_s_own_words_are_told(harness: Harness, tmp_path: Path) -> None:
    one = engine_bundle(harness, tmp_path, "classification")
    manifest = read_trusted_folder(one.folder, TRUST).manifest
    (tmp_path / "engine.plan").write_bytes(b"of another version")
    files = {file.path: one.folder / file.path for file in manifest.files} | {"engine.plan": tmp_path / "engine.plan"}
    write_bundle(tmp_path / "net.resvit", dataclasses.replace(manifest, files=()), files, KEY)
    extract_bundle(tmp_path / "net.resvit", tmp_path / "net")
    (answer,) = harness([f"run {tmp_path / 'net'} {one.key} {tmp_path / 'out'} 1 1 1 1"])
    assert answer.startswith("error 8 TensorRT cannot read the engine: Serialization assertion failed")


def test_what_is_installed_is_run_by_its_name_by_the_example(harness: Harness, tmp_path: Path) -> None:
    one = engine_bundle(harness, tmp_path, "classification")
    (tmp_path / "root/net-classification").mkdir(parents=True)
    (tmp_path / "root/net-classification/current").symlink_to(one.folder)
    frame = np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint8)
    (tmp_path / "frame.ppm").write_bytes(b"P6\n14 9\n255\n" + frame.tobytes())
    (tmp_path / "half.ppm").write_bytes(b"P6\n14 9\n255\n" + frame.tobytes()[:99])
    program = harness.folder / "runtime/resvit-frames"

    def example(*words: object) -> subprocess.CompletedProcess[str]:
        environment = {"RESVIT_ROOT": str(tmp_path / "root"), "PATH": "/usr/bin:/bin"}
        line = [str(word) for word in (program, *words)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    done = example("net-classification", one.key, tmp_path / "frame.ppm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("net-classification, release 1; 4 golden images: the very outputs")
    assert len(done.stdout.splitlines()) == 5
    heads = (b"P6 # GIMP\n#\n14 9 # two\n255\n", b"P6\n" + b"# long\n" * 50 + b"14\t9\n#\n255 ")
    for head in heads:
        (tmp_path / "told.ppm").write_bytes(head + frame.tobytes())
        told = example("net-classification", one.key, tmp_path / "told.ppm")
        assert told.stdout.replace("told.ppm", "frame.ppm") == done.stdout, told.stderr
    odd = (b"", b"P", b"P6", b"P6#", b"P5\n14 9\n255\n", b"P6\n14 9\n256\n", b"P6\n14 -9\n255\n")
    for head in (*odd, b"P614 9\n255\n", b"P6\n0000014 9\n255\n", b"P6\n14 9\n255# no\n", b"P6\n14 9\n255"):
        (tmp_path / "odd.ppm").write_bytes(head + (frame.tobytes() if head.endswith(b"\n") else b""))
        refused = example("net-classification", one.key, tmp_path / "odd.ppm")
        assert (refused.returncode, "no binary PPM" in refused.stderr) == (3, True), (head, refused.stderr)
    for words, code in ((("net-none", one.key, tmp_path / "frame.ppm"), 3), (("a",), 2),
                        (("net-classification", one.key, tmp_path / "half.ppm"), 3)):  # fmt: skip
        refused = example(*words)
        assert refused.returncode == code, refused.stderr
        assert "  -> " in refused.stderr or code == 2


# What others wrote


def test_parsers_refuse_whatever_they_do_not_read(harness: Harness, tmp_path: Path) -> None:
    one = engine_bundle(harness, tmp_path, "detection")
    (tmp_path / "how.json").write_text(json.dumps(settings_of(random.Random(1))))
    tasks = {"detection": {"nms_iou": 0.5}, "text": {"characters": "ab", "blank": 0}, "depth": {"inverted": True},
             "segmentation": {}, "embedding": {"output": "out"}, "classification": {}}  # fmt: skip
    for task, options in tasks.items():
        (tmp_path / f"{task}.json").write_text(json.dumps(said_of(task, options)))
    count = 1500
    lines = [
        f"fuzz manifest 1 {count} {one.folder / 'manifest.json'}",
        f"fuzz signature 2 {count} {one.folder / 'signature.json'}",
        f"fuzz preprocess 3 {count} {tmp_path / 'how.json'}",
        f"fuzz npy 4 {count} {one.folder / 'golden_output.npy'}",
        f"fuzz key 5 {count} {one.key} {tmp_path / 'fuzz.pub'}",
        *(f"fuzz reading 6 {count} {tmp_path / f'{task}.json'}" for task in tasks),
    ]
    for line, answer in zip(lines, harness(lines), strict=True):
        assert answer.removeprefix("ok ").isdigit(), (line, answer)
        assert int(answer[3:]) > count / 3, (line, answer)


def test_it_fits_the_headers_of_nvidia_s_that_are_here(tmp_path: Path) -> None:
    cuda = Path("/usr/local/cuda/include")
    found = sorted((ROOT / "data/tensorrt-include").glob("*/NvInferRuntime.h"))
    if not found or not (cuda / "cuda_runtime_api.h").is_file():
        pytest.skip("no headers of TensorRT below data/tensorrt-include, or none of CUDA")
    for header in found:
        flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I", str(SOURCE / "include")]
        includes = ["-isystem", str(header.parent), "-isystem", str(cuda)]
        line = ["g++", *flags, *includes, str(SOURCE / "src/engine.cpp")]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (header, done.stderr)


def test_the_example_of_the_page_compiles(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    (block,) = re.findall(r"```cpp\n(.*?)```", (ROOT / "docs/cpp.md").read_text(), re.DOTALL)
    (tmp_path / "example.cpp").write_text(block)
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I", str(SOURCE / "include")]
    done = subprocess.run(["g++", *flags, tmp_path / "example.cpp"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_manifest_is_read_as_python_reads_it(harness: Harness, tmp_path: Path) -> None:
    one = engine_bundle(harness, tmp_path, "other")
    record = Record(json.loads((one.folder / "manifest.json").read_text()), "the manifest")
    assert Manifest.from_json(record).release == 1
    (answer,) = harness([f"check {one.folder} {one.key}"])
    assert answer.split()[:3] == ["ok", "net-other", "1"]
