from __future__ import annotations

import io
import json
import os
import pickle
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent
from resvit_export.loading.load import load_network, network_from_module
from resvit_export.loading.program.facts import has_dynamic_batch
from resvit_export.loading.program.trace import program_from_module
from resvit_export.loading.pt2 import program_from_pt2
from resvit_export.loading.spec import ModelSpec
from resvit_export.models.reference import resvit_model
from resvit_export.recipe.pairs import plain_values

FILE = """
import torch
from torch import nn
from neighbour import WIDTH


def make(classes=3, bias=True, name="x"):
    return nn.Sequential(nn.Conv2d(1, WIDTH, 3), nn.Flatten(), nn.Linear(WIDTH * 36, classes, bias=bias))


def number():
    return 5


def fails():
    raise KeyError("no such backbone")


class Branching(nn.Module):
    input_shape = (1, 8, 8)

    def forward(self, x):
        if x.sum() > 0:
            return x.flatten(1)
        return -x.flatten(1)


class FixedBatch(nn.Module):
    input_shape = (1, 4, 4)

    def forward(self, x):
        return torch.cat([x[i].flatten()[None] for i in range(len(x))]) * len(x)


class Crashing(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), 7)


class Broken(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.weight.data[0, 0] = float("nan")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 2\n")
    path = tmp_path / "net.py"
    path.write_text(textwrap.dedent(FILE))
    return path


class Warnings(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


def test_arguments_are_parsed_to_plain_values() -> None:
    assert [plain_values("key", text) for text in ("true", "False", "12", "0.5", "1e-3", "gelu")] == [
        True, False, 12, 0.5, 1e-3, "gelu",
    ]  # fmt: skip


@pytest.mark.whole
def test_resvit_model_with_checkpoint(tmp_path: Path) -> None:
    source = resvit_model("embed-nano").eval()
    for tensor in source.parameters():
        tensor.data.add_(0.01)
    path, warnings = tmp_path / "w.pt", Warnings()
    torch.save({"model": source.state_dict()}, path)
    network = load_network(ModelSpec("resvit:embed-nano", path), warnings)
    assert warnings.lines == []
    config = source.config
    assert network.input_shape == (config.in_channels, *config.image_size)
    assert network.num_classes == config.num_classes
    assert network.preprocess is not None
    assert network.preprocess.mean == config.mean
    assert network.preprocess.size == config.image_size
    for batch in (1, 3):
        images = np.random.default_rng(0).standard_normal((batch, *network.input_shape), dtype=np.float32)
        with torch.no_grad():
            expected = source(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(network.runner()({"input": images})["logits"], expected, rtol=1e-4, atol=1e-5)
    facts = json.loads(json.dumps(network.record().to_json()))
    assert facts["dynamic_batch"] is True
    assert facts["input_shape"] == list(network.input_shape)


@pytest.mark.slow
@pytest.mark.whole
def test_timm_model_warns_of_random_weights() -> None:
    warnings = Warnings()
    network = load_network(ModelSpec("timm:vit_tiny_r_s16_p8_224", None, {"img_size": 32, "num_classes": 5}), warnings)
    assert "random weights" in warnings.lines[0]
    assert (network.input_shape, network.num_classes) == ((3, 32, 32), 5)
    assert network.preprocess is not None
    assert (network.preprocess.resize, network.preprocess.crop_fraction) == ("crop", 0.9)
    assert network.preprocess.mean == (0.5, 0.5, 0.5)
    with pytest.raises(ResvitError, match="timm has no model 'vit_nothing'") as caught:
        load_network(ModelSpec("timm:vit_nothing"))
    assert "vit_" in caught.value.fix


def test_factory_in_a_file(file: Path) -> None:
    spec = ModelSpec(f"{file}:make", None, {"classes": 4, "bias": False}, (1, 8, 8))
    network = load_network(spec)
    assert network.num_classes == 4
    assert network.preprocess is None
    assert network.digest == load_network(spec).digest
    assert "2.bias" not in network.program.state_dict


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "message"),
    [
        ("make", {}, None, "does not say which images it takes"),
        ("make", {"colour": 1}, (1, 8, 8), "does not take these arguments.*colour"),
        ("number", {}, None, "returned a int, not a torch.nn.Module"),
        ("fails", {}, None, r"failed \(net.py, line 16: .*KeyError: .no such backbone"),
        ("nothing", {}, None, "no function or class 'nothing'"),
        ("Branching", {}, None, r"cannot be turned into a graph.*net.py, line 23: if x.sum"),
        ("Crashing", {}, (1, 4, 4), r"fails on a batch of shape \[1, 1, 4, 4\] \(net.py, line 37.*16"),
        ("make", {}, (1, 4, 4), r"fails on a batch of shape \[1, 1, 4, 4\].*8"),
        ("Broken", {}, (1, 4, 4), "weight holds 1 NaN"),
    ],
)
def test_what_is_wrong_with_a_factory_is_said(
    file: Path,
    name: str,
    arguments: dict[str, bool | int | float | str],
    shape: tuple[int, int, int] | None,
    message: str,
) -> None:
    with pytest.raises(ResvitError, match=message):
        load_network(ModelSpec(f"{file}:{name}", None, arguments, shape))


def test_fixed_batch_is_noted(file: Path) -> None:
    network = load_network(ModelSpec(f"{file}:FixedBatch"))
    assert network.record().dynamic_batch is False
    assert "one batch size only" in network.notes[0]
    images = np.ones((3, 1, 4, 4), np.float32)
    assert network.runner()({"input": images})["logits"].shape == (3, 16)  # in pieces of one


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("embed-nano", "does not say where the model is"),
        ("no.such.module:make", "There is no module"),
        ("missing.py:make", "does not exist"),
        ("missing.pt2", "does not exist"),
        ("json:nothing", "no function or class 'nothing'"),
        ("resvit:embed-giant", "embed-giant"),
        ("timm:hf_hub:timm/resnet18.a1_in1k", "names a place, not a model of timm's"),
    ],
)
def test_names_that_lead_nowhere(model: str, message: str) -> None:
    with pytest.raises(ResvitError, match=message):
        load_network(ModelSpec(model))


def test_trained_weights_of_timm_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ResvitError, match="are not on this machine, and nothing is downloaded") as caught:
        load_network(ModelSpec("timm:resnet18", model_args={"pretrained": True}))
    assert "hf download timm/resnet18" in caught.value.fix
    assert constants.HF_HUB_OFFLINE is False


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 6)).eval()
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    shapes = ({0: torch.export.Dim("b", min=1, max=64)},)
    torch.export.save(torch.export.export(module, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=shapes), path)
    return path


@pytest.mark.whole
def test_exported_program_is_taken_as_it_is(program: Path) -> None:
    network = load_network(ModelSpec(str(program)))
    assert (network.input_shape, network.num_classes) == ((3, 8, 8), 6)
    assert network.record().dynamic_batch is True
    images = np.ones((3, 3, 8, 8), np.float32)
    expected = torch.export.load(program).module()(torch.from_numpy(images)).detach().numpy()
    assert np.array_equal(network.runner()({"input": images})["logits"], expected)
    with pytest.raises(ResvitError, match="takes no arguments"):
        load_network(ModelSpec(str(program), None, {"width": 3}))
    with pytest.raises(ResvitError, match=r"takes images of \(3, 8, 8\)"):
        load_network(ModelSpec(str(program), None, {}, (3, 16, 16)))


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.trace}'",)


def rewritten(program: Path, out: Path, changes: dict[str, Callable[[bytes], bytes]]) -> Path:
    """Copy an archive with some members changed, or added."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(out, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            member = name.partition("/")[2]
            new.writestr(name, changes.pop(member, lambda data: data)(old.read(name)))
        for member, make in changes.items():
            new.writestr(f"{root}/{member}", make(b""))
    return out


