"""A bundle becomes a tested engine on the device that it is for, in phases that survive a kill.

Machine and fit, signature, unpacking, build, golden check, outputs on images, timing, and a new bundle with the engine,
signed by the device's own key. Nothing is unpacked before the signature holds. Where TensorRT is absent, a rehearsal
lets TensorRT for RTX stand in; it is called one in every result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resvit_engines.bench.bench import BenchReport, BenchSettings, measure
from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import TrustedBundle, trusted_bundle, write_bundle
from resvit_engines.bundle.fit import require_fit
from resvit_engines.bundle.manifest import MANIFEST, SIGNATURE, Manifest
from resvit_engines.bundle.parts import BuiltOnDevice, BundledFile
from resvit_engines.bundle.source import RecordedFile
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import (
    atomic_directory,
    atomic_file,
    cache_folder,
    canonical_json,
    make_folder,
    pretty_json,
    remove,
    sha256_bytes,
    sha256_file,
)
from resvit_engines.keys.own import own_key
from resvit_engines.keys.public import TrustStore
from resvit_engines.machine import Machine, this_machine
from resvit_engines.names import require_name
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record
from resvit_engines.remote.job_folder import JobFolder
from resvit_engines.remote.job_result import (
    Answers,
    DeviceBundle,
    JobResult,
    Skipped,
    bench_from_json,
    golden_from_json,
)
from resvit_engines.run.golden import GoldenReport, golden_check
from resvit_engines.run.golden_files import encoded, input_name
from resvit_engines.run.runner import Runner, open_runner
from resvit_engines.targets.table import Target, proxy_target
from resvit_engines.version import own_version

ENGINE, ENGINE_REPORT, LOG, TIMING = "engine.plan", "engine.json", "build.log", "timing.cache"
IMAGES = "images-*.npy"
REHEARSAL = "REHEARSAL: TensorRT for RTX stood in for TensorRT; this engine is not for the device."
_NOT_PACKED = (MANIFEST, SIGNATURE, "plan.json", "README.txt")
MODELS = ("model.tensorrt.onnx", "model.onnx")
_AT_ONCE = 32
"""Images that are in memory at once while answering."""
_SECONDS, _REHEARSED_SECONDS = 5.0, 0.5
"""How long is timed; a rehearsal's times say nothing about the device."""


@dataclass(frozen=True)
class Job:
    """What to build from, and where: the images ``images-*.npy`` (float32 [N, C, H, W]) in ``folder`` are answered."""

    bundle: Path
    folder: Path
    rehearse: bool = False


def run_job(job: Job, trust: TrustStore, reporter: Reporter = SILENT) -> JobResult:
    """Do what of the job is not done yet and return its result, which ``result.json`` holds too.

    Files lie in ``folder/built`` and ``folder/outputs``.

    Raises:
        ResvitError: UNTRUSTED for a bundle that is not signed by a trusted key, IMPOSSIBLE where it does not fit this
            device, MISMATCH where the engine computes something else, and what a build raises.
    """
    folder = JobFolder(job.folder)
    with folder.working(reporter) as events, contextlib.ExitStack() as opened:
        if job.rehearse:
            events.warn(REHEARSAL)
        machine = this_machine(disk=job.folder)
        bundle = opened.enter_context(trusted_bundle(job.bundle, trust))
        manifest = bundle.manifest
        # An engine in the bundle is of no concern: it is made anew here.
        require_fit(dataclasses.replace(manifest, engine=None), machine, rehearse=job.rehearse)
        digest = bundle.file_digest()
        folder.begin(_key(job, digest, machine))
        folder.repeated_phase("facts", lambda: machine)
        model, built = job.folder / "model", job.folder / "built"
        _, unpacked = folder.phase("extract", lambda: _extract(bundle, model), _Extracted.from_json, model.name)
        if {name: file.sha256 for name, file in unpacked.items() if name not in (MANIFEST, SIGNATURE)} != {
            file.path: file.sha256 for file in manifest.files
        }:
            raise _strange(model, "what was unpacked is not what was signed")
        engine, left = folder.phase(
            "build",
            lambda: _build(job, model, built, manifest, digest, machine, events),
            EngineReport.from_json,
            built.name,
        )
        packed = _packed(built, manifest, engine, left)
        full = _manifest_of(manifest, engine, digest, machine)
        listed = dataclasses.replace(full, files=tuple(left[name] for name in sorted(packed)))
        runtime = "auto" if job.rehearse else engine.builder.value
        golden, _ = folder.phase(
            "golden", lambda: _golden(built, listed, runtime, job.rehearse, events), golden_from_json
        )
        answers, _ = folder.phase(
            "outputs", lambda: _outputs(job, built, listed, runtime, events), Answers.from_json, "outputs"
        )
        bench, _ = folder.phase("bench", lambda: _bench(built, listed, runtime, job.rehearse, events), bench_from_json)
        path = packed_into(job.folder, full.name)
        made, _ = folder.phase("pack", lambda: _pack(path, packed, full, events), DeviceBundle.from_json, path.name)
        result = JobResult(engine, job.rehearse, machine, golden, answers, bench, made)
        folder.finish(result)
    return result


