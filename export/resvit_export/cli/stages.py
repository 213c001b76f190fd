"""The commands that work on a run folder: build, and each stage by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resvit_engines.console import Output, output_options, verbose_option
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import reporter
from resvit_export.cli.grouped_help import GroupedHelp
from resvit_export.cli.options import device_options, recipe_options, require_one_device, resolve_recipe

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline
    from resvit_export.recipe.recipe import Recipe
    from resvit_export.run import Run
    from resvit_export.stage import Artifact

_MODEL = "--model resvit:embed-mini --checkpoint runs/demo/embed-mini.pt"
_DATA = "--data fashion-mnist"


def examples_text(*lines: str) -> str:
    """The end of a command's help: command lines that run as they stand."""
    return "\b\nExamples:\n" + "\n".join(f"  resvit-export {line}" for line in lines)


@contextlib.contextmanager
def open_runs(
    flags: dict[str, Any], output: Output, *, looks: bool = False, targeted: bool = False, reads: bool = True
) -> Iterator[Sequence[Run]]:
    """A run for each target on the locked run folder, with the recipe written down.

    Who only ``looks`` at a run leaves the recipe that it has. A target that a ``targeted`` command lacks, and data that
    cannot be what they are called, are said before the rest; of data only to who ``reads`` any.
    """
    from resvit_export.api import opened
    from resvit_export.pipeline import Pipeline
    from resvit_export.run import runs_for
    from resvit_export.run_folder import RunFolder

    report = reporter(output.quiet or output.json, output.verbose)
    recipe, path = resolve_recipe(flags, report)
    folder = RunFolder(path, report)
    runs = runs_for(recipe, folder, report)
    for run in runs:
        Pipeline(run)  # what cannot be is refused before any work
    if targeted:
        runs[0].require_target()
    if reads:
        _require_named_data(flags, recipe)
    with opened(recipe, folder, runs, looks=looks):
        yield runs


def _require_named_data(flags: dict[str, Any], recipe: Recipe) -> None:
    """Refuse data that this command line names and that is none; what a finished run's recipe names may be gone."""
    from resvit_calibrate.data.naming import require_source

    for name in ("data", "validation_data", "train_data"):
        if flags.get(name) is not None:
            require_source(str(getattr(recipe, name)))


@contextlib.contextmanager
def open_pipeline(flags: dict[str, Any], output: Output) -> Iterator[Pipeline]:
    """The pipeline of a command that looks at a run, where only one target makes sense; refuses several."""
    from resvit_export.pipeline import Pipeline

    with open_runs(flags, output, looks=True) as runs:
        if len(runs) > 1:
            raise ResvitError(
                "This command looks at one target, and several were given.", "Name one of them with --target."
            )
        yield Pipeline(runs[0])


def each(runs: Sequence[Run], output: Output, do: Callable[[Run], tuple[dict[str, Any], int]]) -> int:
    """Let ``do`` work and print for every target. JSON of several is one document by target; the worst code counts."""
    from resvit_engines.console import console, emit_json

    documents, codes = {}, []
    for run in runs:
        if len(runs) > 1 and not output.quiet and not output.json:
            console().rule(run.require_target().title, align="left")
        document, code = do(run)
        documents[str(run.recipe.target)] = document
        codes.append(code)
    if output.json:
        emit_json({"targets": documents} if len(documents) > 1 else next(iter(documents.values())))
    return max(codes)


def _stage_command(
    name: str, last: str, take: Callable[[Pipeline], Artifact], help_text: str, *examples: str
) -> click.Command:
    @output_options
    @verbose_option
    @recipe_options(last)
    def command(verbose: bool, quiet: bool, as_json: bool, **flags: Any) -> int:
        from resvit_export.api import choose_place
        from resvit_export.cli.output import show_stage, summarize
        from resvit_export.pipeline import Pipeline
        from resvit_export.tune import settled

        output = Output(quiet, as_json, verbose)

        def do(run: Run) -> tuple[dict[str, Any], int]:
            settles = name in ("validate", "compile", "bundle")
            if run.recipe.data is not None and name not in ("fold", "export"):
                run.sources.require_usable_data()
            if settles:
                choose_place(run)
            pipeline = settled(Pipeline(run)) if settles else Pipeline(run)
            artifact = take(pipeline)
            show_stage(artifact, output)
            return summarize(artifact), _exit_code(pipeline) if name == "validate" else 0

        with open_runs(flags, output) as runs:
            return each(runs, output, do)

    return click.command(name=name, cls=GroupedHelp, help=help_text, epilog=examples_text(*examples))(command)


def _exit_code(pipeline: Pipeline) -> int:
    code = pipeline.validated.verdict.verdict.exit_code
    return ExitCode.OK if code == ExitCode.REJECTED and pipeline.recipe.allow_rejected else code


