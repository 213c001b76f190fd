"""Attention, found in a graph: pattern and check; a refusal carries its reason. ``attention_node`` rewrites it.

The pattern is the one that ``regions`` finds: an ``Attention`` node, or two products of computed tensors with a softmax
between. The check asks where the elements of Q, K and V lie in the projection's output, by running the views between
on numbers, and whether the kernel serves what it finds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resvit_engines.kernels.attention import LAYOUTS, THREE_TENSORS, AttentionConfig, parts_of
from resvit_engines.kernels.numerics import FLOATS
from resvit_quantize.fusion.layout import BATCH, Shapes, Traced, behind, traces
from resvit_quantize.fusion.match import RefusedError, quantised_behind, type_of
from resvit_quantize.graph.network import constant
from resvit_quantize.graph.regions import AttentionBlock, is_guard, is_view, next_in_chain

_CALM = frozenset({"Cast", "Dropout", "Identity"})
_UNSEEN = -1e4
"""What stands for minus infinity: far below any other logit, it leaves a share of zero in FP32."""


@dataclass(frozen=True, eq=False)
class Attention:
    """A block that can become one node: ``inputs`` of the node, ``end`` the value that its output replaces."""

    config: AttentionConfig
    inputs: tuple[ir.Value, ...]
    sequence_first: bool
    """Whether the inputs are [N, B, C], as PyTorch's ``nn.MultiheadAttention`` computes them."""
    bias: ir.Value | None
    """FP16, BF16 or FP32; or boolean, where True is a key that is seen."""
    end: ir.Value
    end_sequence_first: bool
    end_view: tuple[int, ...] | None
    """The shape of ``end`` behind its first dimension, where it is another than what the kernel writes."""
    quantizer: ir.Node | None
    """Where ``end`` is only read in 8 bits: the QuantizeLinear that the node takes in."""
    block: AttentionBlock

    @property
    def before(self) -> ir.Node:
        """The last node that the new one replaces: it comes in front of that."""
        last = self.quantizer or self.end.producer()
        assert last is not None
        return last


def attention_of(block: AttentionBlock, shapes: Shapes) -> Attention:
    """Check one block.

    Raises:
        RefusedError: with the reason why it cannot be one node.
    """
    q, k, v = _operands(block)
    kind = type_of(q)
    if kind not in FLOATS:
        raise RefusedError(f"its operands are {kind.upper()}, and the kernel multiplies FP16 or BF16")
    first = block.products[0].node
    whole = first.op_type == "Attention"
    inside = [] if whole else [first, *(node for node, _ in _between(block))]
    if any(node.outputs[0].is_graph_output() for node in inside):
        raise RefusedError("its logits or shares are an output of the model")
    heads, lengths, sizes = _sizes(block, (q, k, v), shapes)
    config = AttentionConfig(
        heads=heads,
        head_size=sizes[0],
        value_size=sizes[1],
        scale=_scale(block, sizes[0]),
        queries=lengths[0],
        keys=lengths[1],
        dtype=kind,
        out_dtype=kind,
        pv=kind,
    )
    through = [node for node in block.nodes if node.op_type in ("Mul", "Div")]
    seen = [traces(value, shapes, through) for value in (q, k, v)]
    config, inputs, sequence_first = _layout(config, seen, shapes, transposed=not whole)
    _check_between(block, config.keys, shapes)
    bias, logits = _added(block)
    if bias is not None and _changes_nothing(bias):
        bias = None
    if bias is not None:
        dtype = kind if type_of(bias) == "bool" else type_of(bias)
        config = dataclasses.replace(config, bias=_differs(bias, logits, config, shapes), bias_dtype=dtype)
    end, end_sequence_first, end_view = _end(block, config, shapes)
    narrow = quantised_behind(end)
    # What is rearranged behind it has to be INT8 or wider: ONNX Runtime neither transposes nor reshapes FP8.
    if narrow is not None and narrow.dtype == "fp8" and (end_sequence_first or end_view is not None):
        narrow = None
    if narrow is not None:
        config = dataclasses.replace(config, out_dtype=narrow.dtype, out_scale=narrow.scale)
    quantizer = narrow.node if narrow else None
    return Attention(config, inputs, sequence_first, bias, end, end_sequence_first, end_view, quantizer, block)


