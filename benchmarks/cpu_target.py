"""INT8 against FP32 on this machine's processor, and against three other quantisers: latency and agreement in one run.

    python benchmarks/cpu_target.py
    python benchmarks/cpu_target.py --only resvit:embed-nano --rounds 40

Every row of a network starts from one float ONNX (opset as exported, batch 1) and the same calibration images. FP32
and ours are the engines that ``--target cpu`` builds. ONNX Runtime's are what ``quantize_static`` writes: U8S8 and
S8S8 with Q/DQ and weights per channel, min-max ranges, with and without attention's products. NNCF's are for
transformers, with fast bias correction. ModelOpt's are by its ONNX quantiser, everything or weighted layers alone,
the rest in FP32. Peers' files are opened with ONNX Runtime's usual options. All sessions are open at once and timed
in turns, in rounds whose order turns; a ratio is the median over rounds of FP32 over the row, with a bootstrap
interval of 95%. With one thread the CPU time of the calling thread is reported too: what others do on the machine
does not count in it. Agreement is the share of test images with the answer of the float graph (the class, or the text
of a line), SQNR that of the logits, by the very sessions that are timed. What the networks know of the images,
``cpu_networks.py`` says.

Prints Markdown and keeps it in ``results/cpu-target.md`` and ``.json``.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from cpu_networks import HYBRIDS, KNOWS, NETWORKS, Images, decisions, exported, image_sets
from machine import RESULTS, write_result
from peers.images import StoredImages, store_array

from resvit_engines.bench.compare import paired_ratio
from resvit_engines.errors import ResvitError
from resvit_engines.machine import this_machine
from resvit_engines.ort.sessions import engine_options, load_onnxruntime, open_session, optimised_onnx

FLOAT, OURS = "FP32", "resvit INT8"
PEERS = {
    "nncf": "NNCF",
    "modelopt-cpu-max": "ModelOpt ONNX, max",
    "modelopt-cpu-weighted-max": "ModelOpt ONNX, Conv/MatMul/Gemm without attention, max",
}
_LIMIT = 900.0
"""Seconds after which a peer is ended."""


@dataclass(frozen=True)
class Row:
    """One quantiser at one number of threads: ms a call (median over rounds), times as fast as FP32, and fidelity."""

    network: str
    method: str
    threads: int
    wall_ms: float
    faster: float
    low: float
    high: float
    cpu_faster: float | None
    agreement: float | None
    sqnr_db: float | None
    note: str = ""


def ours(model: Path, calibration: StoredImages, out: Path) -> None:
    """By the calls that the pipeline makes for ``--target cpu``, with the check on held-back images."""
    from resvit_calibrate.images.held_back import held_apart
    from resvit_calibrate.ranges.collect import collect_statistics
    from resvit_calibrate.ranges.ranges import ranges_from
    from resvit_engines.targets.table import Precision
    from resvit_quantize.check.choose import held_back_of
    from resvit_quantize.quantize import quantize_model
    from resvit_quantize.settings import QuantizeSettings, Rules

    apart = held_apart(calibration)
    statistics = collect_statistics(model, apart.ranges.batches(1))
    settings = QuantizeSettings(Precision.INT8, rules=Rules.ONNXRUNTIME)
    ranges = ranges_from(statistics, "benchmark")
    quantize_model(model, ranges, settings, out, statistics=statistics, held_back=held_back_of(apart, 1))


def by_onnxruntime(model: Path, calibration: Images, out: Path, *, unsigned: bool, attention: bool) -> None:
    """ONNX Runtime's static quantiser, after its own pre-processing."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from peers.ort import unweighted

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = ({"input": calibration[i : i + 1]} for i in range(len(calibration)))

        def get_next(self) -> dict[str, Images] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        prepared = Path(scratch) / "prepared.onnx"
        try:
            quant_pre_process(str(model), str(prepared))
        except Exception:  # noqa: BLE001  what its own message advises where shape inference does not come through
            quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=None if attention else unweighted(prepared),
        )


@dataclass(frozen=True)
class Subject:
    """A file to be timed; ``note`` says in its place why there is none."""

    method: str
    file: Path
    note: str = ""


