"""What became of the network: folds, groups, nodes kept in high precision, sizes; ready to be laid out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resvit_export.report.layout import wording
from resvit_export.report.layout.data import ReportData

if TYPE_CHECKING:
    from resvit_quantize.qdq.report import QuantizeReport

_ORDER = ("stem", "trunk", "bridge", "transformer", "head")
_NO_REASON = "no reason given"


@dataclass(frozen=True)
class Share:
    """A bar: ``whole`` % of the network, of which ``part`` (also % of the network) is quantised."""

    whole: float
    part: float
    text: str
    detail: str


@dataclass(frozen=True)
class GroupRow:
    """One group of the network."""

    name: str
    macs: Share
    nodes: Share


@dataclass(frozen=True)
class Kept:
    """Nodes that stay in high precision for one and the same reason."""

    reason: str
    count: str
    macs: str
    nodes: list[tuple[str, str, str]]
    """Name, what it is, precision."""


@dataclass(frozen=True)
class HeldBackRows:
    """What was compared on held-back images: rows (way, SQNR, arg-max alike, gain), and what was taken."""

    images: str
    rows: list[tuple[str, str, str, str]]
    taken: str
    mended: list[tuple[str, str, str]]
    """Layers left in FP16: name, share of the noise, share of the arithmetic."""
    note: str


@dataclass(frozen=True)
class Bar:
    """A size; ``width`` in % of the largest."""

    name: str
    text: str
    ratio: str
    width: float


def groups_from_quantize(quantize: QuantizeReport) -> list[GroupRow]:
    """Compare the groups by their share of the whole network's multiply-accumulates and nodes."""
    groups = quantize.groups
    names = [name for name in _ORDER if name in groups] + sorted(set(groups) - set(_ORDER))
    macs = sum(group.macs for group in groups.values())
    nodes = sum(group.nodes for group in groups.values())
    rows = []
    for name in names:
        group = groups[name]
        rows.append(
            GroupRow(
                name=name,
                macs=_share(group.quantized_macs, group.macs, macs, True),
                nodes=_share(group.quantized_nodes, group.nodes, nodes, False),
            )
        )
    return rows


def kept_from_quantize(quantize: QuantizeReport) -> list[Kept]:
    """Gather the nodes that were left in FP16 or FP32 by reason, the most arithmetic first."""
    by_reason: dict[str, list[tuple[str, str, str, int]]] = {}
    named = set()
    for node in quantize.nodes:
        if node.precision == quantize.precision:
            continue
        named.add(node.name)
        entry = (node.name, f"{node.op} in the {node.group}", node.precision.upper(), node.macs)
        by_reason.setdefault(node.reason or _NO_REASON, []).append(entry)
    for kept_float in quantize.fp32:
        if kept_float.name not in named:
            by_reason.setdefault(kept_float.reason or _NO_REASON, []).append((kept_float.name, "", "FP32", 0))
    total = sum(group.macs for group in quantize.groups.values())
    # The groups count weighted products only; the products inside attention come on top.
    total += sum(node.macs for node in quantize.nodes if not node.weighted)
    ordered = sorted(by_reason.items(), key=lambda item: (-sum(n[3] for n in item[1]), -len(item[1]), item[0]))
    kept = []
    for reason, nodes in ordered:
        macs = sum(node[3] for node in nodes)
        share = f"{wording.small_percent(macs / total)} of the arithmetic" if macs and total else ""
        kept.append(Kept(reason, wording.plural(len(nodes), "node"), share, [node[:3] for node in nodes]))
    return kept


def held_back_from_quantize(quantize: QuantizeReport) -> HeldBackRows | None:
    """Our methods beside plain ranges on held-back images; None where nothing was compared."""
    check = quantize.held_back
    if check is None or not check.tried:
        return None
    rows = [
        (
            item.what if item.images == check.images else f"{item.what} (the first {item.images} images)",
            f"{item.sqnr_db:.1f} dB",
            "" if item.agreement is None else wording.percent(item.agreement, 1),
            "" if not index else f"{item.gain_db:+.1f} ± {item.noise_db:.1f} dB",
        )
        for index, item in enumerate(check.tried)
    ]
    images = wording.plural(check.images, "calibration image")
    how = "each half judged by ranges of the other" if check.by_halves else "from which no range was taken"
    mended = [(item.node, wording.percent(item.noise, 0), wording.small_percent(item.macs)) for item in check.mended]
    return HeldBackRows(f"{images}, {how}", rows, check.taken, mended, check.note)


