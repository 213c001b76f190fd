"""The recipe: every setting of a run, as one value that can be written to a TOML file and read back."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.loading.inputs import ShapeWish, shape_wishes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Scalar = bool | int | float | str

QUANTIZERS = ("resvit", "modelopt")
CALIBRATORS = ("output", "mse", "percentile", "entropy", "max")
EFFORTS = ("fast", "best")
PRECISIONS = ("int8", "fp8", "fp16")
RECOVERIES = ("auto", "always", "never")
PRUNABLE = ("channels", "heads", "mlp", "embed", "blocks")
IMPORTANCES = ("hessian", "taylor", "magnitude")
SPARSITIES = ("2:4",)
TASKS = ("auto", "classification", "detection", "segmentation", "depth", "other")
PLUGINS = ("auto", "on", "off")
ATTENTIONS = ("fp16", "8bit")
FILES = ("measured_times", "timing_cache", "key")
"""Settings that are the path of a file or folder."""


PATHS = ("model", "checkpoint", "data", "validation_data", "train_data", "metric")
"""Settings that may be a path, among other things."""


def _setting(toml: str, default: Any = None) -> Any:
    """Define a field that lives at ``table.key`` of the recipe file."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"toml": toml})
    return field(default=default, metadata={"toml": toml})


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. ``None`` means: not said, so the model or the target decides."""

    model: str | None = _setting("model.name")
    checkpoint: str | None = _setting("model.checkpoint")
    model_args: Mapping[str, Scalar] = _setting("model.args", {})
    input_shape: str | None = _setting("model.input_shape")
    """``CxHxW``, for models that do not say it."""
    shapes: tuple[str, ...] = _setting("model.shapes", ())
    """``NAME=BATCHxSIZE…[:TYPE]`` for each input, where that is not the image alone."""

    data: str | None = _setting("data.images")
    validation_data: str | None = _setting("data.validation")
    calibration_images: int = _setting("data.calibration_images", 512)
    validation_images: int | None = _setting("data.validation_images")
    train_data: str | None = _setting("data.train")
    train_images: int | None = _setting("data.train_images")
    """At most so many are trained on, held-out ones included. Not said: 20,000 in recovery, all behind pruning."""
    seed: int = _setting("data.seed", 0)
    preprocess: Mapping[str, Any] = _setting("preprocess", {})

    task: str = _setting("task.kind", "auto")
    """What the network is for; ``auto``: told by what is known of the images, else by the outputs."""
    task_options: Mapping[str, Any] = _setting("task.options", {})
    metric: str | None = _setting("task.metric")
    """``package.module:function``: the user's own, for the task ``other``."""

    prune_macs: float | None = _setting("prune.macs")
    """The share of the multiply-accumulates that may remain; or of the predicted latency, or of the weights:"""
    prune_latency: float | None = _setting("prune.latency")
    prune_params: float | None = _setting("prune.params")
    prune_what: tuple[str, ...] = _setting("prune.what", ("channels", "heads", "mlp"))
    prune_importance: str = _setting("prune.importance", "hessian")
    prune_epochs: int = _setting("prune.epochs", 3)
    """Passes over the training images that win the accuracy back."""
    sparsity: str | None = _setting("prune.sparsity")
    """``2:4``: two of four weights are zero, which sparse tensor cores skip."""

    precision: str = _setting("quantize.precision", "int8")
    quantizer: str = _setting("quantize.quantizer", "resvit")
    calibrator: str = _setting("quantize.calibrator", "output")
    """``output``: the least error at the layer's output; the others look at the tensor alone."""
    effort: str = _setting("quantize.effort", "fast")
    """``best``: learn from the calibration images as well."""
    include: tuple[str, ...] = _setting("quantize.include", ())
    exclude: tuple[str, ...] = _setting("quantize.exclude", ())

    recover: str = _setting("recover.when", "auto")
    """``auto``: where calibration alone is rejected and there are training images."""
    recover_epochs: int = _setting("recover.epochs", 3)

    search: bool = _setting("search.enabled", True)
    """Whether layers are raised to a higher precision where the gate does not accept the plain recipe."""
    latency_budget: str | None = _setting("search.latency_budget")
    """``3.5ms``, or ``0.7x`` of the latency predicted for FP16."""
    measured_times: str | None = _setting("search.measured_times")
    """JSON file of layer times measured on the device."""

    max_drop: float = _setting("validate.max_drop", 1.0)
    """Percentage points of top-1; points, hundredths, of another task's metric."""
    confidence: float = _setting("validate.confidence", 0.95)
    allow_rejected: bool = _setting("validate.allow_rejected", False)

    targets: tuple[str, ...] = _setting("target.name", ())
    """Names of devices; one as a text, several as a list."""
    own_targets: Mapping[str, Any] = _setting("targets", {})
    """The user's own devices: by name, ``like`` a row of the table, and what differs."""
    jetpack: str | None = _setting("target.jetpack")
    batch: str = _setting("target.batch", "1")
    """``N`` for a fixed batch, ``MIN:OPT:MAX`` for a dynamic one."""
    workspace_mib: int | None = _setting("target.workspace_mib")
    optimization_level: int = _setting("target.optimization_level", 3)
    hardware_compatible: bool = _setting("target.hardware_compatible", False)
    version_compatible: bool = _setting("target.version_compatible", False)
    strip_weights: bool = _setting("target.strip_weights", False)
    timing_cache: str | None = _setting("target.timing_cache")
    """Folder of TensorRT's measurements, one file per device and version."""
    require_fused: bool = _setting("target.require_fused", False)
    """Whether a build is refused whose quantised layers or attention blocks did not fuse."""
    plugins: str = _setting("target.plugins", "auto")
    """Whether kernels of our own take over what they can; ``auto``: where they are measured to be faster."""
    plugin_attention: str = _setting("target.plugin_attention", "fp16")
    """What our attention kernel multiplies in; ``8bit``: in the precision of the build."""

    key: str | None = _setting("bundle.key")
    """Private key file, or ``agent``; not said: what the environment names."""
    release: int = _setting("bundle.release", 1)
    """Devices refuse to go back to a lower one."""

    def __post_init__(self) -> None:
        _choice("precision", self.precision, PRECISIONS)
        _choice("quantizer", self.quantizer, QUANTIZERS)
        _choice("calibrator", self.calibrator, CALIBRATORS)
        _choice("effort", self.effort, EFFORTS)
        _choice("task", self.task, TASKS)
        if self.metric is not None and self.task not in ("auto", "other"):
            raise ResvitError(
                f"The task {self.task} has its own metric, and {self.metric} was given.",
                "Say --task other, or leave --metric out.",
            )
        _choice("prune_importance", self.prune_importance, IMPORTANCES)
        _choice("plugins", self.plugins, PLUGINS)
        _choice("plugin_attention", self.plugin_attention, ATTENTIONS)
        for kind in self.prune_what:
            _choice("prune_what", kind, PRUNABLE)
        if self.sparsity is not None:
            _choice("sparsity", self.sparsity, SPARSITIES)
        _between("prune_epochs", self.prune_epochs, 1, 10_000)
        budgets = {name: share for name, share in self.prune_budgets.items() if share is not None}
        for name, share in budgets.items():
            _between(f"prune_{name}", share, 0.01, 1.0)
        if len(budgets) > 1:
            raise ResvitError(
                f"Pruning was given {len(budgets)} budgets: {', '.join(f'--prune-{name}' for name in budgets)}.",
                "Choose one of them.",
            )
        _choice("recover", self.recover, RECOVERIES)
        if self.train_images is not None:
            _between("train_images", self.train_images, 128, 100_000_000)
        _between("recover_epochs", self.recover_epochs, 1, 10_000)
        _between("calibration_images", self.calibration_images, 1, 10_000_000)
        if self.validation_images is not None:
            _between("validation_images", self.validation_images, 1, 100_000_000)
        _between("max_drop", self.max_drop, 0.0, 100.0)
        _between("confidence", self.confidence, 0.5, 1.0 - 1e-7)
        _between("optimization_level", self.optimization_level, 0, 5)
        _between("release", self.release, 1, 2**31 - 1)
        if self.workspace_mib is not None:
            _between("workspace_mib", self.workspace_mib, 16, 1 << 20)
        self.shape_wishes, self.batch_range  # noqa: B018  (validates the texts)
        self.shape  # noqa: B018

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
    def shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of one image, where the recipe says them."""
        if self.input_shape is None:
            return None
        match = re.fullmatch(r"(\d+)[x,](\d+)[x,](\d+)", self.input_shape)
        if not match or "0" in match.groups():
            raise ResvitError(
                f"The input shape '{self.input_shape}' is not CHANNELSxHEIGHTxWIDTH.",
                "Write it as in --input-shape 3x224x224.",
            )
        return int(match[1]), int(match[2]), int(match[3])

    @property
    def label(self) -> str:
        """The model's name as a part of file names."""
        named = str(self.model)
        name = named.partition(":")[2] if named.startswith(("resvit:", "timm:", "object:")) else Path(named).name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"

    def settings_without_paths(self) -> dict[str, Any]:
        """All settings that name nothing on this machine, as plain values; the model's own are told elsewhere."""
        return {
            item.name: list(value) if isinstance(value := getattr(self, item.name), tuple) else value
            for item in dataclasses.fields(self)
            if item.name not in (*PATHS, *FILES, "model_args", "preprocess")
        }

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """Replace the settings given that are not ``None``; mappings are merged key by key."""
        changes = {key: value for key, value in settings.items() if value is not None and value != ()}
        for key in ("model_args", "preprocess", "task_options"):
            if key in changes:
                changes[key] = {**getattr(self, key), **changes[key]}
        return dataclasses.replace(self, **changes)


