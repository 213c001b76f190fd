"""A model repository for Triton Inference Server: an ensemble of the manifest's preprocessing and the engine.

The form of ``config.pbtxt`` is Triton's ``model_config.proto``, as text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.run.feeds import Array
from resvit_engines.run.golden_files import encoded, golden_arrays
from resvit_engines.trt.io_tensor import IoTensor
from resvit_export.serve.subject import FILES, Subject

FRAMES = "frames"
"""The ensemble's input: uint8 [B, H, W, 3] in RGB order."""
QUEUE_DELAY_US = 100
_WARMUP = "warmup"
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}


class Word(str):
    """A member of an enumeration, which the text form writes without quotes."""

    __slots__ = ()


def write_repository(subject: Subject, folder: Path, instances: int) -> list[str]:
    """Write the repository into the empty ``folder``; returns what whoever starts the server must know.

    Raises:
        ResvitError: IMPOSSIBLE where the bundle has no engine that Triton runs, or only takes several images at once.
    """
    engine, image = subject.require_engine("Triton"), subject.image
    report = subject.manifest.engine
    assert report is not None
    smallest, usual, largest = subject.batches
    dynamic = _is_dynamic(next((tensor for tensor in report.inputs if tensor.name == image.name), image))
    if dynamic and smallest > 1:
        raise ResvitError(
            f"The engine takes no fewer than {smallest} images at once, and Triton hands over single ones.",
            "Build it for batches from 1 on: --batch 1.",
            ExitCode.IMPOSSIBLE,
        )
    most = largest if dynamic else 0
    head = () if dynamic else (smallest,)
    name, network, prepare = subject.name, f"{subject.name}-network", f"{subject.name}-preprocess"
    read = [(tensor.name, _type(tensor), (*head, *_dims(tensor))) for tensor in [image]]
    made = [(tensor.name, _type(tensor), (*head, *_dims(tensor))) for tensor in subject.manifest.outputs]
    frames = (FRAMES, Word("TYPE_UINT8"), (*head, -1, -1, 3))

    images, _ = golden_arrays(subject.folder, subject.manifest.golden)
    # Of a range of sizes, those of the golden images: what warms up has to say every size.
    warm = (*head, *images.shape[1:])
    _write(folder / network, _network(subject, network, read, made, most, usual, instances, warm))
    shutil.copyfile(engine, folder / network / "1" / "model.plan")
    if subject.class_names:
        (folder / network / "labels.txt").write_text("".join(f"{one}\n" for one in subject.class_names))
    _write_warmup(subject, folder / network / _WARMUP, _warm_batches(dynamic, subject.batches), images)

    how = {"backend": "python", "max_batch_size": most, "input": [_tensor(*frames)], "output": [_tensor(*read[0])]}
    parts = [{"count": instances, "kind": Word("KIND_CPU")}]
    _write(folder / prepare, {"name": prepare, **how, "instance_group": parts})
    shutil.copyfile(FILES / "triton_preprocess.py.in", folder / prepare / "1" / "model.py")
    said = {
        "preprocess": subject.preprocess.to_json(),
        "input": FRAMES,
        "output": image.name,
        "dtype": image.dtype,
        "encoding": image.encoding.to_json() if image.encoding else None,
    }
    (folder / prepare / "1" / "preprocess.json").write_bytes(pretty_json(said))

    _write(folder / name, _ensemble(name, (prepare, network), frames, image.name, made, most))
    notes = []
    if report.plugin_library:
        shutil.copyfile(subject.folder / report.plugin_library.name, folder / network / report.plugin_library.name)
        library = f"{network}/{report.plugin_library.name}"
        notes.append(f"The engine needs its plugin library: --backend-config=tensorrt,plugins=REPOSITORY/{library}")
    if report.version_compatible:
        notes.append("The engine is for several TensorRT releases: --backend-config=tensorrt,version-compatible=true")
    notes.append(
        f"The engine is by TensorRT {report.builder_version} for SM {report.sm / 10:.1f}: Triton's must be the same."
    )
    notes.append("The server's Python needs resvit_engines: pip install resvit-export.")
    return notes


