"""Public keys, and the folder of those that a device trusts.

What their files look like stands in ``key_file``; who may write to them in ``guarded``. ``Revoked: yes`` in a key's
file, or its key id in the file ``revoked`` beside it, withdraws it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from resvit_engines.errors import ResvitError
from resvit_engines.keys.guarded import read_guarded, read_small, require_guarded, untrusted
from resvit_engines.keys.key_file import KEY_FILE_MOST, LIST_MOST, NAME_MOST, key_file_from_bytes, revoked_from_bytes
from resvit_engines.outside import expanded

TRUST_VARIABLE = "RESVIT_TRUST"
REVOKED = "revoked"
_SUFFIXES = (".pub", ".pem")


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key (32 bytes) and what its file says of it; it is good until the end of the day ``expires`` (UTC)."""

    raw: bytes
    name: str
    created: date | None = None
    expires: date | None = None
    revoked: bool = False

    @functools.cached_property
    def keyid(self) -> str:
        """SHA-256 of the raw key, 64 hexadecimal digits."""
        return hashlib.sha256(self.raw).hexdigest()

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether ``signature`` (64 bytes) over ``data`` is by this key."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except InvalidSignature:
            return False
        return True

    def to_text(self) -> str:
        """The content of its file."""
        key = Ed25519PublicKey.from_public_bytes(self.raw)
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        printed = "".join(char if char.isprintable() else " " for char in self.name)
        name = " ".join(printed.split())[:NAME_MOST].strip() or None
        headers = [("Name", name), ("Created", self.created), ("Expires", self.expires)]
        headers += [("Revoked", "yes")] if self.revoked else []
        return "".join(f"{title}: {value}\n" for title, value in headers if value is not None) + pem


def read_public_key(path: Path) -> PublicKey:
    """Read a key file, whoever may write to it.

    Raises:
        ResvitError: UNTRUSTED where it is none in the form of ``key_file``.
    """
    return public_key_from_bytes(read_small(path, KEY_FILE_MOST)[0], path)


def public_key_from_bytes(data: bytes, path: Path) -> PublicKey:
    """Parse the content of a key file; ``path`` is for messages, and names a key that has no other name.

    Raises:
        ResvitError: UNTRUSTED where it is none in the form of ``key_file``.
    """
    said = key_file_from_bytes(data, path)
    return PublicKey(said.raw, said.name or said.comment or path.stem, said.created, said.expires, said.revoked)


@dataclass(frozen=True)
class TrustStore:
    """The public keys that are trusted here. ``source`` is the folder or file that they are from, for messages."""

    keys: tuple[PublicKey, ...]
    revoked: frozenset[str] = frozenset()
    source: str = "the trust folder"

    @property
    def withdrawn(self) -> frozenset[str]:
        """The key ids of all that is revoked here, by list or by its own file."""
        return self.revoked | {key.keyid for key in self.keys if key.revoked}

    def require(self, keyid: str, what: str, *, expired_ok: bool = False, now: datetime | None = None) -> PublicKey:
        """Return the trusted key with this id, if it is good today; ``what`` names the bundle that it signed.

        Raises:
            ResvitError: UNTRUSTED, with a sentence of its own for each: no key is trusted here, this one is not, it
                was revoked, it has expired, and the clock cannot tell whether it has.
        """
        found = [key for key in self.keys if key.keyid == keyid]
        if not self.keys:
            raise untrusted(
                f"No key is trusted on this device, so {what} cannot be: {self.source} holds no public key.",
                f"Copy the maker's .pub file into {self.source}, or name it with --trust.",
            )
        name = found[0].name if found else ""
        if keyid in self.withdrawn:
            raise untrusted(
                f"{what} is signed by a key that was revoked: {name or keyid[:16]}.",
                "Get a bundle that is signed by a key in use.",
            )
        if not found:
            names = ", ".join(sorted({key.name for key in self.keys}))
            raise untrusted(
                f"{what} is signed by a key that is not trusted here ({keyid[:16]}…); trusted: {names}.",
                f"If you know its maker, put the maker's .pub file into {self.source}.",
            )
        if not expired_ok:
            for key in found:
                _require_unexpired(key, what, now or datetime.now(timezone.utc))
        return found[0]


