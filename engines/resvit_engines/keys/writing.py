"""The next list of keys: what the one before it says, but for what changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.keys.key_list import KeyList, SignedList, sign_list
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public_key import PublicKey, public_key_from_bytes


@dataclass(frozen=True)
class Changes:
    """What changes: ``keys`` come, those of the key ids ``retire`` sign nothing new, those of ``revoke`` are withdrawn;
    roots come and go likewise. ``threshold`` of the roots sign the list after it; None leaves that as it is.
    """

    keys: tuple[PublicKey, ...] = ()
    retire: tuple[str, ...] = ()
    revoke: tuple[str, ...] = ()
    add_roots: tuple[PublicKey, ...] = ()
    drop_roots: tuple[str, ...] = ()
    threshold: int | None = None


def changed_list(
    before: SignedList | None, changes: Changes, roots: Sequence[SigningKey], today: date, expires: date
) -> SignedList:
    """The list after ``before``, or the first one, signed by ``roots``, which are roots of it or of the one before.

    Raises:
        ResvitError: INPUT for a key id that is not there, where one of ``roots`` may not sign, and for a threshold
            that the roots cannot meet; UNTRUSTED for a list
            that no device would take.
    """
    old = before.keys if before else KeyList(0, today, expires, tuple(root.public for root in roots), 1, ())
    known = {key.keyid: _plain(key) for key in (*old.keys, *changes.keys)}
    for keyid in changes.retire:
        _require(keyid, known, "key")
        key = known[keyid]
        last = min(today, key.expires) if key.expires else today
        # Its first day may be this one: then it ends with it.
        known[keyid] = dataclasses.replace(key, expires=max(last, key.created) if key.created else last)
    for keyid in changes.revoke:
        if len(keyid) != 64 or set(keyid) - set("0123456789abcdef"):
            raise ResvitError(f"{keyid!r:.100} is no key id.", "Give the 64 digits that keygen and keylist show.")
        known.pop(keyid, None)
    trusted = {root.keyid: _plain(root) for root in (*old.roots, *changes.add_roots)}
    for keyid in changes.drop_roots:
        _require(keyid, trusted, "root")
        del trusted[keyid]
    allowed = {*trusted, *(root.keyid for root in old.roots)}
    for root in roots:
        if root.public.keyid not in allowed:
            raise ResvitError(
                f"{root.public.name} is no root of this list ({root.public.keyid[:16]}…).",
                "Sign with a root of the list before; a new one comes with --add-root.",
            )
    threshold = changes.threshold or old.threshold
    if threshold > len(trusted):
        raise ResvitError(
            f"{threshold} roots are to sign the next list, and there are {len(trusted)}.",
            "Add roots (--add-root), or lower --threshold.",
        )
    revoked = old.revoked | set(changes.revoke)
    again = [key for key in changes.keys if key.keyid in revoked]
    if again:
        raise ResvitError(f"The key {again[0].name} was revoked: it does not come back.", "Make a new one with keygen.")
    new = KeyList(
        old.version + 1,
        today,
        expires,
        tuple(trusted.values()),
        threshold,
        tuple(known.values()),
        frozenset(revoked),
    )
    return sign_list(new, *roots)


def _plain(key: PublicKey) -> PublicKey:
    """The key as its file is written: a name on one line."""
    return public_key_from_bytes(key.to_text().encode(), Path(key.name or "key"))


def _require(keyid: str, known: dict[str, PublicKey], what: str) -> None:
    if keyid not in known:
        names = ", ".join(f"{key.name} {key.keyid[:16]}…" for key in known.values()) or "none"
        raise ResvitError(f"The list has no {what} with the id {keyid!r:.100}.", f"It has: {names}.")
