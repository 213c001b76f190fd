"""The stage ``bundle``: everything that the device needs, in one file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import ImageCount, ManifestVerdict
from resvit_engines.errors import ResvitError
from resvit_engines.files import canonical_json, pretty_json, sha256_bytes
from resvit_engines.progress import Reporter
from resvit_engines.records import Record
from resvit_engines.targets.table import Precision, Target
from resvit_engines.trt.io_tensor import IoTensor, io_tensors_from_json
from resvit_export.loading.source import NetworkSource
from resvit_export.recipe.choices import Quantizer
from resvit_export.run import Run
from resvit_export.stage import Artifact, File, Stage, package_version
from resvit_export.stages.calibrate import Calibrated
from resvit_export.stages.compile import Compiled, lasting
from resvit_export.stages.decide.recover import Recovered
from resvit_export.stages.export import Exported
from resvit_export.stages.quantize import Bound, Quantized
from resvit_export.stages.score import Scored
from resvit_export.stages.validate import Validated
from resvit_export.to_tensorrt.copy import TENSORRT_COPY

if TYPE_CHECKING:
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_engines.bundle.source import RecordedFile
    from resvit_engines.keys.private import SigningKey


@dataclass(frozen=True)
class Signer:
    """The key that signs; its identity is the public half's."""

    key: SigningKey

    @property
    def digest(self) -> str:
        """The key's identity."""
        return self.key.public.keyid


def signer_of(run: Run) -> Signer | None:
    """The key that the recipe or the environment names; raises ``ResvitError`` for one that cannot be used."""
    key = run.signing_key()
    return Signer(key) if key else None


@dataclass(frozen=True)
class Bundled(Artifact):
    """One ``.resvit`` file."""

    @property
    def bundle(self) -> File:
        """The file."""
        (name,) = self.record.outputs
        return self.file(name)

    @functools.cached_property
    def manifest(self) -> Manifest:
        """What it says of itself."""
        from resvit_engines.bundle.bundle import read_manifest

        return read_manifest(self.bundle.path)


@dataclass(frozen=True)
class Naming:
    """What the bundle is called, and what the user said; ``recipe`` holds its settings without paths."""

    network: NetworkSource
    recipe: Mapping[str, Any]
    precision: Precision
    quantizer: Quantizer
    target: Target
    release: int
    file_name: str


def naming_of(run: Run, ships: Precision) -> Naming:
    """As the recipe says, of what ships in that precision."""
    recipe = run.recipe
    said = (recipe.settings_without_paths(), ships, recipe.quantizer)
    return Naming(run.network, *said, run.require_target(), recipe.release, run.bundle_name(ships))


def bundle_of(run: Run, ships: Precision, validation: ImageSet, contents: Contents) -> Bundle:
    """Of a run's finished stages; its preprocessing is what the validation images really went through.

    What a loader of the user's did to them is not known: it is named, so that nobody guesses.
    """
    made = {"factory": validation.factory} if validation.prepared else validation.preprocess.to_json()
    return Bundle(naming_of(run, ships), made, contents)


@dataclass(frozen=True)
class Contents:
    """The finished stages that are packed. ``model`` is what ships, ``build`` how its engine is built.

    ``bound`` knows the types of inputs and outputs where they are not all FP32.
    """

    exported: Exported
    recovered: Recovered | None
    calibrated: Calibrated
    quantized: Quantized
    model: File
    bound: Bound | None
    scored: Scored
    validated: Validated
    compiled: Compiled
    build: BuildSettings
    signer: Signer | None


