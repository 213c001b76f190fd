"""Public keys, and the folder of those that a device trusts.

A key file is PEM with lines of headers before it::

    Name: release
    Created: 2026-11-25
    Expires: 2027-11-25
    -----BEGIN PUBLIC KEY-----
    …

or an OpenSSH ``.pub`` file. ``Revoked: yes`` in it, or its key id in a file ``revoked`` beside it, withdraws a key.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from resvit_engines.errors import ExitCode, ResvitError

TRUST_VARIABLE = "RESVIT_TRUST"
_SUFFIXES = (".pub", ".pem")
_FACTS = ("name", "created", "expires", "revoked")
_LIMIT = 64 << 10
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


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
        headers = [("Name", " ".join(self.name.split())), ("Created", self.created), ("Expires", self.expires)]
        headers += [("Revoked", "yes")] if self.revoked else []
        return "".join(f"{title}: {value}\n" for title, value in headers if value is not None) + pem


def read_public_key(path: Path) -> PublicKey:
    """Read a key file: PEM with or without headers, or OpenSSH's ``ssh-ed25519 …``.

    Raises:
        ResvitError: INPUT where it is none, holds a private key, is of another kind than Ed25519 or has headers that
            are not understood: a misspelt ``Expires`` must not become a key for ever.
    """
    text = _text(path)
    if "PRIVATE KEY" in text:
        raise ResvitError(
            f"{path} holds a private key, where a public one belongs.",
            "Take it away from here; put the .pub file that keygen wrote beside it in its place.",
        )
    return public_key_from_text(text, path)


def public_key_from_text(text: str, path: Path) -> PublicKey:
    """Parse the content of a key file; ``path`` is for messages, and names a key that has no other name."""
    pem = _PEM.search(text)
    lines = (text[: pem.start()] if pem else text).splitlines()
    try:
        if pem:
            key = serialization.load_pem_public_key(pem.group().encode())
            comment = ""
        else:
            line = next(line for line in lines if line.startswith("ssh-"))
            lines.remove(line)
            key = serialization.load_ssh_public_key(line.encode())
            comment = line.split(None, 2)[2].strip() if line.count(" ") > 1 else ""
        if not isinstance(key, Ed25519PublicKey):
            raise TypeError("it is of another kind")
    except (ValueError, TypeError, StopIteration, UnsupportedAlgorithm) as error:
        raise ResvitError(
            f"{path} is not an Ed25519 public key.", "Give a .pub file of resvit-export keygen or of ssh-keygen."
        ) from error
    headers = _headers(lines, path)
    return PublicKey(
        key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw),
        headers.get("name") or comment or path.stem,
        _date(headers.get("created"), path),
        _date(headers.get("expires"), path),
        headers.get("revoked", "no") != "no",
    )


@dataclass(frozen=True)
class TrustStore:
    """The public keys that are trusted here. ``source`` is the folder or file that they are from, for messages."""

    keys: tuple[PublicKey, ...]
    revoked: frozenset[str] = frozenset()
    source: str = "the trust folder"

    def require(self, keyid: str, what: str, *, expired_ok: bool = False, now: datetime | None = None) -> PublicKey:
        """Return the trusted key with this id, if it is good today; ``what`` names the bundle that it signed.

        Raises:
            ResvitError: UNTRUSTED, with a sentence of its own for each: no key is trusted here, this one is not, it
                was revoked, it has expired, and the clock cannot tell whether it has.
        """
        found = [key for key in self.keys if key.keyid == keyid]
        if not self.keys:
            raise _untrusted(
                f"No key is trusted on this device, so {what} cannot be: {self.source} holds no public key.",
                f"Copy the maker's .pub file into {self.source}, or name it with --trust.",
            )
        name = found[0].name if found else ""
        if keyid in self.revoked or any(key.revoked for key in found):
            raise _untrusted(
                f"{what} is signed by a key that was revoked: {name or keyid[:16]}.",
                "Get a bundle that is signed by a key in use.",
            )
        if not found:
            names = ", ".join(sorted({key.name for key in self.keys}))
            raise _untrusted(
                f"{what} is signed by a key that is not trusted here ({keyid[:16]}…); trusted: {names}.",
                f"If you know its maker, put the maker's .pub file into {self.source}.",
            )
        if not expired_ok:
            for key in found:
                _require_unexpired(key, what, now or datetime.now(timezone.utc))
        return found[0]


def load_trust(path: Path | None = None) -> TrustStore:
    """Read the trusted keys: ``.pub`` and ``.pem`` files of a folder, or one file.

    ``path`` falls back to ``$RESVIT_TRUST``, then ``/etc/resvit/keys`` for root and ``~/.config/resvit/keys`` for
    others; that the fallback is absent shows when a signature is checked.

    Raises:
        ResvitError: INPUT for a named path that is not there and for a key that does not read, UNTRUSTED where
            anyone on this machine may write to the folder or to a key.
    """
    named = path or (Path(value) if (value := os.environ.get(TRUST_VARIABLE)) else None)
    path = (named or default_trust_folder()).expanduser()
    if not path.exists():
        if named:
            raise ResvitError(f"There is no {path} to read trusted keys from.", "Give a .pub file or a folder of them.")
        return TrustStore((), source=str(path))
    _refuse_writable(path)
    if path.is_file():
        return TrustStore((read_public_key(path),), source=str(path))
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith("."))
    for file in files:
        _refuse_writable(file)
    listed = path / "revoked"
    revoked = _text(listed).split() if listed.exists() else []
    if odd := [word for word in revoked if not re.fullmatch(r"[0-9a-f]{64}", word)]:
        raise ResvitError(
            f"{listed} holds {odd[0][:70]!r}, which is no key id.", "Write one key id of 64 digits a line."
        )
    return TrustStore(tuple(read_public_key(file) for file in files), frozenset(revoked), str(path))


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
        raise _untrusted(
            f"The clock of this device says {today}, so it cannot be told whether the key {key.name}, which signed "
            f"{what}, has expired ({key.expires}).",
            "Set the clock (sudo date --set '2026-11-25 12:00', or timedatectl set-ntp true) and run this again.",
        )
    if today > key.expires:
        raise _untrusted(
            f"{what} is signed by the key {key.name}, which expired on {key.expires} (today is {today}).",
            "Get a bundle that is signed by a newer key; if the clock is wrong, set it.",
        )


def _headers(lines: Iterable[str], path: Path) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        title, colon, value = line.partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not colon or title.strip().lower() not in _FACTS:
            raise ResvitError(
                f"{path} has a line that is not understood: {line.strip()[:70]!r}.",
                f"Before the key stand lines of {', '.join(fact.title() for fact in _FACTS)}, each with a colon.",
            )
        headers[title.strip().lower()] = value.strip()
    return headers


def _date(text: str | None, path: Path) -> date | None:
    if not text:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ResvitError(f"{path} says {text!r} where a date belongs.", "Write it as 2027-11-25.") from error


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(_LIMIT).decode()
    except ValueError as error:
        raise ResvitError(f"{path} is not a text file.", "Give a .pub file of resvit-export keygen.") from error
    except OSError as error:
        raise ResvitError(
            f"{path} cannot be read: {error.strerror}.", "Check its permissions.", ExitCode.SYSTEM
        ) from error


def _refuse_writable(path: Path) -> None:
    if path.stat().st_mode & stat.S_IWOTH:
        raise _untrusted(
            f"Anyone on this machine may write to {path}, and so decide what is trusted.", f"Run: chmod o-w {path}"
        )


def _untrusted(problem: str, fix: str) -> ResvitError:
    return ResvitError(problem, fix, ExitCode.UNTRUSTED)
