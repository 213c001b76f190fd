"""Distillation behind pruning, on small networks with known answers."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from resvit_calibrate.images.image_set import Batch  # noqa: E402
from resvit_engines.errors import ResvitError  # noqa: E402
from resvit_export.models.reference import resvit_model  # noqa: E402
from resvit_quantize.pruning.distill.distill import distill  # noqa: E402
from resvit_quantize.pruning.distill.features import feature_paths  # noqa: E402
from resvit_quantize.pruning.distill.loss import distance, label_loss, shifted  # noqa: E402
from resvit_quantize.pruning.distill.options import Answer, DistillOptions, DistillReport  # noqa: E402
from resvit_quantize.pruning.distill.tensors import move_average, tensors_of  # noqa: E402
from resvit_quantize.training.standing import Stop, warmed_cosine  # noqa: E402

FAST = DistillOptions(epochs=2, batch=16, learning_rate=1e-2, ema=0.8)


class Images:
    """Random images; ``killed_at`` interrupts that batch, ``broken_at`` makes it NaN (held-out ones count too)."""

    def __init__(
        self, count: int = 240, *, labels: npt.NDArray[np.int64] | None = None, killed_at: int = -1, broken_at: int = -1
    ) -> None:
        self.pixels = np.random.default_rng(1).standard_normal((count, 2, 8, 8)).astype(np.float32)
        self.labels, self.killed_at, self.broken_at, self.read = labels, killed_at, broken_at, 0
        self.digest = "random"

    def __len__(self) -> int:
        return len(self.pixels)

    def batches_at(self, positions: npt.NDArray[np.int64], batch_size: int, skip: int = 0) -> Iterator[Batch]:
        for start in range(skip * batch_size, len(positions), batch_size):
            self.read += 1
            if self.read == self.killed_at:
                raise KeyboardInterrupt
            here = positions[start : start + batch_size]
            pixels = self.pixels[here] * (np.nan if self.read == self.broken_at else 1)
            yield Batch(pixels.astype(np.float32), None if self.labels is None else self.labels[here])


class Net(nn.Module):
    """Convolution, two residual blocks of hidden width ``hidden``, dropout, classes."""

    def __init__(self, hidden: int = 16, classes: int = 5, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.drop(self.norm(x.mean((2, 3)))))
        return result


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, hidden, 1), nn.Conv2d(hidden, 8, 3, padding=1)
        self.branch = nn.Sequential(self.up, nn.ReLU(), self.down)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.branch(x)
        return result


def networks(hidden: int = 8) -> tuple[Net, Net]:
    """A student with the first ``hidden`` of the teacher's 16 hidden channels, and the teacher."""
    torch.manual_seed(0)
    teacher, student = Net(), Net(hidden)
    with torch.no_grad():
        teacher.head.weight.mul_(8.0)
        for (_, to), value in zip(student.named_parameters(), teacher.parameters(), strict=True):
            to.copy_(value[tuple(slice(0, size) for size in to.shape)])
        for to, value in zip(student.buffers(), teacher.buffers(), strict=True):
            to.copy_(value)
    return student, teacher


def trained(
    folder: Path, options: DistillOptions = FAST, images: Images | None = None, **extra: object
) -> tuple[Net, DistillReport]:
    student, teacher = networks()
    return student, distill(student, teacher, images or Images(), options, folder / "state", "key", **extra)  # type: ignore[arg-type]


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


class Auxiliary(Net):
    """Answers with a second head while it trains, as GoogLeNet does."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__(hidden)
        self.second = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"logits": logits, "second": self.second(x.mean((2, 3)).repeat(1, 4))} if self.training else logits


class Losing(Net):
    """Asks for targets while it trains, and answers with losses then, as torchvision's detectors do."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(x)
        if not self.training:
            return logits
        if targets is None:
            raise ValueError("targets should not be None while training")
        return {"loss": nn.functional.cross_entropy(logits, targets)}


