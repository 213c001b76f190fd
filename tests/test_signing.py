"""Signatures, keys and trust: what is accepted, and every reason why something is not."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import stat
import subprocess
import zipfile
import zlib
from collections.abc import Iterator
from datetime import date, datetime, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from resvit_engines.bundle.bundle import (
    extract_trusted,
    read_manifest,
    read_trusted_manifest,
    sign_bundle,
    verify_bundle,
    write_bundle,
)
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.zip_layout import Member, directory, local_header
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.keys.private import SigningKey, load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey, TrustStore, load_trust, read_public_key
from resvit_engines.keys.signing import PAYLOAD_TYPE, pae
from resvit_export.cli.main import run

SEED = bytes(range(32))
MANIFEST = Manifest("net", other={"note": "Größe"})
FILES: dict[str, Path | bytes] = {"model.onnx": b"weights" * 10, "golden.npy": b"\x93NUMPY"}


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RESVIT_SIGNING_KEY", "RESVIT_SIGNING_KEY_FILE", "RESVIT_TRUST", "SSH_AUTH_SOCK", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def secret_file(path: Path, seed: bytes = SEED) -> Path:
    pem = Ed25519PrivateKey.from_private_bytes(seed).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(pem)
    path.chmod(0o600)
    return path


def signing_key(seed: bytes = SEED, name: str = "release") -> SigningKey:
    secret = Ed25519PrivateKey.from_private_bytes(seed)
    raw = secret.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return SigningKey(PublicKey(raw, name), secret.sign)


KEY = signing_key()
TRUST = TrustStore((KEY.public,))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "net.resvit"
    write_bundle(path, MANIFEST, FILES, KEY)
    return path


def refused(function, *arguments, code: ExitCode = ExitCode.UNTRUSTED, **named) -> str:
    with pytest.raises(ResvitError) as caught:
        function(*arguments, **named)
    assert caught.value.code is code
    return str(caught.value)


def repacked(path: Path, **changed: bytes | None) -> Path:
    """The bundle with members replaced (or left out), laid out as an honest one."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for name, data in changed.items():
        full = next(member for member in contents if member.startswith(name))
        if data is None:
            del contents[full]
        else:
            contents[full] = data
    members = [Member(name, len(data), zlib.crc32(data)) for name, data in contents.items()]
    path.write_bytes(b"".join([*(local_header(m) + contents[m.name] for m in members), directory(members)]))
    return path


def member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def test_pae_is_that_of_the_specification() -> None:
    # The example of DSSE's protocol.md.
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("é", b"") == "DSSEv1 2 é 0 ".encode()


def test_a_signed_bundle_is_read_by_who_trusts_its_key(bundle: Path, tmp_path: Path) -> None:
    manifest = read_trusted_manifest(bundle, TRUST)
    assert manifest == read_manifest(bundle) == verify_bundle(bundle)
    assert extract_trusted(bundle, tmp_path / "out", TRUST) == manifest
    assert (tmp_path / "out/model.onnx").read_bytes() == FILES["model.onnx"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "manifest.json", "signature.json"}
    with zipfile.ZipFile(bundle) as archive:
        assert archive.namelist() == ["manifest.json", "signature.json", "golden.npy", "model.onnx"]
        assert archive.testzip() is None


def test_the_envelope_is_dsse_with_its_payload_kept_beside_it(bundle: Path) -> None:
    envelope = json.loads(member(bundle, "signature.json"))
    assert envelope["payloadType"] == PAYLOAD_TYPE
    (signature,) = envelope["signatures"]
    assert signature["keyid"] == hashlib.sha256(KEY.public.raw).hexdigest() == KEY.public.keyid
    # Ed25519 itself, with nothing of ours in between.
    Ed25519PublicKey.from_public_bytes(KEY.public.raw).verify(
        base64.b64decode(signature["sig"]),
        b"DSSEv1 %d %b %d %b"
        % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(m := member(bundle, "manifest.json")), m),
    )


