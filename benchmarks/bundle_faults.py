"""Everything that can go wrong with a bundle between its maker and a running device, tried in full.

    python benchmarks/bundle_faults.py

- every bit of every byte of a small signed bundle flipped, every byte complemented or left out, and the bundle cut at
  every length: each must be refused with a message, before anything of it is used;
- an installation killed (SIGKILL) at random moments, killed before every single step that it takes on the disk, and the
  same with everything lost that was not flushed by then, as when power fails: ``current`` must be the old or the new
  version, whole, and the next installation must succeed and leave nothing behind;
- an installation onto disks of every size too small for it.

``tests/test_install_faults.py`` runs samples of the same.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from machine import write_result

from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.unpacked import read_trusted_folder
from resvit_engines.bundle.zip_layout import Member, directory, local_header
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.install.install import install_bundle
from resvit_engines.install.state import current_version, read_state
from resvit_engines.keys.private import load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey, TrustStore, load_trust
from resvit_engines.machine import Machine
from resvit_engines.targets.table import find_target

NAME = "net"
MACHINE = Machine(
    sm=89, gpu="L4", tensorrt=None, jetpack=None, arch="x86_64", memory_mib=1 << 20, free_disk_mib=1 << 20,
    python="3.10.12", rtx="1.7.1.116",
)  # fmt: skip
REFUSALS = (ExitCode.INPUT, ExitCode.UNTRUSTED)
DIED = 77
STEPS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "os.link", "os.truncate"}


@dataclass(frozen=True)
class Bench:
    """A folder with keys, two signed versions of one model, and a root to install them under."""

    folder: Path

    @property
    def root(self) -> Path:
        """Where versions are installed."""
        return self.folder / "root"

    @property
    def trust(self) -> TrustStore:
        """The one key that is trusted."""
        return load_trust(self.folder / "keys")

    def bundle(self, version: int) -> Path:
        """The bundle of version 1 or 2."""
        return self.folder / f"{version}.resvit"

    def install(self, bundle: Path, calls: list[Path] | None = None) -> None:
        """Install with a check of golden outputs that only notes that it was called."""
        noted: list[Path] = [] if calls is None else calls
        install_bundle(bundle, self.root, self.trust, check=lambda at, _: noted.append(at), machine=MACHINE)

    def current(self) -> int:
        """The release that runs; raises where ``current`` is not a whole version, by signature and digests."""
        model = self.root / NAME
        version = current_version(model)
        assert version is not None
        read_state(model)
        found = read_trusted_folder(model / "current", self.trust)
        assert found.digest.startswith(version[:12])
        return int(found.manifest.other["number"])

    def forget_others(self) -> None:
        """Remove all versions but the current one, so that the other must be unpacked again."""
        model = self.root / NAME
        for path in (model / "versions").iterdir():
            if path.name != current_version(model):
                shutil.rmtree(path)

    def leftovers(self) -> list[str]:
        """Names of what an installation made for itself and did not remove."""
        return [path.name for path in (self.root / NAME).rglob("*") if path.name.endswith(".tmp")]


def prepared(folder: Path, payload: int = 200) -> Bench:
    """Make keys and two versions with ``payload`` bytes of engine, and install the first."""
    bench = Bench(folder)
    make_key_pair(folder / "release.key", folder / "keys" / "release.pub", lambda raw: PublicKey(raw, "release"))
    key = load_signing_key(str(folder / "release.key"))
    for version in (1, 2):
        files: dict[str, Path | bytes] = {
            "engine.plan": random.Random(version).randbytes(payload),
            "golden/input.npy": bytes(range(64)),
            "empty": b"",
        }
        write_bundle(
            bench.bundle(version), Manifest(NAME, target=find_target("rtx-4090"), other={"number": version}), files, key
        )
    bench.install(bench.bundle(1))
    return bench


def damaged(data: bytes, offsets: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """The bundle with every bit at ``offsets`` flipped, the byte complemented, left out, and all from it on cut off."""
    for at in offsets:
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            yield "flipped", data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
        yield "left out", data[:at] + data[at + 1 :]
        yield "cut", data[:at]


def forged(bundle: Path, every: int) -> Iterator[tuple[str, bytes]]:
    """The bundle with each ``every``-th byte of its members changed in turn, and the zip's own checksums right."""
    with zipfile.ZipFile(bundle) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for name, data in contents.items():
        for at in range(0, len(data), every):
            for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
                changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
                yield f"forged {name}", zip_from_contents({**contents, name: changed})


