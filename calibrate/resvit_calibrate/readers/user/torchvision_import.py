"""Importing torchvision, and what imports it, where its own import fails."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from resvit_engines.errors import ExitCode, ResvitError

if TYPE_CHECKING:
    import torch

_declared: list[torch.library.Library] = []
"""The schemas live as long as these objects."""


def import_beside_torchvision(name: str, extra: str) -> ModuleType:
    """Import a library that imports torchvision, also where torchvision's own import fails.

    torchvision registers kernels for ``torchvision::nms`` on import; beside a CPU-only torch its own library that
    declares the operator cannot be loaded, and the import fails. Declaring the two operator schemas first is enough:
    the networks that are exported call neither.

    Raises:
        ResvitError: MISSING where the library is not installed or still fails; ``extra`` is what brings it.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ResvitError(f"torchvision does not import: {error}", "Reinstall it.", ExitCode.MISSING) from error
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _declared.append(library)
    except ImportError:
        pass  # the library will say what it needs
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise ResvitError(
            f"{name} does not import: {error}", f"pip install 'resvit-export[{extra}]'.", ExitCode.MISSING
        ) from error
