"""Recovery: the weights are trained briefly, with the quantisers in the loop, to answer as the float model does.

Quantisation-aware training by distillation (Polino et al. 2018) with straight-through gradients (Bengio et al.
2013). It works on the float ONNX graph, so that it serves every model that can be quantised here, and changes
constants only: the result is a float graph of the same nodes and names, which is calibrated and quantised by the
same passes as any other. The quantisers are our own (``fake_quant``) and not a library's, because they must stand
exactly where the placement puts the Q/DQ pairs.

Weight scales follow the weights at every step. Clips of activations start as calibrated and are learned with the
weights (LSQ, Esser et al. 2020); the report has them, since a graph without Q/DQ has no place for them, and
:func:`pinned_ranges` puts them where the quantiser reads. Fresh ranges of the trained graph would be others than
those that its weights were trained for, and at few bits that costs most of what was won.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.network import constant, network_from_onnx, onnx_from_network
from resvit_quantize.placement import WeightKey, weight_key
from resvit_quantize.qdq import StoredWeight, quantise_weight
from resvit_quantize.quantize import Plan, plan_quantization
from resvit_quantize.settings import Effort, QuantizeSettings

FEWEST_IMAGES = 128
HELD_OUT = (64, 2000)
"""A tenth of the images is held out, within these bounds."""

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NORMS = frozenset({"LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization"})


class TrainingImages(Protocol):
    """Images that can be read in any order; ``resvit_calibrate.data.training_images`` has one for each kind of data."""

    digest: str

    def __len__(self) -> int: ...

    def batches_at(self, positions: npt.NDArray[np.int64], batch_size: int, skip: int = 0) -> Iterator[Batch]:
        """Stream the images at ``positions``, less the first ``skip`` batches; the same call gives the same."""
        ...


@dataclass(frozen=True)
class RecoverOptions:
    """How to train. Raises ``ResvitError`` for values that nothing can be trained with."""

    epochs: int = 3
    batch: int = 32
    learning_rate: float = 3e-3
    """Peak of the cosine, relative to the size of each constant (as in Adafactor, Shazeer and Stern 2018), so that
    one value serves wide and narrow networks; for AdamW without decay."""
    seed: int = 0
    limit: int | None = None
    """At most so many images, held-out ones included."""
    label_weight: float = 0.0
    """Of the cross-entropy with the labels, where there are any, beside the distance from the float model."""
    learned_clips: bool = True
    """Whether the clips of activations are trained too, or stay as calibrated."""
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises."""
    evaluate_every: int = 500
    """Steps between two looks at the held-out images; an epoch's end is always one."""
    patience: int = 4
    """Looks without an improvement after which training stops."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 1),
            ("batch", self.batch, 1),
            ("evaluate_every", self.evaluate_every, 1),
            ("patience", self.patience, 1),
            ("limit", FEWEST_IMAGES if self.limit is None else self.limit, FEWEST_IMAGES),
        ):
            if value < low:
                raise ResvitError(f"Recovery cannot train with {name} = {value}.", f"Give {low} or more.")
        if not (0.0 < self.learning_rate < 1.0 and self.label_weight >= 0.0 and 0.0 <= self.warmup < 1.0):
            raise ResvitError(
                f"Recovery cannot train with a learning rate of {self.learning_rate}, a label weight of "
                f"{self.label_weight} and a warm-up of {self.warmup}.",
                "Give a learning rate above 0, such as 3e-3; a label weight from 0; a warm-up from 0 to below 1.",
            )


class Stop(str, enum.Enum):
    """Why training ended."""

    FINISHED = "all epochs are done"
    NO_BETTER = "the held-out images stopped improving"
    NOT_FINITE = "the loss was not a finite number"


@dataclass(frozen=True)
class TrainingScore:
    """A student against its teacher on the held-out images, behind ``step`` steps."""

    step: int
    loss: float
    """Distance of the answers alone; what the best weights are chosen by."""
    nsr: float
    """Noise to signal: Σ (teacher - student)² / Σ teacher², over all outputs."""
    agreement: float | None
    """Share of images with the teacher's class; ``None`` where the output is not [B, K]."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; what JSON cannot hold becomes None."""
        plain = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


@dataclass(frozen=True)
class Score(TrainingScore):
    """The fake-quantised graph against the float one."""

    train_loss: float | None = None
    """Mean over the training images since the last score."""

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f"agreement with float {self.agreement:.2%}, "
        return f"{agreement}noise to signal {10 * math.log10(max(self.nsr, 1e-30)):.1f} dB"


@dataclass(frozen=True)
class TrainingReport:
    """What a training did, for a record and the report."""

    before: TrainingScore
    after: TrainingScore
    """Of the weights that were kept: the best ones, which may be the first."""
    history: tuple[TrainingScore, ...]
    stop: Stop
    images: int
    held_out: int
    epochs: int
    steps: int
    seconds: float
    """Of all calls together, where one went on from another."""
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        scores = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {
            **plain,
            **scores,
            "history": [score.to_json() for score in self.history],
            "stop": self.stop.value,
            "kept_step": self.after.step,
        }


@dataclass(frozen=True)
class RecoverReport(TrainingReport):
    """What recovery did, for ``recover.json``."""

    trained: int
    """Constants that were trained."""
    clips: Mapping[str, Mapping[str, float]]
    """Largest magnitude by precision and tensor, of every activation that is quantised."""