def test_the_bytes_depend_on_content_and_key_alone(bundle: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "again", MANIFEST, dict(reversed(FILES.items())), signing_key())
    assert (tmp_path / "again").read_bytes() == bundle.read_bytes()
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() == DIGEST


DIGEST = "2e1226547b98dab55fd24eb088a8f79ef9acd63febb4b93616982a24e9bbbb14"


def test_signing_later_gives_the_same_bundle(bundle: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.resvit"
    write_bundle(plain, MANIFEST, FILES)
    unsigned = plain.read_bytes()
    sign_bundle(plain, KEY, tmp_path / "signed.resvit")
    assert plain.read_bytes() == unsigned
    sign_bundle(plain, signing_key(bytes(32), "other"))
    assert "not trusted here" in refused(read_trusted_manifest, plain, TRUST)
    sign_bundle(plain, KEY)
    assert plain.read_bytes() == (tmp_path / "signed.resvit").read_bytes() == bundle.read_bytes()


def test_damage_is_not_signed(bundle: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[-200] ^= 1
    bundle.write_bytes(data)
    refused(sign_bundle, bundle, KEY, code=ExitCode.INPUT)
    assert bundle.read_bytes() == data


def test_each_reason_for_distrust_has_a_sentence_of_its_own(bundle: Path, tmp_path: Path) -> None:
    other = signing_key(bytes(32), "other").public
    old = PublicKey(KEY.public.raw, "release", date(2024, 1, 1), date(2025, 1, 31))
    withdrawn = PublicKey(KEY.public.raw, "release", revoked=True)
    folder = tmp_path / "keys"
    reasons = [
        refused(read_trusted_manifest, bundle, trust)
        for trust in (
            TrustStore((), source=str(folder)),
            TrustStore((other,), source=str(folder)),
            TrustStore((old,)),
            TrustStore((withdrawn,)),
        )
    ]
    for reason, words in zip(
        reasons,
        (f"{folder} holds no public key", "not trusted here", "expired on 2025-01-31", "revoked: release"),
        strict=True,
    ):
        assert words in reason
    assert "trusted: other" in reasons[1]
    assert "revoked" in refused(read_trusted_manifest, bundle, TrustStore((KEY.public,), frozenset({KEY.public.keyid})))
    assert "revoked" in refused(read_trusted_manifest, bundle, TrustStore((other,), frozenset({KEY.public.keyid})))
    plain = tmp_path / "plain.resvit"
    write_bundle(plain, MANIFEST, FILES)
    unsigned = refused(read_trusted_manifest, plain, TRUST)
    assert "is not signed" in unsigned
    assert "keygen" in unsigned
    assert "--key" in unsigned
    repacked(bundle, manifest=member(bundle, "manifest.json").replace(b"net", b"nex"))
    changed = refused(read_trusted_manifest, bundle, TRUST)
    assert "does not hold" in changed
    assert len({*reasons, unsigned, changed}) == 6


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (datetime(1970, 1, 1, 0, 3, tzinfo=timezone.utc), "clock of this device says 1970-01-01"),
        (datetime(2025, 6, 1, tzinfo=timezone.utc), "clock of this device says 2025-06-01"),
        (datetime(2026, 12, 31, 23, 59, tzinfo=timezone.utc), None),
        (datetime(2027, 1, 1, 0, 1, tzinfo=timezone.utc), "expired on 2026-12-31"),
    ],
)
def test_a_key_is_good_to_the_end_of_its_last_day_by_a_clock_that_can_be_right(
    now: datetime, words: str | None
) -> None:
    trust = TrustStore((PublicKey(KEY.public.raw, "release", date(2025, 12, 1), date(2026, 12, 31)),))
    keyid = KEY.public.keyid
    if words is None:
        assert trust.require(keyid, "it", now=now).name == "release"
    else:
        assert words in refused(trust.require, keyid, "it", now=now)
    assert trust.require(keyid, "it", now=now, expired_ok=True).name == "release"
    undated = TrustStore((PublicKey(KEY.public.raw, "release", None, date(2026, 12, 31)),))
    lost = datetime(1970, 1, 1, tzinfo=timezone.utc)
    assert "clock of this device says 1970-01-01" in refused(undated.require, keyid, "it", now=lost)
    forever = TrustStore((KEY.public,))
    assert forever.require(keyid, "it", now=datetime(1970, 1, 1, tzinfo=timezone.utc)) is KEY.public


