"""Every kernel, compiled for every GPU with the PTX that its driver reads, and what came of it. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pairs import values_among
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.attention import AttentionConfig, attention_source
from resvit_engines.kernels.bridge import BridgeConfig, bridge_source
from resvit_engines.kernels.compile.compile import kernel_from_source
from resvit_engines.kernels.compile.ptx import OLDEST_PTX, entry_parameters, served_ptx_version, without_scratch
from resvit_engines.kernels.compile.resources import inspection, load_widths, mma_counts, require_fits
from resvit_engines.kernels.deformable import DeformableConfig, deformable_source
from resvit_engines.kernels.launch import LAUNCH_SHARED_BYTES, Extent, Kernel, Launch, Result, Source, dim
from resvit_engines.kernels.multiprocessors import MULTIPROCESSORS, resident_blocks
from resvit_engines.targets.table import FP8_SMS, TARGETS, find_target

pytest.importorskip("triton", reason="kernels are compiled with Triton, which is for Linux")

PTX_OF_SM = {80: "9.0", 86: "9.0", 103: "9.0"} | {target.sm: target.ptx for target in TARGETS if not target.on_cpu}
"""For GPUs that are in no target's row, what CUDA 13 reads, like their siblings'."""


class Case(NamedTuple):
    """``operands`` are the types that tensor cores must multiply; ``widths`` the bytes that loads may be wide.

    16 must be among them where ``widest`` says no less. 4 is for vectors in FP32 that are gathered element by element.
    """

    source: Callable[[int], Source]
    operands: tuple[str, ...] = ()
    widths: frozenset[int] = frozenset({16})
    widest: int = 16
    fp8: bool = False
    spills: int = 0


OPERANDS = {"fp16": "f16", "bf16": "bf16", "int8": "s8", "fp8": "e4m3"}


def bridge(dtype: str, *, norm: bool, batch: int) -> Case:
    config = BridgeConfig(1024, 14, 14, 768, dtype=dtype, norm=norm, out_dtype=dtype, batch=batch)
    # A channel of a 14 x 14 map is 196 elements: rows of it are aligned to four of them and no more.
    widths = frozenset({4, 16} if dtype in ("int8", "fp8") else {4, 8, 16})
    return Case(lambda sm: bridge_source(config, sm), (OPERANDS[dtype],), widths, fp8=dtype == "fp8")


def attention(dtype: str, size: int, *, shares: str | None = None, **more: Any) -> Case:
    scales = dict.fromkeys(("q_scale", "k_scale", "v_scale", "out_scale"), 0.03) if dtype in ("int8", "fp8") else {}
    shares = shares or dtype
    options = {"queries": 197, "keys": 197, "dtype": dtype, "out_dtype": dtype, "pv": shares, "value_size": size}
    config = AttentionConfig(head_size=size, scale=size**-0.5, **{"heads": 12, **options, **scales, **more})
    operands = tuple({OPERANDS[dtype], OPERANDS[shares]})
    # Values in 8 bits are read in halves of that where a product wants them transposed.
    widths = frozenset({16} if dtype in ("fp16", "bf16") else {8, 16})
    if config.layout == "channels":
        # A channel of a 14 x 14 map again, and of the bias a row; values in 8 bits lie as the product wants them.
        widths = frozenset({8} if dtype in ("fp16", "bf16") else {4, 8})
    elif config.bias is not None:
        # A row of the bias begins anywhere, and of the small tiles beside it a thread reads four elements.
        widths |= {4 if config.bias_dtype == "fp32" else 2, 8}
    return Case(lambda sm: attention_source(config, sm), operands, widths, max(widths), fp8=dtype == "fp8", spills=16)


def deformable(dtype: str, size: int, *, queries: int, points: tuple[int, ...] = (4, 4, 4)) -> Case:
    scales = dict.fromkeys(("value_scale", "out_scale"), 0.03) if dtype in ("int8", "fp8") else {}
    sides = (80, 40, 20)
    config = DeformableConfig(8, size, sides, sides, points, queries, dtype=dtype, out_dtype=dtype, **scales)
    # Values by 16 bytes; places and weights are single numbers of 4 and 2. No products of matrices.
    return Case(lambda sm: deformable_source(config, sm), (), frozenset({2, 4, 16}), fp8=dtype == "fp8")


BIAS = (False, True, True)
BOTNET = {"heads": 4, "queries": 196, "keys": 196, "area": (14, 14), "layout": "channels", "bias": BIAS}
LEVIT = {"heads": 4, "queries": 196, "keys": 196, "value_size": 32, "layout": "per_head", "bias": BIAS}
LEVIT_DOWN = {**LEVIT, "queries": 49, "value_size": 64, "layout": "q_kv"}

CASES: dict[tuple[str, str, str, str], Case] = {
    ("packed", "plain", "64", "fp16"): attention("fp16", 64),
    ("packed", "plain", "32", "bf16"): attention("bf16", 32),
    ("packed", "plain", "64", "int8"): attention("int8", 64),
    ("packed", "plain", "64", "int8-fp16"): attention("int8", 64, shares="fp16"),
    ("packed", "plain", "64", "fp8"): attention("fp8", 64),
    ("packed", "plain", "32", "fp8"): attention("fp8", 32),
    ("packed", "plain", "128", "fp16"): attention("fp16", 128),
    ("packed", "bias-fp32", "64", "fp16"): attention("fp16", 64, bias=BIAS, bias_dtype="fp32"),
    ("packed", "bias", "128", "fp16"): attention("fp16", 128, bias=BIAS),
    ("channels", "bias", "64", "fp16"): attention("fp16", 64, **BOTNET),
    ("channels", "bias", "128", "int8-fp16"): attention("int8", 128, shares="fp16", **BOTNET),
    ("split", "plain", "64", "bf16"): attention("bf16", 64, layout="split", keys=50),
    ("per-head", "bias", "16", "fp16"): attention("fp16", 16, **LEVIT),
    ("per-head", "bias", "16", "int8-fp16"): attention("int8", 16, shares="fp16", **LEVIT),
    ("q-kv", "bias", "16", "int8"): attention("int8", 16, **LEVIT_DOWN),
    ("q-kv", "bias", "16", "fp8-fp16"): attention("fp8", 16, shares="fp16", **LEVIT_DOWN),
    ("bridge", "plain", "batch-32", "fp16"): bridge("fp16", norm=False, batch=32),
    ("bridge", "plain", "batch-32", "bf16"): bridge("bf16", norm=False, batch=32),
    ("bridge", "plain", "batch-32", "int8"): bridge("int8", norm=False, batch=32),
    ("bridge", "norm", "batch-1", "int8"): bridge("int8", norm=True, batch=1),
    ("bridge", "norm", "batch-32", "int8"): bridge("int8", norm=True, batch=32),
    ("bridge", "norm", "batch-32", "fp8"): bridge("fp8", norm=True, batch=32),
    ("deformable", "decoder", "32", "fp16"): deformable("fp16", 32, queries=300),
    ("deformable", "encoder", "32", "fp16"): deformable("fp16", 32, queries=8400),
    ("deformable", "encoder", "64", "bf16"): deformable("bf16", 64, queries=8400),
    ("deformable", "decoder", "32", "int8"): deformable("int8", 32, queries=300, points=(3, 6, 3)),
    ("deformable", "encoder", "32", "fp8"): deformable("fp8", 32, queries=8400),
}
"""By attention's layout or the other kernel, what is added or follows, a head's size or the batch, and what is
multiplied or read."""


def families(sm: int, operand: str) -> set[str]:
    """The tensor-core instructions that a GPU may use for a type; tcgen05 has one kind for both 16-bit types."""
    served = {f"mma.sync {operand}"}
    if sm == 90:
        served.add(f"wgmma {operand}")
    if sm in (100, 103, 110) and operand != "s8":
        served.add(f"tcgen05 {operand.replace('bf16', 'f16')}")
    return served


@pytest.mark.parametrize("sm", PTX_OF_SM)
def test_every_gpu_of_the_table_has_its_ptx_and_limits(sm: int) -> None:
    assert sm in OLDEST_PTX
    assert sm in MULTIPROCESSORS


def test_every_gpu_asked_for_is_compiled_for() -> None:
    assert set(PTX_OF_SM) == {80, 86, 87, 89, 90, 100, 103, 110, 120, 121}
    assert PTX_OF_SM[87] == "8.5"


COMPILED = [(sm, *case) for sm in PTX_OF_SM for case in CASES]
QUICK = set(values_among(COMPILED))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("sm", "name"),
    [
        pytest.param(
            sm, tuple(name), marks=() if (sm, *name) in QUICK else pytest.mark.slow, id="-".join(map(str, (sm, *name)))
        )
        for sm, *name in COMPILED
    ],
)
def test_a_kernel_compiles_into_what_it_should(sm: int, name: tuple[str, str, str, str]) -> None:
    case = CASES[name]
    if case.fp8 and sm not in FP8_SMS:
        with pytest.raises(ResvitError) as refused:
            case.source(sm)
        assert refused.value.code is ExitCode.IMPOSSIBLE
        return
    kernel = kernel_from_source(case.source(sm), sm, PTX_OF_SM[sm])
    found = inspection(kernel)
    assert f".version {kernel.ptx_version}\n" in kernel.ptx
    assert re.search(rf"^\.target sm_{sm}a?$", kernel.ptx, re.MULTILINE)
    assert len(entry_parameters(kernel.ptx)[1]) == sum(
        map(len, (kernel.launch.inputs, kernel.launch.scalars, kernel.launch.outputs))
    )
    assert found.dynamic_shared_bytes == kernel.shared_bytes <= LAUNCH_SHARED_BYTES
    assert found.static_shared_bytes == 0
    assert found.spill_bytes <= case.spills
    assert found.blocks >= 1
    assert {case.widest} <= set(found.loads) <= case.widths, found.loads
    for operand in case.operands:
        assert families(sm, operand) & set(found.mma), found.mma
    allowed = set().union(*(families(sm, operand) for operand in case.operands))
    assert set(found.mma) <= allowed


def test_kernels_fit_the_targets_that_they_are_compiled_for(program: Callable[[str], Source]) -> None:
    kernel = kernel_from_source(program("plain"), 87, "9.2")
    assert kernel.ptx_version == "9.0"
    require_fits(kernel, find_target("jetson-orin@7.2"))
    with pytest.raises(ResvitError, match=r"PTX is version 9\.0 .* reads up to 8\.5") as error:
        require_fits(kernel, find_target("jetson-orin"))
    assert error.value.code is ExitCode.IMPOSSIBLE
    with pytest.raises(ResvitError, match=r"for SM 8\.7 and .* SM 9\.0"):
        require_fits(kernel, find_target("h100"))
    require_fits(replace(kernel, shared_bytes=49152), find_target("jetson-orin@7.2"))
    with pytest.raises(ResvitError, match="49153 bytes of shared memory"):
        require_fits(replace(kernel, shared_bytes=49153), find_target("jetson-orin@7.2"))


@pytest.mark.parametrize(
    ("sm", "newest", "served"),
    [(87, "8.5", "8.5"), (87, "9.2", "9.0"), (80, "7.0", "7.0"), (100, "8.6", "8.6"), (121, "10.1", "9.0")],
)
def test_ptx_is_as_new_as_driver_and_compiler_allow(sm: int, newest: str, served: str) -> None:
    assert served_ptx_version(sm, newest) == served


@pytest.mark.parametrize(("sm", "newest"), [(100, "8.5"), (110, "8.8"), (120, "8.6"), (121, "8.7"), (87, "7.3")])
def test_a_driver_too_old_for_its_gpu_is_refused(sm: int, newest: str) -> None:
    with pytest.raises(ResvitError, match="or newer, and the driver reads up to") as error:
        served_ptx_version(sm, newest)
    assert error.value.code is ExitCode.IMPOSSIBLE


def test_unknown_gpus_and_versions_are_refused() -> None:
    with pytest.raises(ResvitError, match=r"no kernels of ours for SM 7\.5"):
        served_ptx_version(75, "9.0")
    with pytest.raises(ResvitError, match="'9' is no PTX version"):
        served_ptx_version(87, "9")


PROGRAM = """
import triton
import triton.language as tl

