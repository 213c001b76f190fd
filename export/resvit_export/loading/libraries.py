"""Libraries of models, imported where torchvision may refuse to be."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from resvit_calibrate.readers.user.torchvision_import import import_beside_torchvision


def import_timm() -> ModuleType:
    """Import timm; raises as ``import_beside_torchvision``."""
    return import_beside_torchvision("timm", "host")


def import_transformers() -> ModuleType:
    """Import Hugging Face's transformers; raises as ``import_beside_torchvision``."""
    return import_beside_torchvision("transformers", "hf")


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
