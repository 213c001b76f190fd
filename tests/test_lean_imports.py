"""Imports run one way, by one list; and the device wing stays free of what a Jetson does not have."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = {
    "resvit_export": ROOT / "export",
    "resvit_quantize": ROOT / "quantize",
    "resvit_calibrate": ROOT / "calibrate",
    "resvit_engines": ROOT / "engines",
}
ORDER = {
    "resvit_export": (
        "__main__", "cli", "fleet", "sweep", "serve", "tools", "api", "tune", "settle", "report", "report.sections",
        "report.layout", "pipeline", "variant", "refusals", "stages", "stages.decide", "run", "run_folder", "stage",
        "records", "golden_choice", "task_choice", "to_tensorrt", "recipe", "to_onnx", "loading", "models.training",
        "models",
    ),
    "resvit_quantize": (
        "quantize", "check", "rounding", "recovery", "sensitivity", "search", "pruning.distill", "pruning.sparsity",
        "pruning.choose", "pruning.find", "pruning", "training", "modelopt", "torch_graph", "qdq", "equalize", "fusion",
        "placement", "graph", "fold", "settings",
    ),
    "resvit_calibrate": (
        "tasks", "data", "ranges", "answers", "readers", "observe", "gate", "images", "runtime",
    ),
    "resvit_engines": (
        "__main__", "cli", "program", "remote", "bench", "run", "registry", "install", "bundle", "builder", "ort",
        "trt", "plugins",
        "kernels.compile", "kernels.measure", "kernels.triton", "kernels", "keys", "audit", "targets", "machine",
        "records", "names", "console", "files", "process", "progress", "gpu", "rows", "version",
        "terminal", "pictures", "answers", "outside", "errors",
    ),
}  # fmt: skip
"""Rooms and modules of each wing, from roof to ground: each imports only what stands below it."""
GROUND = {
    f"resvit_engines.{name}"
    for name in ("answers", "errors", "files", "outside", "pictures", "progress", "records", "rows")
}
BETWEEN = {
    "resvit_export": {"resvit_quantize", "resvit_calibrate", "resvit_engines"},
    "resvit_quantize": {
        "resvit_calibrate", *GROUND, "resvit_engines.targets", "resvit_engines.kernels", "resvit_engines.plugins.names",
    },
    "resvit_calibrate": GROUND,
    "resvit_engines": set(),
}  # fmt: skip
"""What a wing takes of the others."""
INSIDE_KERNELS = {f"resvit_engines.kernels.{name}" for name in ("compile", "measure", "triton")}
NOT_ON_A_JETSON = {"torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "modelopt", "PIL"}
NOT_ON_A_JETSON.add("triton")
ABOUT_TORCH = ("torch_graph", "fold", "pruning", "recovery", "rounding", "sensitivity", "training")
"""Rooms that are about torch graphs and tensors; others import them where they use them."""
FILES = [
    pytest.param(wing, file, id=str(file.relative_to(folder)))
    for wing, folder in WINGS.items()
    for file in sorted((folder / wing).rglob("*.py"))
]


def name_of(wing: str, file: Path) -> str:
    """The module's name within its wing; a package by its own name."""
    return ".".join(file.relative_to(WINGS[wing] / wing).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


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


def room_of(wing: str, name: str) -> str | None:
    """The room of ``ORDER`` that a name within a wing is in: the most particular one; None for the wing itself."""
    return max((room for room in ORDER[wing] if is_in(name, {room})), key=len, default=None)


def test_there_are_files_to_check() -> None:
    assert len(FILES) > 300
    assert {param.values[0] for param in FILES} == set(WINGS)


@pytest.mark.parametrize("wing", WINGS)
def test_every_module_has_its_place_in_the_order(wing: str) -> None:
    files = [param.values[1] for param in FILES if param.values[0] == wing]
    names = [name_of(wing, file) for file in files if name_of(wing, file) != "__init__"]
    assert [name for name in names if room_of(wing, name) is None] == []
    assert [room for room in ORDER[wing] if not any(is_in(name, {room}) for name in names)] == []


@pytest.mark.parametrize("wing", WINGS)
def test_imports_run_one_way(wing: str) -> None:
    wrong: list[str] = []
    for file in (param.values[1] for param in FILES if param.values[0] == wing):
        here = name_of(wing, file)
        for node, name in imports_of(tree_of(file)):
            other, _, inside = name.partition(".")
            if other not in WINGS:
                continue
            if other != wing:
                allowed = is_in(name, BETWEEN[wing]) and not (wing == "resvit_quantize" and is_in(name, INSIDE_KERNELS))
            elif here in ("__init__", ""):
                allowed = True  # what the package hands on
            else:
                mine, theirs = room_of(wing, here), room_of(wing, inside)
                assert mine, here
                allowed = theirs is not None and ORDER[wing].index(mine) <= ORDER[wing].index(theirs)
            if not allowed:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} may not import {name}")
    assert wrong == []


