from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from resvit_calibrate.readers.scenes import Scenes, normalised
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ResvitError
from resvit_export.loading.load import load_network
from resvit_export.loading.program.facts import output_names
from resvit_export.loading.program.trace import program_from_module
from resvit_export.loading.spec import ModelSpec
from resvit_export.models.heads import Features, RawDetections, TokensOnMaps, cells
from resvit_export.models.presets import preset
from resvit_export.models.reference import resvit_config, resvit_model
from resvit_export.models.training.losses import Boxes, assign, detection_loss, focal_loss, giou, segmentation_loss
from resvit_export.models.training.scenes import scene_loss
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program
from resvit_quantize.pruning.apply import prune
from resvit_quantize.pruning.find.discover import groups_from_module
from resvit_quantize.pruning.groups import Kind

WITH_HEADS = ("fpn-nano-det", "fpn-nano-seg", "embed-nano-seg")
SMALL = {"dim": 32, "depth": 1, "stage_widths": (16, 16, 16, 16)}


def shaken(model: nn.Module) -> nn.Module:
    """Eval mode with statistics and weights under which every part of the output matters."""
    generator = torch.Generator().manual_seed(3)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.3, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(part, nn.Conv2d) and part.bias is not None:
            part.weight.data.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "overrides", "shapes"),
    [
        ("fpn-nano-det", {}, {"boxes": (2, 144 + 36, 4), "scores": (2, 180, 10)}),
        ("fpn-nano-det", {"image_size": (96, 160), "num_classes": 3}, {"boxes": (2, 300, 4), "scores": (2, 300, 3)}),
        ("fpn-nano", {"task": "detection", "image_size": 32}, {"boxes": (2, 320, 4), "scores": (2, 320, 10)}),
        ("fpn-nano-seg", {}, {"output": (2, 11, 96, 96)}),
        ("fpn-nano-seg", {"image_size": (128, 96)}, {"output": (2, 11, 128, 96)}),
        ("embed-nano-seg", {}, {"output": (2, 11, 96, 96)}),
        ("embed-nano", {"task": "segmentation"}, {"output": (2, 10, 28, 28)}),
        ("dual-nano", {"task": "segmentation"}, {"output": (2, 10, 28, 28)}),
        ("dual-nano", {"task": "segmentation", "fusion": "add"}, {"output": (2, 10, 28, 28)}),
        ("fpn-tiny", {"task": "segmentation", "image_size": 64, "depth": 1}, {"output": (2, 1000, 64, 64)}),
    ],
)
def test_heads_answer_in_the_shapes_that_the_config_says(name, overrides, shapes):
    model = resvit_model(name, **overrides).eval()
    with torch.no_grad():
        answer = model(torch.randn(2, *model.config.input_shape))
    named = answer if isinstance(answer, dict) else {"output": answer}
    assert {key: tuple(value.shape) for key, value in named.items()} == shapes
    if "scores" in named:
        assert 0 <= named["scores"].min() <= named["scores"].max() <= 1
        assert (named["boxes"][..., 2:] >= named["boxes"][..., :2]).all()


def test_detection_without_a_pyramid_is_refused():
    with pytest.raises(ResvitError) as caught:
        resvit_config("embed-nano", task="detection")
    assert "embed hybrids lack" in caught.value.problem
    assert "fpn" in caught.value.fix


@pytest.mark.parametrize("name", ["embed-nano", "fpn-nano", "dual-nano"])
def test_classifiers_have_no_new_layers(name):
    names = [n for n, _ in resvit_model(name).named_parameters() if n.startswith("head")]
    assert names == ["head.fc.weight", "head.fc.bias"]


def test_cells_are_where_the_maps_have_them():
    config = preset("fpn-nano-det")
    points, strides = (part[0] for part in cells(config))
    assert points[0].tolist() == [4, 4, 4, 4]
    assert points[1].tolist() == [12, 4, 12, 4]  # along the row first, as maps are flattened
    assert points[144].tolist() == [8, 8, 8, 8]
    assert strides[0].tolist() == [-8, -8, 8, 8]
    assert strides[179].tolist() == [-16, -16, 16, 16]
    head = resvit_model("fpn-nano-det").head
    boxes = head.boxes(torch.ones(1, 180, 4) * torch.tensor([0.5, 1, 1.5, 2]))
    assert boxes[0, 0].tolist() == [0, -4, 16, 20]


