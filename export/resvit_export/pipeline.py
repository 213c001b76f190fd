"""The stages of a run: in which order they come, and what makes each of them a different one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_calibrate.runtime.runner import scorable_opset
from resvit_engines.builder.builder import builder_here
from resvit_engines.builder.limits import require_buildable
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_file
from resvit_engines.progress import Reporter
from resvit_engines.targets.own import resolve_target
from resvit_engines.targets.table import Builder, Kind, Precision, Target, require_precision
from resvit_export import work
from resvit_export.choices import Recovery
from resvit_export.loading.identity import metric_identity, model_identity
from resvit_export.loading.inputs import IMAGE, NetworkInput, require_fed
from resvit_export.pruning import prune_into, require_prunable, retrain_into
from resvit_export.recipe import Recipe
from resvit_export.run_folder import Artifact, RunFolder
from resvit_export.searching import predicted, require_searchable, searched
from resvit_export.to_tensorrt.plugin_choice import By, plugin_choice
from resvit_export.validation import images_per_call, validate

if TYPE_CHECKING:
    from resvit_calibrate.answers.base import Task
    from resvit_calibrate.data.training_images import TrainingImages
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_engines.keys.private import SigningKey
    from resvit_export.loading.load import Network

RECOVERY_IMAGES = 20_000
MOST_IMAGES = 100_000_000
OLDEST_OPSET = 20
"""What every TensorRT from 10.3 on reads."""
_BEFORE_RECOVERY = (
    *("network", "identity", "loaded", "facts", "preprocess", "image_sets", "pruned", "retrained", "slim_network"),
    *("folded", "exported", "reference", "baseline"),
)
"""What is the same with and without recovery."""
_BEFORE_PRECISIONS = (*_BEFORE_RECOVERY, "training_images", "before_recovery", "recovered", "calibrated")
"""What is the same whatever precision each layer gets."""
_ONCE_MEASURED = ("plugin_times",)
"""What is taken to be the same: a search would otherwise build engines at every step."""


class Pipeline:
    """One recipe on one run folder. Each stage is a property: it returns its finished artefact.

    A stage does those before it first, and only what is not finished yet. Wishes that the target cannot fulfil are
    refused at construction, before any work.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, reporter: Reporter) -> None:
        self.recipe = recipe
        self.run = run
        self.reporter = reporter
        self.target: Target | None = None
        if recipe.target is not None:
            self.target = resolve_target(recipe.target, recipe.jetpack, recipe.own_targets)
            require_precision(self.target, Precision(recipe.precision))
            require_buildable(self.target, self.build_settings, builder_here(self.target))
        self.plugin_choice = plugin_choice(recipe, self.target, builder_here(self.target) if self.target else None)
        self.precisions: Mapping[str, str] = {}
        """Precision by node, where the search chose it; nodes not named follow the rules."""
        self.confidence = recipe.confidence
        """Of the gate; higher for what the search looks at after the plain recipe."""
        self.search: Artifact | None = None
        """The stage that chose ``precisions``."""
        require_searchable(recipe, self.target)
        require_prunable(recipe, self.target)
        if recipe.recover == "always" and not self._recoverable:
            raise ResvitError(
                f"Recovery trains for our own INT8 and FP8, not for {recipe.precision} by {recipe.quantizer}.",
                "Leave --recover out, or ask for --precision int8 or fp8 and --quantizer resvit.",
                ExitCode.IMPOSSIBLE,
            )
        if self.recovers and recipe.train_data is None:
            raise ResvitError(
                "Recovery was asked for, and there are no images to train on.",
                "Say --train-data with a folder of images, an .npz, fashion-mnist, or package.module:factory.",
            )

    def borrow(self, other: Pipeline) -> None:
        """Take over what ``other``, of the same recipe for another target, has loaded already."""
        for name in ("network", "identity", "image_sets"):
            if name in other.__dict__:
                self.__dict__[name] = other.__dict__[name]

    @property
    def build_settings(self) -> BuildSettings:
        """What the recipe says of the build."""
        recipe = self.recipe
        return BuildSettings(
            batch=recipe.batch_range,
            workspace_mib=recipe.workspace_mib,
            optimization_level=recipe.optimization_level,
            sparse=recipe.sparsity is not None,
            hardware_compatible=recipe.hardware_compatible,
            version_compatible=recipe.version_compatible,
            strip_weights=recipe.strip_weights,
            timing_cache=Path(recipe.timing_cache) if recipe.timing_cache else None,
        )

    @property
    def engine_settings(self) -> BuildSettings:
        """The same with the way that kernels of our own reach the engine, where there are any in the graph."""
        way = self.plugin_choice.way if self.shipped is not self.quantized else "off"
        return dataclasses.replace(self.build_settings, plugins=way)

    @property
    def from_onnx(self) -> bool:
        """Whether the model came as ONNX, so that there is no PyTorch stage."""
        return str(self.recipe.model).endswith(".onnx")

    def require_target(self) -> Target:
        """The target, or an error that says to name one."""
        if self.target is None:
            raise ResvitError(
                "No target was given.",
                "Say --target, for example --target jetson-orin or --target l4; 'resvit-export targets' lists them.",
            )
        return self.target

    def require_images(self) -> str:
        """The data set, or an error that says to name one, or one that exists."""
        if self.recipe.data is None:
            raise ResvitError(
                "No images were given, and calibration never invents any.",
                "Say --data with a folder of images, an .npz, fashion-mnist, or package.module:factory.",
            )
        from resvit_calibrate.data.sources import require_source

        for data in (self.recipe.data, self.recipe.validation_data, self.recipe.train_data):
            if data is not None:
                require_source(data)
        return self.recipe.data

    @property
    def prunes(self) -> bool:
        """Whether there is a stage ``prune``."""
        return self.recipe.prunes

    @property
    def retrains(self) -> bool:
        """Whether there is a stage ``retrain`` behind it."""
        return self.prunes and self.recipe.train_data is not None

    def require_accepted(self) -> None:
        """Refuse to go on with a rejected model, unless the recipe allows it."""
        if self.verdict["verdict"] == "rejected" and not self.recipe.allow_rejected:
            raise ResvitError(
                f"Validation rejected the model: {self.verdict['reason']}",
                f"Try {self._recovery_advice}--effort best, more --calibration-images, --exclude for the layers "
                "that 'resvit-export sensitivity' names, or --precision fp16; --allow-rejected goes on all the same.",
                ExitCode.REJECTED,
            )

    @property
    def recovers(self) -> bool:
        """Whether the weights are trained before they are quantised; ``auto`` does so only once :meth:`settled`."""
        return self.recipe.recover == "always"

    def settled(self) -> Pipeline:
        """This pipeline, or the one that recovers or was searched, where the gate or the recipe asks for it.

        Does the stages up to ``validate`` where that question is open.
        """
        return searched(self._recovered_if_rejected())

    def with_precisions(self, precisions: Mapping[str, str], confidence: float) -> Pipeline:
        """The same pipeline with precisions by node, judged at ``confidence``."""
        other = Pipeline(self.recipe, self.run, self.reporter)
        kept = (*_BEFORE_PRECISIONS, *_ONCE_MEASURED)
        other.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        other.precisions, other.confidence = dict(precisions), confidence
        return other

    def _recovered_if_rejected(self) -> Pipeline:
        """The pipeline that recovers, where ``auto`` finds that calibration alone is rejected."""
        if self.recipe.recover != "auto" or self.recipe.train_data is None or not self._recoverable:
            return self
        if self.verdict["verdict"] != "rejected" or self.reads_more_than_images:
            return self
        self.reporter.say(f"calibration alone is rejected ({self.verdict['reason']}): recovery follows")
        other = self._with_recover(Recovery.ALWAYS)
        other.__dict__["before_recovery"] = self
        return other

    def _with_recover(self, when: Recovery) -> Pipeline:
        other = Pipeline(dataclasses.replace(self.recipe, recover=when), self.run, self.reporter)
        other.__dict__.update({name: self.__dict__[name] for name in _BEFORE_RECOVERY if name in self.__dict__})
        return other

    @property
    def _recoverable(self) -> bool:
        return self.recipe.quantizer == "resvit" and self.recipe.precision != "fp16"

    @property
    def _recovery_advice(self) -> str:
        if self.recovers:
            return "more --recover-epochs or --train-images, "
        if self._recoverable and self.recipe.train_data is None:
            return "--train-data with training images, labels not needed (recovery then trains the weights), "
        return "--recover, " if self._recoverable else ""

    # --- what stages are made from ------------------------------------------------------------------------------

    @functools.cached_property
    def network(self) -> Network:
        """The user's network, loaded once when a stage really needs it."""
        return work.network_from_recipe(self.recipe, self.reporter)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the network without loading it: names, arguments and digests of files."""
        return model_identity(self.recipe)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the loader knows of the network: input shape, classes, preprocessing."""
        # Pruning needs images before there is an ONNX.
        return (self.loaded if self.prunes else self.exported).json("network.json")

    @functools.cached_property
    def preprocess(self) -> Preprocess:
        """How images become input: from the model where it knows, with the recipe's settings on top."""
        from resvit_export.preprocessing import preprocess_from

        return preprocess_from(self.facts, self.recipe)

    @functools.cached_property
    def image_sets(self) -> tuple[ImageSet, ImageSet]:
        """Calibration and validation images: seeded, disjoint."""
        from resvit_calibrate.data.image_sets import open_image_sets
        from resvit_calibrate.images.image_set import DataSpec
        from resvit_calibrate.images.targets import TargetOptions

        spec = DataSpec(
            data=self.require_images(),
            validation_data=self.recipe.validation_data,
            calibration_images=self.recipe.calibration_images,
            validation_images=self.recipe.validation_images,
            seed=self.recipe.seed,
            reading=TargetOptions.from_options(self.recipe.task_options),
            unlabelled=self.recipe.task == "other" or self.recipe.metric is not None,
        )
        found = open_image_sets(spec, self.preprocess, self.reporter)
        if not self.prunes:
            self._require_fed(found)
        return found

    def _require_fed(self, image_sets: tuple[ImageSet, ImageSet]) -> None:
        """Refuse data that lacks what the network reads beside images."""
        inputs = tuple(
            NetworkInput(item["name"], tuple(item["shape"]), item["dtype"]) for item in self.facts.get("inputs", ())
        )
        for images in image_sets:
            batch = next(images.batches(1))
            if inputs or batch.inputs:
                image = NetworkInput(IMAGE, tuple(self.facts["input_shape"]))
                require_fed(inputs or (image,), batch.feeds(IMAGE), images.description)

    @property
    def reads_more_than_images(self) -> bool:
        """Whether the network has other inputs beside its image."""
        return len(self.facts.get("inputs", ())) > 1

    def require_images_alone(self, what: str) -> None:
        """Refuse ``what`` for a network that reads more than images."""
        if self.reads_more_than_images:
            names = ", ".join(item["name"] for item in self.facts["inputs"])
            raise ResvitError(
                f"{what} works for networks that read images alone, and this one reads {names}.",
                "Wrap the network in a module that makes the others constants, or leave that out.",
                ExitCode.IMPOSSIBLE,
            )

    @functools.cached_property
    def task(self) -> Task:
        """What the network is for: as the recipe says, or told by what is known of the images, else by its outputs."""
        from resvit_calibrate.tasks.kinds import task_named, task_of

        recipe = self.recipe
        if recipe.task != "auto":
            return task_named(recipe.task, self._task_options(recipe.task), recipe.metric)
        outputs = self.exported.json("export.json")["outputs"]
        kind = task_of(outputs, self.image_sets[1].task, {}, recipe.metric).name
        return task_named(kind, self._task_options(kind), recipe.metric)

    def _task_options(self, kind: str) -> dict[str, Any]:
        """What the user says of the outputs, over what a detector says of its own."""
        own = self.facts.get("task_options", {}) if kind == "detection" else {}
        return {**own, **self.recipe.task_options}

    @property
    def task_facts(self) -> dict[str, Any]:
        """What of the task changes what is kept of a network's answers."""
        return {
            "task": self.task.name,
            "task_options": self._task_options(self.task.name),
            "metric": metric_identity(self.recipe.metric),
        }

    @functools.cached_property
    def training_images(self) -> TrainingImages:
        """Images to recover with; none of them is a validation image."""
        return self._training_images(RECOVERY_IMAGES)

    @functools.cached_property
    def retraining_images(self) -> TrainingImages:
        """Images to train on behind pruning; none of them is a validation image."""
        return self._training_images(MOST_IMAGES)

    def _training_images(self, most: int) -> TrainingImages:
        from resvit_calibrate.data.image_sets import open_training_images

        recipe, validation = self.recipe, self.image_sets[1]
        count = recipe.train_images or most
        return open_training_images(
            str(recipe.train_data), validation, count, recipe.seed, self.preprocess, self.reporter
        )

    @functools.cached_property
    def before_recovery(self) -> Pipeline:
        """The same run without recovery: its ranges are those that the weights are trained with."""
        self.exported, self.image_sets  # noqa: B018  (shared with the other)
        return self._with_recover(Recovery.NEVER)

    @property
    def float_model(self) -> tuple[Path, str]:
        """The float ONNX that is calibrated and quantised, and its digest."""
        if not self.recovers:
            return self.exported.path("model.onnx"), self.exported.digest
        # Of the stage's third file, the seconds that it took change the digest.
        outputs = self.recovered.record["outputs"]
        digests = [outputs[name]["sha256"] for name in ("recovered.onnx", "clips.json")]
        return self.recovered.path("recovered.onnx"), "+".join(digests)

    @property
    def quantize_facts(self) -> dict[str, Any]:
        """What of the recipe changes the quantised network."""
        recipe = self.recipe
        return {
            "precision": recipe.precision,
            "quantizer": recipe.quantizer,
            "calibrator": recipe.calibrator,
            "effort": recipe.effort,
            "include": sorted(recipe.include),
            "exclude": sorted(recipe.exclude),
            **({"recovered": True} if self.recovers else {}),
        }

    @property
    def batch_size(self) -> int:
        """Images per call while calibrating and validating."""
        return images_per_call(self.facts["input_shape"])

    @property
    def verdict(self) -> dict[str, Any]:
        """The verdict of the gate, as ``verdict.json`` holds it."""
        return self.validated.json("verdict.json")

    @property
    def bundle_name(self) -> str:
        """File name of the bundle."""
        return f"{self.recipe.label}-{self.require_target().name}-{self.recipe.precision}.resvit"

    @property
    def bundle_path(self) -> Path:
        """Where the bundle lies."""
        return self.bundled.path(self.bundle_name)

    @functools.cached_property
    def signing_key(self) -> SigningKey | None:
        """What the bundle is signed with; ``None`` where neither recipe nor environment names a key."""
        from resvit_engines.keys.private import load_signing_key

        return load_signing_key(self.recipe.key)

    @functools.cached_property
    def slim_network(self) -> Network:
        """The network as it was pruned and trained again, or the user's own."""
        if not self.prunes:
            return self.network
        weights = self.retrained.path("retrained.pt") if self.retrains else self.pruned.path("pruned.pt")
        return work.network_from_recipe(dataclasses.replace(self.recipe, checkpoint=str(weights)), self.reporter)

    # --- stages, in order ---------------------------------------------------------------------------------------

    @functools.cached_property
    def loaded(self) -> Artifact:
        """Stage ``load``: what the loader knows of the network; only where it is pruned."""
        return self.run.stage(
            "load", {"model": self.identity}, {}, ("torch", "timm"), lambda folder: work.load_into(folder, self.network)
        )

    @functools.cached_property
    def pruned(self) -> Artifact:
        """Stage ``prune``: the network without what matters least, and the widths that it has now."""
        recipe, target = self.recipe, self.target
        if not self.prunes:
            raise ResvitError(
                "Nothing says how far to prune.",
                "Say --prune-macs, --prune-latency or --prune-params with the share that may remain, such as 0.5, "
                "or --sparsity 2:4.",
            )
        self.require_images_alone("Pruning")
        if self.retrains:
            # Before any work: what is trained on is told apart from what is validated on.
            self.require_images()
        images = None if recipe.data is None else self.image_sets[0]
        return self.run.stage(
            "prune",
            {
                **{name: share for name, share in recipe.prune_budgets.items() if share is not None},
                "what": sorted(recipe.prune_what),
                "importance": recipe.prune_importance,
                "sparsity": recipe.sparsity,
                "precision": recipe.precision,
                "target": target.to_json() if target and recipe.prune_latency is not None else None,
                **({"measured": sha256_file(Path(recipe.measured_times))} if recipe.measured_times else {}),
                "seed": recipe.seed,
                "model": self.identity,
            },
            {"images": images.digest} if images else {},
            ("torch", "timm", "torch-pruning", *(("nvidia-modelopt",) if recipe.sparsity else ())),
            lambda folder: prune_into(folder, self.network, images, recipe, target, self.reporter),
        )

    @functools.cached_property
    def retrained(self) -> Artifact:
        """Stage ``retrain``: the pruned network, taught by the one that it was."""
        recipe, pruned, images = self.recipe, self.pruned, self.retraining_images
        state = self.run.path / "retrain.resume"
        artifact = self.run.stage(
            "retrain",
            {"epochs": recipe.prune_epochs, "seed": recipe.seed, "model": self.identity},
            {"pruned": _weights_digest(pruned, "pruned"), "images": images.digest},
            ("torch",),
            lambda folder: retrain_into(
                folder,
                self.network,
                work.network_from_recipe(
                    dataclasses.replace(recipe, checkpoint=str(pruned.path("pruned.pt"))), self.reporter
                ),
                pruned.path("pruned.pt"),
                images,
                state,
                recipe,
                self.reporter,
            ),
        )
        if not artifact.reused:
            state.unlink(missing_ok=True)
        return artifact

    @functools.cached_property
    def folded(self) -> Artifact:
        """Stage ``fold``: the network as one exported program, with what is exact to fold folded."""
        if self.from_onnx:
            raise ResvitError(
                "An ONNX model has no fold stage: its graph is taken as it is.",
                "Start with 'export', or run 'build', which begins there by itself.",
            )
        return self.run.stage(
            "fold",
            {"model": self.identity},
            self._slim_digests,
            ("torch", "timm"),
            lambda folder: work.fold_into(folder, self.slim_network),
        )

    @property
    def _slim_digests(self) -> dict[str, str]:
        """What tells the pruned network from the user's own."""
        found = {"pruned": _weights_digest(self.pruned, "pruned")} if self.prunes else {}
        return found | ({"retrained": _weights_digest(self.retrained, "retrained")} if self.retrains else {})

    @functools.cached_property
    def exported(self) -> Artifact:
        """Stage ``export``: the float ONNX, its parity with PyTorch checked; or the user's own ONNX, checked."""
        if self.from_onnx:
            return self.run.stage(
                "export",
                {"model": self.identity, "target_opset": self.target.opset if self.target else None},
                {},
                ("onnx", "onnx-ir", "onnxruntime"),
                lambda folder: work.import_into(
                    folder, Path(str(self.recipe.model)), self.target, self.recipe.shape_wishes
                ),
            )
        opset = self.target.opset if self.target else OLDEST_OPSET
        if opset > scorable_opset():
            # What cannot be validated here is not exported.
            opset = OLDEST_OPSET
        batch = None if self.recipe.dynamic_batch else self.recipe.batch_range[0]
        folded = self.folded
        return self.run.stage(
            "export",
            {"opset": opset, "batch": batch},
            {"program": folded.digest},
            ("torch", "onnx", "onnxscript", "onnxruntime"),
            lambda folder: work.export_into(folder, folded.folder, opset, batch),
        )

    @functools.cached_property
    def recovered(self) -> Artifact:
        """Stage ``recover``: the float ONNX with its weights trained, the quantisers in the loop."""
        self.require_images_alone("Recovery")
        recipe, images, ranges = self.recipe, self.training_images, self.before_recovery.calibrated
        model = self.exported.path("model.onnx")
        return self.run.stage(
            "recover",
            {**self.quantize_facts, "epochs": recipe.recover_epochs, "seed": recipe.seed},
            {"model": self.exported.digest, "ranges": ranges.digest, "images": images.digest},
            ("torch", "onnx-ir"),
            lambda folder: work.recover_into(
                folder,
                model,
                ranges.path("ranges.json"),
                images,
                self.run.path / "recover.resume",
                recipe,
                self.reporter,
            ),
        )

    @functools.cached_property
    def calibrated(self) -> Artifact:
        """Stage ``calibrate``: the ranges of all activations, from one pass over the calibration images."""
        (model, digest), images = self.float_model, self.image_sets[0]
        return self.run.stage(
            "calibrate",
            {"preprocess": self.preprocess.to_json(), "batch": self.batch_size},
            {"model": digest, "images": images.digest},
            ("onnxruntime", "numpy"),
            lambda folder: work.calibrate_into(folder, model, images, self.batch_size, self.reporter),
        )

    @functools.cached_property
    def quantized(self) -> Artifact:
        """Stage ``quantize``: the ONNX with Q/DQ and FP16 in the graph."""
        recipe = self.recipe
        if recipe.effort == "best":
            self.require_images_alone("--effort best")
        (model, digest), ranges = self.float_model, self.calibrated.path("ranges.json")
        builder = builder_here(self.target) if self.target else None
        own: dict[str, Any] = {"precisions": dict(self.precisions)} if self.precisions else {}
        if builder is Builder.RTX:
            own["builder"] = builder.value
        return self.run.stage(
            "quantize",
            {**self.quantize_facts, **own},
            {"model": digest, "ranges": self.calibrated.digest},
            ("onnx", "onnx-ir") + (("nvidia-modelopt",) if recipe.quantizer == "modelopt" else ()),
            lambda folder: work.quantize_into(
                folder,
                model,
                ranges,
                self.image_sets[0],
                self.batch_size,
                recipe,
                self.reporter,
                self.precisions,
                builder,
            ),
        )

    @property
    def fuses(self) -> bool:
        """Whether there is a stage ``fuse``: where nodes of the graph may become kernels of our own."""
        return self.plugin_choice.by is not By.NOTHING

    @functools.cached_property
    def plugin_times(self) -> Artifact:
        """Stage ``times``: engines with and without kernels of our own, timed on the GPU of this machine."""
        from resvit_export.plugin_times import times_into

        target, settings = self.require_target(), self.build_settings
        return self.run.stage(
            "times",
            {"target": target.to_json(), "way": self.plugin_choice.way, **settings.to_json()},
            {"model": self.quantized.digest},
            ("onnx-ir", "triton", "tensorrt"),
            lambda folder: times_into(
                folder, self.quantized.path("model.onnx"), target, self.plugin_choice.way, settings, self.reporter
            ),
        )

    @functools.cached_property
    def fused(self) -> Artifact:
        """Stage ``fuse``: the quantised ONNX with nodes of our own, where any was chosen; and what was found."""
        from resvit_export.fusing import fuse_into

        choice, target = self.plugin_choice, self.require_target()
        kinds = self.plugin_times.json("times.json")["chosen"] if choice.by is By.TIME else None
        eight_bits = self.recipe.plugin_attention == "8bit"
        return self.run.stage(
            "fuse",
            {
                "target": target.to_json(),
                "by": choice.by.value,
                "kinds": kinds,
                "attention": self.recipe.precision if eight_bits else "fp16",
            },
            {"model": self.quantized.digest, **({"ranges": self.calibrated.digest} if eight_bits else {})},
            ("onnx-ir",),
            lambda folder: fuse_into(
                folder,
                self.quantized.path("model.onnx"),
                self.calibrated.path("ranges.json") if eight_bits else None,
                self.recipe,
                target,
                choice,
                kinds,
                self.reporter,
            ),
        )

    def require_fusion(self) -> Artifact:
        """The stage ``fuse``, or an error that says why there is none."""
        if not self.fuses:
            self.require_target()
            raise ResvitError(
                f"No kernel of our own goes into this graph: {self.plugin_choice.reason}.",
                "Say --plugins on, for a target whose engine TensorRT builds (resvit-export targets).",
                ExitCode.IMPOSSIBLE,
            )
        return self.fused

    @functools.cached_property
    def shipped(self) -> Artifact:
        """The stage whose ``model.onnx`` is validated and goes to the device: ``fuse`` where it changed anything."""
        return self.fused if self.fuses and "model.onnx" in self.fused.record["outputs"] else self.quantized

    @functools.cached_property
    def reference(self) -> Artifact:
        """Stage ``reference``: what PyTorch predicts on the validation images; the same for all targets."""
        images = self.image_sets[1]
        pruned = {"pruned": _weights_digest(self.pruned, "pruned")} if self.prunes else {}
        return self.run.stage(
            "reference",
            {"preprocess": self.preprocess.to_json(), "model": self.identity, **self.task_facts},
            {"images": images.digest, **pruned},
            ("torch",),
            lambda folder: work.reference_into(
                folder,
                self.task,
                self.network,
                self.pruned.path("pruned.pt2") if self.prunes else None,
                images,
                self.batch_size,
                self.reporter,
            ),
        )

    @functools.cached_property
    def baseline(self) -> Artifact:
        """Stage ``baseline``: what the float ONNX predicts on the validation images."""
        model, images = self.exported.path("model.onnx"), self.image_sets[1]
        return self.run.stage(
            "baseline",
            {"preprocess": self.preprocess.to_json(), **self.task_facts},
            {"model": self.exported.digest, "images": images.digest},
            ("onnxruntime",),
            lambda folder: work.baseline_into(folder, self.task, model, images, self.batch_size, self.reporter),
        )

    @functools.cached_property
    def validated(self) -> Artifact:
        """Stage ``validate``: the quantised ONNX on the same images, compared and judged."""
        shipped, baseline, images = self.shipped, self.baseline, self.image_sets[1]
        reference = None if self.from_onnx else self.reference
        return self.run.stage(
            "validate",
            {"max_drop": self.recipe.max_drop, "confidence": self.confidence, **self.task_facts},
            {
                "model": shipped.digest,
                "baseline": baseline.digest,
                "images": images.digest,
                **({"reference": reference.digest} if reference else {}),
            },
            ("onnxruntime",),
            lambda folder: validate(
                folder,
                task=self.task,
                quantized=shipped.path("model.onnx"),
                floating=self.float_model[0],
                statistics=self.calibrated.path("statistics.npz"),
                baseline=baseline.path("onnx.npz"),
                reference=reference.folder if reference else None,
                images=images,
                batch_size=self.batch_size,
                sets="TopK" in self.exported.json("export.json")["operators"],
                recipe=dataclasses.replace(self.recipe, confidence=self.confidence),
                reporter=self.reporter,
            ),
        )

    @functools.cached_property
    def predicted(self) -> Artifact:
        """Stage ``predict``: the time of every layer on the target, against all FP16."""
        return predicted(self)

    @functools.cached_property
    def compiled(self) -> Artifact:
        """Stage ``compile``: an engine where one can be built here, else the plan to build it where it can."""
        target = self.require_target()
        self.require_accepted()
        model, export = self.shipped.path("model.onnx"), self.exported.json("export.json")
        builder = builder_here(target)
        settings = self.engine_settings
        return self.run.stage(
            "compile",
            {
                "target": target.to_json(),
                "builder": builder.value if builder else None,
                # The plan's commands name the bundle.
                "bundle": None if builder else self.bundle_name,
                **settings.to_json(),
            },
            {"model": self.shipped.digest},
            ("tensorrt-rtx-cu13-libs", "tensorrt", *(("triton",) if settings.plugins != "off" else ())),
            lambda folder: work.compile_into(
                folder, model, export, target, builder, settings, self.bundle_name, self.reporter
            ),
        )

    @functools.cached_property
    def audited(self) -> Artifact:
        """Stage ``audit``: which Q/DQ and attention fused, beside the FP16 engine of the same network."""
        from resvit_export.auditing import audited

        return audited(self)

    def require_fused(self) -> None:
        """Refuse to go on where something did not fuse, if the recipe says so."""
        if self.recipe.require_fused:
            from resvit_export.auditing import refuse_if_unfused

            refuse_if_unfused(self.audited.json("audit.json"))

    @functools.cached_property
    def bundled(self) -> Artifact:
        """Stage ``bundle``: everything that the device needs, in one file."""
        from resvit_export.bundling import write_run_bundle

        self.require_fused()
        return self.run.stage(
            "bundle",
            {
                "name": self.bundle_name,
                "target": self.require_target().name,
                "release": self.recipe.release,
                "key": self.signing_key.public.keyid if self.signing_key else None,
            },
            {
                "engine": self.compiled.digest,
                "model": self.shipped.digest,
                "verdict": self.validated.digest,
                "ranges": self.calibrated.digest,
            },
            (),
            lambda folder: write_run_bundle(self, folder / self.bundle_name),
        )


def pipelines_for(recipe: Recipe, run: RunFolder, reporter: Reporter) -> list[Pipeline]:
    """One pipeline for each target of the recipe, all on one run folder: stages that do not differ are done once.

    A JetPack goes to the Jetsons among several targets. Raises
    ``ResvitError``, before anything is done, where one of the targets cannot do what is asked for.
    """
    names = list(dict.fromkeys(recipe.targets))
    if len(names) < 2:
        found = [Pipeline(recipe, run, reporter)]
    else:
        jetsons = {name for name in names if resolve_target(name, None, recipe.own_targets).kind is Kind.JETSON}
        found = [
            Pipeline(
                dataclasses.replace(
                    recipe, targets=(name,), jetpack=recipe.jetpack if name in jetsons or not jetsons else None
                ),
                run,
                reporter,
            )
            for name in names
        ]
    return found


def _weights_digest(artifact: Artifact, name: str) -> str:
    """Of the weights and structure alone: reports beside them hold seconds."""
    return str(artifact.record["outputs"][f"{name}.pt"]["sha256"])
