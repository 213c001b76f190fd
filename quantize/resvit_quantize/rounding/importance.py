"""How much each position of a layer's output matters to the network's outputs.

In front of a class token's head nothing but the class token matters, and a map's border matters less than its middle;
an error summed over all positions alike would spend a layer's few levels on the wrong ones. The weight of a position
is the squared gradient of the outputs there, summed over channels (the Fisher weights of BRECQ, Li et al. 2021, by
position), taken with random signs at the outputs as in :mod:`resvit_quantize.sensitivity.sensitivity`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_quantize.torch_graph.graph import TorchGraph

_IMAGES = 64
_PROBES = 2
_FLOOR = 0.05
"""The least weight of a position, the mean being one: it keeps fits regular where only few positions matter."""


def position_importance(graph: TorchGraph, nodes: Iterable[ir.Node], chunks: Sequence[Batch]) -> dict[ir.Node, Tensor]:
    """A weight for each output position of an image, [P] with a mean of one, by node.

    ``chunks`` hold as many images as the graph's batch; the first 64 images are looked at.
    """
    wanted, generator = set(nodes), torch.Generator().manual_seed(0)
    sums: dict[ir.Node, Tensor] = {}

    def writing(node: ir.Node, result: Tensor) -> Tensor:
        if node not in wanted:
            return result
        if not result.requires_grad:
            result.requires_grad_()

        def hook(gradient: Tensor) -> None:
            found = _by_position(node, gradient)
            if node in sums and len(found) != len(sums[node]):
                wanted.discard(node)  # its rows are not positions of one image: the images lie along another axis
                del sums[node]
            elif node in wanted:
                sums[node] = sums.get(node, 0.0) + found

        result.register_hook(hook)  # type: ignore[no-untyped-call]
        return result

    seen = 0
    for chunk in chunks:
        outputs = [v for v in graph(graph.feeds(chunk), writing=writing).values() if v.requires_grad]
        for left in reversed(range(_PROBES)):
            # Every output counts alike, whatever its unit.
            signs = [
                (torch.randint(0, 2, value.shape, generator=generator) * 2.0 - 1.0) / (value.detach().norm() + 1e-30)
                for value in outputs
            ]
            if outputs:
                torch.autograd.backward(outputs, signs, retain_graph=left > 0)
        seen += len(chunk.images)
        if seen >= _IMAGES:
            break
    return {node: _normalised(found) for node, found in sums.items() if found.sum() > 0 and found.isfinite().all()}


def _by_position(node: ir.Node, gradient: Tensor) -> Tensor:
    """Squares summed over channels and images: [P]."""
    squares = gradient.detach().square()
    if node.op_type == "Conv":
        return squares.sum((0, 1)).reshape(-1)
    return squares.sum(-1).sum(0).reshape(-1) if squares.ndim > 2 else squares.sum()[None]


def _normalised(found: Tensor) -> Tensor:
    mean = found.mean()
    return (found / mean + _FLOOR) / (1.0 + _FLOOR)
