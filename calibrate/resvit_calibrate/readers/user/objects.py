"""What a function of the user's may give, and how it is taken: batches, or torch's ``Dataset`` and ``DataLoader``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from resvit_calibrate.readers.user.batch import SHAPE
from resvit_engines.errors import ResvitError

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "picture")
LABEL_KEYS = ("label", "labels", "target", "targets", "class")
ITEMS = (
    "An item is (image, label), an image alone, or a dictionary with `image` and `label`: a PIL picture or uint8 array "
    "of any size, which is prepared here, or float32 [C, H, W] as the network reads it; and a class number from 0."
)
_NOTHING = object()
_NO_LOADERS = (str, bytes, Mapping, np.ndarray, np.generic, int, float)


class Kind(Enum):
    """How what a function gave is read."""

    BATCHES = "batches"
    LOADER = "a DataLoader"
    STREAM = "an IterableDataset"
    ITEMS = "a Dataset"


class Parts(NamedTuple):
    """One item of a data set: an image, and what is known of it or None."""

    image: Any
    known: Any


def kind_of(text: str, made: Any) -> Kind:
    """Tell what ``text`` gave, without reading from it but the first item of what has items by number.

    Raises ``ResvitError`` for what cannot be gone through, and for a ``DataLoader`` that shuffles.
    """
    data = sys.modules.get("torch.utils.data")  # who gives such an object has imported it
    streams = getattr(sys.modules.get("datasets"), "IterableDataset", ())
    if data is not None and isinstance(made, data.DataLoader):
        _require_order(text, made, data)
        return Kind.LOADER
    if (data is not None and isinstance(made, data.IterableDataset)) or isinstance(made, streams):
        return Kind.STREAM
    if isinstance(made, Mapping) and made and all(hasattr(part, "features") for part in made.values()):
        raise ResvitError(
            f"{text} gave {_called(made)}, with the parts {', '.join(map(str, made))}.",
            "Give one of its parts; a function with a parameter `split` gives one for each of both.",
        )
    if isinstance(made, Peeked):
        return Kind.STREAM if made.pictures else Kind.BATCHES
    if isinstance(made, (list, tuple)) and made and shows_picture(made[0]):
        return Kind.ITEMS
    own = type(made)
    by_number = hasattr(own, "__getitem__") and hasattr(own, "__len__") and not hasattr(made, "dtype")
    if (data is not None and isinstance(made, data.Dataset)) or (
        by_number and not isinstance(made, (*_NO_LOADERS, list, tuple))
    ):
        _require_items(text, made)
        return Kind.BATCHES if np.ndim(array_of(parts_of(text, item_of(text, made, 0), 0).image)) == 4 else Kind.ITEMS
    if isinstance(made, _NO_LOADERS) or not hasattr(own, "__iter__"):
        raise ResvitError(f"{text} gave {_called(made)}, which is no images.", f"{SHAPE} Or a Dataset or DataLoader.")
    return Kind.BATCHES


class Peeked:
    """What can be gone through once, whose first item was looked at and comes first all the same.

    ``pictures``: its items are pictures to be prepared here. Once more is asked for than the first, it has begun, and
    can't be gone through again.
    """

    def __init__(self, made: Iterator[Any]) -> None:
        self.name = type(made).__name__
        first = next(made, _NOTHING)
        self._waiting = [] if first is _NOTHING else [first]
        self._rest = made
        self.kept: Any = None
        """Its pictures, once they were taken."""
        self.pictures = first is not _NOTHING and shows_picture(first)

    def __iter__(self) -> Iterator[Any]:
        yield from self._waiting
        self._waiting = []
        yield from self._rest


def peeked(made: Any) -> Any:
    """An iterator with its first item known; all else as it is, with nothing taken from it."""
    return Peeked(made) if isinstance(made, Iterator) else made


def shows_picture(item: Any) -> bool:
    """Whether an item is one picture to be prepared here, alone or with what is known of it; batches are none."""
    known: Any = None
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
    elif isinstance(item, (tuple, list)):
        image, known = (item[0], item[1] if len(item) == 2 else None) if 1 <= len(item) <= 2 else (None, None)
    else:
        image = item
    if hasattr(image, "getexif") and hasattr(image, "mode"):
        return True
    if image is None or isinstance(image, (str, bytes, int, float, list, tuple)):
        return False
    values = array_of(image)
    whole = values.dtype in (np.uint8, np.uint16)
    coloured = values.ndim == 3 and (values.shape[0] in (1, 3) or values.shape[-1] in (1, 3))
    alone = known is None or isinstance(known, (Mapping, str)) or array_of(known).ndim == 0
    return whole and alone and (values.ndim == 2 or coloured)


def batches_from(text: str, made: Any) -> Iterator[Any]:
    """What a function gave as batches that are ready for the network; items become batches of one.

    Items by number come in a mixed order that is always the same, so that the first of them are of all classes.
    """
    kind = kind_of(text, made)
    if kind in (Kind.BATCHES, Kind.LOADER):
        try:
            yield from made
        except TypeError as error:
            if "collate" not in str(error):
                raise
            raise ResvitError(
                f"{text} gives pictures that torch cannot put into a batch: {str(error)[:200]}.",
                "Give the Dataset itself instead of a DataLoader: its pictures are then prepared here.",
            ) from error
        return
    if kind is Kind.STREAM:
        for position, item in enumerate(made):
            yield _batch_of_one(text, parts_of(text, item, position), position)
        return
    for position in np.random.RandomState(0).permutation(len(made)).tolist():
        yield _batch_of_one(text, parts_of(text, item_of(text, made, position), position), position)


def item_of(text: str, made: Any, position: int) -> Any:
    """One item; raises ``ResvitError`` where the data set fails to give it."""
    try:
        return made[position]
    except (ResvitError, MemoryError):
        raise
    except Exception as error:
        raise ResvitError(f"Item {position} of {text} failed: {type(error).__name__}: {error}", ITEMS) from error


def parts_of(text: str, item: Any, position: int) -> Parts:
    """Take one item apart; raises ``ResvitError`` for what is none."""
    if isinstance(item, Mapping):
        image, known = (next((key for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS))
        if image is None:
            told = ", ".join(map(str, item)) or "nothing"
            raise ResvitError(f"Item {position} of {text} is a dictionary with {told}, and no image.", ITEMS)
        return Parts(item[image], None if known is None else item[known])
    if isinstance(item, (tuple, list)):
        if not 1 <= len(item) <= 2:
            raise ResvitError(f"Item {position} of {text} has {len(item)} parts.", ITEMS)
        return Parts(item[0], item[1] if len(item) == 2 else None)
    if isinstance(item, (str, bytes, int, float)) or item is None:
        raise ResvitError(f"Item {position} of {text} is {_called(item)}, and no image.", ITEMS)
    return Parts(item, None)


def is_picture(image: Any) -> bool:
    """Whether an item's image is one to be prepared here: a PIL picture, or whole numbers."""
    if hasattr(image, "getexif") and hasattr(image, "mode"):
        return True
    return array_of(image).dtype.kind in "iu"


