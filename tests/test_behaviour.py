"""Networks that are random, whose images hang on each other, or that return more than tensors."""

from __future__ import annotations

import dataclasses
import random
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn
from torch.export import Dim, export

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.loading.load import load_network
from resvit_export.loading.program.check import COUPLED
from resvit_export.loading.program.facts import fixed_batch_of, output_names, reading_nodes
from resvit_export.loading.program.run import runner_from_program
from resvit_export.loading.program.trace import program_from_module
from resvit_export.loading.spec import ModelSpec
from resvit_export.loading.user_code import left_out_note, tensors_alone
from resvit_export.to_onnx.export import onnx_from_program
from resvit_export.to_onnx.own_onnx import import_onnx

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A convolution, then what the test wants of its maps [B, 4, 4, 4]."""

    def __init__(self, behind: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.behind = nn.Conv2d(3, 4, 2, 2), behind

    def forward(self, images: torch.Tensor) -> Any:
        return self.behind(self.conv(images))


def dropped(maps: torch.Tensor) -> torch.Tensor:
    return F.dropout(maps, 0.3).mean((2, 3))


@pytest.mark.whole
@pytest.mark.parametrize(
    "behind",
    [
        dropped,
        lambda maps: (maps + torch.randn_like(maps)).mean((2, 3)),
        lambda maps: maps.mean((2, 3)) + torch.rand(1),
        lambda maps: F.dropout2d(maps, 0.5, training=True).mean((2, 3)),
        lambda maps: maps.mean((2, 3)) * random.random(),
        lambda maps: maps.mean((2, 3)) + float(np.random.default_rng().random()),
        lambda maps: maps.flatten(1)[:, torch.randperm(64)],
    ],
)
def test_a_random_network_is_said_to_be_random(behind: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(ResvitError, match="is random: two runs on one image differ") as caught:
        program_from_module(Net(behind), SHAPE)
    assert caught.value.code is ExitCode.INPUT
    assert "report" not in str(caught.value)


def test_the_line_that_draws_is_named() -> None:
    with pytest.raises(ResvitError, match=r"test_behaviour\.py, line \d+: return self\.behind"):
        program_from_module(Net(dropped), SHAPE)


@pytest.mark.whole
@pytest.mark.parametrize(
    "behind",
    [
        lambda maps: F.dropout(maps, 0.3, training=False).mean((2, 3)),
        lambda maps: F.dropout(maps, 0.0).mean((2, 3)),
        lambda maps: F.scaled_dot_product_attention(maps, maps, maps).mean((2, 3)),
    ],
)
def test_what_could_draw_and_does_not_is_none(behind: Callable[[torch.Tensor], Any]) -> None:
    program, notes = program_from_module(Net(behind), SHAPE)
    assert (fixed_batch_of(program), notes) == (None, ())


def attention_over_the_batch(maps: torch.Tensor) -> torch.Tensor:
    tokens = maps.flatten(2).transpose(1, 2).reshape(1, -1, 4)
    return ((tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens).reshape(maps.shape[0], -1, 4).mean(1)


COUPLINGS = [
    attention_over_the_batch,
    lambda maps: (maps - maps.mean(0)).mean((2, 3)),
    lambda maps: (maps / maps.abs().max()).mean((2, 3)),
    lambda maps: F.batch_norm(maps, None, None, training=True).flatten(1),
    lambda maps: maps.mean((2, 3)) + torch.ones(maps.shape[0], 1).cumsum(0),
    lambda maps: maps.mean((2, 3)).flip(0),
]


@pytest.mark.whole
@pytest.mark.parametrize("behind", COUPLINGS)
def test_images_that_hang_on_each_other_run_alone(behind: Callable[[torch.Tensor], Any]) -> None:
    program, notes = program_from_module(Net(behind), SHAPE)
    assert fixed_batch_of(program) == 1
    assert notes == (COUPLED,)


def saved(path: Path, behind: Callable[[torch.Tensor], Any], batch: int | None) -> Path:
    free = None if batch else ({0: Dim.AUTO(min=1)},)
    program = export(Net(behind).eval(), (torch.zeros(batch or 2, *SHAPE),), dynamic_shapes=free)
    torch.export.save(program, path)
    return path


@pytest.mark.whole
@pytest.mark.parametrize("batch", [None, 3])
def test_a_saved_program_whose_images_hang_on_each_other_is_refused(tmp_path: Path, batch: int | None) -> None:
    path = saved(tmp_path / "net.pt2", COUPLINGS[2], batch)
    with pytest.raises(ResvitError, match="depend on the other images of the batch") as caught:
        load_network(ModelSpec(str(path)))
    assert caught.value.code is ExitCode.INPUT
    load_network(ModelSpec(str(saved(path, COUPLINGS[2], 1))))
    load_network(ModelSpec(str(saved(path, lambda maps: maps.mean((2, 3)), batch))))


def onnx_file(path: Path, nodes: list[onnx.NodeProto], batch: int | str) -> Path:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("image", [batch, 3, 8, 8]), ("out", [batch, 3, 8, 8]))
    ]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("batch", ["batch", 4])
def test_an_onnx_file_whose_images_hang_on_each_other_is_refused(tmp_path: Path, batch: int | str) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["top"], keepdims=1),
        helper.make_node("Div", ["image", "top"], ["out"]),
    ]
    path = onnx_file(tmp_path / "net.onnx", nodes, batch)
    with pytest.raises(ResvitError, match="depend on the other images of the batch") as caught:
        import_onnx(path, tmp_path / "out.onnx")
    assert caught.value.code is ExitCode.INPUT
    import_onnx(onnx_file(path, nodes, 1), tmp_path / "out.onnx")


def test_a_random_onnx_file_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["image"], ["noise"]),
        helper.make_node("Add", ["image", "noise"], ["out"]),
    ]
    with pytest.raises(ResvitError, match="draws random numbers") as caught:
        import_onnx(onnx_file(tmp_path / "net.onnx", nodes, 1), tmp_path / "out.onnx")
    assert caught.value.code is ExitCode.INPUT


Pair = namedtuple("Pair", ("scores", "loss"))


@pytest.mark.parametrize(
    ("behind", "names", "left_out"),
    [
        (
            lambda maps: {"cls": maps.mean((2, 3)), "aux": [maps.mean(1), None], "feat": (maps, maps + 1), "n": 3},
            ["cls", "aux", "feat_0", "feat_1"],
            "aux[1] (None), n (int 3)",
        ),
        (lambda maps: (maps.mean((2, 3)), None), ["logits"], "[1] (None)"),
        (
            lambda maps: [None, 2.5, maps, "text", maps.mean((2, 3))],
            ["output_0", "output_1"],
            "[0] (None), [1] (float 2.5)",
        ),
        (lambda maps: Pair(maps.mean((2, 3)), maps.mean()), ["scores"], "loss (a single number)"),
        (lambda maps: {"a": {"b": {"c": None}}, "out": maps}, ["out"], "a.b.c (None)"),
    ],
)
def test_what_is_no_tensor_is_left_out_and_named(
    behind: Callable[[torch.Tensor], Any], names: list[str], left_out: str
) -> None:
    module = Net(behind)
    program, notes = program_from_module(module, SHAPE)
    assert output_names(program) == names
    assert left_out in notes[0]
    assert "forward" not in vars(module)


@dataclasses.dataclass
class Found:
    scores: torch.Tensor
    maps: list[torch.Tensor]
    loss: torch.Tensor | None = None


class Own(dict[str, Any]):
    """As libraries have them for answers."""


@pytest.mark.parametrize(
    ("behind", "names"),
    [
        (lambda maps: Pair(maps.mean((2, 3)), maps.mean(1)), ["scores", "loss"]),
        (lambda maps: Found(maps.mean((2, 3)), [maps, maps + 1]), ["scores", "maps_0", "maps_1"]),
        (lambda maps: Own(scores=maps.mean((2, 3)), more=Pair(maps, maps + 1)), ["scores", "more_0", "more_1"]),
        (lambda maps: maps.flatten(1).max(1, keepdim=True), ["output_0", "output_1"]),
    ],
)
def test_answers_with_names_are_saved_and_read_again(
    behind: Callable[[torch.Tensor], Any], names: list[str], tmp_path: Path
) -> None:
    """A program that answers with a class of the user's cannot be saved: the fold's own file failed."""
    program, _ = program_from_module(Net(behind), SHAPE)
    assert output_names(program) == names
    torch.export.save(program, tmp_path / "net.pt2")
    again = load_network(ModelSpec(str(tmp_path / "net.pt2"))).program
    assert output_names(again) == names
    images = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    for name, expected in runner_from_program(program)({"input": images}).items():
        np.testing.assert_array_equal(runner_from_program(again)({"input": images})[name], expected)


def test_an_answer_of_no_known_structure_is_refused_by_its_name() -> None:
    with pytest.raises(ResvitError, match="returns a SimpleNamespace as b") as caught:
        program_from_module(Net(lambda maps: {"a": maps, "b": SimpleNamespace(c=maps)}), SHAPE)
    assert "dataclasses" in caught.value.fix


def test_tensors_alone_stay_the_very_object() -> None:
    answer = {"a": torch.zeros(2, 3), "b": [torch.zeros(2), (torch.zeros(2),)]}
    module = Net(lambda maps: answer)
    with tensors_alone(module) as left_out:
        assert module(torch.zeros(2, *SHAPE)) is answer
    assert left_out_note(left_out) == ()


@pytest.mark.parametrize(
    "behind", [lambda maps: None, lambda maps: [None, 3], lambda maps: {}, lambda maps: maps.mean()]
)
def test_a_network_without_answers_is_refused(behind: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(ResvitError, match="returns no tensor") as caught:
        program_from_module(Net(behind), SHAPE)
    assert caught.value.code is ExitCode.INPUT


def test_a_saved_program_that_returns_none_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt2", lambda maps: (maps.mean((2, 3)), None), None)
    with pytest.raises(ResvitError, match="Output 1 of the program is None, no tensor"):
        load_network(ModelSpec(str(path)))


class Flagged(torch.nn.Module):
    """Branches on buffers of its own: a flag, a list, a number, and what is computed from them."""

    def __init__(self, ready: bool, share: float) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.register_buffer("ready", torch.tensor(ready))
        self.register_buffer("shares", torch.tensor([share, 0.0]))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if not self.ready:
            x = x * 100
        if self.shares[0] * 2 > 1:
            x = x - 1
        if int(self.steps) > 2 and self.shares[1].item() == 0:
            x = x * 2
        if self.ready & (self.steps == 3):
            x = x.relu()
        return x.mean((2, 3)) * self.shares[0]


@pytest.mark.whole
@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_forward_may_branch_on_its_own_small_buffers(ready: bool, share: float) -> None:
    module = Flagged(ready, share).eval()
    program, notes = program_from_module(module, (3, 8, 8))
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype=np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(runner_from_program(program)({"input": images})["logits"], expected, atol=1e-5)
    assert notes == ()
    assert bool(module.ready) is ready


def test_a_forward_that_branches_on_its_image_is_still_refused() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    with pytest.raises(ResvitError, match="depends on values"):
        program_from_module(Branching(), (3, 8, 8))


class Reading(nn.Module):
    """Takes numbers out of its own weights and buffers, as CLIP's temperature and old scale layers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.temperature = nn.Conv2d(3, 4, 3), nn.Parameter(torch.tensor(0.7))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x) * self.scale.item()
        return maps.mean((2, 3)) * self.temperature.exp().item() + float(self.conv.bias.sum())