def zip_from_contents(contents: dict[str, bytes]) -> bytes:
    """A zip in the very layout of bundles."""
    members = [Member(name, len(data), zlib.crc32(data)) for name, data in contents.items()]
    parts = [local_header(member) + contents[member.name] for member in members]
    return b"".join([*parts, directory(members)])


def refuse_all(bench: Bench, every: int = 1) -> dict[str, Any]:
    """Try to install bundles damaged and forged at each ``every``-th byte; raises for one that is not refused."""
    data = bench.bundle(2).read_bytes()
    bad = bench.folder / "bad.resvit"
    refused: dict[str, Counter[str]] = {}
    for kind, changed in (*damaged(data, range(0, len(data), every)), *forged(bench.bundle(2), every)):
        bad.write_bytes(changed)
        calls: list[Path] = []
        error = _refusal(bench, bad, calls)
        assert error is not None, f"installed a bundle that was {kind}"
        assert error.code in REFUSALS, error
        assert error.problem
        assert error.fix
        assert not calls, f"used a bundle that was {kind}"
        refused.setdefault(kind, Counter())[error.code.name] += 1
    assert bench.current() == 1
    assert len(list((bench.root / NAME / "versions").iterdir())) == 1
    return {"bundle_bytes": len(data), **{kind: dict(codes) for kind, codes in refused.items()}}


def _refusal(bench: Bench, bundle: Path, calls: list[Path]) -> ResvitError | None:
    try:
        bench.install(bundle, calls)
    except ResvitError as error:
        return error
    return None


def child(bench: Bench, version: int, step: int = 0, *, lose: bool = False) -> list[str]:
    """The command line of an installation that dies before its ``step``-th step on the disk, if that is not 0."""
    return [sys.executable, __file__, "--child", str(bench.folder), str(version), str(step), str(int(lose))]


