"""``fleet.toml``: which devices there are, what they are to run, in which waves, and when a device is well."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.names import is_name
from resvit_engines.outside import expanded, read_outside, text_from_outside
from resvit_engines.records import shown
from resvit_export.fleet.addresses import DEVICES_MOST, expand

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE_MOST = 8 << 20
_TYPES_MOST = 200
_WAVES_MOST = 20
_PARALLEL, _PARALLEL_MOST = 8, 64
_COMMAND_MOST = 2000
_COMMAND_SECONDS, _COMMAND_SECONDS_MOST = 60.0, 3600.0
_SECONDS = 1.0
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,2})?)%")
_REFERENCE = re.compile(r"oci://[!-~]{1,500}")
_TABLES = ("name", "state", "release", "rollout", "health", "types")


@dataclass(frozen=True)
class Share:
    """A number of devices, or a share of them in per cent."""

    count: int | None
    percent: float = 0.0

    def of(self, total: int) -> int:
        """How many of ``total`` devices that is: a share is rounded up, and all there are is the most."""
        return min(total, self.count if self.count is not None else math.ceil(total * self.percent / 100 - 1e-9))

    def at_most(self, total: int) -> int:
        """How many of ``total`` devices that is where it is a bound: a share is rounded down."""
        return min(total, self.count if self.count is not None else math.floor(total * self.percent / 100 + 1e-9))

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.count is None else str(self.count)


@dataclass(frozen=True)
class DeviceType:
    """Devices of one kind: for each the bundle for ``target`` (of this ``precision``), in the order of ``devices``."""

    name: str
    target: str
    precision: str | None
    devices: tuple[str, ...]


@dataclass(frozen=True)
class ReleaseSource:
    """Where the release is: ``bundles`` (run folders and files), or the registry's ``reference``.

    ``key`` names what signs engines that were built on a device for others; ``keys`` a signed list of keys that goes to
    each device before the bundle, and ``root`` the public key that signed the first one. ``ca`` is the certificate of
    the registry's CA, which is copied to the devices, and ``plain_http`` as of 'resvit-engine pull'.
    """

    bundles: tuple[str, ...] = ()
    registry: str | None = None
    key: str | None = None
    keys: str | None = None
    root: str | None = None
    ca: str | None = None
    plain_http: bool = False


@dataclass(frozen=True)
class Rollout:
    """How a release goes out. Each of ``waves`` says how many devices of each type run it when the wave is over.

    ``parallel`` devices are worked on at once. More than ``max_failures`` of them all end the rollout; then, with
    ``roll_back``, all that run the release go back. ``after`` is the user's command on a device after each switch.
    """

    waves: tuple[Share, ...] = (Share(1), Share(None, 10.0), Share(None, 100.0))
    parallel: int = _PARALLEL
    max_failures: Share = Share(0)
    roll_back: bool = True
    soak_seconds: float = 0.0
    after: str | None = None
    after_seconds: float = _COMMAND_SECONDS


@dataclass(frozen=True)
class HealthChecks:
    """When a device is well: golden outputs, latency in ms, and an exit status 0 of the user's ``command``.

    ``latency`` is how many times the recorded latency it may be, ``latency_ms`` how many ms; ``seconds`` is how long
    is timed.
    """

    golden: bool = True
    latency: float | None = None
    latency_ms: float | None = None
    seconds: float = _SECONDS
    command: str | None = None
    command_seconds: float = _COMMAND_SECONDS

    @property
    def timed_seconds(self) -> float:
        """How long a device is timed: not at all where nobody asks for its latency."""
        return 0.0 if self.latency is None and self.latency_ms is None else self.seconds


@dataclass(frozen=True)
class Fleet:
    """What ``fleet.toml`` says, its paths absolute. ``state`` is the folder that remembers how far the devices are."""

    name: str
    state: Path
    types: tuple[DeviceType, ...]
    release: ReleaseSource
    rollout: Rollout = Rollout()
    health: HealthChecks = HealthChecks()

    @property
    def devices(self) -> int:
        """How many there are."""
        return sum(len(kind.devices) for kind in self.types)


def fleet_from_toml(path: Path) -> Fleet:
    """Read a fleet's file. Relative paths in it are relative to the folder that it lies in.

    Raises:
        ResvitError: INPUT for a missing or malformed file, a key that does not exist, a value that its key does not
            take, and a device that is listed twice.
    """
    if not os.path.lexists(path):
        raise ResvitError(f"There is no fleet at {path}.", "Give the path of its TOML file: docs/fleets.md shows one.")
    name = f"The fleet {path}"
    text = text_from_outside(read_outside(path, _FILE_MOST, name), name, "Give a UTF-8 TOML file.")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResvitError(f"{name} is not valid TOML: {error}.", "Mend that line.") from error
    return fleet_from_document(document, path)


def fleet_from_document(document: Mapping[str, Any], path: Path) -> Fleet:
    """The fleet that a parsed file describes; ``path`` is the file. Raises as ``fleet_from_toml``."""
    top = _Table(document, f"The fleet {path}", "", _TABLES)
    name = top.name("name")
    folder = path.absolute().parent
    state = top.maybe("state", top.path)
    types = tuple(_type(top, key) for key in top.table("types", None).keys_of_tables(_TYPES_MOST))
    if not types:
        raise top.refusal("types", "no table", "a table for each type of device, as [types.camera], belongs")
    _require_once(types, path)
    return Fleet(
        name,
        folder / (state or f"{name}.fleet"),
        types,
        _release(top.table("release", ("bundles", "registry", "key", "keys", "root", "ca", "plain_http")), folder),
        _rollout(top.table("rollout", _ROLLOUT, missing={})),
        _health(top.table("health", _HEALTH, missing={})),
    )


_ROLLOUT = ("waves", "parallel", "max_failures", "on_failure", "soak_seconds", "after", "after_seconds")
_HEALTH = ("golden", "latency", "latency_ms", "seconds", "command", "command_seconds")


class _Table:
    """A table of the file, whose values are read by kind; every refusal names the key and what belongs there."""

    def __init__(self, fields: Any, where: str, at: str, known: Collection[str] | None) -> None:
        self.where, self.at = where, at
        if not isinstance(fields, Mapping):
            raise ResvitError(f"{where} has {at} = {shown(fields)}, where a table belongs.", f"Write it as [{at}].")
        self.fields = fields
        for key in fields if known is not None else ():
            if key not in (known or ()):
                near = difflib.get_close_matches(key, known or (), n=1, cutoff=0.5)
                raise ResvitError(
                    f"{where} has a setting that does not exist: {self.way(key)!r:.120}.",
                    f"Did you mean {self.way(near[0])}?" if near else f"It can have: {', '.join(sorted(known or ()))}.",
                )

    def way(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key

    def refusal(self, key: str, found: str, belongs: str) -> ResvitError:
        return ResvitError(f"{self.where} has {found} at {self.way(key)}, where {belongs}.", "Mend it there.")

    def wrong(self, key: str, belongs: str) -> ResvitError:
        found = shown(self.fields[key]) if key in self.fields else "nothing"
        return self.refusal(key, found, f"{belongs} belongs")

    def has(self, key: str) -> bool:
        return key in self.fields

    def maybe(self, key: str, read: Any) -> Any:
        return read(key) if key in self.fields else None

    def table(self, key: str, known: Collection[str] | None, missing: Mapping[str, Any] | None = None) -> _Table:
        if key not in self.fields and missing is None:
            raise self.wrong(key, f"a table [{self.way(key)}]")
        return _Table(self.fields.get(key, missing), self.where, self.way(key), known)

    def keys_of_tables(self, most: int) -> list[str]:
        if len(self.fields) > most:
            raise ResvitError(f"{self.where} has {len(self.fields)} {self.at}, and {most} are the most.", "Take fewer.")
        for key in self.fields:
            if not is_name(key):
                raise self.refusal(
                    key, f"the name {key!r:.100}", "letters, digits, dots, dashes and underscores belong"
                )
        return list(self.fields)

    def name(self, key: str) -> str:
        value = self.fields.get(key)
        if not is_name(value):
            raise self.wrong(key, "a name of letters, digits, dots, dashes and underscores")
        return str(value)

    def line(self, key: str, most: int = _COMMAND_MOST) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str) or not value.strip() or len(value) > most or not value.isprintable():
            raise self.wrong(key, f"a line of text, {most} characters at most,")
        return value

    def path(self, key: str) -> Path:
        text = self.line(key)
        return expanded(text)

    def flag(self, key: str) -> bool:
        value = self.fields.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def number(self, key: str, least: float, most: float) -> float:
        value = self.fields.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise self.wrong(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, key: str, least: int, most: int) -> int:
        value = self.fields.get(key)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def lines(self, key: str, most: int) -> list[str]:
        value = self.fields.get(key)
        if not isinstance(value, list) or not value or len(value) > most:
            raise self.wrong(key, f"a list of 1 to {most:,} texts")
        if not all(isinstance(item, str) and item.isprintable() and item.strip() for item in value):
            raise self.wrong(key, "a list of texts")
        return value

    def share(self, key: str, value: Any, least: int) -> Share:
        if type(value) is int and least <= value <= DEVICES_MOST:
            return Share(value)
        found = _SHARE.fullmatch(value) if isinstance(value, str) else None
        if found is None or not 0 <= float(found[1]) <= 100:
            raise self.refusal(key, shown(value), f'a number of devices from {least} or a share such as "10%" belongs')
        return Share(None, float(found[1]))


def _type(top: _Table, name: str) -> DeviceType:
    table = top.table("types", None).table(name, ("target", "precision", "devices"))
    precision = table.maybe("precision", table.name)
    if precision not in (None, "int8", "fp8", "fp16", "fp32"):
        raise table.wrong("precision", "int8, fp8, fp16 or fp32")
    devices: list[str] = []
    for text in table.lines("devices", DEVICES_MOST):
        try:
            devices.extend(expand(text, DEVICES_MOST - len(devices)))
        except ResvitError as error:
            raise ResvitError(f"{top.where} at types.{name}.devices: {error.problem}", error.fix) from error
    return DeviceType(name, table.name("target"), precision, tuple(devices))


def _require_once(types: tuple[DeviceType, ...], path: Path) -> None:
    seen: dict[str, str] = {}
    for kind in types:
        for device in kind.devices:
            if device in seen:
                where = (
                    f"twice as {kind.name}" if seen[device] == kind.name else f"as {seen[device]} and as {kind.name}"
                )
                raise ResvitError(f"The fleet {path} lists {device} {where}.", "List each device once.")
            seen[device] = kind.name
    if len(seen) > DEVICES_MOST:
        raise ResvitError(
            f"The fleet {path} has {len(seen):,} devices, and {DEVICES_MOST:,} are the most.", "Split it."
        )


def _release(table: _Table, folder: Path) -> ReleaseSource:
    if table.has("bundles") == table.has("registry"):
        raise ResvitError(
            f"{table.where} says {'both' if table.has('bundles') else 'neither'} release.bundles and release.registry"
            f"{'' if table.has('bundles') else ', so there is nothing to release'}.",
            "Give bundles, a list of run folders and .resvit files, or registry, as oci://HOST/NAME:TAG.",
        )
    bundles = (
        tuple(str(folder / expanded(text)) for text in table.lines("bundles", 1000)) if table.has("bundles") else ()
    )
    registry = table.maybe("registry", table.line)
    if registry is not None and not _REFERENCE.fullmatch(registry):
        raise table.wrong("registry", "a reference such as oci://registry.example/vision/net:1.4")
    if registry is None and (table.has("ca") or table.has("plain_http")):
        raise ResvitError(f"{table.where} says how to reach a registry, and names none.", "Say release.registry too.")
    if registry is not None and table.has("key"):
        raise ResvitError(
            f"{table.where} names a key to sign with, and what comes out of a registry is signed.", "Leave it out."
        )
    key, keys, root = table.maybe("key", table.line), table.maybe("keys", table.path), table.maybe("root", table.path)
    if root is not None and keys is None:
        raise ResvitError(f"{table.where} names the root of a list of keys, and no list.", "Say release.keys too.")
    if key is not None and key != "agent" and not key.startswith("agent:"):
        key = str(folder / expanded(key))
    ca = table.maybe("ca", table.path)
    keys, root, ca = (str(folder / path) if path else None for path in (keys, root, ca))
    return ReleaseSource(bundles, registry, key, keys, root, ca, table.maybe("plain_http", table.flag) or False)


def _rollout(table: _Table) -> Rollout:
    usual = Rollout()
    waves = usual.waves
    if table.has("waves"):
        value = table.fields["waves"]
        if not isinstance(value, list) or not 1 <= len(value) <= _WAVES_MOST:
            raise table.wrong("waves", f"a list of 1 to {_WAVES_MOST} waves, such as [1, '10%', '100%'],")
        waves = tuple(table.share("waves", item, 1) for item in value)
        sizes = [wave.of(DEVICES_MOST) for wave in waves]
        if sizes != sorted(sizes) or 0 in sizes:
            raise table.wrong("waves", "a list of waves that grow")
    on_failure = table.maybe("on_failure", table.line) or "roll back"
    if on_failure not in ("roll back", "stop"):
        raise table.wrong("on_failure", "'roll back' or 'stop'")
    return Rollout(
        waves,
        table.maybe("parallel", lambda key: table.whole(key, 1, _PARALLEL_MOST)) or usual.parallel,
        table.share("max_failures", table.fields["max_failures"], 0)
        if table.has("max_failures")
        else usual.max_failures,
        on_failure == "roll back",
        table.maybe("soak_seconds", lambda key: table.number(key, 0, 86_400)) or 0.0,
        table.maybe("after", table.line),
        table.maybe("after_seconds", lambda key: table.number(key, 1, _COMMAND_SECONDS_MOST)) or usual.after_seconds,
    )


def _health(table: _Table) -> HealthChecks:
    usual = HealthChecks()
    golden = table.maybe("golden", table.flag)
    return HealthChecks(
        usual.golden if golden is None else golden,
        table.maybe("latency", lambda key: table.number(key, 0.01, 1000)),
        table.maybe("latency_ms", lambda key: table.number(key, 1e-6, 1e6)),
        table.maybe("seconds", lambda key: table.number(key, 0.1, 600)) or usual.seconds,
        table.maybe("command", table.line),
        table.maybe("command_seconds", lambda key: table.number(key, 1, _COMMAND_SECONDS_MOST))
        or usual.command_seconds,
    )
