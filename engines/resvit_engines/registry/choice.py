"""Choosing: of the bundles under a tag the one that fits the device, by what is signed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from resvit_engines.bundle.fit import misfits
from resvit_engines.bundle.manifest import Manifest, manifest_from_bytes
from resvit_engines.bundle.reader import MANIFEST_LIMIT, SIGNATURE_LIMIT
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes
from resvit_engines.keys.public import PublicKey, TrustStore
from resvit_engines.keys.signing import require_signature
from resvit_engines.machine import Machine
from resvit_engines.records import record_from_bytes
from resvit_engines.registry.client import Client
from resvit_engines.registry.documents import (
    ACCEPTED,
    FILE_PATH,
    MANIFEST_TYPE,
    Index,
    ModelManifest,
    index_or_manifest,
    manifest_from_record,
    require_bundle_layers,
)
from resvit_engines.registry.offer import Offer, require_same_offer
from resvit_engines.targets.own import target_here

_LISTED = 12
"""Bundles that a message names."""


@dataclass(frozen=True)
class Wishes:
    """What is wanted where more than one bundle fits; None is whatever fits. ``expect`` is the one name that is taken.

    ``rehearse`` is for a machine that stands in for the device: only memory and disk are compared.
    """

    target: str | None = None
    precision: str | None = None
    expect: str | None = None
    rehearse: bool = False

    def allow(self, offer: Offer) -> bool:
        """Whether it is what was asked for."""
        pairs = ((self.target, offer.target), (self.precision, offer.precision), (self.expect, offer.name))
        return all(wanted in (None, found) for wanted, found in pairs)


@dataclass(frozen=True)
class Chosen:
    """The bundle that is fetched: its manifest and signature, which hold, and where in the registry it is.

    ``digest`` is the SHA-256 of the manifest, as installations are known by; ``tag_digest`` what the tag was on, to
    be pinned to; ``at`` the digest of the bundle's own manifest in the registry.
    """

    offer: Offer
    manifest: Manifest
    key: PublicKey
    head: bytes
    envelope: bytes
    at: str
    tag_digest: str

    @property
    def digest(self) -> str:
        """SHA-256 of ``manifest.json``."""
        return sha256_bytes(self.head)


def choose(client: Client, trust: TrustStore, machine: Machine, wishes: Wishes) -> Chosen:
    """The one bundle under the client's reference that is for this machine.

    Those whose annotations say that they may fit are looked at: manifest and signature are fetched, the signature is
    checked, and the signed manifest decides. Of several that fit, those that were accepted go before others, the GPU
    before the processor, an engine before what is built here, and the machine's own target before another of its GPU.

    Raises:
        ResvitError: UNTRUSTED for a signature that does not hold, IMPOSSIBLE where nothing fits, with all that is
            there, INPUT where several fit equally well, or what is there are no bundles.
    """
    where = str(client.reference)
    found, digest, offered = offered_in(client, where)
    wanted = [(offer, at) for offer, at in offered if wishes.allow(offer)]
    if not wanted:
        raise ResvitError(
            f"{where} holds nothing for {_asked(wishes)}. There are: {_listed([offer for offer, _ in offered])}.",
            "Ask for one of these, or push what is missing.",
        )
    worth = [(offer, at) for offer, at in wanted if wishes.rehearse or offer.may_fit(machine)]
    fits, reasons = [], []
    for offer, at in worth:
        manifest = found if isinstance(found, ModelManifest) else None
        looked = _looked_at(client, trust, offer, at, manifest, digest)
        problem = next((problem for problem, _, _ in misfits(looked.manifest, machine, rehearse=wishes.rehearse)), None)
        if problem is None:
            fits.append(looked)
        else:
            reasons.append(f"{offer.name}: {problem}")
    if not fits:
        raise _nothing_fits(where, machine, [offer for offer, _ in wanted], reasons)
    return _best(fits, machine, where)


def offered_in(client: Client, where: str) -> tuple[Index | ModelManifest, str, list[tuple[Offer, str]]]:
    """What the client's reference leads to, its digest, and each bundle's annotations with its manifest's digest.

    ``where`` names it in errors.

    Raises:
        ResvitError: INPUT where there is nothing of ours.
    """
    fetched = client.manifest(client.reference.wanted, ACCEPTED)
    found = index_or_manifest(fetched.data, fetched.media_type, where)
    if isinstance(found, Index):
        pairs = [(Offer.from_annotations(one.annotations), one.digest) for one in found.manifests]
    else:
        pairs = [(Offer.from_annotations(found.annotations), fetched.digest)]
    offered = [(offer, at) for offer, at in pairs if offer is not None]
    if not offered:
        raise ResvitError(
            f"{where} holds {len(pairs)} manifests, and none says in its annotations which device it is for.",
            "Check the name; resvit-export push writes them.",
        )
    return found, fetched.digest, offered


def _looked_at(
    client: Client, trust: TrustStore, offer: Offer, at: str, manifest: ModelManifest | None, tag_digest: str
) -> Chosen:
    """Fetch manifest and signature of a bundle, and check them against each other and against what is said of it."""
    where = f"{offer.name} in {client.reference}"
    if manifest is None:
        data = client.manifest(at, (MANIFEST_TYPE,)).data
        manifest = manifest_from_record(record_from_bytes(data, f"the manifest of {where}"), where)
    first, second = require_bundle_layers(manifest, where)
    head = client.small_blob(first.digest, first.size, MANIFEST_LIMIT)
    envelope = client.small_blob(second.digest, second.size, SIGNATURE_LIMIT)
    key = require_signature(head, envelope, trust, where)
    signed = manifest_from_bytes(head, where)
    require_same_offer(offer, signed, where)
    _require_same_files(manifest, signed, where)
    return Chosen(offer, signed, key, head, envelope, at, tag_digest)


def _require_same_files(manifest: ModelManifest, signed: Manifest, where: str) -> None:
    """Refuse a manifest of the registry that lists other files than the signed one."""
    wanted = {file.path: (f"sha256:{file.sha256}", file.bytes) for file in signed.files}
    listed = {layer.annotations.get(FILE_PATH, ""): (layer.digest, layer.size) for layer in manifest.layers}
    for path, what in wanted.items():
        if listed.get(path) != what:
            raise ResvitError(
                f"The registry's manifest of {where} does not list {path} as its signed manifest does.",
                "It was changed in the registry: push it again, and ask who can write there.",
                ExitCode.UNTRUSTED,
            )


def _best(fits: Sequence[Chosen], machine: Machine, where: str) -> Chosen:
    own = ""
    with contextlib.suppress(ResvitError):
        own = target_here(machine=machine).name

    def rank(one: Chosen) -> tuple[bool, bool, bool, bool]:
        offer = one.offer
        return (offer.verdict == "accepted", not offer.on_cpu, offer.holds == "engine", offer.target == own)

    best = max(map(rank, fits))
    first = [one for one in fits if rank(one) == best]
    if len(first) > 1:
        raise ResvitError(
            f"{len(first)} bundles in {where} fit this device: {_listed([one.offer for one in first])}.",
            "Say which: --precision, or --target.",
        )
    return first[0]


def _nothing_fits(where: str, machine: Machine, offers: Sequence[Offer], reasons: Sequence[str]) -> ResvitError:
    gpu = machine.gpu or ("a GPU" if machine.sm else "no NVIDIA GPU")
    sm = f" (SM {machine.sm / 10:.1f})" if machine.sm else ""
    software = f"TensorRT {machine.tensorrt}" if machine.tensorrt else "no TensorRT"
    jetpack = f", JetPack {machine.jetpack}" if machine.jetpack else ""
    why = f" Of those that are near: {' '.join(reasons[:_LISTED])}" if reasons else ""
    return ResvitError(
        f"Nothing in {where} is for this device, {machine.arch} with {gpu}{sm}, {software}{jetpack}. There are: "
        f"{_listed(offers)}.{why}",
        "Build one for it and push it to the same tag with the others; resvit-engine facts says what this machine is.",
        ExitCode.IMPOSSIBLE,
    )


def _asked(wishes: Wishes) -> str:
    return ", ".join(value for value in (wishes.expect, wishes.target, wishes.precision) if value)


def _listed(offers: Sequence[Offer]) -> str:
    more = f", and {len(offers) - _LISTED} more" if len(offers) > _LISTED else ""
    return ", ".join(offer.describe for offer in offers[:_LISTED]) + more
