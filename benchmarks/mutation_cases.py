"""Bugs that a tired engineer might make, each in a module of its own, and the tests that should notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One bug: ``old``, which stands exactly once in ``file``, becomes ``new``; ``meaning`` is what is then wrong.

    ``file`` is relative to the tree, ``tests`` are the files below it that should notice, the likeliest first.
    """

    file: str
    old: str
    new: str
    meaning: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """``gate/gate`` of the calibrate wing as ``calibrate/gate/gate``."""
        wing, _, *inside = self.file.removesuffix(".py").split("/")
        return "/".join([wing, *inside])


CALIBRATE = (
    Mutation(
        "calibrate/resvit_calibrate/gate/gate.py",
        "    interval = comparison.interval_at(confidence)\n",
        "    interval = comparison.interval\n",
        "the gate judges by the interval that was measured before, not at the confidence that it is asked for",
        ("tests/test_gate.py",),
    ),
    Mutation(
        "calibrate/resvit_calibrate/gate/bootstrap.py",
        "wide = math.sqrt(count / (count - 1)) * _student(z, count - 1)",
        "wide = z",
        "the bootstrap's interval is not widened for few images",
        ("tests/test_bootstrap.py",),
    ),
    Mutation(
        "calibrate/resvit_calibrate/observe/histogram.py",
        "moved = min(2 * (anchor - self.anchor), LOG_BINS - 1)",
        "moved = min(anchor - self.anchor, LOG_BINS - 1)",
        "bins move by half octaves where the maximum grew by whole ones",
        ("tests/test_channels.py", "tests/test_statistics.py"),
    ),
    Mutation(
        "engines/resvit_engines/pictures/preprocess.py",
        "min(most, max(1, round(side * scale)))",
        "min(most, max(1, int(side * scale)))",
        "a letterboxed image loses a row or column of pixels to truncation",
        ("tests/test_geometry.py", "tests/test_preprocess.py", "tests/test_data.py"),
    ),
    Mutation(
        "calibrate/resvit_calibrate/readers/boxes/coco_file.py",
        "ids = tuple(sorted(names.keys() - groups))",
        "ids = tuple(name for name in names if name not in groups)",
        "COCO's classes are counted in the order of the file, not of their ids",
        ("tests/test_data_coco.py",),
    ),
    Mutation(
        "calibrate/resvit_calibrate/answers/mask_counts.py",
        "ratio.sum(axis=-1) / (union > 0).sum(axis=-1)",
        "ratio.mean(axis=-1)",
        "classes that occur nowhere count as zero in the mIoU",
        ("tests/test_task_segmentation.py",),
    ),
    Mutation(
        "calibrate/resvit_calibrate/answers/average_precision.py",
        'np.searchsorted(RECALLS, recall, side="right")',
        'np.searchsorted(RECALLS, recall, side="left")',
        "a recall that is exactly one of the 101 does not count as reached in the mAP",
        ("tests/test_task_detection.py",),
    ),
    Mutation(
        "calibrate/resvit_calibrate/ranges/estimators.py",
        "total: Floats = (np.diff(integral, axis=1) @ density) * scale[:, 0] ** 3",
        "total: Floats = (np.diff(integral, axis=1) @ density) * scale[:, 0] ** 2",
        "the squared error of a clip is in the wrong power of its scale, and favours wide clips",
        ("tests/test_estimators.py",),
    ),
    Mutation(
        "calibrate/resvit_calibrate/runtime/parity.py",
        "min(_ROUNDINGS * moved[name], max(_MOST_MOVED * largest, _NEAR_NOTHING))",
        "_ROUNDINGS * moved[name]",
        "a network that rounding throws about passes parity, however wrong its translation is",
        ("tests/test_rows.py", "tests/test_export.py"),
    ),
)

