"""The very PTX that ships, launched on a GPU as a plugin does it, against the references of the interpreter's tests.

Inputs, references and bounds are those of ``test_kernel_*``; only what runs the kernel is another.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import numpy as np
import pytest

from kernel_bits import bits_of, numbers_of, some_numbers
from resvit_engines.errors import ResvitError
from resvit_engines.kernels.bridge import BridgeConfig, bridge_source
from resvit_engines.kernels.compile.compile import kernel_from_source
from resvit_engines.kernels.launch import Source
from resvit_engines.kernels.measure.drive import load_driver, run_kernel
from resvit_engines.kernels.measure.timing import time_kernel
from resvit_engines.targets.table import FP8_SMS, TARGETS


def ptx_of(sm: int) -> str:
    return next((target.ptx for target in TARGETS if target.sm == sm), "9.0")


@pytest.fixture(scope="module")
def sm() -> int:
    """The compute capability of GPU 0."""
    try:
        driver = load_driver()
        with driver.device() as device:
            return driver.name_and_sm(device)[1]
    except ResvitError as error:
        pytest.skip(f"no GPU: {error.problem}")


def run_source(source: Source, inputs: list[np.ndarray], sm: int) -> list[np.ndarray]:
    """Numbers in, numbers out, like the interpreter's."""
    kernel = kernel_from_source(source, sm, ptx_of(sm))
    arrays = [bits_of(value, dtype) for value, dtype in zip(inputs, source.launch.inputs, strict=True)]
    results = zip(run_kernel(kernel, arrays), source.launch.outputs, strict=True)
    return [numbers_of(bits, result.dtype) for bits, result in results]


