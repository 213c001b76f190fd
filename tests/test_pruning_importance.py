from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import CHECKPOINT
from pruning_groups import ConvNet, embed_groups, hidden, without
from resvit_calibrate.readers.fashion_mnist import read_split
from resvit_engines.errors import ResvitError
from resvit_export.loading.checkpoint import load_checkpoint
from resvit_export.models.reference import resvit_model
from resvit_quantize.pruning.choose.importance import Importance, importance_of
from resvit_quantize.pruning.groups import Group, Kind, Role, Slice
from resvit_quantize.pruning.losses import divergence


@pytest.fixture(scope="module")
def fashion() -> Tensor:
    """64 test images, normalised."""
    images, _ = read_split("test")
    return ((torch.from_numpy(images[:64, None].copy()).float() / 255) - 0.2860) / 0.3530


def conv_net(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet().eval()


def labelled(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 5


def weight_times_gradient(module: nn.Module, group: Group, images: Tensor, labels: Tensor) -> np.ndarray:
    """The derivative of the mean loss by each unit, from the gradients of the weights that read it."""
    module.zero_grad()
    F.cross_entropy(module(images), labels).backward()
    part = next(part for part in group.slices if part.role is Role.READS)
    weight = module.get_parameter(part.tensor)
    return (weight * weight.grad).detach().double().transpose(0, 1).flatten(1).sum(1).numpy()


def test_magnitude_is_the_share_of_squared_weights() -> None:
    module = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[3.0], [1.0]]))
        module[1].weight.copy_(torch.tensor([[1.0, 1.0]]))
    index = np.array([[0], [1]])
    group = Group(
        "a", Kind.MLP, 2, (Slice("0.weight", 0, index, Role.WRITES), Slice("1.weight", 1, index, Role.READS)), ()
    )
    found = importance_of(module, [group], Importance.MAGNITUDE, [])
    np.testing.assert_allclose(found["a"], [(0.9 + 0.5) / 2, (0.1 + 0.5) / 2])


def test_taylor_is_the_squared_weight_times_gradient() -> None:
    module, (images, labels) = conv_net(), labelled()
    groups = module.groups()
    found = importance_of(module, groups, Importance.TAYLOR, [(images, labels)])
    for group in groups:
        np.testing.assert_allclose(
            found[group.name], weight_times_gradient(module, group, images, labels) ** 2, rtol=1e-3
        )


def test_taylor_is_the_mean_over_batches() -> None:
    module, (images, labels) = conv_net(), labelled()
    halves = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    one, two = (importance_of(module, module.groups(), Importance.TAYLOR, [half]) for half in halves)
    both = importance_of(module, module.groups(), Importance.TAYLOR, halves)
    np.testing.assert_allclose(both["conv1"], (one["conv1"] + two["conv1"]) / 2, rtol=1e-5)


def test_taylor_agrees_with_a_finite_difference() -> None:
    module, (images, labels) = conv_net().double(), labelled()
    images, step = images.double(), 1e-4
    group = module.groups()[0]
    found = importance_of(module, [group], Importance.TAYLOR, [(images, labels)])["conv1"]
    for unit in range(group.units):
        losses = []
        for factor in (1 + step, 1 - step):
            changed = copy.deepcopy(module)
            with torch.no_grad():
                changed.conv2.weight[:, unit] *= factor
                losses.append(F.cross_entropy(changed(images), labels).item())
        assert abs(losses[0] - losses[1]) / (2 * step) == pytest.approx(found[unit] ** 0.5, rel=1e-4)


