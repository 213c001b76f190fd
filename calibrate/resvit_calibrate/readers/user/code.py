"""The one place where code that a user brought is imported, and where it is seen what that code reads.

A result that such code had a part in may be used again only while everything that it read is the same. Python tells of
every file that it opens, every folder that it lists and every program that it starts (PEP 578); what is read from
outside installed packages is written down with its digest at that moment.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import site
import stat
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from resvit_engines.files import sha256_bytes, sha256_file
from resvit_engines.outside import expanded

ABSENT = "absent"
"""In the place of a digest, where nothing was there."""
_UNSEEN = {
    "subprocess.Popen": "started another program",
    "os.system": "started another program",
    "os.posix_spawn": "started another program",
    "os.fork": "started another process",
    "socket.connect": "connected to another machine",
    "sqlite3.connect": "opened a database",
}
"""What lets code read things that nobody here sees."""
_LISTS = ("os.listdir", "os.scandir")
_OURS = ("resvit_export", "resvit_quantize", "resvit_calibrate", "resvit_engines")
_PASSING = ("/proc/", "/sys/", "/dev/")


class Reads:
    """What code read while it ran under ``watched``: files, folders and variables of the environment, by digest."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.unseen: set[str] = set()
        """What it did that may have read more, in words."""

    def opened(self, path: str) -> None:
        """Write down a file that is about to be read; the first time counts."""
        self.digests.setdefault(f"file:{path}", digest_of_file(path))

    def listed(self, path: str) -> None:
        """Write down the names in a folder."""
        self.digests.setdefault(f"folder:{path}", _digest_of_folder(path))

    def asked(self, variable: str) -> None:
        """Write down a variable of the environment."""
        self.digests.setdefault(f"variable:{variable}", _digest_of_variable(variable))


def changed_since(digests: Mapping[str, str]) -> str | None:
    """The first of what was read that is not the same any more; None where all is."""
    again = {"file": digest_of_file, "folder": _digest_of_folder, "variable": _digest_of_variable}
    for name, digest in digests.items():
        kind, _, what = name.partition(":")
        if kind not in again or again[kind](what) != digest:
            return what
    return None


