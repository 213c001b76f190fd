"""How long a kernel of TensorRT's takes: rules with their sources, in one table.

A kernel takes a fixed time, and then about the longer of its arithmetic and its memory traffic (Williams, Waterman and
Patterson, "Roofline", CACM 52(4), 2009). A product is cut into tiles, one for each streaming multiprocessor at a time
(NVIDIA, "Matrix multiplication background user's guide": tile and wave quantization); as the builder times its tactics,
the fastest tile counts. The values were set on layers that NVIDIA published with their times, and stand the test of
being set on two networks and tried on the third: ``benchmarks/predictions.py``, results in
``benchmarks/results/predictions.md``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from resvit_engines.targets.layer_work import IMAGE_CHANNELS, Format, LayerKind, MatrixShape
from resvit_engines.targets.speeds import Speed

TILES = ((256, 128), (128, 128), (256, 64), (128, 64), (64, 64), (64, 32), (32, 32))
"""Rows and columns of the output that one thread block computes, as TensorRT's tactics name them (``128x64``)."""

DEPTH_BYTES = 64
"""Bytes of each row and column that a thread block takes in one step, in the same names."""

ALIGNED = {Format.INT8: 32, Format.FP8: 16, Format.FP16: 8, Format.FP32: 4}
"""Channels are padded to these multiples: TensorRT's vectorised formats (``kCHW32``, ``kHWC8``)."""

_WAVES = 2
"""From so many rounds of all multiprocessors on, an unfilled last round is lost only in part."""


@dataclass(frozen=True)
class TimeRules:
    """The values; each has its row in ``SOURCES``."""

    tile_half: float = 15.0
    step_us: float = 0.25
    overlap: float = 1.5
    product_memory: float = 1.0
    stream_memory: float = 0.75
    reformat_memory: float = 0.6
    image_memory: float = 0.25
    image_product: float = 0.6
    plain_product: float = 0.7
    fp32_add: float = 3.0
    linear_eight: float = 0.6
    attention: float = 0.5


TIME_RULES = TimeRules()

RATIO_ERROR = 0.15
"""How far off the gain of 8 bits over FP16 was told of real engines: at worst 0.11 of NVIDIA's, 0.15 of ResNets on an
Orin Nano, and more (0.28) of MobileNetV2 there."""

_PROFILES = (
    "NVIDIA/TensorRT, tools/experimental/trt-engine-explorer: ResNet-18 (A100), ResNet-50 (RTX 3090), "
    "MobileNetV2 (TITAN RTX), TensorRT 8"
)

SOURCES: dict[str, tuple[str, str]] = {
    "tile_half": (
        "A tile of m x n reaches h / (h + tile_half) of the tensor cores' peak, h = m n / (m + n): large ones read "
        "less",
        f"all products of {_PROFILES}",
    ),
    "step_us": (
        "A thread block takes at least so long for one step through the depth: small products wait for memory",
        "1x1 convolutions of 192 to 960 channels at 14x14 and 7x7, batch 1, in both MobileNetV2 engines",
    ),
    "overlap": (
        "Arithmetic c and traffic m together take (c^p + m^p)^(1/p): at p = 1 one after the other, at infinity hidden",
        f"all products of {_PROFILES}",
    ),
    "product_memory": ("Share of the bandwidth that a product's own traffic reaches", f"all products of {_PROFILES}"),
    "stream_memory": (
        "The same for pools, pads, norms and pointwise kernels",
        "max pools and pads of ResNet-18 and ResNet-50: 0.6 to 0.9",
    ),
    "reformat_memory": (
        "The same for kernels that only quantise, dequantise or change the layout",
        "QuantizeLinear and Reformat layers of ResNet-18 without residual Q/DQ (0.4 to 0.7) and of ResNet-50 in FP32 "
        "(0.65 to 0.85)",
    ),
    "image_memory": (
        "The same where the tensor is an image of three channels",
        "first layer of ResNet-18 (0.14 to 0.22) and of ResNet-50 (0.15 to 0.9): why an FP32 input costs 61 to 95 us",
    ),
    "image_product": (
        "Share of a tile's rate that convolutions of an image reach on tensor cores",
        "first convolution of ResNet-18 (FP16; INT8 with its max pool) and ResNet-50 (FP16)",
    ),
    "plain_product": (
        "Share of the plain cores' rate, for FP32 convolutions of an image, INT8 ones without a max pool (four "
        "products at once) and depthwise ones, which gain nothing in 8 bits but bytes",
        "first convolution of ResNet-18 (FP32; INT8 without residual Q/DQ), ResNet-50 (FP32, INT8) and MobileNetV2",
    ),
    "fp32_add": (
        "An 8-bit convolution that adds an FP32 shortcut and writes FP32 takes so many times the arithmetic",
        "layer4.1.conv2 of ResNet-18 with residual Q/DQ: 69.6 us, 28.7 where the shortcut has Q/DQ; "
        "MobileNetV2: 16.4 and 10.1",
    ),
    "linear_eight": (
        "Share of a tile's rate that linear layers (not convolutions) reach in 8 bits",
        "set on one engine: ViT-B/16, linear layers in INT8, Orin Nano, TensorRT 10.3: 4.92 against 5.68 ms in FP16 "
        "(onnxsim/onnxsim, scripts/nvidia/README.md). FP8 on Thor gains as little: 20% (NVIDIA/TensorRT issue 4599)",
    ),
    "attention": (
        "Share of the peak that fused attention reaches",
        "an estimate: no listing with times was found; held to ViT-B/16 in FP16 on Orin Nano as a whole",
    ),
}
"""By the rule's name: what it says, and the layers that it was read from."""


