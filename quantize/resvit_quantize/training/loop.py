"""The training loop of recovery and distillation: epochs, warmed cosine, held-out scores, a file to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Reporter
from resvit_quantize.training.resume import Resumable, interrupts_wait, read_standing, write_standing
from resvit_quantize.training.standing import (
    Standing,
    Stop,
    TrainingImages,
    TrainingReport,
    TrainingScore,
    warmed_cosine,
)
from resvit_quantize.training.worker import Worker

_SAVE_EVERY = 120.0
"""Seconds after which the state is kept although no score is due."""


class Learner(Resumable, Protocol):
    """What trains. Each group of its optimiser's parameters has a ``size``, which its learning rate is relative to."""

    @property
    def told(self) -> str:
        """What the loss of the answers is, in words."""
        ...

    @property
    def score_type(self) -> type[TrainingScore]:
        """What :meth:`score` gives."""
        ...

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The loss of a batch, with its gradients."""
        ...

    def clip(self) -> Tensor:
        """Bound the gradients, and return their norm before."""
        ...

    def stepped(self, step: int) -> None:
        """Called behind each step of the optimiser."""
        ...

    def score(self, step: int, train_loss: float | None) -> TrainingScore:
        """Score :meth:`kept` on the held-out images; ``train_loss`` is the mean since the last score."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long training goes, and how fast."""

    what: str
    """The word for it in front of all that is said."""
    epochs: int
    batch: int
    """Images in a step, of this process."""
    steps_per_epoch: int
    learning_rate: float
    """Peak of the cosine."""
    warmup: float
    """Share of all steps in which the learning rate rises."""
    patience: int | None
    """Scores without an improvement after which training stops; ``None`` trains all epochs."""
    seed: int
    score_every: int | None = None
    """Steps between two scores; an epoch's end always has one."""

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.epochs * self.steps_per_epoch


