"""A device over SSH: what it is, what it lacks, and a job that runs there whether or not the connection holds."""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file, write_atomic
from resvit_engines.machine import Machine
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record, record_from_bytes, shown
from resvit_engines.remote.job_result import JobResult, finished_result
from resvit_engines.remote.progress_events import replay
from resvit_engines.remote.ssh import Answer, Connection, quoted
from resvit_engines.remote.ssh_files import download, upload
from resvit_engines.remote.timing import LAYERS, VARIANTS, TimingResult, too_large
from resvit_engines.remote.wheel import requirements_for, write_device_wheel
from resvit_engines.remote.wheelhouse import download_wheels
from resvit_engines.targets.software import version_of

ROOT = ".local/share/resvit-device"
"""Of everything that is put on a device, from the home folder of its user; installed versions lie elsewhere."""
_PYTHON = f"{ROOT}/venv/bin/python"
_INSTALLED = f"{ROOT}/venv/.resvit-wheel"
_BUNDLES = "bundles"
_POLL = 1.0  # seconds
_PIECE = 1 << 20
_RESULTS = {
    "engine.plan": 64 << 30,
    "engine.json": 16 << 20,
    "build.log": 256 << 20,
    "layers.json": 1 << 30,
    "timing.cache": 4 << 30,
}
"""The files of a build that are fetched, and how many bytes each may have."""
_IMAGES = re.compile(r"images-[0-9a-f-]{1,40}\.npy")
_OUTPUT = re.compile(r"outputs/images-[0-9a-f-]{1,40}(-out[0-9]{1,3})?\.npy")
_OUTPUT_MOST = 8 << 30
_OUTPUTS_OF_A_PIECE = 256
_PROGRESS_MOST = 64 << 20
"""Bytes of progress of the longest job."""
_SILENT_MOST, _JOB_MOST = 4 * 3600.0, 48 * 3600.0
"""Seconds that a job may show no progress, and may take."""
_INSTALLING = 3600.0
"""Seconds that pip may take on a device."""


@dataclass(frozen=True)
class RemoteJob:
    """What to do on a device: a signed bundle, the public key (the text of its file) that signed it, and images.

    Each of ``images`` gives the path of one piece on this machine when it is asked for; the piece may go afterwards.
    """

    bundle: Path
    key: str
    images: Sequence[Callable[[], Path]] = ()
    rehearse: bool = False

    @property
    def folder(self) -> str:
        """Of the job on the device: the same bundle goes on where it was."""
        return f"{ROOT}/jobs/{sha256_file(self.bundle)[:16]}{'-rehearsal' if self.rehearse else ''}"


@dataclass(frozen=True)
class RemoteTiming:
    """Which signed bundles are built and timed on a device, the first the baseline; see ``remote.timing.TimingJob``.

    ``key`` is the public key (the text of its file) that signed all of them.
    """

    bundles: Sequence[Path]
    key: str
    rounds: int
    seconds: float
    rehearse: bool = False

    @functools.cached_property
    def folder(self) -> str:
        """Of the job on the device: the same bundles, timed in the same way, go on where they were."""
        parts = [sha256_file(path) for path in self.bundles]
        digest = sha256_bytes(canonical_json([parts, self.rounds, self.seconds]))
        return f"{ROOT}/jobs/tune-{digest[:16]}{'-rehearsal' if self.rehearse else ''}"