def _operands(block: AttentionBlock) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Q, K and V as the products read them."""
    first, last = block.products[0].node, block.products[-1].node
    if first is last:
        operands = list(first.inputs[:3])
    else:
        chain = _between(block)
        logits = chain[-1][0].outputs[0]
        operands = [*first.inputs[:2], next((v for v in last.inputs[:2] if v is not logits), None)]
        if last.inputs[0] is not logits:
            raise RefusedError("the shares are not the left operand of the second product")
    q, k, v = operands
    if q is None or k is None or v is None or len({q, k, v}) < 3:
        raise RefusedError("it does not read three tensors")
    return q, k, v


def _sizes(
    block: AttentionBlock, operands: tuple[ir.Value, ir.Value, ir.Value], shapes: Shapes
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Heads, lengths of queries and keys, sizes of a head of Q and K and of V."""
    node = block.products[0].node
    q, k, v = (shapes.get(str(value.name)) for value in operands)
    if q is None or k is None or v is None:
        raise RefusedError("a length depends on data")
    if node.op_type == "Attention":
        if len(q) == 4:
            return q[1], (q[2], k[2]), (q[3], v[3])
        heads = node.attributes.get_int("q_num_heads", 0)
        if not heads or node.attributes.get_int("kv_num_heads", heads) != heads:
            raise RefusedError("keys have fewer heads than queries")
        return heads, (q[1], k[1]), (q[2] // heads, v[2] // heads)
    if len(q) not in (3, 4) or len(k) != len(q) or len(v) != len(q):
        raise RefusedError(f"its operands have {len(q)} dimensions")
    # With three dimensions, batch and heads are one; the layout tells how many heads there are.
    return q[1] if len(q) == 4 else 0, (q[-2], k[-1]), (q[-1], v[-1])


def _scale(block: AttentionBlock, head_size: int) -> float:
    """What Q K^T is multiplied by."""
    node = block.products[0].node
    if node.op_type == "Attention":
        for name in ("softcap", "qk_matmul_output_mode", "softmax_precision"):
            plain = (0, 1) if name == "softmax_precision" else (0,)
            if node.attributes.get(name) is not None and node.attributes[name].value not in plain:
                raise RefusedError(f"it sets {name}")
        if node.attributes.get_int("is_causal", 0):
            raise RefusedError("it is causal")
        if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
            raise RefusedError("it keeps keys and values for later")
        return float(node.attributes.get_float("scale", 1 / math.sqrt(head_size)))
    scale, after = 1.0, False
    for inner in block.nodes:
        after = after or inner.op_type == "Softmax"
        if inner.op_type not in ("Mul", "Div"):
            continue
        factor = next((array for value in inner.inputs if (array := constant(value)) is not None), None)
        if after:
            raise RefusedError(f"{inner.name} scales its shares")
        if factor is None or factor.size != 1:
            raise RefusedError(f"{inner.name} scales by more than one number")
        if inner.op_type == "Div" and constant(inner.inputs[1]) is None:
            raise RefusedError(f"{inner.name} divides by what is computed")
        scale = scale * float(factor.item()) if inner.op_type == "Mul" else scale / float(factor.item())
    return scale


def _layout(
    config: AttentionConfig, seen: list[list[Traced]], shapes: Shapes, *, transposed: bool
) -> tuple[AttentionConfig, tuple[ir.Value, ...], bool]:
    """Where Q, K and V lie: in one tensor that the kernel knows a layout of, in two or in three.

    The last of the result is whether tokens come before the batch in them.

    Raises:
        RefusedError: where they lie otherwise.
    """
    if not all(seen):
        raise RefusedError("where its operands come from cannot be told")
    for sequence_first in (False, True):
        for layout in LAYOUTS:
            for sources in _alike(seen, layout):
                fitting = _in_layout(config, layout, sources, shapes, transposed, sequence_first)
                if fitting is not None:
                    values = tuple(trace.source for trace in sources)
                    return fitting, values if layout in THREE_TENSORS else values[:1], sequence_first
    raise RefusedError("queries, keys and values lie in memory in an order that no layout of the kernel has")


def _alike(seen: list[list[Traced]], layout: str) -> Iterator[tuple[Traced, Traced, Traced]]:
    """Q, K and V as seen from one value, from any three, or K and V from one; the farthest first."""
    for q in reversed(seen[0]):
        for k in reversed(seen[1]):
            for v in reversed(seen[2]):
                one, pair = q.source is k.source is v.source, k.source is v.source
                if (
                    (layout == "split" and not pair)
                    or (layout == "q_kv" and pair)
                    or (layout not in THREE_TENSORS and one)
                ):
                    yield q, k, v


def _in_layout(
    config: AttentionConfig,
    layout: str,
    seen: tuple[Traced, Traced, Traced],
    shapes: Shapes,
    transposed: bool,
    sequence_first: bool,
) -> AttentionConfig | None:
    """The configuration with this layout, if the elements lie so; a tensor's leading dimensions may be joined."""
    dk, dv = config.head_size, config.value_size
    whole = [shapes[str(trace.source.name)] for trace in seen]
    units = {"split": (dk, dk, dv), "q_kv": (dk, dk + dv, dk + dv)}.get(layout, (2 * dk + dv,) * 3)
    channels = layout == "channels"
    if any(len(shape) < 2 for shape in whole) or (channels and len(whole[0]) != 4):
        return None
    if sequence_first and (channels or any(len(shape) != 3 or shape[1] != BATCH for shape in whole)):
        return None
    heads, left = divmod(whole[0][1 if channels else -1], units[0])
    if left or not heads or (config.heads and heads != config.heads):
        return None
    if layout not in THREE_TENSORS and config.queries != config.keys:
        return None
    tensors = []
    for shape, unit, tokens in zip(whole, units, (config.queries, config.keys, config.keys), strict=True):
        size = math.prod(shape)
        if (shape[1 if channels else -1]) != heads * unit or size % (tokens * heads * unit):
            return None
        if channels and math.prod(shape[2:]) != tokens:
            return None
        numbers = np.arange(size).reshape(shape)
        if sequence_first:
            numbers = numbers.swapaxes(0, 1)
        tensors.append(numbers if channels else numbers.reshape(-1, tokens, heads * unit))
    area = (whole[0][2], whole[0][3]) if channels else None
    fitting = dataclasses.replace(config, layout=layout, heads=heads, area=area)
    expected = parts_of(fitting, *(tensors if layout in THREE_TENSORS else tensors[:1]))
    for index, (trace, wanted) in enumerate(zip(seen, expected, strict=True)):
        turned = wanted.swapaxes(-1, -2) if transposed and index == 1 else wanted
        if not transposed and trace.places.ndim == 3:  # an Attention of three dimensions joins the heads itself
            turned = wanted.swapaxes(1, 2)
        if trace.places.size != turned.size or not np.array_equal(trace.places.reshape(turned.shape), turned):
            return None
    return fitting


def _check_between(block: AttentionBlock, keys: int, shapes: Shapes) -> None:
    """Refuse all but one softmax over the keys, and views that leave every element in its row.

    A view that keeps the order of the elements, and gives the softmax rows of as many as there are keys, does.
    """
    if block.products[0].node.op_type == "Attention":
        return
    softmaxes = 0
    for node, came in _between(block):
        moves = node.op_type in ("Transpose", "Gather", "Slice", "Split")
        if moves or (node.op_type == "Cast" and type_of(node.outputs[0]) not in (*FLOATS, "fp32")):
            raise RefusedError(f"{node.op_type} ({node.name}) stands between its products")
        if node.op_type == "Softmax":
            shape = shapes.get(str(came.name), ())
            if node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1) or shape[-1:] != (keys,):
                raise RefusedError("its softmax is not one over the keys")
            softmaxes += 1
        if softmaxes > 1:
            raise RefusedError("more than one softmax stands between its products")


