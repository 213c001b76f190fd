"""One engine for all devices of a kind: the first that needs it builds, the others wait and take it."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.bundle.bundle import sign_bundle, trusted_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, explain_os_errors, make_folder, sha256_bytes, sha256_file
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public import TrustStore, read_public_key
from resvit_engines.machine import Machine
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.remote.job import ENGINE, ENGINE_REPORT, LOG, TIMING
from resvit_export.fleet.release import Package
from resvit_export.fleet.state import Built, FleetState
from resvit_export.fleet.transport import EngineThere, Session

ENGINES = "engines"
_TIMES_THE_BUNDLE = 6
"""Disk that a build takes, by the size of its bundle: the copy, what is unpacked, the engine twice, the new bundle."""


@dataclass(frozen=True)
class Engine:
    """A bundle with an engine, signed by the release's key: its file, its manifest's digest, and how it was built."""

    path: Path
    digest: str
    device: str
    latency_ms: float | None


class Builds:
    """The engines of one release. Its one method may be called by several threads."""

    def __init__(self, state: FleetState, key: SigningKey, reporter: Reporter = SILENT) -> None:
        self._state, self._key, self._reporter = state, key, reporter
        self._folder = state.folder / ENGINES
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def engine_for(self, package: Package, machine: Machine, device: str, session: Session) -> Engine:
        """The engine of a package for a machine: one that is there, or one that this device builds now.

        Engines are shared where GPU, TensorRT, JetPack and processor agree; of processors where ONNX Runtime does.

        Raises:
            ResvitError: what the build raises; UNTRUSTED where what came back is not what was asked for.
        """
        key = build_key(package, machine)
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            found = self._kept(key)
            return found or self._build(key, package, machine, device, session)

    def _kept(self, key: str) -> Engine | None:
        built = self._state.built(key)
        if built is None:
            return None
        path = self._folder / built.file
        if not path.is_file() or sha256_file(path) != built.sha256:
            return None
        return Engine(path, built.digest, built.device, built.latency_ms)

    def _build(self, key: str, package: Package, machine: Machine, device: str, session: Session) -> Engine:
        assert package.path is not None
        require_disk(device, machine, package.bytes * _TIMES_THE_BUNDLE, "Building")
        self._reporter.say(f"{device} builds the engine of {package.name} for all devices like it")
        with explain_os_errors(self._folder):
            make_folder(self._folder)
            with tempfile.TemporaryDirectory(prefix=".build.", suffix=".tmp", dir=self._folder) as scratch:
                there = session.build(package.path, self._key.public.to_text(), Path(scratch))
                path = self._folder / f"{key[:16]}.resvit"
                digest = _signed_anew(there, package, device, self._key, path)
        built = Built(path.name, sha256_file(path), digest, device, there.latency_ms)
        self._state.keep_built(key, built)
        return Engine(path, digest, device, there.latency_ms)


def build_key(package: Package, machine: Machine) -> str:
    """What makes an engine another one: the bundle, and of the machine what engines are bound to."""
    on_cpu = package.on_cpu
    bound = (
        (machine.arch, machine.onnxruntime, machine.processor)
        if on_cpu
        else (machine.arch, machine.sm, machine.tensorrt, machine.rtx, machine.jetpack)
    )
    return sha256_bytes(canonical_json([package.digest, *bound]))


def require_disk(device: str, machine: Machine, needed: int, what: str) -> None:
    """Refuse with SYSTEM, before anything is copied, a device with less disk than ``needed`` bytes and a few more."""
    mib = (needed >> 20) + 64
    if machine.free_disk_mib < mib:
        raise ResvitError(
            f"{what} needs {mib:,} MiB of disk on {device}, and {machine.free_disk_mib:,} MiB are free. Nothing was "
            "copied.",
            "Free some space there, and apply again.",
            ExitCode.SYSTEM,
        )


def _signed_anew(there: EngineThere, package: Package, device: str, key: SigningKey, path: Path) -> str:
    """Write the device's bundle to ``path``, signed by ``key``, where it is the release's with an engine; its digest.

    The device's own signature was made by a key that came over the same connection.
    """
    own = read_public_key(there.bundle.with_suffix(".pub"))
    with trusted_bundle(there.bundle, TrustStore((own,)), expired_ok=True) as bundle:
        assert package.manifest is not None
        _require_same(package, bundle.manifest, device)
        bundle.check()
        digest = bundle.digest
    sign_bundle(there.bundle, key, path)
    return digest


def _require_same(package: Package, built: Manifest, device: str) -> None:
    """Refuse what is more than the release's bundle with an engine: that alone is the device's to make."""
    original = package.manifest
    assert original is not None
    assert package.path is not None

    def bare(manifest: Manifest) -> Manifest:
        return dataclasses.replace(manifest, engine=None, plan=None, built=None, files=())

    signed = {file.path: file.sha256 for file in original.files}
    library = built.engine.plugin_library if built.engine else None
    made = {ENGINE, ENGINE_REPORT, LOG, TIMING, built.engine.layers if built.engine else "", library and library.name}
    other = [file.path for file in built.files if signed.get(file.path) != file.sha256 and file.path not in made]
    from_this = built.built is not None and built.built.bundle == sha256_file(package.path)
    if other or not from_this or built.engine is None or bare(built) != bare(original):
        what = (
            f"another {other[0]}"
            if other
            else "another manifest"
            if from_this
            else "what was built from another bundle"
        )
        raise ResvitError(
            f"{device} sent {what} than it was asked to build an engine for.",
            "Nothing of it was kept. Look at that device by hand: something else writes there, or it is not what it "
            "seems.",
            ExitCode.UNTRUSTED,
        )
