"""Files to and from a device over SSH: continued after a lost connection, and checked by digest before they count."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import explain_os_errors, sha256_file
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.remote.ssh import Connection, pieces_of, quoted

_MIB = 1 << 20
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
            f"mv -f {quoted(remote + '.part', remote)}"
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
        assert process.stderr is not None
        try:
            total = max(1, -(-(size - begin) // _MIB))
            for piece in reporter.track(pieces_of(stream), what, total):
                process.stdin.write(piece)
            process.stdin.close()
        except BrokenPipeError:
            pass  # the exit status and ssh's words tell why
        finally:
            # Closing what broke would raise again; wait() must not find it open.
            process.stdin = None
        stderr = process.stderr.read()
        process.wait()
    connection.settle(process.returncode, stderr)
    if process.returncode != 0:
        raise _disk_error(connection, remote, stderr.decode(errors="replace").strip())


def download(connection: Connection, remote: str, file: Path, reporter: Reporter = SILENT) -> None:
    """Bring the device's ``remote`` here as ``file``, which appears whole or not at all.

    Raises ``ResvitError`` where it is not there, or the connection stays lost.
    """
    connection.patiently(lambda: _downloaded(connection, remote, file, reporter))


def _downloaded(connection: Connection, remote: str, file: Path, reporter: Reporter) -> None:
    partial = file.with_name(f".{file.name}.part")
    whole, _ = _state(connection, remote)
    if whole is None:
        raise ResvitError(
            f"{remote} is not on {connection.address} any more.", "Run the same command again: it is made anew."
        )
    size, digest = whole
    with explain_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            begin = partial.stat().st_size if partial.exists() else 0
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
        assert process.stderr is not None
        total = max(1, -(-(size - begin) // _MIB))
        for piece in reporter.track(pieces_of(process.stdout), f"fetch {remote.rpartition('/')[2]}", total):
            out.write(piece)
        stderr = process.stderr.read()
        process.wait()
    connection.settle(process.returncode, stderr)


def _state(connection: Connection, remote: str) -> tuple[tuple[int, str] | None, tuple[int, str] | None]:
    """Size and digest of the file and of its unfinished part on the device; None for what is not there."""
    answer = connection.run(_STATE.format(file=quoted(remote)))
    lines = answer.stdout.splitlines()
    if answer.code != 0 or len(lines) != 2:
        raise ResvitError(
            f"{connection.address} does not answer as a Linux system does: {answer.stderr.strip() or answer.stdout!r}",
            "The device needs a POSIX shell, wc and sha256sum, and a login that prints nothing by itself.",
            ExitCode.SYSTEM,
        )
    found = [None if line == "none" else (int(line.split()[0]), line.split()[1]) for line in lines]
    return found[0], found[1]


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
