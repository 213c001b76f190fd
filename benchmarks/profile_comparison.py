"""Engines of ``profiles/`` as the rules predict them, held to what was measured; and the rules set anew on some of "
"them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from profile_layers import Layer, kernels_of, predicted_kernels, profile
from profile_networks import ENGINES, FP16, mobilenet_v2, resnet18, resnet50, vit

from resvit_engines.targets.speeds import GPU_KERNEL_US, JETSON_KERNEL_US, Speed
from resvit_engines.targets.tensorrt_rules import TIME_RULES, TimeRules, kernel_time
from resvit_quantize.graph.fused_layers import layers_from_graph
from resvit_quantize.graph.quantised_edges import quantised_edges

GPUS = {
    "NVIDIA A100 80GB PCIe": Speed(
        312.0, 624.0, None, 156.0, 19.5, 1935.0, 108, GPU_KERNEL_US, "A100 80GB PCIe data sheet"
    ),
    "NVIDIA GeForce RTX 3090": Speed(
        142.0, 284.0, None, 35.6, 35.6, 936.0, 82, GPU_KERNEL_US, "GA102 whitepaper, with FP16 accumulation"
    ),
    "NVIDIA TITAN RTX": Speed(130.5, 261.0, None, None, 16.3, 672.0, 72, GPU_KERNEL_US, "Turing whitepaper, TITAN RTX"),
    "Jetson Orin Nano 8GB Super": Speed(
        16.7,
        33.4,
        None,
        8.3,
        2.1,
        102.0,
        8,
        JETSON_KERNEL_US,
        "Orin Nano Super data sheet: 67 sparse INT8 TOPS, 1.02 GHz",
    ),
}
"""Peaks of the measured GPUs; those that are targets too have their own rows in ``speeds.py``."""

ORIN_SOURCE = (
    "onnxsim/onnxsim, scripts/nvidia/README.md: Orin Nano 8GB, MAXN_SUPER, TensorRT 10.3, trtexec, no CUDA graph"
)
ORIN = {
    ("ResNet-18", 1): (0.758, 0.485), ("ResNet-18", 8): (3.537, 1.927), ("ResNet-50", 1): (1.814, 1.190),
    ("ResNet-50", 8): (8.816, 4.930), ("MobileNetV2", 1): (0.850, 0.781), ("MobileNetV2", 8): (3.925, 2.446),
    ("ViT-B/16", 1): (5.68, 4.92),
}  # fmt: skip
"""Measured milliseconds in FP16 and INT8 by network and batch; of ViT-B the variant with only linear layers in INT8."""
_ORIN_NETWORKS: dict[str, Callable[[int, bool], Any]] = {
    "ResNet-18": lambda batch, eight: resnet18(FP16, batch, quantised=eight, shortcut=eight, pooled=eight),
    "ResNet-50": lambda batch, eight: resnet50(FP16, batch, quantised=eight, keras=False),
    "MobileNetV2": lambda batch, eight: mobilenet_v2(FP16, batch, quantised=eight, shortcut=eight),
    "ViT-B/16": lambda batch, eight: vit(batch, quantised=eight),
}

FAMILIES = {"ResNet-18": "resnet18", "ResNet-50": "resnet50", "MobileNetV2": "mobilenet"}
PAIRS = (
    ("resnet18-a100-b32-int8-no-residual-qdq", "resnet18-a100-b32-fp16"),
    ("resnet18-a100-b32-int8-residual-qdq", "resnet18-a100-b32-fp16"),
    ("resnet18-a100-b32-int8-residual-qdq-gap", "resnet18-a100-b32-fp16"),
    ("resnet50-rtx3090-b32-int8", "resnet50-rtx3090-b32-fp16"),
)
GOALS = {"total": 0.20, "layer": 0.30, "ratio": 0.15}


@dataclass(frozen=True)
class Comparison:
    """One engine, predicted and measured, in microseconds; ``layers`` (key, predicted, measured) with a profiler."""

    engine: str
    latency_us: float
    profiled_us: float
    layers: tuple[tuple[str, float, float], ...]
    wrong: tuple[str, ...]
    products: int
    missed: tuple[tuple[str, float], ...]
    invented: tuple[tuple[str, float], ...]

    @property
    def latency_error(self) -> float:
        """Relative error of the latency."""
        return self.latency_us / profile(self.engine).latency_us - 1

    @property
    def profiled_error(self) -> float:
        """Relative error of the sum of all layers in a run with a profiler."""
        return self.profiled_us / profile(self.engine).total_us - 1

    @property
    def layer_errors(self) -> list[float]:
        """Relative errors of the layers' times, each without its sign."""
        return sorted(abs(ours / theirs - 1) for _, ours, theirs in self.layers)


