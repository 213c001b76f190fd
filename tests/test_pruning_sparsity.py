"""2:4 sparsity on small networks with known answers."""

from __future__ import annotations

import copy
import dataclasses

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from resvit_engines.errors import ExitCode, ResvitError  # noqa: E402
from resvit_engines.targets.table import TARGETS, find_target  # noqa: E402
from resvit_quantize.pruning.sparsity.masks import compensated  # noqa: E402
from resvit_quantize.pruning.sparsity.report import Layout, SparseMethod, SparseReport  # noqa: E402
from resvit_quantize.pruning.sparsity.sparsity import (  # noqa: E402
    has_sparse_tensor_cores,
    is_two_to_four,
    require_sparsity,
    sparsify,
)

pytestmark = pytest.mark.whole  # Imports modelopt.


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


class Same(nn.Conv2d):
    """Pads one side only, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.same = Same(16, 16, 2)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.std = Standardised(16, 12, 3)
        self.odd = nn.Conv2d(12, 18, 1)
        self.even = nn.Conv2d(18, 16, 1)
        self.fc = nn.Linear(16, 24)
        self.mha = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 8)
        self.spare = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.even(self.odd(self.std(self.deep(self.same(self.conv(self.stem(x).relu()).relu())))))
        x = self.fc(x.permute(0, 2, 3, 1)).relu().flatten(1, 2)  # a linear layer on maps [B, H, W, C]
        x = self.mha(x, x, x, need_weights=False)[0]
        result: Tensor = self.head(x.mean(1))
        return result


def images(count: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(count, 4, 6, 6, generator=random) for _ in range(3)]


@pytest.fixture(scope="module", autouse=True)
def modelopt() -> None:
    """Imported when the tests run, not when they are collected: that takes ten seconds."""
    pytest.importorskip("modelopt.torch.sparsity")


@pytest.fixture(scope="module", params=list(SparseMethod))
def sparse(request: pytest.FixtureRequest) -> tuple[Net, Net, SparseReport]:
    """The network before and behind, and the report."""
    torch.manual_seed(0)
    net = Net()
    before = copy.deepcopy(net)
    return before, net, sparsify(net, request.param, iter(images()))


@pytest.mark.slow
@pytest.mark.whole
def test_every_layer_that_can_has_the_pattern_exactly(sparse: tuple[Net, Net, SparseReport]) -> None:
    _, net, report = sparse
    assert set(report.masks) == {"conv.weight", "same.weight", "odd.weight", "fc.weight"}
    parameters = dict(net.named_parameters())
    for name, mask in report.masks.items():
        assert mask.dtype == torch.bool
        fours = mask.movedim(1, -1).reshape(-1, 4)
        assert bool((fours.sum(1) == 2).all())
        assert torch.equal(parameters[name] != 0, mask)
        assert is_two_to_four(parameters[name], Layout.LINEAR if mask.ndim == 2 else Layout.CONV)
    sizes = sum(parameters[name].numel() for name in report.masks)
    layers = [part for part in net.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    assert report.share == pytest.approx(sizes / sum(layer.weight.numel() for layer in layers))
    assert report.to_json()["sparse"] == sorted(report.masks)


@pytest.mark.slow
@pytest.mark.whole
def test_what_is_left_alone_is_named_and_unchanged(sparse: tuple[Net, Net, SparseReport]) -> None:
    before, net, report = sparse
    reasons = {item.layer: item.reason for item in report.left}
    assert reasons == {
        "stem": "it reads the image",
        "deep": "its channels are in 16 groups",
        "std": "Standardised computes its weights anew in each pass",
        "even": "its 18 input channels are no multiple of 4",
        "mha": "the projections of nn.MultiheadAttention are no layers of their own",
        "mha.out_proj": "it does not run on its own",
        "head": "it gives the answer",
        "spare": "it does not run on its own",
    }
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == set(report.masks)
    # An ordinary module: its class, attributes, hooks, modes and gradients.
    assert net.training
    for part, other in zip(net.modules(), before.modules(), strict=True):
        assert type(part) is type(other)
        assert set(vars(part)) == set(vars(other))
        assert not part._forward_hooks
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_magnitude_keeps_the_larger_two() -> None:
    layer = nn.Linear(8, 1, bias=False)
    net = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(1, 2))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.1, 0.2, -0.4, 0.3]]))
    sparsify(net, SparseMethod.MAGNITUDE, [torch.ones(1, 4)])
    expected = torch.tensor([[0.0, -3.0, 2.0, 0.0, 0.0, 0.0, -0.4, 0.3]])
    assert torch.equal(layer.weight, expected)


def test_the_masks_are_those_of_modelopt_where_it_is_right() -> None:
    import modelopt.torch.sparsity as mts

    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 1), nn.GELU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 32), nn.GELU(),
        nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3),
    )  # fmt: skip
    batches = images()
    for method, mode, config in (
        (SparseMethod.MAGNITUDE, "sparse_magnitude", None),
        (SparseMethod.SPARSEGPT, "sparsegpt", {"data_loader": batches, "collect_func": lambda x: x, "verbose": False}),
    ):
        own, theirs = copy.deepcopy(net), copy.deepcopy(net)
        masks = sparsify(own, method, batches).masks
        theirs = mts.export(mts.sparsify(theirs, mode, config))
        names = {"2.weight", "4.weight", "6.weight"}
        assert set(masks) == names
        for name in names - ({"2.weight"} if method is SparseMethod.SPARSEGPT else set()):
            # Rounding may decide between two that are all but equal.
            same = (theirs.get_parameter(name) != 0) == masks[name]
            assert float(same.float().mean()) > 0.99, (method, name)
        # The reason for putting the channels innermost.
        convolution = theirs.get_parameter("2.weight")
        assert is_two_to_four(convolution, Layout.CONV) is (method is SparseMethod.MAGNITUDE)


def test_sparsegpt_is_nearer_to_the_dense_network_than_magnitude() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1)
    )
    mix = torch.randn(4, 4)

    def correlated(seed: int) -> Tensor:
        noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        return F.avg_pool2d(torch.einsum("bchw,cd->bdhw", noise, mix), 3, 1, 1)

    errors = {}
    for method in SparseMethod:
        own = copy.deepcopy(net)
        sparsify(own, method, [correlated(seed) for seed in range(4)])
        with torch.no_grad():
            fresh = correlated(9)
            errors[method] = float((own(fresh) - net(fresh)).square().sum())
    assert errors[SparseMethod.SPARSEGPT] < 0.5 * errors[SparseMethod.MAGNITUDE]


def test_compensation_of_a_known_answer() -> None:
    """The first two inputs are equal, so that the second takes over the whole weight of the first."""
    x = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    hessian = x.T @ x + 1e-9 * torch.eye(3, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight, mask = torch.tensor([[2.0, 3.0, 4.0]], dtype=torch.float64), torch.tensor([[False, True, True]])
    assert compensated(weight, mask, factor)[0].tolist() == pytest.approx([0.0, 5.0, 4.0], abs=1e-5)


@pytest.mark.parametrize(
    ("values", "layout", "expected"),
    [
        (torch.tensor([[1.0, 0.0, 2.0, 0.0]]), Layout.LINEAR, True),
        (torch.tensor([[1.0, 0.0, 2.0, 3.0]]), Layout.LINEAR, False),
        (torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 4.0]]), Layout.LINEAR, True),
        (torch.zeros(2, 6), Layout.LINEAR, False),
        (torch.zeros(2, 4, 1, 1), Layout.LINEAR, False),
        (torch.zeros(2, 4), Layout.CONV, False),
        # Along the taps there are two of four, along the channels four.
        (torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 2, 2).repeat(1, 4, 1, 1), Layout.CONV, False),
        (torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(1, 4, 1, 1).repeat(1, 1, 3, 3), Layout.CONV, True),
    ],
)
def test_is_two_to_four(values: Tensor, layout: Layout, expected: bool) -> None:
    assert is_two_to_four(values, layout) is expected


def test_shared_weights_are_masked_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    net[3].weight = net[1].weight
    report = sparsify(net, SparseMethod.SPARSEGPT, [torch.randn(16, 8)])
    assert set(report.masks) == {"1.weight"}
    assert "it shares its weights with 1" in [item.reason for item in report.left]
    assert is_two_to_four(net[3].weight, Layout.LINEAR)


def test_preprocessing_and_a_softmax_do_not_hide_the_first_and_the_last_layer() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x / 255))).softmax(-1)

    assert set(sparsify(Wrapped(), SparseMethod.MAGNITUDE, [torch.rand(2, 8)]).masks) == {"b.weight"}


def test_bad_input_is_said() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    before = copy.deepcopy(net)
    with pytest.raises(ResvitError, match="no image"):
        sparsify(net, SparseMethod.MAGNITUDE, [])
    with pytest.raises(ResvitError, match=r"cannot read images of shape \[2, 7\]"):
        sparsify(net, SparseMethod.MAGNITUDE, [torch.rand(2, 7)])
    with pytest.raises(ResvitError, match="not finite"):
        sparsify(net, SparseMethod.SPARSEGPT, [torch.full((2, 8), torch.nan)])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


def test_a_network_with_nothing_to_make_sparse() -> None:
    report = sparsify(nn.Linear(8, 2), SparseMethod.SPARSEGPT, [torch.rand(2, 8)])
    assert (report.masks, report.share, len(report.left)) == ({}, 0.0, 1)


def test_gpus_with_sparse_tensor_cores() -> None:
    assert [sm for sm in (61, 70, 75, 80, 86, 87, 89, 90, 100, 110, 120) if not has_sparse_tensor_cores(sm)] == [
        61, 70, 75,
    ]  # fmt: skip
    for target in (target for target in TARGETS if not target.on_cpu):
        require_sparsity(target)
    with pytest.raises(ResvitError, match=r"no sparse tensor cores.* this is 7\.5") as refused:
        require_sparsity(dataclasses.replace(find_target("a10"), sm=75))
    assert refused.value.code is ExitCode.IMPOSSIBLE
