"""Targets beside the table: the recipe's own, and this machine's GPU."""

from __future__ import annotations

import dataclasses

import pytest

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine
from resvit_engines.targets.own import resolve_target, target_here
from resvit_engines.targets.table import RTX_SMS, TARGETS, Builder, Kind, Precision, find_target, proxy_target

OURS = {"like": "jetson-orin", "title": "Our box", "memory_mib": 65536, "int8": 85.0, "fp16": 42.5, "jetpack": "7.2"}


def facts(gpu: str | None, sm: int | None, jetpack: str | None = None, memory: int = 30_000) -> Machine:
    return Machine(sm, gpu, None, jetpack, "aarch64", memory, 10_000, "3.10.12")


def test_an_own_target_is_its_row_with_what_differs() -> None:
    made = resolve_target("our-box", own={"our-box": OURS})
    row = find_target("jetson-orin", "7.2")
    assert (made.name, made.title, made.memory_mib, made.sm) == ("our-box", "Our box", 65536, row.sm)
    assert (made.peak(Precision.INT8), made.peak(Precision.FP16)) == (85.0, 42.5)
    assert made.speed.bandwidth == row.speed.bandwidth
    assert (made.jetpack, made.tensorrt) == ("7.2", "10.16")
    assert made.speed.source == "the recipe"
    assert made.speed.sms == row.speed.sms
    assert resolve_target("our-box", own={"our-box": {**OURS, "sms": 16}}).speed.sms == 16


def test_an_own_target_has_the_cuda_of_its_tensorrt_unless_it_says_so() -> None:
    own = {"like": "l4", "tensorrt": "10.9"}
    assert resolve_target("box", own={"box": own}).cuda == "12.8"
    assert resolve_target("box", own={"box": {**own, "cuda": "13.2"}}).cuda == "13.2"
    assert resolve_target("box", own={"box": {"like": "jetson-orin", "tensorrt": "10.9"}}).cuda == "12.6"


def test_names_of_the_table_still_work_beside_own_ones() -> None:
    assert resolve_target("l4", own={"our-box": OURS}) == find_target("l4")
    assert resolve_target("jetson-thor@7.2").tensorrt == "10.16"


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({}, "what it is like"),
        ("jetson-orin", "what it is like"),
        ({"like": "jetson-orin", "tops": 3}, "'tops'"),
        ({"like": "jetson-orin", "memory_mib": "many"}, "wrong kind"),
        ({"like": "jetson-orin", "int8": -1.0}, "wrong kind"),
        ({"like": "jetson-orin", "sms": 15.5}, "wrong kind"),
        ({"like": "jetson-orin", "memory_mib": 1024, "workspace_mib": 4096}, "workspace"),
        ({"like": "jetson-orin", "cuda": "9.2"}, "CUDA 9.2"),
        ({"like": "toaster"}, "toaster"),
    ],
)
def test_a_description_that_makes_no_target_is_refused(described: object, words: str) -> None:
    with pytest.raises(ResvitError, match=words):
        resolve_target("our-box", own={"our-box": described})


def test_an_own_target_does_not_hide_one_of_the_table() -> None:
    with pytest.raises(ResvitError, match="taken"):
        resolve_target("l4", own={"l4": OURS})


@pytest.mark.parametrize(
    ("gpu", "sm", "name"),
    [
        ("NVIDIA L4", 89, "l4"),
        ("NVIDIA L40S", 89, "l40s"),
        ("NVIDIA GeForce RTX 4090", 89, "rtx-4090"),
        ("NVIDIA A100-SXM4-40GB", 80, "a100"),
        ("NVIDIA H200", 90, "h200"),
        ("NVIDIA H100 80GB HBM3", 90, "h100"),
        ("NVIDIA GB10", 121, "dgx-spark"),
        ("NVIDIA GeForce RTX 3060", 86, "geforce-rtx-3060"),
        ("NVIDIA RTX 6000 Ada Generation", 89, "rtx-6000-ada-generation"),
        ("NVIDIA A40", 86, "a40"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 87, "jetson-orin"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 87, "jetson-orin-nx"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 87, "jetson-orin-nano"),
    ],
)
def test_auto_is_the_gpu_that_is_there(gpu: str, sm: int, name: str) -> None:
    found = target_here(machine=facts(gpu, sm))
    assert (found.name, found.sm) == (name, sm)
    if name not in {row.name for row in TARGETS}:
        assert "wrong by what the two differ" in found.notes[-1]
    card = "RTX" in gpu
    assert (found.kind is Kind.RTX, found.builder is Builder.RTX, found.tensorrt == "1.7") == (card, card, card)


def test_auto_on_a_jetson_takes_its_release_and_memory() -> None:
    found = target_here(machine=facts("NVIDIA Jetson AGX Orin Developer Kit", 87, "7.2.1", memory=62_000))
    assert (found.jetpack, found.tensorrt, found.memory_mib) == ("7.2", "10.16", 62_000)
    with pytest.raises(ResvitError, match=r"TensorRT 8\.5"):
        target_here(machine=facts("NVIDIA Jetson AGX Orin Developer Kit", 87, "5.1"))


def test_auto_without_a_gpu_or_with_a_foreign_one() -> None:
    with pytest.raises(ResvitError) as caught:
        target_here(machine=facts(None, None))
    assert caught.value.code is ExitCode.MISSING
    with pytest.raises(ResvitError) as caught:
        target_here(machine=facts("NVIDIA GeForce GTX 1080", 61))
    assert caught.value.code is ExitCode.IMPOSSIBLE


GPUS = [target for target in TARGETS if not target.on_cpu]


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_every_target_has_a_proxy_that_tensorrt_for_rtx_compiles(target) -> None:
    proxy = proxy_target(target)
    assert proxy.sm in RTX_SMS
    assert proxy.builder is Builder.RTX
    assert proxy.precisions >= target.precisions
    assert (proxy == target) == (target.builder is Builder.RTX)
    assert dataclasses.replace(proxy, sm=target.sm).name == target.name


def test_ptx_and_kernels_follow_the_software() -> None:
    assert [
        find_target(n, j).ptx for n, j in (("jetson-orin", "6.2"), ("jetson-thor", "7.1"), ("jetson-orin", "7.2"))
    ] == [
        *("8.5", "9.0", "9.2"),
    ]
    assert find_target("jetson-orin").custom_kernels == "C++ IPluginV3 library"
    assert "ahead-of-time" in find_target("jetson-thor").custom_kernels
    assert "ahead-of-time" in find_target("l4").custom_kernels
    assert "takes no plugins" in find_target("rtx-4090").custom_kernels
    assert find_target("jetson-orin").unified_memory
    assert not find_target("l4").unified_memory