def module_from(place: str) -> ModuleType:
    """Import ``file.py`` or ``package.module``, anew or as it is; raises what importing raises.

    Neighbours of a file are importable while it is imported, and the current folder for a module.
    """
    if not place.endswith(".py"):
        with _importable(Path.cwd()):
            return importlib.import_module(place)
    path = expanded(place)
    spec = importlib.util.spec_from_file_location(f"_resvit_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    with _importable(path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except SystemExit as error:  # a script without a guard around its command line
            raise ImportError(f"it ends the process (exit {error.code}) when it is imported") from error
    return module


def user_files(*names: str) -> dict[str, str]:
    """The source files of these modules and of all that they refer to, but installed packages, by module."""
    found: dict[str, str] = {}
    waiting = [".".join(parts[:end]) for parts in (n.split(".") for n in names) for end in range(1, len(parts) + 1)]
    seen = set(waiting)
    while waiting:
        module = sys.modules.get(waiting.pop())
        file = getattr(module, "__file__", None)
        if module is None or not isinstance(file, str) or not is_users(file):
            continue
        found[module.__name__] = _absolute(file)
        for value in list(vars(module).values()):
            other = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(other, str) and other not in seen:
                seen.add(other)
                waiting.append(other)
    return dict(sorted(found.items()))


def is_users(path: str) -> bool:
    """Whether a file is neither of Python, nor of an installed package, nor of this project."""
    full = _absolute(path)
    return not full.startswith((*_installed(), *_PASSING))


def digest_of_file(path: str) -> str:
    """SHA-256 of a file's content; a word for what has none."""
    try:
        mode = Path(path).stat().st_mode
        return sha256_file(Path(path)) if stat.S_ISREG(mode) else f"no file ({stat.S_IFMT(mode)})"
    except (OSError, ValueError):
        return ABSENT


@contextlib.contextmanager
def watched(reads: Reads | None) -> Iterator[None]:
    """Within the block, write down in ``reads``, if any, what code outside installed packages reads.

    Files that libraries open by themselves, past Python (safetensors, OpenCV, HDF5), are not seen.
    """
    _hook_once()
    before = _watching.reads, _watching.others
    _watching.reads = reads
    _watching.others = frozenset(sys._current_frames()) - {threading.get_ident()}
    own_class = os.environ.__class__
    os.environ.__class__ = _WatchedEnviron
    try:
        yield
    finally:
        os.environ.__class__ = own_class
        _watching.reads, _watching.others = before


class _Watching:
    """Who is watching; a hook cannot be taken off again, so that it asks here."""

    def __init__(self) -> None:
        self.reads: Reads | None = None
        self.others: frozenset[int] = frozenset()
        """Threads that ran before: they decode images meanwhile, and are not the user's."""
        self.busy = threading.local()


_watching = _Watching()


class _WatchedEnviron(type(os.environ)):  # type: ignore[misc]  # the class of one object
    """The environment, which tells what the user's own code asks of it; no audit event does."""

    def __getitem__(self, key: Any) -> Any:
        reads, frame = _watching.reads, sys._getframe(1)
        while frame.f_back is not None and _passes_on(frame.f_code.co_filename):
            frame = frame.f_back
        if reads is not None and isinstance(key, str) and is_users(frame.f_code.co_filename):
            reads.asked(key)
        return super().__getitem__(key)


def _passes_on(filename: str) -> bool:
    """Whether code of that file asks the environment for others: ``os.getenv`` and ``get`` of mappings."""
    return filename.startswith("<frozen") or Path(filename).name in ("os.py", "_collections_abc.py")


@functools.cache
def _hook_once() -> None:
    sys.addaudithook(_heard)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    reads = _watching.reads
    if reads is None or getattr(_watching.busy, "yes", False) or threading.get_ident() in _watching.others:
        return
    if event in _UNSEEN:
        reads.unseen.add(_UNSEEN[event])
        return
    if event != "open" and event not in _LISTS:
        return
    _watching.busy.yes = True  # digesting opens files itself
    try:
        _written_down(reads, event, arguments)
    finally:
        _watching.busy.yes = False


def _written_down(reads: Reads, event: str, arguments: tuple[Any, ...]) -> None:
    path = arguments[0] if arguments[0] is not None else "."
    if not isinstance(path, (str, bytes)):
        return  # what a file descriptor is of was opened before
    full = _absolute(os.fsdecode(path))
    if not is_users(full):
        return
    if event in _LISTS:
        reads.listed(full)
        return
    flags = arguments[2] if isinstance(arguments[2], int) else 0
    if flags & os.O_ACCMODE == os.O_WRONLY:
        return
    if full.endswith(".pyc"):
        with contextlib.suppress(ValueError):
            full = importlib.util.source_from_cache(full)
    reads.opened(full)


@functools.cache
def _installed() -> tuple[str, ...]:
    """Folders of Python, of installed packages and of this project, each with its final slash."""
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {*site.getsitepackages(), site.getusersitepackages(), str(Path(os.__file__).parent)}
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            folders.add(str(Path(spec.origin).parent))
    folders |= {str(Path(folder).resolve()) for folder in folders}
    return tuple(f"{_absolute(folder)}/" for folder in folders)


def _absolute(path: str) -> str:
    """From the root, without ``..``; links stay, since they may come to lead elsewhere."""
    return os.path.normpath(Path(path).absolute())


def _digest_of_folder(path: str) -> str:
    try:
        return sha256_bytes(
            "\0".join(sorted(entry.name for entry in Path(path).iterdir())).encode(errors="surrogateescape")
        )
    except (OSError, ValueError):
        return ABSENT


def _digest_of_variable(name: str) -> str:
    value = dict.get(os.environ._data, os.environ.encodekey(name))  # type: ignore[attr-defined]
    return ABSENT if value is None else hashlib.sha256(value).hexdigest()


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
