"""Train a semantic segmentation on scenes of Fashion-MNIST items, in a few minutes on two CPU cores.

    python examples/segmentation/train.py --out runs/segmentation/fpn-nano-seg.pt

The checkpoint holds ``state_dict``, ``config`` (for ``resvit_model``) and ``scores`` (mIoU and Dice),
and loads with ``torch.load(..., weights_only=True)``. Killed, it goes on from the last whole epoch when it is run
again; finished and unchanged, it is skipped.
"""

from __future__ import annotations

from resvit_export.models.config import Task
from resvit_export.models.training.command import scene_training_command

HELP = (__doc__ or "").split("\n\n", maxsplit=1)[0]
main = scene_training_command(Task.SEGMENTATION, "resvit:fpn-nano-seg", HELP, scenes=3000, epochs=6)

if __name__ == "__main__":
    main()
