"""What goes out: for each type of device the one bundle that is for it, out of run folders and files or a registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, explain_os_errors, make_folder, sha256_bytes
from resvit_engines.outside import leads_to_file
from resvit_engines.progress import Reporter
from resvit_export.fleet.plan import DeviceType, Fleet, ReleaseSource
from resvit_export.fleet.transport import Pull

if TYPE_CHECKING:
    from resvit_engines.keys.private import SigningKey
    from resvit_engines.registry.offer import Offer

_SIGNED = "signed"
_CERTIFICATES_MOST = 1 << 20


@dataclass(frozen=True)
class Package:
    """What the devices of one type are to run: the bundle ``name`` of a ``release``.

    ``digest`` is that of the bundle's manifest, which devices know it by; None of what comes from a registry.
    ``manifest`` and ``path`` are the bundle's, ``bytes`` its size; ``pull`` is what the devices pull instead.
    """

    name: str
    release: int
    digest: str | None
    path: Path | None = None
    bytes: int = 0
    manifest: Manifest | None = None
    pull: Pull | None = None

    @property
    def built_there(self) -> bool:
        """Whether a device builds the engine first."""
        return self.manifest is not None and self.manifest.engine is None

    @property
    def on_cpu(self) -> bool:
        """Whether the devices' processors run it."""
        target = self.manifest.target if self.manifest else None
        return target.on_cpu if target else self.pull is not None and self.pull.target == "cpu"


@dataclass(frozen=True)
class Release:
    """What goes out, by type of device; ``id`` is the digest of all of it. ``key`` signs engines that devices build."""

    id: str
    label: str
    packages: Mapping[str, Package]
    key: SigningKey | None = None
    keys: Path | None = None
    root: Path | None = None
    pinned: str | None = None


def release_of(fleet: Fleet, folder: Path, reporter: Reporter, pinned: str | None = None) -> Release:
    """Find the bundle of each type, check it as a whole, and sign it in ``folder`` where it is not signed by the key.

    ``pinned`` is what the registry's tag led to when this release began.

    Raises:
        ResvitError: IMPOSSIBLE for a type that nobody built for; INPUT for bundles that are damaged, unsigned or many
            for one type, and for ``keys`` and ``ca`` that are none; UNTRUSTED for a ``root`` that is no public key;
            what a registry raises.
    """
    _require_shareable(fleet.release)
    if fleet.release.registry is not None:
        return _from_registry(fleet, pinned)
    return _from_bundles(fleet, folder, reporter)


def _from_bundles(fleet: Fleet, folder: Path, reporter: Reporter) -> Release:
    from resvit_engines.bundle.bundle import verify_bundle
    from resvit_engines.keys.private import load_signing_key
    from resvit_export.tools.push import bundles_in

    key = load_signing_key(fleet.release.key)
    sources = [Path(text) for text in fleet.release.bundles]
    found = [(path, verify_bundle(path)) for path in bundles_in(sources, reporter)]
    packages = {}
    for kind in fleet.types:
        path, manifest = _for_type(kind, found)
        packages[kind.name] = _package(path, manifest, kind, key, folder)
    return _release(packages, fleet.release, key, None)


def _require_shareable(source: ReleaseSource) -> None:
    """Refuse what must not be copied to devices, and what each of them would refuse."""
    from cryptography.x509 import load_pem_x509_certificates

    from resvit_engines.keys.guarded import read_small
    from resvit_engines.keys.key_list import LIST_FILE_MOST, list_from_bytes, require_fresh
    from resvit_engines.keys.public_key import read_public_key

    for entry, text in (("keys", source.keys), ("root", source.root), ("ca", source.ca)):
        if text is not None and not leads_to_file(Path(text)):
            raise ResvitError(f"There is no file {text}, which release.{entry} names.", "Mend the fleet's file.")
    if source.root is not None:
        read_public_key(Path(source.root))
    if source.keys is not None:
        try:
            listed = list_from_bytes(read_small(Path(source.keys), LIST_FILE_MOST)[0], source.keys)
        except ResvitError as error:
            raise ResvitError(
                f"release.keys names no signed list of keys: {error.problem}",
                "Name the list that 'resvit-export keylist' wrote.",
            ) from error
        require_fresh(listed.keys, source.keys)
    if source.ca is not None:
        data = read_small(Path(source.ca), _CERTIFICATES_MOST)[0]
        if b"PRIVATE KEY" in data:
            raise ResvitError(
                f"{source.ca} holds a private key, and release.ca is copied to every device.",
                "Name a file with the CA's certificate alone.",
                ExitCode.UNTRUSTED,
            )
        try:
            load_pem_x509_certificates(data)
        except ValueError as error:
            raise ResvitError(
                f"{source.ca} holds no certificate that can be read.",
                "Name the certificate of the registry's CA, as PEM.",
            ) from error


