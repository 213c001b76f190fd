"""Registries: what is pushed is what is pulled, and nothing that a registry sends is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import DEMO
from engine_reports import engine_report
from registry_standin import (
    Certificates,
    Handler,
    Registry,
    basic,
    digest_of,
    logged_in,
    make_certificates,
    serving,
)
from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import ImageCount, ManifestVerdict
from resvit_engines.cli.main import run as run_engine
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.keys.private import SigningKey
from resvit_engines.machine import Machine
from resvit_engines.registry import credentials, download, transport
from resvit_engines.registry.authorization import challenges_from
from resvit_engines.registry.choice import Wishes
from resvit_engines.registry.client import Client
from resvit_engines.registry.credentials import Credentials, credentials_for
from resvit_engines.registry.documents import (
    FILE_PATH,
    INDEX_TYPE,
    MANIFEST_TYPE,
    MODEL_TYPE,
    index_or_manifest,
)
from resvit_engines.registry.offer import model_config
from resvit_engines.registry.pull import Place, Pulled, pull
from resvit_engines.registry.push import Pushed, push
from resvit_engines.registry.reference import reference_from_text
from resvit_engines.registry.transport import Origin, Transport, Url, is_loopback, url_from
from resvit_engines.targets.table import find_target
from resvit_export.cli.main import run as run_export
from task_bundles import task_bundle
from test_install import FACTS, Device, refused
from test_signing import KEY, TRUST, signing_key

ACCEPTED = ManifestVerdict("accepted", "", "classification", ("a", "b"), ImageCount(10, "x"))
ORIN = Machine(
    sm=87, gpu="NVIDIA Jetson AGX Orin Developer Kit", tensorrt="10.3.0.30", jetpack="6.2", arch="aarch64",
    memory_mib=60_000, free_disk_mib=10_000, python="3.10.12",
)  # fmt: skip


def bundle(
    folder: Path, target: str = "rtx-4090", content: bytes = b"weights", key: SigningKey | None = KEY, **more: Any
) -> Path:
    precision = more.pop("precision", "int8")
    name = more.pop("name", f"net-{target}-{precision}")
    fields = {"target": find_target(target), "precision": precision, "quantizer": "own", "verdict": ACCEPTED, **more}
    path = folder / f"{name}.resvit"
    files = {"model.onnx": content, "golden_input.npy": b"golden", "README.txt": b"read me"}
    write_bundle(path, Manifest(name=name, **fields), files, key)
    return path


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("DOCKER_CONFIG", "RESVIT_TRUST", "RESVIT_ROOT", "https_proxy", "HTTPS_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def registry() -> Iterator[Registry]:
    with serving(Registry()) as running:
        yield running


def pushed(registry: Registry, *paths: Path, what: str = "vision/net:1", **options: Any) -> Pushed:
    options.setdefault("plain", "ca" not in options)
    with Client(reference_from_text(registry.reference(what)), push=True, patience=0, **options) as client:
        return push(paths, client)


def pulled(
    registry: Registry, out: Path | None = None, what: str = "vision/net:1", machine: Machine = FACTS,
    patience: float = 0, wishes: Wishes | None = None, trust: Any = TRUST, place: Place | None = None, **options: Any,
) -> Pulled:  # fmt: skip
    options.setdefault("plain", "ca" not in options)
    with Client(reference_from_text(registry.reference(what)), patience=patience, **options) as client:
        return pull(client, trust, machine, wishes or Wishes(), out=out, place=place)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# References


@pytest.mark.parametrize(
    ("text", "authority", "name", "tag"),
    [
        ("oci://localhost:5000/net:1", "localhost:5000", "net", "1"),
        (
            "oci://Registry.Example/team/vision__net/a.b-c:v1.2_3",
            "registry.example",
            "team/vision__net/a.b-c",
            "v1.2_3",
        ),
        ("oci://[::1]:5000/net:latest", "[::1]:5000", "net", "latest"),
        (f"oci://h/net@sha256:{'0' * 64}", "h", "net", None),
        (f"oci://h/net:1@sha256:{'a' * 64}", "h", "net", "1"),
    ],
)
def test_references_are_read(text: str, authority: str, name: str, tag: str | None) -> None:
    found = reference_from_text(text)
    assert (found.authority, found.name, found.tag) == (authority, name, tag)
    assert str(found).lower() == text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "", "net:1", "docker://h/net:1", "oci://", "oci:///net:1", "oci://h", "oci://h/", "oci://h/net", "oci://h/Net:1",
        "oci://h/net:", "oci://h/net:a b", "oci://h/../net:1", "oci://h//net:1", "oci://h/net/:1", "oci://h:0/net:1",
        "oci://h:99999/net:1", "oci://h:x/net:1", "oci://-h/net:1", "oci://h/net@sha256:0", "oci://h/net@md5:0",
        f"oci://h/net@sha512:{'0' * 128}", "oci://h/net:1?x=1", "oci://h/net:1#x", "oci://h\r\n/net:1",
        f"oci://h/{'a' * 256}:1", "oci://h/" + "a-" * 2000, "oci://user:secret@h/net:1",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused(text: str) -> None:
    message = refused(reference_from_text, text, code=ExitCode.INPUT)
    assert "secret" not in message


# The way there and back


def test_what_is_pushed_is_pulled_byte_for_byte(registry: Registry, tmp_path: Path) -> None:
    made = [bundle(tmp_path, target) for target in ("rtx-4090", "jetson-orin", "h100")]
    done = pushed(registry, *made)
    assert (done.before, len(done.offers)) == (None, 3)
    found = pulled(registry, tmp_path / "got.resvit")
    assert found.path is not None
    assert found.path.read_bytes() == made[0].read_bytes()
    assert found.pinned == f"{registry.reference()}@{done.digest}"
    assert (found.kept, found.chosen.key.name) == (0, "release")
    orin = pulled(registry, tmp_path / "orin.resvit", machine=ORIN)
    assert orin.path is not None
    assert orin.path.read_bytes() == made[1].read_bytes()
    assert [name for name in left_in(tmp_path) if name.startswith(".")] == []


def test_what_the_registry_has_is_not_sent_again(registry: Registry, tmp_path: Path) -> None:
    first, second = bundle(tmp_path, "rtx-4090"), bundle(tmp_path, "h100")
    done = pushed(registry, first)
    again = pushed(registry, first, second)
    assert again.before == done.digest
    assert again.digest != done.digest
    assert (done.there, again.there) == (0, 6)
    assert again.sent == 3  # its own manifest, signature and configuration: the files are equal
    same = pushed(registry, second, first)
    assert (same.digest, same.sent, same.before) == (again.digest, 0, None)
    assert Counter(registry.paths("POST")) == {"/v2/vision/net/blobs/uploads/": 9}


def test_the_documents_are_those_of_modelpack(registry: Registry, tmp_path: Path) -> None:
    done = pushed(registry, bundle(tmp_path, "jetson-orin", release=7))
    kind, data = registry.manifests["1"]
    index = json.loads(data)
    assert (kind, index["mediaType"], index["schemaVersion"]) == (INDEX_TYPE, INDEX_TYPE, 2)
    assert digest_of(data) == done.digest
    (entry,) = index["manifests"]
    assert (entry["mediaType"], entry["artifactType"]) == (MANIFEST_TYPE, MODEL_TYPE)
    assert entry["platform"] == {"architecture": "arm64", "os": "linux"}
    assert entry["annotations"] == {
        "ai.resvit.name": "net-jetson-orin-int8", "ai.resvit.release": "7", "ai.resvit.target": "jetson-orin",
        "ai.resvit.arch": "aarch64", "ai.resvit.sm": "87", "ai.resvit.builder": "tensorrt",
        "ai.resvit.tensorrt": "10.3", "ai.resvit.jetpack": "6.2", "ai.resvit.precision": "int8",
        "ai.resvit.verdict": "accepted", "ai.resvit.holds": "model",
        "org.opencontainers.image.title": "net-jetson-orin-int8", "org.opencontainers.image.version": "7",
    }  # fmt: skip
    manifest = json.loads(registry.manifests[entry["digest"]][1])
    assert manifest["annotations"] == entry["annotations"]
    assert manifest["artifactType"] == MODEL_TYPE
    kinds = {one["annotations"][FILE_PATH]: one["mediaType"].split(".cncf.model.")[1] for one in manifest["layers"]}
    assert kinds == {
        "manifest.json": "weight.config.v1.raw", "signature.json": "weight.config.v1.raw",
        "model.onnx": "weight.v1.raw", "golden_input.npy": "dataset.v1.raw", "README.txt": "doc.v1.raw",
    }  # fmt: skip
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    config = json.loads(registry.blobs[manifest["config"]["digest"]])
    assert set(config) == {"descriptor", "config", "modelfs"}
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]}
    assert (config["config"]["format"], config["config"]["precision"]) == ("onnx", "float16,int8")


def test_a_bundle_that_no_device_would_take_is_not_pushed(registry: Registry, tmp_path: Path) -> None:
    assert "not signed" in refused(pushed, registry, bundle(tmp_path, key=None), code=ExitCode.UNTRUSTED)
    twice = [bundle(tmp_path, name="a"), bundle(tmp_path, name="b")]
    assert "no device could choose" in refused(pushed, registry, *twice, code=ExitCode.INPUT)
    damaged = bundle(tmp_path, name="c")
    data = bytearray(damaged.read_bytes())
    data[data.rindex(b"weights")] ^= 1
    damaged.write_bytes(data)
    assert "damaged" in refused(pushed, registry, damaged, code=ExitCode.INPUT)
    pinned = f"vision/net:1@sha256:{'0' * 64}"
    assert "no tag to push to" in refused(pushed, registry, twice[0], what=pinned, code=ExitCode.INPUT)
    assert registry.manifests == {}


# Which one


def test_what_fits_the_device_is_taken(registry: Registry, tmp_path: Path) -> None:
    made = {
        (target, precision): bundle(tmp_path, target, precision=precision, content=f"{target}{precision}".encode())
        for target in ("rtx-4090", "rtx-5090", "l4")
        for precision in ("int8", "fp16")
    }
    pushed(registry, *made.values())
    message = refused(pulled, registry, tmp_path / "x", code=ExitCode.INPUT)
    assert "2 bundles" in message
    assert "--precision" in message
    got = pulled(registry, tmp_path / "x", wishes=Wishes(precision="fp16"))
    assert got.path is not None
    assert got.path.read_bytes() == made["rtx-4090", "fp16"].read_bytes()
    # Of a processor FP32 is what it computes in without 8 bits.
    for precision in ("int8", "fp32"):
        made["cpu", precision] = bundle(tmp_path, "cpu", precision=precision, content=precision.encode())
    pushed(registry, made["cpu", "int8"], made["cpu", "fp32"], what="vision/net:cpu")
    server = dataclasses.replace(FACTS, sm=None, onnxruntime="1.24.1")
    got = pulled(registry, tmp_path / "f", "vision/net:cpu", server, wishes=Wishes(precision="fp32"))
    assert got.path is not None
    assert got.path.read_bytes() == made["cpu", "fp32"].read_bytes()
    manifest = Manifest("net", target=find_target("cpu"), engine=engine_report(), precision="int8")
    config = json.loads(model_config(manifest, []))["config"]
    assert (config["format"], config["precision"]) == ("onnx", "float32,int8")
    # The same GPU with TensorRT instead of TensorRT for RTX is another target's.
    server = dataclasses.replace(FACTS, tensorrt="11.4.0", rtx=None)
    assert pulled(registry, tmp_path / "y", machine=server, wishes=Wishes(precision="int8")).chosen.offer.target == "l4"
    old = dataclasses.replace(FACTS, rtx="1.2.0")
    message = refused(pulled, registry, tmp_path / "z", machine=old, code=ExitCode.IMPOSSIBLE)
    assert "net-rtx-5090-fp16" in message  # all that is there
    assert "here is TensorRT for RTX 1.2.0" in message  # why what is near does not fit
    message = refused(pulled, registry, tmp_path / "z", machine=ORIN, code=ExitCode.IMPOSSIBLE)
    assert "aarch64 with NVIDIA Jetson AGX Orin Developer Kit (SM 8.7), TensorRT 10.3.0.30, JetPack 6.2" in message
    message = refused(pulled, registry, tmp_path / "z", wishes=Wishes(target="a100"), code=ExitCode.INPUT)
    assert "holds nothing for a100" in message
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_bundle_for_processors_goes_where_no_gpu_is(registry: Registry, tmp_path: Path, precision: str) -> None:
    made = bundle(tmp_path, "cpu", precision=precision), bundle(tmp_path, "rtx-4090")
    pushed(registry, *made)
    plain = dataclasses.replace(FACTS, sm=None, gpu=None, rtx=None, onnxruntime="1.30.0", arch="aarch64")
    got = pulled(registry, tmp_path / "x", machine=plain)
    assert got.chosen.offer.target == "cpu"
    assert "any processor" in got.chosen.offer.describe
    # Where a GPU is, what is for it goes first.
    both = dataclasses.replace(FACTS, onnxruntime="1.30.0")
    assert pulled(registry, tmp_path / "y", machine=both).chosen.offer.target == "rtx-4090"


def test_what_was_accepted_goes_before_what_was_not(registry: Registry, tmp_path: Path) -> None:
    rejected = dataclasses.replace(ACCEPTED, verdict="rejected")
    worse = bundle(tmp_path, "rtx-4090", precision="fp8", verdict=rejected)
    better = bundle(tmp_path, "rtx-4090")
    pushed(registry, worse, better)
    assert pulled(registry, tmp_path / "x").chosen.offer.verdict == "accepted"
    assert pulled(registry, tmp_path / "x", wishes=Wishes(precision="fp8")).chosen.offer.verdict == "rejected"


def test_only_the_model_that_is_expected(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, bundle(tmp_path, name="other"))
    message = refused(pulled, registry, tmp_path / "x", wishes=Wishes(expect="net"), code=ExitCode.INPUT)
    assert "holds nothing for net" in message
    assert "other" in message


# Signatures


def test_nothing_large_is_fetched_of_what_is_not_signed_by_a_trusted_key(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, bundle(tmp_path, key=signing_key(bytes(32), "stranger")))
    registry.asked.clear()
    assert "not trusted" in refused(pulled, registry, tmp_path / "x", code=ExitCode.UNTRUSTED)
    fetched = {path.rpartition("/")[2] for path in registry.paths("GET") if "/blobs/" in path}
    manifest = model_manifest(registry)
    first = {layer["digest"] for layer in manifest["layers"][:2]}
    assert fetched == first
    assert left_in(tmp_path) == ["home", "net-rtx-4090-int8.resvit"]


def model_manifest(registry: Registry) -> dict[str, Any]:
    index = json.loads(registry.manifests["1"][1])
    document: dict[str, Any] = json.loads(registry.manifests[index["manifests"][0]["digest"]][1])
    return document


def replaced(registry: Registry, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the bundle's manifest in the registry, with all digests right: who can write there can do that."""
    index = json.loads(registry.manifests["1"][1])
    entry = index["manifests"][0]
    document = json.loads(registry.manifests[entry["digest"]][1])
    change(document)
    data = json.dumps(document).encode()
    registry.manifests[digest_of(data)] = (MANIFEST_TYPE, data)
    entry.update(digest=digest_of(data), size=len(data), annotations=document["annotations"])
    registry.manifests["1"] = (INDEX_TYPE, json.dumps(index).encode())


