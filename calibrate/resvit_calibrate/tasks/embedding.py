"""A vector for the whole image, to find images of the same class by: recall@1 and the cosine distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.base import (
    Answers,
    Place,
    Task,
    finite_images,
    load_arrays,
    require_finite,
    require_same_images,
    save_arrays,
)
from resvit_calibrate.answers.classes import sqnr
from resvit_calibrate.gate.bootstrap import Floats, resampled
from resvit_calibrate.gate.comparison import SHARE, Chance, Resampled
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_engines.answers.options import Array, options_from, stated
from resvit_engines.answers.vectors import EmbeddingOptions, vectors_of
from resvit_engines.errors import ResvitError

_SIMILARITIES = 1 << 24  # float32 held at once: 64 MiB
_DEEPEST = 5
_ALIKE = 1e-6
"""Cosine distance from the mean below which all embeddings are one."""


@dataclass(frozen=True, eq=False)
class Embeddings(Answers):
    """Of N images: ``vectors`` float32 [N, D] as the network gives them, and the class of each, ``labels`` [N]."""

    vectors: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        save_arrays(path, Embedding.name, {"vectors": self.vectors, "labels": self.labels})

    def first(self, count: int) -> Embeddings:
        """Keep the first ``count`` images only."""
        return Embeddings(self.vectors[:count], self.labels[:count])

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Which images got finite values only: bool [N]."""
        return np.asarray(np.isfinite(self.vectors).all(axis=1))

    @property
    def directions(self) -> npt.NDArray[np.float32]:
        """The vectors at length 1; zeros for one that is zero or not finite."""
        vectors = np.where(self.finite[:, None], self.vectors, np.float32(0)).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)

    @property
    def alike(self) -> bool:
        """Whether every image gets the same direction."""
        directions = self.directions
        mean = directions.mean(axis=0)
        return bool((1.0 - directions @ mean <= _ALIKE).all())


@dataclass(frozen=True, eq=False)
class EmbeddingComparison(Resampled):
    """Two networks by what they find; ``collapsed`` where the candidate gives one direction to every image."""

    collapsed: bool = False
    zeros: int = 0
    """Images for which the reference gives zeros, which point nowhere."""

    @property
    def caveat(self) -> str:
        """That the candidate is constant, where it is, and which embeddings of the reference are none."""
        said = ["the quantised network gives the same embedding for every image"] if self.collapsed else []
        if self.zeros:
            said.append(f"the float network gives zeros for {self.zeros} images, which point nowhere")
        return "; ".join(said)


