"""What attention's own products cost in FP8: queries, keys, values and shares in E4M3, beside FP16 as we ship them.

    resvit-export quantize --precision fp8 --target l4 --tensorrt 10.13 --model resvit:embed-nano ... --run runs/embed
    python benchmarks/attention_fp8.py runs/embed runs/fpn --images 2000

Each argument is the folder of a run that `resvit-export quantize --precision fp8` has finished for a TensorRT that
reads attention as two products and a softmax (before 10.14). Its quantised graph is taken as it ships, and with Q/DQ in
E4M3 on what attention's products read: queries and keys the first, values and shares (the softmax) the second. ModelOpt
0.47, exporting from PyTorch, has the ranges of the first three from the largest value that calibration saw, and shares,
which lie in [0, 1], at a scale of 1/448; its export of diffusion models has them at a scale of 1. "Our method" chooses
every range by the least squared error on E4M3's grid. "Operands alone" is what our kernel reads with
`--plugin-attention 8bit`: shares stay in FP16.

The test images took no part in calibration. SQNR is of the outputs against the float ONNX, pooled over the images, the
signal being what differs between them. Beside it is the share of images whose decisions (arg-max of classes; with
`--lines` what CTC reads, the blank being class 0) are all those of the float network. The first row has both; the
others have what they have less than it on the same images: SQNR with its standard error, and images in agreement in
points, with the interval at 95% confidence. Rows are kept in `results/attention-fp8.json` and written anew where a run
is given again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from held_back import image_sets, read_line
from machine import describe_machine

from resvit_calibrate.answers.apart import shared_of
from resvit_calibrate.gate.intervals import paired_difference
from resvit_calibrate.ranges.estimators import Estimator, amax_from
from resvit_calibrate.ranges.statistics import Statistics, statistics_from_npz
from resvit_calibrate.runtime.runner import OnnxRunner, onnx_runner
from resvit_calibrate.runtime.sessions import Array, Arrays
from resvit_engines.files import write_atomic
from resvit_engines.targets.table import Precision
from resvit_quantize.check.judge import Errors, gain
from resvit_quantize.check.judge import joined as errors_of_all
from resvit_quantize.graph.analysis import analyse
from resvit_quantize.graph.network import add_initializer, network_from_onnx
from resvit_quantize.graph.regions import AttentionBlock, attention_blocks
from resvit_quantize.placement.grid import scale_from_amax

RESULTS = Path(__file__).parent / "results"
E4M3 = 448.0
_BATCH = 8
_CENTRE = 4
"""Batches that what all images share is taken of."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How attention's operands are rounded: by which range the shares, and by which the queries, keys and values.

    A number is the largest value that the grid reaches; None leaves them in FP16.
    """

    shares: Estimator | float | None
    others: Estimator | None


SHIPPED = "FP16, as it ships"
WAYS = {
    "operands alone, at their largest": Way(None, Estimator.MAX),
    "shares alone, at 1/448": Way(1.0, None),
    "ModelOpt's: shares at 1/448": Way(1.0, Estimator.MAX),
    "ModelOpt's for diffusion: shares at 1": Way(E4M3, Estimator.MAX),
    "shares at their largest": Way(Estimator.MAX, Estimator.MAX),
    "all by our method": Way(Estimator.MSE, Estimator.MSE),
}


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a network answers to all test images: errors, and of each image whether all decisions are the float's."""

    errors: Errors
    same: Array

    def cell(self, than: Answers) -> dict[str, Any]:
        """Figures, with what they are less than those of ``than`` on the same images."""
        less = gain(self.errors, than.errors)
        lost, won = int((than.same & ~self.same).sum()), int((self.same & ~than.same).sum())
        low, high = paired_difference(lost, won, len(self.same), 0.95)
        return {
            "sqnr_db": self.errors.sqnr_db,
            "same": float(self.same.mean()),
            "less_db": less.gain_db,
            "error_db": less.noise_db,
            "less_points": 100.0 * (lost - won) / len(self.same),
            "interval": [100.0 * low, 100.0 * high],
        }


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("runs", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--images", default=2000, show_default=True, help="Test images.")
@click.option("--lines", is_flag=True, help="The first output is CTC's, [N, positions, classes], with the blank first.")
def main(*, runs: tuple[Path, ...], images: int, lines: bool) -> None:
    """Measure each run, and write the table of all that are known."""
    kept = RESULTS / "attention-fp8.json"
    for run in runs:
        click.echo(run.name, err=True)
        row = measured(run, images, lines=lines)
        rows: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
        write_atomic(kept, (json.dumps({**rows, run.name: row}, indent=1, sort_keys=True) + "\n").encode())
    write_atomic(RESULTS / "attention-fp8.md", page(json.loads(kept.read_text())).encode())


def measured(run: Path, images: int, *, lines: bool = False) -> dict[str, Any]:
    """One network's row."""
    (model,), (shipped,) = run.glob("export-*/model.onnx"), run.glob("quantize-*/model.onnx")
    (counted,) = run.glob("calibrate-*/statistics.npz")
    statistics = statistics_from_npz(counted.read_bytes(), str(counted))
    _, validation = image_sets(run, images)
    blocks = [describe(block, statistics) for block in blocks_of(network_from_onnx(model))]
    if not blocks:
        raise click.ClickException(f"{run} has no attention of two products and a softmax.")
    runners = {SHIPPED: onnx_runner(shipped)}
    for name, way in WAYS.items():
        network = ir.load(shipped)
        insert(network, model, statistics, way)
        runners[name] = onnx_runner(bytes(ir.serde.serialize_model(network).SerializeToString()))
    found = answers(onnx_runner(model), runners, [batch.feeds() for batch in validation.batches(_BATCH)], lines=lines)
    cells = {name: answer.cell(found[SHIPPED]) for name, answer in found.items()}
    return {"ranges": statistics.images, "images": len(validation), "blocks": blocks, "cells": cells}


def blocks_of(network: ir.Model) -> list[AttentionBlock]:
    """Attention written out as two products, in order."""
    return [block for block in attention_blocks(analyse(network)) if len(block.products) == 2]


def operands(block: AttentionBlock) -> dict[str, tuple[ir.Node, int]]:
    """Where the two products read: the node and the input of queries, keys, shares and values."""
    first, second = (product.node for product in block.products)
    inner = {output for node in block.nodes for output in node.outputs}
    found = {"queries": (first, 0), "keys": (first, 1)}
    for index, value in enumerate(second.inputs[:2]):
        found["shares" if value in inner or _from(value, inner) else "values"] = second, index
    return found


def _from(value: ir.Value | None, inner: set[ir.Value]) -> bool:
    """Whether views or casts of the block's own results are read, and no operand."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in ("Cast", "Reshape", "Transpose", "Identity"):
        if producer.inputs[0] in inner:
            return True
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return False


def insert(network: ir.Model, floating: Path, statistics: Statistics, way: Way) -> None:
    """Put Q/DQ in E4M3 in front of the products of all attention, in place; ranges are those of the float graph."""
    import ml_dtypes

    zero = add_initializer(network, "attention/zero", np.zeros((), ml_dtypes.float8_e4m3fn))
    nodes = {str(node.name): node for node in network.graph}
    for block in blocks_of(network_from_onnx(floating)):
        for which, (product, index) in operands(block).items():
            chosen = way.shares if which == "shares" else way.others
            if chosen is None:
                continue
            seen = statistics.tensors[str(product.inputs[index].name)]  # type: ignore[union-attr]
            amax = amax_from(seen, chosen, "fp8") if isinstance(chosen, Estimator) else chosen
            node = nodes[str(product.name)]
            value = node.inputs[index]
            assert value is not None
            kind = np.float16 if value.dtype is ir.DataType.FLOAT16 else np.float32
            scale = scale_from_amax(amax, Precision.FP8).astype(kind)
            node.replace_input_with(index, _pair(network, node, value, f"{node.name}/{which}", scale, zero))


def _pair(network: ir.Model, node: ir.Node, value: ir.Value, name: str, scale: np.ndarray, zero: ir.Value) -> ir.Value:
    """Q and DQ behind ``value``, in front of ``node``."""
    known = add_initializer(network, f"{name}/scale", scale)
    down = ir.node("QuantizeLinear", [value, known, zero], name=f"{name}/QuantizeLinear")
    down.outputs[0].name = f"{name}/q"
    back = ir.node("DequantizeLinear", [down.outputs[0], known, zero], name=f"{name}/DequantizeLinear")
    back.outputs[0].name, back.outputs[0].type, back.outputs[0].shape = f"{name}/dq", value.type, value.shape
    network.graph.insert_before(node, [down, back])
    return back.outputs[0]


def describe(block: AttentionBlock, statistics: Statistics) -> dict[str, float]:
    """The largest value of each operand."""
    found = {}
    for which, (node, index) in operands(block).items():
        value = node.inputs[index]
        assert value is not None
        found[which] = statistics.tensors[str(value.name)].absmax
    return found


def answers(
    floating: OnnxRunner, runners: Mapping[str, OnnxRunner], batches: Sequence[Arrays], *, lines: bool
) -> dict[str, Answers]:
    """What each of ``runners`` answers, batch by batch: what a recogniser answers to all images is gigabytes."""
    first = [floating(batch) for batch in batches[:_CENTRE]]
    shared = {name: shared_of(flat(np.concatenate([part[name] for part in first]))) for name in first[0]}
    del first
    parts: dict[str, list[Answers]] = {name: [] for name in runners}
    for at, batch in enumerate(batches):
        expected = floating(batch)
        size = len(next(iter(expected.values())))
        chosen = slice(at * _BATCH, at * _BATCH + size) if at < _CENTRE else None
        signal = [shared[n].signal(flat(v), shared[n].members[chosen] if chosen else None) for n, v in expected.items()]
        for name, runner in runners.items():
            parts[name].append(against(expected, runner(batch), np.stack(signal, 1), lines=lines))
    return {
        name: Answers(errors_of_all([part.errors for part in some]), np.concatenate([part.same for part in some]))
        for name, some in parts.items()
    }


def flat(value: Array) -> Array:
    """Outputs as float64 [N, values]."""
    return value.astype(np.float64).reshape(len(value), -1)


def against(expected: Arrays, found: Arrays, signal: Array, *, lines: bool) -> Answers:
    """Errors, and which images are decided as the float network decides them."""
    noise = [np.square(flat(value) - flat(found[name])).sum(1) for name, value in expected.items()]
    name = next(iter(expected))
    axis = 1 if expected[name].ndim in (2, 4) else -1
    one, two = expected[name].argmax(axis), found[name].argmax(axis)
    if lines:
        same = np.array([np.array_equal(read_line(a), read_line(b)) for a, b in zip(one, two, strict=True)])
    else:
        same = (one == two).reshape(len(one), -1).all(1)
    return Answers(Errors(np.stack(noise, 1), signal, None), same)


def page(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    machine = describe_machine()
    lines = ["# Attention in FP8", ""]
    lines += [" ".join(part.split()) + "\n" for part in (__doc__ or "").split("\n\n")[2:]]
    lines += [f"{machine['cpu']}; onnxruntime {machine['versions']['onnxruntime']}.", ""]
    lines += [table(rows), ""]
    for name, row in sorted(rows.items()):
        shares = ", ".join(f"{block['shares']:.2f}" for block in row["blocks"])
        lines.append(
            f"- {name}: ranges from {row['ranges']} images, {row['images']} test images; the largest shares of its "
            f"{len(row['blocks'])} attention blocks are {shares}"
        )
    return "\n".join(lines) + "\n"


def table(rows: dict[str, Any]) -> str:
    """A row for each way, a column for each network; what ships has no less than itself."""
    names = sorted(rows)
    lines = [f"| attention | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for way in (SHIPPED, *WAYS):
        cells = [_cell(rows[name]["cells"][way], shipped=way == SHIPPED) for name in names]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any], *, shipped: bool) -> str:
    if shipped:
        return f"{cell['sqnr_db']:.1f} dB · {cell['same']:.2%}"
    low, high = cell["interval"]
    return (
        f"{cell['less_db']:.2f} ± {cell['error_db']:.2f} dB less · {cell['less_points']:+.2f} [{low:+.2f}, {high:+.2f}]"
    )


if __name__ == "__main__":
    main()
