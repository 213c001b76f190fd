from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import CHECKPOINT
from resvit_engines.errors import ResvitError
from resvit_export.loading.libraries import import_timm
from resvit_export.models.reference import resvit_model
from resvit_quantize.pruning.apply import prune
from resvit_quantize.pruning.find.discover import groups_from_module
from resvit_quantize.pruning.groups import Group, Kind
from resvit_quantize.pruning.structure import Structure, apply_structure, structure_from_json

C, H, M, E, B = Kind.CHANNELS, Kind.HEADS, Kind.MLP, Kind.EMBED, Kind.BLOCKS
MODELS: dict[str, tuple[int, dict[Kind, int]]] = {
    "embed-nano": (28, {C: 4, H: 3, M: 3, E: 1, B: 4}),
    "fpn-nano": (28, {C: 7, H: 2, M: 2, E: 1, B: 3}),
    "dual-nano": (28, {C: 4, H: 3, M: 3, E: 1, B: 4}),
    "vit_tiny_r_s16_p8_224": (64, {C: 1, H: 12, M: 12, E: 1, B: 12}),
    "vit_small_r26_s32_224": (64, {C: 21, H: 12, M: 12, E: 1, B: 16}),
    "vit_base_r50_s16_224": (64, {C: 36, H: 12, M: 12, B: 25}),  # timm gives it no head: its tokens are the outputs
    "botnet26t_256": (128, {C: 20, H: 3, B: 4}),
    "mobilevit_s": (64, {C: 23, H: 9, M: 9, E: 3, B: 11}),
}
LARGE = ("vit_base_r50_s16_224", "vit_small_r26_s32_224", "botnet26t_256")


def builder(name: str, size: int) -> Callable[[], nn.Module]:
    if name.endswith("nano"):
        return lambda: resvit_model(name).eval()
    timm = import_timm()
    return lambda: timm.create_model(name, **({} if name == "mobilevit_s" else {"img_size": size})).eval()


def halves(groups: tuple[Group, ...]) -> dict[str, np.ndarray]:
    """Every other unit, and every other block."""
    blocks = [group.name for group in groups if group.kind is Kind.BLOCKS]
    kept = {group.name: np.arange(0, group.units, 2) for group in groups if group.kind is not Kind.BLOCKS}
    return kept | {name: np.arange(0) for name in blocks[::2]}


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in MODELS]
)
def test_half_of_everything_goes(name: str) -> None:
    size, counts = MODELS[name]
    build = builder(name, size)
    module = build()
    channels = 1 if name.endswith("nano") else 3
    image = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    found = groups_from_module(module, image, frozenset(Kind))
    assert Counter(group.kind for group in found.groups) == counts
    assert all("outputs" in why for why in found.left_alone.values())
    before, shape = parameters(module), module(image).shape
    structure = prune(module, found.groups, halves(found.groups))
    assert parameters(module) < (0.75 if E not in counts else 0.45) * before
    with torch.no_grad():
        after = module(image)
    assert after.shape == shape
    assert bool(torch.isfinite(after).all())

    weights = module.state_dict()
    again = build()
    apply_structure(again, structure_from_json(json.dumps(structure.to_json())))
    again.load_state_dict(weights, strict=True)
    with torch.no_grad():
        assert torch.equal(again(image), after)
        program = torch.export.export(again, (image,))
        torch.testing.assert_close(program.module()(image), after, rtol=1e-3, atol=1e-4)
    assert all(isinstance(again.get_submodule(path), nn.Identity) for path in structure.identities)


@pytest.mark.whole
def test_pruning_twice_is_one_structure() -> None:
    module = resvit_model("dual-nano").eval()
    image = torch.randn(2, 1, 28, 28)
    structure = None
    for kinds in (frozenset({C, H, B}), frozenset({C, M, E})):
        groups = groups_from_module(module, image, kinds).groups
        structure = prune(module, groups, halves(groups), structure)
    assert structure is not None
    again = resvit_model("dual-nano").eval()
    apply_structure(again, structure)
    again.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(again(image), module(image))
    assert not any(name.startswith(structure.identities) for name in structure.shapes)