def recipe_from_toml(path: Path) -> Recipe:
    """Read a recipe file. Relative paths in it are relative to the folder that it lies in.

    Raises ``ResvitError`` for a missing or malformed file, an unknown key or a value of the wrong type.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResvitError(f"There is no recipe at {path}.", "Check the path given to --recipe.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ResvitError(f"The recipe {path} cannot be read: {error}.", "Give a UTF-8 TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise ResvitError(f"The recipe {path} is not valid TOML: {error}.", "Mend that line.") from error
    settings = _settings_from_document(document, path)
    for name in FILES:
        if isinstance(settings.get(name), str):
            settings[name] = absolute_file(settings[name], path.parent)
    return Recipe(**settings)


def recipe_to_toml(recipe: Recipe) -> str:
    """Write the complete recipe: every setting that has a value, in the order of the class."""
    document: dict[str, Any] = {}
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        if value is None or (item.name in ("targets", "own_targets") and not value):
            continue
        *tables, key = item.metadata["toml"].split(".")
        table = document
        for name in tables:
            table = table.setdefault(name, {})
        if item.name == "targets" and len(value) == 1:
            value = value[0]
        table[key] = list(value) if isinstance(value, tuple) else _plain(value)
    import tomli_w

    return tomli_w.dumps(document)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
    return value


def _settings_from_document(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    fields = {item.metadata["toml"]: item for item in dataclasses.fields(Recipe)}
    whole_tables = {"model.args", "preprocess", "targets"}
    flat: dict[str, Any] = {}
    for table, content in document.items():
        if table in whole_tables:
            flat[table] = content
        elif isinstance(content, dict):
            flat.update({f"{table}.{key}": value for key, value in content.items()})
        else:
            flat[table] = content
    settings = {}
    for key, value in flat.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3, cutoff=0.4)
            raise ResvitError(
                f"The recipe {path} has a setting that does not exist: {key}.",
                f"Did you mean {', '.join(near)}?" if near else f"It can have: {', '.join(sorted(fields))}.",
            )
        item = fields[key]
        settings[item.name] = _typed(key, value, str(item.type), path)
    for name in ("checkpoint", "validation_data", "train_data", "data", "model", "metric"):
        if isinstance(settings.get(name), str):
            settings[name] = absolute_reference(settings[name], path.parent)
    return settings


def _typed(key: str, value: Any, annotation: str, path: Path) -> Any:
    if annotation.startswith("tuple"):
        if key == "target.name" and isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif annotation.startswith("Mapping"):
        if isinstance(value, dict):
            return value
    else:
        kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
        accepted = kinds[annotation.split(" ", maxsplit=1)[0]]
        if key == "target.batch" and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, accepted) and isinstance(value, bool) == (bool in accepted):
            return value
    raise ResvitError(f"In the recipe {path}, {key} = {value!r} is of the wrong type.", f"It must be {annotation}.")


def absolute_file(text: str, folder: Path) -> str:
    """Make the path of a file absolute; ``agent`` and ``agent:COMMENT``, which name a key, stay."""
    if re.fullmatch(r"agent(:.*)?", text):
        return text
    return str((folder / Path(text).expanduser()).resolve())


def absolute_reference(text: str, folder: Path) -> str:
    """Make the path part of a model or data reference absolute; names such as ``timm:NAME`` stay.

    A reference is a path when it names something that exists below ``folder`` or ends like a file; in
    ``file.py:factory`` only the file is a path.
    """
    head, colon, tail = text.rpartition(":")
    if head == "hf" and (named := folder / Path(tail).expanduser()).is_dir():
        return f"hf:{named.resolve()}"
    if colon and head.endswith(".py"):
        return f"{(folder / Path(head).expanduser()).resolve()}:{tail}"
    path = folder / Path(text).expanduser()
    looks_like_path = text.startswith(("/", "./", "../", "~")) or "/" in text
    if path.exists() or (looks_like_path and ":" not in text) or text.endswith((".pt", ".pth", ".npz", ".onnx")):
        return str(path.resolve())
    return text


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.3)
        raise ResvitError(
            f"{name} = '{value}' does not exist.",
            f"Choose from {', '.join(choices)}." + (f" Did you mean {near[0]}?" if near else ""),
        )


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ResvitError(f"{name} = {value} is out of range.", f"Give a value from {low} to {high}.", ExitCode.INPUT)