@dataclass(frozen=True)
class KernelWork:
    """One kernel: what it multiplies in, its multiply-accumulates, and the bytes that it reads and writes."""

    kind: LayerKind
    multiplies: Format
    macs: int
    activation_bytes: int
    weight_bytes: int = 0
    shape: MatrixShape | None = None
    image: bool = False
    reformats: bool = False
    """Whether it only changes the format."""
    pools: bool = False
    fp32_add: bool = False
    count: int = 1
    """Kernels that do it together, one behind the other."""


@dataclass(frozen=True)
class KernelTime:
    """Microseconds: of arithmetic and traffic alone, fixed, and in total."""

    compute_us: float
    memory_us: float
    fixed_us: float
    total_us: float


@functools.lru_cache(maxsize=1 << 14)
def kernel_time(work: KernelWork, speed: Speed, rules: TimeRules = TIME_RULES) -> KernelTime:
    """The predicted time of one of TensorRT's kernels on a device with these peaks.

    Kept, since a search asks for the same kernels over and over. Raises ``ValueError`` where the device has no tensor
    cores for what it multiplies in.
    """
    compute = _compute_us(work, speed, rules)
    memory = (work.activation_bytes + work.weight_bytes) / (speed.bandwidth * 1e3 * _bandwidth_share(work, rules))
    fixed = work.count * speed.kernel_us
    together = float((compute**rules.overlap + memory**rules.overlap) ** (1 / rules.overlap))
    return KernelTime(compute, memory, fixed, fixed + together)


def _bandwidth_share(work: KernelWork, rules: TimeRules) -> float:
    if work.reformats or work.kind is LayerKind.INPUT:
        return rules.image_memory if work.image else rules.reformat_memory
    return rules.product_memory if _is_tiled(work) else rules.stream_memory


def _is_tiled(work: KernelWork) -> bool:
    """Whether it is a product that tensor cores take; those of single channels (depthwise) they do not."""
    shape = work.shape
    return shape is not None and not (shape.groups > 1 and shape.columns < ALIGNED[Format.FP32])


def _compute_us(work: KernelWork, speed: Speed, rules: TimeRules) -> float:
    shape = work.shape
    if not work.macs:
        return 0.0
    if shape is None:
        return 2.0 * work.macs / (_peak(work.multiplies, speed) * 1e6 * rules.attention)
    if not _is_tiled(work):
        return 2.0 * work.macs / (speed.fp32 * 1e6 * rules.plain_product)
    image = work.kind is LayerKind.CONV and shape.channels <= IMAGE_CHANNELS
    if image and (work.multiplies is Format.FP32 or (work.multiplies is Format.INT8 and not work.pools)):
        at_once, depth = (4, _image_depth(shape)) if work.multiplies is Format.INT8 else (1, shape.depth)
        operations = 2.0 * shape.rows * shape.columns * depth * shape.groups
        return operations / (at_once * speed.fp32 * 1e6 * rules.plain_product)
    tiled = _tiled_us(shape, _image_depth(shape) if image else shape.depth, work.multiplies, speed, rules)
    if image:
        return tiled / rules.image_product
    if work.kind is LayerKind.GEMM and work.multiplies.bytes == 1:
        return tiled / rules.linear_eight
    return tiled * (rules.fp32_add if work.fp32_add else 1.0)


def _image_depth(shape: MatrixShape) -> int:
    """The depth with the channels of an image padded to four."""
    return shape.depth // shape.channels * IMAGE_CHANNELS


def _peak(form: Format, speed: Speed) -> float:
    peaks = {Format.FP32: speed.tf32 or speed.fp32, Format.FP16: speed.fp16, Format.INT8: speed.int8}
    peak = peaks.get(form, speed.fp8)
    if peak is None:
        raise ValueError(f"The device has no {form.value} tensor cores.")
    return peak


def _tiled_us(shape: MatrixShape, depth: int, form: Format, speed: Speed, rules: TimeRules) -> float:
    """The arithmetic of a product, cut into the tiles that make it fastest."""
    aligned = ALIGNED[form]
    depth = -(-depth // aligned) * aligned
    per_sm = _peak(form, speed) * 1e6 / speed.sms
    steps_us = depth * form.bytes / DEPTH_BYTES * rules.step_us

    def time(rows: int, columns: int) -> float:
        tiles = -(-shape.rows // rows) * -(-shape.columns // columns) * shape.groups
        waves = tiles / speed.sms
        waves = float(math.ceil(waves)) if waves <= _WAVES else waves
        half = rows * columns / (rows + columns)
        share = half / (half + rules.tile_half)
        return waves * max(2.0 * rows * columns * depth / (per_sm * share), steps_us)

    return min(time(*tile) for tile in TILES)