def _added(block: AttentionBlock) -> tuple[ir.Value | None, ir.Value | None]:
    """The bias that is added to the logits, or the mask that they are seen through, and the logits that it meets.

    The first is None where there is neither, the second for an ``Attention`` node.
    """
    node = block.products[0].node
    if node.op_type == "Attention":
        return node.inputs[3] if len(node.inputs) > 3 else None, None
    bias: ir.Value | None = None
    logits: ir.Value | None = None
    chain = _between(block)
    for index, (inner, came) in enumerate(chain):
        if inner.op_type in ("MatMul", "Softmax", "Mul", "Div") or inner.op_type in _CALM or is_view(inner):
            continue
        if is_guard(inner, came):
            continue
        others = [value for value in inner.inputs if value is not None and value is not came]
        adds = inner.op_type == "Add" and len(others) == 1
        if not (adds or _hides(inner, came)) or bias is not None:
            raise RefusedError(f"{inner.op_type} ({inner.name}) stands between its products")
        bias, logits = others[0], came
        if any(earlier.op_type == "Softmax" for earlier, _ in chain[:index]):
            raise RefusedError("something is added after the softmax")
        if any(later.op_type in ("Mul", "Div") for later, _ in chain[index + 1 :]):
            raise RefusedError("its bias is scaled after it was added")
    return bias, logits


def _hides(node: ir.Node, logits: ir.Value) -> bool:
    """Whether a node keeps the logits where its first input is True, and makes shares of zero elsewhere.

    Where a row is left nothing, a finite number in place of minus infinity gives equal shares and ours zeros.
    """
    if node.op_type != "Where" or node.inputs[1] is not logits:
        return False
    unseen = constant(node.inputs[2])
    return unseen is not None and unseen.size == 1 and bool(unseen.item() <= _UNSEEN)


