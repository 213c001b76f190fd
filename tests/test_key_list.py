"""Signed lists of keys: rotation, revocation, and every list that a device does not take."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from resvit_engines.bundle.bundle import read_trusted_manifest, write_bundle
from resvit_engines.cli.main import run as run_engine
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.keys.key_list import KeyList, SignedList, list_from_bytes, sign_list
from resvit_engines.keys.private import SigningKey, load_signing_key
from resvit_engines.keys.public import KEY_LIST, load_trust
from resvit_engines.keys.taking import take_list
from resvit_export.cli.main import run as run_export
from test_install import Device, bundle, refused
from test_signing import FILES, MANIFEST, secret_file, signing_key

TODAY = date(2026, 11, 30)
NOW = datetime(2026, 11, 30, 12, tzinfo=timezone.utc)
ROOT, ROOT_2, ROOT_3 = (signing_key(bytes([number] * 32), f"root {number}") for number in (1, 2, 3))
OLD, NEW, STRANGE = (signing_key(bytes([number] * 32), name) for number, name in ((4, "old"), (5, "new"), (6, "odd")))


def keys(
    version: int = 1, *, roots: tuple[SigningKey, ...] = (ROOT,), trusted: tuple[SigningKey, ...] = (OLD,),
    revoked: tuple[SigningKey, ...] = (), threshold: int = 1, days: int = 90, issued: date = TODAY,
) -> KeyList:  # fmt: skip
    publics = [tuple(key.public for key in each) for each in (roots, trusted)]
    gone = frozenset(key.public.keyid for key in revoked)
    return KeyList(version, issued, issued + timedelta(days=days), publics[0], threshold, publics[1], gone)


def written(folder: Path, what: KeyList, *signers: SigningKey) -> Path:
    path = folder / f"keys-{what.version}.json"
    path.write_bytes(sign_list(what, *(signers or (ROOT,))).to_bytes())
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device's folder of trusted keys, with the first list taken."""
    monkeypatch.delenv("RESVIT_TRUST", raising=False)
    monkeypatch.setattr("resvit_engines.keys.public.default_trust_folder", lambda: tmp_path / "device")
    place = tmp_path / "device"
    take_list(place, written(tmp_path, keys()), [ROOT.public], NOW)
    return place


def signed_by(key: SigningKey, path: Path) -> Path:
    write_bundle(path, MANIFEST, FILES, key)
    return path


def test_the_keys_of_the_list_are_trusted_and_no_others(folder: Path, tmp_path: Path) -> None:
    (folder / "odd.pub").write_text(STRANGE.public.to_text())
    (folder / "own.pub").write_text(NEW.public.to_text())
    trust = load_trust()
    assert {key.name for key in trust.keys} == {"old", "new"}
    read_trusted_manifest(signed_by(OLD, tmp_path / "a"), trust)
    read_trusted_manifest(signed_by(NEW, tmp_path / "b"), trust)
    for odd in (STRANGE, ROOT):
        assert "not trusted" in refused(
            read_trusted_manifest, signed_by(odd, tmp_path / "c"), trust, code=ExitCode.UNTRUSTED
        )


def test_rotation(folder: Path, tmp_path: Path) -> None:
    """The new key signs what comes; what the old one signed is run, and later neither installed nor run."""
    take_list(folder, written(tmp_path, keys(2, trusted=(OLD, NEW))), now=NOW)
    for key in (OLD, NEW):
        read_trusted_manifest(signed_by(key, tmp_path / "a"), load_trust())
    take_list(folder, written(tmp_path, keys(3, trusted=(NEW,), revoked=(OLD,))), now=NOW)
    by_old = signed_by(OLD, tmp_path / "a")
    assert "revoked" in refused(read_trusted_manifest, by_old, load_trust(), code=ExitCode.UNTRUSTED)
    # By itself, its file is worth nothing either.
    (tmp_path / "old.pub").write_text(OLD.public.to_text())
    trust = load_trust(tmp_path / "old.pub")
    assert "revoked" in refused(read_trusted_manifest, by_old, trust, code=ExitCode.UNTRUSTED)


