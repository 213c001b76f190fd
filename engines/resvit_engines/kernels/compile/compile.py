"""Compile a kernel ahead of time, on any machine: Triton to PTX for a GPU that need not be there.

Triton's own ``compile`` goes on to machine code, for which it needs an assembler that knows the GPU, and keeps
everything in a cache in the home folder. Its stages up to PTX need neither.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.compile.ptx import (
    plain_ptx,
    served_ptx_version,
    version_of_ptx,
    with_entry_name,
    without_scratch,
)
from resvit_engines.kernels.launch import Kernel, Source

_COMPILED_AS = {121: 120}
"""GPUs whose code Triton writes better under a sibling's name. For SM 12.1 it multiplies FP8 as FP16; the two have the
same instructions, and the assembler checks the result for the real one."""

_THREADS_PER_WARP = 32
_ALIGNMENT = 16
"""Bytes that every tensor's address is a multiple of: TensorRT's and CUDA's own allocations are (256 and more)."""

# Triton's settings and the process's standard output belong to one compilation at a time.
_one_at_a_time = threading.Lock()


def kernel_from_source(source: Source, sm: int, ptx_version: str) -> Kernel:
    """Compile ``source`` for a GPU (87 is compute capability 8.7) whose driver reads PTX up to ``ptx_version``.

    The same source gives the same bytes on every machine. Integer arguments get no promise of divisibility, since
    numbers of tokens have none; addresses are multiples of 16.

    Raises:
        ResvitError: MISSING without Triton; IMPOSSIBLE where the driver's PTX is too old for the GPU; BUILD with the
            compiler's reason where it does not compile or could not be launched as a plugin.
    """
    version = served_ptx_version(sm, ptx_version)
    function = _triton_function(source)
    arguments = len(source.launch.inputs) + len(source.launch.scalars) + len(source.launch.outputs)
    if len(source.arguments) != arguments:
        raise _failed(source, sm, f"it declares {len(source.arguments)} arguments and {arguments} in its launch")
    ptx, metadata = _compiled(function, source, _COMPILED_AS.get(sm, sm), version)
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if metadata.get(scratch):
            raise _failed(source, sm, f"it needs {metadata[scratch]} bytes of scratch memory, which no plugin gives")
    entry, text = with_entry_name(without_scratch(plain_ptx(ptx, sm), arguments=arguments), source.function)
    return Kernel(
        entry=entry,
        ptx=text,
        sm=sm,
        ptx_version=version,
        threads=metadata["num_warps"] * _THREADS_PER_WARP,
        shared_bytes=metadata["shared"],
        launch=source.launch,
    )


def _triton_function(source: Source) -> Any:
    try:
        from triton.runtime.jit import JITFunction
    except (ImportError, OSError) as error:
        raise ResvitError(
            f"Kernels of our own are compiled with Triton, which does not load: {error}.",
            "pip install 'triton>=3.7,<3.8', or build without plugins (--plugins off).",
            ExitCode.MISSING,
        ) from error
    function = getattr(importlib.import_module(f"resvit_engines.kernels.triton.{source.module}"), source.function)
    if not isinstance(function, JITFunction):
        raise ResvitError(
            "Triton is set to interpret kernels in this process, so it cannot compile them.",
            "Run again without TRITON_INTERPRET in the environment.",
            ExitCode.BUILD,
        )
    return function


def _compiled(function: Any, source: Source, sm: int, version: str) -> tuple[str, Mapping[str, Any]]:
    """PTX as Triton writes it, and what it says of it."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget, Language
    from triton.compiler.compiler import ASTSource, make_backend

    major, minor = version_of_ptx(version)
    with _one_at_a_time, contextlib.ExitStack() as settings:
        said = settings.enter_context(_silence())
        settings.enter_context(knobs.compilation.scope())
        settings.enter_context(knobs.runtime.scope())
        knobs.compilation.disable_line_info = True
        knobs.compilation.dump_ir_extract_di_local_variables = False
        knobs.runtime.override_arch = None
        try:
            target = GPUTarget("cuda", sm, _THREADS_PER_WARP)
            backend = make_backend(target)
            chosen = {"num_warps": source.warps, "num_stages": source.stages, "ptx_version": major * 10 + minor}
            # Given outright, so that no variable of the environment decides it.
            options = backend.parse_options({**chosen, "enable_fp_fusion": True})
            module: Any = ASTSource(function, *_signature(function, source))
            metadata: dict[str, Any] = {"target": target, **options.__dict__}
            stages: dict[str, Any] = {}
            backend.add_stages(stages, options, Language.TRITON)
            context = _context(backend)
            codegen = backend.get_codegen_implementation(options)
            module = module.make_ir(target, options, codegen, backend.get_module_map(), context)
            for name in ("ttir", "ttgir", "llir", "ptx"):
                module = stages[name](module, metadata)
        except Exception as error:  # Triton raises whatever its passes do.
            raise _failed(source, sm, _reason(error, said())) from error
    return str(module), metadata


def _context(backend: Any) -> Any:
    from triton._C.libtriton import ir

    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    return context


def _signature(function: Any, source: Source) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[Any]]]:
    """Types of all parameters, values of the constant ones, and what is promised of the others."""
    types = dict(source.arguments)
    given = [name for name in function.arg_names if name in types]
    absent = [name for name in function.arg_names if name not in types and name not in source.constants]
    if given != list(types) or absent or set(source.constants) - set(function.arg_names):
        raise ValueError(
            f"arguments {list(types)} and constants {sorted(source.constants)} do not fit {function.arg_names}"
        )
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    constants = {name: source.constants[name] for name in function.arg_names if name not in types}
    aligned = [index for index, name in enumerate(function.arg_names) if types.get(name, "").startswith("*")]
    return signature, constants, {(index,): [["tt.divisibility", _ALIGNMENT]] for index in aligned}


@contextlib.contextmanager
def _silence() -> Iterator[Any]:
    """Keep what the compiler's C++ writes to both standard streams; yields a function that tells it.

    A failed pass prints the whole program and a reproducer of many screens.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryFile() as kept:
        saved = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(kept.fileno(), number)

            def told() -> str:
                kept.seek(0)
                return kept.read().decode(errors="replace")

            yield told
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, original in zip((1, 2), saved, strict=True):
                os.dup2(original, number)
                os.close(original)


def _reason(error: Exception, said: str) -> str:
    """One line: the compiler's own first complaint, else the exception's last line."""
    complaint = re.search(r"\berror:\s*(.+)", said)
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    text = complaint[1] if complaint else lines[-1] if lines else type(error).__name__
    return inspect.cleandoc(text)[:300]


def _failed(source: Source, sm: int, reason: str) -> ResvitError:
    return ResvitError(
        f"The kernel {source.function} does not compile for SM {sm / 10:.1f}: {reason.rstrip('.')}.",
        "Build without plugins (--plugins off), and report this with the model's name.",
        ExitCode.BUILD,
    )
