"""Signing by the OpenSSH agent: the private key stays with it, passphrase, hardware and all.

Source: draft-ietf-sshm-ssh-agent, "SSH Agent Protocol". For ``ssh-ed25519`` the agent signs the data as it is, so its
signature is a plain Ed25519 one.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

from resvit_engines.errors import ExitCode, ResvitError

KEY_TYPE = b"ssh-ed25519"
_LIST, _LISTED = 11, 12
_SIGN, _SIGNED = 13, 14
_LIMIT = 256 << 10
"""Bytes of the largest message that OpenSSH's agent reads or writes."""
_SECONDS = 120.0
"""For the agent's answer: it may be asking somebody to confirm."""


@dataclass(frozen=True)
class AgentKey:
    """An Ed25519 key in the agent: 32 bytes, and the comment that it was added with."""

    raw: bytes
    comment: str


def agent_keys() -> list[AgentKey]:
    """The Ed25519 keys that the agent holds.

    Raises:
        ResvitError: MISSING where no agent answers.
    """
    body = _ask(bytes([_LIST]), _LISTED)
    keys, place = [], 4
    for _ in range(struct.unpack_from(">I", body)[0]):
        blob, place = _string(body, place)
        comment, place = _string(body, place)
        kind, rest = _string(blob, 0)
        if kind == KEY_TYPE:
            keys.append(AgentKey(_string(blob, rest)[0], comment.decode(errors="replace")))
    return keys


def sign_by_agent(raw: bytes, data: bytes) -> bytes:
    """Have the agent sign ``data`` with its key ``raw``; returns the 64 bytes of the signature.

    Raises:
        ResvitError: MISSING where the agent refuses, INPUT where ``data`` is more than it takes.
    """
    blob = _packed(KEY_TYPE) + _packed(raw)
    request = bytes([_SIGN]) + _packed(blob) + _packed(data) + struct.pack(">I", 0)
    if len(request) > _LIMIT:
        raise ResvitError(
            f"The manifest ({len(data) >> 10} KiB) is larger than the OpenSSH agent signs ({_LIMIT >> 10} KiB).",
            "Sign with a key file: resvit-export keygen release.key.",
        )
    answer, _ = _string(_ask(request, _SIGNED), 0)
    return _string(answer, _string(answer, 0)[1])[0]


def _ask(request: bytes, expected: int) -> bytes:
    path = os.environ.get("SSH_AUTH_SOCK")
    if not path:
        raise _no_agent("SSH_AUTH_SOCK is not set")
    try:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(_SECONDS)
            channel.connect(path)
            channel.sendall(struct.pack(">I", len(request)) + request)
            (size,) = struct.unpack(">I", _exactly(channel, 4))
            if not 1 <= size <= _LIMIT:
                raise OSError("its answer is malformed")
            answer = _exactly(channel, size)
    except OSError as error:
        raise _no_agent(str(error)) from error
    if answer[0] != expected:
        raise _no_agent("it refused")
    return answer[1:]


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = channel.recv(size - len(data))
        if not chunk:
            raise OSError("it hung up")
        data += chunk
    return data


def _string(data: bytes, place: int) -> tuple[bytes, int]:
    """The length-prefixed string at ``place``, and where it ends."""
    try:
        (size,) = struct.unpack_from(">I", data, place)
    except struct.error as error:
        raise _no_agent("its answer is malformed") from error
    end = place + 4 + size
    if end > len(data):
        raise _no_agent("its answer is malformed")
    return data[place + 4 : end], end


def _packed(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _no_agent(why: str) -> ResvitError:
    return ResvitError(
        f"The OpenSSH agent does not sign: {why}.",
        'Start it with eval "$(ssh-agent)", add a key with ssh-add, and look with ssh-add -l.',
        ExitCode.MISSING,
    )