@pytest.mark.whole
def test_numbers_of_small_weights_are_constant(tmp_path: Path) -> None:
    module = Reading().eval()
    program, notes = program_from_module(module, SHAPE)
    assert notes == ()
    assert reading_nodes(program) == []
    images = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    onnx_from_program(program, tmp_path / "net.onnx")
    np.testing.assert_allclose(onnx_runner(tmp_path / "net.onnx")({"input": images})["logits"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("behind", "problem", "fix"),
    [
        (lambda maps: torch.complex(maps, maps), "output output is complex", "view_as_real"),
        (lambda maps: maps[maps > 0.1], "output output holds as much as an image happens to give", "topk"),
        (lambda maps: (maps, (maps > 0).nonzero()), "output output_1 holds as much", "topk"),
        (
            lambda maps: torch.sparse.mm(torch.eye(4).to_sparse(), maps.mean((2, 3)).T).T,
            r"computes with sparse_coo tensors \(test_behaviour.py",
            "to_dense",
        ),
    ],
)
def test_numbers_that_no_engine_has(behind: Callable[[torch.Tensor], Any], problem: str, fix: str) -> None:
    with pytest.raises(ResvitError, match=problem) as caught:
        program_from_module(Net(behind), SHAPE)
    assert fix in caught.value.fix


def factory(tmp_path: Path, source: str) -> ModelSpec:
    file = tmp_path / "net.py"
    file.write_text(f"import torch\nfrom torch import nn\ndef make():\n    {source}\n")
    return ModelSpec(f"{file}:make", input_shape=SHAPE)


CONV = "nn.Conv2d(3, 4, 2)"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (f"return torch.jit.script({CONV})", "it is TorchScript"),
        (f"return torch.jit.trace({CONV}, torch.zeros(1, 3, 8, 8))", "it is TorchScript"),
        (f"return nn.Sequential(nn.ReLU(), torch.jit.script({CONV}))", "its part 1 is TorchScript"),
    ],
)
def test_torchscript_is_refused_with_what_to_do(source: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ResvitError, match=problem) as caught:
        load_network(factory(tmp_path, source))
    assert "dynamo=False" in caught.value.fix


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("m.train(); q.prepare_qat(m, inplace=True)", "is a .*FakeQuantize"),
        ("m.train(); q.prepare_qat(m, inplace=True); m.eval(); q.convert(m, inplace=True)", "is a Conv2d"),
        ("m.eval(); q.prepare(m, inplace=True)", "is a HistogramObserver"),
    ],
)
def test_a_network_that_is_quantised_already_is_refused(how: str, problem: str, tmp_path: Path) -> None:
    source = (
        f"import torch.ao.quantization as q; m = nn.Sequential({CONV}); "
        f"m.qconfig = q.get_default_qat_qconfig('x86') if 'qat' in {how!r} else q.get_default_qconfig('x86'); "
        f"{how}; return m"
    )
    with pytest.raises(ResvitError, match=f"quantised already, or prepared for it: .*{problem}") as caught:
        load_network(factory(tmp_path, source))
    assert "float network" in caught.value.fix


def test_a_float_network_that_can_be_quantised_is_none(tmp_path: Path) -> None:
    """torchvision's ``quantization.models`` hold stubs, and sums as modules."""
    source = (
        "import torch.ao.quantization as q; import torch.ao.nn.quantized as nnq; m = nn.Sequential(q.QuantStub(), "
        f"{CONV}, nn.Flatten(), q.DeQuantStub()); m[1].add = nnq.FloatFunctional(); return m"
    )
    assert load_network(factory(tmp_path, source)).program is not None
