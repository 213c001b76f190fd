"""Trials of the search that are done before their turn: a worker does a candidate's stages up to its verdict.

They are done beside the run, which takes only what its search asks for: it ends as it would without.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.progress import SILENT
from resvit_export.stage import RECORD
from resvit_export.sweep.part import Part
from resvit_export.sweep.store import RunStore

Stages = Mapping[str, Mapping[str, bytes]]
"""Finished stages: of each folder's name, the files by their paths."""


@dataclass(frozen=True)
class Trial(Part[Stages]):
    """The candidate with these ``precisions`` by node, judged at ``confidence``, after the weights were recovered or
    not (``recovers``)."""

    recovers: bool
    precisions: Mapping[str, str]
    confidence: float

    def done(self, place: Path | RunStore) -> Stages:
        """Do its stages, up to the verdict; what the run has finished is not done again."""
        from resvit_export.pipeline import Pipeline
        from resvit_export.run_folder import RunFolder
        from resvit_export.variant import Variant

        run = self.seen(place)
        with tempfile.TemporaryDirectory(prefix="resvit-trial-") as scratch:
            folder = RunFolder(Path(scratch) / self.name, SILENT)
            folder.path.mkdir()
            for record in run.glob(f"*/{RECORD}"):
                (folder.path / record.parent.name).symlink_to(record.parent, target_is_directory=True)
            with folder.locked():
                variant = Variant(self.recovers, self.confidence, self.precisions)
                Pipeline(self.run_in(folder), variant).validated  # noqa: B018  (which does the stages)
            return {
                record.parent.name: {
                    str(path.relative_to(record.parent)): path.read_bytes()
                    for path in record.parent.rglob("*")
                    if path.is_file()
                }
                for record in folder.path.glob(f"*/{RECORD}")
                if not record.parent.is_symlink()
            }
