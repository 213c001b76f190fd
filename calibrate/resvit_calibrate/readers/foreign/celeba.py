"""CelebA's lists (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html): 40 attributes of each picture, and no one class.

Its list of parts, one number a picture, would pass for classes. That of identities is a list of classes, and is read.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_folder

_LISTS = re.compile(r"list_(attr_celeba|eval_partition|(bbox|landmarks|landmarks_align)_celeba)\.(txt|csv)")
_ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
_IDENTITIES = "identity_CelebA.txt"
_COLUMN = '{for (i = 1; i <= NF; i++) if ($i == "Smiling") c = i'
_TO_ONE = {
    ".txt": f"awk 'NR == 2 {_COLUMN} + 1}} NR > 2 {{print $1 \",\" ($c > 0)}}'",
    ".csv": f"awk -F, 'NR == 1 {_COLUMN}}} NR > 1 {{print $1 \",\" ($c > 0)}}'",
}
"""Commands that write a list of one attribute, by how the list of all ends."""


def refuse_celeba(path: Path) -> None:
    """Refuse a folder with CelebA's lists, or one of these itself but that of identities.

    Raises:
        ResvitError: with a command that makes a list of classes.
    """
    folder = path if leads_to_folder(path) else path.parent
    found = sorted(file.name for file in folder.iterdir() if _LISTS.fullmatch(file.name))
    if not found or (folder != path and path.name not in found):
        return
    attributes = next((name for name in _ATTRIBUTES if name in found), None)
    if attributes is not None:
        own, command = folder / "smiling.csv", _TO_ONE[Path(attributes).suffix]
        written = f"{command} {shlex.quote(str(folder / attributes))} > {shlex.quote(str(own))}"
        fix = f"Choose an attribute, write a list of it, and name that, `csv:{own}`: `{written}`"
    else:
        fix = f"Put {_ATTRIBUTES[0]} or {_IDENTITIES} beside them"
    if (folder / _IDENTITIES).is_file():
        fix += f"; or `csv:{folder / _IDENTITIES}` for identities as classes"
    raise ResvitError(
        f"{folder} has CelebA's lists ({', '.join(found)}), which give no picture one class: each has 40 attributes, "
        "and the numbers of list_eval_partition are parts.",
        f"{fix}; or `folder:{folder}` if its folders are classes.",
    )
