"""Whether a network that answers otherwise in 8 bits is sensitive itself, or its quantisation is to blame.

The float network runs under noise at the places where the quantised one rounds: every activation behind a Q/DQ pair and
every stored weight. The noise is as large as the least that 8 bits cost: an INT8 grid of the best step leaves normally
distributed values 40.5 dB (Max 1960, "Quantizing for minimum distortion"), the three bits of E4M3's mantissa 31.5 dB.
Where that alone moves the outputs as far, no ranges help: the network is sensitive, as random weights often make it.
Where it does not, the places that lose more than that are to blame, and they are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from resvit_calibrate.answers.apart import by_image, shared_of
from resvit_calibrate.answers.classes import sqnr
from resvit_calibrate.runtime.runner import onnx_runner, pieces
from resvit_calibrate.runtime.sessions import INTERNAL, Arrays, run_session
from resvit_engines.rows import paired_rows
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.network import add_initializer, constant, network_from_onnx
from resvit_quantize.placement.placement import channel_axis

LOW_DB = 20.0
"""Below this SQNR of the outputs the question is asked."""
LEAST_NOISE_DB = {Precision.INT8: 40.5, Precision.FP8: 31.5}
"""How far below its signal the noise at each place is."""
_ALIKE_DB = 3.0
"""Outputs this near to those under noise of its size are what 8 bits cost this network."""
_LOSSY_DB = 10.0
"""A place that loses this much more than the least is named."""
_NAMED = 3
_DRAWN = 65537
"""Numbers drawn, a prime: repeated, they fall on other channels and pixels every time."""


@dataclass(frozen=True)
class OwnNoise:
    """What was measured on a few images, all in dB.

    ``outputs_db``: SQNR of the quantised network's outputs, the lowest of all; ``under_noise_db``: that of the float
    network under noise ``noise_db`` below the signal at the same ``places``. ``lossy`` names the tensors whose own
    rounding and clipping costs far more, the worst first, with their SQNR.
    """

    outputs_db: float
    under_noise_db: float
    noise_db: float
    places: int
    lossy: tuple[tuple[str, float], ...]

    @property
    def network_is_sensitive(self) -> bool:
        """Whether the least noise of 8 bits moves the outputs as far."""
        return self.under_noise_db < LOW_DB or self.outputs_db > self.under_noise_db - _ALIKE_DB

    @property
    def sentence(self) -> str:
        """Who is to blame, and what to do."""
        measured = (
            f"the outputs keep {self.outputs_db:.1f} dB; under noise {self.noise_db:g} dB below the signal at the same "
            f"{self.places} places, the least that 8 bits cost, the float network keeps {self.under_noise_db:.1f} dB"
        )
        if self.network_is_sensitive:
            return (
                f"The network's own sensitivity is to blame, not the quantisation: {measured}. Random or untrained "
                "weights do that; with trained weights, keep the layers that 'sensitivity' names in FP16 (--exclude), "
                "or use --precision fp16."
            )
        lossy = ", ".join(f"{name} ({value:.1f} dB)" for name, value in self.lossy[:_NAMED])
        named = f" Most is lost at {lossy}." if lossy else ""
        return (
            f"The quantisation is to blame, not the network: {measured}.{named} Calibrate with more images, try "
            "--effort best, or keep what reads them in FP16 (--exclude)."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {name: _plain(getattr(self, name)) for name in ("outputs_db", "under_noise_db", "noise_db")}
        return {**plain, "places": self.places, "lossy": [[name, _plain(value)] for name, value in self.lossy]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> OwnNoise:
        """Read what ``to_json`` wrote."""
        figures = [_number(document[name]) for name in ("outputs_db", "under_noise_db", "noise_db")]
        lossy = tuple((str(name), _number(value)) for name, value in document["lossy"])
        return cls(figures[0], figures[1], figures[2], int(document["places"]), lossy)


def own_noise(
    floating: Path, quantized: Path, precision: Precision, feeds: Arrays, *, sets: bool = False, apart: bool = False
) -> OwnNoise | None:
    """Measure on ``feeds``, a few images; ``None`` where nothing is quantised.

    ``floating`` and ``quantized`` are ONNX files of the same outputs. ``sets`` says that rows of outputs may change
    places; ``apart`` that only what differs between images is signal, as where no metric judges them. Raises
    ``ResvitError`` for files that do not read or run.
    """
    if precision not in LEAST_NOISE_DB:
        return None
    network = ir.load(quantized)  # as it is: to read it as a float network is to fold its stored weights
    weighted = _weighted(network)
    rounded = _with_errors(network)
    if not rounded:
        return None
    noisy = network_from_onnx(floating)
    noise_db = LEAST_NOISE_DB[precision]
    count = _with_noise(noisy, set(rounded), weighted, noise_db)
    answers = onnx_runner(floating)(feeds)
    own, errors = _measured(_bytes(network), feeds)
    lost = {name: _decibels(signal, error) for name, (error, signal) in zip(rounded, errors.tolist(), strict=True)}
    lossy = sorted((value, name) for name, value in lost.items() if value < noise_db - _LOSSY_DB)
    images = len(next(iter(feeds.values()))) if apart else None
    disturbed = onnx_runner(_bytes(noisy), folder=floating.parent)(feeds)
    outputs_db, under_noise_db = (_lowest(answers, each, sets, images) for each in (own, disturbed))
    return OwnNoise(outputs_db, under_noise_db, noise_db, count, tuple((name, value) for value, name in lossy))


_ERRORS = f"{INTERNAL}errors"


def _measured(model: bytes, feeds: Arrays) -> tuple[Arrays, np.ndarray]:
    """Outputs of a graph that ``_with_errors`` made, and its sums over all images [places, 2]."""
    runner = onnx_runner(model)
    total = np.zeros(0)
    parts: list[Arrays] = []
    for piece, size in pieces(feeds, runner.batch or len(next(iter(feeds.values())))):
        answers = dict(zip(runner.outputs, run_session(runner.session, list(runner.outputs), piece), strict=True))
        sums = answers.pop(_ERRORS).astype(np.float64)
        total = sums if not parts else total + sums
        parts.append({name: value[:size] for name, value in answers.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, total.reshape(-1, 2)


def _with_errors(model: ir.Model) -> tuple[str, ...]:
    """Let a quantised graph measure, in place, what each Q/DQ pair costs: Σ error² and Σ signal² [places, 2]."""
    names: list[str] = []
    sums: list[ir.Value] = []
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
            continue
        backs = [use.node for use in node.outputs[0].uses() if use.node.op_type == "DequantizeLinear"]
        if not backs or constant(node.inputs[0]) is not None:
            continue
        given, made = (_step(model, "Cast", [value], to=1) for value in (node.inputs[0], backs[0].outputs[0]))
        for value in (_step(model, "Sub", [given, made]), given):
            square = _step(model, "Mul", [value, value])
            sums.append(_step(model, "ReduceSum", [square], keepdims=0))
        names.append(str(node.inputs[0].name).removesuffix("/fp16").removesuffix("/fp32"))
    if not names:
        return ()
    flat = [_step(model, "Reshape", [value, _integers(model, 1)]) for value in sums]
    whole = _step(model, "Concat", flat, axis=0)
    whole.name, whole.shape, whole.type = _ERRORS, ir.Shape([len(sums)]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(whole)
    return tuple(names)


def _weighted(model: ir.Model) -> set[str]:
    """The names of the products whose weight is stored in 8 bits."""
    names = set()
    for node in model.graph:
        weight = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if weight is not None and weight.op_type == "DequantizeLinear" and constant(weight.inputs[0]) is not None:
            names.add(str(node.name))
    return names


def _with_noise(model: ir.Model, tensors: set[str], weighted: set[str], noise_db: float) -> int:
    """Add normally distributed noise, in place, to tensors and to the weights of products; returns to how many.

    It is ``noise_db`` below the mean square: of a whole activation, of each output channel of a weight. Tensors that
    only the quantised graph has (what smoothing made) stand for the input of the product that reads them.
    """
    size = 10.0 ** (-noise_db / 20.0)
    random = np.random.default_rng(0)
    products = [node for node in model.graph if str(node.name) in weighted]
    read = {node.inputs[0] for node in products if node.inputs[0] is not None}
    shown = [value for value in _values(model) if value in read or str(value.name) in tensors]
    drawn = add_initializer(model, f"{INTERNAL}drawn", random.standard_normal(_DRAWN).astype(np.float32))
    for value in shown:
        noise = _repeated(model, drawn, value, int(random.integers(_DRAWN)))
        _disturb(model, value, noise, size)
    for node in products:
        weight = constant(node.inputs[1])
        if weight is None:
            continue
        axes = tuple(axis for axis in range(weight.ndim) if axis != channel_axis(node) % weight.ndim)
        scale = np.sqrt(np.square(weight, dtype=np.float64).mean(axes, keepdims=True)) * size
        made = (weight + scale * random.standard_normal(weight.shape)).astype(weight.dtype)
        node.replace_input_with(1, add_initializer(model, f"{INTERNAL}{node.name}/weight", made))
    return len(shown) + len(products)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from (value for value in model.graph.inputs if value.dtype is ir.DataType.FLOAT)
    for node in model.graph:
        yield from (value for value in node.outputs if value.dtype is ir.DataType.FLOAT)


def _repeated(model: ir.Model, drawn: ir.Value, value: ir.Value, start: int) -> ir.Value:
    """``drawn`` [_DRAWN] from ``start`` on, as often as it takes to fill the shape of ``value``.

    ONNX Runtime draws no numbers in opset 22 and later.
    """
    elements = _step(model, "Reshape", [_step(model, "Size", [value]), _integers(model, 1)])
    times = _step(model, "Add", [_step(model, "Div", [elements, _integers(model, _DRAWN)]), _integers(model, 2)])
    first = _integers(model, start)
    cut = [_step(model, "Tile", [drawn, times]), first, _step(model, "Add", [elements, first])]
    return _step(model, "Reshape", [_step(model, "Slice", cut), _step(model, "Shape", [value])])


def _disturb(model: ir.Model, value: ir.Value, noise: ir.Value, size: float) -> None:
    """Let all that reads ``value`` read it with ``noise``, ``size`` times as large, in place."""
    users = [use for use in value.uses() if not str(use.node.name).startswith(INTERNAL)]
    square = _step(model, "Mul", [value, value])
    scale = _step(model, "Sqrt", [_step(model, "ReduceMean", [square], keepdims=0)])
    name = f"{INTERNAL}size"
    share = model.graph.initializers.get(name) or add_initializer(model, name, np.array(size, np.float32))
    made = _step(model, "Add", [value, _step(model, "Mul", [noise, _step(model, "Mul", [scale, share])])])
    made.shape, made.type = value.shape, value.type
    for use in users:
        use.node.replace_input_with(use.idx, made)


def _step(model: ir.Model, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
    """A node of ours, behind what the last of its inputs comes from."""
    number = model.graph.num_nodes()
    node = ir.node(op_type, list(inputs), attributes or None, name=f"{INTERNAL}{op_type}_{number}")
    node.outputs[0].name = f"{INTERNAL}{op_type}_{number}/output"
    model.graph.append(node)
    return node.outputs[0]


def _integers(model: ir.Model, number: int) -> ir.Value:
    """The constant [1] of one whole number."""
    name = f"{INTERNAL}{number}"
    return model.graph.initializers.get(name) or add_initializer(model, name, np.array([number], np.int64))


def _bytes(model: ir.Model) -> bytes:
    model.graph.sort()
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def _lowest(expected: Arrays, answers: Arrays, sets: bool, images: int | None) -> float:
    """The lowest SQNR of the float outputs in dB; -infinity where one is not finite.

    Of ``images``, where their number is given, the signal is what differs between them.
    """
    if sets:
        answers = dict(paired_rows(expected, answers))
    values = []
    for name, value in expected.items():
        if value.dtype.kind != "f":
            continue
        rows = None if images is None else by_image(value, images)
        if rows is None:
            values.append(sqnr(value, answers[name]))
            continue
        shared = shared_of(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            noise = float(np.square(rows - answers[name].reshape(rows.shape)).sum())
        values.append(_decibels(float(shared.signal(rows, shared.members).sum()), noise))
    return min((-math.inf if math.isnan(value) else value for value in values), default=math.inf)


def _decibels(signal: float, error: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(error)):
        return -math.inf
    return math.inf if not error or not signal else 10.0 * math.log10(signal / error)


def _plain(value: float) -> float | str | None:
    return value if math.isfinite(value) else str(value)


def _number(value: object) -> float:
    return float(str(value))
