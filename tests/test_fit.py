"""Whether a bundle is for a device: every mismatch is named, and none is made up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine_reports import engine_report
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.bundle.fit import misfits, require_fit
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import BundledFile
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine
from resvit_engines.targets.table import TARGETS, Builder, find_target

ORIN = Machine(
    sm=87, gpu="Jetson AGX Orin", tensorrt="10.3.0.30", jetpack="6.2.1", arch="aarch64", memory_mib=30_000,
    free_disk_mib=10_000, python="3.10.12",
)  # fmt: skip
L4 = Machine(
    sm=89, gpu="NVIDIA L4", tensorrt=None, jetpack=None, arch="x86_64", memory_mib=60_000, free_disk_mib=10_000,
    python="3.11.7", rtx="1.7.1.116",
)  # fmt: skip


def manifest(target: str, engine: EngineReport | None = None, plan: int = 0) -> Manifest:
    """The manifest of a bundle for ``target``, with an engine of ``plan`` MiB if one is given."""
    files = [BundledFile("model.onnx", 1 << 20, "0" * 64)]
    if engine is not None:
        files.append(BundledFile("engine.plan", plan << 20, "0" * 64))
    return Manifest("net", target=find_target(target), engine=engine, files=tuple(files))


def rtx_engine(**other: Any) -> EngineReport:
    return engine_report(**{"sm": 89, "builder": Builder.RTX, "builder_version": "1.7.1.116", **other})


def orin_engine(**other: Any) -> EngineReport:
    return engine_report(**other)


def reason(document: Manifest, machine: Machine, code: ExitCode = ExitCode.IMPOSSIBLE) -> str:
    with pytest.raises(ResvitError) as caught:
        require_fit(document, machine)
    assert caught.value.code is code
    return str(caught.value)


@pytest.mark.parametrize(
    ("document", "machine"),
    [
        (manifest("rtx-4090"), L4),
        (manifest("rtx-4090", rtx_engine(), 100), L4),
        (manifest("l4"), dataclasses.replace(L4, tensorrt="11.4.0.106")),
        (manifest("jetson-orin"), ORIN),
        (manifest("jetson-orin", orin_engine(), 100), ORIN),
        (manifest("jetson-orin", orin_engine(builder_version="10.3.0.30")), ORIN),
        (manifest("jetson-orin"), dataclasses.replace(ORIN, jetpack=None)),
        (manifest("rtx-4090", rtx_engine(sm=86, flags=("hardware_compatible",))), L4),
        (
            manifest("jetson-orin", orin_engine(flags=("version_compatible",))),
            dataclasses.replace(ORIN, tensorrt="10.7.0"),
        ),
    ],
)
def test_what_fits(document: Manifest, machine: Machine) -> None:
    assert list(misfits(document, machine)) == []


@pytest.mark.parametrize(
    ("document", "machine", "words"),
    [
        (manifest("jetson-orin"), L4, "aarch64"),
        (manifest("rtx-4090"), dataclasses.replace(L4, sm=None), "no NVIDIA GPU"),
        (manifest("rtx-4090", rtx_engine()), dataclasses.replace(L4, sm=86, gpu="A10"), "this GPU is A10 (SM 8.6)"),
        (manifest("rtx-4090", rtx_engine(sm=86)), L4, "(SM 8.6), and this GPU is NVIDIA L4 (SM 8.9)"),
        (
            manifest("rtx-4090", rtx_engine(flags=("hardware_compatible",))),
            dataclasses.replace(L4, sm=75),
            "from SM 8.0 on",
        ),
        (manifest("rtx-4090", rtx_engine()), dataclasses.replace(L4, rtx="1.7.2.1"), "1.7.2.1"),
        (manifest("rtx-4090", rtx_engine()), dataclasses.replace(L4, rtx=None), "not installed"),
        (manifest("rtx-4090"), dataclasses.replace(L4, rtx="1.6.0"), "1.6.0"),
        (manifest("l4"), L4, "needs TensorRT 11.4, which is not installed here"),
        (manifest("l4"), dataclasses.replace(L4, tensorrt="10.13.3"), "--target NAME --tensorrt 10.13"),
        (manifest("jetson-orin"), dataclasses.replace(ORIN, jetpack="7.2"), "JetPack 7.2"),
        (manifest("jetson-orin", orin_engine()), dataclasses.replace(ORIN, tensorrt="10.3.1.1"), "10.3.1.1"),
        (manifest("jetson-orin"), dataclasses.replace(ORIN, tensorrt="10.16.1"), "10.16.1"),
        (manifest("jetson-orin"), dataclasses.replace(ORIN, tensorrt=None), "not installed"),
        (manifest("jetson-orin", orin_engine(rehearsal=True)), ORIN, "rehearsal"),
        (
            manifest("jetson-orin", orin_engine(flags=("version_compatible",))),
            dataclasses.replace(ORIN, tensorrt="10.2.0"),
            "10.2.0",
        ),
        (
            manifest("jetson-orin", orin_engine(flags=("version_compatible",))),
            dataclasses.replace(ORIN, tensorrt="11.4.1"),
            "11.4.1",
        ),
    ],
)
def test_what_does_not_fit_is_named(document: Manifest, machine: Machine, words: str) -> None:
    message = reason(document, machine)
    assert words in message
    assert "resvit-export build --target" in message
    require_fit(document, machine, rehearse=True)


def test_memory_and_disk_count_in_a_rehearsal_too() -> None:
    document = manifest("rtx-4090", rtx_engine(), 1500)
    small = dataclasses.replace(L4, memory_mib=1400)
    assert "needs 1,500 MiB of memory, and this device has 1,400" in reason(document, small, ExitCode.SYSTEM)
    assert "1,550 MiB are free" in reason(document, dataclasses.replace(L4, free_disk_mib=1550), ExitCode.SYSTEM)
    with pytest.raises(ResvitError, match="of memory"):
        require_fit(document, small, rehearse=True)
    assert list(misfits(document, dataclasses.replace(L4, memory_mib=0))) == []


def test_a_manifest_that_does_not_say() -> None:
    assert "does not say" in reason(dataclasses.replace(manifest("rtx-4090"), target=None), L4, ExitCode.INPUT)


GPUS = [target for target in TARGETS if not target.on_cpu]


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_each_target_fits_the_device_that_it_describes_and_no_other_gpu(target: Any) -> None:
    rtx = target.builder is Builder.RTX
    machine = Machine(
        sm=target.sm, gpu=target.title, tensorrt=None if rtx else target.tensorrt, jetpack=target.jetpack,
        arch=target.arch, memory_mib=target.memory_mib, free_disk_mib=10_000, python="3.10",
        rtx=target.tensorrt if rtx else None,
    )  # fmt: skip
    for other in GPUS:
        fits = not list(misfits(manifest(other.name), machine))
        alike = (other.sm, other.arch, other.builder, other.tensorrt) == (
            target.sm, target.arch, target.builder, target.tensorrt,
        )  # fmt: skip
        assert fits is alike, other.name
