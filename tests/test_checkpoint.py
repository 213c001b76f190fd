from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import io
import json
import os
import re
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import Silent
from resvit_export.loading.checkpoint import load_checkpoint, require_finite
from resvit_export.loading.load import network_from_module
from resvit_export.loading.source import model_identity
from resvit_export.loading.spec import ModelSpec
from resvit_export.loading.weights.file import read_checkpoint
from resvit_export.loading.weights.places import WRAPPER_SEGMENTS


class Told(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return net().state_dict()


def same(module: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model", "ema", "module", "teacher", "weights", "anything else"])
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
    assert notes[0] == "weights taken from 'ema' in w.pt"
    assert "under state_dict.model.module._orig_mod" in notes[1]
    assert load_checkpoint(module, path, "state_dict.model") == (
        "weights taken from 'state_dict.model' in w.pt",
        "removed the prefix 'module._orig_mod.' from all keys of w.pt",
    )


MODULE_WRAPPERS = st.sampled_from([*sorted(WRAPPER_SEGMENTS), "module"])
KEYS = st.sampled_from(["state_dict", "model", "ema", "module", "teacher", "net.", "runner"])
PREFIXES = st.sampled_from(["", "model.", "net.", "backbone.", "module._orig_mod.", "_forward_module.", "student.net."])


class Parts(nn.Module):
    """Names of several levels, some of which wrappers also use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})


@pytest.mark.whole
@given(
    keys=st.lists(KEYS, max_size=3),
    prefix=PREFIXES,
    inside=st.dictionaries(st.sampled_from(["stem", "stem.0", "model.block", "model.block.1"]), MODULE_WRAPPERS),
    beside=st.booleans(),
    scattered=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_weights_are_found_however_they_are_wrapped(
    keys: list[str], prefix: str, inside: dict[str, str], beside: bool, scattered: bool
) -> None:
    torch.manual_seed(3)
    source, module = Parts(), Parts()
    wrapped: dict[str, Any] = {}
    for own, tensor in source.state_dict().items():
        name = own
        for place, wrapper in sorted(inside.items(), reverse=True):
            name = re.sub(rf"^{re.escape(place)}\.", f"{place}.{wrapper}.", name)
        wrapped[prefix + name] = tensor
    if beside and prefix:
        wrapped["criterion.pos_weight"] = torch.ones(3)
    if scattered and not prefix and not inside:
        wrapped = {
            part: {name.removeprefix(f"{part}."): t for name, t in wrapped.items() if name.startswith(f"{part}.")}
            for part in ("stem", "model")
        }
    for key in keys:
        wrapped = {key: wrapped, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.pt"
        torch.save(wrapped, path)
        load_checkpoint(module, path)
    assert same(module, source.state_dict())


@pytest.mark.parametrize(
    ("averaged", "plain"),
    [("ema.module", "model"), ("state_dict_ema", "state_dict"), ("teacher.backbone", "student.backbone"),
     ("state_dict.ema_model", "state_dict.model"), ("swa", "last"),
     ("ema_state_dict.ema_model", "ema_state_dict.online_model"), ("state_dict.ema_student", "state_dict.student")],
)  # fmt: skip
def test_averaged_weights_go_first_and_both_can_be_chosen(
    tmp_path: Path, weights: dict[str, torch.Tensor], averaged: str, plain: str
) -> None:
    content: dict[str, Any] = {}
    for place, shift in ((plain, 0.0), (averaged, 1.0)):
        *path, last = place.split(".")
        holder = content
        for key in path[: 1 if "." in place else 0]:
            holder = holder.setdefault(key, {})
        holder |= {f"{last}.{name}": value + shift for name, value in weights.items()} if path else {
            last: {name: value + shift for name, value in weights.items()}
        }  # fmt: skip
    file, module, told = tmp_path / "w.pt", net(), Told()
    torch.save(content, file)
    load_checkpoint(module, file, None, told)
    assert same(module, {name: value + 1.0 for name, value in weights.items()})
    assert f"'{averaged}' (averaged over training) is taken, and '{plain}' not" in told.warnings[0]
    assert "--checkpoint-key" in told.warnings[0]
    for key, shift in ((plain, 0.0), (averaged, 1.0)):
        load_checkpoint(module, file, key, told)
        assert same(module, {name: value + shift for name, value in weights.items()})
    assert len(told.warnings) == 1
    with pytest.raises(ResvitError, match="has nothing below 'nowhere'") as caught:
        load_checkpoint(module, file, "nowhere")
    assert averaged in caught.value.fix


@pytest.mark.parametrize("change", [lambda tensor: tensor * 1.0, lambda tensor: tensor.half()])
def test_counts_of_batches_that_an_average_made_floats_of_are_taken(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    file, module = tmp_path / "w.pt", nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    own = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    own[1].num_batches_tracked += 7
    torch.save({"ema": {name: change(tensor) for name, tensor in own.state_dict().items()}}, file)
    load_checkpoint(module, file)
    assert int(module[1].num_batches_tracked) == 7
    assert torch.allclose(module[0].weight, own[0].weight, atol=1e-3)


def test_averages_of_the_parameters_alone_are_told_and_not_used(tmp_path: Path) -> None:
    file, told = tmp_path / "w.pt", Told()
    own = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    torch.save({"model": own.state_dict(), "ema": {name: p.data + 1 for name, p in own.named_parameters()}}, file)
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    notes = load_checkpoint(module, file, None, told)
    assert torch.equal(module[0].weight, own[0].weight)
    (said,) = [note for note in notes if "averaged over training" in note]
    assert "4 of the network's 7 tensors" in said
    assert "1.running_mean" in said


def test_two_places_that_fit_equally_are_a_warning_unless_they_are_equal(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    file, told = tmp_path / "w.pt", Told()
    torch.save({"first": weights, "second": dict(weights)}, file)
    load_checkpoint(net(), file, None, told)
    assert told.warnings == []
    torch.save({"first": weights, "second": {name: value * 2 for name, value in weights.items()}}, file)
    load_checkpoint(net(), file, None, told)
    assert "'first' is taken, and 'second' not" in told.warnings[0]


def test_weights_that_do_not_fit_are_told_with_the_place_that_was_looked_at(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    file = tmp_path / "w.pt"
    half = {name: weights[name] for name in ("0.bias", "1.bias")}
    parts = {
        "ema": {"module": {**weights, "1.weight": torch.zeros(5, 3)}},
        "model": half,
        "head": {"0.bias": half["0.bias"]},
    }
    torch.save(parts, file)
    with pytest.raises(ResvitError, match=r"below 'ema.module' do not fit.* 1 wrongly shaped \(1.weight") as caught:
        load_checkpoint(net(), file)
    assert "some weights fit at 'model' (2 of 4 tensors): --checkpoint-key" in caught.value.fix


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.zeros(3, 2).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3, 2), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.zeros(3, 2, device="meta"), "no values"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
        (lambda: torch.zeros(3, 2, dtype=torch.complex64), "complex64 instead of float32|no plain weights"),
        (lambda: torch.zeros(3, 2, dtype=torch.int8), "int8 instead of float32"),
        (lambda: torch.zeros(3, 2, dtype=torch.bool), "bool instead of float32"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_plain_weights(
    tmp_path: Path, weights: dict[str, torch.Tensor], make: Callable[[], torch.Tensor], why: str
) -> None:
    file = tmp_path / "w.pt"
    torch.save({**weights, "0.weight": make()}, file)
    with pytest.raises(ResvitError, match=why) as caught:
        load_checkpoint(net(), file)
    assert caught.value.code is ExitCode.INPUT


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
    array = io.BytesIO()
    np.savez(array, images=np.zeros(3))
    cases = {
        "missing.pt": (None, "does not exist"),
        "empty.pt": (b"", "is empty"),
        "half.pt": (content[: len(content) // 2], "cannot be read as a checkpoint"),
        "text.pt": (b"hello, weights", "no known checkpoint format"),
        "half.safetensors": (safe.read_bytes()[:-8], "cannot be read as a checkpoint"),
        "weights.npz": (array.getvalue(), "no known checkpoint format: a zip archive of images.npy"),
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


def circle(*keys: str) -> dict[str, Any]:
    outer: dict[str, Any] = {}
    inner = outer
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = outer
    return outer


def doubled(make: Callable[[Any, Any], Any], value: Any) -> Any:
    """2^60 values of 60: each holds the one before twice."""
    for _ in range(60):
        value = make(value, value)
    return value


HOSTILE: dict[str, Any] = {
    "itself": circle("state_dict"),
    "two in a circle": circle("model", "model"),
    "two of two of two, as values": doubled(lambda a, b: {"a": a, "b": b}, torch.zeros(1)),
    "a list": [torch.zeros(1)],
    "a number": 5,
    "odd keys": {1: torch.zeros(3), ("a",): torch.zeros(2)},
    "no tensors": {"a": {"b": {"c": 1}}},
    "a long name": {"a" * 100_000: {"b": torch.zeros(1)}},
    "an odd structure": {"resvit_structure": 5, "0.weight": torch.zeros(3, 2)},
    "a structure of huge numbers": {
        "resvit_structure": {"shapes": {"0.weight": [10**12, 2]}, "attributes": {}, "identities": []}
    },
    "an expanded tensor": {"0.weight": torch.zeros(1).expand(10**12)},
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_content_that_is_built_to_hang_is_refused_at_once(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "w.pt"
    torch.save(content, file)
    with pytest.raises(ResvitError) as caught:
        load_checkpoint(net(), file)
    assert caught.value.code is ExitCode.INPUT


@pytest.mark.parametrize(
    ("pickled", "why"),
    [
        (b"\x80\x02]" + b"\x85" * 1_000_000 + b".", "tuples nested more than"),
        (b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "reading them would not end"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R.", "encodes text as 'punycode'"),
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "asks for 2,147,483,647 bytes"),
        (b"\x80\x02\x8d" + b"\xff" * 7 + b"\x0f.", "damaged"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02}(h\x00u.", "damaged"),
        (b"\x80\x04\x95" + bytes(8) + b".", "no FRAME"),
        (b"\x80\x02" + b"]" * 100 + b"}q\x00X\x01\x00\x00\x00a", "damaged"),
    ],
    ids=["deep", "two of two as a key", "codec", "bytearray", "length", "underflow", "memo", "protocol 4", "no end"],
)  # fmt: skip
@pytest.mark.parametrize("archived", [False, True])
def test_pickles_that_go_too_far_are_refused(tmp_path: Path, pickled: bytes, why: str, archived: bool) -> None:
    file = tmp_path / "w.pt"
    file.write_bytes(pickled)
    if archived:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("w/data.pkl", pickled)
            archive.writestr("w/version", "3\n")
    with pytest.raises(ResvitError, match=why) as caught:
        load_checkpoint(net(), file)
    assert caught.value.code is ExitCode.INPUT


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    file, bomb = tmp_path / "w.pt", tmp_path / "bomb.pt"
    torch.save(weights, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(50 << 20) if name.endswith("data/0") else old.read(name))
    with pytest.raises(ResvitError, match="would unpack to 52,4"):
        load_checkpoint(net(), bomb)


OTHER_FILES = {
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
    "html": (b"\n <!DOCTYPE html><html>Sign in</html>", "Download the file itself"),
    "gzip": (b"\x1f\x8b\x08 and so on", "Unpack it first"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "PyTorch can read"),
    "gguf": (b"GGUF\x03\x00", "float weights"),
    "end of an archive": (b"PK\x05\x06" + b"\xff" * 18, "damaged"),
    "zeros": (bytes(100), "Give a file of safetensors"),
}


@pytest.mark.parametrize(("content", "fix"), OTHER_FILES.values(), ids=OTHER_FILES)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w"])
def test_other_files_are_called_what_they_are(tmp_path: Path, content: bytes, fix: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ResvitError) as caught:
        load_checkpoint(net(), tmp_path / name)
    assert caught.value.code is ExitCode.INPUT
    assert fix in caught.value.fix or (name == "w.safetensors" and "of another kind" in caught.value.fix)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    save_file(weights, tmp_path / "folder/model.safetensors")
    for name, why, fix in (
        ("pipe.pt", "is a pipe", "to a file"),
        ("device.pt", "is a device", "to a file"),
        ("folder", "is a folder", "model.safetensors"),
        ("a/b\0c", "does not exist", "--checkpoint"),
        ("folder/model.safetensors/w.pt", "does not exist", "--checkpoint"),
        ("n" * 300, "cannot be read: File name too long", "--checkpoint"),
    ):
        with pytest.raises(ResvitError, match=why) as caught:
            load_checkpoint(net(), tmp_path / name)
        assert fix in caught.value.fix


def in_shards(folder: Path, kind: str, whole: dict[str, torch.Tensor]) -> Path:
    """The weights in two files, and the index beside them."""
    weights = list(whole.items())
    write = save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    index: dict[str, str] = {}
    for number, part in enumerate((weights[:2], weights[2:]), 1):
        name = f"{stem}-{number:05}-of-00002.{kind}"
        write(dict(part), folder / name)
        index |= {key: name for key, _ in part}
    path = folder / f"{stem}.{kind}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files(kind: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    index, module = in_shards(tmp_path, kind, weights), net()
    assert not same(module, weights)
    assert load_checkpoint(module, index) == ()
    assert same(module, weights)
    before = model_identity(ModelSpec("object:Net", checkpoint=index))
    first = next(tmp_path.glob(f"*00001*.{kind}"))
    with pytest.raises(ResvitError, match="one of several files") as caught:
        load_checkpoint(net(), first)
    assert "index" in caught.value.fix
    with pytest.raises(ResvitError, match="is a folder") as caught:
        load_checkpoint(net(), tmp_path)
    assert caught.value.fix == f"Give the file in it: {index.name}."
    first.write_bytes(next(tmp_path.glob(f"*-00002-of*.{kind}")).read_bytes())
    assert model_identity(ModelSpec("object:Net", checkpoint=index)) != before  # the index itself is unchanged
    with pytest.raises(ResvitError, match="does not hold"):
        load_checkpoint(net(), index)
    first.unlink()
    with pytest.raises(ResvitError, match="does not exist"):
        load_checkpoint(net(), index)


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ("{", "does not read as JSON"),
        ("[]", "which weights are in which file"),
        ('{"weight_map": {}}', "which weights are in which file"),
        ('{"weight_map": {"a": 3}}', "which weights are in which file"),
        ('{"weight_map": {"a": "../a.bin"}}', "no file of its own folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no file of its own folder"),
        ('{"weight_map": {"a": ""}}', "no file of its own folder"),
        ('{"weight_map": {"a": "a.bin.index.json"}}', "no known checkpoint format"),
    ],
)
def test_indexes_that_name_no_weights(document: str, problem: str, tmp_path: Path) -> None:
    index = tmp_path / "a.bin.index.json"
    index.write_text(document)
    with pytest.raises(ResvitError, match=problem):
        load_checkpoint(net(), index)
    assert "checkpoint_files" not in model_identity(ModelSpec("object:Net", checkpoint=index)) or "known" in problem


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    """Checkpoints from before PyTorch 0.4.1, and those that other libraries' weights were made into."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weights = {name: value for name, value in module.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": weights}, tmp_path / "old.pth")
    load_checkpoint(module, tmp_path / "old.pth")
    del weights["1.running_var"]
    torch.save({"state_dict": weights}, tmp_path / "old.pth")
    with pytest.raises(ResvitError, match=r"1 missing .1.running_var"):
        load_checkpoint(module, tmp_path / "old.pth")


def test_arrays_in_place_of_weights_are_called_so(tmp_path: Path) -> None:
    torch.save({"model": {name: value.numpy() for name, value in net().state_dict().items()}}, tmp_path / "a.pth")
    with pytest.raises(ResvitError, match="arrays of NumPy in place of weights") as caught:
        load_checkpoint(net(), tmp_path / "a.pth")
    assert "from_numpy" in caught.value.fix


def test_dates_beside_the_weights(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    settings_ = {"at": when.replace(tzinfo=None), "day": when.date(), "took": datetime.timedelta(hours=3)}
    torch.save({"state_dict": net().state_dict(), "run": settings_}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["run"] == settings_
    load_checkpoint(net(), tmp_path / "a.pth")


def test_lazy_layers_are_refused_with_what_to_do() -> None:
    with pytest.raises(ResvitError, match="lazy layers") as caught:
        network_from_module(nn.Sequential(nn.LazyLinear(2)), ModelSpec("object:Net", input_shape=(1, 2, 2)))
    assert "run one image" in caught.value.fix


@functools.cache
def originals() -> dict[str, bytes]:
    """A checkpoint in each of the three formats."""
    torch.manual_seed(0)
    weights = {"state_dict": net().state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    archive, legacy = io.BytesIO(), io.BytesIO()
    torch.save(weights, archive)
    torch.save(weights, legacy, _use_new_zipfile_serialization=False)
    return {"zip": archive.getvalue(), "legacy": legacy.getvalue(), "safetensors": save(net().state_dict())}


@pytest.mark.whole
@given(
    kind=st.sampled_from(["zip", "legacy", "safetensors", "pickle in a whole archive"]),
    damage=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "insert"]), st.binary(max_size=8)), max_size=5
    ),
    end=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_end_in_one_kind_of_error(kind: str, damage: list[tuple[float, str, bytes]], end: float) -> None:
    whole = originals()["zip" if kind.startswith("pickle") else kind]
    archive = zipfile.ZipFile(io.BytesIO(whole)) if kind.startswith("pickle") else None
    content = archive.read("archive/data.pkl") if archive else whole
    for where, how, data in damage:
        at = int(where * len(content))
        content = content[:at] + (b"" if how == "cut" else data) + content[at + (0 if how == "insert" else len(data)) :]
    content = content if end > 0.3 else content[: int(end * 3 * len(content))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "w.pt"
        file.write_bytes(content)
        if archive:
            with zipfile.ZipFile(file, "w") as new:
                for name in archive.namelist():
                    new.writestr(name, content if name.endswith("data.pkl") else archive.read(name))
        with contextlib.suppress(ResvitError):
            load_checkpoint(net(), file)


def test_nan_is_named_and_masks_may_be_infinite() -> None:
    module = net()
    module.register_buffer("mask", torch.full((2, 2), -torch.inf))
    module.register_buffer("bound", torch.tensor(torch.inf))
    require_finite(module, "net")
    module.state_dict()["1.weight"][0, 1] = torch.nan
    with pytest.raises(ResvitError, match=r"1\.weight holds 1 NaN or infinite values \(of 3\)"):
        require_finite(module, "net")
    norm = nn.BatchNorm2d(4)
    norm.running_var[2] = torch.inf
    with pytest.raises(ResvitError, match="running_var"):
        require_finite(norm, "net")


@pytest.mark.parametrize("zipped", [True, False])
def test_scores_and_settings_beside_the_weights_are_let_through(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    beside = {
        "best": np.float64(0.91),
        "epoch": np.int64(-3),
        "ok": np.bool_(True),
        "half": np.float16(1.5),
        "args": argparse.Namespace(lr=np.float32(0.5)),
        "cfg": types.SimpleNamespace(name="a"),
        "matrix": np.zeros((2, 2)),
        "when": np.datetime64("2020-01-01"),
        "structured": np.zeros(1, np.dtype([("a", "f4")]))[0],
    }
    torch.save({"state_dict": net().state_dict(), **beside}, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert set(found["state_dict"]) == set(net().state_dict())
    assert [found[name] for name in ("best", "epoch", "ok", "half")] == [0.91, -3, True, 1.5]
    assert found["args"].lr == 0.5
    assert found["when"] is found["structured"] is None


def test_no_state_of_a_numpy_type_is_believed(tmp_path: Path) -> None:
    """A dtype whose state says that its elements are larger than the bytes behind them."""

    class Wrong:
        def __reduce__(self) -> tuple[object, ...]:
            return np.dtype, ("f8", False, True), (3, "<", None, None, None, 1 << 30, 1 << 30, 0)

    class Scalar:
        def __reduce__(self) -> tuple[object, ...]:
            return np._core.multiarray.scalar, (Wrong(), b"\0" * 8)

    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "x": Scalar(), "y": Wrong()}, path)
    assert read_checkpoint(path)["x"] == 0.0
