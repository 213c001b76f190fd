"""``audit.json``: a fusion audit as it is kept, with the sentences that people read and what fails the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resvit_engines.audit.findings import AttentionAudit, Fate, FusionAudit, Moved, PairAudit, Subject
from resvit_engines.audit.kernel_totals import KernelTotals
from resvit_engines.audit.text import failures_of, refuse_unfused, sentences_of
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.records import Record


@dataclass(frozen=True)
class PairRecord:
    """A Q/DQ pair: its tensor and precision, its fate, the kernel that only quantises it, and all readers.

    ``readers`` hold node, operator, fate and kernel.
    """

    tensor: str
    precision: str
    weight: bool
    fate: Fate
    quantized_alone_by: str
    readers: tuple[tuple[str, str, Fate, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "tensor": self.tensor,
            "precision": self.precision,
            "weight": self.weight,
            "fate": self.fate.value,
            "quantized_alone_by": self.quantized_alone_by,
            "readers": [
                {"node": node, "op": op, "fate": fate.value, "kernel": kernel}
                for node, op, fate, kernel in self.readers
            ],
        }

    @classmethod
    def from_json(cls, record: Record) -> PairRecord:
        """What :meth:`to_json` wrote."""
        return cls(
            record.text("tensor"),
            record.text("precision"),
            record.flag("weight"),
            record.choice("fate", Fate),
            record.text("quantized_alone_by"),
            tuple(
                (reader.text("node"), reader.text("op"), reader.choice("fate", Fate), reader.text("kernel"))
                for reader in record.records("readers")
            ),
        )


@dataclass(frozen=True)
class AttentionRecord:
    """An attention block and what became of it; ``breaches`` hold rule, problem and mend.

    ``fused`` is None where the listing does not show it; ``lengths`` are those of queries and keys, None where they
    are dynamic, like ``head_size``.
    """

    name: str
    fused: bool | None
    kernel: str
    precision: str
    kernels: int
    moves: int
    head_size: int | None
    lengths: tuple[int | None, int | None]
    mask: str
    expected_precision: str
    breaches: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "fused": self.fused,
            "kernel": self.kernel,
            "precision": self.precision,
            "kernels": self.kernels,
            "moves": self.moves,
            "head_size": self.head_size,
            "lengths": list(self.lengths),
            "mask": self.mask,
            "expected_precision": self.expected_precision,
            "breaches": [{"rule": rule, "problem": problem, "mend": mend} for rule, problem, mend in self.breaches],
        }

    @classmethod
    def from_json(cls, record: Record) -> AttentionRecord:
        """What :meth:`to_json` wrote."""
        query, key = record.wholes_or_none("lengths", 2)
        return cls(
            record.text("name"),
            record.optional("fused", record.flag),
            record.text("kernel"),
            record.text("precision"),
            record.whole("kernels"),
            record.whole("moves"),
            record.optional("head_size", record.whole),
            (query, key),
            record.text("mask"),
            record.text("expected_precision"),
            tuple((item.text("rule"), item.text("problem"), item.text("mend")) for item in record.records("breaches")),
        )


@dataclass(frozen=True)
class AuditRecord:
    """What ``audit.json`` holds of an audit; ``failures`` are problems, each with what would mend it."""

    subject: Subject
    pairs: tuple[PairRecord, ...]
    attention: tuple[AttentionRecord, ...]
    reformats: tuple[Moved, ...]
    fp32: tuple[Moved, ...]
    plugins_expected: tuple[str, ...]
    plugins_missing: tuple[str, ...]
    plugin_layers: int
    totals: KernelTotals
    fp16: KernelTotals | None
    sentences: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]

    def require_fused(self) -> None:
        """The gate of ``--require-fused``; raises REJECTED where something did not fuse."""
        refuse_unfused(self.failures, self.subject.stands_in)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.subject.target,
            "sm": self.subject.sm,
            "builder": self.subject.builder,
            "builder_version": self.subject.version,
            "batch": self.subject.batch,
            "stands_in": self.subject.stands_in,
            "predicted": self.subject.predicted,
            "pairs": [pair.to_json() for pair in self.pairs],
            "attention": [block.to_json() for block in self.attention],
            "reformats": [_moved_to_json(moved) for moved in self.reformats],
            "fp32": [_moved_to_json(moved) for moved in self.fp32],
            "plugins": {
                "expected": list(self.plugins_expected),
                "missing": list(self.plugins_missing),
                "layers_found": self.plugin_layers,
            },
            "totals": self.totals.to_json(),
            "fp16": self.fp16.to_json() if self.fp16 else None,
            "sentences": list(self.sentences),
            "fused": not self.failures,
            "failures": [{"problem": problem, "mend": mend} for problem, mend in self.failures],
        }

    @classmethod
    def from_json(cls, record: Record) -> AuditRecord:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        plugins = record.record("plugins")
        fp16 = record.optional("fp16", record.record)
        return cls(
            Subject(
                record.text("target"),
                record.optional("sm", record.whole),
                record.text("builder"),
                record.text("builder_version"),
                record.whole("batch", 1),
                record.text("stands_in"),
                record.flag("predicted"),
            ),
            tuple(PairRecord.from_json(item) for item in record.records("pairs")),
            tuple(AttentionRecord.from_json(item) for item in record.records("attention")),
            tuple(_moved_from_json(item) for item in record.records("reformats")),
            tuple(_moved_from_json(item) for item in record.records("fp32")),
            plugins.texts("expected"),
            plugins.texts("missing"),
            plugins.whole("layers_found"),
            KernelTotals.from_json(record.record("totals")),
            KernelTotals.from_json(fp16) if fp16 else None,
            record.texts("sentences"),
            tuple((item.text("problem"), item.text("mend")) for item in record.records("failures")),
        )


@dataclass(frozen=True)
class SkippedAudit:
    """In place of an audit: why there is none for the target of this name."""

    target: str
    why: str

    @property
    def sentences(self) -> tuple[str, ...]:
        """The same for people."""
        return (f"Not audited: {self.why}",)

    def require_fused(self) -> None:
        """The gate of ``--require-fused``; raises MISSING, since nothing could be audited."""
        raise ResvitError(
            f"--require-fused cannot be answered: {self.why}",
            "Install what is missing, or leave --require-fused out.",
            ExitCode.MISSING,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"target": self.target, "skipped": self.why, "sentences": list(self.sentences), "failures": []}


def record_of(audit: FusionAudit, notes: Sequence[str] = ()) -> AuditRecord:
    """What is kept of an audit; ``notes`` join its sentences."""
    return AuditRecord(
        audit.subject,
        tuple(_pair(pair) for pair in audit.pairs),
        tuple(_attention(block) for block in audit.attention),
        audit.reformats,
        audit.fp32,
        tuple(plugin.node for plugin in audit.plugins_expected),
        tuple(plugin.node for plugin in audit.plugins_missing),
        audit.plugin_layers,
        audit.totals,
        audit.fp16,
        (*sentences_of(audit), *notes),
        failures_of(audit),
    )


def audit_from_json(document: Mapping[str, Any], where: str) -> AuditRecord | SkippedAudit:
    """What an ``audit.json`` holds; ``where`` names it in errors.

    Raises:
        ResvitError: INPUT, naming the key, where it is malformed.
    """
    record = Record(document, where)
    why = record.optional("skipped", record.text)
    return AuditRecord.from_json(record) if why is None else SkippedAudit(record.text("target"), why)


def _pair(audit: PairAudit) -> PairRecord:
    readers = tuple((reader.node, reader.op, fate, kernel) for reader, fate, kernel in audit.readers)
    pair = audit.pair
    return PairRecord(pair.tensor, pair.precision, pair.weight, audit.fate, audit.alone, readers)


def _attention(audit: AttentionAudit) -> AttentionRecord:
    block = audit.block
    return AttentionRecord(
        block.name,
        audit.fused,
        audit.kernel,
        audit.precision,
        audit.kernels,
        audit.moves,
        block.head_size,
        (block.query_length, block.key_length),
        block.mask,
        block.precision,
        tuple((breach.rule, breach.problem, breach.mend) for breach in audit.breaches),
    )


def _moved_to_json(moved: Moved) -> dict[str, Any]:
    return {"kernel": moved.kernel, "what": moved.what, "bytes": moved.bytes, "layers": list(moved.layers)}


def _moved_from_json(record: Record) -> Moved:
    return Moved(
        record.text("kernel"), record.text("what"), record.optional("bytes", record.whole), record.texts("layers")
    )
