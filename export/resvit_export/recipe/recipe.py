"""The recipe: every setting of a run, as one value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import SizeRange, shape_from_text
from resvit_engines.targets.table import Builder, Precision
from resvit_export.loading.inputs import ShapeWish, shape_wishes
from resvit_export.recipe.choices import (
    Calibrator,
    InputType,
    PluginAttention,
    Plugins,
    Quantizer,
    Recovery,
    Sparsity,
    StageName,
    TaskKind,
    Tuning,
)
from resvit_export.recipe.pairs import plain_values, preprocess_values, task_values
from resvit_export.recipe.setting import Place, setting, settings_of
from resvit_quantize.pruning.choose.importance import Importance
from resvit_quantize.pruning.groups import Kind
from resvit_quantize.settings import Effort

_PRUNE, _CALIBRATE, _QUANTIZE = StageName.PRUNE, StageName.CALIBRATE, StageName.QUANTIZE
_FUSE, _VALIDATE, _COMPILE, _BUNDLE = StageName.FUSE, StageName.VALIDATE, StageName.COMPILE, StageName.BUNDLE
_REFERENCE, _FILE = Place.REFERENCE, Place.FILE
_PAIR, _SHARE = "KEY=VALUE", "SHARE"
_MANY = 100_000_000
_FILE_ENDING = re.compile(r"\.(?:onnx|pt2|py)(?=:|$)")


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, in the order of the stages that first need them.

    ``None`` means: not said, so the model or the target decides. Python may give the texts of choices and
    ``os.PathLike`` for paths.

    Raises:
        ResvitError: for a value of the wrong type, not among the choices or out of bounds, and for settings that
            contradict each other.
    """

    model: str | None = setting(
        _PRUNE,
        "model.name",
        None,
        "resvit:NAME, timm:NAME, hf:FOLDER, package.module:factory, file.py:factory, a .pt2 or an .onnx file.",
        place=_REFERENCE,
    )
    checkpoint: str | None = setting(
        _PRUNE,
        "model.checkpoint",
        None,
        "Trained weights: .pt, .pth, .safetensors, or the .index.json of several.",
        place=_REFERENCE,
    )
    checkpoint_key: str | None = setting(
        _PRUNE,
        "model.checkpoint_key",
        None,
        "Where in the checkpoint the weights are: keys and prefix, as in ema.module or state_dict.net; . is the top.",
        default_text="where they fit; of several places the averaged ones",
        metavar="KEY",
    )
    model_args: Mapping[str, Any] = setting(
        _PRUNE, "model.args", {}, "Argument of the model.", spelling="model-arg", metavar=_PAIR, pairs=plain_values
    )
    input_shape: str | None = setting(
        _PRUNE,
        "model.input_shape",
        None,
        "Shape of one image, where the model does not say it; or the sizes that one engine is to take: "
        "3x320..640x320..640, or LOW..USUAL..HIGH.",
        metavar="CxHxW",
    )
    shapes: tuple[str, ...] = setting(
        _PRUNE,
        "model.shapes",
        (),
        "Of an input by name, its batch N or LOW..HIGH first: pixel_values=1..8x3x224x224, sizes=1x2:int64.",
        spelling="shape",
        metavar="NAME=BxS…[:TYPE]",
    )

    targets: tuple[str, ...] = setting(
        _PRUNE,
        "target.name",
        (),
        "Device to build for ('resvit-export targets' lists them), or auto: this machine's. Repeat it for more.",
        spelling="target",
        metavar="NAME",
        also=str,
    )
    own_targets: Mapping[str, Any] = setting(
        None, "targets", {}, "Your own devices: by name, 'like' a row of the table, and what differs."
    )
    jetpack: str | None = setting(
        _PRUNE, "target.jetpack", None, "JetPack on the Jetson, where it is not the usual one."
    )
    builder: Builder | None = setting(
        _PRUNE,
        "target.builder",
        None,
        "tensorrt builds where the GPU is; rtx (TensorRT for RTX) builds here, for GPUs that it serves.",
        choices=(Builder.TENSORRT, Builder.RTX),
        default_text="rtx for RTX cards, tensorrt for all others",
    )
    tensorrt: str | None = setting(
        _PRUNE,
        "target.tensorrt",
        None,
        "TensorRT release that builds the engine: 10.3 to 11.4; on a Jetson what its JetPack takes.",
        default_text="the one here that builds it, else as 'resvit-export targets' lists",
        metavar="VERSION",
    )
    batch: str = setting(_PRUNE, "target.batch", "1", "Fixed batch N, or MIN:OPT:MAX for a dynamic one.", also=int)

    data: str | None = setting(
        _PRUNE,
        "data.images",
        None,
        "Images: a folder, an .npz, fashion-mnist, hf-dataset:FOLDER-or-NAME, torchvision:NAME:ROOT, film.mp4, or "
        "file.py:factory.",
        place=_REFERENCE,
    )
    validation_data: str | None = setting(
        _PRUNE,
        "data.validation",
        None,
        "Other images to validate on; without it, part of --data.",
        place=_REFERENCE,
    )
    classes: str | None = setting(
        _PRUNE,
        "data.classes",
        None,
        "The network's classes: a name a line, the first class first, or JSON (class_to_idx, id2label, a list).",
        metavar="FILE",
        default_text="as the model says, else the data's own order",
        place=_FILE,
    )
    calibration_images: int = setting(
        _PRUNE, "data.calibration_images", 512, "Images to calibrate with.", low=1, high=10_000_000
    )
    validation_images: int | None = setting(
        _PRUNE,
        "data.validation_images",
        None,
        "Images to validate with.",
        default_text="all there are",
        low=1,
        high=_MANY,
    )
    seed: int = setting(_PRUNE, "data.seed", 0, "Seed of the choice of images.")
    preprocess: Mapping[str, Any] = setting(
        _PRUNE,
        "preprocess",
        {},
        "How an image becomes input, where the model does not say: size, resize, interpolation, mean, std …",
        metavar=_PAIR,
        pairs=preprocess_values,
    )

    task: TaskKind = setting(
        _PRUNE, "task.kind", TaskKind.AUTO, "What the network is for.", default_text="auto, by the data"
    )
    task_options: Mapping[str, Any] = setting(
        _PRUNE,
        "task.options",
        {},
        "Of outputs and targets: boxes, scores, activation, nms_iou, output, ignore, classes, depth_scale …",
        spelling="task-option",
        metavar=_PAIR,
        pairs=task_values,
    )
    metric: str | None = setting(
        _PRUNE,
        "task.metric",
        None,
        "package.module:function or file.py:function, a metric of your own.",
        place=_REFERENCE,
    )

    prune_macs: float | None = setting(
        _PRUNE,
        "prune.macs",
        None,
        "Prune to this share of the multiply-accumulates.",
        metavar=_SHARE,
        low=0.01,
        high=1.0,
    )
    prune_latency: float | None = setting(
        _PRUNE,
        "prune.latency",
        None,
        "Or to this share of the latency, predicted or measured.",
        metavar=_SHARE,
        low=0.01,
        high=1.0,
    )
    measured_times: str | None = setting(
        _PRUNE,
        "search.measured_times",
        None,
        "JSON of layer times measured on the device.",
        metavar="FILE",
        place=_FILE,
    )
    prune_params: float | None = setting(
        _PRUNE, "prune.params", None, "Or to this share of the weights.", metavar=_SHARE, low=0.01, high=1.0
    )
    prune_what: tuple[Kind, ...] = setting(
        _PRUNE, "prune.what", (Kind.CHANNELS, Kind.HEADS, Kind.MLP), "What may go; repeat it."
    )
    prune_importance: Importance = setting(
        _PRUNE,
        "prune.importance",
        Importance.HESSIAN,
        "By what it goes.",
        choices=(Importance.HESSIAN, Importance.TAYLOR, Importance.MAGNITUDE),
    )
    sparsity: Sparsity | None = setting(
        _PRUNE, "prune.sparsity", None, "Zero two of four weights for sparse tensor cores."
    )
    prune_epochs: int = setting(_PRUNE, "prune.epochs", 3, "Passes over --train-data behind it.", low=1, high=10_000)
    train_data: str | None = setting(
        _PRUNE,
        "data.train",
        None,
        "Images to train on behind pruning and in recovery, labels not needed; as for --data.",
        place=_REFERENCE,
    )
    train_images: int | None = setting(
        _PRUNE,
        "data.train_images",
        None,
        "At most so many of them.",
        default_text="all; 20000 in recovery",
        low=128,
        high=_MANY,
    )
    """Held-out ones included."""

    precision: Precision = setting(
        _PRUNE,
        "quantize.precision",
        Precision.INT8,
        "Of the engine.",
        choices=(Precision.INT8, Precision.FP8, Precision.FP16, Precision.FP32),
    )
    calibrator: Calibrator = setting(_CALIBRATE, "quantize.calibrator", Calibrator.OUTPUT, "How ranges are chosen.")
    quantizer: Quantizer = setting(_QUANTIZE, "quantize.quantizer", Quantizer.RESVIT, "Ours, or ModelOpt's.")
    effort: Effort = setting(_QUANTIZE, "quantize.effort", Effort.FAST, "best: also learn from the images.")
    include: tuple[str, ...] = setting(
        _QUANTIZE, "quantize.include", (), "Quantise nodes that the rules leave in FP16.", metavar="PATTERN"
    )
    exclude: tuple[str, ...] = setting(
        _QUANTIZE, "quantize.exclude", (), "Keep nodes that match in FP16.", metavar="PATTERN"
    )

    input_type: InputType = setting(
        _FUSE,
        "target.input_type",
        InputType.FP32,
        "What the engine reads; int8: as the first Q wrote it; uint8: pixels. Outputs are then FP16.",
    )
    tune: Tuning | None = setting(
        _QUANTIZE,
        "quantize.tune",
        None,
        "Time variants of the placement on --device, or here, and keep Q/DQ where they gain 2%.",
        choices=tuple(Tuning),
        default_text="off",
    )

    plugins: Plugins = setting(
        _FUSE,
        "target.plugins",
        Plugins.AUTO,
        "Kernels of our own: everywhere they fit, nowhere, or where measured to be faster.",
    )
    plugin_attention: PluginAttention = setting(
        _FUSE,
        "target.plugin_attention",
        PluginAttention.FP16,
        "What they multiply attention in; 8bit: the precision of the build.",
    )

    max_drop: float = setting(
        _VALIDATE, "validate.max_drop", 1.0, "Accepted drop of the task's metric, points.", low=0.0, high=100.0
    )
    """Percentage points of top-1; points, hundredths, of another task's metric."""
    confidence: float = setting(
        _VALIDATE, "validate.confidence", 0.95, "Of the interval around the drop.", low=0.5, high=1.0 - 1e-7
    )
    recover: Recovery = setting(
        _VALIDATE,
        "recover.when",
        Recovery.AUTO,
        "Train the weights against the float model; auto: where calibration alone is rejected.",
        alone=Recovery.ALWAYS,
    )
    recover_epochs: int = setting(
        _VALIDATE, "recover.epochs", 3, "Passes over the training images.", low=1, high=10_000
    )
    search: bool = setting(
        _VALIDATE, "search.enabled", True, "Raise layers to FP8 or FP16 where the plain recipe is not accepted."
    )
    latency_budget: str | None = setting(
        _VALIDATE,
        "search.latency_budget",
        None,
        "Least loss within 3.5ms, or 0.7x of FP16, predicted.",
        metavar="BUDGET",
    )

    workspace_mib: int | None = setting(
        _COMPILE,
        "target.workspace_mib",
        None,
        "Memory that the builder's kernels may use as scratch.",
        low=16,
        high=1 << 20,
    )
    optimization_level: int = setting(
        _COMPILE, "target.optimization_level", 3, "0 builds fast, 5 searches longest.", low=0, high=5
    )
    hardware_compatible: bool = setting(
        _COMPILE, "target.hardware_compatible", False, "An engine that newer GPUs run too; not on a Jetson."
    )
    version_compatible: bool = setting(
        _COMPILE, "target.version_compatible", False, "An engine that later TensorRT of its major run too."
    )
    strip_weights: bool = setting(
        _COMPILE, "target.strip_weights", False, "An engine without weights; refit puts them back."
    )
    timing_cache: str | None = setting(
        _COMPILE,
        "target.timing_cache",
        None,
        "Keep what TensorRT measures, for the next build.",
        metavar="FOLDER",
        place=_FILE,
    )
    """One file per device and version."""
    require_fused: bool = setting(
        _COMPILE,
        "target.require_fused",
        False,
        "Refuse (exit code 4) what 'resvit-export audit' finds not fused: 8-bit products, attention, plugins.",
    )
    allow_rejected: bool = setting(
        _COMPILE,
        "validate.allow_rejected",
        False,
        "Go on although validation rejected the model; the bundle says so.",
    )
    even_if_slower: bool = setting(
        _BUNDLE,
        "validate.even_if_slower",
        False,
        "Go on although 8 bits are known to be no faster than FP16 on the target.",
    )

    key: str | None = setting(
        _BUNDLE,
        "bundle.key",
        None,
        "Private key to sign with: a file of keygen or ssh-keygen, or the OpenSSH agent.",
        metavar="FILE|agent[:COMMENT]",
        default_text="$RESVIT_SIGNING_KEY, the key itself, or $RESVIT_SIGNING_KEY_FILE",
        place=_FILE,
    )
    release: int = setting(
        _BUNDLE, "bundle.release", 1, "Number of this release; devices refuse to go back.", low=1, high=2**31 - 1
    )

    def __post_init__(self) -> None:
        for name, item in SETTINGS.items():
            object.__setattr__(self, name, item.checked(getattr(self, name)))
        if self.metric is not None and self.task not in (TaskKind.AUTO, TaskKind.OTHER):
            raise ResvitError(
                f"The task {self.task} has its own metric, and {self.metric} was given.",
                "Say --task other, or leave --metric out.",
            )
        budgets = [f"--prune-{name}" for name, share in self.prune_budgets.items() if share is not None]
        if len(budgets) > 1:
            raise ResvitError(f"Pruning was given {len(budgets)} budgets: {', '.join(budgets)}.", "Choose one of them.")
        self.shape_wishes, self.batch_range  # noqa: B018  (validates the texts)
        self.shape, self.sizes  # noqa: B018

    @property
    def batch_range(self) -> tuple[int, int, int]:
        """Smallest, best and largest batch; all equal for a fixed one."""
        if self.shape_wishes:
            wished = self.shape_wishes[0].batch
            if self.batch not in ("1", ":".join(map(str, wished)), str(wished[0])):
                raise ResvitError(
                    f"--batch says {self.batch}, and --shape {'..'.join(map(str, dict.fromkeys(wished)))}.",
                    "Say the batch once.",
                )
            return wished
        match = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", self.batch)
        if match:
            low = int(match[1])
            best, high = int(match[2] or low), int(match[3] or low)
            if 1 <= low <= best <= high:
                return low, best, high
        raise ResvitError(
            f"The batch '{self.batch}' is neither a number nor MIN:OPT:MAX in rising order.",
            "Write --batch 1 for a fixed batch, or for example --batch 1:8:32.",
        )

    @property
    def shape_wishes(self) -> tuple[ShapeWish, ...]:
        """What ``shapes`` say, read."""
        return shape_wishes(self.shapes)

    @property
    def target(self) -> str | None:
        """The only target, or the first of several."""
        return self.targets[0] if self.targets else None

    @property
    def prune_budgets(self) -> dict[str, float | None]:
        """The share that may remain, by what it is a share of; at most one is set."""
        return {"macs": self.prune_macs, "latency": self.prune_latency, "params": self.prune_params}

    @property
    def prunes(self) -> bool:
        """Whether weights are taken out before anything else is done."""
        return self.sparsity is not None or any(share is not None for share in self.prune_budgets.values())

    @property
    def retrains(self) -> bool:
        """Whether the pruned network is trained again."""
        return self.prunes and self.train_data is not None

    @property
    def dynamic_batch(self) -> bool:
        """Whether the batch may vary at run time."""
        low, _, high = self.batch_range
        return low != high

    @property
    def dynamic(self) -> bool:
        """Whether batch or size may vary at run time."""
        return self.dynamic_batch or self.sizes is not None

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of one image, where the recipe says them; of a range, the usual ones."""
        if self.input_shape is None:
            return None
        channels, sizes = shape_from_text(self.input_shape)
        return channels, *sizes.usual

    @property
    def sizes(self) -> SizeRange | None:
        """The sizes that one engine is to take; None for one size, whoever says it."""
        said = [wish.sizes for wish in self.shape_wishes if wish.sizes is not None]
        if self.input_shape is not None and not said:
            said = [shape_from_text(self.input_shape)[1]]
        return said[0] if said and not said[0].is_one else None

    @property
    def label(self) -> str:
        """The model's name as a part of file names, without the ending of its own file."""
        named = str(self.model)
        listed = named.startswith(("resvit:", "timm:", "object:"))
        name = named.partition(":")[2] if listed else _FILE_ENDING.sub("", Path(named).name)
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"

    def settings_without_paths(self) -> dict[str, Any]:
        """All settings that name nothing on this machine, as plain values; the model's own are told elsewhere."""
        left_out = (*REFERENCES, *FILES, "model_args", "preprocess")
        return {
            name: list(value) if isinstance(value := getattr(self, name), tuple) else value
            for name in SETTINGS
            if name not in left_out
        }

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """Replace the settings given that are not ``None``; mappings are merged key by key."""
        changes = {key: value for key, value in settings.items() if value is not None and value != ()}
        for key, value in changes.items():
            if SETTINGS[key].kind is dict:
                changes[key] = {**getattr(self, key), **value}
        return dataclasses.replace(self, **changes)


SETTINGS = settings_of(Recipe)
"""What the recipe can say, by the name of the field."""
FILES = tuple(name for name, item in SETTINGS.items() if item.place is Place.FILE)
"""Settings that are the path of a file or folder."""
REFERENCES = tuple(name for name, item in SETTINGS.items() if item.place is Place.REFERENCE)
"""Settings that are a path, or a name such as ``timm:NAME``."""