QUANTIZE = (
    Mutation(
        "quantize/resvit_quantize/placement/grid.py",
        "    half = np.nextafter(half, np.where(low, np.float16(np.inf), half))\n",
        "",
        "a scale is rounded to FP16 downwards, and the largest value leaves the grid",
        ("tests/test_qdq.py", "tests/test_scales.py"),
    ),
    Mutation(
        "quantize/resvit_quantize/placement/placement.py",
        "main = max(fed, key=lambda value: analysis.depth[value])",
        "main = min(fed, key=lambda value: analysis.depth[value])",
        "of a residual's two convolutions the deep one is taken for the shortcut and quantised",
        ("tests/test_placement.py",),
    ),
    Mutation(
        "quantize/resvit_quantize/qdq/insert.py",
        '{"axis": place.axis}',
        '{"axis": 0}',
        "every weight is dequantised along its first axis, linear layers too",
        ("tests/test_qdq.py",),
    ),
    Mutation(
        "quantize/resvit_quantize/qdq/plan.py",
        "            energy += read\n",
        "            energy = read\n",
        "the clip of a tensor with several readers is chosen for the last one alone",
        ("tests/test_effort.py",),
    ),
    Mutation(
        "quantize/resvit_quantize/fold/rules.py",
        "if not isinstance(node, fx.Node) or len(node.users) != 1:",
        "if not isinstance(node, fx.Node):",
        "a layer is folded into though something else reads its output as it was",
        ("tests/test_fold.py",),
    ),
    Mutation(
        "quantize/resvit_quantize/rounding/compensate.py",
        "error = (value - near) / factor[:, column, column, None]",
        "error = (near - value) / factor[:, column, column, None]",
        "weights that follow add to the error of those rounded before, instead of taking it up",
        ("tests/test_compensate.py",),
    ),
    Mutation(
        "quantize/resvit_quantize/sensitivity/one_pass.py",
        "dots[key] = dots.get(key, 0.0) + float((gradient * error).sum(dtype=torch.float64))",
        "dots[key] = float((gradient * error).sum(dtype=torch.float64))",
        "of a convolution with a quantised shortcut only one of the two errors counts",
        ("tests/test_sensitivity.py",),
    ),
    Mutation(
        "quantize/resvit_quantize/search/assignments.py",
        "rate = math.inf if costs <= _TIE_US else saves / costs",
        "rate = math.inf if costs <= _TIE_US else saves",
        "the search raises what saves most damage, whatever it costs in time",
        ("tests/test_search.py",),
    ),
    Mutation(
        "quantize/resvit_quantize/pruning/sparsity/masks.py",
        "return columns.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)",
        "return columns.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)",
        "2:4 masks of convolutions are chosen by a Hessian whose taps and channels are in another order",
        ("tests/test_pruning_sparsity.py",),
    ),
)

