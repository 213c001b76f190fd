"""The command ``sensitivity``: a table, a chart, and what to paste into the recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from resvit_engines.console import Output, output_options
from resvit_engines.errors import ResvitError
from resvit_export.cli.grouped_help import GroupedHelp
from resvit_export.cli.options import recipe_options
from resvit_export.cli.stages import examples_text, open_pipeline
from resvit_quantize.sensitivity.method import Method

if TYPE_CHECKING:
    from resvit_export.recipe.recipe import Recipe
    from resvit_quantize.sensitivity.exclude import ExcludeList
    from resvit_quantize.sensitivity.sensitivity import Sensitivity

_SHOWN = 15
_BLOCKS = 8


@click.command(
    name="sensitivity",
    cls=GroupedHelp,
    epilog=examples_text(
        "sensitivity --model resvit:embed-mini --checkpoint runs/demo/embed-mini.pt --data fashion-mnist "
        "--precision int8 --images 32 --run runs/by-stage",
        "sensitivity --run runs/by-stage --target jetson-orin --images 16 --method brute-force --json",
        "sensitivity --run runs/by-stage --target jetson-orin --images 16 --method brute-force --on local",
    ),
)
@output_options
@click.option(
    "--method",
    type=click.Choice([method.value for method in Method]),
    default=Method.GRADIENT.value,
    show_default=True,
    help="Gradients, or quantising one layer at a time, which is slow and takes every operator.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Calibration images to measure with.",
)
@click.option(
    "--on",
    "address",
    metavar="local|ray://HOST:PORT",
    help="Ray cluster over whose workers brute force divides the layers; local: of this machine's cores.",
)
@recipe_options("quantize")
def sensitivity_command(quiet: bool, as_json: bool, images: int, method: str, address: str | None, **flags: Any) -> int:
    """Rank layers by the damage that quantising each one alone does.

    Damage is noise at the network's outputs, as SQNR in dB, and of detectors whose boxes are known the change of the
    task's own loss; a layer's share of the sum is what leaving it in FP16
    would save. Layers that the rules leave in FP16 are measured too. Ends with an exclude list for the recipe, and
    writes sensitivity.html into the run folder. Brute force that was stopped goes on where it was; with --on its layers
    are measured by the workers of a Ray cluster, which see the run folder and the data under the same paths.
    """
    from resvit_engines.console import console, emit_json
    from resvit_export.report.sections.sensitivity import write_sensitivity_page
    from resvit_export.settle import measured
    from resvit_export.stages.decide.sensitivity import exclude_snippet
    from resvit_export.sweep.cluster import by_workers
    from resvit_quantize.sensitivity.exclude import exclude_lists

    if address is not None and Method(method) is not Method.BRUTE_FORCE:
        raise ResvitError(
            "One pass for all layers is not divided over workers: --on goes with brute force.",
            "Leave --on out, or say --method brute-force.",
        )
    output = Output(quiet, as_json)
    with open_pipeline(flags, output) as pipeline:
        with by_workers(pipeline.run, address) if address else contextlib.nullcontext():
            artifact = measured(pipeline, images, Method(method))
        found, recipe = artifact.sensitivity, pipeline.recipe
        lists = exclude_lists(found)
        page = pipeline.run.folder.path / "sensitivity.html"
        snippets = [(item.title, exclude_snippet(recipe.exclude, item.layers)) for item in lists]
        write_sensitivity_page(page, recipe.label, found, snippets)
    if as_json:
        emit_json(_document(found, lists, recipe) | {"page": str(page.resolve()), "folder": str(artifact.folder)})
        return 0
    screen = console()
    if not quiet:
        _show_tables(found)
    for title, snippet in snippets:
        screen.print(f"{title}:\n\n{snippet}\n", markup=False, soft_wrap=True)
    screen.print(f"sensitivity: {page}", markup=False, soft_wrap=True)
    return 0


def _document(found: Sensitivity, lists: Sequence[ExcludeList], recipe: Recipe) -> dict[str, Any]:
    return {
        **found.to_json(),
        "total": {precision: found.total(precision) for precision in found.together},
        "groups": found.shares_by("group", found.precision),
        "blocks": found.shares_by("block", found.precision),
        "exclude": [item.to_json() for item in lists],
        "excluded_already": list(recipe.exclude),
    }


def _show_tables(found: Sensitivity) -> None:
    from resvit_engines.console import console, table
    from resvit_export.report.layout.wording import decibels

    precision, screen = found.precision, console()
    kinds = [precision, *(kind for kind in found.together if kind != precision)]
    ranked = found.ranked(precision)
    rows = [
        (
            layer.node,
            layer.group,
            f"{layer.macs / 1e6:.2f} M",
            *(decibels(layer.damage.get(kind)) for kind in kinds),
            f"{found.share(layer, precision):.1%}" if precision in layer.quantized else "in FP16 already",
        )
        for layer in ranked[:_SHOWN]
    ]
    columns = ("layer", "group", "macs", *(f"{kind.upper()}, dB" for kind in kinds), "share of the damage")
    what = "SQNR" if found.measure == "outputs" else "The task's loss over its change, in dB,"
    title = f"{what} with one layer quantised ({found.method.value}, {found.images} images), the worst first"
    screen.print(table(title, columns, rows, left=2))
    if len(ranked) > _SHOWN:
        rest = sum(found.share(layer, precision) for layer in ranked[_SHOWN:])
        screen.print(f"and {len(ranked) - _SHOWN} more with {rest:.1%} together\n")
    for key, shown in (("group", None), ("block", _BLOCKS)):
        shares = list(found.shares_by(key, precision).items())[:shown]
        screen.print(table(f"By {key}", (key, "share of the damage"), [(name, f"{part:.1%}") for name, part in shares]))
    for kind in kinds:
        screen.print(
            f"{kind.upper()}, all together: {decibels(found.together[kind])} dB measured, "
            f"{decibels(found.total(kind))} dB from the sum of the layers",
            markup=False,
        )
    screen.print()
