"""The same with a registry that is no stand-in: Debian's docker-registry on loopback, with TLS and a password."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from registry_standin import PASSWORD, USER, Certificates, logged_in, make_certificates
from resvit_engines.cli.main import run as run_engine
from resvit_engines.errors import ExitCode
from resvit_engines.registry.choice import Wishes
from resvit_engines.registry.client import Client
from resvit_engines.registry.pull import Place, Pulled, pull
from resvit_engines.registry.push import Pushed, push
from resvit_engines.registry.reference import reference_from_text
from resvit_export.cli.main import run as run_export
from test_install import FACTS, Device, refused
from test_registry import ORIN, bundle, left_in, noise
from test_signing import KEY, TRUST

PROGRAM = shutil.which("docker-registry")
SKOPEO = shutil.which("skopeo")
HTPASSWD = f"{USER}:$2y$04$LBd1dfet0L9.uh9wZ3Y3zuzCxuD28wi7NBKRxyr3g91w1kHG.FIT2\n"
"""By `htpasswd -nbB`, of the stand-in's password."""

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(
        PROGRAM is None, reason="docker-registry is not installed: sudo apt-get install docker-registry"
    ),
]


@dataclass(frozen=True)
class Running:
    """A registry at work: its port, its files, and what a client needs."""

    port: int
    store: Path
    certificates: Certificates

    def reference(self, what: str, port: int | None = None) -> str:
        return f"oci://127.0.0.1:{port or self.port}/{what}"

    def push(self, what: str, *paths: Path, port: int | None = None, patience: float = 0) -> Pushed:
        reference = reference_from_text(self.reference(what, port))
        with Client(reference, push=True, ca=self.certificates.ca, patience=patience) as client:
            return push(paths, client)

    def pull(
        self, what: str, out: Path | None = None, *, port: int | None = None, patience: float = 0,
        wishes: Wishes | None = None, place: Place | None = None,
    ) -> Pulled:  # fmt: skip
        reference = reference_from_text(self.reference(what, port))
        with Client(reference, ca=self.certificates.ca, patience=patience) as client:
            return pull(client, TRUST, FACTS, wishes or Wishes(), out=out, place=place)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("registry")
    certificates = make_certificates(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "htpasswd").write_text(HTPASSWD)
    settings = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "store")}},
        "http": {
            "addr": f"127.0.0.1:{port}",
            "secret": "tests",
            "tls": {"certificate": str(certificates.chain), "key": str(certificates.key)},
        },
        "auth": {"htpasswd": {"realm": "the tests' registry", "path": str(folder / "htpasswd")}},
    }
    (folder / "config.yml").write_text(json.dumps(settings))  # JSON is YAML
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(PROGRAM), "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield Running(port, folder / "store", certificates)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _logged_in(registry: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(logged_in(tmp_path / "docker", f"127.0.0.1:{registry.port}")))


