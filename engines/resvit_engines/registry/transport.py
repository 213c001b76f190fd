"""HTTP to a registry by the standard library alone: TLS, bounds on all that is read, one connection for each server.

What a server can do wrong ends as a ``ResvitError``; what may pass by itself (a lost connection, a busy server) as a
``CutError``, after which the same may be tried again.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import open_outside
from resvit_engines.version import own_version

SMALL_MOST = 4 << 20
"""Bytes of the longest answer that is read at once; the OCI distribution specification wants no registry to take more
as a manifest."""
PIECE = 1 << 20
_SILENCE = 60.0
"""Seconds without a byte after which a connection counts as lost."""
_SMALL_SECONDS = 120.0
"""For an answer that is read at once: a server that sends it byte by byte would never be silent."""
_URL_MOST = 16 << 10
_SPEAKS_PLAIN = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")


class CutError(ResvitError):
    """A connection was lost, or the server asks to come again: the same may succeed later, after ``pause`` seconds.

    ``answered`` tells that the server is there.
    """

    pause: float = 0.0
    answered: bool = False


@dataclass(frozen=True)
class Origin:
    """A server: what credentials are for, and what must be the same for them to be sent."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """Host and port as a URL has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


@dataclass(frozen=True)
class Url:
    """Where a request goes: a server, and path and query there."""

    origin: Origin
    target: str


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address alone: nobody is asked."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_from(text: str, base: Url) -> Url:
    """A URL that a server named, such as in ``Location``, where it may be relative to ``base``.

    Raises:
        ResvitError: INPUT for what is no URL of http or https, names a user, or holds what no header may.
    """
    try:
        if len(text) > _URL_MOST or not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError("it is malformed")
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(f"{base.origin}{base.target}", text))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError("it is not of http or https, or names a user")
        origin = Origin(parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme])
    except ValueError as error:
        raise ResvitError(
            f"{base.origin} sends on to {text[:200]!r}, which is refused: {error}.",
            "Ask whoever runs the registry, or check the address.",
        ) from error
    return Url(origin, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


class Body(Protocol):
    """What is sent with a request: opened anew for every attempt."""

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    def open(self) -> Readable:
        """From its beginning."""
        ...


class Readable(Protocol):
    """What can be read piece by piece, as ``http.client`` does while it sends."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, none at the end."""
        ...


@dataclass(frozen=True)
class Plain:
    """Bytes that are sent."""

    data: bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.data)

    def open(self) -> BinaryIO:
        """From its beginning."""
        return io.BytesIO(self.data)


class Response:
    """An answer of which status and headers were read. ``origin`` is who answered."""

    def __init__(self, answer: http.client.HTTPResponse, origin: Origin, drop: Callable[[], None]) -> None:
        self._answer = answer
        self._drop = drop
        self.origin = origin
        self.status = answer.status

    def header(self, name: str) -> str:
        """A header's value, the first of several; empty where there is none."""
        return (self._answer.headers.get(name) or "").strip()

    def headers(self, name: str) -> list[str]:
        """All values of a header."""
        return self._answer.headers.get_all(name) or []

    @property
    def length(self) -> int | None:
        """``Content-Length`` in bytes; None where the server does not say."""
        return self._answer.length

    @property
    def media_type(self) -> str:
        """``Content-Type`` without parameters."""
        return self.header("Content-Type").partition(";")[0].strip().lower()

    def small(self, most: int = SMALL_MOST) -> bytes:
        """The whole body.

        Raises:
            ResvitError: INPUT where it is longer than ``most`` bytes.
            CutError: where the connection is lost.
        """
        data, end = bytearray(), time.monotonic() + _SMALL_SECONDS
        for piece in self.pieces(64 << 10):
            data += piece
            if len(data) > most:
                self._drop()
                raise ResvitError(
                    f"{self.origin} answers with more than the {most >> 10} KiB that are read of such an answer.",
                    "Check the address: is it a registry?",
                )
            if time.monotonic() > end:
                self._drop()
                raise CutError(f"{self.origin} sends too slowly.", "Try again later.", ExitCode.SYSTEM)
        return bytes(data)

    def pieces(self, size: int = PIECE) -> Iterator[bytes]:
        """The body, piece by piece.

        Raises:
            CutError: where the connection is lost before its end.
        """
        if self.header("Content-Encoding").lower() not in ("", "identity"):
            self._drop()
            raise ResvitError(
                f"{self.origin} sends compressed what was asked for as it is.", "Ask whoever runs the registry."
            )
        whole = False
        try:
            with _explained(self.origin):
                while True:
                    piece = self._answer.read1(size)
                    if not piece:
                        break
                    yield piece
                if self._answer.length:  # read1 ends quietly where the connection does
                    raise http.client.IncompleteRead(b"", self._answer.length)
                self._answer.close()  # read1 leaves it open where its length is read; the connection is for the next
            whole = True
        finally:
            if not whole:
                self._drop()

    def done(self) -> None:
        """Leave the connection ready for the next request, or give it up where much is still to come."""
        with contextlib.suppress(ResvitError):
            self.small(64 << 10)


