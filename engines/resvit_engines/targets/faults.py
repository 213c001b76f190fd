"""Known faults of TensorRT: what passes its builder and answers wrongly, by release and by what a graph contains.

Every row rests on a public issue. ``resvit_export.to_tensorrt.fault_patterns`` finds the patterns in a graph;
``docs/faults.md`` shows these rows.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from resvit_engines.targets.choice import tensorrts_of
from resvit_engines.targets.software import JETPACKS, version_of
from resvit_engines.targets.table import Builder, Kind, Target


class Pattern(str, enum.Enum):
    """What a graph contains that some TensorRT computes wrongly."""

    SAMPLING_WORDS = "GridSample in opset 20's words"
    """``mode`` is ``linear`` or ``cubic``."""
    DEFORMABLE = "deformable attention by GridSample"
    """Samples of each level, multiplied by weights and summed."""
    ATTENTION = "attention"
    """A softmax between two products of computed tensors, or ``Attention``."""
    BOTH_SCALED = "attention with queries and keys scaled apart"
    """As PyTorch exports ``scaled_dot_product_attention``: both times the root of the scale."""
    REDUCED_KEYS = "attention with keys from a strided convolution"
    """SegFormer's and PVT's spatial reduction."""
    CONSTANT_QUERY = "attention with constant queries"
    """SigLIP's pooling head."""
    SHARED_INPUT = "several products of one LayerNorm"
    """Q, K and V as layers of their own."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Fault:
    """One row. ``first`` and ``last`` are the TensorRT releases taken to have it, ``seen`` those that reports name.

    ``fixed`` is the first release known to be right, None where none is. ``sms`` are the GPUs that it was seen on, None
    for any; ``batch`` bounds the profile's largest batch for which it matters. ``rewritten`` says what the copy for
    TensorRT has in place of the pattern, from ``first`` to ``last``; empty where there is no such copy. ``way_out`` is
    what helps beside a release without the fault.
    """

    pattern: Pattern
    first: str
    last: str
    seen: str
    fixed: str | None
    what: str
    way_out: str
    references: tuple[str, ...]
    sms: frozenset[int] | None = None
    batch: tuple[int, int | None] = (1, None)
    rewritten: str = ""

    def is_in(self, tensorrt: str) -> bool:
        """Whether a release is taken to have it."""
        return version_of(self.first)[:2] <= version_of(tensorrt)[:2] <= version_of(self.last)[:2]

    def threatens(self, tensorrt: str, sm: int) -> bool:
        """Whether a release may have it on a GPU: from the first on, up to one that is known to be right."""
        here = version_of(tensorrt)[:2]
        right = self.fixed is not None and here >= version_of(self.fixed)[:2]
        return here >= version_of(self.first)[:2] and not right and (self.sms is None or sm in self.sms)

    def matters_at(self, largest_batch: int) -> bool:
        """Whether it shows in a profile with this largest batch."""
        return self.batch[0] <= largest_batch and (self.batch[1] is None or largest_batch <= self.batch[1])


FAULTS: tuple[Fault, ...] = (
    Fault(
        Pattern.SAMPLING_WORDS,
        "10.0",
        "11.4",
        "10.13, 11.1",
        None,
        "it samples the nearest pixel and says nothing: its parser knows only the words of opset 16",
        "",
        ("NVIDIA/TensorRT#4646", "onnx/onnx-tensorrt#1060"),
        rewritten="the words of opset 16",
    ),
    Fault(
        Pattern.DEFORMABLE,
        "10.14",
        "11.1",
        "10.14, 11.1",
        None,
        "DETR-like decoders lose most detections, in FP32 too",
        "compare detections on the device",
        ("NVIDIA/TensorRT#4813",),
        rewritten="GatherND",
    ),
    Fault(
        Pattern.ATTENTION,
        "10.3",
        "10.4",
        "10.3, 10.4",
        "10.5",
        "features of transformers (DINOv2 and v3, Depth Anything) come out wrong, in FP16 and in FP32",
        "",
        ("NVIDIA/TensorRT#4419", "NVIDIA/TensorRT#4723", "NVIDIA/TensorRT#4742"),
    ),
    Fault(
        Pattern.BOTH_SCALED,
        "10.7",
        "11.4",
        "10.7",
        None,
        "fused attention gives large errors, in FP32 too",
        "",
        ("NVIDIA/TensorRT#4333", "NVIDIA/TensorRT#4328"),
        rewritten="the whole scale on the queries",
    ),
    Fault(
        Pattern.REDUCED_KEYS,
        "10.11",
        "11.1",
        "10.11, 11.1",
        None,
        "SegFormer answers wrongly for batches above 1, in FP32 too; batch 1 is exact",
        "--batch 1; the golden outputs, checked at every batch of the profile, tell",
        ("NVIDIA/TensorRT#4853",),
        batch=(2, None),
    ),
    Fault(
        Pattern.ATTENTION,
        "10.16",
        "10.16",
        "10.16.1",
        None,
        "fused attention in FP16 and BF16 gives wrong answers; FP32 is exact",
        "--plugins on (attention is then a kernel of our own)",
        ("NVIDIA/TensorRT#4837",),
        sms=frozenset({120}),
    ),
    Fault(
        Pattern.CONSTANT_QUERY,
        "10.3",
        "10.16",
        "10.x, release not named",
        None,
        "SigLIP's features are far off in FP16 (cosine 0.65)",
        "the golden outputs, checked on the device, tell",
        ("NVIDIA/TensorRT#4373",),
    ),
    Fault(
        Pattern.SHARED_INPUT,
        "10.13",
        "10.13",
        "10.13.3, in language models",
        None,
        "layers that read one LayerNorm are joined and come out wrong where the largest batch is 1",
        "--batch 1:1:2",
        ("NVIDIA/TensorRT-Edge-LLM#151", "NVIDIA/TensorRT-Edge-LLM#105"),
        sms=frozenset({110}),
        batch=(1, 1),
    ),
)  # fmt: skip


def faults_of(target: Target) -> tuple[Fault, ...]:
    """What the TensorRT of a target may do wrong on its GPU; of TensorRT for RTX no fault is known."""
    if target.builder is not Builder.TENSORRT:
        return ()
    return tuple(fault for fault in FAULTS if fault.threatens(target.tensorrt, target.sm))


def is_rewritten(target: Target, pattern: Pattern) -> bool:
    """Whether the copy for the target's TensorRT has something else in place of the pattern."""
    return any(fault.pattern is pattern and _is_avoided(fault, target) for fault in faults_of(target))


