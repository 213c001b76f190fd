"""Engines by their kernels alone, to be put side by side: from layer files and profiles, and from bundles."""

from __future__ import annotations

from pathlib import Path

from resvit_engines.audit.compare.engine import ListedEngine, engine_from_file, engine_from_kernels, with_times
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import TITLES
from resvit_engines.bundle.bundle import read_manifest
from resvit_engines.errors import ResvitError
from resvit_engines.run.opened import BUNDLE_SUFFIX


def listed_engine(source: Path, profile: Path | None = None, times: Path | None = None) -> ListedEngine:
    """An engine as a bundle, or a layer file or profile of ``trtexec``, lists it. No engine is opened for it.

    ``profile`` and ``times`` are what ``trtexec`` wrote of the same engine.

    Raises:
        ResvitError: INPUT for what is neither, and for a bundle whose engine is not built yet.
    """
    if source.suffix != BUNDLE_SUFFIX:
        return engine_from_file(source, profile, times)
    report = read_manifest(source).engine
    if report is None:
        raise ResvitError(
            f"{source} holds no engine yet: it is to be built on the device.",
            "Give the bundle that 'resvit-engine build' wrote there.",
        )
    return with_times(engine_from_report(source.stem, report), profile, times)


def engine_from_report(name: str, report: EngineReport) -> ListedEngine:
    """An engine as its build listed it."""
    built = f"{TITLES[report.builder]} {report.builder_version}, SM {report.sm / 10:.1f}"
    rehearsed = ", a rehearsal" if report.rehearsal else ""
    return engine_from_kernels(name, report.kernels, f"{built}{rehearsed}")