class Transport:
    """Connections to the servers that a registry sends to. ``ca`` holds the only certificates that are trusted then.

    ``plain`` allows http without TLS everywhere; without it, http is for loopback alone.
    """

    def __init__(self, ca: Path | None = None, *, plain: bool = False, silence: float = _SILENCE) -> None:
        self.plain = plain
        self._pinned = ca is not None
        self._silence = silence
        self._open: dict[Origin, http.client.HTTPConnection] = {}
        self._tls = _context(ca)

    def origin(self, host: str, port: int | None) -> Origin:
        """How a registry is spoken to: by TLS; by http where that is allowed, or its loopback port speaks no TLS."""
        if self.plain:
            return Origin("http", host, port or 80)
        secure = Origin("https", host, port or 443)
        if is_loopback(host) and not self._pinned and self._speaks_plain(host, secure.port):
            return Origin("http", host, secure.port)
        return secure

    def may_be_plain(self, origin: Origin) -> bool:
        """Whether a server may be spoken to as ``origin`` says."""
        return origin.scheme == "https" or self.plain or is_loopback(origin.host)

    def send(self, method: str, url: Url, headers: Mapping[str, str], body: Body | None = None) -> Response:
        """Send one request and read status and headers of the answer.

        Raises:
            CutError: where the connection is lost, cannot be had, or the server is busy.
            ResvitError: UNTRUSTED for a certificate that is not trusted, INPUT for what is no HTTP.
        """
        origin = url.origin
        if not self.may_be_plain(origin):
            raise ResvitError(
                f"{origin} is no TLS: whoever is between could read and change everything.",
                "Use a registry with TLS, or in a network that is yours alone, --plain-http.",
                ExitCode.UNTRUSTED,
            )
        connection = self._connected(origin)
        sent = {"User-Agent": f"resvit-export/{own_version()}", "Accept-Encoding": "identity", **headers}
        if body is not None:
            sent["Content-Length"] = str(body.size)
        elif method in ("POST", "PUT", "PATCH"):
            sent["Content-Length"] = "0"
        try:
            with _explained(origin):
                try:
                    connection.request(method, url.target, body.open() if body else None, sent)
                except (BrokenPipeError, ConnectionResetError):
                    if body is None:
                        raise
                    # It may have answered before it had read everything, to refuse it.
                answer = connection.getresponse()
        except BaseException:
            self._drop(origin)
            raise
        response = Response(answer, origin, lambda: self._drop(origin))
        if response.status in (429, 502, 503, 504):
            raise self._busy(response)
        return response

    def close(self) -> None:
        """Close all connections."""
        for origin in list(self._open):
            self._drop(origin)

    def _connected(self, origin: Origin) -> http.client.HTTPConnection:
        if origin in self._open:
            return self._open[origin]
        proxy = _proxy_of(origin)
        host, port = (proxy.hostname or "", proxy.port or 80) if proxy else (origin.host, origin.port)
        if origin.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self._silence, context=self._tls, blocksize=PIECE
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._silence, blocksize=PIECE)
        if proxy:
            connection.set_tunnel(origin.host, origin.port, _proxy_headers(proxy))
        with _explained(origin):
            connection.connect()
        self._open[origin] = connection
        return connection

    def _speaks_plain(self, host: str, port: int) -> bool:
        """Whether http is understood there. Servers of TLS answer it with 400, or hang up; nothing secret is sent."""
        asked = http.client.HTTPConnection(host, port, timeout=self._silence)
        try:
            asked.request("GET", "/v2/", headers={"Connection": "close"})
            return asked.getresponse().status != 400
        except (OSError, http.client.HTTPException, ValueError):
            return False  # it is asked by TLS, and then it is said why not
        finally:
            asked.close()

    def _busy(self, response: Response) -> CutError:
        after = response.header("Retry-After")
        error = CutError(
            f"{response.origin} is busy or out of order (status {response.status}).", "Try again later.",
            ExitCode.SYSTEM,
        )  # fmt: skip
        error.answered = True
        error.pause = float(after) if after.isascii() and after.isdigit() and len(after) < 6 else 0.0
        response.done()
        return error

    def _drop(self, origin: Origin) -> None:
        connection = self._open.pop(origin, None)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()


