"""The stage ``load``: what the loader knows of the network, where it is asked before there is an ONNX."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.source import NetworkSource
from resvit_export.stage import Artifact, Stage

NETWORK = "network.json"


@dataclass(frozen=True)
class Loaded(Artifact):
    """A stage that knows the network: ``network.json``."""

    @functools.cached_property
    def network(self) -> NetworkRecord:
        """What the loader found."""
        return self.read(NETWORK, NetworkRecord.from_json)


@dataclass(frozen=True)
class Load(Stage[Loaded]):
    """Load the network and write down what is known of it."""

    name: ClassVar[str] = "load"
    artifact: ClassVar[type[Artifact]] = Loaded
    packages: ClassVar[tuple[str, ...]] = ("torch", "timm")

    source: NetworkSource

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write ``network.json``."""
        write_network_record(folder, self.source.network(reporter).record())


def write_network_record(folder: Path, record: NetworkRecord) -> None:
    """Write ``network.json``."""
    (folder / NETWORK).write_bytes(pretty_json(record.to_json()))
