"""Everything that runs on or for a device. Needs neither torch nor onnx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resvit_engines.program.load import load as load


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: commands that run nothing need no NumPy.
    if name == "load":
        from resvit_engines.program.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
