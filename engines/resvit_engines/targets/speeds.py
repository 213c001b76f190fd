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
    two), ``None`` where there are no such tensor cores. ``bandwidth`` is that of the device memory in GB/s.
    ``kernel_us`` is the fixed cost of one kernel in microseconds.
    """

    fp16: float
    int8: float
    fp8: float | None
    bandwidth: float
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
            rate("bandwidth"),
            rate("kernel_us"),
            record.text("source"),
            record.text("note"),
        )


GPU_KERNEL_US = 2.0
"""Fixed cost of a kernel on a discrete GPU and on DGX Spark, in microseconds: the gap to the kernel before it inside
a CUDA graph (about 1) and the ramp and tail in which most of the GPU idles (about 1). An estimate, good to a factor
of two; replace it with times measured on the device."""

JETSON_KERNEL_US = 5.0
"""The same on a Jetson: clocks are lower and the front end is slower. Also an estimate."""

_ORIN = "Jetson Orin series data sheets: the GPU's share of the INT8 TOPS, without the DLA's, halved to dense"
_HOPPER = "H100 data sheet"
_GEFORCE = "FP16 and FP8 with FP16 accumulation; with FP32 accumulation GeForce runs at half of these rates"

SPEEDS: dict[str, Speed] = {
    "jetson-orin": Speed(
        27.0, 54.0, None, 204.8, JETSON_KERNEL_US, _ORIN,
        "AGX Orin 32GB at MAXN, 0.93 GHz; the 64GB module reaches 42.5 and 85 at 1.3 GHz, with the same bandwidth",
    ),
    "jetson-orin-nx": Speed(
        12.5, 25.0, None, 102.4, JETSON_KERNEL_US, _ORIN,
        "Orin NX 8GB at MAXN of JetPack 6.1, 0.765 GHz, not Super; the 16GB module reaches 15 and 30",
    ),
    "jetson-orin-nano": Speed(
        5.0, 10.0, None, 34.0, JETSON_KERNEL_US, _ORIN,
        "Orin Nano 4GB at MAXN of JetPack 6.1, 0.625 GHz, not Super; the 8GB module reaches 10 and 20 at 68 GB/s, "
        "and in Super mode 17 and 33 at 102 GB/s",
    ),
    "jetson-thor": Speed(
        150.0, 300.0, 300.0, 273.0, JETSON_KERNEL_US, "Jetson Thor data sheet: sparse FP4 rate",
        "T4000 (64GB): 1200 sparse FP4 TFLOPS, halved for dense, FP8 and FP16 each; INT8 taken to be like FP8; "
        "the T5000 reaches 259, 517 and 517",
    ),
    "a100": Speed(
        312.0, 624.0, None, 1555.0, GPU_KERNEL_US, "A100 data sheet",
        "40GB; the 80GB boards have 1935 (PCIe) and 2039 GB/s (SXM)",
    ),
    "a10": Speed(125.0, 250.0, None, 600.0, GPU_KERNEL_US, "A10 data sheet"),
    "l4": Speed(121.0, 242.5, 242.5, 300.0, GPU_KERNEL_US, "L4 data sheet, halved to dense"),
    "l40s": Speed(362.0, 733.0, 733.0, 864.0, GPU_KERNEL_US, "L40S data sheet"),
    "h100": Speed(989.0, 1979.0, 1979.0, 3350.0, GPU_KERNEL_US, _HOPPER, "SXM; PCIe: 756, 1513, 1513 at 2000 GB/s"),
    "h200": Speed(989.0, 1979.0, 1979.0, 4800.0, GPU_KERNEL_US, "H200 data sheet", "SXM"),
    "b200": Speed(2250.0, 4500.0, 4500.0, 8000.0, GPU_KERNEL_US, "HGX B200 data sheet, per GPU", "at most 8 TB/s"),
    "rtx-4090": Speed(330.0, 661.0, 661.0, 1008.0, GPU_KERNEL_US, "Ada whitepaper", _GEFORCE),
    "rtx-5090": Speed(419.0, 838.0, 838.0, 1792.0, GPU_KERNEL_US, "RTX Blackwell whitepaper", _GEFORCE),
    "dgx-spark": Speed(
        125.0, 250.0, 250.0, 273.0, GPU_KERNEL_US, "DGX Spark data sheet: sparse FP4 rate",
        "1000 sparse FP4 TFLOPS, halved for dense, FP8 and FP16 each; INT8 taken to be like FP8",
    ),
}  # fmt: skip
"""By the target's name; where several modules share a name, the smallest, like the target's memory."""
