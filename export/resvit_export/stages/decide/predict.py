"""The stages ``predict`` and ``estimate``: the time of every layer on the target, against all FP16.

``estimate`` needs the float network alone, so that what 8 bits gain is known before an image is calibrated on.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.targets.costs import ACCUMULATOR_BYTES, EFFICIENCY, CostModel, Efficiency, Prediction
from resvit_engines.targets.layer_times import measured_times_from_json
from resvit_engines.targets.layer_work import LayerKind, LayerWork
from resvit_engines.targets.table import Builder, Precision, Target
from resvit_engines.targets.tensorrt_rules import TIME_RULES, TimeRules
from resvit_export.recipe.choices import InputType
from resvit_export.run import Run
from resvit_export.stage import Artifact, File, Stage

if TYPE_CHECKING:
    import onnx_ir as ir

    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_export.records.costs import CostsRecord
    from resvit_quantize.settings import QuantizeSettings

RESULT = "costs.json"


@dataclass(frozen=True)
class Pricing:
    """What a prediction depends on: the float graph, the device, the batch, and times that were measured on it.

    ``input_type`` is what the engines read (for INT8 the one in FP16 alone reads FP16), and ``pixels`` how images are
    prepared, where they read pixels.
    """

    model: File
    target: Target
    batch: int
    measured: File | None
    input_type: InputType = InputType.FP32
    pixels: Preprocess | None = None
    efficiency: Efficiency = EFFICIENCY
    rules: TimeRules = TIME_RULES
    accumulators: Mapping[LayerKind, int] = field(default_factory=lambda: dict(ACCUMULATOR_BYTES))

    def cost_model(self) -> CostModel:
        """The graph's fused layers with their prices; raises ``ResvitError`` for times of layers it does not have."""
        from resvit_quantize.graph.fused_layers import layers_from_graph
        from resvit_quantize.graph.network import network_from_onnx

        network = network_from_onnx(self.model.path)
        self._retype(network, InputType.FP16 if self.input_type is InputType.INT8 else self.input_type)
        return self._priced(layers_from_graph(network, self.batch))

    def of_quantised(self, quantised: Path, precisions: Mapping[str, Precision]) -> tuple[Prediction, Prediction]:
        """The prices of a quantised graph, and of the same in FP16; raises as ``cost_model`` and ``retype_bindings``.

        By TensorRT, which writes a tensor in the format that its Q/DQ say, with Q/DQ where they stand. TensorRT for RTX
        writes accumulators wherever they stand: the float graph and its products' precisions tell as much.
        """
        from resvit_quantize.graph.fused_layers import layers_from_graph
        from resvit_quantize.graph.quantised_edges import quantised_graph_from_onnx

        costs = self.cost_model()
        if self.target.builder is Builder.RTX or not precisions:
            return costs.predict(precisions), costs.predict({})
        graph = quantised_graph_from_onnx(quantised, self.batch, lambda network: self._retype(network, self.input_type))
        eight = layers_from_graph(graph.model, self.batch, edges=graph.edges)
        return self._priced(eight).predict(precisions), costs.predict({})

    def write(self, folder: Path, quantised: Path, precisions: Mapping[str, Precision]) -> None:
        """Write ``costs.json`` of a quantised graph: the prices of both, and what that is worth; raises likewise."""
        from resvit_export.records.costs import CostsRecord

        chosen, fp16 = self.of_quantised(quantised, precisions)
        (folder / RESULT).write_bytes(pretty_json(CostsRecord(fp16, chosen).to_json(self.target)))

    def _retype(self, network: ir.Model, kind: InputType) -> None:
        from resvit_export.to_tensorrt.bindings import retype_bindings

        retype_bindings(network, kind, self.pixels)

    def _priced(self, layers: Sequence[LayerWork]) -> CostModel:
        measured = measured_times_from_json(self.measured.path) if self.measured else None
        if measured is not None:
            measured.require_known(name for layer in layers for name in (layer.name, *layer.nodes))
        return CostModel(layers, self.target, measured)


def pricing_of(run: Run, model: File, pixels: Preprocess | None, measured: File | None = None) -> Pricing:
    """What predictions for a run depend on; ``measured`` are layer times of its own tuning, where the user has none."""
    of_device = (run.require_target(), run.recipe.batch_range[1], run.measured_times or measured)
    return Pricing(model, *of_device, run.recipe.input_type, pixels)


@dataclass(frozen=True)
class Predicted(Artifact):
    """``costs.json``."""

    @functools.cached_property
    def costs(self) -> CostsRecord:
        """Both predictions."""
        from resvit_export.records.costs import CostsRecord

        return self.read(RESULT, CostsRecord.from_json)


@dataclass(frozen=True)
class Predict(Stage[Predicted]):
    """Price the quantised graph, whose products have these precisions by name."""

    name: ClassVar[str] = "predict"
    artifact: ClassVar[type[Artifact]] = Predicted
    packages: ClassVar[tuple[str, ...]] = ("onnx-ir",)

    pricing: Pricing
    quantized: File
    precisions: Mapping[str, Precision]

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the prices of both, and what that is worth."""
        del reporter
        self.pricing.write(folder, self.quantized.path, self.precisions)


@dataclass(frozen=True)
class Estimate(Stage[Predicted]):
    """Price the float graph as these settings would quantise it, before its ranges are known."""

    name: ClassVar[str] = "estimate"
    artifact: ClassVar[type[Artifact]] = Predicted
    packages: ClassVar[tuple[str, ...]] = ("onnx-ir",)

    pricing: Pricing
    settings: QuantizeSettings

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the prices of both, and what that is worth."""
        del reporter
        from resvit_quantize.qdq.unmeasured import quantise_unmeasured

        with tempfile.TemporaryDirectory(prefix="resvit-estimate-") as scratch:
            unmeasured = Path(scratch) / "unmeasured.onnx"
            precisions = quantise_unmeasured(self.pricing.model.path, self.settings, unmeasured)
            self.pricing.write(folder, unmeasured, precisions)
