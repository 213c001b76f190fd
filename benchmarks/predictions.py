"""Predictions held to real engines of TensorRT: fused layers, the time of each, totals, and INT8 over FP16.

    python benchmarks/predictions.py

The networks of ``profiles/`` are rebuilt as ONNX with their Q/DQ; the rules of ``resvit_engines.targets`` say which
layers TensorRT makes of them and how long each takes. Nothing is timed on this machine. What is measured without a
profiler is a latency; each layer's time includes what the profiler adds, one figure for each GPU: the difference, over
the layers.

The rules' values are tried in two ways that would show values fitted to these files: set anew, from a neutral start, on
all networks but one and held to that one; and held to whole engines on a Jetson that no value was set on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from profile_comparison import (
    GOALS,
    GPUS,
    ORIN_SOURCE,
    Comparison,
    compare,
    judged,
    left_out,
    on_orin,
    profiled_ratios,
    profiler_us,
    ratios,
)
from profile_layers import profile
from profile_networks import ENGINES

from resvit_engines.targets.speeds import GPU_KERNEL_US
from resvit_engines.targets.tensorrt_rules import SOURCES, TIME_RULES

RESULTS = Path(__file__).parent / "results"


def page(
    found: dict[str, Comparison], held_out: dict[str, dict[str, Any]], orin: list[tuple[str, int, str, float, float]]
) -> Iterator[str]:
    """The results as Markdown."""
    yield "# Predictions held to real engines of TensorRT\n"
    yield (
        "Ten engines that NVIDIA published layer by layer (`benchmarks/profiles/README.md`), rebuilt as ONNX and "
        "predicted. Nothing here was timed on the machine that wrote it. *Latency* is that of the whole engine in a "
        "CUDA graph; *profiled sum* adds up the layers of a run with a profiler, which adds "
        + ", ".join(f"{profiler_us(device):.1f} us ({device})" for device in list(GPUS)[:3])
        + " to each layer.\n"
    )
    yield from _table(
        ("goal", "reached", "met"), [(goal, text, "yes" if met else "**no**") for goal, text, met in judged(found)]
    )
    yield "\n## Engines\n"
    yield from _table(
        (
            "engine",
            "products told right",
            "layers told of measured",
            "latency, us: predicted",
            "measured",
            "error",
            "profiled sum",
            "median layer",
            "90% of layers within",
        ),
        [_engine_row(each) for each in found.values()],
    )
    yield "\n## INT8 over FP16\n"
    profiled = {engine: (ours, theirs) for engine, ours, theirs in profiled_ratios(found)}
    yield from _table(
        ("engine", "latency: predicted", "measured", "profiled sum: predicted", "measured"),
        [
            (engine, f"{ours:.2f}", f"{theirs:.2f}", f"{profiled[engine][0]:.2f}", f"{profiled[engine][1]:.2f}")
            for engine, ours, theirs in ratios(found)
        ],
    )
    yield "\n## Set on the other networks\n"
    alone = [each for result in held_out.values() for each in result["engines"].values()]
    within = sum(abs(each.latency_error) <= GOALS["total"] for each in alone)
    yield (
        "The rules' values set anew from a neutral start (what one would guess who had seen no engine) on two "
        "networks, then held to the third. A value that fits these files only would fail here. Which layers fuse is "
        "told by the same rules in all; those were read from all ten listings. "
        f"Latency within {GOALS['total']:.0%}: {within} of {len(alone)}; "
        f"median layer at worst {max(statistics.median(each.layer_errors) for each in alone):.1%}. "
        "What only one network has (an FP32 image quantised by a kernel of its own, an FP32 add) the others cannot "
        "tell.\n"
    )
    yield from _table(
        ("left out", "engine", "latency error", "profiled sum error", "median layer"),
        [
            (
                family,
                engine,
                f"{each.latency_error:+.1%}",
                f"{each.profiled_error:+.1%}",
                f"{statistics.median(each.layer_errors):.1%}",
            )
            for family, result in held_out.items()
            for engine, each in result["engines"].items()
        ],
    )
    yield "\n"
    names = [*dataclasses.asdict(TIME_RULES), "kernel_us"]
    yield from _table(
        ("value", "as used", *(f"without {family}" for family in held_out)),
        [
            (
                name,
                f"{getattr(TIME_RULES, name, GPU_KERNEL_US):.2f}",
                *(f"{result['rules'][name]:.2f}" for result in held_out.values()),
            )
            for name in names
        ],
    )
    yield "\n## On a Jetson\n"
    yield (
        f"Whole engines ({ORIN_SOURCE}). Of these only ViT-B in INT8 set a value (`linear_eight`); the others are held "
        f"out. "
        "The networks are rebuilt from their descriptions, INT8 with Q/DQ on convolutions, residuals and the last "
        "pool.\n"
    )
    yield from _table(
        ("network", "batch", "precision", "predicted, ms", "measured, ms", "error"),
        [(n, str(b), p, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs - 1:+.0%}") for n, b, p, ours, theirs in orin],
    )
    yield "\n"
    yield from _table(
        ("network", "batch", "INT8 over FP16, predicted", "measured"),
        [
            (half[0], str(half[1]), f"{half[3] / eight[3]:.2f}", f"{half[4] / eight[4]:.2f}")
            for half, eight in zip(orin[::2], orin[1::2], strict=True)
        ],
    )
    yield "\n## Rules\n"
    yield from _table(
        ("rule", "value", "what it says", "source"),
        [(name, f"{getattr(TIME_RULES, name):g}", *SOURCES[name]) for name in dataclasses.asdict(TIME_RULES)],
    )
    yield "\n## What is not told\n"
    for each in found.values():
        missed = ", ".join(f"{key} ({us:.0f} us)" for key, us in each.missed)
        invented = ", ".join(f"{key} ({us:.0f} us)" for key, us in each.invented)
        if missed or invented:
            yield f"- {each.engine}: " + "; ".join(
                text
                for text in (
                    f"not predicted: {missed}" if missed else "",
                    f"predicted only: {invented}" if invented else "",
                )
                if text
            )
    yield from NOTES


NOTES = (
    "\n`layout` layers change the order of channels for the tactic that the builder took (Winograd in FP32, a float "
    "average pool behind an 8-bit convolution); no rule says when. Of floats, the rebuilt networks have the type that "
    "the measured engine has: TensorRT 8 chose it (FP32 for the first convolution of ResNet-18 without residual Q/DQ "
    "and for 160 channels of MobileNetV2); strongly typed networks, as `build` writes them, do not leave it a choice. "
    "Both MobileNets are MobileNetV2, one without and one with Q/DQ on its residuals; there is no MobileNet v1 among "
    "the profiles.",
    "\n## Looked for elsewhere\n",
    "- Issues and repositories were searched for listings with times by TensorRT 10 or 11, of ViT blocks, attention, "
    "LayerNorm, and of Orin. **Not found: a listing with the time of each layer** for any of these in a form that "
    "names shapes and formats. Found and used: the whole engines on Orin Nano above.",
    "- Found without times: a BERT in FP16 by TensorRT 10.10 on A100 (NVIDIA/TensorRT issue 4397). Q, K and V are one "
    "product, attention is one kernel (`_gemm_mha_v2`), GELU runs inside the first linear layer, and the residual Add "
    "inside the LayerNorm behind it. The model here has the Add in the linear layer, which moves the same bytes.",
    "- Found without times: a YOLO in FP16 by TensorRT 10.3 on an Orin (ultralytics issue 17640). SiLU (Sigmoid and "
    "Mul) runs inside the convolution before it: predicted so. Convolutions of one input and shape are merged into one "
    "there: not predicted.",
    "- Found without the GPU's name: a ResNet-50 with the time of each layer (NVIDIA/TensorRT issue 3842).",
    "- An Add whose two inputs each have Q/DQ is a pointwise kernel that reads INT8 twice (onnxsim/onnxsim, Orin Nano, "
    "TensorRT 10.3): predicted so.",
    "- A ViT in INT8 by ModelOpt ran 1.37 times as fast as in FP16 (NVIDIA/Model-Optimizer issue 2123; GPU not named), "
    "DINOv2 in INT8 not faster than FP16 on A100, V100 and A10 (NVIDIA/TensorRT issue 4273): what linear layers gain "
    "in 8 bits is known least.",
)


def _engine_row(each: Comparison) -> tuple[str, ...]:
    measured = profile(each.engine)
    errors = each.layer_errors
    return (
        each.engine,
        f"{each.products - len(each.wrong)} of {each.products}",
        f"{len(each.layers)} of {len(measured.layers)}",
        f"{each.latency_us:,.0f}",
        f"{measured.latency_us:,.0f}",
        f"{each.latency_error:+.1%}",
        f"{each.profiled_error:+.1%}",
        f"{statistics.median(errors):.1%}",
        f"{errors[math.ceil(0.9 * len(errors)) - 1]:.0%}",
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def main() -> None:
    """Write ``predictions.md`` and ``predictions.json``."""
    found = {engine: compare(engine) for engine in ENGINES}
    held_out, orin = left_out(), on_orin()
    text = "\n".join(page(found, held_out, orin)) + "\n"
    (RESULTS / "predictions.md").write_text(text)
    document = {
        "goals": [{"goal": goal, "reached": reached, "met": met} for goal, reached, met in judged(found)],
        "engines": {
            engine: {
                "latency_us": round(each.latency_us, 2),
                "latency_error": round(each.latency_error, 4),
                "profiled_error": round(each.profiled_error, 4),
                "wrong": list(each.wrong),
                "layers": [[key, round(ours, 2), theirs] for key, ours, theirs in each.layers],
                "missed": [list(item) for item in each.missed],
            }
            for engine, each in found.items()
        },
        "left_out": {
            family: {
                "rules": {key: round(value, 4) for key, value in result["rules"].items()},
                "latency_error": {engine: round(each.latency_error, 4) for engine, each in result["engines"].items()},
            }
            for family, result in held_out.items()
        },
        "orin": [[*row[:3], round(row[3], 3), row[4]] for row in orin],
    }
    (RESULTS / "predictions.json").write_text(json.dumps(document) + "\n")
    print(text)


if __name__ == "__main__":
    main()
