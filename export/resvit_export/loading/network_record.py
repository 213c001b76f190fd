"""What the loader knows of a network, as later stages read it from ``network.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.pictures.sizes import SizeRange, sizes_from_numbers
from resvit_export.loading.inputs import NetworkInput

if TYPE_CHECKING:
    from resvit_calibrate.images.class_list import ClassList


@dataclass(frozen=True)
class NetworkRecord:
    """(C, H, W) of its image, its classes and preprocessing where they are known, and what else it reads.

    ``inputs`` is empty for a network that reads one image alone. ``digest`` is over graph and weights.
    ``coupled`` says that the images of a batch hang on each other, so that the network serves for batch 1 alone.
    ``image_range`` are the numbers of black and white, for a network that reads pixels and normalises them itself.
    """

    input_shape: tuple[int, int, int]
    num_classes: int | None
    preprocess: Preprocess | None
    dynamic_batch: bool
    digest: str
    task_options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[NetworkInput, ...] = ()
    notes: tuple[str, ...] = ()
    coupled: bool = False
    image_range: tuple[int, int] | None = None
    class_names: Mapping[int, str] = field(default_factory=dict)
    """What the model's configuration calls its classes, where it does."""
    outputs: tuple[Mapping[str, Any], ...] = ()
    """Of a network in PyTorch: ``name`` and ``shape`` of each, free sizes as text."""
    sizes: SizeRange | None = None
    """The sizes that its image may have, where there are several; ``input_shape`` then has the usual one."""

    @property
    def class_list(self) -> ClassList | None:
        """The classes that the model names itself; None where it does not."""
        from resvit_calibrate.images.class_list import class_list_from_names

        return class_list_from_names("the model's configuration", self.class_names)

    @property
    def images_per_call(self) -> int:
        """How many images go through a runner at once: 16 of 3 x 224 x 224, more of smaller ones, at most 128.

        Enough to keep the cores busy and calls rare; memory stays far below what one engine build takes.
        """
        return max(1, min(128, 2_500_000 // math.prod(self.input_shape)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "input_shape": list(self.input_shape),
            "num_classes": self.num_classes,
            "preprocess": self.preprocess.to_json() if self.preprocess else None,
            "dynamic_batch": self.dynamic_batch,
            "task_options": dict(self.task_options),
            **({"inputs": [item.to_json() for item in self.inputs]} if self.inputs else {}),
            **({"image_range": list(self.image_range)} if self.image_range else {}),
            "digest": self.digest,
            "notes": list(self.notes),
            **({"coupled": True} if self.coupled else {}),
            **({"class_names": {str(n): name for n, name in self.class_names.items()}} if self.class_names else {}),
            **({"sizes": self.sizes.numbers()} if self.sizes else {}),
            **({"outputs": [dict(item) for item in self.outputs]} if self.outputs else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> NetworkRecord:
        """Read what ``to_json`` wrote."""
        channels, height, width = document["input_shape"]
        return cls(
            input_shape=(channels, height, width),
            num_classes=document["num_classes"],
            preprocess=Preprocess.from_json(document["preprocess"]) if document["preprocess"] else None,
            dynamic_batch=document["dynamic_batch"],
            digest=document["digest"],
            task_options=document["task_options"],
            inputs=tuple(
                NetworkInput(item["name"], tuple(item["shape"]), item["dtype"]) for item in document.get("inputs", ())
            ),
            notes=tuple(document["notes"]),
            coupled=document.get("coupled", False),
            image_range=tuple(document["image_range"]) if "image_range" in document else None,
            class_names={int(number): name for number, name in document.get("class_names", {}).items()},
            outputs=tuple(document.get("outputs", ())),
            sizes=sizes_from_numbers(document["sizes"]) if "sizes" in document else None,
        )
