"""What was measured of patterns on one kind of device is where the next network starts, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from resvit_engines.bench.compare import Ratio
from resvit_engines.machine import this_machine
from resvit_engines.progress import Silent
from resvit_engines.targets.table import find_target
from resvit_export.records.patterns import keep_patterns, known_patterns, patterns_file
from resvit_export.records.place import Place

CPU, ORIN = find_target("cpu"), find_target("jetson-orin")
MACHINE = dataclasses.replace(
    this_machine(), gpu="Jetson AGX Orin", sm=87, tensorrt="10.3.0", jetpack="6.2", power_mode="MAXN", host="a",
    onnxruntime="1.24.1", processor="Xeon",
)  # fmt: skip
ONE, OTHER = "1" * 64, "2" * 64
FAST = Ratio(1.3, 1.2, 1.4)


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "resvit/tuning"


def place(target=ORIN, **changes) -> Place:
    return Place.of(dataclasses.replace(MACHINE, **changes), target, "ssh://somewhere")


def test_another_network_on_the_same_kind_of_device_starts_from_it() -> None:
    keep_patterns(place(), ONE, {"trunk": FAST}, Silent())
    assert known_patterns(place(host="b"), OTHER, Silent())["trunk"].faster == FAST
    assert known_patterns(place(), ONE, Silent()) == {}, "a network's own times are in its run folder"


def test_the_network_in_floats_is_told_with_it_and_may_lack(cache: Path) -> None:
    keep_patterns(place(), ONE, {"trunk": FAST}, Silent(), "f" * 64)
    assert known_patterns(place(), OTHER, Silent())["trunk"].floats == "f" * 64
    (file,) = cache.glob("*.json")
    document = json.loads(file.read_text())
    del document["patterns"][0]["floats"]
    file.write_text(json.dumps(document))
    assert known_patterns(place(), OTHER, Silent())["trunk"].floats == ""


@pytest.mark.parametrize(
    "changes",
    [{"gpu": "Jetson Orin Nano"}, {"tensorrt": "10.16.1"}, {"jetpack": "7.2"}, {"power_mode": "15W"}, {"sm": 110}],
)
def test_another_device_version_or_power_mode_knows_nothing_of_it(changes) -> None:
    keep_patterns(place(), ONE, {"trunk": FAST}, Silent())
    assert known_patterns(place(**changes), OTHER, Silent()) == {}


@pytest.mark.parametrize("changes", [{"processor": "Neoverse"}, {"onnxruntime": "1.25.0"}, {"arch": "aarch64"}])
def test_so_of_a_processor(changes) -> None:
    keep_patterns(place(CPU), ONE, {"trunk": FAST}, Silent())
    assert known_patterns(place(CPU, tensorrt=None, power_mode=None), OTHER, Silent())
    assert known_patterns(place(CPU, **changes), OTHER, Silent()) == {}


def test_what_is_measured_anew_takes_the_place_of_what_was(cache: Path) -> None:
    keep_patterns(place(), ONE, {"a": FAST, "b": FAST}, Silent())
    slow = Ratio(0.9, 0.85, 0.95)
    keep_patterns(place(), OTHER, {"a": slow}, Silent())
    assert known_patterns(place(), "3" * 64, Silent())["a"].faster == slow
    (file,) = cache.glob("*.json")
    assert [row["pattern"] for row in json.loads(file.read_text())["patterns"]] == ["b", "a"]
    assert file.name.startswith("Jetson-AGX-Orin-")


ODD_ROW = b'{"patterns": [{"pattern": "a", "faster": {"value": "x"}, "network": "y"}]}'


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"patterns": 1}', b'{"patterns": [{"pattern": "a"}]}', ODD_ROW]
)
def test_a_damaged_file_is_said_and_written_anew(content: bytes) -> None:
    file = patterns_file(place())
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    heard = Heard()
    assert known_patterns(place(), ONE, heard) == {}
    assert "is not used" in heard.lines[0]
    keep_patterns(place(), ONE, {"a": FAST}, heard)
    assert known_patterns(place(), OTHER, Silent())["a"].faster == FAST


def test_a_place_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "resvit").write_text("a file")
    heard = Heard()
    keep_patterns(place(), ONE, {"a": FAST}, heard)
    assert "is not kept for other networks" in heard.lines[0]


def test_a_place_is_the_same_under_any_address() -> None:
    there, here = place(), Place.of(MACHINE, ORIN)
    assert there == here
    assert there != Place.of(MACHINE, ORIN, rehearse=True)
    assert "Xeon" not in str(place(ORIN, processor=None).facts)
    assert "tensorrt" not in place(CPU).facts
