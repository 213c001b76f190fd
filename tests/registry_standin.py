"""A registry in memory, on loopback, that can be told to misbehave: what no honest one does on demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

USER, PASSWORD = "robot", "sesame: öffne"
NAMES = ("localhost", "registry.test")


@dataclass(frozen=True)
class Certificates:
    """Files of a CA, and of a server's certificate and key for loopback by it."""

    ca: Path
    chain: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(timezone.utc)

    def begun(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named("tests' CA"))
        made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=30))

    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = begun("tests' CA", root).add_extension(x509.BasicConstraints(True, None), True).add_extension(usage, True)
    ca = ca.add_extension(x509.SubjectKeyIdentifier.from_public_key(root.public_key()), False)
    ca = ca.sign(root, hashes.SHA256())
    places = [x509.IPAddress(ip_address("127.0.0.1")), *(x509.DNSName(name) for name in NAMES)]
    server = begun("server", own).add_extension(x509.SubjectAlternativeName(places), False)
    server = server.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False)
    server = server.sign(root, hashes.SHA256())
    files = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    files.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    files.chain.write_bytes(server.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@dataclass
class Registry:
    """What it holds, what it was asked, and how it misbehaves.

    ``fault`` gets each request before it is answered, and answers it itself where it returns true.
    """

    auth: str = ""
    """How it lets in: anybody, ``basic`` or ``bearer``."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    fault: Callable[[Handler], bool] | None = None
    realm: str = ""
    tokens: int = 0
    port: int = 0
    scheme: str = "http"

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    def reference(self, what: str = "vision/net:1") -> str:
        return f"oci://{self.authority}/{what}"

    def paths(self, method: str) -> list[str]:
        return [path for asked, path, _ in self.asked if asked == method]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    registry: Registry

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self) -> None:
        registry = self.registry
        registry.asked.append((self.command, self.path, dict(self.headers)))
        if registry.fault and registry.fault(self):
            return None
        path, _, query = self.path.partition("?")
        if path == "/token":
            return self.token(query)
        if not self.let_in():
            return None
        if found := re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", path):
            return self.manifest(found[2])
        if found := re.fullmatch(r"/v2/(.+)/blobs/(sha256:[0-9a-f]{64})", path):
            return self.blob(found[2])
        if re.fullmatch(r"/v2/(.+)/blobs/uploads/", path) and self.command == "POST":
            self.body()
            return self.answer(202, Location=f"{path}session?state=a%3D")
        if re.fullmatch(r"/v2/(.+)/blobs/uploads/session", path) and self.command == "PUT":
            return self.upload(urllib.parse.parse_qs(query)["digest"][0])
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def let_in(self) -> bool:
        registry, said = self.registry, self.headers.get("Authorization") or ""
        if registry.auth == "basic":
            wanted, way = f"Basic {basic()}", 'Basic realm="the registry"'
        elif registry.auth == "bearer":
            wanted = f"Bearer token-{registry.tokens}"
            realm = registry.realm or f"{registry.scheme}://{registry.authority}/token"
            way = f'Bearer realm="{realm}",service="tests",scope="repository:other:pull"'
        else:
            return True
        if said == wanted:
            return True
        self.body()
        self.answer(401, b'{"errors":[{"code":"UNAUTHORIZED","message":"who?"}]}', WWW_Authenticate=way)
        return False

    def token(self, query: str) -> None:
        form = urllib.parse.parse_qs(query or self.body().decode())
        known = self.headers.get("Authorization") == f"Basic {basic()}" or form.get("refresh_token") == ["identity"]
        if not known or form.get("service") != ["tests"]:
            return self.answer(401)
        self.registry.tokens += 1
        return self.answer(200, json.dumps({"token": f"token-{self.registry.tokens}"}).encode())

    def manifest(self, reference: str) -> None:
        registry = self.registry
        if self.command == "PUT":
            data = self.body()
            digest = digest_of(data)
            for name in (reference, digest):
                registry.manifests[name] = (self.headers["Content-Type"], data)
            return self.answer(201, Docker_Content_Digest=digest)
        if reference not in registry.manifests:
            return self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
        kind, data = registry.manifests[reference]
        return self.answer(200, data, Content_Type=kind, Docker_Content_Digest=digest_of(data))

    def blob(self, digest: str) -> None:
        if digest not in self.registry.blobs:
            return self.answer(404, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}')
        data = self.registry.blobs[digest]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return self.answer(200, data)
        start = int(asked[1])
        return self.answer(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")

    def upload(self, digest: str) -> None:
        data = self.body()
        if digest_of(data) != digest:
            return self.answer(400, b'{"errors":[{"code":"DIGEST_INVALID","message":"no"}]}')
        self.registry.blobs[digest] = data
        return self.answer(201, Docker_Content_Digest=digest)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are what is tested."""


@contextlib.contextmanager
def serving(registry: Registry, certificates: Certificates | None = None) -> Iterator[Registry]:
    handler = type("Bound", (Handler,), {"registry": registry})
    with _Server(("127.0.0.1", 0), handler) as server:
        if certificates:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates.chain, certificates.key)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            registry.scheme = "https"
        registry.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def basic(user: str = USER, password: str = PASSWORD) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def logged_in(folder: Path, authority: str, user: str = USER, password: str = PASSWORD) -> Path:
    """Docker's configuration as ``docker login`` writes it; returns its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"auths": {authority: {"auth": basic(user, password)}}}))
    return folder
