"""The stage ``fuse``: which parts of the quantised graph become kernels of our own, and why the others do not."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_engines.files import atomic_file, pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.targets.table import Precision, Target
from resvit_export.stage import Artifact, File, Stage
from resvit_export.to_tensorrt.fused_network import fused_network
from resvit_export.to_tensorrt.plugin_choice import By, PluginChoice

if TYPE_CHECKING:
    from resvit_export.to_tensorrt.fault_patterns import Found
    from resvit_quantize.fusion.fuse import Operands
    from resvit_quantize.fusion.match import FusionReport

MODEL = "model.onnx"
RESULT = "fusion.json"


@dataclass(frozen=True)
class OwnNode:
    """A node of ours, and the names of the nodes that it replaces."""

    kind: str
    name: str
    op_type: str
    replaces: tuple[str, ...]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> OwnNode:
        """Read what a ``Match`` writes of itself."""
        return cls(document["kind"], document["name"], document["op_type"], tuple(document["replaces"]))


@dataclass(frozen=True)
class FusionRecord:
    """What is read of ``fusion.json``: what decided and why, the nodes of ours, and all of it for people."""

    by: By
    why: str
    nodes: tuple[OwnNode, ...]
    sentences: tuple[str, ...]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> FusionRecord:
        """Read what the stage ``fuse`` wrote; the refusals are passed over, since the sentences tell them."""
        nodes = tuple(OwnNode.from_json(item) for item in document["matches"])
        return cls(By(document["by"]), document["why"], nodes, tuple(document["sentences"]))


@dataclass(frozen=True)
class Fused(Artifact):
    """``fusion.json`` and, where anything became a node of ours, ``model.onnx``."""

    @property
    def model(self) -> File | None:
        """The ONNX with nodes of ours; ``None`` where none was chosen."""
        return self.file(MODEL) if self.has(MODEL) else None

    @property
    def count(self) -> int:
        """How many nodes are ours."""
        return len(self.result.nodes)

    @functools.cached_property
    def result(self) -> FusionRecord:
        """What was found, and what became of it."""
        return self.read(RESULT, FusionRecord.from_json)


@dataclass(frozen=True)
class Fuse(Stage[Fused]):
    """Put kernels of our own into the quantised graph.

    ``kinds`` names what may; None is everything. With ``ranges``, attention reads its operands in
    ``attention``, 8 bits. By the table of measured results, only what is faster there is taken.
    """

    name: ClassVar[str] = "fuse"
    artifact: ClassVar[type[Artifact]] = Fused
    packages: ClassVar[tuple[str, ...]] = ("onnx-ir",)

    model: File
    target: Target
    choice: PluginChoice
    kinds: tuple[str, ...] | None
    attention: Precision
    ranges: File | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write what was found and, where anything became a node of ours, the new graph."""
        import onnx_ir

        from resvit_quantize.fusion.match import Kind

        wanted = frozenset(Kind) if self.kinds is None else frozenset(Kind(name) for name in self.kinds)
        operands = None if self.ranges is None else _operands(self.ranges, self.attention)
        network, report = fused_network(self.model.path, wanted, self.target, by=self.choice.by, operands=operands)
        if report.matches:
            with atomic_file(folder / MODEL) as partial:
                onnx_ir.save(network, partial)
        document: dict[str, Any] = {"by": self.choice.by.value, "why": self.choice.reason, **report.to_json()}
        document["sentences"] = sentences_of(report, self.choice)
        for sentence in document["sentences"]:
            reporter.say(sentence)
        (folder / RESULT).write_bytes(pretty_json(document))


def patterns_behind(fused: Fused, model: File) -> Found:
    """What TensorRT may compute wrongly of the graph ``model`` with our nodes, where there are any."""
    from resvit_export.to_tensorrt.fault_patterns import patterns_in

    return patterns_in((fused.model or model).path)


def sentences_of(report: FusionReport, choice: PluginChoice) -> list[str]:
    """What became of the parts, for people."""
    taken = [match.kind.value for match in report.matches]
    counted = ", ".join(f"{taken.count(kind)} {kind}" for kind in dict.fromkeys(taken))
    first = f"kernels of our own ({choice.reason}): {counted or 'none'}"
    left = [f"{refusal.kind.value} {refusal.name} stays as it is: {refusal.reason}" for refusal in report.refusals]
    return [first, *left]


def _operands(ranges: File, precision: Precision) -> Operands:
    from resvit_calibrate.ranges.estimators import Estimator
    from resvit_calibrate.ranges.ranges import ranges_from_json
    from resvit_quantize.fusion.fuse import Operands

    known = ranges.read(ranges_from_json)
    # Calibration keeps histograms of what products with weights read; of these tensors it knows the extremes.
    return Operands(precision.value, lambda name: known.amax(name, precision.value, Estimator.MAX))