def _for_type(kind: DeviceType, found: Sequence[tuple[Path, Manifest]]) -> tuple[Path, Manifest]:
    fitting = [
        (path, manifest)
        for path, manifest in found
        if manifest.target is not None
        and manifest.target.name == kind.target
        and kind.precision in (None, manifest.precision)
    ]
    if not fitting:
        raise _nobody_built(kind, [f"{m.target.name if m.target else '?'} in {m.precision}" for _, m in found])
    if len(fitting) > 1:
        names = ", ".join(f"{path.name} in {manifest.precision}" for path, manifest in fitting[:8])
        raise ResvitError(
            f"{len(fitting)} bundles of this release are for {kind.name}, which are {kind.target}: {names}.",
            f"Say types.{kind.name}.precision, or leave one out of release.bundles.",
        )
    return fitting[0]


def _nobody_built(kind: DeviceType, there: Sequence[str]) -> ResvitError:
    asked = f"{kind.target} in {kind.precision}" if kind.precision else kind.target
    precision = f" --precision {kind.precision}" if kind.precision else ""
    listed = ", ".join(sorted(set(there))[:12]) or "nothing"
    return ResvitError(
        f"Nobody built for the devices of type {kind.name}: the release holds nothing for {asked}. There is {listed}.",
        f"Build it, resvit-export build --target {kind.target}{precision}, and add its run folder to release.bundles, "
        "or push it to the same tag.",
        ExitCode.IMPOSSIBLE,
    )


def _package(path: Path, manifest: Manifest, kind: DeviceType, key: SigningKey | None, folder: Path) -> Package:
    from resvit_engines.bundle.bundle import sign_bundle, signers
    from resvit_engines.bundle.reader import opened_bundle

    if manifest.name is None:
        raise ResvitError(f"The manifest of {path} does not say its name.", "Make the bundle again.")
    by = signers(path)
    if key is None and (not by or manifest.engine is None):
        what = (
            "is not signed"
            if not by
            else "holds no engine: a device builds it, and its bundle is signed for the others"
        )
        raise ResvitError(
            f"The bundle for {kind.name}, {path.name}, {what}, and there is no key to sign with.",
            "Say release.key, or set RESVIT_SIGNING_KEY_FILE; resvit-export keygen makes one.",
        )
    with opened_bundle(path) as bundle:
        digest = sha256_bytes(bundle.head)
    if key is not None and key.public.keyid not in by:
        signed = folder / _SIGNED / f"{digest[:16]}.resvit"
        with explain_os_errors(signed):
            make_folder(signed.parent)
            if not signed.exists() or key.public.keyid not in signers(signed):
                sign_bundle(path, key, signed)
        path = signed
    return Package(manifest.name, manifest.release, digest, path, path.stat().st_size, manifest)


def _from_registry(fleet: Fleet, pinned: str | None) -> Release:
    from resvit_engines.registry.choice import offered_in
    from resvit_engines.registry.client import Client
    from resvit_engines.registry.reference import reference_from_text

    source = fleet.release
    reference = reference_from_text(pinned or source.registry or "")
    with Client(reference, ca=Path(source.ca) if source.ca else None, plain=source.plain_http) as client:
        _, digest, offers = offered_in(client, str(reference))
    held = reference.at(digest)
    packages = {kind.name: _pulled(kind, [offer for offer, _ in offers], held, source) for kind in fleet.types}
    return _release(packages, source, None, held)


def _pulled(kind: DeviceType, offers: Sequence[Offer], held: str, source: ReleaseSource) -> Package:
    fitting = [o for o in offers if o.target == kind.target and kind.precision in (None, o.precision)]
    if not fitting:
        raise _nobody_built(kind, [f"{offer.target} in {offer.precision}" for offer in offers])
    engines = [offer for offer in fitting if offer.holds == "engine"]
    if not engines:
        raise ResvitError(
            f"The bundle for {kind.name} in {held}, {fitting[0].name}, holds no engine: a device that pulls it would "
            "run the model on its processor.",
            "Push bundles with engines (resvit-export build --device, then push), or give release.bundles: then one "
            "device of each type builds.",
        )
    if len({offer.name for offer in engines}) > 1:
        raise ResvitError(
            f"{len(engines)} bundles in {held} are for {kind.name}: {', '.join(one.describe for one in engines[:8])}.",
            f"Say types.{kind.name}.precision.",
        )
    offer = engines[0]
    if not offer.release.isdigit():
        raise ResvitError(f"{offer.name} in {held} says release {offer.release!r}.", "Push it again.")
    pull = Pull(held, offer.name, offer.target, kind.precision, source.ca, source.plain_http)
    return Package(offer.name, int(offer.release[:16]), None, pull=pull)


def _release(
    packages: Mapping[str, Package], source: ReleaseSource, key: SigningKey | None, held: str | None
) -> Release:
    from resvit_engines.files import sha256_file

    said = [[kind, one.digest, dataclasses.asdict(one.pull) if one.pull else None] for kind, one in packages.items()]
    label = ", ".join(sorted({f"{one.name} release {one.release}" for one in packages.values()})[:8])
    keys = Path(source.keys) if source.keys else None
    if keys is not None:
        said.append(["keys", sha256_file(keys), None])
    root = Path(source.root) if source.root else None
    return Release(sha256_bytes(canonical_json(said)), label, packages, key, keys, root, held)