@pytest.mark.parametrize(
    ("name", "value"), [("verdict", "accepted at last"), ("release", "2"), ("tensorrt", "10.14"), ("jetpack", "6.2")]
)
def test_annotations_that_the_signed_manifest_contradicts_are_refused(
    registry: Registry, tmp_path: Path, name: str, value: str
) -> None:
    pushed(registry, bundle(tmp_path))
    replaced(registry, lambda document: document["annotations"].update({f"ai.resvit.{name}": value}))
    message = refused(pulled, registry, tmp_path / "x", code=ExitCode.UNTRUSTED)
    assert f"says that {name} is {value!r}" in message


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_files_that_are_not_the_signed_ones_are_refused(registry: Registry, tmp_path: Path, layer: int) -> None:
    pushed(registry, bundle(tmp_path))
    other = b"{}"
    registry.blobs[digest_of(other)] = other

    def change(document: dict[str, Any]) -> None:
        document["layers"][layer].update(digest=digest_of(other), size=len(other))

    replaced(registry, change)
    refused(pulled, registry, tmp_path / "x", code=ExitCode.UNTRUSTED)
    assert not (tmp_path / "x").exists()


# Connections that are cut


def cut_after(size: int, most: int = 1 << 30) -> Callable[[Handler], bool]:
    """Send so many bytes of every blob that is longer, and hang up."""
    cuts = 0

    def fault(handler: Handler) -> bool:
        nonlocal cuts
        digest = handler.path.rpartition("/")[2]
        data = handler.registry.blobs.get(digest, b"")
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        if handler.command != "GET" or len(data) - start <= size or cuts >= most:
            return False
        cuts += 1
        if start:
            where = f"bytes {start}-{len(data) - 1}/{len(data)}"
            handler.answer(206, data[start : start + size], Content_Length=str(len(data) - start), Content_Range=where)
        else:
            handler.answer(200, data[:size], Content_Length=str(len(data)))
        handler.cut()
        return True

    return fault


