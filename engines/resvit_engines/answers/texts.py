"""From what a recogniser says of positions to a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resvit_engines.answers.options import Array, chosen_output, require_between
from resvit_engines.errors import ResvitError

NOTHING = -1
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
        lines = self.characters.replace("\r\n", "\n").replace("\r", "\n")
        return tuple(lines.rstrip("\n").split("\n")) if "\n" in lines else tuple(lines)


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
            return "".join(self.classes[number] for number in row if number not in (self.silent, NOTHING))
        ends = np.flatnonzero(row == self.silent)
        row = row[: ends[0]] if ends.size else row
        return "".join(self.classes[number] for number in row if number != NOTHING)

    def __str__(self) -> str:
        what = "blank" if self.kind == "ctc" else "end"
        return f"decoder={self.kind} {what}={self.silent}"


def decoders_for(options: TextOptions, count: int) -> list[Decoder]:
    """The decoders that fit the options and a network of ``count`` classes; raises ``ResvitError`` for none."""
    decoders = list(_decoders(options, count))
    if not decoders:
        alphabet = options.alphabet
        raise ResvitError(
            f"The network chooses from {count} classes, and there are {len(alphabet)} characters: "
            "one class more (CTC's blank, or the end), or two with the space, is what they need.",
            _CHARACTERS,
        )
    return decoders


def _decoders(options: TextOptions, count: int) -> Iterator[Decoder]:
    """All that fit what the user says and the number of classes."""
    alphabet = options.alphabet
    if not alphabet:
        raise ResvitError("A network that reads text answers with class numbers.", _CHARACTERS)
    for name, value in (("blank", options.blank), ("end", options.end)):
        if value is not None and value >= count:
            raise ResvitError(
                f"The option {name} = {value} of text is out of range: the network chooses from {count} classes.",
                f"Give 0 to {count - 1}, or -1 for the last.",
            )
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


def scores_of(options: TextOptions, outputs: Mapping[str, Array]) -> Array:
    """Scores [B, positions, classes]; raises ``ResvitError`` where no output, or more than one, holds them."""
    scores = {name: value for name, value in outputs.items() if value.dtype.kind == "f" and value.ndim == 3}
    needs, first = "Text needs an output [B, positions, classes]", ", and put the images first (not the positions)"
    name = chosen_output(scores, options.output, outputs, needs, first)
    found, fitting = scores[name], {len(options.alphabet) + more for more in (1, 2)}
    return found.transpose(0, 2, 1) if found.shape[1] in fitting and found.shape[2] not in fitting else found
