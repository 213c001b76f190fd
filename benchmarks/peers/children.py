"""Processes that do one thing and tell it in a file: quantise once, or score one graph.

Each quantiser has a process of its own, so that seconds and peak memory are its own and a crash is a row of the table.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from peers import coarsen
from peers.coverage import coverage
from peers.images import StoredImages
from peers.lines import compare_lines
from peers.methods import BY_NAME, INT8, Job, Work
from resvit_calibrate.answers.classes import Predictions, compare
from resvit_calibrate.runtime.runner import checked_runner, onnx_runner
from resvit_calibrate.tasks.classification import Classification
from resvit_engines.errors import ResvitError
from resvit_engines.files import write_atomic
from resvit_engines.process import peak_memory_mib

MADE, SCORED = "made.json", "scored.json"


@dataclasses.dataclass(frozen=True)
class Task:
    """What a child is told. ``made_bits`` is what the quantiser makes, ``bits`` what is scored."""

    method: str
    precision: str
    bits: int
    made_bits: int
    model: str
    source: str
    checkpoint: str | None
    calibration: str
    test: str
    reference: str
    batch: int
    folder: str
    lines: bool = False
    """Whether lines of text are compared, and not classes."""

    def job(self) -> Job:
        """The quantiser's part."""
        return Job(
            model=Path(self.model),
            source=self.source,
            checkpoint=Path(self.checkpoint) if self.checkpoint else None,
            calibration=StoredImages(Path(self.calibration)),
            batch=self.batch,
            precision=self.precision,
            bits=self.made_bits,
            out=Path(self.folder) / "model.onnx",
        )


def missing(method: str) -> list[str]:
    """Packages that the method needs and that are not installed."""
    lacking = []
    for package in BY_NAME[method].packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            lacking.append(package)
    return lacking


def run_child(what: str, task: Task, limit: float) -> dict[str, Any]:
    """Do ``what`` ("make" or "score") in a process of its own; ``{"failed": reason}`` where it ends badly."""
    out = Path(task.folder) / (MADE if what == "make" else f"{task.bits}-{SCORED}")
    out.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "peers.children", what, str(out), json.dumps(dataclasses.asdict(task))]
    log = out.with_suffix(".log")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH")]))}
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    with log.open("wb") as stream:
        try:
            done = subprocess.run(
                command, check=False, stdout=stream, stderr=subprocess.STDOUT, timeout=limit, env=environment
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"ended after {limit:.0f} s"}
    if out.is_file():
        result: dict[str, Any] = json.loads(out.read_bytes())
        return result
    killed = {-9: " (killed: out of memory?)", -11: " (segmentation fault)"}.get(done.returncode, "")
    return {"failed": f"exit status {done.returncode}{killed}"}


def make(task: Task) -> dict[str, Any]:
    """Quantise; seconds without imports, memory with them (and theirs alone beside it)."""
    method = BY_NAME[task.method]
    module = importlib.import_module(f"peers.{method.module}")
    work: Work = module.work(task.job(), method.settings)
    imports = peak_memory_mib()
    start, cpu = time.perf_counter(), time.process_time()
    work.run()
    made: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mib": peak_memory_mib(),
        "imports_mib": imports,
        "notes": work.notes(),
    }
    if work.answers is not None:
        logits, share, left = work.answers(StoredImages(Path(task.test)))
        np.save(Path(task.folder) / "logits.npy", logits)
        # Its default configurations leave the products inside attention alone.
        made |= {"macs_share": share, "attention_share": 0.0, "left": left}
    return made


def score(task: Task) -> dict[str, Any]:
    """Answer the test images with the quantised graph and compare with the float answers."""
    folder, test = Path(task.folder), StoredImages(Path(task.test))
    notes: list[str] = []
    if (folder / "logits.npy").is_file():
        reference = Predictions.load(Path(task.reference).read_bytes(), task.reference)
        made = json.loads((folder / MADE).read_bytes())
        logits = np.load(folder / "logits.npy").astype(np.float32)
        share, attention, left = made["macs_share"], made["attention_share"], made["left"]
        compared = compare(reference, Predictions(logits, reference.labels)).to_json()
    else:
        graph = folder / "model.onnx"
        covered = coverage(Path(task.model), graph)
        share, attention, left = covered.share, covered.attention, list(covered.left)
        if task.bits != task.made_bits and task.precision == INT8:
            coarse = folder / f"coarse-{task.bits}.onnx"
            notes += coarsen.coarsen(graph, Path(task.model), coarse, task.bits)
            graph = coarse
        runner, remark = checked_runner(graph, {"input": next(test.batches(8)).images})
        notes += [remark] * bool(remark)
        if task.lines:
            compared = compare_lines(onnx_runner(Path(task.model)), runner, test, Path(task.test), task.batch)
        else:
            reference = Predictions.load(Path(task.reference).read_bytes(), task.reference)
            compared = compare(reference, Classification({}).answers(runner, test, task.batch)).to_json()
    shares = {"macs_share": share, "attention_share": attention}
    return {**compared, **shares, "left": left, "notes": notes}


def reference_into(model: Path, test: StoredImages, batch: int, out: Path) -> Predictions:
    """The float graph's answers, by the runner that scores all others."""
    answers = Classification({}).answers(onnx_runner(model), test, batch)
    answers.save(out)
    return answers


def main() -> None:
    """Run one child: what to do, where to write, and the task as JSON."""
    what, out, told = sys.argv[1:]
    task = Task(**json.loads(told))
    try:
        result = make(task) if what == "make" else score(task)
    except ResvitError as error:
        result = {"failed": error.problem}
    except Exception as error:  # noqa: BLE001  whatever a foreign quantiser raises is the row's reason
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result = {"failed": f"{type(error).__name__}: {lines[0][:300]}"}
    write_atomic(Path(out), json.dumps(result).encode())


_HERE = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":
    main()
