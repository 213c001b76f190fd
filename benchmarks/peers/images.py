"""Preprocessed images in a file: every quantiser reads exactly the same numbers, and none pays for preparing them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_engines.files import write_atomic


class StoredImages(ImageSet):
    """Images float32 [N, C, H, W] in ``FOLDER/images.f32``, read a batch at a time; labels int64 [N] beside them."""

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "images.json").read_bytes())
        self.description = facts["description"]
        self.digest = facts["digest"]
        self.contents = ()
        self.shape: tuple[int, ...] = tuple(facts["shape"])
        self._file = folder / "images.f32"
        self._labels: npt.NDArray[np.int64] = np.load(folder / "labels.npy")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Stream all images in order, without mapping the file: memory shall be the quantiser's, not the data's."""
        item = int(np.prod(self.shape[1:]))
        for start in range(0, len(self), batch_size):
            size = min(batch_size, len(self) - start)
            flat = np.fromfile(self._file, np.float32, size * item, offset=4 * item * start)
            yield Batch(flat.reshape(size, *self.shape[1:]), self._labels[start : start + size])

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels int64 [N]; zeros where the data has none that belong to the network."""
        return self._labels

    def without(self, contents: frozenset[bytes]) -> StoredImages:
        """Never asked for here: both sets are chosen before they are stored."""
        raise NotImplementedError


def store_images(images: ImageSet, folder: Path, batch: int = 64) -> StoredImages:
    """Preprocess ``images`` into ``folder``, unless the very same are there already."""
    record = folder / "images.json"
    key = json.dumps([images.digest, images.preprocess.to_json()], sort_keys=True)
    if record.is_file() and json.loads(record.read_bytes())["key"] == key:
        return StoredImages(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    labels: list[npt.NDArray[np.int64]] = []
    with (folder / "images.f32").open("wb") as stream:
        for part in images.batches(batch):
            part.images.tofile(stream)
            shape = part.images.shape[1:]
            labels.append(np.zeros(len(part.images), np.int64) if part.labels is None else part.labels)
    joined = np.concatenate(labels)
    np.save(folder / "labels.npy", joined)
    facts = {"key": key, "digest": images.digest, "shape": [len(joined), *shape], "description": images.description}
    write_atomic(record, json.dumps(facts).encode())
    return StoredImages(folder)


class Reader:
    """Calibration batches in the form that ONNX Runtime's and ModelOpt's quantisers pull."""

    def __init__(self, images: StoredImages, name: str, batch: int) -> None:
        self._images, self._name, self._batch = images, name, batch
        self.rewind()

    def __len__(self) -> int:
        return (len(self._images) + self._batch - 1) // self._batch

    def rewind(self) -> None:
        """Start again from the first batch."""
        self._feeds = ({self._name: part.images} for part in self._images.batches(self._batch))
        self._left: int | None = None

    def set_range(self, start_index: int, end_index: int) -> None:
        """Let the next ``end_index - start_index`` batches through; ranges are asked for in order."""
        if start_index == 0:
            self.rewind()
        self._left = end_index - start_index

    def get_first(self) -> dict[str, npt.NDArray[np.float32]]:
        """The first batch, without using it up."""
        return {self._name: next(self._images.batches(self._batch)).images}

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        """The next batch, ``None`` at the end."""
        if self._left is not None:
            if not self._left:
                return None
            self._left -= 1
        return next(self._feeds, None)
