"""Imports run one way, and the device wing stays free of what a Jetson does not have."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = {
    "resvit_engines": ROOT / "engines",
    "resvit_calibrate": ROOT / "calibrate",
    "resvit_quantize": ROOT / "quantize",
    "resvit_export": ROOT / "export",
}
ALLOWED = {
    "resvit_engines": set(),
    "resvit_calibrate": set(),
    "resvit_quantize": {"resvit_calibrate"},
    "resvit_export": {"resvit_calibrate", "resvit_quantize", "resvit_engines"},
}
SHARED = {f"resvit_engines.{name}" for name in ("errors", "files", "measured", "progress", "costs", "rows", "targets")}
# What a node of ours computes, and what it is called, is said once.
SHARED |= {"resvit_engines.kernels", "resvit_engines.plugins"}
NOT_ON_A_JETSON = {"torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "modelopt", "PIL"}
NOT_ON_A_JETSON.add("triton")
COMPILES_KERNELS = "compile.py"
"""The one module that imports Triton, and the kernels written in it, where it uses them."""
TORCH_MODULES = {
    *("best", "compensate", "fake_quant", "layer_rows"),
    # Of the pruning of modules:
    *("apply", "attention_heads", "dependencies", "discover", "exactness", "residual_blocks", "slices", "structure"),
}
FILES = [
    pytest.param(wing, file, id=str(file.relative_to(folder)))
    for wing, folder in WINGS.items()
    for file in sorted((folder / wing).rglob("*.py"))
]


def imports_of(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every absolute import with the full name of what is imported, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def at_module_level(tree: ast.Module) -> set[ast.AST]:
    """The nodes that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    found: set[ast.AST] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        found.add(node)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not guarded and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def is_in(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def computes_with_torch(file: Path) -> bool:
    """Modules that are about torch graphs and tensors."""
    return file.stem.startswith(("fold", "torch_")) or file.stem in TORCH_MODULES


def test_there_are_files_to_check() -> None:
    assert len(FILES) > 10
    assert {param.values[0] for param in FILES} == set(WINGS)


@pytest.mark.parametrize(("wing", "file"), FILES)
def test_imports_run_one_way(wing: str, file: Path) -> None:
    others = set(WINGS) - ALLOWED[wing] - {wing}
    for node, name in imports_of(ast.parse(file.read_text())):
        assert not is_in(name, others) or is_in(name, SHARED), f"line {node.lineno}: {wing} may not import {name}"


@pytest.mark.parametrize(("wing", "file"), FILES)
def test_every_file_reads_on_python_3_10(wing: str, file: Path) -> None:
    ast.parse(file.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize(("wing", "file"), [param for param in FILES if param.values[0] == "resvit_engines"])
def test_the_device_wing_imports_nothing_that_a_jetson_lacks(wing: str, file: Path) -> None:
    tree = ast.parse(file.read_text())
    first = at_module_level(tree)
    for node, name in imports_of(tree):
        kernel = is_in(name, {"triton"}) and (
            file.stem.endswith("_triton") or (file.name == COMPILES_KERNELS and node not in first)
        )
        assert kernel or not is_in(name, NOT_ON_A_JETSON), f"line {node.lineno} imports {name}"
        assert not name.partition("kernels.")[2].split(".")[0].endswith("_triton") or file.stem.endswith("_triton")


@pytest.mark.parametrize(
    ("wing", "file"), [param for param in FILES if param.values[0] in ("resvit_calibrate", "resvit_quantize")]
)
def test_torch_waits_until_it_is_needed(wing: str, file: Path) -> None:
    if wing == "resvit_quantize" and computes_with_torch(file):
        return  # the others import it where they use it
    late = {"torch", "timm", "torchvision"}
    late |= {
        f"resvit_quantize.{other.stem}"
        for other in (WINGS["resvit_quantize"]).rglob("*.py")
        if computes_with_torch(other)
    }
    tree = ast.parse(file.read_text())
    first = at_module_level(tree)
    for node, name in imports_of(tree):
        assert node not in first or not is_in(name, late), f"line {node.lineno}: {name}"
        assert not is_in(name, {"resvit_quantize.fold.program"}), f"line {node.lineno}: only resvit_export imports fold"


def test_importing_the_device_wing_loads_none_of_it() -> None:
    files = [
        file for file in sorted((ROOT / "engines/resvit_engines").rglob("*.py")) if not file.stem.endswith("_triton")
    ]
    modules = [".".join(file.relative_to(ROOT / "engines").with_suffix("").parts) for file in files]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted({NOT_ON_A_JETSON | {'tensorrt', 'tensorrt_rtx_bindings'}!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
