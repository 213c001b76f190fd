"""The device stage: the bundle is built, checked and timed on the device, and the gate here judges its answers."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json, sha256_file
from resvit_engines.machine import Machine
from resvit_engines.targets.table import Target, version_of
from resvit_export.auditing import audit_on_device
from resvit_export.run_folder import RECORD, Artifact

if TYPE_CHECKING:
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_engines.keys.private import SigningKey
    from resvit_engines.remote.device import RemoteJob
    from resvit_engines.remote.job_result import JobResult
    from resvit_export.pipeline import Pipeline

IMAGES_MIB_VARIABLE = "RESVIT_DEVICE_IMAGES_MIB"
"""How many MiB of validation images are copied to a device at most."""
_IMAGES_MIB = 512
_PIECE_MIB = 32
_SHARE = 4  # of free memory and disk, one part in four may go to images
_KEY_FACTS = ("sm", "gpu", "tensorrt", "rtx", "jetpack", "arch", "python", "host")


def run_on_device(pipeline: Pipeline, device: str, rehearse: bool = False) -> Artifact:
    """Stage ``device``: build the bundle's engine on ``device`` (``ssh://user@host``), validate and time it there.

    Its folder holds ``engine.plan``, ``engine.json``, ``build.log``, timing cache and layers where there are any,
    ``predictions.npz``, ``audit.json`` of its own layers, and ``device.json`` with the facts, the verdict on the
    images that fitted and the times.

    Raises:
        ResvitError: IMPOSSIBLE where the device is not the target, and what ``Device.run`` raises.
    """
    from resvit_engines.remote.device import Device
    from resvit_engines.remote.ssh import Connection, address_from
    from resvit_engines.remote.wheelhouse import WHEELS_VARIABLE

    address = address_from(device)
    bundle = pipeline.bundle_path
    with Connection(address, pipeline.reporter) as connection:
        there = Device(connection, pipeline.reporter)
        facts = there.machine()
        if not rehearse:
            require_target_there(pipeline.require_target(), facts, device)
        count = images_that_fit(pipeline.facts["input_shape"], len(pipeline.image_sets[1]), facts)
        if pipeline.reads_more_than_images:
            pipeline.reporter.warn(
                "The network reads more than images: the device builds, times and checks the golden outputs, and is "
                "not validated on the whole set."
            )
            count = 0
        known = facts.to_json()

        def work(folder: Path) -> None:
            wheels = os.environ.get(WHEELS_VARIABLE)
            there.prepare(facts, Path(wheels) if wheels else None)
            with tempfile.TemporaryDirectory(prefix="resvit-device-") as scratch:
                signed = _signed_for(bundle, pipeline.signing_key, Path(scratch))
                job = _job(pipeline, *signed, rehearse, count, Path(scratch))
                result = there.run(job)
                there.fetch(job, folder)
            _judge_into(folder, pipeline, result, count)
            if not rehearse:
                audit_on_device(pipeline, folder)

        return pipeline.run.stage(
            "device",
            {
                "device": {name: known[name] for name in _KEY_FACTS},
                "rehearse": rehearse,
                "images": count,
                "max_drop": pipeline.recipe.max_drop,
                "confidence": pipeline.confidence,
            },
            {"bundle": sha256_file(bundle), "images": pipeline.image_sets[1].digest},
            (),
            work,
        )


def device_stage(pipeline: Pipeline) -> Artifact | None:
    """The newest finished stage ``device`` of the pipeline's bundle, on whatever device; None where there is none."""
    bundle = sha256_file(pipeline.bundle_path)
    for folder in sorted(pipeline.run.path.glob("device-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((folder / RECORD).read_bytes())
            if record["inputs"]["bundle"] == bundle:
                return Artifact("device", folder, record, reused=True)
    return None


def look_at_device(pipeline: Pipeline, device: str, rehearse: bool = False) -> None:
    """Ask the device what it is and say so, before hours of work end at one that is not there or not the target.

    Raises:
        ResvitError: as ``run_on_device``.
    """
    from resvit_engines.remote.device import Device
    from resvit_engines.remote.ssh import Connection, address_from

    if rehearse and pipeline.fuses:
        raise ResvitError(
            f"Kernels of our own ({pipeline.plugin_choice.reason}) cannot be rehearsed: TensorRT for RTX takes no "
            "plugins.",
            "Rehearse with --plugins off.",
            ExitCode.IMPOSSIBLE,
        )
    with Connection(address_from(device), pipeline.reporter) as connection:
        facts = Device(connection, pipeline.reporter).machine()
    pipeline.reporter.say(describe(facts, device))
    if not rehearse:
        require_target_there(pipeline.require_target(), facts, device)


def describe(facts: Machine, name: str) -> str:
    """One line about a device for people."""
    parts = [
        facts.gpu or "no NVIDIA GPU",
        f"JetPack {facts.jetpack}" if facts.jetpack else "",
        f"TensorRT {facts.tensorrt}" if facts.tensorrt else "",
        f"{facts.memory_available_mib} of {facts.memory_mib} MiB free",
        f"{facts.free_disk_mib} MiB of disk",
        f"power mode {facts.power_mode}" if facts.power_mode else "",
        f"clocks {facts.clocks}" if facts.clocks else "",
    ]
    return f"{name}: {', '.join(part for part in parts if part)}"


def require_target_there(target: Target, facts: Machine, device: str) -> None:
    """Refuse a device that is not what the bundle was made for, before anything large is copied.

    Raises:
        ResvitError: IMPOSSIBLE, naming what to say instead.
    """
    if facts.sm != target.sm:
        name = f" ({facts.gpu})" if facts.gpu else ""
        found = f"compute capability {facts.sm / 10:.1f}{name}" if facts.sm else "no NVIDIA GPU with a working driver"
        raise ResvitError(
            f"{device} has {found}, and {target.title} is {target.sm / 10:.1f}.",
            "Name the target that it is, or another device; --rehearse only tries the way there, without that GPU.",
            ExitCode.IMPOSSIBLE,
        )
    if target.jetpack and facts.jetpack and version_of(facts.jetpack)[:2] != version_of(target.jetpack)[:2]:
        raise ResvitError(
            f"{device} has JetPack {facts.jetpack}, and the bundle was made for JetPack {target.jetpack}.",
            f"Say --jetpack {'.'.join(str(part) for part in version_of(facts.jetpack)[:2])}.",
            ExitCode.IMPOSSIBLE,
        )
    if facts.tensorrt is None and target.jetpack:
        raise ResvitError(
            f"{device} has no TensorRT.", "On the device: sudo apt install nvidia-jetpack", ExitCode.MISSING
        )


def images_that_fit(shape: list[int], most: int, facts: Machine) -> int:
    """How many validation images [C, H, W] in FP32 are copied: all, or as many as a share of the device takes."""
    limit = int(os.environ.get(IMAGES_MIB_VARIABLE, _IMAGES_MIB))
    limit = min(limit, facts.memory_available_mib // _SHARE, facts.free_disk_mib // _SHARE)
    return max(0, min(most, (limit << 20) // (4 * math.prod(shape))))


def _signed_for(bundle: Path, key: SigningKey | None, folder: Path) -> tuple[Path, str]:
    """A signed copy of the bundle in ``folder``, and the public key (the text of its file) that the job is to trust.

    By the user's own key where the recipe or the environment names one, else by this machine's: the same each time,
    so that a job is found again.
    """
    from resvit_engines.bundle.bundle import sign_bundle
    from resvit_engines.keys.own import own_key

    key = key or own_key()
    signed = Path(shutil.copy(bundle, folder / "bundle.resvit"))
    sign_bundle(signed, key)
    return signed, key.public.to_text()


def _job(pipeline: Pipeline, bundle: Path, key: str, rehearse: bool, count: int, scratch: Path) -> RemoteJob:
    from resvit_engines.remote.device import RemoteJob

    shape = pipeline.facts["input_shape"]
    per_piece = max(1, (_PIECE_MIB << 20) // (4 * math.prod(shape)))
    images = pipeline.image_sets[1]
    total = len(images)
    pipeline.reporter.say(f"{count} of {total} validation images go to the device")
    pieces = _pieces(images, count, per_piece, scratch)
    takers: list[Callable[[], Path]] = [functools.partial(next, pieces) for _ in range(-(-count // per_piece))]
    return RemoteJob(bundle, key, tuple(takers), rehearse)


def _pieces(images: ImageSet, count: int, per_piece: int, scratch: Path) -> Iterator[Path]:
    """Write the first ``count`` images in pieces, one file at a time: the last one is removed for the next."""
    left, previous = count, None
    for number, batch in enumerate(images.batches(per_piece)):
        if left <= 0:
            return
        if previous is not None:
            previous.unlink()
        written = scratch / "images.npy"
        np.save(written, np.ascontiguousarray(batch.images[:left], dtype=np.float32))
        # Its digest in its name: other images are another job.
        previous = written.rename(scratch / f"images-{number:04d}-{sha256_file(written)[:12]}.npy")
        left -= min(left, len(batch.images))
        yield previous


def _judge_into(folder: Path, pipeline: Pipeline, result: JobResult, count: int) -> None:
    """Write ``device.json``; the outputs of the device become ``predictions.npz`` and a verdict of the gate."""
    from resvit_calibrate.answers.replay import FirstImages, Replay
    from resvit_calibrate.gate.gate import judge

    document: dict[str, Any] = {**result.to_json(), "images": count, "verdict": None}
    outputs = sorted((folder / "outputs").glob("*.npy"))
    if outputs:
        onnx, task = pipeline.from_onnx, pipeline.task
        every = task.load(pipeline.baseline.path("onnx.npz") if onnx else pipeline.reference.path("pytorch.npz"))
        arrays = _outputs_of(outputs, [str(item["name"]) for item in pipeline.exported.json("export.json")["outputs"]])
        answered = min(len(value) for value in arrays.values())
        if answered != count:
            raise ResvitError(
                f"The device answered {answered} of {count} images.", "Run the same command again.", ExitCode.SYSTEM
            )
        images = FirstImages(pipeline.image_sets[1], count)
        candidate = task.answers(Replay(arrays), images, pipeline.batch_size, what="validate (device)")
        candidate.save(folder / "predictions.npz")
        comparison = task.compare(every.first(count), candidate, pipeline.confidence)
        verdict = judge(comparison, pipeline.recipe.max_drop, pipeline.confidence)
        document.update(verdict=verdict.to_json(), runner=result.outputs.runner)
        for file in outputs:
            file.unlink()
        (folder / "outputs").rmdir()
    (folder / "device.json").write_bytes(pretty_json(document))


def _outputs_of(files: list[Path], names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Every output of the engine, all pieces joined: the files of output 1 and on end in ``-out1.npy`` …"""
    parts: dict[str, list[np.ndarray[Any, Any]]] = {}
    for file in files:
        numbered = re.search(r"-out(\d+)\.npy$", file.name)
        parts.setdefault(names[int(numbered[1]) if numbered else 0], []).append(np.load(file))
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def device_code(stage: Artifact, allow_rejected: bool) -> ExitCode:
    """What the process returns for the verdict on the device's answers."""
    verdict = stage.json("device.json")["verdict"]
    codes = {"rejected": ExitCode.OK if allow_rejected else ExitCode.REJECTED, "undecided": ExitCode.UNDECIDED}
    return codes.get(verdict["verdict"], ExitCode.OK) if verdict else ExitCode.OK


def device_lines(stage: Artifact) -> tuple[str, ...]:
    """What came of it, for people."""
    found = stage.json("device.json")
    facts, engine, verdict, bench = found["facts"], found["engine"], found["verdict"], found["bench"]
    lines = [
        f"device: {facts['gpu'] or facts['host']}, {engine['builder']} {engine['builder_version']}: {engine['bytes']} "
        f"bytes in {engine['seconds']:.1f} s ({stage.path('engine.plan')})"
    ]
    if verdict:
        lines.append(f"device verdict: {verdict['verdict']}; {verdict['reason']} ({found['runner']})")
    if "latency_ms" in bench:
        p50, p99 = bench["latency_ms"]["p50"], bench["latency_ms"]["p99"]
        lines.append(
            f"device time: median {p50:.2f} ms, 99% below {p99:.2f} ms at batch {bench['batch']} ({bench['label']})"
        )
        lines += [f"device: {remark}" for remark in bench["remarks"]]
    if found["rehearsal"]:
        lines.append("device: this was a REHEARSAL; TensorRT for RTX stood in, and nothing of it is true of the device")
    return tuple(lines)
