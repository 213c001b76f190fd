"""Data as other libraries keep it, by a prefix and a name or a path."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from resvit_calibrate.images.pixels import Pixels
from resvit_calibrate.readers.boxes.table import BoxPixels, with_classes_of_both
from resvit_calibrate.readers.folders import class_names, files_below, is_image
from resvit_calibrate.readers.hugging_face.boxes import with_boxes
from resvit_calibrate.readers.hugging_face.places import WHOLE, Found, found_at, has_files
from resvit_calibrate.readers.hugging_face.reference import FORM, Wanted, wanted_from
from resvit_calibrate.readers.hugging_face.tables import pixels_from_tables
from resvit_engines.errors import ResvitError

_FIRST = ("train", "training", WHOLE)
_SECOND = ("validation", "valid", "val", "dev", "test", "testing")
_CAMERA = re.compile(r"/dev/video[0-9]+|[0-9]{1,2}")
_ELSEWHERE = re.compile(r"(?P<scheme>https?|s3|gs|hf|rtsp|rtmp)://.*", re.DOTALL)
_MISSPELT = re.compile(r"(hf|huggingface|hugging-face|hugging_face|hf_dataset|hf_datasets|hf-datasets|datasets):(.+)")


def require_tables(text: str) -> None:
    """Refuse at once what names no data set of Hugging Face's, and a part that it has not. Raises ``ResvitError``."""
    wanted = wanted_from(text)
    _parts(found_at(wanted), wanted)


def pools_of_tables(text: str) -> tuple[Pixels, Pixels | None]:
    """A data set of Hugging Face's by folder, file or name: the part that is named, else one to train and one to check.

    Raises ``ResvitError`` as ``require_tables``, and for files that cannot be read.
    """
    wanted = wanted_from(text)
    found = found_at(wanted)
    first, second = _parts(found, wanted)
    pixels = _part(found, first, wanted)
    left = [name for name in found.parts if name not in (first, second)]
    pixels.notes += found.notes
    if second is None:
        if left and wanted.split is None:
            pixels.notes += (f"of {found.name} the part {first} is read, {', '.join(left)} not",)
        return pixels, None
    if left:
        pixels.notes += (f"of {found.name} the parts {first} and {second} are read, {', '.join(left)} not",)
    checked = _part(found, second, wanted)
    checked.notes = ()  # what columns are read was said of the first
    if isinstance(pixels, BoxPixels) and isinstance(checked, BoxPixels):
        return with_classes_of_both(pixels, checked)
    return pixels, checked


def _part(found: Found, part: str, wanted: Wanted) -> Pixels:
    pictures, columns, objects = pixels_from_tables(found, part, wanted)
    return pictures if columns.objects is None else with_boxes(pictures, columns, wanted, objects)


def has_tables(root: Path) -> bool:
    """Whether a folder holds parquet or arrow files, and no pictures beside them."""
    return has_files(root) and not has_pictures(root)


def has_pictures(root: Path) -> bool:
    """Whether a file in a folder or below is called like a picture."""
    pictures = (files_below(root, name, is_image) for name in (*class_names(root), "."))
    return next(itertools.chain.from_iterable(pictures), None) is not None


def refuse_elsewhere(data: str) -> None:
    """Refuse data that is not on this machine, and misspelt prefixes. Raises ``ResvitError``."""
    found = _ELSEWHERE.fullmatch(data)
    if _CAMERA.fullmatch(data) or (found is not None and found["scheme"].startswith("rt")):
        raise ResvitError(
            f"{data} is a camera or a stream, and the same images are needed several times.",
            "Record some minutes to a file, and name that: --data film.mp4.",
        )
    if found is not None:
        raise ResvitError(f"{data} lies elsewhere, and nothing is downloaded.", "Download it, and name the folder.")
    misspelt = _MISSPELT.fullmatch(data)
    if misspelt is not None:
        raise ResvitError(
            f"{data} names no data; {misspelt[1]}: is not a kind of it.", f"hf-dataset:{misspelt[2]} is. {FORM}"
        )


def _parts(found: Found, wanted: Wanted) -> tuple[str, str | None]:
    names = list(found.parts)
    if wanted.split is not None:
        if wanted.split not in names:
            told = ", ".join(name for name in names if name != WHOLE)
            raise ResvitError(
                f"{wanted.where} has no part {wanted.split!r}.",
                f"It has: {told}." if told else "It is not divided: leave the part out.",
            )
        return wanted.split, None
    first = next((name for name in _FIRST if name in names), None)
    second = next((name for name in _SECOND if name in names), None)
    if first is not None:
        return first, second
    if len(names) == 1:
        return names[0], None
    raise ResvitError(
        f"{wanted.where} has the parts {', '.join(names)}, and none of them is called train.",
        f"Say which: `{wanted.saying(split=names[0])}`, and another with --validation-data.",
    )
