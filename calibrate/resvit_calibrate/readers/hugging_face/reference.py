"""What stands behind ``hf-dataset:``: a folder, a file or a name, and which part and columns of it are meant."""

from __future__ import annotations

import re
from dataclasses import dataclass

from resvit_engines.errors import ResvitError

BOXES = ("xywh", "xyxy")
"""What four numbers of a box are: x, y, width, height, or two corners."""
_KEYS = ("split", "config", "image", "label", "boxes")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_SLICE = re.compile(
    r"(?P<where>.+?):(?P<part>(?:split=)?(?P<name>[A-Za-z_]\w*)(?:\[[^\]]*\]|\+[A-Za-z_]\w*)+[^/]*)", re.DOTALL
)
"""`train[:8]` and `train+test`, as `load_dataset` has them."""
FORM = (
    "Write hf-dataset:FOLDER (or a NAME in the cache), and behind it, where that is needed, :SPLIT or "
    ":split=…,config=…,image=COLUMN,label=COLUMN,boxes=xywh."
)


@dataclass(frozen=True)
class Wanted:
    """``where`` is a path or a name; the others are None where the user does not say."""

    where: str
    split: str | None = None
    config: str | None = None
    image: str | None = None
    label: str | None = None
    boxes: str | None = None

    def saying(self, **choice: str) -> str:
        """What to write to choose that as well."""
        said = {key: getattr(self, key) for key in _KEYS} | choice
        return f"hf-dataset:{self.where}:" + ",".join(f"{key}={value}" for key, value in said.items() if value)


def wanted_from(text: str) -> Wanted:
    """Read ``WHERE``, ``WHERE:SPLIT`` or ``WHERE:key=value,…``; raises ``ResvitError`` for keys that there are not."""
    if not text.strip(": "):
        raise ResvitError("hf-dataset: names nothing.", FORM)
    sliced = _SLICE.fullmatch(text)
    if sliced is not None:
        raise ResvitError(
            f"hf-dataset:{text} asks for a slice or a sum of parts ({sliced['part']}), which are not read.",
            f"Name one part, `hf-dataset:{sliced['where']}:{sliced['name']}`; how many pictures are used is said with "
            "--calibration-images and --validation-images.",
        )
    where, colon, behind = text.rpartition(":")
    if not colon or not where or "/" in behind.partition("=")[0] or "\\" in behind:
        return Wanted(text)
    if "=" not in behind:
        return Wanted(where, split=behind) if _WORD.fullmatch(behind) else Wanted(text)
    found: dict[str, str] = {}
    for part in behind.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in _KEYS or not equals or not value or key in found:
            raise ResvitError(f"{part.strip() or behind!r} of hf-dataset:{text} says nothing that is known.", FORM)
        if key == "boxes" and value not in BOXES:
            raise ResvitError(f"boxes={value} of hf-dataset:{text} is neither {' nor '.join(BOXES)}.", FORM)
        found[key] = value
    return Wanted(where, **found)
