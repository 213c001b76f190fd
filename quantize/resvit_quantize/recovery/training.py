"""The training loop of recovery."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_engines.files import atomic_file
from resvit_engines.progress import Reporter
from resvit_quantize.qdq.plan import Plan
from resvit_quantize.recovery.options import HELD_OUT, RecoverOptions, RecoverReport, Score
from resvit_quantize.recovery.student import Outputs, Pieces, Student
from resvit_quantize.training.standing import (
    Standing,
    Stop,
    TrainingImages,
    relative_error,
    softened_divergence,
    warmed_cosine,
)

_TEMPERATURE = 2.0
"""Softens the answers that are compared (Hinton et al. 2015)."""
_CLIP = 1.0
"""Largest norm of a step's gradient."""
_SMALLEST_SIZE = 1e-2
"""What counts as the size of a constant that is nearly zero, such as a young bias."""
_SAVE_EVERY = 120.0
"""Seconds after which the state is kept although no score is due."""


def distance(outputs: Outputs, targets: Outputs, labels: Tensor | None, options: RecoverOptions) -> Tensor:
    """The loss: error to signal of all outputs, and for one output [B, K] the divergence of softened answers."""
    errors = [relative_error(outputs[name], target) for name, target in targets.items()]
    loss = torch.stack(errors).mean()
    if (name := _classifier(targets)) is not None:
        loss = loss + softened_divergence(outputs[name], targets[name], _TEMPERATURE)
        if labels is not None and options.label_weight:
            loss = loss + options.label_weight * F.cross_entropy(outputs[name], labels)
    return loss


def _classifier(outputs: Outputs) -> str | None:
    """The name of the output that answers one of K classes, where it is the only one."""
    name, value = next(iter(outputs.items()))
    return name if len(outputs) == 1 and value.ndim == 2 and value.shape[1] > 1 else None


class _State(Standing):
    """Where recovery stands."""

    @property
    def scores(self) -> tuple[Score, ...]:
        return tuple(Score(**item) for item in self.history)  # type: ignore[arg-type]


