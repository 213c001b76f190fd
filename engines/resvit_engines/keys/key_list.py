"""A signed list of keys: which keys sign releases, until when, and which were withdrawn; signed by keys of its own.

The list is what a device is told when keys change. It is signed by root keys, which sign nothing else and lie where
nobody builds: so a release key that got out is replaced without a visit to any device. After The Update Framework's
root role (theupdateframework.github.io/specification): a version that rises, an end, a threshold, and a list of other
roots signed by the old ones and the new.

The file is a DSSE envelope in one form, whose payload is::

    {"expires": "2027-05-30", "format": 1, "issued": "2026-11-30", "keys": ["Name: release…"], "revoked": [],
     "roots": ["Name: root…"], "threshold": 1, "version": 7}

A key stands in it as the text of its file.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.keys.dsse import pae
from resvit_engines.keys.guarded import untrusted
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public_key import PublicKey, public_key_from_bytes
from resvit_engines.outside import json_from_outside
from resvit_engines.records import Record

LIST_TYPE = "application/vnd.resvit.keys+json"
LIST_FILE_MOST = 4 << 20
KEYS_MOST, ROOTS_MOST, SIGNATURES_MOST, REVOKED_MOST = 1000, 16, 32, 20_000
VERSION_MOST = 1 << 31
_FORMAT = 1
_NAMES = {"expires", "format", "issued", "keys", "revoked", "roots", "threshold", "version"}
_KEYID = "[0-9a-f]{64}"
_AGAIN = "Get the list anew from where keys are kept: resvit-export keylist writes it."


@dataclass(frozen=True)
class KeyList:
    """What a list says: its ``version``, its first and last day, and the keys that sign bundles.

    ``threshold`` of ``roots`` sign the next list. ``revoked`` are the key ids of keys that are withdrawn: what they
    signed is neither installed nor run.
    """

    version: int
    issued: date
    expires: date
    roots: tuple[PublicKey, ...]
    threshold: int
    keys: tuple[PublicKey, ...]
    revoked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SignedList:
    """A list with the bytes that are signed and the (keyid, signature) pairs over them."""

    keys: KeyList
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    def signed_by(self, roots: Sequence[PublicKey]) -> list[PublicKey]:
        """Those of ``roots`` whose signature over it holds, each once."""
        signed, found = pae(LIST_TYPE, self.payload), []
        for root in {root.keyid: root for root in roots}.values():
            given = [signature for keyid, signature in self.signatures if keyid == root.keyid]
            if any(root.verifies(signature, signed) for signature in given):
                found.append(root)
        return found

    def require_signed(
        self, roots: Sequence[PublicKey], threshold: int, where: str, now: datetime | None = None
    ) -> None:
        """Refuse with UNTRUSTED a list that fewer than ``threshold`` of ``roots`` signed, of those good ``now``."""
        today = now.astimezone(timezone.utc).date() if now else date.min
        ended = {root.keyid for root in roots if root.expires is not None and root.expires < today}
        found = self.signed_by([root for root in roots if root.keyid not in ended])
        if len(found) < threshold:
            names = ", ".join(
                f"{root.name} (expired on {root.expires})" if root.keyid in ended else root.name for root in roots
            )
            raise untrusted(
                f"{where} is signed by {len(found)} of the root keys {names}, and {threshold} are needed.",
                "Have it signed by those who hold them: resvit-export keylist LIST --cosign --root ROOT.key",
            )

    def to_bytes(self) -> bytes:
        """The file."""
        return pretty_json(
            {
                "payloadType": LIST_TYPE,
                "payload": base64.b64encode(self.payload).decode(),
                "signatures": [
                    {"keyid": keyid, "sig": base64.b64encode(signature).decode()}
                    for keyid, signature in self.signatures
                ],
            }
        )

    def cosigned(self, *roots: SigningKey) -> SignedList:
        """The same list with the signatures of ``roots`` too, in the order of their key ids."""
        pairs = dict(self.signatures)
        pairs.update({root.public.keyid: root.sign(pae(LIST_TYPE, self.payload)) for root in roots})
        return SignedList(self.keys, self.payload, tuple(sorted(pairs.items())))


def sign_list(keys: KeyList, *roots: SigningKey) -> SignedList:
    """Sign a list; the same list and keys give the same bytes.

    Raises:
        ResvitError: UNTRUSTED for a list that no device would take, such as one whose threshold its roots cannot meet.
    """
    payload = pretty_json(
        {
            "format": _FORMAT,
            "version": keys.version,
            "issued": str(keys.issued),
            "expires": str(keys.expires),
            "threshold": keys.threshold,
            "roots": [key.to_text() for key in keys.roots],
            "keys": [key.to_text() for key in keys.keys],
            "revoked": sorted(keys.revoked),
        }
    )
    return SignedList(_list_from(payload, "The list"), payload, ()).cosigned(*roots)


def list_from_bytes(data: bytes, where: str) -> SignedList:
    """Parse the file of a list; whether its signatures hold is not looked at. ``where`` names it in errors.

    Raises:
        ResvitError: UNTRUSTED for whatever is not in the one form in which it is written.
    """
    try:
        document = json_from_outside(data, where, _AGAIN)
        if not isinstance(document, dict) or set(document) != {"payload", "payloadType", "signatures"}:
            raise ValueError("it is no DSSE envelope")
        if document["payloadType"] != LIST_TYPE:
            raise ValueError(f"its payload is no {LIST_TYPE}")
        payload = base64.b64decode(document["payload"], validate=True)
        entries = document["signatures"]
        if not isinstance(entries, list) or not 1 <= len(entries) <= SIGNATURES_MOST:
            raise ValueError("it holds no signature, or too many")
        if any(not isinstance(entry, dict) or set(entry) != {"keyid", "sig"} for entry in entries):
            raise ValueError("a signature says more than its key")
        pairs = tuple((str(entry["keyid"]), base64.b64decode(entry["sig"], validate=True)) for entry in entries)
        signed = SignedList(_list_from(payload, where), payload, pairs)
        # One meaning, one form: what is written otherwise was not written by us.
        if signed.to_bytes() != data or [keyid for keyid, _ in pairs] != sorted({keyid for keyid, _ in pairs}):
            raise ValueError("it is not in the form in which it is written")
    except (ValueError, TypeError, binascii.Error) as error:
        raise untrusted(f"{where} is no list of keys: {error}.", _AGAIN) from error
    except ResvitError as error:
        raise untrusted(error.problem, _AGAIN) from error
    return signed


def require_fresh(keys: KeyList, where: str, now: datetime | None = None) -> None:
    """Refuse with UNTRUSTED a list that has expired, and one of a day to come: then list or clock is wrong."""
    today = (now or datetime.now(timezone.utc)).astimezone(timezone.utc).date()
    if (keys.issued - today).days > 1:
        raise untrusted(
            f"{where} was made on {keys.issued}, and the clock of this machine says {today}: so it cannot be told "
            "whether it has expired.",
            "Set the clock (timedatectl set-ntp true) and run this again.",
        )
    if today > keys.expires:
        raise untrusted(
            f"{where} expired on {keys.expires} (today is {today}).",
            "Get a newer one; if the clock is wrong, set it.",
        )


def _list_from(payload: bytes, where: str) -> KeyList:
    document = json_from_outside(payload, where, _AGAIN)
    record = Record(document, where)
    if set(record.names) != _NAMES or pretty_json(document) != payload:
        raise untrusted(f"{where} is not in the form in which a list is written.", _AGAIN)
    record.whole("format", _FORMAT, _FORMAT)
    roots, keys = (_keys(record, name, most, where) for name, most in (("roots", ROOTS_MOST), ("keys", KEYS_MOST)))
    revoked = record.texts("revoked")
    if len(revoked) > REVOKED_MOST or list(revoked) != sorted(set(revoked)):
        raise record.refusal("revoked", "a sorted list of key ids")
    for index in range(len(revoked)):
        Record({"keyid": revoked[index]}, where, "revoked").line("keyid", _KEYID)
    found = KeyList(
        record.whole("version", 1, VERSION_MOST),
        _day(record, "issued"),
        _day(record, "expires"),
        roots,
        record.whole("threshold", 1, ROOTS_MOST),
        keys,
        frozenset(revoked),
    )
    if found.expires < found.issued:
        raise untrusted(f"{where} expires before it was issued.", _AGAIN)
    if not 1 <= found.threshold <= len(roots):
        raise untrusted(f"{where} needs {found.threshold} signatures and has {len(roots)} roots.", _AGAIN)
    if both := {key.keyid for key in roots} & {key.keyid for key in keys}:
        raise untrusted(
            f"{where} has one key as root and for releases: {min(both)[:16]}.", "Make the root its own key."
        )
    if withdrawn := found.revoked & {key.keyid for key in (*roots, *keys)}:
        raise untrusted(f"{where} has a key that it revokes: {min(withdrawn)[:16]}.", _AGAIN)
    return found


def _keys(record: Record, name: str, most: int, where: str) -> tuple[PublicKey, ...]:
    texts = record.texts(name)
    if len(texts) > most:
        raise record.refusal(name, f"a list of {most} keys at most")
    keys = []
    for text in texts:
        key = public_key_from_bytes(text.encode(errors="replace"), Path(f"a key of {where}"))
        if key.to_text() != text or key.revoked:
            raise record.refusal(name, "keys in the form in which keygen writes them")
        keys.append(key)
    if len({key.keyid for key in keys}) != len(keys):
        raise record.refusal(name, "each key once")
    return tuple(keys)


def _day(record: Record, key: str) -> date:
    text = record.line(key, "[0-9]{4}-[0-9]{2}-[0-9]{2}")
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise record.refusal(key, "a date") from None


def described(keys: KeyList) -> dict[str, Any]:
    """A list for people and programs, without the keys' own bytes."""

    def told(key: PublicKey) -> dict[str, Any]:
        return {"name": key.name, "keyid": key.keyid, "expires": str(key.expires) if key.expires else None}

    return {
        "version": keys.version,
        "issued": str(keys.issued),
        "expires": str(keys.expires),
        "threshold": keys.threshold,
        "roots": [told(key) for key in keys.roots],
        "keys": [told(key) for key in keys.keys],
        "revoked": sorted(keys.revoked),
    }
