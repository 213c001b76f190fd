"""A fusion audit in sentences, and what of it fails ``--require-fused``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from resvit_engines.audit.findings import AttentionAudit, Fate, FusionAudit, Moved
from resvit_engines.errors import ExitCode, ResvitError

_SHOWN = 3
_PRECISIONS = {"Half": "FP16", "Float": "FP32", "BFloat16": "BF16", "Int8": "INT8"}
_NO_RULE = "it breaks no rule that is known"
_NO_RULE_MEND = "Try a higher --optimization-level; TensorRT's own choice on the device may differ"


def sentences_of(audit: FusionAudit) -> tuple[str, ...]:
    """The audit for people, one finding each; the most important first."""
    subject = audit.subject
    where = f"SM {subject.sm / 10:.1f}" if subject.sm else "its GPU"
    how = "Predicted by the rules of" if subject.predicted else "Audited as compiled by"
    first = f"{how} {subject.builder} {subject.version}".rstrip() + f" for {where}."
    return tuple(
        text
        for text in (
            f"{first} {subject.stands_in}".strip(),
            _beside_fp16(audit),
            _products(audit),
            *_pairs(audit),
            *_attention(audit.attention),
            _plugins(audit),
            _full_precision(audit),
            _reformats(audit),
        )
        if text
    )


def failures_of(audit: FusionAudit) -> tuple[tuple[str, str], ...]:
    """What did not fuse though the graph asks for it, each with what would mend it; empty if all did.

    Kernels that only quantise or move do not count: a layer in FP16 in front of one in 8 bits needs them.
    """
    found = [(_refusal(item), _mend(item)) for item in audit.attention if item.fused is False]
    slow = [node for node, consumed in audit.quantized_products.items() if not consumed]
    blocks = {node for item in audit.attention for node in item.block.nodes}
    outside = [node for node in slow if node not in blocks]
    if outside:
        what = "products are quantised but do" if len(outside) > 1 else "product is quantised but does"
        found.append(
            (
                f"{len(outside)} {what} not run in 8 bits: {_some(outside)}",
                "--exclude them, or quantise their weights as well",
            )
        )
    alone = [item.pair.tensor for item in audit.pairs if not item.pair.weight and item.fate is Fate.SEPARATE]
    if alone:
        found.append(
            (
                f"{len(alone)} of the activations' Q/DQ became kernels of their own: {_some(alone)}",
                "--exclude the layers that read them",
            )
        )
    if audit.plugins_missing:
        nodes = [plugin.node for plugin in audit.plugins_missing]
        found.append(
            (
                f"{len(nodes)} plugin layers are missing: {_some(nodes)}",
                "give the builder the plugin library; without it TensorRT builds the body of the function",
            )
        )
    return tuple(found)


def refuse_unfused(failures: Sequence[tuple[str, str]], stands_in: str = "") -> None:
    """The gate of ``--require-fused``, on failures as ``failures_of`` has them.

    Raises:
        ResvitError: REJECTED, with what did not fuse and what would mend it.
    """
    if not failures:
        return
    problems = "; ".join(problem for problem, _ in failures)
    mends = "; ".join(dict.fromkeys(mend for _, mend in failures))
    note = f" ({stands_in.rstrip('.')})" if stands_in else ""
    raise ResvitError(
        f"Not everything fused{note}: {problems}.",
        f"{mends[:1].upper()}{mends[1:]}. Without --require-fused the build goes on.",
        ExitCode.REJECTED,
    )


def _beside_fp16(audit: FusionAudit) -> str:
    totals, fp16 = audit.totals, audit.fp16
    per = "one image" if audit.subject.batch == 1 else f"a batch of {audit.subject.batch}"
    moved = _megabytes(totals.activation_bytes)
    own = (
        f"{totals.kernels} kernels move {moved} of activations for {per}, as an engine lists kernels and whole tensors"
    )
    if totals.unknown:
        own += f", without {totals.unknown} of them whose shapes or types are not told"
    if fp16 is None:
        return f"{own}."
    compared = f"{own}; the FP16 engine's {fp16.kernels} move {_megabytes(fp16.activation_bytes)}"
    if totals.unknown or fp16.unknown or not fp16.activation_bytes:
        return f"{compared}."
    ratio = totals.activation_bytes / fp16.activation_bytes
    verdict = "" if ratio < 1 else "; what 8 bits gain is in the products and weights alone"
    if ratio < 1 and totals.kernels > fp16.kernels:
        verdict = ", but in more kernels"
    return f"{compared} ({ratio:.2f} times as much{verdict})."


def _products(audit: FusionAudit) -> str:
    products = audit.quantized_products
    if not products:
        return ""
    slow = [node for node, consumed in products.items() if not consumed]
    text = f"{len(products) - len(slow)} of {len(products)} quantised products run in 8 bits"
    return f"{text}; not: {_some(slow)}." if slow else f"{text}."


def _pairs(audit: FusionAudit) -> list[str]:
    activations = [item for item in audit.pairs if not item.pair.weight]
    if not activations:
        return []
    by_fate = {fate: [item for item in activations if item.fate is fate] for fate in Fate}
    said = [f"{len(by_fate[Fate.CONSUMED])} of {len(activations)} activations' Q/DQ are consumed by 8-bit kernels"]
    for fate, text in (
        (Fate.INSIDE, "inside one kernel, which saves no bytes"),
        (Fate.HIGHER, "undone because the product runs in a higher precision"),
        (Fate.SEPARATE, "undone by a kernel of its own"),
        (Fate.UNLISTED, "named by no kernel"),
    ):
        if by_fate[fate]:
            said.append(f"{len(by_fate[fate])} {text} ({_some([item.pair.tensor for item in by_fate[fate]])})")
    found = ["; ".join(said) + "."]
    alone = [item.pair.tensor for item in activations if item.alone]
    if alone:
        kernels = len({item.alone for item in activations if item.alone})
        only = "1 kernel only quantises" if kernels == 1 else f"{kernels} kernels only quantise"
        found.append(f"{only}, because what is before does not write 8 bits: {_some(alone)}.")
    return found


def _attention(blocks: Sequence[AttentionAudit]) -> list[str]:
    if not blocks:
        return []
    fused = [item for item in blocks if item.fused]
    text = f"{len(fused)} of {len(blocks)} attention blocks run as one kernel"
    precisions = sorted({_PRECISIONS.get(item.precision, item.precision) for item in fused if item.precision})
    found = [f"{text}{f' ({_some(precisions)})' if precisions else ''}."]
    unknown = [item.block.name for item in blocks if item.fused is None]
    if unknown:
        found.append(f"The listing does not show what became of {_some(unknown)}.")
    groups: dict[tuple[str, str], list[str]] = {}
    for item in blocks:
        if item.fused is False:
            groups.setdefault((_why(item), _mend(item)), []).append(item.block.name)
    found += [f"Not one kernel: {_some(names)}: {why}; {mend}." for (why, mend), names in groups.items()]
    return found


def _why(item: AttentionAudit) -> str:
    return " and ".join(breach.problem for breach in item.breaches) or _NO_RULE


def _mend(item: AttentionAudit) -> str:
    return "; ".join(dict.fromkeys(breach.mend for breach in item.breaches)) or _NO_RULE_MEND


def _refusal(item: AttentionAudit) -> str:
    return f"attention {item.block.name} takes {item.kernels} kernels: {_why(item)}"


def _plugins(audit: FusionAudit) -> str:
    expected, missing = len(audit.plugins_expected), len(audit.plugins_missing)
    if not expected and not audit.plugin_layers:
        return ""
    text = f"{audit.plugin_layers} plugin layers found, {expected} expected"
    return f"{text}; missing: {_some([plugin.node for plugin in audit.plugins_missing])}." if missing else f"{text}."


def _full_precision(audit: FusionAudit) -> str:
    if not audit.fp32:
        return "No kernel reads or writes FP32 between layers."
    count = len(audit.fp32)
    verb = "kernel reads or writes" if count == 1 else "kernels read or write"
    return f"{count} {verb} FP32 between layers: {_some(_shared_layers(audit.fp32))}."


def _reformats(audit: FusionAudit) -> str:
    if not audit.reformats:
        return "No kernel only moves or converts data."
    kinds: dict[str, int] = {}
    for moved in audit.reformats:
        kinds[moved.what] = kinds.get(moved.what, 0) + 1
    size = sum(moved.bytes or 0 for moved in audit.reformats)
    each = ", ".join(f"{count} {what}" for what, count in sorted(kinds.items()))
    verb = "kernel computes" if len(audit.reformats) == 1 else "kernels compute"
    return f"{len(audit.reformats)} {verb} nothing ({each}): {_megabytes(size)}."


def _shared_layers(kernels: Sequence[Moved]) -> list[str]:
    """For each kernel the one of its nodes that most of these kernels name: what they have in common."""
    shares = Counter(layer for kernel in kernels for layer in kernel.layers)
    named = [max(kernel.layers, key=lambda layer: shares[layer], default=kernel.kernel) for kernel in kernels]
    return list(dict.fromkeys(named))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
