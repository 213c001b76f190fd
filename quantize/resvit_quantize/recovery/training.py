"""What recovery trains: constants and clips of the fake-quantised graph, towards the answers of the float one."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_engines.progress import Reporter
from resvit_quantize.qdq.plan import Plan
from resvit_quantize.recovery.options import HELD_OUT, RecoverOptions, RecoverReport, Score
from resvit_quantize.recovery.student import Outputs, Pieces, Student
from resvit_quantize.training.loop import Schedule, Training, split
from resvit_quantize.training.objectives.objective import Teaching
from resvit_quantize.training.resume import require_same_shapes
from resvit_quantize.training.standing import TrainingImages, relative_error, softened_divergence
from resvit_quantize.training.worker import Worker

_TEMPERATURE = 2.0
"""Softens the answers that are compared (Hinton et al. 2015)."""
_CLIP = 1.0
"""Largest norm of a step's gradient."""
_RATES = (1.0, 1 / 3, 1 / 10, 1 / 30, 1 / 100, 1 / 300)
"""What shares of the learning rate are tried."""
_SMALLEST_SIZE = 1e-2
"""What counts as the size of a constant that is nearly zero, such as a young bias."""


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


def train(
    plan: Plan,
    teacher: ir.Model,
    bits: int,
    images: TrainingImages,
    count: int,
    options: RecoverOptions,
    state_file: Path,
    key: str,
    reporter: Reporter,
    teaching: Teaching | None,
) -> tuple[dict[str, npt.NDArray[np.float32]], RecoverReport]:
    """Train on ``count`` of the images, and return the best constants, not on grids, and the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_out, used = split(count, len(images), min(max(count // 10, HELD_OUT[0]), HELD_OUT[1]), options.seed)
    learner = RecoveryLearner(plan, teacher, bits, images, held_out, used, options, device, teaching)
    schedule = Schedule(
        "recover",
        options.epochs,
        options.batch,
        math.ceil(len(used) / options.batch),
        learner.usable_rate(),
        options.warmup,
        options.patience,
        options.seed,
        options.evaluate_every,
    )

    def announce(done: int) -> None:
        seconds = learner.seconds_left(schedule, done)
        where = "the GPU" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        before = f", {done} of {schedule.steps} steps done before" if done else ""
        reporter.say(
            f"recover: about {spoken(seconds)} for {options.epochs} epochs of {len(used):,} images on {where}{before}, "
            f"at a learning rate of {schedule.learning_rate:.2g}"
        )

    training = Training(learner, images, used, schedule, Worker(0, 1, device), state_file, key, reporter)
    best, report = training.run(len(held_out), announce)
    trained = {name: best[name].numpy() for name in learner.student.trained}
    return trained, RecoverReport(**vars(report), trained=len(trained), clips=learner.student.clips(best))


class RecoveryLearner:
    """The constants and clips of a plan, which learn to answer as ``teacher`` does."""

    score_type = Score

    def __init__(
        self,
        plan: Plan,
        teacher: ir.Model,
        bits: int,
        images: TrainingImages,
        held_out: npt.NDArray[np.int64],
        used: npt.NDArray[np.int64],
        options: RecoverOptions,
        device: torch.device,
        teaching: Teaching | None,
    ) -> None:
        self.images, self.held_out, self.used, self.options, self.device = images, held_out, used, options, device
        self.student = Student(plan, bits, device)
        sample = next(images.batches_at(used, options.batch))
        self.pieces = Pieces(teacher, sample, device)
        answers = self.pieces.targets(self.pieces.feeds(sample.first(2)))
        shapes = {name: value.shape for name, value in answers.items() if value.is_floating_point()}
        self.objective = teaching.objective(shapes) if teaching else None
        plain = "the float model's outputs: error to signal"
        plain += ", and divergence of classes" if _classifier(answers) else ""
        self.told = f"{plain}; {self.objective.told}" if self.objective else plain
        self.constants, self.stretches = [*self.student.trained.values()], [*self.student.stretches.values()]
        groups = [{"params": [p], "size": max(_rms(p), _SMALLEST_SIZE)} for p in self.constants]
        groups += [{"params": self.stretches, "size": 1.0 if options.learned_clips else 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0.0)

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The distance from the teacher's answers, and from the labels where they count."""
        del step
        feeds = self.pieces.feeds(batch)
        labels = None if batch.labels is None else torch.from_numpy(batch.labels).to(self.device)
        outputs, targets = self.pieces(self.student, feeds), self.pieces.targets(feeds)
        loss = distance(outputs, targets, labels, self.options)
        return loss if self.objective is None else loss + self.objective(outputs, targets, batch)

    def usable_rate(self) -> float:
        """The learning rate whose first step, as long as at its peak, leaves the least loss on images of another batch.

        A step of AdamW has the length of its rate. At few bits errors are large and so may steps be; at 8 bits what
        is left to win is a hundred times smaller, and the steps that few bits want undo more than training wins back.
        """
        if not self.options.tries_rates:
            return self.options.learning_rate
        first, *others = itertools.islice(self.images.batches_at(self.used, self.options.batch), 2)
        self.loss(first, 0).backward()  # type: ignore[no-untyped-call]
        before = self.student.copies()
        signs = [torch.zeros_like(value) if value.grad is None else value.grad.sign() for value in self.constants]
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[float, float] = {}
        for share in _RATES:
            rate = share * self.options.learning_rate
            with torch.no_grad():
                for value, sign, group in zip(self.constants, signs, self.optimizer.param_groups, strict=False):
                    value.sub_(rate * group["size"] * sign)
                found = float(self.loss(others[0] if others else first, 0))
            self.student.load(before)
            losses[rate] = found if math.isfinite(found) else math.inf
        return min(losses, key=lambda rate: losses[rate])

    def clip(self) -> Tensor:
        """Bound the gradients of constants and clips apart; the norm of the constants'."""
        norm = torch.nn.utils.clip_grad_norm_(self.constants, _CLIP)
        torch.nn.utils.clip_grad_norm_(self.stretches, _CLIP)
        return norm

    def stepped(self, step: int) -> None:
        """Nothing follows a step."""

    def kept(self) -> dict[str, Tensor]:
        """All that is learned, as it is now."""
        return self.student.copies()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What is learned."""
        return {"learned": self.student.copies()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take it back."""
        require_same_shapes(state["learned"], self.student.learned)
        self.student.load(state["learned"])

    def score(self, step: int, train_loss: float | None) -> Score:
        """Distance, noise and agreement on the held-out images."""
        noise = signal = loss = 0.0
        same: float | None = 0.0
        seen = 0
        plain = dataclasses.replace(self.options, label_weight=0.0)
        with torch.no_grad():
            for batch in self.images.batches_at(self.held_out, self.options.batch):
                feeds = self.pieces.feeds(batch)
                targets, outputs = self.pieces.targets(feeds), self.pieces(self.student, feeds)
                loss += float(distance(outputs, targets, None, plain)) * len(batch.images)
                if self.objective is not None:
                    loss += float(self.objective(outputs, targets, batch)) * len(batch.images)
                noise += sum(float((outputs[n] - t).square().sum()) for n, t in targets.items())
                signal += sum(float(t.square().sum()) for t in targets.values())
                name = _classifier(targets)
                if name is None or same is None:
                    same = None
                else:
                    same += float((outputs[name].argmax(1) == targets[name].argmax(1)).sum())
                seen += len(batch.images)
        agreement = None if same is None else same / seen
        return Score(step, loss / seen, noise / max(signal, 1e-12), agreement, train_loss)

    def seconds_left(self, schedule: Schedule, done: int) -> float:
        """Time two steps, without taking them, and say how long all behind the first ``done`` will last."""
        batches = list(itertools.islice(self.images.batches_at(self.used, self.options.batch), 3))
        start = time.monotonic()
        for index, batch in enumerate(batches):
            self.loss(batch, 0).backward()  # type: ignore[no-untyped-call]
            if index == 0 and len(batches) > 1:
                start = time.monotonic()  # the first one also allocates
        each = (time.monotonic() - start) / max(1, len(batches) - 1)
        self.optimizer.zero_grad(set_to_none=True)
        left = schedule.steps - done
        scores = left / min(self.options.evaluate_every, schedule.steps_per_epoch)
        # A held-out image costs about half of a training step's: forward only, twice.
        return each * (left + 0.5 * scores * len(self.held_out) / self.options.batch)


def _rms(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt())


def spoken(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
