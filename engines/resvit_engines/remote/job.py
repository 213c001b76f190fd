"""A bundle becomes a tested engine on the device that it is for, in phases that survive a kill.

Facts and fit, signature, unpacking, build, golden check, outputs on images, timing, and a new bundle with the engine,
signed by the device's own key. Nothing is unpacked before the signature holds. Where TensorRT is absent, a rehearsal
lets TensorRT for RTX stand in; it is called one in every result.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import extract_trusted, read_trusted_manifest, write_bundle
from resvit_engines.bundle.fit import require_fit
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_directory, atomic_file, canonical_json, pretty_json, sha256_bytes, sha256_file
from resvit_engines.keys.own import own_key
from resvit_engines.keys.public import TrustStore
from resvit_engines.machine import DeviceFacts, device_facts
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.remote.job_folder import JobFolder
from resvit_engines.targets.speeds import Speed
from resvit_engines.targets.table import Builder, Kind, Target, proxy_target
from resvit_engines.version import own_version

if TYPE_CHECKING:
    from resvit_engines.run.runner import Runner

ENGINE, ENGINE_FACTS = "engine.plan", "engine.json"
IMAGES = "images-*.npy"
REHEARSAL = "REHEARSAL: TensorRT for RTX stood in for TensorRT; this engine is not for the device."
_FROM_BUNDLE = ("format", "format_version", "files", "plan")
_NOT_PACKED = ("manifest.json", "signature.json", "plan.json", "README.txt")
_MODELS = ("model.tensorrt.onnx", "model.onnx")
_AT_ONCE = 32
"""Images that are in memory at once while answering."""
_SECONDS, _REHEARSED_SECONDS = 5.0, 0.5
"""How long is timed; a rehearsal's times say nothing about the device."""
_RUNTIMES = {"TensorRT": "tensorrt", "TensorRT for RTX": "tensorrt-rtx"}


@dataclass(frozen=True)
class Job:
    """What to build from, and where: the images ``images-*.npy`` (float32 [N, C, H, W]) in ``folder`` are answered."""

    bundle: Path
    folder: Path
    rehearse: bool = False


