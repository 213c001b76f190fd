"""The file that a killed training goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from resvit_engines.files import atomic_file
from resvit_engines.progress import Reporter
from resvit_quantize.training.standing import Standing


class Resumable(Protocol):
    """What trains, as far as the file is concerned."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose state goes into the file as well."""
        ...

    def kept(self) -> dict[str, Tensor]:
        """Copies on the CPU of the weights that are scored."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that the next step depends on, by what they are and by name."""
        ...

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what :meth:`state` gave. Raises ``ValueError`` for other tensors, and then changes nothing."""
        ...


def write_standing(path: Path, key: str, standing: Standing, learner: Resumable) -> None:
    """Write where training stands to ``path`` in one step."""
    document = {
        "key": key,
        "standing": {item.name: getattr(standing, item.name) for item in dataclasses.fields(standing)},
        "learner": learner.state(),
        "optimizer": learner.optimizer.state_dict(),
    }
    with atomic_file(path) as partial:
        torch.save(document, partial)


def read_standing(path: Path, key: str, learner: Resumable, reporter: Reporter) -> Standing | None:
    """Take back what :func:`write_standing` wrote; ``None`` if there is nothing of ``key``."""
    if not path.exists():
        return None
    before = {part: {n: v.clone() for n, v in tensors.items()} for part, tensors in learner.state().items()}
    try:
        document: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if document["key"] != key:
            return None
        standing = Standing(**document["standing"])
        require_same_shapes(standing.best, learner.kept())
        learner.load_state(document["learner"])
        learner.optimizer.load_state_dict(document["optimizer"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError, OSError):
        learner.load_state(before)
        reporter.warn(f"{path} cannot be read; training starts from the beginning.")
        return None
    return standing


def require_same_shapes(values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` where names or shapes differ."""
    if {name: value.shape for name, value in values.items()} != {name: value.shape for name, value in own.items()}:
        raise ValueError("the tensors are others")


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end, so that no step is taken by half; in the main thread only."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
