"""Signatures in the format of OpenSSF Model Signing, held to its own verifier."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from model_signing import verifying

from resvit_engines.bundle.bundle import read_trusted_manifest, write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode
from resvit_engines.keys.private import load_signing_key
from resvit_engines.keys.public import TrustStore
from resvit_export.cli.main import run


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESVIT_SIGNING_KEY", "RESVIT_SIGNING_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "net.resvit"
    write_bundle(path, Manifest("net"), {"model.onnx": b"weights" * 10})
    return path


def key_pair(folder: Path, curve: ec.EllipticCurve, password: bytes | None = None) -> tuple[Path, Path]:
    secret = ec.generate_private_key(curve)
    private, public = folder / "openssf.pem", folder / "openssf.pub"
    closed = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(secret.private_bytes(serialization.Encoding.PEM, form, closed))
    public.write_bytes(
        secret.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def holds(bundle: Path, public: Path) -> bool:
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(bundle, f"{bundle}.sig")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=["256", "384", "521"])
def test_its_own_verifier_takes_it_and_refuses_another_bundle(
    bundle: Path, tmp_path: Path, curve: ec.EllipticCurve, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = key_pair(tmp_path, curve)
    before = bundle.read_bytes()
    assert run(["sign", str(bundle), "--openssf", str(private), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"bundle": str(bundle), "name": "net", "openssf": f"{bundle}.sig"}
    assert bundle.read_bytes() == before
    assert holds(bundle, public)
    (tmp_path / "other").mkdir()
    assert not holds(bundle, key_pair(tmp_path / "other", curve)[1])
    write_bundle(bundle, Manifest("other"), {"model.onnx": b"weights" * 10})
    assert not holds(bundle, public)


def test_both_signatures_and_the_bytes_of_the_signed_bundle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = key_pair(tmp_path, ec.SECP256R1())
    own, out = tmp_path / "release.key", tmp_path / "signed.resvit"
    assert run(["keygen", str(own)]) == 0
    assert run(["sign", str(bundle), "--key", str(own), "--openssf", str(private), "--out", str(out)]) == 0
    assert "signed.resvit.sig" in capsys.readouterr().out
    key = load_signing_key(str(own))
    assert key is not None
    assert read_trusted_manifest(out, TrustStore((key.public,))).name == "net"
    assert holds(out, public)
    assert not Path(f"{bundle}.sig").exists()


def test_a_signature_that_no_longer_holds_is_told(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = key_pair(tmp_path, ec.SECP256R1())
    own = tmp_path / "release.key"
    assert run(["keygen", str(own), "-q"]) == 0
    line = ["sign", str(bundle), "--key", str(own)]
    assert run([*line, "--openssf", str(private)]) == 0
    capsys.readouterr()
    assert run(line) == 0  # to the same bytes
    assert "no longer holds" not in capsys.readouterr().err
    assert holds(bundle, public)
    assert run(["keygen", str(tmp_path / "other.key"), "-q"]) == 0
    assert run(["sign", str(bundle), "--key", str(tmp_path / "other.key"), "--json"]) == 0
    assert f"{bundle.name}.sig is of the bundle as it was, and no longer holds" in capsys.readouterr().err
    assert not holds(bundle, public)


def wrong_key(kind: str, folder: Path) -> Path:
    path = folder / "openssf.pem"
    if kind == "another curve":
        return key_pair(folder, ec.SECP256K1())[0]
    if kind == "a password":
        return key_pair(folder, ec.SECP256R1(), b"secret")[0]
    if kind == "public":
        return key_pair(folder, ec.SECP256R1())[1]
    if kind == "ed25519":
        secret = Ed25519PrivateKey.generate()
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(secret.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    if kind == "a folder":
        path.mkdir()
    if kind == "no PEM":
        path.write_bytes(b"\0" * 100)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("another curve", "P-256"),
        ("a password", "has a password"),
        ("public", "no private key in PEM"),
        ("ed25519", "P-256"),
        ("a folder", "openssf.pem"),
        ("no PEM", "no private key in PEM"),
        ("nowhere", "openssf.pem"),
    ],
)
def test_keys_that_it_does_not_take(
    bundle: Path, tmp_path: Path, kind: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own, before = tmp_path / "release.key", bundle.read_bytes()
    assert run(["keygen", str(own)]) == 0
    beside = ["--openssf", str(wrong_key(kind, tmp_path))]
    assert run(["sign", str(bundle), *beside]) == ExitCode.INPUT
    assert said in capsys.readouterr().err
    assert run(["sign", str(bundle), "--key", str(own), *beside]) == ExitCode.INPUT
    assert bundle.read_bytes() == before
    assert list(tmp_path.glob("*.sig")) == []
    assert list(tmp_path.glob(".*.tmp")) == []


def test_what_else_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    private, _ = key_pair(tmp_path, ec.SECP256R1())
    assert run(["sign", str(bundle), "--openssf", str(private), "--out", str(tmp_path / "x")]) == ExitCode.INPUT
    assert "Leave --out away" in capsys.readouterr().err
    bundle.write_bytes(bundle.read_bytes().replace(b"weightsweights", b"wEightsweights", 1))
    assert run(["sign", str(bundle), "--openssf", str(private)]) == ExitCode.INPUT
    assert not Path(f"{bundle}.sig").exists()
    monkeypatch.setitem(sys.modules, "model_signing", None)
    write_bundle(bundle, Manifest("net"), {"model.onnx": b"weights" * 10})
    assert run(["sign", str(bundle), "--openssf", str(private)]) == ExitCode.MISSING
    assert "resvit-export[openssf]" in capsys.readouterr().err
