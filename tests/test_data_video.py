"""Films and folders of frames as calibration images: spread evenly, nothing twice, and whatever damage is told."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.naming import is_factory, kind_of_folder, require_source
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL
from resvit_calibrate.readers.fashion_mnist import read_split
from resvit_calibrate.readers.video import container, film
from resvit_calibrate.readers.video.container import format_of
from resvit_calibrate.readers.video.evenly import Evenly
from resvit_engines.errors import ExitCode, ResvitError

av = pytest.importorskip("av")
HEIGHT, WIDTH, RATE = 96, 128, 10


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A wall of real pictures, across which the camera pans: uint8 [H, W, 3]."""
    images, _ = read_split("test")
    wall = np.asarray(images[:400]).reshape(20, 20, 28, 28).transpose(0, 2, 1, 3).reshape(560, 560)
    return np.stack([wall, wall // 2 + 60, 255 - wall // 3], 2)


def pan(scene: np.ndarray, count: int, step: int = 4) -> Iterator[np.ndarray]:
    for number in range(count):
        row, left = divmod(number * step, 560 - WIDTH)
        top = 100 * row + left // 5
        yield scene[top : top + HEIGHT, left : left + WIDTH]


def write(path: Path, frames: Iterable[np.ndarray], codec: str = "libx264", **options: str) -> Path:
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size, stream.bit_rate = 5, 6_000_000
        for values in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24")))
        out.mux(stream.encode(None))
    return path


def opened(data: object) -> Any:
    require_source(str(data))
    pools = open_source(str(data), AS_USUAL)
    assert isinstance(pools, Pools)
    assert pools.validation is None
    assert pools.calibration.task is None
    return pools.calibration


@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("avi", "mpeg4"),
        ("ts", "libx264"),
        pytest.param("webm", "libvpx", marks=pytest.mark.whole),
        ("mov", "mpeg4"),
    ],
)
def test_a_film_is_its_frames_spread_evenly(ending: str, codec: str, scene: np.ndarray, tmp_path: Path) -> None:
    shown = list(pan(scene, 40, 12))
    path = write(tmp_path / f"film.{ending}", shown, codec)
    path = path.rename(tmp_path / "film")  # by its content, whatever it is called
    pixels = opened(path)
    assert not is_factory(str(path))
    assert len(pixels) == 40
    assert pixels.title(7) == f"film at 0:0{pixels._frames[7].title.rpartition(':0')[2]}"
    for number in (0, 20, 39):
        values = pixels.read(number)
        assert values.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(values.astype(int) - shown[number]).mean() < 12
    assert "40 of 40 frames are used" in pixels.notes[0]
    spec = DataSpec(str(path), calibration_images=10, unlabelled=True)
    calibration, validation = open_image_sets(spec, Preprocess((32, 32), 3))
    assert (len(calibration), len(validation)) == (10, 30)
    assert sum(len(batch.images) for batch in validation.batches(8)) == 30


def test_what_shows_the_same_is_dropped_and_counted(scene: np.ndarray, tmp_path: Path) -> None:
    still = [scene[:HEIGHT, :WIDTH]] * 60
    moving = list(pan(scene, 12, 30))
    pixels = opened(write(tmp_path / "film.mp4", [*still, *moving, *still]))
    assert len(pixels) == 12
    assert "120 of 132 that were looked at show the same as another and were dropped" in pixels.notes[0]
    with pytest.raises(ResvitError, match="shows 1 different frames, and at least 8 are needed"):
        opened(write(tmp_path / "still.mp4", still))


def test_a_small_thing_that_moves_is_something_new(tmp_path: Path) -> None:
    frames = []
    for number in range(12):
        values = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        values[40:46, 10 * number : 10 * number + 6] = 200
        frames.append(values)
    assert len(opened(write(tmp_path / "film.mp4", frames))) == 12