def test_hessian_is_half_the_mean_square_over_images() -> None:
    module, (images, labels) = conv_net(), labelled()
    group = module.groups()[1]
    found = importance_of(module, [group], Importance.HESSIAN, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    slopes = [weight_times_gradient(module, group, images[i : i + 1], labels[i : i + 1]) for i in range(6)]
    np.testing.assert_allclose(found["conv2"], 0.5 * np.mean(np.square(slopes), 0), rtol=1e-3, atol=1e-12)


def test_fisher_of_a_linear_model_by_hand() -> None:
    """Scores (x, 0): with labels drawn from p = sigmoid(x), the Fisher information of x's mask is x² p (1 - p)."""
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        module[0].weight.fill_(1.0)
        module[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
    index = np.array([[0]])
    group = Group("x", Kind.MLP, 1, (Slice("1.weight", 1, index, Role.READS),), ())
    images = torch.full((20_000, 1), 1.5)
    found = importance_of(module, [group], Importance.HESSIAN, [(images, None)], images=20_000)["x"][0]
    p = 1 / (1 + np.exp(-1.5))
    assert found == pytest.approx(0.5 * 1.5**2 * p * (1 - p), rel=0.03)


def test_outputs_that_are_no_scores_lose_error_to_signal() -> None:
    """Two maps whose channels add up: what a unit carries of the output's energy is what its removal costs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 3, 1, bias=False)).eval()
    index = np.arange(4)[:, None]
    slices = (Slice("0.weight", 0, index, Role.WRITES), Slice("1.weight", 1, index, Role.READS))
    group = Group("g", Kind.CHANNELS, 4, slices, ())
    images = torch.randn(64, 2, 3, 3)
    found = importance_of(module, [group], Importance.HESSIAN, [(images, None)] * 40, images=64 * 40)["g"]
    whole = module(images).detach().flatten(1)
    for unit in range(4):
        pruned = copy.deepcopy(module)
        without(pruned, group, [unit])
        error = (pruned(images).detach().flatten(1) - whole).square().sum(1) / whole.square().sum(1)
        assert found[unit] == pytest.approx(error.mean().item(), rel=0.1)


def test_a_dead_unit_is_worth_nothing_and_the_important_one_most() -> None:
    module, (images, labels) = conv_net(), labelled()
    without(module, module.groups()[0], [3])
    with torch.no_grad():
        module.conv2.weight[:, 5] *= 20
    for method in (Importance.TAYLOR, Importance.HESSIAN):
        found = importance_of(module, module.groups(), method, [(images, labels)])["conv1"]
        assert found[3] == 0
        assert found.argmax() == 5


def test_a_block_costs_what_skipping_it_changes() -> None:
    module = resvit_model("embed-nano").eval()
    with torch.no_grad():
        module.blocks[1].attn.proj.weight.zero_()
        module.blocks[1].attn.proj.bias.zero_()
        module.blocks[1].mlp.fc2.weight.zero_()
        module.blocks[1].mlp.fc2.bias.zero_()
        module.head.fc.weight *= 50
    blocks = [group for group in embed_groups(module) if group.kind is Kind.BLOCKS]
    images = torch.randn(4, 1, 28, 28)
    for method in Importance:
        found = importance_of(module, blocks, method, [(images, None)])
        assert found["blocks.1"][0] == pytest.approx(0, abs=1e-9)
        assert min(found["blocks.0"][0], found["blocks.2"][0]) > 1e-9


class OwnWeights(nn.Module):
    """Reads its hidden channels through a bare parameter, which no layer's input shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.first(x)), self.second)


def test_bare_parameters_are_weighed_image_by_image() -> None:
    torch.manual_seed(0)
    own, plain = OwnWeights(), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5, bias=False))
    plain[0].load_state_dict(own.first.state_dict())
    plain[2].weight.data.copy_(own.second.data)
    index, images, labels = np.arange(4)[:, None], torch.randn(6, 3), torch.arange(6) % 5
    a = Group("g", Kind.MLP, 4, (Slice("second", 1, index, Role.READS),), ())
    b = Group("g", Kind.MLP, 4, (Slice("2.weight", 1, index, Role.READS),), ())
    for method in (Importance.TAYLOR, Importance.HESSIAN):
        one = importance_of(own, [a], method, [(images, labels)])["g"]
        np.testing.assert_allclose(one, importance_of(plain, [b], method, [(images, labels)])["g"], rtol=1e-5)


def test_it_leaves_the_module_as_it_was_and_repeats() -> None:
    module, (images, _) = conv_net(), labelled()
    module.train()
    module.fc.bias.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    one, two = (importance_of(module, module.groups(), Importance.HESSIAN, [(images, None)], seed=3) for _ in range(2))
    assert all((one[name] == two[name]).all() for name in one)
    assert module.training
    assert module.conv1.training
    assert [p.requires_grad for p in module.parameters()] == [True] * 7 + [False]
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_labels_below_zero_are_drawn() -> None:
    module, (images, _) = conv_net(), labelled()
    unknown = torch.full((6,), -1)
    one = importance_of(module, module.groups(), Importance.HESSIAN, [(images, unknown)])
    two = importance_of(module, module.groups(), Importance.HESSIAN, [(images, None)])
    assert (one["conv1"] == two["conv1"]).all()


@pytest.mark.parametrize("method", list(Importance))
def test_nan_is_refused(method: Importance) -> None:
    module, (images, labels) = conv_net(), labelled()
    with torch.no_grad():
        module.conv2.weight[0, 2] = float("nan")
    with pytest.raises(ResvitError, match=r"not a finite number|NaN"):
        importance_of(module, module.groups(), method, [(images, labels)])


def test_images_are_asked_for() -> None:
    module = conv_net()
    with pytest.raises(ResvitError, match="no images"):
        importance_of(module, module.groups(), Importance.TAYLOR, [])


def test_labels_must_fit() -> None:
    module, (images, _) = conv_net(), labelled()
    with pytest.raises(ResvitError, match="do not fit"):
        importance_of(module, module.groups(), Importance.TAYLOR, [(images, torch.full((6,), 7))])


@pytest.mark.whole
def test_fisher_foretells_the_loss_of_a_trained_hybrid(fashion: Tensor) -> None:
    """One unit at a time: the estimated loss goes with the measured divergence of the answers."""
    module = resvit_model("embed-nano").eval()
    load_checkpoint(module, CHECKPOINT)
    groups = [group for group in embed_groups(module) if group.kind in (Kind.HEADS, Kind.MLP)]
    found = importance_of(module, groups, Importance.HESSIAN, [(fashion, None)] * 4, images=4 * len(fashion))
    foretold, measured = [], []
    for group in groups:
        for unit in range(0, group.units, 1 if group.kind is Kind.HEADS else 32):
            pruned = copy.deepcopy(module)
            without(pruned, group, [unit])
            with torch.no_grad():
                measured.append(divergence([module(fashion)], [pruned(fashion)]))
            foretold.append(found[group.name][unit])
    orders = [np.argsort(np.argsort(values)) for values in (foretold, measured)]
    assert np.corrcoef(orders)[0, 1] > 0.8


def test_hidden_units_between_linear_layers() -> None:
    module = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 4))
    group = hidden("0", "0", "2", 6)
    found = importance_of(module, [group], Importance.TAYLOR, [(torch.randn(5, 7, 3), None)])["0"]
    assert found.shape == (6,)
    assert (found > 0).all()
