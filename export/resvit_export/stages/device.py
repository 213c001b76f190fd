"""The device stage: the bundle is built, checked and timed on the device, and the gate here judges its answers."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from resvit_engines.audit.record import AuditRecord, SkippedAudit, audit_from_json
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json, sha256_file
from resvit_engines.machine import Machine
from resvit_engines.progress import Reporter
from resvit_engines.targets.software import version_of
from resvit_engines.targets.table import Builder, Target
from resvit_export.records.device import DeviceResult
from resvit_export.run_folder import RunFolder, read_record
from resvit_export.stage import Artifact, File, Stage, plain
from resvit_export.stages.audit import RESULT as AUDIT
from resvit_export.stages.audit import Audit
from resvit_export.stages.bundle import Signer
from resvit_export.stages.score import Answered
from resvit_export.task_choice import Questions

if TYPE_CHECKING:
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_engines.keys.private import SigningKey
    from resvit_engines.remote.device import RemoteJob
    from resvit_engines.remote.job_result import JobResult
    from resvit_engines.trt.io_tensor import IoTensor

RESULT = "device.json"
IMAGES_MIB_VARIABLE = "RESVIT_DEVICE_IMAGES_MIB"
"""How many MiB of validation images are copied to a device at most."""
_IMAGES_MIB = 512
_PIECE_MIB = 32
_SHARE = 4  # of free memory and disk, one part in four may go to images
KEY_FACTS = ("sm", "gpu", "tensorrt", "rtx", "jetpack", "arch", "python", "host", "processor")


@dataclass(frozen=True)
class OnDevice(Artifact):
    """The engine with all that lay beside it, ``device.json``, and ``predictions.npz`` where it was validated."""

    @functools.cached_property
    def result(self) -> DeviceResult:
        """What the device said, and the gate's verdict on its answers."""
        return self.read(RESULT, DeviceResult.from_json)

    @functools.cached_property
    def audit(self) -> AuditRecord | SkippedAudit | None:
        """What fused in the engine that was built there; None of a rehearsal's."""
        return self.read(AUDIT, lambda found: audit_from_json(found, AUDIT)) if self.has(AUDIT) else None


