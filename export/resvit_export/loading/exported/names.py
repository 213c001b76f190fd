"""What names and texts in an archive may look like: they become Python source, attributes and lines on a terminal."""

from __future__ import annotations

import keyword
import re

from torch import nn

_PART = re.compile(r"[\w \-+:/@=()\[\]<>]{1,200}")
_TEXT_LIMIT = 4000
_TAKEN = frozenset(dir(nn.Module()))


def is_text(value: object) -> bool:
    """Whether it is text that can be shown: no control characters, not endless."""
    return isinstance(value, str) and len(value) <= _TEXT_LIMIT and value.isprintable()


def is_identifier(value: object) -> bool:
    """Whether it can name a value of the graph: the graph becomes Python source."""
    return isinstance(value, str) and len(value) <= 500 and value.isidentifier() and not keyword.iskeyword(value)


def is_tensor_path(value: object) -> bool:
    """Whether it can be a weight's dotted path: no part of it is an attribute that every module has."""
    if not isinstance(value, str) or len(value) > _TEXT_LIMIT:
        return False
    return all(_PART.fullmatch(part) and part not in _TAKEN and not part.startswith("__") for part in value.split("."))
