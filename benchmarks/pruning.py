"""Pruning, ours and others', with the same training behind it, on trained hybrids and Fashion-MNIST.

    python benchmarks/pruning.py --model resvit:embed-nano
    python benchmarks/pruning.py --model resvit:fpn-nano --share 0.5 --epochs 1 --images 20000

Every method brings the network to the same share of its multiply-accumulates; then the same distillation from the
unpruned network trains it, on the training split without labels, with the same images and seed. All 10,000 test images
are scored: the drop is the float network's top-1 less the pruned one's, in percentage points with its 95% interval
(paired), before and after training, and after our INT8. Wall time is of the float ONNX in ONNX Runtime on the CPU, one
image at a time, in turns with the unpruned one: medians, and their ratio. A row that stands in the result with the same
inputs is not computed again unless ``--again``.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from machine import RESULTS, write_result
from torch import nn

from resvit_calibrate.answers.classes import Predictions, compare
from resvit_calibrate.data.image_sets import open_image_sets, open_training_images
from resvit_calibrate.data.training_images import TrainingImages
from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.ranges import ranges_from
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_calibrate.tasks.classification import Classification
from resvit_engines.errors import ResvitError
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file
from resvit_engines.progress import Reporter, reporter
from resvit_engines.targets.table import Precision
from resvit_export.loading.checkpoint import load_checkpoint
from resvit_export.loading.program.trace import program_from_module
from resvit_export.models.reference import resvit_config, resvit_model
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program
from resvit_quantize.pruning.apply import prune
from resvit_quantize.pruning.choose.budget import Budget
from resvit_quantize.pruning.choose.choice import Choice, choose_widths, uniform_widths
from resvit_quantize.pruning.choose.importance import Importance, importance_of
from resvit_quantize.pruning.choose.recorder import costs_from_module
from resvit_quantize.pruning.distill.distill import distill
from resvit_quantize.pruning.distill.options import DistillOptions
from resvit_quantize.pruning.find.discover import groups_from_module
from resvit_quantize.pruning.groups import Kind
from resvit_quantize.pruning.sparsity.report import SparseMethod
from resvit_quantize.pruning.sparsity.sparsity import sparsify
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import Effort, QuantizeSettings

BATCH = 128
KINDS = frozenset({Kind.CHANNELS, Kind.HEADS, Kind.MLP})
IMPORTANCE_IMAGES = 1024
SHARES = (0.7, 0.5, 0.3)
Masks = dict[str, torch.Tensor]


class Case:
    """A trained network and its images."""

    def __init__(self, model: str, checkpoint: Path, images: int) -> None:
        name = model.removeprefix("resvit:")
        config = resvit_config(name)
        self.preprocess = Preprocess((28, 28), 1, mean=config.mean, std=config.std)
        self.module = resvit_model(name).eval()
        load_checkpoint(self.module, checkpoint)
        self.digest = sha256_file(checkpoint)
        self.shape = (1, 28, 28)
        self.calibration, self.test = open_image_sets(
            DataSpec("fashion-mnist", calibration_images=512), self.preprocess
        )
        self.training: TrainingImages = open_training_images("fashion-mnist", self.test, images, 0, self.preprocess)
        self.reference = self.predicted(self.module)

    def predicted(self, module: nn.Module) -> Predictions:
        """Answers on the test images."""

        def run(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                return {"logits": module.eval()(torch.from_numpy(arrays["input"])).numpy()}

        return Classification({}).answers(run, self.test, BATCH)

    def score(self, predictions: Predictions) -> dict[str, Any]:
        """Top-1, drop with interval in percentage points, and agreement."""
        plain = compare(self.reference, predictions).to_json()
        return {key: plain[key] for key in ("top1", "drop", "interval", "agreement")}

    def batches(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Training images and labels to tell importance by."""
        order = np.random.default_rng(0).permutation(len(self.training))[:count]
        return [
            (torch.from_numpy(b.images), None if b.labels is None else torch.from_numpy(b.labels))
            for b in self.training.batches_at(order, 32)
        ]