ENGINES = (
    Mutation(
        "engines/resvit_engines/targets/costs.py",
        "total_us=max(compute, memory) + fixed + reformat",
        "total_us=compute + memory + fixed + reformat",
        "arithmetic and traffic add up instead of running side by side: no roofline",
        ("tests/test_costs.py",),
    ),
    Mutation(
        "engines/resvit_engines/targets/tensorrt_kernels.py",
        "direct = one_eight and all(form.eight for form in reads[1:])",
        "direct = one_eight",
        "an 8-bit convolution that adds a shortcut in floats is told to write 8 bits",
        ("tests/test_predictions.py",),
    ),
    Mutation(
        "engines/resvit_engines/bundle/reader.py",
        "if digest.hexdigest() != file.sha256 or checksum != crc:",
        "if checksum != crc:",
        "a file of a bundle is held against the zip's checksum only, which anybody can make fit",
        ("tests/test_bundle.py", "tests/test_install_faults.py"),
    ),
    Mutation(
        "engines/resvit_engines/keys/public.py",
        "return self.revoked | {key.keyid for key in self.keys if key.revoked}",
        "return frozenset(key.keyid for key in self.keys if key.revoked)",
        "a key id in the trust folder's list of revoked ones still counts",
        ("tests/test_signing.py",),
    ),
    Mutation(
        "engines/resvit_engines/run/golden.py",
        "allowed = _SIGMAS * np.sqrt(2.0) * noise / np.sqrt(true.size)",
        "allowed = _SIGMAS * np.sqrt(2.0) * noise",
        "golden answers may differ by the whole noise, not by its mean",
        ("tests/test_run.py",),
    ),
    Mutation(
        "engines/resvit_engines/install/state.py",
        "return next((v for v in reversed(self.history[:-1]) if v.version != self.current), None)",
        "return next((v for v in self.history[:-1] if v.version != self.current), None)",
        "a rollback returns to the oldest version instead of the one before",
        ("tests/test_install.py",),
    ),
    Mutation(
        "engines/resvit_engines/builder/timing_cache.py",
        'name = f"{self.target}-sm{self.sm}-{self.builder}-{self.version}"',
        'name = f"{self.target}-sm{self.sm}-{self.builder}"',
        "two versions of TensorRT overwrite each other's timing cache",
        ("tests/test_build_timing_cache.py",),
    ),
    Mutation(
        "engines/resvit_engines/audit/audit.py",
        "own = [k for k in dequantizers if k.operation is Operation.REFORMAT and not EIGHT_BITS & {*k.outputs}]",
        "own = [k for k in dequantizers if k.operation is Operation.REFORMAT]",
        "a kernel that moves 8-bit values is reported as dequantising on its own",
        ("tests/test_audit.py",),
    ),
    Mutation(
        "engines/resvit_engines/builder/device_plan.py",
        'zip(("minShapes", "optShapes", "maxShapes"), settings.batch, each_size, strict=True)',
        'zip(("minShapes", "maxShapes", "optShapes"), settings.batch, each_size, strict=True)',
        "the plan for a device asks for the best batch as the largest one",
        ("tests/test_build.py", "tests/test_several_inputs.py"),
    ),
    Mutation(
        "engines/resvit_engines/run/runner.py",
        "if sm != here and not (hardware_compatible and here >= _AMPERE):",
        "if sm != here and not hardware_compatible:",
        "an engine for Ampere and newer is started on a GPU older than that",
        ("tests/test_run.py",),
    ),
)

EXPORT = (
    Mutation(
        "export/resvit_export/stage.py",
        '{"stage": self.stage, "value": self.value, "versions": dict(self.versions)}',
        '{"stage": self.stage, "value": self.value}',
        "a stage's key forgets the versions of the libraries that compute it: an upgrade changes nothing",
        ("tests/test_stages.py", "tests/test_runfolder.py"),
    ),
    Mutation(
        "export/resvit_export/loading/preprocessing.py",
        "        **known,\n        **wished,\n",
        "        **wished,\n        **known,\n",
        "the model's own preprocessing wins over what the user says",
        ("tests/test_preprocess.py", "tests/test_robustness.py"),
    ),
    Mutation(
        "export/resvit_export/recipe/recipe.py",
        "if 1 <= low <= best <= high:",
        "if 1 <= low <= high:",
        "a best batch outside of the smallest and the largest passes the recipe",
        ("tests/test_recipe.py",),
    ),
    Mutation(
        "export/resvit_export/loading/weights/places.py",
        "-place.fitting, len(place.unexpected), -len(place.names), not place.averaged",
        "-place.fitting, len(place.unexpected), -len(place.names), place.averaged",
        "of the trained and the averaged weights in one file, the worse ones are taken",
        ("tests/test_checkpoint.py",),
    ),
    Mutation(
        "export/resvit_export/to_onnx/constant_islands.py",
        "(array == array.flat[0]).all()",
        "(array == array.flat[0]).any()",
        "a mask that hides something is taken for one that hides nothing, and dropped",
        ("tests/test_onnx_islands.py",),
    ),
)

MUTATIONS = (*CALIBRATE, *QUANTIZE, *ENGINES, *EXPORT)
