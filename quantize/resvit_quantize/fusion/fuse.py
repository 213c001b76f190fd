"""Parts of a graph that become one node of our own: a plugin where there is one, its plain computation elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from resvit_engines.kernels.attention import AttentionConfig
from resvit_engines.kernels.bridge import BridgeConfig
from resvit_engines.kernels.deformable import DeformableConfig
from resvit_engines.plugins.names import DOMAIN
from resvit_quantize.fusion import attention_node, bridge, deformable
from resvit_quantize.fusion.attention import attention_of
from resvit_quantize.fusion.functions import function_of
from resvit_quantize.fusion.layout import BATCH
from resvit_quantize.fusion.match import Config, FusionReport, Kind, Match, Refusal, RefusedError
from resvit_quantize.fusion.operands import Amax, insert, narrowed
from resvit_quantize.graph.analysis import analyse
from resvit_quantize.graph.network import opset_of
from resvit_quantize.graph.regions import AttentionBlock, attention_blocks
from resvit_quantize.graph.shapes import static_shapes

Decide = Callable[[Match], "str | None"]
"""A reason to leave a match alone; None to take it."""
Rewrite = Callable[[str], object]
"""Puts a node of the name given in place."""


@dataclass(frozen=True)
class Operands:
    """What attention multiplies in, if not what the graph has: ``int8`` or ``fp8``, and the clip of each tensor."""

    dtype: str
    amax: Amax


def fuse(
    model: ir.Model,
    kinds: frozenset[Kind] = frozenset(Kind),
    decide: Decide = lambda _: None,
    operands: Operands | None = None,
) -> FusionReport:
    """Rewrite, in place, every part of these kinds that fits and that ``decide`` has no reason to leave alone.

    Each becomes one node of the domain ``ai.resvit``, with a function of the same name in the model. With
    ``operands``, attention reads its queries, keys and values in 8 bits, and deformable attention its values.
    """
    matches: list[Match] = []
    refusals: list[Refusal] = []
    shapes = static_shapes(model, BATCH)
    for kind, name, check in _candidates(model, shapes, kinds, operands):
        try:
            match, rewrite = check()
            reason = decide(match)
            if reason is not None:
                raise RefusedError(reason)
        except RefusedError as error:
            refusals.append(Refusal(kind, name, str(error)))
            continue
        match = dataclasses.replace(match, name=_new_name(match.name, matches))
        rewrite(match.name)
        matches.append(match)
    if matches:
        common.RemoveUnusedNodesPass()(model)
        for op_type in dict.fromkeys(match.op_type for match in matches):
            function = function_of(op_type, opset_of(model))
            model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
        # Functions came with version 8.
        model.ir_version = max(model.ir_version or 0, 8)
    return FusionReport(tuple(matches), tuple(refusals))


def our_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes that ``fuse`` made, in order."""
    return (node for node in model.graph if node.domain == DOMAIN)


def config_of(node: ir.Node) -> Config:
    """The kernel's configuration of one of ``our_nodes``."""
    plain = json.loads(node.attributes.get_string("config", "{}"))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
    made = next(config for start, config in _CONFIGS.items() if node.op_type.startswith(start))
    return made(**values)


_CONFIGS: dict[str, type[Config]] = {
    "ResvitAttention": AttentionConfig,
    "ResvitBridge": BridgeConfig,
    "ResvitDeformable": DeformableConfig,
}


def _new_name(name: str, matches: list[Match]) -> str:
    """One module may hold several; TensorRT tells its layers by their names."""
    taken = {match.name for match in matches}
    names = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in taken else next(other for other in names if other not in taken)


def _candidates(
    model: ir.Model, shapes: dict[str, tuple[int, ...]], kinds: frozenset[Kind], operands: Operands | None
) -> Iterator[tuple[Kind, str, Callable[[], tuple[Match, Rewrite]]]]:
    """Everything of these kinds, fit or not: with its name, and with what checks it (and raises ``RefusedError``)."""
    if Kind.ATTENTION in kinds:
        for block in attention_blocks(analyse(model)):
            name = attention_node.name_of(block).rpartition("/")[0]
            yield Kind.ATTENTION, name, partial(_checked_attention, model, block, shapes, operands)
    if Kind.BRIDGE in kinds:
        for conv in [node for node in model.graph if bridge.is_bridge(node, shapes)]:
            yield Kind.BRIDGE, str(conv.name), partial(_checked_bridge, model, conv, shapes)
    if Kind.DEFORMABLE in kinds:
        for group in deformable.groups(model):
            yield (
                Kind.DEFORMABLE,
                deformable.module_of(group),
                partial(_checked_deformable, model, group, shapes, operands),
            )


def _checked_attention(
    model: ir.Model, block: AttentionBlock, shapes: dict[str, tuple[int, ...]], operands: Operands | None
) -> tuple[Match, Rewrite]:
    attention = attention_of(block, shapes)
    if operands is None:
        return attention_node.match_of(attention, shapes), lambda name: attention_node.rewrite(model, attention, name)
    narrow, factors = narrowed(attention, operands.amax, operands.dtype)
    return attention_node.match_of(narrow, shapes), lambda name: attention_node.rewrite(
        model, insert(model, narrow, factors), name
    )


def _checked_bridge(model: ir.Model, conv: ir.Node, shapes: dict[str, tuple[int, ...]]) -> tuple[Match, Rewrite]:
    part = bridge.bridge_of(conv, shapes)
    return bridge.match_of(part), lambda name: bridge.rewrite(model, part, name)


def _checked_deformable(
    model: ir.Model, group: deformable.Group, shapes: dict[str, tuple[int, ...]], operands: Operands | None
) -> tuple[Match, Rewrite]:
    part = deformable.deformable_of(group, shapes)
    if operands is not None:
        part = deformable.narrowed(part, operands.amax, operands.dtype)
    return deformable.match_of(part, shapes), lambda name: deformable.rewrite(model, part, name)