@dataclass(frozen=True)
class _Extracted:
    """The files that were unpacked, by name."""

    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"files": list(self.files)}

    @classmethod
    def from_json(cls, record: Record) -> _Extracted:
        """What :meth:`to_json` wrote."""
        return cls(record.texts("files"))


def software_of(machine: Machine, *, rehearse: bool) -> tuple[object, ...]:
    """What of a machine makes the results of a job other ones."""
    rtx = machine.rtx if rehearse else None
    return (
        *(machine.sm, machine.tensorrt, machine.onnxruntime, machine.processor, rtx, machine.arch),
        own_version(),
    )


def _key(job: Job, digest: str, machine: Machine) -> str:
    """What makes the results of a job other ones."""
    parts = software_of(machine, rehearse=job.rehearse)
    images = [(file.name, sha256_file(file)) for file in _images(job)]
    return sha256_bytes(canonical_json([digest, job.rehearse, *parts, images]))


def _images(job: Job) -> list[Path]:
    return [file for file in sorted(job.folder.glob(IMAGES)) if file.is_file()]


def _extract(bundle: TrustedBundle, model: Path) -> _Extracted:
    with atomic_directory(model) as partial:
        bundle.extract(partial)
    return _Extracted(tuple(sorted(file.name for file in model.iterdir())))


def _build(
    job: Job, model: Path, built: Path, manifest: Manifest, digest: str, machine: Machine, reporter: Reporter
) -> EngineReport:
    target, settings = how_to_build(manifest, rehearse=job.rehearse)
    cache = settings.timing_cache
    onnx = next(model / name for name in MODELS if (model / name).exists())
    with atomic_directory(built) as partial:
        report = build_engine(onnx, partial / ENGINE, target, settings, reporter, partial / LOG)
        engine = dataclasses.replace(report, rehearsal=job.rehearse)
        if cache and report.timing_cache and (cache / report.timing_cache).exists():
            shutil.copy(cache / report.timing_cache, partial / TIMING)
        (partial / ENGINE_REPORT).write_bytes(pretty_json(engine.to_json()))
        for name in (file.path for file in manifest.files if "/" not in file.path):
            if not (partial / name).exists():
                os.link(model / name, partial / name)
        # The runner reads the manifest beside the engine: it must be that of the engine built here.
        (partial / "manifest.json").unlink(missing_ok=True)
        (partial / "manifest.json").write_bytes(
            pretty_json(_manifest_of(manifest, engine, digest, machine).described())
        )
    return engine


def how_to_build(manifest: Manifest, *, rehearse: bool) -> tuple[Target, BuildSettings]:
    """For what and how the engine of a bundle that fits this device is built: with its timing cache, if it keeps one.

    Raises:
        ResvitError: IMPOSSIBLE for what cannot be rehearsed.
    """
    target = manifest.target
    assert target is not None  # else it does not fit
    if rehearse and target.on_cpu:
        raise ResvitError(
            "This bundle is for processors, and there is nothing to rehearse: this machine has one.",
            "Leave --rehearse out.",
            ExitCode.IMPOSSIBLE,
        )
    cache = None if target.on_cpu else cache_folder("timing")
    settings = dataclasses.replace(manifest.build_settings, timing_cache=cache)
    if rehearse and settings.plugins != "off":
        raise ResvitError(
            "This bundle's engine has kernels of our own, and TensorRT for RTX, which rehearses, takes no plugins.",
            "Rehearse with a bundle that was built with --plugins off.",
            ExitCode.IMPOSSIBLE,
        )
    return proxy_target(target) if rehearse else target, settings


def _manifest_of(manifest: Manifest, engine: EngineReport, digest: str, machine: Machine) -> Manifest:
    """The manifest of the built engine: the original's, what it was built from, and on what."""
    rehearsal = bool(engine.rehearsal)
    original = sha256_bytes(canonical_json(manifest.to_json()))
    warning = manifest.warning
    if rehearsal:
        warning = " ".join(part for part in (manifest.warning, REHEARSAL) if part)
    return dataclasses.replace(
        manifest,
        engine=engine,
        plan=None,
        warning=warning,
        built=BuiltOnDevice.on(machine, digest, original, rehearsal=rehearsal),
        files=(),
    )


def _golden(
    built: Path, manifest: Manifest, runtime: str, rehearse: bool, reporter: Reporter
) -> GoldenReport | Skipped:
    reporter.say("Comparing the golden outputs")
    try:
        return golden_check(built, manifest, runtime)
    except ResvitError as error:
        if not (rehearse and error.code == ExitCode.MISSING):
            raise
        return _skipped("golden check", error, reporter)


def _outputs(job: Job, built: Path, manifest: Manifest, runtime: str, reporter: Reporter) -> Answers:
    """Answer every image; ``outputs/NAME.npy`` holds float32 [N, …] for the images of the same name.

    That is the first output; of others, ``NAME-out1.npy`` and so on, in the manifest's order.
    """
    pieces = _images(job)
    if not pieces:
        return Answers(0, None)
    folder = job.folder / "outputs"
    remove(folder)
    make_folder(folder)
    total = sum(len(np.load(piece, mmap_mode="r")) for piece in pieces)
    try:
        with open_runner(built, manifest, runtime) as runner:
            batch = max(runner.batch[1], _AT_ONCE // runner.batch[1] * runner.batch[1])
            answers = _answered(runner, pieces, folder, batch, manifest)
            for _ in reporter.track(answers, f"validate ({runner.label})", total):
                pass
            return Answers(total, runner.label, runner.why)
    except ResvitError as error:
        if not (job.rehearse and error.code == ExitCode.MISSING):
            raise
        return Answers(0, None, skipped=_skipped("validation", error, reporter).why)


def _answered(runner: Runner, pieces: Sequence[Path], folder: Path, batch: int, manifest: Manifest) -> Iterator[None]:
    """Write the outputs of every piece; yields once for each image."""
    name, outputs = input_name(runner, manifest), [tensor.name for tensor in manifest.outputs]
    for piece in pieces:
        images = np.load(piece, mmap_mode="r")
        answered: list[list[np.ndarray[Any, Any]]] = [[] for _ in outputs]
        for begin in range(0, len(images), batch):
            part = np.ascontiguousarray(images[begin : begin + batch], dtype=np.float32)
            answers = runner({name: encoded(part, manifest)})
            for parts, output in zip(answered, outputs, strict=True):
                parts.append(np.asarray(answers[output], np.float32))
            yield from itertools.repeat(None, len(part))
        # The first last: where its file is there, so are the others.
        for number in reversed(range(len(outputs))):
            file = folder / (f"{piece.stem}-out{number}.npy" if number else piece.name)
            with atomic_file(file) as partial, partial.open("wb") as stream:
                np.save(stream, np.concatenate(answered[number]))


def _bench(built: Path, manifest: Manifest, runtime: str, rehearse: bool, reporter: Reporter) -> BenchReport | Skipped:
    reporter.say("Timing")
    try:
        return _timed(built, manifest, runtime, _REHEARSED_SECONDS if rehearse else _SECONDS)
    except ResvitError as error:
        if not (rehearse and error.code == ExitCode.MISSING):
            raise
        return _skipped("timing", error, reporter)


def _timed(built: Path, manifest: Manifest, runtime: str, seconds: float) -> BenchReport:
    with open_runner(built, manifest, runtime) as runner:
        return measure(runner, BenchSettings(batch=manifest.build_settings.batch[1], seconds=seconds))


def packed_into(folder: Path, name: object) -> Path:
    """The file of the new bundle; raises INPUT for a name that could lead elsewhere."""
    return folder / f"{require_name(name, 'The name of the bundle,')}-engine.resvit"


def _pack(path: Path, packed: Mapping[str, RecordedFile], manifest: Manifest, reporter: Reporter) -> DeviceBundle:
    key = own_key()
    write_bundle(path, manifest, packed, key)
    reporter.say(f"{path.name}: signed by {key.public.name}")
    return DeviceBundle(path.name, sha256_file(path), key.public.to_text(), key.public.keyid)


def _packed(
    built: Path, signed: Manifest, engine: EngineReport, left: Mapping[str, BundledFile]
) -> dict[str, RecordedFile]:
    """The files of the new bundle by their names in it, each with the digest that it must have.

    That is the one that was signed, of what came in the bundle, and of what the build made the one of its record.

    Raises:
        ResvitError: UNTRUSTED for a file that neither the bundle nor the build knows.
    """
    library = engine.plugin_library
    others = [name for name in (ENGINE_REPORT, LOG, TIMING, engine.layers) if name and name in left]
    made = {name: left[name].sha256 for name in others} | {ENGINE: engine.sha256}
    if library:
        made[library.name] = library.sha256
    known = {**{file.path: file.sha256 for file in signed.files}, **made}
    packed = {}
    for name in left:
        if name in _NOT_PACKED:
            continue
        if name not in known:
            raise _strange(built / name, "neither the bundle nor the build knows it")
        packed[name] = RecordedFile(built / name, known[name])
    return packed


def _strange(path: Path, why: str) -> ResvitError:
    return ResvitError(
        f"{path} is not signed: {why}.",
        "Let nothing else write into the folder of a job; remove that folder and run the same command.",
        ExitCode.UNTRUSTED,
    )


def _skipped(what: str, error: ResvitError, reporter: Reporter) -> Skipped:
    reporter.warn(f"No {what} in this rehearsal: {error.problem}")
    return Skipped(error.problem)
