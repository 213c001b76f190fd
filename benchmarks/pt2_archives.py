"""Does the reader of exported programs take what torch wrote, and nothing that somebody changed in it?

    python benchmarks/pt2_archives.py
    python benchmarks/pt2_archives.py --seconds 60 --only resvit --only swin

Networks of the reference hybrids, timm and transformers, with random weights, are exported for any batch and for one,
written by torch.export.save, and read: graph and tensors must be those that torch.export.load reads. Then each is
changed in one place after the other, every kind of place by a hundred hostile values and more, and loaded and run in
this process under an audit hook. A change must end in a refusal that the user understands, or in a network; an import,
a file opened, a library loaded, a process started is a failure, as is any other error. Archives that are done are kept
in a file, and not done again when a run goes on. Writes ``results/pt2-archives.md`` after each.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from machine import RESULTS, describe_machine
from pt2_fuzz import Parts, changes, watched
from torch import nn

from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.loading.libraries import import_timm, import_transformers
from resvit_export.loading.load import load_network
from resvit_export.loading.pt2 import program_from_pt2
from resvit_export.loading.spec import ModelSpec
from resvit_export.models.reference import resvit_model

_MEMORY = 16 << 30  # bytes: what a changed size asks for must fail here and not take the machine down
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _timm(name: str, **arguments: Any) -> nn.Module:
    return import_timm().create_model(name, pretrained=False, **arguments)  # type: ignore[no-any-return]


def _transformers(name: str, config: str, **arguments: Any) -> nn.Module:
    library = import_transformers()
    return getattr(library, name)(getattr(library, config)(**arguments))  # type: ignore[no-any-return]


def _rt_detr(version: str) -> nn.Module:
    library = import_transformers()
    backbone = library.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return _transformers(
        f"RTDetr{version}ForObjectDetection",
        f"RTDetr{version}Config",
        backbone_config=backbone,
        encoder_in_channels=[24, 32, 48],
        encoder_hidden_dim=32,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=20,
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    **{
        f"resvit:{name}": (lambda name=name: resvit_model(name), (1, 28, 28))
        for name in ("embed-nano", "fpn-nano", "dual-nano")
    },
    **{
        f"resvit:{name}": (lambda name=name: resvit_model(name), (1, 96, 96))
        for name in ("embed-nano-seg", "fpn-nano-det")
    },
    "transformers RT-DETR": (lambda: _rt_detr(""), (3, 96, 96)),
    "transformers RT-DETRv2": (lambda: _rt_detr("V2"), (3, 96, 96)),
    "transformers ViT": (
        lambda: _transformers("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **_SMALL),
        (3, 32, 32),
    ),
    "transformers DINOv2": (
        lambda: _transformers(
            "Dinov2ForImageClassification",
            "Dinov2Config",
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        (3, 32, 32),
    ),
    "transformers BEiT": (
        lambda: _transformers("BeitForImageClassification", "BeitConfig", image_size=32, patch_size=8, **_SMALL),
        (3, 32, 32),
    ),
    "transformers Swin": (
        lambda: _transformers(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        (3, 32, 32),
    ),
    "transformers SegFormer": (
        lambda: _transformers(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=32,
        ),
        (3, 64, 64),
    ),
    "transformers ResNet": (
        lambda: _transformers(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 24],
            depths=[1, 1],
            layer_type="basic",
        ),
        (3, 32, 32),
    ),
    "transformers ConvNeXt": (
        lambda: _transformers(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]
        ),
        (3, 64, 64),
    ),
    "transformers YOLOS": (
        lambda: _transformers(
            "YolosForObjectDetection",
            "YolosConfig",
            image_size=[32, 32],
            patch_size=8,
            num_detection_tokens=5,
            **_SMALL,
        ),
        (3, 32, 32),
    ),
    "transformers DPT": (
        lambda: _transformers(
            "DPTForDepthEstimation",
            "DPTConfig",
            image_size=64,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            **{**_SMALL, "num_hidden_layers": 4},
        ),
        (3, 64, 64),
    ),
    **{
        f"timm {name}": (lambda name=name: _timm(name), (3, size, size))
        for name, size in (
            *(("resnet10t", 64), ("resnet18", 64), ("convnext_atto", 64), ("mobilenetv3_small_050", 64)),
            *(("efficientnet_lite0", 64), ("regnetx_002", 64), ("mobilenetv4_conv_small", 96), ("hrnet_w18_small", 64)),
            *(("vit_tiny_patch16_224", 224), ("vit_tiny_r_s16_p8_224", 224), ("swin_tiny_patch4_window7_224", 224)),
            *(
                ("coatnet_nano_rw_224", 224),
                ("maxvit_rmlp_pico_rw_256", 256),
                ("levit_128s", 224),
                ("botnet26t_256", 256),
            ),
            *(
                ("mobilevitv2_050", 128),
                ("efficientformer_l1", 224),
                ("eva02_tiny_patch14_224", 224),
                ("fastvit_t8", 256),
            ),
            *(("xcit_nano_12_p16_224", 224), ("mvitv2_tiny", 224), ("gcvit_xxtiny", 224), ("edgenext_xx_small", 128)),
        )
    },
}


@dataclass
class Row:
    """What came of one network."""

    name: str
    batch: str
    nodes: int = 0
    problem: str = ""
    outcomes: Counter[str] = field(default_factory=Counter)


def exported(module: nn.Module, shape: tuple[int, int, int], path: Path, *, dynamic: bool) -> None:
    """Export for batches of any size, or of 2, and write as a user would."""
    sizes = ({0: torch.export.Dim.AUTO(min=1)},) if dynamic else None
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), (torch.zeros(2, *shape),), dynamic_shapes=sizes, strict=False)
        torch.export.save(program, path)


def difference(path: Path) -> tuple[int, str]:
    """Nodes of the graph that is read, and how it differs from what torch reads; empty where it does not."""
    try:
        own = program_from_pt2(path)
    except ResvitError as error:
        return 0, error.problem
    theirs = torch.export.load(path)
    if str(own.graph) != str(theirs.graph):
        return len(own.graph.nodes), "another graph"
    for name, tensor in {**theirs.state_dict, **theirs.constants}.items():
        mine = {**own.state_dict, **own.constants}.get(name)
        same = isinstance(mine, torch.Tensor) and mine.dtype == tensor.dtype and torch.equal(mine, tensor)
        if not same and not torch.isnan(tensor).any():
            return len(own.graph.nodes), f"another {name}"
    return len(own.graph.nodes), ""


def outcome(path: Path) -> str:
    """``refused``, ``loaded``, or what went wrong while a changed archive was loaded and run once."""
    seen: list[str] = []
    with watched(path, seen):
        try:
            load_network(ModelSpec(str(path)))
            result = "loaded"
        except ResvitError as error:
            result = "refused" if error.code is ExitCode.INPUT else f"exit code {error.code}"
        except Exception as error:  # noqa: BLE001 what is counted here
            result = f"{type(error).__name__}: {error}"[:200]
    return f"touched {seen[0]}" if seen else result


@click.command()
@click.option("--only", multiple=True, help="Networks whose name has this in it.")
@click.option("--seconds", default=30.0, show_default=True, help="For the changes to one archive.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--done",
    "kept",
    type=click.Path(path_type=Path),
    default=Path("runs/pt2-archives.jsonl"),
    show_default=True,
    help="Archives that are done, a line each; without it everything is done again.",
)
def main(only: tuple[str, ...], seconds: float, seed: int, kept: Path) -> None:
    """Read archives as torch wrote them, then changed ones."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    names = [name for name in NETWORKS if not only or any(part in name for part in only)]
    settings = {"seconds": seconds, "seed": seed, "torch": torch.__version__}
    done = _done(kept, settings)
    kept.parent.mkdir(parents=True, exist_ok=True)
    for number, (name, batch) in enumerate((name, batch) for name in names for batch in ("any", "2")):
        if (name, batch) in done:
            continue
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "it.pt2"
            row = _row(name, batch, path)
            if path.exists() and not row.problem:
                _attack(row, path, seconds, random.Random(seed + number))
        with kept.open("a") as stream:
            stream.write(json.dumps({**settings, "row": vars(row)}) + "\n")
        done[name, batch] = row
        said = row.problem or f"{row.nodes} nodes, as torch reads it"
        click.echo(f"{name}, batch {batch}: {said}; {dict(row.outcomes)}")
        if not only:
            (RESULTS / "pt2-archives.md").write_text(_page(list(done.values()), seconds, seed))


