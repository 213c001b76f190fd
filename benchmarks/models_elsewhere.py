"""Models that people deploy, with random weights, through every stage to an engine for RTX 4090 and a bundle for Orin.

    python benchmarks/models_elsewhere.py --out benchmarks/results/models-elsewhere.md

Weights cannot be had everywhere, architectures can: fidelity, sizes and what the builder makes of a graph need no
training. Accuracy is not measured: a network of random weights has none, and the gate says so (undecided). Images are
scenes of Fashion-MNIST items for detectors and segmenters, Fashion-MNIST for classifiers. A model that is done already
is not run again; --only names some.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from machine import describe_machine

ROOT = Path(__file__).parent.parent
STAGES = ("fold", "export", "calibrate", "quantize", "validate", "compile", "audit", "bundle")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Model:
    """What is built: ``--model`` and further options, and the kind of its images."""

    model: str
    data: str
    options: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """Of a Hugging Face model: its configuration's class and arguments, its own class, its image processor."""


def _rt_detr(depth: int) -> dict[str, Any]:
    """As PekingU/rtdetr_r18vd and rtdetr_r50vd are configured."""
    features = ["stage2", "stage3", "stage4"]
    if depth == 18:
        trunk = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
        own = {"encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5, "decoder_layers": 3}
    else:
        trunk, own = {}, {"encoder_in_channels": [512, 1024, 2048]}
    return {
        "config": "RTDetrConfig",
        "backbone": ("RTDetrResNetConfig", {**trunk, "out_features": features}),
        "arguments": own,
        "architecture": "RTDetrForObjectDetection",
        "processor": {"do_normalize": False, "size": {"height": 640, "width": 640}, "resample": 2},
        "labels": 80,
    }


MODELS = {
    "RT-DETR R18, 640 px": Model("hf:", "detection", settings=_rt_detr(18)),
    "RT-DETR R50, 640 px": Model("hf:", "detection", settings=_rt_detr(50)),
    "DETR R50, 800 px": Model(
        "hf:",
        "detection",
        settings={
            "config": "DetrConfig",
            "backbone": ("ResNetConfig", {"out_features": ["stage4"]}),
            "arguments": {"use_timm_backbone": False, "backbone": None},
            "architecture": "DetrForObjectDetection",
            "processor": {**IMAGENET, "size": {"shortest_edge": 800, "longest_edge": 1333}, "resample": 2},
            "labels": 91,
        },
    ),
    "ViT-B/16, 224 px (Hugging Face)": Model(
        "hf:",
        "fashion-mnist",
        settings={
            "config": "ViTConfig",
            "arguments": {},
            "architecture": "ViTForImageClassification",
            "processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}},
            "labels": 1000,
        },
    ),
    "SegFormer-B0, 512 px": Model(
        "hf:",
        "segmentation",
        settings={
            "config": "SegformerConfig",
            "arguments": {},
            "architecture": "SegformerForSemanticSegmentation",
            "processor": {**IMAGENET, "size": {"height": 512, "width": 512}, "resample": 2},
            "labels": 150,
        },
    ),
    "ViT-B/16, 224 px (torchvision)": Model(
        "torchvision.models:vit_b_16",
        "fashion-mnist",
        ("--preprocess", "mean=0.485,0.456,0.406", "--preprocess", "std=0.229,0.224,0.225"),
    ),
    "TransUNet R50+ViT-B/16, 224 px": Model(
        "examples/transunet/model.py:transunet_base",
        "segmentation",
        ("--preprocess", "mean=0.5,0.5,0.5", "--preprocess", "std=0.5,0.5,0.5", "--model-arg", "classes=11"),
    ),
    "R26+ViT-S/32, 224 px (timm)": Model("timm:vit_small_r26_s32_224", "fashion-mnist"),
    "BoTNet-26t, 256 px (timm)": Model("timm:botnet26t_256", "fashion-mnist"),
    "CoAtNet-nano, 224 px (timm)": Model("timm:coatnet_nano_rw_224", "fashion-mnist"),
    "LeViT-128, 224 px (timm)": Model("timm:levit_128", "fashion-mnist"),
    "MobileViTv2-0.5, 256 px (timm)": Model("timm:mobilevitv2_050", "fashion-mnist"),
}

_FIGURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "export-*/export.json": lambda found: {
        "nodes": found["nodes"],
        "parameters": found["parameters"],
        "parity": found["parity_max_rel"],
    },
    "quantize-*/quantize.json": lambda found: {"share": found["macs_share"]},
    "validate-*/verdict.json": lambda found: {"sqnr_db": found["stages"][-1]["sqnr_db"]},
    "audit-*/audit.json": lambda found: {
        "kernels": found["totals"]["kernels"],
        "fp16_kernels": found["fp16"]["kernels"],
        "attention": len(found["attention"]),
    },
}
"""What the table takes from the files of a run."""


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Markdown. [standard output]")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/elsewhere"))
@click.option("--only", multiple=True, help="Part of a model's name.")
def main(*, out: Path | None, runs: Path, only: tuple[str, ...]) -> None:
    """Build every model and write the table."""
    chosen = {name: m for name, m in MODELS.items() if not only or any(part.lower() in name.lower() for part in only)}
    rows = [
        row_of(name, model, runs / re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")) for name, model in chosen.items()
    ]
    text = table(rows)
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        click.echo(text)


def row_of(name: str, model: Model, folder: Path) -> dict[str, Any]:
    """Build one model, if it is not built yet, and read what its run recorded."""
    done = folder / "row.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    reference = model.model + (str(hugging_face_folder(model.settings, folder / "model")) if model.settings else "")
    data = model.data if model.data == "fashion-mnist" else str(scenes(folder.parent / "scenes") / model.data)
    click.echo(f"{name} …", err=True)
    few = ["--calibration-images", "8", "--validation-images", "8", "--no-search", "--quiet"]
    command = ["build", "--precision", "int8", "--target", "rtx-4090", "--target", "jetson-orin", "--model", reference]
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "resvit_export",
            *command,
            "--data",
            data,
            *few,
            "--run",
            str(folder / "run"),
            *model.options,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    row = {"name": name, "code": made.returncode, **recorded(folder / "run")}
    if made.returncode not in (0, 4, 5):
        row["error"] = made.stderr.strip().splitlines()[-2:]
    else:
        done.write_text(json.dumps(row))
    return row


def recorded(run: Path) -> dict[str, Any]:
    """Seconds and peak memory of each stage, and the figures of the table, as far as the build came."""
    stages: dict[str, Any] = {}
    for path in run.glob("*/record.json"):
        record = json.loads(path.read_bytes())
        known = stages.setdefault(record["stage"], {"seconds": 0.0, "peak_mib": 0})
        known["seconds"] += record["seconds"]
        known["peak_mib"] = max(known["peak_mib"], record["peak_mib"])
    row: dict[str, Any] = {"stages": stages}
    for pattern, take in _FIGURES.items():
        for path in sorted(run.glob(pattern))[:1]:
            row |= take(json.loads(path.read_bytes()))
    row["engines"] = len(list(run.glob("compile-*/engine.plan")))
    row["bundles"] = len(list(run.glob("bundle-*/*.resvit")))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    machine = describe_machine()
    lines = [
        "# Models from elsewhere, stage by stage",
        "",
        " ".join((__doc__ or "").split("\n\n")[2].split()),
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + ". Seconds are of this machine, and noisy. `python benchmarks/models_elsewhere.py`",
        "",
        "| model | weights | "
        + " | ".join(STAGES)
        + " | peak | nodes | parity | products in INT8 | kernels (FP16) | ends in |",
        "|---|---|" + "---|" * (len(STAGES) + 6),
    ]
    for row in rows:
        stages = row["stages"]
        seconds = [f"{stages[s]['seconds']:.0f} s" if s in stages else "—" for s in STAGES]
        peak = max((stage["peak_mib"] for stage in stages.values()), default=0)
        share = row.get("share")
        ends = " ".join(row["error"]) if "error" in row else f"{row['engines']} engine, {row['bundles']} bundles"
        cells = [
            row["name"],
            f"{row.get('parameters', 0) / 1e6:.1f} M",
            *seconds,
            f"{peak / 1024:.1f} GiB",
            str(row.get("nodes", "—")),
            f"{row['parity']:.0e}" if "parity" in row else "—",
            f"{share:.1%}" if isinstance(share, float) else "—",
            f"{row['kernels']} ({row['fp16_kernels']})" if "kernels" in row else "—",
            ends,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scenes(folder: Path) -> Path:
    """Scenes as files, written once."""
    if not (folder / "detection" / "val").exists():
        command = [
            sys.executable,
            str(ROOT / "examples" / "scenes.py"),
            "--out",
            str(folder),
            "--train",
            "40",
            "--val",
            "40",
        ]
        subprocess.run([*command, "--quiet"], check=True)
    return folder


def hugging_face_folder(settings: dict[str, Any], folder: Path) -> Path:
    """Write a folder with a configuration and no weights."""
    from resvit_export.loading.libraries import import_transformers

    transformers = import_transformers()
    arguments = dict(settings["arguments"])
    if backbone := settings.get("backbone"):
        arguments["backbone_config"] = getattr(transformers, backbone[0])(**backbone[1])
    config = getattr(transformers, settings["config"])(**arguments)
    config.num_labels, config.architectures = settings["labels"], [settings["architecture"]]
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings["processor"]))
    return folder.resolve()


if __name__ == "__main__":
    main()