class Training:
    """Training on ``count`` of the images against ``teacher``."""

    def __init__(
        self,
        plan: Plan,
        teacher: ir.Model,
        bits: int,
        images: TrainingImages,
        count: int,
        options: RecoverOptions,
        state_file: Path,
        key: str,
        reporter: Reporter,
    ) -> None:
        self.options, self.images, self.reporter = options, images, reporter
        self.state_file, self.key = state_file, key
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        order = np.random.default_rng((options.seed, len(images))).permutation(len(images))[:count]
        held = min(max(count // 10, HELD_OUT[0]), HELD_OUT[1])
        self.held_out, self.used = np.sort(order[:held]), np.sort(order[held:])
        self.steps = options.epochs * math.ceil(len(self.used) / options.batch)
        self.student = Student(plan, bits, self.device)
        self.pieces = Pieces(teacher, self._tensors(next(images.batches_at(self.used, options.batch)))[0])
        self.constants, self.stretches = [*self.student.trained.values()], [*self.student.stretches.values()]
        groups = [{"params": [p], "size": max(_rms(p), _SMALLEST_SIZE)} for p in self.constants]
        groups += [{"params": self.stretches, "size": 1.0 if options.learned_clips else 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0.0)

    def run(self) -> tuple[dict[str, npt.NDArray[np.float32]], RecoverReport]:
        """Train, and return the best constants, not on grids, and the report."""
        state = self._resumed()
        began = time.monotonic() - (state.seconds if state else 0.0)
        if state is None:
            state = _State(best=self.student.copies())
            self._evaluate(state)
            self._save(state, began)
        self.reporter.say(f"recover: before training, {state.scores[0]}")
        self._estimate(state)
        stop = self._loop(state, began)
        trained = {name: state.best[name].numpy() for name in self.student.trained}
        scores = state.scores
        report = RecoverReport(
            before=scores[0],
            after=scores[state.best_index],
            history=scores,
            stop=stop,
            images=len(self.used),
            held_out=len(self.held_out),
            epochs=min(self.options.epochs, state.epoch + (1 if state.batch else 0)),
            steps=state.step,
            trained=len(trained),
            seconds=round(time.monotonic() - began, 1),
            device=str(self.device),
            clips=self.student.clips(state.best),
        )
        self.reporter.say(f"recover: {stop.value}; kept step {report.after.step} of {state.step}, {report.after}")
        return trained, report

    def _loop(self, state: _State, began: float) -> Stop:
        saved = time.monotonic()
        left = (self.options.epochs - state.epoch) * len(self.used) - state.batch * self.options.batch
        todo = self.reporter.track(self._batches(state), "recover", left, self.options.batch)
        for batch, ends_epoch in todo:
            loss = self._step(batch, state.step)
            if not math.isfinite(loss):
                self.reporter.warn(f"The loss was not finite at step {state.step}; the best weights so far are kept.")
                return Stop.NOT_FINITE
            state.step += 1
            state.batch += 1
            state.train_loss += loss
            state.train_steps += 1
            if ends_epoch:
                state.epoch, state.batch = state.epoch + 1, 0
            if ends_epoch or state.batch % self.options.evaluate_every == 0:
                score = self._evaluate(state)
                self.reporter.say(f"recover: step {state.step} of {self.steps}, {score}")
                if not math.isfinite(score.loss):
                    return Stop.NOT_FINITE
                if state.stale >= self.options.patience:
                    return Stop.NO_BETTER
            elif time.monotonic() - saved < _SAVE_EVERY:
                continue
            self._save(state, began)
            saved = time.monotonic()
        return Stop.FINISHED

    def _batches(self, state: _State) -> Iterator[tuple[Batch, bool]]:
        """What is left of all epochs; an epoch's order follows from the seed and its number alone."""
        for epoch in range(state.epoch, self.options.epochs):
            order = np.random.default_rng((self.options.seed, epoch, 1)).permutation(self.used)
            yield from _marked(self.images.batches_at(order, self.options.batch, state.batch))

    def _step(self, batch: Batch, step: int) -> float:
        rate = warmed_cosine(self.options.learning_rate, self.options.warmup, step / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["size"]
        loss = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.constants, _CLIP)
        torch.nn.utils.clip_grad_norm_(self.stretches, _CLIP)
        value = float(loss.detach()) if bool(norm.isfinite()) else math.nan
        if math.isfinite(value):
            self.optimizer.step()
        return value

    def _loss(self, batch: Batch) -> Tensor:
        images, labels = self._tensors(batch)
        return distance(self.pieces(self.student, images), self.pieces.targets(images), labels, self.options)

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        labels = None if batch.labels is None else torch.from_numpy(batch.labels).to(self.device)
        return torch.from_numpy(batch.images).to(self.device), labels

    def _evaluate(self, state: _State) -> Score:
        """Score the held-out images, and remember the weights if they are the best so far."""
        noise = signal = loss = 0.0
        same: float | None = 0.0
        seen = 0
        plain = dataclasses.replace(self.options, label_weight=0.0)
        with torch.no_grad():
            for batch in self.images.batches_at(self.held_out, self.options.batch):
                images, _ = self._tensors(batch)
                targets, outputs = self.pieces.targets(images), self.pieces(self.student, images)
                loss += float(distance(outputs, targets, None, plain)) * len(images)
                noise += sum(float((outputs[n] - t).square().sum()) for n, t in targets.items())
                signal += sum(float(t.square().sum()) for t in targets.values())
                name = _classifier(targets)
                if name is None or same is None:
                    same = None
                else:
                    same += float((outputs[name].argmax(1) == targets[name].argmax(1)).sum())
                seen += len(images)
        mean = state.train_loss / state.train_steps if state.train_steps else None
        agreement = None if same is None else same / seen
        score = Score(state.step, loss / seen, noise / max(signal, 1e-12), agreement, mean)
        state.train_loss, state.train_steps = 0.0, 0
        state.history.append(dataclasses.asdict(score))
        if len(state.history) == 1 or score.loss < state.scores[state.best_index].loss:
            state.best, state.best_index, state.stale = self.student.copies(), len(state.history) - 1, 0
        else:
            state.stale += 1
        return score

    def _estimate(self, state: _State) -> None:
        """Time two steps, without taking them, and say how long the rest will last."""
        batches = list(itertools.islice(self.images.batches_at(self.used, self.options.batch), 3))
        start = time.monotonic()
        for index, batch in enumerate(batches):
            self._loss(batch).backward()  # type: ignore[no-untyped-call]
            if index == 0 and len(batches) > 1:
                start = time.monotonic()  # the first one also allocates
        each = (time.monotonic() - start) / max(1, len(batches) - 1)
        self.optimizer.zero_grad(set_to_none=True)
        left = self.steps - state.step
        looks = left / min(self.options.evaluate_every, self.steps / self.options.epochs)
        # A look at one held-out image costs about half of a training step: forward only, twice.
        seconds = each * (left + 0.5 * looks * len(self.held_out) / self.options.batch)
        where = "the GPU" if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        done = f", {state.step} of {self.steps} steps done before" if state.step else ""
        self.reporter.say(
            f"recover: about {spoken(seconds)} for {self.options.epochs} epochs of {len(self.used):,} images "
            f"on {where}{done}"
        )

    def _save(self, state: _State, began: float) -> None:
        state.seconds = time.monotonic() - began
        plain = {item.name: getattr(state, item.name) for item in dataclasses.fields(state)}
        document = {
            "key": self.key,
            "state": plain,
            "learned": self.student.copies(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(self.state_file) as partial:
            torch.save(document, partial)

    def _resumed(self) -> _State | None:
        if not self.state_file.exists():
            return None
        try:
            document = torch.load(self.state_file, weights_only=True, map_location="cpu")
            if document["key"] != self.key:
                return None
            state = _State(**document["state"])
            self.student.load(document["learned"])
            self.optimizer.load_state_dict(document["optimizer"])
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, OSError):
            self.reporter.warn(f"{self.state_file} cannot be read; recovery starts from the beginning.")
            return None
        self.reporter.say(f"recover: going on behind step {state.step} of {self.steps}")
        return state


def _rms(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt())


def spoken(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _marked(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last."""
    waiting: Batch | None = None
    for batch in batches:
        if waiting is not None:
            yield waiting, False
        waiting = batch
    if waiting is not None:
        yield waiting, True