def on_gpu(name: str, sm: int, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The interpreter's tests of a kernel, with the GPU in place of the interpreter."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "run_source", lambda source, inputs: run_source(source, inputs, sm))
    monkeypatch.setattr(module, "SM", sm)
    if sm in (89, 90):  # which add FP8 products with 13 bits of fraction
        monkeypatch.setattr(module, "FP8_UNIT", 2.0**-14, raising=False)
    return module


def require_type(dtype: str, sm: int) -> None:
    if dtype == "fp8" and sm not in FP8_SMS:
        pytest.skip("this GPU has no FP8")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("channels", "side", "embed", "batch"),
    [(1024, 14, 768, 1), (1024, 14, 768, 32), (2048, 7, 384, 8), (64, 24, 192, 2), (40, 3, 130, 3)],
)
def test_bridge(
    channels: int, side: int, embed: int, batch: int, norm: bool, dtype: str, sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_type(dtype, sm)
    tests = on_gpu("test_kernel_bridge", sm, monkeypatch)
    config = tests.config_of(channels, (side, side), embed, dtype, norm, dtype if norm else "fp16", batch=batch)
    inputs = tests.inputs_of(config, batch, np.random.default_rng(0))
    assert tests.faults(config, inputs, tests.bridge_source(config, sm)) == 0


@pytest.mark.gpu
def test_a_wrong_constant_is_noticed_on_a_gpu_too(sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = on_gpu("test_kernel_bridge", sm, monkeypatch)
    config = tests.config_of(40, (3, 7), 24, "int8", True, "int8")
    inputs = tests.inputs_of(config, 2, np.random.default_rng(0))
    source = tests.bridge_source(dataclasses.replace(config, in_scale=0.031), sm)
    assert tests.faults(config, inputs, source) > 0


@pytest.mark.gpu
def test_a_launch_takes_time(sm: int) -> None:
    kernel = kernel_from_source(bridge_source(BridgeConfig(64, 56, 56, 64), sm), sm, ptx_of(sm))
    weight, table = np.ones((64, 64), np.float16), np.ones((56 * 56 + 1, 64), np.float32)
    small, large = (
        time_kernel(kernel, [np.ones((batch, 64, 56, 56), np.float16), weight, table], repeats=10, cold=True)
        for batch in (1, 64)
    )
    assert 0 < small < large


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "pv"),
    [("fp16", "fp16"), ("bf16", "bf16"), ("int8", "int8"), ("int8", "fp16"), ("fp8", "fp8"), ("fp8", "fp16")],
)
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (50, 64), (197, 64), (577, 32), (64, 36), (785, 128)])
def test_attention(tokens: int, size: int, dtype: str, pv: str, sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    require_type(dtype, sm)
    tests = on_gpu("test_kernel_attention", sm, monkeypatch)
    config = tests.config_of(tokens, None, size, dtype, pv, heads=3, out_dtype=dtype)
    assert tests.faults(config, tests.inputs_of(config, 2, np.random.default_rng(tokens))) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "pv"),
    [("fp16", "fp16"), ("bf16", "bf16"), ("int8", "int8"), ("int8", "fp16"), ("fp8", "fp8"), ("fp8", "fp16")],
)
@pytest.mark.parametrize(
    ("layout", "queries", "keys", "size", "value_size"),
    [
        ("channels", 196, 196, 128, 128),
        ("channels", 196, 196, 64, 64),
        ("channels", 49, 49, 128, 128),
        ("split", 197, 50, 64, 64),
        ("per_head", 196, 196, 16, 32),
        ("q_kv", 49, 196, 16, 64),
        ("packed", 49, 49, 32, 32),
    ],
)
def test_attention_with_a_bias(
    layout: str,
    queries: int,
    keys: int,
    size: int,
    value_size: int,
    dtype: str,
    pv: str,
    sm: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_type(dtype, sm)
    tests = on_gpu("test_kernel_attention", sm, monkeypatch)
    more = {"layout": layout, "value_size": value_size, "out_dtype": dtype, "bias": (False, True, True)}
    config = tests.config_of(queries, keys, size, dtype, pv, heads=3, **more)
    assert tests.faults(config, tests.inputs_of(config, 2, np.random.default_rng(0), closed=0.2)) == 0


@pytest.mark.gpu
def test_attention_with_a_wrong_scale_is_noticed(sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = on_gpu("test_kernel_attention", sm, monkeypatch)
    config = tests.config_of(50, None, 64)
    source = tests.attention_source(dataclasses.replace(config, scale=config.scale * 1.1), sm)
    assert tests.faults(config, tests.inputs_of(config, 2, np.random.default_rng(0)), source) > 100


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(
    ("heads", "size", "sides", "points", "queries"),
    [(8, 32, (80, 40, 20), (4, 4, 4), 300), (8, 32, (40, 20, 10), (3, 6, 3), 2100), (3, 24, (9, 1), (2, 5), 17)],
)
def test_deformable_attention(
    heads: int, size: int, sides: tuple[int, ...], points: tuple[int, ...], queries: int, unit: bool, dtype: str,
    sm: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    require_type(dtype, sm)
    tests = on_gpu("test_kernel_deformable", sm, monkeypatch)
    config = tests.config_of(heads, size, (sides, sides, points), queries, dtype=dtype, out_dtype=dtype, unit=unit)
    assert tests.faults(config, tests.inputs_of(config, 2, np.random.default_rng(0))) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("place", [np.nan, np.inf, 1e30])
def test_places_that_are_none_or_far_away(place: float, sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = on_gpu("test_kernel_deformable", sm, monkeypatch)
    tests.test_places_that_are_none_or_far_away_give_what_grid_sample_gives(place)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "fp8", "int32", "bool"])
def test_numbers_survive_the_way_to_the_gpu_and_back(dtype: str) -> None:
    numbers = some_numbers(dtype) if dtype != "int32" else np.arange(-5.0, 5.0)
    assert np.array_equal(numbers_of(bits_of(numbers, dtype), dtype), numbers)
    assert len(np.unique(numbers)) > 1


def test_fp8_is_e4m3() -> None:
    bits = np.array([0x00, 0x01, 0x08, 0x38, 0x7E, 0xFE, 0xB8], np.uint8)
    assert numbers_of(bits, "fp8").tolist() == [0.0, 2.0**-9, 2.0**-6, 1.0, 448.0, -448.0, -1.0]
    assert np.isnan(numbers_of(np.array([0x7F, 0xFF], np.uint8), "fp8")).all()
