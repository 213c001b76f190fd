"""Whether a bundle is for a device: every mismatch is named, and none is made up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from resvit_engines.bundle.fit import misfits, require_fit
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import DeviceFacts
from resvit_engines.targets.table import TARGETS, Builder, find_target

ORIN = DeviceFacts(
    sm=87, gpu="Jetson AGX Orin", tensorrt="10.3.0.30", jetpack="6.2.1", arch="aarch64", memory_mib=30_000,
    free_disk_mib=10_000, python="3.10.12",
)  # fmt: skip
L4 = DeviceFacts(
    sm=89, gpu="NVIDIA L4", tensorrt=None, jetpack=None, arch="x86_64", memory_mib=60_000, free_disk_mib=10_000,
    python="3.11.7", rtx="1.7.1.116",
)  # fmt: skip


def manifest(target: str, engine: dict[str, Any] | None = None, plan: int = 0) -> dict[str, Any]:
    """The manifest of a bundle for ``target``, with an engine of ``plan`` MiB if one is given."""
    files = [{"path": "model.onnx", "bytes": 1 << 20}]
    built: dict[str, Any] = {"name": "net", "target": find_target(target).to_json(), "files": files}
    if engine is not None:
        built["engine"] = engine
        files.append({"path": "engine.plan", "bytes": plan << 20})
    return built


def rtx_engine(**other: Any) -> dict[str, Any]:
    return {"sm": 89, "builder": "TensorRT for RTX", "builder_version": "1.7.1.116", **other}


def orin_engine(**other: Any) -> dict[str, Any]:
    return {"sm": 87, "builder": "TensorRT", "builder_version": "10.3.0", **other}


def reason(document: dict[str, Any], facts: DeviceFacts, code: ExitCode = ExitCode.IMPOSSIBLE) -> str:
    with pytest.raises(ResvitError) as caught:
        require_fit(document, facts)
    assert caught.value.code is code
    return str(caught.value)


@pytest.mark.parametrize(
    ("document", "facts"),
    [
        (manifest("l4"), L4),
        (manifest("l4", rtx_engine(), 100), L4),
        (manifest("jetson-orin"), ORIN),
        (manifest("jetson-orin", orin_engine(), 100), ORIN),
        (manifest("jetson-orin", orin_engine(builder_version="10.3.0.30")), ORIN),
        (manifest("jetson-orin"), dataclasses.replace(ORIN, jetpack=None)),
        (manifest("l4", rtx_engine(sm=86, hardware_compatible=True)), L4),
        (manifest("jetson-orin", orin_engine(version_compatible=True)), dataclasses.replace(ORIN, tensorrt="10.7.0")),
    ],
)
def test_what_fits(document: dict[str, Any], facts: DeviceFacts) -> None:
    assert list(misfits(document, facts)) == []


@pytest.mark.parametrize(
    ("document", "facts", "words"),
    [
        (manifest("jetson-orin"), L4, "aarch64"),
        (manifest("l4"), dataclasses.replace(L4, sm=None), "no NVIDIA GPU"),
        (manifest("l4", rtx_engine()), dataclasses.replace(L4, sm=86, gpu="A10"), "this GPU is A10 (SM 8.6)"),
        (manifest("l4", rtx_engine(sm=86)), L4, "(SM 8.6), and this GPU is NVIDIA L4 (SM 8.9)"),
        (manifest("l4", rtx_engine(hardware_compatible=True)), dataclasses.replace(L4, sm=75), "from SM 8.0 on"),
        (manifest("l4", rtx_engine()), dataclasses.replace(L4, rtx="1.7.2.1"), "1.7.2.1"),
        (manifest("l4", rtx_engine()), dataclasses.replace(L4, rtx=None), "not installed"),
        (manifest("l4"), dataclasses.replace(L4, rtx="1.6.0"), "1.6.0"),
        (manifest("jetson-orin"), dataclasses.replace(ORIN, jetpack="7.2"), "JetPack 7.2"),
        (manifest("jetson-orin", orin_engine()), dataclasses.replace(ORIN, tensorrt="10.3.1.1"), "10.3.1.1"),
        (manifest("jetson-orin"), dataclasses.replace(ORIN, tensorrt="10.16.1"), "10.16.1"),
        (manifest("jetson-orin"), dataclasses.replace(ORIN, tensorrt=None), "not installed"),
        (manifest("jetson-orin", orin_engine(rehearsal=True)), ORIN, "rehearsal"),
        (
            manifest("jetson-orin", orin_engine(version_compatible=True)),
            dataclasses.replace(ORIN, tensorrt="10.2.0"),
            "10.2.0",
        ),
        (
            manifest("jetson-orin", orin_engine(version_compatible=True)),
            dataclasses.replace(ORIN, tensorrt="11.4.1"),
            "11.4.1",
        ),
    ],
)
def test_what_does_not_fit_is_named(document: dict[str, Any], facts: DeviceFacts, words: str) -> None:
    message = reason(document, facts)
    assert words in message
    assert "resvit-export build --target" in message
    require_fit(document, facts, rehearse=True)


def test_memory_and_disk_count_in_a_rehearsal_too() -> None:
    document = manifest("l4", rtx_engine(device_memory_mib=500), 1000)
    small = dataclasses.replace(L4, memory_mib=1400)
    assert "needs 1,500 MiB of memory, and this device has 1,400" in reason(document, small, ExitCode.SYSTEM)
    assert "1,050 MiB are free" in reason(document, dataclasses.replace(L4, free_disk_mib=1050), ExitCode.SYSTEM)
    with pytest.raises(ResvitError, match="of memory"):
        require_fit(document, small, rehearse=True)
    assert list(misfits(document, dataclasses.replace(L4, memory_mib=0))) == []


@pytest.mark.parametrize("changed", [{"target": None}, {"target": "l4"}, {"engine": []}, {"target": ...}])
def test_a_manifest_that_does_not_say(changed: dict[str, Any]) -> None:
    document = {key: value for key, value in {**manifest("l4"), **changed}.items() if value is not ...}
    assert "does not say" in reason(document, L4, ExitCode.INPUT)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_each_target_fits_the_device_that_it_describes_and_no_other_gpu(target: Any) -> None:
    rtx = target.builder is Builder.RTX
    facts = DeviceFacts(
        sm=target.sm, gpu=target.title, tensorrt=None if rtx else target.tensorrt, jetpack=target.jetpack,
        arch=target.arch, memory_mib=target.memory_mib, free_disk_mib=10_000, python="3.10",
        rtx=target.tensorrt if rtx else None,
    )  # fmt: skip
    for other in TARGETS:
        fits = not list(misfits(manifest(other.name), facts))
        alike = (other.sm, other.arch, other.builder, other.tensorrt) == (
            target.sm, target.arch, target.builder, target.tensorrt,
        )  # fmt: skip
        assert fits is alike, other.name
