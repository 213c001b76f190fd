"""What is served: an unpacked bundle whose signature held, and what of it every program asks for."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.bundle.bundle import extract_trusted
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError, one_line
from resvit_engines.files import atomic_directory
from resvit_engines.keys.public import TrustStore
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.program.reading import Reading, reading_of
from resvit_engines.run.prepared import preprocess_from
from resvit_engines.targets.table import Builder
from resvit_engines.trt.io_tensor import IoTensor

FILES = Path(__file__).parent / "files"
"""What is written as it stands, but for the names in it."""
ENGINE = "engine.plan"


@dataclass(frozen=True)
class Subject:
    """An unpacked bundle: its folder, what it says, how frames become input and outputs become answers."""

    folder: Path
    manifest: Manifest
    preprocess: PicturePreprocess
    reading: Reading

    @property
    def name(self) -> str:
        """What the bundle is called."""
        return self.manifest.name or "model"

    @property
    def identifier(self) -> str:
        """The name as packages of ROS and C are called: lower case, digits and underscores, a letter first."""
        plain = re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")
        return f"resvit_{plain}" if plain else "resvit_model"

    @property
    def image(self) -> IoTensor:
        """The input that images go to; raises INPUT where the manifest does not say it, or there are others beside."""
        manifest = self.manifest
        named = manifest.input.name if manifest.input else None
        beside = [tensor.name for tensor in manifest.inputs if tensor.name != named]
        if manifest.input is None or beside:
            raise ResvitError(
                f"The network reads {', '.join(beside)} beside images."
                if beside
                else "The manifest does not say what the network reads.",
                "Call it from a program: resvit_engines.load, docs/program.md.",
                ExitCode.IMPOSSIBLE,
            )
        return manifest.input

    @property
    def batches(self) -> tuple[int, int, int]:
        """The smallest, usual and largest batch of the engine."""
        return self.manifest.build_settings.batch

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, each on one line, by the numbers that the network answers.

        A number where a name is not known.
        """
        names = self.reading.names
        return tuple(one_line(names.get(number, str(number))) for number in range(max(names, default=-1) + 1))

    def require_engine(self, what: str) -> Path:
        """The engine of the bundle, which ``what`` runs by TensorRT.

        Raises:
            ResvitError: IMPOSSIBLE where the bundle has none, or one that TensorRT does not read.
        """
        report = self.manifest.engine
        if report is None:
            raise ResvitError(
                f"The bundle holds no engine, and {what} runs one.",
                "Build it where it will run, 'resvit-engine build', and give the bundle that this makes.",
                ExitCode.IMPOSSIBLE,
            )
        if report.builder is not Builder.TENSORRT:
            raise ResvitError(
                f"The engine is for TensorRT for RTX, and {what} runs those of TensorRT.",
                "Build for a datacenter GPU or a Jetson.",
                ExitCode.IMPOSSIBLE,
            )
        if report.strip_weights:
            raise ResvitError(
                f"The engine was built without its weights, and {what} does not fill them in.",
                "Build it with them.",
                ExitCode.IMPOSSIBLE,
            )
        return self.folder / ENGINE


@contextlib.contextmanager
def opened_subject(bundle: Path, trust: TrustStore) -> Iterator[Subject]:
    """Check a bundle's signature and files, and unpack it into a temporary folder.

    Raises:
        ResvitError: UNTRUSTED and INPUT as ``extract_trusted``; INPUT where it does not say how pictures become input.
    """
    with tempfile.TemporaryDirectory(prefix="resvit-serve-") as scratch:
        folder = Path(scratch) / "bundle"
        manifest = extract_trusted(bundle, folder, trust)
        yield Subject(folder, manifest, preprocess_from(manifest.preprocess), reading_of(manifest))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` when the block ends well.

    Raises:
        ResvitError: INPUT where ``out`` is there and not an empty folder.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ResvitError(f"{out} exists already and is not an empty folder.", "Name a folder that is not there yet.")
    with atomic_directory(out) as partial:
        yield partial
