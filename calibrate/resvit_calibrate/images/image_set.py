"""What a set of images is to the rest of the tool, whatever it was read from."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL, Geometry, Target, TargetOptions
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import Size

if TYPE_CHECKING:
    from resvit_calibrate.images.class_list import ClassList
    from resvit_calibrate.images.pixels import Look


@dataclass(frozen=True)
class DataSpec:
    """Which images to calibrate with and which to validate on.

    ``data`` is ``fashion-mnist``, a folder (class folders, ``images`` beside ``masks`` or ``depth``, or COCO's
    annotations; each also with ``train`` and ``val`` inside), an ``.npz`` file, or ``package.module:factory`` or
    ``file.py:factory``. ``folder:``, ``coco:``, ``masks:`` or ``depth:`` before a path says which kind it is.
    ``validation_data`` is of the same kinds; without it, validation images are taken from ``data``, apart from
    the calibration images. ``validation_images`` = None takes all that are left. ``seed`` decides which images
    are chosen. ``unlabelled`` allows validation images of which nothing is known, and ``unjudged`` those that are all
    of one class, since the network is not judged by classes. ``classes`` are the network's, as the user says, and
    ``known_classes`` as its own configuration does (see ``data.numbering``). ``said`` names the settings of the
    preprocessing that the user gave: what data leave open is in doubt where it is not among them. ``objects`` are data
    sets in memory, by the names that stand for them in ``data`` and ``validation_data``.
    """

    data: str
    validation_data: str | None = None
    calibration_images: int = 512
    validation_images: int | None = None
    seed: int = 0
    reading: TargetOptions = AS_USUAL
    unlabelled: bool = False
    unjudged: bool = False
    classes: ClassList | None = None
    known_classes: ClassList | None = None
    said: frozenset[str] = frozenset()
    objects: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.data.strip() or (self.validation_data is not None and not self.validation_data.strip()):
            raise ResvitError("The name of the data is empty.", "Give a folder, an .npz file or a factory.")
        if self.calibration_images < 1 or (self.validation_images is not None and self.validation_images < 1):
            raise ResvitError(
                f"{self.calibration_images} calibration and {self.validation_images} validation images were "
                "asked for; both need at least one.",
                "Ask for 512 calibration images, and leave the number of validation images out to use all.",
            )
        if not 0 <= self.seed < 2**32:
            raise ResvitError(f"The seed {self.seed} is out of range.", "Choose one from 0 to 4294967295.")


@dataclass(frozen=True)
class Batch:
    """Images float32 [B, C, H, W], C-contiguous and preprocessed, and what is known of each.

    ``labels`` int64 [B] are the classes of whole images, ``targets`` the boxes, masks, depths or texts in
    them, in pixels of the network's input. ``geometry`` says how each image became input, where that is known.
    ``inputs`` are what the network reads beside the images, arrays [B, …] by the names of its inputs.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None
    targets: tuple[Target, ...] | None = None
    geometry: tuple[Geometry, ...] | None = None
    inputs: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def feeds(self, image_input: str = "input") -> dict[str, npt.NDArray[Any]]:
        """All that the network reads, the images under the name ``image_input``."""
        return {image_input: self.images, **self.inputs}

    def first(self, count: int) -> Batch:
        """The first ``count`` images, or all if there are fewer, with all that is known of them."""
        part = slice(count)
        return Batch(
            self.images[part],
            None if self.labels is None else self.labels[part],
            None if self.targets is None else self.targets[part],
            None if self.geometry is None else self.geometry[part],
            {name: value[part] for name, value in self.inputs.items()},
        )


ImageSource: TypeAlias = Callable[[int], Iterable[Batch]]
"""The first so many images of a set, or all if there are fewer, in batches of any size."""


