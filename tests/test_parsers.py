"""Whatever is changed in data from outside, reading it gives a value or one error that is the user's, and no more.

A short form of ``benchmarks/parser_faults.py``, where the parsers and the changes stand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_engines.console import run_command
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.install.install import installed_version, status
from resvit_engines.install.state import default_root
from resvit_engines.keys.own import own_key
from resvit_engines.keys.private import load_signing_key
from resvit_engines.keys.public import load_trust
from resvit_engines.registry.client import Client
from resvit_engines.registry.reference import reference_from_text
from resvit_engines.remote.ssh import Connection, address_from
from resvit_engines.remote.wheelhouse import WHEELS_VARIABLE, chosen_wheels
from resvit_export.stages.device import images_that_fit
from test_on_device import ORIN

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import mutants  # noqa: E402
import parsers  # noqa: E402

PARSERS = functools.cache(parsers.parsers)
NAMES = (
    *("checkpoint", "checkpoint before PyTorch 1.6", "checkpoint of safetensors", "checkpoint of NumPy", "ONNX"),
    *("ONNX with weights beside it", "recipe", "record of a stage", "record of a network", "record of images"),
    *("measured times", "layers of an engine", "fleet", "state of a fleet", "key file", "list of revoked keys"),
    *("signed list of keys", "folder of keys", "private key"),
    *("signature", "manifest", "bundle", "what a device is", "error of a device", "result of a device"),
    *("progress of a device", "files of a device", "ranges", "statistics", "array", "COCO", "COCO's panoptic format"),
    *("list of classes", "classes in JSON", "NPZ with labels", "NPZ with masks", "NPZ with boxes", "Fashion-MNIST"),
    *("YOLO's boxes", "YOLO's data.yaml", "VOC's XML", "texts: gt.txt", "texts: labels.txt", "texts: metadata.csv"),
    *("texts: metadata.jsonl", "classes: val.txt", "classes: labels.csv", "classes: shares.csv"),
    *(
        "classes: labels.jsonl",
        "COCO's outlines",
        "table of colours",
        *("labelme", "labelme with its pictures inside", "VIA", "VIA's CSV", "CreateML", "CVAT's XML", "KITTI"),
        *("Supervisely", "Label Studio", "list of boxes", "Open Images"),
        "shard",
        "synsets in order",
        "picture: png",
        "picture: jpg",
        "picture: tiff",
        "picture: gif",
        "picture: bmp",
    ),
    *("picture: webp", "picture: png of 16 bits", "depths", "masks"),
)
SLOW = dict.fromkeys(("ONNX", "ONNX with weights beside it"), 300)
"""Cases of the long form, where a thousand would take more than a minute."""


def tried(name: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = parsers.ended(PARSERS()[name], random.Random(seed), Path(folder).resolve())
    assert result in ("read", "refused")


def test_every_parser_is_tried_and_reads_what_nobody_changed(tmp_path: Path) -> None:
    assert tuple(PARSERS()) == NAMES
    for index, (name, parser) in enumerate(PARSERS().items()):
        whole = dataclasses.replace(parser, change=dict.fromkeys(parser.change, lambda data, _: data))
        (tmp_path / str(index)).mkdir()
        ended = parsers.ended(whole, random.Random(0), tmp_path / str(index))
        assert ended == ("refused" if name in ("error of a device", "checkpoint of NumPy") else "read"), name


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 1 << 40))
@settings(max_examples=4)
def test_changed_data_is_read_or_refused(name: str, seed: int) -> None:
    tried(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_much_changed_data_is_read_or_refused(name: str) -> None:
    @given(st.integers(0, 1 << 40))
    @settings(max_examples=SLOW.get(name, 1000))
    def attempt(seed: int) -> None:
        tried(name, seed)

    attempt()


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    for action, word in (
        (lambda: outside.write_text("x"), "open"),
        (outside.unlink, "os.remove"),
        (lambda: os.system("true"), "os.system"),
        (lambda: __import__(mutants.CANARY), "import"),
    ):
        seen: list[str] = []
        with mutants.watched(inside, seen), contextlib.suppress(ImportError):
            action()
        assert seen
        assert seen[0].startswith(word)
    seen = []
    with mutants.watched(inside, seen):
        (inside / "x").write_text("x")
    assert seen == []


# Variables of the environment.


def _device() -> None:
    with Connection(address_from("ssh://nobody.invalid"), patience=0.1) as connection:
        connection.run("true")


@click.command()
def _fails() -> None:
    raise ResvitError("a problem", "a fix")


VARIABLES: dict[str, Callable[[], Any]] = {
    "RESVIT_DEBUG": lambda: run_command(_fails, "p", [], missing=""),
    "RESVIT_DEVICE_IMAGES_MIB": lambda: images_that_fit([3, 8, 8], 1, ORIN),
    WHEELS_VARIABLE: chosen_wheels,
    "RESVIT_FASHION_MNIST": lambda: __import__(
        "resvit_calibrate.readers.fashion_mnist", fromlist=["read_split"]
    ).read_split("test"),
    "RESVIT_REGISTRY_PATIENCE": lambda: Client(reference_from_text("oci://localhost/a/b:c")),
    "RESVIT_ROOT": lambda: (status(default_root()), installed_version(default_root(), "net", load_trust())),
    "RESVIT_SIGNING_KEY": load_signing_key,
    "RESVIT_SIGNING_KEY_FILE": load_signing_key,
    "RESVIT_SSH_CONFIG": _device,
    "RESVIT_SSH_PATIENCE": lambda: Connection(address_from("ssh://nobody.invalid")),
    "RESVIT_TRUST": lambda: (load_trust(), own_key()),
}
"""Each variable, and what reads it."""
HOSTILE = (
    *("", " ", ".", "/", "~", "[", "0", "-1", "nan", "9" * 400, "x" * 5000, "../../x", "a\nb", "\udc80"),
    *(
        "folder",
        "pipe",
        "/etc/passwd",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "/root/\u202ex",
        "~nobody/x",
        "~nosuchuser/x",
    ),
    *("-oProxyCommand=touch x", "$(touch x)", "\x1b]0;owned\x07", "agent", "agent:\x1b[2J", "ssh://x"),
)


def test_every_variable_is_known() -> None:
    wings = [ROOT / wing for wing in ("export", "quantize", "calibrate", "engines")]
    texts = [path.read_text() for wing in wings for path in wing.rglob("*.py")]
    assert {name for text in texts for name in re.findall(r"\bRESVIT_[A-Z_]+\b", text)} == set(VARIABLES)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ssh"
    program.write_text("#!/bin/sh\necho ssh: Could not resolve hostname nobody.invalid >&2\nexit 255\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr("resvit_engines.keys.public.default_trust_folder", lambda: tmp_path / "home/keys")
    monkeypatch.setattr("resvit_engines.keys.own.default_trust_folder", lambda: tmp_path / "home/keys")
    return tmp_path


@pytest.mark.parametrize("name", VARIABLES)
def test_a_hostile_value_is_used_or_refused(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for value in HOSTILE:
        monkeypatch.setenv(name, value)
        refusal = ended = None
        try:
            ended = VARIABLES[name]()
        except ResvitError as error:
            refusal = error
        if refusal is not None:
            assert refusal.code not in (ExitCode.OK, ExitCode.BUG, ExitCode.USAGE), value
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", str(refusal)), value
        assert name != "RESVIT_DEBUG" or ended == ExitCode.INPUT
        assert not Path("x").exists(), value
    assert "\x1b" not in "".join(capfd.readouterr())
