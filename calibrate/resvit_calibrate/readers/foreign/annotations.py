"""Files about pictures in formats that are not read: each is named, so that no folder is taken for what it is not.

Scalabel and BDD100K, results of networks, DOTA (https://captain-whu.github.io/DOTA), and metadata with boxes of Hugging
Face's imagefolder.
"""

from __future__ import annotations

from pathlib import Path

from resvit_calibrate.readers.labelled.recognise import BEGINS_A_LIST, NUMBER, format_of, formats_in
from resvit_engines.errors import ResvitError

_COCO = "Convert them to COCO's format, and put the file into the folder as `annotations.json`"


_FORMATS = (
    format_of(".json", (rb'"box2d"\s*:',), "annotations of BDD100K or Scalabel",
              f"{_COCO} (`python -m scalabel.label.to_coco`)"),
    format_of(".json", (BEGINS_A_LIST, rb'"image_id"\s*:', rb'"category_id"\s*:', rb'"score"\s*:'),
              "results of a network in COCO's format",
              "Put the annotations themselves into the folder as `annotations.json`"),
    format_of(".jsonl", (rb'"file_name"\s*:', rb'"objects"\s*:\s*\{'), "Hugging Face's metadata with boxes",
              'Save it once, `datasets.load_dataset("imagefolder", data_dir=FOLDER).save_to_disk(OTHER)`, and give '
              "`hf-dataset:OTHER`"),
    format_of(".txt", (rb"\A(?:imagesource:.*\s+gsd:.*\s+)?(?:" + NUMBER + rb"[ ,]+){8}[A-Za-z][\w-]*[ ,]+[0-2]\s*$",),
              "DOTA's labels, which are turned boxes", f"{_COCO}, with upright boxes"),
)  # fmt: skip


def refuse_foreign(root: Path) -> None:
    """Refuse a folder with files of a format that is known and not read, in itself or up to three folders below.

    Raises:
        ResvitError: with a file, its format, and how to convert it.
    """
    for form, file in formats_in(root, _FORMATS):
        raise ResvitError(
            f"{root} holds {form.what} ({file.relative_to(root)}), and that format is not read.",
            f"{form.fix}; or say `folder:{root}` if only its pictures, or their folders as classes, are meant.",
        )
