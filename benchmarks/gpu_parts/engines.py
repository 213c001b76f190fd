"""Engines of one network, built and timed by this project's own commands: each precision, at each batch.

    python -m gpu_parts.engines --network resvit:embed-nano --builder tensorrt --work runs/gpu-work --out result.json

Builds for this machine's GPU (``--target`` names another target). What a killed call has built is not built again. Each
row holds the median of the network in FP16 and quantised, as ``bench`` has it, and what was predicted of both. With
``--tune`` the placement is tuned by timing first. With ``--trtexec`` the validated ONNX files are built and timed by
TensorRT's own program, where its Python package is missing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from gpu_parts.schedule import IMPOSSIBLE_KEY
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import write_atomic
from resvit_engines.targets.own import Software, resolve_target
from resvit_engines.targets.table import Builder, Precision

ASSETS = Path(__file__).parents[2] / "tests" / "assets"
_RUNTIMES = {Builder.RTX: "rtx", Builder.TENSORRT: "tensorrt", Builder.ONNXRUNTIME: "onnxruntime"}
_JUDGED = (ExitCode.OK, ExitCode.REJECTED, ExitCode.UNDECIDED, ExitCode.NOT_FASTER)
"""The engine is there: what the gate thinks of few images, or of random weights, is not the question here."""
_COMPUTE = re.compile(r"GPU Compute Time: .*?median = ([0-9.]+) ms")


class NotHereError(Exception):
    """This machine cannot do what was asked for; the message is a sentence."""


def run(arguments: list[str]) -> dict[str, Any]:
    """What one of our commands prints as JSON; what it says besides goes to the log."""
    command = [sys.executable, "-m", "resvit_export", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode in (ExitCode.IMPOSSIBLE, ExitCode.MISSING):
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise NotHereError(" ".join(lines[-2:])[-400:] or f"exit code {done.returncode}")
    if done.returncode not in _JUDGED:
        raise SystemExit(f"{' '.join(arguments[:1])} ended with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def built(network: str, where: list[str], precision: str, batch: int, tune: bool, folder: Path) -> dict[str, Any]:
    """Build one engine in ``folder``; stages that the engines before it share are not done again."""
    options = ["--model", network, *where, "--precision", precision, "--batch", str(batch), "--run", str(folder)]
    options += ["--data", "fashion-mnist", "--calibration-images", "64", "--validation-images", "256", "--no-search"]
    options += ["--recover", "never", "--allow-rejected", "--even-if-slower", *(["--tune", "quick"] if tune else [])]
    if network.startswith("resvit:"):
        options += ["--checkpoint", str(ASSETS / f"{network.partition(':')[2]}.pt")]
    else:
        options += ["--task", "other"]  # its weights are random, and its classes are none of the images'
    return run(["build", *options])


def predicted(folder: Path, model_record: dict[str, Any]) -> dict[str, float] | None:
    """The ms that were predicted of the network quantised and in FP16; None where nothing predicts for the target."""
    stage = next((stage for stage in model_record["stages"] if stage["stage"] == "predict"), None)
    costs = Path(stage["folder"]) / "costs.json" if stage else folder / "absent"
    if not costs.is_file():
        return None
    found = json.loads(costs.read_bytes())
    return {"quantised_ms": found["chosen"]["ms"], "fp16_ms": found["fp16"]["ms"]}


def timed_by_bench(folder: Path, runtime: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Both forms of the run, timed in turns: medians of the GPU's own time, or of the whole call without one."""
    measured = run(
        ["bench", "--run", str(folder), "--runtime", runtime, "--batch", str(batch), "--seconds", str(seconds)]
    )
    keys = ("name", "label", "gpu_ms", "latency_ms", "faster", "verdict", "remarks", "conditions")
    return [{key: row[key] for key in keys} for row in measured["runners"]]


def timed_by_trtexec(trtexec: str, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """The same networks as ONNX files, built and timed by ``trtexec``; its own median of the GPU's time."""
    from resvit_engines.progress import reporter
    from resvit_export.pipeline import Pipeline
    from resvit_export.recipe.file import recipe_from_toml
    from resvit_export.run import runs_for
    from resvit_export.run_folder import RunFolder
    from resvit_export.tools.bench import finished, subjects_of

    report = reporter(quiet=True)
    run_folder = RunFolder(folder, report)
    with run_folder.locked():
        found = runs_for(recipe_from_toml(folder / "recipe.toml"), run_folder, report)
        subjects = subjects_of(finished(Pipeline(found[0])))
    rows = []
    for subject in subjects:
        command = [trtexec, f"--onnx={subject.model.path}", "--stronglyTyped", "--useCudaGraph", "--noDataTransfers"]
        done = subprocess.run([*command, f"--duration={seconds:g}"], capture_output=True, text=True, check=False)
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-4000:])
        median = _COMPUTE.search(done.stdout)
        if done.returncode or median is None:
            raise SystemExit(f"trtexec ended with exit code {done.returncode} and named no time for {subject.name}")
        rows.append({"name": subject.name, "label": "trtexec", "gpu_ms": {"p50": float(median[1])}, "faster": None})
    return rows


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--network", required=True)
@click.option("--builder", type=click.Choice(["rtx", "tensorrt"]), help="[what serves the target best]")
@click.option("--target", "target_name", default="auto", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("int8", "fp8"), show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 32), show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="To time one network.")
@click.option("--tune", is_flag=True)
@click.option("--trtexec", help="The program that builds and times.")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    *, network: str, builder: str | None, target_name: str, precisions: tuple[str, ...], batches: tuple[int, ...],
    seconds: float, tune: bool, trtexec: str | None, work: Path, out: Path,
) -> None:  # fmt: skip
    """Build and time, and write the rows."""
    try:
        target = resolve_target(target_name, Software(builder=Builder(builder) if builder else None))
        where = ["--target", target_name, *(["--builder", builder] if builder else [])]
        rows = []
        name = network.rpartition(":")[2]
        folder = work / "-".join([name, target.name, "trtexec" if trtexec else target.builder.value, *["tuned"] * tune])
        for precision in precisions:
            if Precision(precision) not in target.precisions:
                continue
            for batch in batches:
                record = built(network, where, precision, batch, tune, folder)
                row = {"network": network, "target": target.name, "builder": target.builder.value, "batch": batch,
                       "precision": precision, "verdict": record["verdict"], "tuned": record["tuned"],
                       "predicted": predicted(folder, record)}  # fmt: skip
                times = (
                    timed_by_trtexec(trtexec, folder, seconds)
                    if trtexec
                    else timed_by_bench(folder, _RUNTIMES[target.builder], batch, seconds)
                )
                rows.append({**row, "runners": times})
        found: dict[str, Any] = {"rows": rows}
    except (NotHereError, ResvitError) as error:
        if isinstance(error, ResvitError) and error.code not in (ExitCode.IMPOSSIBLE, ExitCode.MISSING):
            raise SystemExit(f"{error.problem} {error.fix}") from error
        found = {IMPOSSIBLE_KEY: str(error).replace("\n", " ")}
    write_atomic(out, json.dumps(found).encode())


if __name__ == "__main__":
    main()