def array_of(image: Any) -> np.ndarray[Any, Any]:
    """A picture, tensor or list as an array; an empty one of objects where it is none."""
    try:
        return np.asarray(image)
    except (TypeError, ValueError, RuntimeError):
        return np.empty(0, object)


def _batch_of_one(text: str, parts: Parts, position: int) -> Any:
    image = array_of(parts.image)
    if image.dtype.kind != "f" or image.ndim != 3:
        what = "a picture" if is_picture(parts.image) else f"of type {image.dtype} and shape {list(image.shape)}"
        raise ResvitError(
            f"Item {position} of {text} is {what}, and not the network's input.",
            f"Give all items in one form, floats or pictures. {ITEMS}",
        )
    known = parts.known
    if known is None:
        return image[None]
    if isinstance(known, (Mapping, str)):
        return image[None], [known]
    return image[None], array_of(known)[None]


def _require_items(text: str, made: Any) -> None:
    try:
        count = len(made)
    except (TypeError, NotImplementedError) as error:
        raise ResvitError(f"{text} gave a Dataset without a length.", "Give it __len__ and __getitem__.") from error
    if not count:
        raise ResvitError(f"{text} gave a Dataset without any item.", ITEMS)


def _require_order(text: str, made: Any, data: Any) -> None:
    """Refuse what gives its images in another order each time."""
    samplers = [made.sampler, getattr(made.batch_sampler, "sampler", None)]
    random = (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)
    if any(isinstance(sampler, random) for sampler in samplers):
        raise ResvitError(
            f"{text} gave a DataLoader that shuffles: both networks must see the same images.",
            "Make it with shuffle=False and without random augmentation, or give the Dataset itself.",
        )


def _called(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def class_names_of(made: Any) -> tuple[str, ...]:
    """What a data set calls its classes: ``classes``, or a ClassLabel's names; empty where it says nothing."""
    for one in _inside(made):
        names: Any = getattr(one, "classes", None)
        features = getattr(one, "features", None)
        if names is None and isinstance(features, Mapping):
            names = next((getattr(features[key], "names", None) for key in LABEL_KEYS if key in features), None)
        if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()


def labels_told(made: Any) -> np.ndarray[Any, Any] | None:
    """The labels that a data set keeps beside its images, int64 [N]; None where it keeps none that are that."""
    if hasattr(made, "indices") and hasattr(made, "dataset"):
        below = labels_told(made.dataset)
        return None if below is None else below[np.asarray(made.indices, np.int64)]
    features = getattr(made, "features", None)
    column = next((key for key in LABEL_KEYS if isinstance(features, Mapping) and key in features), None)
    kept = [getattr(made, name, None) for name in ("targets", "labels", "_labels")]
    for values in [*kept, made[column][:] if column is not None else None]:
        if values is None or isinstance(values, str):
            continue
        array = array_of(values)
        if array.shape == (len(made),) and array.dtype.kind in "iu":
            return array.astype(np.int64)
    return None


def _inside(made: Any) -> Iterator[Any]:
    """A data set, and what it is a subset of."""
    for _ in range(8):
        yield made
        made = getattr(made, "dataset", None)
        if made is None:
            return
