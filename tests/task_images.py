"""Small sets of images with targets, and networks as functions, for the tests of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.targets import BoxTarget, Target

SIZE = (48, 64)


class Images:
    """Images whose first pixel is their number, so that a network of the tests knows which one it sees."""

    description = "a set of the tests"
    doubt = ""

    def __init__(self, targets: Sequence[Target] | None, labels=None, count=None, classes=None, ids=()) -> None:
        self.targets, self.known, self.num_classes, self.class_ids = targets, labels, classes, tuple(ids)
        self.count = count or len(targets if targets is not None else labels)
        self.contents = tuple(number.to_bytes(4, "big") for number in range(self.count))

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, self.count, size):
            numbers = np.arange(start, min(start + size, self.count))
            pixels = np.zeros((len(numbers), 1, *SIZE), np.float32)
            pixels[:, 0, 0, 0] = numbers
            labels = None if self.known is None else self.known[numbers]
            targets = None if self.targets is None else tuple(self.targets[i] for i in numbers)
            yield Batch(pixels, labels, targets)

    first, batches_behind = ImageSet.first, ImageSet.batches_behind
    left_out, leave_out = ImageSet.left_out, ImageSet.leave_out


def network(**outputs: np.ndarray):
    """A runner that gives what was prepared for each image."""

    def run(arrays):
        numbers = arrays["input"][:, 0, 0, 0].astype(int)
        return {name: values[numbers] for name, values in outputs.items()}

    return run


def some_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """Boxes of all sizes within the images."""
    corners = random.uniform(0, 0.6, (count, 2)) * (SIZE[1], SIZE[0])
    sides = random.uniform(0.08, 0.4, (count, 2)) * (SIZE[1], SIZE[0])
    return np.concatenate([corners, corners + sides], 1).astype(np.float32)


def scenes(random: np.random.Generator, count: int, classes: int = 4, crowds: float = 0.1) -> list[BoxTarget]:
    """Up to six objects in each image, some of them crowds."""
    found = []
    for _ in range(count):
        objects = int(random.integers(0, 7))
        found.append(
            BoxTarget(
                some_boxes(random, objects),
                random.integers(0, classes, objects),
                random.random(objects) < crowds,
            )
        )
    return found


def detector(random, targets, classes: int = 4, noise: float = 0.8, queries: int = 30, miss: float = 0.2):
    """Outputs ``boxes`` and ``scores`` of a detector that is wrong by ``noise`` pixels, and invents boxes."""
    boxes = np.stack([some_boxes(random, queries) for _ in targets])
    scores = random.beta(1, 8, (len(targets), queries, classes)).astype(np.float32)
    for i, target in enumerate(targets):
        for j, (box, kind) in enumerate(zip(target.boxes, target.classes, strict=True)):
            if random.random() > miss:
                boxes[i, j] = box + random.normal(0, noise, 4)
                scores[i, j, kind] = random.uniform(0.3, 1.0)
    return {"boxes": boxes, "scores": scores}
