"""Which keys are trusted: one form of key files and of the list of revoked keys, and no in doubt."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import socket
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.keys.guarded import read_small, require_guarded
from resvit_engines.keys.key_file import ATTRIBUTES, LIST_MOST, KeyFile, key_file_from_bytes, revoked_from_bytes
from resvit_engines.keys.public import PublicKey, TrustStore, load_trust, public_key_from_bytes
from test_names import kept_or_refused

DEVICE_PAGE = Path(__file__).parent.parent / "docs/device.md"
RAW, OTHER_RAW = bytes(range(32)), bytes(range(1, 33))
KEY, OTHER = PublicKey(RAW, "release"), PublicKey(OTHER_RAW, "other")
PEM = KEY.to_text().removeprefix("Name: release\n")
SSH = "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0 " + RAW).decode()
WHERE = Path("a.pub")


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RESVIT_TRUST", "SUDO_UID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("resvit_engines.keys.public.default_trust_folder", lambda: tmp_path / "device/keys")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that trusts one key."""
    (tmp_path / "keys").mkdir(mode=0o755)
    (tmp_path / "keys/a.pub").write_text(KEY.to_text())
    return tmp_path / "keys"


def no(function: Callable[..., object], *arguments: object) -> str:
    """The message of a refusal: nothing else than UNTRUSTED may come."""
    with pytest.raises(ResvitError) as caught:
        function(*arguments)
    assert caught.value.code is ExitCode.UNTRUSTED
    return str(caught.value)


known_or_no = functools.partial(kept_or_refused, code=ExitCode.UNTRUSTED)


def trusted(store: TrustStore, key: PublicKey = KEY) -> PublicKey:
    return store.require(key.keyid, "net.resvit")


def read(text: str | bytes) -> PublicKey:
    return public_key_from_bytes(text.encode() if isinstance(text, str) else text, WHERE)


@pytest.mark.parametrize("key", [PEM, SSH + "\n", SSH + " me@desk\n", SSH])
def test_revoked_is_appended_as_the_device_page_says(folder: Path, key: str) -> None:
    """Its own commands: the example of the documents is run."""
    page = DEVICE_PAGE.read_text()
    (folder / "a.pub").write_text(key if key.endswith("\n") else key + "\n")
    assert trusted(load_trust(folder))
    (command,) = re.findall(r"echo 'Revoked: yes' >> (\S+)", page)
    assert command.endswith(".pub")
    with (folder / "a.pub").open("a") as stream:
        stream.write("Revoked: yes\n")
    for where in (folder, folder / "a.pub"):
        assert "revoked: " in no(trusted, load_trust(where))
    # Behind a line without its end it cannot be told, and what cannot be told is no key.
    (folder / "a.pub").write_text(key.rstrip("\n") + "Revoked: yes\n")
    no(load_trust, folder)


