"""Which stage reads which artefact, in the order of the README's first line."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from resvit_engines.builder.settings import BuildSettings
from resvit_engines.targets.speed_verdict import measured_floats, measured_speed, unpredicted_speed
from resvit_engines.targets.table import Precision
from resvit_export import refusals
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.recipe.choices import InputType, PluginAttention, Quantizer, Recovery
from resvit_export.run import MOST_IMAGES, RECOVERY_IMAGES, Run
from resvit_export.stage import File
from resvit_export.stages import audit, bundle, calibrate, export, fold, fuse, load, prune, quantize, retrain, score
from resvit_export.stages import compile as engine
from resvit_export.stages import validate as gate
from resvit_export.stages.decide import overlap, predict, preprocessing, recover, times
from resvit_export.task_choice import Questions
from resvit_export.to_tensorrt.parser import require_readable
from resvit_export.to_tensorrt.plugin_choice import By
from resvit_export.variant import Variant

if TYPE_CHECKING:
    from resvit_calibrate.data.overlap import Overlap
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_engines.targets.speed_verdict import SpeedVerdict


class Pipeline:
    """The stages of a run. Each is a property, which does those before it first, and only what is not finished."""

    def __init__(self, run: Run, variant: Variant | None = None) -> None:
        refusals.refuse_impossible(run.recipe, run.target)
        self.run, self.recipe, self.do = run, run.recipe, run.folder.do
        self.variant = variant or Variant(run.recipe.recover is Recovery.ALWAYS, run.recipe.confidence)

    def vary(self, **changes: object) -> Pipeline:
        """The same run in another variant."""
        return Pipeline(self.run, dataclasses.replace(self.variant, **changes))  # type: ignore[arg-type]

    # What stages are made from, told by the run and by the stages before them.

    @cached_property
    def network(self) -> NetworkRecord:
        """What is known of the network. Pruning needs images before there is an ONNX."""
        return (self.do(load.Load(self.run.network)) if self.recipe.prunes else self.exported).network

    @cached_property
    def preprocess(self) -> Preprocess:
        """How images become input."""
        return self.run.preprocess(self.network)

    @property
    def images(self) -> tuple[ImageSet, ImageSet]:
        """Calibration and validation images."""
        return self.run.image_sets(self.network)

    @cached_property
    def questions(self) -> Questions:
        """What every network is asked."""
        task = self.run.task(self.network, self.exported.report.to_json()["outputs"])
        return Questions(self.images[1], self.preprocess, self.network.images_per_call, task)

    @property
    def float_model(self) -> File:
        """The float ONNX that is calibrated and quantised."""
        return self.recovered.model if self.variant.recovers else self.exported.model

    @property
    def model(self) -> File:
        """The ONNX that is validated and goes to the device: with nodes of ours, where there are any."""
        return (
            self.bound.model if self.bound else (self.fused.model if self.run.fuses else None) or self.quantized.model
        )

    @cached_property
    def bound(self) -> quantize.Bound | None:
        """The same with inputs and outputs of other types than FP32, where the recipe says so."""
        if self.recipe.input_type is InputType.FP32:
            return None
        model = (self.fused.model if self.run.fuses else None) or self.quantized.model
        return self.do(quantize.Bind(model, self.recipe.input_type, self.pixels))

    @property
    def pixels(self) -> Preprocess | None:
        """How pixels become the image, where the engine reads pixels."""
        return refusals.pixels_of(self.recipe, lambda: self.images)

    @property
    def ships(self) -> Precision:
        """What the ONNX that ships is: as asked, or FP16 where the search or the rules leave nothing in 8 bits."""
        if self.quantized.eight_bit_products:
            return self.run.precision
        return Precision.FP32 if self.run.target is not None and self.run.target.on_cpu else Precision.FP16

    @property
    def label(self) -> str:
        """What people read of the ONNX that ships."""
        return f"onnx {self.ships.value}"

    @property
    def engine_settings(self) -> BuildSettings:
        """How to build, with the way that kernels of our own reach the engine, where there are any in the graph."""
        ours = self.run.fuses and self.fused.model is not None
        return dataclasses.replace(self.run.build_settings, plugins=self.run.plugins.way if ours else "off")

    # The stages.

    @cached_property
    def pruned(self) -> prune.Pruned:
        """The network without what matters least."""
        refusals.require_budget(self.recipe)
        self.run.require_images_alone(self.network, "Pruning")
        network, images = self.run.network, None if self.recipe.data is None else self.images[0]
        preprocess, budget = self.preprocess if images else None, prune.budget_of(self.recipe, self.run.target)
        sparse, seed, trained = self.recipe.sparsity is not None, self.recipe.seed, self.recipe.retrains
        stage = prune.Prune(network, budget, sparse, images, preprocess, seed, trained, network.code)
        # What is said of the whole network after pruning is too late.
        if self.run.target is not None and self.run.folder.is_ahead(stage):
            self._require_ready(self._exported(self.do(fold.Fold(network))))
        return self.do(stage)

    @cached_property
    def retrained(self) -> retrain.Retrained:
        """The pruned network, taught by the one that it was."""
        before, images = self.pruned, self.run.training_images(self.network, MOST_IMAGES)
        how = (images, self.preprocess, self.recipe.prune_epochs, self.recipe.seed, self.run.network.code)
        taught = self.run.taught(self.network, self.network.outputs)
        return self.do(retrain.Retrain(self.run.network, before.weights, before.masks, *how, *taught))

    @cached_property
    def folded(self) -> fold.Folded:
        """The network, pruned or whole, as one exported program, with what is exact to fold folded."""
        refusals.require_torch(self.recipe)
        if not self.recipe.prunes:
            return self.do(fold.Fold(self.run.network))
        weights = self.retrained.weights if self.recipe.retrains else self.pruned.weights
        return self.do(fold.Fold(self.run.network.with_checkpoint(weights.path)))

    @cached_property
    def exported(self) -> export.Exported:
        """The float ONNX, its parity with PyTorch checked; or the user's own ONNX, checked. The target reads it."""
        return self._exported(None if self.run.network.from_onnx else self.folded)

    def _exported(self, folded: fold.Folded | None) -> export.Exported:
        exported = self.do(export.export_of(self.run, folded))
        if not exported.reused:
            gc.collect()  # programs are full of cycles, and hold the weights once more
        require_readable(exported.report.operators, self.run.target)
        if not self.run.fuses:  # kernels of our own may take the place of what TensorRT computes wrongly
            self.run.warn_of_faults(exported.patterns)
        return exported

    @cached_property
    def recovered(self) -> recover.Recovered:
        """The float ONNX with its weights trained, the quantisers in the loop."""
        before = self.vary(recovers=False).calibrated
        images = self.run.training_images(self.network, RECOVERY_IMAGES)
        taught = self.run.taught(self.network, self.exported.report.to_json()["outputs"])
        how = (images, self.preprocess, self.recipe.recover_epochs, self.recipe.seed, *taught)
        settings, model = self.run.quantize_settings(self._decided), self.exported.model
        return self.do(recover.Recover(model, before.ranges, before.statistics, settings, *how))

    @cached_property
    def _decided(self) -> Mapping[str, str]:
        """What held-back images decided of layers and heads, by node: weights are trained with these precisions."""
        if self.recipe.quantizer is Quantizer.MODELOPT:
            return {}
        check = self.vary(recovers=False, precisions={}).quantized.report.held_back
        return check.precisions if check is not None else {}

    @cached_property
    def doubt(self) -> str:
        """Why the validation images tell nothing, empty where nothing does."""
        if self.network.image_range:  # it normalises by itself, and is not told how
            return self.images[1].doubt
        seen = self.do(preprocessing.SeePreprocess(self.questions, self.exported.model, self.network.preprocess))
        return self.images[1].doubt or seen.doubt

    @cached_property
    def overlap(self) -> Overlap:
        """How many images calibration and validation share."""
        calibration, validation = self.images
        return self.do(overlap.SeeOverlap(calibration, validation, validation.shared)).overlap

    @cached_property
    def calibrated(self) -> calibrate.Calibrated:
        """The ranges of all activations, from one pass over the calibration images."""
        self.doubt, self.overlap  # noqa: B018  (what is wrong with the data is told before the pass)
        how = (self.images[0], self.preprocess, self.network.images_per_call, self.network.sizes)
        stage = calibrate.Calibrate(self.float_model, *how, holds_back=True)
        if self.run.folder.is_ahead(stage):
            self._require_ready(self.exported)
        return self.do(stage)

    def _require_ready(self, exported: export.Exported) -> None:
        images = self.images if self.recipe.data is not None else None
        refusals.require_ready(self.run, self.network, exported, images)

    @cached_property
    def quantized(self) -> quantize.Quantized:
        """The ONNX with Q/DQ and FP16 in the graph."""
        decided = self._decided if self.variant.recovers else {}
        settings, ranges = self.run.quantize_settings({**decided, **self.variant.precisions}), self.calibrated
        how = (settings, self.images[0], self.network.images_per_call, self.run.builder)
        if self.recipe.quantizer is Quantizer.MODELOPT:
            return self.do(quantize.QuantizeByModelOpt(self.float_model, *how))
        clips = self.recovered.clips if self.variant.recovers else None
        selects = self.exported.report.selects_rows
        return self.do(quantize.Quantize(self.float_model, ranges.ranges, ranges.statistics, clips, *how, selects))

    @property
    def half(self) -> quantize.Halve:
        """The float network in FP16, which quantised engines are held against; not done by itself."""
        return quantize.Halve(self.float_model, self.calibrated.ranges, self.calibrated.statistics, self.run.builder)

    @cached_property
    def fused(self) -> fuse.Fused:
        """The quantised ONNX with nodes of our own, where any was chosen; and what was found."""
        refusals.require_fusing(self.run)
        model, target, choice = self.quantized.model, self.run.require_target(), self.run.plugins
        timed = times.Time(model, target, choice.way, self.run.build_settings)
        kinds = self.do(timed).chosen if choice.by is By.TIME else None
        eight_bits = self.recipe.plugin_attention is PluginAttention.EIGHT_BITS
        how = (self.run.precision, self.calibrated.ranges) if eight_bits else (Precision.FP16, None)
        found = self.do(fuse.Fuse(model, target, choice, kinds, *how))
        self.run.warn_of_faults(fuse.patterns_behind(found, model))
        return found

    @cached_property
    def answered(self) -> dict[str, score.Answered]:
        """What all networks answer on the validation images, by stage; each image is decoded once."""
        pruned = self.pruned if self.recipe.prunes else None
        how = (self.questions, self.exported, pruned, self.model, self.float_model, self.label)
        return score.answers_of(self.run, *how)

    @cached_property
    def validated(self) -> gate.Validated:
        """The answers of the ONNX that ships held against the original network's, and judged."""
        clips = (self.float_model, self.calibrated.statistics, self.quantized, self.exported.report.selects_rows)
        limit, images = (self.recipe.max_drop, self.variant.confidence), self.images[1]
        how = (*gate.sides(self.answered), *clips, *limit, images.class_names, self.doubt, self.overlap)
        return self.do(gate.Validate(self.questions, self.label, *how))

    @cached_property
    def predicted(self) -> predict.Predicted:
        """The time of every layer on the target, against all FP16."""
        measured = self.variant.tuned.measured_times if self.variant.tuned else None
        pricing = predict.pricing_of(self.run, self.float_model, self.pixels, measured)
        return self.do(predict.Predict(pricing, self.quantized.model, self.quantized.eight_bit_products))

    @cached_property
    def speed(self) -> SpeedVerdict:
        """The second half of the verdict: whether what ships is faster than FP16 on the target."""
        target, tuned = self.run.require_target(), self.variant.tuned
        if tuned is not None and tuned.speed is not None:
            ratio, *ms = tuned.speed
            label = self.run.precision.value.upper()
            return measured_speed(ratio.value, ratio.sentence, (ms[0], ms[1]), label, target)
        if tuned is not None and not self.quantized.eight_bit_products:
            tried, *took = tuned.best or (None,)
            within, both = (tried.sentence, (took[0], took[1])) if tried else ("", None)
            return measured_floats(within, both, self.run.precision.value.upper(), target)
        if target.on_cpu:
            return unpredicted_speed(target)
        return self.predicted.costs.speed(target).for_wish(self.run.precision)

    def look_ahead(self) -> None:
        """Refuse at once what the network's shapes and the first images tell, and 8 bits that gain nothing there."""
        if self.recipe.data is not None:
            self.run.sources.require_usable_data()  # seconds, where a network takes a minute to load and export
        source, unpruned = self.run.network, None
        if not source.from_onnx:
            folding = fold.Fold(source)
            if not self.run.folder.has(folding):  # what is wrong with the data is told before the network is folded
                loaded = source.network(self.run.reporter)
                refusals.require_answerable(self.run, loaded)
                if self.recipe.data is not None:
                    self.run.tell_preprocess(loaded.record())
            unpruned = self.do(folding)
        if self.recipe.data is not None:
            self.run.tell_preprocess(self.network)
        target = self.run.target
        if target is not None and not target.on_cpu and refusals.quantises_itself(self.recipe):
            exported, settings = self._exported(unpruned), self.run.quantize_settings({})
            estimated = self.do(predict.Estimate(predict.pricing_of(self.run, exported.model, self.pixels), settings))
            refusals.require_gain(estimated.costs.speed(target), self.recipe)

    @cached_property
    def compiled(self) -> engine.Compiled:
        """An engine where one can be built here, else the plan to build it where it can."""
        target = self.run.require_target()
        refusals.require_accepted(self.validated.verdict, self.recipe, recovers=self.variant.recovers)
        planned = (
            None
            if self.run.builds_here
            else engine.planned_input(self.exported.report, self.run, self.ships, self.bound)
        )
        return self.do(engine.Compile(self.model, target, self.engine_settings, planned))

    def audit_of(self, *, own: bool) -> audit.Audit:
        """The audit of the target's own engine, or of what is predicted or compiled for it."""
        fused = self.fused if self.run.fuses else None
        return audit.audit_of(self.run, self.quantized, self.half, fused, self.compiled, own=own)

    @cached_property
    def audited(self) -> audit.Audited:
        """Which Q/DQ and attention fused. Of a range of shapes kernels tell none: the usual is listed."""
        return self.do(self.audit_of(own=self.compiled.engine is not None and not self.recipe.dynamic))

    @cached_property
    def bundled(self) -> bundle.Bundled:
        """Everything that the device needs, in one file; refused where something did not fuse, if the recipe asks."""
        if self.recipe.require_fused:
            self.audited.result.require_fused()
        numbers = (self.exported, self.recovered if self.variant.recovers else None, self.calibrated, self.quantized)
        shipped = (self.model, self.bound, score.shipped_in(self.answered), self.validated)
        engine_of = (self.compiled, self.engine_settings, bundle.signer_of(self.run))
        contents = bundle.Contents(*numbers, *shipped, *engine_of)
        return self.do(bundle.bundle_of(self.run, self.ships, self.images[1], contents))
