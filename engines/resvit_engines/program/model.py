"""A loaded bundle as a function from frames to answers, waited for or not."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.program.answers import Answer
from resvit_engines.program.frames import Order, Placement, frames_of, is_several
from resvit_engines.program.reading import Reading
from resvit_engines.run.feeds import Array, Arrays, checked_feeds, pieces
from resvit_engines.run.golden_files import encoded, input_name
from resvit_engines.run.runner import Lane, Runner

MOST_AT_ONCE = 64
"""Frames of one run where the model takes any number: more only take more memory."""


class Pending:
    """Answers that are being made; ``result`` waits for them."""

    def __init__(
        self,
        parts: list[tuple[Future[Arrays], int]],
        places: list[Placement],
        reading: Reading,
        least_score: float | None,
        several: bool,
    ) -> None:
        self._parts, self._places, self._several = parts, places, several
        self.reading, self._least_score = reading, least_score

    def done(self) -> bool:
        """Whether ``result`` would not wait."""
        return all(future.done() for future, _ in self._parts)

    def result(self, timeout: float | None = None) -> Any:
        """The answer for one frame, or a list of them for a list; see ``program.answers``.

        Raises:
            ResvitError: SYSTEM where the GPU failed, MISMATCH for answers that are NaN or infinite.
            TimeoutError: after ``timeout`` seconds, each batch for itself; it can be asked again.
        """
        answers: list[Answer] = []
        for future, count in self._parts:
            outputs = future.result(timeout)
            places = self._places[len(answers) : len(answers) + count]
            answers += self.reading.answers(outputs, places, self._least_score)
        return answers if self._several else answers[0]


@dataclass(frozen=True)
class Opened:
    """What a model is made of. ``batch`` is how few and how many images run at once, ``owned`` gives all of it back."""

    runner: Runner
    manifest: Manifest
    preprocess: PicturePreprocess
    reading: Reading
    golden: str | None
    batch: tuple[int, int]
    lanes: tuple[Lane, ...]
    owned: contextlib.ExitStack


class Model:
    """Frames in, answers out; ``resvit_engines.load`` makes it, and ``with`` or ``close`` gives everything back.

    Any number of threads may call it, and any may close it. ``label`` tells what computes, and ``why`` why that is not
    the engine, where it is not. ``golden`` is what the golden check found, None where it was left out. ``batch`` is how
    few and how many frames run at once: fewer are filled up, more run one batch after the other.
    """

    def __init__(self, opened: Opened, order: Order, least_score: float | None) -> None:
        self.manifest, self.preprocess, self.golden = opened.manifest, opened.preprocess, opened.golden
        self.label, self.why, self.batch = opened.runner.label, opened.runner.why, opened.batch
        self.note = ""
        """What could not be done as it was asked for, such as recording a CUDA graph."""
        self.reading, self._order, self._least_score = opened.reading, order, least_score
        self._inputs, self._image = opened.runner.inputs, input_name(opened.runner, opened.manifest)
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for lane in opened.lanes:
            self._lanes.put(lane)
        self._workers = ThreadPoolExecutor(len(opened.lanes), thread_name_prefix="resvit")
        self._waiting = threading.BoundedSemaphore(2 * len(opened.lanes))
        self._lock = threading.Lock()
        self._owned: contextlib.ExitStack | None = opened.owned

    def __call__(self, frames: object, beside: Mapping[str, Array] | None = None) -> Any:
        """The answer for a frame, or a list of answers for a list of frames; see ``submit``."""
        return self.submit(frames, beside).result()

    def submit(self, frames: object, beside: Mapping[str, Array] | None = None) -> Pending:
        """Begin with one frame, or a list of frames of any sizes, and return at once; ``result()`` gives the answers.

        A frame is uint8 [H, W, 3] in the order that ``load`` was told, or [H, W] in grey. The caller's thread prepares
        it: the memory of a frame may be used again as soon as this returns. ``beside`` is what the network reads beside
        images, [N, …] by name. Where twice as many batches as there are streams are under way, this waits.

        Raises:
            ResvitError: INPUT for anything that is no frame, or not one that the network takes.
        """
        given = frames_of(frames, self._order)
        places = [Placement.of(frame, self.preprocess) for frame in given]
        images = encoded(np.stack([self.preprocess.apply(frame) for frame in given]), self.manifest)
        if beside is not None and not (isinstance(beside, Mapping) and all(isinstance(name, str) for name in beside)):
            raise ResvitError(
                f"What is read beside the frames, a {type(beside).__name__}, does not name its arrays.",
                "Give a dictionary: {'NAME': array}.",
            )
        feeds, count = checked_feeds({self._image: images, **(beside or {})}, self._inputs)
        parts = [(self._begin(part, size), size) for part, size in pieces(feeds, count, self.batch)]
        return Pending(parts, places, self.reading, self._least_score, is_several(frames))

    def close(self) -> None:
        """Wait for what is under way, then give memory and files back. Closing twice does nothing."""
        with self._lock:
            owned, self._owned = self._owned, None
        if owned is not None:
            self._workers.shutdown()
            owned.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _begin(self, part: Arrays, size: int) -> Future[Arrays]:
        self._waiting.acquire()
        try:
            with self._lock:
                if self._owned is None:
                    raise ResvitError("The model is closed.", "Load it again.")
                return self._workers.submit(self._run, part, size)
        except BaseException:
            self._waiting.release()
            raise

    def _run(self, part: Arrays, size: int) -> Arrays:
        """The outputs of the first ``size`` images of a batch, on a stream that is free."""
        lane = self._lanes.get()
        try:
            lane.load(part)
            lane.submit()
            lane.wait()
            outputs, whole = lane.results(), len(part[self._image])
            self.note = self.note or lane.note
        finally:
            self._lanes.put(lane)
            self._waiting.release()
        return {name: value[:size] if value.ndim and len(value) == whole else value for name, value in outputs.items()}
