"""What a student of boxes, masks or depths loses beside its teacher, on outputs made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.images.targets import BoxTarget, DepthTarget, MaskTarget, Target
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.answers.maps import map_at
from resvit_engines.errors import ResvitError
from resvit_quantize.training.objectives.base import Objective
from resvit_quantize.training.objectives.maps import at_pixels, lattice
from resvit_quantize.training.objectives.objective import Teaching

SIZE = (60, 80)
LAYOUTS = ("cells", "sigmoid", "softmax", "selected")
"""Every cell answers; queries by sigmoid and by softmax; a head that picks the rows itself."""


def objective(kind: str, outputs: Mapping[str, Tensor], selects: bool = False, labelled: bool = True, **options):
    teaching = Teaching(task_named(kind, options), tuple(outputs), 3, (), labelled, selects)
    found = teaching.objective({name: value.shape for name, value in outputs.items()})
    assert found is not None
    return found


def detector(layout: str, seed: int = 0, images: int = 2, count: int = 12) -> dict[str, Tensor]:
    """Random outputs of a detector, some of its boxes confident."""
    random = np.random.default_rng(seed)
    low = random.uniform(0, 0.6, (images, count, 2))
    sides = random.uniform(0.1, 0.4, (images, count, 2))
    wide = {"softmax": 4}.get(layout, 3)
    logits = random.normal(-4, 0.5, (images, count, wide))
    sure = random.random((images, count)) < 0.4
    logits[sure, random.integers(0, 3, int(sure.sum()))] = random.uniform(0.5, 3, int(sure.sum()))
    if layout == "softmax":
        logits[..., 3] = np.where(sure, -2.0, 2.0)
    if layout in ("cells", "selected"):
        corners = np.concatenate([low, low + sides], -1) * np.array([SIZE[1], SIZE[0]] * 2)
        return {"boxes": tensor(corners), "scores": tensor(1 / (1 + np.exp(-logits)))}
    return {"pred_boxes": tensor(np.concatenate([low + sides / 2, sides], -1)), "logits": tensor(logits)}


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def batch(targets: tuple[Target, ...] | None = None, images: int = 2) -> Batch:
    return Batch(np.zeros((images, 1, *SIZE), np.float32), None, targets)


def lost(layout: str, student: dict[str, Tensor], teacher: dict[str, Tensor], targets=None) -> float:
    found = objective("detection", teacher, layout == "selected")
    return float(found(student, teacher, batch(targets)))


def boxed(*boxes: tuple[float, ...], classes: tuple[int, ...] = (), crowd: bool = False) -> BoxTarget:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return BoxTarget(array, np.array(classes, np.int64), np.full(len(array), crowd))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_student_that_says_what_its_teacher_says_loses_nothing(layout: str, seed: int) -> None:
    teacher = detector(layout, seed)
    assert lost(layout, teacher, teacher) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(seed=st.integers(0, 1000), step=st.floats(0.02, 0.3))
@settings(max_examples=10, deadline=None)
def test_the_loss_falls_when_boxes_come_closer(layout: str, seed: int, step: float) -> None:
    teacher = detector(layout, seed)
    boxes = next(iter(teacher))
    by = step * (1.0 if layout in ("sigmoid", "softmax") else SIZE[0])
    losses = [lost(layout, {**teacher, boxes: teacher[boxes] + by * share}, teacher) for share in (1.0, 0.5, 0.1, 0.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] > losses[3] + 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_loss_falls_when_scores_come_closer(layout: str, seed: int) -> None:
    teacher, other = detector(layout, seed), detector(layout, seed + 1)
    scores = list(teacher)[1]
    mixed = [{**teacher, scores: torch.lerp(teacher[scores], other[scores], share)} for share in (0.8, 0.3, 0.0)]
    losses = [lost(layout, student, teacher) for student in mixed]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_matched_predictions_may_stand_in_any_order(layout: str, seed: int) -> None:
    teacher, student = detector(layout, seed), detector(layout, seed + 1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(12))
    mixed = {name: value[:, order] for name, value in student.items()}
    known = (boxed((5, 5, 30, 30), classes=(1,)), boxed())
    for targets in (None, known):
        assert lost(layout, mixed, teacher, targets) == pytest.approx(lost(layout, student, teacher, targets), rel=1e-4)
    taught = {name: value[:, order] for name, value in teacher.items()}
    assert lost(layout, student, taught) == pytest.approx(lost(layout, student, teacher), rel=1e-4)
    assert lost(layout, taught, teacher) == pytest.approx(0.0, abs=1e-4)


def test_cells_are_not_matched() -> None:
    teacher = detector("cells")
    turned = {name: value.flip(1) for name, value in teacher.items()}
    assert lost("cells", turned, teacher) > 1.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_match(layout: str) -> None:
    teacher = detector(layout)
    scores = list(teacher)[1]
    quiet = torch.full_like(teacher[scores], 0.01 if layout in ("cells", "selected") else -6.0)
    if layout == "softmax":
        quiet[..., 3] = 6.0
    nothing = {**teacher, scores: quiet}
    assert lost(layout, nothing, nothing) == pytest.approx(0.0, abs=1e-5)
    assert lost(layout, nothing, nothing, (boxed(), boxed())) == pytest.approx(0.0, abs=1e-2)
    assert lost(layout, teacher, nothing) > 0.5  # it sees what is not there
    student = {name: value.clone().requires_grad_() for name, value in teacher.items()}
    objective("detection", nothing, layout == "selected")(student, nothing, batch()).backward()
    assert all(value.grad is None or bool(value.grad.isfinite().all()) for value in student.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labelled_boxes_correct_and_complete_the_teachers(layout: str) -> None:
    teacher = detector(layout, images=1)
    boxes, scores = teacher
    true = (boxed((10, 10, 40, 30), (50, 20, 70, 55), classes=(2, 0)),)
    sees = {name: value.clone() for name, value in teacher.items()}
    corners = torch.tensor([[10.0, 10, 40, 30], [50, 20, 70, 55]])
    if layout in ("sigmoid", "softmax"):
        sides = torch.tensor([SIZE[1], SIZE[0]] * 2)
        corners = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1) / sides
    sees[boxes][0, :2] = corners
    low, high = (0.01, 0.95) if layout in ("cells", "selected") else (-5.0, 4.0)
    sees[scores][0, :2] = low
    sees[scores][0, 0, 2] = sees[scores][0, 1, 0] = high
    only = objective("detection", teacher, layout == "selected", labelled=False)

    def labels_cost(student: dict[str, Tensor]) -> float:
        known = objective("detection", teacher, layout == "selected")(student, sees, batch(true, 1))
        return float(known) - float(only(student, sees, batch(true, 1)))

    # Where the teacher sees them, labels change nothing; where it does not, a student that does loses less.
    assert labels_cost(sees) == pytest.approx(0.0, abs=1e-3)
    blind = {**sees, scores: torch.full_like(sees[scores], low)}
    if layout == "softmax":
        blind[scores][..., 3] = 5.0
    missed = objective("detection", teacher, layout == "selected")
    assert float(missed(sees, blind, batch(true, 1))) < float(missed(blind, blind, batch(true, 1)))
    crowd = (boxed((10, 10, 40, 30), classes=(2,), crowd=True),)
    assert lost(layout, sees, sees, crowd) < lost(layout, blind, sees, crowd)


def test_the_boxes_are_read_as_the_task_says() -> None:
    dense = detector("sigmoid")
    assert objective("detection", dense).matches
    assert not objective("detection", dense, nms_iou=0.6).matches
    assert not objective("detection", detector("cells")).matches
    assert objective("detection", detector("cells"), nms_iou=1.0).matches
    assert objective("detection", detector("cells"), selects=True).matches
    assert "matched one to one" in objective("detection", dense).told
    assert "labelled" not in objective("detection", dense, labelled=False).told
    by_number = task_named("detection", {"class_numbers": "id", "activation": "sigmoid"})
    ids = Teaching(by_number, tuple(dense), 2, (1, 2), True, False)
    by_id = ids.objective({name: value.shape for name, value in dense.items()})
    assert by_id is not None
    one, two = (
        float(found(dense, dense, batch((boxed((5, 5, 30, 30), classes=(number,)), boxed()))))
        for found, number in ((by_id, 1), (objective("detection", dense), 2))
    )
    assert one == pytest.approx(two)
    with pytest.raises(ResvitError, match="boxes have the class 7"):
        lost("sigmoid", dense, dense, (boxed((5, 5, 30, 30), classes=(7,)), boxed()))


def test_other_tasks_have_no_loss_of_their_own() -> None:
    logits = {"logits": torch.zeros(2, 3)}
    for kind in ("classification", "other"):
        teaching = Teaching(task_named(kind, {}), ("logits",), None, (), False, False)
        assert teaching.objective({"logits": logits["logits"].shape}) is None
    numbers = Teaching(task_named("segmentation", {}), ("output",), None, (), False, False)
    assert numbers.objective({"output": torch.Size((2, *SIZE))}) is None
    elsewhere = Teaching(task_named("segmentation", {"output": "classes"}), ("output",), None, (), False, False)
    assert elsewhere.objective({"output": torch.Size((2, 3, *SIZE))}) is None


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    teacher = detector("cells")
    broken = {**teacher, "scores": torch.full_like(teacher["scores"], torch.nan)}
    with pytest.raises(ResvitError, match="network that teaches gives NaN"):
        lost("cells", teacher, broken)


def segmenter(seed: int, size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
    return {"output": tensor(np.random.default_rng(seed).normal(0, 3, (2, 3, *size)))}


@given(seed=st.integers(0, 1000), coarse=st.booleans())
@settings(max_examples=8, deadline=None)
def test_maps_are_held_to_the_teachers_and_to_the_masks(seed: int, coarse: bool) -> None:
    size = (SIZE[0] // 4, SIZE[1] // 4) if coarse else SIZE
    teacher, other = segmenter(seed, size), segmenter(seed + 1, size)
    found: Objective = objective("segmentation", teacher)
    mixed = [{"output": torch.lerp(teacher["output"], other["output"], share)} for share in (1.0, 0.5, 0.1, 0.0)]
    losses = [float(found(student, teacher, batch())) for student in mixed]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0.0, abs=1e-5)
    wanted = np.random.default_rng(seed).integers(0, 3, (2, *SIZE)).astype(np.int16)
    ignored = np.random.default_rng(seed).random((2, *SIZE)) < 0.3
    masks = tuple(MaskTarget(np.where(part, -1, mask)) for mask, part in zip(wanted, ignored, strict=True))
    loss = float(found(teacher, teacher, batch(masks)))
    planes = [np.stack([map_at(plane, SIZE) for plane in image]) for image in teacher["output"].numpy()]
    shares = [plane - np.log(np.exp(plane).sum(0)) for plane in planes]
    own = [np.take_along_axis(share, mask[None].astype(int), 0)[0] for share, mask in zip(shares, wanted, strict=True)]
    expected = -np.concatenate([one[~part] for one, part in zip(own, ignored, strict=True)]).mean()
    assert loss == pytest.approx(float(expected), rel=1e-3)
    # What is not labelled counts for nothing at all.
    blank = tuple(MaskTarget(np.full(SIZE, -1, np.int16)) for _ in range(2))
    assert float(found(teacher, teacher, batch(blank))) == pytest.approx(0.0, abs=1e-5)


def test_masks_of_other_classes_are_refused() -> None:
    teacher = segmenter(0)
    masks = tuple(MaskTarget(np.full(SIZE, 5, np.int16)) for _ in range(2))
    with pytest.raises(ResvitError, match="masks have the class 5"):
        objective("segmentation", teacher)(teacher, teacher, batch(masks))


@given(height=st.integers(1, 2000), width=st.integers(1, 2000))
@settings(max_examples=50, deadline=None)
def test_large_images_are_asked_on_a_lattice(height: int, width: int) -> None:
    rows, columns = lattice(height, width)
    assert 1 <= len(rows) * len(columns) <= 1.1 * 65_536 + height + width
    assert rows.max() < height
    assert columns.max() < width
    if height * width <= 65_536:
        assert (len(rows), len(columns)) == (height, width)


@pytest.mark.parametrize("size", [(7, 9), (12, 40), (60, 80)])
def test_maps_between_cells_are_those_that_are_scored(size: tuple[int, int]) -> None:
    plane = tensor(np.random.default_rng(0).normal(size=size))
    rows, columns = np.arange(3, 60, 7), np.arange(0, 80, 5)
    at = at_pixels(plane[None, None], SIZE, rows, columns)[0, 0]
    np.testing.assert_allclose(at.numpy(), map_at(plane.numpy(), SIZE)[np.ix_(rows, columns)], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"inverted": True}, {"align": "median"}])
@pytest.mark.parametrize("planes", [True, False])
def test_depths_are_held_to_the_teachers_and_to_the_known(options: dict[str, object], planes: bool) -> None:
    random = np.random.default_rng(0)
    depth = random.uniform(1, 20, (2, *SIZE))
    said = 1 / depth if options.get("inverted") else depth
    teacher = {"output": tensor(said[:, None] if planes else said)}
    found: Objective = objective("depth", teacher, **options)
    noise = tensor(random.normal(0, 0.3, (2, *SIZE)))
    noise = noise[:, None] if planes else noise
    students = [{"output": teacher["output"] * (share * noise).exp()} for share in (1.0, 0.5, 0.1, 0.0)]
    known = tuple(DepthTarget(one.astype(np.float32)) for one in depth)
    for targets in (None, known):
        losses = [float(found(student, teacher, batch(targets))) for student in students]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] == pytest.approx(0.0, abs=1e-5)
    # Unknown depths count for nothing; a factor costs less than noise of its size, and none where it is aligned.
    unknown = tuple(DepthTarget(np.zeros(SIZE, np.float32)) for _ in range(2))
    both = [float(found(students[0], teacher, batch(targets))) for targets in (None, unknown)]
    assert both[0] == pytest.approx(both[1])
    far = tuple(DepthTarget(2 * one.depth) for one in known)
    scaled = float(found(teacher, teacher, batch(far)))
    assert scaled == pytest.approx(0.0 if options.get("align") else 0.5 * np.log(2) ** 2, rel=1e-3, abs=1e-5)


def test_depths_beyond_what_counts_still_have_a_gradient() -> None:
    teacher = {"output": torch.ones(2, *SIZE)}
    student = {"output": torch.full((2, *SIZE), -1.0, requires_grad=True)}
    objective("depth", teacher)(student, teacher, batch()).backward()
    assert bool((student["output"].grad < 0).all())


def test_labels_of_another_kind_are_left_alone() -> None:
    teacher = segmenter(0)
    found = objective("segmentation", teacher, labelled=False)
    assert float(found(teacher, teacher, batch((boxed(), boxed())))) == pytest.approx(0.0, abs=1e-5)
    assert dataclasses.replace(batch(), targets=None).targets is None
