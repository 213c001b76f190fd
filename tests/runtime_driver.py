"""The C++ runtime, compiled with sanitizers over stand-ins for TensorRT and CUDA, and driven a line at a time.

The same small engines run behind Python's stand-ins, so that both sides' answers can be compared byte for byte.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from cuda_standin import FakeCuda, FakeTensorRT
from resvit_engines.program.answers import (
    Answer,
    Classification,
    Depths,
    Detections,
    Embedding,
    Line,
    Mask,
    Outputs,
)

SOURCE = ROOT / "tests/runtime_library"
NEEDED = ("/usr/include/nlohmann/json.hpp", "/usr/include/openssl/evp.h")
SANITIZERS = {"address": "address,undefined", "thread": "thread"}


def compiled(folder: Path, sanitizer: str) -> Path:
    """Build everything with CMake; returns the folder of the programs."""
    missing = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    missing += [header for header in NEEDED if not Path(header).exists()]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: sudo apt-get install g++ cmake libssl-dev nlohmann-json3-dev")
    flags = f"-O1 -g1 -fsanitize={SANITIZERS[sanitizer]} -fno-sanitize-recover=all"
    for line in (
        ["cmake", "-S", SOURCE, "-B", folder, "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}"],
        ["cmake", "--build", folder, "-j2"],
    ):
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


class Harness:
    """What ``harness`` says to lines; a sanitizer's report, a leak among it, fails the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, lines: Sequence[str], **environment: str) -> list[str]:
        said = subprocess.run(
            [self.folder / "harness"],
            input="\n".join(lines),
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        assert said.returncode == 0, said.stderr[-6000:]
        answers = said.stdout.splitlines()
        assert len(answers) == len(lines), answers
        return answers

    def computed(self, scratch: Path, plan: Path, output: str, images: np.ndarray, like: np.ndarray) -> np.ndarray:
        """What the stand-in's engine makes of ``images``, as an array ``like`` this."""
        (scratch / "in.bin").write_bytes(images.tobytes())
        sizes = " ".join(map(str, images.shape))
        self([f"compute {plan} {output} {scratch / 'in.bin'} {scratch / 'out.bin'} {like.nbytes} {sizes}"])
        return np.frombuffer((scratch / "out.bin").read_bytes(), like.dtype).reshape(like.shape)


def written(answers: Sequence[Answer]) -> bytes:
    """Answers as ``harness`` writes them."""
    return b"".join(map(_written, answers))


def _written(answer: Answer) -> bytes:
    if isinstance(answer, Classification):
        top = "".join(f"{one.number} {one.name}\n" for one in answer.top(3))
        return b"classification %d\n" % len(answer.probabilities) + answer.probabilities.tobytes() + top.encode()
    if isinstance(answer, Detections):
        lines = [
            np.array([*box, score], np.float32).tobytes() + f"{number} {answer.names[int(number)]}\n".encode()
            for box, score, number in zip(answer.boxes, answer.scores, answer.classes, strict=True)
        ]
        return b"detections %d\n" % len(lines) + b"".join(lines)
    if isinstance(answer, Mask):
        return b"mask %d %d\n" % answer.classes.shape + answer.classes.tobytes()
    if isinstance(answer, Depths):
        return b"depths %d %d\n" % answer.depths.shape + answer.depths.tobytes()
    if isinstance(answer, Line):
        return f"line\n{answer.text}\n".encode()
    if isinstance(answer, Embedding):
        return b"embedding %d\n" % len(answer.vector) + answer.vector.tobytes()
    assert isinstance(answer, Outputs)
    return b"".join(
        f"output {' '.join(map(str, (name, value.dtype.name, *value.shape)))}\n".encode() + value.tobytes()
        for name, value in answer.arrays.items()
    )


class Tensor:
    """A line of a plan; see ``nvinfer.cpp``."""

    def __init__(self, line: str) -> None:
        self.kind, self.name, self.type, *words = line.split()
        self.sizes, self.least, self.most = [], [], []
        place = self.sizes
        for word in words if self.kind == "input" else words[4:]:
            place = {"min": self.least, "max": self.most}.get(word, place)
            if word not in ("min", "max"):
                place.append(int(word))

    def shape_for(self, image: Sequence[int]) -> tuple[int, ...]:
        return tuple(size if size >= 0 else image[{-1: 0, -2: 2, -3: 3}[size]] for size in self.sizes)


class PlanEngine:
    """The stand-in's engine for Python: what ``cuda_standin.FakeEngine`` is, with the tensors of a plan."""

    def __init__(self, cuda: FakeCuda, harness: Harness, plan: Path) -> None:
        self.cuda, self.harness, self.plan = cuda, harness, plan
        self.tensors = [Tensor(line) for line in plan.read_text().splitlines()[1:]]
        self.num_io_tensors = len(self.tensors)

    def named(self, name: str) -> Tensor:
        return next(one for one in self.tensors if one.name == name)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        modes = FakeTensorRT.TensorIOMode
        return modes.INPUT if self.named(name).kind == "input" else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(max(size, -1) for size in self.named(name).sizes)

    def get_tensor_dtype(self, name: str) -> Any:
        types = {"float32": "FLOAT", "float16": "HALF"}
        return SimpleNamespace(name=types.get(self.named(name).type, self.named(name).type.upper()))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        one = self.named(name)
        return [tuple(one.least), tuple(one.most), tuple(one.most)]

    def create_execution_context(self) -> PlanContext:
        return PlanContext(self)


class PlanContext:
    """Computes by ``standin_compute``, as the C++ side's."""

    def __init__(self, engine: PlanEngine) -> None:
        self.engine = engine
        self.image = engine.tensors[0]
        self.shape = tuple(self.image.sizes)
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self.shape = tuple(shape)
        return all(
            low <= size <= high for low, size, high in zip(self.image.least, shape, self.image.most, strict=True)
        )

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name == self.image.name else self.engine.named(name).shape_for(self.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shape, addresses = self.shape, dict(self.addresses)

        def work() -> None:
            kind = np.dtype(self.image.type)
            source = ctypes.string_at(
                self.engine.cuda.memory(addresses[self.image.name]), math.prod(shape) * kind.itemsize
            )
            images = np.frombuffer(source, kind).reshape(shape)
            for one in self.engine.tensors[1:]:
                like = np.empty(one.shape_for(shape), one.type)
                made = self.engine.harness.computed(self.engine.plan.parent, self.engine.plan, one.name, images, like)
                ctypes.memmove(self.engine.cuda.memory(addresses[one.name]), made.ctypes.data, made.nbytes)

        self.engine.cuda.run(stream, work)
        return True