def noise(size: int) -> bytes:
    return hashlib.shake_128(b"noise").digest(size)


def test_a_cut_connection_goes_on_where_it_was(registry: Registry, tmp_path: Path) -> None:
    made = bundle(tmp_path, content=noise(300_000))
    pushed(registry, made)
    registry.fault = cut_after(90_000)
    registry.asked.clear()
    found = pulled(registry, tmp_path / "x", patience=60)
    assert found.path is not None
    assert found.path.read_bytes() == made.read_bytes()
    ranges = [headers["Range"] for _, _, headers in registry.asked if "Range" in headers]
    assert ranges == ["bytes=90000-", "bytes=180000-", "bytes=270000-"]


def test_a_pull_that_ended_goes_on_later(registry: Registry, tmp_path: Path) -> None:
    made = bundle(tmp_path, content=noise(300_000))
    pushed(registry, made)
    out = tmp_path / "out"
    registry.fault = lambda handler: cut_after(100_000)(handler) if "blobs" in handler.path else False
    limited = cut_after(100_000, most=1)

    def once(handler: Handler) -> bool:  # one part, and then nothing at all
        if limited(handler):
            return True
        if "Range" in handler.headers:
            handler.cut()
            return True
        return False

    registry.fault = once
    message = refused(pulled, registry, out / "x.resvit", code=ExitCode.SYSTEM)
    assert "the same command again" in message
    (part,) = left_in(out)
    assert re.fullmatch(r"\.x\.resvit\.[0-9a-f]{12}\.part", part)
    registry.fault = None
    found = pulled(registry, out / "x.resvit")
    assert found.path is not None
    assert found.path.read_bytes() == made.read_bytes()
    assert found.kept >= 100_000
    assert left_in(out) == ["x.resvit"]
    assert found.path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("damage", ["flipped", "zeros behind", "longer than all"])
def test_what_was_left_is_read_again(registry: Registry, tmp_path: Path, damage: str) -> None:
    made = bundle(tmp_path, content=noise(300_000))
    pushed(registry, made)
    registry.fault = cut_after(100_000)
    out = tmp_path / "out"
    refused(pulled, registry, out / "x", code=ExitCode.SYSTEM)
    registry.fault = None
    (name,) = left_in(out)
    part = out / name
    data = bytearray(part.read_bytes())
    if damage == "flipped":
        data[-1000] ^= 1
    else:
        data += bytes(5_000 if damage == "zeros behind" else 1 << 20)
    part.write_bytes(data)
    found = pulled(registry, out / "x")
    assert found.path is not None
    assert found.path.read_bytes() == made.read_bytes()


def test_a_registry_without_ranges_sends_from_the_beginning(registry: Registry, tmp_path: Path) -> None:
    made = bundle(tmp_path, content=noise(300_000))
    pushed(registry, made)
    cut = cut_after(100_000, most=1)

    def fault(handler: Handler) -> bool:
        if "Range" in handler.headers:
            del handler.headers["Range"]
        return cut(handler)

    registry.fault = fault
    found = pulled(registry, tmp_path / "x", patience=60)
    assert found.path is not None
    assert found.path.read_bytes() == made.read_bytes()


def test_an_upload_that_is_cut_begins_again(registry: Registry, tmp_path: Path) -> None:
    made = bundle(tmp_path, content=noise(300_000))
    cuts = []

    def fault(handler: Handler) -> bool:
        if handler.command == "PUT" and "blobs" in handler.path and not cuts:
            cuts.append(handler.path)
            handler.rfile.read(10)
            handler.cut()
            return True
        return False

    registry.fault = fault
    with Client(reference_from_text(registry.reference()), push=True, patience=60) as client:
        push([made], client)
    assert len(cuts) == 1
    registry.fault = None
    found = pulled(registry, tmp_path / "x")
    assert found.path is not None
    assert found.path.read_bytes() == made.read_bytes()