@given(st.integers(0, 800), st.integers(1, 99))
@settings(max_examples=20)
def test_whatever_the_length_what_is_held_is_even_and_at_most_so_much(length: int, most: int) -> None:
    even: Evenly[int] = Evenly(most)
    given_back: list[int] = []
    marks = np.random.default_rng(0).integers(0, 256, (length + 1, 2, 2, 3), np.uint8)
    for number in range(length):
        if even.wants(number) and even.shows_something_new(marks[number]):
            given_back += even.hold(number, marks[number], number)
    assert len(even.items) <= most
    assert even.items == list(range(0, length, even.step))[: len(even.items)] or even.alike
    assert not set(even.items) & set(given_back)
    assert even.alike or len(even.items) >= min(length, most // 2)


def test_a_long_film_is_thinned_and_a_very_long_one_read_by_its_key_frames(
    scene: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "film.mp4", pan(scene, 80, 5))
    monkeypatch.setattr(film, "MOST", 20)
    pixels = opened(path)
    assert 10 <= len(pixels) <= 20
    times = [float(pixels.title(number).rpartition(":")[2]) for number in range(len(pixels))]
    assert np.ptp(np.diff(times)) < 1e-6
    assert times[-1] > 7
    monkeypatch.setattr(container, "_LONG", 50)
    pixels = opened(path)
    assert "of 16 key frames are used" in pixels.notes[0]
    monkeypatch.setattr(film, "LEAST", 17)
    assert "of 80 frames are used" in opened(path).notes[0]  # too few of them: all are decoded


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_film_that_ends_early_is_used_as_far_as_it_goes(share: float, scene: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "film.mp4", pan(scene, 60, 12), movflags="faststart")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    pixels = opened(path)
    assert LEAST_READ < len(pixels) < 60
    said = " ".join(pixels.notes)
    assert ("ends early" in said and "of 0:06.0" in said) or "cannot be decoded and are left out" in said


LEAST_READ = 15


def test_a_film_whose_index_is_missing_is_refused(scene: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "film.mp4", pan(scene, 60, 12))
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ResvitError, match=r"cannot be opened as a film \(mov\).*copied in part"):
        opened(path)


def test_a_damaged_film_says_how_much_of_it_was_left_out(scene: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "film.avi", pan(scene, 60, 12), "mpeg4")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 6000] = bytes(6000)
    path.write_bytes(data)
    pixels = opened(path)
    assert len(pixels) < 60
    assert "film.avi" in pixels.notes[-1]
    assert len(pixels.notes) > 1


def test_a_turned_film_is_upright_as_players_show_it(scene: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "film.mp4", pan(scene, 12, 30), "mpeg4")
    straight = opened(path)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    quarter = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()  # clockwise
    data[matrix : matrix + 36] = quarter
    path.write_bytes(data)
    turned = opened(path)
    assert turned.read(3).shape == (WIDTH, HEIGHT, 3)
    assert (turned.read(3) == np.rot90(straight.read(3), -1)).all()
    assert "12 frames of film.mp4 are turned upright" in turned.notes[-1]


