"""Ours and every public quantiser on the same float ONNX, the same calibration images and the same test images.

    python benchmarks/quantizers.py --model resvit:embed-nano
    python benchmarks/quantizers.py --model elpv --bits 8
    python benchmarks/quantizers.py --model timm:vit_small_r26_s32_224 --weights perturbed --images 128
    python benchmarks/quantizers.py --model rec.onnx --data runs/lines/train-lines.npz ...

Prints Markdown tables and keeps them in ``results/quantizers-MODEL.json`` and ``.md``. Each quantiser runs in a
process of its own; one that fails or is not installed (``benchmarks/requirements.txt``) is a row with its reason. All
graphs are scored by ONNX Runtime on the CPU with Q/DQ unfused. A row that stands in the result with the same inputs is
not computed again unless ``--again``.

Fewer than 8 bits are simulated: ours is asked for them, ModelOpt's fake quantisers in PyTorch are set to them, and the
8-bit graphs of the others are coarsened (``peers/coarsen.py``). "resvit, ranges for 8 bits" is ours, coarsened alike.
Networks with random or perturbed weights show fidelity alone: agreement and SQNR there are not accuracy.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from machine import RESULTS, write_result
from peers.cases import PERTURBED, RANDOM, Case, Wish, case_from
from peers.children import Task, missing, reference_into, run_child
from peers.methods import COMPARED, INT8, Method, rows_of
from peers.table import goals, markdown, notes

from resvit_engines.errors import ResvitError
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file
from resvit_engines.progress import reporter

HERE = Path(__file__).resolve().parent
RUN = uuid.uuid4().hex
"""A failure is not tried again at every number of bits, but is in the next run."""
SHARED = ("children.py", "coarsen.py", "coverage.py", "images.py", "lines.py")


def task_of(case: Case, method: Method, precision: str, bits: int, folder: Path, batch: int) -> Task:
    """What the children are told; rows whose graph is the same share its folder."""
    native = method.native_bits
    made = bits if native and precision == INT8 else 8
    return Task(
        method=method.name,
        precision=precision,
        bits=bits,
        made_bits=made,
        model=str(case.model),
        source=case.source,
        checkpoint=str(case.checkpoint.resolve()) if case.checkpoint else None,
        calibration=str(folder / "calibration"),
        test=str(folder / "test"),
        reference=str(folder / "float.npz"),
        batch=batch,
        folder=str(folder / f"{method.name}-{precision}-{made}"),
        lines=case.lines,
    )


def digests(case: Case, method: Method, task: Task) -> tuple[str, str]:
    """Everything that decides (the quantised graph, its row): inputs, settings, versions and sources."""
    sources = [HERE / "peers" / f"{method.module}.py"]
    if method.module == "ours":
        wings = [HERE.parent / wing for wing in ("quantize/resvit_quantize", "calibrate/resvit_calibrate")]
        sources += sorted(path for wing in wings for path in wing.rglob("*.py"))
    made = {
        "method": method.name,
        "settings": dict(method.settings),
        "precision": task.precision,
        "bits": task.made_bits,
        "batch": task.batch,
        "model": case.digest,
        "calibration": case.calibration.digest,
        "versions": versions(method),
        "sources": [sha256_file(path) for path in sources],
    }
    first = sha256_bytes(canonical_json(made))
    scored = [sha256_file(HERE / "peers" / name) for name in SHARED]
    row = {"made": first, "bits": task.bits, "test": case.test.digest, "images": len(case.test), "sources": scored}
    return first, sha256_bytes(canonical_json(row))


def versions(method: Method) -> dict[str, str]:
    """The installed versions of what the method needs."""
    return {package: metadata.version(package) for package in method.packages if package not in missing(method.name)}


def computed_row(task: Task, method: Method, keys: tuple[str, str], limit: float, again: bool) -> dict[str, Any]:
    """Quantise (unless the graph of these inputs is there, or has failed in this very run) and score."""
    row: dict[str, Any] = {
        "name": method.name,
        "label": method.label,
        "precision": task.precision,
        "bits": task.bits,
        "natively": task.bits == task.made_bits,
        "settings": dict(method.settings),
        "versions": versions(method),
        "digest": keys[1],
    }
    if lacking := missing(method.name):
        return {**row, "status": "not installed", "reason": f"pip install {' '.join(lacking)}"}
    record = Path(task.folder) / "record.json"
    made = json.loads(record.read_bytes()) if record.is_file() and not again else {}
    if "failed" in made and made.get("run") != RUN:
        made = {}
    if made.get("digest") != keys[0]:
        for stale in ("model.onnx", "logits.npy"):
            (Path(task.folder) / stale).unlink(missing_ok=True)
        made = {**run_child("make", task, limit), "digest": keys[0], "run": RUN}
        record.write_text(json.dumps(made))
    if "failed" in made:
        return {**row, "status": "failed", "reason": made["failed"]}
    scored = run_child("score", task, limit)
    if "failed" in scored:
        return {**row, "status": "failed", "reason": f"made, but not scored: {scored['failed']}"}
    cost = {name: made[name] for name in ("seconds", "cpu_seconds", "peak_mib", "imports_mib")}
    return {**row, "status": "ok", **cost, **scored, "notes": made["notes"] + scored["notes"]}


def finished_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier result by digest; failed and missing ones are tried again."""
    try:
        rows = json.loads(path.read_bytes())["rows"]
    except (OSError, ValueError, KeyError):
        return {}
    return {row["digest"]: row for row in rows if row["status"] == "ok"}


