"""Multi-scale deformable attention, found in a graph and made one node.

The pattern, as PyTorch's exporter writes it for Deformable DETR and all that came from it: a GridSample for each level
of one tensor of values, the samples joined, multiplied by the weights, summed over all points, and the heads joined.
Models differ in how they cut, turn and join, so the views between are run on numbers (see ``layout``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from resvit_engines.kernels.deformable import DeformableConfig
from resvit_engines.kernels.numerics import EIGHT_BIT
from resvit_engines.plugins.names import DOMAIN
from resvit_quantize.fusion.attention_node import Inserter
from resvit_quantize.fusion.layout import Shapes, Traced, behind, traces
from resvit_quantize.fusion.match import ONNX_TYPES, Kind, Match, RefusedError, quantised_behind, type_of
from resvit_quantize.fusion.nodes import named_after, plugin_attributes, take_over
from resvit_quantize.fusion.operands import STORED, Amax, clip_of, scale_of
from resvit_quantize.graph.network import constant

_VIEWS = ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Flatten", "Cast", "Identity")
_PLAIN = {"mode": ("linear", "bilinear"), "padding_mode": ("zeros",)}


@dataclass(frozen=True, eq=False)
class Group:
    """GridSamples whose samples are multiplied by one tensor: ``join`` is what puts them together, if any."""

    samples: tuple[ir.Node, ...]
    join: ir.Node | None
    weigh: ir.Node
    """The Mul."""
    joined: ir.Value
    """The samples as the Mul reads them."""


@dataclass(frozen=True, eq=False)
class Deformable:
    """A group that can become one node: its inputs, and ``end``, the value that its output replaces."""

    config: DeformableConfig
    value: ir.Value
    places: ir.Value
    weights: ir.Value
    end: ir.Value
    quantizer: ir.Node | None
    """Where ``end`` is only read in 8 bits: the QuantizeLinear that the node takes in."""
    nodes: tuple[ir.Node, ...]

    @property
    def last(self) -> ir.Node:
        """The last node that the new one replaces: it comes in front of that."""
        last = self.quantizer or self.end.producer()
        assert last is not None
        return last


def groups(model: ir.Model) -> tuple[Group, ...]:
    """All GridSamples that lead to a product with weights, alone or joined with others, in order."""
    made: dict[ir.Node, Group] = {}
    for node in model.graph:
        if node.op_type != "GridSample" or node.domain:
            continue
        end, reader = _reader(node.outputs[0])
        samples: tuple[ir.Node, ...] = (node,)
        join = reader if reader is not None and reader.op_type == "Concat" else None
        if join is not None:
            sources = [_sampler(value) for value in join.inputs]
            samples = tuple(source for source in sources if source is not None)
            if len(samples) < len(sources):
                continue
            end, reader = _reader(join.outputs[0])
        if reader is not None and reader.op_type == "Mul" and reader not in made:
            made[reader] = Group(samples, join, reader, end)
    return tuple(made.values())


def module_of(group: Group) -> str:
    """The module that the group stands in."""
    return str(group.weigh.name).rpartition("/")[0] or str(group.weigh.name)


def deformable_of(group: Group, shapes: Shapes) -> Deformable:
    """Check one group, whose types may be others than a kernel has.

    Raises:
        RefusedError: with the reason why it cannot be one node.
    """
    for node in group.samples:
        _check_sampling(node)
    maps = [_shape(node.inputs[0], shapes) for node in group.samples]
    grids = [_shape(node.inputs[1], shapes) for node in group.samples]
    if len({(shape[:2], grid[:2]) for shape, grid in zip(maps, grids, strict=True)}) != 1:
        raise RefusedError("its levels differ in heads, in the size of a head, or in queries")
    both, size = maps[0][:2]
    queries = grids[0][1]
    config = DeformableConfig(
        heads=1,
        head_size=size,
        heights=tuple(shape[2] for shape in maps),
        widths=tuple(shape[3] for shape in maps),
        points=tuple(grid[2] for grid in grids),
        queries=queries,
    )
    value, batch = _value(group, config, both, shapes)
    config = dataclasses.replace(config, heads=both // batch)
    places, unit = _located(_places(group, config, batch, shapes))
    weights = _weights(group, config, batch, shapes)
    _check_join(group, config, batch, shapes)
    total = _summed(group, shapes)
    end = _end(total, config, batch, shapes)
    config = dataclasses.replace(
        config,
        unit=unit,
        dtype=type_of(value),
        place_dtype=type_of(places),
        weight_dtype=type_of(weights),
        out_dtype=type_of(end),
    )
    narrow = quantised_behind(end)
    if narrow is not None:
        config = dataclasses.replace(config, out_dtype=narrow.dtype, out_scale=narrow.scale)
    joins = [group.join] if group.join is not None else []
    nodes = (*group.samples, *joins, group.weigh, _producer(total))
    return Deformable(config, value, places, weights, end, narrow.node if narrow else None, nodes)


def op_type_of(config: DeformableConfig) -> str:
    """The name of the node."""
    return "ResvitDeformable" + ("Q" if config.out_dtype in EIGHT_BIT else "")


def match_of(part: Deformable, shapes: Shapes) -> Match:
    """The part for a report."""
    config = part.config
    read = tuple((1, *shapes[str(value.name)][1:]) for value in (part.value, part.places, part.weights))
    nodes = [*part.nodes, *([part.quantizer] if part.quantizer is not None else [])]
    name = named_after(part.nodes[0], "ResvitDeformable")
    return Match(Kind.DEFORMABLE, name, op_type_of(config), config, read, tuple(str(node.name) for node in nodes))


def narrowed(part: Deformable, amax: Amax, dtype: str) -> Deformable:
    """The same with values in ``int8`` or ``fp8``; places and weights stay.

    Raises:
        RefusedError: where the range of the values is not known, or is nothing.
    """
    if part.config.dtype != "fp16":
        raise RefusedError(f"its values are {part.config.dtype.upper()}, and only FP16 is quantised for it")
    scale = scale_of(clip_of(str(part.value.name), amax), dtype)
    return dataclasses.replace(part, config=dataclasses.replace(part.config, dtype=dtype, value_scale=scale))


def rewrite(model: ir.Model, part: Deformable, name: str) -> ir.Node:
    """Put a node of this name in place; nodes that nothing reads any more are left for the caller to remove."""
    config, last = part.config, part.last
    value = part.value
    if config.dtype in EIGHT_BIT:
        inserter = Inserter(model, last)
        value = inserter.quantised(value, config.value_scale, STORED[config.dtype], f"{name}/{value.name}")
    inputs = [value, part.places, part.weights]
    node = ir.node(op_type_of(config), inputs, attributes_of(config), domain=DOMAIN, name=name)
    model.graph.insert_before(last, node)
    take_over(last.outputs[0], node.outputs[0])
    return node


def attributes_of(config: DeformableConfig) -> dict[str, Any]:
    """What the function's body reads, beside ``plugin_attributes``."""
    heads, size, samples, queries = config.heads, config.head_size, config.samples, config.queries

    def of_points(numbers: Sequence[float]) -> tuple[float, ...]:
        """The number of each point's level."""
        return tuple(number for number, count in zip(numbers, config.points, strict=True) for _ in range(count))

    attributes: dict[str, Any] = {}
    for axis, sizes in (("x", config.widths), ("y", config.heights)):
        half = 1.0 if config.unit else 0.5
        attributes[f"{axis}_factor"] = of_points([half * number for number in sizes])
        attributes[f"{axis}_shift"] = of_points([-0.5 if config.unit else half * number - 0.5 for number in sizes])
        attributes[f"{axis}_last"] = of_points([number - 1.0 for number in sizes])
        attributes[f"{axis}_most"] = of_points([number - 1 for number in sizes])
    return {
        **plugin_attributes(config),
        **attributes,
        "width": of_points(config.widths),
        "start": of_points(config.starts),
        "value_view": (0, config.positions, heads, size),
        "pyramid_view": (-1, config.positions, size),
        "places_view": (0, queries, heads, samples, 2),
        "weights_view": (0, queries, heads, samples),
        "index_view": (-1, queries * samples, 1),
        "points_view": (-1, queries, samples, size),
        "summed_view": (-1, heads, queries, size),
        "joined": (0, queries, heads * size),
        "value_scale": config.value_scale,
        "out_type": ONNX_TYPES[config.out_dtype],
        **({"out_scale": config.out_scale} if op_type_of(config).endswith("Q") else {}),
    }