@triton.jit
def plain(x, n, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

@triton.jit
def unknown(x, n, y, BLOCK: tl.constexpr):
    tl.store(y, tl.load(x).no_such_thing)

@triton.jit
def scratch(x, n, y, BLOCK: tl.constexpr):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    described = tl.make_tensor_descriptor(x, [n, n], [n, 1], [64, 64])
    tl.store(y + at, described.load([0, 0]))

@triton.jit
def vast(x, n, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.static_assert(BLOCK == 3, "a block of three is asked for")
"""

LAUNCH = Launch(("fp16",), (dim(0, 0),), (Result("fp16", (dim(0, 0),)),), (dim(0, 0, divisor=128), Extent(), Extent()))


def load_program(folder: Path) -> object:
    folder.mkdir()
    path = folder / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Source]:
    """Sources of functions in ``PROGRAM``."""
    monkeypatch.setitem(sys.modules, "resvit_engines.kernels.triton.program", load_program(tmp_path / "one"))
    arguments = (("x", "*fp16"), ("n", "i32"), ("y", "*fp16"))
    return lambda function: Source("program", function, arguments, {"BLOCK": 128}, 4, 1, LAUNCH)


def test_the_same_source_gives_the_same_bytes_anywhere(
    program: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kernel_from_source(program("plain"), 87, "8.5")
    monkeypatch.setitem(sys.modules, "resvit_engines.kernels.triton.program", load_program(tmp_path / "two"))
    monkeypatch.chdir(tmp_path)
    assert kernel_from_source(program("plain"), 87, "8.5") == first
    assert str(tmp_path) not in first.ptx
    assert "program.py" not in first.ptx
    assert not re.search(r"\.loc|\.file|\.section|//", first.ptx)


def test_names_tell_kernels_apart(program: Callable[[str], Source]) -> None:
    source = program("plain")
    kernels = [
        kernel_from_source(source, 87, "8.5"),
        kernel_from_source(source, 86, "8.5"),
        kernel_from_source(replace(source, constants={"BLOCK": 256}), 87, "8.5"),
    ]
    assert len({kernel.entry for kernel in kernels}) == 3
    for kernel in kernels:
        assert re.fullmatch(r"resvit_plain_[0-9a-f]{12}", kernel.entry)
        assert entry_parameters(kernel.ptx)[0] == kernel.entry


def test_compiling_leaves_settings_folders_and_streams_as_they_were(
    program: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from triton import knobs

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "cache"))
    before = (dict(os.environ), knobs.compilation.knobs, knobs.runtime.knobs)
    kernel_from_source(program("plain"), 87, "8.5")
    with pytest.raises(ResvitError):
        kernel_from_source(program("unknown"), 87, "8.5")
    assert (dict(os.environ), knobs.compilation.knobs, knobs.runtime.knobs) == before
    assert not list(home.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "reason"),
    [("unknown", "no_such_thing"), ("vast", "a block of three is asked for"), ("scratch", "scratch memory")],
)
def test_what_cannot_be_compiled_or_launched_is_refused_with_the_reason(
    function: str, reason: str, program: Callable[[str], Source], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResvitError, match=reason) as error:
        kernel_from_source(program(function), 90, "9.0")
    assert error.value.code is ExitCode.BUILD
    assert "\n" not in error.value.problem
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "changed",
    [
        {"arguments": (("n", "i32"), ("x", "*fp16"), ("y", "*fp16"))},
        {"constants": {}},
        {"constants": {"BLOCK": 128, "MORE": 1}},
        {"arguments": (("x", "*fp16"), ("y", "*fp16"))},
    ],
)
def test_a_source_that_does_not_fit_its_function_is_refused(
    changed: dict[str, object], program: Callable[[str], Source]
) -> None:
    with pytest.raises(ResvitError, match="does not compile") as error:
        kernel_from_source(replace(program("plain"), **changed), 87, "8.5")
    assert error.value.code is ExitCode.BUILD


def test_without_triton_the_fix_is_named(program: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch) -> None:
    source = program("plain")
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", None)
    with pytest.raises(ResvitError, match="does not load") as error:
        kernel_from_source(source, 87, "8.5")
    assert error.value.code is ExitCode.MISSING
    assert "pip install" in error.value.fix


@pytest.mark.whole
def test_an_interpreting_triton_is_told() -> None:
    program_ = """
from resvit_engines.errors import ResvitError
from resvit_engines.kernels.compile.compile import kernel_from_source
from resvit_engines.kernels.bridge import BridgeConfig, bridge_source
try:
    kernel_from_source(bridge_source(BridgeConfig(16, 3, 3, 16), 87), 87, "8.5")
except ResvitError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program_],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert "without TRITON_INTERPRET" in done.stdout
    assert not done.stderr


@pytest.mark.whole
def test_kernels_compiled_at_the_same_time_do_not_mix(program: Callable[[str], Source]) -> None:
    sources = [replace(program("plain"), constants={"BLOCK": 1 << power}) for power in range(5, 13)]
    one_by_one = [kernel_from_source(source, 87, "8.5") for source in sources]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda source: kernel_from_source(source, 87, "8.5"), sources))
    assert together == one_by_one


