from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pruning_groups import ConvNet, embed_groups, hidden
from resvit_engines.errors import ResvitError
from resvit_engines.targets.layer_times import MeasuredTimes
from resvit_engines.targets.table import TENSOR_CORES, Precision, find_target
from resvit_export.models.reference import resvit_model
from resvit_quantize.pruning.choose.budget import Budget, cost_of, legal_widths
from resvit_quantize.pruning.choose.choice import choose_widths, uniform_widths
from resvit_quantize.pruning.choose.costs import Costs, layer_us, widths_of
from resvit_quantize.pruning.choose.recorder import costs_from_module
from resvit_quantize.pruning.groups import Group, Kind


def two_mlps(first: int = 32, second: int = 32) -> tuple[nn.Module, tuple[Group, Group], Costs]:
    """Hidden layers ``a`` on 4 positions and ``b`` on one: a unit of ``a`` costs four times as much."""

    class TwoMlps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a1, self.a2 = nn.Linear(8, first), nn.Linear(first, 8)
            self.b1, self.b2 = nn.Linear(8, second), nn.Linear(second, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b2(self.b1(self.a2(self.a1(x)).mean(1)))

    module = TwoMlps()
    groups = (hidden("a", "a1", "a2", first), hidden("b", "b1", "b2", second))
    return module, groups, costs_from_module(module, torch.zeros(1, 4, 8), groups)


def flops(module: nn.Module, image: torch.Tensor) -> int:
    """Multiply-accumulates as torch counts them, attention in its parts."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(image)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["embed-nano", "fpn-nano", "dual-nano"])
def test_macs_and_params_are_those_that_torch_counts(name: str) -> None:
    module, image = resvit_model(name).eval(), torch.zeros(1, 1, 28, 28)
    costs = costs_from_module(module, image, ())
    assert costs.macs({}) == flops(module, image)
    assert costs.params({}) == sum(parameter.numel() for parameter in module.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        assert costs_from_module(module, image, ()).macs({}) == costs.macs({})


def test_macs_of_narrower_widths_are_those_of_a_narrower_network() -> None:
    image = torch.zeros(2, 3, 8, 8)
    wide, narrow = ConvNet(8), ConvNet(3)
    costs = costs_from_module(wide, image, wide.groups())
    assert costs.macs({"conv1": 3}) == flops(narrow, image[:1])
    assert costs.params({"conv1": 3}) == sum(parameter.numel() for parameter in narrow.parameters())


def test_a_hybrid_with_fewer_heads_hidden_units_and_blocks() -> None:
    module, image = resvit_model("embed-nano").eval(), torch.zeros(1, 1, 28, 28)
    costs = costs_from_module(module, image, embed_groups(module))
    widths = {"blocks.0.attn.qkv": 1, "blocks.1.mlp.fc1": 32, "blocks.2": 0}
    tokens, dim = 50, 64
    heads = tokens * dim * (96 + 32) + tokens * tokens * 32 * 2
    mlp = tokens * dim * 2 * (128 - 32)
    block = tokens * dim * dim * 4 + tokens * tokens * dim * 2 + tokens * dim * 2 * 128
    assert costs.macs({}) - costs.macs(widths) == heads + mlp + block
    block_params = sum(parameter.numel() for parameter in module.blocks[2].parameters())
    assert costs.params({}) - costs.params(widths) == (96 * 65 + 32 * 64) + 96 * (64 + 1 + 64) + block_params


def test_depthwise_and_shared_weights() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1))
    module.append(nn.Conv2d(4, 4, 1, bias=False))
    module.append(nn.Conv2d(4, 4, 1, bias=False))
    module[4].weight = module[3].weight
    group = hidden("0", "0", "2", 8, "1")
    costs = costs_from_module(module, torch.zeros(1, 3, 5, 5), [group])
    assert costs.macs({}) == 25 * (3 * 8 + 9 * 8 + 8 * 4 + 16 * 2)
    assert costs.macs({"0": 2}) == 25 * (3 * 2 + 9 * 2 + 2 * 4 + 16 * 2)
    assert costs.params({"0": 2}) == (3 * 2 + 2) + (9 * 2 + 2) + (2 * 4 + 4) + 16


def test_recording_leaves_the_module_as_it_was() -> None:
    module = ConvNet()
    module.norm.train()
    before = copy.deepcopy(module.state_dict())
    costs_from_module(module, torch.randn(1, 3, 8, 8), module.groups())
    assert module.norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not module.conv1._forward_hooks


def test_a_group_of_another_network_is_refused() -> None:
    with pytest.raises(ResvitError, match=r"conv9\.weight"):
        costs_from_module(ConvNet(), torch.zeros(1, 3, 8, 8), [hidden("g", "conv9", "fc", 4)])


@pytest.mark.whole
@pytest.mark.parametrize("precision", TENSOR_CORES)
@pytest.mark.parametrize("target", ["l4", "rtx-4090", "jetson-thor"])
def test_latency_never_rises_where_units_go(precision: Precision, target: str) -> None:
    module = resvit_model("embed-nano").eval()
    groups = embed_groups(module)
    costs = costs_from_module(module, torch.zeros(1, 1, 28, 28), groups)
    device = find_target(target)
    for group in groups:
        least = 0 if group.kind is Kind.BLOCKS else 1
        times = [costs.latency_us({group.name: n}, device, precision) for n in range(least, group.units + 1)]
        assert times == sorted(times)
        assert group.kind not in (Kind.BLOCKS, Kind.HEADS) or times[0] < times[-1]


def test_odd_widths_cost_as_much_as_whole_tiles() -> None:
    _, _, costs = two_mlps(128, 128)
    device = find_target("l4")
    for precision, odd, tile in ((Precision.FP16, 33, 40), (Precision.FP8, 33, 48), (Precision.INT8, 33, 64)):
        assert costs.latency_us({"a": odd}, device, precision) == costs.latency_us({"a": tile}, device, precision)
        assert costs.latency_us({"a": tile}, device, precision) < costs.latency_us({"a": 2 * tile}, device, precision)


def group_of(units: int, width: int = 1, kind: Kind = Kind.CHANNELS) -> Group:
    return Group("g", kind, units, (), (), width)


@pytest.mark.parametrize(
    ("group", "precision", "widths"),
    [
        (group_of(32), Precision.FP16, (8, 16, 24, 32)),
        (group_of(36), Precision.FP16, (8, 16, 24, 32, 36)),
        (group_of(64), Precision.INT8, (32, 64)),
        (group_of(48), Precision.INT8, (16, 32, 48)),
        (group_of(48), Precision.FP8, (16, 32, 48)),
        (group_of(6), Precision.FP16, (2, 4, 6)),
        (group_of(1), Precision.FP16, (1,)),
        (group_of(32, 4), Precision.FP16, (4, *range(6, 33, 2))),
        (group_of(3, 64, Kind.HEADS), Precision.INT8, (1, 2, 3)),
        (group_of(1, 1, Kind.BLOCKS), Precision.FP16, (0, 1)),
        (group_of(200), Precision.FP16, tuple(range(24, 201, 8))),
    ],
)
def test_legal_widths(group: Group, precision: Precision, widths: tuple[int, ...]) -> None:
    assert legal_widths(group, Budget(macs=0.5, precision=precision)) == widths


def test_the_dear_layer_goes_where_both_matter_alike() -> None:
    _, groups, costs = two_mlps()
    importance = {"a": np.ones(32), "b": np.ones(32)}
    choice = choose_widths(groups, importance, costs, Budget(macs=0.8))
    assert widths_of(choice.kept) == {"a": 24}
    assert choice.before.macs == 2 * 8 * 32 * 5
    assert choice.after.macs == choice.before.macs * 4 // 5
    assert [(w.group, w.before, w.after, w.importance_lost) for w in choice.widths] == [
        ("a", 32, 24, 0.25),
        ("b", 32, 32, 0.0),
    ]


def test_the_cheap_layer_goes_where_the_dear_one_matters_more() -> None:
    _, groups, costs = two_mlps()
    importance = {"a": np.full(32, 100.0), "b": np.ones(32)}
    assert widths_of(choose_widths(groups, importance, costs, Budget(macs=0.86)).kept) == {"b": 8}


def test_the_least_important_units_go_and_of_equals_the_last() -> None:
    _, groups, costs = two_mlps()
    values = np.ones(32)
    values[[3, 30]] = 5.0
    importance = {"a": values, "b": np.full(32, 1e9)}
    kept = choose_widths(groups, importance, costs, Budget(macs=0.4)).kept["a"]
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 30]


def test_what_still_fits_is_given_back() -> None:
    """``b`` goes first, being worth nothing; then a step of ``a`` is needed, after which most of ``b`` fits again."""
    _, groups, costs = two_mlps()
    importance = {"a": np.ones(32), "b": np.full(32, 1e-3)}
    choice = choose_widths(groups, importance, costs, Budget(macs=0.8))
    assert widths_of(choice.kept) == {"a": 24}


def test_what_keeps_clearly_less_than_it_may_says_which_step_was_too_large() -> None:
    _, groups, costs = two_mlps()
    importance = {"a": np.ones(32), "b": np.ones(32)}
    budget = Budget(macs=0.7, precision=Precision.INT8)
    choice = choose_widths(groups, importance, costs, budget)
    after, whole = widths_of(choice.kept), costs.macs({})
    steps = {
        group.name: next(width for width in legal_widths(group, budget) if width > after[group.name])
        for group in groups
        if group.name in after
    }
    then = {name: costs.macs({**after, name: width}) / whole for name, width in steps.items()}
    smallest = min(then, key=lambda name: then[name])
    assert then[smallest] > 0.7
    assert choice.notes[-1] == (
        f"{choice.after.macs / whole:.1%} of the multiply-accumulates remain where 70.0% may: channels go in steps for "
        f"int8, and with the smallest one back, {smallest} from {after[smallest]} to {steps[smallest]}, they would be "
        f"{then[smallest]:.1%}"
    )
    exact = choose_widths(groups, importance, costs, Budget(macs=0.6))
    assert exact.after.macs == 0.6 * whole
    assert not any("remain where" in note for note in exact.notes)


def test_a_block_that_is_too_large_to_come_back_is_named() -> None:
    module = resvit_model("embed-nano").eval()
    groups = tuple(group for group in embed_groups(module) if group.kind is Kind.BLOCKS)
    costs = costs_from_module(module, torch.zeros(1, 1, 28, 28), groups)
    importance = {group.name: np.ones(group.units) for group in groups}
    choice = choose_widths(groups, importance, costs, Budget(macs=0.97))
    assert "blocks go whole, and with blocks." in choice.notes[-1]
    assert choice.notes[-1].endswith("they would be 100.0%")


def test_a_block_goes_where_skipping_it_costs_least() -> None:
    module = resvit_model("embed-nano").eval()
    groups = embed_groups(module)
    costs = costs_from_module(module, torch.zeros(1, 1, 28, 28), groups)
    importance = {group.name: np.ones(group.units) for group in groups}
    importance["blocks.1"] = np.array([1e-3])
    choice = choose_widths(groups, importance, costs, Budget(macs=0.87))
    assert choice.kept["blocks.1"].tolist() == []
    assert widths_of(choice.kept) == {"blocks.1": 0}
    assert "blocks.1" in choice.notes[-1]


def test_one_block_of_several_always_stays() -> None:
    module = resvit_model("embed-nano").eval()
    groups = embed_groups(module)
    costs = costs_from_module(module, torch.zeros(1, 1, 28, 28), groups)
    importance = {g.name: np.full(g.units, 1e-6 if g.kind is Kind.BLOCKS else 1.0) for g in groups}
    choice = choose_widths(groups, importance, costs, Budget(params=0.35))
    assert sum(len(choice.kept.get(f"blocks.{i}", [0])) for i in range(3)) == 1


@pytest.mark.whole
@settings(max_examples=30, deadline=None)
@given(
    share=st.floats(0.45, 1.0),
    measure=st.sampled_from(["macs", "params"]),
    seed=st.integers(0, 1000),
    precision=st.sampled_from(TENSOR_CORES),
)
def test_budgets_are_met(share: float, measure: str, seed: int, precision: Precision) -> None:
    module, image = NANO
    groups = embed_groups(module)
    costs = costs_from_module(module, image, groups)
    random = np.random.default_rng(seed)
    importance = {group.name: random.exponential(random.exponential(), group.units) for group in groups}
    budget = Budget(**{measure: share}, precision=precision)
    choice = choose_widths(groups, importance, costs, budget)
    assert getattr(choice.after, measure) <= share * getattr(choice.before, measure) * (1 + 1e-6)
    assert choice.after == cost_of(costs, widths_of(choice.kept), budget)
    for group in groups:
        kept, values = choice.kept.get(group.name, np.arange(group.units)), importance[group.name]
        assert len(kept) in legal_widths(group, budget)
        assert (np.diff(kept) > 0).all()
        gone = np.setdiff1d(np.arange(group.units), kept)
        assert values[gone].max(initial=0) <= values[kept].min(initial=np.inf)
    again = choose_widths(groups, importance, costs, budget)
    assert widths_of(again.kept) == widths_of(choice.kept)
    # As near below as the steps allow: nothing but blocks can be widened.
    for group in groups:
        wider = [w for w in legal_widths(group, budget) if w > len(choice.kept.get(group.name, np.arange(group.units)))]
        inside_gone_block = any(
            g.kind is Kind.BLOCKS and len(choice.kept.get(g.name, [0])) == 0 and group.name.startswith(f"{g.name}.")
            for g in groups
        )
        if wider and group.kind is not Kind.BLOCKS and not inside_gone_block:
            cost = cost_of(costs, {**widths_of(choice.kept), group.name: wider[0]}, budget)
            assert getattr(cost, measure) > share * getattr(choice.before, measure)


NANO = (resvit_model("embed-nano").eval(), torch.zeros(1, 1, 28, 28))


@pytest.mark.whole
def test_a_latency_budget_is_met_on_a_wide_network() -> None:
    module = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(1024, 4096), nn.Linear(4096, 1024))))
    groups = [hidden(f"{i}", f"{i}", f"{i + 1}", 4096) for i in (0, 2, 4)]
    costs = costs_from_module(module, torch.zeros(1, 256, 1024), groups)
    importance = {group.name: np.random.default_rng(int(group.name)).random(4096) for group in groups}
    for target, precision in (("jetson-orin-nano", Precision.INT8), ("l4", Precision.FP8), ("h100", Precision.FP16)):
        budget = Budget(latency=0.7, precision=precision, target=find_target(target))
        choice = choose_widths(groups, importance, costs, budget)
        assert choice.before.latency_us is not None
        assert choice.after.latency_us is not None
        assert 0.65 < choice.after.latency_us / choice.before.latency_us <= 0.7


def test_measured_times_take_the_place_of_predicted_ones() -> None:
    module = nn.Sequential(*(layer for _ in range(2) for layer in (nn.Linear(1024, 4096), nn.Linear(4096, 1024))))
    groups = [hidden(f"{i}", f"{i}", f"{i + 1}", 4096) for i in (0, 2)]
    costs = costs_from_module(module, torch.zeros(1, 256, 1024), groups)
    importance = {group.name: np.ones(4096) for group in groups}
    target = find_target("l4")
    plain = {layer.name: costs.latency_us({}, target, Precision.INT8) / 4 for layer in costs.layers}
    # The second pair takes ten times as long on the device as was thought.
    times = {f"{name}/MatMul": {Precision.INT8: us * (10 if name in "23" else 1)} for name, us in plain.items()}
    measured = MeasuredTimes("here", times)
    assert costs.latency_us({}, target, Precision.INT8, measured) == pytest.approx(22 * plain["0"], rel=0.01)
    budget = Budget(latency=0.7, precision=Precision.INT8, target=target, measured=measured)
    kept = widths_of(choose_widths(groups, importance, costs, budget).kept)
    assert kept["2"] < kept.get("0", 4096) == 4096
    # What was not measured is off by as much as what was.
    predicted = layer_us(costs.layers[0], {}, target, Precision.INT8)
    partly = MeasuredTimes("here", {"0/MatMul": {Precision.INT8: 3 * predicted}})
    whole = costs.latency_us({}, target, Precision.INT8)
    assert costs.latency_us({}, target, Precision.INT8, partly) == pytest.approx(3 * whole)
    with pytest.raises(ResvitError, match="None of the 1 layers"):
        costs.latency_us({}, target, Precision.INT8, MeasuredTimes("", {"other/MatMul": {Precision.INT8: 1.0}}))


def test_a_budget_out_of_reach_names_the_nearest() -> None:
    _, groups, costs = two_mlps()
    importance = {"a": np.ones(32), "b": np.ones(32)}
    with pytest.raises(ResvitError) as caught:
        choose_widths(groups, importance, costs, Budget(macs=0.1))
    assert "At most 0.750 of the multiply-accumulates can go, and 0.900 should" in caught.value.problem
    assert "0.250" in caught.value.fix
    assert "--prune-what" not in caught.value.fix
    allowed = frozenset({Kind.CHANNELS, Kind.HEADS, Kind.MLP})
    with pytest.raises(ResvitError, match=r"\(--prune-what: embed, blocks\)"):
        choose_widths(groups, importance, costs, Budget(macs=0.1, allowed=allowed))
    assert choose_widths(groups, importance, costs, Budget(macs=0.25)).after.macs == 640
    with pytest.raises(ResvitError, match=r"At most 0\.750"):
        uniform_widths(groups, importance, costs, Budget(macs=0.1))


def test_uniform_takes_the_same_share_of_every_group() -> None:
    _, groups, costs = two_mlps(32, 64)
    importance = {"a": np.full(32, 100.0), "b": np.arange(64.0)}
    choice = uniform_widths(groups, importance, costs, Budget(macs=0.5))
    assert widths_of(choice.kept) == {"a": 16, "b": 32}
    assert choice.kept["b"].tolist() == list(range(32, 64))
    assert uniform_widths(groups, importance, costs, Budget(macs=1.0)).kept == {}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, "0 were given"),
        ({"macs": 0.5, "params": 0.5}, "2 were given"),
        ({"macs": 0.0}, "no share"),
        ({"macs": 1.5}, "no share"),
        ({"macs": float("nan")}, "no share"),
        ({"latency": 0.5}, "needs a target"),
        ({"latency": 0.5, "precision": Precision.FP8, "target": find_target("a100")}, "no fp8"),
        ({"macs": 0.5, "least": 0.0}, "no share"),
    ],
)
def test_budgets_that_make_no_sense(values: dict[str, object], found: str) -> None:
    with pytest.raises(ResvitError, match=found):
        Budget(**values)


def test_importance_must_fit_the_groups() -> None:
    _, groups, costs = two_mlps()
    for values in (np.ones(31), np.full(32, np.nan), np.full(32, -1.0)):
        with pytest.raises(ResvitError, match="importance of a"):
            choose_widths(groups, {"a": values, "b": np.ones(32)}, costs, Budget(macs=0.5))