def test_the_example_of_the_device_page_reads() -> None:
    block = re.search(r"```\n(Name: .*?Revoked: yes\n)```", DEVICE_PAGE.read_text(), re.DOTALL)
    assert block
    key = read(block[1])
    assert (key.name, key.created, key.expires, key.revoked) == (
        "release 2026", date(2026, 11, 25), date(2027, 11, 25), True,
    )  # fmt: skip
    assert not read(block[1].replace("Revoked: yes\n", "")).revoked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PEM + "Expires: 2020-01-01\n", "Expires behind the key"),
        (PEM + "Name: a\n", "Name behind the key"),
        (PEM + "expires: 2020-01-01\n", "Expires behind the key"),
        ("Expires:\n" + PEM, "no value"),
        ("Expires: \n" + PEM, "no value"),
        ("Name:\n" + PEM, "no value"),
        ("Revoked:\n" + PEM, "no value"),
        (PEM + "Revoked:\n", "no value"),
        ("Expires: 2020-01-01\nExpires: 2099-01-01\n" + PEM, "Expires twice"),
        ("Expires: 2099-01-01\nEXPIRES: 2099-01-01\n" + PEM, "Expires twice"),
        ("Revoked: no\n" + PEM + "Revoked: yes\n", "Revoked twice"),
        (PEM + "Revoked: yes\nRevoked: yes\n", "Revoked twice"),
        ("Expire: 2020-01-01\n" + PEM, "not understood"),
        ("Expires 2020-01-01\n" + PEM, "not understood"),
        (" Expires: 2020-01-01\n" + PEM, "not understood"),
        ("Expires : 2020-01-01\n" + PEM, "not understood"),
        ("Valid-Until: 2020-01-01\n" + PEM, "not understood"),
        (PEM + "Revoke: yes\n", "not understood"),
        (PEM + "revoked\n", "not understood"),
        (PEM.rstrip("\n") + "Revoked: yes\n", "not an Ed25519"),
        ("Revoked: true\n" + PEM, "Write yes or no"),
        ("Revoked: yes, 2026-11-25\n" + PEM, "Write yes or no"),
        ("Expires: 20270101\n" + PEM, "where a date belongs"),
        ("Expires: 2027-W01-1\n" + PEM, "where a date belongs"),
        ("Expires: 2027-02-30\n" + PEM, "where a date belongs"),
        ("Expires: 2027-01-01T00:00\n" + PEM, "where a date belongs"),
        ("Expires: \u0662\u0660\u0662\u0667-01-01\n" + PEM, "where a date belongs"),
        ("Created: 2027-01-02\nExpires: 2027-01-01\n" + PEM, "before it was created"),
        ("\N{ZERO WIDTH NO-BREAK SPACE}" + PEM, "byte order mark"),
        (PEM.replace("\n", "\r\n"), "line ends of Windows"),
        (PEM + "Revoked: yes\r\n", "line ends of Windows"),
        ("Name: a\x1b[2J\n" + PEM, "control characters"),
        ("Name: a\u202eb\n" + PEM, "control characters"),
        (PEM + "\0\0\0", "control characters"),
        ("Name: " + "x" * 201 + "\n" + PEM, "too long"),
        (PEM + PEM, "more than one key"),
        (PEM + OTHER.to_text(), "more than one key"),
        (SSH + "\n" + SSH + "\n", "more than one key"),
        (SSH + "\n" + PEM, "more than one key"),
        (PEM + SSH + "\n", "more than one key"),
        (SSH + " me Expires: 2020-01-01\n", "Expires in the line"),
        (SSH + " " + "x" * 201 + "\n", "longer than"),
        ("cert-authority " + SSH + "\n", "not an Ed25519"),
        (SSH.replace("ssh-ed25519", "ssh-rsa") + "\n", "not an Ed25519"),
        (SSH[:-4] + "\n", "not an Ed25519"),
        ("", "not an Ed25519"),
        ("# " + PEM, "not an Ed25519"),
        (PEM.replace("-----END PUBLIC KEY-----\n", ""), "not an Ed25519"),
        (PEM.replace("MCow", "MCox"), "not an Ed25519"),
        (PublicKey(bytes(32), "z").to_text(), "not an Ed25519"),
        (PublicKey(bytes(31) + b"\x80", "z").to_text(), "not an Ed25519"),
        (b"\xff\xfe".decode("latin-1"), "not an Ed25519"),
    ],
)
def test_a_key_file_has_one_form(text: str, words: str) -> None:
    assert words in no(read, text)


def test_what_a_key_file_may_say_besides() -> None:
    text = f"# From the wiki.\nname: release 2026 \n\nEXPIRES:2027-01-01\nRevoked: No\n{PEM}\n# The end\n\n"
    assert read(text) == PublicKey(RAW, "release 2026", None, date(2027, 1, 1))
    assert read(SSH + "  me@desk ").name == "me@desk"
    assert read(SSH).name == "a"
    assert read("Name: desk\n" + SSH + " me\nrevoked: YES\n") == PublicKey(RAW, "desk", revoked=True)


ATTRIBUTE = st.sampled_from(ATTRIBUTES).flatmap(
    lambda title: st.tuples(
        st.sampled_from((title, title.lower(), title[:-1], " " + title)),
        st.sampled_from((": ", ":", " ", " : ")),
        st.sampled_from(("yes", "no", "2020-01-01", "2999-01-01", "", "robot", "\t", "\r")),
    ).map("".join)
)
LINES = st.lists(st.one_of(ATTRIBUTE, st.sampled_from(("", "# a", *PEM.splitlines(), SSH)), st.text(max_size=20)))