def text_of(config: dict[str, Any], indent: str = "") -> str:
    """A message as protobuf's text form: a list is a repeated field, a dictionary a message."""
    lines = []
    for key, value in config.items():
        simple = isinstance(value, (list, tuple)) and all(not isinstance(one, dict) for one in value)
        if simple:
            lines.append(f"{indent}{key}: [{', '.join(map(_scalar, value))}]")
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, dict):
                lines.append(f"{indent}{key} {{\n{text_of(one, indent + '  ')}{indent}}}")
            else:
                lines.append(f"{indent}{key}: {_scalar(one)}")
    return "".join(f"{line}\n" for line in lines)


def _network(
    subject: Subject,
    name: str,
    read: Sequence[tuple[str, Word, tuple[int, ...]]],
    made: Sequence[tuple[str, Word, tuple[int, ...]]],
    most: int,
    usual: int,
    instances: int,
    warm_dims: tuple[int, ...],
) -> dict[str, Any]:
    outputs = [_tensor(*tensor) for tensor in made]
    if subject.reading.task == "classification" and subject.class_names:
        outputs = [{**output, "label_filename": "labels.txt"} for output in outputs]
    batching = {
        "dynamic_batching": {
            "preferred_batch_size": sorted({usual, most} - {1}) or [1],
            "max_queue_delay_microseconds": QUEUE_DELAY_US,
        }
    }
    image, kind, _ = read[0]
    warm = [
        {
            "name": f"batch-{batch}",
            "batch_size": batch if most else 1,
            "inputs": {
                "key": image,
                "value": {"data_type": kind, "dims": warm_dims, "input_data_file": f"batch-{batch}"},
            },
        }
        for batch in _warm_batches(most > 0, subject.batches)
    ]
    return {
        "name": name,
        "platform": "tensorrt_plan",
        "max_batch_size": most,
        "input": [_tensor(*tensor) for tensor in read],
        "output": outputs,
        "instance_group": [{"count": instances, "kind": Word("KIND_GPU")}],
        **(batching if most > 1 else {}),
        "model_warmup": warm,
    }


def _ensemble(
    name: str,
    models: tuple[str, str],
    frames: tuple[str, Word, tuple[int, ...]],
    image: str,
    made: Sequence[tuple[str, Word, tuple[int, ...]]],
    most: int,
) -> dict[str, Any]:
    prepare, network = models
    steps = [
        _step(prepare, {FRAMES: FRAMES}, {image: "prepared"}),
        _step(network, {image: "prepared"}, {output: output for output, _, _ in made}),
    ]
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": most,
        "input": [_tensor(*frames)],
        "output": [_tensor(*tensor) for tensor in made],
        "ensemble_scheduling": {"step": steps},
    }


def _step(model: str, read: dict[str, str], made: dict[str, str]) -> dict[str, Any]:
    maps = {"input_map": read, "output_map": made}
    pairs = {name: [{"key": key, "value": value} for key, value in of.items()] for name, of in maps.items()}
    return {"model_name": model, "model_version": -1, **pairs}


def _write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text_of(config))


def _warm_batches(dynamic: bool, batches: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(batches)) if dynamic else (batches[0],)


def _write_warmup(subject: Subject, folder: Path, batches: Sequence[int], images: Array) -> None:
    """One file of golden ``images`` for each batch, in the type that the network reads."""
    given = encoded(images, subject.manifest)
    folder.mkdir()
    for batch in batches:
        some = np.resize(np.arange(len(images)), batch)
        (folder / f"batch-{batch}").write_bytes(given[some].astype(subject.image.dtype or "float32").tobytes())


def _tensor(name: str, kind: Word, dims: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "data_type": kind, "dims": dims}


def _type(tensor: IoTensor) -> Word:
    kind = _TYPES.get(tensor.dtype or "float32")
    if kind is None:
        raise ResvitError(
            f"{tensor.name} is {tensor.dtype}, which Triton's engines do not read.", "Export it as FP32 or FP16.",
            ExitCode.IMPOSSIBLE,
        )  # fmt: skip
    return Word(kind)


def _dims(tensor: IoTensor) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in tensor.shape[1:])


def _is_dynamic(tensor: IoTensor) -> bool:
    return not tensor.shape or not isinstance(tensor.shape[0], int) or tensor.shape[0] < 0


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value) if isinstance(value, str) else str(value)
