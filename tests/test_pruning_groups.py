from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resvit_engines.errors import ResvitError
from resvit_export.models.reference import resvit_model
from resvit_quantize.pruning.apply import prune
from resvit_quantize.pruning.find.discover import Discovery, groups_from_module
from resvit_quantize.pruning.groups import Count, Group, Kind, Role

EVERY = frozenset(Kind)


def named(found: Discovery) -> dict[str, Group]:
    return {group.name: group for group in found.groups}


def slices(group: Group) -> dict[tuple[str, int], tuple[str, list[list[int]]]]:
    return {(part.tensor, part.axis): (part.role.value, part.index.tolist()) for part in group.slices}


def find(module: nn.Module, shape: tuple[int, ...], kinds: frozenset[Kind] = EVERY) -> Discovery:
    return groups_from_module(module, torch.zeros(1, *shape), kinds)


class Pooled(nn.Module):
    """Layers, the mean over the map, and a linear classifier."""

    def __init__(self, body: nn.Module, width: int, classes: int = 3) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_a_convolution_with_its_norm_and_reader() -> None:
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1, bias=False))
    found = named(find(Pooled(body, 2), (1, 6, 6)))
    group = found["body.0"]
    each = [[0], [1], [2], [3]]
    assert slices(group) == {
        ("body.0.weight", 0): ("writes", each),
        ("body.0.bias", 0): ("writes", each),
        **{(f"body.1.{name}", 0): ("writes", each) for name in ("weight", "bias", "running_mean", "running_var")},
        ("body.3.weight", 1): ("reads", each),
    }
    counts = {(each.module, each.attribute, each.each) for each in group.counts}
    assert counts == {("body.0", "out_channels", 1), ("body.1", "num_features", 1), ("body.3", "in_channels", 1)}
    assert (group.kind, group.units, group.width, group.exact) == (Kind.CHANNELS, 4, 1, True)
    assert set(found) == {"body.0", "body.3"}


@dataclass
class Answer:
    scores: Tensor
    loss: Tensor | None = None


@pytest.mark.parametrize(
    "form",
    [
        lambda y: (y, None),
        lambda y: {"scores": [y, (None, 3)], "name": "net"},
        Answer,
        lambda y: [Answer(y), "text"],
    ],
)
def test_what_stands_beside_the_tensors_of_an_answer_is_passed_over(form: Callable[[Tensor], object]) -> None:
    class Formed(Pooled):
        def forward(self, x: Tensor) -> Any:
            return form(super().forward(x))

    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    found = find(Formed(body, 2), (1, 6, 6))
    assert {"body.0", "body.2"} <= set(named(found))
    assert "outputs" in found.left_alone["head"]


def test_outputs_stay() -> None:
    found = find(Pooled(nn.Conv2d(1, 4, 3), 4), (1, 6, 6))
    assert "outputs" in found.left_alone["head"]
    assert all(part.tensor != "head.weight" or part.axis == 1 for group in found.groups for part in group.slices)


def test_group_norm_loses_whole_groups() -> None:
    body = nn.Sequential(nn.Conv2d(1, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 2, 1))
    group = named(find(Pooled(body, 2), (1, 6, 6)))["body.0"]
    assert (group.units, group.width, group.exact) == (4, 3, True)
    assert Count("body.1", "num_groups", 1) in group.counts
    assert Count("body.1", "num_channels", 3) in group.counts
    assert slices(group)["body.3.weight", 1] == ("reads", [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])


def test_group_norms_that_disagree_take_what_suits_both() -> None:
    class Two(nn.Module):
        def __init__(self, width: int, first: int, second: int) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, width, 3)
            self.first, self.second = nn.GroupNorm(first, width), nn.GroupNorm(second, width)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.first(x) + self.second(x)

    group = named(find(Pooled(Two(24, 12, 8), 24), (1, 6, 6)))["body.stem"]  # 2 and 3 channels in a norm group
    assert (group.units, group.width) == (4, 6)
    assert {Count("body.first", "num_groups", 3), Count("body.second", "num_groups", 2)} <= set(group.counts)
    alone = find(Pooled(Two(6, 3, 2), 6), (1, 6, 6))
    assert "one unit" in alone.left_alone["body.stem"]


