"""What the command lines share: lazy commands, errors as sentences and exit codes, tables, and JSON."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from resvit_engines.errors import (
    ExitCode,
    OutOfMemoryError,
    ResvitError,
    first_line,
    interrupts_as_themselves,
    is_out_of_memory,
    one_line,
)
from resvit_engines.files import refused
from resvit_engines.terminal import CleanConsole, NobodyReadsError, clean_streams

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Output:
    """How a command speaks: for people, quietly, or as JSON; ``verbose`` with everything that is known."""

    quiet: bool
    json: bool
    verbose: bool = False


def output_options(function: F) -> F:
    """Add ``--quiet`` and ``--json``."""
    function = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")(function)
    return click.option("-q", "--quiet", is_flag=True, help="No progress, no tables: only results and warnings.")(
        function
    )


def verbose_option(function: F) -> F:
    """Add ``-v``, for commands that say less than they know."""
    return click.option("-v", "--verbose", is_flag=True, help="Everything: tables, kernels, times, where things lie.")(
        function
    )


class LazyCommands(click.Group):
    """A group whose subclasses name the module of each command; it is imported only when the command is used."""

    modules: Mapping[str, str] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order in which they are listed."""
        del ctx
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The object ``NAME_command`` of the command's module, a dash in the name being an underscore."""
        del ctx
        if cmd_name not in self.modules:
            return None
        name = f"{cmd_name.replace('-', '_')}_command"
        command: click.Command = getattr(importlib.import_module(self.modules[cmd_name]), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for one that does not exist."""
        if args and args[0] not in self.modules and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.modules, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"The commands are: {', '.join(self.modules)}."
            ctx.fail(f"There is no command '{args[0]}'. {hint}")
        return super().resolve_command(ctx, args)


def run_command(group: click.Command, program: str, arguments: list[str], *, missing: str) -> int:
    """Run one command line; returns the exit code and never raises for what a user can cause.

    ``missing`` says what to do where a Python package is not installed.
    """
    with clean_streams():
        return _run(group, program, arguments, missing)


def _run(group: click.Command, program: str, arguments: list[str], missing: str) -> int:
    as_json = "--json" in arguments
    try:
        with interrupts_as_themselves():
            result = group.main(args=arguments, prog_name=program, standalone_mode=False)
        return int(result) if isinstance(result, int) else 0
    except click.ClickException as error:
        return _not_understood(error, arguments, as_json)
    except ResvitError as error:
        # A library reports it as a damaged file or a faulty model as readily.
        if not isinstance(error, OutOfMemoryError) and is_out_of_memory(error):
            return _fail(f"Memory ran out: {error.problem}", _FIX_MEMORY, ExitCode.SYSTEM, as_json)
        return _fail(error.problem, error.fix, error.code, as_json)
    except (KeyboardInterrupt, click.Abort):
        return _fail(
            "Interrupted.", "Finished stages are kept: the same command continues.", ExitCode.INTERRUPTED, as_json
        )
    except NobodyReadsError:
        return _nobody_reads()
    except ModuleNotFoundError as error:
        return _fail(f"The Python package '{error.name}' is not installed.", missing, ExitCode.MISSING, as_json)
    except MemoryError:
        return _fail("This machine ran out of memory.", _FIX_MEMORY, ExitCode.SYSTEM, as_json)
    except OSError as error:
        told = refused(error)
        return _fail(told.problem, told.fix, told.code, as_json)
    except Exception as error:  # noqa: BLE001  (the last line of defence: a sentence instead of a traceback)
        if os.environ.get("RESVIT_DEBUG"):
            traceback.print_exc()
        if is_out_of_memory(error):
            return _fail(f"Memory ran out: {first_line(error)}", _FIX_MEMORY, ExitCode.SYSTEM, as_json)
        return _fail(
            f"Unexpected {type(error).__name__}: {error}",
            f"This is a bug in {program}. Set RESVIT_DEBUG=1 for the traceback and report it.",
            ExitCode.BUG,
            as_json,
        )


def run_process(run: Callable[[list[str]], int]) -> None:
    """The whole of a console script: SIGTERM interrupts like Ctrl-C, and the exit code is that of ``run``."""
    signal.signal(signal.SIGTERM, _interrupt)
    code = run(sys.argv[1:])
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything is written and closed by now. PyTorch has been seen to crash while the interpreter shuts down after
    # an error, which would replace our exit code by the signal's.
    os._exit(code)


def console() -> CleanConsole:
    """Standard output for people. Off a terminal it is wide, so that paths and tables do not break."""
    return CleanConsole(width=None if sys.stdout.isatty() else 140, highlight=False)


def emit_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document, in ASCII: so it is what it is in every encoding, whatever names hold."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], left: int = 1) -> Table:
    """Build a plain table; the first ``left`` columns are text, the others numbers."""
    built = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        built.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        built.add_row(*(escape(one_line(cell)) if isinstance(cell, str) else cell for cell in row))
    return built


def mib(size: int) -> str:
    """A number of bytes, in MiB."""
    return f"{size / (1 << 20):.2f} MiB"


def _fail(problem: str, fix: str, code: ExitCode, as_json: bool) -> int:
    with contextlib.suppress(NobodyReadsError):
        sys.stderr.write(f"error: {_indented(problem)}\n  → {_indented(fix)}\n")
    if as_json:
        with contextlib.suppress(NobodyReadsError):
            emit_json({"error": {"problem": problem, "fix": fix, "exit_code": int(code)}})
    return int(code)


def _not_understood(error: click.ClickException, arguments: list[str], as_json: bool) -> int:
    error.show()
    context = error.ctx if isinstance(error, click.UsageError) else None
    fix = f"See {context.command_path} --help." if context else "See --help."
    if context and (extra := re.match(r"Got unexpected extra arguments? \((.+)\)", error.format_message())):
        options = {name: item for item in context.command.params for name in item.opts}
        option = _option_of_pair(extra[1], arguments, options) or _option_for(extra[1], options.keys())
        meant = f'"{extra[1]}"' if " " in extra[1] else extra[1]
        fix = f"Did you mean {option} {meant}?" if option else f"Every setting is an option of its own. {fix}"
        sys.stderr.write(f"  → {_indented(fix)}\n")
    if as_json:
        with contextlib.suppress(NobodyReadsError):
            emit_json({"error": {"problem": error.format_message(), "fix": fix, "exit_code": error.exit_code}})
    return error.exit_code


_FIX_MEMORY = "Use a smaller --batch or fewer --calibration-images, or a machine with more memory."
_ENDINGS = {".onnx": "--model", ".pt2": "--model", ".pt": "--checkpoint", ".pth": "--checkpoint"}


def _option_of_pair(argument: str, arguments: list[str], options: Mapping[str, click.Parameter]) -> str | None:
    """The option of KEY=VALUE pairs that ``argument``, another pair, was written behind: each pair has its own."""
    argument = argument.split(" ", maxsplit=1)[0]
    if not re.match(r"[A-Za-z_]\w*=", argument) or argument not in arguments:
        return None
    named = [text for text in arguments[: arguments.index(argument)] if text in options]
    return named[-1] if named and options[named[-1]].metavar == "KEY=VALUE" else None


def _option_for(argument: str, options: Set[str]) -> str | None:
    """The option that a file or folder was probably meant for, where the command has it."""
    place = Path(argument)
    kind = _ENDINGS.get(place.suffix.lower())
    with contextlib.suppress(OSError, ValueError):
        if place.is_dir():
            kind = "--run" if (place / "recipe.toml").is_file() else "--data"
    return kind if kind in options else None


def _indented(text: str) -> str:
    """Every line of it but the first stands further right, so that none looks like a line of ours."""
    return text.replace("\r", "\n").replace("\n", "\n    ")


def _nobody_reads() -> int:
    """Whoever read standard output or error has gone: what is still to be written goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return 0


def _interrupt(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt
