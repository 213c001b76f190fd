"""Which version of this package runs: as part of resvit-export on a host, or by itself on a device."""

from __future__ import annotations

import importlib.metadata


def own_version() -> str:
    """The version of the distribution that this package came with; ``unknown`` when run from source alone."""
    for name in ("resvit-export", "resvit-engines"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
