"""The frames of films as pictures of which nothing is known."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import UNSEEN, Look, Untargeted
from resvit_calibrate.readers.folders import class_names
from resvit_calibrate.readers.paired import shortened
from resvit_calibrate.readers.video.container import ENDINGS, Reading, format_of, frames_of, opened
from resvit_calibrate.readers.video.evenly import CANDIDATES, GRID, LEAST, MOST, SAME, Evenly
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import explain_os_errors
from resvit_engines.pictures.decode import AS_USUAL, Decoding
from resvit_engines.progress import SILENT, Reporter

_BYTES_MOST = 4 << 30
"""What the frames of all films may take in the folder for temporary files."""
FILMS_MOST = 128
_FOLDERS_MOST = 64
_MORE = "Give a longer film, or several in a folder."


@dataclass(frozen=True)
class _Frame:
    """Where one frame lies, and how many quarter turns counter-clockwise make it upright."""

    title: str
    film: int
    slot: int
    quarters: int


class _Slots:
    """A nameless file with room for frames of one size; a slot that is given back is used again."""

    def __init__(self, height: int, width: int) -> None:
        self.size = (height, width)
        self._shape, self._size = (height, width, 3), height * width * 3
        with explain_os_errors(Path(tempfile.gettempdir())):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - kept as long as its frames are read
        self._free: list[int] = []
        self._count, self._lock = 0, threading.Lock()

    def put(self, frame: npt.NDArray[np.uint8]) -> int:
        """Write a frame uint8 [H, W, 3]; returns its slot."""
        slot = self._free.pop() if self._free else self._count
        self._count = max(self._count, slot + 1)
        with explain_os_errors(Path(tempfile.gettempdir())):
            self._file.seek(slot * self._size)
            self._file.write(np.ascontiguousarray(frame).data)
        return slot

    def give_back(self, slot: int) -> None:
        """Let the next frame be written there."""
        self._free.append(slot)

    def get(self, slot: int) -> npt.NDArray[np.uint8]:
        """Read a frame."""
        with self._lock:
            self._file.seek(slot * self._size)
            data = self._file.read(self._size)
        return np.frombuffer(data, np.uint8).reshape(self._shape)


class FilmPixels(Untargeted):
    """Frames of films, in the order of the films and of time."""

    def __init__(self, name: str, frames: Sequence[_Frame], slots: Sequence[_Slots], notes: tuple[str, ...]) -> None:
        self.name, self.notes = name, notes
        self.labels: npt.NDArray[np.int64] | None = None
        self.class_names: tuple[str, ...] = ()
        self._frames, self._slots = frames, slots
        sizes = {
            (width, height) if one.quarters % 2 else (height, width)
            for one in frames
            for height, width in (slots[one.film].size,)
        }
        self.native_size: tuple[int, int] | None = next(iter(sizes)) if len(sizes) == 1 else None

    def __len__(self) -> int:
        return len(self._frames)

    def title(self, index: int) -> str:
        """Name one frame by its film and time."""
        return self._frames[index].title

    def look(self, index: int) -> Look:
        """Digest one frame's pixels."""
        values = self._values(index)
        return Look(hashlib.sha256(values.tobytes()).digest(), colour=True, stored=(values.shape[0], values.shape[1]))

    def read(self, index: int, decoding: Decoding = AS_USUAL, seen: Look = UNSEEN) -> npt.NDArray[np.uint8]:
        """One frame: uint8 [H, W, 3]."""
        del decoding, seen  # of 8 bits and upright, in a file that nobody else can write
        return self._values(index)

    def _values(self, index: int) -> npt.NDArray[np.uint8]:
        frame = self._frames[index]
        return np.ascontiguousarray(np.rot90(self._slots[frame.film].get(frame.slot), frame.quarters))


