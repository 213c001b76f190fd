"""Which mode every file has that is written, whatever the umask: the rule of docs/device.md."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.files import atomic_directory, make_folder, write_atomic
from resvit_engines.install.install import install_bundle, rollback
from resvit_engines.keys.own import own_key
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public import load_trust
from resvit_engines.machine import Machine
from resvit_engines.targets.table import find_target

MACHINE = Machine(
    sm=89, gpu="L4", tensorrt=None, jetpack=None, arch="x86_64", memory_mib=1 << 20, free_disk_mib=1 << 20,
    python="3.10.12", rtx="1.7.1.116",
)  # fmt: skip
UMASKS = [0o000, 0o002, 0o022, 0o027, 0o077]
FOLDER, FILE = 0o755, 0o644


@pytest.fixture(params=UMASKS, ids=lambda mask: f"{mask:04o}")
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> SigningKey:
    """This machine's own, made under that umask."""
    monkeypatch.delenv("RESVIT_TRUST", raising=False)
    monkeypatch.setattr("resvit_engines.keys.own.default_trust_folder", lambda: tmp_path / "etc/resvit/keys")
    monkeypatch.setattr("resvit_engines.keys.public.default_trust_folder", lambda: tmp_path / "etc/resvit/keys")
    return own_key()


def modes(root: Path) -> dict[str, int]:
    """The modes of all below a folder and of it, by relative path; links have none of their own."""
    paths = [root, *(path for path in root.rglob("*") if not path.is_symlink())]
    return {path.relative_to(root).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in paths}


def install(tmp_path: Path, key: SigningKey, content: bytes, release: int) -> Path:
    path = tmp_path / f"{release}.resvit"
    files: dict[str, Path | bytes] = {"model.onnx": content, "data/deep/golden.npy": b"golden"}
    write_bundle(path, Manifest("net", release, find_target("rtx-4090")), files, key)
    trust = load_trust()
    root = tmp_path / "var/lib/resvit"
    install_bundle(path, root, trust, check=lambda *_: None, machine=MACHINE)
    return root


@pytest.mark.whole
def test_an_installation_has_the_same_modes_whatever_the_umask(tmp_path: Path, key: SigningKey) -> None:
    for release, content in enumerate((b"one", b"two", b"two", b"three"), 1):
        root = install(tmp_path, key, content, release)
        found = modes(root)
        assert found.pop("net/.lock") == 0o600
        for path, mode in found.items():
            assert mode == (FOLDER if (root / path).is_dir() else FILE), path
    rollback(root, "net", load_trust(), check=lambda *_: None)
    found = modes(tmp_path / "var")
    assert {found[path] for path in (".", "lib", "lib/resvit", "lib/resvit/net/versions")} == {FOLDER}
    assert found["lib/resvit/net/state.json"] == FILE


def test_what_an_older_version_left_to_the_umask_is_mended(tmp_path: Path, key: SigningKey) -> None:
    root = install(tmp_path, key, b"one", 1)
    for path in (root / "net", *(root / "net").rglob("*")):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o666)
    root.chmod(0o700)
    install(tmp_path, key, b"one", 1)
    found = modes(root)
    assert found.pop(".") == 0o700, "a root that exists keeps its mode"
    found.pop("net/.lock")
    assert set(found.values()) == {FOLDER, FILE}


def test_keys_have_their_modes(tmp_path: Path, key: SigningKey) -> None:
    found = modes(tmp_path / "etc")
    assert found["resvit/own.key"] == 0o600
    assert found["resvit/keys/own.pub"] == FILE
    assert found["resvit"] == found["resvit/keys"] == FOLDER
    assert load_trust().require(key.public.keyid, "it") == key.public


def test_nothing_is_written_that_everybody_may_change(tmp_path: Path, umask: int) -> None:
    with atomic_directory(tmp_path / "run/stage") as partial:
        (partial / "sub").mkdir()
        (partial / "sub/a").write_bytes(b"a")
        (partial / "b").write_bytes(b"b")
    write_atomic(tmp_path / "run/more/file", b"c")
    make_folder(tmp_path / "run/x/y/z")
    for path, mode in modes(tmp_path / "run").items():
        full = 0o777 if (tmp_path / "run" / path).is_dir() else 0o666
        assert mode == full & ~umask & ~0o002, path


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    make_folder(tmp_path / "a/b", 0o755)
    make_folder(tmp_path / "a", 0o755)
    assert modes(tmp_path / "a") == {".": 0o700, "b": 0o755}
    (tmp_path / "a/file").touch()
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "a/file")
