"""This process among those that torchrun has started: PyTorch's own way to train on several GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Worker:
    """This process among those that torchrun has started; alone without it."""

    rank: int
    world: int
    device: torch.device

    def mean(self, value: Tensor) -> Tensor:
        """Of all processes."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def joined(self, module: nn.Module) -> nn.Module:
        """``module``, with gradients that are the mean of all processes."""
        if self.world == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)

    def same(self, values: Iterable[Tensor]) -> None:
        """Give every process what the first one has."""
        if self.world > 1:
            for value in values:
                dist.broadcast(value, 0)


@contextlib.contextmanager
def worker() -> Iterator[Worker]:
    """Join the processes that torchrun has started, if it has, and leave them at the end."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local if world > 1 else torch.cuda.current_device()) if cuda else torch.device("cpu")
    joins = world > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Worker(dist.get_rank() if world > 1 else 0, world, device)
    finally:
        if joins:
            dist.destroy_process_group()
