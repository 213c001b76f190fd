"""The stages of a run: in which order they come, and what makes each of them a different one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_calibrate.runtime import scorable_opset
from resvit_engines.build import BuildSettings, builder_here
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import write_atomic
from resvit_engines.progress import Reporter
from resvit_engines.targets import Precision, Target, find_target, require_precision
from resvit_export import work
from resvit_export.identity import model_identity
from resvit_export.recipe import Recipe, recipe_to_toml
from resvit_export.runfolder import Artifact, RunFolder
from resvit_export.validation import images_per_call, validate

if TYPE_CHECKING:
    from resvit_calibrate.data import ImageSet, Preprocess
    from resvit_export.load import Network

OLDEST_OPSET = 20
"""What every TensorRT from 10.3 on reads."""


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
            self.target = find_target(recipe.target, recipe.jetpack)
            require_precision(self.target, Precision(recipe.precision))

    def save_recipe(self) -> None:
        """Write the complete recipe into the run folder."""
        write_atomic(self.run.path / "recipe.toml", recipe_to_toml(self.recipe).encode())

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
        from resvit_calibrate.data import require_source

        for data in (self.recipe.data, self.recipe.validation_data):
            if data is not None:
                require_source(data)
        return self.recipe.data

    def require_accepted(self) -> None:
        """Refuse to go on with a rejected model, unless the recipe allows it."""
        if self.verdict["verdict"] == "rejected" and not self.recipe.allow_rejected:
            raise ResvitError(
                f"Validation rejected the model: {self.verdict['reason']}",
                "Try --calibrator percentile or entropy, more --calibration-images, --exclude for the layers that "
                "hurt, or --precision fp16; --allow-rejected goes on all the same.",
                ExitCode.REJECTED,
            )

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
        return self.exported.json("network.json")

    @functools.cached_property
    def preprocess(self) -> Preprocess:
        """How images become input: from the model where it knows, with the recipe's settings on top."""
        from resvit_export.preprocessing import preprocess_from

        return preprocess_from(self.facts, self.recipe)

    @functools.cached_property
    def image_sets(self) -> tuple[ImageSet, ImageSet]:
        """Calibration and validation images: seeded, disjoint."""
        from resvit_calibrate.data import DataSpec, open_image_sets

        spec = DataSpec(
            data=self.require_images(),
            validation_data=self.recipe.validation_data,
            calibration_images=self.recipe.calibration_images,
            validation_images=self.recipe.validation_images,
            seed=self.recipe.seed,
        )
        return open_image_sets(spec, self.preprocess, self.reporter)

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

    # --- stages, in order ---------------------------------------------------------------------------------------

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
            {},
            ("torch", "timm"),
            lambda folder: work.fold_into(folder, self.network),
        )

    @functools.cached_property
    def exported(self) -> Artifact:
        """Stage ``export``: the float ONNX, its parity with PyTorch checked; or the user's own ONNX, checked."""
        if self.from_onnx:
            return self.run.stage(
                "export",
                {"model": self.identity, "target_opset": self.target.opset if self.target else None},
                {},
                ("onnx", "onnx-ir", "onnxruntime"),
                lambda folder: work.import_into(folder, Path(str(self.recipe.model)), self.target),
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
    def calibrated(self) -> Artifact:
        """Stage ``calibrate``: the ranges of all activations, from one pass over the calibration images."""
        model, images = self.exported.path("model.onnx"), self.image_sets[0]
        return self.run.stage(
            "calibrate",
            {"preprocess": self.preprocess.to_json(), "batch": self.batch_size},
            {"model": self.exported.digest, "images": images.digest},
            ("onnxruntime", "numpy"),
            lambda folder: work.calibrate_into(folder, model, images, self.batch_size, self.reporter),
        )

    @functools.cached_property
    def quantized(self) -> Artifact:
        """Stage ``quantize``: the ONNX with Q/DQ and FP16 in the graph."""
        recipe = self.recipe
        model, ranges = self.exported.path("model.onnx"), self.calibrated.path("ranges.json")
        return self.run.stage(
            "quantize",
            {
                "precision": recipe.precision,
                "quantizer": recipe.quantizer,
                "calibrator": recipe.calibrator,
                "include": sorted(recipe.include),
                "exclude": sorted(recipe.exclude),
            },
            {"model": self.exported.digest, "ranges": self.calibrated.digest},
            ("onnx", "onnx-ir") + (("nvidia-modelopt",) if recipe.quantizer == "modelopt" else ()),
            lambda folder: work.quantize_into(
                folder, model, ranges, self.image_sets[0], self.batch_size, recipe, self.reporter
            ),
        )

    @functools.cached_property
    def baseline(self) -> Artifact:
        """Stage ``baseline``: what PyTorch and the float ONNX predict on the validation images."""
        model, images = self.exported.path("model.onnx"), self.image_sets[1]
        return self.run.stage(
            "baseline",
            {"preprocess": self.preprocess.to_json(), "model": self.identity},
            {"model": self.exported.digest, "images": images.digest},
            ("torch", "onnxruntime"),
            lambda folder: work.baseline_into(
                folder, None if self.from_onnx else self.network, model, images, self.batch_size, self.reporter
            ),
        )

    @functools.cached_property
    def validated(self) -> Artifact:
        """Stage ``validate``: the quantised ONNX on the same images, compared and judged."""
        quantized, baseline, images = self.quantized, self.baseline, self.image_sets[1]
        return self.run.stage(
            "validate",
            {"max_drop": self.recipe.max_drop, "confidence": self.recipe.confidence},
            {"model": quantized.digest, "baseline": baseline.digest, "images": images.digest},
            ("onnxruntime",),
            lambda folder: validate(
                folder,
                quantized=quantized.path("model.onnx"),
                baseline=baseline.folder,
                images=images,
                batch_size=self.batch_size,
                recipe=self.recipe,
                reporter=self.reporter,
            ),
        )

    @functools.cached_property
    def compiled(self) -> Artifact:
        """Stage ``compile``: an engine where one can be built here, else the plan to build it where it can."""
        target = self.require_target()
        self.require_accepted()
        model, image = self.quantized.path("model.onnx"), self.exported.json("export.json")["input"]
        builder = builder_here(target)
        settings = BuildSettings(
            batch=self.recipe.batch_range,
            workspace_mib=self.recipe.workspace_mib or target.workspace_mib,
            optimization_level=self.recipe.optimization_level,
        )
        return self.run.stage(
            "compile",
            {
                "target": target.to_json(),
                "builder": builder.value if builder else None,
                # The plan's commands name the bundle.
                "bundle": None if builder else self.bundle_name,
                **settings.to_json(),
            },
            {"model": self.quantized.digest},
            ("tensorrt-rtx-cu13-libs", "tensorrt"),
            lambda folder: work.compile_into(
                folder, model, image, target, builder, settings, self.bundle_name, self.reporter
            ),
        )

    @functools.cached_property
    def bundled(self) -> Artifact:
        """Stage ``bundle``: everything that the device needs, in one file."""
        from resvit_export.bundling import write_run_bundle

        return self.run.stage(
            "bundle",
            {"name": self.bundle_name, "target": self.require_target().name},
            {
                "engine": self.compiled.digest,
                "model": self.quantized.digest,
                "verdict": self.validated.digest,
                "ranges": self.calibrated.digest,
            },
            (),
            lambda folder: write_run_bundle(self, folder / self.bundle_name),
        )
