"""Random weights under which a network's signals neither die out nor grow without bounds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from resvit_export.loading.libraries import import_timm
from resvit_export.loading.load import load_network, network_from_module
from resvit_export.loading.spec import ModelSpec
from resvit_export.loading.weights.drawn import _reach, keep_signals_alive

IMAGE = (3, 16, 16)


class Branches(nn.Module):
    """Five branches with norms that know nothing yet, added up: each block more than doubles what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)) for _ in range(5)
        )
        for branch in self.branches:
            nn.init.kaiming_normal_(branch[0].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(sum((branch(x) for branch in self.branches), start=x))


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3)
    if kind == "grows":
        return nn.Sequential(stem, *(Branches() for _ in range(20)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(12)]
    made = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for block in blocks:
        nn.init.normal_(block[0].weight, std=0.005 if kind == "dies" else 0.2)
    return made


def reach(module: nn.Module) -> float:
    images = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return float(module(images).abs().max())


@pytest.mark.parametrize(("kind", "before"), [("dies", (0.0, 1e-10)), ("grows", (1e5, 1e30))])
def test_signals_that_die_or_grow_are_kept(kind: str, before: tuple[float, float]) -> None:
    module = network(kind).eval()
    assert before[0] < reach(module) < before[1]
    assert keep_signals_alive(module, IMAGE)
    assert 1e-3 < reach(module) < 1e3
    assert not any(each.training for each in module.modules())
    assert {each.momentum for each in module.modules() if isinstance(each, nn.BatchNorm2d)} == {0.1}
    assert not keep_signals_alive(module, IMAGE)


@pytest.mark.parametrize(
    ("module", "image"),
    [(network("lives"), IMAGE), (network("dies"), (4, 16, 16)), (network("dies"), ()), (nn.Flatten(), (0, 1, 1))],
    ids=["lives", "fails", "several", "nothing"],
)
def test_what_lives_or_fails_stays_as_it_is(module: nn.Module, image: tuple[int, ...]) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert not keep_signals_alive(module, image)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_only_random_weights_are_replaced(tmp_path: Path) -> None:
    # Trained to answer with little, or given without a checkpoint by its owner: neither is ours to change.
    module = network("dies").eval()
    before = reach(module)
    network_from_module(module, ModelSpec("object:owner", input_shape=IMAGE))
    assert reach(module) == before
    module = network("dies")
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    module.random_weights = True
    network_from_module(module, ModelSpec("object:owner", tmp_path / "weights.pt", input_shape=IMAGE))
    assert reach(module) == before
    found = network_from_module(module, ModelSpec("object:owner", input_shape=IMAGE))
    assert reach(module) > 1e-3
    assert any("signals died out" in note for note in found.notes)


@pytest.mark.whole
def test_a_network_of_timm_that_dies_out_under_its_own_start() -> None:
    import_timm()
    found = load_network(ModelSpec("timm:lcnet_035"))
    assert any("signals died out" in note for note in found.notes)


def test_answers_in_a_dataclass_are_looked_at_too() -> None:
    @dataclasses.dataclass
    class Answer:
        score: torch.Tensor

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            with torch.no_grad():
                self.norm.weight.fill_(1e-12)

        def forward(self, x: torch.Tensor) -> Answer:
            return Answer(self.norm(x))

    with torch.no_grad():
        answer = Net().eval()(torch.ones(1, 3, 4, 4))
    assert _reach(answer) == pytest.approx(1e-12, rel=1e-3)
