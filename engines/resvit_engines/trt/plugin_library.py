"""The plugin library in TensorRT's registry."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.plugins.names import NAMESPACE


def load_plugin_library(trt: Any, content: bytes) -> None:
    """Load the compiled library of ``engines/plugin``: before a file is parsed, and before an engine is read.

    It is code that runs in this process: load only what was built here, or what has the digest that a verified
    manifest names. What is loaded is ``content`` itself, so no file can change in between. Loaded once in a process.

    Raises:
        ResvitError: BUILD where it is not for this TensorRT or machine.
    """
    registry = trt.get_plugin_registry()
    if any(creator.plugin_namespace == NAMESPACE for creator in registry.all_creators):
        return
    memory = os.memfd_create("resvit_plugins")
    # Left open: the loader may read from it as long as the library is in use.
    with os.fdopen(memory, "wb", closefd=False) as stream:
        stream.write(content)
    path = f"/proc/self/fd/{memory}"
    try:
        library, text = ctypes.CDLL(path), str(trt.__version__)
        major = int(library.resvitTensorRTMajor())
        if str(major) != text.partition(".")[0]:
            raise _unloadable(trt, f"it was compiled for TensorRT {major}")
        if registry.load_library(path) is None:
            raise _unloadable(trt, "it gave no reason")
    except (OSError, AttributeError, RuntimeError) as error:
        raise _unloadable(trt, str(error)) from error


def _unloadable(trt: Any, reason: str) -> ResvitError:
    return ResvitError(
        f"TensorRT {trt.__version__} cannot load the plugin library: {reason}.",
        "Build it for the TensorRT that is installed here: resvit-engine plugin.",
        ExitCode.BUILD,
    )