def test_old_lists_are_refused(folder: Path, tmp_path: Path) -> None:
    first = (folder / KEY_LIST).read_bytes()
    take_list(folder, written(tmp_path, keys(2, trusted=(NEW,), revoked=(OLD,))), now=NOW)
    second = (folder / KEY_LIST).read_bytes()
    said = refused(take_list, folder, written(tmp_path, keys(1)), now=NOW, code=ExitCode.UNTRUSTED)
    assert "version 1" in said
    assert "is older" in said
    other = written(tmp_path, keys(2, trusted=(OLD, NEW)))
    assert "another list" in refused(take_list, folder, other, now=NOW, code=ExitCode.UNTRUSTED)
    assert (folder / KEY_LIST).read_bytes() == second != first
    path = tmp_path / "again.json"
    path.write_bytes(second)
    assert take_list(folder, path, now=NOW).version == 2, "the same list is taken as often as it comes"


def test_a_list_that_has_ended_installs_nothing_and_stops_nothing(folder: Path, tmp_path: Path) -> None:
    path, trust = signed_by(OLD, tmp_path / "a"), load_trust()
    keyid, later = OLD.public.keyid, NOW + timedelta(days=91)
    trust.require(keyid, "net", now=NOW + timedelta(days=90))
    assert "expired" in refused(trust.require, keyid, "net", now=later, code=ExitCode.UNTRUSTED)
    trust.require(keyid, "net", expired_ok=True, now=later)
    read_trusted_manifest(path, trust, expired_ok=True)
    # Nor does a clock of another year make it good again.
    past = NOW - timedelta(days=366)
    assert "clock" in refused(trust.require, keyid, "net", now=past, code=ExitCode.UNTRUSTED)
    assert "expired" in refused(
        take_list, folder, written(tmp_path, keys(2, days=1)), now=later, code=ExitCode.UNTRUSTED
    )
    assert "clock" in refused(take_list, folder, written(tmp_path, keys(2)), now=past, code=ExitCode.UNTRUSTED)


@pytest.mark.parametrize(
    ("change", "signers", "says"),
    [
        ({}, (STRANGE,), "signed by 0 of the root keys"),
        ({}, (OLD,), "signed by 0"),
        ({"roots": (ROOT_2,)}, (ROOT_2,), "root 1"),
        ({"roots": (ROOT_2,)}, (ROOT,), "root 2"),
        ({"roots": (ROOT, ROOT_2), "threshold": 2}, (ROOT,), "signed by 1"),
    ],
)
def test_who_has_to_sign_the_next_list(
    folder: Path, tmp_path: Path, change: dict[str, Any], signers: tuple[SigningKey, ...], says: str
) -> None:
    path = written(tmp_path, keys(2, **change), *signers)
    assert says in refused(take_list, folder, path, now=NOW, code=ExitCode.UNTRUSTED)
    assert take_list(folder, written(tmp_path, keys(1)), now=NOW).version == 1


def test_roots_change_by_the_old_ones_and_the_new(folder: Path, tmp_path: Path) -> None:
    both = written(tmp_path, keys(2, roots=(ROOT_2, ROOT_3), threshold=2), ROOT, ROOT_2, ROOT_3)
    take_list(folder, both, now=NOW)
    third = keys(3, roots=(ROOT_2, ROOT_3), threshold=2)
    assert "signed by 0" in refused(take_list, folder, written(tmp_path, third, ROOT), now=NOW, code=ExitCode.UNTRUSTED)
    assert "signed by 1" in refused(
        take_list, folder, written(tmp_path, third, ROOT, ROOT_2), now=NOW, code=ExitCode.UNTRUSTED
    )
    take_list(folder, written(tmp_path, third, ROOT_2, ROOT_3), now=NOW)
    # Two signatures of one root are one.
    doubled = sign_list(keys(4, roots=(ROOT_2, ROOT_3), threshold=2), ROOT_2)
    twice = SignedList(doubled.keys, doubled.payload, doubled.signatures * 2)
    (tmp_path / "twice.json").write_bytes(twice.to_bytes())
    assert "form" in refused(take_list, folder, tmp_path / "twice.json", now=NOW, code=ExitCode.UNTRUSTED)