def subjects(model: Path, calibration: Images, folder: Path, *, signed: bool) -> Iterator[Subject]:
    """The float engine, ours, and what the peers make; ``signed`` asks for ONNX Runtime's signed activations too."""
    optimised_onnx(model, folder / "float.plan")
    yield Subject(FLOAT, folder / "float.plan")
    ours(model, store_array(calibration, folder / "calibration"), folder / "ours.onnx")
    optimised_onnx(folder / "ours.onnx", folder / "ours.plan")
    yield Subject(OURS, folder / "ours.plan")
    for unsigned in (True, False) if signed else (True,):
        for attention in (True, False):
            kind = "U8S8" if unsigned else "S8S8"
            method = f"ONNX Runtime {kind}" + ("" if attention else ", without attention")
            file = folder / f"{kind}-{attention}.onnx"
            try:
                by_onnxruntime(model, calibration, file, unsigned=unsigned, attention=attention)
            except Exception as error:  # noqa: BLE001  a peer that fails is a row
                yield Subject(method, file, str(error).splitlines()[0][:120])
                continue
            yield Subject(method, file)
    yield from by_peers(model, folder)


def by_peers(model: Path, folder: Path) -> Iterator[Subject]:
    """What NNCF and ModelOpt make of the images in ``folder``'s ``calibration``, each in a process of its own."""
    from peers.children import Task, missing, run_child

    for name, title in PEERS.items():
        out = folder / name
        if lacking := missing(name):
            yield Subject(title, out, f"not installed: {', '.join(lacking)}")
            continue
        paths = [str(path) for path in (folder / "calibration", folder / "calibration", folder / "none")]
        task = Task(name, "int8", 8, 8, str(model), "", None, *paths, batch=1, folder=str(out))
        made = run_child("make", task, _LIMIT)
        yield Subject(title, out / "model.onnx", made.get("failed", "")[:160])


def answers(session: Any, images: Images) -> Images:
    """The first output, [N, K] or [N, T, K], an image at a time: the graphs' batch is 1."""
    return np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])


def timed(sessions: dict[str, Any], image: Images, rounds: int, seconds: float) -> dict[str, tuple[list[float], ...]]:
    """Wall and CPU ms of one call by session, each the median of its share of a round, ``rounds`` of each."""
    feed = {"input": image}
    calls = {}
    for name, session in sessions.items():
        session.run(None, feed)
        begin = time.thread_time()
        for _ in range(2):
            session.run(None, feed)
        calls[name] = max(1, int(seconds / max((time.thread_time() - begin) / 2, 1e-5)))
    taken: dict[str, tuple[list[float], ...]] = {name: ([], []) for name in sessions}
    names = list(sessions)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            session, wall, cpu = sessions[name], [], []
            session.run(None, feed)
            for _ in range(calls[name]):
                begin, spent = time.perf_counter(), time.thread_time()
                session.run(None, feed)
                wall.append((time.perf_counter() - begin) * 1e3)
                cpu.append((time.thread_time() - spent) * 1e3)
            taken[name][0].append(float(np.median(wall)))
            taken[name][1].append(float(np.median(cpu)))
    return taken