@pytest.mark.whole
@settings(deadline=None)
@given(LINES, LINES, st.sampled_from((PEM, SSH + "\n", SSH + " me\n")))
def test_every_line_of_a_key_file_counts_or_is_refused(before: list[str], behind: list[str], key: str) -> None:
    """No line that looks like an attribute is passed over: what was said is what is known, or there is no key."""
    text = "".join(f"{line}\n" for line in before) + key + "".join(f"{line}\n" for line in behind)
    known = known_or_no(read, text)
    if not isinstance(known, PublicKey):
        return
    said = [line for line in (*before, *behind) if line.strip() and not line.startswith("#")]
    told = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in said}
    assert len(told) == len(said)
    assert set(told) <= {title.lower() for title in ATTRIBUTES}
    assert known.raw == RAW
    assert known.revoked == (told.get("revoked", "no").lower() == "yes")
    assert str(known.expires or "") == told.get("expires", "")
    assert {line.partition(":")[0].lower() for line in behind if line.strip() and line[0] != "#"} <= {"revoked"}


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_key_or_refused(data: bytes) -> None:
    for text in (data, PEM.encode() + data, data + PEM.encode(), SSH.encode() + data):
        known = known_or_no(key_file_from_bytes, text, WHERE)
        assert known is None or (isinstance(known, KeyFile) and len(known.raw) == 32)


@pytest.mark.whole
@settings(deadline=None)
@given(st.text(max_size=300), st.binary(), st.dates(), st.booleans())
def test_what_is_written_reads_again(name: str, seed: bytes, day: date, revoked: bool) -> None:
    raw = hashlib.sha256(seed).digest()
    written = PublicKey(raw, name, day, day, revoked)
    again = read(written.to_text())
    assert (again.raw, again.created, again.expires, again.revoked) == (raw, day, day, revoked)
    assert again.name == " ".join(written.name.split()) or not name.isprintable() or len(name) > 199 or not name.strip()


def test_points_of_small_order_are_all_known() -> None:
    """By the curve itself: eight times each is the neutral element, and no other y has that."""
    from resvit_engines.keys.key_file import _SMALL_ORDER

    p = 2**255 - 19
    d = -121665 * pow(121666, -1, p) % p

    def doubled(x: int, y: int) -> tuple[int, int]:
        t = d * x * x * y * y % p
        return 2 * x * y * pow(1 + t, -1, p) % p, (y * y + x * x) * pow(1 - t, -1, p) % p

    def x_of(y: int) -> int:
        square = (y * y - 1) * pow(d * y * y + 1, -1, p) % p
        x = pow(square, (p + 3) // 8, p)
        return x if x * x % p == square else x * pow(2, (p - 1) // 4, p) % p

    for encoded in _SMALL_ORDER:
        y = int.from_bytes(encoded, "little") % p
        x = x_of(y)
        for _ in range(3):
            x, y = doubled(x, y)
        assert (x, y) == (0, 1)
    assert len(_SMALL_ORDER) == 7


KEYID = KEY.keyid.encode()


@pytest.mark.parametrize(
    "listed",
    [
        KEYID,
        KEYID + b"\n",
        b"# got out\n\n" + KEYID + b"\n",
        b"".join(b"%064x\n" % number for number in range(993)) + KEYID + b"\n",
        b"\n" * 65536 + KEYID + b"\n",
        b"%064x\n" % 1 * 5000 + KEYID + b"\n",
    ],
)
def test_a_list_of_revoked_keys_is_read_to_its_end(folder: Path, listed: bytes) -> None:
    (folder / "revoked").write_bytes(listed)
    for where in (folder, folder / "a.pub"):
        assert "revoked: release" in no(trusted, load_trust(where))


@pytest.mark.parametrize(
    "listed",
    [
        b"",
        b"\n\n",
        b" " + KEYID,
        KEYID + b" ",
        KEYID + b" # got out",
        KEYID[:-1],
        KEYID + b"0",
        KEYID.upper(),
        KEYID + b"," + KEYID,
        KEYID.replace(KEYID[:1], b"g", 1),
        KEYID + b"\r\n",
        b"".join(b"%064x\r\n" % number for number in range(993)) + KEYID + b"\r\n",
        b"\xef\xbb\xbf" + KEYID,
        b"\xff\xfe" + KEYID.decode().encode("utf-16-le"),
        KEYID + b"\0",
        b"\0" * 65,
        b"release\n",
        b"SHA256:abc\n",
        b"%064x\n" % 1 * (LIST_MOST // 65 + 2),
    ],
)
def test_any_other_list_revokes_everything(folder: Path, listed: bytes) -> None:
    (folder / "revoked").write_bytes(listed)
    for where in (folder, folder / "a.pub"):
        assert "revoked" in no(load_trust, where)


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from((KEYID, KEYID.upper(), b"", b"# a")), st.binary(max_size=70))))
def test_every_line_of_a_list_counts_or_is_refused(lines: list[bytes]) -> None:
    keyids = known_or_no(revoked_from_bytes, b"\n".join(lines), WHERE)
    if keyids is None:
        return
    told = b"\n".join(lines).decode().split("\n")
    assert keyids == {line for line in told if line.strip() and not line.startswith("#")}


