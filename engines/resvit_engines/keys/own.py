"""This machine's own signing key: for engines that a device builds itself, and for bundles that go straight to one."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import OPEN_FOLDER, explain_os_errors, make_folder
from resvit_engines.keys.private import SigningKey, load_signing_key, make_key_pair
from resvit_engines.keys.public import TRUST_VARIABLE, PublicKey, default_trust_folder, read_public_key


def own_key() -> SigningKey:
    """The key, made on first use (mode 0600) and trusted on this machine from then on.

    ``own.key`` lies beside the folder of trusted keys, ``own.pub`` in it: in ``$RESVIT_TRUST`` where that is a
    folder, else in the usual one.

    Raises ``ResvitError`` where it cannot be written, or was damaged.
    """
    named = Path(os.environ.get(TRUST_VARIABLE, ""))
    trusted = named if named.name and named.is_dir() else default_trust_folder()
    private, public = trusted.parent / "own.key", trusted / "own.pub"
    if not private.exists():
        with explain_os_errors(trusted):
            make_folder(trusted, OPEN_FOLDER)
        make_key_pair(private, public, lambda raw: PublicKey(raw, f"machine {platform.node()}"))
    key = load_signing_key(str(private))
    assert key is not None
    if not os.path.lexists(public):
        return key
    known = read_public_key(public)
    if known.raw != key.public.raw:
        raise ResvitError(
            f"{public} is not the public half of {private}.",
            "One of them was exchanged: move both away, and a new pair is made.",
            ExitCode.UNTRUSTED,
        )
    return dataclasses.replace(key, public=known)
