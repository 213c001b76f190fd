"""Public keys: what is known of one, and how its file is read and written."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from resvit_engines.keys.guarded import read_small
from resvit_engines.keys.key_file import KEY_FILE_MOST, NAME_MOST, key_file_from_bytes


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
