"""The golden images that travel with a bundle, and how near one output is to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from resvit_engines.errors import ResvitError
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.trt.running import TensorSpec


class _Runner(Protocol):
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    def __call__(self, arrays: Mapping[str, Array]) -> Arrays: ...


def input_name(runner: _Runner, manifest: Mapping[str, Any]) -> str:
    """The input that images go to: the one that the manifest names, or the only or first one."""
    declared = manifest.get("input")
    names = [spec.name for spec in runner.inputs]
    name = declared.get("name") if isinstance(declared, Mapping) else None
    return name if name in names else names[0]


def output_of(outputs: Arrays) -> str:
    """The output that is judged: ``logits``, or the only or first one."""
    return "logits" if "logits" in outputs else next(iter(outputs))


def golden_output(
    runner: _Runner, images: Array, manifest: Mapping[str, Any], beside: Mapping[str, Array] | None = None
) -> Array:
    """What ``runner`` makes of the golden images and of what is read ``beside`` them."""
    outputs = runner({input_name(runner, manifest): images, **(beside or {})})
    return outputs[output_of(outputs)]


def sqnr_db(reference: Array, other: Array) -> float | None:
    """Signal-to-noise ratio of ``other`` in dB; None where it equals the reference."""
    true = reference.astype(np.float64)
    noise, signal = float(np.linalg.norm(other.astype(np.float64) - true)), float(np.linalg.norm(true))
    if noise == 0.0:
        return None
    return 20.0 * float(np.log10(max(signal, 1e-300) / noise))


def golden_arrays(folder: Path, manifest: Mapping[str, Any]) -> tuple[Array, Array]:
    """The golden images [N, C, H, W] of an unpacked bundle, and the outputs [N, …] that were validated.

    Raises:
        ResvitError: INPUT where they are missing, damaged, or not the same number.
    """
    named = manifest.get("golden")
    names = named if isinstance(named, Mapping) else {"input": "golden_input.npy", "output": "golden_output.npy"}
    images, expected = (read_array(folder / _plain(names.get(key)), "golden") for key in ("input", "output"))
    if len(images) == 0 or len(images) != len(expected):
        raise ResvitError(
            f"The bundle's golden files hold {len(images)} images and {len(expected)} outputs.",
            "Make the bundle again.",
        )
    return images, expected


def other_golden_outputs(folder: Path, manifest: Mapping[str, Any], images: int) -> dict[str, Array]:
    """The validated outputs [N, …] by name, beside the one that is judged, of a network that has several.

    Raises:
        ResvitError: INPUT where one is missing, damaged, or not of as many ``images``.
    """
    named = manifest.get("golden")
    listed = named.get("outputs") if isinstance(named, Mapping) else None
    if not isinstance(named, Mapping) or not isinstance(listed, Mapping):
        return {}
    return _listed(folder, {name: file for name, file in listed.items() if file != named.get("output")}, images)


def golden_inputs(folder: Path, manifest: Mapping[str, Any], images: int) -> dict[str, Array]:
    """What the network reads beside the golden images, [N, …] by name; empty where it reads images alone.

    Raises:
        ResvitError: INPUT where one is missing, damaged, or not of as many ``images``.
    """
    named = manifest.get("golden")
    listed = named.get("inputs") if isinstance(named, Mapping) else None
    return _listed(folder, listed, images) if isinstance(listed, Mapping) else {}


def _listed(folder: Path, listed: Mapping[Any, Any], images: int) -> dict[str, Array]:
    found = {str(name): read_array(folder / _plain(file), "golden") for name, file in listed.items()}
    for name, array in found.items():
        if len(array) != images:
            raise ResvitError(
                f"The bundle's golden files hold {images} images and {len(array)} of {name}.", "Make the bundle again."
            )
    return found


def _plain(name: object) -> str:
    if not isinstance(name, str) or not name or PurePosixPath(name).name != name:
        raise ResvitError(f"The manifest names the golden file {name!r}, which is no file name.", "Make it again.")
    return name


def read_array(path: Path, what: str) -> Array:
    """An array [N, …] from an ``.npy`` file; nothing in it is executed.

    Raises:
        ResvitError: INPUT where it is missing, damaged, or no array of numbers.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise ResvitError(f"There is no {what} file {path}.", "Check the path.") from error
    except (OSError, ValueError, EOFError) as error:
        raise ResvitError(f"{path} cannot be read as an .npy file: {error}.", "Save it with numpy.save.") from error
    if not isinstance(array, np.ndarray) or array.ndim == 0 or array.dtype.kind not in "fiub":
        raise ResvitError(f"{path} holds no array of numbers [N, …].", "Save it with numpy.save.")
    return array
