"""Files to and from a device over SSH: continued after a lost connection, and checked by digest before they count."""

from __future__ import annotations

import hashlib
import os
import re
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import explain_os_errors, sha256_file
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import shown
from resvit_engines.remote.ssh import Connection, quoted

_MIB = 1 << 20
FILE_MOST = 64 << 30
"""Bytes of the largest file that is fetched from a device."""
_SLOWEST = 16 << 10
"""Bytes per second; slower than that, after ten minutes, a device is not waited for."""
_TEN_MINUTES = 600.0
_HASHING = 3600.0
"""Seconds that a device may take to digest a file."""
_ANSWER = re.compile(r"none|([0-9]{1,18})\s+([0-9a-f]{64})\s+-")
_STATE = """
for file in {file} {file}.part; do
  if [ -f "$file" ]; then echo "$(wc -c < "$file") $(sha256sum < "$file")"; else echo none; fi
done
"""


def upload(connection: Connection, file: Path, remote: str, reporter: Reporter = SILENT, what: str = "") -> bool:
    """Bring ``file`` to the path ``remote`` (from the device's home folder); False where it was there already.

    It appears in one step when it is whole. What an earlier try left beside it is continued where it agrees with
    ``file`` byte for byte.

    Raises:
        ResvitError: SYSTEM where the device's disk is full or may not be written, or the connection stays lost.
    """
    digest, size = sha256_file(file), file.stat().st_size
    return connection.patiently(lambda: _uploaded(connection, file, size, digest, remote, reporter, what))


def _uploaded(
    connection: Connection, file: Path, size: int, digest: str, remote: str, reporter: Reporter, what: str
) -> bool:
    for _ in range(3):
        whole, part = _state(connection, remote)
        if whole == (size, digest):
            return False
        begin = part[0] if part and part[0] <= size and part[1] == _prefix_digest(file, part[0]) else 0
        _append(connection, file, begin, size, remote, reporter, what or f"copy {file.name}")
        moved = connection.run(
            f'[ "$(sha256sum < {quoted(remote + ".part")} | cut -c 1-64)" = {digest} ] && '
            f"mv -f {quoted(remote + '.part', remote)}",
            seconds=_HASHING,
        )
        if moved.code == 0:
            return True
    raise ResvitError(
        f"{file.name} arrived damaged on {connection.address} three times.",
        "Check the network, the device's disk and whether something else writes there.",
        ExitCode.SYSTEM,
    )