prune_command = _stage_command(
    "prune",
    "prune",
    lambda pipeline: pipeline.retrained if pipeline.recipe.retrains else pipeline.pruned,
    """Take out of the network what matters least, and with --train-data win the accuracy back.

    The share given is what remains: --prune-macs 0.5 halves the multiply-accumulates. Channels of the trunk,
    attention heads and MLP widths go where that saves most for the least loss; widths stay at what tensor cores
    like. Writes pruned.pt (or retrained.pt), which loads as any --checkpoint of the same model, and a .pt2 program.""",
    f"prune {_MODEL} {_DATA} --prune-macs 0.7 --run runs/pruned",
    "prune --run runs/pruned --train-data fashion-mnist --prune-epochs 1 --train-images 2000",
)
fold_command = _stage_command(
    "fold",
    "fold",
    lambda pipeline: pipeline.folded,
    """Fold BatchNorm, weight standardisation and LayerScale into the weights.

    Also removes dropout and identities. All of it is exact; the numerical error is measured and printed.""",
    f"fold {_MODEL} --run runs/by-stage",
    "fold --model timm:vit_tiny_r_s16_p8_224 --run runs/timm --json",
)
export_command = _stage_command(
    "export",
    "export",
    lambda pipeline: pipeline.exported,
    """Export the folded network to float ONNX and check its parity with PyTorch.

    The opset follows the target; the batch is fixed unless --batch says MIN:OPT:MAX.""",
    f"export {_MODEL} --target jetson-orin --run runs/by-stage",
    "export --run runs/by-stage --batch 1:8:32",
)
calibrate_command = _stage_command(
    "calibrate",
    "calibrate",
    lambda pipeline: pipeline.calibrated,
    """Measure the ranges of all activations in one pass over real images.

    Memory does not grow with the number of images. Without images it refuses: it never invents any.""",
    f"calibrate {_MODEL} {_DATA} --target jetson-orin --run runs/by-stage",
    "calibrate --run runs/by-stage --calibration-images 256 --seed 1",
)
quantize_command = _stage_command(
    "quantize",
    "quantize",
    lambda pipeline: pipeline.quantized,
    """Put Q/DQ and FP16 into the ONNX graph.

    Patterns of --include and --exclude match node names, module paths or operator types; each must match
    something.""",
    f"quantize {_MODEL} {_DATA} --target jetson-orin --precision int8 --run runs/by-stage",
    "quantize --run runs/by-stage --calibrator percentile --exclude 'trunk.stem*'",
)
fuse_command = _stage_command(
    "fuse",
    "fuse",
    lambda pipeline: pipeline.fused,
    """Put kernels of our own into the quantised graph, where they fit.

    Each attention block and each bridge from trunk to tokens becomes one node, whose function is the plain computation:
    ONNX Runtime validates the file that ships. What stays as it is gets a reason. See docs/kernels.md.""",
    f"fuse {_MODEL} {_DATA} --target jetson-orin --plugins on --run runs/by-stage",
    "fuse --run runs/by-stage --plugins on --plugin-attention 8bit --json",
)
validate_command = _stage_command(
    "validate",
    "validate",
    lambda pipeline: pipeline.validated,
    """Compare PyTorch, float ONNX and quantised ONNX on the same images, and judge the drop.

    The verdict is accepted (exit code 0), rejected (4) or undecided (5: too few images, or a baseline at chance
    level), from the confidence interval of the paired predictions.""",
    f"validate {_MODEL} {_DATA} --target jetson-orin --run runs/by-stage",
    "validate --run runs/by-stage --max-drop 0.5 --confidence 0.99",
)
compile_command = _stage_command(
    "compile",
    "compile",
    lambda pipeline: pipeline.compiled,
    """Build the engine, or the plan to build it where only the device can.

    TensorRT builds where the GPU is; TensorRT for RTX builds here, for RTX cards and with --builder rtx. A rejected
    model is not compiled, unless --allow-rejected.""",
    f"compile {_MODEL} {_DATA} --target rtx-4090 --run runs/by-stage",
    "compile --run runs/by-stage --target jetson-orin",
)
bundle_command = _stage_command(
    "bundle",
    "bundle",
    lambda pipeline: pipeline.bundled,
    """Pack model, engine or build plan, preprocessing, ranges, verdict and golden outputs into one file.

    The same inputs give the same bytes.""",
    f"bundle {_MODEL} {_DATA} --target jetson-orin --run runs/by-stage",
    "bundle --run runs/by-stage --target rtx-4090 --json",
)


