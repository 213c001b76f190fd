"""Whether what is installed under a name works: its files, its golden outputs, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.bench.bench import BenchSettings, measure
from resvit_engines.install.install import installed_version
from resvit_engines.keys.public import TrustStore
from resvit_engines.records import Record
from resvit_engines.run.golden import GoldenReport, golden_check
from resvit_engines.run.runner import open_runner


@dataclass(frozen=True)
class Health:
    """Of an installed version: its digest, the golden check, and the median latency in ms of the usual batch.

    ``golden`` and ``latency_ms`` are None where they were not asked for.
    """

    name: str
    digest: str
    release: int
    golden: GoldenReport | None
    latency_ms: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "digest": self.digest,
            "release": self.release,
            "golden": self.golden.to_json() if self.golden else None,
            "latency_ms": self.latency_ms,
        }

    @classmethod
    def from_json(cls, record: Record) -> Health:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        golden = record.optional("golden", record.record)
        return cls(
            record.name("name"),
            record.sha256("digest"),
            record.whole("release"),
            GoldenReport.from_json(golden) if golden else None,
            record.optional("latency_ms", lambda key: record.number(key, 0)),
        )


def health_of(
    root: Path, name: str, trust: TrustStore, runtime: str = "auto", *, golden: bool = True, seconds: float = 1.0
) -> Health:
    """Check the current version of ``name``: every file, the golden outputs, and its latency for ``seconds`` above 0.

    Raises:
        ResvitError: INPUT where nothing is installed, UNTRUSTED where it is not what was signed, MISMATCH where its
            outputs are not those that were validated.
    """
    found = installed_version(root, name, trust)
    report = golden_check(found.folder, found.manifest, runtime) if golden else None
    latency = None
    if seconds > 0:
        with open_runner(found.folder, found.manifest, runtime) as runner:
            # As the device that built the engine was timed, so that both can be compared.
            build = found.manifest.build
            batch = min(max(build.batch[1], runner.batch[0]), runner.batch[1]) if build else runner.batch[0]
            latency = measure(runner, BenchSettings(batch, seconds, min(1.0, seconds))).latency_ms["p50"]
    return Health(name, found.digest, found.manifest.release, report, latency)