def kill_at_random(bench: Bench, times: int, seed: int) -> Counter[str]:
    """Kill installations of the version that does not run at random moments; returns how often which one ran then."""
    dice, ended = random.Random(seed), Counter[str]()
    seconds = _seconds_of_one(bench)
    for _ in range(times):
        before = bench.current()
        bench.forget_others()
        process = subprocess.Popen(child(bench, 3 - before), stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it is imported, and begins
        time.sleep(dice.uniform(0, 1.1 * seconds))
        process.kill()
        process.wait()
        process.stdout.close()
        after = bench.current()
        ended["finished" if process.returncode == 0 else "old" if after == before else "new"] += 1
    bench.install(bench.bundle(3 - bench.current()))
    assert not bench.leftovers()
    return ended


def die_at_steps(bench: Bench, steps: Iterable[int], *, lose: bool) -> Counter[str]:
    """Install the version that does not run, dying before each of ``steps``; ends at a step that is not reached."""
    ended = Counter[str]()
    before = bench.current()
    for step in steps:
        bench.forget_others()
        done = subprocess.run(child(bench, 3 - before, step, lose=lose), capture_output=True, text=True, check=False)
        assert done.returncode in (0, DIED), done.stderr
        after = bench.current()
        bench.install(bench.bundle(before))
        assert bench.current() == before
        assert not bench.leftovers()
        if done.returncode == 0:
            break
        ended["old" if after == before else "new"] += 1
    return ended


def fill_disk(bench: Bench, spaces: Iterable[int]) -> Counter[str]:
    """Install onto disks that hold the other version and have ``spaces`` KiB free; needs a mount namespace."""
    ended = Counter[str]()
    script = (
        'set -e; mount -t tmpfs -o size=64m tmpfs "$2"; cp -a "$3" "$2"; used=$(df -k "$2" | awk \'END {print $3}\'); '
        'mount -o remount,size=$((used + $1))k "$2"; shift 3; exec "$@"'
    )
    for space in spaces:
        with tempfile.TemporaryDirectory() as mount:
            inside = Bench(Path(mount) / bench.folder.name)
            command = ["unshare", "-rm", "sh", "-c", script, "sh", str(space), mount, str(bench.folder)]
            done = subprocess.run([*command, *child(inside, 2, -1)], capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        ended[done.stdout.strip().splitlines()[-1]] += 1
    return ended


def _seconds_of_one(bench: Bench) -> float:
    bench.forget_others()
    start = time.monotonic()
    bench.install(bench.bundle(3 - bench.current()))
    return time.monotonic() - start


def _child(folder: Path, version: int, step: int, lose: bool) -> None:
    bench = Bench(folder)
    if step == -1:
        _report(bench, version)
        return
    bench.trust.require(bench.trust.keys[0].keyid, "this")
    if step:
        _die_before(step, str(bench.root), lose=lose)
    sys.stdout.write("begin\n")
    sys.stdout.flush()
    bench.install(bench.bundle(version))


def _report(bench: Bench, version: int) -> None:
    try:
        bench.install(bench.bundle(version))
        said = "installed"
    except ResvitError as error:
        said = f"refused: {error.code.name}{', disk is full' if 'disk is full' in error.problem else ''}"
    left = "" if not bench.leftovers() else ", with leftovers"
    sys.stdout.write(f"{said}; runs {bench.current()}{left}\n")


def _die_before(step: int, root: str, *, lose: bool) -> None:
    """End the process before its ``step``-th operation below ``root``; ``lose`` also what was written, not flushed."""
    taken, dirty = 0, set[int]()
    flush = os.fsync

    def die() -> NoReturn:
        if lose:
            for at, _, files in os.walk(root):
                for name in files:
                    info = os.lstat(f"{at}/{name}")
                    if info.st_ino in dirty and stat.S_ISREG(info.st_mode):
                        handle = os.open(f"{at}/{name}", os.O_WRONLY)
                        os.ftruncate(handle, 0)
        os._exit(DIED)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal taken
        if event not in STEPS or taken < 0 or not any(str(value).startswith(root) for value in arguments[:2]):
            return
        taken += 1
        if taken == step:
            taken = -1
            die()

    def flushed(handle: int) -> None:
        count("open", (root,))
        flush(handle)
        dirty.discard(os.fstat(handle).st_ino)

    opened = os.open

    def noted(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        handle = opened(path, flags, *rest, **named)
        if flags & (os.O_WRONLY | os.O_RDWR):
            dirty.add(os.fstat(handle).st_ino)
        return handle

    import io
    import pathlib

    plain = io.open

    def noted_stream(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        stream = plain(file, mode, *rest, **named)
        if set(mode) & set("wxa+"):
            dirty.add(os.fstat(stream.fileno()).st_ino)
        return stream

    # Everything that writes goes through these: pathlib, tempfile and the os module itself.
    os.fsync, os.open, io.open = flushed, noted, noted_stream  # type: ignore[assignment]
    pathlib.io.open = noted_stream  # type: ignore[attr-defined]
    sys.addaudithook(count)


@click.command()
@click.option("--kills", default=200, show_default=True, help="Installations killed at random moments.")
@click.option("--child", "as_child", nargs=4, hidden=True)
def main(kills: int, as_child: tuple[str, str, str, str] | None) -> None:
    """Run everything and keep the result."""
    if as_child:
        folder, version, step, lose = as_child
        _child(Path(folder), int(version), int(step), lose == "1")
        return
    with tempfile.TemporaryDirectory(prefix="bundle-faults-") as at:
        start = time.monotonic()
        small = prepared(_new(at, "small"))
        result: dict[str, Any] = {"damage": refuse_all(small)}
        click.echo(json.dumps(result))
        result["died_before_every_step"] = dict(die_at_steps(small, range(1, 10_000), lose=False))
        result["and_lost_what_was_not_flushed"] = dict(die_at_steps(small, range(1, 10_000), lose=True))
        click.echo(json.dumps(result))
        result["killed_at_random"] = dict(kill_at_random(prepared(_new(at, "large"), 20 << 20), kills, 0))
        click.echo(json.dumps(result))
        disks = prepared(_new(at, "disks"), 100 << 10)
        result["disks_too_small"] = dict(fill_disk(disks, range(0, 160, 4)))
        result["seconds"] = round(time.monotonic() - start, 1)
    click.echo(json.dumps(result))
    click.echo(f"kept in {write_result('bundle_faults', result)}")


def _new(at: str, name: str) -> Path:
    folder = Path(at) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