def recover_model(
    model: Path,
    ranges: Ranges,
    settings: QuantizeSettings,
    images: TrainingImages,
    out: Path,
    state: Path,
    options: RecoverOptions = RecoverOptions(),
    reporter: Reporter = SILENT,
    *,
    statistics: Statistics | None = None,
) -> RecoverReport:
    """Train the constants of ``model`` as ``settings`` will quantise it; write the new float ONNX to ``out``.

    Weights that are quantised are written on their grid, so that quantising them again changes nothing; quantise
    the result with :func:`settings_behind_recovery` and :func:`pinned_ranges`. ``state`` keeps what a killed call
    needs to go on and is removed at the end; ``statistics`` serve as in :func:`plan_quantization`. Raises
    :class:`ResvitError` where nothing is quantised, where the graph has an operator without gradients, for fewer
    than 128 images, and for images that the graph cannot read.
    """
    from resvit_quantize.torch_recover import Training

    # What --effort best would learn, the training learns better.
    settings = dataclasses.replace(settings, effort=Effort.FAST)
    plan = plan_quantization(model, ranges, settings, statistics)
    if not plan.placement.edges:
        raise ResvitError(
            f"Nothing is quantised to {settings.precision.value}, so there is nothing to recover.",
            "Leave recovery out, or quantise more with --include.",
            ExitCode.IMPOSSIBLE,
        )
    wanted = len(images) if options.limit is None else min(options.limit, len(images))
    if wanted < FEWEST_IMAGES:
        raise ResvitError(
            f"There are {wanted} training images; recovery needs {FEWEST_IMAGES} or more.",
            "Give more training images: thousands serve best.",
        )
    facts = {
        "model": sha256_file(model),
        "ranges": sha256_bytes(canonical_json(ranges.to_json())),
        "settings": settings_to_json(settings),
        "options": dataclasses.asdict(options),
        "images": images.digest,
        "statistics": statistics is not None,
    }
    key = sha256_bytes(canonical_json(facts))
    teacher = network_from_onnx(model)
    trained, report = Training(plan, teacher, settings.bits, images, wanted, options, state, key, reporter).run()
    grids = on_grid(plan)
    for name, array in trained.items():
        if name in grids:
            _, axis, precision = grids[name]
            stored = StoredWeight(*quantise_weight(array, axis, precision, settings.bits))
            array = stored.restored(axis)  # noqa: PLW2901
        plan.network.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)
    onnx_from_network(plan.network, out)
    state.unlink(missing_ok=True)
    return report


def settings_behind_recovery(settings: QuantizeSettings) -> QuantizeSettings:
    """How to quantise a recovered model: its weights lie on their grid already, with their errors trained away.

    What moves weights, biases or ranges to come nearer to the float graph would undo the training.
    """
    off = dict.fromkeys(("smoothing", "shifting", "output_ranges", "bias_correction"), False)
    where_only = dataclasses.replace(settings.methods, **off)
    return dataclasses.replace(settings, methods=where_only, effort=Effort.FAST)


def pinned_ranges(ranges: Ranges, clips: Mapping[str, Mapping[str, float]]) -> Ranges:
    """Ranges with the clips of a :class:`RecoverReport` in place of what calibration chose, by any estimator."""
    tensors = dict(ranges.tensors)
    for precision, by_tensor in clips.items():
        for name, clip in by_tensor.items():
            if name in tensors:
                every = {estimator.value: float(clip) for estimator in Estimator}
                tensors[name] = dataclasses.replace(tensors[name], amax={**tensors[name].amax, precision: every})
    return dataclasses.replace(ranges, tensors=tensors)


def settings_to_json(settings: QuantizeSettings) -> dict[str, Any]:
    """Settings as plain values, to tell whether two are equal."""
    plain = dataclasses.asdict(settings)
    plain["precisions"] = {name: precision.value for name, precision in sorted(settings.precisions.items())}
    return plain


def trainable_constants(plan: Plan) -> tuple[str, ...]:
    """The constants that recovery may train, in the graph's order.

    Weights of products, and behind the first product also biases and the scales and offsets of norms. All else
    stays as it is, bit for bit: preprocessing inside the graph, positions, masks, epsilons, statistics of
    BatchNorms, and whatever is read in a second way.
    """
    return tuple(
        name
        for name, value in plan.network.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT
        and value.uses()
        and not value.is_graph_output()
        and all(_may_train(plan, use.node, use.idx) for use in value.uses())
    )


def on_grid(plan: Plan) -> dict[str, WeightKey]:
    """The constants that are read through one and the same quantiser wherever they are read."""
    read = {(place.node, place.index): weight_key(place) for place in plan.placement.weights}
    found: dict[str, WeightKey] = {}
    for name, value in plan.network.graph.initializers.items():
        keys = {read.get((use.node, use.idx)) for use in value.uses()}
        key = keys.pop() if len(keys) == 1 else None
        if key is not None:
            found[name] = key
    return found


def _may_train(plan: Plan, node: ir.Node, index: int) -> bool:
    product = plan.analysis.of.get(node)
    if product is not None and product.weight is not None and node.op_type in _WEIGHTED:
        return index in (1, 2)
    if node.op_type in _NORMS:
        return index in (1, 2) and _behind_product(plan, node.inputs[0])
    if node.op_type not in ("Add", "Mul"):
        return False
    array = constant(node.inputs[index])
    # A vector along one axis is a bias or a norm's scale; what has two axes may be positions or a mask.
    is_vector = array is not None and array.size > 1 and max(array.shape) == array.size
    masks = any(use.node.op_type == "Softmax" for use in node.outputs[0].uses())
    return is_vector and not masks and _behind_product(plan, node.inputs[1 - index])


def _behind_product(plan: Plan, value: ir.Value | None) -> bool:
    return value is not None and value in plan.analysis.data and plan.analysis.depth.get(value, 0) > 0
