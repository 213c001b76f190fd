"""Preprocessed images in a file: every quantiser reads exactly the same numbers, and none pays for preparing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_engines.files import sha256_bytes, write_atomic


class StoredImages(ImageSet):
    """Images float32 [N, C, H, W] in ``FOLDER/images.f32``, read a batch at a time; labels int64 [N] beside them."""

    def __init__(self, folder: Path, chosen: npt.NDArray[np.int64] | None = None) -> None:
        """Take the images at ``chosen``, int64 [N]; all without it."""
        facts = json.loads((folder / "images.json").read_bytes())
        self.description = facts["description"]
        self._folder = folder
        self._chosen = np.arange(facts["shape"][0], dtype=np.int64) if chosen is None else chosen
        self.digest = facts["digest"] if chosen is None else sha256_bytes(facts["digest"].encode() + chosen.tobytes())
        self.shape: tuple[int, ...] = (len(self._chosen), *facts["shape"][1:])
        digests = np.load(folder / "contents.npy")
        self.contents = tuple(digests[at].tobytes() for at in self._chosen)
        self._labels: npt.NDArray[np.int64] = np.load(folder / "labels.npy")[self._chosen]

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Read the images in order, without mapping the file: memory shall be the quantiser's, not the data's."""
        item = int(np.prod(self.shape[1:]))
        with (self._folder / "images.f32").open("rb") as file:
            for start in range(0, len(self), batch_size):
                size = min(batch_size, len(self) - start)
                images = np.empty((size, *self.shape[1:]), np.float32)
                for image, at in zip(images, self._chosen[start : start + size], strict=True):
                    file.seek(4 * item * int(at))
                    image[...] = np.fromfile(file, np.float32, item).reshape(image.shape)
                yield Batch(images, self._labels[start : start + size])

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels int64 [N]; zeros where the data has none that belong to the network."""
        return self._labels

    def without(self, contents: frozenset[bytes]) -> StoredImages:
        """The others, in their order."""
        kept = [at for at, own in zip(self._chosen, self.contents, strict=True) if own not in contents]
        return StoredImages(self._folder, np.array(kept, np.int64))


def store_images(images: ImageSet, folder: Path, batch: int = 64) -> StoredImages:
    """Preprocess ``images`` into ``folder``, unless the very same are there already."""
    record = folder / "images.json"
    key = json.dumps([images.digest, images.preprocess.to_json()], sort_keys=True)
    if record.is_file() and json.loads(record.read_bytes())["key"] == key and (folder / "contents.npy").is_file():
        return StoredImages(folder)
    record.unlink(missing_ok=True)
    parts = ((part.images, part.labels) for part in images.batches(batch))
    return _stored(parts, folder, key, images.digest, images.description)


def store_array(images: npt.NDArray[np.float32], folder: Path) -> StoredImages:
    """Write preprocessed images float32 [N, C, H, W] into ``folder``, without labels."""
    return _stored([(images.astype(np.float32), None)], folder, "", "", "an array")


def _stored(
    parts: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]],
    folder: Path,
    key: str,
    digest: str,
    description: str,
) -> StoredImages:
    folder.mkdir(parents=True, exist_ok=True)
    labels: list[npt.NDArray[np.int64]] = []
    contents: list[bytes] = []
    with (folder / "images.f32").open("wb") as stream:
        for images, known in parts:
            images.tofile(stream)
            shape = images.shape[1:]
            contents += [hashlib.sha256(np.ascontiguousarray(image)).digest() for image in images]
            labels.append(np.zeros(len(images), np.int64) if known is None else known)
    joined = np.concatenate(labels)
    np.save(folder / "labels.npy", joined)
    np.save(folder / "contents.npy", np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 32))
    facts = {"key": key, "digest": digest, "shape": [len(joined), *shape], "description": description}
    write_atomic(folder / "images.json", json.dumps(facts).encode())
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