def test_a_busy_registry_is_asked_again(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, bundle(tmp_path))
    busy = iter([503, 429, 500])

    def fault(handler: Handler) -> bool:
        status = next(busy, 0)
        if status:
            handler.answer(status, b"<html>", Content_Type="text/html", Retry_After="0")
        return bool(status)

    registry.fault = fault
    assert pulled(registry, tmp_path / "x", patience=60).path
    registry.fault = lambda handler: handler.answer(503) is None
    assert "busy" in refused(pulled, registry, tmp_path / "y", code=ExitCode.SYSTEM)


def test_a_silent_registry_counts_as_lost(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(registry, bundle(tmp_path))
    silent = threading.Event()
    registry.fault = lambda handler: silent.wait() or True
    with Client(reference_from_text(registry.reference()), patience=0) as client:
        client._transport = Transport(plain=True, silence=0.05)
        client._authorization._transport = client._transport
        message = refused(pull, client, TRUST, FACTS, Wishes(), out=tmp_path / "x", code=ExitCode.SYSTEM)
    silent.set()
    assert "does not answer" in message


def test_a_registry_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        reference = reference_from_text(f"oci://127.0.0.1:{taken.getsockname()[1]}/net:1")
        with Client(reference, patience=1e6) as client:
            message = refused(pull, client, TRUST, FACTS, Wishes(), out=tmp_path / "x", code=ExitCode.SYSTEM)
    assert "refuses connections" in message


# Bytes that are wrong


def test_wrong_bytes_are_never_used(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, bundle(tmp_path))
    digest = digest_of(b"weights")
    out = tmp_path / "out"
    for wrong in (b"weighty", b"weight", b"weights!"):
        registry.blobs[digest] = wrong
        message = refused(pulled, registry, out / "x", code=ExitCode.INPUT)
        assert ("are not those of" if len(wrong) == 7 else "bytes where the manifest says") in message
        # The next attempt begins with what was right; bytes that were wrong are not kept.
        assert not [name for name in left_in(out) if not name.endswith(".part")]
    registry.blobs[digest] = b"weights"
    assert pulled(registry, out / "x").path


def test_more_bytes_than_there_may_be_are_not_read(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, bundle(tmp_path))

    def fault(handler: Handler) -> bool:
        if handler.path.endswith(digest_of(b"weights")):
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            handler.close_connection = True
            return True
        return False

    registry.fault = fault
    assert "longer than it may be" in refused(pulled, registry, tmp_path / "x", code=ExitCode.INPUT)


@pytest.mark.parametrize(
    "where",
    ["bytes 0-299999/300000", "bytes 100000-299999/300001", "bytes 100001-299999/300000", "bytes 1-0/0", "", "x"],
)
def test_a_wrong_range_is_refused(registry: Registry, tmp_path: Path, where: str) -> None:
    pushed(registry, bundle(tmp_path, content=noise(300_000)))
    cut = cut_after(100_000, most=1)

    def fault(handler: Handler) -> bool:
        if "Range" in handler.headers:
            handler.answer(206, noise(300_000)[100_000:], Content_Range=where)
            return True
        return cut(handler)

    registry.fault = fault
    assert "other bytes than those from 100,000" in refused(
        pulled, registry, tmp_path / "x", patience=60, code=ExitCode.INPUT
    )


@pytest.mark.parametrize(
    ("headers", "data", "words"),
    [
        ({"Content_Type": "text/html"}, b"<html>log in</html>", "web page"),
        ({}, b"", "JSON"),
        ({}, b"not JSON", "JSON"),
        ({}, b"[]", "not an object"),
        ({}, b"{}", "schemaVersion"),
        ({}, b'{"schemaVersion": 1}', "no bundle"),
        ({}, b'{"schemaVersion": 2}', "no bundle"),
        ({}, b'{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}', "no bundle"),
        ({"Content_Type": INDEX_TYPE}, b'{"schemaVersion": 2}', "manifests"),
        ({"Content_Type": INDEX_TYPE}, b'{"schemaVersion": 2, "manifests": []}', "none says"),
        ({"Content_Type": INDEX_TYPE}, b'{"schemaVersion": 2, "manifests": [{}]}', "digest"),
        ({}, b"[" * 100_000, "does not read"),
        ({}, b'{"a":' * 500 + b"1" + b"}" * 500, "deep"),
        ({}, b" " * ((4 << 20) + 1), "4096 KiB"),
        ({"Content_Encoding": "gzip"}, b"{}", "compressed"),
        ({"Docker_Content_Digest": f"sha256:{'0' * 64}"}, b"{}", "not those of"),
    ],
)
def test_documents_that_are_none(
    registry: Registry, tmp_path: Path, headers: dict[str, str], data: bytes, words: str
) -> None:
    def fault(handler: Handler) -> bool:
        with contextlib.suppress(OSError):
            handler.answer(200, data, **{"Content_Type": MANIFEST_TYPE, **headers})
        return True

    registry.fault = fault
    assert words in refused(pulled, registry, tmp_path / "x", code=ExitCode.INPUT)


def test_the_image_of_a_container_is_no_bundle(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, bundle(tmp_path))
    replaced(registry, lambda document: document.pop("artifactType"))
    assert "no bundle of resvit-export" in refused(pulled, registry, tmp_path / "x", code=ExitCode.INPUT)
    replaced(registry, lambda document: document.update(artifactType=MODEL_TYPE, layers=document["layers"][1:]))
    assert "without manifest.json" in refused(pulled, registry, tmp_path / "x", code=ExitCode.INPUT)
    replaced(registry, lambda document: document.update(annotations={"org.opencontainers.image.title": "net"}))
    assert "none says" in refused(pulled, registry, tmp_path / "x", code=ExitCode.INPUT)


@pytest.mark.parametrize("status", [204, 301, 400, 402, 404, 405, 406, 416, 418])
def test_other_statuses_are_told(registry: Registry, tmp_path: Path, status: int) -> None:
    said = b'{"errors": [{"code": "SOME_CODE", "message": "in\\u001b[31m words"}]}'
    registry.fault = lambda handler: handler.answer(status, b"" if status == 204 else said) is None
    message = refused(pulled, registry, tmp_path / "x", code=ExitCode.INPUT)
    assert "\x1b" not in message
    assert status in (204, 301) or "SOME_CODE" in message


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\r\n", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n", b"HTTP/1.1 200 OK\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{}", bytes(range(256)),
    ],
)  # fmt: skip
def test_what_is_no_http_is_told(tmp_path: Path, answer: bytes) -> None:
    class Wrong(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            with contextlib.suppress(OSError):
                self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Wrong) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        reference = reference_from_text(f"oci://127.0.0.1:{server.server_address[1]}/net:1")
        with Client(reference, patience=0, plain=True) as client, pytest.raises(ResvitError) as caught:
            pull(client, TRUST, FACTS, Wishes(), out=tmp_path / "x")
        server.shutdown()
    assert caught.value.code in (ExitCode.INPUT, ExitCode.SYSTEM)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_any_document_is_read_or_refused(data: st.DataObject) -> None:
    document: Any = {
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": MODEL_TYPE, "annotations": {"a": "b"},
        "config": {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": f"sha256:{'0' * 64}", "size": 2},
        "layers": [{"mediaType": "x", "digest": f"sha256:{'1' * 64}", "size": 1, "annotations": {FILE_PATH: "a"}}],
    }  # fmt: skip
    if data.draw(st.booleans()):
        document = {
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": [{**document["layers"][0], "platform": {}}],
        }
    for _ in range(data.draw(st.integers(1, 3))):
        holder: Any = document
        while True:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            if not keys:
                break
            key = data.draw(st.sampled_from(list(keys)))
            if isinstance(holder[key], (dict, list)) and holder[key] and data.draw(st.booleans()):
                holder = holder[key]
                continue
            holder[key] = data.draw(_JSON)
            break
    with contextlib.suppress(ResvitError):
        index_or_manifest(json.dumps(document).encode(), MANIFEST_TYPE, "there")


# Moved tags


def test_a_pinned_digest_is_not_moved(registry: Registry, tmp_path: Path) -> None:
    first = bundle(tmp_path, name="net")
    old = first.read_bytes()
    done = pushed(registry, first)
    pushed(registry, bundle(tmp_path, name="net", content=b"other", release=2))
    assert pulled(registry, tmp_path / "new").chosen.manifest.release == 2
    found = pulled(registry, tmp_path / "x", what=f"vision/net:1@{done.digest}")
    assert found.path is not None
    assert found.path.read_bytes() == old
    # A registry that answers with the new content is caught.
    registry.manifests[done.digest] = registry.manifests["1"]
    pinned = f"vision/net@{done.digest}"
    assert "not those of" in refused(pulled, registry, tmp_path / "y", what=pinned, code=ExitCode.INPUT)


def test_a_tag_that_moves_between_two_attempts_mixes_nothing(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, bundle(tmp_path, name="net", content=noise(300_000)))
    registry.fault = cut_after(100_000)
    out = tmp_path / "out"
    refused(pulled, registry, out / "x", code=ExitCode.SYSTEM)
    registry.fault = None
    second = bundle(tmp_path, name="net", content=noise(300_001)[1:], release=2)
    pushed(registry, second)
    found = pulled(registry, out / "x")
    assert found.path is not None
    assert found.path.read_bytes() == second.read_bytes()
    assert (found.kept, left_in(out)) == (0, ["x"])


# Disks


def test_a_full_disk_leaves_nothing(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(registry, bundle(tmp_path, content=noise(300_000)))
    out = tmp_path / "out"
    real, room = os.pwrite, 120_000

    def pwrite(handle: int, data: bytes, at: int) -> int:
        nonlocal room
        if room < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= len(data)
        return real(handle, data, at)

    monkeypatch.setattr(download.os, "pwrite", pwrite)
    assert "disk is full" in refused(pulled, registry, out / "x", code=ExitCode.SYSTEM)
    assert left_in(out) == []


def test_a_disk_that_is_too_small_is_seen_before(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(registry, bundle(tmp_path, content=noise(300_000)))
    registry.asked.clear()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "disk is too small" in refused(pulled, registry, tmp_path / "x", code=ExitCode.SYSTEM)
    assert not [path for path in registry.paths("GET") if path.endswith(digest_of(noise(300_000)))]


def test_two_pulls_to_one_place(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, bundle(tmp_path, content=noise(300_000)))
    out = tmp_path / "out"
    meanwhile: list[str] = []

    def fault(handler: Handler) -> bool:
        if handler.path.endswith(digest_of(noise(300_000))) and not meanwhile:
            meanwhile.append("")
            meanwhile[0] = refused(pulled, registry, out / "x", code=ExitCode.SYSTEM)
        return False

    registry.fault = fault
    assert pulled(registry, out / "x").path
    assert "Another process" in meanwhile[0]


# Installing


def test_pulled_and_installed(registry: Registry, tmp_path: Path) -> None:
    device = Device(tmp_path / "root")
    place = Place(device.root, device.check)
    pushed(registry, bundle(tmp_path, name="net", content=b"one"))
    done = pulled(registry, place=place)
    assert done.installed is not None
    assert (device.runs(), done.path, left_in(device.root / ".downloads")) == (b"one", None, [])
    registry.asked.clear()
    again = pulled(registry, place=place)
    assert (again.already, again.installed) == (True, None)
    assert digest_of(b"one") not in "".join(registry.paths("GET"))
    assert len(device.checked) == 1
    pushed(registry, bundle(tmp_path, name="net", content=b"two", release=2))
    assert pulled(registry, place=place).installed
    assert device.runs() == b"two"
    # The tag moves back: a lower release is refused before anything of it is fetched.
    pushed(registry, bundle(tmp_path, name="net", content=b"one"))
    registry.asked.clear()
    assert "release 1" in refused(pulled, registry, place=place, code=ExitCode.INPUT)
    assert digest_of(b"one") not in "".join(registry.paths("GET"))
    assert device.runs() == b"two"
    back = pulled(registry, place=Place(device.root, device.check, allow_downgrade=True))
    assert back.installed
    assert device.runs() == b"one"


def test_what_computes_something_else_is_not_switched_to(registry: Registry, tmp_path: Path) -> None:
    device = Device(tmp_path / "root")
    place = Place(device.root, device.check)
    pushed(registry, bundle(tmp_path, name="net", content=b"one"))
    pulled(registry, place=place)
    pushed(registry, bundle(tmp_path, name="net", content=b"two", release=2))
    device.outputs_differ = True
    refused(pulled, registry, place=place, code=ExitCode.MISMATCH)
    assert (device.runs(), left_in(device.root / ".downloads")) == (b"one", [])
    kept = tmp_path / "kept"
    kept.mkdir()
    refused(pulled, registry, kept, place=place, code=ExitCode.MISMATCH)
    assert left_in(kept) == ["net.resvit"]  # where it was asked for


def test_a_damaged_installation_is_mended(registry: Registry, tmp_path: Path) -> None:
    device = Device(tmp_path / "root")
    place = Place(device.root, device.check)
    pushed(registry, bundle(tmp_path, name="net", content=b"one"))
    pulled(registry, place=place)
    (device.root / "net/current/model.onnx").write_bytes(b"0ne")
    assert pulled(registry, place=place).installed
    assert device.runs() == b"one"


# Being let in


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_credentials_are_those_of_docker(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, auth: str
) -> None:
    made = bundle(tmp_path)
    with serving(Registry(auth=auth), certificates) as registry:
        where = logged_in(tmp_path / "docker", registry.authority)
        assert (
            "does not let nobody known" in refused(pushed, registry, made, ca=certificates.ca, code=ExitCode.SYSTEM)
            or auth == "basic"
        )
        monkeypatch.setenv("DOCKER_CONFIG", str(where))
        pushed(registry, made, ca=certificates.ca)
        found = pulled(registry, tmp_path / "x", ca=certificates.ca)
        assert found.path is not None
        assert found.path.read_bytes() == made.read_bytes()
        asked = [(path, headers.get("Authorization", "")) for _, path, headers in registry.asked]
        if auth == "bearer":
            # The password goes to the server of tokens alone, and each side asks for what it needs.
            assert {path.partition("?")[0] for path, said in asked if said.startswith("Basic")} == {"/token"}
            scopes = {path for path, _ in asked if path.startswith("/token")}
            assert any("vision%2Fnet%3Apull%2Cpush" in path for path in scopes)
            assert any("vision%2Fnet%3Apull&" in path for path in scopes)
            assert not any("other" in path for path in scopes)
            registry.tokens += 1  # a token that ran out is renewed
            assert pulled(registry, tmp_path / "y", ca=certificates.ca).path
        logged_in(where, registry.authority, password="wrong")
        message = refused(pulled, registry, tmp_path / "z", ca=certificates.ca, code=ExitCode.SYSTEM)
        assert "does not let the user robot use vision/net" in message
        assert "docker login" in message
        assert "wrong" not in message


def test_an_identity_token_is_exchanged(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with serving(Registry(auth="bearer"), certificates) as registry:
        entry = {"auths": {registry.authority: {"identitytoken": "identity"}}}
        (tmp_path / "config.json").write_text(json.dumps(entry))
        pushed(registry, bundle(tmp_path), ca=certificates.ca)
        registry.auth = "basic"
        assert "asks for a user" in refused(pulled, registry, tmp_path / "x", ca=certificates.ca, code=ExitCode.SYSTEM)


@pytest.mark.parametrize(
    "realm", ["http://auth.example/token", "http://127.0.0.1:1/token", "ftp://auth.example/", "", "https://u:p@h/"]
)
def test_a_realm_that_would_show_the_password_is_refused(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, realm: str
) -> None:
    with serving(Registry(auth="bearer", realm=realm or "not a url at all"), certificates) as registry:
        monkeypatch.setenv("DOCKER_CONFIG", str(logged_in(tmp_path / "docker", registry.authority)))
        with pytest.raises(ResvitError) as caught:
            pulled(registry, tmp_path / "x", ca=certificates.ca)
    assert caught.value.code is (ExitCode.UNTRUSTED if realm.startswith("http:") else ExitCode.INPUT)
    assert not any(headers.get("Authorization") for _, _, headers in registry.asked)


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b"[]", b'{"token": 1}', b'{"token": "a b"}', b'{"token": "a\\r\\nX: y"}', b"<html>",
     b'{"token": "' + b"a" * 70_000 + b'"}', b" " * 300_000],
)  # fmt: skip
def test_tokens_that_are_none(tmp_path: Path, registry: Registry, answer: bytes) -> None:
    registry.auth = "bearer"

    def fault(handler: Handler) -> bool:
        if handler.path.startswith("/token"):
            handler.answer(200, answer)
            return True
        return False

    registry.fault = fault
    refused(pulled, registry, tmp_path / "x", code=ExitCode.INPUT)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ('Bearer realm="https://a/t",service="s"', [("bearer", {"realm": "https://a/t", "service": "s"})]),
        ("basic realm=x, charset=UTF-8", [("basic", {"realm": "x", "charset": "UTF-8"})]),
        ('Negotiate, Basic realm="a b"', [("basic", {"realm": "a b"})]),
        ('Bearer realm="https://a" Basic realm="x"', [("bearer", {"realm": "https://a"}), ("basic", {"realm": "x"})]),
        ("", []), ("Bearer", [("bearer", {})]), ("Digest x=y", []), ("\x00" * 50_000, []),
        ("Bearer " + "," * 50_000, [("bearer", {})]),
    ],
)  # fmt: skip
def test_challenges_are_read(header: str, found: list[tuple[str, dict[str, str]]]) -> None:
    assert [(one.scheme, one.parameters) for one in challenges_from([header])] == found