@cache
def profiler_us(device: str) -> float:
    """What the profiler adds to a layer on a device."""
    engines = [found for engine in ENGINES if (found := profile(engine)).device == device]
    added = sum(found.total_us - found.latency_us for found in engines)
    return added / sum(len(found.layers) for found in engines)


def compare(engine: str, rules: TimeRules = TIME_RULES, kernel_us: float = GPU_KERNEL_US) -> Comparison:
    """Hold the prediction to one engine."""
    measured = profile(engine)
    speed = dataclasses.replace(GPUS[measured.device], kernel_us=kernel_us)
    added = profiler_us(measured.device)
    predicted = [_timed(layer, speed, rules) for layer in predicted_kernels(engine)]
    ours, theirs = ({layer.key: layer for layer in layers} for layers in (predicted, measured.layers))
    both = [key for key in theirs if key in ours]
    wrong = [
        key for key, layer in theirs.items() if layer.fusion and (key not in ours or ours[key].fusion != layer.fusion)
    ]
    return Comparison(
        engine,
        sum(layer.us for layer in predicted),
        sum(layer.us + added for layer in predicted),
        tuple((key, ours[key].us + added, theirs[key].us) for key in both),
        tuple(wrong),
        sum(layer.fusion is not None for layer in theirs.values()),
        tuple((key, layer.us) for key, layer in theirs.items() if key not in ours),
        tuple((key, layer.us + added) for key, layer in ours.items() if key not in theirs),
    )


def _timed(layer: Layer, speed: Speed, rules: TimeRules) -> Layer:
    assert layer.kernel is not None
    return dataclasses.replace(layer, us=kernel_time(layer.kernel.work, speed, rules).total_us)


def ratios(found: dict[str, Comparison]) -> list[tuple[str, float, float]]:
    """How many times FP16's speed each INT8 engine has: engine, predicted, measured; by latency."""
    return [
        (
            eight,
            found[half].latency_us / found[eight].latency_us,
            profile(half).latency_us / profile(eight).latency_us,
        )
        for eight, half in PAIRS
    ]


def profiled_ratios(found: dict[str, Comparison]) -> list[tuple[str, float, float]]:
    """The same by the sum of all layers in a run with a profiler."""
    return [
        (e, found[h].profiled_us / found[e].profiled_us, profile(h).total_us / profile(e).total_us) for e, h in PAIRS
    ]


def order(times: Callable[[str], float]) -> list[str]:
    """The five ResNet-18 engines, fastest first."""
    return sorted((engine for engine in ENGINES if engine.startswith("resnet18")), key=times)


NEUTRAL = TimeRules(
    tile_half=20.0, step_us=0.1, overlap=2.0, product_memory=0.8, stream_memory=0.8, reformat_memory=0.8,
    image_memory=0.8, image_product=1.0, plain_product=0.8, fp32_add=1.0,
)  # fmt: skip
"""Where setting the rules starts: what one would guess who had seen no engine."""
_HOLD = 0.05
"""What a value pays for being e times as large as at the start, beside the engines' errors (each about 0.2)."""
_SHARES = frozenset(
    {"product_memory", "stream_memory", "reformat_memory", "image_memory", "image_product", "plain_product"}
)


