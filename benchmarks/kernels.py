"""Kernels of our own beside PyTorch's, at every shape of the reference hybrids.

    python benchmarks/kernels.py                       # on a machine with a GPU
    python benchmarks/kernels.py --record              # and keep it for --plugins auto
    python benchmarks/kernels.py --static              # what the compiled code tells, on any machine

On a GPU: our PTX, launched through the driver, beside scaled_dot_product_attention in each backend (with the
transposes and conversions around it that it needs), beside plain PyTorch and torch.compile of the same subgraph, and
beside the floor: bytes over the bandwidth of a large copy, operations over the rate of a large matrix product, both
measured first. Medians over CUDA graphs of 20 launches, inputs cold (copies larger than the cache take turns).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from kernel_peers.cases import BATCHES, DTYPES, Case, all_cases
from kernel_peers.table import measured_table, static_table
from machine import RESULTS, write_result

from resvit_engines.errors import ResvitError
from resvit_engines.kernels.compile.compile import kernel_from_source
from resvit_engines.kernels.compile.resources import inspection
from resvit_engines.kernels.measure.results import RESULTS as MEASURED
from resvit_engines.kernels.measure.results import case_of
from resvit_engines.targets.table import TARGETS, Precision, Target, find_target

KINDS = ("attention", "bridge", "deformable")
LARGEST_ERROR = {"fp16": 0.02, "int8": 0.03, "fp8": 0.06}
"""Between ours and PyTorch's, as a share of the norm; both round. What is further off is not timed."""
STATIC_TARGETS = ("jetson-orin", "h100", "jetson-thor", "rtx-5090")


def floor_us(case: Case, bandwidth: float, peak: float | None) -> float:
    """The least time in microseconds: of moving the bytes (GB/s), or of the tensor cores' work (TFLOPS, TOPS)."""
    moving = case.bytes / bandwidth / 1e3
    return max(moving, case.operations / peak / 1e6) if peak else moving