def test_a_root_that_has_expired_or_was_revoked_signs_no_list(tmp_path: Path) -> None:
    ending = SigningKey(dataclasses.replace(ROOT.public, expires=TODAY), ROOT.sign)
    place = tmp_path / "new"
    take_list(place, written(tmp_path, keys(roots=(ending,)), ending), [ending.public], NOW)
    second = written(tmp_path, keys(2, roots=(ending,)), ending)
    said = refused(take_list, place, second, now=NOW + timedelta(days=1), code=ExitCode.UNTRUSTED)
    assert "signed by 0" in said
    assert "expired on 2026-11-30" in said
    take_list(place, second, now=NOW)
    gone = dataclasses.replace(ROOT.public, revoked=True)
    first = written(tmp_path, keys())
    assert "was revoked" in refused(take_list, tmp_path / "other", first, [gone], NOW, code=ExitCode.UNTRUSTED)


def test_the_first_list_needs_a_root_that_somebody_brought(tmp_path: Path) -> None:
    place, path = tmp_path / "new", written(tmp_path, keys())
    assert "--root" in refused(take_list, place, path, now=NOW, code=ExitCode.INPUT)
    assert "signed by 0" in refused(take_list, place, path, [ROOT_2.public], NOW, code=ExitCode.UNTRUSTED)
    assert not place.exists()
    take_list(place, path, [ROOT.public], NOW)
    # On a machine that has one, nobody's word goes above it.
    by_other = written(tmp_path, keys(2, roots=(ROOT_2,)), ROOT_2)
    assert "root 1" in refused(take_list, place, by_other, [ROOT_2.public], NOW, code=ExitCode.UNTRUSTED)


def test_a_list_that_was_changed_on_the_device_trusts_nobody(folder: Path) -> None:
    data = (folder / KEY_LIST).read_bytes()
    document = json.loads(data)
    payload = json.loads(base64.b64decode(document["payload"]))
    payload["version"] = 9
    document["payload"] = base64.b64encode(pretty_json(payload)).decode()
    for changed in (pretty_json(document), data[:-2], b"", data + b" "):
        (folder / KEY_LIST).write_bytes(changed)
        refused(load_trust, code=ExitCode.UNTRUSTED)
    (folder / KEY_LIST).write_bytes(data)
    (folder / KEY_LIST).chmod(0o666)
    refused(load_trust, code=ExitCode.UNTRUSTED)


ODD: list[tuple[str, Any, str]] = [
    ("format", 2, "format"),
    ("version", 0, "version"),
    ("version", True, "version"),
    ("version", 1 << 40, "version"),
    ("issued", "2026-13-01", "issued"),
    ("issued", "yesterday", "issued"),
    ("expires", "2025-01-01", "expires before"),
    ("threshold", 2, "needs 2"),
    ("threshold", 0, "threshold"),
    ("roots", [], "needs 1"),
    ("roots", ["x"], "Ed25519"),
    ("keys", [OLD.public.to_text(), OLD.public.to_text()], "each key once"),
    ("keys", ["# note\n" + OLD.public.to_text()], "in the form"),
    ("keys", ["Revoked: yes\n" + OLD.public.to_text()], "in the form"),
    ("keys", [ROOT.public.to_text()], "one key as root"),
    ("keys", [7], "texts"),
    ("revoked", ["x"], "revoked"),
    ("revoked", [OLD.public.keyid], "that it revokes"),
    ("revoked", ["b" * 64, "a" * 64], "sorted"),
    ("more", 1, "form"),
]


@pytest.mark.parametrize(("name", "value", "says"), ODD, ids=[f"{name}={value!r:.20}" for name, value, _ in ODD])
def test_what_a_list_may_not_say(name: str, value: Any, says: str) -> None:
    payload = {**json.loads(sign_list(keys(), ROOT).payload), name: value}
    odd = SignedList(keys(), pretty_json(payload), ()).cosigned(ROOT)
    said = refused(list_from_bytes, odd.to_bytes(), "keys.json", code=ExitCode.UNTRUSTED)
    assert says in said, said


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"\xff", b'{"payload": 1, "payloadType": 2, "signatures": 3}', b"[" * 100_000,
     sign_list(keys(), ROOT).to_bytes().replace(b"keys+json", b"manifest+json"),
     json.dumps(json.loads(sign_list(keys(), ROOT).to_bytes())).encode()],
)  # fmt: skip
def test_files_that_are_no_list(data: bytes) -> None:
    refused(list_from_bytes, data, "keys.json", code=ExitCode.UNTRUSTED)


