"""What decides who is trusted, read with more asked of the answer than that there is one.

A key that was withdrawn or has ended stays so: what is read as a good key must be one whose attributes really say so.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from resvit_engines.bundle.manifest import Manifest, check_names, manifest_from_bytes
from resvit_engines.files import pretty_json
from resvit_engines.keys.key_file import revoked_from_bytes
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public import PublicKey, TrustStore, public_key_from_bytes
from resvit_engines.keys.signing import envelope_from_manifest, require_signature
from resvit_engines.names import is_relative_path
from resvit_engines.targets.table import find_target

SECRET = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RAW = SECRET.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
KEY = PublicKey(RAW, "release", date(2024, 1, 1), date(2025, 1, 1), revoked=True)
SIGNING = SigningKey(KEY, SECRET.sign)
A_MANIFEST = Manifest("net", target=find_target("l4"))
MANIFEST = pretty_json(A_MANIFEST.to_json())
KEY_FILE = KEY.to_text().encode()
LIST = f"# got out\n{KEY.keyid}\n{'f' * 64}\n".encode()
ENVELOPE = envelope_from_manifest(MANIFEST, SIGNING)
PRIVATE = SECRET.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
WHERE = Path("a.pub")


def read_key(data: bytes) -> None:
    """A key that reads as good says so in lines of its own, and the file says it nowhere otherwise."""
    key = public_key_from_bytes(data, WHERE)
    lines = [line.split(b":", 1) for line in data.split(b"\n") if b":" in line and not line.startswith(b"#")]
    said = {title.strip().lower(): value.strip() for title, value in lines}
    assert key.revoked == (said.get(b"revoked", b"no").lower() == b"yes"), data
    assert str(key.expires or "").encode() == said.get(b"expires", b""), data


def read_list(data: bytes) -> None:
    """Every line of a list that reads is a key id that is revoked."""
    keyids = revoked_from_bytes(data, WHERE)
    told = [line for line in data.decode().split("\n") if line.strip() and not line.startswith("#")]
    assert keyids == set(told), data


def read_signature(data: bytes) -> None:
    """No mutant of an envelope holds but one with the very signature, in the one form, beside others at most."""
    require_signature(MANIFEST, data, TrustStore((PublicKey(RAW, "release"),)), "it")
    true = json.loads(envelope_from_manifest(MANIFEST, SIGNING))
    document = json.loads(data)
    assert true["signatures"][0] in document["signatures"], data
    assert set(document) == set(true), data


def read_manifest(data: bytes) -> None:
    """A manifest that reads has a name and files that stay in their folder."""
    manifest = manifest_from_bytes(data, "it")
    assert manifest.name is None or is_relative_path(manifest.name), data
    check_names([file.path for file in manifest.files], "it")