def _append(
    connection: Connection, file: Path, begin: int, size: int, remote: str, reporter: Reporter, what: str
) -> None:
    folder = remote.rpartition("/")[0] or "."
    redirect = ">>" if begin else ">"
    script = f"mkdir -p {quoted(folder)} && cat {redirect} {quoted(remote + '.part')}"
    with file.open("rb") as stream, connection.start(script, subprocess.PIPE) as process:
        stream.seek(begin)
        assert process.stdin is not None
        try:
            pieces = iter(lambda: stream.read(_MIB), b"")
            for piece in reporter.track(pieces, what, max(1, -(-(size - begin) // _MIB))):
                _send(connection, process.stdin.fileno(), piece)
        except BrokenPipeError:
            pass  # the exit status and ssh's words tell why
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdin.close()
        _, stderr = connection.listen(process, connection.silence)
    connection.settle(process.returncode, stderr)
    if process.returncode != 0:
        raise _disk_error(connection, remote, stderr.decode(errors="replace").strip())


def _send(connection: Connection, pipe: int, data: bytes) -> None:
    """Write all of ``data``; ``UnreachableError`` where nobody takes it for too long."""
    os.set_blocking(pipe, False)
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_WRITE)
        left = memoryview(data)
        while left:
            connection.ready(waiting, connection.silence, connection.silence)
            left = left[os.write(pipe, left) :]


def download(
    connection: Connection, remote: str, file: Path, reporter: Reporter = SILENT, most: int = FILE_MOST
) -> None:
    """Bring the device's ``remote`` here as ``file``, which appears whole or not at all.

    The device says first how many bytes it has. That must be no more than ``most`` and what the disk here has free,
    and not one byte more is taken.

    Raises:
        ResvitError: INPUT where it is not there, too large, or more comes than was said; SYSTEM where the disk is full
            or the connection stays lost.
    """
    connection.patiently(lambda: _downloaded(connection, remote, file, reporter, most))


def _downloaded(connection: Connection, remote: str, file: Path, reporter: Reporter, most: int) -> None:
    partial = file.with_name(f".{file.name}.part")
    whole, _ = _state(connection, remote)
    if whole is None:
        raise ResvitError(
            f"{remote} is not on {connection.address} any more.", "Run the same command again: it is made anew."
        )
    size, digest = whole
    if size > most:
        raise ResvitError(
            f"{remote} on {connection.address} has {size} bytes, and such a file has {most} at most.",
            "Something else writes there, or the device is not what it seems: look at it by hand.",
        )
    with explain_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(file.parent).free):
            raise ResvitError(
                f"The disk is full: {file} has {size >> 20} MiB, and {free >> 20} MiB are free. Nothing was damaged.",
                "Free some space and run the same command again; finished stages are kept.",
                ExitCode.SYSTEM,
            )
        for _ in range(2):
            begin = partial.stat().st_size if partial.is_file() else 0
            if begin > size:
                partial.unlink()
                begin = 0
            _fetch(connection, remote, partial, begin, size, reporter)
            if sha256_file(partial) == digest:
                partial.replace(file)
                return
            partial.unlink()
    raise ResvitError(
        f"{remote} arrived damaged from {connection.address} twice.",
        "Check the network and that nothing writes to it meanwhile.",
        ExitCode.SYSTEM,
    )


def _fetch(connection: Connection, remote: str, partial: Path, begin: int, size: int, reporter: Reporter) -> None:
    script = f"tail -c +{begin + 1} {quoted(remote)}"
    with partial.open("ab") as out, connection.start(script) as process:
        assert process.stdout is not None
        try:
            pieces = _pieces(connection, process.stdout.fileno(), remote, size - begin)
            total = max(1, -(-(size - begin) // _MIB))
            for piece in reporter.track(pieces, f"fetch {remote.rpartition('/')[2]}", total):
                out.write(piece)
        except BaseException:
            process.kill()
            raise
        _, stderr = connection.listen(process, connection.silence)
    connection.settle(process.returncode, stderr)


def _pieces(connection: Connection, pipe: int, remote: str, size: int) -> Iterator[bytes]:
    """What comes, in pieces of a MiB, until it ends; refused as soon as that is more than ``size`` bytes."""
    piece, count = bytearray(), 0
    end = time.monotonic() + _TEN_MINUTES + size / _SLOWEST
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_READ)
        while True:
            connection.ready(waiting, connection.silence, connection.silence)
            part = os.read(pipe, _MIB - len(piece))
            count += len(part)
            if count > size:
                raise ResvitError(
                    f"{connection.address} sends more of {remote} than the {size} bytes that it announced.",
                    "Nothing of it was kept. Something writes to it meanwhile, or the device is not what it seems.",
                )
            if time.monotonic() > end:
                raise ResvitError(
                    f"{connection.address} sends {remote} at less than {_SLOWEST >> 10} KiB a second.",
                    "Check the network and run the same command again.",
                    ExitCode.SYSTEM,
                )
            piece += part
            if piece and (not part or len(piece) == _MIB):
                yield bytes(piece)
                piece.clear()
            if not part:
                return


def _state(connection: Connection, remote: str) -> tuple[tuple[int, str] | None, tuple[int, str] | None]:
    """Size and digest of the file and of its unfinished part on the device; None for what is not there."""
    answer = connection.run(_STATE.format(file=quoted(remote)), seconds=_HASHING)
    found = [_ANSWER.fullmatch(line.strip()) for line in answer.stdout.split("\n") if line]
    if answer.code != 0 or len(found) != 2 or not all(found):
        raise ResvitError(
            f"{connection.address} does not answer as a Linux system does: "
            f"{shown(answer.stderr.strip() or answer.stdout)}",
            "The device needs a POSIX shell, wc and sha256sum, and a login that prints nothing by itself.",
            ExitCode.SYSTEM,
        )
    whole, part = ((int(match[1]), match[2]) if match and match[1] else None for match in found)
    return whole, part


def _prefix_digest(file: Path, length: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while length > 0 and (piece := stream.read(min(length, _MIB))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()


def _disk_error(connection: Connection, remote: str, said: str) -> ResvitError:
    if "No space left" in said or "quota" in said.lower():
        return ResvitError(
            f"The disk of {connection.address} is full: {remote} could not be written.",
            "Free some space there and run the same command again: what has arrived is kept.",
            ExitCode.SYSTEM,
        )
    return ResvitError(
        f"{remote} cannot be written on {connection.address}: {said or 'no reason given'}",
        "Check the permissions of that folder on the device.",
        ExitCode.SYSTEM,
    )
