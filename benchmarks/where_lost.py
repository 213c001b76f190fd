"""Where a network's SQNR is lost: activations or weights, which part, which tensors, and by what fault.

    python benchmarks/where_lost.py runs/fastvit_t8 runs/dpt-hybrid --out benchmarks/results/where-lost.md

Each argument is the folder of a run that `resvit-export calibrate` has finished. What it calibrated is quantised to
INT8 as `--effort fast` does it, and again with one thing otherwise: activations alone, weights alone, one part of the
network alone, or without one of the quantiser's methods. Every figure is the SQNR of the outputs against the float
ONNX, in dB, the lowest of all outputs, on images that calibration did not see; "same" is, with `--decisions`, the
share of images whose arg-max along the last axis, at every position, is the float network's. "The least" is the float
network under noise at the same places, as small as 8 bits allow (see ``sensitivity/own_noise.py``), "Image" under noise
of 40 dB on its images alone. The tensors are those that lose the most against that least: `own` is the
SQNR of the tensor behind its Q/DQ pair, `crest` its largest value over its root mean square, `alone` the outputs' SQNR
where nothing else is in 8 bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import click
import numpy as np
import onnx_ir as ir
from machine import describe_machine

from resvit_calibrate.answers.classes import sqnr
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges, ranges_from_json
from resvit_calibrate.ranges.statistics import Statistics, statistics_from_npz
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.targets.choice import with_builder
from resvit_engines.targets.costs import CostModel
from resvit_engines.targets.table import Builder, Precision, find_target
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.preprocessing import preprocess_from
from resvit_export.recipe.file import recipe_from_toml
from resvit_quantize.graph.analysed import AnalysedGraph, graph_from_onnx
from resvit_quantize.graph.analysis import Product
from resvit_quantize.graph.fused_layers import layers_from_graph
from resvit_quantize.graph.network import int_attribute, module_of
from resvit_quantize.placement.placement import Edge, Placement, Weight, edge_key
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.qdq.plan import plan_quantization
from resvit_quantize.qdq.report import QuantizeReport
from resvit_quantize.quantize import quantize_model
from resvit_quantize.sensitivity.own_noise import LEAST_NOISE_DB, own_noise
from resvit_quantize.settings import Methods, QuantizeSettings


@dataclasses.dataclass(frozen=True)
class Near:
    """SQNR in dB, and the share of images of which every arg-max along the last axis is the float network's."""

    sqnr_db: float
    same: float

    def __str__(self) -> str:
        return f"{self.sqnr_db:.1f} | {self.same:.0%}" if not math.isnan(self.same) else f"{self.sqnr_db:.1f} | —"