def run_job(job: Job, trust: TrustStore, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Do what of the job is not done yet and return its result, which ``result.json`` holds too.

    The result has ``engine`` (see ``EngineReport``), ``golden``, ``outputs``, ``bench``, ``facts``, ``bundle`` and
    ``rehearsal``; files lie in ``folder/built`` and ``folder/outputs``.

    Raises:
        ResvitError: UNTRUSTED for a bundle that is not signed by a trusted key, IMPOSSIBLE where it does not fit this
            device, MISMATCH where the engine computes something else, and what a build raises.
    """
    work = JobFolder(job.folder)
    with work.working(reporter) as events:
        if job.rehearse:
            events.warn(REHEARSAL)
        facts = device_facts(disk=job.folder)
        manifest = read_trusted_manifest(job.bundle, trust)
        # An engine in the bundle is of no concern: it is made anew here.
        wanted = {name: value for name, value in manifest.items() if name != "engine"}
        require_fit(wanted, facts, rehearse=job.rehearse)
        digest = sha256_file(job.bundle)
        work.begin(_key(job, digest, facts))
        work.phase("facts", facts.to_json, always=True)
        model, built = job.folder / "model", job.folder / "built"
        work.phase("extract", lambda: _extract(job, model, trust))
        engine = work.phase("build", lambda: _build(job, model, built, manifest, digest, facts, events))
        full = _manifest_of(manifest, engine, digest, facts)
        listed = {**full, "files": [_entry(name, file) for name, file in _packed(built).items()]}
        runtime = "auto" if job.rehearse else _RUNTIMES[engine["builder"]]
        result = {
            "engine": engine,
            "rehearsal": job.rehearse,
            "facts": facts.to_json(),
            "golden": work.phase("golden", lambda: _golden(built, listed, runtime, job.rehearse, events)),
            "outputs": work.phase("outputs", lambda: _outputs(job, built, listed, runtime, events)),
            "bench": work.phase("bench", lambda: _bench(built, listed, runtime, job.rehearse, events)),
            "bundle": work.phase("pack", lambda: _pack(job, built, full, events)),
        }
        work.finish(result)
    return result


def settings_from_manifest(manifest: Mapping[str, Any]) -> BuildSettings:
    """The builder's settings as the bundle's maker chose them."""
    found = manifest.get("build") or manifest.get("plan", {}).get("settings")
    if found is None:
        recipe = manifest.get("settings", {})
        low, *rest = (int(part) for part in str(recipe.get("batch", "1")).split(":"))
        found = {**recipe, "batch": [low, *(rest or (low, low))], "sparse": recipe.get("sparsity") is not None}
    names = {field.name for field in dataclasses.fields(BuildSettings)} - {"timing_cache", "plugin_library"}
    known = {name: value for name, value in found.items() if name in names and value is not None}
    return BuildSettings(**{**known, "batch": tuple(known.get("batch", (1, 1, 1)))})


def target_from_json(document: Mapping[str, Any]) -> Target:
    """What ``Target.to_json`` wrote; a target of the user's own comes to the device this way.

    Raises ``ResvitError`` where a field is missing or of a kind that this version does not know.
    """
    try:
        names = {field.name for field in dataclasses.fields(Target)}
        plain = {name: value for name, value in document.items() if name in names}
        plain.update(kind=Kind(plain["kind"]), builder=Builder(plain["builder"]), notes=tuple(plain["notes"]))
        plain["speed"] = Speed(**plain["speed"])
        return Target(**plain)
    except (KeyError, TypeError, ValueError) as error:
        raise ResvitError(
            f"The target in the bundle is not understood: {error}.",
            f"Use the version of resvit-export that wrote it; this is {own_version()}.",
        ) from error


def _key(job: Job, digest: str, facts: DeviceFacts) -> str:
    """What makes the results of a job other ones."""
    parts = (facts.sm, facts.tensorrt, facts.rtx if job.rehearse else None, facts.arch, own_version())
    images = [(file.name, file.stat().st_size) for file in sorted(job.folder.glob(IMAGES))]
    return sha256_bytes(canonical_json([digest, job.rehearse, *parts, images]))


def _extract(job: Job, model: Path, trust: TrustStore) -> dict[str, Any]:
    shutil.rmtree(model, ignore_errors=True)
    extract_trusted(job.bundle, model, trust)
    return {"files": sorted(file.name for file in model.iterdir())}


def _build(
    job: Job, model: Path, built: Path, manifest: Mapping[str, Any], digest: str, facts: DeviceFacts, reporter: Reporter
) -> dict[str, Any]:
    target = target_from_json(manifest["target"])
    if job.rehearse:
        target = proxy_target(target)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resvit" / "timing"
    settings = dataclasses.replace(settings_from_manifest(manifest), timing_cache=cache)
    onnx = next(model / name for name in _MODELS if (model / name).exists())
    if job.rehearse and settings.plugins != "off":
        raise ResvitError(
            "This bundle's engine has kernels of our own, and TensorRT for RTX, which rehearses, takes no plugins.",
            "Rehearse with a bundle that was built with --plugins off.",
            ExitCode.IMPOSSIBLE,
        )
    with atomic_directory(built) as partial:
        report = build_engine(onnx, partial / ENGINE, target, settings, reporter, partial / "build.log")
        engine = {**report.to_json(), "rehearsal": job.rehearse}
        if report.timing_cache and (cache / report.timing_cache).exists():
            shutil.copy(cache / report.timing_cache, partial / "timing.cache")
        (partial / ENGINE_FACTS).write_bytes(pretty_json(engine))
        for file in model.iterdir():
            if not (partial / file.name).exists() and file.is_file():
                os.link(file, partial / file.name)
        # The runner reads the manifest beside the engine: it must be that of the engine built here.
        (partial / "manifest.json").unlink(missing_ok=True)
        (partial / "manifest.json").write_bytes(pretty_json(_manifest_of(manifest, engine, digest, facts)))
    return engine


def _manifest_of(
    manifest: Mapping[str, Any], engine: Mapping[str, Any], digest: str, facts: DeviceFacts
) -> dict[str, Any]:
    """The manifest of the built engine: the original's, what it was built from, and on what."""
    built = {key: value for key, value in manifest.items() if key not in _FROM_BUNDLE}
    built["engine"] = dict(engine)
    built["built_from"] = {"bundle": digest, "manifest": sha256_bytes(canonical_json(manifest))}
    shown = ("sm", "gpu", "tensorrt", "rtx", "jetpack", "arch")
    built["built_on"] = {name: value for name, value in facts.to_json().items() if name in shown}
    if engine["rehearsal"]:
        built["rehearsal"] = True
        built["warning"] = " ".join(part for part in (manifest.get("warning"), REHEARSAL) if part)
    return built


def _golden(
    built: Path, manifest: Mapping[str, Any], runtime: str, rehearse: bool, reporter: Reporter
) -> dict[str, Any]:
    from resvit_engines.run.golden import golden_check

    reporter.say("Comparing the golden outputs")
    try:
        return dict(golden_check(built, manifest, runtime).to_json())
    except ResvitError as error:
        if not (rehearse and error.code == ExitCode.MISSING):
            raise
        return _skipped("golden check", error, reporter)


def _outputs(job: Job, built: Path, manifest: Mapping[str, Any], runtime: str, reporter: Reporter) -> dict[str, Any]:
    """Answer every image; ``outputs/NAME.npy`` holds float32 [N, …] for the images of the same name.

    That is the first output; of others, ``NAME-out1.npy`` and so on, in the manifest's order.
    """
    from resvit_engines.run.runner import open_runner

    pieces = sorted(job.folder.glob(IMAGES))
    if not pieces:
        return {"images": 0, "runner": None}
    folder = job.folder / "outputs"
    folder.mkdir(exist_ok=True)
    total = sum(len(np.load(piece, mmap_mode="r")) for piece in pieces)
    try:
        with open_runner(built, manifest, runtime) as runner:
            batch = max(runner.batch[1], _AT_ONCE // runner.batch[1] * runner.batch[1])
            answers = _answered(runner, pieces, folder, batch, manifest)
            for _ in reporter.track(answers, f"validate ({runner.label})", total):
                pass
            return {"images": total, "runner": runner.label, "why": runner.why}
    except ResvitError as error:
        if not (job.rehearse and error.code == ExitCode.MISSING):
            raise
        return {"images": 0, "runner": None, **_skipped("validation", error, reporter)}


def _answered(
    runner: Runner, pieces: Sequence[Path], folder: Path, batch: int, manifest: Mapping[str, Any]
) -> Iterator[None]:
    """Write the outputs of every piece; yields once for each image."""
    name, outputs = manifest["input"]["name"], [item["name"] for item in manifest["outputs"]]
    for piece in pieces:
        images, found = np.load(piece, mmap_mode="r"), [[] for _ in outputs]  # type: ignore[var-annotated]
        for begin in range(0, len(images), batch):
            part = np.ascontiguousarray(images[begin : begin + batch], dtype=np.float32)
            answers = runner({name: part})
            for parts, output in zip(found, outputs, strict=True):
                parts.append(np.asarray(answers[output], np.float32))
            yield from itertools.repeat(None, len(part))
        # The first last: where its file is there, so are the others.
        for number in reversed(range(len(outputs))):
            file = folder / (f"{piece.stem}-out{number}.npy" if number else piece.name)
            with atomic_file(file) as partial, partial.open("wb") as stream:
                np.save(stream, np.concatenate(found[number]))


def _bench(
    built: Path, manifest: Mapping[str, Any], runtime: str, rehearse: bool, reporter: Reporter
) -> dict[str, Any]:
    reporter.say("Timing")
    try:
        return _timed(built, manifest, runtime, _REHEARSED_SECONDS if rehearse else _SECONDS)
    except ResvitError as error:
        if not (rehearse and error.code == ExitCode.MISSING):
            raise
        return _skipped("timing", error, reporter)


def _timed(built: Path, manifest: Mapping[str, Any], runtime: str, seconds: float) -> dict[str, Any]:
    from resvit_engines.bench.bench import BenchSettings, measure
    from resvit_engines.run.runner import open_runner

    with open_runner(built, manifest, runtime) as runner:
        return measure(
            runner, BenchSettings(batch=settings_from_manifest(manifest).batch[1], seconds=seconds)
        ).to_json()


def _pack(job: Job, built: Path, manifest: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
    key = own_key()
    path = job.folder / f"{manifest['name']}-engine.resvit"
    write_bundle(path, manifest, _packed(built), key)
    reporter.say(f"{path.name}: signed by {key.public.name}")
    return {"name": path.name, "sha256": sha256_file(path), "key": key.public.to_text(), "keyid": key.public.keyid}


def _packed(built: Path) -> dict[str, Path]:
    """The files of the new bundle by their names in it."""
    files = (file for file in sorted(built.rglob("*")) if file.is_file() and file.name not in _NOT_PACKED)
    return {file.relative_to(built).as_posix(): file for file in files}


def _entry(name: str, file: Path) -> dict[str, Any]:
    return {"path": name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _skipped(what: str, error: ResvitError, reporter: Reporter) -> dict[str, Any]:
    reporter.warn(f"No {what} in this rehearsal: {error.problem}")
    return {"skipped": error.problem}
