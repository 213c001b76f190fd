"""The command ``resvit-export``. Commands parse, call the library and print; nothing heavy is imported for --help."""

from __future__ import annotations

import os

import click

from resvit_engines.console import LazyCommands, run_command, run_process

_COMMANDS = {
    "build": "resvit_export.cli.stages",
    "prune": "resvit_export.cli.stages",
    "fold": "resvit_export.cli.stages",
    "export": "resvit_export.cli.stages",
    "calibrate": "resvit_export.cli.stages",
    "quantize": "resvit_export.cli.stages",
    "sensitivity": "resvit_export.cli.sensitivity",
    "fuse": "resvit_export.cli.stages",
    "validate": "resvit_export.cli.stages",
    "compile": "resvit_export.cli.stages",
    "audit": "resvit_export.cli.audit",
    "bundle": "resvit_export.cli.stages",
    "report": "resvit_export.cli.stages",
    "bench": "resvit_export.cli.bench",
    "compare": "resvit_export.cli.compare",
    "sweep": "resvit_export.cli.sweep",
    "keygen": "resvit_export.cli.shipping.keys",
    "keylist": "resvit_export.cli.shipping.keylist",
    "sign": "resvit_export.cli.shipping.keys",
    "push": "resvit_export.cli.shipping.push",
    "fleet": "resvit_export.cli.shipping.fleet",
    "layers": "resvit_export.cli.layers",
    "serve-config": "resvit_export.cli.shipping.serve_config",
    "wheel": "resvit_export.cli.shipping.wheel",
    "targets": "resvit_export.cli.tools",
    "inspect": "resvit_export.cli.tools",
    "doctor": "resvit_export.cli.tools",
}


class _Commands(LazyCommands):
    modules = _COMMANDS


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  resvit-export targets
  resvit-export build --precision int8 --target jetson-orin --model resvit:embed-mini --checkpoint runs/demo/embed-mini.pt --data fashion-mnist
  resvit-export build --help

\b
Exit codes: 0 done, 2 misspelt command, 3 unusable model, data or recipe, 4 accuracy rejected, 5 accuracy
undecided, 6 impossible on that target, 7 something missing, 8 engine build failed, 9 disk, memory or
permissions, 10 signature or trust, 11 the engine's outputs are not those that were validated, 12 accurate but no
faster than FP16, 13 a release was stopped in a fleet, 14 devices of a fleet are missing, 130 interrupted, 1 a
bug of ours.""",  # noqa: E501
)
@click.version_option(package_name="resvit-export")
def cli() -> None:
    """Take a trained ResNet+ViT hybrid to a quantised, validated TensorRT engine.

    'build' does everything; each stage is also a command of its own on the same run folder, and does the stages
    before it where they are not finished yet.
    """


def main() -> None:
    """Entry point of the console script: runs a command and turns errors into sentences and exit codes."""
    # Threads of PyTorch that wait by spinning cost five times the processor time as soon as the machine is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    run_process(run)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code and never raises for what a user can cause."""
    return run_command(
        cli,
        "resvit-export",
        arguments,
        missing="Building needs the extra: pip install 'resvit-export[host]'. 'resvit-export doctor' checks the rest.",
    )
