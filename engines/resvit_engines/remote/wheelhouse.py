"""The wheels that a device without a network needs, downloaded here for its Python and processor."""

from __future__ import annotations

import email.parser
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine
from resvit_engines.outside import leads_to_folder
from resvit_engines.remote.wheel import pip_platforms, requirements_for
from resvit_engines.targets.software import version_of

WHEELS_VARIABLE = "RESVIT_DEVICE_WHEELS"
"""Names a folder on this machine with the wheels that a device without a network needs."""


def chosen_wheels() -> Path | None:
    """The folder that ``$RESVIT_DEVICE_WHEELS`` names; None where it is not set or empty.

    Raises ``ResvitError`` INPUT where it names no folder.
    """
    named = os.environ.get(WHEELS_VARIABLE)
    if not named:
        return None
    folder = Path(named)
    if not leads_to_folder(folder):
        raise ResvitError(
            f"There is no folder {named}.", f"Let {WHEELS_VARIABLE} name a folder of wheels, or unset it."
        )
    return folder


def download_wheels(machine: Machine, folder: Path, requirements: Sequence[str] | None = None) -> None:
    """Fill ``folder`` with everything that ``machine`` needs: ``requirements``, or those of any device.

    pip judges conditions such as ``python_version < '3.11'`` by the Python that runs it, also when it downloads for
    another; so they are judged here, until nothing is missing.

    Raises ``ResvitError`` MISSING where pip cannot download.
    """
    environment = device_environment(machine)
    wanted = needed(requirements or requirements_for(machine), environment)
    while wanted:
        _download(wanted, machine, folder)
        wanted = missing_requirements(folder, environment)


def device_environment(machine: Machine) -> dict[str, str]:
    """What the markers of requirements (PEP 508) ask about, as it is on the device."""
    return {
        "python_version": ".".join(str(part) for part in version_of(machine.python)[:2]),
        "python_full_version": machine.python,
        "platform_machine": machine.arch,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def needed(requirements: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The requirements that hold in ``environment``, without their conditions."""
    found = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(dict(environment)):
            found.append(f"{requirement.name}{requirement.specifier}")
    return found


def missing_requirements(folder: Path, environment: Mapping[str, str]) -> list[str]:
    """What the wheels in ``folder`` require on the device and none of them is."""
    here = {parse_wheel_filename(file.name)[0] for file in folder.glob("*.whl")}
    wanted: list[str] = []
    for file in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(file) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = email.parser.BytesHeaderParser().parsebytes(wheel.read(name))
        wanted += needed(metadata.get_all("Requires-Dist", []), environment)
    return sorted({text for text in wanted if canonicalize_name(Requirement(text).name) not in here})


def _download(requirements: Sequence[str], machine: Machine, folder: Path) -> None:
    version = "".join(str(part) for part in version_of(machine.python)[:2])
    platforms = [part for tag in pip_platforms(machine.arch, machine.libc) for part in ("--platform", tag)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
            *("--dest", str(folder), "--only-binary=:all:", "--python-version", version, *platforms, *requirements),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        names = ", ".join(requirements_for(machine))
        raise ResvitError(
            f"Neither the device nor this machine could download what the device needs ({last}).",
            f"Download the wheels of {names} elsewhere and name their folder in {WHEELS_VARIABLE}.",
            ExitCode.MISSING,
        )