def test_tokens_reach_the_cells_of_their_patch():
    config = resvit_config("fpn-nano", task="segmentation", image_size=16)  # maps 8x8 and 4x4, patches 2 and 1
    maps = TokensOnMaps(config, config.pyramid_width)
    for proj in maps.proj:
        nn.init.zeros_(proj.weight)
        nn.init.zeros_(proj.bias)
        proj.weight.data[0, 0] = 1.0
    tokens = torch.zeros(1, 1 + 16 + 16, config.dim)
    tokens[0, 0] = 100.0  # the class token belongs to no cell
    tokens[0, 1 + 6, 0] = 2.0  # row 1, column 2 of the fine level's patches
    tokens[0, 17 + 6, 0] = 3.0
    width = config.pyramid_width
    fine, coarse = maps(Features((torch.zeros(1, width, 8, 8), torch.zeros(1, width, 4, 4)), tokens))
    assert fine[0, 0].nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    assert coarse[0, 0].nonzero().tolist() == [[1, 2]]
    assert (fine.sum(), coarse.sum()) == (8.0, 3.0)


# --- losses ---


def test_giou_is_the_papers():
    first = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1]])
    second = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 3, 1]])
    expected = [1.0, 1 / 7 - 2 / 9, -1 / 3]
    torch.testing.assert_close(giou(first, second), torch.tensor(expected))


def test_focal_loss_is_the_papers():
    logits, wanted = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    p = 1 / (1 + np.exp(-2.0))
    expected = 0.25 * 0.5**2 * -np.log(0.5) + 0.75 * p**2 * -np.log(1 - p)
    assert focal_loss(logits, wanted).item() == pytest.approx(expected, rel=1e-5)


def test_cells_take_the_box_around_them_on_the_level_of_its_size():
    head = resvit_model("fpn-nano-det").head
    corners = torch.tensor([[[8.0, 8, 32, 32], [16, 16, 24, 24], [0, 0, 96, 96], [0, 0, 0, 0]]])
    assigned = assign(head, Boxes(corners, torch.tensor([[4, 5, 6, -1]])))
    fine, coarse = assigned.classes[0, :144].reshape(12, 12), assigned.classes[0, 144:].reshape(6, 6)
    assert fine[2, 2] == 5  # the centre of both: the smaller one has it
    assert fine[1, 1] == fine[3, 3] == fine[1, 3] == 4
    assert (fine == 6).sum() == 0  # too large for this level
    assert coarse[2:4, 2:4].eq(6).all()
    assert (coarse >= 0).sum() == 4 == (coarse == 6).sum()
    where = (assigned.classes[0] == 6).nonzero()[0, 0]
    assert assigned.corners[0, where].tolist() == [0, 0, 96, 96]
    empty = assign(head, Boxes(torch.zeros(2, 1, 4), torch.full((2, 1), -1)))
    assert (empty.classes == -1).all()


def test_right_answers_cost_little():
    model = resvit_model("fpn-nano-det")
    corners, classes = torch.tensor([[[20.0, 20, 40, 44]]]), torch.tensor([[3]])
    assigned = assign(model.head, Boxes(corners, classes))
    found = assigned.classes >= 0
    logits = torch.full((1, 180, 10), -12.0)
    logits[..., 3][found] = 12.0
    distances = (assigned.corners - model.head.points) / model.head.strides
    right = RawDetections(logits, distances.clamp(min=0), torch.zeros(1, 180, 1))
    wrong = RawDetections(-logits, distances.clamp(min=0), torch.zeros(1, 180, 1))
    off = RawDetections(logits, distances.clamp(min=0) + 1, torch.zeros(1, 180, 1))
    losses = [detection_loss(model.head, raw, Boxes(corners, classes)).item() for raw in (right, off, wrong)]
    assert losses[0] < 0.8 < losses[1] < losses[2]  # the entropy of centre-ness is left
    nothing = Boxes(torch.zeros(1, 1, 4), torch.full((1, 1), -1))
    assert detection_loss(model.head, RawDetections(*(-abs(part) for part in right)), nothing).item() < 1e-3


def test_unlabelled_pixels_cost_nothing():
    torch.manual_seed(0)
    logits, classes = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 8, 8))
    classes[:, :4] = -1
    changed = logits.clone()
    changed[:, :, :4] += torch.randn(2, 5, 4, 8)
    assert segmentation_loss(logits, classes) == segmentation_loss(changed, classes)
    right = torch.nn.functional.one_hot(classes.clamp(min=0), 5).permute(0, 3, 1, 2) * 20.0
    assert segmentation_loss(right, classes) < 0.01 < segmentation_loss(logits, classes)
    assert torch.isfinite(segmentation_loss(logits, torch.full_like(classes, -1)))


