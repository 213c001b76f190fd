"""Answers that hold a map of every image: how they are thinned, kept and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.base import Answers, load_arrays, save_arrays
from resvit_calibrate.answers.raw import Raw, joined_raw
from resvit_engines.answers.options import Array
from resvit_engines.errors import ResvitError

_MAP_BYTES = 256 << 20
_M = TypeVar("_M", bound="Maps")


@dataclass(frozen=True, eq=False)
class Maps(Answers):
    """Of N images: a map [h, w] each, at every ``step``-th pixel, and further arrays [N, …] of a subclass.

    ``finite`` bool [N]: no output held NaN or infinity. ``digest`` uint8 [N, 32] is of what is known of each image.
    """

    task: ClassVar[str]
    together: ClassVar[tuple[str, ...]] = ()
    """Arrays of a subclass that are not [N, …]; its ``first`` cuts them."""
    maps: Array
    step: int
    finite: npt.NDArray[np.bool_]
    digest: npt.NDArray[np.uint8]
    raw: Raw

    def __len__(self) -> int:
        return len(self.maps)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        arrays = {name: np.asarray(value) for name, value in vars(self).items() if name != "raw"}
        save_arrays(path, self.task, {**arrays, **self.raw.to_arrays()})

    def first(self: _M, count: int) -> _M:
        """Keep the first ``count`` images only."""
        kept = {name: getattr(self, name)[:count] for name in self._per_image()}
        return dataclasses.replace(self, raw=self.raw.first(count), **kept)

    @classmethod
    def joined(cls: type[_M], parts: Sequence[_M]) -> _M:
        """The answers of several parts of a set, in order; their arrays are of the same sizes but for the images."""
        names = (*cls._per_image(), *cls.together)
        arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return dataclasses.replace(parts[0], raw=joined_raw([part.raw for part in parts]), **arrays)

    @classmethod
    def load(cls: type[_M], data: bytes, where: str) -> _M:
        """Read what ``save`` wrote; raises ``ResvitError`` as ``load_arrays``."""
        arrays = load_arrays(data, where, cls.task)
        missing = {*cls._per_image(), *cls.together} - arrays.keys()
        if missing:
            raise ResvitError(
                f"The answers {where} lack {', '.join(sorted(missing))}.", "Remove the run's folder and run again."
            )
        fields: dict[str, Any] = {name: arrays[name] for name in (*cls._per_image(), *cls.together)}
        return cls(step=int(arrays["step"]), raw=Raw.from_arrays(arrays), **fields)

    @classmethod
    def _per_image(cls) -> list[str]:
        return [item.name for item in dataclasses.fields(cls) if item.name not in ("raw", "step", *cls.together)]


def step_for(count: int, size: tuple[int, int]) -> int:
    """Which pixels of ``count`` maps of two bytes a pixel are kept: every one where all take at most 256 MiB."""
    step = 1
    while 2 * count * -(-size[0] // step) * -(-size[1] // step) > _MAP_BYTES:
        step += 1
    return step


def outcome_of(worse: bool, better: bool) -> str:
    """How a changed image is called in the report."""
    return "lost" if worse else "gained" if better else "neutral"
