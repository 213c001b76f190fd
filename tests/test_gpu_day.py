"""The day with a GPU, without one: what is run in which call, what is kept, what a part that cannot be done leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GPU = {"sm": 90, "smi": "Test GPU, 580.1, 1 MiB", "others": [], "held_down": []}
WRITES = "import json, sys; json.dump({'value': 1}, open(sys.argv[1], 'w'))"
SLEEPS = "import time; print('at work', flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def _benchmarks_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def part(name: str, code: str = WRITES, seconds: float = 0.1, **options: Any) -> Any:
    from gpu_parts.schedule import Part

    return Part(name, ("{python}", "-c", code, "{result}"), seconds, **options)


def place(tmp_path: Path, machine: dict[str, Any] = GPU, lacking: tuple[str, ...] = ()) -> Any:
    from gpu_parts.schedule import Place

    return Place(
        tmp_path, tmp_path / "results", tmp_path / "work", {**os.environ},
        look=lambda: machine,
        missing=lambda modules: [name for name in modules if name in lacking],
        found=lambda programs: next((name for name in programs if name == "/bin/true"), None),
    )  # fmt: skip


def call(tmp_path: Path, parts: list[Any], *arguments: str, **how: Any) -> int:
    from gpu_day import main

    return main(arguments, parts, place(tmp_path, **how))


def known(tmp_path: Path) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = json.loads((tmp_path / "results" / "gpu-day.json").read_bytes())["parts"]
    return parts


def statuses(tmp_path: Path) -> dict[str, str]:
    return {name: facts["status"] for name, facts in known(tmp_path).items()}


def test_what_is_done_is_kept_and_not_done_again(tmp_path: Path) -> None:
    counts = "import json, sys; open('count', 'a').write('x'); json.dump({}, open(sys.argv[1], 'w'))"
    assert call(tmp_path, [part("a", counts), part("b")]) == 0
    assert call(tmp_path, [part("a", counts), part("b")]) == 0
    assert (tmp_path / "count").read_text() == "x"
    assert known(tmp_path)["b"]["result"] == {"value": 1}
    assert "| a | done |" in (tmp_path / "results" / "gpu-day.md").read_text()
    assert call(tmp_path, [part("a", counts), part("b")], "--again", "a") == 0
    assert (tmp_path / "count").read_text() == "xx"


def test_what_does_not_fit_is_left_and_the_first_part_gets_all_of_the_budget(tmp_path: Path) -> None:
    parts = [part("long", seconds=1e6), part("longer", seconds=1e6), part("short")]
    assert call(tmp_path, parts, "--budget", "60") == 13
    assert statuses(tmp_path) == {"long": "done", "short": "done"}
    assert call(tmp_path, parts, "--budget", "60") == 0
    assert statuses(tmp_path)["longer"] == "done"


@pytest.mark.whole
def test_a_part_is_ended_with_the_budget_and_comes_behind_those_never_tried(tmp_path: Path) -> None:
    parts = [part("hangs", SLEEPS), part("next", seconds=0.5)]
    assert call(tmp_path, parts, "--budget", "3") == 13
    facts = known(tmp_path)
    assert facts["hangs"]["status"] == "stopped"
    assert "at work" in facts["hangs"]["log"]
    assert "next" not in facts
    # On a busy machine what comes first may leave nothing of the budget to the second.
    codes = [call(tmp_path, parts, "--budget", "3")]
    assert "next" in known(tmp_path)
    while codes[-1] == 13:
        codes.append(call(tmp_path, parts, "--budget", "3"))
    assert codes[-1] == 8
    assert known(tmp_path)["hangs"]["tries"] == 3
    assert known(tmp_path)["next"]["status"] == "done"
    assert call(tmp_path, parts, "--budget", "3") == 8


@pytest.mark.whole
def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    child = "import subprocess, sys, time\n"
    child += f"p = subprocess.Popen([sys.executable, '-c', {SLEEPS!r}])\nopen('pid', 'w').write(str(p.pid))\n"
    assert call(tmp_path, [part("parent", child + "time.sleep(600)")], "--budget", "4") == 13
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z":
        time.sleep(0.01)


def test_a_failing_part_says_why_and_stops_no_other(tmp_path: Path) -> None:
    parts = [part("fails", "print('started'); raise SystemExit('out of luck')"), part("silent", "pass"), part("good")]
    assert call(tmp_path, parts) == 13
    facts = known(tmp_path)
    assert facts["fails"]["reason"] == "exit code 1: out of luck"
    assert facts["silent"]["reason"] == "it wrote no result"
    assert facts["good"]["status"] == "done"
    assert call(tmp_path, parts) == 8
    assert "| fails | failed: exit code 1: out of luck |" in (tmp_path / "results" / "gpu-day.md").read_text()


@pytest.mark.parametrize("written", ["{", '{"a": "' + "x" * (300 << 10) + '"}'])
def test_a_result_that_cannot_be_kept_is_a_failure(tmp_path: Path, written: str) -> None:
    (tmp_path / "text").write_text(written)
    call(tmp_path, [part("odd", "import shutil, sys; shutil.copy('text', sys.argv[1])")])
    assert known(tmp_path)["odd"]["status"] == "failed"
    assert (tmp_path / "results" / "gpu-day.json").stat().st_size < 100 << 10


def test_what_cannot_be_done_here_says_why_in_a_sentence(tmp_path: Path) -> None:
    refuses = WRITES.replace("'value': 1", "'impossible': 'TensorRT has no code for this GPU.'")
    parts = [
        part("module", modules=("tensorrt",)), part("program", programs=("trtexec",)), part("data", files=("data/x",)),
        part("itself", refuses), part("found", programs=("trtexec", "/bin/true")),
    ]  # fmt: skip
    assert call(tmp_path, parts, lacking=("tensorrt",)) == 0
    text = (tmp_path / "results" / "gpu-day.md").read_text()
    assert "| module | not possible here: Python has no module tensorrt (carry its wheel" in text
    assert "| program | not possible here: There is no program trtexec. |" in text
    assert "| data | not possible here: There is no data/x here: carry it along. |" in text
    assert "| itself | not possible here: TensorRT has no code for this GPU. |" in text
    assert statuses(tmp_path)["found"] == "done"


def test_a_library_that_comes_later_is_used_when_asked_again(tmp_path: Path) -> None:
    parts = [part("module", modules=("tensorrt",))]
    assert call(tmp_path, parts, lacking=("tensorrt",)) == 0
    assert call(tmp_path, parts, "--again", "module") == 0
    assert statuses(tmp_path) == {"module": "done"}


def test_without_a_gpu_nothing_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, [part("a")], machine={"sm": None}) == 7
    assert "There is no NVIDIA GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--only", "x"], ["--budget", "0"], ["--wheels", "nowhere"], ["--again", "x"]])
def test_a_misspelt_line_is_refused_before_anything(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(tmp_path, [part("a")], *arguments)
    assert caught.value.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"parts": []}', '{"parts": {"a": 1}}', '{"parts": {"a": {"tries": 1}}}']
)
def test_a_file_of_another_program_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gpu-day.json").write_text(content)
    assert call(tmp_path, [part("a")]) == 3
    assert (tmp_path / "results" / "gpu-day.json").read_text() == content


SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu_day import main
from gpu_parts.schedule import Part, Place
folder = Path({folder!r})
place = Place(folder, folder / "results", folder / "work", dict(os.environ), look=lambda: {gpu!r},
              missing=lambda modules: [], found=lambda programs: None)
parts = [Part("quick", ("{{python}}", "-c", {writes!r}, "{{result}}"), 0.1),
         Part("slow", ("{{python}}", "-c", {slow!r}, "{{result}}"), 0.1)]
raise SystemExit(main(["--budget", "60"], parts, place))
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.whole
def test_a_killed_call_goes_on_where_it_stopped(tmp_path: Path, sign: signal.Signals) -> None:
    slow = "import pathlib, time\npathlib.Path('started').touch()\n"
    slow += f"while not pathlib.Path('go').exists(): time.sleep(0.01)\n{WRITES}"
    script = SCRIPT.format(benchmarks=str(ROOT / "benchmarks"), folder=str(tmp_path), gpu=GPU, writes=WRITES, slow=slow)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL) as first:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        first.send_signal(sign)
    assert first.returncode == (-9 if sign is signal.SIGKILL else 130)
    assert statuses(tmp_path) == {"quick": "done", "slow": "stopped"}
    (tmp_path / "go").touch()  # which ends the one that was left alone, too
    again = subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False)
    assert again.returncode == 0
    facts = known(tmp_path)
    assert statuses(tmp_path) == {"quick": "done", "slow": "done"}
    assert (facts["quick"]["tries"], facts["slow"]["tries"]) == (1, 2)


def wheel(path: Path, name: str, tag: str = "py3-none-any") -> Path:
    file = path / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", "VALUE = 7\n")
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(
            f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\nleft_out.so,,\n"
        )
    return file


@pytest.mark.whole
def test_wheels_are_installed_offline_whole_and_in_pieces(tmp_path: Path) -> None:
    from gpu_parts.wheels import install_wheels

    carried, said = tmp_path / "wheels", []
    carried.mkdir()
    wheel(carried, "carried_whole")
    wheel(carried, "of_another_python", "cp27-cp27m-win32")
    cut = wheel(carried, "carried_in_pieces")
    content = cut.read_bytes()
    cut.unlink()
    for number in range(3):
        third = len(content) // 3 + 1
        (carried / f"{cut.name}.{number:02d}").write_bytes(content[number * third : (number + 1) * third])
    site = tmp_path / "work" / "site"
    refused = install_wheels(carried, site, said.append)
    assert len(refused) == 1
    assert "of_another_python" in refused[0]
    code = "import carried_whole, carried_in_pieces; print(carried_whole.VALUE + carried_in_pieces.VALUE)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment) == b"14\n"
    assert len(said) == 2
    install_wheels(carried, site, said.append)
    assert len(said) == 2  # nothing twice


def test_the_real_parts_have_names_of_their_own_and_scripts_that_are_there() -> None:
    from gpu_day import BOOK
    from gpu_parts.parts import PARTS

    assert BOOK == "gpu-day.json"
    assert len({item.name for item in PARTS}) == len(PARTS)
    for item in PARTS:
        module = item.command[item.command.index("-m") + 1] if "-m" in item.command else None
        script = f"benchmarks/{module.replace('.', '/')}.py" if module else item.command[1]
        assert (ROOT / script).is_file(), item.name
        assert item.seconds < 540


def test_the_look_at_a_machine_names_the_modules_it_lacks() -> None:
    from gpu_day import asked, environment

    found = asked(environment(ROOT / "absent"), "json", "no_such_module", "no_such.child")
    assert found == ["no_such_module", "no_such.child"]


def test_counts_of_tests_come_from_pytests_own_file(tmp_path: Path) -> None:
    from gpu_parts.gpu_tests import counted

    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="off"/></testcase>'
        '<testcase name="c"><skipped message="no FP8"/></testcase></testsuite></testsuites>'
    )
    found = counted(tmp_path / "r.xml")
    assert found == {"passed": 1, "failed": 1, "failures": ["b: off"], "skipped": {"no FP8": 1}}


def kernel_row(ours: float) -> dict[str, Any]:
    return {"sm": 90, "device": "Test GPU", "kind": "bridge", "case": f"c{ours}", "ours_us": ours,
            "best_other": "eager", "best_other_us": 12.0}  # fmt: skip


def day(status: str = "done") -> dict[str, Any]:
    engines = {
        "rows": [
            {
                "network": "n", "target": "h200", "builder": "tensorrt", "batch": 1, "precision": "int8", "tuned": None,
                "verdict": "accepted", "predicted": {"quantised_ms": 0.1, "fp16_ms": 0.15},
                "runners": [{"name": "FP16", "gpu_ms": {"p50": 0.2}}, {"name": "INT8", "gpu_ms": {"p50": 0.125}}],
            }
        ]
    }  # fmt: skip
    kernels = {"rows": [kernel_row(6.0), kernel_row(24.0), {"kind": "bridge", "refused": "wrong: off by 0.5"}]}
    facts = {"status": status, "reason": "", "seconds": 3.0, "tries": 1}
    return {
        "tensorrt-n": {**facts, "result": engines, "before": {"others": ["python (7)"]}},
        "kernels-bridge-int8": {**facts, "result": kernels, "after": {"held_down": ["its temperature"]}},
        "gpu-tests": {**facts, "result": {"passed": 3, "failed": 0, "failures": [], "skipped": {"no FP8": 2}}},
    }


def test_the_table_holds_predictions_beside_what_was_measured() -> None:
    from gpu_parts.table import markdown

    text = markdown(GPU, day(), [*day(), "trtexec-n"])
    assert "| tensorrt-n | int8 | 1 | 0.200 | 0.125 | 1.60 | 0.150 (-25%) | 0.100 (-20%) | 1.50 | accepted |" in text
    assert "| kernels-bridge-int8 | 2 | 1 | wrong: off by 0.5 |" in text
    assert "Tests marked gpu: 3 passed, 0 failed." in text
    assert "tensorrt-n: python (7) used the GPU too." in text
    assert "kernels-bridge-int8: the clock was held down by its temperature." in text
    assert "| trtexec-n | not tried yet | 0 | 0 |" in text


def test_what_came_back_fills_the_table_of_measured_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels
    import machine
    from gpu_day import main

    table = tmp_path / "measured.json"
    table.write_text("[]")
    monkeypatch.setattr(kernels.record, "__defaults__", (table,))
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    (tmp_path / "back.json").write_text(json.dumps({"machine": GPU, "parts": day()}))
    assert main(["--take", str(tmp_path / "back.json")]) == 0
    assert [row["ours_us"] for row in json.loads(table.read_text())] == [24.0, 6.0]
    assert "Test GPU, 580.1" in (tmp_path / "gpu-day.md").read_text()
    broken = day()
    broken["kernels-bridge-int8"]["result"] = {"rows": [{"best_other_us": 1}]}
    (tmp_path / "back.json").write_text(json.dumps({"parts": broken}))
    assert main(["--take", str(tmp_path / "back.json")]) == 3


@pytest.mark.slow
@pytest.mark.whole
def test_engines_are_built_and_timed_by_our_own_commands(tmp_path: Path) -> None:
    """On the processor, whose times are real, in place of a GPU."""
    from gpu_day import environment

    command = [sys.executable, "-m", "gpu_parts.engines", "--network", "resvit:embed-nano", "--target", "cpu"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "r.json"), "--seconds", "0.5", "--batch", "1"]
    assert subprocess.run(command, env=environment(tmp_path / "site"), check=False).returncode == 0
    (row,) = json.loads((tmp_path / "r.json").read_bytes())["rows"]
    assert [runner["name"] for runner in row["runners"]] == ["FP32", "INT8"]
    assert (row["builder"], row["precision"], row["predicted"]) == ("onnxruntime", "int8", None)
    trtexec = tmp_path / "trtexec"
    trtexec.write_text(
        "#!/bin/sh\n[ -f \"${1#--onnx=}\" ] && echo '[I] GPU Compute Time: min = 0.1 ms, median = 0.25 ms, max = 1 ms'"
    )
    trtexec.chmod(0o755)
    command[command.index("cpu")] = "jetson-orin"
    assert (
        subprocess.run(
            [*command, "--trtexec", str(trtexec)], env=environment(tmp_path / "site"), check=False
        ).returncode
        == 0
    )
    (row,) = json.loads((tmp_path / "r.json").read_bytes())["rows"]
    assert [(runner["name"], runner["gpu_ms"]["p50"]) for runner in row["runners"]] == [("FP16", 0.25), ("INT8", 0.25)]
    assert row["predicted"]["fp16_ms"] > 0
    command[command.index("jetson-orin")] = "h200"
    assert (
        subprocess.run([*command, "--builder", "rtx"], env=environment(tmp_path / "site"), check=False).returncode == 0
    )
    assert "it serves compute capability" in json.loads((tmp_path / "r.json").read_bytes())["impossible"]
