"""Builds on devices that share their memory: the estimate, the smaller second try, and who killed a build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from resvit_engines.builder import builder as build
from resvit_engines.builder import child as build_child
from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.memory import available_mib, oom_kills, workspace_for
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import Silent
from resvit_engines.targets.table import find_target

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc")


class Notes(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


# The estimate: 1024 MiB, four times the weights, and the workspace.


@pytest.mark.parametrize(
    ("name", "asked", "onnx_mib", "free", "mib", "says"),
    [
        ("jetson-orin-nano", None, 100, 2448, 1024, None),
        ("jetson-orin-nano", None, 100, 2447, 1023, "limited to 1023 MiB instead of 1024"),
        ("jetson-orin-nano", None, 100, 1500, 128, "Even so it may not fit"),
        ("jetson-orin-nano", 1024, 100, 2000, 1024, "it may not fit"),
        ("jetson-orin-nano", 64, 100, 2000, 64, None),
        ("jetson-orin-nano", None, 100, None, 1024, None),
        ("dgx-spark", None, 100, 3000, 1576, "limited to 1576"),
        ("rtx-4090", None, 100, 500, 8192, None),
    ],
)
def test_the_workspace_fits_what_is_free(name, asked, onnx_mib, free, mib, says) -> None:
    chosen = workspace_for(find_target(name), asked, onnx_mib * MIB, free)
    assert chosen.mib == mib
    assert (says in chosen.notes[0]) if says else chosen.notes == ()


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable:    4096000 kB\n"}
V2 = {"proc/self/cgroup": "0::/user/build\n"}
V1 = {"proc/self/cgroup": "4:memory:/user/build\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "mib"),
    [
        ({}, None),
        (MEMINFO, 4000),
        ({**MEMINFO, **V2, "sys/fs/cgroup/user/build/memory.max": "max\n"}, 4000),
        (
            {
                **MEMINFO,
                **V2,
                "sys/fs/cgroup/user/memory.max": str(1000 * MIB),
                "sys/fs/cgroup/user/memory.current": str(400 * MIB),
            },
            600,
        ),
        (
            {
                **MEMINFO,
                **V1,
                "sys/fs/cgroup/memory/user/build/memory.limit_in_bytes": str(100 * MIB),
                "sys/fs/cgroup/memory/user/build/memory.usage_in_bytes": str(200 * MIB),
            },
            0,
        ),
    ],
)
def test_free_memory_is_the_machines_or_the_control_groups(tmp_path, files, mib) -> None:
    assert available_mib(machine(tmp_path, files)) == mib


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({}, None),
        ({"proc/vmstat": "pgfault 1\noom_kill 3\n"}, 3),
        ({**V2, "proc/vmstat": "oom_kill 3\n", "sys/fs/cgroup/user/build/memory.events": "max 9\noom_kill 2\n"}, 2),
        ({**V1, "sys/fs/cgroup/memory/user/build/memory.oom_control": "under_oom 0\noom_kill 1\n"}, 1),
    ],
)
def test_the_kernels_own_count_of_kills(tmp_path, files, kills) -> None:
    assert oom_kills(machine(tmp_path, files)) == kills


# A second try

CHILD = """
import json, os, sys
request = json.load(open(sys.argv[1]))
workspace = request["config"]["workspace_mib"]
fits = workspace <= {fits}
if not fits and {killed}:
    os.kill(os.getpid(), 9)
result = dict(version="10.3.0", seconds=1.0, peak_mib=1, inputs=[], outputs=[], kernels=[], warnings=[], notes=[],
    plugin_layers=[], timing_cache=None) if fits else dict(problem="The builder failed: out of memory.", fix="-",
    code=8, memory=True)