def open_faults(
    target: Target, patterns: Collection[Pattern], largest_batch: int = 1, *, copied: bool = False
) -> tuple[Fault, ...]:
    """The faults that a graph with these patterns may meet, those left out that the copy for TensorRT avoids.

    In such a copy (``copied``) what is there still is not avoided.
    """
    return tuple(
        fault
        for fault in faults_of(target)
        if fault.pattern in patterns and fault.matters_at(largest_batch) and (copied or not _is_avoided(fault, target))
    )


def warnings_for(
    target: Target, patterns: Mapping[Pattern, Sequence[str]], largest_batch: int = 1, *, copied: bool = False
) -> tuple[str, ...]:
    """A sentence or two for every fault that a graph, or the copy for TensorRT, may meet on ``target``.

    ``patterns`` holds the names of the nodes for each pattern that the graph contains.
    """
    found = open_faults(target, patterns, largest_batch, copied=copied)
    clean = releases_without(target, patterns, largest_batch) if found else ()
    return tuple(_sentence(fault, target, patterns[fault.pattern], clean) for fault in found)


def releases_without(target: Target, patterns: Collection[Pattern], largest_batch: int = 1) -> tuple[str, ...]:
    """How to get a TensorRT on that GPU without the faults: options, or the JetPack to flash; the nearest first."""
    return tuple(_clean_releases(target, patterns, largest_batch))


def _clean_releases(target: Target, patterns: Collection[Pattern], largest_batch: int) -> Iterator[str]:
    def clean(version: str) -> bool:
        return not open_faults(dataclasses.replace(target, tensorrt=version), patterns, largest_batch)

    here = version_of(target.tensorrt)[:2]
    others = sorted(
        (version_of(version)[:2], version) for version in tensorrts_of(target) if version_of(version)[:2] != here
    )
    newer = [version for release, version in others if release > here and clean(version)]
    older = [version for release, version in reversed(others) if release < here and clean(version)]
    if newer or older:
        yield f"--tensorrt {(newer or older)[0]}"
    if target.kind is Kind.JETSON:
        for row in JETPACKS:
            served = not row.refusal and target.name in row.modules and row.version != target.jetpack
            if served and row.tensorrt != target.tensorrt and clean(row.tensorrt):
                yield f"--jetpack {row.version}, whose image has TensorRT {row.tensorrt}"


def _is_avoided(fault: Fault, target: Target) -> bool:
    return bool(fault.rewritten) and fault.is_in(target.tensorrt)


def _sentence(fault: Fault, target: Target, nodes: Sequence[str], clean: Sequence[str]) -> str:
    where = f"{nodes[0]} and {len(nodes) - 1} more" if len(nodes) > 1 else nodes[0] if nodes else "the graph"
    later = "" if fault.is_in(target.tensorrt) else ", and no later release is known to be right"
    text = (
        f"TensorRT {target.tensorrt} may answer wrongly here: with {fault.pattern} ({where}), {fault.what} "
        f"(seen in {fault.seen}{later}; {', '.join(fault.references)})."
    )
    return f"{text} Way out: {', or '.join([*filter(None, [fault.way_out]), *clean])}."