class Embedding(Task):
    """One output [B, D], compared by the cosine: CLIP, SigLIP, DINO, re-identification."""

    name: ClassVar[str] = "embedding"
    metric = "recall@1"
    unit = SHARE

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(EmbeddingOptions, self.name, options)

    def kept(self, batch: Batch, outputs: Mapping[str, Array], image_set: ImageSet, place: Place) -> Embeddings:
        """Vectors and labels of every image."""
        del place
        if batch.labels is None:
            raise ResvitError(
                f"The images have no labels ({image_set.description}): whether images of one class are found "
                "cannot be told.",
                "Give one folder for each class (or person, or product), or compare the vectors alone: --task other.",
            )
        output = vectors_of(self.options, outputs)
        fine = finite_images({"output": output}, len(output))
        with np.errstate(over="ignore"):
            return Embeddings(np.where(fine[:, None], output, np.nan).astype(np.float32), batch.labels)

    def joined(self, parts: Sequence[Embeddings]) -> Embeddings:
        """All of them."""
        return Embeddings(np.concatenate([p.vectors for p in parts]), np.concatenate([p.labels for p in parts]))

    def require_judgeable(self, answers: Embeddings, image_set: ImageSet) -> None:
        """Refuse classes of which none has two images; raises ``ResvitError``."""
        if not _counts(answers.labels).any():
            raise ResvitError(
                f"No class has two images ({image_set.description}), so that none can be found by another.",
                "Give at least two images of each class.",
            )

    def load(self, data: bytes, where: str) -> Embeddings:
        """Read what ``Embeddings.save`` wrote."""
        arrays = load_arrays(data, where, self.name)
        return Embeddings(arrays["vectors"], arrays["labels"])

    def compare(self, reference: Embeddings, candidate: Embeddings, confidence: float = 0.95) -> EmbeddingComparison:
        """Recall@1: the share of images whose nearest other image, by the cosine, is of the same class.

        Every image asks all others; one whose class has no other image does not count. The network's own embeddings
        are searched, and those of the reference too (``recall@1 in the float gallery``), as where a gallery made on
        a host is asked by a device. The interval of the drop comes from images drawn again.
        """
        require_same_images(np.array_equal(reference.labels, candidate.labels), reference, candidate)
        require_finite(reference.finite)
        asked, labels = _counts(reference.labels), reference.labels
        mine, theirs = reference.directions, candidate.directions
        own, others = _nearest(mine, mine), _nearest(theirs, theirs)
        before, after = (_hits(nearest[:, :1], labels) for nearest in (own, others))
        across = _hits(_nearest(theirs, mine, 1), labels)
        chance = (np.bincount(labels)[labels] - 1) / (len(labels) - 1)
        stats = np.where(asked[:, None], np.stack([before, after, chance], axis=1), 0.0)

        def statistic(weights: Floats) -> Floats:
            return np.asarray((weights @ stats) / np.maximum(weights @ asked.astype(float), 1.0)[:, None], np.float64)

        whole, draws = statistic(np.ones((1, len(labels))))[0], resampled(statistic, len(labels))
        distances = _distances(mine, theirs)
        return EmbeddingComparison(
            images=int(asked.sum()),
            metric=self.metric,
            reference={
                "recall@1": float(whole[0]),
                "recall@5": float(_hits(own, labels)[asked].mean()),
                "recall@1 in the float gallery": float(whole[0]),
                "mean cosine distance": 0.0,
            },
            candidate={
                "recall@1": float(whole[1]),
                "recall@5": float(_hits(others, labels)[asked].mean()),
                "recall@1 in the float gallery": float(across[asked].mean()),
                "mean cosine distance": float(distances.mean()),
            },
            drop=100.0 * float(whole[0] - whole[1]),
            draws=100.0 * (draws[:, 0] - draws[:, 1]),
            confidence=confidence,
            agreement=float((own[:, 0] == others[:, 0]).mean()),
            agreement_of="images with the same nearest image",
            sqnr_db=sqnr(reference.vectors, candidate.vectors),
            not_finite=int((~candidate.finite).sum()),
            worse=int((stats[:, 0] > stats[:, 1]).sum()),
            better=int((stats[:, 0] < stats[:, 1]).sum()),
            unit=self.unit,
            collapsed=candidate.alike,
            zeros=int((~mine.any(axis=1)).sum()),
            chance=_chance(reference, float(whole[0]), float(whole[2]), draws),
        )

    def reading(self, answers: Any) -> dict[str, Any]:
        """The options that were said."""
        del answers
        return stated(self.options)

    def changed(self, reference: Embeddings, candidate: Embeddings) -> list[dict[str, Any]]:
        """The images that no longer find one of their class, and those that now do, the farthest from before first."""
        labels, asked = reference.labels, _counts(reference.labels)
        mine, theirs = reference.directions, candidate.directions
        before, after = (_nearest(vectors, vectors, 1)[:, 0] for vectors in (mine, theirs))
        distances = _distances(mine, theirs)
        right, still = labels[before] == labels, labels[after] == labels
        return [
            {
                "index": int(i),
                "label": int(labels[i]),
                "float": f"finds image {before[i]} of class {labels[before[i]]}",
                "quantized": f"finds image {after[i]} of class {labels[after[i]]}, cosine distance {distances[i]:.3f}",
                "outcome": "lost" if right[i] else "gained",
            }
            for i in np.argsort(-distances, kind="stable")
            if asked[i] and right[i] != still[i]
        ]

    def require_outputs(self, outputs: Mapping[str, Array]) -> None:
        """Refuse outputs that hold no embedding; raises ``ResvitError``."""
        vectors_of(self.options, outputs)


def _distances(mine: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The cosine distance of each direction from the same image's; 0 where both are zero, which have no cosine."""
    nowhere = ~(mine.any(axis=1) | theirs.any(axis=1))
    return np.asarray(np.where(nowhere, np.float32(0), 1.0 - (mine * theirs).sum(axis=1)), np.float32)


def _counts(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which images have another of their class: bool [N]."""
    return np.asarray(np.bincount(labels)[labels] > 1)


def _nearest(
    queries: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32], depth: int = _DEEPEST
) -> npt.NDArray[np.int64]:
    """The nearest other images of each, nearest first: int64 [N, ``depth`` or as many as there are]; ties by number."""
    count = len(gallery)
    rows = max(1, _SIMILARITIES // count)
    found = np.empty((count, min(depth, count - 1)), np.int64)
    for start in range(0, count, rows):
        similar = queries[start : start + rows] @ gallery.T
        each = np.arange(len(similar))
        similar[each, start + each] = -np.inf
        for place in range(found.shape[1]):  # a few passes cost less than sorting rows as long as the gallery
            nearest = similar.argmax(axis=1)
            found[start : start + rows, place] = nearest
            similar[each, nearest] = -np.inf
    return found


def _hits(nearest: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.asarray((labels[nearest] == labels[:, None]).any(axis=1))


def _chance(reference: Embeddings, recall: float, guessed: float, draws: Floats) -> Chance:
    against = f"the float network's recall@1 is {100 * recall:.1f}% on {len(reference)} images"
    if reference.alike:
        words = f"{against}, and it gives the same embedding for every one: check the checkpoint and the preprocessing"
        return Chance(0.0, np.zeros(len(draws)), words)
    words = (
        f"{against}, not clearly better than picking one at random ({100 * guessed:.1f}%): check the checkpoint, the "
        "preprocessing and the classes, or give more images"
    )
    return Chance(100.0 * (recall - guessed), 100.0 * (draws[:, 0] - draws[:, 2]), words)