def onnx_of(case: Case, module: nn.Module, path: Path, batch: int | None = None) -> Path:
    """Export a float ONNX as the tool does."""
    program, _ = program_from_module(copy.deepcopy(module), case.shape)
    onnx_from_program(fold_program(program)[0], path, opset=20, batch=batch)
    return path


def macs_of(case: Case, module: nn.Module) -> int:
    """Multiply-accumulates of one image."""
    return costs_from_module(module, torch.zeros(1, *case.shape), ()).macs({})


def ours(importance: Importance, pick: Callable[..., Choice] = choose_widths) -> Callable[[Case, float], nn.Module]:
    """Our groups; importance and choice as said."""

    def make(case: Case, share: float) -> nn.Module:
        module, example = copy.deepcopy(case.module), torch.zeros(2, *case.shape)
        groups = groups_from_module(module, example, KINDS).groups
        costs = costs_from_module(module, example[:1], groups)
        values = importance_of(module, groups, importance, case.batches(IMPORTANCE_IMAGES), images=IMPORTANCE_IMAGES)
        prune(module, groups, pick(groups, values, costs, Budget(macs=share, precision=Precision.FP16)).kept)
        return module

    return make


def torch_pruning(case: Case, share: float, attention: bool = True) -> nn.Module:
    """Torch-Pruning's own pruner: group magnitude, one ratio for all, widths in steps of 8.

    The ratio is found by bisection. As it comes, its hook for attention (``num_heads``) narrows every head; else
    attention is among its ``ignored_layers``.
    """
    import torch_pruning as tp

    example, whole = torch.zeros(1, *case.shape), macs_of(case, case.module)

    def narrowed(ratio: float) -> nn.Module:
        module = copy.deepcopy(case.module)
        attentions = [m for m in module.modules() if hasattr(m, "qkv")]
        ignored = [] if attention else [layer for m in attentions for layer in (m.qkv, m.proj)]
        pruner = tp.pruner.BasePruner(
            module,
            example,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=ratio,
            ignored_layers=[module.head.fc, *ignored],
            num_heads={m.qkv: m.heads for m in attentions} if attention else {},
            round_to=8,
        )
        pruner.step()
        for m in attentions:
            m.head_dim = m.qkv.out_features // (3 * m.heads)
        module(example)
        return module

    low, high = 0.0, 0.95
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if macs_of(case, narrowed(middle)) > share * whole else (low, middle)
    return narrowed(high)


def modelopt(case: Case, share: float) -> nn.Module:
    """ModelOpt's FastNAS, with its own search for subnets; scored by agreement on 512 training images."""
    import modelopt.torch.prune as mtp

    batches = case.batches(512)

    def score(module: nn.Module) -> float:
        with torch.no_grad():
            return float(
                np.mean([(module(x).argmax(1) == case.module(x).argmax(1)).float().mean() for x, _ in batches])
            )

    module, _ = mtp.prune(
        copy.deepcopy(case.module),
        mode="fastnas",
        constraints={"flops": f"{round(100 * share)}%"},
        dummy_input=torch.zeros(1, *case.shape),
        config={"data_loader": batches, "score_func": score, "collect_func": lambda batch: batch[0], "verbose": False},
    )
    found: nn.Module = module
    return found


METHODS: dict[str, tuple[str, Callable[[Case, float], nn.Module]]] = {
    "ours": ("resvit, Hessian-aware, chosen widths", ours(Importance.HESSIAN)),
    "ours-taylor": ("resvit, Taylor, chosen widths", ours(Importance.TAYLOR)),
    "ours-magnitude": ("resvit, magnitude, chosen widths", ours(Importance.MAGNITUDE)),
    "uniform": ("magnitude, one ratio for all", ours(Importance.MAGNITUDE, uniform_widths)),
    "torch-pruning": ("Torch-Pruning as it comes", torch_pruning),
    "torch-pruning-trunk": ("Torch-Pruning, attention left alone", partial(torch_pruning, attention=False)),
    "modelopt": ("ModelOpt, FastNAS", modelopt),
}