@pytest.mark.whole
@pytest.mark.parametrize("kind", [Auxiliary, Losing])
def test_a_network_that_answers_otherwise_in_training_is_trained_on_what_it_answers_else(
    kind: type[Net], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    teacher, student = kind(), kind()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        student.head.weight.add_(torch.randn_like(student.head.weight), alpha=0.3)
    mean = student.stem[1].running_mean
    assert mean is not None
    before = mean.clone()
    report = distill(student, teacher, Images(), dataclasses.replace(FAST, epochs=4), tmp_path / "state", "key")
    assert report.after.loss < 0.6 * report.before.loss
    assert not torch.equal(before, mean)  # its BatchNorms trained


@pytest.mark.whole
def test_a_narrower_student_comes_nearer_to_the_teacher(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    student, teacher = networks()
    whole = copy.deepcopy(teacher)
    student.train()
    torch.manual_seed(5)
    after_this = torch.rand(3)
    torch.manual_seed(5)
    report = distill(student, teacher, Images(), dataclasses.replace(FAST, epochs=4), tmp_path / "state", "key")
    assert report.after.loss < 0.6 * report.before.loss
    assert report.after.nsr < 0.7 * report.before.nsr
    assert report.after.agreement is not None
    assert report.before.agreement is not None
    assert report.after.agreement >= report.before.agreement
    assert report.after.top1 is None
    assert report.after.loss == min(score.loss for score in report.history)
    assert [score.step for score in report.history] == [0, 10, 20, 30, 40]
    assert (report.stop, report.steps, report.epochs, report.images, report.held_out) == (
        Stop.FINISHED, 40, 4, 160, 80,
    )  # fmt: skip
    assert report.features == ("stem", "blocks.0", "blocks.1", "norm")
    json.dumps(report.to_json(), allow_nan=False)
    # Nothing else has changed: the teacher, the modes, the generator, the threads.
    assert same(teacher, whole)
    assert student.training
    assert torch.equal(torch.rand(3), after_this)
    assert torch.get_num_threads() == threads


def test_the_kept_weights_are_the_averaged_ones_that_were_scored(tmp_path: Path) -> None:
    student, report = trained(tmp_path)
    _, teacher = networks()
    images = Images()
    order = np.random.default_rng((0, 240)).permutation(240)
    held = torch.from_numpy(images.pixels[np.sort(order[:80])])
    student.eval()
    with torch.no_grad():
        loss = distance([student(held)], [teacher.eval()(held)], FAST)
    assert float(loss) == pytest.approx(report.after.loss, rel=1e-4)


@pytest.mark.whole
@pytest.mark.parametrize("killed_at", [8, 13, 17, 21, 28])
def test_a_resumed_training_is_that_of_one_in_a_piece(tmp_path: Path, killed_at: int) -> None:
    """Batch 1 is a trial, 2 to 6 the first score, 7 to 16 the first epoch, 17 to 21 its score."""
    whole, report = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", images=Images(killed_at=killed_at))
    student, teacher = networks()
    images = Images()
    resumed = distill(student, teacher, images, FAST, tmp_path / "cut" / "state", "key")
    assert same(student, whole)
    assert resumed.history == report.history
    # No step is taken twice: of 36 batches in all, those before the cut are not read again, but for the trial and
    # a score that was cut short.
    assert images.read == 1 + 36 - (killed_at - 1) + ((killed_at - 17) if killed_at in range(17, 22) else 0)


@pytest.mark.whole
def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    whole, report = trained(tmp_path)
    images = Images()
    again, second = trained(tmp_path, images=images)
    assert same(again, whole)
    assert second.history == report.history
    assert images.read == 1


@pytest.mark.whole
def test_a_state_of_another_key_or_a_broken_one_is_not_gone_on_from(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole")
    student, teacher = networks()
    distill(student, teacher, Images(), dataclasses.replace(FAST, seed=3), tmp_path / "state", "another")
    again, report = trained(tmp_path)
    assert same(again, whole)
    assert report.steps == 20
    (tmp_path / "state").write_bytes(b"PK\x03\x04 not a state")
    again, _ = trained(tmp_path)
    assert same(again, whole)


@pytest.mark.whole
def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(tmp_path: Path) -> None:
    one_epoch = dataclasses.replace(FAST, epochs=1)
    # The learning rate follows from the number of all epochs, so the reference has as many.
    said: list[str] = []

    class Listener:
        def track(
            self, items: Iterator[Batch], what: str, total: int, weight: int = 1, before: int = 0
        ) -> Iterator[Batch]:
            yield from items

        def say(self, text: str) -> None: ...

        def warn(self, text: str) -> None:
            said.append(text)

    broken, report = trained(tmp_path / "broken", images=Images(broken_at=24), reporter=Listener())
    assert report.stop is Stop.NOT_FINITE
    assert report.steps == 12
    assert "not finite" in said[0]
    _, other = trained(tmp_path / "whole")
    assert report.history == other.history[:2]
    assert report.after.step == 10
    assert all(bool(value.isfinite().all()) for value in broken.state_dict().values())
    # In the very first step: the student is as it was.
    first, report = trained(tmp_path / "first", one_epoch, Images(broken_at=7))
    assert report.stop is Stop.NOT_FINITE
    assert (report.after, report.steps) == (report.before, 0)
    assert same(first, networks()[0])


@pytest.mark.whole
def test_masked_weights_stay_zero_in_what_is_kept(tmp_path: Path) -> None:
    mask = torch.rand(8, 8, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    student, report = trained(tmp_path, masks={"blocks.0.up.weight": mask})
    before = networks()[0].blocks[0].up.weight
    after = student.blocks[0].up.weight
    assert torch.equal(after != 0, mask)
    assert not torch.equal(after, before * mask)
    assert report.after.step > 0


@pytest.mark.whole
def test_early_stop(tmp_path: Path) -> None:
    """A student that is its teacher cannot become better, and stays as it was."""
    _, teacher = networks()
    student = copy.deepcopy(teacher)
    report = distill(
        student, teacher, Images(), dataclasses.replace(FAST, epochs=9, patience=2), tmp_path / "state", "key"
    )
    assert (report.stop, len(report.history), report.after.step) == (Stop.NO_BETTER, 3, 0)
    assert report.before.loss == 0.0
    assert same(student, teacher)


@pytest.mark.slow
@pytest.mark.whole
def test_labels_are_learned_where_there_are_any(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 5, 240)
    labels[::3] = -1
    options = dataclasses.replace(FAST, label_weight=5.0, epochs=8)
    with_labels, report = trained(tmp_path / "with", options, Images(labels=labels))
    without, _ = trained(tmp_path / "without", options)
    assert report.before.top1 is not None
    pixels, known = torch.from_numpy(Images().pixels), torch.from_numpy(labels >= 0)
    answers = [net.eval()(pixels)[known].argmax(1) for net in (with_labels, without)]
    right = [float((answer == torch.from_numpy(labels)[known]).float().mean()) for answer in answers]
    assert right[0] > right[1]
    # All unknown: as if there were none.
    unknown, _ = trained(tmp_path / "unknown", options, Images(labels=np.full(240, -1)))
    assert same(unknown, without)


def test_label_loss_of_known_answers() -> None:
    scores = torch.tensor([[0.0, math.log(3.0)], [7.0, -7.0]])
    loss = label_loss([scores], torch.tensor([1, -1]), FAST)
    assert float(loss) == pytest.approx(-math.log(0.75))
    with pytest.raises(ResvitError, match="labels up to 2"):
        label_loss([scores], torch.tensor([2, -1]), FAST)


def test_distance_of_known_answers() -> None:
    target, output = torch.tensor([[0.0, 2 * math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    # At temperature 2 the answers are (1/4, 3/4) and (1/2, 1/2).
    divergence = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(distance([output], [target], FAST)) == pytest.approx(4 * divergence)
    values = dataclasses.replace(FAST, answer=Answer.VALUES)
    assert float(distance([output], [target], values)) == pytest.approx(1.0)
    maps = [torch.full((2, 3, 4, 4), 2.0), torch.full((2, 5), 1.0)]
    assert float(distance([maps[0] * 1.5, maps[1]], maps, FAST)) == pytest.approx(0.125)


@pytest.mark.whole
def test_several_outputs_in_any_nesting(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.net(x)
            return {"scores": y, "rest": (y.square(), [y.argmax(1)])}

    student, teacher = Many(), Many()
    report = distill(student, teacher, Images(), dataclasses.replace(FAST, epochs=4), tmp_path / "state", "key")
    assert report.after.agreement is None
    assert report.after.nsr < report.before.nsr


def test_the_average_follows_its_rule() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = {"weight": torch.tensor([[0.0]])}
    with torch.no_grad():
        module.weight.fill_(1.0)
    move_average(average, module, 0.999, 0)  # decays: 1/10 in the first step, 2/11 in the second
    assert float(average["weight"]) == pytest.approx(0.9)
    move_average(average, module, 0.999, 1)
    assert float(average["weight"]) == pytest.approx(1 - 0.1 * 2 / 11)
    norm = nn.BatchNorm1d(2)
    average = {name: value.clone() for name, value in tensors_of(norm).items()}
    norm(torch.ones(4, 2))
    move_average(average, norm, 0.5, 100)
    assert average["running_mean"].tolist() == pytest.approx([0.05, 0.05])
    assert int(average["num_batches_tracked"]) == 1


def test_the_learning_rate_rises_and_falls() -> None:
    options = DistillOptions(learning_rate=0.1, warmup=0.2)
    values = [warmed_cosine(options.learning_rate, options.warmup, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert values == pytest.approx([0.005, 0.0525, 0.1, 0.05, 0.0])


def test_shifted_images_are_windows_of_the_whole() -> None:
    images = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).reshape(2, 3, 5, 4)
    torch.manual_seed(0)
    moved = {tuple(one[0, 2].tolist()) for _ in range(40) for one in shifted(images, 1)[:1]}
    rows = [[8.0 + 4 * up + c for c in range(4)] for up in (-1, 0, 1)]
    ends = [[*r[1:], r[-1]] for r in rows], rows, [[r[0], *r[:-1]] for r in rows]
    assert moved == {tuple(row) for kind in ends for row in kind}
    assert torch.equal(shifted(images, 0), images)


@pytest.mark.parametrize("name", ["embed-nano", "fpn-nano", "dual-nano"])
def test_features_of_the_reference_hybrids_are_spread_over_the_depth(name: str) -> None:
    model, images = resvit_model(name).eval(), torch.zeros(2, 1, 28, 28)
    paths = feature_paths(model, copy.deepcopy(model), images)
    assert len(paths) == 4
    assert paths[-1] == "norm"
    assert any("blocks." in path for path in paths)
    # Narrower hidden layers leave them as they are.
    narrow = copy.deepcopy(model)
    mlp = narrow.blocks[0].mlp
    mlp.fc1, mlp.fc2 = nn.Linear(64, 48), nn.Linear(48, 64)
    assert feature_paths(narrow, model, images) == paths


def test_features_of_other_shapes_are_left_out() -> None:
    student, teacher = networks()
    assert feature_paths(student, teacher, torch.zeros(2, 2, 8, 8)) == ("stem", "blocks.0", "blocks.1", "norm")
    student.blocks[0] = nn.Conv2d(8, 8, 2)
    assert feature_paths(student, teacher, torch.zeros(2, 2, 8, 8)) == ("stem", "norm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"batch": 1}, "batch = 1"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"ema": 1.0}, "ema = 1.0"),
        ({"patience": 0}, "patience = 0"),
        ({"limit": 10}, "limit = 10"),
        ({"feature_weight": -1.0}, "feature_weight = -1.0"),
    ],
)
def test_options_that_nothing_can_be_trained_with(change: dict[str, float], message: str) -> None:
    with pytest.raises(ResvitError, match=message):
        dataclasses.replace(FAST, **change)


def test_bad_input_is_said(tmp_path: Path) -> None:
    student, teacher = networks()
    state = tmp_path / "state"
    with pytest.raises(ResvitError, match="There are 63 training images"):
        distill(student, teacher, Images(63), FAST, state, "key")
    with pytest.raises(ResvitError, match="one and the same"):
        distill(teacher, teacher, Images(), FAST, state, "key")
    with pytest.raises(ResvitError, match="cannot read images of shape"):
        distill(nn.Linear(3, 5), teacher, Images(), FAST, state, "key")
    with pytest.raises(ResvitError, match=r"answers with \[\[2, 6\]\]"):
        distill(Net(classes=6), teacher, Images(), FAST, state, "key")
    mask = torch.ones(8, 2, dtype=torch.bool)
    with pytest.raises(ResvitError, match=r"one of shape \[8, 2, 3, 3\]"):
        distill(student, teacher, Images(), FAST, state, "key", masks={"stem.0.weight": mask})
    with pytest.raises(ResvitError, match="no parameter of that name"):
        distill(student, teacher, Images(), FAST, state, "key", masks={"stem.0": mask})
    options = dataclasses.replace(FAST, features=("stem", "blocks.0.up"))
    with pytest.raises(ResvitError, match=r"'blocks\.0\.up'"):
        distill(student, teacher, Images(), options, state, "key")
    with pytest.raises(ResvitError, match="no parameter that may be trained"):
        distill(copy.deepcopy(student).requires_grad_(False), teacher, Images(), FAST, state, "key")


def test_images_that_end_too_soon_are_said(tmp_path: Path) -> None:
    class Short(Images):
        def batches_at(self, positions: npt.NDArray[np.int64], batch_size: int, skip: int = 0) -> Iterator[Batch]:
            yield from super().batches_at(positions[:100], batch_size, skip)

    with pytest.raises(ResvitError, match="ended before the epoch did"):
        trained(tmp_path, images=Short())


@pytest.mark.whole
def test_frozen_parameters_stay(tmp_path: Path) -> None:
    student, teacher = networks()
    student.stem.requires_grad_(False)
    before = copy.deepcopy(student)
    distill(student, teacher, Images(), FAST, tmp_path / "state", "key")
    assert torch.equal(student.stem[0].weight, before.stem[0].weight)
    assert not torch.equal(student.head.weight, before.head.weight)


WORKER = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import test_pruning_distill as t
student, report = t.trained(Path(sys.argv[2]))
torch.save(student.state_dict(), Path(sys.argv[2]) / f"{t.os.environ['RANK']}.pt")
assert report.after.loss < report.before.loss
assert report.steps == 20
"""


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "state").exists()
