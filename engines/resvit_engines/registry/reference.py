"""``oci://host/name:tag``: which bundles, in which registry.

The grammar of names, tags and digests is that of the OCI distribution specification 1.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from resvit_engines.errors import ResvitError

SCHEME = "oci://"
HUB = "docker.io"
"""Docker's own registry, whose interface answers at another name than the one that people write."""
_HUB_HOST = "registry-1.docker.io"
_HOST = re.compile(
    r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9A-Fa-f:.]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOST = 1024
_NAME_MOST = 255


def is_digest(text: object) -> bool:
    """Whether this is a digest as registries write it, ``sha256:`` and 64 hexadecimal digits; no other is taken."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True)
class Reference:
    """A place in a registry. ``tag`` may be moved to other content, ``digest`` is one content for ever."""

    host: str
    port: int | None
    name: str
    tag: str | None = None
    digest: str | None = None

    @property
    def authority(self) -> str:
        """Host and port as they were written, which is what credentials are kept under."""
        return self.host if self.port is None else f"{self.host}:{self.port}"

    @property
    def server(self) -> str:
        """The host that answers, without the brackets of an IPv6 address."""
        return _HUB_HOST if self.host == HUB else self.host.strip("[]")

    @property
    def wanted(self) -> str:
        """What manifests are asked for by: the digest where there is one, else the tag."""
        return self.digest or self.tag or ""

    def at(self, digest: str) -> str:
        """The same name and tag, held to one content."""
        tag = f":{self.tag}" if self.tag else ""
        return f"{SCHEME}{self.authority}/{self.name}{tag}@{digest}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{SCHEME}{self.authority}/{self.name}{tag}{digest}"


def reference_from_text(text: str) -> Reference:
    """Parse ``oci://HOST[:PORT]/NAME:TAG``, ``…@sha256:DIGEST`` or both; nothing is taken for a tag that is not said.

    Raises:
        ResvitError: INPUT for anything else.
    """
    if not text.startswith(SCHEME) or len(text) > _MOST:
        raise _no_reference(text, "it does not begin with oci://" if len(text) <= _MOST else "it is too long")
    authority, _, rest = text.removeprefix(SCHEME).partition("/")
    if "@" in authority:
        raise ResvitError(
            f"The reference to {authority.rpartition('@')[2]} has a user or a password in it.",
            "Leave it out: credentials are those of Docker's configuration, as docker login writes it.",
        )
    rest, _, digest = rest.partition("@")
    name, _, tag = rest.partition(":")
    place = _HOST.fullmatch(authority)
    if place is None:
        raise _no_reference(text, f"{authority!r} is no host")
    port = int(place["port"]) if place["port"] else None
    if port is not None and not 0 < port < 1 << 16:
        raise _no_reference(text, f"{port} is no port")
    if len(name) > _NAME_MOST or not _NAME.fullmatch(name):
        raise _no_reference(text, f"{name!r} is no name of a repository: small letters, digits, and / . _ - between")
    if tag and not _TAG.fullmatch(tag):
        raise _no_reference(text, f"{tag!r} is no tag")
    if digest and not is_digest(digest):
        raise _no_reference(text, f"{digest!r} is no digest")
    if not tag and not digest:
        raise _no_reference(text, "it says neither tag nor digest")
    return Reference(place["host"].lower(), port, name, tag or None, digest or None)


def _no_reference(text: str, why: str) -> ResvitError:
    return ResvitError(
        f"{text[:200]!r} names nothing in a registry: {why}.",
        "Write oci://HOST[:PORT]/NAME:TAG, or oci://HOST[:PORT]/NAME@sha256:DIGEST.",
    )
