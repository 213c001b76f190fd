"""What a task is: how a network's outputs are kept, scored against what is known, and compared."""

from __future__ import annotations

import abc
import io
import itertools
import zipfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.classes import INPUT
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
Seen: TypeAlias = tuple[Batch, dict[str, Array]]
"""A batch and a network's outputs for it."""
Keeping: TypeAlias = Generator[None, "Seen | None", Any]
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


class Task(abc.ABC):
    """One kind of network: its outputs, its metrics, what counts as agreement, and what changed.

    ``metric`` is the first metric, which the gate holds to the largest drop, given in ``unit``.
    """

    name: ClassVar[str]
    metric: str
    unit: str
    reads: Reads | None = None
    """What code of the user's has read while it had a part in the answers; None where it has none."""

    @abc.abstractmethod
    def keeping(self, image_set: ImageSet) -> Keeping:
        """Keep what comparing needs of one network: sent each batch with its outputs, then ``None``, returns answers.

        Raises ``ResvitError`` for outputs that are not the task's, and images of which the task needs to know more.
        """

    def answers_of(
        self,
        runners: Mapping[str, Runner],
        image_set: ImageSet,
        batch_size: int,
        reporter: Reporter = SILENT,
    ) -> dict[str, Any]:
        """The answers of several networks by name, each image decoded once for all of them; raises as ``keeping``."""
        keepers = {name: self.keeping(image_set) for name in runners}
        for keeper in keepers.values():
            next(keeper)
        what = f"validate ({', '.join(runners)})"
        any_image = False
        for batch in reporter.track(image_set.batches(batch_size), what, len(image_set), batch_size):
            any_image = True
            for name, runner in runners.items():
                keepers[name].send((batch, _outputs(runner, batch)))
        if not any_image:
            raise ResvitError(f"There is no image ({image_set.description}).", "Give more images.")
        return {name: _returned(keeper) for name, keeper in keepers.items()}

    def require_answers(self, runner: Runner, image_set: ImageSet) -> None:
        """Ask a network about one batch of ``_TRIED`` images and keep nothing, before anything depends on its answers.

        Raises as ``keeping``.
        """
        keeper = self.keeping(image_set)
        next(keeper)
        for batch in itertools.islice(image_set.batches(_TRIED), 1):
            keeper.send((batch, _outputs(runner, batch)))
        keeper.close()

    def answers(self, runner: Runner, image_set: ImageSet, batch_size: int) -> Any:
        """The answers of one network; raises as ``keeping``."""
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


def _returned(keeper: Keeping) -> Any:
    """What a keeper returns once there is no more."""
    try:
        keeper.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a task keeps asking behind its last batch")


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
