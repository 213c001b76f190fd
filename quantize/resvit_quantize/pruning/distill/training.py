"""What distillation trains: a pruned network, towards the answers of the whole one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.pruning.copies import copy_of
from resvit_quantize.pruning.distill.features import compared_features
from resvit_quantize.pruning.distill.loss import Answering, is_class_score, label_loss, outputs_of, shifted
from resvit_quantize.pruning.distill.options import (
    HELD_OUT,
    HELD_OUT_SHARE,
    DistillOptions,
    DistillReport,
    DistillScore,
)
from resvit_quantize.pruning.distill.tensors import checked_masks, holding, load_tensors, move_average, tensors_of
from resvit_quantize.pruning.losses import answers
from resvit_quantize.training.loop import Schedule, Training, split
from resvit_quantize.training.objectives.objective import Teaching
from resvit_quantize.training.resume import require_same_shapes
from resvit_quantize.training.standing import TrainingImages, relative_error
from resvit_quantize.training.worker import Worker, worker

_BETAS = (0.9, 0.99)
"""The second is lower than usual, since so short a training has no time for a long average."""


def train(
    student: nn.Module,
    teacher: nn.Module,
    images: TrainingImages,
    count: int,
    options: DistillOptions,
    masks: Mapping[str, Tensor],
    state_file: Path,
    key: str,
    reporter: Reporter,
    teaching: Teaching | None,
) -> DistillReport:
    """Train ``student`` on ``count`` of the images, leave the best weights in it, and report."""
    with _borrowed(student, teacher) as process:
        held = min(max(round(count * HELD_OUT_SHARE), HELD_OUT[0]), HELD_OUT[1], count // 3)
        held_out, used = split(count, len(images), held, options.seed)
        # What is left over at an epoch's end is too few for a BatchNorm, and is in another order in the next.
        batch = min(max(1, options.batch // process.world), len(used) // process.world)
        learner = DistillLearner(student, teacher, images, held_out, used, batch, options, masks, process, teaching)
        schedule = Schedule(
            "distill",
            options.epochs,
            batch,
            len(used) // (batch * process.world),
            options.learning_rate,
            options.warmup,
            options.patience,
            options.seed,
        )
        reporter = SILENT if process.rank else reporter
        reporter.say(f"distill: features {', '.join(learner.features) or 'none'}")
        best, report = Training(learner, images, used, schedule, process, state_file, key, reporter).run(len(held_out))
        load_tensors(student, best)
    return DistillReport(**vars(report), features=learner.features)


@contextlib.contextmanager
def _borrowed(student: nn.Module, teacher: nn.Module) -> Iterator[Worker]:
    """Both networks on this process's device, with random numbers of their own; afterwards all is where it was."""
    modes = [(part, part.training) for part in itertools.chain(student.modules(), teacher.modules())]
    homes = [(module, _home(module)) for module in (student, teacher)]
    with worker() as process:
        forked = [process.device] if process.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(forked):
                for module in (student, teacher):
                    module.to(process.device).eval()
                yield process
        finally:
            for module, home in homes:
                module.to(home)
            for part, mode in modes:
                part.training = mode