def test_credentials_do_not_follow_to_another_server(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bundle(tmp_path)
    with serving(Registry(), certificates) as store, serving(Registry(auth="basic"), certificates) as registry:
        monkeypatch.setenv("DOCKER_CONFIG", str(logged_in(tmp_path / "docker", registry.authority)))
        pushed(registry, made, ca=certificates.ca)
        store.blobs = registry.blobs
        store.asked.clear()

        def fault(handler: Handler) -> bool:
            if "/blobs/" in handler.path and handler.command == "GET" and handler.headers.get("Authorization"):
                handler.answer(307, Location=f"https://localhost:{store.port}{handler.path}?signature=x%2Fy")
                return True
            return False

        registry.fault = fault
        found = pulled(registry, tmp_path / "x", ca=certificates.ca)
        assert found.path is not None
        assert found.path.read_bytes() == made.read_bytes()
        assert len(store.asked) == 5
        assert not any(headers.get("Authorization") for _, _, headers in store.asked)
        assert all(path.endswith("?signature=x%2Fy") for _, path, _ in store.asked)


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://127.0.0.1:1/blob", ExitCode.UNTRUSTED), ("file:///etc/passwd", ExitCode.INPUT), ("", ExitCode.INPUT),
        ("https://user:secret@127.0.0.1/", ExitCode.INPUT), ("https://[", ExitCode.INPUT),
        ("https://a:99999/", ExitCode.INPUT),
    ],
)  # fmt: skip
def test_redirects_that_lead_astray_are_refused(
    tmp_path: Path, certificates: Certificates, location: str, code: ExitCode
) -> None:
    with serving(Registry(), certificates) as registry:
        registry.fault = lambda handler: handler.answer(307, Location=location) is None
        refused(pulled, registry, tmp_path / "x", ca=certificates.ca, code=code)