ENTRY = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1,\n\t.param .u64 f_param_2\n)\n{\n%s\n}\n"


def test_unused_scratch_pointers_go_and_used_ones_are_refused() -> None:
    shorter = without_scratch(ENTRY % "ld.param.u64 %rd1, [f_param_0];", arguments=1)
    assert entry_parameters(shorter) == ("f", [".param .u64 f_param_0"])
    with pytest.raises(ResvitError, match="scratch memory"):
        without_scratch(ENTRY % "ld.param.u64 %rd1, [f_param_2];", arguments=1)
    with pytest.raises(ResvitError, match=r"takes 3 parameters where 2 \+ 2"):
        without_scratch(ENTRY % "", arguments=2)
    with pytest.raises(ResvitError, match="0 entries"):
        without_scratch("", arguments=1)


def test_instructions_are_counted_by_what_they_multiply_and_read() -> None:
    text = """
    mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1}, {%r2};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2};
    wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {%r1}, %rd1;
    @%p1 tcgen05.mma.cta_group::1.kind::f8f6f4 [ %r1 + 0 ], %rd1;
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p2 ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd1 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;
    ld.shared.v4.b32 { %r1 }, [ %r2 ];
    """
    assert mma_counts(text) == {"mma.sync s8": 1, "mma.sync bf16": 1, "wgmma e4m3": 1, "tcgen05 e4m3": 1}
    assert load_widths(text) == {2: 1, 4: 1, 16: 3}