def _context(ca: Path | None) -> ssl.SSLContext:
    if ca is None:
        return ssl.create_default_context()
    open_outside(ca).close()
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ResvitError(
            f"{ca} holds no certificates that can be read.", "Give the certificate of the registry's CA, as PEM."
        ) from error


def _proxy_of(origin: Origin) -> urllib.parse.SplitResult | None:
    """The proxy that the environment names for a server, as ``https_proxy`` and ``no_proxy`` do everywhere else."""
    if is_loopback(origin.host) or urllib.request.proxy_bypass(origin.host):
        return None
    named = urllib.request.getproxies_environment().get(origin.scheme)
    if not named:
        return None
    try:
        proxy = urllib.parse.urlsplit(named if "://" in named else f"http://{named}")
        proxy.port  # noqa: B018  (raises for one that is none)
    except ValueError:
        proxy = urllib.parse.urlsplit("")
    if proxy.scheme != "http" or not proxy.hostname:
        raise ResvitError(
            f"The environment names a proxy for {origin.scheme} that cannot be used.",
            f"Set {origin.scheme}_proxy to http://HOST:PORT, or no_proxy to {origin.host}.",
        )
    return proxy


def _proxy_headers(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    login = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


@contextlib.contextmanager
def _explained(origin: Origin) -> Iterator[None]:
    """Turn what the network does into a problem and a fix."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise ResvitError(
            f"The certificate of {origin} is not one that is trusted here: {error.verify_message}.",
            "Name the certificate of its CA with --ca, or check that this is the right host.",
            ExitCode.UNTRUSTED,
        ) from error
    except ssl.SSLError as error:
        if (error.reason or "") in _SPEAKS_PLAIN:
            raise ResvitError(
                f"{origin} speaks no TLS.",
                "Check host and port; in a network that is yours alone, --plain-http does without.",
                ExitCode.UNTRUSTED,
            ) from error
        raise _lost(origin, error.reason or str(error)) from error
    except socket.gaierror as error:
        raise CutError(
            f"No host is called {origin.host} ({error.strerror}).",
            "Check the name, and that this machine is on the network.",
            ExitCode.SYSTEM,
        ) from error
    except ConnectionRefusedError as error:
        raise CutError(
            f"{origin} refuses connections: nothing listens there.", "Check host and port.", ExitCode.SYSTEM
        ) from error
    except (http.client.RemoteDisconnected, http.client.IncompleteRead) as error:
        raise _lost(origin, "it ended early") from error
    except http.client.HTTPException as error:
        raise ResvitError(
            f"{origin} speaks no HTTP that is understood ({type(error).__name__}).", "Check host and port."
        ) from error
    except UnicodeError as error:  # a name of a host that no resolver takes
        raise ResvitError(f"{origin.host!r:.100} is no name of a host.", "Check the address.") from error
    except TimeoutError as error:
        raise _lost(origin, "it does not answer") from error
    except OSError as error:
        raise _lost(origin, error.strerror or str(error)) from error
    except ValueError as error:  # http.client's own for lengths and chunks that are no numbers
        raise ResvitError(f"{origin} speaks no HTTP that is understood ({error}).", "Check host and port.") from error


def _lost(origin: Origin, why: str) -> CutError:
    return CutError(
        f"The connection to {origin} was lost: {why}.",
        "Run the same command again: what was transferred is kept.",
        ExitCode.SYSTEM,
    )
