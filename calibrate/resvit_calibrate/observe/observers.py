"""An ONNX graph turned into one that also measures its own activations.

Minimum and maximum of every float activation are reduced inside the graph, so that no activation leaves it; a
strided sample of those that may be quantised leaves it for histograms. Everything is joined into one output.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resvit_calibrate.observe.activations import ActivationPlan, float_types, types_and_ranks
from resvit_calibrate.runtime.sessions import Array
from resvit_engines.errors import ResvitError, first_line

if TYPE_CHECKING:
    import onnx

STARTS, STEPS = "resvit.starts", "resvit.steps"
"""Extra graph inputs: int64 [S], where the sample of each sampled tensor starts and its stride."""
VALUES, SHAPES, RANKS, ROWS = "resvit.values", "resvit.shapes", "resvit.ranks", "resvit.row_extremes"
"""Graph outputs: float32 [S samples, then minima, maxima, sums]; int64, the shapes of the tensors in ``shaped`` one
behind the other, and how many dimensions each has; float32, the largest and then the smallest value of every row of
the tensors in ``by_row`` (a row is what lies under one index of the first axis)."""


MASK = -1e30
"""From here down a value in front of a softmax stands for minus infinity."""


@dataclasses.dataclass(frozen=True)
class ObservedModel:
    """A model that measures itself, and what its measurements belong to."""

    model: bytes
    """Serialised; its external data, if any, stays in ``folder``."""
    folder: Path
    input: str
    """The graph input that takes the images."""
    measured: tuple[str, ...]
    """Tensors with minimum and maximum, in the order of the graph (topological)."""
    summed: tuple[str, ...]
    """Those that a NaN of any other must pass through: their sums are NaN if there is one."""
    sampled: tuple[str, ...]
    """Tensors that leave a sample, in the order of the graph."""
    masked: frozenset[str]
    """Measured tensors in which minus infinity, or what stands for it, is a mask: left out of their minimum."""
    derived: dict[str, tuple[str, bool]]
    """Tensors not measured themselves: the measured one with the same values, and whether Relu came between."""
    producer: dict[str, str]
    """The name and operator of the node that writes each measured tensor."""
    aliases: dict[str, str]
    """Reshaped and transposed tensors: the one that each was made from."""
    perms: dict[str, tuple[int, ...]]
    """The permutations of the transposed ones; empty: all axes reversed."""
    channel_axes: dict[str, int | None]
    """Tensors that products and residuals read, and their channel axis; None where the rank decides."""
    shaped: tuple[str, ...]
    """Tensors whose shapes are put out."""
    by_row: tuple[str, ...]
    """Measured tensors whose extremes are put out by row."""
    in_one_row: frozenset[str]
    """Those of them of no rank, or of one that nobody knows: they are one row."""

    def extremes(self, values: Array) -> tuple[Array, Array, Array]:
        """Take minima [M], maxima [M] and sums [≤ M] out of the output VALUES, masks left out."""
        count, summed = len(self.measured), len(self.summed)
        low, high, sums = np.split(values[values.size - 2 * count - summed :], [count, 2 * count])
        masked = np.array([name in self.masked for name in self.measured]) & (low <= MASK)
        masked_sums = np.array([name in self.masked for name in self.summed], bool) & (sums <= MASK)
        return np.where(masked, high, low), high, np.where(masked_sums, 0.0, sums)

    def root(self, name: str) -> str:
        """The first tensor in the chain of reshapes and transposes that holds the values of ``name``."""
        return self.chain(name)[0]

    def chain(self, name: str) -> list[str]:
        """The root, and every reshaped or transposed tensor from there to ``name``."""
        names = [name]
        while names[0] in self.aliases:
            names.insert(0, self.aliases[names[0]])
        return names


def observed_model(path: Path, *, sum_all: bool = False) -> ObservedModel:
    """Turn an ONNX file into a model that measures its float activations.

    ``sum_all`` sums every tensor and not only those where a NaN must come past: for finding where one began.
    Raises ResvitError for an unreadable file or a model without a float image input.
    """
    import onnx

    if not path.is_file():
        raise ResvitError(f"There is no model file {path}.", "Check the path.")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ResvitError(
            f"{path} cannot be read as an ONNX model: {first_line(error)}",
            "Check that the file is complete, or export it again.",
        ) from error
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    types, ranks = types_and_ranks(model)
    if not inputs or types.get(inputs[0]) not in float_types():
        raise ResvitError(
            f"{path} has no float input that images could be fed to.",
            "Export the model with its preprocessed images as its first input, in float32.",
        )
    plan = ActivationPlan(graph, inputs, types, ranks)
    summed = plan.measured if sum_all else plan.summed
    writer = _Writer(model, plan, summed)
    writer.write()
    return ObservedModel(
        model=model.SerializeToString(),
        folder=path.parent,
        input=inputs[0],
        measured=plan.measured,
        summed=summed,
        sampled=plan.sampled,
        masked=plan.masked,
        derived=plan.derived,
        producer=plan.producer,
        aliases=plan.aliases,
        perms=plan.perms,
        channel_axes=plan.channel_axes,
        shaped=writer.shaped,
        by_row=writer.by_row,
        in_one_row=frozenset(name for name in writer.by_row if not ranks.get(name, 0)),
    )


class _Writer:
    """Writes the measuring nodes right behind the producers, and one Concat of all that they measure."""

    def __init__(self, model: onnx.ModelProto, plan: ActivationPlan, summed: tuple[str, ...]) -> None:
        self.graph = model.graph
        self.opset = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)
        self.plan = plan
        self.reductions = {
            "ReduceMin": set(plan.measured),
            "ReduceMax": set(plan.measured),
            "ReduceSum": set(summed),
        }
        self.order = {name: index for index, name in enumerate(plan.sampled)}
        self.flat = self.constant("flat", [-1])
        self.rows, self.single_row = self.constant("rows", [0, -1]), self.constant("single_row", [1, -1])
        self.axes = self.constant("axis0", [0]), self.constant("axis1", [1])
        self.end = self.constant("end", [np.iinfo(np.int64).max])
        self.measured: dict[str, list[str]] = {kind: [] for kind in self.reductions}
        self.by_row = tuple(dict.fromkeys(plan.derived.get(name, (name, False))[0] for name in plan.sampled))
        self.shaped = self._shaped()

    def _shaped(self) -> tuple[str, ...]:
        """What is sampled, what shows an extreme by row, and all between a sampled tensor and its readers."""
        shaped = dict.fromkeys((*self.plan.sampled, *self.by_row))
        for name in self.plan.channel_axes:
            end = name
            while end in self.plan.aliases:
                shaped[end] = None
                end = self.plan.aliases[end]
        return tuple(shaped)

    def constant(self, name: str, values: list[int]) -> str:
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(np.array(values, np.int64), f"resvit.{name}")
        self.graph.initializer.append(tensor)
        return tensor.name

    def write(self) -> None:
        import onnx
        from onnx import TensorProto, helper

        watched = {*self.plan.measured, *self.shaped}
        nodes = [observer for name in self.plan.inputs for observer in self.observers(name)]
        for node in self.graph.node:
            nodes.append(node)
            for name in node.output:
                if name in watched:
                    nodes += self.observers(name)
        samples = [f"resvit.{name}.sample" for name in self.plan.sampled]
        everything = [*samples, *(name for kind in self.measured.values() for name in kind)]
        nodes.append(helper.make_node("Concat", everything, [VALUES], axis=0))
        outputs = [helper.make_tensor_value_info(VALUES, TensorProto.FLOAT, [None])]
        if samples:
            rows = [f"resvit.{name}.{kind}.rows" for kind in ("ReduceMax", "ReduceMin") for name in self.by_row]
            for table, parts, kind in (
                (SHAPES, [f"resvit.{name}.shape" for name in self.shaped], TensorProto.INT64),
                (RANKS, [f"resvit.{name}.rank" for name in self.shaped], TensorProto.INT64),
                (ROWS, rows, TensorProto.FLOAT),
            ):
                nodes.append(helper.make_node("Concat", parts, [table], axis=0))
                outputs.append(helper.make_tensor_value_info(table, kind, [None]))
            for table in (STARTS, STEPS):
                value = helper.make_tensor_value_info(table, TensorProto.INT64, [len(samples)])
                self.graph.input.append(value)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:], self.graph.output[:]
        self.graph.node.extend(copies)
        self.graph.output.extend(outputs)

    def observers(self, name: str) -> list[onnx.NodeProto]:
        from onnx import TensorProto, helper

        tag, source = f"resvit.{name}", name
        nodes: list[onnx.NodeProto] = []
        if self.plan.types[name] != TensorProto.FLOAT and (name in self.reductions["ReduceMin"] or name in self.order):
            source = f"{tag}.float32"
            nodes.append(helper.make_node("Cast", [name], [source], to=TensorProto.FLOAT))
        if name in self.reductions["ReduceMin"]:
            # One row per image, so that the runtime shares the rows among its threads.
            shape = self.rows if self.plan.ranks.get(name, 0) else self.single_row
            nodes.append(helper.make_node("Reshape", [source, shape], [f"{tag}.rows"]))
            for kind, wanted in self.reductions.items():
                if name in wanted:
                    target = f"{tag}.{kind}"
                    nodes.append(self.reduce(kind, f"{tag}.rows", f"{target}.rows", axis=1, keepdims=0))
                    nodes.append(self.reduce(kind, f"{target}.rows", target, axis=0, keepdims=1))
                    self.measured[kind].append(target)
        if name in self.order:
            index = self.constant(f"{name}.index", [self.order[name]])
            for table in (STARTS, STEPS):
                nodes.append(helper.make_node("Gather", [table, index], [f"{tag}.{table}"], axis=0))
            nodes.append(helper.make_node("Reshape", [source, self.flat], [f"{tag}.flat"]))
            inputs = [f"{tag}.flat", f"{tag}.{STARTS}", self.end, self.axes[0], f"{tag}.{STEPS}"]
            nodes.append(helper.make_node("Slice", inputs, [f"{tag}.sample"]))
        if name in self.shaped:
            nodes.append(helper.make_node("Shape", [name], [f"{tag}.shape"]))
            nodes.append(helper.make_node("Shape", [f"{tag}.shape"], [f"{tag}.rank"]))
        return nodes

    def reduce(self, kind: str, source: str, target: str, *, axis: int, keepdims: int) -> onnx.NodeProto:
        from onnx import helper

        if self.opset >= (13 if kind == "ReduceSum" else 18):
            return helper.make_node(kind, [source, self.axes[axis]], [target], keepdims=keepdims)
        return helper.make_node(kind, [source], [target], keepdims=keepdims, axes=[axis])
