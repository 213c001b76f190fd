"""Networks and files as they should not be: each goes through, or is refused in a sentence that says what to change."""

from __future__ import annotations

import functools
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.cli.main import run
from resvit_export.loading.load import Network, load_network, network_from_module
from resvit_export.loading.program.facts import output_names
from resvit_export.loading.spec import ModelSpec
from resvit_export.to_onnx import onnx_file, own_onnx
from resvit_export.to_onnx.own_onnx import import_onnx
from resvit_export.to_onnx.report import write_model
from resvit_quantize.graph.external import write_onnx

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A convolution and ten classes; ``behind`` sees module, image and classes, and returns what the network does."""

    def __init__(self, behind: Callable[[Net, torch.Tensor, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.behind = behind

    def forward(self, images: torch.Tensor) -> Any:
        classes = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        return classes if self.behind is None else self.behind(self, images, classes)


class Labels(Net):
    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Any:
        return nn.functional.cross_entropy(super().forward(images), labels)


class Targets(Net):
    def forward(self, images: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        if targets is None:
            raise ValueError("targets should not be None")
        return super().forward(images)


class Keyword(Net):
    def forward(self, images: torch.Tensor, *, mode: str) -> Any:
        return super().forward(images) if mode else None


class NoMode(Net):
    def train(self, mode: bool = True) -> nn.Module:
        raise RuntimeError("this network knows no modes")


class Property(Net):
    @property
    def preprocess(self) -> Any:
        raise KeyError("mean")


class Halves(Net):
    def forward(self, images: torch.Tensor) -> Any:
        return super().forward(images.half()).float()


class Casting(Net):
    def forward(self, images: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(images)


class Writing(Net):
    def forward(self, images: torch.Tensor) -> Any:
        return super().forward(images.mul_(2))


class Ends(Net):
    def forward(self, images: torch.Tensor) -> Any:
        raise SystemExit(0)


def loaded(module: nn.Module) -> Network:
    return network_from_module(module, ModelSpec("object:Net", input_shape=SHAPE))


def doubled(module: Net, images: torch.Tensor, classes: torch.Tensor) -> Any:
    del images
    return {"logits": classes, "second": classes * 2} if module.training else classes


@pytest.mark.whole
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("behind", [None, doubled])
def test_the_mode_that_a_network_comes_in_and_what_it_answers_in_training_do_not_matter(
    mode: bool, behind: Callable[..., Any] | None
) -> None:
    network = loaded(Net(behind).train(mode))
    assert output_names(network.program) == ["logits"]
    assert network.record().dynamic_batch
    assert network.digest == loaded(Net().eval()).digest


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    network = loaded(Net().to(dtype))
    assert {t.dtype for t in network.program.state_dict.values() if t.is_floating_point()} == {torch.float32}
    assert str(dtype).removeprefix("torch.") in network.notes[0]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Labels(), "needs images, labels.*labels is.*such as labels, is no input of an engine"),
        (Targets(), r"test_bad_input.py, line \d+: raise ValueError.*targets should not be None"),
        (Keyword(), "nothing says what mode is"),
        (NoMode(), r"fails while it is loaded \(test_bad_input.py, line \d+.*knows no modes"),
        (Property(), r"fails while it is loaded \(test_bad_input.py, line \d+.*mean"),
        (Ends(), r"ends the process while it is loaded \(test_bad_input.py, line \d+"),
        (Net(lambda net, images, classes: classes.mean()), "no tensor with an entry for each image"),
        (Net(lambda net, images, classes: {}), "no tensor with an entry for each image"),
        (Net(lambda net, images, classes: classes * 0), "answers every image alike"),
        (Net(lambda net, images, classes: net.head.bias.expand(len(images), 10) + 0), "answers every image alike"),
        (Net(lambda net, images, classes: (classes, net.conv.weight)), r"is \[8, 3, 3, 3\] whatever the batch"),
        (Net(lambda net, images, classes: (classes, net.head.bias + 1)), r"is \[10\] whatever the batch"),
        (Net(lambda net, images, classes: classes[:, :0]), "holds no number"),
        (Halves().half(), r"test_bad_input.py, line \d+.*Its weights became float32"),
        (Casting(), r"computes aten.* in bfloat16 \(test_bad_input.py, line \d+"),
        (Writing(), "writes into its own image"),
        (Net(lambda net, images, classes: classes.to_sparse()), r"sparse_coo tensors \(test_bad_input.py, line"),
        (Net().to("meta"), "weights without values: conv.weight is on the device .meta"),
        (Net(lambda net, images, classes: classes + torch.zeros(1, device="meta")), "meta"),
    ],
)
def test_what_cannot_be_loaded_is_the_networks_fault_and_said_so(module: nn.Module, words: str) -> None:
    with pytest.raises(ResvitError, match=f"(?s){words}") as caught:
        loaded(module)
    assert caught.value.code is ExitCode.INPUT


def test_a_size_in_the_order_of_other_frameworks_is_told_from_an_image() -> None:
    with pytest.raises(ResvitError, match="height, width and channels") as caught:
        network_from_module(Net(), ModelSpec("object:Net", input_shape=(8, 9, 3)))
    assert "--input-shape 3,8,9" in caught.value.fix


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise SystemExit(2)", r"ends the process \(exit 2\) when it is imported"),
        ("def make():\n    raise SystemExit(2)", r"ends the process while it is loaded \(net.py, line 2"),
        ("class make:\n    pass", "not a torch.nn.Module"),
    ],
)
def test_a_file_that_ends_the_process_is_said_to(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(textwrap.dedent(line))
    with pytest.raises(ResvitError, match=words) as caught:
        load_network(ModelSpec(f"{tmp_path}/net.py:make", input_shape=SHAPE))
    assert caught.value.code is ExitCode.INPUT


def graph(
    image: str = "image",
    inner: tuple[str, str, str] = ("a", "b", "c"),
    output: str = "y",
    nodes: tuple[str, str, str, str] = ("", "", "", ""),
    weights: tuple[str, str] = ("w", "f"),
) -> onnx.ModelProto:
    """A convolution [N, 3, 8, 8] and a product to ten classes, under these names."""
    random = np.random.default_rng(0)
    arrays = [(random.standard_normal(shape) / 4).astype(np.float32) for shape in ((8, 3, 3, 3), (8, 10))]
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Conv", [image, weights[0]], [inner[0]], name=nodes[0]),
                helper.make_node("GlobalAveragePool", [inner[0]], [inner[1]], name=nodes[1]),
                helper.make_node("Flatten", [inner[1]], [inner[2]], name=nodes[2]),
                helper.make_node("MatMul", [inner[2], weights[1]], [output], name=nodes[3]),
            ],
            "g",
            [helper.make_tensor_value_info(image, TensorProto.FLOAT, ["N", *SHAPE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", 10])],
            [numpy_helper.from_array(array, name) for array, name in zip(arrays, weights, strict=True)],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def imported(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model in our form, which answers as the original does: ``import_onnx`` compares them."""
    (folder / "theirs.onnx").write_bytes(model.SerializeToString())
    import_onnx(folder / "theirs.onnx", folder / "ours.onnx")
    return onnx.load(folder / "ours.onnx")


