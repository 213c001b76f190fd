"""Data sets of torchvision's by name, that lie on this machine: nothing is downloaded.

https://docs.pytorch.org/vision/stable/datasets.html. Those of ``SETS`` give pictures with a class each, and unpickle
nothing but files whose digest torchvision knows (CIFAR's).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_calibrate.readers.user.pictures import DatasetPixels
from resvit_calibrate.readers.user.torchvision_import import import_beside_torchvision
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_folder

FORM = "Write torchvision:NAME:ROOT, or torchvision:NAME:ROOT:PART."


@dataclass(frozen=True)
class Known:
    """What a class of torchvision's is told to give each part, and what it looks for below its root."""

    parts: Mapping[str, Mapping[str, Any]]
    inside: str


def _split(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


_TRAIN: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
SETS = {
    "CIFAR10": Known(_TRAIN, "cifar-10-batches-py"),
    "CIFAR100": Known(_TRAIN, "cifar-100-python"),
    "Country211": Known(_split("train", "valid", "test"), "country211"),
    "DTD": Known(_split("train", "val", "test"), "dtd/dtd"),
    "FGVCAircraft": Known(_split("train", "val", "test"), "fgvc-aircraft-2013b"),
    "FashionMNIST": Known(_TRAIN, "FashionMNIST/raw"),
    "Flowers102": Known(_split("train", "val", "test"), "flowers-102"),
    "Food101": Known(_split("train", "test"), "food-101"),
    "Imagenette": Known(_split("train", "val"), "imagenette2"),
    "KMNIST": Known(_TRAIN, "KMNIST/raw"),
    "MNIST": Known(_TRAIN, "MNIST/raw"),
    "OxfordIIITPet": Known(_split("trainval", "test"), "oxford-iiit-pet"),
    "STL10": Known(_split("train", "test"), "stl10_binary"),
    "SVHN": Known(_split("train", "test"), "train_32x32.mat and test_32x32.mat"),
    "USPS": Known(_TRAIN, "usps.bz2 and usps.t.bz2"),
}
"""By the name of the class; the first part of each is to train with, the second to validate with."""


def parsed(text: str) -> tuple[str, str, str | None]:
    """The name, the root and the part, if one is said, of ``NAME:ROOT`` or ``NAME:ROOT:PART``.

    Raises ``ResvitError`` for a name that is not among ``SETS``, and where there is no root.
    """
    name, _, root = text.partition(":")
    if name not in SETS:
        usual = {known.lower(): known for known in SETS}
        near = difflib.get_close_matches(name.lower(), usual, n=1)
        also = (
            " A folder of class folders is named without `torchvision:`." if name in ("ImageFolder", "ImageNet") else ""
        )
        raise ResvitError(
            f"torchvision:{name} is not among the data sets that are read by name: {', '.join(SETS)}.",
            (f"Did you mean torchvision:{usual[near[0]]}? " if near else "")
            + f"Any other can be given by a function that returns it, file.py:function.{also}",
        )
    head, colon, tail = root.rpartition(":")
    part = tail if colon and tail in SETS[name].parts else None
    root = head if part is not None else root
    if not root:
        raise ResvitError(f"torchvision:{text} does not say where the data set lies.", FORM)
    return name, root, part


def require_torchvision_set(text: str) -> None:
    """Refuse at once a name that is not known, and a root that is no folder; imports nothing."""
    name, root, _ = parsed(text)
    if not Path(root).expanduser().is_dir():
        raise ResvitError(
            f"There is no folder {root} with {name}, and nothing is downloaded.",
            f"Name the folder that holds {SETS[name].inside}, as torchvision's `root`.",
        )


def refuse_roots(root: Path) -> None:
    """Refuse what is named without the prefix: a root with one of these data sets, or the folder in it.

    Raises ``ResvitError`` with what to write.
    """
    for name, known in SETS.items():
        if " " in known.inside:
            continue
        above = root
        for _ in Path(known.inside).parts:
            above = above.parent
        for place in (root, above):
            inside = place / known.inside
            if leads_to_folder(inside) and root in (place, inside):
                raise ResvitError(
                    f"{root} holds {name} as torchvision keeps it, and no class folders.",
                    f"Write torchvision:{name}:{place}.",
                )


def pixels_from_torchvision(text: str) -> tuple[DatasetPixels, DatasetPixels | None]:
    """The pictures of both parts, or of the one that is named.

    Raises ``ResvitError`` where torchvision does not import, or does not find the data set whole below the root.
    """
    require_torchvision_set(text)
    name, root, part = parsed(text)
    module = import_beside_torchvision("torchvision.datasets", "host")
    parts = [part] if part is not None else list(SETS[name].parts)[:2]
    pools = [_opened(module, name, Path(root).expanduser(), one) for one in parts]
    if part is None and len(SETS[name].parts) > len(parts):
        left = [one for one in SETS[name].parts if one not in parts]
        pools[0].notes += (f"of {name} the parts {' and '.join(parts)} are read, {', '.join(left)} not",)
    return pools[0], pools[1] if len(pools) > 1 else None


def _opened(module: Any, name: str, root: Path, part: str) -> DatasetPixels:
    try:
        made = getattr(module, name)(root=str(root), download=False, **SETS[name].parts[part])
    except (ResvitError, MemoryError):
        raise
    except Exception as error:  # whatever a file that is damaged or missing makes torchvision raise
        reason = str(error).partition(" You can use download")[0].partition("\n")[0].rstrip(".")
        raise ResvitError(
            f"torchvision does not read {name} ({part}) in {root}: {reason or type(error).__name__}.",
            f"Name the folder that holds {SETS[name].inside}; nothing is downloaded.",
        ) from error
    return DatasetPixels(f"torchvision's {name}", f"{name} ({part})", made)