open(request["engine"], "wb").write(b"engine")
json.dump(result, open(request["result"], "w"))
"""


@pytest.fixture
def child(monkeypatch, tmp_path):
    """A builder that finishes only with a small enough workspace; else it is killed, or says so."""
    (tmp_path / "model.onnx").write_bytes(b"-")
    monkeypatch.setattr(build, "_installed", lambda module: True)
    monkeypatch.setattr(build, "local_sm", lambda: 87)
    counts = iter(range(100))

    def use(fits: int, *, killed: bool, counted: bool = True) -> None:
        script = CHILD.format(fits=fits, killed=killed)
        monkeypatch.setattr(build_child, "_worker_command", lambda request: [sys.executable, "-c", script, request])
        monkeypatch.setattr(build_child, "oom_kills", lambda: next(counts) if counted else 0)

    return use


def built(tmp_path: Path, name: str, notes: Notes, **settings) -> int | None:
    report = build_engine(
        tmp_path / "model.onnx", tmp_path / "engine.plan", find_target(name), BuildSettings(**settings), notes
    )
    return report.workspace_mib


@pytest.mark.whole
@linux
@pytest.mark.parametrize("killed", [True, False])
def test_with_too_little_memory_it_tries_half_the_workspace(tmp_path, child, killed) -> None:
    child(fits=300, killed=killed)
    notes = Notes()
    assert built(tmp_path, "jetson-orin", notes, workspace_mib=1024) == 256
    tries = [note for note in notes.warned if "Trying again" in note]
    assert ["512 MiB instead of 1024" in tries[0], "256 MiB instead of 512" in tries[1], len(tries)] == [True, True, 2]
    assert ("OOM killer" if killed else "out of memory") in tries[0]


@pytest.mark.whole
@linux
def test_it_gives_up_where_no_kernel_would_be_left(tmp_path, child) -> None:
    child(fits=1, killed=True)
    with pytest.raises(ResvitError, match="OOM killer") as caught:
        built(tmp_path, "jetson-orin", Notes(), workspace_mib=512)
    assert caught.value.code is ExitCode.SYSTEM
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@linux
def test_what_somebody_else_kills_is_not_tried_again(tmp_path, child) -> None:
    child(fits=300, killed=True, counted=False)
    notes = Notes()
    with pytest.raises(ResvitError, match="not by the kernel's OOM killer"):
        built(tmp_path, "jetson-orin", notes, workspace_mib=1024)
    assert not [note for note in notes.warned if "Trying again" in note]


@linux
def test_a_workspace_of_a_gpu_that_is_not_there_has_no_part_in_it(tmp_path, child) -> None:
    child(fits=300, killed=True)
    notes = Notes()
    with pytest.raises(ResvitError, match="OOM killer"):
        built(tmp_path, "rtx-4090", notes, workspace_mib=1024)
    assert notes.warned == []


@linux
def test_an_engine_outlives_the_listing_of_its_layers(tmp_path, child, monkeypatch) -> None:
    child(fits=4096, killed=False)
    command = build_child._worker_command("")
    died = command[2] + "\nos.kill(os.getpid(), 9)"
    monkeypatch.setattr(build_child, "_worker_command", lambda request: [*command[:2], died, request])
    assert built(tmp_path, "jetson-orin", Notes()) == 4096
    assert (tmp_path / "engine.plan").read_bytes() == b"engine"


# The real OOM killer


def control_group(limit: int) -> Path | None:
    """A memory control group that holds so many bytes, where this machine lets us make one."""
    name = f"resvit-test-{os.getpid()}"
    for base, file in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup") / base / name
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return group
    return None


@pytest.mark.whole
@linux
def test_the_real_oom_killer_is_recognised(tmp_path) -> None:
    group = control_group(200 * MIB)
    if group is None:
        pytest.skip("no memory control group can be made here")
    (tmp_path / "model.onnx").write_bytes(b"-")
    eats = "held = []\nwhile True: held.append(bytearray(b'x') * (8 << 20))"
    parent = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        Path({str(group)!r}, "cgroup.procs").write_text(str(os.getpid()))
        from resvit_engines.builder import builder as build
        from resvit_engines.builder import child as build_child
        from resvit_engines.errors import ResvitError
        from resvit_engines.targets.table import find_target
        start = build_child._start
        def eaten_first(*arguments):
            child = start(*arguments)
            Path(f"/proc/{{child.pid}}/oom_score_adj").write_text("1000")
            return child
        build_child._start = eaten_first
        build_child._worker_command = lambda request: [sys.executable, "-c", {eats!r}]
        build._installed = lambda module: module == "tensorrt_rtx_bindings"
        try:
            build.build_engine(Path("model.onnx"), Path("engine.plan"), find_target("rtx-4090"))
        except ResvitError as error:
            print(error.problem)
    """)
    try:
        done = subprocess.run([sys.executable, "-c", parent], cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        group.rmdir()
    assert "The kernel's OOM killer ended the builder" in done.stdout, json.dumps([done.stdout, done.stderr])