def _reader(value: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """Follow views that alone read what is before them: the last value, and what alone reads that."""
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return value, None
        node = uses[0].node
        if node.op_type not in _VIEWS:
            return value, node
        if node.domain or uses[0].idx != 0:
            return value, None
        value = node.outputs[0]


def _sampler(value: ir.Value | None) -> ir.Node | None:
    """The GridSample that a value is a view of."""
    here = value
    while here is not None and (node := here.producer()) is not None:
        if node.op_type == "GridSample" and not node.domain:
            return node
        if node.op_type not in _VIEWS:
            return None
        here = node.inputs[0]
    return None


def _check_sampling(node: ir.Node) -> None:
    for name, served in _PLAIN.items():
        said = node.attributes.get_string(name, served[0])
        if said not in served:
            raise RefusedError(f"{node.name} samples with {name} {said}, and the kernel with {served[0]}")
    if node.attributes.get_int("align_corners", 0):
        raise RefusedError(f"{node.name} samples with aligned corners")


def _shape(value: ir.Value | None, shapes: Shapes) -> tuple[int, ...]:
    shape = shapes.get(str(value.name)) if value is not None else None
    if shape is None:
        raise RefusedError("a size depends on data")
    if len(shape) != 4:
        raise RefusedError(f"what it samples has {len(shape)} dimensions")
    return shape


def _common(
    levels: Sequence[list[Traced]],
    shapes: Shapes,
    expected: Callable[[tuple[int, ...]], Sequence[np.ndarray] | None],
) -> ir.Value | None:
    """The farthest value that all levels are views of, just as ``expected`` says for its shape."""
    for trace in reversed(levels[0]):
        others = [next((t for t in level if t.source is trace.source), None) for level in levels]
        wanted = expected(shapes[str(trace.source.name)])
        if wanted is None or len(others) != len(wanted):
            continue
        if all(t is not None and np.array_equal(t.places, places) for t, places in zip(others, wanted, strict=True)):
            return trace.source
    return None


def _value(group: Group, config: DeformableConfig, both: int, shapes: Shapes) -> tuple[ir.Value, int]:
    """What holds the values of all levels, [B, S, H D] or [B, S, H, D], and B."""
    size = config.head_size

    def expected(shape: tuple[int, ...]) -> list[np.ndarray] | None:
        if len(shape) not in (3, 4) or shape[1] != config.positions or both % shape[0]:
            return None
        if math.prod(shape) != both * config.positions * size:
            return None
        numbers = np.arange(math.prod(shape)).reshape(shape[0], config.positions, -1, size).transpose(0, 2, 3, 1)
        ends = np.cumsum([height * width for height, width in zip(config.heights, config.widths, strict=True)])
        levels = np.split(numbers, ends[:-1], -1)
        sizes = zip(levels, config.heights, config.widths, strict=True)
        return [level.reshape(both, size, height, width) for level, height, width in sizes]

    source = _common([traces(node.inputs[0], shapes, widened=True) for node in group.samples], shapes, expected)
    if source is None:
        raise RefusedError("its levels are not one tensor of values, one behind the other with all heads")
    return source, shapes[str(source.name)][0]


def _places(group: Group, config: DeformableConfig, batch: int, shapes: Shapes) -> ir.Value:
    """What holds the grids of all levels, [B, Q, ...]."""

    def expected(shape: tuple[int, ...]) -> list[np.ndarray] | None:
        if shape[:2] != (batch, config.queries):
            return None
        if math.prod(shape) != batch * config.queries * config.heads * config.samples * 2:
            return None
        numbers = np.arange(math.prod(shape)).reshape(batch, config.queries, config.heads, config.samples, 2)
        turned = numbers.swapaxes(1, 2).reshape(-1, config.queries, config.samples, 2)
        return np.split(turned, np.cumsum(config.points)[:-1], 2)

    source = _common([traces(node.inputs[1], shapes, widened=True) for node in group.samples], shapes, expected)
    if source is None:
        raise RefusedError("its places are not one tensor by query, head, level and point")
    return source


def _located(grid: ir.Value) -> tuple[ir.Value, bool]:
    """Where the grid is twice a place less one, that place; and whether it is."""
    for op_type, shift in (("Sub", 1.0), ("Add", -1.0)):
        doubled = _without(grid, op_type, shift)
        place = _without(doubled, "Mul", 2.0) if doubled is not None else None
        if place is not None and place.dtype == grid.dtype:
            return place, True
    return grid, False


def _without(value: ir.Value, op_type: str, number: float) -> ir.Value | None:
    """What a node of this type has together with the constant to give ``value``."""
    node = value.producer()
    if node is None or node.op_type != op_type or node.domain:
        return None
    sides = [(node.inputs[0], node.inputs[1])] + ([(node.inputs[1], node.inputs[0])] if op_type != "Sub" else [])
    for data, other in sides:
        array = constant(other)
        if data is not None and array is not None and array.size == 1 and float(array.item()) == number:
            return data if constant(data) is None else None
    return None


def _weights(group: Group, config: DeformableConfig, batch: int, shapes: Shapes) -> ir.Value:
    """What holds the weights, [B, Q, ...]."""
    others = [value for value in group.weigh.inputs if value is not group.joined]
    if len(others) != 1 or constant(others[0]) is not None:
        raise RefusedError(f"{group.weigh.name} does not multiply by computed weights")
    full = (batch * config.heads, 1, config.queries, config.samples)

    def expected(shape: tuple[int, ...]) -> list[np.ndarray] | None:
        if shape[:2] != (batch, config.queries) or math.prod(shape) != math.prod(full):
            return None
        numbers = np.arange(math.prod(full)).reshape(batch, config.queries, config.heads, config.samples)
        return [numbers.swapaxes(1, 2).reshape(full)]

    source = _common([traces(others[0], shapes, widened=True)], shapes, expected)
    if source is None:
        raise RefusedError("its weights are not one tensor by query, head, level and point")
    return source


def _check_join(group: Group, config: DeformableConfig, batch: int, shapes: Shapes) -> None:
    """Refuse samples that the Mul does not read as [B H, D, Q, P], level after level."""
    rows = (batch * config.heads, config.head_size, config.queries)
    numbers, first = [], 0
    for count in config.points:
        numbers.append(first + np.arange(math.prod(rows) * count).reshape(*rows, count))
        first += math.prod(rows) * count
    expected = np.concatenate(numbers, -1)
    parts = []
    for node, own in zip(group.samples, numbers, strict=True):
        end = behind(node.outputs[0], shapes)[-1]
        reads = group.join if group.join is not None else group.weigh
        if not _only_for(end.source, reads):
            raise RefusedError(f"something else reads what {node.name} samples, or casts it")
        parts.append(own.reshape(-1)[end.places])
    whole = parts[0]
    if group.join is not None:
        whole = np.concatenate(parts, group.join.attributes.get_int("axis", 0))
        end = behind(group.join.outputs[0], shapes)[-1]
        whole = whole.reshape(-1)[end.places]
        if not _only_for(end.source, group.weigh):
            raise RefusedError("its samples are cast behind where they are joined")
    if not np.array_equal(whole, expected):
        raise RefusedError("its samples are not joined level after level")


def _only_for(value: ir.Value, node: ir.Node) -> bool:
    """Whether one node alone reads a value."""
    uses = list(value.uses())
    return len(uses) == 1 and uses[0].node is node and not value.is_graph_output()


def _summed(group: Group, shapes: Shapes) -> ir.Value:
    """The sum over all points."""
    product = group.weigh.outputs[0]
    uses = list(product.uses())
    node = uses[0].node if len(uses) == 1 and not product.is_graph_output() else None
    axes = constant(node.inputs[1]) if node is not None and len(node.inputs) > 1 else None
    last = len(shapes.get(str(product.name), ())) - 1
    if node is None or node.op_type != "ReduceSum" or axes is None or axes.tolist() not in ([-1], [last]):
        raise RefusedError("its weighted samples are not summed over the points alone")
    return node.outputs[0]


def _end(total: ir.Value, config: DeformableConfig, batch: int, shapes: Shapes) -> ir.Value:
    """The last value behind the sum that is [B, Q, H D]."""
    rows = (batch, config.heads, config.head_size, config.queries)
    expected = np.arange(math.prod(rows)).reshape(rows).transpose(0, 3, 1, 2).reshape(batch, config.queries, -1)
    fitting = [trace.source for trace in behind(total, shapes) if np.array_equal(trace.places, expected)]
    if not fitting:
        raise RefusedError("its heads are not joined behind it in the order that the kernel writes")
    return fitting[-1]


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
