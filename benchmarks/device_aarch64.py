"""The slim wheel on an aarch64 Python under qemu-user: installed by pip, importing, verifying and refusing a bundle.

Needs root, Debian, a network and qemu-user-static. The aarch64 Python is unpacked into a folder of its own; nothing
of it is installed on this machine.

    apt-get install qemu-user-static && dpkg --add-architecture arm64 && apt-get update
    python benchmarks/device_aarch64.py
"""

from __future__ import annotations

import argparse
import ensurepip
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import write_result

from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.keys.private import load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey
from resvit_engines.machine import Machine
from resvit_engines.records import record_from_bytes
from resvit_engines.remote.wheel import write_device_wheel
from resvit_engines.remote.wheelhouse import download_wheels
from resvit_engines.targets.table import find_target

_PACKAGES = (
    *("python3", "python3-minimal", "libc6", "zlib1g", "libexpat1", "libssl3", "libffi8", "liblzma5", "libbz2-1.0"),
    *("libuuid1", "libgcc-s1", "libstdc++6", "libsqlite3-0"),
)


class Emulated:
    """An aarch64 Python: ``root`` is the system that it sees, ``site`` what pip installs into."""

    def __init__(self, folder: Path) -> None:
        self.root, self.site = folder / "root", folder / "site"
        self.python = self._unpacked(folder / "packages")

    def run(self, *arguments: str, path: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the Python, with ``path`` (``site`` unless given) as its only packages."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.site.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["qemu-aarch64-static", "-L", str(self.root), str(self.python), *arguments],
            env={**environment, "PYTHONPATH": path or str(self.site)},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            sys.exit(f"{' '.join(arguments[:3])} ended with {done.returncode}:\n{done.stderr}")
        return done

    def _unpacked(self, packages: Path) -> Path:
        packages.mkdir(parents=True)
        found = subprocess.run(
            ["apt-cache", "depends", "python3:arm64"], capture_output=True, text=True, check=True
        ).stdout  # the versioned packages, such as python3.11
        versioned = next(word for word in found.split() if word.startswith("python3.") and word.endswith(":arm64"))
        version = versioned.removesuffix(":arm64")
        names = [version, f"{version}-minimal", f"lib{version}-minimal", f"lib{version}-stdlib", *_PACKAGES[2:]]
        command = ["apt-get", "download", "-qq", *(f"{name}:arm64" for name in names)]
        subprocess.run(command, cwd=packages, check=True, stderr=subprocess.DEVNULL)
        for package in packages.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, self.root], check=True)
        return self.root / "usr/bin" / version


def signed_bundle(folder: Path) -> Path:
    """A small bundle for a Jetson Orin, with its key beside it."""
    make_key_pair(folder / "release.key", folder / "release.pub", lambda raw: PublicKey(raw, "release"))
    np.save(folder / "golden_input.npy", np.zeros((1, 1, 12, 12), np.float32))
    manifest = Manifest("small", target=find_target("jetson-orin"))
    files = {"golden_input.npy": folder / "golden_input.npy", "model.onnx": b"\x00" * 100_000}
    write_bundle(folder / "small.resvit", manifest, files, load_signing_key(str(folder / "release.key")))
    return folder / "small.resvit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="Work in this new folder and keep it.")
    options = parser.parse_args()
    if shutil.which("qemu-aarch64-static") is None:
        sys.exit("qemu-aarch64-static is not installed: apt-get install qemu-user-static")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="resvit-aarch64-"))
    try:
        device = Emulated(folder)
        wheel = write_device_wheel(folder)
        printed = device.run("-m", "resvit_engines.machine", path=str(wheel)).stdout
        machine = Machine.from_json(record_from_bytes(printed.encode(), "the emulated device"))
        download_wheels(machine, folder / "wheels")
        pip = next((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
        begin = time.monotonic()
        device.run(
            *("-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(folder / "wheels")),
            *("--target", str(device.site), str(wheel)),
            path=str(pip),
        )
        print(f"{machine.arch}, Python {machine.python}: {wheel.name} installed in {time.monotonic() - begin:.0f} s")
        versions = device.run("-c", "import numpy, cryptography; print(numpy.__version__, cryptography.__version__)")
        print(f"numpy, cryptography: {versions.stdout.strip()}")
        bundle = signed_bundle(folder)
        verify = ("-m", "resvit_engines", "verify", "--trust", str(folder / "release.pub"))
        good = device.run(*verify, str(bundle), check=False)
        print(f"verify: exit code {good.returncode}: {(good.stdout or good.stderr).strip()}")
        data = bytearray(bundle.read_bytes())
        data[len(data) // 2] ^= 1
        tampered = folder / "tampered.resvit"
        tampered.write_bytes(data)
        bad = device.run(*verify, str(tampered), check=False)
        print(f"verify, one bit flipped: exit code {bad.returncode}: {bad.stderr.strip()}")
        emulated = {"arch": machine.arch, "python": machine.python, "install_exit": 0, "wheel": wheel.name}
        codes = {"verify_exit": good.returncode, "verify_one_bit_flipped_exit": bad.returncode}
        write_result("device_aarch64", {"emulated": emulated, "packages": versions.stdout.split(), **codes})
        sys.exit(0 if good.returncode == 0 and bad.returncode in (3, 10) else "the aarch64 device is wrong")
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
