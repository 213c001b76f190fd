"""What a registry says that a bundle is for, before any of it is fetched: annotations, beside the signed manifest.

Nobody signs annotations. They say which bundles are worth a look; what is signed decides, and must say the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from resvit_engines.builder.settings import TITLES
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json
from resvit_engines.machine import Machine
from resvit_engines.records import Record
from resvit_engines.registry.documents import TITLE, VERSION
from resvit_engines.targets.table import ANY_ARCH, Builder, Precision

_PREFIX = "ai.resvit."
_PRECISIONS = {
    Precision.FP32: "float32",
    Precision.FP16: "float16",
    Precision.INT8: "int8",
    Precision.FP8: "float8_e4m3",
}
_OUTPUTS = {"segmentation": "image", "depth": "image", "embedding": "embedding", "text": "text"}


@dataclass(frozen=True)
class Offer:
    """One bundle as its annotations describe it; each field is the annotation ``ai.resvit.NAME``.

    ``sm`` is the compute capability of engine or target without its dot; ``tensorrt`` the version of ``builder`` that
    built the engine, or will. ``jetpack`` is empty where there is none. ``holds`` is ``engine`` or, of what the device
    builds itself, ``model``. ``from_sm`` tells that newer GPUs run the engine too.
    """

    name: str
    release: str
    target: str
    arch: str
    sm: str
    builder: str
    tensorrt: str
    jetpack: str
    precision: str
    verdict: str
    holds: str
    from_sm: str = ""

    def to_annotations(self) -> dict[str, str]:
        """As they stand in manifest and index, with those that everybody reads."""
        ours = {_key(name): value for name, value in dataclasses.asdict(self).items() if value}
        return {**ours, TITLE: self.name, VERSION: self.release}

    @classmethod
    def from_annotations(cls, annotations: Mapping[str, str]) -> Offer | None:
        """What annotations say; None where they are none of ours, or say it in no way that is understood."""
        record = Record(annotations, "the annotations")
        try:
            values = {
                item.name: record.optional(_key(item.name), lambda key: record.line(key, most=200)) or ""
                for item in dataclasses.fields(cls)
            }
        except ResvitError:
            return None
        required = ("name", "release", "target", "arch", "sm", "precision")
        return cls(**values) if all(values[name] for name in required) else None

    @property
    def describe(self) -> str:
        """One line for people."""
        runs = f"SM {self.sm_title}" if self.sm_title else "any processor"
        software = f"{self.builder_title} {self.tensorrt}" + (f", JetPack {self.jetpack}" if self.jetpack else "")
        return (
            f"{self.name} (release {self.release}, {self.target}, {runs}, {software}, {self.precision}, "
            f"{self.verdict or 'no verdict'}, {self.holds})"
        )

    @property
    def sm_title(self) -> str:
        """The compute capability for people, such as 8.7; empty of what processors run."""
        return "" if self.on_cpu else f"{self.sm[:-1]}.{self.sm[-1:]}"

    @property
    def builder_title(self) -> str:
        """What builds, for people."""
        return next((title for builder, title in TITLES.items() if builder.value == self.builder), "TensorRT")

    @property
    def on_cpu(self) -> bool:
        """Whether a processor runs it."""
        return self.builder == Builder.ONNXRUNTIME.value

    def may_fit(self, machine: Machine) -> bool:
        """Whether the bundle is worth a look on this machine: its processor and its GPU, where it wants one."""
        if self.arch not in {ANY_ARCH, machine.arch}:
            return False
        if self.on_cpu or machine.sm is None:
            return self.on_cpu
        return self.sm == str(machine.sm) or (self.from_sm.isdigit() and int(self.from_sm[:4]) <= machine.sm)


def offer_of(manifest: Manifest) -> Offer:
    """What a bundle is, by its own manifest.

    Raises:
        ResvitError: INPUT where it does not say what it is for.
    """
    target, engine = manifest.target, manifest.engine
    if target is None or manifest.name is None or manifest.precision is None:
        raise ResvitError(
            "The manifest does not say name, target and precision, so no device could choose it.",
            "Make the bundle again with resvit-export bundle.",
        )
    return Offer(
        name=manifest.name,
        release=str(manifest.release),
        target=target.name,
        arch=target.arch,
        sm=str(engine.sm if engine else target.sm),
        builder=(engine.builder if engine else target.builder).value,
        tensorrt=engine.builder_version if engine else target.tensorrt,
        jetpack=target.jetpack or "",
        precision=manifest.precision,
        verdict=manifest.verdict.verdict if manifest.verdict else "",
        holds="engine" if engine else "model",
        from_sm="80" if engine and engine.hardware_compatible else "",
    )


def require_same_offer(said: Offer, manifest: Manifest, where: str) -> Offer:
    """What the signed manifest says, where the annotations say the same.

    Raises:
        ResvitError: UNTRUSTED for anything else.
    """
    signed = offer_of(manifest)
    for item in dataclasses.fields(Offer):
        ours, theirs = getattr(signed, item.name), getattr(said, item.name)
        if ours != theirs:
            raise ResvitError(
                f"{where} says that {item.name.replace('_', ' ')} is {theirs!r}, and its signed manifest {ours!r}.",
                "Its annotations were changed in the registry: push it again, and ask who can write there.",
                ExitCode.UNTRUSTED,
            )
    return signed


def model_config(manifest: Manifest, diff_ids: list[str]) -> bytes:
    """ModelPack's configuration of a bundle, for programs that list models; it holds no time.

    ``diff_ids`` are the digests of the layers, which are not compressed.
    """
    offer, on_cpu = offer_of(manifest), manifest.target is not None and manifest.target.on_cpu
    task = manifest.verdict.task if manifest.verdict else ""
    return canonical_json(
        {
            "descriptor": {"name": offer.name, "version": offer.release, "title": f"{offer.name} for {offer.target}"},
            "config": {
                "format": "tensorrt" if manifest.engine and not on_cpu else "onnx",
                "precision": _precision(offer.precision, on_cpu=on_cpu),
                **({"quantization": manifest.quantizer} if manifest.quantizer else {}),
                "capabilities": {"inputTypes": ["image"], "outputTypes": [_OUTPUTS.get(task, "other")]},
            },
            "modelfs": {"type": "layers", "diffIds": diff_ids},
        }
    )


def _precision(text: str, *, on_cpu: bool) -> str:
    """In ModelPack's words: what a network computes in, floats first; a precision that we do not know as it is."""
    precision = next((known for known in Precision if known.value == text), None)
    if precision is None:
        return text
    floats = _PRECISIONS[Precision.FP32 if on_cpu else Precision.FP16]
    return f"{floats},{_PRECISIONS[precision]}" if precision.quantises else _PRECISIONS[precision]


def _key(name: str) -> str:
    return f"{_PREFIX}{name.replace('_', '-')}"