@click.command(
    name="build",
    cls=GroupedHelp,
    epilog=examples_text(
        f"build --precision int8 --target jetson-orin {_MODEL} {_DATA}",
        f"build --target jetson-orin --plugins on {_MODEL} {_DATA} --run runs/fused",
        f"build --precision fp8 --target l4 {_MODEL} {_DATA} --max-drop 0.5 --run runs/l4-fp8",
        "build --run runs/l4-fp8 --json",
        f"build --target rtx-4090 --target jetson-orin {_MODEL} {_DATA} --run runs/both",
        f"build --target jetson-orin {_MODEL} {_DATA} --max-drop 0.5 --run runs/searched",
        "build --run runs/searched --latency-budget 1x",
        "build --recipe runs/l4-fp8/recipe.toml --precision fp16 --builder rtx --run runs/l4-fp16",
    ),
)
@output_options
@verbose_option
@device_options
@recipe_options("bundle")
def build_command(device: str | None, rehearse: bool, verbose: bool, quiet: bool, as_json: bool, **flags: Any) -> int:
    """Do everything: prune where asked, fold, export, calibrate, quantize, validate, compile, bundle, report.

    Where the accuracy of the plain recipe is not accepted, layers are raised to FP8 or FP16 until it is, those first
    that cost the least time on the target. What is finished in the run folder and unchanged is not done again; a
    killed build continues where it stopped.
    """
    from resvit_export.api import Device, build_run
    from resvit_export.pipeline import Pipeline

    output = Output(quiet, as_json, verbose)
    with open_runs(flags, output, targeted=True) as runs:
        several = len(runs) > 1
        require_one_device(device, rehearse, several)
        on = Device(device, rehearse) if device is not None else None
        for run in runs if several else ():  # what ends the build of one ends it before the others are begun
            Pipeline(run).look_ahead()

        def do(run: Run) -> tuple[dict[str, Any], int]:
            from resvit_export.cli.outcome import build_document, show_build

            built = build_run(run, report=_report_name(run, several), device=on)
            if not output.json:
                show_build(built, output)
            if built.rejection is not None:
                click.echo(f"error: {built.rejection}", err=True)
            return build_document(built), built.exit_code

        return each(runs, output, do)


@click.command(
    name="report",
    cls=GroupedHelp,
    epilog=examples_text(
        f"report {_MODEL} {_DATA} --target jetson-orin --run runs/by-stage",
        "report --run runs/by-stage",
        "report runs/embed-mini runs/both --out runs/comparison.html",
    ),
)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Page that compares RUNS.  [default: comparison.html]")
@output_options
@recipe_options("bundle")
def report_command(runs: tuple[Path, ...], out: Path | None, quiet: bool, as_json: bool, **flags: Any) -> int:
    """Write the HTML report of a run, one self-contained page for each target; or compare RUNS.

    With folders of RUNS the page holds one table of all their targets, and one picture of accuracy over latency with
    the Pareto front. Nothing is computed for it, and the runs stay as they are.
    """
    from resvit_export.pipeline import Pipeline
    from resvit_export.report.gather import write_run_report
    from resvit_export.tune import settled

    output = Output(quiet, as_json)
    if runs:
        return _compare_runs(runs, out or Path("comparison.html"), flags, output)
    if out is not None:
        raise ResvitError("--out is for a page that compares runs.", "Name their folders: report RUN RUN --out FILE")

    def do(run: Run, several: bool) -> tuple[dict[str, Any], int]:
        pipeline = Pipeline(run)
        with run.folder.looking_back(), contextlib.suppress(ResvitError):
            pipeline = settled(pipeline)
        path = write_run_report(pipeline, _report_name(run, several))
        if not output.json:
            click.echo(f"report: {path}")
        return {"report": str(path.resolve())}, 0

    with open_runs(flags, output, looks=True, reads=False) as opened_runs:
        return each(opened_runs, output, lambda run: do(run, len(opened_runs) > 1))


def _compare_runs(runs: Sequence[Path], out: Path, flags: dict[str, Any], output: Output) -> int:
    from resvit_engines.console import console, emit_json
    from resvit_export.cli.output import comparison_table
    from resvit_export.report.comparison import entries_of, pareto_front, write_comparison
    from resvit_export.tune import settled

    if given := [name for name, value in flags.items() if value not in (None, ())]:
        raise ResvitError(
            f"Runs are compared as they are, and {len(given)} settings were given: {', '.join(given)}.",
            "Name nothing but the run folders, and --out.",
        )
    entries = entries_of(runs, settled)
    write_comparison(entries, out)
    if output.json:
        front = {entry.target: [e.name for e in pareto_front([o for o in entries if o.target == entry.target])]
                 for entry in entries}  # fmt: skip
        emit_json({"report": str(out.resolve()), "entries": [entry.to_json() for entry in entries], "front": front})
        return 0
    if not output.quiet:
        console().print(comparison_table(entries))
    click.echo(f"report: {out}")
    return 0


def _report_name(run: Run, several: bool) -> str:
    return f"report-{run.require_target().name}.html" if several else "report.html"