def test_a_bundle_s_signature_is_none_of_a_list(folder: Path, tmp_path: Path) -> None:
    """What one is signed as, the other is not: DSSE signs the type too."""
    from resvit_engines.keys.signing import envelope_from_manifest, require_signature

    signed = sign_list(keys(2), ROOT)
    as_manifest = json.loads(envelope_from_manifest(signed.payload, ROOT))["signatures"][0]["sig"]
    odd = SignedList(signed.keys, signed.payload, ((ROOT.public.keyid, base64.b64decode(as_manifest)),))
    (tmp_path / "odd.json").write_bytes(odd.to_bytes())
    assert "signed by 0" in refused(take_list, folder, tmp_path / "odd.json", now=NOW, code=ExitCode.UNTRUSTED)
    envelope = pretty_json(
        {"payloadType": "application/vnd.resvit.manifest+json",
         "signatures": [{"keyid": OLD.public.keyid,
                         "sig": base64.b64encode(sign_list(keys(), OLD).signatures[0][1]).decode()}]}
    )  # fmt: skip
    refused(require_signature, sign_list(keys(), OLD).payload, envelope, load_trust(), "net", code=ExitCode.UNTRUSTED)


def test_what_was_installed_stays_until_its_key_is_revoked(folder: Path, tmp_path: Path) -> None:
    device = Device(tmp_path / "root", load_trust())
    device.install(bundle(tmp_path / "1", key=OLD))
    take_list(folder, written(tmp_path, keys(2, trusted=(OLD, NEW))), now=NOW)
    device.trust = load_trust()
    device.install(bundle(tmp_path / "2", b"two", key=NEW, release=2))
    device.rollback()
    device.install(bundle(tmp_path / "2", b"two", key=NEW, release=2))
    take_list(folder, written(tmp_path, keys(3, trusted=(NEW,), revoked=(OLD,))), now=NOW)
    device.trust = load_trust()
    assert "revoked" in refused(device.rollback, code=ExitCode.UNTRUSTED)
    assert device.runs() == b"two"


# The commands


