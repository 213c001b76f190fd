"""The stages of a run, each a function of the recipe and of the stages before it."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json, sha256_file, write_atomic
from resvit_engines.progress import Reporter
from resvit_engines.targets import Precision, Target, find_target, require_precision
from resvit_export.identity import model_identity
from resvit_export.recipe import Recipe, recipe_to_toml
from resvit_export.runfolder import Artifact, RunFolder
from resvit_export.tensorrt_copy import TENSORRT_COPY, onnx_for_tensorrt
from resvit_export.validation import images_per_call, validate

if TYPE_CHECKING:
    from resvit_calibrate.data import ImageSet, Preprocess
    from resvit_export.load import Network

_DEFAULT_OPSET = 20


class Pipeline:
    """One recipe on one run folder. Each method returns its finished stage, doing those before it first.

    Wishes that the target cannot fulfil are refused at construction, before any work.
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

    # --- torch --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def network(self) -> Network:
        """The user's network with its weights, loaded once when a stage really needs it."""
        from resvit_export.load import ModelSpec, load_network

        with _quiet_libraries():
            return load_network(
                ModelSpec(
                    model=str(self.recipe.model),
                    checkpoint=Path(self.recipe.checkpoint) if self.recipe.checkpoint else None,
                    model_args=dict(self.recipe.model_args),
                    input_shape=self.recipe.shape,
                ),
                self.reporter,
            )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the network without loading it: names, arguments and digests of files."""
        return model_identity(self.recipe)

    @functools.cached_property
    def folded(self) -> Artifact:
        """Stage ``fold``: the network as one exported program, with what is exact to fold folded."""
        if self.from_onnx:
            raise ResvitError(
                "An ONNX model has no fold stage: its graph is taken as it is.",
                "Start with 'export', or run 'build', which begins there by itself.",
            )

        def work(folder: Path) -> None:
            import torch

            from resvit_quantize.fold import fold_program

            network = self.network
            with _quiet_libraries():
                program, report = fold_program(network.program)
                # By way of memory: PyTorch's own writer aborts the process on a full disk.
                buffer = io.BytesIO()
                torch.export.save(program, buffer)
            (folder / "folded.pt2").write_bytes(buffer.getbuffer())
            (folder / "fold.json").write_bytes(pretty_json(report.to_json()))
            (folder / "network.json").write_bytes(pretty_json(network.facts()))

        return self.run.stage("fold", {"model": self.identity}, {}, ("torch", "timm"), work)

    @functools.cached_property
    def exported(self) -> Artifact:
        """Stage ``export``: the float ONNX, its parity with PyTorch checked."""
        opset = self.target.opset if self.target else _DEFAULT_OPSET
        batch = None if self.recipe.dynamic_batch else self.recipe.batch_range[0]
        if self.from_onnx:

            def imported(folder: Path) -> None:
                from resvit_export.onnx_import import import_onnx

                facts, report = import_onnx(Path(str(self.recipe.model)), folder / "model.onnx")
                if self.target and report.opset > opset:
                    raise ResvitError(
                        f"The model is of opset {report.opset}, and {self.target.software} reads up to opset {opset}.",
                        f"Export it with opset {opset}, or choose a target with a newer TensorRT.",
                        ExitCode.IMPOSSIBLE,
                    )
                (folder / "network.json").write_bytes(pretty_json(facts))
                (folder / "export.json").write_bytes(pretty_json(report.to_json()))

            return self.run.stage(
                "export", {"model": self.identity, "opset": opset}, {}, ("onnx", "onnx-ir", "onnxruntime"), imported
            )

        folded = self.folded

        def work(folder: Path) -> None:
            import torch

            from resvit_export.onnx_export import onnx_from_program

            with _quiet_libraries():
                program = torch.export.load(folded.path("folded.pt2"))
                report = onnx_from_program(program, folder / "model.onnx", opset=opset, batch=batch)
            (folder / "network.json").write_bytes(folded.path("network.json").read_bytes())
            (folder / "export.json").write_bytes(pretty_json(report.to_json()))

        return self.run.stage(
            "export",
            {"opset": opset, "batch": batch},
            {"program": folded.digest},
            ("torch", "onnx", "onnxscript", "onnxruntime"),
            work,
        )

    # --- images -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the loader knows of the network: input shape, classes, preprocessing."""
        return self.exported.json("network.json")

    @functools.cached_property
    def preprocess(self) -> Preprocess:
        """How images become input: from the model where it knows, with the recipe's settings on top."""
        from resvit_export.preprocessing import preprocess_from

        return preprocess_from(self.facts, self.recipe)

    def require_images(self) -> str:
        """The data set, or an error that says to name one."""
        if self.recipe.data is None:
            raise ResvitError(
                "No images were given, and calibration never invents any.",
                "Say --data with a folder of images, an .npz, fashion-mnist, or package.module:factory.",
            )
        return self.recipe.data

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
    def _batch_size(self) -> int:
        return images_per_call(self.facts["input_shape"])

    @functools.cached_property
    def calibrated(self) -> Artifact:
        """Stage ``calibrate``: the ranges of all activations, from one pass over the calibration images."""
        exported = self.exported
        images, _ = self.image_sets

        def work(folder: Path) -> None:
            from resvit_calibrate.ranges import ranges_from, save_ranges
            from resvit_calibrate.statistics import collect_statistics, save_statistics

            statistics = collect_statistics(
                exported.path("model.onnx"), images.batches(self._batch_size), self.reporter, len(images)
            )
            save_statistics(statistics, folder / "statistics.npz")
            save_ranges(ranges_from(statistics, images.digest), folder / "ranges.json")
            (folder / "images.json").write_bytes(pretty_json(_describe(images)))

        return self.run.stage(
            "calibrate",
            {"preprocess": self.preprocess.to_json(), "batch": self._batch_size},
            {"model": exported.digest, "images": images.digest},
            ("onnxruntime", "numpy"),
            work,
        )

    # --- precision ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def quantized(self) -> Artifact:
        """Stage ``quantize``: the ONNX with Q/DQ and FP16 in the graph."""
        recipe, exported, calibrated = self.recipe, self.exported, self.calibrated
        settings = {
            "precision": recipe.precision,
            "quantizer": recipe.quantizer,
            "calibrator": recipe.calibrator,
            "include": sorted(recipe.include),
            "exclude": sorted(recipe.exclude),
        }

        def work(folder: Path) -> None:
            from resvit_calibrate.estimators import Estimator
            from resvit_calibrate.ranges import load_ranges
            from resvit_quantize.settings import Precision as QuantizedTo
            from resvit_quantize.settings import QuantizeSettings

            model, out = exported.path("model.onnx"), folder / "model.onnx"
            chosen = QuantizeSettings(
                precision=QuantizedTo(recipe.precision),
                estimator=Estimator(recipe.calibrator),
                include=recipe.include,
                exclude=recipe.exclude,
            )
            if recipe.quantizer == "modelopt":
                from resvit_quantize.modelopt import quantize_with_modelopt

                images, _ = self.image_sets
                report = quantize_with_modelopt(model, images.batches(self._batch_size), chosen, out, self.reporter)
            else:
                from resvit_quantize.quantize import quantize_model

                report = quantize_model(model, load_ranges(calibrated.path("ranges.json")), chosen, out, self.reporter)
            (folder / "quantize.json").write_bytes(pretty_json(report.to_json()))

        packages = ("onnx", "onnx-ir") + (("nvidia-modelopt",) if recipe.quantizer == "modelopt" else ())
        return self.run.stage(
            "quantize",
            settings,
            {"model": exported.digest, "ranges": calibrated.digest},
            packages,
            work,
        )

    # --- proof --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def baseline(self) -> Artifact:
        """Stage ``baseline``: what PyTorch and the float ONNX predict on the validation images."""
        exported = self.exported
        _, images = self.image_sets

        def work(folder: Path) -> None:
            from resvit_calibrate.metrics import predict
            from resvit_calibrate.runtime import onnx_runner

            if not self.from_onnx:
                runner = self.network.runner()
                predict(runner, images, self._batch_size, self.reporter, "validate (PyTorch)").save(
                    folder / "pytorch.npz"
                )
            onnx = onnx_runner(exported.path("model.onnx"))
            predict(onnx, images, self._batch_size, self.reporter, "validate (ONNX float)").save(folder / "onnx.npz")

        return self.run.stage(
            "baseline",
            {"preprocess": self.preprocess.to_json(), "model": self.identity},
            {"model": exported.digest, "images": images.digest},
            ("torch", "onnxruntime"),
            work,
        )

    @functools.cached_property
    def validated(self) -> Artifact:
        """Stage ``validate``: the quantised ONNX on the same images, compared and judged."""
        quantized, baseline = self.quantized, self.baseline
        _, images = self.image_sets

        def work(folder: Path) -> None:
            validate(
                folder,
                quantized=quantized.path("model.onnx"),
                baseline=baseline.folder,
                images=images,
                batch_size=self._batch_size,
                recipe=self.recipe,
                reporter=self.reporter,
            )

        return self.run.stage(
            "validate",
            {"max_drop": self.recipe.max_drop, "confidence": self.recipe.confidence},
            {"model": quantized.digest, "baseline": baseline.digest, "images": images.digest},
            ("onnxruntime",),
            work,
        )

    @property
    def verdict(self) -> dict[str, Any]:
        """The verdict of the gate, as ``verdict.json`` holds it."""
        return self.validated.json("verdict.json")

    # --- device -------------------------------------------------------------------------------------------------

    def require_target(self) -> Target:
        """The target, or an error that says to name one."""
        if self.target is None:
            raise ResvitError(
                "No target was given.",
                "Say --target, for example --target jetson-orin or --target l4; 'resvit-export targets' lists them.",
            )
        return self.target

    def require_accepted(self) -> None:
        """Refuse to go on with a rejected model, unless the recipe allows it."""
        verdict = self.verdict
        if verdict["verdict"] == "rejected" and not self.recipe.allow_rejected:
            raise ResvitError(
                f"Validation rejected the model: {verdict['reason']}",
                "Try --calibrator percentile or entropy, more --calibration-images, --exclude for the layers that "
                "hurt, or --precision fp16; --allow-rejected goes on all the same.",
                ExitCode.REJECTED,
            )

    @functools.cached_property
    def compiled(self) -> Artifact:
        """Stage ``compile``: an engine where one can be built here, else the plan to build it where it can."""
        from resvit_engines.build import BuildSettings, build_engine, builder_here
        from resvit_engines.device import plan_for_device

        target = self.require_target()
        self.require_accepted()
        quantized = self.quantized
        settings = BuildSettings(
            batch=self.recipe.batch_range,
            workspace_mib=self.recipe.workspace_mib or target.workspace_mib,
            optimization_level=self.recipe.optimization_level,
        )
        builder = builder_here(target)

        def work(folder: Path) -> None:
            model = quantized.path("model.onnx")
            if onnx_for_tensorrt(model, folder / TENSORRT_COPY):
                model = folder / TENSORRT_COPY
            if builder is None:
                image = self.exported.json("export.json")["input"]
                plan = plan_for_device(
                    target,
                    settings,
                    tuple(image["shape"][1:]),
                    dynamic_batch=not isinstance(image["shape"][0], int),
                    bundle=f"{self.bundle_name}.resvit",
                    onnx=model.name,
                    onnx_sha256=sha256_file(model),
                    input_name=image["name"],
                )
                (folder / "plan.json").write_bytes(pretty_json(plan.to_json()))
                return
            report = build_engine(
                model,
                folder / "engine.plan",
                target,
                settings,
                self.reporter,
                folder / "build.log",
            )
            (folder / "engine.json").write_bytes(pretty_json(report.to_json()))

        return self.run.stage(
            "compile",
            {
                "target": target.to_json(),
                "builder": builder.value if builder else None,
                # The plan's commands name the bundle.
                "bundle": None if builder else self.bundle_name,
                **settings.to_json(),
            },
            {"model": quantized.digest},
            ("tensorrt-rtx-cu13-libs", "tensorrt"),
            work,
        )

    @functools.cached_property
    def bundled(self) -> Artifact:
        """Stage ``bundle``: everything that the device needs, in one file."""
        from resvit_export.bundling import write_run_bundle

        target = self.require_target()
        compiled = self.compiled

        def work(folder: Path) -> None:
            write_run_bundle(self, folder / f"{self.bundle_name}.resvit")

        return self.run.stage(
            "bundle",
            {"name": self.bundle_name, "target": target.name},
            {
                "engine": compiled.digest,
                "model": self.quantized.digest,
                "verdict": self.validated.digest,
                "ranges": self.calibrated.digest,
            },
            (),
            work,
        )

    @property
    def bundle_name(self) -> str:
        """File name of the bundle without its ending."""
        return f"{self.run.path.resolve().name}-{self.require_target().name}-{self.recipe.precision}"

    @property
    def bundle_path(self) -> Path:
        """Where the bundle lies."""
        return self.bundled.path(f"{self.bundle_name}.resvit")


def _describe(images: ImageSet) -> Mapping[str, Any]:
    return {
        "description": images.description,
        "images": len(images),
        "digest": images.digest,
        "skipped": list(images.skipped),
    }


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the exporter's own warnings and log lines off the terminal: ours say what matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
