"""The slim wheel: this package alone, for a device. The same files give the same bytes, so its digest names it.

The format is that of the binary distribution specification (packaging.python.org): a zip with METADATA, WHEEL,
entry_points.txt and RECORD.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.machine import Machine
from resvit_engines.plugins.library import SOURCE_FOLDER, source_files
from resvit_engines.targets.software import OLDEST_ONNXRUNTIME
from resvit_engines.version import own_version

DISTRIBUTION = "resvit-engines"
REQUIREMENTS = (
    "click>=8.1",
    "cryptography>=42",
    "numpy>=1.24",
    "packaging>=23",
    "rich>=13.7",
    "tomli>=2.0; python_version < '3.11'",
)
"""What a device installs beside it: the plain dependencies of the project, and never torch or onnx."""
GPU_REQUIREMENTS = ("cuda-bindings>=12.8,<13",)
"""And where there is a GPU: what running an engine takes."""
_PACKAGE = "resvit_engines"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_OLDEST_GLIBC = 17


def write_device_wheel(folder: Path) -> Path:
    """Write the wheel of the running package into ``folder`` and return its path.

    Raises ``ResvitError`` where the package's own files cannot be read, or ``folder`` cannot be written.
    """
    version = own_version()
    stem = f"{_PACKAGE}-{version}"
    info = f"{stem}.dist-info"
    content = {f"{_PACKAGE}/{name}": data for name, data in _own_files().items()}
    content[f"{info}/METADATA"] = _metadata(version).encode()
    content[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: resvit-export\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    content[f"{info}/entry_points.txt"] = b"[console_scripts]\nresvit-engine = resvit_engines.cli.main:main\n"
    rows = [f"{name},sha256={_record_digest(data)},{len(data)}" for name, data in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            member = zipfile.ZipInfo(name, _EPOCH)
            member.create_system = 3
            member.external_attr = 0o100644 << 16
            archive.writestr(member, data)
    return path


CPU_REQUIREMENTS = (f"onnxruntime>={OLDEST_ONNXRUNTIME}",)
"""And for engines of processors."""


def requirements_for(machine: Machine, *, on_cpu: bool = False) -> tuple[str, ...]:
    """What is installed beside the wheel on this machine; with ``on_cpu`` for engines that its processor runs."""
    found = REQUIREMENTS if machine.sm is None else (*REQUIREMENTS, *GPU_REQUIREMENTS)
    return (*found, *CPU_REQUIREMENTS) if on_cpu else found


def pip_platforms(arch: str, libc: str | None) -> tuple[str, ...]:
    """The wheel platforms that a Linux with this glibc (``"2.35"``) takes, newest first, for ``pip download``."""
    found = re.fullmatch(r"2\.(\d+).*", libc or "")
    newest = int(found[1]) if found else _OLDEST_GLIBC
    tags = [f"manylinux_2_{minor}_{arch}" for minor in range(newest, _OLDEST_GLIBC - 1, -1)]
    return (*tags, f"manylinux2014_{arch}")


def _own_files() -> dict[str, bytes]:
    """Every file of this package by its name in it, sorted; compiled ones are left out."""
    root = Path(__file__).parents[1]
    if not root.is_dir():
        raise ResvitError(
            f"The files of {_PACKAGE} cannot be read from {root}.",
            "Install resvit-export unpacked, with pip, and run again.",
            ExitCode.SYSTEM,
        )
    files = [file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    own = {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(files)}
    # In a checkout the plugin library's source lies beside the package, and belongs to the wheel.
    return {**{f"{SOURCE_FOLDER}/{file.name}": file.read_bytes() for file in sorted(source_files())}, **own}


def _metadata(version: str) -> str:
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {DISTRIBUTION}",
        f"Version: {version}",
        "Summary: The device side of resvit-export: builds, verifies, installs, runs and times engines",
        "License: Apache-2.0",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
        "Provides-Extra: cpu",
        *(f"Requires-Dist: {requirement}; extra == 'cpu'" for requirement in CPU_REQUIREMENTS),
        "Provides-Extra: device",
        *(f"Requires-Dist: {requirement}; extra == 'device'" for requirement in GPU_REQUIREMENTS),
    ]
    return "\n".join(lines) + "\n"


def _record_digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