def test_depthwise_convolutions_follow() -> None:
    body = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
    group = named(find(Pooled(body, 2), (1, 6, 6)))["body.0"]
    assert {Count("body.1", name, 1) for name in ("groups", "in_channels", "out_channels")} <= set(group.counts)
    assert slices(group)["body.1.weight", 0][0] == "writes"
    assert group.exact


def test_grouped_convolutions_stay() -> None:
    body = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 1))
    found = find(Pooled(body, 4), (1, 6, 6))
    assert set(named(found)) == {"body.3"}
    assert "body.1 is a grouped convolution" in found.left_alone["body.0"]
    assert "body.1 is a grouped convolution" in found.left_alone["body.1"]


def test_shared_weights_and_repeated_calls_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 1)
            self.tied, self.like = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
            self.like.weight = self.tied.weight
            self.free = nn.Conv2d(6, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.again(self.stem(x)).relu()).relu()
            return self.free(self.like(self.tied(self.last(x)).relu()))

    found = find(Pooled(Twice(), 5), (1, 6, 6))
    assert set(named(found)) == {"body.free"}
    assert "body.again is called 2 times" in found.left_alone["body.stem"]
    assert "share their weights" in found.left_alone["body.tied"]
    assert "share their weights" in found.left_alone["body.last"]


def test_channels_joined_split_and_flattened() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.both = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(10, 5, 1)
            self.wide, self.narrow = nn.Linear(5 * 4, 8), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.both(torch.cat([self.left(x), self.right(x).relu()], dim=1))
            gate, value = self.wide(x.flatten(1)).chunk(2, dim=-1)
            return self.narrow(F.silu(gate) * value)

    found = named(find(Joined(), (1, 2, 2)))
    assert slices(found["left"])["both.weight", 1][1] == [[0], [1], [2], [3]]
    assert slices(found["right"])["both.weight", 1][1] == [[4], [5], [6], [7], [8], [9]]
    assert slices(found["both"])["wide.weight", 1][1][1] == [4, 5, 6, 7]
    assert slices(found["wide"])["wide.weight", 0][1] == [[0, 4], [1, 5], [2, 6], [3, 7]]  # the gate and its value
    module = Joined()
    prune(module, found.values(), {name: np.array([1]) for name in found})
    assert module.both.in_channels == 2
    assert module(torch.zeros(2, 1, 2, 2)).shape == (2, 3)


def test_what_removes_more_than_channels_is_found_out() -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.next = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.next(self.stem(x).roll(1, dims=1))  # which the trace takes for an elementwise operator

    found = find(Pooled(Rolled(), 6), (1, 4, 4))
    assert set(named(found)) == {"body.next"}
    assert found.left_alone["body.stem"].startswith("removing channels here does not only remove them: the outputs")


def test_weight_standardisation_is_not_exact() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, (self.weight - mean) / std, self.bias)

    found = named(find(Pooled(nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), Standardised(8, 4, 1)), 4), (1, 4, 4)))
    assert not found["body.0"].exact
    assert found["body.2"].exact


def test_normalised_by_hand_weights_stay() -> None:
    body = nn.Sequential(nn.Conv2d(1, 8, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1)))
    found = find(Pooled(body, 4), (1, 4, 4))
    assert not found.groups
    assert "computed from others" in found.left_alone["body.0"]


class OwnAttention(nn.Module):
    """Attention as people write it; ``style`` says how."""

    def __init__(self, dim: int, heads: int, style: str) -> None:
        super().__init__()
        self.n_head, self.size, self.style = heads, dim // heads, style
        self.inner = dim
        self.norm = nn.LayerNorm(dim)
        if style == "apart":
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        else:
            self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        y = self.norm(x)
        if self.style == "apart":
            q, k, v = (f(y).view(batch, tokens, self.n_head, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        elif self.style == "interleaved":
            q, k, v = self.to_qkv(y).view(batch, tokens, self.n_head, 3, self.size).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = (
                t.view(batch, tokens, self.n_head, self.size).transpose(1, 2) for t in self.to_qkv(y).chunk(3, dim=-1)
            )
        weights = torch.softmax(q @ k.transpose(-2, -1) * self.size**-0.5, dim=-1)
        made = (weights @ v).transpose(1, 2)
        return x + self.out(made.reshape(batch, tokens, dim if self.style == "tied" else -1))


class OwnHybrid(nn.Module):
    def __init__(self, style: str, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, dim, 2, 2))
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.place = nn.Parameter(torch.randn(1, 5, dim))
        self.attention = OwnAttention(dim, heads, style)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.place
        return self.head(self.attention(tokens)[:, 0])


@pytest.mark.parametrize("style", ["fused", "apart"])
def test_heads_of_an_own_attention(style: str) -> None:
    found = find(OwnHybrid(style), (1, 8, 8))
    (heads,) = (group for group in found.groups if group.kind is Kind.HEADS)
    (embed,) = (group for group in found.groups if group.kind is Kind.EMBED)
    assert (heads.units, heads.width, heads.exact) == (4, 4, True)
    assert Count("attention", "n_head", 1) in heads.counts
    if style == "fused":
        rows = slices(heads)["attention.to_qkv.weight", 0][1]
        assert rows[1] == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]
    assert slices(heads)["attention.out.weight", 1] == ("reads", np.arange(16).reshape(4, 4).tolist())
    touched = {part.tensor for part in embed.slices}
    assert {"token", "place", "attention.norm.weight", "stem.3.weight", "attention.out.weight"} <= touched
    assert (embed.units, embed.exact) == (16, False)
    assert set(found.left_alone) == {"head"}