ODD = [
    "input",
    "input_",
    "logits",
    "logits_",
    "output",
    "batch",
    "a b",
    "a/b",
    "/",
    "../../etc",
    "'\"",
    "größe",
    "日本",
]
NAMES = st.lists(st.sampled_from(ODD) | st.text(min_size=1, max_size=6), min_size=7, max_size=7, unique=True)
NODES = st.tuples(*[st.sampled_from(["", "n", *ODD])] * 4)


@pytest.mark.whole
@settings(max_examples=12)
@given(NAMES, NODES)
def test_any_names_go_through(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], nodes: tuple[str, str, str, str]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    image, a, b, c, output, w, f = names
    ours = imported(graph(image, (a, b, c), output, nodes, (w, f)), folder)
    assert [value.name for value in ours.graph.input] == ["input"]
    assert [value.name for value in ours.graph.output] == ["logits"]
    taken = [node.name for node in ours.graph.node]
    assert all(taken)
    assert len(set(taken)) == len(taken)
    assert all(name.isprintable() for name in taken)
    onnx.checker.check_model(ours, full_check=True)


def changed(*nodes: onnx.NodeProto, output: str = "", shape: Sequence[int | str] = ()) -> onnx.ModelProto:
    """The graph with ``nodes`` behind it; ``output`` then is its only one, empty for none at all."""
    model = graph()
    model.graph.node.extend(nodes)
    del model.graph.output[:]
    if output:
        model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, shape))
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (changed(), "it has no output"),
        (changed(helper.make_node("Identity", ["f"], ["z"]), output="z", shape=[8, 10]), "one entry for each image"),
        (changed(helper.make_node("ReduceSum", ["y"], ["z"], keepdims=0), output="z"), "a single number"),
        (changed(helper.make_node("Sub", ["y", "y"], ["z"]), output="z", shape=["N", 10]), "answers every image alike"),
    ],
)
def test_a_file_whose_outputs_are_no_answers_is_told_so(model: onnx.ModelProto, words: str, tmp_path: Path) -> None:
    with pytest.raises(ResvitError, match=words) as caught:
        imported(model, tmp_path)
    assert caught.value.code is ExitCode.INPUT


