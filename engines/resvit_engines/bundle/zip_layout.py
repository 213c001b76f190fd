"""The zip format as bundles use it: stored members, one fixed form of every header, so that no byte is free.

A reader of zip files in general believes what headers say: names, sizes and places that may contradict each other.
Here a header is only accepted when it is, byte for byte, what this module writes for the same name, size and CRC-32.
Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

LOCAL_MAGIC = b"PK\x03\x04"
NAME_LIMIT = 1024
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_LARGE = 0xFFFFFFFF
"""From here on, a size or place stands in a zip64 field."""
_DATE = 1 << 5 | 1  # 1 January 1980, the earliest that a zip can hold
_UNIX = 3 << 8
_UTF8 = 0x800
_ATTRIBUTES = (stat.S_IFREG | 0o644) << 16


@dataclass(frozen=True)
class Member:
    """One file in the zip; ``size`` in bytes."""

    name: str
    size: int
    crc: int


def local_header(member: Member) -> bytes:
    """What stands before a member's bytes."""
    large = member.size >= _LARGE
    extra = struct.pack("<HHQQ", 1, 16, member.size, member.size) if large else b""
    size = _LARGE if large else member.size
    name = member.name.encode()
    head = _LOCAL.pack(
        LOCAL_MAGIC, _version(large), _flags(name), 0, 0, _DATE, member.crc, size, size, len(name), len(extra)
    )
    return head + name + extra


def read_local_header(stream: BinaryIO) -> tuple[Member, bytes]:
    """Read one header at the stream's place; returns what it claims, and its bytes to hold against ``local_header``.

    Raises:
        ValueError: where there is no header, or no whole one.
    """
    head = stream.read(_LOCAL.size)
    if len(head) != _LOCAL.size or head[:4] != LOCAL_MAGIC:
        raise ValueError("there is no zip header where one must be")
    *_, crc, _, size, name_bytes, extra_bytes = _LOCAL.unpack(head)
    if name_bytes > NAME_LIMIT or extra_bytes > 20:
        raise ValueError("a header is longer than any of ours")
    rest = stream.read(name_bytes + extra_bytes)
    if len(rest) != name_bytes + extra_bytes:
        raise ValueError("it ends inside a header")
    extra = rest[name_bytes:]
    if size == _LARGE and len(extra) == 20:
        (size,) = struct.unpack_from("<Q", extra, 4)
    # UnicodeDecodeError is a ValueError.
    return Member(rest[:name_bytes].decode(), size, crc), head + rest


def directory(members: Iterable[Member]) -> bytes:
    """What stands after the last member: the central directory and the end records."""
    entries, offset, count = [], 0, 0
    for member in members:
        entries.append(_central(member, offset))
        offset += len(local_header(member)) + member.size
        count += 1
    central = b"".join(entries)
    end = b""
    if offset >= _LARGE:
        version = _version(large=True)
        end = _END_64.pack(
            b"PK\x06\x06", _END_64.size - 12, _UNIX | version, version, 0, 0, count, count, len(central), offset
        )
        end += _LOCATOR_64.pack(b"PK\x06\x07", 0, offset + len(central), 1)
    end += _END.pack(b"PK\x05\x06", 0, 0, count, count, len(central), min(offset, _LARGE), 0)
    return central + end


def total_size(sizes: Iterable[tuple[str, int]]) -> int:
    """Bytes of the whole zip that holds files of these names and sizes."""
    members = [Member(name, size, 0) for name, size in sizes]
    return sum(len(local_header(member)) + member.size for member in members) + len(directory(members))


def _central(member: Member, offset: int) -> bytes:
    large = member.size >= _LARGE
    values = [member.size, member.size] if large else []
    values += [offset] if offset >= _LARGE else []
    extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    name = member.name.encode()
    version = _version(bool(values))
    size = _LARGE if large else member.size
    return (
        _CENTRAL.pack(
            b"PK\x01\x02", _UNIX | version, version, _flags(name), 0, 0, _DATE, member.crc, size, size,
            len(name), len(extra), 0, 0, 0, _ATTRIBUTES, min(offset, _LARGE),
        )
        + name
        + extra
    )  # fmt: skip


def _version(large: bool) -> int:
    return 45 if large else 20


def _flags(name: bytes) -> int:
    return 0 if name.isascii() else _UTF8
