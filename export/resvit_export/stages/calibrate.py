"""The stage ``calibrate``: the ranges of all activations, from one pass over the calibration images."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.pictures.sizes import SizeRange
from resvit_engines.progress import Reporter
from resvit_export.stage import Artifact, File, Stage

if TYPE_CHECKING:
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_calibrate.ranges.ranges import Ranges

RANGES = "ranges.json"
STATISTICS = "statistics.npz"
IMAGES = "images.json"


@dataclass(frozen=True)
class CalibrationImages:
    """How many images were used, which, and what is doubtful about them."""

    description: str
    images: int
    digest: str
    skipped: tuple[str, ...]
    diagnostics: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in ``images.json``."""
        return {
            "description": self.description,
            "images": self.images,
            "digest": self.digest,
            "skipped": list(self.skipped),
            "remarks": list(self.diagnostics),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CalibrationImages:
        """Read what ``to_json`` wrote."""
        kept = {name: document[name] for name in ("description", "images", "digest")}
        return cls(**kept, skipped=tuple(document["skipped"]), diagnostics=tuple(document["remarks"]))


@dataclass(frozen=True)
class Calibrated(Artifact):
    """``ranges.json``, ``statistics.npz`` and ``images.json``."""

    @property
    def ranges(self) -> File:
        """The range of every activation."""
        return self.file(RANGES)

    @functools.cached_property
    def known(self) -> Ranges:
        """The same, read."""
        from resvit_calibrate.ranges.ranges import ranges_from_json

        return self.file(RANGES).read(ranges_from_json)

    @property
    def statistics(self) -> File:
        """The histograms that the ranges were chosen from."""
        return self.file(STATISTICS)

    @functools.cached_property
    def images(self) -> CalibrationImages:
        """Which images it was."""
        return self.read(IMAGES, CalibrationImages.from_json)


@dataclass(frozen=True)
class Calibrate(Stage[Calibrated]):
    """Run the float model on the images, ``batch_size`` at a time, and remember what every activation held."""

    name: ClassVar[str] = "calibrate"
    artifact: ClassVar[type[Artifact]] = Calibrated
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")

    model: File
    images: ImageSet
    preprocess: Preprocess
    batch_size: int
    sizes: SizeRange | None
    """Those that the images are prepared in, in turn; None for the one of ``preprocess``."""
    holds_back: bool
    """Whether some images are left to judge the quantised network by (see ``images/held_back.py``)."""

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write ranges and statistics; what is doubtful about the images is said, and kept in ``images.json``."""
        from resvit_calibrate.images.held_back import held_apart
        from resvit_calibrate.ranges.collect import collect_statistics
        from resvit_calibrate.ranges.diagnostics import diagnostics_from_statistics, tell
        from resvit_calibrate.ranges.ranges import ranges_from, save_ranges
        from resvit_calibrate.ranges.statistics import save_statistics

        images = held_apart(self.images).ranges if self.holds_back else self.images
        if self.sizes is None:
            batches = images.batches(self.batch_size)
        else:
            batches = images.batches_in_sizes(self.sizes.all, self.batch_size)
        statistics = collect_statistics(self.model.path, batches, reporter, len(images))
        save_statistics(statistics, folder / STATISTICS)
        save_ranges(ranges_from(statistics, images.digest), folder / RANGES)
        diagnostics = diagnostics_from_statistics(statistics)
        tell(diagnostics, reporter)
        record = CalibrationImages(
            images.description + (f", in sizes of {self.sizes} pixels in turn" if self.sizes else ""),
            statistics.images,
            images.digest,
            tuple(images.skipped),
            tuple(diagnostic.to_json() for diagnostic in diagnostics),
        )
        (folder / IMAGES).write_bytes(pretty_json(record.to_json()))
