"""What is written in the image: lines that are read without an error, and the share of wrong characters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.base import (
    Answers,
    Array,
    Keeping,
    Task,
    chosen_output,
    finite_images,
    load_arrays,
    options_from,
    require_between,
    require_finite,
    require_same_images,
    save_arrays,
    targets_of,
)
from resvit_calibrate.answers.raw import Raw, RawKeeper
from resvit_calibrate.gate.bootstrap import resampled
from resvit_calibrate.gate.comparison import SHARE, Chance, Resampled
from resvit_calibrate.images.image_set import ImageSet
from resvit_calibrate.images.targets import TextTarget
from resvit_engines.errors import ResvitError

_NOTHING = -1
"""In the place of a position's class where the network's outputs are not finite."""
_CLASSES_MOST = 1 << 20
_SHOWN = 12
_CHARACTERS = (
    "Say which characters the network writes, in the order of its classes: --task-option characters=FILE (one a line, "
    "as recognisers' dictionaries are) or characters=0123456789."
)


@dataclass(frozen=True)
class TextOptions:
    """``characters``: those that the network writes, in the order of its classes, one after another or one a line.

    ``decoder``: ``ctc`` (Graves et al., ICML 2006: the likeliest class of each position, repetitions once, blanks
    dropped) or ``positions`` (the likeliest class of each position up to the end). ``blank`` is CTC's class for
    nothing, ``end`` the class that ends a text: the characters take the other places in order. What is None is told
    by what the float network reads best with. ``output``: the output [B, positions, classes] or [B, classes,
    positions]; None for the only one.
    """

    characters: str | None = None
    decoder: str | None = None
    blank: int | None = None
    end: int | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if self.decoder not in (None, "ctc", "positions"):
            raise ResvitError(
                f"The option decoder = {self.decoder!r} of text does not exist.", "Choose ctc, positions."
            )
        for name, value in (("blank", self.blank), ("end", self.end)):
            if value is not None:
                require_between("text", name, value, -1, _CLASSES_MOST)
        if (self.blank is not None and self.decoder == "positions") or (self.end is not None and self.decoder == "ctc"):
            raise ResvitError("`blank` is CTC's, and `end` of positions.", "Leave one out, or name the other decoder.")
        repeated = sorted({one for one in self.alphabet if self.alphabet.count(one) > 1})
        if repeated:
            raise ResvitError(
                f"The characters hold {', '.join(map(repr, repeated[:_SHOWN]))} more than once.",
                "Give the dictionary that the network was trained with.",
            )

    @property
    def alphabet(self) -> tuple[str, ...]:
        """The characters one by one; none where they are not said."""
        if self.characters is None:
            return ()
        lines = self.characters.replace("\r\n", "\n")
        return tuple(lines.removesuffix("\n").split("\n")) if "\n" in lines else tuple(lines)


@dataclass(frozen=True)
class Decoder:
    """How positions become a text: ``kind``, the class that is no character, and the text of every class."""

    kind: str
    silent: int
    classes: tuple[str, ...]

    def texts(self, answers: npt.NDArray[np.int32]) -> list[str]:
        """The texts of likeliest classes [N, positions]."""
        return [self._text(row) for row in answers]

    def _text(self, row: npt.NDArray[np.int32]) -> str:
        if self.kind == "ctc":
            row = row[np.r_[True, row[1:] != row[:-1]]] if row.size else row
            return "".join(self.classes[number] for number in row if number not in (self.silent, _NOTHING))
        ends = np.flatnonzero(row == self.silent)
        row = row[: ends[0]] if ends.size else row
        return "".join(self.classes[number] for number in row if number != _NOTHING)

    def __str__(self) -> str:
        what = "blank" if self.kind == "ctc" else "end"
        return f"decoder={self.kind} {what}={self.silent}"


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

    def keeping(self, image_set: ImageSet) -> Keeping:
        """The likeliest class of every position, and what is written."""
        classes, texts, finite, keeper, count = [], [], [], RawKeeper(), 0
        while (seen := (yield)) is not None:
            batch, outputs = seen
            output = self._output(outputs)
            count = output.shape[2]
            fine = finite_images({"output": output}, len(output))
            keeper.add({"output": output}, len(output))
            with np.errstate(invalid="ignore"):
                likeliest = np.where(fine[:, None], output.argmax(axis=2), _NOTHING)
            classes.append(likeliest.astype(np.int32))
            texts += [target.text for target in targets_of(batch, TextTarget, self.name, image_set)]
            finite.append(fine)
        return Readings(np.concatenate(classes), tuple(texts), count, np.concatenate(finite), keeper.taken())

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
                "preprocessing (most recognisers want resize=letterbox), or give more images",
            ),
        )

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
        self._fitting(self._output(outputs).shape[2])

    def _fitting(self, count: int) -> list[Decoder]:
        decoders = list(self._decoders(count))
        if not decoders:
            alphabet = self.options.alphabet
            raise ResvitError(
                f"The network chooses from {count} classes, and there are {len(alphabet)} characters: "
                "one class more (CTC's blank, or the end), or two with the space, is what they need.",
                _CHARACTERS,
            )
        return decoders

    def _decoder(self, reference: Readings) -> tuple[Decoder, str]:
        """The decoder, and in words how it was told where the user did not say."""
        decoders = self._fitting(reference.count)
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

    def _decoders(self, count: int) -> Iterator[Decoder]:
        """All that fit what the user says and the number of classes."""
        options = self.options
        alphabet = options.alphabet
        if not alphabet:
            raise ResvitError("A network that reads text answers with class numbers.", _CHARACTERS)
        spaced = [alphabet] if " " in alphabet else [alphabet, (*alphabet, " ")]
        for kind, said in (("ctc", options.blank), ("positions", options.end)):
            other = options.end if kind == "ctc" else options.blank
            if options.decoder not in (None, kind) or (options.decoder is None and said is None and other is not None):
                continue
            for characters in spaced:
                if len(characters) == count - 1:
                    for silent in (0, count - 1) if said is None else (said % count,):
                        yield Decoder(kind, silent, (*characters[:silent], "", *characters[silent:]))
                elif kind == "positions" and len(characters) == count - 2 and said in (None, 0, 1):
                    # A start in front of the end, or behind it, that no position answers with.
                    yield Decoder(kind, 1 if said is None else said, ("", "", *characters))

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

    def _output(self, outputs: Mapping[str, Array]) -> Array:
        """Scores [B, positions, classes]."""
        scores = {name: value for name, value in outputs.items() if value.dtype.kind == "f" and value.ndim == 3}
        needs, first = "Text needs an output [B, positions, classes]", ", and put the images first (not the positions)"
        name = chosen_output(scores, self.options.output, outputs, needs, first)
        found, fitting = scores[name], {len(self.options.alphabet) + more for more in (1, 2)}
        return found.transpose(0, 2, 1) if found.shape[1] in fitting and found.shape[2] not in fitting else found


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
