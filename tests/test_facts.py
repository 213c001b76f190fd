"""What a device says about itself, from samples in the documented formats."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from resvit_engines.machine import (
    Machine,
    clocks_from_devfreq,
    jetpack_from_l4t,
    l4t_from_release,
    memory_from_meminfo,
    oom_kills_from_vmstat,
    power_mode_from_nvpmodel,
    this_machine,
    versions_from_dpkg,
)
from resvit_engines.records import Record

RELEASE = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan 8 01:49:37 2025\n"
    "# KERNEL_VARIANT: oot\n"
)
DPKG = """Package: libnvinfer10
Status: install ok installed
Architecture: arm64
Version: 10.3.0.30-1+cuda12.5
Description: NVIDIA TensorRT
 Version: of a description, not of the package

Package: libnvinfer8
Status: deinstall ok config-files
Version: 8.6.2.3-1+cuda12.2

Package: bash
Status: install ok installed
Version: 5.1-6ubuntu1
"""
MEMINFO = "MemTotal:       32158972 kB\nMemFree:         1022004 kB\nMemAvailable:   24117248 kB\n"


def jetson(root: Path, dpkg: str = DPKG, release: str = RELEASE) -> Path:
    for name, text in {
        "etc/nv_tegra_release": release,
        "var/lib/dpkg/status": dpkg,
        "proc/meminfo": MEMINFO,
        "proc/vmstat": "nr_free_pages 100\noom_kill 2\n",
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\x00",
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "612000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
        "sys/class/devfreq/15340000.vic/min_freq": "1\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_jetson_is_read_from_its_files(tmp_path: Path) -> None:
    asked = []

    def run(command) -> str:
        asked.append(command[0])
        return "NV Power Mode: MODE_30W\n2\n" if command[0] == "nvpmodel" else ""

    facts = this_machine(jetson(tmp_path), run)
    assert (facts.gpu, facts.l4t, facts.jetpack) == ("NVIDIA Jetson AGX Orin Developer Kit", "36.4.3", "6.2")
    assert (facts.tensorrt, facts.power_mode, facts.oom_kills) == ("10.3.0.30", "MODE_30W", 2)
    assert (facts.memory_mib, facts.memory_available_mib) == (31405, 23552)
    assert facts.clocks == "not locked: 306 to 1300 MHz, now 612"
    assert facts.free_disk_mib > 0
    assert asked == ["nvpmodel"]
    assert Machine.from_json(Record({**facts.to_json(), "later": 1}, "a device")) == facts


def test_the_jetpack_package_is_believed_before_the_table(tmp_path: Path) -> None:
    package = "\nPackage: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2.1+b38\n"
    assert this_machine(jetson(tmp_path, dpkg=DPKG + package), lambda command: "").jetpack == "6.2.1"


def test_a_machine_with_nothing_of_nvidia_is_no_error(tmp_path: Path) -> None:
    facts = this_machine(tmp_path, lambda command: "")
    assert (facts.gpu, facts.tensorrt, facts.jetpack, facts.power_mode, facts.clocks) == (None,) * 5
    assert facts.memory_mib == 0


def test_a_gpu_of_a_server_is_named_by_its_driver(tmp_path: Path) -> None:
    file = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    file.parent.mkdir(parents=True)
    file.write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 104\n")
    facts = this_machine(tmp_path, lambda command: "1755, 1980\n" if command[0] == "nvidia-smi" else "")
    assert (facts.gpu, facts.clocks) == ("NVIDIA H100 80GB HBM3", "1755 MHz now, 1980 MHz at most")


def test_this_machine_reads_itself() -> None:
    facts = this_machine()
    assert facts.python == platform.python_version()
    assert facts.memory_mib >= facts.memory_available_mib > 0


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        *(("36.4.0", "6.1"), ("36.4.3", "6.2"), ("36.4.4", "6.2.1"), ("36.4.7", "6.2.1"), ("36.3.0", "6.0")),
        *(("35.5.0", "5.1"), ("38.4.0", "7.1"), ("39.2.0", "7.2"), ("39.2.1", "7.2.1"), ("3.0", None), ("36.40", None)),
    ],
)
def test_jetpack_of_a_jetson_linux_release(l4t: str, jetpack: str | None) -> None:
    assert jetpack_from_l4t(l4t) == jetpack


def test_parsers_on_what_they_do_not_know() -> None:
    assert l4t_from_release("no such line") is None
    assert memory_from_meminfo("") == (0, 0)
    assert power_mode_from_nvpmodel("NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN_SUPER\n2") == "MAXN_SUPER"
    assert power_mode_from_nvpmodel("command failed") is None
    assert oom_kills_from_vmstat("pgfault 1") is None
    assert versions_from_dpkg(DPKG) == {"libnvinfer10": "10.3.0.30-1+cuda12.5", "bash": "5.1-6ubuntu1"}
    assert clocks_from_devfreq(1300500000, 1300500000, 1300500000) == "locked at 1300 MHz"
