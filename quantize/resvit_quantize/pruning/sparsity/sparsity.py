"""2:4 sparsity: of every four weights along the input channels, two are zero, and sparse tensor cores skip them.

Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks". NVIDIA ModelOpt finds the masks; what it gets wrong
is set right in ``torch_sparsity``. TensorRT runs a layer sparse if, for each output channel and each tap of the
kernel, every four input channels have two zeros or more (its developer guide, "Structured Sparsity").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.targets.table import SPARSE_SMS, Target
from resvit_quantize.pruning.sparsity.report import Layout, SparseMethod, SparseReport

if TYPE_CHECKING:
    from torch import Tensor, nn


def has_sparse_tensor_cores(sm: int) -> bool:
    """Whether a GPU of compute capability ``sm`` (87 is 8.7) has 2:4 sparsity: Ampere and later."""
    return sm in SPARSE_SMS


def require_sparsity(target: Target) -> None:
    """Refuse 2:4 sparsity where it gains nothing. Raises ``ResvitError`` with code IMPOSSIBLE."""
    if not has_sparse_tensor_cores(target.sm):
        raise ResvitError(
            f"{target.title} has no sparse tensor cores: 2:4 sparsity needs compute capability 8.0 or newer, "
            f"and this is {target.sm / 10:.1f}.",
            "Leave 2:4 sparsity out for this target; pruning channels helps everywhere.",
            ExitCode.IMPOSSIBLE,
        )


def is_two_to_four(weight: Tensor, layout: Layout) -> bool:
    """Whether every four input channels of ``weight`` have two zeros or more, at each output channel and tap."""
    if weight.ndim < 2 or weight.shape[1] % 4 or (layout is Layout.LINEAR) != (weight.ndim == 2):
        return False
    fours = weight.detach().movedim(1, -1).reshape(-1, 4)
    return bool(((fours != 0).sum(1) <= 2).all())


def sparsify(
    module: nn.Module, method: SparseMethod, batches: Iterable[Tensor], reporter: Reporter = SILENT
) -> SparseReport:
    """Set two of every four weights of ``module`` to zero, in place, wherever TensorRT can gain from it.

    Left alone, and named, are the layers that read the image and those that answer, grouped convolutions, layers
    whose input channels are no multiple of four, and layers that compute their weights anew in each pass.
    ``batches`` are images [B, C, H, W]: the first shows how the network runs, and ``SPARSEGPT`` uses them all. The
    module stays an ordinary one; only the masks know of the pattern.

    Raises ``ResvitError`` with code MISSING where ModelOpt does not import, and where there is no image, the
    network cannot read them, or the calibration is not finite.
    """
    from resvit_quantize.pruning.sparsity.masks import masks_by_modelopt

    return masks_by_modelopt(module, method, batches, reporter)