def test_programs_that_bring_code_are_refused_and_not_run(program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save((Evil(trace),), buffer)

    def edit(key: str, value: str) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            text = json.loads(data)

            def walk(node: object) -> None:
                if isinstance(node, dict):
                    for name in node:
                        if name == key and isinstance(node[name], (str, bool)):
                            node[name] = json.loads(value)
                        walk(node[name])
                elif isinstance(node, list):
                    for entry in node:
                        walk(entry)

            walk(text)
            return json.dumps(text).encode()

        return change

    command = f"__import__('os').system('touch {trace}')"
    attacks: list[tuple[dict[str, Callable[[bytes], bytes]], str]] = [
        ({"data/sample_inputs/model.pt": lambda _: buffer.getvalue()}, "sample inputs are pickled"),
        ({"data/sample_inputs/model.pt": lambda _: pickle.dumps(Evil(trace))}, "sample inputs are pickled"),
        (
            {
                "data/weights/model_weights_config.json": edit("use_pickle", "true"),
                "data/weights/weight_0": lambda _: buffer.getvalue(),
            },
            "is pickled",
        ),
        ({"data/weights/model.pt": lambda _: buffer.getvalue()}, "holds 'data/weights/model.pt'"),
        ({"data/constants/opaque_obj_0": lambda _: pickle.dumps(Evil(trace))}, "opaque_obj_0"),
        ({"data/aotinductor/model/net.so": lambda _: b"\x7fELF"}, "aotinductor"),
        ({"models/model.json": edit("expr_str", json.dumps(command))}, "a size is given as"),
        ({"models/model.json": edit("target", '"torch.hub.load"')}, "it calls 'torch.hub.load'"),
    ]
    for changes, reason in attacks:
        attacked = rewritten(program, tmp_path / "evil.pt2", changes)
        with pytest.raises(ResvitError, match="is refused as an exported program") as caught:
            program_from_pt2(attacked)
        assert reason in caught.value.problem
        assert not trace.exists()
    plain = rewritten(program, tmp_path / "plain.pt2", {})
    assert len(program_from_pt2(plain).state_dict) == 9


def test_damaged_programs(program: Path, tmp_path: Path) -> None:
    content = program.read_bytes()
    for name, data in {"half.pt2": content[: len(content) // 2], "empty.pt2": b"", "text.pt2": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ResvitError, match="is refused as an exported program"):
            program_from_pt2(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("version", "8.14")
    with pytest.raises(ResvitError):
        program_from_pt2(tmp_path / "other.pt2")


class CountsByLen(nn.Module):
    """Asks Python for the batch, as RT-DETR does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.reshape(len(images), -1))


def test_len_of_a_tensor_does_not_fix_the_batch() -> None:
    program, notes = program_from_module(CountsByLen().eval(), (3, 8, 8))
    assert (has_dynamic_batch(program), notes) == (True, ())
    assert "len" not in globals()


def test_a_class_whose_file_is_not_among_the_loaded_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountsByLen, "__module__", "made.elsewhere")
    program, _ = program_from_module(CountsByLen().eval(), (3, 8, 8))
    assert program.graph is not None


class Stem(nn.Module):
    """As timm's: a configuration beside the layers, and a convolution that may stand behind a rearrangement."""

    def __init__(self, first: int, named: str | tuple[str, ...]) -> None:
        super().__init__()
        self.head = nn.Conv2d(64, 8, 1)
        self.first = nn.Conv2d(first, 8, 3)
        self.pretrained_cfg = {"input_size": (3, 32, 32), "first_conv": named}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        blocks = torch.nn.functional.pixel_unshuffle(images, int((self.first.in_channels // images.shape[1]) ** 0.5))
        return self.first(blocks).mean((2, 3))


@pytest.mark.parametrize(
    ("first", "named", "arguments", "channels"),
    [
        (3, "first", {}, 3),
        (1, "first", {}, 1),
        (4, ("first", "second"), {}, 4),
        (48, "first", {}, 3),
        (3, (), {}, 3),
        (16, "first", {"in_chans": 1}, 1),
    ],
)
def test_the_channels_of_timms_networks(
    first: int, named: str | tuple[str, ...], arguments: dict[str, int], channels: int
) -> None:
    network = network_from_module(Stem(first, named), ModelSpec("object:Stem", model_args=arguments))
    assert network.input_shape == (channels, 32, 32)