def test_an_assembler_that_refuses_is_told(program: Callable[[str], Source]) -> None:
    kernel = kernel_from_source(program("plain"), 87, "8.5")
    broken = replace(kernel, ptx=kernel.ptx.replace("ret;", "rot;"))
    with pytest.raises(ResvitError, match="assembler refuses the kernel resvit_plain_") as error:
        inspection(broken)
    assert error.value.code is ExitCode.BUILD


def test_a_missing_assembler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from resvit_engines.kernels.compile import resources as inspect

    monkeypatch.setattr(inspect.shutil, "which", lambda _: None)
    monkeypatch.setattr(inspect.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ResvitError, match="ptxas is not here") as error:
        inspect.find_ptxas()
    assert error.value.code is ExitCode.MISSING


@pytest.mark.whole
def test_spilled_registers_are_seen() -> None:
    kernel = kernel_from_source(CASES["packed", "plain", "32", "bf16"].source(80), 80, "8.5")
    assert inspection(kernel).spill_bytes == 0
    squeezed: Kernel = replace(kernel, ptx=kernel.ptx.replace(".reqntid", ".maxnreg 32\n.reqntid"))
    found = inspection(squeezed)
    assert found.registers <= 32
    assert found.spill_store_bytes > 0
    assert found.spill_load_bytes > 0


@pytest.mark.parametrize(
    ("sm", "threads", "registers", "shared", "columns", "blocks"),
    [
        (80, 128, 32, 0, 0, 16),  # 64 warps
        (80, 128, 128, 0, 0, 4),  # 65536 registers
        (80, 128, 32, 48 * 1024, 0, 3),  # 164 KiB, 1 KiB of each block's being the system's
        (86, 32, 16, 0, 0, 16),  # 16 blocks
        (100, 128, 32, 0, 256, 2),  # 512 columns of tensor memory
        (120, 1024, 80, 0, 0, 0),  # more registers than there are
    ],
)
def test_the_scarcest_resource_limits_the_blocks(
    sm: int, threads: int, registers: int, shared: int, columns: int, blocks: int
) -> None:
    assert resident_blocks(sm, threads, registers=registers, shared_bytes=shared, tensor_columns=columns) == blocks
