"""What a run keeps of its images, so that what was made of them is found when they have changed or are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.data.training_images import TrainingImages
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ResvitError
from resvit_engines.files import make_folder, pretty_json, write_atomic
from resvit_engines.records import Record, record_from_file

T = TypeVar("T")
FOLDER = "images"
"""Where in the run folder."""


class KeptImages(ImageSet):
    """All that is known of a set without reading any image; whoever asks for one is refused."""

    def __init__(self, record: Record) -> None:
        """Read what ``document_of`` wrote; ``ResvitError`` INPUT, naming the key, for anything else."""
        self._count = record.whole("count")
        self.description = record.text("description")
        self.digest = record.sha256("digest")
        self.contents = ()
        self.num_classes = record.optional("num_classes", record.whole)
        self.class_names = record.texts("class_names")
        self.task = record.optional("task", record.text)
        self.factory = record.optional("factory", record.text)
        self.doubt = record.text("doubt")
        self.shared = record.whole("shared")
        self.preprocess = Preprocess.from_json(record.plain("preprocess"))

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Refuse: the images themselves are not kept."""
        del batch_size
        raise self._not_here()

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Refuse: they are not kept."""
        raise self._not_here()

    def without(self, contents: frozenset[bytes]) -> ImageSet:
        """Refuse: what the images are is not kept."""
        del contents
        raise self._not_here()

    def _not_here(self) -> ResvitError:
        return _not_here(self.description)


class KeptTraining(TrainingImages):
    """What tells images to train on from others; whoever asks for one is refused."""

    def __init__(self, record: Record) -> None:
        """Read what ``keep_training`` wrote; ``ResvitError`` INPUT, naming the key, for anything else."""
        self._count = record.whole("count")
        self.description = record.text("description")
        self.digest = record.sha256("digest")
        self.task = record.optional("task", record.text)
        self.class_ids = ()

    def __len__(self) -> int:
        return self._count

    def batches_at(self, positions: npt.NDArray[np.int64], batch_size: int, skip: int = 0) -> Iterator[Batch]:
        """Refuse: the images themselves are not kept."""
        del positions, batch_size, skip
        raise _not_here(self.description)


@dataclass(frozen=True)
class KeptData:
    """Both sets of a run, and how its images become input."""

    calibration: KeptImages
    validation: KeptImages
    preprocess: Preprocess


def keep_data(run: Path, key: str, sets: tuple[ImageSet, ImageSet], preprocess: Preprocess) -> None:
    """Write down what is known of the sets that ``key``, 64 hexadecimal digits over recipe and network, leads to."""
    calibration, validation = (document_of(images) for images in sets)
    document = {"calibration": calibration, "validation": validation, "preprocess": preprocess.to_json()}
    _write(run, key, document)


def keep_training(run: Path, key: str, images: TrainingImages) -> None:
    """Write down what is known of images to train on."""
    known = {"count": len(images), "description": images.description, "digest": images.digest, "task": images.task}
    _write(run, key, known)


def kept_data(run: Path, key: str) -> KeptData | None:
    """Read what ``keep_data`` wrote for ``key``; None where there is nothing, or nothing of this form."""

    def read(record: Record) -> KeptData:
        calibration, validation = (KeptImages(record.record(name)) for name in ("calibration", "validation"))
        return KeptData(calibration, validation, Preprocess.from_json(record.plain("preprocess")))

    return _read(run, key, read)


def kept_training(run: Path, key: str) -> KeptTraining | None:
    """Read what ``keep_training`` wrote for ``key``; None where there is nothing, or nothing of this form."""
    return _read(run, key, KeptTraining)


def document_of(images: ImageSet) -> dict[str, Any]:
    """What is kept of a set, as plain JSON values."""
    return {
        "count": len(images),
        "description": images.description,
        "digest": images.digest,
        "num_classes": images.num_classes,
        "class_names": list(images.class_names),
        "task": images.task,
        "factory": images.factory,
        "doubt": images.doubt,
        "shared": images.shared,
        "preprocess": images.preprocess.to_json(),
    }


def _write(run: Path, key: str, document: dict[str, Any]) -> None:
    make_folder(run / FOLDER)
    write_atomic(_file(run, key), pretty_json(document))


def _read(run: Path, key: str, read: Callable[[Record], T]) -> T | None:
    if not _file(run, key).is_file():
        return None
    try:
        return read(record_from_file(_file(run, key)))
    except ResvitError:
        return None


def _not_here(description: str) -> ResvitError:
    return ResvitError(f"A finished run does not hold its images ({description}).", "Run 'build' again.")


def _file(run: Path, key: str) -> Path:
    return run / FOLDER / f"{key[:12]}.json"