def sizes_from_run(data: ReportData) -> list[Bar]:
    """Compare the files; each ratio is against the first (the float ONNX)."""
    known = [(name, count) for name, count in (data.sizes or _written(data)).items() if count]
    largest = max((count for _, count in known), default=0)
    first = known[0][1] if known else 0
    bars = []
    for index, (name, count) in enumerate(known):
        ratio = "" if index == 0 else f"{count / first * 100:.0f}% of the float ONNX"
        bars.append(Bar(name[:1].upper() + name[1:], wording.size(count), ratio, round(100 * count / largest, 2)))
    return bars


def _written(data: ReportData) -> Mapping[str, int]:
    """The sizes that the stages wrote down."""
    sizes = {"Float ONNX": data.export.bytes} if data.export else {}
    if data.quantize:
        sizes["Float ONNX"] = data.quantize.bytes_before
        sizes[f"{data.quantize.precision.upper()} ONNX"] = data.quantize.bytes_after
    if data.engine:
        sizes["Engine"] = data.engine.bytes
    return sizes


def folds_from_run(data: ReportData) -> list[tuple[str, str, Sequence[str]]]:
    """Count the folds by kind, with where each was."""
    items = data.fold.items if data.fold else ()
    counts = Counter(item.kind for item in items)
    return [
        (
            kind.replace("_", " "),
            wording.plural(count, "place"),
            [item.where for item in items if item.kind == kind],
        )
        for kind, count in counts.most_common()
    ]


def facts_from_run(data: ReportData) -> list[tuple[str, str]]:
    """List what the float network is and how exactly each step kept its outputs."""
    facts = []
    if export := data.export:
        for what, (name, shape) in (("Input", export.input), *(("Output", output) for output in export.outputs)):
            facts.append((what, f"{name}, {wording.shape(shape)}"))
        facts.append(("Parameters", f"{export.parameters:,}"))
        facts.append(("ONNX", f"opset {export.opset}, {wording.plural(export.nodes, 'node')}"))
        against = "ONNX against PyTorch" if data.fold else "Canonical form against your ONNX"
        facts.append((against, _errors(export.parity_max_abs, export.parity_max_rel)))
    if data.fold:
        facts.append(("After folding against before", _errors(data.fold.max_abs_error, data.fold.max_rel_error)))
    if recover := data.recover:
        images = wording.plural(recover.images, "image")
        facts.append(("Recovery", f"trained on {images}; the loss is of {recover.objective}"))
    if data.quantize:
        facts.append(("Quantiser", data.quantize.quantizer))
        facts.append(("Range estimator", data.quantize.estimator))
    return facts


def _errors(absolute: float, relative: float) -> str:
    large, part = wording.significant(absolute, 2), wording.significant(relative, 2)
    return f"largest difference {large} ({part} relative)"


def _share(part: int, whole: int, total: int, operations: bool) -> Share:
    if not total:
        return Share(0.0, 0.0, wording.NOTHING, "")
    count = wording.operations if operations else "{:,}".format
    inside = wording.percent(part / whole, 0) if whole else wording.NOTHING
    detail = f"{count(part)} of {count(whole)}"
    return Share(round(100 * whole / total, 2), round(100 * part / total, 2), inside, detail)


@dataclass(frozen=True)
class Costs:
    """What is said about predicted speed: sentences, and rows (layer, precision, microseconds, noise to signal)."""

    sentences: list[str]
    raised: list[tuple[str, str, str, str]]


def costs_from_run(data: ReportData) -> Costs | None:
    """The predicted gain over FP16, and what the search left in a higher precision."""
    if data.costs is None:
        return None
    found = data.search
    return Costs(
        [
            *([data.speed.sentence] if data.speed else ()),
            *_left_cost(data),
            *(found.sentences if found else ()),
        ],
        [
            (item.node, item.precision.value.upper(), wording.number(item.costs_us, 2), f"{item.saves:.1e}")
            for item in (found.raised if found else ())
        ],
    )


def _left_cost(data: ReportData) -> list[str]:
    """What the head and the layers out of line take in FP16, by the prediction."""
    if data.costs is None or data.quantize is None:
        return []
    found, chosen = data.quantize, data.costs.chosen
    head = {node.name for node in found.nodes if (node.group, node.weighted, node.precision) == ("head", True, "fp16")}
    timed = {layer.name: layer.total_us for layer in chosen.layers}
    mended = {item.node for item in found.held_back.mended} if found.held_back else set()
    said = []
    for why, names in (("as heads", head), ("because their error is out of line", mended)):
        each = [timed[name] for name in names if name in timed]
        taken = sum(each)
        if each:
            said.append(
                f"Left in FP16 {why}: {wording.plural(len(each), 'layer')}, "
                f"{wording.number(taken, 1)} of {wording.number(chosen.total_us, 1)} µs."
            )
    return said