def test_one_good_signature_of_several_is_enough(bundle: Path) -> None:
    other = signing_key(bytes(32), "other")
    manifest = member(bundle, "manifest.json")
    pairs = [
        {"keyid": key.public.keyid, "sig": base64.b64encode(key.sign(pae(PAYLOAD_TYPE, manifest))).decode()}
        for key in (other, KEY)
    ]

    def envelope(signatures: list[dict[str, str]]) -> bytes:
        document = {"payloadType": PAYLOAD_TYPE, "signatures": signatures}
        return (json.dumps(document, sort_keys=True, indent=2) + "\n").encode()

    repacked(bundle, signature=envelope(pairs))
    for trusted in (KEY, other):
        assert read_trusted_manifest(bundle, TrustStore((trusted.public,))).name == "net"
    # The signature of one under the id of the other is none.
    swapped = [{**pairs[0], "keyid": pairs[1]["keyid"]}, {**pairs[1], "keyid": pairs[0]["keyid"]}]
    repacked(bundle, signature=envelope(swapped))
    assert "does not hold" in refused(read_trusted_manifest, bundle, TrustStore((KEY.public, other.public)))


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 60_000,
        b'{"payloadType": "x", "signatures": []}',
        json.dumps({"payloadType": PAYLOAD_TYPE, "signatures": []}, indent=2).encode() + b"\n",
        json.dumps({"payloadType": PAYLOAD_TYPE, "signatures": None}, indent=2).encode() + b"\n",
        json.dumps(
            {"more": 1, "payloadType": PAYLOAD_TYPE, "signatures": [{"keyid": "a", "sig": ""}]}, indent=2
        ).encode()
        + b"\n",
        json.dumps(
            {"payloadType": PAYLOAD_TYPE, "signatures": [{"keyid": "a", "more": 1, "sig": ""}]}, indent=2
        ).encode()
        + b"\n",
        json.dumps({"payloadType": PAYLOAD_TYPE, "signatures": [{"keyid": 1, "sig": ""}]}, indent=2).encode() + b"\n",
        json.dumps({"payloadType": PAYLOAD_TYPE, "signatures": [{"keyid": "a", "sig": "?"}]}, indent=2).encode()
        + b"\n",
    ],
)
def test_odd_envelopes_are_refused(bundle: Path, envelope: bytes) -> None:
    assert "does not read" in refused(read_trusted_manifest, repacked(bundle, signature=envelope), TRUST)


def test_a_signature_is_accepted_in_one_form_only(bundle: Path) -> None:
    envelope = member(bundle, "signature.json")
    last = envelope.index(b"==") - 1
    assert envelope[last : last + 1] in b"AQgw"
    # The same 64 bytes, in base64 with other bits where none are read.
    loose = envelope[:last] + bytes([envelope[last] + 1]) + envelope[last + 1 :]
    assert base64.b64decode(loose[last - 85 : last + 3]) == base64.b64decode(envelope[last - 85 : last + 3])
    written_otherwise = (envelope + b"\n", envelope.replace(b"  ", b" "), json.dumps(json.loads(envelope)).encode())
    for changed in (loose, *written_otherwise):
        assert "does not read" in refused(read_trusted_manifest, repacked(bundle, signature=changed), TRUST)


