"""What a search chose, as ``search.json`` keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_quantize.search.assignments import Raised


@dataclass(frozen=True)
class SearchRecord:
    """What is read of ``search.json``: the precision of every product by name, and what was found, for people.

    ``confidence`` is that of the look at what was chosen; ``raised`` are the products left in a higher precision than
    the fastest, and ``prices`` say the same in words, the dearest first.
    """

    assignment: Mapping[str, str]
    confidence: float
    raised: tuple[Raised, ...]
    sentences: tuple[str, ...]
    prices: tuple[str, ...]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SearchRecord:
        """Read what the stage ``search`` wrote; the looks on the way are passed over."""
        return cls(
            document["assignment"],
            float(document["confidence"]),
            tuple(Raised.from_json(item) for item in document["raised"]),
            tuple(document["sentences"]),
            tuple(document["prices"]),
        )
