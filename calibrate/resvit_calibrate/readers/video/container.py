"""Opening a film with PyAV, as one of the containers that are known by their first bytes, and reading its frames.

FFmpeg would guess the container itself, and some that it knows are lists of other files and addresses
(https://ffmpeg.org/ffmpeg-formats.html): none of these is ever opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import open_outside

ENDINGS = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv"),
    *(".asf", ".ogv", ".h264", ".264", ".ivf"),
)
_STARTS = (
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, b"FLV\x01", "flv"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"OggS", "ogg"),
    (0, b"DKIF", "ivf"),
    (0, b"\0\0\x01\xba", "mpeg"),
    (0, b"\0\0\x01\xb3", "mpegvideo"),
    (0, b"\0\0\0\x01\x67", "h264"),
    (0, b"\0\0\0\x01\x40\x01", "hevc"),
    *((4, box, "mov") for box in (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free")),
)
_HEAD = 600
_PACKET, _SYNC = 188, 0x47
_MOST_PIXELS = 1 << 26
_LONG = 60_000
"""Frames beyond which only key frames are decoded: half an hour at 30 a second."""
_FIX = "Give a film that a player shows whole, or convert it: ffmpeg -i FILM -c:v libx264 film.mp4."


@dataclass
class Reading:
    """What is found of a film while it is read. ``duration`` and ``reached`` are seconds; 0 where nothing says."""

    width: int
    height: int
    frames: int
    duration: float
    keys_only: bool
    reached: float = 0.0
    decoded: int = 0
    damaged: int = 0
    """Packets and frames that cannot be decoded, or were only in part."""
    other_size: int = 0


def format_of(path: Path) -> str | None:
    """FFmpeg's name for the container of a film, by its first bytes; None for all other files."""
    try:
        with open_outside(path) as stream:
            start = stream.read(_HEAD)
    except ResvitError:
        return None
    if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
        return "avi"
    for first in (0, 4):  # a Blu-ray's packets begin with a time stamp of four bytes
        places = [first + number * (first + _PACKET) for number in range(3)]
        if len(start) > places[-1] and all(start[place] == _SYNC for place in places):
            return "mpegts"
    return next((name for at, mark, name in _STARTS if start[at : at + len(mark)] == mark), None)


@contextlib.contextmanager
def opened(path: Path, *, keys_only: bool | None = None) -> Iterator[tuple[Any, Reading]]:
    """The film's container and what its header says; ``keys_only``: no frames but these, None where the film is long.

    Raises ``ResvitError`` where PyAV is missing, and where the file is no film or none that can be opened.
    """
    library = _av()
    found = format_of(path)
    if found is None:
        raise ResvitError(f"{path} is no film that is known.", _FIX)
    try:
        container = library.open(str(path), format=found, options={"protocol_whitelist": "file"})
    except (library.FFmpegError, ValueError) as error:
        raise ResvitError(
            f"{path} cannot be opened as a film ({found}): {_said(error)}. It may have been copied in part, or its "
            "recording never finished.",
            _FIX,
        ) from error
    with container:
        streams = [one for one in container.streams.video if not _is_cover(one) and one.codec_context is not None]
        if not streams and container.streams.video:
            raise ResvitError(f"The codec of {path} is not known.", _FIX)
        if not streams:
            raise ResvitError(f"{path} has no pictures, only {_others(container)}.", "Give a film.")
        stream = streams[0]
        width, height = int(stream.width or 0), int(stream.height or 0)
        if not 0 < width * height <= _MOST_PIXELS:
            raise ResvitError(f"{path} says that its frames are {width}x{height}.", _FIX)
        duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        duration = duration or (container.duration or 0) / library.time_base
        rate = float(stream.average_rate or 0)
        frames = int(stream.frames or duration * rate)
        reading = Reading(width, height, frames, duration, frames > _LONG if keys_only is None else keys_only)
        if reading.keys_only:
            stream.codec_context.skip_frame = "NONKEY"
        stream.thread_type = "AUTO"
        yield container, reading


def frames_of(container: Any, reading: Reading) -> Iterator[Any]:
    """The frames in order; what cannot be decoded is counted in ``reading`` and passed over."""
    library = _av()
    stream = next(one for one in container.streams.video if not _is_cover(one) and one.codec_context is not None)
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames = packet.decode()
        except library.error.EOFError:
            return
        except (library.FFmpegError, ValueError):
            reading.damaged += 1
            if reading.damaged > _LONG:
                return
            continue
        for frame in frames:
            reading.decoded += 1
            if frame.time is not None:
                reading.reached = max(reading.reached, float(frame.time))
            if frame.is_corrupt:
                reading.damaged += 1
            elif (frame.width, frame.height) != (reading.width, reading.height):
                reading.other_size += 1
            else:
                yield frame


def _is_cover(stream: Any) -> bool:
    """Whether a stream is a picture on the cover, and no film."""
    return "attached_pic" in str(stream.disposition).lower()


def _others(container: Any) -> str:
    kinds = sorted({stream.type for stream in container.streams})
    return ", ".join(kinds) or "nothing at all"


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", "") or error).rstrip(".")[:200]


def _av() -> Any:
    try:
        import av
        import av.container
    except ImportError as error:
        raise ResvitError(
            f"Reading a film needs PyAV: {error}.", "pip install 'resvit-export[video]'.", ExitCode.MISSING
        ) from error
    av.logging.set_level(None)
    return av