def test_an_upload_to_another_server_is_refused(registry: Registry, tmp_path: Path) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "POST":
            handler.answer(202, Location="https://elsewhere.example/v2/upload")
            return True
        return False

    registry.fault = fault
    assert "another server" in refused(pushed, registry, bundle(tmp_path), code=ExitCode.UNTRUSTED)


def test_an_upload_place_with_a_lost_scheme_is_the_registrys_own(tmp_path: Path, certificates: Certificates) -> None:
    """As behind a proxy that ends TLS and does not say so."""
    with serving(Registry(), certificates) as registry:

        def fault(handler: Handler) -> bool:
            if handler.command == "POST":
                handler.answer(202, Location=f"http://127.0.0.1{handler.path}session?a=b")
                return True
            return False

        registry.fault = fault
        pushed(registry, bundle(tmp_path), ca=certificates.ca)
        registry.fault = None
        assert pulled(registry, tmp_path / "x", ca=certificates.ca).path


def test_a_registry_that_says_another_digest_of_what_it_got(registry: Registry, tmp_path: Path) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "PUT":
            handler.body()
            handler.answer(201, Docker_Content_Digest=f"sha256:{'0' * 64}")
            return True
        return False

    registry.fault = fault
    assert "not those of" in refused(pushed, registry, bundle(tmp_path), code=ExitCode.INPUT)