class Relay:
    """Between client and registry: cuts every connection after some bytes, in the direction that is chosen."""

    def __init__(self, registry: Running, *, down: list[int] | None = None, up: list[int] | None = None) -> None:
        self._target = registry.port
        self._down, self._up = down or [], up or []
        self.cuts = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                limits = [budget.pop(0) if budget else None for budget in (self._down, self._up)]
                ends = (client, server)
                for source, target, limit in ((server, client, limits[0]), (client, server, limits[1])):
                    threading.Thread(target=self._copy, args=(source, target, limit, ends), daemon=True).start()

    def _copy(
        self, source: socket.socket, target: socket.socket, left: int | None, ends: tuple[socket.socket, ...]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if left is not None:
                    data, left = data[:left], left - len(data)
                target.sendall(data)
                if left is not None and left <= 0:
                    self.cuts += 1
                    break
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def test_pushed_pulled_and_installed(registry: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [bundle(tmp_path, target) for target in ("rtx-4090", "jetson-orin", "l4")]
    done = registry.push("vision/net:1", *made)
    assert (done.before, done.there) == (None, 0)
    again = registry.push("vision/net:1", *made)
    assert (again.digest, again.sent, again.before) == (done.digest, 0, None)
    found = registry.pull("vision/net:1", tmp_path / "x")
    assert found.path is not None
    assert found.path.read_bytes() == made[0].read_bytes()
    device = Device(tmp_path / "root")
    assert registry.pull("vision/net:1", place=Place(device.root, device.check)).installed
    assert device.runs("net-rtx-4090-int8") == b"weights"
    # As people type it.
    (tmp_path / "release.pub").write_text(KEY.public.to_text())
    monkeypatch.chdir(tmp_path)
    reference, ca = registry.reference("vision/typed:1"), ["--ca", str(registry.certificates.ca)]
    assert run_export(["push", str(made[1]), reference, *ca]) == 0
    line = ["pull", reference, *ca, "--trust", "release.pub", "--rehearse", "--out", "typed.resvit"]
    assert run_engine(line) == 0
    assert (tmp_path / "typed.resvit").read_bytes() == made[1].read_bytes()


def test_without_a_password_or_with_a_wrong_one(registry: Running, tmp_path: Path) -> None:
    made = bundle(tmp_path)
    registry.push("vision/closed:1", made)
    (tmp_path / "docker/config.json").unlink()
    assert "none are known" in refused(registry.pull, "vision/closed:1", tmp_path / "x", code=ExitCode.SYSTEM)
    assert "none are known" in refused(registry.push, "vision/closed:1", made, code=ExitCode.SYSTEM)
    logged_in(tmp_path / "docker", f"127.0.0.1:{registry.port}", password="guessed")
    message = refused(registry.pull, "vision/closed:1", tmp_path / "x", code=ExitCode.SYSTEM)
    assert "does not let the user robot" in message
    assert "guessed" not in message
    logged_in(tmp_path / "docker", f"127.0.0.1:{registry.port}")
    message = refused(registry.pull, "vision/closed:2", tmp_path / "x", code=ExitCode.INPUT)
    assert "has no tag 2 in vision/closed" in message


def test_moved_tags(registry: Running, tmp_path: Path) -> None:
    first = bundle(tmp_path, name="net")
    old = first.read_bytes()
    done = registry.push("vision/moved:stable", first)
    moved = registry.push("vision/moved:stable", bundle(tmp_path, name="net", content=b"new", release=2))
    assert moved.before == done.digest
    assert registry.pull("vision/moved:stable", tmp_path / "x").chosen.manifest.release == 2
    found = registry.pull(f"vision/moved:stable@{done.digest}", tmp_path / "y")
    assert found.path is not None
    assert found.path.read_bytes() == old


def test_cut_connections(registry: Running, tmp_path: Path) -> None:
    made = bundle(tmp_path, content=noise(2 << 20))
    relay = Relay(registry, up=[300_000, 900_000], down=[])
    try:
        logged_in(tmp_path / "docker", f"127.0.0.1:{relay.port}")
        registry.push("vision/cut:1", made, port=relay.port, patience=600)
    finally:
        relay.close()
    assert relay.cuts == 2
    relay = Relay(registry, down=[20_000, 500_000, 700_000, 600_000])
    try:
        logged_in(tmp_path / "docker", f"127.0.0.1:{relay.port}")
        found = registry.pull("vision/cut:1", tmp_path / "x", port=relay.port, patience=600)
    finally:
        relay.close()
    assert relay.cuts == 4
    assert found.path is not None
    assert found.path.read_bytes() == made.read_bytes()
    assert found.fetched == sum(file.bytes for file in found.chosen.manifest.files)  # nothing came twice


def test_a_blob_that_changed_on_the_registrys_disk(registry: Running, tmp_path: Path) -> None:
    content = noise(100_000)
    registry.push("vision/damaged:1", bundle(tmp_path, content=content))
    (stored,) = [path for path in registry.store.rglob("data") if path.stat().st_size == len(content)]
    stored.write_bytes(bytes(len(content)))
    out = tmp_path / "out"
    assert "not those of" in refused(registry.pull, "vision/damaged:1", out / "x", code=ExitCode.INPUT)
    assert left_in(out) == []
    stored.write_bytes(content)
    assert registry.pull("vision/damaged:1", out / "x").path


@pytest.mark.skipif(SKOPEO is None, reason="skopeo is not installed: sudo apt-get install skopeo")
def test_what_skopeo_copies_is_pulled(registry: Running, tmp_path: Path) -> None:
    made = {target: bundle(tmp_path, target) for target in ("rtx-4090", "jetson-orin")}
    registry.push("vision/source:1", *made.values())
    certificates = tmp_path / "certs"
    certificates.mkdir()
    shutil.copy(registry.certificates.ca, certificates / "ca.crt")

    def skopeo(*line: str) -> str:
        ended = subprocess.run([str(SKOPEO), *line], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    there, login = f"docker://127.0.0.1:{registry.port}/vision", f"{USER}:{PASSWORD}"
    raw = skopeo("inspect", "--raw", "--cert-dir", str(certificates), "--creds", login, f"{there}/source:1")
    seen = json.loads(raw)["manifests"]
    assert [one["annotations"]["ai.resvit.target"] for one in seen] == ["jetson-orin", "rtx-4090"]
    copy = ("copy", "--all", "--src-cert-dir", str(certificates), "--src-creds", login)
    layout = f"oci:{tmp_path / 'layout'}:1"
    skopeo(*copy, f"{there}/source:1", layout)
    skopeo("copy", "--all", "--dest-cert-dir", str(certificates), "--dest-creds", login, layout, f"{there}/mirror:1")
    found = registry.pull("vision/mirror:1", tmp_path / "x")
    assert found.path is not None
    assert found.path.read_bytes() == made["rtx-4090"].read_bytes()
    # The index is written anew by skopeo, the manifests are not.
    assert found.chosen.at in {one["digest"] for one in seen}


@pytest.mark.slow
def test_a_thousand_pulls(registry: Running, tmp_path: Path) -> None:
    """By four at once, a third of them over connections that are cut: every one gives the same bytes."""
    made = bundle(tmp_path, content=noise(200_000))
    registry.push("vision/many:1", made)
    wanted, dice = made.read_bytes(), random.Random(1)
    relay = Relay(registry, down=[dice.randrange(3_000, 400_000) for _ in range(1_000)])
    entry = json.loads((tmp_path / "docker/config.json").read_text())
    entry["auths"][f"127.0.0.1:{relay.port}"] = next(iter(entry["auths"].values()))
    (tmp_path / "docker/config.json").write_text(json.dumps(entry))

    def one(number: int) -> bool:
        port = relay.port if number % 3 == 0 else None
        found = registry.pull("vision/many:1", tmp_path / f"{number}", port=port, patience=600)
        assert found.path is not None
        same = found.path.read_bytes() == wanted
        found.path.unlink()
        return same

    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(one, range(1_000))) == [True] * 1_000
    finally:
        relay.close()
    assert relay.cuts > 200
    assert not [name for name in left_in(tmp_path) if name.endswith(".part")]


def test_the_device_of_another_gpu_is_told_what_there_is(registry: Running, tmp_path: Path) -> None:
    registry.push("vision/other:1", bundle(tmp_path))
    reference = reference_from_text(registry.reference("vision/other:1"))
    with Client(reference, ca=registry.certificates.ca) as client:
        message = refused(pull, client, TRUST, ORIN, Wishes(), out=tmp_path / "x", code=ExitCode.IMPOSSIBLE)
    assert "There are: net-rtx-4090-int8" in message