@pytest.mark.whole
@pytest.mark.parametrize("name", WITH_HEADS)
def test_training_steps_reduce_the_loss(name):
    torch.manual_seed(0)
    model = resvit_model(name, **SMALL).train()
    scenes = list(Scenes("train").scenes(0, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = scene_loss(model, scenes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# --- export ---


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("fpn") else ()) for name in WITH_HEADS]
)
def test_exported_heads_are_plain_and_right_at_any_batch(name, tmp_path):
    model = shaken(resvit_model(name, **SMALL))
    program, notes = program_from_module(model, model.config.input_shape)
    folded, report = fold_program(program)
    assert notes == ()
    assert report.counts()["batch_norm"] >= 10
    path = tmp_path / "model.onnx"
    written = onnx_from_program(folded, path)
    expected = {"fpn-nano-det": ["boxes", "scores"]}.get(name, ["output"])
    assert [output for output, _ in written.outputs] == expected == output_names(folded) == output_names(program)
    images = normalised(np.stack([scene.pixels for scene in Scenes("train").scenes(0, 3)]))
    for size in (1, 3):
        with torch.no_grad():
            answer = model(torch.from_numpy(images[:size]))
        named = answer if isinstance(answer, dict) else {"output": answer}
        found = onnx_runner(path)({"input": images[:size]})
        assert list(found) == expected
        for key, value in named.items():
            assert value.std() > 1e-3
            np.testing.assert_allclose(found[key], value.numpy(), atol=2e-4 * float(value.abs().max()))
    ops = Counter(written.operators)
    banned = {"If", "Loop", "Scan", "Expand", "Range", "ConstantOfShape", "Cast", "Shape", "Where", "Exp", "Gather"}
    assert not ops.keys() & banned


@pytest.mark.slow
@pytest.mark.whole
def test_loaded_networks_say_how_many_classes_they_tell_apart(tmp_path):
    for name, classes in (("fpn-nano-det", 4), ("embed-nano-seg", 7)):
        network = load_network(ModelSpec(f"resvit:{name}", model_args={"num_classes": classes}))
        assert network.num_classes == classes
        assert network.input_shape == (1, 96, 96)
        assert network.preprocess.mean == (0.2860,)


class Pair(NamedTuple):
    near: torch.Tensor
    far: torch.Tensor


@pytest.mark.whole
@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda x: {"logits": x, "pred_boxes": x + 1}, ["logits", "pred_boxes"]),
        (lambda x: {"b": x, "a": x + 1}, ["b", "a"]),
        (lambda x: Pair(x, x + 1), ["near", "far"]),
        (lambda x: {"depth": x}, ["depth"]),
        (lambda x: {"maps": [x, x + 1], "mean": x.mean((1, 2))}, ["maps_0", "maps_1", "mean"]),
        (lambda x: (x, x + 1), ["output_0", "output_1"]),
        (lambda x: {"input": x, "other": x + 1}, ["output_0", "output_1"]),
        (lambda x: {"not a name": x, "other": x + 1}, ["output_0", "output_1"]),
        (lambda x: {1: x, 2: x + 1}, ["output_0", "output_1"]),
    ],
)
def test_outputs_are_named_as_the_forward_names_them(answer, names):
    class Net(nn.Module):
        def forward(self, x):
            return answer(x * 2)

    program, _ = program_from_module(Net(), (1, 4, 4))
    assert output_names(program) == names
    assert output_names(fold_program(program)[0]) == names


@pytest.mark.slow
@pytest.mark.whole
def test_names_of_outputs_survive_a_file(tmp_path):
    model = shaken(resvit_model("fpn-nano-det", **SMALL))
    program, _ = program_from_module(model, model.config.input_shape)
    torch.export.save(program, tmp_path / "model.pt2")
    network = load_network(ModelSpec(str(tmp_path / "model.pt2")))
    assert output_names(network.program) == ["boxes", "scores"]
    assert network.num_classes == 10
    images = np.random.default_rng(0).standard_normal((2, 1, 96, 96), np.float32)
    found = network.runner()({"input": images})
    with torch.no_grad():
        expected = model(torch.from_numpy(images))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.whole
@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_can_be_pruned(name):
    """The towers lose channels, what answers keeps them, and the names stay."""
    model = shaken(resvit_model(name, **SMALL))
    found = groups_from_module(model, torch.zeros(2, 1, 96, 96), frozenset({Kind.CHANNELS}))
    answering = {"fpn-nano-det": {"classes.0", "classes.1", "distances.0", "distances.1"}}.get(name, {"classes"})
    assert set(found.left_alone) == {f"head.{part}" for part in answering}
    groups = [group for group in found.groups if group.name.startswith("head.")]
    assert len(groups) == (8 if name == "fpn-nano-det" else 1)
    before = sum(parameter.numel() for parameter in model.parameters())
    shapes = [value.shape for value in torch.utils._pytree.tree_leaves(model(torch.zeros(2, 1, 96, 96)))]
    prune(model, groups, {group.name: np.arange(group.units // 2) for group in groups})
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert [value.shape for value in torch.utils._pytree.tree_leaves(model(torch.zeros(2, 1, 96, 96)))] == shapes
