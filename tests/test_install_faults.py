"""Samples of ``benchmarks/bundle_faults.py``: damage, forgery, kills, power failures and full disks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parent.parent
needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs a mount namespace of its own",
)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's own functions."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bundle_faults

    return bundle_faults


def test_damage_and_forgery_are_refused(faults: Any, tmp_path: Path) -> None:
    result = faults.refuse_all(faults.prepared(tmp_path), every=37)
    for kind in ("flipped", "left out", "cut"):
        assert set(result.pop(kind)) <= {"INPUT", "UNTRUSTED"}, kind
    assert set(result.pop("forged manifest.json")) == set(result.pop("forged signature.json")) == {"UNTRUSTED"}
    assert set(result.pop("forged engine.plan")) == {"INPUT"}


def test_killed_at_any_moment_current_is_whole(faults: Any, tmp_path: Path) -> None:
    ended = faults.kill_at_random(faults.prepared(tmp_path, 8 << 20), times=12, seed=1)
    assert sum(ended.values()) == 12
    assert ended["old"] + ended["new"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lose", [False, True])
def test_dead_before_any_step_current_is_whole(faults: Any, tmp_path: Path, lose: bool) -> None:
    steps = [*sorted(Random(lose).sample(range(1, 50), 10)), 50]
    ended = faults.die_at_steps(faults.prepared(tmp_path), steps, lose=lose)
    assert ended["old"] >= 8


@pytest.mark.slow
def test_losing_what_was_not_flushed_really_loses_it(faults: Any, tmp_path: Path) -> None:
    """The simulated power failure finds an installation that does not flush."""
    bench = faults.prepared(tmp_path)
    script = tmp_path / "careless.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import bundle_faults, resvit_engines.install.install as install\n"
        "from pathlib import Path\n"
        "install.sync_tree = lambda folder: None\n"
        "bundle_faults._child(Path(sys.argv[1]), 2, int(sys.argv[2]), True)\n"
    )
    broken = 0
    for step in range(20, 60):
        bench.forget_others()
        done = subprocess.run([sys.executable, str(script), str(tmp_path), str(step)], capture_output=True, check=False)
        if done.returncode == 0:
            break
        try:
            bench.current()
        except faults.ResvitError:
            broken += 1
        bench.install(bench.bundle(1))
    assert broken


@needs_mounts
def test_a_full_disk_leaves_the_old_version_running(faults: Any, tmp_path: Path) -> None:
    ended = faults.fill_disk(faults.prepared(tmp_path, 100 << 10), [0, 4, 40, 96, 104, 110, 300])
    assert set(ended) == {"refused: SYSTEM, disk is full; runs 1", "installed; runs 2"}
    assert ended["installed; runs 2"] >= 1


@pytest.mark.slow
def test_two_installations_at_once(faults: Any, tmp_path: Path) -> None:
    bench = faults.prepared(tmp_path, 4 << 20)
    for _ in range(4):
        bench.forget_others()
        both = [subprocess.Popen(faults.child(bench, version), stdout=subprocess.DEVNULL) for version in (1, 2, 2)]
        assert [process.wait() for process in both] == [0, 0, 0]
        assert bench.current() in (1, 2)
        assert not bench.leftovers()
    bench.install(bench.bundle(1))
    assert bench.current() == 1