def set_rules(engines: Sequence[str]) -> tuple[TimeRules, float]:
    """Rules and fixed cost of a kernel that tell these engines best, by turns in each value, from the neutral start.

    What the engines hardly tell stays near the start: a value pays for how far it is from it.
    """
    values = {**dataclasses.asdict(NEUTRAL), "kernel_us": 2.0}
    del values["attention"], values["linear_eight"]  # Nothing in these engines tells them.

    start = dict(values)

    def loss(tried: dict[str, float]) -> float:
        rules = dataclasses.replace(NEUTRAL, **{key: value for key, value in tried.items() if key != "kernel_us"})
        total = sum(_HOLD * math.log(value / start[key]) ** 2 for key, value in tried.items())
        for engine in engines:
            found = compare(engine, rules, tried["kernel_us"])
            total += statistics.fmean(abs(math.log(ours / theirs)) for _, ours, theirs in found.layers)
            total += abs(math.log1p(found.latency_error))
        return total

    best = loss(values)
    for factor in (1.4, 1.2, 1.1, 1.05):
        improved = True
        while improved:
            improved = False
            for key, step in itertools.product(tuple(values), (factor, 1 / factor)):
                most = 1.0 if key in _SHARES else math.inf
                least = 1.0 if key == "overlap" else 0.0
                tried = {**values, key: min(most, max(least, values[key] * step))}
                if (now := loss(tried)) < best - 1e-4:
                    best, values, improved = now, tried, True
    kernel_us = values.pop("kernel_us")
    return dataclasses.replace(NEUTRAL, **values), kernel_us


def left_out() -> dict[str, dict[str, Any]]:
    """By network: rules set on the others, and how they do on this one."""
    found = {}
    for family, prefix in FAMILIES.items():
        own = [engine for engine in ENGINES if engine.startswith(prefix)]
        rules, kernel_us = set_rules([engine for engine in ENGINES if engine not in own])
        found[family] = {
            "rules": {**dataclasses.asdict(rules), "kernel_us": kernel_us},
            "engines": {engine: compare(engine, rules, kernel_us) for engine in own},
        }
    return found


def on_orin() -> list[tuple[str, int, str, float, float]]:
    """Whole engines on a Jetson: network, batch, precision, predicted and measured milliseconds."""
    rows = []
    speed = GPUS["Jetson Orin Nano 8GB Super"]
    for (network, batch), measured in ORIN.items():
        for precision, eight, theirs in (("FP16", False, measured[0]), ("INT8", True, measured[1])):
            graph = quantised_edges(_ORIN_NETWORKS[network](batch, eight))
            layers = kernels_of(graph, layers_from_graph(graph.model, edges=graph.edges))
            ours = sum(_timed(layer, speed, TIME_RULES).us for layer in layers) / 1e3
            rows.append((network, batch, precision, ours, theirs))
    return rows


def judged(found: dict[str, Comparison]) -> list[tuple[str, str, bool]]:
    """Each goal, what was reached, and whether that meets it."""
    wrong = sum(len(each.wrong) for each in found.values())
    products = sum(each.products for each in found.values())
    totals = {
        "profiled sum": [each.profiled_error for each in found.values()],
        "latency": [each.latency_error for each in found.values()],
    }
    rows = [
        (
            "Every product's fusion with add, activation, pooling and requantisation told right",
            f"{products - wrong} of {products}",
            not wrong,
        )
    ]
    for what, errors in totals.items():
        worst = max(errors, key=abs)
        within = sum(abs(error) <= GOALS["total"] for error in errors)
        text = f"{within} of {len(errors)} engines, at worst {worst:+.1%}"
        rows.append((f"Total within {GOALS['total']:.0%} ({what})", text, within == len(errors)))
    medians = [statistics.median(each.layer_errors) for each in found.values()]
    rows.append(
        (
            f"Median layer within {GOALS['layer']:.0%}",
            f"at worst {max(medians):.1%}, over all engines {statistics.median(medians):.1%}",
            max(medians) <= GOALS["layer"],
        )
    )
    for what, pairs in (("latency", ratios(found)), ("profiled sum", profiled_ratios(found))):
        worst = max((ours / theirs - 1 for _, ours, theirs in pairs), key=abs)
        rows.append(
            (
                f"INT8 over FP16 within {GOALS['ratio']:.0%} ({what})",
                f"at worst {worst:+.1%}",
                abs(worst) <= GOALS["ratio"],
            )
        )
    right = order(lambda engine: found[engine].latency_us) == order(lambda engine: profile(engine).latency_us)
    rows.append(("Order of the five ResNet-18 engines", "right" if right else "wrong", right))
    return rows
