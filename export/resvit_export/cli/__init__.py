"""The command ``resvit-export``. Commands parse, call the library and print; nothing heavy is imported for --help."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback

import click

from resvit_engines.errors import ExitCode, ResvitError

_COMMANDS = {
    "build": "resvit_export.cli.stages",
    "prune": "resvit_export.cli.stages",
    "fold": "resvit_export.cli.stages",
    "export": "resvit_export.cli.stages",
    "calibrate": "resvit_export.cli.stages",
    "quantize": "resvit_export.cli.stages",
    "sensitivity": "resvit_export.cli.sensitivity",
    "validate": "resvit_export.cli.stages",
    "compile": "resvit_export.cli.stages",
    "bundle": "resvit_export.cli.stages",
    "report": "resvit_export.cli.stages",
    "targets": "resvit_export.cli.tools",
    "inspect": "resvit_export.cli.tools",
    "doctor": "resvit_export.cli.tools",
}


class _Commands(click.Group):
    """Imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        import importlib

        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name])
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            ctx.fail(f"There is no command '{args[0]}'." + (f" Did you mean '{near[0]}'?" if near else ""))
        return super().resolve_command(ctx, args)


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  resvit-export targets
  resvit-export build --precision int8 --target jetson-orin --model resvit:embed-nano --checkpoint runs/demo/embed-nano.pt --data fashion-mnist
  resvit-export build --help

\b
Exit codes: 0 done, 2 misspelt command, 3 unusable model, data or recipe, 4 accuracy rejected, 5 accuracy
undecided, 6 impossible on that target, 7 something missing, 8 engine build failed, 9 disk, memory or
permissions, 130 interrupted, 1 a bug of ours.""",  # noqa: E501
)
@click.version_option(package_name="resvit-export")
def cli() -> None:
    """Take a trained ResNet+ViT hybrid to a quantised, validated TensorRT engine.

    'build' does everything; each stage is also a command of its own on the same run folder, and does the stages
    before it where they are not finished yet.
    """


def main() -> None:
    """Entry point of the console script: runs a command and turns errors into sentences and exit codes."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Threads of PyTorch that wait by spinning cost five times the processor time as soon as the machine is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    code = run(sys.argv[1:])
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything is written and closed by now. PyTorch has been seen to crash while the interpreter shuts down after
    # an error, which would replace our exit code by the signal's.
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code and never raises for what a user can cause."""
    as_json = "--json" in arguments
    try:
        result = cli.main(args=arguments, prog_name="resvit-export", standalone_mode=False)
        return int(result) if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ResvitError as error:
        return _fail(error.problem, error.fix, error.code, as_json)
    except (KeyboardInterrupt, click.Abort):
        return _fail(
            "Interrupted.", "Finished stages are kept: the same command continues.", ExitCode.INTERRUPTED, as_json
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        return _fail(
            f"The Python package '{error.name}' is not installed.",
            "Building needs the extra: pip install 'resvit-export[host]'. 'resvit-export doctor' checks the rest.",
            ExitCode.MISSING,
            as_json,
        )
    except MemoryError:
        return _fail(
            "This machine ran out of memory.",
            "Use a smaller --batch or fewer --calibration-images, or a machine with more memory.",
            ExitCode.SYSTEM,
            as_json,
        )
    except OSError as error:
        return _fail(
            f"The operating system refused: {error}.", "Check the path, permissions and disk.", ExitCode.SYSTEM, as_json
        )
    except Exception as error:  # noqa: BLE001  (the last line of defence: a sentence instead of a traceback)
        if os.environ.get("RESVIT_DEBUG"):
            traceback.print_exc()
        return _fail(
            f"Unexpected {type(error).__name__}: {error}",
            "This is a bug in resvit-export. Set RESVIT_DEBUG=1 for the traceback and report it.",
            ExitCode.BUG,
            as_json,
        )


def _fail(problem: str, fix: str, code: ExitCode, as_json: bool) -> int:
    sys.stderr.write(f"error: {problem}\n  → {fix}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": {"problem": problem, "fix": fix, "exit_code": int(code)}}) + "\n")
    return int(code)


def _interrupt(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt
