"""What the commands ``run`` and ``bench`` do with an open runner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.run import Runner
from resvit_engines.run.bench import BenchSettings
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.run.golden_files import input_name, output_of, read_array


def outputs_into(
    path: Path, runner: Runner, images: Array, manifest: Mapping[str, Any], output_name: str | None = None
) -> dict[str, Any]:
    """Run ``images`` [N, …] and write one output [N, …] to ``path``, whole or not at all; returns what was done.

    Raises:
        ResvitError: INPUT for images that are not the model's, or an output that it does not have.
    """
    outputs = runner({input_name(runner, manifest): images})
    name = output_of(outputs) if output_name is None else output_name
    if name not in outputs:
        raise ResvitError(f"The model has no output {name!r}.", f"It has {', '.join(outputs)}.")
    with atomic_file(path) as partial, partial.open("wb") as stream:
        np.save(stream, outputs[name])
    return {
        "images": len(images),
        "output": name,
        "shape": list(outputs[name].shape),
        "dtype": outputs[name].dtype.name,
        "path": str(path),
        "label": runner.label,
        "why": runner.why,
    }


def golden_feeds(folder: Path, manifest: Mapping[str, Any], runner: Runner) -> Arrays | None:
    """The golden images of an unpacked bundle, to be timed with; None where there are none."""
    path = folder / "golden_input.npy"
    return {input_name(runner, manifest): read_array(path, "golden")} if path.is_file() else None


def settings_from(flags: Mapping[str, Any], *runners: Runner) -> BenchSettings:
    """The settings that the flags say; without a batch the smallest that all runners take."""
    batch = flags["batch"]
    if batch is None:
        batch = max(runner.batch[0] for runner in runners)
    return BenchSettings(
        batch, flags["seconds"], flags["warmup"], flags["iterations"], flags["streams"], flags["cuda_graph"]
    )