class ImageSet(abc.ABC):
    """Images in a fixed order that can be streamed again and again in bounded memory.

    ``contents`` has one digest per image, before preprocessing; ``digest`` is the SHA-256 over them, the
    labels and the targets, in order. ``preprocess`` is what these images really go through. ``num_classes`` and
    ``class_names`` are None and empty where the data does not say. ``converted`` counts the images whose
    colours are not the network's: grey for a colour network, or colour for a grey one; ``looks`` holds what else is
    known of each without decoding it, of image files and arrays. ``factory`` names the user's code that made the
    network's input, so that ``preprocess`` is only the size that it must have. ``doubt`` says why answers to these
    images tell nothing, empty where nothing does. ``task`` is
    ``classification``, ``detection``, ``segmentation``, ``depth`` or ``text`` by what is known of the images, None
    where nothing is. ``class_ids`` are the numbers that the data itself gives to class 0, 1, 2…, where it has others.
    """

    description: str
    digest: str
    contents: tuple[bytes, ...]
    preprocess: Preprocess
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    class_ids: tuple[int, ...] = ()
    task: str | None = None
    converted: int = 0
    looks: Sequence[Look] = ()
    factory: str | None = None
    doubt: str = ""
    shared: int = 0
    """Of validation images: how many of them were among the calibration images too, and were left out there."""

    @property
    def prepared(self) -> bool:
        """Whether somebody else's code made the network's input."""
        return self.factory is not None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Count the images that ``batches`` gives; broken ones leave the count when they are found."""

    @abc.abstractmethod
    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Stream all images in order, ``batch_size`` at a time; the last batch may be smaller."""

    def first(self, count: int, batch_size: int) -> Iterator[Batch]:
        """Stream the first ``count`` images, or all if there are fewer."""
        for batch in self.batches(min(batch_size, max(count, 1))):
            if count <= 0:
                return
            yield batch.first(count)
            count -= len(batch.images)

    def batches_behind(self, count: int, batch_size: int) -> Iterator[Batch]:
        """Stream what ``batches`` gives behind its first ``count`` images, which end a batch."""
        seen = 0
        for batch in self.batches(batch_size):
            if seen >= count:
                yield batch
            seen += len(batch.images)

    @property
    def left_out(self) -> Mapping[int, str]:
        """The images that broke while they were decoded, by their place in ``contents``, each with the reason."""
        return {}

    def leave_out(self, broken: Mapping[int, str]) -> None:
        """Take it that these images break, as ``left_out`` said of the same set before."""
        del broken

    def batches_in_sizes(self, sizes: Sequence[Size], batch_size: int) -> Iterator[Batch]:
        """Stream all images in order, batch by batch in another one of ``sizes`` (height, width).

        Batches are as small as it takes for every size to have its turn; where there are fewer images than sizes, all
        of them come in each. Which image has which size is the same each time.

        Raises:
            ResvitError: INPUT where somebody else's code made the network's input, which then has one size.
        """
        del sizes, batch_size
        raise ResvitError(
            f"The images are to come in several sizes, and {self.factory} gives them in one ({self.description}).",
            "Give a folder of images or an .npz, which are prepared here, or name one size with --input-shape.",
        )

    @property
    @abc.abstractmethod
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Labels int64 [N] in the order of ``batches``, or None."""

    @abc.abstractmethod
    def without(self, contents: frozenset[bytes]) -> ImageSet:
        """Leave out the images whose digest is in ``contents``."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Name the images that could not be read, each with the reason."""
        return ()

    def image(self, index: int) -> npt.NDArray[np.uint8] | None:
        """Read one image for people to look at: uint8 [H, W, 1 or 3], or None where there is none."""
        del index
        return None

    def pictures(self, places: Sequence[int]) -> Iterator[npt.NDArray[np.uint8] | None]:
        """Read several images for people to look at, in order: as ``image``, None too where one breaks."""
        for place in places:
            yield self.image(place)

    def target(self, index: int) -> Target | None:
        """What is in ``image(index)``, in that image's own pixels, or None where there is no such thing."""
        del index
        return None


def digest_of(contents: Sequence[bytes], labels: npt.NDArray[np.int64] | None, targets: Sequence[bytes] = ()) -> str:
    """SHA-256 over the digests of images, their labels and their targets, in order, as 64 hexadecimal digits."""
    digest = hashlib.sha256(b"".join(contents))
    digest.update(b"no labels" if labels is None else labels.astype("<i8").tobytes())
    digest.update(b"".join(targets))
    return digest.hexdigest()
