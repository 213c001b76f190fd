"""PTX as text: the versions that a GPU needs, and an entry that takes our arguments and nothing else.

Versions are those of the release notes in NVIDIA's "PTX ISA" document. From SM 90 on, code is made for the
architecture itself (``sm_90a``), whose matrix instructions run on no other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from resvit_engines.errors import ExitCode, ResvitError

OLDEST_PTX: Mapping[int, str] = {
    80: "7.0", 86: "7.1", 87: "7.4", 89: "7.8", 90: "8.0", 100: "8.6", 103: "8.8", 110: "9.0", 120: "8.7", 121: "8.8",
}  # fmt: skip
"""The first PTX version that knows a GPU (from SM 90 on, its architecture-specific instructions)."""

NEWEST_PTX = "9.0"
"""The newest that the compiler writes. Every driver reads all older versions."""

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)", re.MULTILINE)
_COMMENT = re.compile(r"[ \t]*//.*$", re.MULTILINE)


def version_of_ptx(text: str) -> tuple[int, int]:
    """Turn ``"8.5"`` into ``(8, 5)``.

    Raises:
        ResvitError: INPUT where it is no such version.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    if not found:
        raise ResvitError(f"{text!r} is no PTX version.", "Give it as major.minor, such as 8.5.")
    return int(found[1]), int(found[2])


def served_ptx_version(sm: int, newest: str) -> str:
    """The PTX version to write for a GPU whose driver reads versions up to ``newest``.

    Raises:
        ResvitError: IMPOSSIBLE for a GPU that is not in the table, and for a driver too old for its GPU.
    """
    if sm not in OLDEST_PTX:
        raise ResvitError(
            f"There are no kernels of ours for SM {sm / 10:.1f}.",
            f"They are made for SM {', '.join(f'{known / 10:.1f}' for known in OLDEST_PTX)}.",
            ExitCode.IMPOSSIBLE,
        )
    asked, oldest = version_of_ptx(newest), version_of_ptx(OLDEST_PTX[sm])
    if asked < oldest:
        raise ResvitError(
            f"SM {sm / 10:.1f} needs PTX {OLDEST_PTX[sm]} or newer, and the driver reads up to {newest}.",
            "Update the driver (on a Jetson: JetPack), or build without plugins (--plugins off).",
            ExitCode.IMPOSSIBLE,
        )
    return min(newest, NEWEST_PTX, key=version_of_ptx)


def plain_ptx(ptx: str, sm: int) -> str:
    """For ``sm``, without comments."""
    named = re.sub(r"^\.target\s+sm_\d+", f".target sm_{sm}", ptx, flags=re.MULTILINE)
    lines = _COMMENT.sub("", named).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"


def entry_parameters(ptx: str) -> tuple[str, list[str]]:
    """The name of the one entry, and its parameters as they stand.

    Raises:
        ResvitError: BUILD where there is not exactly one entry.
    """
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise _broken(f"its PTX has {len(entries)} entries instead of one")
    parameters = entries[0]["parameters"].strip()
    return entries[0]["name"], [part.strip() for part in parameters.split(",")] if parameters else []


def without_scratch(ptx: str, *, arguments: int) -> str:
    """Take the pointers to scratch memory off the entry, which Triton appends whether they are used or not.

    Raises:
        ResvitError: BUILD where the code reads one, or where the entry takes another number of arguments.
    """
    name, parameters = entry_parameters(ptx)
    surplus = parameters[arguments:]
    if len(parameters) != arguments + _SCRATCH or not all(".u64" in parameter for parameter in surplus):
        raise _broken(f"its entry takes {len(parameters)} parameters where {arguments} + {_SCRATCH} were expected")
    start = ptx.index("{", _ENTRY.search(ptx).end())  # type: ignore[union-attr]
    body = ptx[start:]
    for parameter in surplus:
        own = parameter.split()[-1]
        if re.search(rf"\b{re.escape(own)}\b", body):
            raise _broken(f"it needs scratch memory ({own}), which no plugin gives")
    kept = ",\n\t".join(parameters[:arguments])
    return _ENTRY.sub(lambda _: f".visible .entry {name}(\n\t{kept}\n)", ptx, count=1)


_SCRATCH = 2


def with_entry_name(ptx: str, function: str) -> tuple[str, str]:
    """Name the entry after the function and a digest of its own code: kernels of one name are one kernel.

    Returns:
        The new name and the PTX.
    """
    name, _ = entry_parameters(ptx)
    # Parameters and labels carry the name in front: all of them change.
    anonymous = re.sub(rf"\b{re.escape(name)}(?=\b|_param_\d+\b)", "ENTRY", ptx)
    digest = hashlib.sha256(anonymous.encode()).hexdigest()[:12]
    chosen = f"resvit_{function.strip('_')}_{digest}"
    return chosen, anonymous.replace("ENTRY", chosen)


def _broken(reason: str) -> ResvitError:
    return ResvitError(
        f"A kernel cannot be used as a plugin: {reason}.",
        "Install the Triton that this release names (pip install 'triton>=3.7,<3.8'), or use --plugins off.",
        ExitCode.BUILD,
    )
