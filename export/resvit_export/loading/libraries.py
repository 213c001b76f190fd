"""Libraries of models, imported where torchvision may refuse to be."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from resvit_engines.errors import ExitCode, ResvitError

_declared: list[torch.library.Library] = []
"""The schemas live as long as these objects."""


def import_timm() -> ModuleType:
    """Import timm; raises as ``import_beside_torchvision``."""
    return import_beside_torchvision("timm", "host")


def import_transformers() -> ModuleType:
    """Import Hugging Face's transformers; raises as ``import_beside_torchvision``."""
    return import_beside_torchvision("transformers", "hf")


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


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the exporter's own warnings and log lines off the terminal: ours say what matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
