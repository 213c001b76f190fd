"""What is done with a registry: blobs and manifests by their digests, as the OCI distribution specification 1.1 has it.

No digest is believed that was not computed here, from the bytes that were read or sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import number_from_environment
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import record_from_bytes
from resvit_engines.registry.authorization import Authorization
from resvit_engines.registry.reference import Reference, is_digest
from resvit_engines.registry.transport import (
    SMALL_MOST,
    Body,
    CutError,
    Plain,
    Readable,
    Response,
    Transport,
    Url,
    url_from,
)

PATIENCE_VARIABLE = "RESVIT_REGISTRY_PATIENCE"
"""Seconds that a registry that answered before may stay away."""
_PATIENCE = 120.0
_LONGEST_PAUSE = 15.0
_REDIRECTS = 5
_SENT_ON = (301, 302, 303, 307, 308)
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
T = TypeVar("T")


@dataclass(frozen=True)
class Section:
    """A part of an open file that is sent: ``size`` bytes from ``start`` on."""

    stream: BinaryIO
    start: int
    size: int

    def open(self) -> Readable:
        """From its beginning."""
        self.stream.seek(self.start)
        return _Left(self.stream, self.size)


class _Left:
    """So many bytes of a stream."""

    def __init__(self, stream: BinaryIO, left: int) -> None:
        self._stream, self._left = stream, left

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, none at the end."""
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


@dataclass(frozen=True)
class Fetched:
    """A manifest or index: its bytes, which media type it is said to be, and the digest of the bytes."""

    data: bytes
    media_type: str
    digest: str


