"""Private keys: made, read from a file, the environment or the OpenSSH agent, and never shown."""

from __future__ import annotations

import base64
import contextlib
import os
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import OPEN_FILE, explain_os_errors, make_folder, write_atomic
from resvit_engines.keys.guarded import read_small
from resvit_engines.keys.key_file import KEY_FILE_MOST
from resvit_engines.keys.public_key import PublicKey, public_key_from_bytes
from resvit_engines.keys.ssh_agent import AgentKey, agent_keys, sign_by_agent
from resvit_engines.outside import expanded

KEY_VARIABLE = "RESVIT_SIGNING_KEY"
KEY_FILE_VARIABLE = "RESVIT_SIGNING_KEY_FILE"
AGENT = "agent"
_KEYGEN = "Make one with: resvit-export keygen release.key"


@dataclass(frozen=True)
class SigningKey:
    """Something that signs as ``public``. The secret is inside ``sign`` and in no other field."""

    public: PublicKey
    sign: Callable[[bytes], bytes] = field(repr=False)


def load_signing_key(source: str | None = None) -> SigningKey | None:
    """Find the key to sign with.

    ``source`` is a private key file (PKCS#8 or OpenSSH, Ed25519, mode 0600), a public key file whose private half the
    OpenSSH agent holds, ``agent``, or ``agent:COMMENT``. Without it, ``$RESVIT_SIGNING_KEY`` (the PEM text itself) and
    ``$RESVIT_SIGNING_KEY_FILE`` are looked at. None where nothing is said anywhere.

    Raises:
        ResvitError: INPUT for a file that is no such key, is protected by a passphrase, or may be read by others;
            MISSING where the agent does not answer or has no such key.
    """
    if source is None:
        if text := os.environ.get(KEY_VARIABLE):
            return _key_from_pem(os.fsencode(text), f"${KEY_VARIABLE}", "environment")
        source = os.environ.get(KEY_FILE_VARIABLE) or None
    if source is None:
        return None
    if source == AGENT or source.startswith(f"{AGENT}:"):
        return _key_from_agent(source.removeprefix(AGENT).removeprefix(":"))
    return _key_from_file(expanded(source))


def make_key_pair(private: Path, public: Path, public_key: Callable[[bytes], PublicKey]) -> PublicKey:
    """Make an Ed25519 key: ``private`` (PKCS#8 PEM, mode 0600) and ``public``; ``public_key`` names the raw public key.

    Raises:
        ResvitError: INPUT where one of the files exists: a key is never overwritten.
    """
    for path in (private, public):
        if os.path.lexists(path):
            raise _exists(path)
    secret = Ed25519PrivateKey.generate()
    pem = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key = public_key(_raw(secret))
    _write_secret(private, pem)
    write_atomic(public, key.to_text().encode(), OPEN_FILE)
    return key


def _write_secret(path: Path, data: bytes) -> None:
    """Write a new file that nobody else can read at any moment; it appears whole, or not at all."""
    with explain_os_errors(path):
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(name, path)  # unlike a rename, it fails where the file exists
        except FileExistsError as error:
            raise _exists(path) from error
        finally:
            Path(name).unlink(missing_ok=True)


def _key_from_file(path: Path) -> SigningKey:
    if not os.path.lexists(path):
        raise ResvitError(f"There is no key {path}.", _KEYGEN)
    data, status = read_small(path, KEY_FILE_MOST)
    mode = status.st_mode
    if b"PRIVATE KEY" not in data and (b"PUBLIC KEY" in data or data.startswith(b"ssh-")):
        try:
            return _key_from_agent("", public_key_from_bytes(data, path))
        except ResvitError as error:
            if error.code is not ExitCode.MISSING:
                raise
            private = path.with_suffix(".key")
            beside = f"Name the private key, {private}" if private.is_file() else "Name the private key's file"
            raise ResvitError(
                f"{path} is a public key, and signing takes the private one. {error.problem}",
                f"{beside}, or load it into the OpenSSH agent (ssh-add).",
                ExitCode.MISSING,
            ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ResvitError(
            f"Others on this machine may read or write the private key {path} (mode {stat.S_IMODE(mode):04o}).",
            f"Run: chmod 600 {path}; if somebody may have read it, make a new key.",
        )
    return _key_from_pem(data, str(path), path.stem)


def _key_from_pem(data: bytes, where: str, name: str) -> SigningKey:
    openssh = b"BEGIN OPENSSH PRIVATE KEY" in data
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    # A variable often comes with its line breaks written as \n.
    text = data.strip().replace(b"\\n", b"\n") + b"\n"
    try:
        secret = load(text, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The text of such an error could hold parts of the key.
        if _is_protected(text):
            raise ResvitError(
                f"The key in {where} is protected by a passphrase, which is never asked for here.",
                "Give it to the OpenSSH agent (ssh-add, for a key of ssh-keygen -t ed25519) and sign with --key agent.",
            ) from None
        raise ResvitError(f"{where} holds no private key in PEM or OpenSSH form.", _KEYGEN) from None
    if not isinstance(secret, Ed25519PrivateKey):
        raise ResvitError(f"The key in {where} is of another kind than Ed25519.", _KEYGEN)
    return SigningKey(PublicKey(_raw(secret), name), secret.sign)


def _is_protected(pem: bytes) -> bool:
    """Whether PKCS#8 or OpenSSH text holds a key that only a passphrase opens."""
    if b"-----BEGIN OPENSSH" not in pem:
        return b"ENCRYPTED" in pem
    body = b"".join(line for line in pem.splitlines() if not line.startswith(b"-----"))
    with contextlib.suppress(ValueError):
        # "openssh-key-v1", a zero byte, then the name of the cipher; its length comes first.
        return not base64.b64decode(body)[15:].startswith(b"\x00\x00\x00\x04none")
    return False


def _key_from_agent(comment: str, public: PublicKey | None = None) -> SigningKey:
    held = agent_keys()
    if public is not None:
        wanted = [key for key in held if key.raw == public.raw]
    else:
        wanted = [key for key in held if comment in ("", key.comment)]
    if len(wanted) != 1:
        found = ", ".join(key.comment for key in held) or "none"
        asked = f"the key {public.name}" if public else f"a key {comment}" if comment else "one key alone"
        raise ResvitError(
            f"The OpenSSH agent does not hold {asked} (its Ed25519 keys: {found}).",
            "Add it with ssh-add, or name one with --key agent:COMMENT (ssh-add -l lists them).",
            ExitCode.MISSING,
        )
    return _agent_key(wanted[0], public)


def _agent_key(held: AgentKey, public: PublicKey | None) -> SigningKey:
    def sign(data: bytes) -> bytes:
        signature = sign_by_agent(held.raw, data)
        if not key.verifies(signature, data):
            raise ResvitError(
                "The OpenSSH agent gave a signature that does not hold.", "Use another agent or a key file."
            )
        return signature

    key = public or PublicKey(held.raw, held.comment)
    return SigningKey(key, sign)


def _raw(secret: Ed25519PrivateKey) -> bytes:
    return secret.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _exists(path: Path) -> ResvitError:
    return ResvitError(
        f"{path} exists already, and a key is never overwritten.", "Choose another name, or move the old key away."
    )
