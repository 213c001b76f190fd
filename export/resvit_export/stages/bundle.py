"""The stage ``bundle``: everything that the device needs, in one file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.targets.table import Target
from resvit_export.stage import Artifact, File, Stage, package_version
from resvit_export.stages.calibrate import Calibrated
from resvit_export.stages.compile import Compiled, lasting
from resvit_export.stages.decide.recover import Recovered
from resvit_export.stages.export import Exported
from resvit_export.stages.quantize import Quantized
from resvit_export.stages.score import Scored
from resvit_export.stages.validate import Validated
from resvit_export.to_tensorrt.copy import TENSORRT_COPY

if TYPE_CHECKING:
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_engines.keys.private import SigningKey


@dataclass(frozen=True)
class Signer:
    """The key that signs; its identity is the public half's."""

    key: SigningKey

    @property
    def digest(self) -> str:
        """The key's identity."""
        return self.key.public.keyid


@dataclass(frozen=True)
class Bundled(Artifact):
    """One ``.resvit`` file."""

    @property
    def bundle(self) -> File:
        """The file."""
        (name,) = self.record.outputs
        return self.file(name)

    @functools.cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What it says of itself."""
        from resvit_engines.bundle.bundle import read_manifest

        return read_manifest(self.bundle.path)


@dataclass(frozen=True)
class Bundle(Stage[Bundled]):
    """Pack the finished stages of a run. ``model`` is what ships.

    ``identity`` names the network without paths, ``settings`` are the recipe's without paths.
    """

    name: ClassVar[str] = "bundle"
    artifact: ClassVar[type[Artifact]] = Bundled

    file_name: str
    identity: Mapping[str, Any]
    settings: Mapping[str, Any]
    precision: str
    quantizer: str
    target: Target
    release: int
    preprocess: Preprocess
    exported: Exported
    recovered: Recovered | None
    calibrated: Calibrated
    quantized: Quantized
    model: File
    scored: Scored
    validated: Validated
    compiled: Compiled
    build: Mapping[str, Any]
    signer: Signer | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the file. The manifest holds no time, host name or path: the same inputs give the same bytes."""
        del reporter
        from resvit_engines.bundle.bundle import write_bundle

        key = self.signer.key if self.signer else None
        write_bundle(folder / self.file_name, self.manifest(), self.files(), key=key)

    def files(self) -> dict[str, Path | bytes]:
        """What goes in, by name."""
        scored, compiled = self.scored, self.compiled
        files: dict[str, Path | bytes] = {
            "model.onnx": self.model.path,
            "ranges.json": self.calibrated.ranges.path,
            "quantize.json": self.quantized.path("quantize.json"),
            "verdict.json": self.validated.path("verdict.json"),
            **{name: scored.path(name) for name in scored.record.outputs if name.startswith("golden_")},
        }
        for name in ("engine.plan", "plan.json", "layers.json", TENSORRT_COPY):
            if compiled.has(name):
                files[name] = compiled.path(name)
        if compiled.engine is not None:
            files["engine.json"] = pretty_json(lasting(compiled.engine))
        if compiled.plan is not None:
            files["README.txt"] = self.readme().encode()
        return files

    def manifest(self) -> dict[str, Any]:
        """What the bundle says of itself."""
        verdict, report = self.validated.verdict, self.exported.report.to_json()
        chain: list[Artifact] = [self.exported, self.calibrated, self.quantized, self.validated]
        manifest: dict[str, Any] = {
            "name": self.file_name.removesuffix(".resvit"),
            "release": self.release,
            "versions": {"resvit-export": package_version("resvit-export"), **self.quantized.record.versions},
            "model": dict(self.identity),
            "precision": self.precision,
            "quantizer": self.quantizer,
            "target": self.target.to_json(),
            "settings": dict(self.settings),
            "build": dict(self.build),
            "preprocess": self.preprocess.to_json(),
            "class_names": list(verdict.class_names),
            "input": report["input"],
            **({"inputs": report["inputs"]} if "inputs" in report else {}),
            "outputs": report["outputs"],
            "calibration": {"images": self.calibrated.images.images, "digest": self.calibrated.images.digest},
            "validation": {"images": verdict.verdict.images, "digest": verdict.data_digest},
            "verdict": verdict.kind.value,
            "verdict_reason": verdict.reason,
            "task": verdict.task,
            "golden": dict(verdict.golden),
            "stages": {artifact.stage: artifact.record.key for artifact in chain},
        }
        if self.recovered is not None:
            manifest["stages"]["recover"] = self.recovered.record.key
            manifest["recovery"] = dict(self.recovered.lasting)
        if verdict.kind is not VerdictKind.ACCEPTED:
            manifest["warning"] = f"Validation did not accept this model ({verdict.kind.value}): {verdict.reason}"
        if self.compiled.engine is not None:
            manifest["engine"] = lasting(self.compiled.engine)
        if self.compiled.plan is not None:
            manifest["plan"] = self.compiled.plan.to_json()
        return manifest

    def readme(self) -> str:
        """What stands beside a plan, for whoever has only the bundle."""
        plan, verdict = self.compiled.plan, self.validated.verdict
        assert plan is not None
        commands = "\n".join(f"    {command}" for command in plan.commands)
        notes = "\n".join(plan.notes)
        return f"""{self.file_name}

{plan.why}

On the {self.target.title} ({self.target.software}), with the wheel of resvit_engines and the public key of whoever signed this:

    resvit-engine build {self.file_name} --trust KEY.pub

which also checks the engine and packs it for 'resvit-engine install'. Or with TensorRT's own program alone:

{commands}

{notes}

The engine reads FP32 images prepared as manifest.json says under "preprocess". golden_input.npy and
golden_output.npy hold images and the outputs that were validated: compare the engine's with them.

Verdict of the validation: {verdict.kind.value}; {verdict.reason}.
"""  # noqa: E501
