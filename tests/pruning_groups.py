"""Groups written by hand, for tests of what is decided about them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from resvit_quantize.pruning.groups import Count, Group, Kind, Role, Slice


def positions(units: int, each: int = 1, start: int = 0) -> np.ndarray:
    """[units, each]: units that lie one behind the other from ``start``."""
    return start + np.arange(units * each).reshape(units, each)


def hidden(name: str, writer: str, reader: str, units: int, *norms: str, kind: Kind = Kind.MLP) -> Group:
    """The channels between two layers, with the norms on the way."""
    index = positions(units)
    writes = [
        f"{writer}.weight",
        f"{writer}.bias",
        *(f"{norm}.{each}" for norm in norms for each in ("weight", "bias")),
    ]
    slices = [Slice(tensor, 0, index, Role.WRITES) for tensor in writes]
    return Group(name, kind, units, (*slices, Slice(f"{reader}.weight", 1, index, Role.READS)), ())


class ConvNet(nn.Module):
    """Convolution, BatchNorm, ReLU, convolution, mean over the map, classifier: (B, 3, 8, 8) → (B, 5)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)
        nn.init.normal_(self.norm.bias)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(torch.relu(self.norm(self.conv1(x))))
        return self.fc(torch.relu(x).mean((2, 3)))

    def groups(self) -> tuple[Group, Group]:
        width = self.conv1.out_channels
        return (
            hidden("conv1", "conv1", "conv2", width, "norm", kind=Kind.CHANNELS),
            hidden("conv2", "conv2", "fc", 16, kind=Kind.CHANNELS),
        )


def embed_groups(module: nn.Module) -> tuple[Group, ...]:
    """Heads, MLP channels, blocks and the inner trunk channels of an embed hybrid with basic blocks."""
    state = module.state_dict()
    found = []
    for path, each in module.named_modules():
        if path.endswith(".branch"):
            units = len(state[f"{path}.0.conv.weight"])
            index = positions(units)
            names = ["conv.weight", *(f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var"))]
            slices = [Slice(f"{path}.0.{name}", 0, index, Role.WRITES) for name in names]
            slices.append(Slice(f"{path}.1.conv.weight", 1, index, Role.READS))
            found.append(Group(f"{path}.0.conv", Kind.CHANNELS, units, tuple(slices), ()))
        elif path.endswith(".attn"):
            heads, size = each.heads, each.head_dim
            rows = [positions(heads, size, part * heads * size) for part in range(3)]
            slices = [Slice(f"{path}.qkv.{name}", 0, r, Role.WRITES) for r in rows for name in ("weight", "bias")]
            slices.append(Slice(f"{path}.proj.weight", 1, rows[0], Role.READS))
            counts = (Count(path, "heads", 1),)
            found.append(Group(f"{path}.qkv", Kind.HEADS, heads, tuple(slices), counts, width=size))
        elif path.endswith(".mlp"):
            found.append(hidden(f"{path}.fc1", f"{path}.fc1", f"{path}.fc2", len(state[f"{path}.fc1.weight"])))
        elif path.startswith("blocks.") and path.count(".") == 1:
            found.append(Group(path, Kind.BLOCKS, 1, (), (), identities=(path,), exact=False))
    return tuple(found)


def without(module: nn.Module, group: Group, units: list[int]) -> None:
    """Zero whatever reads some units: for exact groups, as if they were gone."""
    state = module.state_dict()
    with torch.no_grad():
        for part in group.slices:
            if part.role is Role.READS:
                gone = torch.from_numpy(part.index[units].reshape(-1))
                state[part.tensor].index_fill_(part.axis, gone, 0.0)
