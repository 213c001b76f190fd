"""What decides who is trusted, mutated for as long as one likes: key files, lists of revoked keys, signatures, names.

    python benchmarks/trust_faults.py --seconds 60

Every mutant is read, or refused with one kind of error. A key that was withdrawn or has ended stays so: a mutant of its
file that is read as a good key must be one whose attributes really say so. ``tests/test_trusted_keys.py`` and
``tests/test_names.py`` run samples of the same.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import click
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from machine import write_result

from resvit_engines.bundle.manifest import Manifest, check_names, manifest_from_bytes
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.keys.key_file import ATTRIBUTES, revoked_from_bytes
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public import PublicKey, TrustStore, public_key_from_bytes
from resvit_engines.keys.signing import envelope_from_manifest, require_signature
from resvit_engines.names import is_relative_path
from resvit_engines.targets.table import find_target

SECRET = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RAW = SECRET.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
KEY = PublicKey(RAW, "release", date(2024, 1, 1), date(2025, 1, 1), revoked=True)
SIGNING = SigningKey(KEY, SECRET.sign)
MANIFEST = pretty_json(Manifest("net", target=find_target("l4")).to_json())
WHERE = Path("a.pub")
PIECES = (
    *(f"{title}: ".encode() for title in ATTRIBUTES), b"yes", b"no", b"\n", b"\r\n", b"\0", b"#", b" ", b":",
    b"\xef\xbb\xbf", b"-----BEGIN PUBLIC KEY-----\n", b"-----END PUBLIC KEY-----\n", b"ssh-ed25519 ", b"2099-01-01",
    b"../", b"\\", b"\x1b[2J", "\u202e".encode(), b'"', b"{", b"[" * 100, KEY.keyid.encode(),
)  # fmt: skip


def mutant(data: bytes, dice: random.Random) -> bytes:
    """``data`` with up to four places changed: a byte, a piece put in, a stretch left out, doubled or moved."""
    for _ in range(dice.randint(1, 4)):
        at, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        data = dice.choice(
            (
                data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :],
                data[:at] + dice.choice(PIECES) + data[at:],
                data[:at] + data[end:],
                data[:end] + data[at:],
                data[:at] + data[end:] + data[at:end],
                data + dice.choice(PIECES) + dice.choice(PIECES),
            )
        )[: 1 << 16]
    return data


def read_key(data: bytes) -> None:
    """A key that reads as good says so in lines of its own, and the file says it nowhere otherwise."""
    key = public_key_from_bytes(data, WHERE)
    lines = [line.split(b":", 1) for line in data.split(b"\n") if b":" in line and not line.startswith(b"#")]
    said = {title.strip().lower(): value.strip() for title, value in lines}
    assert key.revoked == (said.get(b"revoked", b"no").lower() == b"yes"), data
    assert str(key.expires or "").encode() == said.get(b"expires", b""), data


def read_list(data: bytes) -> None:
    """Every line of a list that reads is a key id that is revoked."""
    keyids = revoked_from_bytes(data, WHERE)
    told = [line for line in data.decode().split("\n") if line.strip() and not line.startswith("#")]
    assert keyids == set(told), data


def read_signature(data: bytes) -> None:
    """No mutant of an envelope holds but one with the very signature, in the one form, beside others at most."""
    require_signature(MANIFEST, data, TrustStore((PublicKey(RAW, "release"),)), "it")
    true = json.loads(envelope_from_manifest(MANIFEST, SIGNING))
    document = json.loads(data)
    assert true["signatures"][0] in document["signatures"], data
    assert set(document) == set(true), data


def read_manifest(data: bytes) -> None:
    """A manifest that reads has a name and files that stay in their folder."""
    manifest = manifest_from_bytes(data, "it")
    assert manifest.name is None or is_relative_path(manifest.name), data
    check_names([file.path for file in manifest.files], "it")


READERS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "key file": (read_key, KEY.to_text().encode()),
    "list of revoked keys": (read_list, f"# got out\n{KEY.keyid}\n{'f' * 64}\n".encode()),
    "signature": (read_signature, envelope_from_manifest(MANIFEST, SIGNING)),
    "manifest": (read_manifest, MANIFEST),
}


def attack(seconds: float, seed: int) -> dict[str, dict[str, int]]:
    """Read mutants of each for a share of the time; how many were read and refused."""
    ended: dict[str, dict[str, int]] = {}
    for name, (reader, seed_data) in READERS.items():
        dice, counts = random.Random(f"{seed} {name}"), Counter[str]()
        until = time.monotonic() + seconds / len(READERS)
        while time.monotonic() < until:
            try:
                reader(mutant(seed_data, dice))
                code = ExitCode.OK
            except ResvitError as error:
                code = error.code
            assert code in (ExitCode.OK, ExitCode.UNTRUSTED, ExitCode.INPUT)
            counts["read" if code is ExitCode.OK else "refused"] += 1
        ended[name] = dict(counts)
    return ended


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="For all readers together.")
@click.option("--seed", default=0, show_default=True, help="Of the mutants.")
def main(seconds: float, seed: int) -> None:
    """Mutate key files, lists, signatures and manifests, and write how many were read and refused."""
    result = attack(seconds, seed)
    for name, counts in result.items():
        click.echo(f"{name}: {counts}")
    write_result("trust_faults", {"seconds": seconds, "seed": seed, "ended": result})


if __name__ == "__main__":
    main()
