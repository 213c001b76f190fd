"""What TensorRT's ONNX parser reads: said when the graph is exported, not when a device refuses its bundle."""

from __future__ import annotations

from collections.abc import Iterable

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.table import Builder, Target

UNREAD = frozenset(
    [
        "AffineGrid",
        "Bernoulli",
        "BitCast",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "ConvInteger",
        "CumProd",
        "DFT",
        "Det",
        "DynamicQuantizeLinear",
        "ImageDecoder",
        "MatMulInteger",
        "MaxRoiPool",
        "MaxUnpool",
        "MelWeightMatrix",
        "Multinomial",
        "NegativeLogLikelihoodLoss",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "QLinearConv",
        "QLinearMatMul",
        "RegexFullMatch",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
        "SoftmaxCrossEntropyLoss",
        "SplitToSequence",
        "StringConcat",
        "StringNormalizer",
        "StringSplit",
        "SwiGLU",
        "TfIdfVectorizer",
        "Unique",
    ]
)
"""Standard operators that no parser from TensorRT 10.3 to TensorRT for RTX 1.7 imports."""
UNREAD_BY_RTX = UNREAD | {"DeformConv"}
"""TensorRT computes this one with a plugin, and TensorRT for RTX has none."""


def require_readable(operators: Iterable[str], target: Target | None) -> None:
    """Raise ``ResvitError`` (IMPOSSIBLE) for operators of the graph that the target's parser, if any, does not read."""
    if target is None or target.on_cpu:
        return
    unread = UNREAD_BY_RTX if target.builder is Builder.RTX else UNREAD
    wrong = sorted(set(operators) & unread)
    if not wrong:
        return
    fft = " A Fourier transform of one fixed size is a product with a constant matrix." if "DFT" in wrong else ""
    raise ResvitError(
        f"The graph holds {', '.join(wrong)}, which {target.software} cannot read: no engine for {target.title} comes "
        "of it.",
        f"Write that part of the network with other operations, or compute it outside of the network.{fft}",
        ExitCode.IMPOSSIBLE,
    )
