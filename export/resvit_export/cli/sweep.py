"""The command ``sweep``: many builds, here or over a Ray cluster, and the page that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resvit_engines.console import output_options
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.cli.stages import examples_text

if TYPE_CHECKING:
    from resvit_export.report.comparison import Entry
    from resvit_export.sweep.plan import Task
    from resvit_export.sweep.work import Outcome

_COLUMNS = ("run", "target", "said", "exit")


@click.command(
    name="sweep",
    epilog=examples_text("sweep sweep.toml", "sweep sweep.toml --on local --json"),
)
@click.argument("plan", metavar="SWEEP.toml", type=click.Path(path_type=Path))
@click.option("--on", "address", metavar="local|ray://HOST:PORT", help="Ray cluster; local: of this machine's cores.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the runs.  [default: runs/SWEEP]")
@output_options
def sweep_command(plan: Path, address: str | None, out: Path | None, quiet: bool, as_json: bool) -> int:
    """Build every model in every precision for every target, and compare them on one page.

    SWEEP.toml names the lists 'targets' and 'precisions', a table [models.NAME] for each model and [recipe] for what
    all share, both with the tables of a recipe. Each model in each precision is a run folder; what is finished there is
    not done again. Exits with 9 where a task was lost; what was rejected or cannot be is in the table.
    """
    from resvit_engines.console import console, emit_json, table
    from resvit_engines.files import pretty_json, write_atomic
    from resvit_export.cli.output import comparison_table
    from resvit_export.report.comparison import write_comparison
    from resvit_export.sweep.plan import sweep_from_toml
    from resvit_export.sweep.spread import outcomes_by_ray, outcomes_here

    tasks = sweep_from_toml(plan)
    root = (out or Path("runs") / plan.stem).absolute()
    root.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for outcome in outcomes_here(tasks, root) if address is None else outcomes_by_ray(tasks, root, address):
        outcomes.append(outcome)
        if not quiet and not as_json:
            said = outcome.lost or ", ".join(f"{one.target} {one.said}" for one in outcome.targets)
            click.echo(f"{len(outcomes)} of {len(tasks)}: {outcome.name} in {outcome.seconds:.0f} s: {said}")
    outcomes.sort(key=lambda outcome: [task.name for task in tasks].index(outcome.name))
    entries, left_out = _entries(tasks, outcomes, root)
    page = root / "comparison.html"
    if entries:
        write_comparison(entries, page)
    document: dict[str, Any] = {
        "tasks": [outcome.to_json() for outcome in outcomes],
        "entries": [entry.to_json() for entry in entries],
        "left_out": left_out,
        "report": str(page) if entries else None,
    }
    write_atomic(root / "sweep.json", pretty_json(document))
    if as_json:
        emit_json(document)
    elif not quiet:
        rows = [(o.name, t.target, t.said, str(t.exit_code)) for o in outcomes for t in o.targets if t.exit_code]
        rows += [(outcome.name, "", outcome.lost, str(int(ExitCode.SYSTEM))) for outcome in outcomes if outcome.lost]
        if rows:
            console().print(table("Not accepted, or not done", _COLUMNS, rows, left=3))
        if entries:
            console().print(comparison_table(entries))
        for line in left_out:
            click.echo(f"not compared: {line}")
    if entries and not as_json:
        click.echo(f"report: {page}")
    return ExitCode.SYSTEM if any(outcome.lost for outcome in outcomes) else ExitCode.OK


def _entries(tasks: Sequence[Task], outcomes: Sequence[Outcome], root: Path) -> tuple[list[Entry], list[str]]:
    """What can be compared of the runs, and why others cannot."""
    from resvit_export.report.comparison import entries_of
    from resvit_export.tune import settled

    found: list[Entry] = []
    left_out: list[str] = []
    for task, outcome in zip(tasks, outcomes, strict=True):
        if not outcome.lost and any(one.finished for one in outcome.targets):
            try:
                entries = entries_of([root / task.name], settled)
            except ResvitError as error:
                left_out.append(f"{task.name}: {error.problem}")
                continue
            if found and entries and entries[0].metric != found[0].metric:
                left_out.append(f"{task.name}: it is judged by {entries[0].metric}, the others by {found[0].metric}.")
                continue
            found += entries
    return found, left_out