def still_valid(
    case: Case, folder: Path, order: list[tuple[Method, str, int]], known: dict[str, dict[str, Any]], batch: int
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Rows of an earlier result whose inputs have not changed, whether this run asks for them or not."""
    found = {}
    for method, precision, bits in order:
        row = known.get(digests(case, method, task_of(case, method, precision, bits, folder, batch))[1])
        if row:
            found[method.name, precision, bits] = row
    return found


def compute(
    case: Case, folder: Path, plan: list[tuple[Method, str, int]], known: dict[str, dict[str, Any]], **how: Any
) -> Iterator[dict[str, Any]]:
    """Every row of the plan, from ``known`` where its inputs are the same."""
    for method, precision, bits in plan:
        task = task_of(case, method, precision, bits, folder, how["batch"])
        try:
            keys = digests(case, method, task)
            row = known.get(keys[1]) if not how["again"] else None
            yield row or computed_row(task, method, keys, how["limit"], how["again"] and bits == task.made_bits)
        except ResvitError as error:
            yield {"name": method.name, "label": method.label, "precision": precision, "bits": bits, "digest": "",
                   "status": "failed", "reason": error.problem}  # fmt: skip


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option(
    "--model", default="resvit:embed-nano", show_default=True, help="resvit:NAME, elpv, elpv-mobile, timm:NAME, …"
)
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="[tests/assets/NAME.pt]")
@click.option("--data", help="As resvit-export takes it. [fashion-mnist; elpv's photographs for its hybrids and timm]")
@click.option("--test-data", help="Test images, where --data has no part for it.")
@click.option(
    "--export", multiple=True, help="A further option of `resvit-export export`, as OPTION=VALUE (ONNX files)."
)
@click.option("--texts", type=click.Path(path_type=Path, exists=True), help="JSON list of what the test lines say.")
@click.option("--characters", type=click.Path(path_type=Path, exists=True), help="The recogniser's, one to a line.")
@click.option("--weights", type=click.Choice([RANDOM, PERTURBED]), default=RANDOM, help="Without checkpoint (timm).")
@click.option("--only", multiple=True, type=click.Choice([method.name for method in COMPARED]), help="Only these rows.")
@click.option("--ablation", is_flag=True, help="Add ours with one accuracy method less at a time.")
@click.option("--bits", multiple=True, type=click.IntRange(3, 8), default=(8, 6, 5), show_default=True)
@click.option("--images", type=click.IntRange(1), help="Test images. [all]")
@click.option("--calibration-images", type=click.IntRange(1), default=512, show_default=True)
@click.option("--batch", type=click.IntRange(1), help="[32 for images of up to 128 pixels, else 8]")
@click.option("--limit", default=3600.0, show_default=True, help="Seconds after which a quantiser is ended.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/quantizers"), show_default=True)
@click.option("--again", is_flag=True, help="Compute every row anew.")
def main(
    model: str,
    checkpoint: Path | None,
    data: str | None,
    test_data: str | None,
    export: tuple[str, ...],
    texts: Path | None,
    characters: Path | None,
    weights: str,
    only: tuple[str, ...],
    ablation: bool,
    bits: tuple[int, ...],
    images: int | None,
    calibration_images: int,
    batch: int | None,
    limit: float,
    work: Path,
    again: bool,
) -> None:
    """Compare the quantisers."""
    options = tuple(part for option in export for part in (f"--{option.partition('=')[0]}", option.partition("=")[2]))
    wish = Wish(model, checkpoint, data, weights, calibration_images, images, test_data, options, texts, characters)
    folder = (work / wish.label).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        case = case_from(wish, folder, reporter(quiet=True))
        batch = batch or (32 if max(case.test.shape[2:]) <= 128 else 8)
        top1 = None if case.lines else float_top1(case, batch, folder)
    except ResvitError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(int(error.code)) from None
    name = f"quantizers-{wish.label}"
    known = finished_rows(RESULTS / f"{name}.json")
    plan = rows_of(only, bits, ablation)
    order = rows_of((), (8, 7, 6, 5, 4, 3), ablation=True)
    rows = still_valid(case, folder, order, known, batch)
    facts = {
        **case.facts(),
        "batch": batch,
        "float_top1": round(top1, 6) if top1 is not None and case.accurate else None,
    }
    for row in compute(case, folder, plan, known, batch=batch, limit=limit, again=again):
        rows[row["name"], row["precision"], row["bits"]] = row
        if case.lines and case.accurate and row["status"] == "ok":
            facts["float_top1"] = round(row["reference_top1"], 6)
        click.echo(f"{row['name']} {row['precision']} {row['bits']}: {row['status']} {row.get('reason', '')}", err=True)
        ordered = [rows[key] for m, *rest in order if (key := (m.name, *rest)) in rows]
        path = write_result(name, {**facts, "goals": goals(ordered), "rows": ordered})
    text = document(case, facts, ordered)
    path.with_suffix(".md").write_text(text)
    click.echo(text)


def float_top1(case: Case, batch: int, folder: Path) -> float:
    """The float network's accuracy, 0 to 1; its answers are kept for the rows."""
    reference = reference_into(case.model, case.test, batch, folder / "float.npz")
    return float((reference.answers == reference.labels).mean())


def document(case: Case, facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The tables with what is needed to read them."""
    top1 = f"Float top-1 {100 * facts['float_top1']:.2f}%. " if facts["float_top1"] is not None else ""
    top1 += "A line that is read counts as one answer: right where every character is. " if case.lines else ""
    warning = "" if case.accurate else f"Weights are {case.weights}: this is fidelity, not accuracy. "
    return (
        f"# {case.name}\n\n{top1}{warning}{facts['calibration']['images']} calibration images "
        f"({facts['calibration']['what']}), {facts['test']['images']} test images ({facts['test']['what']}).\n\n"
        f"{markdown(rows, accurate=case.accurate)}\n\n{notes(rows)}\n"
    )


if __name__ == "__main__":
    main()
