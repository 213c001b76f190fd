"""What is written in the image: lines that are read without an error, and the share of wrong characters."""

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
    targets_of,
)
from resvit_calibrate.answers.raw import Raw, joined_raw, raw_of
from resvit_calibrate.gate.bootstrap import resampled
from resvit_calibrate.gate.comparison import SHARE, Chance, Resampled
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.targets import TextTarget
from resvit_engines.answers.options import Array, options_from, stated
from resvit_engines.answers.texts import NOTHING, Decoder, TextOptions, decoders_for, scores_of

_SHOWN = 12


@dataclass(frozen=True, eq=False)
class Readings(Answers):
    """Of N images: the likeliest class of each position, ``classes`` int32 [N, positions]; and what is written.

    ``count`` is how many classes there are to choose from.
    """

    classes: npt.NDArray[np.int32]
    texts: tuple[str, ...]
    count: int
    finite: npt.NDArray[np.bool_]
    raw: Raw

    def __len__(self) -> int:
        return len(self.texts)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        # One joined text: an array of texts would drop what ends in NUL, and be as wide as its longest.
        joined = np.frombuffer("".join(self.texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        lengths = np.array([len(text) for text in self.texts], np.int64)
        about: dict[str, Array] = {"texts": joined, "lengths": lengths, "count": np.array(self.count)}
        save_arrays(path, Text.name, {"classes": self.classes, "finite": self.finite, **about, **self.raw.to_arrays()})

    def first(self, count: int) -> Readings:
        """Keep the first ``count`` images only."""
        kept = (self.classes[:count], self.texts[:count], self.count, self.finite[:count], self.raw.first(count))
        return Readings(*kept)


@dataclass(frozen=True, eq=False)
class TextComparison(Resampled):
    """Two recognisers on the same lines; ``said`` is what else there is to know of how they were read."""

    said: str = ""

    @property
    def caveat(self) -> str:
        """How the texts were decoded where that was told by the answers, and what no network could read."""
        return self.said


class Text(Task):
    """One output [B, positions, classes]: recognisers of lines, words, number plates."""

    name: ClassVar[str] = "text"
    metric = "lines right"
    unit = SHARE

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(TextOptions, self.name, options)

    def kept(self, batch: Batch, outputs: Mapping[str, Array], image_set: ImageSet, place: Place) -> Readings:
        """The likeliest class of every position, and what is written."""
        output = scores_of(self.options, outputs)
        fine = finite_images({"output": output}, len(output))
        with np.errstate(invalid="ignore"):
            likeliest = np.where(fine[:, None], output.argmax(axis=2), NOTHING)
        texts = tuple(target.text for target in targets_of(batch, TextTarget, self.name, image_set))
        raw = raw_of({"output": output}, len(output), place.before)
        return Readings(likeliest.astype(np.int32), texts, output.shape[2], fine, raw)

    def joined(self, parts: Sequence[Readings]) -> Readings:
        """All of them."""
        return Readings(
            np.concatenate([part.classes for part in parts]),
            tuple(text for part in parts for text in part.texts),
            parts[0].count,
            np.concatenate([part.finite for part in parts]),
            joined_raw([part.raw for part in parts]),
        )

    def load(self, data: bytes, where: str) -> Readings:
        """Read what ``Readings.save`` wrote."""
        arrays = load_arrays(data, where, self.name)
        joined = arrays["texts"].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        ends = np.cumsum(arrays["lengths"])
        texts = tuple(joined[end - length : end] for end, length in zip(ends, arrays["lengths"], strict=True))
        return Readings(arrays["classes"], texts, int(arrays["count"]), arrays["finite"], Raw.from_arrays(arrays))

    def compare(self, reference: Readings, candidate: Readings, confidence: float = 0.95) -> TextComparison:
        """The share of lines that are read without an error, and the interval of its fall.

        CER is the number of edits (Levenshtein 1966) that turn what was read into what is written, over the characters
        that are written, all lines together.
        """
        require_same_images(reference.texts == candidate.texts, reference, candidate)
        require_finite(reference.finite)
        decoder, how = self._decoder(reference)
        known = reference.texts
        first, second = decoder.texts(reference.classes), decoder.texts(candidate.classes)
        right = np.array([read == text for read, text in zip(first, known, strict=True)], np.float64)
        still = np.array([read == text for read, text in zip(second, known, strict=True)], np.float64)
        edits = np.array(
            [[edits_between(read, text) for read in pair] for *pair, text in zip(first, second, known, strict=True)]
        )
        draws = resampled(lambda weights: weights @ np.stack([right, still], axis=1) / len(known), len(known))
        length = max(1, sum(map(len, known)))
        rates = edits.reshape(-1, 2).sum(axis=0) / length
        return TextComparison(
            images=len(known),
            metric=self.metric,
            reference={self.metric: float(right.mean()), "CER": float(rates[0])},
            candidate={self.metric: float(still.mean()), "CER": float(rates[1])},
            drop=100.0 * float((right - still).mean()),
            draws=100.0 * (draws[:, 0] - draws[:, 1]),
            confidence=confidence,
            agreement=float(np.mean([one == two for one, two in zip(first, second, strict=True)])),
            agreement_of="lines that are read alike",
            sqnr_db=reference.raw.sqnr_db(candidate.raw),
            not_finite=int((~candidate.finite).sum()),
            worse=int((right > still).sum()),
            better=int((right < still).sum()),
            unit=self.unit,
            said="; ".join(part for part in (how, self._unknown(known, decoder)) if part),
            chance=Chance(
                100.0 * float(right.mean()),
                100.0 * draws[:, 0],
                f"the float network reads {int(right.sum())} of {len(known)} lines without an error ({decoder}; "
                f"{first[0]!r} for {known[0]!r}): check the checkpoint, the characters and their order, the "
                "blank (--task-option blank=NUMBER where it is neither the first class nor the last), the "
                "preprocessing (most recognisers want resize=letterbox), or give more images",
            ),
        )

    def reading(self, answers: Readings) -> dict[str, Any]:
        """The options, with the decoder that the answers tell."""
        decoder, _ = self._decoder(answers)
        said = {"decoder": decoder.kind, ("blank" if decoder.kind == "ctc" else "end"): decoder.silent}
        return {**stated(self.options), **said}

    def changed(self, reference: Readings, candidate: Readings) -> list[dict[str, Any]]:
        """The lines that are read otherwise, those with the most edits between the two first."""
        decoder, _ = self._decoder(reference)
        first, second = decoder.texts(reference.classes), decoder.texts(candidate.classes)
        apart = np.array([edits_between(one, two) for one, two in zip(first, second, strict=True)])
        rows = []
        for index in np.argsort(-apart, kind="stable"):
            if not apart[index]:
                break
            before, after, text = first[index], second[index], reference.texts[index]
            outcome = "lost" if before == text else "gained" if after == text else "changed"
            said = f"{after!r}, written is {text!r}"
            rows.append(
                {"index": int(index), "label": None, "float": repr(before), "quantized": said, "outcome": outcome}
            )
        return rows

    def require_outputs(self, outputs: Mapping[str, Array]) -> None:
        """Refuse outputs that cannot be read with these characters; raises ``ResvitError``."""
        decoders_for(self.options, scores_of(self.options, outputs).shape[2])

    def _decoder(self, reference: Readings) -> tuple[Decoder, str]:
        """The decoder, and in words how it was told where the user did not say."""
        decoders = decoders_for(self.options, reference.count)
        if len(decoders) == 1:
            return decoders[0], ""
        scores = []
        for decoder in decoders:
            texts = decoder.texts(reference.classes)
            right = sum(read == text for read, text in zip(texts, reference.texts, strict=True))
            wrong = sum(edits_between(read, text) for read, text in zip(texts[:64], reference.texts[:64], strict=True))
            scores.append((right, -wrong))
        chosen = decoders[max(range(len(decoders)), key=lambda index: scores[index])]
        return chosen, f"read with {chosen}, by which the float network reads most"

    def _unknown(self, texts: Sequence[str], decoder: Decoder) -> str:
        """That some lines hold what the network has no class for."""
        known = {letter for text in decoder.classes for letter in text}
        strange = [text for text in texts if not set(text) <= known]
        if not strange:
            return ""
        letters = sorted({letter for text in strange for letter in text} - known)
        return (
            f"{len(strange)} lines hold characters that the network does not know, and count as misread: "
            f"{', '.join(map(repr, letters[:_SHOWN]))}{', …' if len(letters) > _SHOWN else ''}"
        )


def edits_between(read: str, written: str) -> int:
    """Insertions, deletions and replacements that turn one text into the other."""
    if read == written:
        return 0
    above = list(range(len(written) + 1))
    for number, letter in enumerate(read, 1):
        row = [number]
        for place, other in enumerate(written):
            row.append(min(above[place] + (letter != other), above[place + 1] + 1, row[place] + 1))
        above = row
    return above[-1]