def usual(ort: Any, threads: int) -> Any:
    """Options of a session as ONNX Runtime has them: the peers' files were made for those."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def rows_of(network: str, runs: Path, rounds: int, seconds: float, calibration: int, test: int) -> list[Row]:
    """Every row of one network, at one and two threads."""
    ort, model = load_onnxruntime(), exported(network, runs)
    if network not in HYBRIDS:  # ten to a hundred times the work
        calibration, test = min(calibration, 64 if network in KNOWS else 16), min(test, 200)
    first, second = image_sets(network, model, calibration, test)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        # Signed activations have no 8-bit convolutions here, which the small networks show.
        made = list(subjects(model, first, Path(scratch), signed=network in HYBRIDS))
        known: dict[str, tuple[float, float]] = {}
        for threads in (1, 2):
            sessions = {}
            for item in list(made):
                if item.note:
                    continue
                try:
                    options = engine_options(ort, threads) if item.method in (FLOAT, OURS) else usual(ort, threads)
                    sessions[item.method] = open_session(ort, str(item.file), options, item.file.name)
                except ResvitError as error:
                    made[made.index(item)] = replace(item, note=f"does not open: {error.problem[:160]}")
            if threads == 1:
                expected = answers(sessions[FLOAT], second)
                for name, session in sessions.items():
                    found = answers(session, second)
                    noise = max(float(np.linalg.norm(found - expected)), 1e-12)
                    pairs = zip(decisions(found), decisions(expected), strict=True)
                    same = float(np.mean([ours == theirs for ours, theirs in pairs]))
                    known[name] = same, min(120.0, 20 * float(np.log10(np.linalg.norm(expected) / noise)))
            taken = timed(sessions, second[:1], rounds, seconds)
            for item in made:
                if item.note:
                    rows.append(Row(network, item.method, threads, 0, 0, 0, 0, None, None, None, item.note))
                    continue
                wall, cpu = taken[item.method]
                ratio = paired_ratio(taken[FLOAT][0], wall)
                by_cpu = float(np.median(taken[FLOAT][1]) / np.median(cpu)) if threads == 1 else None
                same_sqnr = known.get(item.method, (None, None))
                median = float(np.median(wall))
                rows.append(
                    Row(network, item.method, threads, median, ratio.value, ratio.low, ratio.high, by_cpu, *same_sqnr)
                )
    return rows


def markdown(rows: list[Row], facts: dict[str, Any]) -> str:
    """The table, and what it was measured on."""
    lines = [
        "# The processor as a target",
        "",
        f"{facts['processor']}, {facts['cores']} cores, ONNX Runtime {facts['onnxruntime']}; {facts['rounds']} rounds, "
        f"in turns; batch 1. Load of the machine while it was measured (1 minute): {facts['load']}.",
        "",
        "Agreement means accuracy where a network was trained for the images it sees, else fidelity alone: "
        + "; ".join(f"{name}: {KNOWS.get(name, 'random weights')}" for name in dict.fromkeys(r.network for r in rows))
        + ".",
        "",
        "| network | quantiser | threads | ms | times as fast as FP32 | by CPU time | agreement | SQNR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.note:
            lines.append(f"| {row.network} | {row.method} | {row.threads} | {row.note} | | | | |")
            continue
        faster = "" if row.method == FLOAT else f"{row.faster:.2f} [{row.low:.2f}, {row.high:.2f}]"
        cpu = f"{row.cpu_faster:.2f}" if row.cpu_faster is not None and row.method != FLOAT else ""
        same = "" if row.agreement is None or row.method == FLOAT else f"{row.agreement:.2%}"
        sqnr = "" if row.sqnr_db is None or row.method == FLOAT else f"{row.sqnr_db:.1f} dB"
        lines.append(
            f"| {row.network} | {row.method} | {row.threads} | {row.wall_ms:.3f} | {faster} | {cpu} | {same} | {sqnr} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--only", multiple=True, help="These networks alone; rows of the others stay as they were.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs/cpu-target"), show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--seconds", default=0.05, show_default=True, help="CPU time of one share of a round.")
@click.option("--calibration-images", default=128, show_default=True)
@click.option("--images", default=1000, show_default=True)
def main(only: tuple[str, ...], runs: Path, rounds: int, seconds: float, calibration_images: int, images: int) -> None:
    """Measure and write ``results/cpu-target.md``."""
    import os

    chosen, kept = only or NETWORKS, RESULTS / "cpu-target.json"
    former = json.loads(kept.read_text())["rows"] if kept.is_file() else []
    rows = {(row["network"], row["method"], row["threads"]): Row(**row) for row in former}
    machine = this_machine()
    for network in chosen:
        click.echo(network, err=True)
        for row in rows_of(network, runs, rounds, seconds, calibration_images, images):
            rows[row.network, row.method, row.threads] = row
        ordered = [row for name in NETWORKS for row in rows.values() if row.network == name]
        facts = {
            "processor": machine.processor,
            "cores": len(os.sched_getaffinity(0)),
            "onnxruntime": machine.onnxruntime,
            "rounds": rounds,
            "load": f"{os.getloadavg()[0]:.1f}",
        }
        write_result("cpu-target", {**facts, "rows": [asdict(row) for row in ordered]})
        (RESULTS / "cpu-target.md").write_text(markdown(ordered, facts))
    click.echo((RESULTS / "cpu-target.md").read_text())


if __name__ == "__main__":
    main()
