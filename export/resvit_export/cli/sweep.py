"""The command ``sweep``: many builds, here or over a Ray cluster, and the page that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resvit_engines.console import output_options
from resvit_engines.errors import ExitCode
from resvit_export.cli.stages import examples_text

if TYPE_CHECKING:
    from resvit_export.report.comparison import Entry
    from resvit_export.sweep.work import Outcome

_COLUMNS = ("run", "target", "said", "exit")


@click.command(
    name="sweep",
    epilog=examples_text("sweep sweep.toml", "sweep sweep.toml --on local --json"),
)
@click.argument("plan", metavar="SWEEP.toml", type=click.Path(path_type=Path))
@click.option("--on", "address", metavar="local|ray://HOST:PORT", help="Ray cluster; local: of this machine's cores.")
@click.option("--out", metavar="PLACE", help="Folder of the runs, or s3://BUCKET/FOLDER.  [default: runs/SWEEP]")
@output_options
def sweep_command(plan: Path, address: str | None, out: str | None, quiet: bool, as_json: bool) -> int:
    """Build every model in every precision for every target, and compare them on one page.

    SWEEP.toml names the lists 'targets' and 'precisions', a table [models.NAME] for each model, if wanted one
    [budgets.NAME] for each budget, and [recipe] for what all share, all with the tables of a recipe. Each model in each
    precision and budget is a run folder; what is finished there is not done again. With --on, workers of a Ray cluster
    do them, divide validations on many images, and try candidates of a search ahead. With s3:// the runs lie in a
    store, and the page in runs/SWEEP as well. What was rejected or cannot be is in the table. Exits with 9 where a task
    was lost, and where no row could be made with the code that all of them have, or 3.
    """
    from resvit_engines.console import console, emit_json, table
    from resvit_engines.files import pretty_json, write_atomic
    from resvit_engines.progress import reporter
    from resvit_export.cli.output import comparison_table
    from resvit_export.report.comparison import write_comparison
    from resvit_export.sweep.plan import sweep_from_toml
    from resvit_export.sweep.spread import outcomes_by_ray, outcomes_here
    from resvit_export.sweep.store import RunStore, place_of

    tasks, say = sweep_from_toml(plan), reporter(quiet or as_json)
    named = place_of(out) if out is not None else Path("runs") / plan.stem
    store = named if isinstance(named, RunStore) else None
    root = (named if isinstance(named, Path) else Path("runs") / plan.stem).absolute()
    root.mkdir(parents=True, exist_ok=True)
    place = store or root
    outcomes: list[Outcome] = []
    for outcome in (
        outcomes_here(tasks, place, say) if address is None else outcomes_by_ray(tasks, place, address, reporter=say)
    ):
        outcomes.append(outcome)
        if not quiet and not as_json:
            said = outcome.lost or ", ".join(f"{one.target} {one.said}" for one in outcome.targets)
            click.echo(f"{len(outcomes)} of {len(tasks)}: {outcome.name} in {outcome.seconds:.0f} s: {said}")
    outcomes.sort(key=lambda outcome: [task.name for task in tasks].index(outcome.name))
    entries, left_out = _entries(outcomes)
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
    if store is not None:
        for file in (page, root / "sweep.json"):
            if file.is_file():
                store.keep("", file)
    if as_json:
        emit_json(document)
    elif not quiet:
        rows = [
            (o.name, t.target, f"{t.said} {t.fix}".strip(), str(t.exit_code))
            for o in outcomes
            for t in o.targets
            if t.exit_code
        ]
        rows += [(outcome.name, "", outcome.lost, str(int(ExitCode.SYSTEM))) for outcome in outcomes if outcome.lost]
        if rows:
            console().print(table("Not accepted, or not done", _COLUMNS, rows, left=3))
        if entries:
            console().print(comparison_table(entries))
        for line in left_out:
            click.echo(f"not compared: {line}")
    if entries and not as_json:
        click.echo(f"report: {page}")
    return _exit_code(outcomes)


def _exit_code(outcomes: Sequence[Outcome]) -> int:
    """SYSTEM where a task was lost; where no target got as far as its verdict, what all say, or INPUT."""
    if any(outcome.lost for outcome in outcomes):
        return ExitCode.SYSTEM
    targets = [target for outcome in outcomes for target in outcome.targets]
    if any(target.finished for target in targets):
        return ExitCode.OK
    codes = {target.exit_code for target in targets}
    return codes.pop() if len(codes) == 1 else ExitCode.INPUT


def _entries(outcomes: Sequence[Outcome]) -> tuple[list[Entry], list[str]]:
    """What can be compared of the runs, and why others cannot."""
    found: list[Entry] = []
    left_out = [f"{outcome.name}: {outcome.left_out}" for outcome in outcomes if outcome.left_out]
    for outcome in outcomes:
        entries = outcome.entries
        if found and entries and entries[0].metric != found[0].metric:
            left_out.append(f"{outcome.name}: it is judged by {entries[0].metric}, the others by {found[0].metric}.")
            continue
        found += entries
    return found, left_out