@pytest.mark.whole
def test_weights_beside_their_graph_go_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those above 2 GiB do: here above 64 bytes. What ships is one file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_onnx, "write_model", functools.partial(write_model, external_above=64))
    random = np.random.default_rng(0)
    Path("theirs.onnx").write_bytes(graph().SerializeToString())
    np.savez("data.npz", images=random.integers(0, 255, (40, 8, 8, 3)).astype(np.uint8), labels=np.arange(40) % 10)
    normal = ["--preprocess", "mean=0.5", "--preprocess", "std=0.5", "--data", "data.npz", "--task", "other"]
    common = ["--model", "theirs.onnx", "--target", "jetson-orin", *normal, "--run", "r", "--quiet"]
    assert run(["build", "--include", "*", "--allow-rejected", "--even-if-slower", *common]) == 0
    assert next(Path("r").glob("export-*/model.onnx.data")).stat().st_size > 1000
    shipped = next(Path("r").glob("quantize-*/model.onnx"))
    (tmp_path / "alone").mkdir()
    alone = Path(shutil.copy(shipped, tmp_path / "alone"))
    assert onnx_runner(alone)({"input": np.zeros((2, *SHAPE), np.float32)})["logits"].shape == (2, 10)
    assert next(Path("r").glob("bundle-*/*.resvit")).stat().st_size > shipped.stat().st_size / 4
    assert run(["sensitivity", "--method", "brute-force", *common]) == 0


def test_other_weights_beside_their_graph_are_another_model(tmp_path: Path) -> None:
    """A stage is known by the bytes of the model that it reads."""
    model = ir.serde.deserialize_model(graph())
    written = []
    for factor in (1.0, 2.0):
        weight = model.graph.initializers["w"]
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name="w")
        write_onnx(model, tmp_path / "model.onnx", external_above=64)
        written.append((tmp_path / "model.onnx").read_bytes())
    assert written[0] != written[1]


def test_the_weights_of_a_large_file_never_stand_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX's own functions are given is small: they take models as one message, which ends at 2 GiB."""
    old = onnx.version_converter.convert_version(graph(), 18)
    seen = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: Any, *rest: Any, **named: Any) -> Any:
            if isinstance(model, onnx.ModelProto):
                seen.append(model.ByteSize())
            return function(model, *rest, **named)

        return call

    monkeypatch.setattr(onnx_file, "_LARGE", 64)
    for place, name in (
        (onnx.checker, "check_model"),
        (onnx.version_converter, "convert_version"),
        (onnx.inliner, "inline_local_functions"),
    ):
        monkeypatch.setattr(place, name, noted(getattr(place, name)))
    ours = imported(old, tmp_path)
    assert len(seen) >= 2
    assert max(seen) < 800 < sum(len(tensor.raw_data) for tensor in ours.graph.initializer)
    images = np.random.default_rng(1).standard_normal((2, *SHAPE)).astype(np.float32)
    answers = [onnx_runner(tmp_path / f"{whose}.onnx")({name: images}) for whose, name in
               (("theirs", "image"), ("ours", "input"))]  # fmt: skip
    np.testing.assert_allclose(*(next(iter(answer.values())) for answer in answers), atol=1e-5)
