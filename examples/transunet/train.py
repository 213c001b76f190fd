"""Train the small TransUNet on scenes of Fashion-MNIST items, in a few minutes on two CPU cores.

    python examples/transunet/train.py --out runs/transunet/transunet.pt

A plain loop, as a user would have one: cross-entropy, AdamW, one cycle. The checkpoint is what
``torch.save(model.state_dict())`` writes.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import numpy as np
from model import transunet

from resvit_calibrate.readers.scenes import Scenes, normalised
from resvit_engines.files import atomic_file
from resvit_engines.progress import reporter
from resvit_export.models.training.errors import spoken_errors


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("runs/transunet/transunet.pt"))
@click.option("--scenes", type=click.IntRange(16, 10**6), default=12_000, show_default=True, help="Each is seen once.")
@click.option("--batch", type=click.IntRange(1, 1000), default=16, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress.")
def main(*, out: Path, scenes: int, batch: int, quiet: bool) -> None:
    """Train, and write the weights."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    model = transunet().to(memory_format=torch.channels_last)
    steps = scenes // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    source, report = Scenes("train"), reporter(quiet)
    with spoken_errors("begins again"):
        for step in report.track(range(steps), "train", scenes, batch):
            some = list(source.scenes(step * batch, batch))
            images = torch.from_numpy(normalised(np.stack([scene.pixels for scene in some])))
            masks = torch.from_numpy(np.stack([scene.mask().classes for scene in some]).astype(np.int64))
            loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), masks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as partial:
            torch.save({name: value.contiguous() for name, value in model.state_dict().items()}, partial)
    click.echo(f"{out}: trained on {steps * batch} scenes, last loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
