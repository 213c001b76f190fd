"""An ONNX graph becomes an engine, in a child process that may crash or be killed without harm."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from pathlib import Path
from typing import Any

from resvit_engines.audit.kernels import Kernel
from resvit_engines.builder.child import run_child
from resvit_engines.builder.engine_report import EngineReport, LibraryRecord
from resvit_engines.builder.limits import compute_capabilities, require_buildable
from resvit_engines.builder.memory import SMALLEST_WORKSPACE_MIB, available_mib, shares_memory, workspace_for
from resvit_engines.builder.settings import TITLES, BuildSettings
from resvit_engines.errors import ExitCode, OutOfMemoryError, ResvitError
from resvit_engines.files import atomic_file, sha256_file, write_atomic
from resvit_engines.gpu import local_sm
from resvit_engines.machine import tensorrt_here
from resvit_engines.plugins.library import LIBRARY, cached_library
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record
from resvit_engines.targets.choice import with_tensorrt
from resvit_engines.targets.software import version_of
from resvit_engines.targets.table import ANY_ARCH, Builder, Target
from resvit_engines.trt.io_tensor import io_tensors_from_json

_MODULES = {
    Builder.RTX: "tensorrt_rtx_bindings", Builder.TENSORRT: "tensorrt", Builder.ONNXRUNTIME: "onnxruntime",
}  # fmt: skip


def builds_here(target: Target) -> bool:
    """Whether this machine can build for ``target``: TensorRT only where its GPU is, the others anywhere.

    A Jetson's TensorRT is that of its image. Elsewhere several releases may be asked for, and it has to be that one.
    """
    if target.builder is not Builder.TENSORRT:
        return True
    if not _installed("tensorrt") or local_sm() != target.sm:
        return False
    version = None if target.jetpack else tensorrt_here()
    return version is None or version_of(version)[:2] == version_of(target.tensorrt)[:2]


def as_installed(target: Target) -> Target:
    """The target with the release of TensorRT on this machine, where that builds for it and its image names none.

    Raises:
        ResvitError: IMPOSSIBLE for a release that is not served.
    """
    own = target.builder is Builder.TENSORRT and target.jetpack is None and _installed("tensorrt")
    version = tensorrt_here() if own and local_sm() == target.sm else None
    return target if version is None else with_tensorrt(target, version)


def build_engine(
    onnx: Path,
    engine: Path,
    target: Target,
    settings: BuildSettings | None = None,
    reporter: Reporter = SILENT,
    log: Path | None = None,
) -> EngineReport:
    """Build ``engine`` from ``onnx``; the file appears whole or not at all. ``log`` keeps the builder's verbose log.

    Where the GPU shares its memory with the CPU, the workspace is chosen to fit what is free, and a build that ends
    for want of memory is tried again with half of it. Where the engine's GPU is, TensorRT's JSON about its layers is
    written beside it, as ``layers.json`` beside ``engine.plan``. So is the plugin library, where the engine needs it.

    Raises:
        ResvitError: IMPOSSIBLE where this machine cannot build for the target (see ``plan_for_device``) or the builder
            lacks an option, MISSING without the builder's package, BUILD where the builder fails or crashes, SYSTEM
            where it is killed for memory or the file cannot be written, INTERRUPTED on Ctrl-C.
    """
    settings = settings or BuildSettings()
    builder = target.builder
    _require_builder(target)
    require_buildable(target, settings)
    if not onnx.is_file():
        raise ResvitError(f"There is no file {onnx}.", "Give the path of an ONNX file.")
    if target.arch not in {ANY_ARCH, platform.machine()}:
        reporter.warn(
            f"{target.title} has an {target.arch} processor and this machine is {platform.machine()}: NVIDIA does "
            "not promise that engines move between the two; if it does not load there, build it there."
        )
    capability = "" if target.on_cpu else f" (SM {target.sm / 10:.1f})"
    reporter.say(f"Building for {target.title}{capability} with {TITLES[builder]}")
    cache = _timing_cache_for(builder, settings, reporter)
    library = _plugin_library(settings, reporter)
    layers = engine.with_name("layers.json" if engine.stem == "engine" else f"{engine.stem}.layers.json")
    with atomic_file(engine) as partial, tempfile.TemporaryDirectory(prefix="resvit-build-") as scratch:
        described = Path(scratch) / "layers.json"
        request = {
            "kind": "optimise" if target.on_cpu else "build",
            "module": _MODULES[builder],
            "onnx": str(onnx.resolve()),
            "engine": str(partial.resolve()),
            "log": str(log.resolve()) if log else None,
            "batch": list(settings.batch),
            "sizes": settings.sizes.numbers() if settings.sizes else None,
            "config": {
                "optimization_level": settings.optimization_level,
                "sms": compute_capabilities(target, settings) if builder is Builder.RTX else [],
                **settings.flags,
            },
            "timing_cache": str(cache.resolve()) if cache else None,
            "plugins": settings.plugins,
            "plugin_library": str(library.resolve()) if library else None,
            "owner": {"target": target.name, "sm": target.sm, "builder": builder.value},
            "layers": str(described) if local_sm() == target.sm else None,
        }
        result, workspace_mib = _built(request, onnx, target, settings, Path(scratch), reporter)
        layers.unlink(missing_ok=True)  # of the engine that this one replaces
        if described.is_file():
            with atomic_file(layers) as listing:
                listing.write_bytes(described.read_bytes())
        if library and library.resolve() != engine.with_name(LIBRARY).resolve():
            write_atomic(engine.with_name(LIBRARY), library.read_bytes())
        built = Record(result, "the builder's result")
        report = EngineReport(
            target=target.name,
            builder=builder,
            builder_version=built.text("version"),
            sm=target.sm,
            bytes=partial.stat().st_size,
            sha256=sha256_file(partial),
            seconds=built.number("seconds"),
            peak_mib=built.whole("peak_mib"),
            inputs=io_tensors_from_json(built.records("inputs")),
            outputs=io_tensors_from_json(built.records("outputs")),
            kernels=tuple(map(Kernel.from_json, built.records("kernels"))),
            warnings=built.texts("warnings"),
            workspace_mib=workspace_mib,
            timing_cache=built.optional("timing_cache", built.text),
            layers=layers.name if described.is_file() else None,
            flags=tuple(settings.flags),
            plugins=settings.plugins,
            plugin_layers=built.texts("plugin_layers"),
            plugin_library=LibraryRecord(LIBRARY, sha256_file(library)) if library else None,
        )
    for note in result["notes"]:
        reporter.say(note)
    if builder is Builder.TENSORRT and version_of(report.builder_version)[:2] != version_of(target.tensorrt)[:2]:
        reporter.warn(f"Built with TensorRT {report.builder_version}, but {target.software} was named as the target.")
    return report


def _built(
    request: dict[str, Any], onnx: Path, target: Target, settings: BuildSettings, scratch: Path, reporter: Reporter
) -> tuple[dict[str, Any], int | None]:
    """Build with the workspace that fits, and with half of it where it does not; returns what it was in the end."""
    if target.on_cpu:  # kernels take what they need when they run
        return run_child(request, scratch, reporter, "optimising"), None
    chosen = workspace_for(target, settings.workspace_mib, onnx.stat().st_size, available_mib())
    for note in chosen.notes:
        reporter.warn(note)
    workspace_mib = chosen.mib
    while True:
        request["config"]["workspace_mib"] = workspace_mib
        try:
            return run_child(request, scratch, reporter, "building"), workspace_mib
        except OutOfMemoryError as error:
            half = workspace_mib // 2
            # Elsewhere the workspace is memory of the GPU, and TensorRT for RTX allocates none while it builds.
            smaller = shares_memory(target) or request["module"] == _MODULES[Builder.TENSORRT]
            if not smaller or half < SMALLEST_WORKSPACE_MIB:
                raise
            reporter.warn(f"{error.problem} Trying again with a workspace of {half} MiB instead of {workspace_mib}.")
            workspace_mib = half


def refit_engine(
    stripped: Path,
    onnx: Path,
    engine: Path,
    builder: Builder,
    sha256: str,
    reporter: Reporter = SILENT,
    log: Path | None = None,
    plugin_library: Path | None = None,
) -> str:
    """Put the weights of ``onnx`` into the weight-stripped engine ``stripped``; returns the new engine's SHA-256.

    It reads the engine, so it runs on the device, and ``sha256`` must be the digest from a manifest whose signature
    holds: another file is not read. ``engine`` appears whole or not at all. ``plugin_library`` is trusted, and needed
    by an engine that was built with it.

    Raises:
        ResvitError: UNTRUSTED where the digest differs, BUILD where engine and weights do not fit each other or the
            engine is not this GPU's, MISSING without TensorRT or a driver, INTERRUPTED on Ctrl-C.
    """
    for path in (stripped, onnx):
        if not path.is_file():
            raise ResvitError(f"There is no file {path}.", "Give the paths of the engine and of its ONNX file.")
    with atomic_file(engine) as partial, tempfile.TemporaryDirectory(prefix="resvit-build-") as scratch:
        request = {
            "kind": "refit",
            "module": _MODULES[builder],
            "stripped": str(stripped.resolve()),
            "sha256": sha256,
            "onnx": str(onnx.resolve()),
            "engine": str(partial.resolve()),
            "log": str(log.resolve()) if log else None,
            "plugin_library": str(plugin_library.resolve()) if plugin_library else None,
        }
        run_child(request, Path(scratch), reporter, "refitting")
        return sha256_file(partial)


def _timing_cache_for(builder: Builder, settings: BuildSettings, reporter: Reporter) -> Path | None:
    if settings.timing_cache is not None and builder is not Builder.TENSORRT:
        reporter.say(f"{TITLES[builder]} measures nothing while it builds, so there is no timing cache to keep.")
        return None
    return settings.timing_cache


def _plugin_library(settings: BuildSettings, reporter: Reporter) -> Path | None:
    if settings.plugins != "library":
        return None
    library = settings.plugin_library
    if library is None:
        reporter.say("Compiling the plugin library for the TensorRT of this machine (once)")
        return cached_library()
    if not library.is_file():
        raise ResvitError(
            f"There is no plugin library {library}.", "Build one: resvit-engine plugin.", ExitCode.MISSING
        )
    return library


def _require_builder(target: Target) -> None:
    if not builds_here(target):
        raise ResvitError(
            f"An engine for {target.title} by {target.software} cannot be built on this machine.",
            "Build it where that GPU is, with the commands of the plan.",
            ExitCode.IMPOSSIBLE,
        )
    if target.on_cpu and not _installed(_MODULES[target.builder]):
        raise ResvitError(
            "ONNX Runtime, which makes engines for processors, is not installed.",
            "pip install onnxruntime",
            ExitCode.MISSING,
        )
    if not _installed(_MODULES[target.builder]):
        raise ResvitError(
            "TensorRT for RTX, which builds engines without a GPU, is not installed.",
            "pip install 'resvit-export[host]' (or tensorrt-rtx-cu13-bindings and tensorrt-rtx-cu13-libs).",
            ExitCode.MISSING,
        )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