def test_no_import_goes_in_a_circle() -> None:
    modules = {f"{wing}.{name_of(wing, file)}": (wing, file) for wing, file in (p.values for p in FILES)}
    reads: dict[str, set[str]] = {}
    for module, (_, file) in modules.items():
        names = {name for _, name in imports_of(tree_of(file))}
        reads[module] = {
            other for name in names for other in (name, name.rpartition(".")[0]) if other in modules and other != module
        }
    finished: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in finished:
            for other in sorted(reads[module]):
                walk(other, (*path, module))
            finished.add(module)

    for module in modules:
        walk(module, ())


def _hands_on_load(node: ast.stmt) -> bool:
    """What hands on `load` without importing it: for type checkers at once, else when it is asked for."""
    if isinstance(node, ast.FunctionDef):
        return node.name == "__getattr__"
    return isinstance(node, ast.ImportFrom | ast.If)


def test_folders_stay_small_and_packages_hold_no_logic() -> None:
    folders: dict[Path, int] = {}
    for wing, file in (param.values for param in FILES):
        folders[file.parent] = folders.get(file.parent, 0) + 1
        if file.name == "__init__.py":
            body = tree_of(file).body
            kinds = (ast.Expr, ast.ImportFrom) if wing == "resvit_export" else (ast.Expr,)
            names = [
                node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            ]
            if file == WINGS["resvit_engines"] / "resvit_engines" / "__init__.py":
                body = [node for node in body if not _hands_on_load(node)]
            assert all(isinstance(node, kinds) or node in names for node in body), file
    assert {str(folder): count for folder, count in folders.items() if count > 15} == {}


@pytest.mark.whole
@pytest.mark.parametrize("wing", WINGS)
def test_every_file_reads_on_python_3_10(wing: str) -> None:
    for file in (param.values[1] for param in FILES if param.values[0] == wing):
        ast.parse(file.read_text(), filename=str(file), feature_version=(3, 10))


def test_the_device_wing_imports_nothing_that_a_jetson_lacks() -> None:
    wrong = []
    for file in (param.values[1] for param in FILES if param.values[0] == "resvit_engines"):
        tree = tree_of(file)
        first = at_module_level(tree)
        written_in_triton = file.parent.name == "triton"
        for node, name in imports_of(tree):
            # Kernels are compiled where Triton is: it is imported there, when a kernel is.
            compiles = file.parent.name == "compile" and node not in first
            # Pictures are decoded by Pillow where it is installed, and nothing else needs it.
            decodes = file.parent.name == "pictures" and node not in first and is_in(name, {"PIL"})
            kernel = is_in(name, {"triton"}) and (written_in_triton or compiles)
            if is_in(name, NOT_ON_A_JETSON) and not (kernel or decodes):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} imports {name}")
            if is_in(name, {"resvit_engines.kernels.triton"}) and not written_in_triton:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("wing", ["resvit_calibrate", "resvit_quantize"])
def test_torch_waits_until_it_is_needed(wing: str) -> None:
    late = {"torch", "timm", "torchvision", *(f"resvit_quantize.{room}" for room in ("torch_graph", "fold"))}
    wrong = []
    for file in (param.values[1] for param in FILES if param.values[0] == wing):
        if wing == "resvit_quantize" and is_in(name_of(wing, file), set(ABOUT_TORCH)):
            continue
        tree = tree_of(file)
        first = at_module_level(tree)
        wrong += [
            f"{file.relative_to(ROOT)}:{node.lineno} imports {name}"
            for node, name in imports_of(tree)
            if node in first and is_in(name, late)
        ]
    assert wrong == []


def loaded_by(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() + done.stderr


def test_importing_the_device_wing_loads_none_of_it() -> None:
    files = [file for file in sorted((ROOT / "engines/resvit_engines").rglob("*.py")) if file.parent.name != "triton"]
    modules = [".".join(file.relative_to(ROOT / "engines").with_suffix("").parts) for file in files]
    modules = [name for name in modules if not name.endswith(("__main__", "__init__"))]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted({NOT_ON_A_JETSON | {'tensorrt', 'tensorrt_rtx_bindings'}!r} & set(sys.modules)))"
    )
    assert loaded_by(code) == "[]"


def test_the_package_and_its_help_load_no_torch() -> None:
    code = "import sys, resvit_export, resvit_export.cli.main\n"
    code += f"print(sorted({NOT_ON_A_JETSON!r} & set(sys.modules)))"
    assert loaded_by(code) == "[]"
