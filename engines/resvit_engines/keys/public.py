"""The folder of public keys that a device trusts.

What their files look like stands in ``key_file``; who may write to them in ``guarded``. ``Revoked: yes`` in a key's
file, or its key id in the file ``revoked`` beside it, withdraws it. Where a signed list of keys (``key_list``) lies in
the folder, the keys in it and the machine's own are trusted, and no others.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.keys.guarded import read_guarded, require_guarded, untrusted
from resvit_engines.keys.key_file import KEY_FILE_MOST, LIST_MOST, revoked_from_bytes
from resvit_engines.keys.key_list import LIST_FILE_MOST, KeyList, list_from_bytes, require_fresh
from resvit_engines.keys.public_key import PublicKey, public_key_from_bytes, read_public_key
from resvit_engines.outside import expanded

__all__ = ("PublicKey", "TrustStore", "load_trust", "public_key_from_bytes", "read_public_key")

TRUST_VARIABLE = "RESVIT_TRUST"
REVOKED = "revoked"
KEY_LIST, OWN = "keys.json", "own.pub"
"""The signed list of keys that was taken, and the machine's own key, in the folder of trusted ones."""
_SUFFIXES = (".pub", ".pem")


@dataclass(frozen=True)
class TrustStore:
    """The public keys that are trusted here. ``source`` is the folder or file that they are from, for messages.

    ``listed`` is the signed list that most of them are from, where there is one: it is good until its own end.
    """

    keys: tuple[PublicKey, ...]
    revoked: frozenset[str] = frozenset()
    source: str = "the trust folder"
    listed: KeyList | None = None

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
            if self.listed is not None and keyid in {key.keyid for key in self.listed.keys}:
                require_fresh(self.listed, f"The list of keys in {self.source}", now)
            for key in found:
                _require_unexpired(key, what, now or datetime.now(timezone.utc))
        return found[0]


def load_trust(path: Path | None = None) -> TrustStore:
    """Read the trusted keys: ``.pub`` and ``.pem`` files of a folder, or one file; without those that are revoked.

    Where a signed list lies in the folder, the trusted keys are those of the list and the machine's own.
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
    chosen = trust_folder(path)
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


def trust_folder(path: Path | None = None) -> Path:
    """Where trusted keys are read from: ``path``, else ``$RESVIT_TRUST``, else the usual folder."""
    value = os.environ.get(TRUST_VARIABLE)
    return expanded(path or (Path(value) if value else default_trust_folder()))


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
    by_file = {file.name: _trusted_key(file) for file in files if _is_key(file.name)}
    keys = tuple(by_file.values())
    revoked = _listed(path / REVOKED)
    taken = taken_list(path)
    if taken is None:
        return TrustStore(keys, revoked, str(path))
    withdrawn = revoked | taken.revoked | {key.keyid for key in keys if key.revoked}
    trusted = (*taken.keys, *([by_file[OWN]] if OWN in by_file else []))
    return TrustStore(trusted, withdrawn, str(path), taken)


def taken_list(folder: Path) -> KeyList | None:
    """The signed list of keys in a folder of trusted ones; None where there is none.

    Raises:
        ResvitError: UNTRUSTED for one that is not in its form, that its own roots did not sign, or that others on this
            machine may write to.
    """
    path = folder / KEY_LIST
    if not os.path.lexists(path):
        return None
    signed = list_from_bytes(read_guarded(path, LIST_FILE_MOST), str(path))
    signed.require_signed(signed.keys.roots, signed.keys.threshold, str(path))
    return signed.keys


def _is_key(name: str) -> bool:
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def _trusted_key(path: Path) -> PublicKey:
    return public_key_from_bytes(read_guarded(path, KEY_FILE_MOST), path)


def _listed(*lists: Path) -> frozenset[str]:
    """The key ids on those of the lists that are there; a link that leads nowhere is there."""
    there = (path for path in lists if os.path.lexists(path))
    return frozenset[str]().union(*(revoked_from_bytes(read_guarded(path, LIST_MOST), path) for path in there))