@pytest.mark.slow
@pytest.mark.whole
def test_another_process_loads_without_the_pruning_library(tmp_path: Path) -> None:
    module = resvit_model("embed-nano").eval()
    module.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["state_dict"])
    image = torch.randn(2, 1, 28, 28)
    groups = groups_from_module(module, image, frozenset({C, H, M})).groups
    structure = prune(module, groups, halves(groups))
    saved = {"weights": module.state_dict(), "structure": structure.to_json(), "image": image, "out": module(image)}
    torch.save(saved, tmp_path / "pruned.pt")
    code = """
import sys, torch
from resvit_export.models.reference import resvit_model
from resvit_quantize.pruning.structure import apply_structure, structure_from_json
saved = torch.load(sys.argv[1], weights_only=True)
module = resvit_model("embed-nano").eval()
apply_structure(module, structure_from_json(saved["structure"]))
module.load_state_dict(saved["weights"], strict=True)
torch.testing.assert_close(module(saved["image"]), saved["out"])
assert "torch_pruning" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pruned.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.whole
def test_attributes_and_gradients_follow() -> None:
    module = resvit_model("embed-nano")
    module.proj.weight.requires_grad_(False)
    groups = groups_from_module(module, torch.zeros(1, 1, 28, 28), frozenset({C, H, E})).groups
    prune(module, groups, {"blocks.1.attn.qkv": np.array([1]), "proj": np.arange(48)})
    assert (module.blocks[1].attn.heads, module.blocks[1].attn.head_dim) == (1, 32)
    assert module.blocks[0].attn.heads == 2
    assert module.blocks[1].attn.qkv.weight.shape == (96, 48)
    assert module.norm.normalized_shape == (48,)
    assert not module.proj.weight.requires_grad
    module(torch.zeros(2, 1, 28, 28)).sum().backward()
    assert module.blocks[1].attn.qkv.weight.grad is not None


def test_what_stays_keeps_its_values_and_order() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    weight = module[0].weight.detach().clone()
    groups = groups_from_module(module, torch.zeros(1, 3), frozenset({M})).groups
    structure = prune(module, groups, {"0": np.array([1, 3])})
    assert torch.equal(module[0].weight, weight[[1, 3]])
    assert structure == Structure(
        {"0.weight": (2, 3), "0.bias": (2,), "2.weight": (2, 2)},
        {"0": {"out_features": 2}, "2": {"in_features": 2}},
    )


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"0": np.array([], dtype=np.int64)}, "without a single one of its 4 units"),
        ({"0": np.array([1, 4])}, "from 0 to 3"),
        ({"0": np.array([1, 1])}, "from 0 to 3"),
        ({"other": np.array([1])}, "no group 'other'"),
    ],
)
def test_choices_that_make_no_sense(kept: dict[str, np.ndarray], words: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    groups = groups_from_module(module, torch.zeros(1, 3), frozenset({M})).groups
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ResvitError, match=words):
        prune(module, groups, kept)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


EMPTY = {"shapes": {}, "attributes": {}, "identities": []}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        7,
        None,
        EMPTY | {"more": 1},
        EMPTY | {"shapes": {"0.weight": 3}},
        EMPTY | {"shapes": {"0.weight": [3, 0]}},
        EMPTY | {"shapes": {"0.weight": [3, True]}},
        EMPTY | {"shapes": {1: [3]}},
        EMPTY | {"attributes": {"0": 3}},
        EMPTY | {"attributes": {"0": {"out_features": "3"}}},
        EMPTY | {"attributes": {"0": {"out_features": 2.0}}},
        EMPTY | {"identities": "0"},
        EMPTY | {"identities": [0]},
    ],
)
def test_rubbish_is_no_structure(content: object) -> None:
    with pytest.raises(ResvitError):
        structure_from_json(content)


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": {"0.nothing": [1]}},
        {"shapes": {"0.weight": [5, 3]}},
        {"shapes": {"0.weight": [4]}},
        {"attributes": {"3": {"out_features": 2}}},
        {"attributes": {"0": {"out_features": 5}}},
        {"attributes": {"0": {"out_features": [2]}}},
        {"attributes": {"0": {"forward": 2}}},
        {"attributes": {"0": {"training": 1}}},
        {"attributes": {"0": {"__class__": 1}}},
        {"identities": [""]},
        {"identities": ["9"]},
    ],
)
def test_a_structure_of_something_else_changes_nothing(change: dict[str, object]) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = copy.deepcopy(module.state_dict())
    content = EMPTY | {"shapes": {"2.weight": [2, 2]}}
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ResvitError):
        apply_structure(module, structure_from_json(content))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