def seconds_of(models: list[Path], shape: tuple[int, int, int], repeats: int = 400) -> list[float]:
    """Median seconds of one image by each model, in turns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(m), options, providers=["CPUExecutionProvider"]) for m in models]
    image = {sessions[0].get_inputs()[0].name: np.zeros((1, *shape), np.float32)}
    found: list[list[float]] = [[] for _ in sessions]
    for turn in range(repeats + 20):
        for session, times in zip(sessions, found, strict=True):
            start = time.perf_counter()
            session.run(None, image)
            if turn >= 20:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


def int8_score(case: Case, module: nn.Module, folder: Path) -> dict[str, Any]:
    """Our INT8, effort best, of a network."""
    model = onnx_of(case, module, folder / "int8-source.onnx")
    seen = collect_statistics(model, case.calibration.batches(BATCH))
    settings = QuantizeSettings(Precision.INT8, effort=Effort.BEST)
    ranges = ranges_from(seen, case.calibration.digest)
    images: ImageSet = case.calibration
    out = folder / "int8.onnx"
    quantize_model(model, ranges, settings, out, statistics=seen, images=lambda count: images.first(count, BATCH))
    return case.score(Classification({}).answers(onnx_runner(out), case.test, BATCH))


def row_of(
    case: Case, name: str, share: float, options: DistillOptions, quantise: bool, report: Reporter
) -> dict[str, Any]:
    """Prune, train, score and time."""
    label, make = METHODS[name]
    row: dict[str, Any] = {"name": name, "label": label, "share": share}
    start = time.perf_counter()
    try:
        module = make(case, share)
    except ResvitError as error:
        return {**row, "status": "failed", "reason": error.problem}
    except Exception as error:  # noqa: BLE001  (another library may raise anything)
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {said[-1][:160] if said else ''}"}
    row |= {"status": "ok", "seconds": round(time.perf_counter() - start, 1)}
    row |= {"macs": macs_of(case, module) / macs_of(case, case.module)}
    if row["macs"] > share + 0.02:
        return {**row, "status": "failed", "reason": f"stops at {row['macs']:.0%} of the multiply-accumulates"}
    row |= {"params": sum(p.numel() for p in module.parameters()) / sum(p.numel() for p in case.module.parameters())}
    row["pruned"] = case.score(case.predicted(module))
    return {**row, **trained(case, module, options, {}, quantise, report)}


def trained(
    case: Case, module: nn.Module, options: DistillOptions, masks: Masks, quantise: bool, report: Reporter
) -> dict[str, Any]:
    """Distil, score and time a pruned module."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        distill(module, case.module, case.training, options, folder / "state", "benchmark", report, masks=masks)
        found: dict[str, Any] = {"training_seconds": round(time.perf_counter() - start, 1)}
        found["trained"] = case.score(case.predicted(module))
        models = [onnx_of(case, case.module, folder / "whole.onnx", 1), onnx_of(case, module, folder / "slim.onnx", 1)]
        whole, slim = seconds_of(models, case.shape)
        found["time"] = {"whole_us": round(whole * 1e6, 1), "pruned_us": round(slim * 1e6, 1), "ratio": slim / whole}
        if quantise:
            found["int8"] = int8_score(case, module, folder)
    return found


def sparse_row(case: Case, options: DistillOptions, quantise: bool, report: Reporter) -> dict[str, Any]:
    """2:4 sparsity of the whole network."""
    module = copy.deepcopy(case.module)
    made = sparsify(module, SparseMethod.SPARSEGPT, [images for images, _ in case.batches(512)], report)
    row = {"name": "2:4", "label": "resvit, 2:4 sparsity (SparseGPT)", "share": 1.0, "status": "ok", "macs": 1.0}
    return {
        **row,
        "sparse_share": made.share,
        "pruned": case.score(case.predicted(module)),
        **trained(case, module, options, made.masks, quantise, report),
    }


