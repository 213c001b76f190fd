from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resvit_engines.errors import ResvitError
from resvit_export.loading.checkpoint import WRAPPERS, load_checkpoint, require_finite


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return net().state_dict()


def same(module: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("key", WRAPPERS)
def test_finds_weights_under_every_usual_key(tmp_path: Path, weights: dict[str, torch.Tensor], key: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, key: weights, "args": argparse.Namespace(lr=0.1, out=Path("x"))}, path)
    module = net()
    notes = load_checkpoint(module, path)
    assert same(module, weights)
    assert notes == (f"weights taken from '{key}' in w.pth",)


def test_nested_wrappers_and_prefixes(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "w.pt"
    prefixed = {f"module._orig_mod.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": {"model": prefixed}, "ema": weights}, path)
    module = net()
    notes = load_checkpoint(module, path)
    assert same(module, weights)
    assert "under ema" in notes[1]
    assert "'module._orig_mod.'" in notes[2]


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    path, source, module = tmp_path / "w.pt", Outer(), Outer()
    torch.save(source.state_dict(), path)
    assert load_checkpoint(module, path) == ()
    assert torch.equal(module.model.weight, source.model.weight)


def test_swa_counter_is_no_weight(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path, module = tmp_path / "w.pt", net()
    torch.save({"n_averaged": torch.tensor(4)} | {f"module.{k}": v for k, v in weights.items()}, path)
    load_checkpoint(module, path)
    assert same(module, weights)


def test_safetensors_and_half_precision(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path, module = tmp_path / "w.safetensors", net()
    save_file({key: value.half() for key, value in weights.items()}, path)
    notes = load_checkpoint(module, path)
    assert same(module, {key: value.half().float() for key, value in weights.items()})
    assert "torch.float16" in notes[0]


def test_mismatch_names_every_kind_of_key(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "w.pt"
    del weights["0.bias"]
    weights |= {"head.weight": torch.zeros(1), "1.weight": torch.zeros(5, 3)}
    torch.save(weights, path)
    with pytest.raises(ResvitError) as caught:
        load_checkpoint(net(), path)
    assert "1 missing (0.bias)" in caught.value.problem
    assert "1 unexpected (head.weight)" in caught.value.problem
    assert "1 wrongly shaped (1.weight [5, 3] instead of [1, 3])" in caught.value.problem


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path, trace = tmp_path / "w.pt", tmp_path / "executed"
    torch.save({"state_dict": weights, "extra": Evil(f"touch '{trace}'")}, path)
    with pytest.raises(ResvitError, match="would run code") as caught:
        load_checkpoint(net(), path)
    assert "system" in caught.value.problem
    assert "state_dict()" in caught.value.fix
    assert not trace.exists()


def test_files_that_hold_no_weights(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    whole, module = tmp_path / "w.pt", net()
    torch.save(weights, whole)
    content = whole.read_bytes()
    safe = tmp_path / "s.safetensors"
    save_file(weights, safe)
    cases = {
        "missing.pt": (None, "does not exist"),
        "empty.pt": (b"", "is empty"),
        "half.pt": (content[: len(content) // 2], "cannot be read as a checkpoint"),
        "text.pt": (b"hello, weights", "cannot be read as a checkpoint"),
        "half.safetensors": (safe.read_bytes()[:-8], "cannot be read as a checkpoint"),
        "weights.npz": (content, "no known checkpoint format"),
    }
    for name, (data, message) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ResvitError, match=message):
            load_checkpoint(module, tmp_path / name)
    torch.save({"epoch": 3}, whole)
    with pytest.raises(ResvitError, match="holds the keys epoch"):
        load_checkpoint(module, whole)
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("net/code/__torch__.py", "")
    with pytest.raises(ResvitError, match="TorchScript"):
        load_checkpoint(module, whole)


def test_nan_is_named_and_masks_may_be_infinite() -> None:
    module = net()
    module.register_buffer("mask", torch.full((2, 2), -torch.inf))
    require_finite(module, "net")
    module.state_dict()["1.weight"][0, 1] = torch.nan
    with pytest.raises(ResvitError, match=r"1\.weight holds 1 NaN or infinite values \(of 3\)"):
        require_finite(module, "net")
    norm = nn.BatchNorm2d(4)
    norm.running_var[2] = torch.inf
    with pytest.raises(ResvitError, match="running_var"):
        require_finite(norm, "net")
