"""What became of the network: folds, groups, nodes kept in high precision, sizes; ready to be laid out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resvit_export.report.layout import wording
from resvit_export.report.layout.data import Json, ReportData

_ORDER = ("stem", "trunk", "bridge", "transformer", "head")


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
class Bar:
    """A size; ``width`` in % of the largest."""

    name: str
    text: str
    ratio: str
    width: float


def groups_from_quantize(quantize: Json) -> list[GroupRow]:
    """Compare the groups by their share of the whole network's multiply-accumulates and nodes."""
    groups: Json = quantize.get("groups") or {}
    names = [name for name in _ORDER if name in groups] + sorted(set(groups) - set(_ORDER))
    macs = sum(group.get("macs") or 0 for group in groups.values())
    nodes = sum(group.get("nodes") or 0 for group in groups.values())
    rows = []
    for name in names:
        group = groups[name]
        rows.append(
            GroupRow(
                name=name,
                macs=_share(group.get("quantized_macs") or 0, group.get("macs") or 0, macs, True),
                nodes=_share(group.get("quantized_nodes") or 0, group.get("nodes") or 0, nodes, False),
            )
        )
    return rows


def kept_from_quantize(quantize: Json) -> list[Kept]:
    """Gather the nodes that were left in FP16 or FP32 by reason, the most arithmetic first."""
    wanted = str(quantize.get("precision", "")).lower()
    by_reason: dict[str, list[tuple[str, str, str, int]]] = {}
    named = set()
    for node in quantize.get("nodes") or []:
        precision = str(node.get("precision", "")).lower()
        if precision == wanted:
            continue
        named.add(node["name"])
        what = " in the ".join(str(node[key]) for key in ("op", "group") if node.get(key))
        entry = (str(node["name"]), what, precision.upper(), int(node.get("macs") or 0))
        by_reason.setdefault(str(node.get("reason") or "no reason given"), []).append(entry)
    for node in quantize.get("fp32") or []:
        if node["name"] not in named:
            reason = str(node.get("reason") or "no reason given")
            by_reason.setdefault(reason, []).append((str(node["name"]), "", "FP32", 0))
    total = sum(group.get("macs") or 0 for group in (quantize.get("groups") or {}).values())
    # The groups count weighted products only; the products inside attention come on top.
    total += sum(node.get("macs") or 0 for node in quantize.get("nodes") or () if not node.get("weighted", True))
    ordered = sorted(by_reason.items(), key=lambda item: (-sum(n[3] for n in item[1]), -len(item[1]), item[0]))
    kept = []
    for reason, nodes in ordered:
        macs = sum(node[3] for node in nodes)
        share = f"{wording.small_percent(macs / total)} of the arithmetic" if macs and total else ""
        kept.append(Kept(reason, wording.plural(len(nodes), "node"), share, [node[:3] for node in nodes]))
    return kept


def sizes_from_run(data: ReportData) -> list[Bar]:
    """Compare the files; each ratio is against the first (the float ONNX)."""
    quantize, export, engine = data.quantize or {}, data.export or {}, data.engine or {}
    sizes: dict[str, Any] = (
        dict(data.sizes)
        if data.sizes
        else {
            "Float ONNX": quantize.get("bytes_before") or export.get("bytes"),
            f"{str(quantize.get('precision', '')).upper()} ONNX": quantize.get("bytes_after"),
            "Engine": engine.get("bytes"),
        }
    )
    known = [(name, int(count)) for name, count in sizes.items() if count]
    largest = max((count for _, count in known), default=0)
    first = known[0][1] if known else 0
    bars = []
    for index, (name, count) in enumerate(known):
        ratio = "" if index == 0 else f"{count / first * 100:.0f}% of the float ONNX"
        bars.append(Bar(name[:1].upper() + name[1:], wording.size(count), ratio, round(100 * count / largest, 2)))
    return bars


def folds_from_run(data: ReportData) -> list[tuple[str, str, Sequence[str]]]:
    """Count the folds by kind, with where each was."""
    items = (data.fold or {}).get("items") or []
    counts = Counter(str(item["kind"]) for item in items)
    return [
        (
            kind.replace("_", " "),
            wording.plural(count, "place"),
            [str(item["where"]) for item in items if str(item["kind"]) == kind],
        )
        for kind, count in counts.most_common()
    ]


def facts_from_run(data: ReportData) -> list[tuple[str, str]]:
    """List what the float network is and how exactly each step kept its outputs."""
    facts = []
    if export := data.export:
        for tensor in [export.get("input"), *(export.get("outputs") or [])]:
            if tensor:
                what = "Input" if tensor is export.get("input") else "Output"
                facts.append((what, f"{tensor.get('name', '')}, {wording.shape(tensor.get('shape'))}"))
        if export.get("parameters") is not None:
            facts.append(("Parameters", f"{export['parameters']:,}"))
        facts.append(("ONNX", f"opset {export.get('opset')}, {wording.plural(export.get('nodes') or 0, 'node')}"))
        if export.get("parity_max_abs") is not None:  # the model may have come as ONNX
            facts.append(("ONNX against PyTorch", _errors(export, "parity_max_abs", "parity_max_rel")))
    if data.fold:
        facts.append(("After folding against before", _errors(data.fold, "max_abs_error", "max_rel_error")))
    if quantize := data.quantize:
        facts.append(("Quantiser", wording.plain(quantize.get("quantizer"))))
        facts.append(("Range estimator", wording.plain(quantize.get("estimator"))))
    return facts


def _errors(report: Json, absolute: str, relative: str) -> str:
    large, part = wording.significant(report.get(absolute), 2), wording.significant(report.get(relative), 2)
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
    found = data.search or {}
    sentences = [str(data.costs["sentence"]), *found.get("sentences", ())]
    rows = [
        (item["node"], item["precision"].upper(), wording.number(item["costs_us"], 2), f"{item['saves']:.1e}")
        for item in found.get("raised", ())
    ]
    return Costs(sentences, rows)