def _done(kept: Path, settings: dict[str, Any]) -> dict[tuple[str, str], Row]:
    """The archives that an earlier run with the same settings finished, by name and batch."""
    rows: dict[tuple[str, str], Row] = {}
    for line in kept.read_text().splitlines() if kept.exists() else ():
        document = json.loads(line)
        row = Row(**document.pop("row"))
        if document == settings:
            row.outcomes = Counter(row.outcomes)
            rows[row.name, row.batch] = row
    return rows


def _row(name: str, batch: str, path: Path) -> Row:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    try:
        exported(make(), shape, path, dynamic=batch == "any")
    except Exception as error:  # noqa: BLE001 not every network can be exported for any batch
        return Row(name, batch, problem=f"not exported: {str(error).splitlines()[0][:100]}")
    nodes, problem = difference(path)
    return Row(name, batch, nodes, problem)


def _attack(row: Row, path: Path, seconds: float, chosen: random.Random) -> None:
    parts, changed = Parts(path), path.with_name("changed.pt2")
    outcome(path)  # torch imports parts of its own when it first needs them
    if (plain := outcome(path)) != "loaded":
        row.outcomes[f"unchanged: {plain}"] += 1
        return
    end = time.monotonic() + seconds
    for what, members in changes(parts, chosen):
        if time.monotonic() > end:
            break
        result = outcome(parts.written(changed, members))
        row.outcomes[result if result in ("refused", "loaded") else f"{what}: {result}"] += 1


def _page(rows: list[Row], seconds: float, seed: int) -> str:
    read = [row for row in rows if not row.problem]
    unexported = [row for row in rows if row.problem.startswith("not exported")]
    refused, loaded = (sum(row.outcomes[kind] for row in rows) for kind in ("refused", "loaded"))
    wrong = [(row, what) for row in rows for what in row.outcomes if what not in ("refused", "loaded")]
    machine = describe_machine()
    lines = [
        "# Archives of exported programs",
        "",
        f"`python benchmarks/pt2_archives.py --seconds {seconds:g} --seed {seed}`; {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB; Python {machine['python']}, "
        f"torch {torch.__version__}.",
        "",
        f"{len(rows)} of {2 * len(NETWORKS)} archives were tried. "
        f"{len(read)} of {len(rows) - len(unexported)} exports are read as torch reads them. "
        f"Of {refused + loaded + len(wrong):,} changed archives {refused:,} were refused, {loaded:,} were loaded and "
        f"run, and {len(wrong):,} went wrong.",
        "",
        "| network | batch | nodes | read | changed: refused | loaded |",
        "|---|---|---:|---|---:|---:|",
        *(
            f"| {row.name} | {row.batch} | {row.nodes or ''} | {row.problem or 'as torch does'} "
            f"| {row.outcomes['refused']:,} | {row.outcomes['loaded']:,} |"
            for row in rows
        ),
        *(f"\n- {row.name}, batch {row.batch}: {what}" for row, what in wrong),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
