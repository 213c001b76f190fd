"""The one form of a public key's file, and of the list of revoked keys.

A key file is UTF-8 text with line feeds::

    Name: release
    Created: 2026-11-25
    Expires: 2027-11-25
    -----BEGIN PUBLIC KEY-----
    MCowBQYDK2VwAyEA…
    -----END PUBLIC KEY-----
    Revoked: yes

or has a line of OpenSSH's, ``ssh-ed25519 AAAA… comment``, in place of the PEM block. It holds one Ed25519 key. Each
attribute stands once at most and has a value; ``Revoked`` is ``yes`` or ``no``, and alone may stand behind the key,
where it is appended. Empty lines and lines that begin with ``#`` say nothing. The list of revoked keys has one key id
of 64 hexadecimal digits a line, and such lines.

Everything else is an error: a misspelt ``Expires`` must not become a key for ever, nor a list that lost its lines one
that revokes nothing.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.keys.guarded import text_from, untrusted

ATTRIBUTES = ("Name", "Created", "Expires", "Revoked")
NAME_MOST = 200
"""Characters of the longest name of a key."""
KEY_FILE_MOST, LIST_MOST = 64 << 10, 4 << 20
"""Bytes of the longest key file and list."""
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"
_DER = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410)."""
_SSH = b"ssh-ed25519"
_ATTRIBUTE = re.compile(r"([A-Za-z]+):[ ]*(.*?)[ ]*")
_IN_COMMENT = re.compile(rf"({'|'.join(ATTRIBUTES)})\s*:", re.IGNORECASE)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_KEYID = re.compile(r"[0-9a-f]{64}")
_SMALL_ORDER = frozenset(
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        *(f"{low:02x}" + "ff" * 30 + "7f" for low in (0xEC, 0xED, 0xEE)),
    )
)
"""Points of order 8 or less, without their sign: under such a key, whose bytes may be all zero, anyone can sign."""


@dataclass(frozen=True)
class KeyFile:
    """What a key file says: the raw key (32 bytes), OpenSSH's comment, and the attributes."""

    raw: bytes
    comment: str
    name: str | None
    created: date | None
    expires: date | None
    revoked: bool


def key_file_from_bytes(data: bytes, path: Path) -> KeyFile:
    """Parse a key file; ``path`` is for messages.

    Raises:
        ResvitError: UNTRUSTED for whatever is not in the form above.
    """
    if b"PRIVATE KEY" in data:
        raise untrusted(
            f"{path} holds a private key, where a public one belongs.",
            "Take it away from here; put the .pub file that keygen wrote beside it in its place.",
        )
    lines = text_from(data, path)
    begins = [number for number, line in enumerate(lines) if line == _BEGIN or line.startswith("ssh-")]
    if not begins:
        raise _no_key(path)
    begin = begins[0]
    if lines[begin] == _BEGIN:
        end = next((number for number, line in enumerate(lines) if number > begin and line == _END), None)
        if end is None:
            raise _no_key(path)
        raw, comment = _raw_from_pem("".join(lines[begin + 1 : end]), path), ""
    else:
        end = begin
        raw, comment = _raw_from_openssh(lines[begin], path)
    if raw[:-1] + bytes([raw[-1] & 0x7F]) in _SMALL_ORDER:
        raise _no_key(path)
    if len(begins) > 1:
        raise untrusted(f"{path} holds more than one key.", "Give each key a file of its own.")
    before, behind = _attributes(lines[:begin], path), _attributes(lines[end + 1 :], path)
    for title in behind:
        if title != "Revoked":
            raise untrusted(f"{path} says {title} behind the key, where it does not count.", "Put it before the key.")
        if title in before:
            raise _twice(path, title)
    said = {**before, **behind}
    created, expires = (_date(said.get(title), path) for title in ("Created", "Expires"))
    if created and expires and expires < created:
        raise untrusted(f"{path} says that the key expired before it was created.", "Give the file that keygen wrote.")
    return KeyFile(raw, comment, said.get("Name"), created, expires, _yes(said.get("Revoked"), path))


