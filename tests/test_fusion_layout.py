"""Chains of views run on numbers: what is said of where elements come from is what ONNX Runtime does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from fusion_graphs import computed, graph_of
from resvit_quantize.fusion.layout import BATCH, behind, traces
from resvit_quantize.graph.shapes import static_shapes

START = (BATCH, 6, 4, 5)


class Chain:
    """Random views, one behind the other, with the constants that they read."""

    def __init__(self, seed: int, length: int, *, whole: bool = False) -> None:
        self.random = np.random.default_rng(seed)
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}
        self.shape, self.value = START, "x"
        kinds = [self.reshape, self.transpose, self.squeeze, self.flatten, self.identity]
        kinds += [] if whole else [self.slice, self.split, self.gather, self.picked]
        for _ in range(length):
            kinds[self.random.integers(len(kinds))]()

    def add(self, text: str, shape: tuple[int, ...], **constants: object) -> None:
        at = len(self.lines)
        names = {name: f"{name}{at}" for name in constants}
        self.constants |= {names[name]: value for name, value in constants.items()}
        self.lines.append(text.format(out=f"v{at}", x=self.value, more=f"w{at}", **names))
        self.value, self.shape = f"v{at}", shape

    def axis(self) -> tuple[int, int]:
        """An axis longer than 1, as it may be written (from the end, or not), and as it is."""
        longer = [axis for axis, size in enumerate(self.shape) if size > 1] or [0]
        axis = int(self.random.choice(longer))
        return (axis - len(self.shape) if self.random.random() < 0.5 else axis), axis

    def reshape(self) -> None:
        size = int(np.prod(self.shape))
        shape = []
        while size > 1 and len(shape) < 4:
            factor = int(self.random.choice([n for n in range(1, size + 1) if size % n == 0]))
            shape.append(factor)
            size //= factor
        shape.append(size)
        written = list(shape)
        written[self.random.integers(len(shape))] = -1
        self.add("{out} = Reshape ({x}, {target})", tuple(shape), target=written)

    def transpose(self) -> None:
        perm = [int(axis) for axis in self.random.permutation(len(self.shape))]
        self.add(f"{{out}} = Transpose <perm = {perm}> ({{x}})", tuple(self.shape[axis] for axis in perm))

    def squeeze(self) -> None:
        place = int(self.random.integers(len(self.shape) + 1))
        shape = (*self.shape[:place], 1, *self.shape[place:])
        self.add("{out} = Unsqueeze ({x}, {axes})", shape, axes=[place])
        if self.random.random() < 0.5:
            self.add("{out} = Squeeze ({x}, {axes})", (*shape[:place], *shape[place + 1 :]), axes=[place - len(shape)])

    def flatten(self) -> None:
        axis = int(self.random.integers(len(self.shape) + 1))
        shape = (int(np.prod(self.shape[:axis])), int(np.prod(self.shape[axis:])))
        self.add(f"{{out}} = Flatten <axis = {axis}> ({{x}})", shape)

    def identity(self) -> None:
        self.add("{out} = Identity ({x})", self.shape)

    def slice(self) -> None:
        written, axis = self.axis()
        size = self.shape[axis]
        start, stop = sorted(int(n) for n in self.random.integers(0, size, 2))
        step = int(self.random.choice([1, 2, -1]))
        ends = [start, stop + 1] if step > 0 else [stop, start - 1 if start else -(2**63)]
        if step > 0 and self.random.random() < 0.3:
            ends = [start - size, 2**63 - 1]
        length = len(range(size)[slice(*ends, step)])
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        self.add(
            "{out} = Slice ({x}, {starts}, {ends}, {axes}, {steps})",
            shape, starts=[ends[0]], ends=[ends[1]], axes=[written], steps=[step],
        )  # fmt: skip

    def split(self) -> None:
        written, axis = self.axis()
        size = self.shape[axis]
        first = int(self.random.integers(1, size)) if size > 1 else 1
        if size == 1:
            return
        order = ["{out}, {more}", "{more}, {out}"][self.random.integers(2)]
        kept = first if order.startswith("{out}") else size - first
        shape = (*self.shape[:axis], kept, *self.shape[axis + 1 :])
        self.add(f"{order} = Split <axis = {written}> ({{x}}, {{sizes}})", shape, sizes=[first, size - first])

    def gather(self) -> None:
        written, axis = self.axis()
        size = self.shape[axis]
        index = np.asarray(self.random.integers(-size, size, 3))
        shape = (*self.shape[:axis], 3, *self.shape[axis + 1 :])
        self.add(f"{{out}} = Gather <axis = {written}> ({{x}}, {{index}})", shape, index=index)

    def picked(self) -> None:
        """One of an axis, which is then gone."""
        if len(self.shape) < 2:
            return
        written, axis = self.axis()
        index = np.array(self.random.integers(self.shape[axis]))
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        self.add(f"{{out}} = Gather <axis = {written}> ({{x}}, {{index}})", shape, index=index)

    def model(self) -> ir.Model:
        sizes = ",".join(map(str, self.shape))
        return graph_of(
            "\n".join([*self.lines, f"y = Identity ({self.value})"]),
            f"float[{','.join(map(str, START))}] x",
            f"float[{sizes}] y",
            **self.constants,
        )


NUMBERS = np.arange(np.prod(START), dtype=np.float32).reshape(START)


@pytest.mark.whole
@pytest.mark.parametrize("seed", range(60))
def test_a_value_is_traced_to_all_that_it_is_a_view_of(seed: int) -> None:
    model = Chain(seed, 1 + seed % 8).model()
    end = model.graph.outputs[0]
    found = traces(end, static_shapes(model, BATCH))
    assert found[-1].source is model.graph.inputs[0]
    sources = [trace.source for trace in found]
    model.graph.outputs.extend(source for source in sources[1:-1] if source not in model.graph.outputs)
    arrays = computed(model, x=NUMBERS)
    values = dict(zip(model.graph.outputs, arrays, strict=True)) | {model.graph.inputs[0]: NUMBERS}
    assert len(found) == 1 + len([node for node in model.graph if node.op_type])
    for trace in found:
        assert np.array_equal(values[trace.source].reshape(-1)[trace.places], values[end])


@pytest.mark.whole
@pytest.mark.parametrize("seed", range(60))
def test_the_views_of_a_value_are_followed(seed: int) -> None:
    model = Chain(seed, 1 + seed % 8).model()
    start = model.graph.inputs[0]
    found = behind(start, static_shapes(model, BATCH))
    # A split gives two values, and is the end of what is followed.
    kinds = [node.op_type for node in model.graph]
    assert len(found) == 1 + (kinds.index("Split") if "Split" in kinds else len(kinds))
    model.graph.outputs.extend(trace.source for trace in found[1:] if not trace.source.is_graph_output())
    values = dict(zip(model.graph.outputs, computed(model, x=NUMBERS), strict=True)) | {start: NUMBERS}
    for trace in found:
        assert np.array_equal(NUMBERS.reshape(-1)[trace.places], values[trace.source])


@pytest.mark.parametrize("seed", range(12))
def test_scalings_are_passed_where_they_are_named(seed: int) -> None:
    """Half of a chain, a factor, the other half: the elements stay in place, and what lies between is left out."""
    chain = Chain(seed, 3, whole=True)
    split = len(chain.lines)
    chain.add("{out} = Mul ({x}, {factor})", chain.shape, factor=np.float32(0.5))
    for _ in range(3):
        [chain.reshape, chain.transpose, chain.squeeze][chain.random.integers(3)]()
    model = chain.model()
    end, shapes = model.graph.outputs[0], static_shapes(model, BATCH)
    (scaling,) = (node for node in model.graph if node.op_type == "Mul")
    found = traces(end, shapes, [scaling])
    assert found[-1].source is model.graph.inputs[0]
    assert len(found) == split + 1
    assert np.array_equal(0.5 * NUMBERS.reshape(-1)[found[-1].places], computed(model, x=NUMBERS)[0])
    # Without its name, it is the end.
    assert traces(end, shapes)[-1].source is scaling.outputs[0]


def test_what_moves_by_data_is_the_end() -> None:
    lines = "a = Gather <axis = 1> (x, i)\ny = Transpose <perm = [1, 0]> (a)"
    model = graph_of(lines, "float[2,6] x, int64[3] i", "float[3,2] y")
    found = traces(model.graph.outputs[0], static_shapes(model, BATCH))
    assert [str(trace.source.name) for trace in found] == ["y", "a"]


def test_another_type_is_another_value() -> None:
    lines = "a = Transpose <perm = [1, 0]> (x)\nb = Cast <to = 10> (a)\ny = Transpose <perm = [1, 0]> (b)"
    model = graph_of(lines, "float[2,6] x", "float16[2,6] y")
    shapes = static_shapes(model, BATCH)
    assert [str(trace.source.name) for trace in traces(model.graph.outputs[0], shapes)] == ["y", "b"]
    assert [str(trace.source.name) for trace in behind(model.graph.inputs[0], shapes)] == ["x", "a"]


def test_a_value_of_unknown_shape_is_the_end() -> None:
    model = graph_of("a = Identity (x)\ny = Reshape (a, s)", "float[2,M] x, int64[2] s", "float[P,Q] y")
    found = traces(model.graph.outputs[0], static_shapes(model, BATCH))
    assert found == []
