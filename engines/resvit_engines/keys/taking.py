"""Taking a signed list of keys: the first by a root key that somebody brought, every other by the list before it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.files import OPEN_FILE, OPEN_FOLDER, explain_os_errors, make_folder, write_atomic
from resvit_engines.keys.guarded import read_guarded, read_small, require_guarded, untrusted
from resvit_engines.keys.key_list import LIST_FILE_MOST, KeyList, list_from_bytes, require_fresh
from resvit_engines.keys.public import KEY_LIST, taken_list
from resvit_engines.keys.public_key import PublicKey


def take_list(folder: Path, path: Path, roots: Sequence[PublicKey] = (), now: datetime | None = None) -> KeyList:
    """Take the list at ``path`` for the trusted keys in ``folder``; the one that is there already is taken again.

    The list has to be signed by as many roots of the list before it as that one asks for, and by as many of its own.
    ``roots`` stand for the list before it on a machine that has none: all of them have to have signed.

    Raises:
        ResvitError: UNTRUSTED for a list that is older than the one there, another one of the same version, expired,
            not signed so, or made in days to come by this machine's clock; INPUT for a first list without ``roots``.
    """
    data = read_small(path, LIST_FILE_MOST)[0]
    new = list_from_bytes(data, str(path))
    there = folder / KEY_LIST
    old = taken_list(folder) if os.path.lexists(folder) else None
    if old is None and not roots:
        raise ResvitError(
            f"{folder} has no list of keys yet, so it cannot be told whose {path.name} is.",
            "Bring the root's public key here by a way that you trust, and add --root ROOT.pub.",
        )
    if old is not None and new.keys.version <= old.version:
        if new.keys.version == old.version and data == read_guarded(there, LIST_FILE_MOST):
            return old
        what = "is older" if new.keys.version < old.version else "is another list of that version"
        raise untrusted(
            f"{path} is version {new.keys.version} of the keys, and version {old.version} has been taken here: it "
            f"{what}.",
            "Get the newest list: an old one may trust keys that were withdrawn since.",
        )
    before, threshold = (old.roots, old.threshold) if old is not None else (tuple(roots), len({r.keyid for r in roots}))
    for root in before:
        if root.revoked:
            raise untrusted(f"The root key {root.name} was revoked.", "Bring the public key of a root that is in use.")
    require_fresh(new.keys, str(path), now)
    new.require_signed(before, threshold, str(path), now or datetime.now(timezone.utc))
    new.require_signed(new.keys.roots, new.keys.threshold, str(path), now or datetime.now(timezone.utc))
    with explain_os_errors(there):
        make_folder(folder, OPEN_FOLDER)
        require_guarded(folder)
        write_atomic(there, data, OPEN_FILE)
    return new.keys