def revoked_from_bytes(data: bytes, path: Path) -> frozenset[str]:
    """Parse a list of revoked keys into their key ids; ``path`` is for messages.

    Raises:
        ResvitError: UNTRUSTED for whatever is not in the form above, an empty file among it.
    """
    fix = "Write one key id of 64 digits a line, as 'resvit-export keygen' shows it."
    if not data.strip():
        raise untrusted(
            f"{path} is empty, as a list is that lost its lines.", "Write it again, or remove it if no key is revoked."
        )
    keyids = _told(text_from(data, path))
    for line in keyids:
        if not _KEYID.fullmatch(line):
            raise untrusted(f"{path} holds {line[:70]!r}, which is no key id.", fix)
    return frozenset(keyids)


def _told(lines: Iterable[str]) -> list[str]:
    """The lines that say something."""
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _raw_from_pem(body: str, path: Path) -> bytes:
    data = _from_base64(body)
    if data is None or len(data) != len(_DER) + 32 or not data.startswith(_DER):
        raise _no_key(path)
    return data[len(_DER) :]


def _raw_from_openssh(line: str, path: Path) -> tuple[bytes, str]:
    kind, _, rest = line.partition(" ")
    body, _, comment = rest.partition(" ")
    head = struct.pack(">I", len(_SSH)) + _SSH + struct.pack(">I", 32)
    data = _from_base64(body)
    if kind != _SSH.decode() or data is None or len(data) != len(head) + 32 or not data.startswith(head):
        raise _no_key(path)
    if found := _IN_COMMENT.search(comment):
        # 'echo Revoked: yes >>' behind a line without its end.
        raise untrusted(
            f"{path} says {found[1]} in the line of the key, where it does not count.", "Give it a line of its own."
        )
    if len(comment) > NAME_MOST:
        raise untrusted(f"The comment of the key in {path} is longer than {NAME_MOST} characters.", "Shorten it.")
    return data[len(head) :], comment.strip()


def _from_base64(text: str) -> bytes | None:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if base64.b64encode(data).decode() == text else None


def _attributes(lines: Sequence[str], path: Path) -> dict[str, str]:
    titles = {title.lower(): title for title in ATTRIBUTES}
    said: dict[str, str] = {}
    for line in _told(lines):
        matched = _ATTRIBUTE.fullmatch(line)
        title = titles.get(matched[1].lower()) if matched else None
        if matched is None or title is None:
            raise untrusted(
                f"{path} has a line that is not understood: {line[:70]!r}.",
                f"Before the key stand lines of {', '.join(ATTRIBUTES)}, each with a colon and a value.",
            )
        if title in said:
            raise _twice(path, title)
        if not 0 < len(matched[2]) <= NAME_MOST:
            raise untrusted(f"{path} gives {title} no value, or one too long.", "Give it a value, or remove the line.")
        said[title] = matched[2]
    return said


def _date(text: str | None, path: Path) -> date | None:
    if text is None:
        return None
    try:
        if not _DATE.fullmatch(text):
            raise ValueError(text)
        return date.fromisoformat(text)
    except ValueError as error:
        raise untrusted(f"{path} says {text!r} where a date belongs.", "Write it as 2027-11-25.") from error


def _yes(text: str | None, path: Path) -> bool:
    if text is None or text.lower() == "no":
        return False
    if text.lower() == "yes":
        return True
    raise untrusted(f"{path} says Revoked: {text!r}.", "Write yes or no.")


def _no_key(path: Path) -> ResvitError:
    return untrusted(
        f"{path} is not an Ed25519 public key.", "Give a .pub file of resvit-export keygen or of ssh-keygen."
    )


def _twice(path: Path, title: str) -> ResvitError:
    return untrusted(f"{path} says {title} twice.", "Keep one of the two lines.")