def load_trust(path: Path | None = None) -> TrustStore:
    """Read the trusted keys: ``.pub`` and ``.pem`` files of a folder, or one file; without those that are revoked.

    ``path`` falls back to ``$RESVIT_TRUST``, then ``/etc/resvit/keys`` for root and ``~/.config/resvit/keys`` for
    others; that the fallback is absent shows when a signature is checked. Revoked is a key by its own file, by the list
    ``revoked`` in the folder, or beside the file and beside what a link to it leads to, and by the keys and the list of
    this machine's own folders: what was withdrawn there is so under whatever name it comes.

    Raises:
        ResvitError: INPUT for a named path that is not there; UNTRUSTED for a key or list that is not in the form of
            ``key_file`` or cannot be read, and where others on this machine may write to folder, key or list.
    """
    own = [Path(value)] if (value := os.environ.get(TRUST_VARIABLE)) else []
    named = path or (own[0] if own else None)
    chosen = expanded(named or default_trust_folder())
    if not os.path.lexists(chosen):
        if named:
            raise ResvitError(
                f"There is no {chosen} to read trusted keys from.", "Give a .pub file or a folder of them."
            )
        return TrustStore((), source=str(chosen))
    store = _stored(chosen)
    for other in map(expanded, (*own, default_trust_folder())):
        if other != chosen and os.path.lexists(other):
            store = dataclasses.replace(store, revoked=store.revoked | _stored(other).withdrawn)
    return store


def default_trust_folder() -> Path:
    """Where trusted keys are looked for unless told otherwise."""
    if os.geteuid() == 0:
        return Path("/etc/resvit/keys")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "resvit" / "keys"


def _require_unexpired(key: PublicKey, what: str, now: datetime) -> None:
    today = now.astimezone(timezone.utc).date()
    if key.expires is None:
        return
    if today.year < 2024 or (key.created and today < key.created and (key.created - today).days > 1):
        raise untrusted(
            f"The clock of this device says {today}, so it cannot be told whether the key {key.name}, which signed "
            f"{what}, has expired ({key.expires}).",
            "Set the clock (sudo date --set '2026-11-25 12:00', or timedatectl set-ntp true) and run this again.",
        )
    if today > key.expires:
        raise untrusted(
            f"{what} is signed by the key {key.name}, which expired on {key.expires} (today is {today}).",
            "Get a bundle that is signed by a newer key; if the clock is wrong, set it.",
        )


def _stored(path: Path) -> TrustStore:
    """The keys and the revoked key ids of one folder or file."""
    if not path.is_dir():
        places = {Path(function(path)).parent for function in (os.path.abspath, os.path.realpath)}
        return TrustStore((_trusted_key(path),), _listed(*(place / REVOKED for place in sorted(places))), str(path))
    require_guarded(path)
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise untrusted(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error
    for file in files:
        if file.name != REVOKED and file.name.partition(".")[0].lower() == REVOKED:
            raise untrusted(
                f"{file} looks like a list of revoked keys, and only one that is called '{REVOKED}' is read.",
                "Rename it, or take it away.",
            )
    keys = tuple(map(_trusted_key, (file for file in files if _is_key(file.name))))
    return TrustStore(keys, _listed(path / REVOKED), str(path))


def _is_key(name: str) -> bool:
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def _trusted_key(path: Path) -> PublicKey:
    return public_key_from_bytes(read_guarded(path, KEY_FILE_MOST), path)


def _listed(*lists: Path) -> frozenset[str]:
    """The key ids on those of the lists that are there; a link that leads nowhere is there."""
    there = (path for path in lists if os.path.lexists(path))
    return frozenset[str]().union(*(revoked_from_bytes(read_guarded(path, LIST_MOST), path) for path in there))
