"""Which stage reads which artefact: one property a stage, in the order of the first line of the README."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from resvit_calibrate.runtime.runner import scorable_opset
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.targets.table import Precision, proxy_target
from resvit_export.choices import PluginAttention, Quantizer, Recovery
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.source import NetworkSource
from resvit_export.refusals import (
    refuse_impossible,
    require_accepted,
    require_budget,
    require_fusing,
    require_own_quantizer,
    require_torch,
)
from resvit_export.run import MOST_IMAGES, RECOVERY_IMAGES, Run, images_per_call
from resvit_export.stage import File
from resvit_export.stages.audit import Audit, Audited, refuse_if_unfused, remark_about_plugins
from resvit_export.stages.bundle import Bundle, Bundled, Signer
from resvit_export.stages.calibrate import Calibrate, Calibrated
from resvit_export.stages.compile import Compile, Compiled, for_batch, planned_input
from resvit_export.stages.decide.predict import Predict, Predicted, Pricing
from resvit_export.stages.decide.recover import Recover, Recovered
from resvit_export.stages.decide.search import Searched
from resvit_export.stages.decide.sensitivity import Measure, Measured
from resvit_export.stages.decide.times import Time
from resvit_export.stages.export import Export, Exported, Import
from resvit_export.stages.fold import Fold, Folded
from resvit_export.stages.fuse import Fuse, Fused
from resvit_export.stages.load import Load, Loaded
from resvit_export.stages.prune import Prune, Pruned, budget_of
from resvit_export.stages.quantize import Halve, Quantize, QuantizeByModelOpt, Quantized
from resvit_export.stages.retrain import Retrain, Retrained
from resvit_export.stages.score import (
    Answered,
    Asked,
    AskFloat,
    AskPruned,
    AskQuantized,
    AskReference,
    Questions,
    Scored,
    ask_together,
)
from resvit_export.stages.validate import Validate, Validated
from resvit_export.to_tensorrt.plugin_choice import By
from resvit_quantize.sensitivity.method import Method
from resvit_quantize.settings import Effort

if TYPE_CHECKING:
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_quantize.settings import QuantizeSettings

ORDER = (
    *("pruned", "retrained", "folded", "exported", "recovered", "calibrated", "quantized", "fused"),
    *("validated", "predicted"),
)
OLDEST_OPSET = 20
"""What every TensorRT from 10.3 on reads."""


@dataclass(frozen=True)
class Variant:
    """What of a run may differ from its recipe: whether weights are trained, and precisions that were searched for.

    ``confidence`` is the gate's, higher for what the search looks at after the plain recipe.
    """

    recovers: bool
    confidence: float
    precisions: Mapping[str, str] = field(default_factory=dict)
    search: Searched | None = None


class Pipeline:
    """The stages of a run. Each is a property, which does those before it first, and only what is not finished."""

    def __init__(self, run: Run, variant: Variant | None = None) -> None:
        refuse_impossible(run.recipe, run.target)
        self.run, self.recipe = run, run.recipe
        self.variant = variant or Variant(run.recipe.recover is Recovery.ALWAYS, run.recipe.confidence)

    def vary(self, **changes: object) -> Pipeline:
        """The same run in another variant."""
        return Pipeline(self.run, dataclasses.replace(self.variant, **changes))  # type: ignore[arg-type]

    @property
    def before_the_gate(self) -> list[str]:
        """The stages of this run up to the gate, in order."""
        recipe = self.recipe
        chosen = {
            "pruned": recipe.prunes,
            "retrained": recipe.retrains,
            "folded": not self.run.network.from_onnx,
            "recovered": self.variant.recovers,
            "fused": self.run.fuses,
            "predicted": self.run.target is not None,
        }
        return [name for name in ORDER if chosen.get(name, True)]

    # What stages are made from ---------------------------------------------------------------------------------------

    @cached_property
    def network(self) -> NetworkRecord:
        """What is known of the network. Pruning needs images before there is an ONNX."""
        return (self.loaded if self.recipe.prunes else self.exported).network

    @cached_property
    def preprocess(self) -> Preprocess:
        """How images become input."""
        return self.run.preprocess(self.network)

    @property
    def images(self) -> tuple[ImageSet, ImageSet]:
        """Calibration and validation images."""
        return self.run.image_sets(self.network)

    @property
    def batch_size(self) -> int:
        """Images per call while calibrating and validating."""
        return images_per_call(self.network.input_shape)

    @cached_property
    def questions(self) -> Questions:
        """What every network is asked."""
        outputs = [{"name": name, "shape": list(shape)} for name, shape in self.exported.report.outputs]
        return Questions(self.images[1], self.preprocess, self.batch_size, self.run.task(self.network, outputs))

    @property
    def settings(self) -> QuantizeSettings:
        """How to quantise."""
        return self.run.quantize_settings(self.variant.precisions)

    @property
    def float_model(self) -> File:
        """The float ONNX that is calibrated and quantised."""
        return self.recovered.model if self.variant.recovers else self.exported.model

    @property
    def model(self) -> File:
        """The ONNX that is validated and goes to the device: with nodes of ours, where there are any."""
        return (self.fused.model if self.run.fuses else None) or self.quantized.model

    @property
    def slim_source(self) -> NetworkSource:
        """The network as it was pruned and trained again, or the user's own."""
        if not self.recipe.prunes:
            return self.run.network
        weights = self.retrained.weights if self.recipe.retrains else self.pruned.weights
        return self.run.network.with_checkpoint(weights.path)

    @property
    def pricing(self) -> Pricing:
        """What a prediction depends on."""
        batch = self.recipe.batch_range[1]
        return Pricing(self.float_model, self.run.require_target(), batch, self.run.measured_times)

    # The stages ------------------------------------------------------------------------------------------------------

    @cached_property
    def loaded(self) -> Loaded:
        """What the loader knows of the network; only where it is pruned."""
        return self.run.folder.do(Load(self.run.network))

    @cached_property
    def pruned(self) -> Pruned:
        """The network without what matters least."""
        require_budget(self.recipe)
        self.run.require_images_alone(self.network, "Pruning")
        images = None if self.recipe.data is None else self.images[0]
        return self.run.folder.do(
            Prune(
                self.run.network,
                budget_of(self.recipe, self.run.target),
                self.recipe.sparsity is not None,
                images,
                self.preprocess if images else None,
                self.recipe.seed,
                self.recipe.retrains,
            )
        )

    @cached_property
    def retrained(self) -> Retrained:
        """The pruned network, taught by the one that it was."""
        weights, masks = self.pruned.weights, self.pruned.masks
        images = self.run.sources.training_images(self.preprocess, MOST_IMAGES)
        epochs, seed = self.recipe.prune_epochs, self.recipe.seed
        return self.run.folder.do(Retrain(self.run.network, weights, masks, images, self.preprocess, epochs, seed))

    @cached_property
    def folded(self) -> Folded:
        """The network as one exported program, with what is exact to fold folded."""
        require_torch(self.run.network)
        return self.run.folder.do(Fold(self.slim_source))

    @cached_property
    def exported(self) -> Exported:
        """The float ONNX, its parity with PyTorch checked; or the user's own ONNX, checked."""
        target, recipe = self.run.target, self.recipe
        if self.run.network.from_onnx:
            reads = (target.opset, target.software) if target else (None, "")
            return self.run.folder.do(Import(self.run.network, recipe.shape_wishes, *reads))
        opset = target.opset if target else OLDEST_OPSET
        # What cannot be validated here is not exported.
        opset = OLDEST_OPSET if opset > scorable_opset() else opset
        batch = None if recipe.dynamic_batch else recipe.batch_range[0]
        return self.run.folder.do(Export(self.folded.program, self.folded.network, opset, batch))

    @cached_property
    def recovered(self) -> Recovered:
        """The float ONNX with its weights trained, the quantisers in the loop."""
        self.run.require_images_alone(self.network, "Recovery")
        before = self.vary(recovers=False).calibrated
        images = self.run.sources.training_images(self.preprocess, RECOVERY_IMAGES)
        return self.run.folder.do(
            Recover(
                self.exported.model,
                before.ranges,
                before.statistics,
                self.run.quantize_settings({}),
                images,
                self.preprocess,
                self.recipe.recover_epochs,
                self.recipe.seed,
            )
        )

    @cached_property
    def calibrated(self) -> Calibrated:
        """The ranges of all activations, from one pass over the calibration images."""
        return self.run.folder.do(Calibrate(self.float_model, self.images[0], self.preprocess, self.batch_size))

    @cached_property
    def quantized(self) -> Quantized:
        """The ONNX with Q/DQ and FP16 in the graph."""
        model, images, size, builder = self.float_model, self.images[0], self.batch_size, self.run.builder
        if self.recipe.quantizer is Quantizer.MODELOPT:
            return self.run.folder.do(QuantizeByModelOpt(model, self.settings, images, size, builder))
        if self.recipe.effort is Effort.BEST:
            self.run.require_images_alone(self.network, "--effort best")
        ranges, statistics = self.calibrated.ranges, self.calibrated.statistics
        clips = self.recovered.clips if self.variant.recovers else None
        return self.run.folder.do(Quantize(model, ranges, statistics, clips, self.settings, images, size, builder))

    @cached_property
    def halved(self) -> Halve:
        """The float network in FP16, to hold quantised engines against; not done by itself."""
        return Halve(self.float_model, self.calibrated.ranges, self.calibrated.statistics, self.run.builder)

    @cached_property
    def fused(self) -> Fused:
        """The quantised ONNX with nodes of our own, where any was chosen; and what was found."""
        require_fusing(self.run)
        target, choice, model = self.run.require_target(), self.run.plugins, self.quantized.model
        kinds = None
        if choice.by is By.TIME:
            kinds = self.run.folder.do(Time(model, target, choice.way, self.run.build_settings)).chosen
        eight_bits = self.recipe.plugin_attention is PluginAttention.EIGHT_BITS
        attention = self.run.precision if eight_bits else Precision.FP16
        ranges = self.calibrated.ranges if eight_bits else None
        return self.run.folder.do(Fuse(model, target, choice, kinds, attention, ranges))

    @cached_property
    def answered(self) -> dict[str, Answered]:
        """What all networks answer on the validation images, by stage, each image decoded once."""
        asked: list[Asked] = [AskFloat(self.questions, self.exported.model)]
        if not self.run.network.from_onnx:
            asked.append(AskReference(self.questions, self.run.network))
        if self.recipe.prunes:
            asked.append(AskPruned(self.questions, self.pruned.program))
        asked.append(AskQuantized(self.questions, self.model, self.label, self.exported.report.selects_rows))
        artifacts = self.run.folder.do_together(asked, lambda missing: ask_together(missing, self.run.reporter))
        return {artifact.stage: artifact for artifact in artifacts}

    @property
    def label(self) -> str:
        """What people read of the ONNX that ships."""
        return f"onnx {self.run.precision.value}"

    @property
    def scored(self) -> Scored:
        """The answers of the ONNX that ships."""
        scored = self.answered["score"]
        assert isinstance(scored, Scored)
        return scored

    @cached_property
    def validated(self) -> Validated:
        """The quantised ONNX held against the original network, and judged."""
        answered = self.answered
        return self.run.folder.do(
            Validate(
                questions=self.questions,
                label=self.label,
                reference=answered.get("reference"),
                pruned=answered.get("pruned"),
                baseline=answered["baseline"],
                candidate=self.scored,
                floating=self.float_model,
                statistics=self.calibrated.statistics,
                quantize_report=self.quantized.file("quantize.json"),
                max_drop=self.recipe.max_drop,
                confidence=self.variant.confidence,
            )
        )

    def measured(self, images: int, method: Method = Method.GRADIENT) -> Measured:
        """Which layers the accuracy loss comes from, on the first ``images`` of the calibration images."""
        require_own_quantizer(self.recipe)
        self.run.sources.require_images()
        self.run.require_images_alone(self.network, "Sensitivity")
        plain, known = self.vary(recovers=False), self.run.target.precisions if self.run.target else None
        eight_bits = [p.value for p in (Precision.INT8, Precision.FP8) if known is None or p in known]
        return self.run.folder.do(
            Measure(
                model=plain.exported.model,
                ranges=plain.calibrated.ranges,
                settings=self.run.quantize_settings({}),
                precisions=tuple(dict.fromkeys([self.run.precision.value, *eight_bits])),
                images=self.images[0],
                preprocess=self.preprocess,
                count=min(images, len(self.images[0])),
                method=method,
                task=self.questions.task,
                seed=self.recipe.seed,
            )
        )

    @cached_property
    def predicted(self) -> Predicted:
        """The time of every layer on the target, against all FP16."""
        return self.run.folder.do(Predict(self.pricing, self.quantized.eight_bit_products))

    @cached_property
    def compiled(self) -> Compiled:
        """An engine where one can be built here, else the plan to build it where it can."""
        target = self.run.require_target()
        require_accepted(self.validated.verdict, self.recipe, recovers=self.variant.recovers)
        planned = None if self.run.builder else planned_input(self.exported.report, self.run.bundle_name)
        return self.run.folder.do(Compile(self.model, target, self.run.builder, self.engine_settings, planned))

    @property
    def engine_settings(self) -> BuildSettings:
        """How to build, with the way that kernels of our own reach the engine, where there are any in the graph."""
        ours = self.run.fuses and self.fused.model is not None
        return dataclasses.replace(self.run.build_settings, plugins=self.run.plugins.way if ours else "off")

    def audit_of(self, *, own: bool) -> Audit:
        """The audit of the target's ``own`` engine, or of what stands in: the graph without kernels of ours."""
        target, plain = self.run.require_target(), self.model == self.quantized.model
        copy = self.compiled.copy if own or plain else None
        settings = BuildSettings(
            workspace_mib=self.recipe.workspace_mib or target.workspace_mib,
            optimization_level=self.recipe.optimization_level,
            sparse=self.recipe.sparsity is not None,
        )
        fused = self.fused if self.run.fuses else None
        return Audit(
            quantized=copy or self.quantized.model,
            half=None if self.run.precision is Precision.FP16 else self.halved,
            target=target,
            stand_in=proxy_target(target),
            settings=for_batch(settings, self.recipe.batch_range[1]),
            compiled=self.compiled if own else None,
            remark=remark_about_plugins(self.run.plugins, fused, own=own),
        )

    @cached_property
    def audited(self) -> Audited:
        """Which Q/DQ and attention fused, beside the FP16 engine of the same network."""
        # A dynamic batch has no shapes in its kernels: the usual one is compiled for the audit.
        own = self.compiled.engine is not None and not self.recipe.dynamic_batch
        return self.run.folder.do(self.audit_of(own=own))

    def require_fused(self) -> None:
        """Refuse to go on where something did not fuse, if the recipe says so."""
        if self.recipe.require_fused:
            refuse_if_unfused(self.audited)

    @cached_property
    def bundled(self) -> Bundled:
        """Everything that the device needs, in one file."""
        self.require_fused()
        key = self.run.signing_key()
        return self.run.folder.do(
            Bundle(
                file_name=self.run.bundle_name,
                identity=self.run.network.identity,
                settings=self.recipe.settings_without_paths(),
                precision=self.run.precision.value,
                quantizer=self.recipe.quantizer.value,
                target=self.run.require_target(),
                release=self.recipe.release,
                preprocess=self.preprocess,
                exported=self.exported,
                recovered=self.recovered if self.variant.recovers else None,
                calibrated=self.calibrated,
                quantized=self.quantized,
                model=self.model,
                scored=self.scored,
                validated=self.validated,
                compiled=self.compiled,
                build=self.engine_settings.to_json(),
                signer=Signer(key) if key else None,
            )
        )