def markdown(model: str, float_top1: float, rows: list[dict[str, Any]]) -> str:
    """The table."""

    def drop(score: dict[str, Any] | None) -> str:
        if score is None:
            return ""
        low, high = score["interval"]
        return f"{score['drop']:+.2f} [{low:+.2f}, {high:+.2f}]"

    lines = [
        f"# {model}: float top-1 {100 * float_top1:.2f}%",
        "",
        "| method | MACs left | weights left | drop, pruned | drop, trained | drop, and INT8 | CPU time, share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['label']} at {row['share']:.0%} | failed: {row['reason']} | | | | | |")
            continue
        cells = [
            f"{row['label']}",
            f"{row['macs']:.1%}",
            f"{row['params']:.1%}" if "params" in row else f"{row['sparse_share']:.0%} in 2:4",
            drop(row["pruned"]),
            drop(row["trained"]),
            drop(row.get("int8")),
            f"{row['time']['ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--model", default="resvit:embed-nano", show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="[tests/assets/NAME.pt]")
@click.option("--share", "shares", type=float, multiple=True, default=SHARES, show_default=True)
@click.option("--only", multiple=True, type=click.Choice([*METHODS, "2:4"]), help="Only these rows.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--images", default=60_000, show_default=True, help="Training images, held-out ones included.")
@click.option("--int8/--no-int8", default=True, show_default=True, help="Also quantise what was trained.")
@click.option("--again", is_flag=True, help="Compute every row anew.")
def main(
    model: str,
    checkpoint: Path | None,
    shares: tuple[float, ...],
    only: tuple[str, ...],
    epochs: int,
    images: int,
    int8: bool,
    again: bool,
) -> None:
    """Compare."""
    name = model.removeprefix("resvit:")
    case = Case(model, checkpoint or Path(f"tests/assets/{name}.pt"), images)
    options = DistillOptions(epochs=epochs)
    report = reporter(quiet=True)
    float_top1 = float((case.reference.answers == case.reference.labels).mean())
    path = RESULTS / f"pruning-{name}.json"
    known = json.loads(path.read_bytes())["rows"] if path.exists() else []
    kept = {row["key"]: row for row in known}
    every = sorted({*SHARES, *shares}, reverse=True)
    plan = [(method, share) for share in every for method in METHODS] + [("2:4", 1.0)]
    rows = []
    for method, share in plan:
        facts = [method, share, case.digest, str(options), images, int8]
        key = sha256_bytes(canonical_json([str(fact) for fact in facts]))
        row = kept.get(key)
        if (
            (again or row is None or row["status"] != "ok")
            and (not only or method in only)
            and (method == "2:4" or share in shares)
        ):
            quantise = int8 and (method in ("ours", "2:4"))
            made = (
                sparse_row(case, options, quantise, report)
                if method == "2:4"
                else row_of(case, method, share, options, quantise, report)
            )
            row = {**made, "key": key}
            told = f"{row['trained']['drop']:+.2f}" if row["status"] == "ok" else row["reason"]
            click.echo(f"{method} {share}: {told}", err=True)
        if row is not None:
            rows.append(row)
            result = {"model": model, "float_top1": float_top1, "epochs": epochs, "images": images, "rows": rows}
            write_result(f"pruning-{name}", result)
    table = markdown(model, float_top1, rows)
    path.with_suffix(".md").write_text(table)
    click.echo(table)
    best = [r["trained"]["drop"] for r in rows if r["name"] == "ours" and math.isclose(r["share"], 0.5)]
    if best:
        click.echo(f"goal at half the multiply-accumulates: at most 0.5 points; {best[0]:+.2f}")


if __name__ == "__main__":
    main()
