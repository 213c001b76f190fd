"""Pushing: signed bundles under one tag, an index with a manifest for each; what the registry has is not sent again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.bundle.manifest import MANIFEST, SIGNATURE, Manifest
from resvit_engines.bundle.reader import OpenBundle, opened_bundle
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.registry.client import Client, Section, digest_of
from resvit_engines.registry.documents import (
    ACCEPTED,
    CONFIG_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    MODEL_TYPE,
    Descriptor,
    Index,
    ModelManifest,
    architecture_of,
    layer_of,
)
from resvit_engines.registry.offer import Offer, model_config, offer_of
from resvit_engines.registry.reference import Reference
from resvit_engines.registry.transport import SMALL_MOST, Body, Plain


@dataclass(frozen=True)
class Package:
    """A bundle as a registry holds it: its manifest there, and every blob by digest. The bundle must stay open."""

    path: Path
    offer: Offer
    descriptor: Descriptor
    document: bytes
    blobs: tuple[tuple[str, Body], ...]


@dataclass(frozen=True)
class Pushed:
    """What a push did. ``digest`` is the index's, ``before`` what the tag was on until then; sizes are in bytes."""

    reference: Reference
    digest: str
    before: str | None
    offers: tuple[Offer, ...]
    sent: int
    sent_bytes: int
    there: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "reference": str(self.reference),
            "digest": self.digest,
            "pinned": self.reference.at(self.digest),
            "before": self.before,
            "bundles": [offer.to_annotations() for offer in self.offers],
            "blobs_sent": self.sent,
            "bytes_sent": self.sent_bytes,
            "blobs_there": self.there,
        }


def package(bundle: OpenBundle) -> Package:
    """Check every byte of an open bundle and say what a registry will hold of it.

    Raises:
        ResvitError: UNTRUSTED where it is not signed, INPUT where it is damaged or does not say what it is for.
    """
    manifest = bundle.manifest()
    if bundle.envelope is None:
        raise ResvitError(
            f"{bundle.path} is not signed, and no device would take it.",
            "Sign it: resvit-export sign BUNDLE --key release.key, or build with --key.",
            ExitCode.UNTRUSTED,
        )
    bundle.check(manifest)
    offer = offer_of(manifest)
    first = [(MANIFEST, bundle.head), (SIGNATURE, bundle.envelope)]
    layers = [layer_of(name, sha256_bytes(data), len(data)) for name, data in first]
    blobs: list[tuple[str, Body]] = [
        (layer.digest, Plain(data)) for layer, (_, data) in zip(layers, first, strict=True)
    ]
    places = bundle.places(manifest)
    for file in manifest.files:
        layer = layer_of(file.path, file.sha256, file.bytes)
        layers.append(layer)
        blobs.append((layer.digest, Section(bundle.stream, places[file.path], file.bytes)))
    config = model_config(manifest, [layer.digest for layer in layers])
    blobs.append((digest_of(config), Plain(config)))
    described = Descriptor(CONFIG_TYPE, digest_of(config), len(config))
    document = ModelManifest(described, tuple(layers), offer.to_annotations()).to_bytes()
    if len(document) > SMALL_MOST:
        raise ResvitError(
            f"{bundle.path} holds {len(layers):,} files: its manifest in a registry would be longer than the "
            f"{SMALL_MOST >> 20} MiB that registries take.",
            "Bundle fewer files.",
        )
    return Package(bundle.path, offer, _in_index(document, offer, manifest), document, tuple(blobs))


def _in_index(document: bytes, offer: Offer, manifest: Manifest) -> Descriptor:
    assert manifest.target is not None
    architecture = architecture_of(manifest.target.arch)
    return Descriptor(
        MANIFEST_TYPE, digest_of(document), len(document), offer.to_annotations(), MODEL_TYPE, architecture
    )


def index_of(packages: Sequence[Package]) -> bytes:
    """The index of bundles under one tag, in an order of its own.

    Raises:
        ResvitError: INPUT for two bundles of one name for one target and precision: no device could choose.
    """
    seen: dict[tuple[str, str, str, str], Package] = {}
    for one in packages:
        key = (one.offer.target, one.offer.precision, one.offer.holds, one.offer.tensorrt)
        if key in seen:
            raise ResvitError(
                f"{seen[key].path} and {one.path} are both for {one.offer.target} in {one.offer.precision}: no device "
                "could choose.",
                "Push them under two tags.",
            )
        seen[key] = one
    return Index(tuple(seen[key].descriptor for key in sorted(seen))).to_bytes()


def push(paths: Sequence[Path], client: Client, reporter: Reporter = SILENT) -> Pushed:
    """Push bundles under the tag of the client's reference: blobs first, then their manifests, the index last.

    The tag changes in one step, when all that it leads to is there; a push that ends before has changed nothing.

    Raises:
        ResvitError: as ``package``, ``index_of`` and the registry.
    """
    reference = client.reference
    tag = reference.tag
    if tag is None or reference.digest is not None:
        raise ResvitError(f"{reference} names no tag to push to.", "Write oci://HOST/NAME:TAG, without a digest.")
    with contextlib.ExitStack() as owned:
        packages = [package(owned.enter_context(opened_bundle(path))) for path in paths]
        index = index_of(packages)
        before = client.digest_of_tag(tag, ACCEPTED)
        blobs = {digest: body for one in packages for digest, body in one.blobs}
        sent, sent_bytes = 0, 0
        for digest, body in reporter.track(blobs.items(), "pushing", len(blobs)):
            if not client.has_blob(digest, body.size):
                client.put_blob(digest, body)
                sent, sent_bytes = sent + 1, sent_bytes + body.size
        for one in packages:
            client.put_manifest(one.descriptor.digest, one.document, MANIFEST_TYPE)
        digest = client.put_manifest(tag, index, INDEX_TYPE)
    offers = tuple(one.offer for one in packages)
    return Pushed(reference, digest, before if before != digest else None, offers, sent, sent_bytes, len(blobs) - sent)