def test_from_the_first_list_to_a_key_that_got_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resvit_engines.keys.public.default_trust_folder", lambda: tmp_path / "nowhere")
    for number, name in enumerate(("root", "second", "release", "next")):
        secret = secret_file(tmp_path / f"{name}.key", bytes([70 + number] * 32))
        assert secret.exists()
        public = signing_key(bytes([70 + number] * 32), name).public
        (tmp_path / f"{name}.pub").write_text(public.to_text())
    release = signing_key(bytes([72] * 32), "release")
    (tmp_path / "device").mkdir(mode=0o700)
    on = ["--trust", "device"]

    def export(line: str, code: int = 0) -> dict[str, Any]:
        assert run_export(["keylist", *line.split(), "--json"]) == code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    def engine(line: str, code: int = 0) -> dict[str, Any]:
        assert run_engine([*line.split(), *on, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    first = export("1.json --root root.key --key release.pub --days 30")
    assert (first["version"], first["signatures_missing"]) == (1, 0)
    assert "--root" in engine("keys 1.json", ExitCode.INPUT)["error"]["fix"]
    assert engine("keys 1.json --root root.pub")["list"]["version"] == 1
    write_bundle(tmp_path / "net.resvit", MANIFEST, FILES, release)
    assert engine("verify net.resvit")["signed_by"]["name"] == "release"

    # One more root, and two have to sign from now on.
    second = export("2.json --after 1.json --root root.key --add-root second.pub --threshold 2 --key next.pub")
    assert second["signatures_missing"] == 1
    assert "signed by 1" in engine("keys 2.json", ExitCode.UNTRUSTED)["error"]["problem"]
    assert export("2.json --cosign --root second.key")["signatures_missing"] == 0
    assert [key["name"] for key in engine("keys 2.json")["keys"]] == ["release", "next"]

    # The key got out.
    export(f"3.json --after 2.json --root root.key --root second.key --revoke {release.public.keyid}")
    assert engine("keys 3.json")["revoked"] == [release.public.keyid]
    assert "revoked" in engine("verify net.resvit", ExitCode.UNTRUSTED)["error"]["problem"]
    assert "is older" in engine("keys 2.json", ExitCode.UNTRUSTED)["error"]["problem"]
    back = export("4.json --after 3.json --root root.key --root second.key --key release.pub", ExitCode.INPUT)
    assert "does not come back" in back["error"]["problem"]
    assert run_engine(["keys", *on]) == 0
    assert "version 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("x.json --root root.key --retire 77", ExitCode.INPUT, "no key with the id"),
        ("x.json --root root.key --revoke 77", ExitCode.INPUT, "is no key id"),
        ("x.json --root root.key --drop-root 77", ExitCode.INPUT, "no root with the id"),
        ("x.json --root root.key --threshold 9", ExitCode.INPUT, "Add roots (--add-root), or lower --threshold"),
        ("x.json --root root.pub", ExitCode.MISSING, "Name the private key, root.key"),
        ("1.json --root root.key", ExitCode.INPUT, "exists already"),
        ("x.json --root root.key --key root.pub", ExitCode.UNTRUSTED, "one key as root"),
        ("x.json --after 1.json --root next.key", ExitCode.INPUT, "is no root of this list"),
        ("x.json --after none.json --root root.key", ExitCode.INPUT, "no file"),
        ("1.json --cosign --root root.key --days 7 --key next.pub", ExitCode.INPUT, "as it is"),
        ("x.json", ExitCode.USAGE, "--root"),
    ],
)
def test_lists_that_are_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("root", "next")):
        secret_file(tmp_path / f"{name}.key", bytes([80 + number] * 32))
        (tmp_path / f"{name}.pub").write_text(signing_key(bytes([80 + number] * 32), name).public.to_text())
    assert run_export(["keylist", "1.json", "--root", "root.key", "--key", "next.pub"]) == 0
    capsys.readouterr()
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    before = Path("1.json").read_bytes()
    assert run_export(["keylist", *line.split()]) == code
    assert says in " ".join(capsys.readouterr().err.split())
    assert Path("1.json").read_bytes() == before
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("days", "says"),
    [
        (-9, r"The list of keys expired on .* Nothing that its keys signed is installed until a newer list is taken"),
        (40, r"The list of keys was made on .*, and the clock of this machine says"),
    ],
)
def test_a_list_that_is_not_good_today_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], days: int, says: str
) -> None:
    today = datetime.now(timezone.utc).date()
    (folder / KEY_LIST).write_bytes(written(tmp_path, keys(days=3, issued=today)).read_bytes())
    assert run_engine(["keys", "--trust", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nothing_installs"] is None
    path = written(tmp_path, keys(days=3, issued=today + timedelta(days=days)))
    (folder / KEY_LIST).write_bytes(path.read_bytes())
    for line in (["keys"], ["keys", str(path)]):  # which was taken when it was good
        assert run_engine([*line, "--trust", str(folder)]) == 0
        assert re.search(says, " ".join(capsys.readouterr().out.split()))
        assert run_engine([*line, "--trust", str(folder), "--json"]) == 0
        assert re.search(says, json.loads(capsys.readouterr().out)["nothing_installs"])


def test_the_public_key_of_a_private_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "odd.pub").write_text(STRANGE.public.to_text())
    for fix in ("Name the private key's file", f"Name the private key, {tmp_path / 'odd.key'}"):
        said = refused(load_signing_key, str(tmp_path / "odd.pub"), code=ExitCode.MISSING)
        assert "odd.pub is a public key" in said
        assert fix in said
        secret_file(tmp_path / "odd.key")


def test_a_retired_key_ends_and_what_it_signed_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resvit_engines.keys.writing import Changes, changed_list

    monkeypatch.setattr("resvit_engines.keys.public.default_trust_folder", lambda: tmp_path / "nowhere")
    first = sign_list(keys(), ROOT)
    second = changed_list(
        first, Changes(keys=(NEW.public,), retire=(OLD.public.keyid,)), [ROOT], TODAY, TODAY + timedelta(days=9)
    )
    place = tmp_path / "device"
    take_list(place, written(tmp_path, keys()), [ROOT.public], NOW)
    (tmp_path / "2.json").write_bytes(second.to_bytes())
    take_list(place, tmp_path / "2.json", now=NOW)
    trust, keyid = load_trust(place), OLD.public.keyid
    assert "expired" in refused(trust.require, keyid, "net", now=NOW + timedelta(days=1), code=ExitCode.UNTRUSTED)
    trust.require(keyid, "net", expired_ok=True, now=NOW + timedelta(days=1))


def test_the_same_list_and_keys_give_the_same_bytes() -> None:
    assert sign_list(keys(), ROOT).to_bytes() == sign_list(keys(), ROOT).to_bytes()
    with pytest.raises(ResvitError):
        sign_list(keys(threshold=2), ROOT)
