"""The stage ``overlap``: how many validation images show the same as a calibration image, said before the long work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_export.stage import Artifact, Stage

if TYPE_CHECKING:
    from resvit_calibrate.data.overlap import Overlap
    from resvit_calibrate.images.image_set import ImageSet

FOUND = "overlap.json"


@dataclass(frozen=True)
class OverlapSeen(Artifact):
    """``overlap.json``: how many images the two sets share."""

    @property
    def overlap(self) -> Overlap:
        """Read it."""
        from resvit_calibrate.data.overlap import Overlap

        return Overlap.from_json(self.json(FOUND))


@dataclass(frozen=True)
class SeeOverlap(Stage[OverlapSeen]):
    """The pictures of both sets held against each other. ``exact`` of them were left out of calibration already."""

    name: ClassVar[str] = "overlap"
    artifact: ClassVar[type[Artifact]] = OverlapSeen
    packages: ClassVar[tuple[str, ...]] = ("pillow",)

    calibration: ImageSet
    validation: ImageSet
    exact: int

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Compare, and say what was found."""
        from resvit_calibrate.data.overlap import overlap_of

        found = overlap_of(self.calibration, self.validation, reporter)
        if found.sentence:
            reporter.warn(found.sentence)
        (folder / FOUND).write_bytes(pretty_json(found.to_json()))