def test_an_upload_that_is_refused_early_is_told(registry: Registry, tmp_path: Path) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "PUT":
            handler.answer(413, b'{"errors": [{"code": "SIZE_INVALID", "message": "too large"}]}', Connection="close")
            handler.close_connection = True
            return True
        return False

    registry.fault = fault
    with pytest.raises(ResvitError) as caught:
        pushed(registry, bundle(tmp_path, content=noise(8 << 20)))
    assert "413" in caught.value.problem or "was lost" in caught.value.problem


# TLS


def test_only_certificates_that_are_trusted(tmp_path: Path, certificates: Certificates) -> None:
    with serving(Registry(), certificates) as registry:
        message = refused(pulled, registry, tmp_path / "x", plain=False, code=ExitCode.UNTRUSTED)
        assert "--ca" in message
        assert not registry.asked
        other = tmp_path / "other"
        other.mkdir()
        stranger = make_certificates(other)
        refused(pulled, registry, tmp_path / "x", ca=stranger.ca, code=ExitCode.UNTRUSTED)
        # A name that is not the certificate's.
        reference = reference_from_text(f"oci://127.0.0.2:{registry.port}/net:1")
        assert not registry.asked
        assert reference.authority.startswith("127.0.0.2")
    (tmp_path / "none.pem").write_bytes(b"no certificate")
    for name in ("none.pem", "absent.pem", "home"):
        refused(Client, reference, ca=tmp_path / name, code=ExitCode.INPUT)


def test_http_is_for_loopback_or_by_request(registry: Registry, tmp_path: Path, certificates: Certificates) -> None:
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"):
        assert is_loopback(host)
    for host in ("localhost.example", "10.0.0.1", "registry", "::2", "0.0.0.0", ""):
        assert not is_loopback(host)
    far = Url(Origin("http", "registry.example", 80), "/v2/")
    assert "--plain-http" in refused(Transport().send, "GET", far, {}, code=ExitCode.UNTRUSTED)
    assert Transport().origin("registry.example", None).scheme == "https"
    assert Transport(plain=True).origin("registry.example", None) == Origin("http", "registry.example", 80)
    # On loopback it is tried whether http is understood.
    pushed(registry, bundle(tmp_path), plain=False)
    assert pulled(registry, tmp_path / "y", plain=False).path
    # Whoever names a CA means TLS, even on loopback.
    assert "no TLS" in refused(pulled, registry, tmp_path / "x", ca=certificates.ca, code=ExitCode.UNTRUSTED)


def test_urls_of_servers_are_held_to_one_form() -> None:
    base = Url(Origin("https", "h", 443), "/v2/net/blobs/uploads/")
    assert url_from("/a?b=c", base) == Url(Origin("https", "h", 443), "/a?b=c")
    assert url_from("x", base).target == "/v2/net/blobs/uploads/x"
    assert url_from("http://[::1]:5000", base) == Url(Origin("http", "::1", 5000), "/")
    for text in ("/a b", "/\r\nX: y", "/ö", "https://h/" + "a" * 20_000, "javascript:x"):
        refused(url_from, text, base, code=ExitCode.INPUT)


def test_through_a_proxy(tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = bundle(tmp_path), []
    with serving(Registry(), certificates) as registry:

        class Proxy(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = iter(self.rfile.readline, b"\r\n")
                seen.append(b"".join(head))
                with socket.create_connection(("127.0.0.1", registry.port)) as there:
                    self.wfile.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                    back = threading.Thread(target=_copy, args=(there, self.connection), daemon=True)
                    back.start()
                    _copy(self.connection, there)
                    back.join()

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            monkeypatch.setenv("https_proxy", f"http://me:my%20self@127.0.0.1:{server.server_address[1]}")
            reference = reference_from_text("oci://registry.test/vision/net:1")
            with Client(reference, push=True, ca=certificates.ca, patience=0) as client:
                push([made], client)
            assert seen[0].startswith(b"CONNECT registry.test:443 ")
            assert basic("me", "my self").encode() in seen[0]
            monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
            with Client(reference, ca=certificates.ca, patience=0) as client:
                refused(client.manifest, "1", (INDEX_TYPE,), code=ExitCode.INPUT)
            server.shutdown()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


# Docker's configuration


def configured(folder: Path, monkeypatch: pytest.MonkeyPatch, document: Any) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": 3}', '{"credsStore": 3}', '{"auths": {"h:1": {"auth": "?"}}}'])
def test_a_damaged_configuration_is_made_by_logging_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    configured(tmp_path, monkeypatch, text)
    with pytest.raises(ResvitError) as caught:
        credentials_for("h:1")
    assert (caught.value.code, caught.value.fix) == (ExitCode.INPUT, "Log in again: docker login h:1")


def test_every_form_of_dockers_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert credentials_for("h:1") is None  # no file
    (tmp_path / "home/.docker").mkdir()
    (tmp_path / "home/.docker/config.json").write_text(json.dumps({"auths": {"h": {"auth": basic("a", "b:c")}}}))
    assert credentials_for("h") == Credentials("a", "b:c")
    assert credentials_for("h:1") is None
    auth = {"auth": basic("a", "b")}
    for key in ("h:1", "https://h:1", "https://h:1/v1/", "https://h:1/v2/"):
        configured(tmp_path, monkeypatch, {"auths": {key: auth}})
        assert credentials_for("h:1") == Credentials("a", "b")
    configured(tmp_path, monkeypatch, {"auths": {"https://index.docker.io/v1/": auth}})
    assert credentials_for("docker.io") == Credentials("a", "b")
    configured(tmp_path, monkeypatch, {"auths": {"h": {"username": "u", "password": "p"}}})
    assert credentials_for("h") == Credentials("u", "p")
    configured(tmp_path, monkeypatch, {"auths": {"h": {"registrytoken": "t"}}})
    assert credentials_for("h") == Credentials(registry_token="t")
    configured(tmp_path, monkeypatch, {"auths": {"h": {}}})
    assert credentials_for("h") is None
    assert "b" not in repr(Credentials("a", "b"))


@pytest.mark.parametrize(
    "document",
    ["", "[]", "{", '{"auths": []}', '{"auths": {"h": 1}}', '{"auths": {"h": {"auth": "%%%"}}}', '{"credsStore": 1}',
     '{"auths": {"h": {"auth": "/////w=="}}}', '{"credHelpers": {"h": ["x"]}}', '{"credsStore": "../../bin/sh"}',
     '{"credsStore": "a/b"}', " " * (1 << 20) + "{}"],
)  # fmt: skip
def test_a_configuration_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str) -> None:
    configured(tmp_path, monkeypatch, document)
    refused(credentials_for, "h", code=ExitCode.INPUT)


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the program ``docker-credential-ours`` of a shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(script: str) -> None:
        program = folder / "docker-credential-ours"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return make


def test_credential_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helper: Callable[[str], None]) -> None:
    auths = {"auths": {"h": {"auth": basic("file", "b")}}}
    helper('read key; [ "$1 $key" = "get h" ] && echo \'{"ServerURL": "h", "Username": "u", "Secret": "s"}\'')
    configured(tmp_path, monkeypatch, {**auths, "credsStore": "ours"})
    assert credentials_for("h") == Credentials("u", "s")
    configured(tmp_path, monkeypatch, {**auths, "credsStore": "absent", "credHelpers": {"h": "ours"}})
    assert credentials_for("h") == Credentials("u", "s")
    configured(tmp_path, monkeypatch, {**auths, "credHelpers": {"other": "ours"}})
    assert credentials_for("h") == Credentials("file", "b")
    configured(tmp_path, monkeypatch, {"credsStore": "ours"})
    helper('echo \'{"Username": "<token>", "Secret": "identity"}\'')
    assert credentials_for("h") == Credentials(identity_token="identity")
    helper("echo 'credentials not found in native keychain'; exit 1")
    assert credentials_for("h") is None
    helper("echo locked; exit 3")
    assert "failed (locked)" in refused(credentials_for, "h", code=ExitCode.MISSING)
    for script in ("echo no JSON", 'echo "{}"', "true"):
        helper(script)
        refused(credentials_for, "h", code=ExitCode.INPUT)
    configured(tmp_path, monkeypatch, {"credsStore": "absent"})
    assert "not installed" in refused(credentials_for, "h", code=ExitCode.MISSING)


