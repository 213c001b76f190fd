"""Every name of TensorRT that the code touches exists in every version that it claims, and none is touched unlisted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from resvit_engines.builder import builder as build
from resvit_engines.trt.names import NAMES, VERSIONS
from tensorrt_standin import BINDINGS, names_of, names_of_rtx

FOLDER = Path(build.__file__).parents[1]
WITHOUT_CALLS = {"__init__.py", "names.py", "io_tensor.py"}
SOURCES = tuple(path for path in sorted((FOLDER / "trt").glob("*.py")) if path.name not in WITHOUT_CALLS)

# What a variable of these names holds, in the modules that call TensorRT.
OWNERS = {
    "trt": "",
    "builder": "Builder",
    "cache": "ITimingCache",
    "desc": "plugin.TensorDesc",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "creator": "IPluginCreatorV3One",
    "dtype": "DataType",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "plugin": "plugin",
    "profile": "IOptimizationProfile",
    "refitter": "Refitter",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
    "settings": "ISerializationConfig",
    "severity": "ILogger.Severity",
    "size": "plugin.ShapeExpr",
    "tensor": "ITensor",
    "trouble": "ParserError",
    "weights": "OnnxParserRefitter",
}
OURS = {"log", "self", "watcher", "onnx", "importlib", "text", "dict", "ExitCode", "_DTYPES", "np"}
OURS |= {
    "sizes",
    "ctypes",
    "extent",
    "function",
    "inspect",
    "launch",
    "library",
    "node",
    "op",
    "os",
    "result",
    "stream",
    "term",
    "types",
}
OF_TEXT = {"strip", "rstrip", "join", "lower", "append", "name", "get", "items", "partition"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bindings")


def test_the_versions_are_those_that_are_compared() -> None:
    assert set(VERSIONS) == set(BINDINGS)


@pytest.mark.whole
@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_is_true_of_tensorrt(version, unpacked) -> None:
    real = names_of(version, unpacked)
    assert len(real) > 3000
    at = VERSIONS.index(version)
    there = {name: where.tensorrt and VERSIONS.index(where.since) <= at for name, where in NAMES.items()}
    assert [name for name, expected in there.items() if expected is not (name in real)] == []


@pytest.mark.whole
@pytest.mark.skipif(not build._installed("tensorrt_rtx_bindings"), reason="TensorRT for RTX is not installed")
def test_the_table_is_true_of_tensorrt_for_rtx() -> None:
    real = names_of_rtx()
    assert [name for name, where in NAMES.items() if where.rtx is not (name in real)] == []


@pytest.mark.whole
def test_the_versions_do_differ(unpacked) -> None:
    """Were all names in all versions, the comparison would show nothing."""
    old, new = names_of("10.3", unpacked), names_of("11.4", unpacked)
    assert "BuilderFlag.INT8" in old - new
    assert "INetworkDefinition.add_attention" in new - old


def names_in(source: str) -> Iterator[str]:
    """The names of TensorRT that a module touches; raises where a variable's kind is not known."""
    tree = ast.parse(source)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if ast.unparse(base).startswith("trt."):
                    owner = ast.unparse(base).removeprefix("trt.")
                    yield from (f"{owner}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef))
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        chain, root = [], node
        while isinstance(root, ast.Attribute):
            chain.insert(0, root.attr)
            root = root.value
        if isinstance(root, ast.Name) and root.id in OWNERS:
            owner = OWNERS[root.id]
            yield from (".".join([owner, *chain[: index + 1]]).lstrip(".") for index in range(len(chain)))
        elif not (isinstance(root, ast.Name) and root.id in OURS) and not set(chain) <= OF_TEXT:
            raise AssertionError(f"line {node.lineno}: what is {ast.unparse(node)}?")


def test_every_name_that_is_touched_is_in_the_table() -> None:
    assert {path.name for path in SOURCES} >= {"api.py", "engine.py"}
    for path in SOURCES:
        unlisted = {name for name in names_in(path.read_text()) if name not in NAMES}
        assert unlisted == set(), path.name


def test_the_table_holds_nothing_that_is_no_longer_touched() -> None:
    touched = {name for path in SOURCES for name in names_in(path.read_text())}
    assert set(NAMES) - touched == set()


def test_a_name_that_is_not_listed_is_noticed() -> None:
    source = "def f(trt, config, builder):\n    config.set_flag(trt.BuilderFlag.INT8)\n    builder.max_batch_size\n"
    assert set(names_in(source)) - set(NAMES) == {"BuilderFlag.INT8", "Builder.max_batch_size"}
    with pytest.raises(AssertionError, match=r"line 1: what is plugins\.add"):
        list(names_in("plugins.add()"))


@pytest.mark.whole
@pytest.mark.parametrize("path", [path for path in FOLDER.rglob("*.py") if path not in SOURCES], ids=lambda p: p.name)
def test_no_other_module_calls_tensorrt(path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trt":
            assert node.attr == "__version__", f"line {node.lineno}: trt.{node.attr}"