@dataclass(frozen=True)
class Bundle(Stage[Bundled]):
    """Pack the finished stages of a run."""

    name: ClassVar[str] = "bundle"
    artifact: ClassVar[type[Artifact]] = Bundled

    naming: Naming
    preprocess: Mapping[str, Any]
    """What the validation images went through; only ``factory`` where a loader of the user's made the input itself."""
    contents: Contents

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the file. The manifest holds no time, host name or path: the same inputs give the same bytes."""
        del reporter
        from resvit_engines.bundle.bundle import write_bundle

        key = self.contents.signer.key if self.contents.signer else None
        write_bundle(folder / self.naming.file_name, self.manifest(), self.files(), key=key)

    def agrees(self, artifact: Bundled) -> bool:
        """Whether the bundle holds the files that the stages recorded, says what they say, and is signed as asked."""
        from resvit_engines.bundle.bundle import read_trusted_manifest, signers
        from resvit_engines.keys.public import TrustStore

        path, signer = artifact.bundle.path, self.contents.signer
        try:
            if signer is None:
                manifest = artifact.manifest if not signers(path) else None
            else:
                manifest = read_trusted_manifest(path, TrustStore((signer.key.public,)), expired_ok=True)
        except ResvitError:
            return False
        wanted = {name: sha256_bytes(it) if isinstance(it, bytes) else it.sha256 for name, it in self.files().items()}
        return (
            manifest is not None
            and {file.path: file.sha256 for file in manifest.files} == wanted
            and canonical_json(manifest.described()) == canonical_json(self.manifest().described())
        )

    def files(self) -> dict[str, RecordedFile | bytes]:
        """What goes in, by name: each file only as it was when its stage recorded it."""
        from resvit_engines.bundle.source import RecordedFile

        scored, compiled = self.contents.scored, self.contents.compiled
        recorded = {
            "model.onnx": self.contents.model,
            "ranges.json": self.contents.calibrated.ranges,
            "quantize.json": self.contents.quantized.file("quantize.json"),
            "verdict.json": self.contents.validated.file("verdict.json"),
            **{name: scored.file(name) for name in scored.record.outputs if name.startswith("golden_")},
        }
        for name in ("engine.plan", "plan.json", "layers.json", TENSORRT_COPY):
            if compiled.has(name):
                recorded[name] = compiled.file(name)
        files: dict[str, RecordedFile | bytes] = {
            name: RecordedFile(file.path, file.digest) for name, file in recorded.items()
        }
        if compiled.engine is not None:
            files["engine.json"] = pretty_json(lasting(compiled.engine).to_json())
        if compiled.plan is not None:
            files["README.txt"] = self.readme().encode()
        return files

    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        record, report = self.contents.validated.verdict, Record(self.contents.exported.report.to_json(), "export.json")
        chain: list[Artifact] = [
            self.contents.exported,
            self.contents.calibrated,
            self.contents.quantized,
            self.contents.validated,
        ]
        chain += [self.contents.recovered] if self.contents.recovered else []
        warning = f"Validation did not accept this model ({record.kind.value}): {record.reason}"
        validation = ImageCount(record.verdict.images, record.data_digest)
        inputs = io_tensors_from_json(report.optional("inputs", report.records) or ())
        image, outputs = IoTensor.from_json(report.record("input")), io_tensors_from_json(report.records("outputs"))
        if self.contents.bound is not None:
            bound, outputs = self.contents.bound.tensors
            image, inputs = bound[0], bound if len(bound) > 1 else ()
        return Manifest(
            name=self.naming.file_name.removesuffix(".resvit"),
            release=self.naming.release,
            target=self.naming.target,
            engine=lasting(self.contents.compiled.engine) if self.contents.compiled.engine else None,
            plan=self.contents.compiled.plan,
            build=self.contents.build,
            precision=self.naming.precision.value,
            quantizer=self.naming.quantizer.value,
            input=image,
            inputs=inputs,
            outputs=outputs,
            golden=record.golden,
            calibration=ImageCount(self.contents.calibrated.images.images, self.contents.calibrated.images.digest),
            verdict=ManifestVerdict(record.kind.value, record.reason, record.task, record.class_names, validation),
            recovery=self.contents.recovered.recovery if self.contents.recovered else None,
            warning=None if record.kind is VerdictKind.ACCEPTED else warning,
            model=dict(self.naming.network.identity),
            settings=dict(self.naming.recipe),
            preprocess=self.preprocess,
            answers=record.reading,
            versions={"resvit-export": package_version("resvit-export"), **self.contents.quantized.record.versions},
            stages={artifact.stage: artifact.record.key for artifact in chain},
        )

    def _reads(self) -> str:
        """What goes into the engine, for people."""
        image = self.contents.bound.tensors[0][0] if self.contents.bound else None
        if image is None or image.encoding is None:
            return "FP16 images" if image else "FP32 images"
        return f'{image.dtype}: round(image * factor + offset), as manifest.json says under "input", of images'

    def readme(self) -> str:
        """What stands beside a plan, for whoever has only the bundle."""
        plan, verdict = self.contents.compiled.plan, self.contents.validated.verdict
        assert plan is not None
        commands = "\n".join(f"    {command}" for command in plan.commands)
        notes = "\n".join(plan.notes)
        prepared = (
            f"as {self.preprocess['factory']}, code of whoever trained the network, made them"
            if "factory" in self.preprocess
            else 'prepared as manifest.json says under "preprocess"'
        )
        return f"""{self.naming.file_name}

{plan.why}

On the {self.naming.target.title} ({self.naming.target.software}), with the wheel of resvit_engines and the public key of whoever signed this:

    resvit-engine build {self.naming.file_name} --trust KEY.pub

which also checks the engine and packs it for 'resvit-engine install'. Or with TensorRT's own program alone:

{commands}

{notes}

The engine reads {self._reads()} {prepared}. golden_input.npy and
golden_output.npy hold what it reads and the outputs that were validated: compare the engine's with them.

Verdict of the validation: {verdict.kind.value}; {verdict.reason}.
"""  # noqa: E501
