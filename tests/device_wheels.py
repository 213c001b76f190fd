"""What the loopback device of the tests is made of: a Python without torch, and wheels in ``data/device-wheels``.

``python tests/device_wheels.py`` downloads them; the tests themselves need no network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from resvit_engines.remote.wheel import CPU_REQUIREMENTS, REQUIREMENTS

WHEELS = Path(__file__).parent.parent / "data" / "device-wheels"
_SYSTEM = ("tensorrt-rtx-cu13-bindings>=1.7,<1.8", "onnxruntime")
"""They stand for what JetPack's image brings along; the libraries of TensorRT for RTX are lent by this environment."""


def device_python() -> Path:
    """A Python 3.10, as JetPack 6 has it, where there is one; else the one that this environment is made from."""
    places = [Path.home() / ".pyenv/versions", Path("/opt"), Path("/usr/bin"), Path("/usr/local/bin")]
    found = [
        file for place in places for pattern in ("python3.10", "3.10*/bin/python3.10") for file in place.glob(pattern)
    ]
    on_path = shutil.which("python3.10")
    for candidate in [*found, *((Path(on_path),) if on_path else ())]:
        done = subprocess.run([candidate, "-c", "import ensurepip, venv"], capture_output=True, check=False)
        if done.returncode == 0:
            return candidate
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return base if base.exists() else Path(sys.executable)


def main() -> None:
    """Download the wheels that are installed on the device, and unpack those that are there already."""
    python = device_python()
    # This environment's pip, run by that Python: Debian's has none of its own.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    download = [*pip, "download", "--only-binary=:all:"]
    shutil.rmtree(WHEELS, ignore_errors=True)
    subprocess.run([*download, "--dest", WHEELS, *REQUIREMENTS, *CPU_REQUIREMENTS], check=True)
    subprocess.run([*download, "--dest", WHEELS / "packed", "--no-deps", *_SYSTEM], check=True)
    for wheel in (WHEELS / "packed").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(WHEELS / "system")
    shutil.rmtree(WHEELS / "packed")
    (WHEELS / ".ready").write_text(f"{python}\n")
    sys.stdout.write(f"{len(list(WHEELS.glob('*.whl')))} wheels for {python} in {WHEELS}\n")


if __name__ == "__main__":
    main()
