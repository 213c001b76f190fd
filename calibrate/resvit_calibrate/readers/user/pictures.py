"""Pictures of a data set that is a Python object, by number: prepared as pictures in files are."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import UNSEEN, BrokenImage, Look, Untargeted, with_range
from resvit_calibrate.readers.user.objects import ITEMS, class_names_of, item_of, labels_told, parts_of
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.decode import AS_USUAL, Decoding, eight_bits

_MOST = 5_000_000
_TRIED = 8
_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "F")


class DatasetPixels(Untargeted):
    """The items of ``made``, which has ``__len__`` and ``__getitem__``; ``text`` is what messages call it.

    Labels that it keeps itself (``targets``) are taken where some items say the same; else every item is read once.
    Raises ``ResvitError`` for items that are no pictures, and where some have a label and others none.
    """

    def __init__(self, text: str, name: str, made: Any) -> None:
        self._text, self._made, self._lock = text, made, threading.Lock()
        self.name = name
        self.native_size: tuple[int, int] | None = None
        self.class_names = class_names_of(made)
        self.num_classes = len(self.class_names) or None
        self._count = len(made)
        if not 0 < self._count <= _MOST:
            raise ResvitError(f"{text} says that it has {self._count} items.", ITEMS)
        self._looks: dict[int, Look] = {}
        self.labels = self._labels()
        self.task = None if self.labels is None else "classification"
        if self.labels is not None and self.class_names and int(self.labels.max()) >= len(self.class_names):
            raise ResvitError(
                f"{text} gives the class {int(self.labels.max())}, but names {len(self.class_names)} classes.",
                "Classes are numbered from 0; check `classes` of the data set and its target_transform.",
            )
        told = getattr(made, "told", f"pictures ({type(made).__name__}, {self._count} items)")
        self.notes: tuple[str, ...] = (f"{name} gives {told}: they are prepared here, as files are",)

    def __len__(self) -> int:
        return self._count

    def title(self, index: int) -> str:
        """Name one image by its number."""
        return f"{self.name}[{index}]"

    def look(self, index: int) -> Look:
        """Digest one picture's values, and see that its label is the one that the data set keeps."""
        if index not in self._looks:
            values, label = self._item(index)
            if label != (None if self.labels is None else int(self.labels[index])):
                told = "none" if self.labels is None else int(self.labels[index])
                raise ResvitError(
                    f"Item {index} of {self._text} has the class {label}, and its `targets` say {told}.",
                    "Leave `targets` out of the data set, or let it say what items say.",
                )
            return looked_at(values)
        return self._looks[index]

    def read(self, index: int, decoding: Decoding = AS_USUAL, seen: Look = UNSEEN) -> npt.NDArray[np.uint8]:
        """One picture as 8 bits: uint8 [H, W, 1 or 3]."""
        values = self._values(index)
        if seen.content and looked_at(values).content != seen.content:
            raise self._changed(index)
        try:
            return eight_bits(values, decoding.white)
        except ValueError as error:
            raise BrokenImage(str(error)) from error

    def _values(self, index: int) -> npt.NDArray[Any]:
        with self._lock:
            image = parts_of(self._text, item_of(self._text, self._made, index), index).image
            return values_of(self._text, image, index)

    def _changed(self, index: int) -> ResvitError:
        return ResvitError(
            f"{self._text} does not give the same picture each time: item {index} is another one than before.",
            "Switch off its random augmentation: both networks must see the same images.",
        )

    def _item(self, index: int) -> tuple[npt.NDArray[Any], int | None]:
        with self._lock:  # files and databases that it holds open are rarely for several threads at once
            parts = parts_of(self._text, item_of(self._text, self._made, index), index)
            return values_of(self._text, parts.image, index), label_of(self._text, parts.known, index)

    def _labels(self) -> npt.NDArray[np.int64] | None:
        told = labels_told(self._made)
        tried = np.unique(np.linspace(0, self._count - 1, _TRIED).astype(int)).tolist()
        if told is not None and all(self._item(index)[1] == told[index] for index in tried):
            return self._checked(told)
        found: list[int | None] = []
        for index in range(self._count):
            values, label = self._item(index)
            self._looks[index] = looked_at(values)
            found.append(label)
        known = [label for label in found if label is not None]
        if not known:
            return None
        if len(known) < len(found):
            raise ResvitError(
                f"{self._text} gives a class for {len(known)} of {len(found)} items.", "Give one for each, or for none."
            )
        return self._checked(np.array(known, np.int64))

    def _checked(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if int(labels.min()) < 0:
            raise ResvitError(f"{self._text} gives the class {int(labels.min())}.", "Classes are numbered from 0.")
        return labels


def values_of(text: str, image: Any, index: int) -> npt.NDArray[Any]:
    """A picture's values [H, W, 1 or 3], uint8 or of more bits, from PIL's picture or an array in either layout."""
    if hasattr(image, "getexif") and hasattr(image, "mode"):
        return _from_pillow(image)
    try:
        values = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ResvitError(f"Item {index} of {text} holds no image but a {type(image).__name__}.", ITEMS) from error
    if values.dtype != np.uint8 and values.dtype.newbyteorder("=") != np.uint16:
        raise ResvitError(
            f"Item {index} of {text} is of type {values.dtype}, where others are pictures.",
            f"Give all items in one form. {ITEMS}",
        )
    if values.ndim == 2:
        return np.ascontiguousarray(values[..., None])
    first, last = (values.ndim == 3 and values.shape[place] in (1, 3) for place in (0, -1))
    # Of a small picture both may fit: tensors have their channels first, arrays last.
    if first and (not last or hasattr(image, "detach")):
        return np.ascontiguousarray(values.transpose(1, 2, 0))
    if not last or 0 in values.shape:
        raise ResvitError(
            f"Item {index} of {text} has the shape {list(values.shape)}, which is not one of a picture.", ITEMS
        )
    return np.ascontiguousarray(values)


def label_of(text: str, known: Any, index: int) -> int | None:
    """The class number of an item, None where it has none; raises ``ResvitError`` for anything else."""
    if known is None:
        return None
    if isinstance(known, str):
        raise ResvitError(
            f"Item {index} of {text} gives its class as a text, {known[:40]!r}.",
            "Give its number from 0, as the network's outputs are; `classes` of the data set says what each is called.",
        )
    value = np.asarray(known) if not isinstance(known, dict) else np.empty(0, object)
    if value.shape in ((), (1,)) and value.dtype.kind == "f":
        raise ResvitError(
            f"Item {index} of {text} gives its class as a number with a point, {float(value.reshape(())):g}.",
            "Give whole numbers from 0: `int(label)`.",
        )
    if value.ndim == 1 and value.dtype.kind in "iufb" and value.size > 1:
        one = np.count_nonzero(value) == 1 and value.max() == 1
        told = "one of which is 1 (one-hot)" if one else "and a picture has one class"
        raise ResvitError(
            f"Item {index} of {text} has a label of {value.size} numbers, {told}.",
            f"Give the number of its class from 0{': `int(label.argmax())`' if one else ''}.",
        )
    if value.shape not in ((), (1,)) or value.dtype.kind not in "iu":
        what = f"of shape {list(value.shape)}" if value.dtype.kind in "iufb" else f"a {type(known).__name__}"
        raise ResvitError(
            f"Item {index} of {text} has a label that is {what}, and no class number.",
            "Pictures have a class number from 0, a mask, a dictionary with `boxes` and `labels` or with `text`, or "
            "nothing.",
        )
    return int(value.reshape(()))


def _from_pillow(image: Any) -> npt.NDArray[Any]:
    # Nothing is turned: whoever trained with this data set saw its pictures as they are.
    if image.mode in _GREY:
        return np.array(image.convert("L"), np.uint8)[:, :, None]
    if image.mode in _DEEP or image.mode.startswith("I;16"):
        return np.asarray(image)[:, :, None]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)


def looked_at(values: npt.NDArray[Any]) -> Look:
    """What is told of a picture by its values [H, W, C]."""
    found = Look(hashlib.sha256(values.tobytes()).digest(), values.shape[2] == 3, stored=values.shape[:2])
    return found if values.dtype == np.uint8 else with_range(found, values)