@pytest.mark.parametrize("style", ["interleaved", "tied"])
def test_heads_that_cannot_go_are_named(style: str) -> None:
    found = find(OwnHybrid(style), (1, 8, 8))
    assert not any(group.kind is Kind.HEADS for group in found.groups)
    assert "its heads stay" in found.left_alone["attention"]


def test_torch_multihead_attention_is_left_alone() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(x + self.attention(x, x, x)[0])[:, 0]

    found = find(Tokens(), (5, 3))
    assert not found.groups
    assert "attention" in found.left_alone["embed"]


def test_the_module_is_left_as_it_was() -> None:
    module = OwnHybrid("fused").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    paths = [path for path, _ in module.named_modules()]
    random = torch.get_rng_state()
    find(module, (1, 8, 8))
    assert torch.equal(random, torch.get_rng_state())
    assert module.training
    assert paths == [path for path, _ in module.named_modules()]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.whole
def test_kinds_are_what_was_asked_for() -> None:
    found = find(resvit_model("dual-nano"), (1, 28, 28), frozenset({Kind.MLP, Kind.BLOCKS}))
    assert {group.kind for group in found.groups} == {Kind.MLP, Kind.BLOCKS}


def test_a_module_that_does_not_run_is_refused() -> None:
    with pytest.raises(ResvitError, match="does not run"):
        find(resvit_model("embed-nano"), (3, 28, 28))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("embed-nano", {Kind.CHANNELS: 4, Kind.HEADS: 3, Kind.MLP: 3, Kind.EMBED: 1, Kind.BLOCKS: 4}),
        ("fpn-nano", {Kind.CHANNELS: 7, Kind.HEADS: 2, Kind.MLP: 2, Kind.EMBED: 1, Kind.BLOCKS: 3}),
        ("dual-nano", {Kind.CHANNELS: 4, Kind.HEADS: 3, Kind.MLP: 3, Kind.EMBED: 1, Kind.BLOCKS: 4}),
    ],
)
def test_reference_hybrids(name: str, counts: dict[Kind, int]) -> None:
    module = resvit_model(name)
    found = find(module, (1, 28, 28))
    assert Counter(group.kind for group in found.groups) == counts
    assert set(found.left_alone) == {"head.fc"}
    (embed,) = (group for group in found.groups if group.kind is Kind.EMBED)
    free = {"embed.positions"} | {
        name for name, _ in module.named_parameters() if name in ("levels", "trunk_positions")
    }
    last = {part.tensor: part.axis for part in embed.slices if part.tensor in free}
    assert last == {name: module.get_parameter(name).ndim - 1 for name in free}
    again = find(module, (1, 28, 28))
    assert [group.name for group in again.groups] == [group.name for group in found.groups]


@pytest.mark.whole
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_removing_equals_not_reading(seed: int) -> None:
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    module = OwnHybrid("fused").eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    groups = [group for group in find(module, (1, 8, 8)).groups if group.exact]
    kept = {each.name: np.sort(random.permutation(each.units)[: random.integers(1, each.units)]) for each in groups}
    image = torch.randn(2, 1, 8, 8)
    zeroed = OwnHybrid("fused").eval()
    zeroed.load_state_dict(module.state_dict())
    for group in groups:
        gone = np.setdiff1d(np.arange(group.units), kept[group.name])
        for part in group.slices:
            if part.role is Role.READS:
                zeroed.state_dict()[part.tensor].index_fill_(part.axis, torch.tensor(part.index[gone].ravel()), 0)
    prune(module, groups, kept)
    torch.testing.assert_close(module(image), zeroed(image), rtol=1e-3, atol=1e-4)


