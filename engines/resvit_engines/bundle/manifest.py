"""``manifest.json``: what a bundle is, and what it must look like before anything in it is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from resvit_engines.builder.device_plan import DevicePlan
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.parts import BuiltOnDevice, BundledFile, GoldenFiles, ImageCount, ManifestVerdict, Recovery
from resvit_engines.bundle.zip_layout import NAME_LIMIT
from resvit_engines.errors import ResvitError
from resvit_engines.names import is_relative_path
from resvit_engines.records import LARGEST, Record
from resvit_engines.targets.table import Target
from resvit_engines.trt.io_tensor import IoTensor, io_tensors_from_json

MANIFEST = "manifest.json"
SIGNATURE = "signature.json"
FORMAT = "resvit-bundle"
FORMAT_VERSION = 2
FIX_DAMAGED = "Copy the bundle again, and compare its sha256sum with the original's."
_MEMBERS_LIMIT = 10_000
_KEYS = frozenset(
    (
        *("format", "format_version", "files", "name", "release", "versions", "model", "precision", "quantizer"),
        *("target", "settings", "build", "preprocess", "input", "inputs", "outputs", "golden", "calibration"),
        *("verdict", "verdict_reason", "task", "answers", "class_names", "validation", "stages", "recovery", "warning"),
        *("engine", "plan", "built_from", "built_on", "rehearsal"),
    )
)


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and what it is for; None and empty is what its maker did not say.

    ``name`` is what folders and files are called by. ``release`` only grows: a device takes no lower one than it has
    had. ``versions`` are those of the libraries that made it, ``model`` names the network and its files' digests,
    ``settings`` are the recipe's, ``preprocess`` how images become input and ``answers`` how outputs are read (the
    task's ``options``, how many ``classes`` the data has, ``class_ids``); these are passed on as they are. ``input`` is
    the image and ``inputs`` are all, where the network reads more than images. ``stages`` holds the keys of the
    finished stages by name. ``engine`` is there in a bundle with an engine, ``plan`` in one to be built on the device.
    ``other`` is what a newer version says besides.
    """

    name: str | None = None
    release: int = 1
    target: Target | None = None
    engine: EngineReport | None = None
    plan: DevicePlan | None = None
    build: BuildSettings | None = None
    precision: str | None = None
    quantizer: str | None = None
    input: IoTensor | None = None
    inputs: tuple[IoTensor, ...] = ()
    outputs: tuple[IoTensor, ...] = ()
    golden: GoldenFiles | None = None
    calibration: ImageCount | None = None
    verdict: ManifestVerdict | None = None
    recovery: Recovery | None = None
    warning: str | None = None
    model: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] | None = None
    answers: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    stages: Mapping[str, str] | None = None
    built: BuiltOnDevice | None = None
    files: tuple[BundledFile, ...] = ()
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.release) is not int or not 0 <= self.release <= LARGEST:
            raise ResvitError(f"The release {self.release!r} is no whole number.", "Give one, such as 7.")

    def size_of(self, path: str) -> int | None:
        """The size in bytes of a file of the bundle; None where it has no such file."""
        return next((file.bytes for file in self.files if file.path == path), None)

    def digest_of(self, path: str) -> str:
        """The digest of a file of the bundle; one that matches nothing where it has no such file."""
        return next((file.sha256 for file in self.files if file.path == path), "")

    @property
    def build_settings(self) -> BuildSettings:
        """How its maker chose that the engine is built; raises INPUT where that is not said."""
        settings = self.build or (self.plan.settings if self.plan else None)
        if settings is None:
            raise ResvitError("The manifest does not say how the engine is built.", "Make the bundle again.")
        return settings

    def described(self) -> dict[str, Any]:
        """Plain JSON values of all but the files."""
        said: dict[str, Any] = {
            "name": self.name,
            "release": self.release,
            "versions": self.versions,
            "model": self.model,
            "precision": self.precision,
            "quantizer": self.quantizer,
            "target": self.target,
            "settings": self.settings,
            "build": self.build,
            "preprocess": self.preprocess,
            "answers": self.answers,
            "input": self.input,
            "inputs": [tensor.to_json() for tensor in self.inputs] or None,
            "outputs": [tensor.to_json() for tensor in self.outputs] or None,
            "calibration": self.calibration,
            "golden": self.golden,
            "stages": self.stages,
            "recovery": self.recovery,
            "warning": self.warning,
            "engine": self.engine,
            "plan": self.plan,
        }
        groups = [group.to_json() for group in (self.verdict, self.built) if group is not None]
        plain = {key: _plain(value) for key, value in said.items() if value is not None}
        return {**self.other, **plain, **{key: value for group in groups for key, value in group.items()}}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in a bundle's ``manifest.json``."""
        files = [file.to_json() for file in self.files]
        return {**self.described(), "format": FORMAT, "format_version": FORMAT_VERSION, "files": files}

    @classmethod
    def from_json(cls, record: Record) -> Manifest:
        """What :meth:`to_json` wrote, without its format being looked at; see ``manifest_from_bytes``.

        Raises:
            ResvitError: INPUT, naming the key, where it is malformed.
        """

        def part(key: str) -> Record | None:
            return record.optional(key, record.record)

        target, engine, plan, build = part("target"), part("engine"), part("plan"), part("build")
        image, golden, calibration, recovery = part("input"), part("golden"), part("calibration"), part("recovery")
        return cls(
            name=record.optional("name", record.name),
            release=1 if "release" not in record.names else record.whole("release"),
            target=Target.from_json(target) if target else None,
            engine=EngineReport.from_json(engine) if engine else None,
            plan=DevicePlan.from_json(plan) if plan else None,
            build=BuildSettings.from_json(build) if build else None,
            precision=record.optional("precision", record.text),
            quantizer=record.optional("quantizer", record.text),
            input=IoTensor.from_json(image) if image else None,
            inputs=io_tensors_from_json(record.optional("inputs", record.records) or ()),
            outputs=io_tensors_from_json(record.optional("outputs", record.records) or ()),
            golden=GoldenFiles.from_json(golden) if golden else None,
            calibration=ImageCount.from_json(calibration) if calibration else None,
            verdict=ManifestVerdict.from_json(record) if "verdict" in record.names else None,
            recovery=Recovery.from_json(recovery) if recovery else None,
            warning=record.optional("warning", record.text),
            model=record.optional("model", record.plain),
            settings=record.optional("settings", record.plain),
            preprocess=record.optional("preprocess", record.plain),
            answers=record.optional("answers", record.plain),
            versions=record.optional("versions", record.texts_by_name),
            stages=record.optional("stages", record.texts_by_name),
            built=BuiltOnDevice.from_json(record) if "built_from" in record.names else None,
            files=tuple(map(BundledFile.from_json, record.records("files"))),
            other=record.other_than(_KEYS),
        )


