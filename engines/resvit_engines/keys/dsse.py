"""What is signed of a DSSE envelope (github.com/secure-systems-lab/dsse)."""

from __future__ import annotations


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