class Client:
    """One repository in one registry; ``push`` asks for the right to write there."""

    def __init__(
        self,
        reference: Reference,
        *,
        push: bool = False,
        ca: Path | None = None,
        plain: bool = False,
        patience: float | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        self.reference = reference
        self.patience = number_from_environment(PATIENCE_VARIABLE, _PATIENCE) if patience is None else patience
        self._transport = Transport(ca, plain=plain)
        self._authorization = Authorization(reference, "pull,push" if push else "pull", self._transport)
        self._reporter = reporter
        self._base: Url | None = None
        self._reached = False

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Manifests

    def manifest(self, wanted: str, accept: Sequence[str]) -> Fetched:
        """The manifest or index of a tag or digest.

        Raises:
            ResvitError: INPUT where there is none, it is longer than 4 MiB or no such document, or its bytes are not
                those of the digest that was asked for or that the registry itself names.
        """

        def ask() -> Fetched:
            response = self._ask("GET", f"manifests/{wanted}", {"Accept": ", ".join(accept)})
            with self._read(response, f"{self._named(wanted)}"):
                said = response.header("Docker-Content-Digest")
                if response.media_type in ("text/html", "application/xhtml+xml"):
                    raise self._web_page()
                data = response.small()
            digest = digest_of(data)
            for other in (said if is_digest(said) else "", wanted if is_digest(wanted) else ""):
                if other and other != digest:
                    raise wrong_bytes(self._named(wanted), other)
            return Fetched(data, response.media_type, digest)

        return self._patiently(ask)

    def digest_of_tag(self, tag: str, accept: Sequence[str]) -> str | None:
        """Which content a tag is on, as the registry says; None for a tag that there is not."""

        def ask() -> str | None:
            response = self._ask("HEAD", f"manifests/{tag}", {"Accept": ", ".join(accept)})
            said = response.header("Docker-Content-Digest")
            response.done()
            return said if response.status == 200 and is_digest(said) else None

        return self._patiently(ask)

    def put_manifest(self, wanted: str, data: bytes, media_type: str) -> str:
        """Store a manifest or index under a tag or its digest; returns the digest."""
        digest = digest_of(data)

        def ask() -> None:
            headers = {"Content-Type": media_type}
            response = self._ask("PUT", f"manifests/{wanted}", headers, Plain(data))
            with self._read(response, self._named(wanted), ok=(200, 201)):
                self._require_same(response, digest)

        self._patiently(ask)
        return digest

    # Blobs

    def has_blob(self, digest: str, size: int) -> bool:
        """Whether the repository holds a blob, of that size."""

        def ask() -> bool:
            response = self._ask("HEAD", f"blobs/{digest}")
            said = response.header("Content-Length")
            response.done()
            if response.status not in (200, 404):
                raise self._refused(response, b"", f"the blob {digest}")
            return response.status == 200 and said in ("", str(size))

        return self._patiently(ask)

    def put_blob(self, digest: str, body: Body) -> None:
        """Store a blob in one piece; a lost connection begins it again."""

        def ask() -> None:
            what = f"the blob {digest}"
            response = self._ask("POST", "blobs/uploads/")
            with self._read(response, what, ok=(202,)):
                place = self._upload_place(response)
            headers = {"Content-Type": "application/octet-stream"}
            joint = "&" if "?" in place.target else "?"
            place = Url(place.origin, f"{place.target}{joint}digest={urllib.parse.quote(digest)}")
            response = self._send("PUT", place, headers, body)
            with self._read(response, what, ok=(201,)):
                self._require_same(response, digest)

        self._patiently(ask)

    def small_blob(self, digest: str, size: int, most: int) -> bytes:
        """A blob that is held in memory, of ``size`` bytes, at most ``most``.

        Raises:
            ResvitError: INPUT where it is not there, is longer, or has other bytes than its digest says.
        """
        if size > most:
            raise ResvitError(
                f"{self.reference} holds {size:,} bytes where at most {most:,} are read.", "Push it again."
            )
        data = b"".join(self.blob(digest, size))
        if digest_of(data) != digest:
            raise wrong_bytes(f"a blob of {self.reference}", digest)
        return data

    def blob(self, digest: str, size: int, start: int = 0) -> Iterator[bytes]:
        """The bytes of a blob of ``size`` bytes from ``start`` on, through lost connections; never more than ``size``.

        Whether they are those of the digest is for who puts them together.

        Raises:
            CutError: where the registry stays away for longer than ``patience``.
            ResvitError: INPUT where the blob is not there or has another size.
        """
        moved, pause, at = time.monotonic(), 0.0, start
        while at < size:
            try:
                for piece in self._once(digest, size, at):
                    yield piece
                    at += len(piece)
                    moved, pause = time.monotonic(), 0.0
            except CutError as error:
                pause = self._wait(error, moved, pause)

    def _once(self, digest: str, size: int, start: int) -> Iterator[bytes]:
        """The bytes from ``start`` on that one request brings."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = self._ask("GET", f"blobs/{digest}", headers)
        with self._read(response, f"the blob {digest}", ok=(200, 206)):
            skip = 0 if _begins(response, size, start) else start
            left = size - start
            for piece in response.pieces():
                fresh = piece[skip:]
                skip -= len(piece) - len(fresh)
                if len(fresh) > left:
                    raise wrong_bytes(f"a blob of {self.reference}, which is longer than it may be,", digest)
                left -= len(fresh)
                if fresh:
                    yield fresh
            if left:
                raise CutError(
                    f"{response.origin} sent {size - left:,} of {size:,} bytes.",
                    "Run the same command again: what was transferred is kept.",
                    ExitCode.SYSTEM,
                )

    # One request

    def _ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Body | None = None
    ) -> Response:
        if self._base is None:
            origin = self._transport.origin(self.reference.server, self.reference.port)
            self._base = Url(origin, f"/v2/{self.reference.name}/")
        return self._send(method, Url(self._base.origin, self._base.target + path), headers or {}, body)

    def _send(self, method: str, url: Url, headers: Mapping[str, str], body: Body | None = None) -> Response:
        """Send a request, get in where that is asked for, and follow to where what is read lies."""
        home, renewed = url.origin, False
        for _ in range(_REDIRECTS + 2):
            ours = url.origin == home
            authorized = {"Authorization": self._authorization.header} if ours and self._authorization.header else {}
            try:
                response = self._transport.send(method, url, {**headers, **authorized}, body)
            except CutError as error:
                self._reached |= error.answered
                raise
            self._reached = True
            if response.status == 401 and ours:
                if renewed:
                    response.done()
                    raise self._authorization.refusal()
                self._authorization.renew(response, url)
                renewed = True
            elif response.status in _SENT_ON and method in ("GET", "HEAD"):
                location = response.header("Location")
                response.done()
                url = self._followed(location, url)
            else:
                return response
        raise ResvitError(f"{home} sends on and on.", "Ask whoever runs the registry.")

    def _followed(self, location: str, url: Url) -> Url:
        place = url_from(location, url)
        if url.origin.scheme == "https" and place.origin.scheme != "https":
            raise ResvitError(
                f"{url.origin} sends on to {place.origin}, without TLS.",
                "Whoever runs the registry must send on to https.",
                ExitCode.UNTRUSTED,
            )
        return place

    def _upload_place(self, response: Response) -> Url:
        """Where a blob is to be sent: at the registry itself, whatever scheme and port a proxy before it lost."""
        assert self._base is not None
        place = url_from(response.header("Location"), self._base)
        if place.origin.host != self._base.origin.host:
            raise ResvitError(
                f"{self._base.origin} wants what is pushed to be sent to {place.origin}, which is another server.",
                "Whoever runs the registry must name itself in Location.",
                ExitCode.UNTRUSTED,
            )
        return Url(self._base.origin, place.target)

    @contextlib.contextmanager
    def _read(self, response: Response, what: str, ok: Sequence[int] = (200,)) -> Iterator[None]:
        """Raise for another status than those of ``ok``; afterwards the connection is ready for the next request."""
        if response.status not in ok:
            web_page = response.media_type == "text/html"
            said = b""
            with contextlib.suppress(ResvitError):
                said = response.small(64 << 10)
            raise self._web_page() if web_page and response.status < 500 else self._refused(response, said, what)
        yield
        response.done()

    def _refused(self, response: Response, said: bytes, what: str) -> ResvitError:
        words = _words_of(said)
        if response.status in (401, 403):
            error = self._authorization.refusal()
            return ResvitError(f"{error.problem[:-1]}{words}.", error.fix, error.code)
        if response.status == 404:
            return ResvitError(
                f"{self.reference.authority} has no {what.removeprefix('the ')} in {self.reference.name}{words}.",
                "Check name and tag; resvit-export push puts it there.",
            )
        if response.status >= 500:
            return CutError(
                f"{response.origin} is out of order (status {response.status}{words}).", "Try again later.",
                ExitCode.SYSTEM,
            )  # fmt: skip
        return ResvitError(
            f"{response.origin} does not take the request for {what} (status {response.status}{words}).",
            "Ask whoever runs the registry.",
        )

    def _web_page(self) -> ResvitError:
        return ResvitError(
            f"{self.reference.authority} answers with a web page, and not as a registry does.",
            "Check host and port; behind a login page of the network, log in there first.",
        )

    def _require_same(self, response: Response, digest: str) -> None:
        said = response.header("Docker-Content-Digest")
        if said and said != digest:
            raise wrong_bytes(f"what was sent to {response.origin}", digest)

    def _named(self, wanted: str) -> str:
        return f"manifest {wanted}" if is_digest(wanted) else f"tag {wanted}"

    # Time

    def _patiently(self, ask: Callable[[], T]) -> T:
        began, pause = time.monotonic(), 0.0
        while True:
            try:
                return ask()
            except CutError as error:
                pause = self._wait(error, began, pause)

    def _wait(self, error: CutError, since: float, pause: float) -> float:
        """Sleep before the next attempt, and return how long; raise where patience is at its end.

        The first attempt follows at once, for a connection that was idle for too long. A server that never answered
        is not waited for.
        """
        pause = max(pause, error.pause)
        if time.monotonic() - since + pause > self.patience or (pause and not self._reached):
            raise error
        if pause:
            self._reporter.warn(f"{error.problem} Trying again.")
            time.sleep(pause)
        return min(max(0.5, 2 * pause), _LONGEST_PAUSE)


def digest_of(data: bytes) -> str:
    """The digest of bytes, as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def wrong_bytes(what: str, digest: str) -> ResvitError:
    """The error for bytes that are not those of their digest."""
    return ResvitError(
        f"The bytes of {what} are not those of {digest}: they were changed in the registry or on the way.",
        "Nothing of it is used. Push it again, or ask whoever runs the registry.",
    )


def _begins(response: Response, size: int, start: int) -> bool:
    """Whether the answer begins at ``start``; not where the whole blob comes. Refuses what fits neither."""
    length = response.header("Content-Length")
    if response.status == 200:
        if length.isdigit() and int(length[:19]) != size:
            raise _other_size(response, int(length[:19]), size)
        return start == 0
    said = _RANGE.fullmatch(response.header("Content-Range"))
    if said is None or int(said[1]) != start or int(said[2]) >= size or said[3] not in ("*", str(size)):
        raise ResvitError(
            f"{response.origin} answers with other bytes than those from {start:,} on of {size:,}: "
            f"{response.header('Content-Range')[:100]!r}.",
            "Ask whoever runs the registry.",
        )
    return True


def _other_size(response: Response, found: int, size: int) -> ResvitError:
    return ResvitError(
        f"{response.origin} has a blob of {found:,} bytes where the manifest says {size:,}.",
        "Push it again, or ask whoever runs the registry.",
    )


def _words_of(said: bytes) -> str:
    """What a registry says of an error, in its own words and within a line; empty where it says nothing."""
    try:
        record = record_from_bytes(said[:SMALL_MOST], "the answer")
        first = record.records("errors")[0]
        words = [first.optional(key, first.text) or "" for key in ("code", "message")]
    except (ResvitError, IndexError):
        return ""
    text = " ".join(" ".join(words).split())[:200]
    return f"; it says: {text}" if text else ""