class DistillLearner:
    """A student whose averaged weights learn to answer as ``teacher`` does."""

    score_type = DistillScore

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: TrainingImages,
        held_out: npt.NDArray[np.int64],
        used: npt.NDArray[np.int64],
        batch: int,
        options: DistillOptions,
        masks: Mapping[str, Tensor],
        process: Worker,
        teaching: Teaching | None,
    ) -> None:
        self.student, self.teacher, self.images, self.options = student, teacher, images, options
        self.held_out, self.batch, self.worker, self.device = held_out, batch, process, process.device
        self.pairs = checked_masks(student, masks, self.device)
        self._mask()
        pair = self._tensors(next(images.batches_at(used[:2], 2)))[0]
        self.features = compared_features(student, teacher, pair, options)
        self.steady = steady_parts(student, pair)
        with torch.no_grad():
            self.answering = Answering(teaching, answers(teacher, pair), options)
        self.told = self.answering.told
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(student, options.weight_decay), lr=options.learning_rate, betas=_BETAS
        )
        self.average = {name: value.clone() for name, value in tensors_of(student).items()}
        """Of every parameter and buffer, where the student is."""
        self.joined = process.joined(student)

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The distance from the teacher's answers and maps, and from the labels where they count."""
        # Seeded by the step, so that dropout in a resumed training is that of one in a piece.
        torch.manual_seed((self.options.seed * 1_000_003 + step) * 4096 + self.worker.rank)
        self.joined.train()
        for part in self.steady:
            part.training = False
        images, labels = self._tensors(batch)
        images = shifted(images, self.options.shift)
        batch = batch if not self.options.shift else dataclasses.replace(batch, targets=None)
        with self._autocast():
            with torch.no_grad(), outputs_of(self.teacher, self.features) as teacher_maps:
                targets = answers(self.teacher, images)
            with outputs_of(self.student, self.features) as student_maps:
                outputs = answers(self.joined, images)
        if len(outputs) != len(targets):
            raise ResvitError(
                f"While it trains, the pruned network answers with {len(outputs)} tensors instead of {len(targets)}.",
                "Give a module that answers in training as it does otherwise.",
            )
        loss = self.answering(outputs, targets, batch)
        if self.features and self.options.feature_weight:
            errors = [relative_error(student_maps[path], teacher_maps[path]) for path in self.features]
            loss = loss + self.options.feature_weight * torch.stack(errors).mean()
        if labels is not None and self.options.label_weight:
            loss = loss + self.options.label_weight * label_loss(outputs, labels, self.options)
        return loss

    def clip(self) -> Tensor:
        """Mask the gradients, and bound their norm."""
        for parameter, mask in self.pairs:
            if parameter.grad is not None:
                parameter.grad *= mask
        return nn.utils.clip_grad_norm_(self.student.parameters(), self.options.clip)

    def stepped(self, step: int) -> None:
        """Mask the weights, and let the average follow them."""
        self._mask()
        move_average(self.average, self.student, self.options.ema, step)

    def kept(self) -> dict[str, Tensor]:
        """The averaged weights."""
        # A copy: on the CPU, .cpu() alone would give the average itself.
        return {name: value.detach().cpu().clone() for name, value in self.average.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The student and its average."""
        return {"student": tensors_of(self.student), "average": self.average}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take them back."""
        for values in (state["student"], state["average"]):
            require_same_shapes(values, self.average)
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        load_tensors(self.student, state["student"])

    def score(self, step: int, train_loss: float | None) -> DistillScore:
        """Distance, noise, agreement and top-1 of the averaged weights on the held-out images."""
        self.worker.same(self.average.values())
        with torch.no_grad(), holding(self.student, self.average):
            self.student.eval()
            score = self._scored(step, train_loss)
        # The last bit may differ between two GPUs, and all must keep the same weights.
        loss = torch.tensor([score.loss], dtype=torch.float64, device=self.device)
        self.worker.same([loss])
        return dataclasses.replace(score, loss=float(loss))

    def _scored(self, step: int, train_loss: float | None) -> DistillScore:
        loss = noise = signal = 0.0
        seen = judged = same = labelled = right = 0
        for batch in self.images.batches_at(self.held_out, self.batch):
            images, labels = self._tensors(batch)
            with self._autocast():
                targets, outputs = answers(self.teacher, images), answers(self.student, images)
            loss += float(self.answering(outputs, targets, batch)) * len(images)
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
            step=step,
            loss=loss / seen,
            nsr=noise / max(signal, 1e-12),
            agreement=same / judged if judged else None,
            top1=right / labelled if labelled else None,
            train_loss=train_loss,
        )

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


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices and filters; leave biases, norms and embeddings alone."""
    groups: dict[float, list[Tensor]] = {weight_decay: [], 0.0: []}
    for name, value in module.named_parameters():
        if value.requires_grad:
            groups[weight_decay if name.endswith("weight") and value.ndim >= 2 else 0.0].append(value)
    return [{"params": values, "weight_decay": decay, "size": 1.0} for decay, values in groups.items() if values]


def steady_parts(module: nn.Module, images: Tensor) -> list[nn.Module]:
    """The parts that stay in evaluation while ``module`` trains; none where it answers in training as it does else.

    Auxiliary heads (GoogLeNet) and losses come from the modules that put layers together, which then have to stay;
    BatchNorm and dropout are layers, which train.
    """
    trial = copy_of(module)
    with torch.no_grad():
        wanted = [output.shape for output in answers(trial.eval(), images)]
        try:
            same = [output.shape for output in answers(trial.train(), images)] == wanted
        except Exception:  # noqa: BLE001 - whatever a forward raises that asks for labels
            same = False
    return [] if same else [part for part in module.modules() if next(part.children(), None) is not None]


def _home(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
