"""The documents of a registry: an OCI index of CNCF ModelPack manifests, one for each bundle.

Sources: OCI image specification 1.1 (manifest.md, image-index.md, descriptor.md) and the model specification of CNCF
ModelPack (github.com/modelpack/model-spec: docs/spec.md, docs/config.md, docs/annotations.md). The files of a bundle
are layers as they are, without an archive, so that other programs see them by name and equal ones are stored once;
``manifest.json`` and ``signature.json`` are two of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resvit_engines.bundle.manifest import MANIFEST, SIGNATURE
from resvit_engines.errors import ResvitError
from resvit_engines.files import canonical_json
from resvit_engines.outside import FILE_MOST
from resvit_engines.records import Record, record_from_bytes
from resvit_engines.registry.reference import is_digest

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
ACCEPTED = (INDEX_TYPE, MANIFEST_TYPE)
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
_LAYER = "application/vnd.cncf.model.{}.v1.raw"
_LAYER_KINDS = (
    ((".onnx", ".plan", ".data", ".bin"), "weight"),
    ((".npy", ".npz"), "dataset"),
    ((".txt", ".md"), "doc"),
    ((".so", ".py", ".cpp"), "code"),
)
_MOST_BUNDLES = 1000
_MOST_LAYERS = 10_002
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Descriptor:
    """What a document says of another one, or of a blob: media type, digest, size in bytes, annotations."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    architecture: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
            **({"artifactType": self.artifact_type} if self.artifact_type else {}),
            **({"annotations": dict(self.annotations)} if self.annotations else {}),
            **({"platform": {"architecture": self.architecture, "os": "linux"}} if self.architecture else {}),
        }

    @classmethod
    def from_json(cls, record: Record) -> Descriptor:
        """What a registry holds: a descriptor by SHA-256, of at most 64 GiB."""
        digest = record.text("digest")
        if not is_digest(digest):
            raise record.refusal("digest", "a digest by SHA-256")
        return cls(
            record.line("mediaType", most=255),
            digest,
            record.whole("size", most=FILE_MOST),
            record.optional("annotations", record.texts_by_name) or {},
            record.optional("artifactType", record.line) or "",
        )


@dataclass(frozen=True)
class Index:
    """The bundles of one tag."""

    manifests: tuple[Descriptor, ...]

    def to_bytes(self) -> bytes:
        """As it is stored: the same bundles give the same bytes."""
        return canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": INDEX_TYPE,
                "artifactType": MODEL_TYPE,
                "manifests": [one.to_json() for one in self.manifests],
            }
        )


@dataclass(frozen=True)
class ModelManifest:
    """One bundle: its configuration for programs that know ModelPack, and its files."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """As it is stored."""
        return canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "artifactType": MODEL_TYPE,
                "config": self.config.to_json(),
                "layers": [layer.to_json() for layer in self.layers],
                "annotations": dict(self.annotations),
            }
        )

    def layer(self, path: str) -> Descriptor | None:
        """The layer that holds a file of the bundle."""
        return next((layer for layer in self.layers if layer.annotations.get(FILE_PATH) == path), None)


def index_or_manifest(data: bytes, media_type: str, where: str) -> Index | ModelManifest:
    """Parse what a tag or digest leads to.

    Raises:
        ResvitError: INPUT for any other document, with what it is; the image of a container most likely.
    """
    record = record_from_bytes(data, f"what is at {where}")
    kind = record.optional("mediaType", record.text) or media_type
    if record.whole("schemaVersion") != 2 or kind not in ACCEPTED:
        raise _no_bundles(where, kind)
    if kind == INDEX_TYPE:
        descriptors = tuple(map(Descriptor.from_json, _few(record, "manifests", _MOST_BUNDLES, where)))
        return Index(tuple(one for one in descriptors if one.media_type == MANIFEST_TYPE))
    return manifest_from_record(record, where)


def manifest_from_record(record: Record, where: str) -> ModelManifest:
    """A bundle's manifest.

    Raises:
        ResvitError: INPUT for the manifest of anything else, or one that is malformed.
    """
    kind, config = record.optional("artifactType", record.text) or "", record.optional("config", record.record)
    configured = Descriptor.from_json(config) if config else None
    if kind != MODEL_TYPE or configured is None or configured.media_type != CONFIG_TYPE:
        raise _no_bundles(where, kind if kind not in ("", MODEL_TYPE) else configured.media_type if configured else "")
    layers = tuple(map(Descriptor.from_json, _few(record, "layers", _MOST_LAYERS, where)))
    return ModelManifest(configured, layers, record.optional("annotations", record.texts_by_name) or {})


def layer_type(path: str) -> str:
    """The media type of a bundle's file by its name."""
    return _LAYER.format(next((kind for ends, kind in _LAYER_KINDS if path.endswith(ends)), "weight.config"))


def layer_of(path: str, sha256: str, size: int) -> Descriptor:
    """The layer that holds a file; its title is what other programs name it by when they fetch it."""
    return Descriptor(layer_type(path), f"sha256:{sha256}", size, {FILE_PATH: path, TITLE: path})


def architecture_of(arch: str) -> str:
    """A processor as OCI platforms name it."""
    return _ARCHITECTURES.get(arch, arch)


def require_bundle_layers(manifest: ModelManifest, where: str) -> tuple[Descriptor, Descriptor]:
    """The layers of ``manifest.json`` and ``signature.json``; raises INPUT where either is not there."""
    head, envelope = manifest.layer(MANIFEST), manifest.layer(SIGNATURE)
    if head is None or envelope is None:
        raise _no_bundles(where, f"a model without {MANIFEST if head is None else SIGNATURE}")
    return head, envelope


def _few(record: Record, key: str, most: int, where: str) -> tuple[Record, ...]:
    found = record.records(key)
    if len(found) > most:
        raise ResvitError(f"What is at {where} lists {len(found):,} {key}; at most {most:,} are read.", "Push again.")
    return found


def _no_bundles(where: str, kind: str) -> ResvitError:
    return ResvitError(
        f"{where} holds no bundle of resvit-export, but {kind[:200] or 'something else'}.",
        "Check the name; resvit-export push puts bundles there.",
    )
