"""What a task is: how a network's outputs are kept, scored against what is known, and compared."""

from __future__ import annotations

import abc
import contextlib
import io
import itertools
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.classes import INPUT
from resvit_calibrate.answers.parts import Parts
from resvit_calibrate.gate.comparison import Comparison
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.targets import BoxTarget, DepthTarget, MaskTarget, Target, TextTarget
from resvit_calibrate.readers.user.code import Reads
from resvit_engines.answers.options import Array
from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.progress import SILENT, Reporter

if TYPE_CHECKING:
    from resvit_calibrate.runtime.runner import Runner

_T = TypeVar("_T", bound=Target)
PART_SECONDS = 30.0
"""So much work is lost at most when a validation is killed."""
_TRIED = 2
_KINDS = {BoxTarget: "boxes", MaskTarget: "masks", DepthTarget: "depths", TextTarget: "texts"}


class Answers(Protocol):
    """All that is kept of one network on N images, with what is known of them."""

    def __len__(self) -> int:
        """Count the images."""

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""

    def first(self, count: int) -> Answers:
        """Keep the first ``count`` images only."""


@dataclass(frozen=True)
class Place:
    """Where a batch is in its set: ``before`` images come before it, and the set was opened with ``count``."""

    before: int
    count: int


class Task(abc.ABC):
    """One kind of network: its outputs, its metrics, what counts as agreement, and what changed.

    ``metric`` is the first metric, which the gate holds to the largest drop, given in ``unit``; of an error, such as
    AbsRel, ``lower_is_better``.
    """

    name: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    metric: str
    unit: str
    reads: Reads | None = None
    """What code of the user's has read while it had a part in the answers; None where it has none."""

    @abc.abstractmethod
    def kept(self, batch: Batch, outputs: Mapping[str, Array], image_set: ImageSet, place: Place) -> Any:
        """What comparing needs of one network's outputs for one batch: answers about its images.

        Raises ``ResvitError`` for outputs that are not the task's, and images of which the task needs to know more.
        """

    @abc.abstractmethod
    def joined(self, parts: Sequence[Any]) -> Any:
        """One or more answers about parts of a set, in order, as the answers about all of it."""

    def require_judgeable(self, answers: Any, image_set: ImageSet) -> None:
        """Refuse answers about a whole set of which nothing can be measured; raises ``ResvitError``."""
        del answers, image_set

    def answers_of(
        self,
        runners: Mapping[str, Runner],
        image_set: ImageSet,
        batch_size: int,
        reporter: Reporter = SILENT,
        stores: Mapping[str, Parts] | None = None,
    ) -> dict[str, Any]:
        """The answers of several networks by name, each image decoded once for all of them.

        What lies in ``stores``, by the same names, is not asked again; there the answers are kept every
        ``PART_SECONDS``, and when the asking ends early. They say the same, to the byte, as those of one go. Raises as
        ``kept`` and ``require_judgeable``.
        """
        asked = {name: _Asked(self, image_set, (stores or {}).get(name)) for name in runners}
        start = min(one.end for one in asked.values())
        what, total = f"validate ({', '.join(runners)})", len(image_set)
        if start:
            reporter.say(f"validate goes on where it was stopped: {start:,} of {total:,} images are answered")
        before, kept_at = start, time.monotonic()
        try:
            batches = image_set.batches_behind(start, batch_size)
            for batch in reporter.track(batches, what, total, batch_size, start):
                before = _ask_about(batch, asked, runners, before)
                if time.monotonic() - kept_at >= PART_SECONDS:
                    for one in asked.values():
                        one.keep()
                    kept_at = time.monotonic()
        except BaseException:
            for one in asked.values():
                with contextlib.suppress(Exception):  # what ended the asking is what is told
                    one.keep()
            raise
        if not before:
            raise ResvitError(f"There is no image ({image_set.description}).", "Give more images.")
        return {name: one.all() for name, one in asked.items()}

    def answer_range(
        self,
        runners: Mapping[str, Runner],
        image_set: ImageSet,
        batch_size: int,
        between: tuple[int, int],
        stores: Mapping[str, Parts],
    ) -> None:
        """Ask about the images from the first of ``between`` up to the second, and keep it as one part of each store.

        The first is a multiple of the batch size. Raises as ``kept`` and ``Parts.write``.
        """
        first, last = between
        asked = {name: _Asked(self, image_set, stores[name], first) for name in runners}
        before = first
        for batch in image_set.batches_behind(first, batch_size):
            before = _ask_about(batch, asked, runners, before)
            if before >= last:
                break
        for one in asked.values():
            one.keep()

    def require_answers(self, runner: Runner, image_set: ImageSet) -> None:
        """Ask a network about one batch of ``_TRIED`` images and keep nothing, before anything depends on its answers.

        Raises as ``kept``.
        """
        for batch in itertools.islice(image_set.batches(_TRIED), 1):
            self.kept(batch, _outputs(runner, batch), image_set, Place(0, len(image_set.contents)))

    def answers(self, runner: Runner, image_set: ImageSet, batch_size: int) -> Any:
        """The answers of one network; raises as ``answers_of``."""
        return self.answers_of({"outputs": runner}, image_set, batch_size)["outputs"]

    @abc.abstractmethod
    def load(self, data: bytes, where: str) -> Answers:
        """Read what ``Answers.save`` wrote, which errors call ``where``; raises ``ResvitError`` for anything else."""

    @abc.abstractmethod
    def compare(self, reference: Any, candidate: Any, confidence: float = 0.95) -> Comparison:
        """Measure the candidate's answers against the reference's, on the same images in the same order.

        Raises ``ResvitError`` for answers about other images, and a reference that gives NaN or infinity.
        """

    @abc.abstractmethod
    def changed(self, reference: Any, candidate: Any) -> list[dict[str, Any]]:
        """List the images that the two answer differently.

        Each has ``index``, ``label`` (or None), and what both said under ``float`` and ``quantized``: a class
        number, or words.
        """

    def reading(self, answers: Any) -> dict[str, Any]:
        """The options by which a device reads outputs, as plain values, but for those that are as usual.

        What the user left open is said as ``answers``, the reference's, tell it.
        """
        del answers
        return {}

    def drawing(self, answers: Any, index: int) -> dict[str, Array]:
        """What was answered for one image, to be drawn over it; empty where there is nothing to draw."""
        del answers, index
        return {}