def static_rows(cases: Sequence[Case], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """What each case's compiled code comes to on each target, and the floor by the target's data sheet."""
    seen: dict[tuple[str, int], Any] = {}
    rows = []
    for target in targets:
        for case in cases:
            row = {"target": target.name, "sm": target.sm, **described(case)}
            try:
                source = case.source(target.sm)
                key = (repr(source), target.sm)
                if key not in seen:
                    kernel = kernel_from_source(source, target.sm, target.ptx)
                    seen[key] = (kernel, inspection(kernel))
                kernel, found = seen[key]
            except ResvitError as error:
                rows.append({**row, "refused": error.problem})
                continue
            floor = floor_us(case, target.speed.bandwidth, target.peak(Precision(case.dtype)))
            grid = [extent.at(case.shapes) for extent in kernel.launch.grid]
            rows.append(
                {
                    **row, "registers": found.registers, "spill_bytes": found.spill_bytes,
                    "shared_bytes": found.static_shared_bytes + found.dynamic_shared_bytes,
                    "occupancy": found.occupancy, "threads": kernel.threads, "grid": grid, "mma": dict(found.mma),
                    "loads": dict(found.loads), "floor_us": floor + target.speed.kernel_us,
                }
            )  # fmt: skip
        click.echo(f"{target.name}: {len(cases)} cases", err=True)
    return rows


def described(case: Case) -> dict[str, Any]:
    return {
        "kind": case.kind, "model": case.model, "dtype": case.dtype, "batch": case.batch,
        "case": case_of(case.config, case.shapes), "bytes": case.bytes, "operations": case.operations,
    }  # fmt: skip


def measured_rows(cases: Sequence[Case], repeats: int, compiled: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The GPU and its ceilings, and the times of each case on it."""
    import torch
    from kernel_peers.clock import copies_for, disagreement, measured_bandwidth, measured_peak, time_ours, time_rival
    from kernel_peers.rivals import FUNCTIONS, inputs_of, rivals

    major, minor = torch.cuda.get_device_capability()
    sm, device = major * 10 + minor, torch.cuda.get_device_name()
    bandwidth, peaks = measured_bandwidth(), {dtype: measured_peak(dtype) for dtype in DTYPES}
    ptx = next((target.ptx for target in TARGETS if target.sm == sm), "9.0")
    gpu = {"device": device, "sm": sm, "bandwidth_gb_s": bandwidth, "peak_tops": peaks, "torch": torch.__version__}
    generator = torch.Generator("cuda").manual_seed(0)
    rows = []
    for case in cases:
        row = {"sm": sm, "device": device, **described(case)}
        try:
            kernel = kernel_from_source(case.source(sm), sm, ptx)
            copies = [inputs_of(case, generator)]
            copies += [inputs_of(case, generator) for _ in range(copies_for(copies[0]) - 1)]
            error = disagreement(kernel, case, copies[0], FUNCTIONS[case.kind](case))
            if not error < LARGEST_ERROR[case.dtype]:
                rows.append({**row, "refused": f"wrong: off by {error:.3g} of the norm"})
                continue
            row.update(error=error, ours_us=time_ours(kernel, case, copies, repeats))
        except ResvitError as error:
            rows.append({**row, "refused": error.problem})
            continue
        others, failed = {}, {}
        for name, function, context in rivals(case, compiled=compiled):
            try:
                others[name] = time_rival(function, context, copies, repeats)
            except RuntimeError as error:  # A backend that does not serve this shape.
                failed[name] = str(error).splitlines()[0][:100]
        if not others:
            rows.append({**row, "refused": f"no other way runs: {failed}"})
            continue
        best = min(others, key=others.__getitem__)
        floor = floor_us(case, bandwidth, peaks[case.dtype])
        row.update(best_other=best, best_other_us=others[best], others_us=others, failed=failed, floor_us=floor)
        rows.append(row)
        click.echo(f"{case.label}: {row['ours_us']:.1f} us, {best} {others[best]:.1f} us", err=True)
    return gpu, rows


def record(rows: Sequence[dict[str, Any]], path: Path = MEASURED) -> int:
    """Put rows into the table that ``--plugins auto`` reads, in place of older ones of such a GPU; returns how many."""
    new = [
        {
            "sm": row["sm"], "device": row["device"], "kind": row["kind"], "case": row["case"],
            "ours_us": round(row["ours_us"], 2), "other_us": round(row["best_other_us"], 2), "other": row["best_other"],
        }
        for row in rows
        if "best_other_us" in row
    ]  # fmt: skip
    places = {(row["sm"], row["kind"], row["case"]) for row in new}
    old = [row for row in json.loads(path.read_text()) if (row["sm"], row["kind"], row["case"]) not in places]
    table = sorted([*old, *new], key=lambda row: (row["sm"], row["kind"], row["case"]))
    path.write_text(json.dumps(table, indent=1) + "\n")
    return len(new)


@click.command()
@click.option("--static", is_flag=True, help="Look at the compiled code instead of timing it; needs no GPU.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="Only these kernels.")
@click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True, default=DTYPES)
@click.option("--batch", "batches", type=int, multiple=True, default=BATCHES, show_default=True)
@click.option("--target", "targets", multiple=True, default=STATIC_TARGETS, show_default=True, help="For --static.")
@click.option("--repeats", default=30, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, help="Time torch.compile too (slow to start).")
@click.option("--record", "keep", is_flag=True, help="Keep the times for --plugins auto.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for Markdown and JSON instead of benchmarks/results."
)
def main(
    static: bool,
    kinds: tuple[str, ...],
    dtypes: tuple[str, ...],
    batches: tuple[int, ...],
    targets: tuple[str, ...],
    repeats: int,
    compiled: bool,
    keep: bool,
    out: Path | None,
) -> None:
    """Time or inspect every kernel at every shape, and write tables."""
    cases = list(all_cases(kinds, dtypes, batches))
    if static:
        rows = static_rows(cases, [find_target(name) for name in targets])
        name, text, result = "kernels-static", static_table(rows), {"rows": rows}
    else:
        import torch

        if not torch.cuda.is_available():
            raise click.ClickException("There is no GPU here: use --static.")
        gpu, rows = measured_rows(cases, repeats, compiled)
        name, text = f"kernels-sm{gpu['sm']}", measured_table(gpu, rows)
        result = {"gpu": gpu, "repeats": repeats, "rows": rows}
        if keep:
            click.echo(f"kept: {record(rows)} cases in {MEASURED}")
    click.echo(text)
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(f"{text}\n")
    if out is not None:
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    elif not static:  # The rows of --static are many, and whoever needs them can have them again.
        write_result(name, result)
    click.echo(f"written: {folder / name}.md")


if __name__ == "__main__":
    main()
