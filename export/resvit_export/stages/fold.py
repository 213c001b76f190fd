"""The stage ``fold``: the network as one exported program, with what is exact to fold folded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_export.loading.source import NetworkSource
from resvit_export.stage import Artifact, File, Stage
from resvit_export.stages.load import Loaded, write_network_record

if TYPE_CHECKING:
    from resvit_quantize.fold.program import FoldReport

PROGRAM = "folded.pt2"
REPORT = "fold.json"


@dataclass(frozen=True)
class Folded(Loaded):
    """``folded.pt2``, ``fold.json`` and ``network.json``."""

    @property
    def program(self) -> File:
        """The folded program."""
        return self.file(PROGRAM)

    @functools.cached_property
    def report(self) -> FoldReport:
        """What was folded."""
        from resvit_quantize.fold.program import FoldReport

        return self.read(REPORT, FoldReport.from_json)


@dataclass(frozen=True)
class Fold(Stage[Folded]):
    """Fold BatchNorm, weight standardisation, LayerScale and more into the weights."""

    name: ClassVar[str] = "fold"
    artifact: ClassVar[type[Artifact]] = Folded
    packages: ClassVar[tuple[str, ...]] = ("torch", "timm")

    source: NetworkSource

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the folded program, what was folded, and what is known of the network."""
        import torch

        from resvit_export.loading.libraries import quiet_libraries
        from resvit_export.loading.program.run import write_by_memory
        from resvit_quantize.fold.program import fold_program

        network = self.source.network(reporter)
        with quiet_libraries():
            program, report = fold_program(network.program)
            write_by_memory(folder / PROGRAM, lambda out: torch.export.save(program, out))
        (folder / REPORT).write_bytes(pretty_json(report.to_json()))
        write_network_record(folder, network.record())