def manifest_from_bytes(data: bytes, what: object) -> Manifest:
    """Parse a manifest and check its form; ``what`` names the bundle in messages.

    Raises:
        ResvitError: INPUT where it is none, is of another format, or anything in it is malformed.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ResvitError(f"The {MANIFEST} of {what} does not read: {error}.", FIX_DAMAGED) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ResvitError(f"{what} is a zip file, but no bundle of resvit-export.", "Give the path of a .resvit file.")
    if document.get("format_version") != FORMAT_VERSION:
        raise ResvitError(
            f"{what} has bundle format {document.get('format_version')}; this program reads {FORMAT_VERSION}.",
            "Use the version of resvit-export that wrote it, or a newer one.",
        )
    manifest = Manifest.from_json(Record(document, f"the {MANIFEST} of {what}"))
    names = [file.path for file in manifest.files]
    if len(names) > _MEMBERS_LIMIT or names != sorted(names):
        raise ResvitError(f"The {MANIFEST} of {what} lists its files wrongly.", FIX_DAMAGED)
    check_names([MANIFEST, SIGNATURE, *names], f"{what} is refused")
    return manifest


def check_names(names: Sequence[str], refused: str) -> None:
    """Names are plain relative POSIX paths that mean the same file on every system, each once, none inside another.

    Raises:
        ResvitError: INPUT, beginning with ``refused``.
    """
    seen: set[str] = set()
    for name in names:
        if not is_relative_path(name, NAME_LIMIT):
            raise ResvitError(f"{refused}: the name {name[:200]!r} is not a plain relative path.", FIX_DAMAGED)
        if name.casefold() in seen:
            raise ResvitError(f"{refused}: the name {name!r} comes twice.", FIX_DAMAGED)
        seen.add(name.casefold())
    for name in names:
        if any(str(parent) in seen for parent in PurePosixPath(name.casefold()).parents):
            raise ResvitError(f"{refused}: {name!r} lies inside another file.", FIX_DAMAGED)


def _plain(value: Any) -> Any:
    """A part of the manifest as JSON values: its own form, or as it is."""
    return value.to_json() if hasattr(value, "to_json") else value