@dataclass(frozen=True)
class RunOnDevice(Stage[OnDevice]):
    """Build the bundle's engine on the device at ``address``, validate and time it there.

    The first ``count`` validation images are copied and answered; ``original`` holds the original network's answers,
    and ``outputs`` names the graph's outputs. ``rehearse`` lets TensorRT for RTX stand in. ``doubt`` says why the
    images tell nothing, where something does. ``audit`` is for the engine's own layers.
    """

    name: ClassVar[str] = "device"
    artifact: ClassVar[type[Artifact]] = OnDevice

    address: str
    device: Mapping[str, Any]
    rehearse: bool
    bundle: File
    signer: Signer | None
    questions: Questions
    count: int
    original: Answered
    outputs: tuple[str, ...]
    max_drop: float
    confidence: float
    doubt: str
    audit: Audit

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write what the device brought back, the verdict, the times, and the audit of its own layers."""
        from resvit_engines.remote.device import Device
        from resvit_engines.remote.ssh import Connection, address_from
        from resvit_engines.remote.wheelhouse import chosen_wheels

        wheels = chosen_wheels()
        with Connection(address_from(self.address), reporter) as connection:
            device = Device(connection, reporter)
            device.prepare(device.machine(), wheels, on_cpu=self.audit.target.on_cpu)
            with tempfile.TemporaryDirectory(prefix="resvit-device-") as scratch:
                job = self._job(Path(scratch), reporter)
                result = device.run(job)
                device.fetch(job, folder)
        self._judge(folder, result)
        if not self.rehearse:
            self.audit.write(folder, folder, reporter)

    def _job(self, scratch: Path, reporter: Reporter) -> RemoteJob:
        from resvit_engines.remote.device import RemoteJob

        bundle, key = _signed_for(self.bundle, self.signer.key if self.signer else None, scratch)
        images = self.questions.images
        height, width = self.questions.preprocess.size
        per_piece = max(1, (_PIECE_MIB << 20) // (4 * self.questions.preprocess.channels * height * width))
        reporter.say(f"{self.count} of {len(images)} validation images go to the device")
        pieces = _pieces(images, self.count, per_piece, scratch)
        takers: list[Callable[[], Path]] = [functools.partial(next, pieces) for _ in range(-(-self.count // per_piece))]
        return RemoteJob(bundle, key, tuple(takers), self.rehearse)

    def _judge(self, folder: Path, result: JobResult) -> None:
        """Write ``device.json``; the outputs of the device become ``predictions.npz`` and a verdict of the gate."""
        from resvit_calibrate.answers.replay import FirstImages, Replay
        from resvit_calibrate.gate.gate import judge
        from resvit_engines.bundle.bundle import read_manifest

        document: dict[str, Any] = {**result.to_json(), "images": self.count, "verdict": None}
        files = sorted((folder / "outputs").glob("*.npy"))
        if files:
            task, questions = self.questions.task.task(), self.questions
            arrays = outputs_of(files, self.outputs)
            require_answers(arrays, read_manifest(self.bundle.path).outputs, self.count)
            candidate = task.answers(Replay(arrays), FirstImages(questions.images, self.count), questions.batch_size)
            candidate.save(folder / "predictions.npz")
            comparison = task.compare(
                self.original.answers(questions.task).first(self.count), candidate, self.confidence
            )
            names = questions.images.class_names
            verdict = judge(comparison, self.max_drop, self.confidence, names, self.doubt)
            document.update(verdict=verdict.to_json(), runner=result.outputs.runner)
            for file in files:
                file.unlink()
            (folder / "outputs").rmdir()
        (folder / RESULT).write_bytes(pretty_json(document))


def newest_on_device(run: RunFolder, bundle: File) -> OnDevice | None:
    """The newest finished stage ``device`` of a bundle, on whatever device; None where there is none."""
    for folder in sorted(run.path.glob("device-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ResvitError):
            record = read_record(folder)
            if record.value.get("bundle") == plain(bundle):
                return OnDevice(folder, record, reused=True)
    return None


def look_at_device(address: str, target: Target, rehearse: bool, reporter: Reporter, *, quiet: bool = False) -> Machine:
    """Ask the device what it is and say so, before hours of work end at one that is not there or not the target.

    Raises:
        ResvitError: IMPOSSIBLE where the device is not the target, and what connecting raises.
    """
    from resvit_engines.remote.device import Device
    from resvit_engines.remote.ssh import Connection, address_from

    with Connection(address_from(address), reporter) as connection:
        facts = Device(connection, reporter).machine()
    if not quiet:
        reporter.say(describe(facts, address))
    if not rehearse:
        require_target_there(target, facts, address)
    return facts


def describe(facts: Machine, name: str) -> str:
    """One line about a device for people."""
    parts = [
        facts.gpu or "no NVIDIA GPU",
        facts.processor or "",
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
    if target.on_cpu:
        if facts.arch not in {"x86_64", "aarch64"}:
            raise ResvitError(
                f"{device} has a {facts.arch} processor, and engines are made for x86-64 and aarch64.",
                "Name another device.",
                ExitCode.IMPOSSIBLE,
            )
        return
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
    if target.builder is Builder.TENSORRT:
        _require_tensorrt_there(target, facts.tensorrt, device)


def _require_tensorrt_there(target: Target, installed: str | None, device: str) -> None:
    if installed is None:
        package = (
            "sudo apt install nvidia-jetpack" if target.jetpack else f"pip install 'tensorrt=={target.tensorrt}.*'"
        )
        raise ResvitError(f"{device} has no TensorRT.", f"On the device: {package}", ExitCode.MISSING)
    if version_of(installed)[:2] != version_of(target.tensorrt)[:2]:
        raise ResvitError(
            f"{device} has TensorRT {installed}, and the bundle was made for TensorRT {target.tensorrt}.",
            f"Say --tensorrt {'.'.join(map(str, version_of(installed)[:2]))}.",
            ExitCode.IMPOSSIBLE,
        )


def images_that_fit(shape: Sequence[int], most: int, facts: Machine) -> int:
    """How many validation images [C, H, W] in FP32 are copied: all, or as many as a share of the device takes."""
    from resvit_engines.outside import number_from_environment

    limit = int(number_from_environment(IMAGES_MIB_VARIABLE, _IMAGES_MIB))
    limit = min(limit, facts.memory_available_mib // _SHARE, facts.free_disk_mib // _SHARE)
    return max(0, min(most, (limit << 20) // (4 * math.prod(shape))))


def _signed_for(bundle: File, key: SigningKey | None, folder: Path) -> tuple[Path, str]:
    """A signed copy of the bundle in ``folder``, and the public key (the text of its file) that the job is to trust.

    Raises ``ResvitError`` INPUT where the bundle is not any more what its stage recorded.

    By the user's own key where the recipe or the environment names one, else by this machine's: the same each time,
    so that a job is found again.
    """
    from resvit_engines.bundle.bundle import sign_bundle
    from resvit_engines.keys.own import own_key

    key = key or own_key()
    signed = Path(shutil.copy(bundle.path, folder / "bundle.resvit"))
    File(signed, bundle.digest).require_unchanged()
    sign_bundle(signed, key)
    return signed, key.public.to_text()


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


def outputs_of(files: Sequence[Path], names: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Every output of the engine, all pieces joined: the files of output 1 and on end in ``-out1.npy`` …

    Raises:
        ResvitError: INPUT for a file that is no array of numbers, of an output that there is not, or of another shape
            than the other pieces.
    """
    from resvit_engines.run.npy import read_array

    parts: dict[str, list[np.ndarray[Any, Any]]] = {}
    for file in files:
        numbered = re.search(r"-out(\d+)\.npy$", file.name)
        number = int(numbered[1]) if numbered else 0
        if number >= len(names):
            raise _odd_answer(f"{file.name} is of output {number}, and the network has {len(names)}")
        parts.setdefault(names[number], []).append(read_array(file, "answer"))
    for name, pieces in parts.items():
        if len({piece.shape[1:] for piece in pieces}) > 1:
            raise _odd_answer(f"it answered with {name} of several shapes")
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def require_answers(arrays: Mapping[str, np.ndarray[Any, Any]], outputs: Sequence[IoTensor], count: int) -> None:
    """Refuse answers that are not those of ``count`` images by a network with these ``outputs``.

    Raises:
        ResvitError: INPUT where an output is missing, of another shape, or no number; SYSTEM where images are.
    """
    for name, value in arrays.items():
        if len(value) != count:
            raise ResvitError(
                f"The device answered {len(value)} of {count} images with {name}.",
                "Run the same command again.",
                ExitCode.SYSTEM,
            )
        if np.isnan(value).any():
            raise _odd_answer(f"its {name} are no numbers (NaN)")
    for output in outputs:
        if output.name not in arrays:
            raise _odd_answer(f"it answered without {output.name}")
        shape, wanted = arrays[output.name].shape, output.shape
        if len(shape) != len(wanted) or any(
            isinstance(size, int) and size >= 0 and size != given
            for given, size in zip(shape[1:], wanted[1:], strict=True)
        ):
            raise _odd_answer(f"its {output.name} have the shape {list(shape)}, and the network gives {list(wanted)}")


def _odd_answer(why: str) -> ResvitError:
    return ResvitError(
        f"The device's answers are not those of this network: {why}.",
        "Nothing of them was used. Run the same command again; if that does not help, look at the device by hand.",
    )