class _Asked:
    """One network that is asked about a set of images: what it has answered, in memory and in its store."""

    def __init__(self, task: Task, image_set: ImageSet, store: Parts | None, first: int = 0) -> None:
        self.task, self.images, self.store = task, image_set, store
        self._parts: list[Any] = []
        self._new: list[Any] = []
        self.end = first
        """How many images it, or others before it, have answered."""
        for record, answers in store.read(task.load) if store else ():
            image_set.leave_out(record.left_out)
            if task.reads is not None:
                task.reads.digests.update(record.reads)
                task.reads.unseen.update(record.unseen)
            self._parts.append(answers)
            self.end = record.last

    def ask(self, runner: Runner, batch: Batch, place: Place) -> None:
        """Ask it about the next batch."""
        self._new.append(self.task.kept(batch, _outputs(runner, batch), self.images, place))
        self.end += len(batch.images)

    def keep(self) -> None:
        """Write what is new into the store; raises as ``Parts.write``."""
        if not self._new or self.store is None:
            return
        part = self.task.joined(self._new)
        self.store.write(part, self.end - len(part), self.images.left_out, self.task.reads)
        self._parts.append(part)
        self._new = []

    def all(self) -> Any:
        """The answers to all images."""
        found = self.task.joined([*self._parts, *self._new])
        self.task.require_judgeable(found, self.images)
        return found


def _ask_about(batch: Batch, asked: Mapping[str, _Asked], runners: Mapping[str, Runner], before: int) -> int:
    """Ask those that have not answered about a batch behind ``before`` images; returns how many there are with it."""
    for name, one in asked.items():
        if one.end <= before:
            one.ask(runners[name], batch, Place(before, len(one.images.contents)))
    return before + len(batch.images)


def _outputs(runner: Runner, batch: Batch) -> dict[str, Array]:
    """The network's outputs, in which an image more or less than in the batch is refused."""
    outputs = {name: np.asarray(value) for name, value in runner(batch.feeds(INPUT)).items()}
    for name, value in outputs.items():
        if value.ndim and len(value) != len(batch.images):
            raise ResvitError(
                f"The output {name} has the shape {list(value.shape)} for {len(batch.images)} images.",
                "Every output must have one entry for each image, along its first axis.",
            )
    return outputs


def targets_of(batch: Batch, kind: type[_T], task: str, image_set: ImageSet) -> list[_T]:
    """What is known of a batch's images.

    Raises:
        ResvitError: where that is something else, saying what it is.
    """
    found = batch.targets or ()
    if len(found) == len(batch.images) and all(isinstance(target, kind) for target in found):
        return [target for target in found if isinstance(target, kind)]
    has = {_KINDS[type(target)] for target in found} or ({"class labels"} if batch.labels is not None else set())
    raise ResvitError(
        f"{task.capitalize()} needs {_KINDS[kind]} for every image, and the data has "
        f"{' and '.join(sorted(has)) or 'nothing but images'} ({image_set.description}).",
        f"Give data with {_KINDS[kind]}, or say what the network is for: --task other compares outputs alone.",
    )


def finite_images(outputs: Mapping[str, Array], count: int) -> npt.NDArray[np.bool_]:
    """Which images got finite values only: bool [B]."""
    fine = np.ones(count, bool)
    for value in outputs.values():
        if value.ndim and value.dtype.kind == "f":
            fine &= np.isfinite(value.reshape(count, -1)).all(axis=1)
    return fine


def save_arrays(path: Path, task: str, arrays: Mapping[str, Array]) -> None:
    """Write arrays and the task's name into an ``.npz`` file, whole or not at all."""
    with atomic_file(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, task=np.array(task), **arrays)  # type: ignore[arg-type]


def load_arrays(data: bytes, where: str, task: str) -> dict[str, Array]:
    """Read what ``save_arrays`` wrote for the same task, which errors call ``where``; nothing in it is executed.

    Raises:
        ResvitError: for a file that is damaged, or of another task.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if str(arrays.pop("task", "classification")) != task:
            raise ValueError(f"it is not of the task {task}")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ResvitError(
            f"The answers {where} cannot be read: {error}.", "Remove the run's folder and run again."
        ) from error
    return arrays


def require_same_images(same: bool, reference: Answers, candidate: Answers) -> None:
    """Raise ``ResvitError`` unless both are about the same images, and about any."""
    if not same or len(reference) != len(candidate):
        raise ResvitError(
            f"Two networks cannot be compared: {len(reference)} and {len(candidate)} images, or other targets.",
            "Run both on the same images; remove the run's folder if the data has changed.",
        )
    if not len(reference):
        raise ResvitError("There is no image to compare two networks on.", "Give validation images.")


def require_finite(finite: npt.NDArray[np.bool_]) -> None:
    """Raise ``ResvitError`` where the reference's outputs are not finite."""
    broken = int((~finite).sum())
    if broken:
        raise ResvitError(
            f"The reference network gives NaN or infinity for {broken} of {len(finite)} images.",
            "Check the checkpoint and the preprocessing: nothing can be compared with such a network.",
        )
