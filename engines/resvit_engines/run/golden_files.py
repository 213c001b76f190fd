"""The golden images that travel with a bundle, and how near one output is to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.errors import ResvitError
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.run.npy import read_array
from resvit_engines.trt.running import TensorSpec


class _Runner(Protocol):
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    def __call__(self, arrays: Mapping[str, Array]) -> Arrays: ...


def input_name(runner: _Runner, manifest: Manifest | None) -> str:
    """The input that images go to: the one that the manifest names, or the only or first one."""
    names = [spec.name for spec in runner.inputs]
    declared = manifest.input if manifest else None
    return declared.name if declared and declared.name in names else names[0]


def encoded(images: Array, manifest: Manifest) -> Array:
    """Prepared images [N, C, H, W] as the engine of a bundle reads them; whole numbers are that already."""
    encoding = manifest.input.encoding if manifest.input else None
    return images if encoding is None else encoding.encode(images)


def output_of(outputs: Arrays) -> str:
    """The output that is judged: ``logits``, or the only or first one."""
    return "logits" if "logits" in outputs else next(iter(outputs))


def golden_output(
    runner: _Runner, images: Array, manifest: Manifest | None, beside: Mapping[str, Array] | None = None
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


def moving_sqnr_db(reference: Array, other: Array) -> float | None:
    """The same of what moves from image to image, [N, …] less its mean over the images.

    None where ``other`` equals the reference, or nothing moves: a large part that all images share would hide noise.
    """
    true = reference.astype(np.float64)
    still = true.mean(axis=0, keepdims=True)
    moving, noise = float(np.linalg.norm(true - still)), float(np.linalg.norm(other.astype(np.float64) - true))
    if noise == 0.0 or moving <= 1e-6 * float(np.linalg.norm(true)):
        return None
    return 20.0 * float(np.log10(moving / noise))


def golden_arrays(folder: Path, golden: GoldenFiles | None) -> tuple[Array, Array]:
    """The golden images [N, C, H, W] of an unpacked bundle, and the outputs [N, …] that were validated.

    Raises:
        ResvitError: INPUT where they are missing, damaged, or not the same number.
    """
    golden = golden or GoldenFiles()
    images, expected = (read_array(folder / name, "golden") for name in (golden.input, golden.output))
    if len(images) == 0 or len(images) != len(expected):
        raise ResvitError(
            f"The bundle's golden files hold {len(images)} images and {len(expected)} outputs.",
            "Make the bundle again.",
        )
    return images, expected


def other_golden_outputs(folder: Path, golden: GoldenFiles | None, images: int) -> dict[str, Array]:
    """The validated outputs [N, …] by name, beside the one that is judged, of a network that has several.

    Raises:
        ResvitError: INPUT where one is missing, damaged, or not of as many ``images``.
    """
    if golden is None:
        return {}
    return _listed(folder, {name: file for name, file in golden.outputs.items() if file != golden.output}, images)


def golden_inputs(folder: Path, golden: GoldenFiles | None, images: int) -> dict[str, Array]:
    """What the network reads beside the golden images, [N, …] by name; empty where it reads images alone.

    Raises:
        ResvitError: INPUT where one is missing, damaged, or not of as many ``images``.
    """
    return _listed(folder, golden.inputs, images) if golden else {}


def _listed(folder: Path, files: Mapping[str, str], images: int) -> dict[str, Array]:
    arrays = {name: read_array(folder / file, "golden") for name, file in files.items()}
    for name, array in arrays.items():
        if len(array) != images:
            raise ResvitError(
                f"The bundle's golden files hold {images} images and {len(array)} of {name}.", "Make the bundle again."
            )
    return arrays
