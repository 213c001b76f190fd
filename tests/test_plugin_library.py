"""The C++ plugin library, compiled and driven as TensorRT drives it, over a driver that only says what it is asked.

With declarations of our own (tests/plugin_library/headers) everywhere; with NVIDIA's headers of every version that is
found below data/tensorrt-include, or in the folder that TENSORRT_INCLUDE names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import ROOT
from plugin_kernels import kernel_for
from resvit_engines.kernels.launch import Kernel
from resvit_engines.plugins.fields import DATA_TYPES, LISTS, NAMES, TEXTS, fields_from_kernel
from resvit_engines.plugins.names import NAMESPACE, OP_TYPES, VERSION

pytestmark = pytest.mark.whole  # Compiles the library first.

SOURCE = ROOT / "engines/plugin/resvit_plugins.cpp"
OURS = ROOT / "tests/plugin_library"
SHAPE = (2, 197, 384)


def header_sets() -> dict[str, tuple[Path, ...]]:
    cuda = [folder for folder in (Path("/usr/local/cuda/include"),) if (folder / "cuda.h").is_file()]
    named = os.environ.get("TENSORRT_INCLUDE")
    folders = [*sorted((ROOT / "data/tensorrt-include").glob("*/")), *([Path(named)] if named else [])]
    real = {folder.name: (folder, *cuda) for folder in folders if cuda and (folder / "NvInfer.h").is_file()}
    return {"ours": (OURS / "headers",), **real}


HEADERS = header_sets()


class Built(NamedTuple):
    library: Path
    harness: Path
    driver: Path


def compile_cpp(source: Path, output: Path, includes: tuple[Path, ...], *more: str) -> None:
    flags = [word for folder in includes for word in ("-isystem", str(folder))]
    strict = ["-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(
        ["g++", "-std=c++17", *strict, *flags, str(source), "-o", str(output), *more, "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=sorted(HEADERS))
def built(request, tmp_path_factory) -> Built:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("plugin")
    found = Built(folder / "libresvit_plugins.so", folder / "harness", folder / "libcuda.so.1")
    includes = HEADERS[request.param]
    compile_cpp(SOURCE, found.library, includes, "-shared", "-fPIC", "-fvisibility=hidden")
    # NVIDIA's destructors are not virtual where the plugin's caller never deletes; ours is a test.
    compile_cpp(OURS / "harness.cpp", found.harness, includes)
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c", OURS / "driver.c", "-o", found.driver], check=True)
    return found


class Answer(NamedTuple):
    code: int
    lines: list[str]

    def of(self, kind: str) -> list[str]:
        return [line.partition(" ")[2] for line in self.lines if line.startswith(f"{kind} ")]


def drive(built: Built, op_type: str, fields: dict[str, object], *, shape=SHAPE, types=None, **environment) -> Answer:
    lines = [f"op {op_type}"]
    for name, value in fields.items():
        kind = "text" if isinstance(value, str) else "list"
        lines.append(f"{kind} {name} {value.encode().hex() if kind == 'text' else ' '.join(map(str, value))}")
    for number in types or fields["kernel_inputs"]:
        lines.append(f"tensor {number} {' '.join(map(str, shape))}")
    done = subprocess.run(
        [built.harness, built.library],
        input="\n".join(lines),
        env={"LD_LIBRARY_PATH": str(built.driver.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return Answer(done.returncode, done.stdout.splitlines())


def kinds(kernel: Kernel) -> str:
    launch = kernel.launch
    return "p" * len(launch.inputs) + "i" * len(launch.scalars) + "p" * len(launch.outputs)


@pytest.mark.whole
def test_every_op_type_has_a_creator(built) -> None:
    answer = drive(built, "ResvitAttentionBias", fields_from_kernel(kernel_for("ResvitAttentionBias")))
    assert sorted(answer.of("creator")) == sorted(f"{name} {VERSION} {NAMESPACE}" for name in OP_TYPES)
    assert answer.of("declared") == list(NAMES)


def test_the_source_lists_the_op_types_in_their_order() -> None:
    listed = re.search(r"kOP_TYPES\{(.*?)\}", SOURCE.read_text(), flags=re.DOTALL)
    assert listed is not None
    assert re.findall(r'"(\w+)"', listed[1]) == list(OP_TYPES)
    assert len(SOURCE.read_text().splitlines()) < 500


@pytest.mark.whole
@pytest.mark.parametrize("op_type", ["ResvitAttentionSplitBiasQ", "ResvitBridgeW8NormQ", "ResvitAttentionBias"])
def test_it_launches_the_kernel_as_it_was_described(built, op_type) -> None:
    kernel = kernel_for(op_type)
    launch, shapes = kernel.launch, [SHAPE] * len(kernel.launch.inputs)
    answer = drive(built, op_type, fields_from_kernel(kernel), ARGUMENTS=kinds(kernel))
    assert (answer.code, answer.lines[-1]) == (0, "done")
    assert answer.of("plugin") == [f"{op_type} {VERSION} {NAMESPACE}"]
    assert answer.of("output") == [
        " ".join(map(str, [DATA_TYPES[result.dtype], *(size.at(shapes) for size in result.shape)]))
        for result in launch.outputs
    ]
    tensors = len(launch.inputs) + len(launch.outputs)
    assert answer.of("format") == [f"{at} 100" for at in range(tensors)]
    grid = ",".join(str(size.at(shapes)) for size in launch.grid)
    arguments = [
        *(hex(0x1000 + index) for index in range(len(launch.inputs))),
        *(str(scalar.at(shapes)) for scalar in launch.scalars),
        *(hex(0x2000 + index) for index in range(len(launch.outputs))),
    ]
    run = f"cuLaunchKernel {grid} 128,1,1 4096 0x77 {' '.join(arguments)}"
    # Loaded once, launched twice, unloaded in the context that it was loaded into.
    assert answer.of("cuda") == [
        "cuCtxGetCurrent",
        f"cuModuleLoadData {len(kernel.ptx)}",
        f"cuModuleGetFunction {kernel.entry}",
        run,
        run,
        "cuCtxPushCurrent",
        "cuModuleUnload",
        "cuCtxPopCurrent",
    ]
    assert answer.of("log") == []


def test_much_shared_memory_is_asked_for(built) -> None:
    fields = fields_from_kernel(kernel_for("ResvitAttentionBias"))
    plain = drive(built, "ResvitAttentionBias", {**fields, "kernel_block": [128, 49152]})
    assert not any("Attribute" in line for line in plain.of("cuda"))
    much = drive(built, "ResvitAttentionBias", {**fields, "kernel_block": [128, 99328]})
    assert "cuFuncSetAttribute 8 99328" in much.of("cuda")
    assert any(re.match(r"cuLaunchKernel \S+ 128,1,1 99328 ", line) for line in much.of("cuda"))


def test_an_empty_batch_launches_nothing(built) -> None:
    answer = drive(
        built, "ResvitAttentionBias", fields_from_kernel(kernel_for("ResvitAttentionBias")), shape=(0, 197, 384)
    )
    assert answer.code == 0
    assert not any("Launch" in line for line in answer.of("cuda"))


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("cuCtxGetCurrent", 7, "cuCtxGetCurrent"),
        ("cuModuleLoadData", 7, "loading the kernel resvitattentionbias_kernel"),
        ("cuModuleGetFunction", 7, "finding the kernel"),
        ("cuFuncSetAttribute", 7, "99328 bytes of shared memory"),
        ("cuLaunchKernel", 8, "launching the kernel"),
        ("cuModuleUnload", 0, "cuModuleUnload"),
    ],
)
def test_every_call_to_the_driver_is_checked(built, function, code, words) -> None:
    fields = {**fields_from_kernel(kernel_for("ResvitAttentionBias")), "kernel_block": [128, 99328]}
    answer = drive(built, "ResvitAttentionBias", fields, FAIL=function)
    assert answer.code == code
    assert answer.of("log")
    for line in answer.of("log"):
        assert words in line
        assert line.endswith("failed: out of memory (2)")
    if function in ("cuModuleGetFunction", "cuFuncSetAttribute"):
        assert "cuModuleUnload" in answer.of("cuda")


def test_without_a_driver_it_says_so(built, tmp_path) -> None:
    alone = built._replace(driver=tmp_path / "none")
    answer = drive(alone, "ResvitAttentionBias", fields_from_kernel(kernel_for("ResvitAttentionBias")))
    if "cuda" in "".join(answer.of("log")):
        assert answer.code == 7
        assert "the NVIDIA driver does not load" in answer.of("log")[0]
    else:
        pytest.skip("there is a driver here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel_entry": None}, "no attribute kernel_entry"),
        ({"kernel_grid": None}, "no attribute kernel_grid"),
        ({"kernel_grid": "text"}, "kernel_grid has another type"),
        ({"kernel_grid": [1, 0, 1, 0]}, "kernel_grid is malformed"),
        ({"kernel_grid": [1, 0, 1, 0, 1, 0, 1]}, "kernel_grid is malformed"),
        ({"kernel_grid": [1, 1, 4, 0, 1, 1, 0, 1, 0]}, "kernel_grid is malformed"),
        ({"kernel_grid": [1, 1, 0, 8, 1, 1, 0, 1, 0]}, "kernel_grid is malformed"),
        ({"kernel_grid": [1, 1, 0, 0, 0, 1, 0, 1, 0]}, "kernel_grid is malformed"),
        ({"kernel_scalars": [-1]}, "kernel_scalars is malformed"),
        ({"kernel_scalars": [2, 1, 0]}, "kernel_scalars is malformed"),
        ({"kernel_block": [0, 0]}, "malformed"),
        ({"kernel_outputs": [1, 9, 1, 0]}, "kernel_outputs is malformed"),
    ],
)
def test_malformed_attributes_make_no_plugin(built, changes, words) -> None:
    fields = {**fields_from_kernel(kernel_for("ResvitAttentionBias")), **changes}
    answer = drive(built, "ResvitAttentionBias", {k: v for k, v in fields.items() if v is not None}, types=[1, 1])
    assert answer.code == 1
    assert words in answer.of("log")[0]
    assert answer.of("log")[0].startswith("node: ")


@pytest.mark.parametrize(
    ("shape", "types", "code", "words"),
    [
        (SHAPE, [1, 0], 2, "input 1 has another type"),
        (SHAPE, [1, 1, 1], 2, "another number of inputs"),
        ((2, 197), [1, 1], 3, "fewer dimensions"),
        ((30000, 197, 384), [1, 1], 8, "90000 is more than a launch takes"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(built, shape, types, code, words) -> None:
    fields = fields_from_kernel(kernel_for("ResvitAttentionBias"))
    answer = drive(built, "ResvitAttentionBias", fields, shape=shape, types=types)
    assert answer.code == code
    assert words in answer.of("log")[0]
    assert answer.of("log")[0].startswith("ResvitAttentionBias: ")


def test_the_names_of_the_attributes_are_those_of_the_python_side() -> None:
    text = SOURCE.read_text()
    for array, names in (("kTEXTS", TEXTS), ("kLISTS", LISTS)):
        assert re.search(rf"{array}\{{(.*?)\}}", text)[1] == ", ".join(f'"{name}"' for name in names)
