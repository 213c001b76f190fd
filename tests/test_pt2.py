"""Archives of exported programs: what torch writes is read as it is, and nothing else is read at all."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.loading.exported.errors import NotAllowedError
from resvit_export.loading.exported.operators import arguments_of
from resvit_export.loading.exported.sizes import nodes_of_size
from resvit_export.loading.exported.structures import structure_from_text
from resvit_export.loading.load import load_network
from resvit_export.loading.program.facts import output_names
from resvit_export.loading.program.run import runner_from_program
from resvit_export.loading.pt2 import program_from_pt2
from resvit_export.loading.spec import ModelSpec

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """The changes that are made to archives stand beside the benchmark that makes all of them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class Pair(NamedTuple):
    scores: Tensor
    boxes: Tensor


@dataclasses.dataclass
class Answer:
    scores: Tensor
    boxes: Tensor
    loss: Tensor | None = None


class Small(nn.Module):
    """A network whose answer is held as ``make`` holds it."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)
        self.head = nn.Linear(4, 5)
        self.tied = self.head.weight
        self.register_buffer("low", torch.ones(4, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([True, False, True, True]), persistent=False)
        self.register_buffer("spread", torch.ones(1, 1).expand(1, 4))
        self.make = make

    def forward(self, image: Tensor) -> Any:
        x = self.conv(image).mean((2, 3)) * self.low * self.spread + 1e-8
        x = torch.where(self.mask, x, torch.tensor(0.5))
        with torch.no_grad():
            x = x.reshape(x.shape[0], 4)
        return self.make(self.head(x), x)


def saved(module: nn.Module, path: Path, *, named: bool = False) -> Path:
    """Export for any batch of images [B, 3, 8, 8], and write."""
    image, free = torch.zeros(2, 3, 8, 8), {0: torch.export.Dim.AUTO(min=1)}
    with torch.no_grad():
        program = (
            torch.export.export(module.eval(), (), {"image": image}, dynamic_shapes={"image": free})
            if named
            else torch.export.export(module.eval(), (image,), dynamic_shapes=(free,))
        )
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    return saved(Small(lambda scores, boxes: {"scores": scores, "boxes": boxes}), path)


def changed(archive: Path, out: Path, member: str, change: Callable[[Any], None]) -> Path:
    """Copy an archive with a JSON member changed in place."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith(member):
                document = json.loads(data)
                change(document)
                data = json.dumps(document).encode()
            new.writestr(name, data)
    return out


def tensor_of(document: Any) -> Any:
    """What is said of one tensor among the weights."""
    return document["config"]["conv.bias"]["tensor_meta"]


def refusal(path: Path) -> str:
    """Why an archive is refused."""
    with pytest.raises(ResvitError, match="is refused as an exported program") as caught:
        program_from_pt2(path)
    assert caught.value.code is ExitCode.INPUT
    assert "torch.export.save" in caught.value.fix
    assert all(char.isprintable() for char in caught.value.problem)
    return caught.value.problem


HELD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "alone": lambda scores, _: scores,
    "tuple": lambda scores, boxes: (scores, [boxes]),
    "dict": lambda scores, boxes: {"scores": scores, "boxes": boxes},
    "ordered": lambda scores, boxes: collections.OrderedDict(scores=scores, boxes=boxes),
    "default": lambda scores, boxes: collections.defaultdict(list, {"scores": scores, "boxes": boxes}),
    "named tuple": Pair,
    "dataclass": Answer,
    "none inside": lambda scores, boxes: {"scores": scores, "boxes": boxes, "loss": None},
}
torch.export.register_dataclass(Answer, serialized_type_name="test_pt2.Answer")
torch.utils._pytree._register_namedtuple(Pair, serialized_type_name="test_pt2.Pair")