def films_in(root: Path) -> tuple[Path, ...]:
    """The films right in a folder, by their endings and first bytes, sorted by name."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        names = sorted(one.name for one in entries if one.name.lower().endswith(ENDINGS) and one.name[0] != ".")
        return tuple(root / name for name in names if format_of(root / name) is not None)
    return ()


def films_below(root: Path) -> tuple[Path, ...]:
    """The films in the folders right below a folder; none where there are none."""
    with contextlib.suppress(ResvitError):
        return tuple(film for name in class_names(root)[:_FOLDERS_MOST] for film in films_in(root / name))
    return ()


def pixels_from_films(paths: Sequence[Path], name: str, reporter: Reporter = SILENT) -> FilmPixels:
    """Frames of one film or several: evenly spread over each, without those that show the same as another of it.

    Of several, those that cannot be opened are left out. Raises ``ResvitError`` where PyAV is missing, the only film
    cannot be opened, or all show fewer than ``LEAST`` different frames.
    """
    frames: list[_Frame] = []
    slots: list[_Slots] = []
    notes: list[str] = []
    if len(paths) > FILMS_MOST:
        notes.append(
            f"of {len(paths)} films of {name} {FILMS_MOST} are read, evenly spread in the order of their names"
        )
        paths = [paths[int(place)] for place in np.linspace(0, len(paths) - 1, FILMS_MOST)]
    most = MOST // len(paths)
    room = _BYTES_MOST // len(paths)
    for path in paths:
        try:
            found, store, note = _frames_of_one(path, len(slots), most, room, reporter)
        except ResvitError as error:
            if len(paths) == 1 or error.code is not ExitCode.INPUT:
                raise
            notes.append(f"left out: {error.problem}")
            continue
        frames, slots, notes = frames + found, [*slots, store], notes + note
    if len(frames) < LEAST:
        raise ResvitError(
            f"{name} shows {len(frames)} different frames, and at least {LEAST} are needed ({'; '.join(notes)}).", _MORE
        )
    return FilmPixels(name, frames, slots, tuple(notes))


def _frames_of_one(
    path: Path, number: int, most: int, room: int, reporter: Reporter
) -> tuple[list[_Frame], _Slots, list[str]]:
    found = _taken(path, number, most, room, reporter, keys_only=None)
    if found[3].keys_only and len(found[0]) < min(LEAST, most):
        found = _taken(path, number, most, room, reporter, keys_only=False)
    frames, store, even, reading = found
    return frames, store, _notes(path, frames, even, reading)


def _taken(
    path: Path, number: int, most: int, room: int, reporter: Reporter, *, keys_only: bool | None
) -> tuple[list[_Frame], _Slots, Evenly[_Frame], Reading]:
    with opened(path, keys_only=keys_only) as (container, reading):
        size = reading.width * reading.height * 3
        most = max(min(most, room // size), 1)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        needed = min(most, reading.frames or most) * size
        if needed > free:
            raise ResvitError(
                f"The frames of {path} need {-(-needed >> 20)} MiB in {tempfile.gettempdir()}, where {free >> 20} MiB "
                "are free.",
                "Make room there, or name another folder by the variable TMPDIR.",
                ExitCode.SYSTEM,
            )
        # Of key frames there are few, and nobody knows how many.
        step = 1 if reading.keys_only else reading.frames // CANDIDATES
        even: Evenly[_Frame] = Evenly(most, step)
        store = _Slots(reading.height, reading.width)
        decoded: Iterator[Any] = frames_of(container, reading)
        if reading.frames and not reading.keys_only:
            decoded = reporter.track(decoded, f"decode {path.name}", reading.frames)
        for place, frame in enumerate(decoded):
            if not even.wants(place):
                continue
            small = frame.reformat(width=GRID, height=GRID, format="rgb24", interpolation="AREA").to_ndarray()
            if even.shows_something_new(small):
                values = frame.to_ndarray(format="rgb24")
                title = f"{path.name} at {clock(float(frame.time or 0.0))}"
                held = _Frame(title, number, store.put(values), round(frame.rotation / 90) % 4)
                for given in even.hold(place, small, held):
                    store.give_back(given.slot)
    return even.items, store, even, reading


def _notes(path: Path, frames: list[_Frame], even: Evenly[_Frame], reading: Reading) -> list[str]:
    which = "key frames" if reading.keys_only else "frames"
    notes = [
        f"{path.name}: {len(frames)} of {reading.decoded} {which} are used, evenly spread over "
        f"{clock(reading.reached)}; {even.alike} of {even.looked} that were looked at show the same as another and "
        f"were dropped ({SAME})"
    ]
    least, share = (15.0, 0.05) if reading.keys_only else (0.5, 0.03)
    if reading.duration - reading.reached > max(least, share * reading.duration):
        notes.append(f"{path.name} ends early, at {clock(reading.reached)} of {clock(reading.duration)}: not whole")
    if reading.damaged:
        notes.append(f"{path.name} is damaged: {reading.damaged} packets or frames cannot be decoded and are left out")
    if reading.other_size:
        size = f"{reading.width}x{reading.height}"
        notes.append(f"{reading.other_size} frames of {path.name} are not {size} as the first, and are left out")
    turned = sum(frame.quarters != 0 for frame in frames)
    if turned:
        notes.append(f"{turned} frames of {path.name} are turned upright, as it says and players do")
    return notes


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03.4``."""
    minutes, rest = divmod(max(seconds, 0.0), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{int(rest):02}" if hours else f"{minutes}:{rest:04.1f}"


def named_films(root: Path) -> tuple[Path, ...]:
    """The films of a folder; raises ``ResvitError`` where there is none."""
    found = films_in(root)
    if not found:
        raise ResvitError(f"{root} holds no films.", f"Films end in {shortened(list(ENDINGS))}; name one, video:FILM.")
    return found
