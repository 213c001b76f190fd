"""The training loop of distillation."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.pruning.distill.features import compared_features
from resvit_quantize.pruning.distill.loss import distance, is_class_score, label_loss, outputs_of, shifted
from resvit_quantize.pruning.distill.options import (
    HELD_OUT,
    HELD_OUT_SHARE,
    DistillOptions,
    DistillReport,
    DistillScore,
)
from resvit_quantize.pruning.distill.state import (
    State,
    checked_masks,
    holding,
    interrupts_wait,
    load_tensors,
    move_average,
    read_state,
    tensors_of,
    write_state,
)
from resvit_quantize.pruning.distill.worker import worker
from resvit_quantize.pruning.losses import answers
from resvit_quantize.training.standing import Stop, TrainingImages, relative_error, warmed_cosine

_SAVE_EVERY = 120.0
"""Seconds after which the state is kept although no epoch has ended."""
_BETAS = (0.9, 0.99)
"""The second is lower than usual, since so short a training has no time for a long average."""


class Training:
    """Training of ``student`` on ``count`` of the images against ``teacher``."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: TrainingImages,
        count: int,
        options: DistillOptions,
        masks: Mapping[str, Tensor],
        state_file: Path,
        key: str,
        reporter: Reporter,
    ) -> None:
        self.student, self.teacher, self.images, self.options = student, teacher, images, options
        self.masks, self.state_file, self.key, self.reporter = masks, state_file, key, reporter
        order = np.random.default_rng((options.seed, len(images))).permutation(len(images))[:count]
        held = min(max(round(count * HELD_OUT_SHARE), HELD_OUT[0]), HELD_OUT[1], count // 3)
        self.held_out, self.used = np.sort(order[:held]), np.sort(order[held:])

    def run(self) -> DistillReport:
        """Train, leave the best weights in the student, and report."""
        modes = [(part, part.training) for part in itertools.chain(self.student.modules(), self.teacher.modules())]
        homes = [(module, _home(module)) for module in (self.student, self.teacher)]
        with worker() as self.worker:
            self.device = self.worker.device
            if self.worker.rank:
                self.reporter = SILENT
            forked = [self.device] if self.device.type == "cuda" else []
            try:
                with torch.random.fork_rng(forked):
                    return self._run()
            finally:
                for module, home in homes:
                    module.to(home)
                for part, mode in modes:
                    part.training = mode

    def _run(self) -> DistillReport:
        self.began = time.monotonic()
        for module in (self.student, self.teacher):
            module.to(self.device).eval()
        # What is left over at an epoch's end is too few for a BatchNorm, and is in another order in the next.
        each = max(1, self.options.batch // self.worker.world)
        self.batch = min(each, len(self.used) // self.worker.world)
        self.per_epoch = len(self.used) // (self.batch * self.worker.world)
        self.steps = self.options.epochs * self.per_epoch
        self.pairs = checked_masks(self.student, self.masks, self.device)
        self._mask()
        pair = self._tensors(next(self.images.batches_at(self.used[:2], 2)))[0]
        self.features = compared_features(self.student, self.teacher, pair, self.options)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.student, self.options.weight_decay), lr=self.options.learning_rate, betas=_BETAS
        )
        state = read_state(self.state_file, self._key(), self.student, self.optimizer, self.reporter)
        if state is None:
            average = {name: value.clone() for name, value in tensors_of(self.student).items()}
            state = State(average=average, best={})
            state.add(self._score(state))
            self._save(state)
        else:
            self.began -= state.seconds
            self.reporter.say(f"distill: going on behind step {state.step} of {self.steps}")
        self.reporter.say(f"distill: before training, {state.scores[0]}; features {', '.join(self.features) or 'none'}")
        stop = self._loop(state)
        load_tensors(self.student, state.best)
        report = DistillReport(
            before=state.scores[0],
            after=state.scores[state.best_index],
            history=state.scores,
            stop=stop,
            images=len(self.used),
            held_out=len(self.held_out),
            epochs=min(self.options.epochs, state.epoch + (1 if state.batch else 0)),
            steps=state.step,
            features=self.features,
            seconds=round(time.monotonic() - self.began, 1),
            device=str(self.device),
        )
        self.reporter.say(f"distill: {stop.value}; kept step {report.after.step} of {state.step}, {report.after}")
        return report

    def _loop(self, state: State) -> Stop:
        module = self.worker.joined(self.student)
        saved = time.monotonic()
        stop = self._stop(state)
        left = (self.steps - state.step) * self.batch * self.worker.world
        todo = self.reporter.track(self._batches(state), "distill", left, self.batch * self.worker.world)
        try:
            while stop is None:
                if state.batch < self.per_epoch:
                    batch = next(todo, None)
                    if batch is None:
                        raise ResvitError("The training images ended before the epoch did.", "Check the data set.")
                    with interrupts_wait():
                        self._take(module, batch, state)
                if state.batch == self.per_epoch:
                    self._end_epoch(state)
                stop = self._stop(state)
                if state.batch == 0 or time.monotonic() - saved >= _SAVE_EVERY:
                    self._save(state)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self._save(state)
            raise
        if left and stop is Stop.FINISHED:
            next(todo, None)  # lets the progress come to its end
        return stop

    def _stop(self, state: State) -> Stop | None:
        if not state.finite:
            self.reporter.warn(f"The loss was not finite at step {state.step}; the best weights so far are kept.")
            return Stop.NOT_FINITE
        if self.options.patience is not None and state.stale >= self.options.patience:
            return Stop.NO_BETTER
        return Stop.FINISHED if state.epoch >= self.options.epochs else None

    def _batches(self, state: State) -> Iterator[Batch]:
        """What is left of all epochs; an epoch's order follows from the seed and its number alone."""
        each = self.per_epoch * self.batch
        for epoch in range(state.epoch, self.options.epochs):
            order = np.random.default_rng((self.options.seed, epoch, 1)).permutation(self.used)
            own = order[self.worker.rank :: self.worker.world][:each]
            yield from self.images.batches_at(own, self.batch, state.batch)

    def _take(self, module: nn.Module, batch: Batch, state: State) -> None:
        """One step, with all that must go with it."""
        loss = self._step(module, batch, state.step)
        if not math.isfinite(loss):
            state.finite = False
            return
        move_average(state.average, self.student, self.options.ema, state.step)
        state.step += 1
        state.batch += 1
        state.train_loss += loss
        state.train_steps += 1

    def _end_epoch(self, state: State) -> None:
        score = self._score(state)
        with interrupts_wait():
            state.add(score)
            state.epoch, state.batch = state.epoch + 1, 0
        self.reporter.say(f"distill: epoch {state.epoch} of {self.options.epochs}, {score}")

    def _step(self, module: nn.Module, batch: Batch, step: int) -> float:
        # Seeded by the step, so that dropout in a resumed training is that of one in a piece.
        torch.manual_seed((self.options.seed * 1_000_003 + step) * 4096 + self.worker.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = warmed_cosine(self.options.learning_rate, self.options.warmup, step / self.steps)
        module.train()
        loss = self._loss(module, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, mask in self.pairs:
            if parameter.grad is not None:
                parameter.grad *= mask
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.options.clip)
        value = float(self.worker.mean(loss.detach())) if bool(norm.isfinite()) else math.nan
        if math.isfinite(value):
            self.optimizer.step()
            self._mask()
        return value

    def _loss(self, module: nn.Module, batch: Batch) -> Tensor:
        images, labels = self._tensors(batch)
        images = shifted(images, self.options.shift)
        with self._autocast():
            with torch.no_grad(), outputs_of(self.teacher, self.features) as there:
                targets = answers(self.teacher, images)
            with outputs_of(self.student, self.features) as here:
                outputs = answers(module, images)
        if len(outputs) != len(targets):
            raise ResvitError(
                f"While it trains, the pruned network answers with {len(outputs)} tensors instead of {len(targets)}.",
                "Give a module that answers in training as it does otherwise.",
            )
        loss = distance(outputs, targets, self.options)
        if self.features and self.options.feature_weight:
            errors = [relative_error(here[path], there[path]) for path in self.features]
            loss = loss + self.options.feature_weight * torch.stack(errors).mean()
        if labels is not None and self.options.label_weight:
            loss = loss + self.options.label_weight * label_loss(outputs, labels, self.options)
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """BF16 on a GPU that has it: it needs no scaling of the loss, and the rest is fast enough without."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def _mask(self) -> None:
        with torch.no_grad():
            for parameter, mask in self.pairs:
                parameter.mul_(mask)

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        labels = None if batch.labels is None else torch.from_numpy(batch.labels).to(self.device)
        return torch.from_numpy(batch.images).to(self.device), labels

    def _score(self, state: State) -> DistillScore:
        """Score the averaged weights on the held-out images."""
        self.worker.same(state.average.values())
        with torch.no_grad(), holding(self.student, state.average):
            self.student.eval()
            score = self._scored(state)
        # The last bit may differ between two GPUs, and all must keep the same weights.
        loss = torch.tensor([score.loss], dtype=torch.float64, device=self.device)
        self.worker.same([loss])
        return dataclasses.replace(score, loss=float(loss))

    def _scored(self, state: State) -> DistillScore:
        loss = noise = signal = 0.0
        seen = judged = same = labelled = right = 0
        for batch in self.images.batches_at(self.held_out, self.batch):
            images, labels = self._tensors(batch)
            with self._autocast():
                targets, outputs = answers(self.teacher, images), answers(self.student, images)
            loss += float(distance(outputs, targets, self.options)) * len(images)
            for output, target in zip(outputs, targets, strict=True):
                noise += float((output.float() - target.float()).square().sum())
                signal += float(target.float().square().sum())
                if not is_class_score(target, len(targets), self.options.answer):
                    continue
                answer = output.argmax(1)
                same, judged = same + int((answer == target.argmax(1)).sum()), judged + len(images)
                if labels is not None:
                    known = labels >= 0
                    right, labelled = right + int((answer == labels)[known].sum()), labelled + int(known.sum())
            seen += len(images)
        return DistillScore(
            step=state.step,
            loss=loss / seen,
            nsr=noise / max(signal, 1e-12),
            agreement=same / judged if judged else None,
            top1=right / labelled if labelled else None,
            train_loss=state.train_loss / state.train_steps if state.train_steps else None,
        )

    def _save(self, state: State) -> None:
        if self.worker.rank == 0:
            seconds = time.monotonic() - self.began
            write_state(self.state_file, self._key(), state, self.student, self.optimizer, seconds)

    def _key(self) -> str:
        """Another number of processes cuts the epochs into other batches."""
        return f"{self.key} {self.worker.world}"


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices and filters; leave biases, norms and embeddings alone."""
    groups: dict[float, list[Tensor]] = {weight_decay: [], 0.0: []}
    for name, value in module.named_parameters():
        if value.requires_grad:
            groups[weight_decay if name.endswith("weight") and value.ndim >= 2 else 0.0].append(value)
    return [{"params": values, "weight_decay": decay} for decay, values in groups.items() if values]


def _home(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
