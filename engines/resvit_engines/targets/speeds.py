"""How fast each target can be at best: tensor-core rates by precision, memory bandwidth, and the cost of a kernel.

Rates are for dense matrices; data sheets that lead with the rate for 2:4 sparse ones are halved. They are peaks of
NVIDIA's public data sheets (named at each row), not measurements: what a layer reaches of them is the business of
:mod:`resvit_engines.targets.costs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from resvit_engines.records import Record


@dataclass(frozen=True)
class Speed:
    """Peaks of one device.

    ``fp16``, ``int8`` and ``fp8`` are dense tensor-core rates in TFLOPS or TOPS (a multiply-accumulate counts as
    two), ``None`` where there are no such tensor cores; ``tf32`` is that of FP32 matrices rounded to TF32, and ``fp32``
    the rate of the plain cores. ``bandwidth`` is that of the device memory in GB/s, ``sms`` the number of streaming
    multiprocessors. ``kernel_us`` is the fixed cost of one kernel in microseconds.
    """

    fp16: float
    int8: float
    fp8: float | None
    tf32: float | None
    fp32: float
    bandwidth: float
    sms: int
    kernel_us: float
    source: str
    note: str = ""

    @classmethod
    def from_json(cls, record: Record) -> Speed:
        """What ``dataclasses.asdict`` made of it."""

        def rate(key: str) -> float:
            return record.number(key, 0)

        return cls(
            rate("fp16"),
            rate("int8"),
            record.optional("fp8", rate),
            record.optional("tf32", rate),
            rate("fp32"),
            rate("bandwidth"),
            record.whole("sms", 1),
            rate("kernel_us"),
            record.text("source"),
            record.text("note"),
        )


GPU_KERNEL_US = 3.0
"""Fixed cost of a kernel on a discrete GPU and on DGX Spark, in microseconds, inside a CUDA graph: the gap to the
kernel before it, and the ramp and tail in which most of the GPU idles. The smallest kernels of TensorRT's engines take
1.5 (A100), 2 (RTX 3090) and 2.5 to 3 (TITAN RTX); over all layers 2.8 to 3.9 fits best
(``benchmarks/results/predictions.md``)."""

JETSON_KERNEL_US = 5.0
"""The same on a Jetson: clocks are lower and the front end is slower. An estimate, to which whole engines on an Orin
Nano agree (``benchmarks/results/predictions.md``)."""

_ORIN = "Jetson Orin series data sheets: the GPU's share of the INT8 TOPS, without the DLA's, halved to dense"
_HOPPER = "H100 data sheet"
_GEFORCE = "FP16 and FP8 with FP16 accumulation; with FP32 accumulation GeForce runs at half of these rates"

SPEEDS: dict[str, Speed] = {
    "jetson-orin": Speed(
        27.0, 54.0, None, 13.5, 3.3, 204.8, 14, JETSON_KERNEL_US, _ORIN,
        "AGX Orin 32GB at MAXN, 0.93 GHz; the 64GB module reaches 42.5 and 85 at 1.3 GHz, with the same bandwidth",
    ),
    "jetson-orin-nx": Speed(
        12.5, 25.0, None, 6.25, 1.57, 102.4, 8, JETSON_KERNEL_US, _ORIN,
        "Orin NX 8GB at MAXN of JetPack 6.1, 0.765 GHz, not Super; the 16GB module reaches 15 and 30",
    ),
    "jetson-orin-nano": Speed(
        5.0, 10.0, None, 2.5, 0.64, 34.0, 4, JETSON_KERNEL_US, _ORIN,
        "Orin Nano 4GB at MAXN of JetPack 6.1, 0.625 GHz, not Super; the 8GB module reaches 10 and 20 at 68 GB/s, "
        "and in Super mode 17 and 33 at 102 GB/s",
    ),
    "jetson-thor": Speed(
        150.0, 300.0, 300.0, 75.0, 4.8, 273.0, 12, JETSON_KERNEL_US, "Jetson Thor data sheet: sparse FP4 rate",
        "T4000 (64GB): 1200 sparse FP4 TFLOPS, halved for dense, FP8 and FP16 each; INT8 taken to be like FP8; "
        "the T5000 reaches 259, 517 and 517",
    ),
    "a100": Speed(
        312.0, 624.0, None, 156.0, 19.5, 1555.0, 108, GPU_KERNEL_US, "A100 data sheet",
        "40GB; the 80GB boards have 1935 (PCIe) and 2039 GB/s (SXM)",
    ),
    "a10": Speed(125.0, 250.0, None, 62.5, 31.2, 600.0, 72, GPU_KERNEL_US, "A10 data sheet"),
    "l4": Speed(121.0, 242.5, 242.5, 60.0, 30.3, 300.0, 58, GPU_KERNEL_US, "L4 data sheet, halved to dense"),
    "l40s": Speed(362.0, 733.0, 733.0, 183.0, 91.6, 864.0, 142, GPU_KERNEL_US, "L40S data sheet"),
    "h100": Speed(
        989.0, 1979.0, 1979.0, 494.0, 67.0, 3350.0, 132, GPU_KERNEL_US, _HOPPER,
        "SXM; PCIe: 756, 1513, 1513 at 2000 GB/s",
    ),
    "h200": Speed(989.0, 1979.0, 1979.0, 494.0, 67.0, 4800.0, 132, GPU_KERNEL_US, "H200 data sheet", "SXM"),
    "b200": Speed(
        2250.0, 4500.0, 4500.0, 1125.0, 75.0, 8000.0, 148, GPU_KERNEL_US, "HGX B200 data sheet, per GPU",
        "at most 8 TB/s",
    ),
    "rtx-4090": Speed(330.0, 661.0, 661.0, 82.6, 82.6, 1008.0, 128, GPU_KERNEL_US, "Ada whitepaper", _GEFORCE),
    "rtx-5090": Speed(
        419.0, 838.0, 838.0, 104.8, 104.8, 1792.0, 170, GPU_KERNEL_US, "RTX Blackwell whitepaper", _GEFORCE,
    ),
    "dgx-spark": Speed(
        125.0, 250.0, 250.0, 62.5, 31.0, 273.0, 48, GPU_KERNEL_US, "DGX Spark data sheet: sparse FP4 rate",
        "1000 sparse FP4 TFLOPS, halved for dense, FP8 and FP16 each; INT8 taken to be like FP8",
    ),
    "cpu": Speed(
        0.0, 0.0, None, None, 0.0, 0.0, 1, 0.0, "none",
        "every processor has others: times on it are measured, and none is predicted",
    ),
}  # fmt: skip
"""By the target's name; where several modules share a name, the smallest, like the target's memory."""
