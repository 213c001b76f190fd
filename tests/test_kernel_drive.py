"""The launch of a kernel through the CUDA driver, against a stand-in that reads what the driver would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from driver_standin import FakeDriver, Launched, Result
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels import launch as vocabulary
from resvit_engines.kernels.launch import Extent, Kernel, Launch, dim, product
from resvit_engines.kernels.measure.drive import CALLS, Driver, run_kernel
from resvit_engines.kernels.measure.timing import time_kernel

PTX = """.version 8.5
.target sm_87
.visible .entry resvit_scale(.param .u64 a, .param .u64 b, .param .u32 n, .param .u32 m, .param .u64 y) { ret; }
"""
KERNEL = Kernel(
    entry="resvit_scale",
    ptx=PTX,
    sm=87,
    ptx_version="8.5",
    threads=128,
    shared_bytes=4096,
    launch=Launch(
        inputs=("fp16", "fp32"),
        scalars=(dim(0, 1), dim(1, 0)),
        outputs=(vocabulary.Result("fp16", (dim(0, 0), dim(0, 1))),),
        grid=(product(dim(0, 1, divisor=4), dim(0, 0)), Extent(2), Extent()),
    ),
)
X = np.arange(30, dtype=np.float16).reshape(3, 10)
B = np.arange(1, 11, dtype=np.float32)


def scale(driver: FakeDriver, launched: Launched) -> None:
    (_, x), (_, b), (_, n), (_, m), (_, y) = launched.arguments
    product_ = driver.array(x, np.float16, (3, n)) * driver.array(b, np.float32, (m,))
    driver.array(y, np.float16, (3, n))[:] = product_.astype(np.float16)


def test_a_launch_has_the_kernels_grid_block_memory_and_arguments_in_order() -> None:
    fake = FakeDriver(scale)
    (y,) = run_kernel(KERNEL, [X, B], Driver(fake))
    assert np.array_equal(y, (X * B).astype(np.float16))
    (launched,) = fake.launches
    assert launched[:4] == ("resvit_scale", (9, 2, 1), (128, 1, 1), 4096)
    assert [kind for kind, _ in launched.arguments] == ["u64", "u64", "u32", "u32", "u64"]
    assert [value for kind, value in launched.arguments if kind == "u32"] == [10, 10]
    assert not fake.left()
    assert fake.context is None
    assert {name for name in fake.calls if not name.startswith("cuGetError")} <= set(CALLS)


def test_what_a_kernel_does_not_write_shows() -> None:
    (y,) = run_kernel(KERNEL, [X, B], Driver(FakeDriver()))
    assert np.isnan(y).all()


@pytest.mark.parametrize("offset", [-1, 30])
def test_a_write_beside_the_output_is_found(offset: int) -> None:
    def beside(driver: FakeDriver, launched: Launched) -> None:
        driver.array(launched.arguments[-1][1] + 2 * offset, np.float16, (1,))[0] = 1

    fake = FakeDriver(beside)
    with pytest.raises(ResvitError, match="outside of its output") as error:
        run_kernel(KERNEL, [X, B], Driver(fake))
    assert error.value.code is ExitCode.MISMATCH
    assert not fake.left()


def test_bf16_and_fp8_come_back_as_their_bits() -> None:
    for dtype, kind in (("bf16", np.uint16), ("fp8", np.uint8), ("int8", np.int8)):
        launch = replace(KERNEL.launch, outputs=(vocabulary.Result(dtype, (dim(0, 0), Extent(4))),))
        (y,) = run_kernel(replace(KERNEL, launch=launch), [X, B], Driver(FakeDriver()))
        assert (y.dtype, y.shape) == (kind, (3, 4))
        assert (y.view(np.uint8) == 0xFF).all()


@pytest.mark.parametrize(
    ("call", "number", "code", "exit_code", "fix"),
    [
        ("cuInit", 1, Result.CUDA_ERROR_NO_DEVICE, ExitCode.MISSING, "nvidia-smi"),
        ("cuModuleLoadData", 1, Result.CUDA_ERROR_UNSUPPORTED_PTX_VERSION, ExitCode.IMPOSSIBLE, "PTX version"),
        ("cuMemAlloc", 2, Result.CUDA_ERROR_OUT_OF_MEMORY, ExitCode.SYSTEM, "smaller batch"),
        ("cuStreamSynchronize", 1, Result.CUDA_ERROR_ILLEGAL_ADDRESS, ExitCode.SYSTEM, "run again"),
    ],
)
def test_an_error_of_the_driver_is_told_by_name_and_nothing_is_kept(
    call: str, number: int, code: Result, exit_code: ExitCode, fix: str
) -> None:
    fake = FakeDriver(scale)
    fake.fail[call] = (number, code)
    with pytest.raises(ResvitError, match=f"{call} failed with {code.name}: it is so") as error:
        run_kernel(KERNEL, [X, B], Driver(fake))
    assert error.value.code is exit_code
    assert fix in error.value.fix
    assert not fake.left()


def test_a_machine_without_a_driver_is_told() -> None:
    class Nothing:
        def cuInit(self, flags: int) -> None:  # noqa: N802
            raise RuntimeError("libcuda.so.1 is not found\nand much more")

    with pytest.raises(ResvitError, match=r"no NVIDIA driver here \(libcuda\.so\.1 is not found\)") as error:
        run_kernel(KERNEL, [X, B], Driver(Nothing()))
    assert error.value.code is ExitCode.MISSING


@pytest.mark.parametrize("inputs", [[X], [X, B.astype(np.float16)], [X, B, B]])
def test_other_inputs_are_refused_before_the_gpu_is_asked(inputs: list[np.ndarray]) -> None:
    fake = FakeDriver()
    with pytest.raises(ResvitError, match="takes fp16, fp32"):
        run_kernel(KERNEL, inputs, Driver(fake))
    assert not fake.calls


def test_the_time_is_that_of_one_launch() -> None:
    fake = FakeDriver(scale)
    assert time_kernel(KERNEL, [X, B], repeats=5, launches=8, driver=Driver(fake)) == pytest.approx(0.25)
    assert len(fake.launches) == 8 * (5 + 3)
    assert not fake.left()


def test_cold_launches_take_turns_among_copies() -> None:
    fake = FakeDriver(scale)
    time_kernel(KERNEL, [X, B], repeats=1, launches=8, cold=True, driver=Driver(fake))
    assert len({launched.arguments[0][1] for launched in fake.launches}) == 8
    assert not fake.left()


def test_a_failed_launch_ends_the_recording() -> None:
    fake = FakeDriver(scale)
    fake.fail["cuLaunchKernel"] = (2, Result.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(ResvitError, match="cuLaunchKernel failed"):
        time_kernel(KERNEL, [X, B], driver=Driver(fake))
    assert fake.calls["cuStreamEndCapture"] == 1
    assert fake.capturing is None
    assert not fake.left()


def test_the_gpu_is_named() -> None:
    driver = Driver(FakeDriver())
    with driver.device() as device:
        assert driver.name_and_sm(device) == ("Stand-in", 87)


def test_every_call_is_one_of_cuda_bindings() -> None:
    api = pytest.importorskip("cuda.bindings.driver")
    assert [name for name in CALLS if not hasattr(api, name)] == []
