from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram, export

from resvit_engines.errors import ResvitError
from resvit_quantize.fold.editor import module_path
from resvit_quantize.fold.program import FoldReport, fold_program


def stir(module: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and factors that a mistake would show on."""
    generator = torch.Generator().manual_seed(7)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.uniform_(-1, 1, generator=generator)
            part.running_var.uniform_(0.2, 3, generator=generator)
            if part.affine:
                nn.init.uniform_(part.weight, -2, 2, generator=generator)
                nn.init.uniform_(part.bias, -1, 1, generator=generator)
    return module.eval()


def folded(module: nn.Module, *shape: int) -> tuple[ExportedProgram, FoldReport]:
    """Fold a module, and hold the result against the module on images that the fold did not see."""
    stir(module)
    with torch.no_grad():
        program = export(module, (torch.zeros(2, *shape),), dynamic_shapes=({0: Dim.AUTO},))
        result, report = fold_program(program)
        images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(result.module()(images), module(images), rtol=1e-4, atol=1e-5)
    assert report.max_rel_error < 1e-5
    return result, report


def operators(program: ExportedProgram) -> Counter[str]:
    return Counter(str(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("conv", "width"),
    [
        (nn.Conv2d(4, 6, 3), 6),
        (nn.Conv2d(4, 6, 3, bias=False, padding="same"), 6),
        (nn.Conv2d(4, 8, 3, groups=2, stride=2), 8),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), 4),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 6),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), 6),
    ],
)
def test_batch_norm_goes_into_every_kind_of_convolution(conv: nn.Module, width: int) -> None:
    program, report = folded(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()), 4, 8, 8)
    assert report.counts() == {"batch_norm": 1}
    assert [(item.kind, item.where) for item in report.items] == [("batch_norm", "1")]
    assert sorted(program.state_dict) == ["0.bias", "0.weight"]
    assert len(operators(program)) == 2


@pytest.mark.whole
def test_batch_norm_without_affine_and_with_zero_variance() -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    module = stir(nn.Sequential(nn.Conv2d(2, 3, 1), norm))
    norm.running_var[1] = 0
    with torch.no_grad():
        program = export(module, (torch.zeros(2, 2, 4, 4),))
    result, _ = fold_program(program)
    scale = result.state_dict["0.weight"][1] / module[0].weight[1]
    torch.testing.assert_close(scale, torch.full_like(scale, 1e-5**-0.5), rtol=1e-5, atol=0)


@pytest.mark.whole
def test_batch_norm_stays_where_it_cannot_go() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.second(F.relu(self.norm(y) + y))

    _, report = folded(Twice(), 3, 4, 4)
    assert report.counts() == {}

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x))  # [B, 4, 4]: the norm's channels are the tokens

    assert folded(Tokens(), 4, 5)[1].counts() == {}
    assert folded(nn.Sequential(nn.Flatten(), Tokens()), 5, 1)[1].counts() == {"batch_norm": 1}


@pytest.mark.whole
def test_one_convolution_with_two_norms_gets_two_weights() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.conv(F.relu(self.one(self.conv(x)))))

    program, report = folded(Shared(), 3, 6, 6)
    assert report.counts() == {"batch_norm": 2}
    assert sorted(program.state_dict) == ["conv.bias", "conv.bias_folded", "conv.weight", "conv.weight_folded"]


class Scaled(nn.Module):
    """x + gamma * linear(x), with a dropout and an identity on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.rest = nn.Linear(6, 6), nn.Dropout(0.3), nn.Identity()
        self.gamma = nn.Parameter(torch.linspace(0.1, 2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.rest(self.drop(self.linear(x)))


@pytest.mark.whole
def test_layer_scale_goes_into_the_linear_layer() -> None:
    module = Scaled()
    program, report = folded(module, 5, 6)
    assert report.counts() == {"layer_scale": 1, "no_op": 1}
    assert operators(program) == {"linear": 1, "add": 1}
    torch.testing.assert_close(program.state_dict["linear.bias"], module.gamma * module.linear.bias)


@pytest.mark.whole
def test_a_factor_that_is_not_per_channel_stays() -> None:
    class Tokenwise(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.linspace(0.1, 2, 5)[:, None])

    assert folded(Tokenwise(), 5, 6)[1].counts() == {"no_op": 1}


@pytest.mark.whole
def test_standardised_weights_become_plain() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True, eps=1e-6).reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias, padding=1)

    module = nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4))
    program, report = folded(module, 3, 6, 6)
    assert report.counts() == {"constant": 1, "batch_norm": 1}
    assert operators(program) == {"conv2d": 1}
    flat = module[0].weight.detach().double().reshape(4, -1)
    plain = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    factor = module[1].weight.double() / (module[1].running_var.double() + 1e-5).sqrt()
    expected = (plain * factor[:, None]).reshape(4, 3, 3, 3).float()
    assert torch.equal(program.state_dict["0.weight"], expected)  # rounded once, so exact to the bit