class Device:
    """What can be done on the other end of a connection. Every method can be done again after it was interrupted."""

    def __init__(self, connection: Connection, reporter: Reporter = SILENT) -> None:
        self.connection = connection
        self.reporter = reporter
        self._wheel: tuple[str, str] | None = None

    def machine(self, *, installed: bool = False) -> Machine:
        """Ask what the device is; before anything is installed there, from the wheel that is copied for it.

        Once ``prepare`` has been there (``installed``), what it installed counts too.

        Raises ``ResvitError`` MISSING without Python, IMPOSSIBLE where it is older than 3.10.
        """
        wheel, _ = self._copied_wheel()
        code = f"import sys; sys.path.insert(0, {wheel!r}); from resvit_engines.machine import main; main()"
        answer = self._run(f"{_PYTHON if installed else 'python3'} -c {quoted(code)}")
        if answer.code == 127:
            raise ResvitError(
                f"{self.connection.address} has no python3.", "On the device: sudo apt install python3 python3-venv.",
                ExitCode.MISSING,
            )  # fmt: skip
        try:
            last = answer.stdout.rstrip("\n").rpartition("\n")[2]
            machine = Machine.from_json(record_from_bytes(last.encode(), f"the answer of {self.connection.address}"))
        except ResvitError as error:
            raise self._failed("could not be asked what it is", answer.stderr or error.problem) from error
        if version_of(machine.python) < (3, 10):
            jetpack = f" (JetPack {machine.jetpack})" if machine.jetpack else ""
            raise ResvitError(
                f"{self.connection.address} has Python {machine.python}{jetpack}, and 3.10 or newer is needed.",
                "Flash it with JetPack 6.1 or newer, or install a newer Python as python3.",
                ExitCode.IMPOSSIBLE,
            )
        return machine

    def prepare(self, machine: Machine, wheels: Path | None = None, *, on_cpu: bool = False) -> bool:
        """Install the slim wheel and what it needs there, in a virtual environment; False where it was installed.

        ``wheels`` is a folder on this machine that is used instead of any network. Otherwise the device's own pip is
        tried, then the wheels are downloaded here for it. With ``on_cpu`` its processor runs the engines.

        Raises ``ResvitError`` MISSING with the command that mends it.
        """
        wheel, digest = self._copied_wheel()
        wanted = requirements_for(machine, on_cpu=on_cpu)
        mark = sha256_bytes(f"{digest} {wanted}".encode())
        if self._run(f"cat {_INSTALLED}").stdout.strip() == mark:
            return False
        self.reporter.say(f"Installing the device's side on {self.connection.address}")
        made = self._run(f"test -x {_PYTHON} -a -x {ROOT}/venv/bin/pip || "
                         f"python3 -m venv --clear --system-site-packages {ROOT}/venv", _INSTALLING)  # fmt: skip
        if made.code != 0:
            if "ensurepip" in made.stdout + made.stderr or "No module named venv" in made.stderr:
                raise ResvitError(
                    f"Python on {self.connection.address} cannot make virtual environments.",
                    "On the device: sudo apt install python3-venv",
                    ExitCode.MISSING,
                )
            raise self._failed("could not make a virtual environment", made.stderr)
        if wheels is not None or not self._pip(("--timeout", "15", "--retries", "1", *wanted)):
            self._install_offline(machine, wheels, wanted)
        if not self._pip(("--no-index", "--no-deps", "--force-reinstall", wheel)):
            raise self._failed("could not install the wheel", self._pip_said)
        self._run(f"echo {mark} > {_INSTALLED}")
        return True

    def run(self, job: RemoteJob) -> JobResult:
        """Copy what the job needs, start it unless it runs, show its progress, and return its result.

        Raises:
            UnreachableError: the device stays away; the job goes on there, and the same call picks it up.
            ResvitError: what the job raised there, or BUILD where it ended without a word.
        """
        folder = job.folder
        self._copy_key(job.key, folder)
        upload(self.connection, job.bundle, f"{folder}/bundle.resvit", self.reporter, "copy the bundle")
        if self._state(folder, 0)[0] != "alive":
            self._copy_images(job, folder)
        record = self._done(folder, _command("build", ("bundle.resvit",), rehearse=job.rehearse))
        return JobResult.from_json(record)

    def time(self, job: RemoteTiming) -> TimingResult:
        """Build and time variants there, as ``run`` builds a bundle; whatever is interrupted goes on.

        Raises:
            UnreachableError: the device stays away; the job goes on there, and the same call picks it up.
            ResvitError: SYSTEM without space for the engines, what the job raised there, or BUILD where it ended
                without a word.
        """
        folder = job.folder
        if self._state(folder, 0)[0] != "alive" and not self._run(f"ls {folder}/{_BUNDLES}").stdout.strip():
            free = self._run(f"df -Pk {ROOT} | tail -n 1").stdout.split()
            if len(free) > 3 and free[3].isdigit():
                sizes = [path.stat().st_size for path in job.bundles]
                if (error := too_large(sizes, int(free[3]) >> 10, str(self.connection.address))) is not None:
                    raise error
        self._copy_key(job.key, folder)
        names = [f"{_BUNDLES}/{path.name}" for path in job.bundles]
        pairs = list(zip(job.bundles, names, strict=True))
        for path, name in self.reporter.track(pairs, "copy variants", len(pairs)):
            upload(self.connection, path, f"{folder}/{name}")
        how = ("--rounds", str(job.rounds), "--seconds", repr(job.seconds))
        record = self._done(folder, _command("time", (*names, *how), rehearse=job.rehearse))
        return TimingResult.from_json(record)

    def fetch_layers(self, job: RemoteTiming, into: Path) -> tuple[Path, ...]:
        """Bring TensorRT's lists of layers of a finished timing here, ``NAME.json`` by variant."""
        names = self._run(f"ls {job.folder}/{LAYERS}").stdout.split("\n")
        listed = [path.with_suffix(".json").name for path in job.bundles]
        found = []
        for name in (name for name in listed if name in names):
            download(
                self.connection, f"{job.folder}/{LAYERS}/{name}", into / name, self.reporter, _RESULTS["layers.json"]
            )
            found.append(into / name)
        return tuple(found)

    def forget(self, job: RemoteTiming) -> None:
        """Remove the bundles and engines of a timing that is over: times are all that is wanted of them."""
        self._run(f"cd {job.folder} && rm -rf {_BUNDLES} {VARIANTS} phases")

    def _copy_key(self, key: str, folder: str) -> None:
        with tempfile.TemporaryDirectory(prefix="resvit-") as scratch:
            file = Path(scratch) / "trust.pub"
            write_atomic(file, key.encode())
            upload(self.connection, file, f"{folder}/trust.pub")

    def _done(self, folder: str, command: str) -> Record:
        """Start a job unless it runs, follow it to its end, and return its result."""
        started = self._run(_START.format(folder=folder, command=command)).stdout.strip()
        if started == "running":
            self.reporter.say("The job is running there already: following it")
        try:
            return self._follow(folder)
        except KeyboardInterrupt:
            self.connection.run(f"kill -TERM $(cat {folder}/pid)")
            raise

    def fetch(self, job: RemoteJob, into: Path) -> tuple[Path, ...]:
        """Bring engine, logs, timing cache and outputs of a finished job here; its images are removed there.

        Raises:
            ResvitError: INPUT where the device names a file that no job writes, or sends more than it announced; SYSTEM
                where the disk is full.
        """
        answer = self._run(f"cd {job.folder} && ls built outputs/*.npy").stdout
        names = listed_results(answer, len(job.images), str(self.connection.address))
        for name, most in names.items():
            file = into / name.removeprefix("built/")
            download(self.connection, f"{job.folder}/{name}", file, self.reporter, most)
        self._run(f"rm -f {job.folder}/images-*.npy")
        return tuple(into / name.removeprefix("built/") for name in names)

    def _run(self, script: str, seconds: float = 0.0) -> Answer:
        return self.connection.patiently(lambda: self.connection.run(script, seconds=seconds))

    def _copied_wheel(self) -> tuple[str, str]:
        """The slim wheel's path on the device and its digest; it is made and copied once."""
        if self._wheel is None:
            with tempfile.TemporaryDirectory(prefix="resvit-") as scratch:
                wheel = write_device_wheel(Path(scratch))
                upload(self.connection, wheel, f"{ROOT}/{wheel.name}")
                self._wheel = f"{ROOT}/{wheel.name}", sha256_file(wheel)
        return self._wheel

    def _pip(self, arguments: Sequence[str]) -> bool:
        answer = self._run(
            f"{_PYTHON} -m pip install --quiet --disable-pip-version-check --no-input {quoted(*arguments)}",
            _INSTALLING,
        )
        self._pip_said = answer.stderr
        return answer.code == 0

    def _install_offline(self, machine: Machine, wheels: Path | None, wanted: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory(prefix="resvit-") as scratch:
            if wheels is None:
                self.reporter.say("The device's pip finds no network: downloading its wheels here")
                wheels = Path(scratch)
                download_wheels(machine, wheels, wanted)
            files = sorted(wheels.glob("*.whl"))
            for file in self.reporter.track(files, "copy wheels", len(files)):
                upload(self.connection, file, f"{ROOT}/wheels/{file.name}")
        if not self._pip(("--no-index", "--find-links", f"{ROOT}/wheels", *wanted)):
            raise self._failed("could not install the wheels that were copied", self._pip_said)

    def _copy_images(self, job: RemoteJob, folder: str) -> None:
        kept = set()
        for piece in self.reporter.track(job.images, "copy images", len(job.images)):
            path = piece()
            upload(self.connection, path, f"{folder}/{path.name}")
            kept.add(path.name)
        copied = self._run(f"cd {folder} && ls images-*.npy").stdout.split()
        if stale := [f"{folder}/{name}" for name in copied if _IMAGES.fullmatch(name) and name not in kept]:
            self._run(f"rm -f {quoted(*stale)}")

    def _follow(self, folder: str) -> Record:
        replay(self._lines(folder), self.reporter)
        answer = self._run(f"cat {folder}/result.json")
        if answer.code != 0:
            output = self._run(f"tail -n 3 {folder}/output.txt; grep oom_kill /proc/vmstat").stdout.split("\n")
            said = " | ".join(line.strip() for line in output if line.strip())
            raise ResvitError(
                f"The build on {self.connection.address} ended without a result: the device restarted, or the process "
                f"was killed. What is known: {said or 'nothing'}.",
                "Run the same command again: what was finished there is kept. If memory ran out (oom_kill above 0), "
                "close other programs or give a smaller --workspace-mib.",
                ExitCode.BUILD,
            )
        address = str(self.connection.address)
        record = record_from_bytes(answer.stdout.encode(), f"the result of the job on {address}")
        return finished_result(record, address)

    def _endless(self, why: str) -> ResvitError:
        return ResvitError(
            f"The job on {self.connection.address} {why}: it is not followed any longer.",
            f"Look at what it does there: {self.connection.address.by_hand}. The same command follows it again.",
            ExitCode.BUILD,
        )

    def _lines(self, folder: str) -> Iterator[str]:
        """The lines of the job's progress as they come, until it has ended and all were read."""
        offset, rest = 0, ""
        start = heard = time.monotonic()
        while True:
            life, ended, text = self._state(folder, offset)
            offset += len(text.encode())
            now = time.monotonic()
            heard = now if text else heard
            if offset > _PROGRESS_MOST:
                raise self._endless(f"writes more than {_PROGRESS_MOST >> 20} MiB of progress")
            if now - heard > _SILENT_MOST:
                raise self._endless(f"showed no progress for {_SILENT_MOST / 3600:.0f} hours")
            if now - start > _JOB_MOST:
                raise self._endless(f"takes more than {_JOB_MOST / 3600:.0f} hours")
            *lines, rest = (rest + text).split("\n")
            yield from lines
            if (ended or life == "gone") and not text:
                return
            if not text:
                time.sleep(_POLL)

    def _state(self, folder: str, offset: int) -> tuple[str, bool, str]:
        """Whether the job lives, whether its result is there, and its progress from ``offset`` on."""
        answer = self._run(_STATE.format(folder=folder, begin=offset + 1, piece=_PIECE))
        life, _, rest = answer.stdout.partition("\n")
        ended, _, text = rest.partition("\n")
        return life, ended == "ended", text

    def _failed(self, what: str, said: str) -> ResvitError:
        last = " | ".join(line.strip() for line in said.strip().splitlines()[-3:])
        return ResvitError(
            f"{self.connection.address} {what}: {last or 'it gave no reason'}",
            f"Try it there by hand: {self.connection.address.by_hand}",
            ExitCode.MISSING,
        )


def listed_results(answer: str, pieces: int, device: str) -> dict[str, int]:
    """The files of a finished job in what ``ls built outputs/*.npy`` printed, with the bytes that each may have.

    Of the folder ``built`` those that are wanted are taken. Below ``outputs`` there may be the answers to ``pieces``
    files of images, in the names that a job gives them, and nothing else.

    Raises:
        ResvitError: INPUT for any other name, and for more of them than the job can have written.
    """
    found: dict[str, int] = {}
    for line in answer.split("\n"):
        output = _OUTPUT.fullmatch(line) is not None
        name = line if output else f"built/{line}"
        if not output and (not line.isprintable() or re.search(r"[/\\]|\.\.", line)):
            raise _odd_name(device, line)
        if output or line in _RESULTS:
            if name in found:
                raise _odd_name(device, line)
            found[name] = _OUTPUT_MOST if output else _RESULTS[line]
    if len(found) > len(_RESULTS) + max(1, pieces) * _OUTPUTS_OF_A_PIECE:
        raise ResvitError(
            f"{device} lists {len(found)} files of a job with {pieces} files of images.", "Look at it by hand."
        )
    return found


def _odd_name(device: str, name: str) -> ResvitError:
    return ResvitError(
        f"{device} lists a file that no job of ours writes: {shown(name)}.",
        "Nothing was fetched. The device is not what it seems, or something else writes there: look at it by hand.",
    )


# The lock tells whether the job lives, also after a restart of the device gave its number to another process; before
# its first phase, when it may not hold the lock yet, its number has to do.
_STATE = """cd {folder} 2>/dev/null || {{ echo gone; echo open; exit; }}
if ! flock -n .lock true 2>/dev/null; then echo alive
elif [ ! -f state.json ] && kill -0 "$(cat pid)" 2>/dev/null; then echo alive
else echo gone; fi
if [ -f result.json ]; then echo ended; else echo open; fi
tail -c +{begin} progress.log 2>/dev/null | head -c {piece}
"""


def _command(name: str, arguments: Sequence[str], *, rehearse: bool) -> str:
    flags = ("--job", ".", "--trust", "trust.pub", "--quiet", *(("--rehearse",) if rehearse else ()))
    return f'"$HOME/{_PYTHON}" -m resvit_engines {quoted(name, *arguments, *flags)}'


_START = """cd {folder} && touch .lock || exit 1
flock -n .lock true || {{ echo running; exit; }}
rm -f state.json result.json progress.log
setsid nohup {command} > output.txt 2>&1 < /dev/null &
echo $! > pid
echo started
"""