@pytest.mark.whole
@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("named", [False, True])
def test_whatever_holds_the_answer_it_is_read(kind: str, named: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Small(HELD[kind])
    path = saved(module, tmp_path / "net.pt2", named=named)
    image = torch.randn(3, 3, 8, 8)
    expected = torch.utils._pytree.tree_leaves(module(image))
    program = program_from_pt2(path)
    assert str(program.graph) == str(torch.export.load(path).graph)
    if kind != "none inside":  # an answer of None has no value to compare
        answers = runner_from_program(program)({"input": image.numpy()})
        assert list(answers) == output_names(program)
        if kind not in ("alone", "tuple"):
            assert list(answers) == ["scores", "boxes"]
        for own, theirs in zip(answers.values(), expected, strict=True):
            assert np.array_equal(own, theirs.detach().numpy())


def test_a_class_that_holds_the_answer_is_not_looked_for(tmp_path: Path) -> None:
    path = saved(Small(Answer), tmp_path / "net.pt2")

    def rename(document: Any) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = signature["out_spec"].replace("test_pt2.Answer", "gone.library.Answer")

    other = changed(path, tmp_path / "other.pt2", "model.json", rename)
    assert output_names(program_from_pt2(other)) == ["scores", "boxes"]
    assert "gone" not in sys.modules


@pytest.mark.whole
def test_sizes_that_depend_on_the_image_s(tmp_path: Path) -> None:
    class Pyramid(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            small = nn.functional.avg_pool2d(image, 3, 2, 1, ceil_mode=True)
            large = nn.functional.interpolate(small, scale_factor=1.5)
            pooled = nn.functional.adaptive_avg_pool2d(large[:, :, : image.shape[2] // 2], 1)
            return pooled.flatten(1) * max(image.shape[2], image.shape[3])

    height, width = torch.export.Dim("height", min=4, max=32), torch.export.Dim("width", min=4, max=32)
    free = {2: 2 * height, 3: 2 * width}
    program = torch.export.export(Pyramid(), (torch.zeros(1, 3, 16, 24),), dynamic_shapes=(free,))
    torch.export.save(program, tmp_path / "net.pt2")
    own = program_from_pt2(tmp_path / "net.pt2")
    assert str(own.graph) == str(torch.export.load(tmp_path / "net.pt2").graph)
    image = torch.randn(1, 3, 20, 28)
    assert torch.equal(own.module()(image), Pyramid()(image))


@pytest.mark.parametrize(
    "text",
    [
        "Piecewise(ExprCondPair(Integer(1), Equality(Symbol('s7', integer=True), Integer(0))), ExprCondPair(s7, true))",
        "Max(Integer(1), FloorDiv(Add(Symbol('s0', positive=True, integer=True), Integer(-1)), Integer(2)))",
        "4*s77 + 1", "(s0 - 1)//2 % 7", "Eq(s0, 2)", "Ne(u0, 0) & (s1 >= 2)",
        "Pow(Symbol('s1', integer=True), Rational(1, 2))",
        "CeilToInt(Mul(Float('1.5', precision=53), ToFloat(s0)))", "ModularIndexing(s0, 2, 3)", "s0**2/4", "-s0",
    ],
)  # fmt: skip
def test_arithmetic_on_sizes_is_read(text: str) -> None:
    assert 1 <= nodes_of_size(text) < 20


_FUNCTIONS = (
    *(sympy.Add, sympy.Mul, sympy.Max, sympy.Min),
    *(lambda a, b: a**2 + b, lambda a, b: sympy.floor(a / 7) + b),
)
_SYMBOLS = sympy.symbols("s0 s77 u3", integer=True, positive=True)
_SIZES = st.recursive(
    st.integers(-1000, 1000).map(sympy.Integer) | st.sampled_from(_SYMBOLS),
    lambda inner: st.builds(lambda call, a, b: call(a, b), st.sampled_from(_FUNCTIONS), inner, inner),
    max_leaves=8,
)


@pytest.mark.whole
@settings(deadline=None)
@given(_SIZES)
def test_whatever_sympy_writes_of_a_size_is_read(size: Any) -> None:
    for text in (sympy.srepr(size), str(size)):
        assert nodes_of_size(text) >= 1


def test_expressions_that_nobody_could_compute_are_refused_at_once() -> None:
    from pt2_fuzz import EXPRESSIONS

    for text in EXPRESSIONS:
        with pytest.raises(NotAllowedError, match="a size is given as"):
            nodes_of_size(text)


@given(st.text(max_size=60) | st.from_regex(r"[a-zA-Z_0-9()', +*/=.-]{1,60}", fullmatch=True))
def test_no_text_is_a_size_by_accident(text: str) -> None:
    try:
        nodes_of_size(text)
    except NotAllowedError:
        return
    assert "." not in text or not text.replace(".", "").isidentifier()


def test_structures_that_name_what_to_import_are_refused() -> None:
    from pt2_fuzz import STRUCTURES

    read = []
    for text in STRUCTURES:
        try:
            read.append(structure_from_text(text, {}).type)
        except NotAllowedError:
            continue
    assert read == [dict, None]  # any text can name a part of an answer, and the leaf at the end is one
    assert "pt2_canary" not in sys.modules


def test_operators_that_are_no_networks_are_refused() -> None:
    from pt2_fuzz import OPERATORS

    for target in OPERATORS:
        with pytest.raises(NotAllowedError, match="it calls"):
            arguments_of(target)
    for target in ("conv2d.default", "relu_.default", "upsample_bilinear2d.vec", "__and__.Tensor", "pad.default"):
        assert {"self", "input"} & (arguments_of(f"torch.ops.aten.{target}") or set())
    assert arguments_of("_operator.mul") is None


@pytest.mark.parametrize(
    ("member", "change", "reason"),
    [
        ("model.json", lambda d: d["schema_version"].update(major=9), "its schema is 9"),
        ("model.json", lambda d: d.update(surprise=1), "and not ExportedProgram"),
        ("model.json", lambda d: d["graph_module"]["graph"]["nodes"][0].update(name="x\nimport os"), "Node.name"),
        ("model.json", lambda d: d["graph_module"]["graph"]["nodes"].pop(0), "which is not there"),
        ("model.json", lambda d: d["range_constraints"].update(u9999999={"min_val": 0, "max_val": 1}), "a size"),
        ("weights_config.json", lambda d: d["config"].update({"__class__.x": d["config"]["conv.bias"]}), "__class__"),
        ("weights_config.json", lambda d: d["config"]["conv.bias"].update(use_pickle=True), "'conv.bias' is pickled"),
        ("weights_config.json", lambda d: d["config"]["conv.bias"].update(path_name="../etc"), "path_name is '../etc'"),
        ("weights_config.json", lambda d: d["config"]["conv.bias"].update(path_name="weight_77"), "has no data"),
        *(
            ("weights_config.json", lambda d, k=key, v=value: tensor_of(d).update({k: v}), why)
            for key, value, why in (
                ("sizes", [{"as_int": 1 << 40}], "reaches beyond its bytes"),
                ("sizes", [{"as_int": -1}], "a size that is none"),
                ("strides", [{"as_int": 1 << 40}], "reaches beyond its bytes"),
                ("strides", [{"as_int": 0}], None),
                ("storage_offset", {"as_int": 10**6}, "reaches beyond its bytes"),
                ("sizes", [{"as_int": 1}] * 100, "not laid out"),
                ("dtype", 99, "dtype is 99"),
                ("layout", 1, "sparse"),
            )
        ),
    ],
)  # fmt: skip
def test_one_thing_that_torch_would_not_write(
    archive: Path, tmp_path: Path, member: str, change: Callable[[Any], Any], reason: str | None
) -> None:
    other = changed(archive, tmp_path / "other.pt2", member, change)
    if reason is None:
        assert program_from_pt2(other).state_dict["conv.bias"].stride() == (0,)
    else:
        assert reason in refusal(other)


def test_sizes_that_grow_while_the_program_runs_are_refused(archive: Path, tmp_path: Path) -> None:
    def grow(document: Any) -> None:
        graph = document["graph_module"]["graph"]
        first = next(iter(graph["sym_int_values"]))
        place = 1 + next(i for i, node in enumerate(graph["nodes"]) if first in json.dumps(node["outputs"]))
        for step in range(20):
            arguments = [{"name": x, "arg": {"as_sym_int": {"as_name": first}}, "kind": 1} for x in "ab"]
            graph["sym_int_values"][f"grown_{step}"] = {"as_int": 1}
            graph["nodes"].insert(
                place + step,
                {
                    "target": "_operator.mul",
                    "name": f"grown_{step}",
                    "inputs": arguments,
                    "outputs": [{"as_sym_int": {"as_name": f"grown_{step}"}}],
                    "metadata": {},
                },
            )
            first = f"grown_{step}"

    assert "could grow too large" in refusal(changed(archive, tmp_path / "other.pt2", "model.json", grow))


def test_the_file_is_an_archive_as_torch_lays_it_out(archive: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "other.pt2", archive.read_bytes()
    path.write_bytes(b"\x7fELF" + bytes(60) + data)
    assert "does not begin as an archive" in refusal(path)

    def repacked(compression: int, *extra: tuple[str, bytes]) -> Path:
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w", compression) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
            for name, content in extra:
                new.writestr(name, content)
        return path

    assert program_from_pt2(repacked(zipfile.ZIP_STORED)).state_dict
    assert "is compressed" in refusal(repacked(zipfile.ZIP_DEFLATED))
    for name in ("net/data/aotinductor/model/x.so", "net/data/constants/custom_obj_0", "net/models/other.json"):
        assert name.partition("/")[2] in refusal(repacked(zipfile.ZIP_STORED, (name, b"x")))
    for name in ("../x", "/x", "other/models/model.json", "net/archive_version"):
        assert "lies where torch writes none" in refusal(repacked(zipfile.ZIP_STORED, (name, b"x")))
    for cut in (10, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:cut])
        assert refusal(path)


@pytest.mark.whole
@settings(deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read(archive: Path, data: st.DataObject) -> None:
    content = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = archive.with_name("damaged.pt2")
    path.write_bytes(content)
    with contextlib.suppress(ResvitError):  # any other error fails
        program_from_pt2(path)


def test_a_program_that_says_other_sizes_than_it_computes(archive: Path, tmp_path: Path) -> None:
    def lie(document: Any) -> None:
        values = document["graph_module"]["graph"]["tensor_values"]
        values[document["graph_module"]["graph"]["outputs"][0]["as_tensor"]["name"]]["sizes"][1] = {"as_int": 7}

    with pytest.raises(ResvitError, match=r"says that scores is .*, 7\], and it computes \[2, 5\]"):
        load_network(ModelSpec(str(changed(archive, tmp_path / "other.pt2", "model.json", lie))))


@pytest.mark.whole
def test_changed_archives_touch_nothing(archive: Path, tmp_path: Path) -> None:
    """A short form of benchmarks/pt2_archives.py."""
    from pt2_archives import outcome
    from pt2_fuzz import Parts, changes

    parts = Parts(archive)
    outcome(archive)  # torch imports parts of its own when it first needs them
    assert outcome(archive) == "loaded"
    results = collections.Counter[str]()
    for number, (what, members) in enumerate(changes(parts, random.Random(0))):
        if number == 150:
            break
        result = outcome(parts.written(tmp_path / "changed.pt2", members))
        assert result in ("refused", "loaded"), f"{what}: {result}"
        results[result] += 1
    assert results["refused"] > 75


def test_the_watch_sees_what_would_be_touched(tmp_path: Path) -> None:
    from pt2_fuzz import watched

    seen: list[str] = []
    with watched(tmp_path / "x.pt2", seen):
        (tmp_path / "x.pt2").write_bytes(b"x")
        assert seen == []
        (tmp_path / "y").write_bytes(b"x")
        with pytest.raises(ImportError):
            __import__("pt2_canary")
        os.system("true")
    assert {"open", "import", "os.system"} <= {event.partition(" ")[0] for event in seen}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    "name",
    [
        "resvit:fpn-nano",
        pytest.param("transformers RT-DETRv2", marks=pytest.mark.slow),
        "transformers ViT",
        "timm resnet10t",
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_networks_are_read_as_torch_reads_them(name: str, dynamic: bool, tmp_path: Path) -> None:
    from pt2_archives import NETWORKS, difference, exported

    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    exported(make(), shape, tmp_path / "net.pt2", dynamic=dynamic)
    nodes, problem = difference(tmp_path / "net.pt2")
    assert (problem, nodes > 20) == ("", True)
