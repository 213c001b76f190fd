"""Where distillation stands: the averaged weights, the best ones, and the file that a killed call goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.progress import Reporter
from resvit_quantize.pruning.distill.options import DistillScore
from resvit_quantize.training.standing import Standing


@dataclass(kw_only=True)
class State(Standing):
    """All that training is made of, beside the student itself and its optimiser."""

    average: dict[str, Tensor]
    """Of every parameter and buffer, where the student is."""
    finite: bool = True

    @property
    def scores(self) -> tuple[DistillScore, ...]:
        """One for the untrained student, and one for each epoch."""
        return tuple(DistillScore(**item) for item in self.history)  # type: ignore[arg-type]

    def add(self, score: DistillScore) -> None:
        """Append ``score``, and keep the averaged weights if they are the best so far."""
        self.history.append(dataclasses.asdict(score))
        self.train_loss, self.train_steps = 0.0, 0
        best = self.scores[self.best_index].loss
        if len(self.history) > 1 and not score.loss < (best if math.isfinite(best) else math.inf):
            self.stale += 1
            return
        # A copy: on the CPU, .cpu() alone would give the average itself.
        self.best = {name: value.detach().cpu().clone() for name, value in self.average.items()}
        self.best_index, self.stale = len(self.history) - 1, 0


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, shared ones once; training changes what they hold and never replaces them."""
    return {**{n: p.detach() for n, p in module.named_parameters()}, **dict(module.named_buffers())}


def load_tensors(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into what :func:`tensors_of` gives."""
    own = tensors_of(module)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


@contextlib.contextmanager
def holding(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, ``module`` holds ``values``."""
    own = {name: value.clone() for name, value in tensors_of(module).items()}
    load_tensors(module, values)
    try:
        yield
    finally:
        load_tensors(module, own)


def move_average(average: Mapping[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the weights and the statistics of BatchNorms; counters are copied.

    The first steps average over few, as in TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``: the
    pruned weights are soon forgotten.
    """
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, value in tensors_of(module).items():
            if value.is_floating_point():
                average[name].lerp_(value.to(average[name].dtype), weight)
            else:
                average[name].copy_(value)


def checked_masks(module: nn.Module, masks: Mapping[str, Tensor], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a parameter and its mask. Raises ``ResvitError`` for a mask that fits none."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            what = "no parameter" if parameter is None else f"one of shape {list(parameter.shape)}"
            raise ResvitError(
                f"There is a mask of shape {list(mask.shape)} for '{name}', and the network has {what} of that name.",
                "Make the masks for the network that is trained, behind all other pruning.",
            )
        pairs.append((parameter, mask.to(device=device, dtype=torch.bool)))
    return pairs


def write_state(
    path: Path, key: str, state: State, module: nn.Module, optimizer: torch.optim.Optimizer, seconds: float
) -> None:
    """Write everything to ``path`` in one step; ``seconds`` are those spent so far."""
    state.seconds = seconds
    document = {
        "key": key,
        "state": {item.name: getattr(state, item.name) for item in dataclasses.fields(state)},
        "student": tensors_of(module),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_file(path) as partial:
        torch.save(document, partial)


def read_state(
    path: Path, key: str, module: nn.Module, optimizer: torch.optim.Optimizer, reporter: Reporter
) -> State | None:
    """Take back what :func:`write_state` wrote; ``None`` if there is nothing of ``key``."""
    if not path.exists():
        return None
    own = {name: value.clone() for name, value in tensors_of(module).items()}
    try:
        document = torch.load(path, weights_only=True, map_location="cpu")
        if document["key"] != key:
            return None
        state = State(**document["state"])
        for values in (document["student"], state.average, state.best):
            if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in own.items()}:
                raise ValueError("the tensors are others")
        state.average = {name: value.to(own[name].device) for name, value in state.average.items()}
        load_tensors(module, document["student"])
        optimizer.load_state_dict(document["optimizer"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError, OSError):
        load_tensors(module, own)
        reporter.warn(f"{path} cannot be read; distillation starts from the beginning.")
        return None
    return state


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