def test_a_folder_of_films_and_films_beside_pictures(scene: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", pan(scene, 20, 12))
    write(tmp_path / "b.mkv", (frame[::-1] for frame in pan(scene, 20, 12)))
    (tmp_path / "notes.txt").write_text("x")
    assert kind_of_folder(tmp_path) == "video"
    for data in (tmp_path, f"video:{tmp_path}"):
        pixels = opened(data)
        assert len(pixels) == 40
        assert pixels.title(25).startswith("b.mkv at ")
    for number in range(9):
        Image.fromarray(scene[number : number + 20, :20]).save(tmp_path / f"{number}.png")
    assert kind_of_folder(tmp_path) == "folder"
    assert "3 (1 .mkv, 1 .mp4, 1 .txt)" in opened(tmp_path).notes[0]


def test_of_very_many_films_some_are_read(scene: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.mp4", (frame // (1 + number) for frame in pan(scene, 8, 30)))
    monkeypatch.setattr(film, "FILMS_MOST", 3)
    monkeypatch.setattr(film, "MOST", 12)
    pixels = opened(tmp_path)
    assert {pixels.title(number).partition(".")[0] for number in range(len(pixels))} == {"0", "2", "4"}
    assert 8 <= len(pixels) <= 12
    assert pixels.notes[0].startswith("of 5 films of")
    (tmp_path / "2.mp4").write_bytes((tmp_path / "2.mp4").read_bytes()[:900])
    pixels = opened(tmp_path)
    assert {pixels.title(number).partition(".")[0] for number in range(len(pixels))} == {"0", "4"}
    assert any("left out: " in note and "2.mp4 cannot be opened as a film" in note for note in pixels.notes)


def test_frames_in_a_folder_come_in_the_order_of_their_numbers(scene: np.ndarray, tmp_path: Path) -> None:
    for number, values in enumerate(pan(scene, 24, 20)):
        for again in range(2):
            Image.fromarray(values).save(tmp_path / f"frame{2 * number + again}.png")
    pixels = opened(f"frames:{tmp_path}")
    assert list(pixels.files)[:3] == ["frame0.png", "frame2.png", "frame4.png"]
    assert len(pixels) == 24
    assert "24 of 48 frames are used" in pixels.notes[0]
    assert "24 of 48 that were looked at show the same" in pixels.notes[0]
    (tmp_path / "frame46.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "1 frames of" in opened(f"frames:{tmp_path}").notes[-1]
    (tmp_path / "more").mkdir()
    Image.fromarray(scene[:9, :9]).save(tmp_path / "more" / "x.png")
    with pytest.raises(ResvitError, match="has sub-folders, and frames of a film lie in one folder"):
        opened(f"frames:{tmp_path}")


def still_frames(root: Path) -> str:
    for number in range(20):
        Image.new("RGB", (16, 16), (number // 10, 0, 0)).save(root / f"{number}.png")
    return f"frames:{root}"


def sound(root: Path) -> str:
    with av.open(str(root / "song.mkv"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return str(root / "song.mkv")


def playlist(root: Path) -> str:
    """What FFmpeg would open as a list of other files, whatever it is called."""
    (root / "film.mp4").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    return f"video:{root}/film.mp4"


def named(name: str, content: bytes) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).write_bytes(content)
        return str(root / name)

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (still_frames, "shows 1 different frames, and at least 8"),
        (sound, "has no pictures, only audio"),
        (playlist, "is no film that is known"),
        (named("film.mp4", b"#EXTM3U\nhttp://x/1.ts\n"), "called like a film and does not begin like one"),
        (named("film.mp4", b""), "called like a film and does not begin like one"),
        (named("film.mkv", b"\x1a\x45\xdf\xa3" + bytes(500)), "cannot be opened as a film"),
        (named("notes.xyz", b"words"), "is of no kind of data that is read"),
        (lambda root: f"video:{root}", "holds no films"),
        (lambda root: f"video:{root}/absent.mp4", "does not exist"),
        (lambda root: f"frames:{root}/absent", "does not exist"),
        (lambda root: "/dev/video0", "is a camera or a stream"),
        (lambda root: "0", "is a camera or a stream"),
    ],
)
def test_what_is_no_film_ends_in_a_sentence(make: Callable[[Path], str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ResvitError, match=said):
        opened(make(tmp_path))


def test_a_film_as_other_kinds_and_others_as_a_film(scene: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "film.mp4", pan(scene, 12, 30))
    for kind in ("folder", "coco", "yolo", "masks", "csv", "frames", "tar"):
        with pytest.raises(ResvitError):
            opened(f"{kind}:{path}")
    Image.fromarray(scene).save(tmp_path / "p.png")
    assert format_of(tmp_path / "p.png") is None
    with pytest.raises(ResvitError, match="is no film that is known"):
        opened(f"video:{tmp_path}/p.png")


def test_without_pyav_the_extra_is_named(scene: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "film.mp4", pan(scene, 12, 30))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ResvitError, match="needs PyAV") as caught:
        opened(path)
    assert caught.value.code is ExitCode.MISSING
    assert "resvit-export[video]" in caught.value.fix


def test_a_full_disk_is_known_before_anything_is_decoded(
    scene: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "film.mp4", pan(scene, 12, 30))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(film.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResvitError, match=r"need 1 MiB in .*where 0 MiB are free") as caught:
        opened(path)
    assert caught.value.code is ExitCode.SYSTEM


@settings(max_examples=40)
@given(st.data())
def test_whatever_bytes_stand_in_a_film_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, scene: np.ndarray, data: st.DataObject
) -> None:
    base = tmp_path_factory.getbasetemp() / "films"
    kind = data.draw(st.sampled_from(["mp4", "mkv", "avi", "ts"]))
    if not (base / f"film.{kind}").exists():
        base.mkdir(exist_ok=True)
        write(base / f"film.{kind}", pan(scene, 12, 30), "mpeg4")
    content = bytearray((base / f"film.{kind}").read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path = base / f"changed.{kind}"
    path.write_bytes(content[: data.draw(st.integers(100, len(content)))])
    try:
        pixels = opened(path)
        pixels.read(0)
    except ResvitError:
        pass
