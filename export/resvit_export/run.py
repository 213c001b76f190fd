"""One recipe for one target in one run folder; network, images and task are loaded once for all that share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from resvit_engines.builder.builder import as_installed, builds_here
from resvit_engines.builder.limits import require_buildable
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, sha256_bytes
from resvit_engines.names import NAME_MOST
from resvit_engines.progress import Reporter
from resvit_engines.targets.choice import rtx_in_place
from resvit_engines.targets.faults import Pattern, warnings_for
from resvit_engines.targets.own import Software, resolve_target
from resvit_engines.targets.table import Builder, Kind, Precision, Target, require_precision
from resvit_export.loading.inputs import IMAGE, NetworkInput, require_fed
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.preprocessing import preprocess_from, steps_of
from resvit_export.loading.source import NetworkSource, metric_identity
from resvit_export.loading.spec import ModelSpec
from resvit_export.recipe.choices import Calibrator, TaskKind
from resvit_export.recipe.recipe import Recipe
from resvit_export.records.place import Place
from resvit_export.run_folder import RunFolder
from resvit_export.stage import File, plain
from resvit_export.task_choice import TaskChoice
from resvit_export.to_tensorrt.plugin_choice import By, PluginChoice, plugin_choice

if TYPE_CHECKING:
    from torch import nn

    from resvit_calibrate.answers.parts import Parts
    from resvit_calibrate.data.sources import Pools
    from resvit_calibrate.data.training_images import TrainingImages
    from resvit_calibrate.images.class_list import ClassList
    from resvit_calibrate.images.image_set import DataSpec, ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_calibrate.readers.user.loader import Factory
    from resvit_engines.keys.private import SigningKey
    from resvit_export.records.images import KeptData
    from resvit_quantize.sensitivity.known_noise import KnownNoise
    from resvit_quantize.settings import QuantizeSettings

RECOVERY_IMAGES = 20_000
MOST_IMAGES = 100_000_000
_ABOUT_DATA = (
    "data", "validation_data", "train_data", "calibration_images", "validation_images", "train_images", "seed",
    "task", "task_options", "metric", "classes", "preprocess",
)  # fmt: skip
"""Settings that decide which images are used, and how they are prepared."""
_RTX_IN_RECORDS = {Builder.RTX.value, "tensorrt-rtx"}
"""What records call TensorRT for RTX, older ones too."""


class Sources:
    """What every target of a recipe shares: the network and the images, each loaded once."""

    def __init__(
        self,
        recipe: Recipe,
        reporter: Reporter,
        module: nn.Module | None = None,
        objects: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.reporter, self._module = recipe, reporter, module
        self.objects = objects or {}
        """Data sets in memory, by the names that stand for them in the recipe."""
        self._network: NetworkSource | None = None
        self._sets: tuple[ImageSet, ImageSet] | None = None
        self._opened: tuple[Pools | Factory, Pools | Factory] | None = None
        """What the data were opened as before there were sets of them."""
        self._training: dict[int, TrainingImages] = {}
        self.told = False
        """Whether the preprocessing was said."""

    @property
    def network(self) -> NetworkSource:
        """The user's network; raises ``ResvitError`` where a file that the recipe names does not exist."""
        if self._network is None:
            recipe = self.recipe
            spec = ModelSpec(
                model=str(recipe.model),
                checkpoint=Path(recipe.checkpoint) if recipe.checkpoint else None,
                model_args=dict(recipe.model_args),
                input_shape=recipe.shape,
                inputs=tuple(wish.input for wish in recipe.shape_wishes),
                checkpoint_key=recipe.checkpoint_key,
                sizes=recipe.sizes,
            )
            self._network = NetworkSource(spec, self._module, self.reporter)
        return self._network

    def require_images(self) -> str:
        """The data set, or an error that says to name one, or one that exists."""
        return self._data

    @cached_property
    def _data(self) -> str:
        # Folders are looked into for this, once for all who ask.
        from resvit_calibrate.data.naming import require_source

        recipe = self.recipe
        if recipe.data is None:
            raise ResvitError(
                "No images were given, and calibration never invents any.",
                "Say --data with a folder of images, an .npz, fashion-mnist, or package.module:factory.",
            )
        for data in (recipe.data, recipe.validation_data, recipe.train_data):
            if data is not None and data not in self.objects:
                require_source(data)
        return recipe.data

    @cached_property
    def classes(self) -> ClassList | None:
        """The network's classes, as the user's file says."""
        from resvit_calibrate.images.class_list import class_list_from_file

        return class_list_from_file(Path(self.recipe.classes)) if self.recipe.classes else None

    def image_sets(self, preprocess: Preprocess, known_classes: ClassList | None = None) -> tuple[ImageSet, ImageSet]:
        """Calibration and validation images: seeded, disjoint; ``known_classes`` are those that the model names."""
        if self._sets is None:
            from resvit_calibrate.data.image_sets import open_image_sets

            opened, self._opened = self._opened, None
            self._sets = open_image_sets(self._spec(known_classes), preprocess, self.reporter, opened)
        return self._sets

    def require_usable_data(self) -> None:
        """Refuse what the data tell without a network: that there is no image, broken ones, labels that say nothing.

        Raises ``ResvitError``. What was opened for this is not opened again.
        """
        if self._sets is None and self._opened is None:
            from resvit_calibrate.data.image_sets import open_sources, require_usable

            spec = self._spec(None)
            self._opened = open_sources(spec, self.reporter)
            require_usable(self._opened, spec)

    def _spec(self, known_classes: ClassList | None) -> DataSpec:
        from resvit_calibrate.images.image_set import DataSpec
        from resvit_calibrate.images.targets import TargetOptions

        recipe = self.recipe
        unjudged = recipe.task is TaskKind.OTHER or recipe.metric is not None
        return DataSpec(
            data=self.require_images(),
            validation_data=recipe.validation_data,
            calibration_images=recipe.calibration_images,
            validation_images=recipe.validation_images,
            seed=recipe.seed,
            reading=TargetOptions.from_options(recipe.task_options, recipe.task.value),
            unlabelled=unjudged or recipe.task is TaskKind.AUTO,
            unjudged=unjudged,
            classes=self.classes,
            known_classes=known_classes,
            said=frozenset(recipe.preprocess),
            objects=self.objects,
        )

    def training_images(
        self, preprocess: Preprocess, most: int, known_classes: ClassList | None = None
    ) -> TrainingImages:
        """Images to train on, at most so many where the recipe does not say; none of them is a validation image."""
        count = self.recipe.train_images or most
        if count not in self._training:
            from resvit_calibrate.data.image_sets import open_training_images
            from resvit_calibrate.images.targets import TargetOptions

            recipe, validation = self.recipe, self.image_sets(preprocess, known_classes)[1]
            self._training[count] = open_training_images(
                str(recipe.train_data),
                validation,
                count,
                recipe.seed,
                preprocess,
                self.reporter,
                TargetOptions.from_options(recipe.task_options, recipe.task.value),
                self.classes,
                known_classes,
                self.objects,
            )
        return self._training[count]