def _changes_nothing(bias: ir.Value) -> bool:
    """Whether a mask lets all be seen, or a bias is zero, all told by constants: HuggingFace's models export such."""
    value: ir.Value | None = bias
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Expand", "Identity", "Reshape", "Unsqueeze"):
            return False
        value = node.inputs[0]
    array = constant(value)
    return array is not None and bool(np.all(array) if array.dtype == bool else not np.any(array))


def _between(block: AttentionBlock) -> list[tuple[ir.Node, ir.Value]]:
    """The nodes from Q K^T to P V, each with the input by which the logits come."""
    chain: list[tuple[ir.Node, ir.Value]] = []
    value = block.products[0].node.outputs[0]
    last = block.products[-1].node
    while True:
        node = next_in_chain(value)
        assert node is not None  # ``regions`` came this way
        if node is last:
            return chain
        chain.append((node, value))
        value = node.outputs[0]


def _differs(
    value: ir.Value, logits: ir.Value | None, config: AttentionConfig, shapes: Shapes
) -> tuple[bool, bool, bool]:
    """Whether a bias or mask, broadcast to [B, H, Nq, Nk], differs by batch, head and query.

    ``logits`` have that shape, which None says too, or [B H, Nq, Nk].
    """
    shape, met = shapes.get(str(value.name)), shapes.get(str(logits.name)) if logits is not None else None
    if shape is None:
        raise RefusedError("the shape of its bias depends on data")
    rows = (config.heads, config.queries, config.keys)
    batch = math.prod(met) // math.prod(rows) if met is not None else max(BATCH, shape[0] if len(shape) == 4 else 1)
    whole = (batch, *rows)
    full = (*(1 for _ in range(4 - len(shape))), *shape)
    if met == (batch * config.heads, *rows[1:]) and len(shape) == 3 and shape[0] != 1:
        full = (batch, config.heads, *shape[1:]) if shape[0] == met[0] else full
    elif met is not None and met not in (whole, (batch * config.heads, *rows[1:])):
        raise RefusedError(f"its bias meets logits of the shape {list(met)}")
    if len(full) != 4 or full[3] != config.keys or any(a not in (1, b) for a, b in zip(full, whole, strict=True)):
        raise RefusedError(f"its bias or mask has the shape {list(shape)}")
    by_batch, by_head, by_row = (size != 1 for size in full[:3])
    return by_batch, by_head, by_row


def _end(
    block: AttentionBlock, config: AttentionConfig, shapes: Shapes
) -> tuple[ir.Value, bool, tuple[int, ...] | None]:
    """The last value behind P V that holds what the kernel writes.

    Also whether it does with tokens before the batch, and its shape behind the first dimension where that is another.
    """
    heads, dv, out = config.heads, config.value_size, block.output
    end: tuple[ir.Value, bool, tuple[int, ...] | None] | None = None
    for trace in behind(out, shapes):
        if trace.places.size != math.prod(shapes[str(out.name)]):
            break
        batch = trace.places.size // (heads * dv * config.queries)
        numbers = np.arange(trace.places.size)
        mixed = numbers.reshape(batch, heads, config.queries, dv).swapaxes(1, 2)
        if block.products[0].node.op_type == "Attention" and len(shapes[str(out.name)]) == 3:
            mixed = numbers.reshape(batch, config.queries, heads, dv)
        wanted = mixed.reshape(batch, config.queries, heads * dv)
        if config.layout == "channels":
            wanted = wanted.swapaxes(1, 2).reshape(batch, heads * dv, *(config.area or ()))
        for turned in (False, True):
            if turned and config.layout == "channels":
                continue
            expected = wanted.swapaxes(0, 1) if turned else wanted
            if not np.array_equal(trace.places.reshape(-1), expected.reshape(-1)):
                continue
            same = trace.places.shape == expected.shape
            # Tokens may be joined with the batch, or lie in rows and columns of a window.
            if same or (config.layout != "channels" and _has_fixed_rows(trace.source, heads * dv)):
                end = trace.source, turned, None if same else trace.places.shape[1:]
            break
    if end is None:
        raise RefusedError("its heads are not joined behind it in the order that the kernel writes")
    return end


def _has_fixed_rows(value: ir.Value, channels: int) -> bool:
    """Whether only the first dimension may depend on the batch, and the last is that of all heads together."""
    shape = value.shape
    return (
        shape is not None
        and len(shape) >= 2
        and shape[-1] == channels
        and all(isinstance(size, int) for size in shape[1:])
    )