Chosen: TypeAlias = Callable[[Edge | Weight], bool]
IMAGES = 4
TENSORS = 8
_IMAGE_NOISE_DB = 40.0
_SIZE = 10 ** (-_IMAGE_NOISE_DB / 20)
_METHODS = ("smoothing", "shifting", "output_ranges")


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What a run calibrated, and what the float network answers on ``feeds``."""

    name: str
    model: Path
    graph: AnalysedGraph
    ranges: Ranges
    statistics: Statistics
    feeds: Arrays
    answers: Arrays
    decisions: bool

    def near(self, model: bytes | Path, feeds: Arrays | None = None) -> Near:
        """How near the outputs of ``model`` are to the float network's."""
        return near(self.answers, onnx_runner(model)(feeds or self.feeds), decisions=self.decisions)

    def quantised(
        self, settings: QuantizeSettings, edges: Chosen = lambda _: True, weights: Chosen = lambda _: True
    ) -> Near:
        """How near the outputs are where only the chosen edges and weights are in 8 bits, all else in FP32."""
        plan = plan_quantization(self.graph, self.ranges, settings, self.statistics)
        placement = Placement(
            tuple(edge for edge in plan.placement.edges if edges(edge)),
            tuple(weight for weight in plan.placement.weights if weights(weight)),
            plan.placement.reasons,
        )
        insert_qdq(plan.network, placement, plan.amax, {}, settings.bits)
        return self.near(bytes(ir.serde.serialize_model(plan.network).SerializeToString()))

    def under_image_noise(self) -> Near:
        """The float outputs where noise of 40 dB lies on the images."""
        random = np.random.default_rng(0)
        noisy = {
            name: images + (random.standard_normal(images.shape) * np.sqrt(np.mean(images**2)) * _SIZE).astype("f4")
            for name, images in self.feeds.items()
        }
        return self.near(self.model, noisy)


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Markdown. [standard output]")
@click.option("--images", default=IMAGES, show_default=True)
@click.option("--tensors", default=TENSORS, show_default=True, help="How many of the worst tensors are tried alone.")
@click.option("--data", default="fashion-mnist", show_default=True)
@click.option("--decisions", is_flag=True, help="The last axis of the outputs are scores of classes.")
def main(*, runs: tuple[Path, ...], out: Path | None, images: int, tensors: int, data: str, decisions: bool) -> None:
    """Measure each run and write the table."""
    machine = describe_machine()
    lines = ["# Where the SQNR is lost", "", " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    lines += [f"{machine['cpu']}; onnxruntime {machine['versions']['onnxruntime']}; {images} images of {data}.", ""]
    for run in runs:
        click.echo(run.name, err=True)
        lines += section(calibrated(run, data, images, decisions=decisions), tensors)
    text = "\n".join(lines)
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        click.echo(text)


def calibrated(run: Path, data: str, images: int, *, decisions: bool = False) -> Calibrated:
    """Read a run's folder, and ask its float ONNX."""
    (model,) = run.glob("export-*/model.onnx")
    (ranges,) = run.glob("calibrate-*/ranges.json")
    (statistics,) = run.glob("calibrate-*/statistics.npz")
    (stored,) = run.glob("export-*/network.json")
    network = NetworkRecord.from_json(json.loads(stored.read_bytes()))
    wished = recipe_from_toml(run / "recipe.toml").preprocess
    preprocess = preprocess_from(network, wished, data)
    spec = DataSpec(data, calibration_images=1, validation_images=images, unlabelled=True)
    _, held_back = open_image_sets(spec, preprocess)
    feeds = next(held_back.batches(images)).feeds()
    return Calibrated(
        run.name,
        model,
        graph_from_onnx(model),
        ranges_from_json(ranges.read_bytes(), str(ranges)),
        statistics_from_npz(statistics.read_bytes(), str(statistics)),
        feeds,
        onnx_runner(model)(feeds),
        decisions,
    )


def section(run: Calibrated, tensors: int) -> list[str]:
    """One network's tables."""
    settings = QuantizeSettings(Precision.INT8)
    shipped = Path(f"{run.model}.int8")
    report = quantize_model(run.model, run.ranges, settings, shipped, statistics=run.statistics)
    noise = own_noise(run.model, shipped, Precision.INT8, run.feeds)
    near_shipped = run.near(shipped)
    shipped.unlink()
    lines = [f"## {run.name}", ""]
    if noise is None:
        return [*lines, "Nothing is in 8 bits.", ""]
    whole = run.quantised(settings)
    rows = {
        "Shipped (INT8, the rest in FP16)": near_shipped,
        f"The least: {LEAST_NOISE_DB[Precision.INT8]:g} dB at the same {noise.places} places": Near(
            noise.under_noise_db, math.nan
        ),
        f"Image: {_IMAGE_NOISE_DB:g} dB": run.under_image_noise(),
        "The rest in FP32, biases as they were": whole,
        "Activations alone": run.quantised(settings, weights=lambda _: False),
        "Weights alone": run.quantised(settings, edges=lambda _: False),
    }
    for estimator in (Estimator.MAX, Estimator.PERCENTILE):
        rows[f"Plain {estimator.value} ranges, no method"] = run.quantised(
            dataclasses.replace(settings, estimator=estimator, methods=Methods(*[False] * 5))
        )
    for method in _METHODS:
        without = dataclasses.replace(settings, methods=dataclasses.replace(Methods(), **{method: False}))
        rows[f"Without {method.replace('_', ' ')}"] = run.quantised(without)
    lines += [
        f"{report.macs_share:.1%} of the multiply-accumulates in 8 bits.",
        "",
        "| what | SQNR | same |",
        "|---|---|---|",
    ]
    lines += [f"| {what} | {value} |" for what, value in rows.items()]
    lines += ["", "| alone in 8 bits | SQNR | same |", "|---|---|---|"]
    for name, members in parts_of(run.graph).items():
        lines.append(f"| {name} | {run.quantised(settings, *[among(members)] * 2)} |")
    lines += ["", "| bytes of activations moved for one image | FP16 | INT8 |", "|---|---|---|"]
    lines += list(bytes_rows(run, report))
    lines += ["", "| tensor | read by | own | crest | alone | same |", "|---|---|---|---|---|---|"]
    for name, own in noise.lossy[:tensors]:
        lines.append(tensor_row(run, settings, name, own))
    return [*lines, ""]


def bytes_rows(run: Calibrated, report: QuantizeReport) -> Iterator[str]:
    """What the cost model counts, with and without what one builder's 8-bit kernels write besides."""
    layers = layers_from_graph(run.graph.network, 1, run.graph.analysis)
    chosen = {node.name: Precision.INT8 for node in report.nodes if node.precision == Precision.INT8.value}
    for builder, what in ((Builder.RTX, "TensorRT for RTX"), (Builder.TENSORRT, "TensorRT")):
        model = CostModel(layers, with_builder(find_target("l4"), builder))
        half, eight = (model.predict(kinds).activation_bytes / 1e6 for kinds in ({}, chosen))
        yield f"| {what} | {half:.1f} MB | {eight:.1f} MB |"


def parts_of(graph: AnalysedGraph) -> dict[str, set[str]]:
    """Names of products by the first two words of their modules' paths, where those tell, and by kind."""
    parts: dict[str, set[str]] = {}
    kinds: dict[str, set[str]] = {}
    for product in graph.analysis.products:
        if product.weight is not None:
            parts.setdefault(".".join(module_of(product.node).split(".")[:2]), set()).add(product.name)
            kinds.setdefault(kind_of(product, graph), set()).add(product.name)
    return {name: members for name, members in (parts | kinds).items() if name}


def kind_of(product: Product, graph: AnalysedGraph) -> str:
    """What kind of layer a product is."""
    node, weight = product.node, product.weight
    assert weight is not None
    if node.op_type != "Conv":
        return "linear layers"
    image = graph.analysis.shapes.get(str(node.outputs[0].name), ())
    if len(image) == 4 and image[2:] == (1, 1):
        return "squeeze-and-excitation"
    if int_attribute(node, "group", 1) > 1:
        return "depthwise and grouped convolutions"
    return "pointwise convolutions" if weight.shape is not None and weight.shape[2:] == (1, 1) else "convolutions"


def among(names: set[str]) -> Chosen:
    """Edges and weights of these products."""
    return lambda place: str(place.node.name) in names


def tensor_row(run: Calibrated, settings: QuantizeSettings, name: str, own: float) -> str:
    """One tensor that loses much, tried alone."""
    source = name.removesuffix("/shifted").removesuffix("/scaled")
    readers = [p.name for p in run.graph.analysis.products if (p.node.inputs[0] and p.node.inputs[0].name) == source]
    entry = run.statistics.tensors.get(source)
    channels = entry.channels if entry else None
    rms = float(np.sqrt(channels.mean_square.mean())) if channels is not None else float("nan")
    crest = (entry.absmax if entry else float("nan")) / rms if rms else float("nan")
    alone = run.quantised(settings, lambda edge: edge_key(edge)[0] == name, lambda _: False)  # type: ignore[arg-type]
    return f"| {name} | {', '.join(readers[:2])} | {own:.1f} | {crest:.0f} | {alone} |"


def near(expected: Arrays, other: Arrays, *, decisions: bool) -> Near:
    """The lowest SQNR of all outputs, and of how many images all decisions are the same."""
    same = np.ones(len(next(iter(expected.values()))), bool)
    for name, value in expected.items():
        if decisions:
            same &= (value.argmax(-1) == other[name].argmax(-1)).reshape(len(value), -1).all(1)
    ratios = [sqnr(value, other[name]) for name, value in expected.items()]
    return Near(min(ratios), float(same.mean()) if decisions else math.nan)


if __name__ == "__main__":
    main()