def test_nothing_but_manifest_and_signature_is_read_before_the_signature_holds(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exploded(*_: object) -> None:
        raise AssertionError("read more than manifest and signature")

    untrusted = TrustStore((signing_key(bytes(32)).public,))
    monkeypatch.setattr("resvit_engines.bundle.reader.manifest_from_bytes", exploded)
    monkeypatch.setattr("resvit_engines.bundle.reader.OpenBundle.check", exploded)
    refused(read_trusted_manifest, bundle, untrusted)
    refused(extract_trusted, bundle, tmp_path / "out", untrusted)
    # What comes after the two is not even looked at: here it is no zip at all.
    data = bundle.read_bytes()
    end = data.index(b"PK\x03\x04", data.index(b'"sig"'))
    for rest in (b"", b"PK\x03\x04" + b"\xff" * 1000, bytes(1000)):
        bundle.write_bytes(data[:end] + rest)
        assert "not trusted here" in refused(read_trusted_manifest, bundle, untrusted)
    assert not (tmp_path / "out").exists()


def test_keygen_writes_a_pair_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.umask(previous := os.umask(0))
    private, public = tmp_path / "keys/release.key", tmp_path / "keys/release.pub"
    try:
        os.umask(0)
        assert run(["keygen", str(private), "--name", "robots", "--days", "30", "--json"]) == 0
    finally:
        os.umask(previous)
    said = json.loads(capsys.readouterr().out)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    key = read_public_key(public)
    assert (key.name, key.keyid, str(key.expires)) == ("robots", said["keyid"], said["expires"])
    loaded = load_signing_key(str(private))
    assert loaded is not None
    assert loaded.public.raw == key.raw
    assert key.verifies(loaded.sign(b"data"), b"data")
    assert not key.verifies(loaded.sign(b"data"), b"date")
    assert sorted(path.name for path in private.parent.iterdir()) == ["release.key", "release.pub"]
    before = private.read_bytes(), public.read_bytes()
    for arguments in (
        [str(private)],
        [str(tmp_path / "new.key"), "--public", str(public)],
        [str(private), "--public", str(tmp_path / "new.pub")],
    ):
        assert run(["keygen", *arguments]) == ExitCode.INPUT
    assert (private.read_bytes(), public.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys"]


def test_no_command_shows_a_private_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "net.resvit", MANIFEST, FILES)
    private = tmp_path / "release.key"
    run(["keygen", str(private)])
    run(["sign", str(tmp_path / "net.resvit"), "--key", str(private)])
    run(["sign", str(tmp_path / "net.resvit"), "--key", str(private), "--json"])
    broken = tmp_path / "broken.key"
    broken.write_text(private.read_text().replace("MC4", "M%%"))
    broken.chmod(0o600)
    assert run(["sign", str(tmp_path / "net.resvit"), "--key", str(broken)]) == ExitCode.INPUT
    out, err = capfd.readouterr()
    body = private.read_text().splitlines()[1]
    secret = base64.b64decode(body)[-32:]
    assert load_signing_key(str(private)) is not None
    shown = out + err + repr(load_signing_key(str(private))) + private.with_suffix(".pub").read_text()
    for form in (body, body[:40], secret.hex(), repr(secret), base64.b64encode(secret).decode()):
        assert form not in shown


def test_the_key_comes_from_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_signing_key() is None
    path = secret_file(tmp_path / "a.key")
    monkeypatch.setenv("RESVIT_SIGNING_KEY_FILE", str(path))
    found = load_signing_key()
    assert found is not None
    assert found.public.raw == KEY.public.raw
    other = secret_file(tmp_path / "b.key", bytes(32)).read_text()
    for text in (other, other.strip().replace("\n", "\\n")):
        monkeypatch.setenv("RESVIT_SIGNING_KEY", text)
        found = load_signing_key()
        assert found is not None
        assert found.public.raw == signing_key(bytes(32)).public.raw
    named = load_signing_key(str(path))
    assert named is not None
    assert named.public.raw == KEY.public.raw
    monkeypatch.setenv("RESVIT_SIGNING_KEY", "nonsense")
    assert "$RESVIT_SIGNING_KEY holds no private key" in refused(load_signing_key, code=ExitCode.INPUT)


def test_private_keys_that_are_refused(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "open.key")
    for mode in (0o644, 0o640, 0o604, 0o660):
        path.chmod(mode)
        message = refused(load_signing_key, str(path), code=ExitCode.INPUT)
        assert f"chmod 600 {path}" in message
    assert "keygen" in refused(load_signing_key, str(tmp_path / "absent.key"), code=ExitCode.INPUT)
    for name, data in (("text", b"hello"), ("binary", bytes(range(256))), ("empty", b"")):
        file = tmp_path / name
        file.write_bytes(data)
        file.chmod(0o600)
        assert "no private key" in refused(load_signing_key, str(file), code=ExitCode.INPUT)
    rsa = generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(rsa)
    path.chmod(0o600)
    assert "another kind" in refused(load_signing_key, str(path), code=ExitCode.INPUT)
    path.write_bytes(
        Ed25519PrivateKey.from_private_bytes(SEED).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for protected in (path, ssh_key(tmp_path / "ssh", "me", passphrase="secret")):
        message = refused(load_signing_key, str(protected), code=ExitCode.INPUT)
        assert "passphrase" in message
        assert "agent" in message


def ssh_key(path: Path, comment: str, kind: str = "ed25519", passphrase: str = "") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", comment, "-f", str(path)], check=True)
    return path


@contextlib.contextmanager
def ssh_agent(*keys: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """A real agent that holds these keys."""
    # In the foreground, so that it ends with us.
    socket = Path("/tmp") / f"resvit-agent-{os.getpid()}"  # a socket's path is at most 108 bytes
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None
        agent.stdout.readline()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        if keys:
            subprocess.run(["ssh-add", "-q", *map(str, keys)], check=True, capture_output=True)
        yield
    finally:
        agent.terminate()
        agent.communicate()
        socket.unlink(missing_ok=True)


@pytest.mark.whole
def test_an_openssh_key_signs_by_file_and_by_agent_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ssh_key(tmp_path / "first", "me@desk")
    second, rsa = ssh_key(tmp_path / "second", "other"), ssh_key(tmp_path / "third", "rsa", "rsa")
    write_bundle(tmp_path / "file.resvit", MANIFEST, FILES, load_signing_key(str(first)))
    expected = (tmp_path / "file.resvit").read_bytes()
    trust = load_trust(tmp_path / "first.pub")
    assert trust.keys[0].name == "me@desk"
    with ssh_agent(first, rsa, monkeypatch=monkeypatch, folder=tmp_path):
        first.unlink()
        for source in ("agent", "agent:me@desk", str(tmp_path / "first.pub")):
            write_bundle(tmp_path / "agent.resvit", MANIFEST, FILES, load_signing_key(source))
            assert (tmp_path / "agent.resvit").read_bytes() == expected
            assert read_trusted_manifest(tmp_path / "agent.resvit", trust).name == "net"
        said = refused(load_signing_key, "agent:nobody", code=ExitCode.MISSING)
        assert "me@desk" in said
        refused(load_signing_key, str(tmp_path / "second.pub"), code=ExitCode.MISSING)
        subprocess.run(["ssh-add", "-q", str(second)], check=True, capture_output=True)
        assert "one key alone" in refused(load_signing_key, "agent", code=ExitCode.MISSING)
        large = load_signing_key("agent:other")
        assert large is not None
        assert "larger" in refused(large.sign, bytes(300 << 10), code=ExitCode.INPUT)
    assert "does not sign" in refused(load_signing_key, "agent", code=ExitCode.MISSING)
    monkeypatch.delenv("SSH_AUTH_SOCK")
    assert "SSH_AUTH_SOCK is not set" in refused(load_signing_key, "agent", code=ExitCode.MISSING)


def test_the_trust_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    other = signing_key(bytes(32), "other").public
    (folder / "a.pub").write_text(PublicKey(KEY.public.raw, "release", date(2026, 1, 1), date(2999, 1, 1)).to_text())
    (folder / "b.pem").write_text(other.to_text())
    (folder / "README").write_text("not a key")
    trust = load_trust(folder)
    assert [(key.name, key.expires) for key in trust.keys] == [("release", date(2999, 1, 1)), ("other", None)]
    assert load_trust(folder / "b.pem").keys == (other,)
    monkeypatch.setenv("RESVIT_TRUST", str(folder))
    assert load_trust() == trust
    (folder / "revoked").write_text(f"{other.keyid}\n")
    assert "revoked: other" in refused(load_trust(folder).require, other.keyid, "it")
    assert load_trust(folder).require(KEY.public.keyid, "it").name == "release"
    (folder / "revoked").write_text("other\n")
    assert "no key id" in refused(load_trust, folder)
    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "absent"))
    assert "absent" in refused(load_trust, code=ExitCode.INPUT)


@pytest.mark.whole
def test_what_does_not_belong_into_the_trust_folder(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    good = KEY.public.to_text()
    for text, words in (
        (good.replace("Name:", "Expire: 2020-01-01\nName:"), "not understood"),
        (good.replace("Name:", "Expires: soon\nName:"), "where a date belongs"),
        ("hello", "is not an Ed25519 public key"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "is not an Ed25519 public key"),
        ("ssh-ed25519 AAAA me", "is not an Ed25519 public key"),
        (secret_file(tmp_path / "a.key").read_text(), "holds a private key"),
    ):
        (folder / "a.pub").write_text(text)
        assert words in refused(load_trust, folder)
    rsa = ssh_key(tmp_path / "rsa", "rsa", "rsa").with_suffix(".pub").read_text()
    (folder / "a.pub").write_text(rsa)
    assert "is not an Ed25519" in refused(load_trust, folder)
    (folder / "a.pub").write_bytes(b"\xff\xfe")
    assert "not a text file" in refused(load_trust, folder)
    (folder / "a.pub").write_text(good)
    (folder / "a.pub").chmod(0o666)
    assert "chmod o-w" in refused(load_trust, folder)
    (folder / "a.pub").chmod(0o644)
    folder.chmod(0o777)
    assert "Anyone on this machine" in refused(load_trust, folder)
    folder.chmod(0o755)
    assert load_trust(folder).keys == (KEY.public,)


def test_revoked_in_the_key_file_counts(tmp_path: Path) -> None:
    text = PublicKey(KEY.public.raw, "release", revoked=True).to_text()
    (tmp_path / "a.pub").write_text(text)
    assert "revoked" in refused(load_trust(tmp_path / "a.pub").require, KEY.public.keyid, "it")
    (tmp_path / "a.pub").write_text(text.replace("Revoked: yes", "Revoked: no"))
    assert load_trust(tmp_path / "a.pub").require(KEY.public.keyid, "it").name == "release"


def test_a_pair_is_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.key").symlink_to(tmp_path / "elsewhere")
    refused(make_key_pair, tmp_path / "a.key", tmp_path / "a.pub", lambda raw: PublicKey(raw, "a"), code=ExitCode.INPUT)
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "a.pub").exists()


def test_sign_takes_a_folder_with_one_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run/bundle-1").mkdir(parents=True)
    write_bundle(tmp_path / "run/bundle-1/net.resvit", MANIFEST, FILES)
    key = secret_file(tmp_path / "a.key")
    assert run(["sign", str(tmp_path / "run"), "--key", str(key), "--out", str(tmp_path / "signed")]) == 0
    assert read_trusted_manifest(tmp_path / "signed", TRUST).name == "net"
    assert run(["sign", str(tmp_path / "run")]) == ExitCode.INPUT
    write_bundle(tmp_path / "run/other.resvit", MANIFEST, FILES)
    assert run(["sign", str(tmp_path / "run"), "--key", str(key)]) == ExitCode.INPUT
    assert "does not hold one bundle" in capsys.readouterr().err
