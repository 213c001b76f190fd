"""Signatures over a bundle's manifest: DSSE envelopes with Ed25519, kept beside the manifest instead of around it.

The envelope is that of "DSSE: Dead Simple Signing Envelope" 1.0.2 (github.com/secure-systems-lab/dsse) without its
``payload``: the payload is the manifest's bytes. Putting them back gives an envelope that any DSSE library checks.
"""

from __future__ import annotations

import base64
import binascii
import json
from datetime import datetime

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.keys.dsse import pae
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public import PublicKey, TrustStore

PAYLOAD_TYPE = "application/vnd.resvit.manifest+json"
_SIGNATURES = 8
_COPY = "Copy the bundle again from where it was made; if it was changed on purpose, its maker must sign it again."
_SIGN = (
    "Its maker signs it: resvit-export keygen release.key, then resvit-export sign BUNDLE --key release.key "
    "(or build with --key); release.pub goes to the device."
)


def envelope_from_manifest(manifest: bytes, key: SigningKey) -> bytes:
    """Sign a manifest's bytes; returns the content of ``signature.json``. The same key gives the same bytes."""
    signature = base64.b64encode(key.sign(pae(PAYLOAD_TYPE, manifest))).decode()
    return pretty_json(
        {"payloadType": PAYLOAD_TYPE, "signatures": [{"keyid": key.public.keyid, "sig": signature}]},
    )


def require_signature(
    manifest: bytes, envelope: bytes | None, trust: TrustStore, what: str, *, expired_ok: bool = False,
    now: datetime | None = None,
) -> PublicKey:  # fmt: skip
    """Return the trusted key whose signature over ``manifest`` holds; ``what`` names the bundle in messages.

    Of several signatures one is enough. ``expired_ok`` is for what was installed while its key was still good.

    Raises:
        ResvitError: UNTRUSTED where there is no signature, it does not read or hold, or its key is not known here,
            revoked or expired (or the clock cannot tell).
    """
    if envelope is None:
        raise ResvitError(f"{what} is not signed, so nothing in it is used.", _SIGN, ExitCode.UNTRUSTED)
    refusal: ResvitError | None = None
    for keyid, signature in signatures_in(envelope, what):
        try:
            key = trust.require(keyid, what, expired_ok=expired_ok, now=now)
            if key.verifies(signature, pae(PAYLOAD_TYPE, manifest)):
                return key
            raise ResvitError(
                f"The signature of {what} does not hold: its manifest is not the one that {key.name} signed.",
                _COPY,
                ExitCode.UNTRUSTED,
            )
        except ResvitError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def signatures_in(envelope: bytes, what: str) -> list[tuple[str, bytes]]:
    """The (keyid, signature) pairs of an envelope in the one form in which it is written.

    Raises:
        ResvitError: UNTRUSTED for any other form.
    """
    try:
        document = json.loads(envelope)
        # One meaning, one form: whatever is written otherwise was not written by us.
        if document["payloadType"] != PAYLOAD_TYPE or pretty_json(document) != envelope:
            raise ValueError("it is not in the form in which it is written")
        if set(document) != {"payloadType", "signatures"}:
            raise ValueError("it says more than who signed")
        if any(set(entry) != {"keyid", "sig"} for entry in document["signatures"]):
            raise ValueError("a signature says more than its key")
        pairs = [(entry["keyid"], _from_base64(entry["sig"])) for entry in document["signatures"]]
        if not 1 <= len(pairs) <= _SIGNATURES or not all(isinstance(keyid, str) for keyid, _ in pairs):
            raise ValueError("it holds no signature, or too many")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error) as error:
        raise ResvitError(f"The signature of {what} does not read: {error}.", _COPY, ExitCode.UNTRUSTED) from error
    return pairs


def _from_base64(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:  # its last digit has bits that decoding drops
        raise ValueError("its base64 is not in the form in which it is written")
    return data
