"""What the compiler made of the graph: which Q/DQ and which attention fused, held against what the graph asks for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from resvit_engines.audit.attention_rules import breaches_of
from resvit_engines.audit.expectation import Attention, Consumer, Expectation, QdqPair
from resvit_engines.audit.findings import AttentionAudit, Fate, FusionAudit, Moved, PairAudit, Subject
from resvit_engines.audit.kernel_totals import PRODUCTS, kernel_totals
from resvit_engines.audit.kernels import EIGHT_BITS, Kernel, Operation

_OPAQUE = ("myelin",)
"""Layer types that hold kernels which the listing does not show."""


def audit_engine(
    subject: Subject,
    expectation: Expectation,
    kernels: Sequence[Kernel],
    io_names: Collection[str],
    fp16: Sequence[Kernel] | None = None,
) -> FusionAudit:
    """Compare the kernels of an engine with what its ONNX asks for.

    ``io_names`` are the network's inputs and outputs, which may be FP32. ``fp16`` are the kernels of the FP16 engine
    of the same network, batch and builder.
    """
    by_node: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for layer in kernel.layers:
            by_node.setdefault(layer, []).append(kernel)
    plugins = [kernel for kernel in kernels if kernel.operation is Operation.PLUGIN]
    named = {name for kernel in plugins for name in (kernel.name, *kernel.layers)}
    return FusionAudit(
        subject=subject,
        pairs=tuple(_pair(pair, by_node) for pair in expectation.pairs),
        attention=tuple(_attention(block, by_node) for block in expectation.attention),
        reformats=tuple(
            _moved(kernel, movement_of(kernel)) for kernel in kernels if kernel.operation is Operation.REFORMAT
        ),
        fp32=tuple(_moved(kernel, what) for kernel in kernels if (what := _full_precision(kernel, io_names))),
        plugins_expected=expectation.plugins,
        plugins_missing=tuple(plugin for plugin in expectation.plugins if plugin.node not in named),
        plugin_layers=len(plugins),
        totals=kernel_totals(kernels),
        fp16=kernel_totals(fp16) if fp16 is not None else None,
    )


def _pair(pair: QdqPair, by_node: dict[str, list[Kernel]]) -> PairAudit:
    quantizers = by_node.get(pair.quantize, []) if pair.quantize else []
    alone = quantizers[0].name if quantizers and all(k.operation is Operation.REFORMAT for k in quantizers) else ""
    return PairAudit(pair, tuple((reader, *_fate(pair, reader, by_node)) for reader in pair.consumers), alone)


def _fate(pair: QdqPair, reader: Consumer, by_node: dict[str, list[Kernel]]) -> tuple[Fate, str]:
    """What happened at one reader, and the kernel that tells."""
    computing = [kernel for kernel in by_node.get(reader.node, []) if kernel.operation is not Operation.REFORMAT]
    dequantizers = by_node.get(pair.dequantize, [])
    if reader.product:
        products = [kernel for kernel in computing if kernel.operation in PRODUCTS] or computing
        eight = next((kernel for kernel in products if kernel.precision in EIGHT_BITS), None)
        if eight is not None:
            return Fate.CONSUMED, eight.name
    else:
        products = computing
        shared = [kernel for kernel in computing if kernel in dequantizers]
        if shared:
            reads = next((kernel for kernel in shared if EIGHT_BITS & {*kernel.inputs}), None)
            return (Fate.CONSUMED, reads.name) if reads else (Fate.INSIDE, shared[0].name)
        reads = next((kernel for kernel in computing if EIGHT_BITS & {*kernel.inputs}), None)
        if reads and not dequantizers:
            return Fate.CONSUMED, reads.name
    own = [k for k in dequantizers if k.operation is Operation.REFORMAT and not EIGHT_BITS & {*k.outputs}]
    if own:
        return Fate.SEPARATE, own[0].name
    if reader.product and products:
        return Fate.HIGHER, products[0].name
    return Fate.UNLISTED, ""


def _attention(block: Attention, by_node: dict[str, list[Kernel]]) -> AttentionAudit:
    touching = list(dict.fromkeys(kernel for node in block.nodes for kernel in by_node.get(node, [])))
    ends = {block.nodes[0], block.nodes[-1]}
    opaque = [kernel for kernel in touching if kernel.type.lower() in _OPAQUE]
    whole = [k for k in touching if k.operation is Operation.ATTENTION]
    if not whole and not block.whole:
        candidates = [k for k in touching if k.operation is not Operation.REFORMAT and k not in opaque]
        whole = [k for k in candidates if ends <= {*k.layers}]
    fused = True if whole else (None if opaque or not touching else False)
    return AttentionAudit(
        block,
        fused,
        whole[0].name if whole else "",
        whole[0].precision if whole else "",
        len(touching),
        sum(kernel.operation is Operation.REFORMAT for kernel in touching),
        () if fused else breaches_of(block),
    )


def movement_of(kernel: Kernel) -> str:
    """What a kernel that computes nothing does: quantises, dequantises, converts or moves."""
    reads, writes = {*kernel.inputs}, {*kernel.outputs}
    if EIGHT_BITS & writes and not EIGHT_BITS & reads:
        return "quantises"
    if EIGHT_BITS & reads and not EIGHT_BITS & writes:
        return "dequantises"
    return "moves" if reads == writes else "converts"


def _full_precision(kernel: Kernel, io_names: Collection[str]) -> str:
    """``reads FP32`` and so on, for tensors between kernels; empty where there is none."""
    sides = (("reads", kernel.inputs, kernel.input_names), ("writes", kernel.outputs, kernel.output_names))
    found = []
    for word, types, names in sides:
        known = names if len(names) == len(types) else ("",) * len(types)
        if any(dtype == "Float" and name not in io_names for dtype, name in zip(types, known, strict=True)):
            found.append(word)
    return f"{' and '.join(found)} FP32" if found else ""


def _moved(kernel: Kernel, what: str) -> Moved:
    return Moved(kernel.name, what, kernel.bytes_moved, kernel.layers)