class Division(Protocol):
    """Has parts of a run's work done elsewhere. What does not come back the run does itself."""

    def answer(self, run: Run, asked: Sequence[Any], stores: Mapping[str, Parts]) -> None:
        """Parts of a validation: by the networks that are asked, into stores by their titles."""
        ...

    def measure(self, run: Run, stage: Any, store: KnownNoise) -> None:
        """Layers of a sensitivity by brute force, into its store."""
        ...

    def trials_at_once(self, images: int) -> int:
        """How many candidates of a search are worth trying at once, validated on so many images."""
        ...

    def tried(
        self, run: Run, recovers: bool, candidates: Sequence[tuple[Mapping[str, str], float]]
    ) -> list[Mapping[str, Mapping[str, bytes]]]:
        """The finished stages of candidates, which are precisions by node with the gate's confidence.

        Stages are files by the names of their folders; those of a candidate that was lost are none.
        """
        ...


class Run:
    """A recipe for one target. What the target cannot do is refused at construction, before any work.

    ``sources`` are shared by the runs of all targets.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, reporter: Reporter, sources: Sources) -> None:
        self.recipe, self.folder, self.reporter = recipe, folder, reporter
        self.sources = sources
        self.target = _target_of(recipe)
        self.builds_here = self.target is not None and builds_here(self.target)
        if self.target is not None:
            require_precision(self.target, self.precision)
            require_buildable(self.target, self.build_settings)
        self.plugins: PluginChoice = plugin_choice(recipe, self.target, here=self.builds_here)
        self.place: Place | None = None
        """Where variants are timed for ``--tune``; None where that is not said: wherever it was done."""
        self.division: Division | None = None
        """Who does parts of the run's work elsewhere; None where nobody does."""
        self._told: set[str] = set()
        self._kept: set[str] = set()
        """Keys of the data of which was written down what is known."""

    @property
    def precision(self) -> Precision:
        """What the recipe asks for."""
        return self.recipe.precision

    @property
    def network(self) -> NetworkSource:
        """The user's network."""
        return self.sources.network

    @property
    def builder(self) -> Builder | None:
        """What builds the target's engines; None without a target."""
        return self.target.builder if self.target else None

    def require_target(self) -> Target:
        """The target, or an error that says to name one."""
        if self.target is None:
            raise ResvitError(
                "No target was given.",
                "Say --target, for example --target jetson-orin or --target l4; 'resvit-export targets' lists them.",
            )
        return self.target

    def warn_of_faults(self, patterns: Mapping[Pattern, Sequence[str]]) -> None:
        """Say, once, what the target's TensorRT is known to compute wrongly of a graph that contains these patterns."""
        for sentence in warnings_for(self.target, patterns, self.recipe.batch_range[2]) if self.target else ():
            if sentence not in self._told:
                self.reporter.warn(sentence)
            self._told.add(sentence)

    @property
    def build_settings(self) -> BuildSettings:
        """What the recipe says of the build."""
        recipe = self.recipe
        return BuildSettings(
            batch=recipe.batch_range,
            sizes=recipe.sizes,
            workspace_mib=recipe.workspace_mib,
            optimization_level=recipe.optimization_level,
            sparse=recipe.sparsity is not None,
            hardware_compatible=recipe.hardware_compatible,
            version_compatible=recipe.version_compatible,
            strip_weights=recipe.strip_weights,
            timing_cache=Path(recipe.timing_cache) if recipe.timing_cache else None,
        )

    def quantize_settings(self, precisions: Mapping[str, str]) -> QuantizeSettings:
        """The recipe's part on quantising; ``precisions`` by node are what the search chose."""
        from resvit_calibrate.ranges.estimators import Estimator
        from resvit_quantize.settings import Methods, QuantizeSettings, Rules

        recipe = self.recipe
        at_output = recipe.calibrator is Calibrator.OUTPUT
        return QuantizeSettings(
            precision=Precision(recipe.precision),
            estimator=Estimator.MSE if at_output else Estimator(recipe.calibrator.value),
            effort=recipe.effort,
            methods=Methods(output_ranges=at_output),
            include=recipe.include,
            exclude=recipe.exclude,
            precisions={node: Precision(name) for node, name in precisions.items()},
            rules=Rules.ONNXRUNTIME if self.builder is Builder.ONNXRUNTIME else Rules.TENSORRT,
        )

    @property
    def fuses(self) -> bool:
        """Whether nodes of the graph may become kernels of our own."""
        return self.plugins.by is not By.NOTHING

    @property
    def measured_times(self) -> File | None:
        """The user's file of layer times."""
        return File.of(Path(self.recipe.measured_times)) if self.recipe.measured_times else None

    def bundle_name(self, precision: Precision) -> str:
        """File name of the bundle of what ships in ``precision``."""
        ending = f"-{self.require_target().name}-{precision.value}"
        return self.recipe.label[: NAME_MOST - len(ending)] + ending + ".resvit"

    def signing_key(self) -> SigningKey | None:
        """What the bundle is signed with; ``None`` where neither recipe nor environment names a key."""
        from resvit_engines.keys.private import load_signing_key

        return load_signing_key(self.recipe.key)

    def preprocess(self, network: NetworkRecord) -> Preprocess:
        """How images become input: from the model where it knows, with the recipe's settings on top."""
        if (kept := self._looked_back_at(network)) is not None:
            return kept.preprocess
        return preprocess_from(network, self.recipe.preprocess, self.recipe.data, self.sources.objects)

    def preprocess_steps(self, network: NetworkRecord) -> list[tuple[str, str]]:
        """What the validation images really go through, step by step; raises as ``image_sets``."""
        images = self.image_sets(network)[1]
        return steps_of(images.preprocess, network, self.recipe.preprocess, images.factory)

    def tell_preprocess(self, network: NetworkRecord) -> None:
        """Say, once for all targets, what happens to an image before the network reads it."""
        if not self.sources.told:
            self.sources.told = True
            steps = self.preprocess_steps(network)
            self.reporter.say("images: " + "; ".join(f"{step} {what}" for step, what in steps))

    def image_sets(self, network: NetworkRecord) -> tuple[ImageSet, ImageSet]:
        """Calibration and validation images; refuses data that lacks what the network reads beside images."""
        if (kept := self._looked_back_at(network)) is not None:
            return kept.calibration, kept.validation
        preprocess = self.preprocess(network)
        sets = self.sources.image_sets(preprocess, network.class_list)
        if not self.recipe.prunes:
            for images in sets:
                batch = next(images.batches(1))
                if network.inputs or batch.inputs:
                    image = NetworkInput(IMAGE, network.input_shape)
                    require_fed(network.inputs or (image,), batch.feeds(IMAGE), images.description)
        key = self._data_key(network)
        if key not in self._kept and not self.folder.looks_only:
            from resvit_export.records.images import keep_data

            self._kept.add(key)
            keep_data(self.folder.path, key, sets, preprocess)
        return sets

    def _data_key(self, network: NetworkRecord, *more: object) -> str:
        """Digest over all that decides, of unchanged data, which images are used and how they are prepared."""
        said = {name: plain(getattr(self.recipe, name)) for name in _ABOUT_DATA}
        return sha256_bytes(canonical_json([said, network.to_json(), *more]))

    def _looked_back_at(self, network: NetworkRecord) -> KeptData | None:
        """What is kept of the data where a finished run is looked back at; None elsewhere, and where nothing is."""
        if not self.folder.looks_back:
            return None
        from resvit_export.records.images import kept_data

        return kept_data(self.folder.path, self._data_key(network))

    def task(self, network: NetworkRecord, outputs: Sequence[Mapping[str, Any]]) -> TaskChoice:
        """What the network is for: as the recipe says, or told by what is known of the images, else by its outputs.

        Raises ``ResvitError`` for outputs that the task cannot read, and data with more or fewer classes than these.
        """
        from resvit_calibrate.tasks.kinds import task_of, with_files_read

        recipe = self.recipe
        kind = recipe.task
        if kind is TaskKind.AUTO:
            known = self.image_sets(network)[1].task
            # Of images of which nothing is known no accuracy can be asked, whatever the outputs look like.
            kind = TaskKind(task_of(outputs, known, {}, recipe.metric).name) if known is not None else TaskKind.OTHER
        own = network.task_options if kind is TaskKind.DETECTION else {}
        # What the user says of the outputs goes before what a detector says of its own.
        options = with_files_read({**own, **recipe.task_options})
        task = TaskChoice(kind.value, options, recipe.metric, metric_identity(recipe.metric))
        self._require_classes(network, task, outputs)
        return task

    def taught(
        self, network: NetworkRecord, outputs: Sequence[Mapping[str, Any]]
    ) -> tuple[TaskChoice | None, int | None]:
        """What a student of this network learns to say, and how many classes the validation images know."""
        task = self.task(network, outputs).for_training()
        return task, self.image_sets(network)[1].num_classes if task else None

    def training_images(self, network: NetworkRecord, most: int) -> TrainingImages:
        """Images to train on, at most so many where the recipe does not say."""
        from resvit_export.records.images import keep_training, kept_training

        key, path = self._data_key(network, "training", most), self.folder.path
        if self.folder.looks_back and (kept := kept_training(path, key)) is not None:
            return kept
        images = self.sources.training_images(self.preprocess(network), most, network.class_list)
        if key not in self._kept and not self.folder.looks_only:
            self._kept.add(key)
            keep_training(path, key, images)
        return images

    def require_images_alone(self, network: NetworkRecord, what: str) -> None:
        """Refuse ``what`` for a network that reads more than images."""
        if network.inputs:
            names = ", ".join(item.name for item in network.inputs)
            raise ResvitError(
                f"{what} works for networks that read images alone, and this one reads {names}.",
                "Wrap the network in a module that makes the others constants, or leave that out.",
                ExitCode.IMPOSSIBLE,
            )

    def _require_classes(self, network: NetworkRecord, task: TaskChoice, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Refuse outputs that the task cannot read, and data with more or fewer classes than the network has."""
        from resvit_calibrate.tasks.class_count import require_outputs_for

        if self._looked_back_at(network) is not None:
            return  # they were held against each other when the stages were done
        for images in reversed(self.image_sets(network)):
            if task.kind in (images.task, TaskKind.EMBEDDING.value):
                require_outputs_for(images, task.kind, task.options, outputs)


def runs_for(
    recipe: Recipe,
    folder: RunFolder,
    reporter: Reporter,
    module: nn.Module | None = None,
    objects: Mapping[str, Any] | None = None,
) -> list[Run]:
    """One run for each target of the recipe, all in one folder: stages that do not differ are done once.

    ``module`` is a network in memory, where the recipe names none, and ``objects`` are data sets in memory by name.
    Among several targets a JetPack goes to the Jetsons, and a TensorRT release to those that TensorRT builds for.
    Raises ``ResvitError``, before anything is done, where one of the targets cannot do what is asked for.
    """
    names = list(dict.fromkeys(recipe.targets))
    sources = Sources(recipe, reporter, module, objects)
    alone = [dataclasses.replace(recipe, targets=(name,)) for name in names] if len(names) > 1 else [recipe]
    runs = [Run(one, folder, reporter, sources) for one in (_each_its_own(alone) if len(alone) > 1 else alone)]
    for run in runs:
        _tell_of_the_builder(run)
    return runs


def _each_its_own(recipes: Sequence[Recipe]) -> Iterator[Recipe]:
    """The recipe of each target without what is said for the others; what belongs to none stays, to be refused."""
    rows = [resolve_target(str(one.target), Software(builder=one.builder), one.own_targets) for one in recipes]
    jetsons = [row.kind is Kind.JETSON for row in rows]
    by_tensorrt = [row.builder is Builder.TENSORRT for row in rows]
    for one, jetson, built in zip(recipes, jetsons, by_tensorrt, strict=True):
        yield dataclasses.replace(
            one,
            jetpack=one.jetpack if jetson or not any(jetsons) else None,
            tensorrt=one.tensorrt if built or not any(by_tensorrt) else None,
        )


def _target_of(recipe: Recipe) -> Target | None:
    """What the recipe says; where this machine builds for it and no release of TensorRT is named, with the one here."""
    if recipe.target is None:
        return None
    software = Software(recipe.jetpack, recipe.builder, recipe.tensorrt)
    target = resolve_target(recipe.target, software, recipe.own_targets)
    named = recipe.tensorrt or "tensorrt" in recipe.own_targets.get(recipe.target, {})
    return target if named else as_installed(target)


def _tell_of_the_builder(run: Run) -> None:
    """Say what TensorRT for RTX means where TensorRT serves best; and where it built before, that it does no longer."""
    target, reporter = run.target, run.reporter
    if target is None:
        return
    for sentence in rtx_in_place(target, run.precision):
        reporter.warn(sentence)
    if target.builder is Builder.TENSORRT and run.recipe.builder is None:
        built_by = {
            former.get("builder")
            for record in run.folder.records("compile")
            if isinstance(former := record.value.get("target"), dict) and former.get("name") == target.name
        }
        if built_by & _RTX_IN_RECORDS and target.builder.value not in built_by:
            reporter.warn(
                f"So far TensorRT for RTX built the engines for {target.title} in {run.folder.path}; it is TensorRT "
                f"{target.tensorrt} now, on the {target.title} itself. --builder rtx goes on as before."
            )
