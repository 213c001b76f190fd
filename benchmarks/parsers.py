"""Every parser of data from outside, with data that it reads, and how to change that.

A parser is a function of a file (or of a folder, with one file in it changed) that gives something or raises
``ResvitError``. ``ended`` says how one attempt ended; anything but ``read`` or ``refused`` is a fault.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import gzip
import io
import json
import os
import random
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutants
import numpy as np

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Mutator = Callable[[bytes, random.Random], bytes]
ALLOWED = frozenset(ExitCode) - {ExitCode.OK, ExitCode.BUG, ExitCode.USAGE}
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


@dataclass(frozen=True)
class Parser:
    """``read`` gets the path of the first of ``files``, or of their folder; one of those in ``change`` is changed."""

    read: Callable[[Path], object]
    files: Mapping[str, bytes]
    change: Mapping[str, Mutator]
    whole: bool = False
    """``read`` gets the folder."""


def ended(parser: Parser, dice: random.Random, folder: Path) -> str:
    """Change one thing, read it, and say how that ended."""
    name = dice.choice(sorted(parser.change))
    for other, content in parser.files.items():
        path = folder / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parser.change[name](content, dice) if other == name else content)
    seen: list[str] = []
    before, tempfile.tempdir = tempfile.tempdir, str(folder / "scratch")
    (folder / "scratch").mkdir(exist_ok=True)
    try:
        with mutants.watched(folder, seen), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.read(folder if parser.whole else folder / next(iter(parser.files)))
        result = "read"
    except ResvitError as error:
        result = "refused"
        if error.code not in ALLOWED:
            result = f"exit code {error.code}: {error.problem:.150}"
        elif _COMMANDS.search(str(error)):
            result = f"control characters: {str(error)!r:.200}"
    except Exception as error:  # noqa: BLE001 what is counted here
        result = f"{type(error).__name__}: {error}"[:300]
    finally:
        tempfile.tempdir = before
    return f"touched {seen[0]}" if seen else result


def parsers() -> dict[str, Parser]:
    """All of them, by what they read."""
    return {
        **_checkpoints(),
        **_onnx(),
        **_records(),
        **_trust(),
        **_device(),
        **_calibration(),
        **_data(),
        **_pictures(),
    }


def _one(read: Callable[[Path], object], name: str, content: bytes, change: Mutator) -> Parser:
    return Parser(read, {name: content}, {name: change})


def _checkpoints() -> dict[str, Parser]:
    import torch
    from safetensors.torch import save
    from torch import nn

    from resvit_export.loading.checkpoint import load_checkpoint
    from resvit_export.tools.inspect import describe_file

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))

    def read(path: Path) -> None:
        try:
            load_checkpoint(network(), path)
        finally:
            describe_file(path)

    torch.manual_seed(0)
    weights = network().state_dict()
    saved, legacy, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": weights, "epoch": 3}, saved)
    torch.save({"state_dict": weights, "epoch": 3}, legacy, _use_new_zipfile_serialization=False)
    np.savez(arrays, **{name: value.numpy() for name, value in weights.items()})
    return {
        "checkpoint": _one(read, "w.pt", saved.getvalue(), mutants.of_archive),
        "checkpoint before PyTorch 1.6": _one(read, "w.pt", legacy.getvalue(), mutants.of_bytes),
        "checkpoint of safetensors": _one(read, "w.safetensors", save(weights), mutants.of_bytes),
        "checkpoint of NumPy": _one(read, "w.npz", arrays.getvalue(), mutants.of_archive),
    }


def _onnx() -> dict[str, Parser]:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from resvit_export.loading.source import NetworkSource
    from resvit_export.loading.spec import ModelSpec
    from resvit_export.to_onnx.own_onnx import import_onnx
    from resvit_export.to_tensorrt.expectation import expectation_from_onnx
    from resvit_export.tools.inspect import describe_file

    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w", (4, 3, 3, 3)), ("f", (4, 5)), ("b", (5,)))
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("own", ["c"], ["r"], domain="own"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["l"], axis=1),
        helper.make_node("Gemm", ["l", "f", "b"], ["y"], name="fc"),
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "own", ["a"], ["z"], [helper.make_node("Relu", ["a"], ["z"])], opsets[:1])
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5]),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    with tempfile.TemporaryDirectory() as place:
        onnx.save(
            copy_of(model), Path(place) / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
        )
        outside, data = (Path(place, name).read_bytes() for name in ("m.onnx", "w.bin"))

    def change(content: bytes, dice: random.Random) -> bytes:
        return mutants.of_bytes(content, dice) if dice.random() < 0.5 else changed_message(content, dice)

    def read(path: Path) -> None:
        NetworkSource(ModelSpec(str(path))).digest  # noqa: B018 what it is known by is read from the file
        try:
            expectation_from_onnx(path)
            describe_file(path)
        finally:
            import_onnx(path, path.with_name("out.onnx"))

    return {
        "ONNX": _one(read, "m.onnx", model.SerializeToString(), change),
        "ONNX with weights beside it": Parser(
            read, {"m.onnx": outside, "w.bin": data}, {"m.onnx": change, "w.bin": mutants.of_bytes}
        ),
    }


def copy_of(message: Any) -> Any:
    """Another message of the same content."""
    return type(message).FromString(message.SerializeToString())


def changed_message(content: bytes, dice: random.Random) -> bytes:
    """An ONNX file in which some fields hold something else, are left out or come twice."""
    import onnx

    model = onnx.ModelProto.FromString(content)
    for _ in range(dice.choice((1, 1, 2))):
        message: Any = model
        while True:
            fields = message.ListFields()
            if not fields:
                break
            descriptor, value = dice.choice(fields)
            repeated = not isinstance(value, (bytes, str, int, float)) and hasattr(value, "__len__")
            if descriptor.message_type and dice.random() < 0.85:
                message = dice.choice(list(value)) if repeated else value
                continue
            if repeated and dice.random() < 0.5:
                kept = list(value) + [dice.choice(list(value))] * dice.choice((0, 1, 30))
                del value[:]
                value.extend(kept if dice.random() < 0.6 else kept[:-1])
            elif descriptor.message_type or dice.random() < 0.2:
                message.ClearField(descriptor.name)
            else:
                new = _other_value(descriptor, dice)
                if repeated:
                    value[dice.randrange(len(value))] = new
                else:
                    setattr(message, descriptor.name, new)
            break
    return bytes(model.SerializeToString())


def _other_value(descriptor: Any, dice: random.Random) -> Any:
    if descriptor.cpp_type == descriptor.CPPTYPE_STRING:
        texts = [text for text in (*mutants.TEXTS, "Conv", "Loop", "w", "x", "y", "Relu") if text.isascii()]
        text = dice.choice(texts)
        return text.encode() if descriptor.type == descriptor.TYPE_BYTES else text
    if descriptor.cpp_type in (descriptor.CPPTYPE_FLOAT, descriptor.CPPTYPE_DOUBLE):
        return dice.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if descriptor.cpp_type == descriptor.CPPTYPE_ENUM:
        return dice.choice(list(descriptor.enum_type.values_by_number))
    small = descriptor.cpp_type in (descriptor.CPPTYPE_INT32, descriptor.CPPTYPE_UINT32)
    return dice.choice((0, 1, 2, 3, 7, 16, 255, 65536, 2**31 - 1) if small else (0, 1, -1, 3, 99, 2**31, 2**40, 2**62))


def _records() -> dict[str, Parser]:
    import tomli_w

    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_engines.audit.inspector import layers_from_file
    from resvit_engines.targets.layer_times import measured_times_from_json
    from resvit_export.fleet.plan import fleet_from_toml
    from resvit_export.fleet.state import DATABASE, Built, Phase, ReleaseState, opened_state
    from resvit_export.loading.network_record import NetworkRecord
    from resvit_export.recipe.file import recipe_from_toml, recipe_to_toml
    from resvit_export.recipe.recipe import Recipe
    from resvit_export.run_folder import read_record
    from resvit_export.stage import Artifact, Output, Record
    from resvit_export.stages.calibrate import CalibrationImages

    text = recipe_to_toml(
        Recipe(model="resvit:embed-nano", targets=("l4",), data="fashion-mnist", task_options={"classes": 10})
    ).encode()
    recipe = tomllib.loads(text.decode())

    fleet = {
        "name": "cameras",
        "release": {"bundles": ["net.resvit"], "key": "agent", "keys": "keys.json"},
        "rollout": {
            "waves": [1, "10%", "100%"],
            "parallel": 4,
            "max_failures": "5%",
            "soak_seconds": 1.5,
            "after": "a",
        },
        "health": {"golden": True, "latency": 1.5, "command": "true"},
        "types": {"camera": {"target": "l4", "precision": "int8", "devices": ["ssh://u@a-[01..03]:22", "ssh://[::1]"]}},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with opened_state(folder, alone=True) as begun:
            begun.set_devices([("ssh://a", "camera"), ("ssh://b", "camera")])
            begun.begin(ReleaseState("a" * 64, "net release 1", Phase.GOING_OUT, 0, "2026-11-30T00:00:00+00:00"))
            begun.keep_built("b" * 64, Built("b.resvit", "c" * 64, "d" * 64, "ssh://a", 1.5))
        state = (folder / DATABASE).read_bytes()

    def change_fleet(content: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.3:
            return mutants.of_bytes(content, dice)
        with contextlib.suppress(TypeError, ValueError):
            return tomli_w.dumps(mutants.of_document(fleet, dice, _TOML)).encode(errors="replace")
        return content

    def read_state(folder: Path) -> None:
        with opened_state(folder, alone=True) as found:
            _ = found.holder, found.release, found.devices, found.built("b" * 64), found.latency_of("d" * 64)

    def change_recipe(content: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.5:
            return mutants.of_bytes(content, dice)
        try:
            return tomli_w.dumps(mutants.of_document(recipe, dice, _TOML)).encode(errors="replace")
        except (TypeError, ValueError):
            return b"\x00"

    network = NetworkRecord((3, 8, 8), 5, Preprocess((8, 8), 3), True, "0" * 64, class_names={0: "cat"})
    images = CalibrationImages("x", 3, "0" * 64, ("a",), ())
    stage = Record("fold", "0" * 64, {"a": 1}, {"torch": "2"}, {"a.json": Output("0" * 64, 3)}, 1.0, 10)

    def read_documents(path: Path) -> None:
        artifact = Artifact(path.parent, Record("s", "0" * 64, {}, {}, {}, 0.0, 0), reused=True)
        document = artifact._parsed
        from resvit_engines.outside import json_from_outside, read_outside

        value = json_from_outside(read_outside(path), str(path))
        reader = NetworkRecord.from_json if b"input_shape" in path.read_bytes() else CalibrationImages.from_json
        document(path.name, value, reader)

    times = {"device": "orin", "layers": {"conv": {"fp16": 3.0, "int8": 2.0}}}
    layer = {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 3], "Format/Datatype": "Int8"}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 3], "Format/Datatype": "Half"}],
        "TacticName": "t",
        "Metadata": "[ONNX Layer: conv]",
    }
    layers = {"Layers": [layer], "Bindings": ["x", "y"]}
    return {
        "recipe": _one(recipe_from_toml, "recipe.toml", text, change_recipe),
        "record of a stage": Parser(
            read_record,
            {"record.json": json.dumps(stage.to_json()).encode()},
            {"record.json": mutants.of_json},
            whole=True,
        ),
        "record of a network": _one(read_documents, "a.json", json.dumps(network.to_json()).encode(), mutants.of_json),
        "record of images": _one(read_documents, "a.json", json.dumps(images.to_json()).encode(), mutants.of_json),
        "measured times": _one(measured_times_from_json, "t.json", json.dumps(times).encode(), mutants.of_json),
        "layers of an engine": _one(layers_from_file, "l.json", json.dumps(layers).encode(), mutants.of_json),
        "fleet": _one(fleet_from_toml, "fleet.toml", tomli_w.dumps(fleet).encode(), change_fleet),
        "state of a fleet": Parser(read_state, {DATABASE: state}, {DATABASE: mutants.of_bytes}, whole=True),
    }


_TOML = tuple(value for value in mutants.VALUES if value is not None and value not in ([None], [1.5, "x", None]))


def _trust() -> dict[str, Parser]:
    from trusted import (
        A_MANIFEST,
        ENVELOPE,
        KEY_FILE,
        LIST,
        MANIFEST,
        PRIVATE,
        SIGNING,
        read_key,
        read_list,
        read_manifest,
        read_signature,
    )

    from resvit_engines.bundle.bundle import extract_bundle, write_bundle
    from resvit_engines.bundle.bundle import read_manifest as manifest_of
    from resvit_engines.files import pretty_json
    from resvit_engines.keys.key_list import KeyList, SignedList, list_from_bytes, sign_list
    from resvit_engines.keys.private import SigningKey, load_signing_key
    from resvit_engines.keys.public import load_trust
    from resvit_engines.keys.public_key import PublicKey, public_key_from_bytes
    from resvit_export.tools.inspect import describe_file

    days = datetime.date(2026, 11, 30), datetime.date(2027, 11, 30)
    raw = public_key_from_bytes(KEY_FILE, Path("a.pub")).raw
    root, release = SigningKey(PublicKey(SIGNING.public.raw, "root"), SIGNING.sign), PublicKey(raw, "release")
    trusted = (release,) if raw != root.public.raw else ()
    signed_list = sign_list(KeyList(3, *days, (root.public,), 1, trusted, frozenset({"a" * 64})), root)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "b.resvit"
        files = {"model.onnx": b"onnx" * 8, "golden_input.npy": b"g" * 9, "golden_output.npy": b"h" * 9}
        write_bundle(path, A_MANIFEST, files, SIGNING)
        bundle = path.read_bytes()

    def read_signed_list(data: bytes) -> None:
        list_from_bytes(data, "keys.json").require_signed([root.public], 1, "keys.json")

    def change_list(data: bytes, dice: random.Random) -> bytes:
        """Its bytes, or what is signed, in its form and with a signature that holds."""
        if dice.random() < 0.3:
            return mutants.of_bytes(data, dice)
        payload = mutants.of_json(signed_list.payload, dice)
        with contextlib.suppress(ValueError, UnicodeError):
            payload = pretty_json(json.loads(payload))
        return SignedList(signed_list.keys, payload, ()).cosigned(root).to_bytes()

    def read_private(path: Path) -> None:
        path.chmod(0o600)
        load_signing_key(str(path))

    def read_trust(folder: Path) -> None:
        folder.chmod(0o755)
        load_trust(folder / "keys")

    def read_bundle(path: Path) -> None:
        into = path.with_name("out")
        shutil.rmtree(into, ignore_errors=True)
        try:
            manifest_of(path)
            extract_bundle(path, into)
        finally:
            describe_file(path, path.with_name("none"))

    def of(read: Callable[[bytes], None]) -> Callable[[Path], None]:
        return lambda path: read(path.read_bytes())

    return {
        "key file": _one(of(read_key), "a.pub", KEY_FILE, mutants.of_bytes),
        "list of revoked keys": _one(of(read_list), "revoked", LIST, mutants.of_bytes),
        "signed list of keys": _one(of(read_signed_list), "keys.json", signed_list.to_bytes(), change_list),
        "folder of keys": Parser(
            read_trust,
            {"keys/a.pub": KEY_FILE, "keys/revoked": LIST},
            {"keys/a.pub": mutants.of_bytes, "keys/revoked": mutants.of_bytes},
            whole=True,
        ),
        "private key": _one(read_private, "a.key", PRIVATE, mutants.of_bytes),
        "signature": _one(of(read_signature), "signature.json", ENVELOPE, mutants.of_bytes),
        "manifest": _one(of(read_manifest), "manifest.json", MANIFEST, mutants.of_json),
        "bundle": _one(read_bundle, "b.resvit", bundle, mutants.of_archive),
    }


def _device() -> dict[str, Parser]:
    from resvit_engines.machine import Machine
    from resvit_engines.records import record_from_bytes
    from resvit_engines.remote.device import listed_results
    from resvit_engines.remote.job_result import Answers, DeviceBundle, JobResult, Skipped, finished_result
    from resvit_engines.remote.progress_events import replay

    machine = {
        "arch": "aarch64",
        "memory_mib": 1,
        "free_disk_mib": 1,
        "python": "3.10.12",
        "sm": 87,
        "gpu": "Orin",
        "jetpack": "6.1",
        "tensorrt": "10.3.0",
    }
    error = {"error": {"problem": "p", "fix": "f", "exit_code": 8}}
    kernel = {
        "name": "gemm",
        "type": "gemm",
        "inputs": ["Int8"],
        "outputs": ["Half"],
        "input_shapes": [[1, 8]],
        "output_shapes": [[1, 8]],
        "layers": ["fc/MatMul"],
        "constants": [],
        "constant_shapes": [],
        "input_names": [],
        "output_names": [],
        "tactic": "",
    }
    engine = {
        "target": "jetson-orin",
        "builder": "TensorRT",
        "builder_version": "10.3.0",
        "sm": 87,
        "bytes": 3,
        "seconds": 7.5,
        "peak_mib": 12,
        "sha256": "3d" * 32,
        "inputs": [],
        "outputs": [],
        "warnings": [],
        "kernels": [kernel],
    }
    job = {
        "engine": engine,
        "rehearsal": False,
        "facts": machine,
        "golden": Skipped("none").to_json(),
        "outputs": Answers(3, "TensorRT 10.3.0").to_json(),
        "bench": Skipped("none").to_json(),
        "bundle": DeviceBundle("x.resvit", "0" * 64, "key", "id").to_json(),
    }
    result = {"result": job}
    events = [{"begin": "b", "total": 3, "weight": 1}, {"step": 1}, {"say": "x"}, {"warn": "y"}, {"end": 1}]
    listed = b"built:\nengine.plan\n\noutputs/images-0001-ab.npy\n"

    def read_progress(path: Path) -> None:
        replay(iter(path.read_bytes().decode(errors="replace").splitlines()), SILENT)

    def change_progress(content: bytes, dice: random.Random) -> bytes:
        lines = content.splitlines()
        if dice.random() < 0.5:
            return b"\n".join(mutants.of_json(line, dice) if dice.random() < 0.5 else line for line in lines)
        return mutants.of_bytes(content, dice)

    def read_result(path: Path) -> None:
        JobResult.from_json(finished_result(record_from_bytes(path.read_bytes(), "the result"), "ssh://dev"))

    return {
        "what a device is": _one(
            lambda path: Machine.from_json(record_from_bytes(path.read_bytes(), "it")),
            "a.json",
            json.dumps(machine).encode(),
            mutants.of_json,
        ),
        "error of a device": _one(read_result, "a.json", json.dumps(error).encode(), mutants.of_json),
        "result of a device": _one(read_result, "a.json", json.dumps(result).encode(), mutants.of_json),
        "progress of a device": _one(
            read_progress, "a.log", b"\n".join(json.dumps(event).encode() for event in events), change_progress
        ),
        "files of a device": _one(
            lambda path: listed_results(path.read_bytes().decode(errors="replace"), 1, "ssh://dev"),
            "a.txt",
            listed,
            mutants.of_bytes,
        ),
    }


def _calibration() -> dict[str, Parser]:
    from resvit_calibrate.observe.histogram import TensorStatistics
    from resvit_calibrate.ranges.ranges import ranges_from, ranges_from_json
    from resvit_calibrate.ranges.statistics import Statistics, save_statistics, statistics_from_npz
    from resvit_engines.run.npy import read_array

    seen = TensorStatistics(9, -1.0, 2.0, np.arange(128, dtype=np.int64), 0.1)
    statistics = Statistics({"a": seen, "b": TensorStatistics(0, -1.0, 1.0, None, 0.0)}, 4)
    with tempfile.TemporaryDirectory() as place:
        save_statistics(statistics, Path(place) / "s.npz")
        kept = Path(place, "s.npz").read_bytes()
    ranges = json.dumps(ranges_from(statistics, "0" * 64).to_json()).encode()
    array = io.BytesIO()
    np.save(array, np.zeros((2, 3, 4), np.float32))
    return {
        "ranges": _one(lambda path: ranges_from_json(path.read_bytes(), path.name), "r.json", ranges, mutants.of_json),
        "statistics": _one(
            lambda path: statistics_from_npz(path.read_bytes(), path.name), "s.npz", kept, mutants.of_archive
        ),
        "array": _one(lambda path: read_array(path, "input"), "a.npy", array.getvalue(), mutants.of_bytes),
    }


def _images(count: int = 6) -> dict[str, bytes]:
    from PIL import Image

    rng, files = np.random.default_rng(0), {}
    for number in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (9, 10, 3), np.uint8)).save(out, "PNG")
        files[f"{number}.png"] = out.getvalue()
    return files


def _segments() -> bytes:
    """A PNG of the segments 258 and 5, and pixels of none, of the size of the pictures."""
    from PIL import Image

    colours, out = np.zeros((9, 10, 3), np.uint8), io.BytesIO()
    colours[:4], colours[4:8] = (2, 1, 0), (5, 0, 0)
    Image.fromarray(colours).save(out, "PNG")
    return out.getvalue()


def _opened(**more: Any) -> Callable[[Path], object]:
    """Open what a path names as data, and read all of its images."""
    from resvit_calibrate.data.image_sets import open_image_sets
    from resvit_calibrate.images.image_set import DataSpec
    from resvit_calibrate.images.preprocess import Preprocess

    def read(path: Path) -> None:
        for images in open_image_sets(DataSpec(str(path), calibration_images=2, **more), Preprocess((8, 8), 3)):
            for _ in images.batches(4):
                pass

    return read


def _data() -> dict[str, Parser]:
    from resvit_calibrate.images.class_list import class_list_from_file
    from resvit_calibrate.readers.fashion_mnist import read_split

    pictures = _images()
    entries = [{"id": number, "file_name": name, "width": 10, "height": 9} for number, name in enumerate(pictures)]
    boxes = [
        {
            "id": number,
            "image_id": number,
            "category_id": 1 + number % 2,
            "bbox": [1, 1, 4, 4],
            "area": 16,
            "iscrowd": 0,
        }
        for number in range(len(pictures))
    ]
    coco = {
        "images": entries,
        "annotations": boxes,
        "categories": [{"id": 1, "name": "a", "supercategory": "b"}, {"id": 2, "name": "b"}],
    }

    segments = {f"panoptic_all/{name}": _segments() for name in pictures}
    panoptic = {
        **coco,
        "annotations": [
            {
                "image_id": number,
                "file_name": name,
                "segments_info": [{"id": 258, "category_id": 1}, {"id": 5, "category_id": 2}],
            }
            for number, name in enumerate(pictures)
        ],
    }

    def archive(**arrays: Any) -> bytes:
        out = io.BytesIO()
        np.savez(out, images=np.random.default_rng(1).integers(0, 256, (8, 9, 10, 3), np.uint8), **arrays)
        return out.getvalue()

    def idx(values: Any) -> bytes:
        sizes = struct.pack(f">{values.ndim}I", *values.shape)
        return gzip.compress(bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes())

    def read_mnist(folder: Path) -> None:
        with variable("RESVIT_FASHION_MNIST", str(folder)):
            for split in ("train", "test"):
                read_split(split)

    def change_idx(content: bytes, dice: random.Random) -> bytes:
        return (
            mutants.of_bytes(content, dice)
            if dice.random() < 0.3
            else gzip.compress(mutants.of_bytes(gzip.decompress(content), dice), 1)
        )

    mnist = {
        f"{split}-{kind}-ubyte.gz": idx(np.zeros(shape))
        for split in ("train", "t10k")
        for kind, shape in (("images-idx3", (4, 28, 28)), ("labels-idx1", (4,)))
    }
    labels = np.arange(8) % 2
    return {
        "COCO": Parser(
            _opened(),
            {**pictures, "annotations.json": json.dumps(coco).encode()},
            {"annotations.json": mutants.of_json},
            whole=True,
        ),
        "COCO's panoptic format": Parser(
            _opened(),
            {**pictures, **segments, "panoptic_all.json": json.dumps(panoptic).encode()},
            {"panoptic_all.json": mutants.of_json, "panoptic_all/0.png": mutants.of_bytes},
            whole=True,
        ),
        "list of classes": _one(class_list_from_file, "classes.txt", b"cat\ndog\nowl\n", mutants.of_bytes),
        "classes in JSON": _one(
            class_list_from_file, "c.json", json.dumps({"cat": 0, "dog": 1}).encode(), mutants.of_json
        ),
        "NPZ with labels": _one(_opened(), "a.npz", archive(labels=labels), mutants.of_archive),
        "NPZ with masks": _one(
            _opened(),
            "a.npz",
            archive(masks=np.zeros((8, 9, 10), np.uint8) + labels[:, None, None].astype(np.uint8)),
            mutants.of_archive,
        ),
        "NPZ with boxes": _one(
            _opened(),
            "a.npz",
            archive(
                boxes=np.tile(np.array([1, 1, 5, 5], np.float32), (8, 1)), box_classes=labels, box_offsets=np.arange(9)
            ),
            mutants.of_archive,
        ),
        "Fashion-MNIST": Parser(read_mnist, mnist, dict.fromkeys(mnist, change_idx), whole=True),
        **_lists(),
    }


def _lists() -> dict[str, Parser]:
    """Files of lines, YAML, XML and outlines about pictures, and tar files of both."""
    from resvit_calibrate.images.targets import TargetOptions

    pictures = _images()
    yolo = {f"labels/{Path(name).stem}.txt": b"0 0.5 0.5 0.2 0.2\n1 .1 .1 .9 .1 .9 .9\n" for name in pictures}
    beside = {f"images/{name}": data for name, data in pictures.items()}
    described = b"path: .\ntrain: images\nval: [images]\nnc: 2\nnames: {0: a, 1: b}\n"
    annotation = (
        b"<annotation><size><width>10</width><height>9</height></size><object><name>a</name><difficult>0</difficult>"
        b"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object></annotation>"
    )
    voc = {f"Annotations/{Path(name).stem}.xml": annotation for name in pictures}
    rows = [(name, f"text {number}, \u00e9") for number, name in enumerate(pictures)]
    texts = {
        "gt.txt": "".join(f"{name}\t{text}\n" for name, text in rows),
        "labels.txt": "".join(f'{name}, "{text}"\n' for name, text in rows),
        "metadata.csv": "file_name,text\n" + "".join(f'{name},"{text}"\n' for name, text in rows),
        "metadata.jsonl": "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows),
    }
    found = {
        "YOLO's boxes": Parser(
            _opened(), {**beside, **yolo, "data.yaml": described}, dict.fromkeys(yolo, mutants.of_bytes), whole=True
        ),
        "YOLO's data.yaml": Parser(
            _opened(), {**beside, **yolo, "data.yaml": described}, {"data.yaml": mutants.of_bytes}, whole=True
        ),
        "VOC's XML": Parser(
            _opened(),
            {**{f"JPEGImages/{name}": data for name, data in pictures.items()}, **voc},
            dict.fromkeys(voc, mutants.of_bytes),
            whole=True,
        ),
    }
    for name, text in texts.items():
        found[f"texts: {name}"] = Parser(
            _opened(), {**pictures, name: text.encode()}, {name: mutants.of_bytes}, whole=True
        )
    classes = {
        "val.txt": "".join(f"{name} {number % 2}\n" for number, name in enumerate(pictures)),
        "labels.csv": "file,label,split\n"
        + "".join(f"{name},{'ab'[n % 2]},train\n" for n, name in enumerate(pictures)),
        "shares.csv": "image,a,b\n" + "".join(f"{n},{n % 2},{1 - n % 2}\n" for n in range(len(pictures))),
        "labels.jsonl": "".join(
            json.dumps({"file_name": name, "class_name": "ab"[number % 2], "class_id": number % 2}) + "\n"
            for number, name in enumerate(pictures)
        ),
    }
    for name, text in classes.items():
        found[f"classes: {name}"] = Parser(
            _opened(), {**pictures, name: text.encode()}, {name: mutants.of_bytes}, whole=True
        )
    synsets = {f"val/ILSVRC2012_val_{n + 1:08}.png": data for n, data in enumerate(pictures.values())}
    lines = {
        "synset_labels.txt": "".join(f"n0144076{n % 2}\n" for n in range(len(pictures))).encode(),
        "synset_words.txt": b"n01440760 a, b\nn01440761 c\n",
    }
    outlines = {
        "images": [{"id": n, "file_name": name, "width": 10, "height": 9} for n, name in enumerate(pictures)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 5, 5], "segmentation": outline}
            for n, outline in enumerate(
                (
                    [[1, 1, 8, 1, 8, 8]],
                    {"size": [9, 10], "counts": [3, 7, 80]},
                    {"size": [9, 10], "counts": "d04500000R1"},
                )
            )
        ],
    }
    found["COCO's outlines"] = Parser(
        _opened(reading=TargetOptions(outlines=True)),
        {**pictures, "annotations.json": json.dumps(outlines).encode()},
        {"annotations.json": mutants.of_json},
        whole=True,
    )
    colour_rows = {"class_dict.csv": b"name,r,g,b\na,0,0,0\nb,9,9,9\n"}
    found["table of colours"] = Parser(
        _opened(),
        {**beside, **{f"masks/{name}": _mask_of_colours() for name in pictures}, **colour_rows},
        dict.fromkeys(colour_rows, mutants.of_bytes),
        whole=True,
    )
    found.update(_labelled(pictures))
    found["shard"] = _one(_opened(), "a.tar", _shard(pictures), mutants.of_bytes)
    found["synsets in order"] = Parser(
        _opened(), {**synsets, **lines}, dict.fromkeys(lines, mutants.of_bytes), whole=True
    )
    return found


def _labelled(pictures: Mapping[str, bytes]) -> dict[str, Parser]:
    """What tools for labelling write, read for masks where it has outlines; pictures are 9 by 10."""
    from resvit_calibrate.images.targets import TargetOptions

    names, size = list(pictures), {"height": 9, "width": 10}
    outline = [[1, 1], [8, 1], [8, 8]]
    patch = _packed_mask()
    shapes = [
        {"label": "a", "points": outline, "group_id": 1, "shape_type": "polygon"},
        {"label": "a", "points": [[1, 2], [4, 5]], "group_id": 1, "shape_type": "rectangle"},
        {"label": "b", "points": [[3, 3], [5, 3]], "shape_type": "circle"},
        {"label": "b", "points": [[0, 0], [3, 2]], "shape_type": "mask", "mask": patch[0]},
    ]
    labelme = {
        f"{Path(name).stem}.json": {
            "shapes": shapes,
            "imagePath": name,
            "imageData": base64.b64encode(pictures[name]).decode(),
            "imageHeight": 9,
            "imageWidth": 10,
        }
        for name in names
    }
    regions = [
        {
            "shape_attributes": {"name": "rect", "x": 1, "y": 1, "width": 4, "height": 4},
            "region_attributes": {"c": "a"},
        },
        {
            "shape_attributes": {"name": "polygon", "all_points_x": [1, 8, 8], "all_points_y": [1, 1, 8]},
            "region_attributes": {"c": {"b": True}},
        },
        {
            "shape_attributes": {"name": "ellipse", "cx": 5, "cy": 5, "rx": 2, "ry": 1, "theta": 1},
            "region_attributes": {"c": "a"},
        },
    ]
    via = {name: {"filename": name, "regions": regions} for name in names}
    box = {"label": "a", "coordinates": {"x": 5, "y": 4, "width": 4, "height": 3}}
    hole = [[5, 2], [7, 2], [7, 5]]
    objects = [
        {"classTitle": "a", "geometryType": "rectangle", "points": {"exterior": [[1, 1], [5, 5]], "interior": []}},
        {"classTitle": "a", "geometryType": "polygon", "points": {"exterior": outline, "interior": [hole]}},
        {"classTitle": "b", "geometryType": "bitmap", "bitmap": {"data": patch[1], "origin": [2, 3]}},
    ]
    supervisely = {f"ds/ann/{name}.json": {"size": size, "objects": objects} for name in names}
    common = {"from_name": "a", "to_name": "b", "original_height": 9, "original_width": 10}
    results = [
        {"type": kind, **common, "value": {"x": 10, "y": 10, "rotation": 9, kind: ["a"], **more}}
        for kind, more in (
            ("rectanglelabels", {"width": 30, "height": 40}),
            ("polygonlabels", {"points": [[10, 10], [80, 10], [80, 80]]}),
            ("ellipselabels", {"radiusX": 5, "radiusY": 9}),
        )
    ]
    studio = [{"data": {"image": f"/x/{name}"}, "annotations": [{"result": results}]} for name in names]
    drawn = (
        '<box label="a" xtl="1" ytl="1" xbr="5" ybr="5" rotation="9"/><polygon label="a" points="1,1;8,1;8,8"/>'
        '<ellipse label="b" cx="5" cy="5" rx="2" ry="1"/>'
        '<mask label="b" rle="2,3,1" left="1" top="1" width="3" height="2"/>'
    )
    images = "".join(f'<image name="{name}" width="10" height="9">{drawn}</image>' for name in names)
    labels = "<meta><task><labels><label><name>a</name></label><label><name>b</name></label></labels></task></meta>"
    kitti = b"Car 0.00 0 -1.58 1.0 1.0 5.0 5.0 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n"
    boxes = "".join(f"{name},10,9,{'ab'[number % 2]},1,1,5,5\n" for number, name in enumerate(names))
    shares = "".join(f"{Path(name).stem},/m/1,0.1,0.5,0.1,0.5,0\n" for name in names)
    csv = "".join(
        f'{name},"{json.dumps(one["shape_attributes"]).replace(chr(34), chr(34) * 2)}",'
        f'"{json.dumps(one["region_attributes"]).replace(chr(34), chr(34) * 2)}"\n'
        for name in names
        for one in regions
    )

    def parser(
        files: Mapping[str, Any], change: Mutator, beside: Mapping[str, bytes] = pictures, *, outlined: bool = True
    ) -> Parser:
        contents = {
            name: held if isinstance(held, bytes) else json.dumps(held).encode() for name, held in files.items()
        }
        read = _opened(reading=TargetOptions(outlines=True)) if outlined else _opened()
        return Parser(read, {**beside, **contents}, dict.fromkeys(contents, change), whole=True)

    beside = {f"ds/img/{name}": data for name, data in pictures.items()}
    left = {f"image_2/{name}": data for name, data in pictures.items()}
    return {
        "labelme": parser(labelme, mutants.of_json),
        "labelme with its pictures inside": parser(labelme, mutants.of_bytes, {}, outlined=False),
        "VIA": parser({"via.json": via}, mutants.of_json),
        "VIA's CSV": parser(
            {"via.csv": f"filename,region_shape_attributes,region_attributes\n{csv}".encode()}, mutants.of_bytes
        ),
        "CreateML": parser(
            {"a.json": [{"image": name, "annotations": [box]} for name in names]}, mutants.of_json, outlined=False
        ),
        "CVAT's XML": parser(
            {"annotations.xml": f"<annotations>{labels}{images}</annotations>".encode()}, mutants.of_bytes
        ),
        "KITTI": parser(
            {f"label_2/{Path(name).stem}.txt": kitti for name in names}, mutants.of_bytes, left, outlined=False
        ),
        "Supervisely": parser(supervisely, mutants.of_json, beside),
        "Label Studio": parser({"a.json": studio}, mutants.of_json),
        "list of boxes": parser(
            {"boxes.csv": f"filename,width,height,class,xmin,ymin,xmax,ymax\n{boxes}".encode()},
            mutants.of_bytes,
            outlined=False,
        ),
        "Open Images": parser(
            {
                "boxes.csv": f"ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n{shares}".encode(),
                "class-descriptions-boxable.csv": b"/m/1,a\n",
            },
            mutants.of_bytes,
            outlined=False,
        ),
    }


def _packed_mask() -> tuple[str, str]:
    """A small mask as labelme and as Supervisely keep one: a PNG in base64, and one that zlib packed before."""
    from PIL import Image

    data = _encoded(Image.fromarray(np.eye(3, 4, dtype=np.uint8) * 255))
    return base64.b64encode(data).decode(), base64.b64encode(zlib.compress(data)).decode()


def _mask_of_colours() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.tile((np.arange(10) % 2 * 9).astype(np.uint8)[None, :, None], (9, 1, 3))).save(out, "PNG")
    return out.getvalue()


def _shard(pictures: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number, data in enumerate(pictures.values()):
            about = {"cls": str(number % 2).encode()} if number % 3 else {"json": b'{"label": 1}'}
            for ending, content in {"png": data, **about}.items():
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _pictures() -> dict[str, Parser]:
    from PIL import Image

    rng = np.random.default_rng(2)
    colour = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    made: dict[str, bytes] = {}
    for name, image, options in (
        ("png", colour, {}),
        ("jpg", colour, {"exif": turned}),
        ("tiff", colour, {"compression": "tiff_lzw"}),
        ("gif", colour.convert("P"), {}),
        ("bmp", colour, {}),
        ("webp", colour, {}),
        ("png of 16 bits", Image.fromarray(rng.integers(0, 65536, (20, 24), np.uint16)), {}),
    ):
        out = io.BytesIO()
        image.save(out, {"jpg": "JPEG"}.get(name, name.partition(" ")[0].upper()), **options)
        made[name] = out.getvalue()
    masks = {
        f"masks/{number}.png": content
        for number, content in enumerate(
            _encoded(Image.fromarray(np.full((9, 10), number % 2, np.uint8))) for number in range(6)
        )
    }
    found = {}
    for name, content in made.items():
        ending = name.partition(" ")[0]
        files = {f"{kind}/{name}": data for kind in "ab" for name, data in _images(4).items()}
        changed = f"a/x.{ending}"
        found[f"picture: {name}"] = Parser(
            _opened(), {**files, changed: content}, {changed: mutants.of_bytes}, whole=True
        )
    pictures = {f"images/{name}": data for name, data in _images().items()}
    depths = {f"depth/{number}.npy": _array(np.full((9, 10), 2.5, np.float32)) for number in range(6)}
    found["depths"] = Parser(_opened(), {**pictures, **depths}, {"depth/0.npy": mutants.of_bytes}, whole=True)
    found["masks"] = Parser(_opened(), {**pictures, **masks}, {"masks/0.png": mutants.of_bytes}, whole=True)
    return found


def _array(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _encoded(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class variable:  # noqa: N801 used as a context
    """Within the block a variable of the environment has a value."""

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def __enter__(self) -> None:
        self.before = os.environ.get(self.name)
        os.environ[self.name] = self.value

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            os.environ.pop(self.name, None)
        else:
            os.environ[self.name] = self.before
