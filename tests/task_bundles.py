"""Signed bundles with small networks that tell the colours of a frame, one for every task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles, ImageCount, ManifestVerdict
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.run.onnx_on_cpu import open_onnx
from resvit_engines.targets.table import find_target
from resvit_engines.trt.io_tensor import IoTensor
from test_signing import KEY

NAMES = ("red", "green", "blue")
SIZE = (16, 24)
BOXES = np.array([[2, 2, 10, 8], [3, 2, 10, 8], [12, 4, 24, 16]], np.float32)
"""What the detector says of every image, in pixels of its input."""


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


POOLED = [node("GlobalAveragePool", "input", "pooled"), node("Flatten", "pooled", "colour")]
GRAPHS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], dict[str, list[Any]]]] = {
    "classification": (
        [*POOLED, node("Mul", "colour ten", "logits")],
        {"ten": np.array(10.0, np.float32)},
        {"logits": ["B", 3]},
    ),
    "embedding": ([*POOLED, node("Identity", "colour", "vector")], {}, {"vector": ["B", 3]}),
    "segmentation": ([node("Identity", "input", "masks")], {}, {"masks": ["B", 3, *SIZE]}),
    "depth": (
        [node("ReduceSum", "input one", "depths", keepdims=1)],
        {"one": np.array([1])},
        {"depths": ["B", 1, *SIZE]},
    ),
    "text": (
        [
            node("ReduceMean", "input two", "columns", keepdims=0),
            node("Transpose", "columns", "positions", perm=[0, 2, 1]),
        ],
        {"two": np.array([2])},
        {"positions": ["B", SIZE[1], 3]},
    ),
    "detection": (
        [
            *POOLED,
            node("Unsqueeze", "colour one", "each"),
            node("Mul", "each strength", "scores"),
            node("Mul", "colour none", "nothing"),
            node("ReduceSum", "nothing one", "zero", keepdims=1),
            node("Unsqueeze", "zero one", "zeros"),
            node("Add", "zeros places", "boxes"),
        ],
        {
            "one": np.array([1]),
            "none": np.array(0.0, np.float32),
            "strength": np.array([[[1.0], [0.9], [0.7]]], np.float32),
            "places": BOXES[None],
        },
        {"boxes": ["B", 3, 4], "scores": ["B", 3, 3]},
    ),
    "other": ([node("Neg", "input", "negative")], {}, {"negative": ["B", 3, *SIZE]}),
}
OPTIONS: dict[str, Mapping[str, Any]] = {"text": {"characters": "gb", "decoder": "ctc", "blank": 0}}
RESIZE: dict[str, Any] = {"segmentation": "letterbox", "detection": "letterbox", "depth": "crop"}


def network(path: Path, task: str) -> Path:
    """Write the network of a task: images [B, 3, 16, 24] of 0 to 1 in, the task's outputs out."""
    nodes, constants, outputs = GRAPHS[task]
    graph = helper.make_graph(
        nodes,
        task,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["B", 3, *SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def task_bundle(
    folder: Path, task: str, engine_bytes: bytes = b"", *, beside: Mapping[str, bytes] | None = None, **changes: Any
) -> Path:
    """Write ``TASK.resvit``, signed by ``test_signing.KEY``, and ``release.pub``; ``changes`` of the manifest.

    ``engine_bytes`` are the engine, where the manifest is changed to have one, and ``beside`` are more files.
    """
    model = network(folder / f"{task}.onnx", task)
    images = np.random.default_rng(0).random((4, 3, *SIZE)).astype(np.float32)
    with open_onnx(model) as runner:
        outputs = runner({"input": images})
    files: dict[str, Any] = {"model.onnx": model}
    names = {name: f"golden_output{f'_{at}' if at else ''}.npy" for at, name in enumerate(outputs)}
    for name, array in {"golden_input.npy": images, **{file: outputs[name] for name, file in names.items()}}.items():
        np.save(folder / f"{task}-{name}", array)
        files[name] = folder / f"{task}-{name}"
    files |= {**(beside or {}), **({"engine.plan": engine_bytes} if engine_bytes else {})}
    verdict = ManifestVerdict("accepted", "as before", task, NAMES, ImageCount(4, "0"))
    settings: dict[str, Any] = {
        "name": f"net-{task}",
        "target": find_target("l4"),
        "input": IoTensor("input", ("B", 3, *SIZE), "float32"),
        "outputs": tuple(IoTensor(name, tuple(shape), "float32") for name, shape in GRAPHS[task][2].items()),
        "golden": GoldenFiles(outputs=names if len(names) > 1 else {}),
        "verdict": verdict,
        "answers": {"options": dict(OPTIONS.get(task, {})), "classes": 3, "class_ids": []},
        "preprocess": PicturePreprocess(
            SIZE, resize=RESIZE.get(task, "stretch"), interpolation="bilinear", padding="centre"
        ).to_json(),
        **changes,
    }
    write_bundle(folder / f"{task}.resvit", Manifest(**settings), files, KEY)
    (folder / "release.pub").write_text(KEY.public.to_text())
    (folder / "release.pub").chmod(0o644)
    return folder / f"{task}.resvit"


def coloured(height: int, width: int, colour: int) -> np.ndarray:
    """A frame uint8 [H, W, 3] of one of ``NAMES``."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, :, colour] = 255
    return frame