class FrozenNorm(nn.Module):
    """A BatchNorm of constants, as the convolutional trunks of detectors have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def test_channels_go_through_a_norm_of_buffers() -> None:
    body = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), FrozenNorm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), FrozenNorm(4))
    network = Pooled(body, 4)
    found = find(network, (1, 8, 8))
    first, second = found.groups
    assert (first.name, first.units, first.exact) == ("body.0", 8, True)
    names = ("weight", "bias", "running_mean", "running_var")
    assert {f"body.1.{name}" for name in names} <= {part.tensor for part in first.slices}
    assert Count("body.1", "width", 1) in first.counts
    assert second.name == "body.3"
    prune(network, found.groups, {"body.0": np.arange(3)})
    assert network.body[1].running_var.shape == (3,)
    assert network.body[1].width == 3


class BiasedAttention(nn.Module):
    """Attention as libraries call it: what it reads is named, the bias of each head is a table, the shares go along."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.table = nn.Parameter(torch.randn(tokens * tokens, heads))

    def forward(self, hidden: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, _ = hidden.shape
        q, k, v = (f(hidden).view(batch, tokens, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        bias = self.table.view(tokens, tokens, -1).permute(2, 0, 1)
        shares = torch.softmax(q @ k.transpose(-2, -1) * scale + bias, dim=-1)
        return self.out((shares @ v).transpose(1, 2).reshape(batch, tokens, -1)), shares


class NamedCalls(nn.Module):
    def __init__(self, *, reads: bool = True) -> None:
        super().__init__()
        self.reads = reads
        self.embed, self.attention, self.head = nn.Linear(3, 16), BiasedAttention(16, 4, 5), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        made, _ = self.attention(hidden=tokens, scale=torch.full((), 0.5))
        return self.head((tokens + made if self.reads else tokens).mean(1))


def test_heads_of_an_attention_that_is_called_by_name_go_with_their_biases() -> None:
    found = find(NamedCalls(), (5, 3), frozenset({Kind.HEADS}))
    (heads,) = found.groups
    assert (heads.units, heads.width, heads.exact) == (4, 4, True)
    assert slices(heads)["attention.table", 1] == ("writes", [[0], [1], [2], [3]])
    assert Count("attention", "num_heads", 1) in heads.counts


class GroupDeviation(nn.Module):
    """Divides by the deviation of groups of channels, as EvoNorm does."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), self.groups, -1, *x.shape[2:])
        deviation = grouped.var((2, 3, 4), keepdim=True).add(1e-5).sqrt().expand(grouped.shape).reshape(x.shape)
        return x * (x * self.weight.view(1, -1, 1, 1)).sigmoid() / deviation


def test_channels_that_a_norm_views_in_groups_are_left_alone() -> None:
    """Torch-Pruning's map of such a view forgets which channel each began as (timm's resnetv2_50d_evos)."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3), GroupDeviation(64, 32), nn.Conv2d(64, 8, 3))
    found = find(net, (3, 16, 16), frozenset(Kind))
    assert "not followed" in found.left_alone["0"]


class GainedConv(nn.Conv2d):
    """A convolution with standardised weights and a gain for each of its channels, as NFNet's."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out, 3)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, out).reshape(out, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (spread + 1e-5).sqrt() * self.gain, self.bias)


def test_a_gain_goes_with_its_channels() -> None:
    net = nn.Sequential(GainedConv(3, 16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    found = find(net, (3, 12, 12), frozenset({Kind.CHANNELS}))
    (first,) = (group for group in found.groups if ("0.gain", 0) in slices(group))
    assert (first.units, first.exact) == (16, True)
    assert slices(first)["0.gain", 0] == slices(first)["0.weight", 0]


def test_what_no_output_reads_is_left_alone() -> None:
    found = find(NamedCalls(reads=False), (5, 3), frozenset({Kind.HEADS, Kind.MLP}))
    assert not found.groups
    assert "not followed to the model's outputs" in found.left_alone["attention"]
