"""What the commands ``run`` and ``bench`` do with an open runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resvit_engines.bench.bench import BenchSettings
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.pictures.sizes import Size
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.run.golden_files import encoded, golden_inputs, input_name, output_of
from resvit_engines.run.npy import read_array
from resvit_engines.run.prepared import NONE, Listed, images_from, require_size
from resvit_engines.run.runner import Runner


@dataclass(frozen=True)
class Answered:
    """What a runner made of images: the output that was written, its shape and type, the file, and what computed it.

    ``why`` says why that was not the engine. ``files`` are the pictures of the rows, where pictures were given, and
    ``left_out`` what else lay in their folder.
    """

    images: int
    output: str
    shape: tuple[int, ...]
    dtype: str
    path: str
    label: str
    why: str
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        lists = {"shape": list(self.shape), "files": list(self.files), "left_out": list(self.left_out)}
        return {**dataclasses.asdict(self), **lists}


def outputs_into(
    path: Path,
    runner: Runner,
    images: Array,
    manifest: Manifest,
    output_name: str | None = None,
    beside: Mapping[str, Array] | None = None,
    pictures: Listed = NONE,
) -> Answered:
    """Run ``images`` [N, …], with what is read ``beside`` them by name; returns what was done, of which ``pictures``.

    One output [N, …] is written to ``path``, whole or not at all.

    Raises:
        ResvitError: INPUT for images that are not the model's, or an output that it does not have.
    """
    if manifest is not None and manifest.build is not None and manifest.build.sizes is not None and images.ndim == 4:
        require_size(manifest, (images.shape[2], images.shape[3]))
    outputs = runner({input_name(runner, manifest): encoded(images, manifest), **(beside or {})})
    name = output_of(outputs) if output_name is None else output_name
    if name not in outputs:
        raise ResvitError(f"The model has no output {name!r}.", f"It has {', '.join(outputs)}.")
    with atomic_file(path) as partial, partial.open("wb") as stream:
        np.save(stream, outputs[name])
    written = outputs[name]
    files = tuple(map(str, pictures.files))
    told = (written.shape, written.dtype.name, str(path), runner.label, runner.why)
    return Answered(len(images), name, *told, files, pictures.left_out)


def golden_feeds(folder: Path, manifest: Manifest, runner: Runner, size: Size | None = None) -> Arrays | None:
    """The golden images of an unpacked bundle, to be timed with; None where there are none.

    Of another ``size`` than the usual one, an image of noise.

    Raises:
        ResvitError: INPUT for a size that the bundle is not for.
    """
    path = folder / "golden_input.npy"
    if not path.is_file():
        return None
    images = read_array(path, "golden")
    if size is not None and size != images.shape[2:]:
        require_size(manifest, size)
        noise = np.random.default_rng(0).standard_normal((len(images), images.shape[1], *size)).astype(np.float32)
        images = encoded(noise, manifest)
    return {input_name(runner, manifest): images, **golden_inputs(folder, manifest.golden, len(images))}


def arrays_from(
    sources: Sequence[str], preprocess: Mapping[str, Any] | None = None, pictures: Listed | None = None
) -> tuple[Array, Arrays]:
    """The images and what is read beside them, from one source of images and any number of ``NAME=FILE.npy``.

    Pictures become images as ``preprocess``, of the bundle's manifest, says: see ``images_from``.

    Raises:
        ResvitError: INPUT where there is not one source of images, and as ``read_array`` and ``images_from``.
    """
    named = dict(source.split("=", 1) for source in sources if _is_named(source))
    beside = {name: read_array(Path(file), "input") for name, file in named.items()}
    return images_from(image_source(sources), preprocess, pictures), beside


def image_source(sources: Sequence[str]) -> Path:
    """Of ``sources`` the one that holds images; raises ``ResvitError`` INPUT where there is not one."""
    images = [source for source in sources if not _is_named(source)]
    if len(images) != 1:
        raise ResvitError(
            f"{len(images)} files of images were given.",
            "Give one --input FILE.npy, picture or folder of pictures, and --input NAME=FILE.npy for whatever else "
            "the model reads.",
        )
    return Path(images[0])


def _is_named(source: str) -> bool:
    """Whether a source is NAME=FILE, and not a file whose name has an equals sign."""
    return "=" in source and "/" not in source.split("=", 1)[0] and not Path(source).exists()


def settings_from(flags: Mapping[str, Any], *runners: Runner) -> BenchSettings:
    """The settings that the flags say; without a batch the smallest that all runners take."""
    batch = flags["batch"]
    if batch is None:
        batch = max(runner.batch[0] for runner in runners)
    return BenchSettings(
        batch, flags["seconds"], flags["warmup"], flags["iterations"], flags["streams"], flags["cuda_graph"]
    )