def split(count: int, total: int, held_out: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The positions of the held-out images, and of those to train on: ``count`` of ``total`` together."""
    order = np.random.default_rng((seed, total)).permutation(total)[:count]
    return np.sort(order[:held_out]), np.sort(order[held_out:])


class Training:
    """Training of ``learner`` on the images at the positions ``used``.

    ``key`` tells the trainings apart that one ``state_file`` may be of. It is written every two minutes, behind each
    score and on Ctrl-C, by the first process alone.
    """

    def __init__(
        self,
        learner: Learner,
        images: TrainingImages,
        used: npt.NDArray[np.int64],
        schedule: Schedule,
        worker: Worker,
        state_file: Path,
        key: str,
        reporter: Reporter,
    ) -> None:
        self.learner, self.images, self.used, self.schedule = learner, images, used, schedule
        self.worker, self.state_file, self.reporter = worker, state_file, reporter
        # Another number of processes cuts the epochs into other batches.
        self.key = f"{key} {worker.world}"
        self.together = schedule.batch * worker.world

    def run(
        self, held_out: int, announce: Callable[[int], None] | None = None
    ) -> tuple[dict[str, Tensor], TrainingReport[Any]]:
        """Train, and return the best weights, on the CPU, and what was done; ``held_out`` images are scored.

        ``announce`` is called with the steps that are done before the first one is taken.
        """
        self.began = time.monotonic()
        what, total = self.schedule.what, self.schedule.steps
        standing = read_standing(self.state_file, self.key, self.learner, self.reporter)
        if standing is None:
            standing = Standing()
            self._score(standing)
            self._save(standing)
        else:
            self.began -= standing.seconds
            self.reporter.say(f"{what}: going on behind step {standing.step} of {total}")
        self.reporter.say(f"{what}: the loss is of {self.learner.told}")
        self.reporter.say(f"{what}: before training, {self._scores(standing)[0]}")
        if announce is not None:
            announce(standing.step)
        stop = self._loop(standing)
        scores = self._scores(standing)
        report = TrainingReport(
            before=scores[0],
            after=scores[standing.best_index],
            history=scores,
            stop=stop,
            images=len(self.used),
            held_out=held_out,
            epochs=min(self.schedule.epochs, standing.epoch + (1 if standing.batch else 0)),
            steps=standing.step,
            seconds=round(time.monotonic() - self.began, 1),
            device=str(self.worker.device),
            objective=self.learner.told,
        )
        self.reporter.say(f"{what}: {stop.value}; kept step {report.after.step} of {standing.step}, {report.after}")
        return standing.best, report

    def _loop(self, standing: Standing) -> Stop:
        saved = time.monotonic()
        stop = self._stop(standing)
        left = self._images_left(standing)
        todo = self.reporter.track(self._batches(standing), self.schedule.what, left, self.together)
        try:
            while stop is None:
                if not self._score_is_due(standing):
                    batch = next(todo, None)
                    if batch is None:
                        raise ResvitError("The training images ended before the epoch did.", "Check the data set.")
                    with interrupts_wait():
                        self._take(batch, standing)
                scored = self._score_is_due(standing)
                if scored:
                    score = self._score(standing)
                    self.reporter.say(f"{self.schedule.what}: {self._place(standing)}, {score}")
                stop = self._stop(standing)
                if scored or stop is not None or time.monotonic() - saved >= _SAVE_EVERY:
                    self._save(standing)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self._save(standing)
            raise
        if left and stop is Stop.FINISHED:
            next(todo, None)  # lets the progress come to its end
        return stop

    def _stop(self, standing: Standing) -> Stop | None:
        if not standing.finite:
            self.reporter.warn(f"The loss was not finite at step {standing.step}; the best weights so far are kept.")
            return Stop.NOT_FINITE
        if self.schedule.patience is not None and standing.stale >= self.schedule.patience:
            return Stop.NO_BETTER
        return Stop.FINISHED if standing.epoch >= self.schedule.epochs else None

    def _batches(self, standing: Standing) -> Iterator[Batch]:
        """What is left of all epochs; an epoch's order follows from the seed and its number alone."""
        for epoch in range(standing.epoch, self.schedule.epochs):
            order = np.random.default_rng((self.schedule.seed, epoch, 1)).permutation(self.used)
            own = order[self.worker.rank :: self.worker.world][: self.schedule.steps_per_epoch * self.schedule.batch]
            yield from self.images.batches_at(own, self.schedule.batch, standing.batch)

    def _images_left(self, standing: Standing) -> int:
        in_epoch = min(len(self.used), self.schedule.steps_per_epoch * self.together)
        return (self.schedule.epochs - standing.epoch) * in_epoch - standing.batch * self.together

    def _take(self, batch: Batch, standing: Standing) -> None:
        """One step, with all that must go with it; none where the loss or its gradient is not finite."""
        optimizer, step = self.learner.optimizer, standing.step
        rate = warmed_cosine(self.schedule.learning_rate, self.schedule.warmup, step / self.schedule.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["size"]
        loss = self.learner.loss(batch, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self.learner.clip()
        value = float(self.worker.mean(loss.detach())) if bool(norm.isfinite()) else math.nan
        if not math.isfinite(value):
            standing.finite = False
            return
        optimizer.step()
        self.learner.stepped(step)
        standing.step += 1
        standing.batch += 1
        standing.train_loss += value
        standing.train_steps += 1

    def _score_is_due(self, standing: Standing) -> bool:
        if not standing.finite or standing.history[-1]["step"] == standing.step:
            return False
        every = self.schedule.score_every
        ends = standing.batch == self.schedule.steps_per_epoch
        return ends or (every is not None and standing.batch > 0 and standing.batch % every == 0)

    def _score(self, standing: Standing) -> TrainingScore:
        """Score the held-out images, and keep the weights if they are the best so far."""
        mean = standing.train_loss / standing.train_steps if standing.train_steps else None
        score = self.learner.score(standing.step, mean)
        with interrupts_wait():
            standing.add(score, self.learner.kept)
            if standing.batch == self.schedule.steps_per_epoch:
                standing.epoch, standing.batch = standing.epoch + 1, 0
        return score

    def _scores(self, standing: Standing) -> tuple[TrainingScore, ...]:
        return tuple(self.learner.score_type(**item) for item in standing.history)  # type: ignore[arg-type]

    def _place(self, standing: Standing) -> str:
        if standing.batch == 0:
            return f"epoch {standing.epoch} of {self.schedule.epochs}"
        return f"step {standing.step} of {self.schedule.steps}"

    def _save(self, standing: Standing) -> None:
        if self.worker.rank == 0:
            standing.seconds = time.monotonic() - self.began
            write_standing(self.state_file, self.key, standing, self.learner)
