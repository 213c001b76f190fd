"""Being let in: what a registry asks for (RFC 7235), by password or by a token that another server gives for it.

The token protocol is that of Docker's registries (distribution.github.io, "Token Authentication Specification"), which
the OCI ones took over. Credentials go to the registry itself, or to the server of tokens that it names over TLS; they
go nowhere else.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.records import record_from_bytes
from resvit_engines.registry.credentials import Credentials, credentials_for
from resvit_engines.registry.reference import Reference
from resvit_engines.registry.transport import Origin, Plain, Response, Transport, Url, is_loopback, url_from

_TOKEN_MOST = 256 << 10
_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}")
_SCHEME = re.compile(r"\s*(?P<scheme>[A-Za-z][A-Za-z0-9-]{0,30})(?:\s+|\s*$)(?P<rest>.*)", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*,?\s*(?P<name>[A-Za-z_]{1,30})\s*=\s*"
    r'(?:"(?P<quoted>[^"\\]{0,4000})"|(?P<plain>[^\s",]{1,4000}))'
)
_CLIENT = "resvit-export"


@dataclass(frozen=True)
class Challenge:
    """One way in: ``basic`` or ``bearer``, with its parameters."""

    scheme: str
    parameters: dict[str, str]


def challenges_from(headers: Sequence[str]) -> list[Challenge]:
    """The ways in that ``WWW-Authenticate`` offers and that are known here; what does not read is passed over."""
    found = []
    for header in headers:
        for part in re.split(r"(?=\b(?:basic|bearer)\b\s)", header[:8000], flags=re.IGNORECASE):
            begun = _SCHEME.match(part)
            if begun is None or begun["scheme"].lower() not in ("basic", "bearer"):
                continue
            parameters: dict[str, str] = {}
            at = 0
            while (one := _PARAMETER.match(begun["rest"], at)) is not None:
                parameters.setdefault(one["name"].lower(), one["quoted"] if one["plain"] is None else one["plain"])
                at = one.end()
            found.append(Challenge(begun["scheme"].lower(), parameters))
    return found


class Authorization:
    """The header ``Authorization`` for one repository; ``actions`` are ``pull``, or ``pull,push``."""

    def __init__(self, reference: Reference, actions: str, transport: Transport) -> None:
        self._reference = reference
        self._scope = f"repository:{reference.name}:{actions}"
        self._transport = transport
        self.header = ""

    @cached_property
    def _credentials(self) -> Credentials | None:
        return credentials_for(self._reference.authority)

    def renew(self, response: Response, url: Url) -> None:
        """Get in as the answer to a request without, or with an old, ``header`` asks for.

        Raises:
            ResvitError: SYSTEM where nobody gets in, UNTRUSTED where credentials would go where others read them.
        """
        asked = challenges_from(response.headers("WWW-Authenticate"))
        offered = {challenge.scheme: challenge for challenge in reversed(asked)}
        response.done()
        known = self._credentials
        if known and known.registry_token:
            self.header = f"Bearer {_sound(known.registry_token, self._reference.authority)}"
        elif "bearer" in offered:
            self.header = f"Bearer {self._token(offered['bearer'], url)}"
        elif "basic" in offered and known and known.user:
            self.header = known.basic
        elif "basic" in offered:
            raise ResvitError(
                f"{self._reference.authority} asks for a user and a password, and none are known.", self._log_in,
                ExitCode.SYSTEM,
            )  # fmt: skip
        else:
            raise ResvitError(
                f"{self._reference.authority} lets nobody in and does not say how one gets in.",
                "Check the address: is it a registry?",
            )

    def refusal(self) -> ResvitError:
        """The error where what was got does not open."""
        known = self._credentials
        who = f"the user {known.user}" if known and known.user else "whoever has its token" if known else "nobody known"
        return ResvitError(
            f"{self._reference.authority} does not let {who} use {self._reference.name} (it asks for "
            f"{self._scope.rpartition(':')[2]}).",
            self._log_in,
            ExitCode.SYSTEM,
        )

    @property
    def _log_in(self) -> str:
        return (
            f"Log in with: docker login {self._reference.authority} (or put its auth into ~/.docker/config.json or "
            "$DOCKER_CONFIG/config.json), and check what that user may do."
        )

    def _token(self, challenge: Challenge, url: Url) -> str:
        realm = self._realm(challenge, url)
        known, service = self._credentials, challenge.parameters.get("service", "")
        asked = {"scope": self._scope, **({"service": service} if service else {})}
        if known and known.identity_token:
            form = {
                "grant_type": "refresh_token", "client_id": _CLIENT, "refresh_token": known.identity_token, **asked,
            }  # fmt: skip
            body = Plain(urllib.parse.urlencode(form).encode())
            headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
            response = self._transport.send("POST", realm, headers, body)
        else:
            joint = "&" if "?" in realm.target else "?"
            target = f"{realm.target}{joint}{urllib.parse.urlencode(asked)}"
            headers = {"Accept": "application/json", **({"Authorization": known.basic} if known and known.user else {})}
            response = self._transport.send("GET", Url(realm.origin, target), headers)
        if response.status in (400, 401, 403):
            response.done()
            raise self.refusal()
        if response.status != 200:
            response.done()
            raise ResvitError(
                f"{realm.origin}, which gives the tokens for {self._reference.authority}, answers with status "
                f"{response.status}.",
                "Ask whoever runs the registry.",
            )
        record = record_from_bytes(response.small(_TOKEN_MOST), f"the token of {realm.origin}")
        token = record.optional("token", record.text) or record.optional("access_token", record.text) or ""
        return _sound(token, str(realm.origin))

    def _realm(self, challenge: Challenge, url: Url) -> Url:
        named = challenge.parameters.get("realm", "")
        realm = url_from(named, url)
        if realm.origin.scheme != "https" and not _as_near(realm.origin, url.origin):
            raise ResvitError(
                f"{self._reference.authority} sends to {realm.origin} for a token, without TLS: the password would be "
                "read on the way.",
                "Whoever runs the registry must name a realm with https.",
                ExitCode.UNTRUSTED,
            )
        return realm


def _as_near(realm: Origin, registry: Origin) -> bool:
    """Whether http to ``realm`` shows nobody what http to the registry would not."""
    if registry.scheme != "http":
        return False
    return realm.host == registry.host or (is_loopback(realm.host) and is_loopback(registry.host))


def _sound(token: str, whose: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ResvitError(f"The token of {whose} is none.", "Ask whoever runs the registry.")
    return token