@pytest.mark.parametrize(("script", "words"), [("yes", "more than 64 KiB"), ("sleep 60 & sleep 60", "does not answer")])
def test_a_helper_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helper: Callable[[str], None], script: str, words: str
) -> None:
    monkeypatch.setattr(credentials, "_SECONDS", 0.3)
    configured(tmp_path, monkeypatch, {"credsStore": "ours"})
    helper(script)
    assert words in refused(credentials_for, "h", code=ExitCode.MISSING)


# The commands


def test_the_commands(
    registry: Registry, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [bundle(tmp_path, target) for target in ("rtx-4090", "jetson-orin")]
    (tmp_path / "release.pub").write_text(KEY.public.to_text())
    reference, trust = registry.reference(), ["--trust", str(tmp_path / "release.pub")]
    monkeypatch.chdir(tmp_path)

    def said(run: Callable[[list[str]], int], *line: str, code: int = 0) -> Any:
        capfd.readouterr()
        assert run([*line, "--json"]) == code, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    would = said(run_export, "push", *map(str, made), reference, "--dry-run")
    assert registry.asked == []
    done = said(run_export, "push", *map(str, made), reference)
    assert done["digest"] == would["digest"]
    assert done["pinned"] == f"{reference}@{would['digest']}"
    assert run_export(["push", str(tmp_path), reference]) == 0  # a folder of bundles
    assert "0 blobs sent" in capfd.readouterr().out
    error = said(run_engine, "pull", reference, *trust, code=ExitCode.IMPOSSIBLE)["error"]
    assert "net-jetson-orin-int8" in error["problem"]
    rehearsed = ["--rehearse", "--target", "jetson-orin", *trust]
    got = said(run_engine, "pull", reference, *rehearsed)
    assert (got["path"], got["target"], got["already"]) == ("net-jetson-orin-int8.resvit", "jetson-orin", False)
    assert Path(got["path"]).read_bytes() == made[1].read_bytes()
    assert run_engine(["pull", done["pinned"], *rehearsed, "--out", "x.resvit", "-q"]) == 0
    assert capfd.readouterr().out == "x.resvit\n"
    said(run_engine, "pull", reference, *rehearsed, "--root", "r", code=ExitCode.INPUT)
    said(run_engine, "pull", "net:1", code=ExitCode.INPUT)
    said(run_export, "push", str(tmp_path / "home"), reference, code=ExitCode.INPUT)
    said(run_export, "push", str(made[0]), "oci://h/net", code=ExitCode.INPUT)
    monkeypatch.setenv("RESVIT_REGISTRY_PATIENCE", "soon")
    said(run_engine, "pull", reference, *trust, code=ExitCode.INPUT)


def test_small_answers_are_bounded_in_time(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_SMALL_SECONDS", -1.0)
    pushed_before = {"1": (INDEX_TYPE, b"{}")}
    registry.manifests = pushed_before
    assert "too slowly" in refused(pulled, registry, tmp_path / "x", code=ExitCode.SYSTEM)


def test_a_run_s_bundles_are_listed_where_its_model_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/x"
    (folder / "bundle-1").mkdir(parents=True)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        'model = { name = "resvit:embed-nano", checkpoint = "absent.pt" }\ntarget = { name = "l4" }\n'
        'data = { images = "fashion-mnist" }\nquantize = { precision = "int8" }\n'
    )
    line = ["push", str(folder), "oci://registry.example/net:1", "--dry-run", "--json"]
    assert run_export(line) == ExitCode.INPUT
    assert "absent.pt" in json.loads(capfd.readouterr().out)["error"]["problem"]
    path = task_bundle(tmp_path, "text", precision="int8").rename(folder / "bundle-1/text.resvit")
    for when in (1, path.stat().st_mtime + 99):  # the times of files say nothing: whoever copies a folder changes them
        os.utime(recipe, (when, when))
        assert run_export(line) == ExitCode.INPUT
        error = json.loads(capfd.readouterr().out)["error"]
        assert "cannot be told here" in error["problem"]
        assert "absent.pt" in error["problem"]
        assert str(path) in error["fix"]
    assert run_export(["push", str(path), *line[2:]]) == 0
    assert [offer["ai.resvit.target"] for offer in json.loads(capfd.readouterr().out)["bundles"]] == ["l4"]


@pytest.mark.whole
def test_the_bundles_of_a_run_are_pushed(
    workspace: Path, seeded: Callable[..., str], registry: Registry, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, reference = seeded("runs/x", "jetson-orin"), registry.reference()
    assert run_export(["keygen", "release.key", "-q"]) == 0
    made = ["--run", folder, "--target", "jetson-orin", *shlex.split(DEMO), "-q"]
    assert run_export(["bundle", *made]) == 0
    assert run_export(["push", folder, reference]) == ExitCode.UNTRUSTED  # as its recipe says now: not signed
    assert run_export(["bundle", *made, "--key", "release.key"]) == 0
    capfd.readouterr()
    assert run_export(["push", folder, reference, "--json"]) == 0
    (offer,) = json.loads(capfd.readouterr().out)["bundles"]
    assert (offer["ai.resvit.target"], offer["ai.resvit.holds"]) == ("jetson-orin", "model")
    line = ["pull", reference, "--trust", "release.pub", "--rehearse", "--install", "--root", "root"]
    assert run_engine([*line, "--runtime", "onnxruntime", "--json"]) == 0
    got = json.loads(capfd.readouterr().out)
    assert got["installed"]["golden"]
    assert run_engine([*line, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["already"]
    # A run whose bundle is not made is not made by pushing it.
    shutil.rmtree(next(Path(folder).glob("validate-*")))
    assert run_export(["push", folder, reference]) == ExitCode.INPUT
    assert "not finished" in capfd.readouterr().err