def as_dangling(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_writable(mode: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(KEY.to_text() if path.suffix else "f" * 64)
        os.chown(path, os.geteuid(), 65534)
        path.chmod(mode)

    return write


def as_strangers(path: Path) -> None:
    path.write_text(KEY.to_text() if path.suffix else "f" * 64)
    os.chown(path, 65534, 65534)


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
ODD = [
    as_dangling, as_loop, as_pipe, as_socket, as_device, Path.mkdir,
    pytest.param(as_writable(0o666), id="writable by all"),
    pytest.param(as_writable(0o664), id="writable by a group", marks=AS_ROOT),
    pytest.param(as_strangers, id="another user's", marks=AS_ROOT),
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["revoked", "b.pub"])
def test_a_key_or_list_that_is_no_file_of_ours_is_refused(folder: Path, odd: Callable[[Path], None], name: str) -> None:
    assert trusted(load_trust(folder))
    odd(folder / name)
    assert name in no(load_trust, folder)
    if name == "revoked":
        assert name in no(load_trust, folder / "a.pub")
    elif not (folder / name).is_dir():
        assert name in no(load_trust, folder / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_list_that_may_not_be_read_is_refused(folder: Path) -> None:
    (folder / "revoked").write_text(KEY.keyid)
    (folder / "revoked").chmod(0)
    assert "revoked" in no(load_trust, folder)


@pytest.mark.parametrize("name", ["Revoked", "REVOKED", "revoked.txt", "revoked.old", "revoked.pub"])
def test_a_list_under_another_name_is_not_passed_over(folder: Path, name: str) -> None:
    (folder / name).write_text(KEY.to_text())
    assert name in no(load_trust, folder)


def test_a_file_by_itself_honours_every_list_beside_it(folder: Path, tmp_path: Path) -> None:
    (folder / "revoked").write_text(KEY.keyid)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.pub").symlink_to(folder / "a.pub")
    assert "revoked" in no(trusted, load_trust(tmp_path / "elsewhere/link.pub"))
    (folder / "revoked").unlink()
    assert trusted(load_trust(tmp_path / "elsewhere/link.pub"))
    (tmp_path / "elsewhere/revoked").write_text(KEY.keyid)
    assert "revoked" in no(trusted, load_trust(tmp_path / "elsewhere/link.pub"))
    assert trusted(load_trust(folder))


@pytest.mark.parametrize("by", ["list", "file", "variable"])
def test_what_this_machine_revoked_is_so_under_any_name(
    folder: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job on a device trusts the one key that came with it: not where the device has withdrawn it."""
    own = tmp_path / "device/keys"
    if by == "variable":
        own = tmp_path / "named"
        monkeypatch.setenv("RESVIT_TRUST", str(own))
    own.mkdir(parents=True)
    assert trusted(load_trust(folder / "a.pub"))
    if by == "file":
        (own / "a.pub").write_text(PublicKey(RAW, "a", revoked=True).to_text())
    else:
        (own / "revoked").write_text(KEY.keyid)
    for where in (folder, folder / "a.pub"):
        assert "revoked" in no(trusted, load_trust(where))
    (own / "revoked").write_text("doubtful")
    assert "no key id" in no(load_trust, folder)


def test_folders_that_others_can_change(folder: Path, tmp_path: Path) -> None:
    for place in (folder, tmp_path):
        before = place.stat().st_mode
        place.chmod(0o777)
        for where in (folder, folder / "a.pub"):
            assert "Anyone on this machine" in no(load_trust, where)
        place.chmod(before)
    folder.chmod(0o1777)  # nobody else renames a file there, but everybody can add one
    assert "Anyone on this machine" in no(load_trust, folder)
    assert trusted(load_trust(folder / "a.pub"))


@AS_ROOT
def test_folders_of_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(folder, 65534, 65534)
    assert "another user (nobody)" in no(load_trust, folder)
    monkeypatch.setenv("SUDO_UID", "65534")
    assert trusted(load_trust(folder))
    folder.chmod(0o775)
    assert "Others in its group" in no(require_guarded, folder)


def test_a_small_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_small(tmp_path / "a", 100)[0] == b"x" * 100
    assert "longer than" in no(read_small, tmp_path / "a", 99)
    no(read_small, tmp_path / "gone", 99)
    no(read_small, Path("a\0b"), 99)