@pytest.mark.whole
def test_an_expanded_token_stays_small() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.token.expand(1, 4096, 64)

    program, report = folded(Token(), 4096, 64)
    assert report.counts() == {}
    assert sum(tensor.numel() for tensor in program.state_dict.values()) == 64


@pytest.mark.whole
def test_broken_norm_and_modules_that_write_are_refused() -> None:
    module = stir(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    module[1].running_var[0] = -1
    with pytest.raises(ResvitError, match="1: folding needs finite factors, and 1 of 3"):
        fold_program(export(module, (torch.zeros(2, 2, 4, 4),)))

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return x * 2

    with pytest.raises(ResvitError, match="changes its own state while it runs: calls"):
        fold_program(export(Counting().eval(), (torch.zeros(2, 3),)))


@pytest.mark.whole
def test_saved_program_round_trips_and_leads_back_to_modules(tmp_path: Path) -> None:
    module = nn.Sequential()
    module.add_module("trunk", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    program, _ = folded(module, 3, 8, 8)
    path = tmp_path / "folded.pt2"
    torch.export.save(program, path)
    first = path.read_bytes()
    assert str(Path(__file__).parent).encode() not in first
    loaded = torch.export.load(path)
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded.module()(images), program.module()(images))
    paths = [module_path(node) for node in loaded.graph.nodes if node.op == "call_function"]
    assert paths == ["trunk.0", "trunk.2"]
    program.example_inputs = None
    assert fold_program(program)[1].items == ()  # nothing left, and no example input needed
    torch.export.save(folded(module, 3, 8, 8)[0], path)
    assert path.read_bytes() == first


class Branches(nn.Module):
    """A RepVGG block: two filters over the same image, each with a BatchNorm, added."""

    def __init__(self, large: int, small: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(4, 6, small, stride, small // 2, bias=False), nn.BatchNorm2d(6))
        self.two = nn.Sequential(nn.Conv2d(4, 6, large, stride, dilation * (large // 2), dilation), nn.BatchNorm2d(6))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.silu(self.one(images) + self.two(images))


@pytest.mark.whole
@pytest.mark.parametrize(
    "block", [Branches(3, 1), Branches(5, 3), Branches(3, 3), Branches(3, 1, stride=2), Branches(3, 1, dilation=2)]
)
def test_side_by_side_convolutions_become_one(block: Branches) -> None:
    result, report = folded(block, 4, 9, 9)
    assert report.counts()["parallel_convolution"] == 1
    assert sum(node.target is torch.ops.aten.conv2d.default for node in result.graph.nodes) == 1


class Apart(Branches):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.one(images) + self.two(images.flip(-1))


class Forked(Branches):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.one(images)
        return first + self.two(images) + first.mean()


@pytest.mark.whole
@pytest.mark.parametrize("block", [Apart(3, 1), Forked(3, 1), Branches(5, 3, dilation=2)])
def test_convolutions_that_do_not_lie_over_each_other_stay_two(block: Branches) -> None:
    _, report = folded(block, 4, 9, 9)
    assert "parallel_convolution" not in report.counts()


@pytest.mark.whole
def test_what_a_program_checks_while_it_runs_is_gone() -> None:
    class Checking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("sizes", torch.tensor([[6, 6]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps = self.conv(x)
            torch._check((self.sizes.prod() == 36).item(), lambda: "sizes")
            torch._check_tensor_all(self.sizes > 0)
            return maps.mean((2, 3))

    module = Checking().eval()
    program = export(module, (torch.ones(2, 3, 8, 8),), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    assert any("assert" in str(node.target) for node in program.graph.nodes)
    folded_program, _ = fold_program(program)
    kinds = {str(node.target) for node in folded_program.graph.nodes if node.op == "call_function"}
    assert kinds == {"aten.convolution.default", "aten.mean.dim"} or kinds == {"aten.conv2d.default", "aten.mean.dim"}
    (free,) = folded_program.range_constraints  # the batch: no bounds of what only the check read
    assert str(free) in str(folded_program.graph.output_node().args[0][0].meta["val"].shape[0])
